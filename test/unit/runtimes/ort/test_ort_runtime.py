"""
R-3: OnnxTrtEpRuntime, one test or more for each AC and Risk line.

AC-5 is the chain's to prove; the rest of R-1 and AC-7 is in the conformance suite. What needs a GPU
provider runs against FakeOnnxRuntimeThisMachineHasNoCuda, everything else on the real ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.errors import (
    C7Error,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    GpuUnavailableError,
    InferenceError,
    RuntimeUnavailableError,
)
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.gpu import cuda as cuda_module
from gps_denied_c7.runtimes.ort import providers as ort_providers
from gps_denied_c7.runtimes.ort.runtime import OnnxTrtEpRuntime
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineCacheEntry, ProviderSet
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.worker.protocol import ErrorReport
from support.engine_files import HOST, PLAN, write_engine
from support.fake_onnxruntime import CPU, CUDA, TENSORRT
from support.onnx_models import (
    INPUTS,
    OUTPUTS,
    SHAPE,
    arithmetic,
    bare_bundle,
    bundle_around,
    model_of,
    write_model,
)
from support.ort_sessions import (
    BUILD,
    NAMES,
    TENSORRT_OPTIONS,
    FakeGpu,
    cache_of,
    load,
    providers_asked,
    refusal,
)

pytestmark = pytest.mark.filterwarnings('ignore:Specified provider')


@pytest.mark.parametrize('provider', [TENSORRT, CUDA, CPU])
def test_ac1_label_is_the_strategys_whatever_provider_is_active(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, provider: str
) -> None:
    fake_gpu(silent=tuple({TENSORRT, CUDA, CPU}.difference({provider, CPU})))
    runtime, handle = load(config, bare_bundle(tmp_path))
    assert handle.facts.active_provider == provider
    assert runtime.current_runtime_label() == 'onnx_trt_ep'


def test_ac2_onnx_asks_for_tensorrt_cuda_and_cpu_past_the_gate(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_gpu()

    def admit(*_: object, **__: object) -> None:
        raise AssertionError('an .onnx went through the gate')

    monkeypatch.setattr(EngineGate, 'admit', admit)
    _, handle = load(config, bare_bundle(tmp_path), gate=EngineGate(HOST))
    assert [attempt['providers'] for attempt in fake.attempts] == [[TENSORRT, CUDA, CPU]]
    assert handle.facts.requested_providers == (TENSORRT, CUDA, CPU)
    assert handle.facts.active_provider == TENSORRT


@pytest.mark.parametrize('providers', [ProviderSet.ANY, ProviderSet.GPU])
def test_ac2_tensorrt_is_not_asked_for_where_it_would_have_to_build(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, providers: ProviderSet
) -> None:
    fake = fake_gpu()
    _, handle = load(config, bare_bundle(tmp_path), providers, BuildConfig(allow_build=False))
    assert [attempt['providers'] for attempt in fake.attempts] == [[CUDA, CPU]]
    assert any(TENSORRT in note for note in handle.facts.notes)
    assert not config.ort_trt_cache_dir.exists()


def test_ac2_one_warm_up_run_then_the_comparison_of_bound_with_plain_runs(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_arrays: dict[str, NDArray]
) -> None:
    runs: list[str] = []
    session = onnxruntime.InferenceSession

    def count(kind: str, method: str) -> None:
        run = getattr(session, method)
        monkeypatch.setattr(session, method, lambda *given: (runs.append(kind), run(*given))[1])

    count('plain', 'run')
    count('bound', 'run_with_iobinding')
    runtime, handle = load(config, bare_bundle(tmp_path))
    compared = (len(runs) - 1) // 2
    assert compared >= 3 and runs == ['bound', *['plain', 'bound'] * compared]
    runtime.infer(handle, request_arrays)
    assert runs[1 + 2 * compared :] == ['bound']


def test_ac2_session_is_made_from_the_bytes_that_were_hashed(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu
) -> None:
    fake = fake_gpu()
    model = bare_bundle(tmp_path)
    load(config, model)
    source = fake.attempts[0]['source']
    assert isinstance(source, bytes)
    assert hashlib.sha256(source).hexdigest() == model.artefacts[0].sha256


def test_ac2_silent_retry_of_onnxruntime_is_off(config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu) -> None:
    fake = fake_gpu(raises={TENSORRT: 'libnvinfer.so.10: cannot open shared object file'})
    load(config, bare_bundle(tmp_path))
    assert len(fake.attempts) == 2
    assert all(attempt['enable_fallback'] == 0 for attempt in fake.attempts)


@pytest.fixture
def no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every import of onnxruntime fail, so that a test sees also one that touches nothing in it."""
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)


@pytest.mark.parametrize('change', [{'sm': 90}, {'gpu': 'NVIDIA H200'}, {'engine_sha256': '0' * 64}])
@pytest.mark.usefixtures('no_onnxruntime')
def test_ac3_refused_engine_never_touches_onnxruntime(
    config: C7InferenceConfig, tmp_path: Path, change: dict[str, object]
) -> None:
    error = refusal(config, write_engine(tmp_path, **change), ProviderSet.GPU, gate=EngineGate(HOST))
    assert isinstance(error, EngineSchemaMismatchError)
    assert error.field == next(iter(change))


def test_ac3_engine_is_held_to_the_bundles_digest(config: C7InferenceConfig, tmp_path: Path) -> None:
    runtime = OnnxTrtEpRuntime(config, gate=EngineGate(HOST))
    entry = replace(runtime.compile_engine(write_engine(tmp_path), BUILD), sha256='1' * 64)
    with pytest.raises(EngineSchemaMismatchError, match='engine_sha256'):
        runtime.deserialize_engine(entry)


@pytest.mark.usefixtures('no_onnxruntime')
def test_ac3_engine_without_a_gate_is_refused(config: C7InferenceConfig, tmp_path: Path) -> None:
    entry = OnnxTrtEpRuntime(config, gate=EngineGate(HOST)).compile_engine(write_engine(tmp_path), BUILD)
    with pytest.raises(EngineDeserializeError, match='without an engine gate') as caught:
        OnnxTrtEpRuntime(config).deserialize_engine(entry)
    assert caught.value.remedy


@pytest.mark.usefixtures('no_onnxruntime')
def test_ac3_engine_is_refused_on_the_cpu(config: C7InferenceConfig, tmp_path: Path) -> None:
    model = write_engine(tmp_path)
    runtime = OnnxTrtEpRuntime(config, gate=EngineGate(HOST), providers=ProviderSet.CPU)
    with pytest.raises(RuntimeUnavailableError):
        runtime.compile_engine(model, BUILD)
    entry = OnnxTrtEpRuntime(config, gate=EngineGate(HOST)).compile_engine(model, BUILD)
    with pytest.raises(EngineDeserializeError, match='GPU'):
        runtime.deserialize_engine(entry)


def test_g4_admitted_engine_reaches_onnxruntime_inside_an_epcontext_model(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, request_arrays: dict[str, NDArray]
) -> None:
    fake = fake_gpu(available=(TENSORRT, CUDA, CPU))
    runtime, handle = load(config, write_engine(tmp_path), ProviderSet.GPU, gate=EngineGate(HOST))
    model = onnx.load_model_from_string(fake.attempts[0]['source'])
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert (node.op_type, node.domain) == ('EPContext', 'com.microsoft')
    assert attributes['embed_mode'] == 1
    assert attributes['ep_cache_context'] == PLAN
    assert attributes['source'] == b'TensorrtExecutionProvider'
    assert [attempt['providers'] for attempt in fake.attempts] == [[TENSORRT]]
    assert (handle.inputs, handle.outputs) == (INPUTS, OUTPUTS)
    assert handle.facts.active_provider == TENSORRT
    assert list(runtime.infer(handle, request_arrays)) == ['total', 'ratio']


@pytest.mark.parametrize('providers', [ProviderSet.ANY, ProviderSet.GPU])
@pytest.mark.parametrize(
    'behaviour', [{'available': (CUDA, CPU)}, {'silent': (TENSORRT,)}, {'raises': {TENSORRT: 'x'}}]
)
def test_g4_engine_without_the_tensorrt_provider_is_refused(
    config: C7InferenceConfig,
    tmp_path: Path,
    fake_gpu: FakeGpu,
    providers: ProviderSet,
    behaviour: dict[str, object],
) -> None:
    fake = fake_gpu(**behaviour)
    error = refusal(config, write_engine(tmp_path), providers, gate=EngineGate(HOST))
    assert isinstance(error, RuntimeUnavailableError if 'available' in behaviour else EngineDeserializeError)
    assert fake.runs == 0


def test_ac4_named_inputs_and_outputs_round_trip(
    config: C7InferenceConfig, tmp_path: Path, request_arrays: dict[str, NDArray]
) -> None:
    path = write_model(tmp_path / 'renamed.onnx', arithmetic(NAMES))
    model = bundle_around(path, 'onnx_trt_ep', io_names={own: name for name, own in NAMES.items()})
    runtime, handle = load(config, model)
    assert (handle.inputs, handle.outputs) == (INPUTS, OUTPUTS)
    outputs = runtime.infer(handle, request_arrays)
    np.testing.assert_allclose(outputs['total'], request_arrays['left'] + request_arrays['right'])
    np.testing.assert_allclose(outputs['ratio'], request_arrays['left'] / request_arrays['right'])


def test_ac4_canonical_order_is_the_bundles(
    config: C7InferenceConfig, tmp_path: Path, request_arrays: dict[str, NDArray]
) -> None:
    path = write_model(tmp_path / 'arithmetic.onnx', arithmetic())
    model = bundle_around(path, 'onnx_trt_ep', inputs=INPUTS[::-1], outputs=OUTPUTS[::-1])
    runtime, handle = load(config, model)
    assert [spec.name for spec in handle.inputs] == ['right', 'left']
    assert list(runtime.infer(handle, request_arrays)) == ['ratio', 'total']


def test_ac4_outputs_that_the_bundle_does_not_name_are_left_out(
    config: C7InferenceConfig, tmp_path: Path, request_arrays: dict[str, NDArray]
) -> None:
    path = write_model(tmp_path / 'arithmetic.onnx', arithmetic())
    runtime, handle = load(config, bundle_around(path, 'onnx_trt_ep', outputs=OUTPUTS[1:]))
    assert handle.outputs == OUTPUTS[1:]
    assert list(runtime.infer(handle, request_arrays)) == ['ratio']


def test_ac4_bare_onnx_names_its_own_tensors(config: C7InferenceConfig, tmp_path: Path) -> None:
    _, handle = load(config, bare_bundle(tmp_path, arithmetic(NAMES, dtype=TensorProto.FLOAT16)))
    assert handle.inputs == tuple(TensorSpec(NAMES[spec.name], 'float16', SHAPE) for spec in INPUTS)
    assert handle.outputs == tuple(TensorSpec(NAMES[spec.name], 'float16', SHAPE) for spec in OUTPUTS)


TRT_REFUSALS = [
    {'raises': {TENSORRT: 'libnvinfer.so.10: cannot open shared object file'}},
    {'available': (CUDA, CPU)},
    {'silent': (TENSORRT,)},
]


@pytest.mark.parametrize('behaviour', TRT_REFUSALS)
@pytest.mark.parametrize('providers', [ProviderSet.ANY, ProviderSet.GPU])
def test_ac6_tensorrt_refused_gives_cuda_and_an_info_line_that_names_it(
    config: C7InferenceConfig,
    tmp_path: Path,
    fake_gpu: FakeGpu,
    caplog: pytest.LogCaptureFixture,
    behaviour: dict[str, object],
    providers: ProviderSet,
) -> None:
    fake_gpu(**behaviour)
    caplog.set_level(logging.INFO)
    _, handle = load(config, bare_bundle(tmp_path), providers)
    assert handle.facts.active_provider == CUDA
    assert handle.facts.requested_providers == (TENSORRT, CUDA, CPU)
    assert not handle.facts.cpu_only
    assert any(TENSORRT in note for note in handle.facts.notes)
    lines = [record for record in caplog.records if CUDA in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.INFO]


def test_ac6_retry_keeps_our_options(config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu) -> None:
    fake = fake_gpu(raises={TENSORRT: 'no libnvinfer'})
    load(config, bare_bundle(tmp_path))
    first, second = fake.attempts
    assert second['providers'] == [CUDA, CPU]
    assert second['options'][CUDA] == first['options'][CUDA]
    assert first['options'][CUDA]['gpu_mem_limit'] == config.gpu_memory_budget_bytes
    assert first['options'][CUDA]['cudnn_conv_use_max_workspace'] == '0', 'memory that no budget knows of'
    assert second['session_options'] is not first['session_options']
    for attempt in fake.attempts:
        assert attempt['session_options'].intra_op_num_threads == 1


def test_ac6_no_info_line_while_tensorrt_is_active(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    fake_gpu()
    caplog.set_level(logging.INFO)
    load(config, bare_bundle(tmp_path))
    assert not [record for record in caplog.records if CUDA in record.getMessage()]


def test_ac8_tensorrt_option_dict(config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu) -> None:
    fake = named_gpu()
    model = bare_bundle(tmp_path)
    load(config, model)
    options = fake.attempts[0]['options'][TENSORRT]
    assert options == {
        'trt_engine_cache_enable': True,
        'trt_engine_cache_path': str(config.ort_trt_cache_dir / model.artefacts[0].sha256),
        'trt_max_workspace_size': config.gpu_memory_budget_bytes // 4,
        'trt_fp16_enable': True,
    }
    assert Path(options['trt_engine_cache_path']).is_dir()


def test_ac8_precision_is_the_one_asked_for(config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu) -> None:
    fake = fake_gpu()
    load(config, bare_bundle(tmp_path), build=BuildConfig(allow_build=True, precision='fp32'))
    assert fake.attempts[0]['options'][TENSORRT]['trt_fp16_enable'] is False


def test_ac8_models_that_differ_in_weights_alone_do_not_share_a_cache(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu
) -> None:
    fake = fake_gpu()
    for producer in ('one', 'other'):
        load(config, bare_bundle(tmp_path, arithmetic(producer=producer)))
    paths = {attempt['options'][TENSORRT]['trt_engine_cache_path'] for attempt in fake.attempts}
    assert len(paths) == 2
    assert {Path(path).parent for path in paths} == {config.ort_trt_cache_dir}


def test_ac8_cache_that_cannot_be_made_is_done_without(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    fake = named_gpu()
    config.ort_trt_cache_dir.write_text('a file in the way')
    (tmp_path / 'xdg').write_text('another')
    _, handle = load(config, bare_bundle(tmp_path))
    assert handle.facts.active_provider == TENSORRT
    assert set(fake.attempts[0]['options'][TENSORRT]) == TENSORRT_OPTIONS
    assert fake.attempts[0]['options'][TENSORRT]['trt_engine_cache_enable'] is False
    for place in (config.ort_trt_cache_dir, tmp_path / 'xdg'):
        assert any(str(place) in note for note in handle.facts.notes)
        assert any(str(place) in record.getMessage() for record in caplog.records)


def test_ac8_cache_that_cannot_be_made_moves_to_the_users_own_with_a_warning(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    fake = named_gpu(placement={TENSORRT: 2})
    config.ort_trt_cache_dir.write_text('a file in the way')
    model = bare_bundle(tmp_path)
    load(config, model)
    options = fake.attempts[0]['options'][TENSORRT]
    assert options['trt_engine_cache_enable'] is True
    assert Path(options['trt_engine_cache_path']).is_relative_to(tmp_path / 'xdg' / 'gps-denied')
    warnings = [record for record in caplog.records if str(config.ort_trt_cache_dir) in record.getMessage()]
    assert [record.levelno for record in warnings] == [logging.WARNING]
    load(config, model, build=BuildConfig())
    assert len(fake.builds) == 1


def test_risk2_cpu_session_is_reported_not_refused(
    config: C7InferenceConfig, tmp_path: Path, request_arrays: dict[str, NDArray]
) -> None:
    runtime, handle = load(config, bare_bundle(tmp_path))
    assert handle.facts.cpu_only
    assert handle.facts.active_provider == CPU
    assert handle.facts.requested_providers == (TENSORRT, CUDA, CPU)
    assert any(CUDA in note for note in handle.facts.notes)
    assert runtime.infer(handle, request_arrays)


def test_risk2_cpu_set_asks_for_the_cpu_alone(config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu) -> None:
    fake = fake_gpu()
    _, handle = load(config, bare_bundle(tmp_path), ProviderSet.CPU)
    assert [attempt['providers'] for attempt in fake.attempts] == [[CPU]]
    assert handle.facts.requested_providers == (CPU,)
    assert handle.facts.cpu_only
    assert handle.facts.notes == ()


GPU_REFUSALS = [
    {'available': (CPU,)},
    {'available': ('AzureExecutionProvider', CPU)},
    {'silent': (TENSORRT, CUDA)},
    {'raises': {TENSORRT: 'no libnvinfer', CUDA: 'no libcudart'}},
    {'placement': {CPU: 2}},
]


@pytest.mark.parametrize('behaviour', GPU_REFUSALS)
@pytest.mark.parametrize('build', [BUILD, BuildConfig()])
def test_risk2_gpu_set_refuses_what_came_up_on_the_cpu_before_a_run(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, behaviour: dict[str, object], build: BuildConfig
) -> None:
    fake = fake_gpu(**behaviour)
    error = refusal(config, bare_bundle(tmp_path), ProviderSet.GPU, build)
    # What this build of ONNX Runtime lacks, no later attempt finds; anything else may be there next time.
    assert isinstance(error, RuntimeUnavailableError if 'available' in behaviour else EngineDeserializeError)
    assert fake.runs == 0


@pytest.mark.parametrize('behaviour', GPU_REFUSALS)
@pytest.mark.parametrize('providers', list(ProviderSet))
def test_risk2_disallowed_cpu_is_refused_before_any_cpu_work(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, behaviour: dict[str, object], providers: ProviderSet
) -> None:
    fake = fake_gpu(**behaviour)
    error = refusal(replace(config, ort_disallow_cpu_fallback=True), bare_bundle(tmp_path), providers)
    assert isinstance(error, EngineDeserializeError)
    assert 'ort_disallow_cpu_fallback' in str(error)
    assert fake.runs == 0
    if 'available' in behaviour or providers is ProviderSet.CPU:
        assert fake.attempts == []
    assert [CPU] not in [attempt['providers'] for attempt in fake.attempts]


@pytest.mark.parametrize('providers', list(ProviderSet))
def test_risk2_disallowed_cpu_is_refused_by_the_real_onnxruntime_without_a_session(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, providers: ProviderSet
) -> None:
    def session(*_: object, **__: object) -> None:
        raise AssertionError('a session was made')

    model = bare_bundle(tmp_path)
    monkeypatch.setattr(onnxruntime.InferenceSession, '__init__', session)
    error = refusal(replace(config, ort_disallow_cpu_fallback=True), model, providers)
    assert 'ort_disallow_cpu_fallback' in str(error)


def test_risk2_disallowed_cpu_does_not_refuse_a_gpu(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu
) -> None:
    fake_gpu()
    _, handle = load(replace(config, ort_disallow_cpu_fallback=True), bare_bundle(tmp_path))
    assert handle.facts.active_provider == TENSORRT


@pytest.mark.parametrize('behaviour', GPU_REFUSALS)
def test_risk2_any_set_keeps_flying_on_the_cpu(
    config: C7InferenceConfig,
    tmp_path: Path,
    fake_gpu: FakeGpu,
    behaviour: dict[str, object],
    request_arrays: dict[str, NDArray],
) -> None:
    fake_gpu(**behaviour)
    runtime, handle = load(config, bare_bundle(tmp_path))
    assert handle.facts.cpu_only
    assert handle.facts.active_provider == CPU
    assert runtime.infer(handle, request_arrays)


def test_risk2_partly_placed_graph_is_reported(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    fake_gpu(placement={TENSORRT: 30, CUDA: 5, CPU: 7})
    _, handle = load(config, bare_bundle(tmp_path), ProviderSet.GPU)
    assert handle.facts.active_provider == TENSORRT
    assert handle.facts.cpu_nodes == 7
    assert not handle.facts.cpu_only
    assert any('7 of 42' in note for note in handle.facts.notes)
    assert any(record.levelno == logging.WARNING and '7 of 42' in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ('placement', 'active', 'cpu_nodes'),
    [({CUDA: 2}, CUDA, 0), (None, TENSORRT, None)],
    ids=['as reported', 'unknown before ONNX Runtime 1.24'],
)
def test_risk2_active_provider_is_the_one_that_holds_the_graph(
    config: C7InferenceConfig,
    tmp_path: Path,
    fake_gpu: FakeGpu,
    placement: dict[str, int] | None,
    active: str,
    cpu_nodes: int | None,
) -> None:
    fake_gpu(placement=placement)
    _, handle = load(config, bare_bundle(tmp_path), ProviderSet.GPU)
    assert (handle.facts.active_provider, handle.facts.cpu_nodes) == (active, cpu_nodes)


@pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, 'get_provider_graph_assignment_info'),
    reason=f'onnxruntime {onnxruntime.__version__} cannot tell where nodes run (1.24 and later can)',
)
def test_risk2_placement_is_read_from_the_real_onnxruntime(config: C7InferenceConfig, tmp_path: Path) -> None:
    _, handle = load(config, bare_bundle(tmp_path), ProviderSet.CPU)
    assert handle.facts.cpu_nodes == 2


@pytest.mark.parametrize(('cpu_threads', 'expected'), [(3, 3), (0, max(1, len(os.sched_getaffinity(0)) - 1))])
def test_session_leaves_a_core_to_the_drone(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, cpu_threads: int, expected: int
) -> None:
    fake = fake_gpu(placement={TENSORRT: 2})
    load(replace(config, cpu_threads=cpu_threads), bare_bundle(tmp_path))
    options = fake.attempts[0]['session_options']
    assert options.intra_op_num_threads == expected
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry('session.intra_op.allow_spinning') == '0'
    # test_differential shows on ONNX Runtime up to 1.18 what this costs otherwise.
    assert not options.enable_mem_pattern
    assert options.get_session_config_entry('session.record_ep_graph_assignment_info') == '1'


def test_r1_vendor_error_of_a_request_is_the_cause(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, request_arrays: dict[str, NDArray]
) -> None:
    fake = fake_gpu()
    runtime, handle = load(config, bare_bundle(tmp_path))
    fake.behaviour.run_raises = RuntimeError('CUDA error 700')
    with pytest.raises(InferenceError, match='CUDA error 700') as caught:
        runtime.infer(handle, request_arrays)
    assert caught.value.__cause__ is fake.behaviour.run_raises
    assert caught.value.remedy


def test_r1_vendor_error_of_the_warm_up_run_refuses_the_engine(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu
) -> None:
    fake = fake_gpu(run_raises=RuntimeError('CUDA error 2: out of memory'))
    error = refusal(config, bare_bundle(tmp_path))
    assert isinstance(error, EngineDeserializeError)
    assert error.__cause__ is fake.behaviour.run_raises


def test_r1_vendor_error_while_the_session_is_looked_at_is_the_cause(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fake_gpu()

    def get_inputs(_: object) -> None:
        raise RuntimeError('no metadata')

    monkeypatch.setattr(fake.InferenceSession, 'get_inputs', get_inputs)
    error = refusal(config, bare_bundle(tmp_path))
    assert isinstance(error, EngineDeserializeError)
    assert isinstance(error.__cause__, RuntimeError)


@pytest.mark.parametrize('content', [b'', b'\x3a', bytes(range(256)), b'# no model\n'])
def test_r1_damaged_model_never_reaches_onnxruntime(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    path = tmp_path / 'damaged.onnx'
    path.write_bytes(content)
    error = refusal(config, ModelBundle.load(path))
    assert 'no graph' in error.message or 'no ONNX model' in error.message


NODES = {
    'unknown operator': [helper.make_node('Foo', ['x'], ['y'])],
    'operator of an unknown domain': [helper.make_node('Foo', ['x'], ['y'], domain='a.b')],
    'input that is not there': [helper.make_node('Identity', ['q'], ['y'])],
    'too few inputs': [helper.make_node('Add', ['x'], ['y'])],
    'circle': [helper.make_node('Add', ['y', 'x'], ['z']), helper.make_node('Identity', ['z'], ['y'])],
    'wrong attribute': [helper.make_node('Transpose', ['x'], ['y'], perm=[0, 5])],
}


@pytest.mark.parametrize('kind', NODES)
def test_n2_a_model_that_onnxruntime_refuses_for_what_it_says_waits_for_its_file_to_change(
    config: C7InferenceConfig, tmp_path: Path, kind: str
) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in 'xy')
    opsets = [helper.make_opsetid('', 17), helper.make_opsetid('a.b', 1)]
    model = helper.make_model(helper.make_graph(NODES[kind], 'net', [x], [y]), opset_imports=opsets, ir_version=8)
    (tmp_path / 'net.onnx').write_bytes(model.SerializeToString())
    error = refusal(config, ModelBundle.load(tmp_path / 'net.onnx'), ProviderSet.CPU)
    assert 'ONNX Runtime refused' in error.message
    assert error.lasting and ErrorReport.of(error).error().lasting


@pytest.mark.parametrize(
    'cause',
    [
        onnxruntime.capi.onnxruntime_pybind11_state.Fail('FAIL : Exception during loading: std::bad_alloc'),
        onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException('pthread_create failed, error code: 11'),
        MemoryError('std::bad_alloc'),
    ],
)
def test_n2_a_model_that_onnxruntime_has_no_memory_or_thread_for_is_tried_again(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    def session(*_: object, **__: object) -> None:
        raise cause

    bundle = bare_bundle(tmp_path)
    # A machine that is short of either is no place for the other tests.
    monkeypatch.setattr(onnxruntime.InferenceSession, '__init__', session)
    error = refusal(config, bundle, ProviderSet.CPU)
    assert 'ONNX Runtime refused' in error.message and not error.lasting


def test_r3_neither_model_nor_engine_is_refused_unread(config: C7InferenceConfig, tmp_path: Path) -> None:
    entry = EngineCacheEntry(tmp_path / 'model.pt2', None, bare_bundle(tmp_path))
    with pytest.raises(EngineDeserializeError, match='neither .onnx nor .engine'):
        OnnxTrtEpRuntime(config).deserialize_engine(entry)


def test_r1_model_that_onnxruntime_refuses_keeps_its_error_as_the_cause(
    config: C7InferenceConfig, tmp_path: Path
) -> None:
    value = helper.make_tensor_value_info
    unknown = model_of(
        [helper.make_node('Teleport', ['x'], ['y'], domain='elsewhere')],
        [value('x', TensorProto.FLOAT, [1])],
        [value('y', TensorProto.FLOAT, [1])],
    )
    error = refusal(config, bare_bundle(tmp_path, unknown))
    assert error.__cause__ is not None
    assert type(error.__cause__).__module__.startswith('onnxruntime')


def test_r1_onnxruntime_that_does_not_import_is_unavailable(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bare_bundle(tmp_path)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(RuntimeUnavailableError, match='requirements/runtime.txt') as caught:
        load(config, model)
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize(
    ('bare', 'shape', 'axes'),
    [(False, ('batch', 'rows', 4), {'batch': 1, 'rows': 3}), (True, ('batch', 3, 4), {'batch': 1})],
    ids=['to the sizes of the bundle', 'a batch of one for a bare model'],
)
def test_f5_named_free_axes_are_fixed_before_the_session_is_made(
    config: C7InferenceConfig,
    tmp_path: Path,
    fake_gpu: FakeGpu,
    request_arrays: dict[str, NDArray],
    bare: bool,
    shape: tuple[int | str, ...],
    axes: dict[str, int],
) -> None:
    fake = fake_gpu()
    path = write_model(tmp_path / 'free.onnx', arithmetic(shape=shape))
    runtime, handle = load(config, ModelBundle.load(path) if bare else bundle_around(path, 'onnx_trt_ep'))
    assert fake.attempts[0]['session_options'].axes == axes
    assert (handle.inputs, handle.outputs) == (INPUTS, OUTPUTS)
    assert runtime.infer(handle, request_arrays)


@pytest.mark.parametrize('batch', ['batch', None])
def test_f5_free_batch_axis_of_a_bare_model_is_one(
    config: C7InferenceConfig, tmp_path: Path, batch: str | None, request_arrays: dict[str, NDArray]
) -> None:
    runtime, handle = load(config, bare_bundle(tmp_path, arithmetic(shape=(batch, 3, 4))))
    assert handle.inputs == INPUTS
    assert runtime.infer(handle, request_arrays)
    with pytest.raises(InferenceError, match='shape'):
        runtime.infer(handle, {name: np.concatenate([array, array]) for name, array in request_arrays.items()})


def test_f5_axis_free_in_the_bundle_is_the_models(config: C7InferenceConfig, tmp_path: Path) -> None:
    path = write_model(tmp_path / 'arithmetic.onnx', arithmetic())
    free = [tuple(replace(spec, shape=(None, 3, None)) for spec in specs) for specs in (INPUTS, OUTPUTS)]
    _, handle = load(config, bundle_around(path, 'onnx_trt_ep', inputs=free[0], outputs=free[1]))
    assert (handle.inputs, handle.outputs) == (INPUTS, OUTPUTS)


@pytest.mark.parametrize('axis', ['rows', None])
def test_f5_free_axis_that_nobody_sizes_is_refused(config: C7InferenceConfig, tmp_path: Path, axis: str | None) -> None:
    error = refusal(config, bare_bundle(tmp_path, arithmetic(shape=(1, axis, 4))))
    assert '--input-size' in error.remedy


def test_f5_one_axis_name_with_two_sizes_is_refused(config: C7InferenceConfig, tmp_path: Path) -> None:
    path = write_model(tmp_path / 'free.onnx', arithmetic(shape=(1, 'rows', 4)))
    inputs = (INPUTS[0], TensorSpec('right', 'float32', (1, 5, 4)))
    error = refusal(config, bundle_around(path, 'onnx_trt_ep', inputs=inputs))
    assert isinstance(error, EngineSchemaMismatchError)
    assert 'rows' in str(error)


def test_f5_axis_that_depends_on_the_data_stays_free(config: C7InferenceConfig, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    model = model_of(
        [helper.make_node('NonZero', ['x'], ['points'])],
        [value('x', TensorProto.FLOAT, [3, 4])],
        [value('points', TensorProto.INT64, [2, 'count'])],
    )
    runtime, handle = load(config, bare_bundle(tmp_path, model))
    assert handle.outputs == (TensorSpec('points', 'int64', (2, None)),)
    assert runtime.infer(handle, {'x': np.eye(3, 4, dtype=np.float32)})['points'].shape == (2, 3)


def normalising() -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    return model_of(
        [helper.make_node('ReduceMean', ['x'], ['m'], keepdims=1), helper.make_node('Div', ['x', 'm'], ['y'])],
        [value('x', TensorProto.FLOAT, [1, 8])],
        [value('y', TensorProto.FLOAT, [1, 8])],
    )


def test_r1_network_that_divides_by_its_input_survives_the_warm_up(config: C7InferenceConfig, tmp_path: Path) -> None:
    runtime, handle = load(config, bare_bundle(tmp_path, normalising()))
    with pytest.raises(InferenceError, match='non-finite'):
        runtime.infer(handle, {'x': np.zeros((1, 8), np.float32)})


@pytest.mark.parametrize('kind', [TensorProto.UINT8, TensorProto.INT64, TensorProto.BOOL, TensorProto.DOUBLE])
def test_r1_element_types_round_trip(config: C7InferenceConfig, tmp_path: Path, kind: int) -> None:
    value = helper.make_tensor_value_info
    model = model_of(
        [helper.make_node('Reshape', ['x', 'shape'], ['y'])],
        [value('x', kind, [2, 3])],
        [value('y', kind, [6])],
        [helper.make_tensor('shape', TensorProto.INT64, [1], [6])],
    )
    runtime, handle = load(config, bare_bundle(tmp_path, model))
    x = np.array([[0, 1, 0], [1, 1, 0]], handle.inputs[0].dtype)
    np.testing.assert_array_equal(runtime.infer(handle, {'x': x})['y'], x.reshape(6))


def test_r1_element_type_that_numpy_lacks_is_refused(config: C7InferenceConfig, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    model = model_of(
        [helper.make_node('Cast', ['x'], ['y'], to=TensorProto.BFLOAT16)],
        [value('x', TensorProto.FLOAT, [1])],
        [value('y', TensorProto.BFLOAT16, [1])],
    )
    error = refusal(config, bare_bundle(tmp_path, model))
    assert 'bfloat16' in error.message
    assert 'float32' in error.remedy


def test_g1_engine_hidden_in_an_onnx_does_not_pass_by_the_gate(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = helper.make_tensor_value_info
    model = model_of(
        [helper.make_node('EPContext', ['x'], ['y'], domain='com.microsoft', embed_mode=1, ep_cache_context=PLAN)],
        [value('x', TensorProto.FLOAT, [1])],
        [value('y', TensorProto.FLOAT, [1])],
    )
    assert 'EPContext' in str(refusal(config, bare_bundle(tmp_path, model)))


def test_model_beyond_a_protobufs_size_is_refused_unread(config: C7InferenceConfig, tmp_path: Path) -> None:
    model = bare_bundle(tmp_path)
    os.truncate(model.artefacts[0].path, 1 << 31)
    assert 'external data' in refusal(config, model).remedy


def test_compile_prefers_a_model_over_an_engine_and_minds_the_device(config: C7InferenceConfig, tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    onnx_on = {
        device: bundle_around(
            write_model(tmp_path / f'{device}.onnx', arithmetic(producer=device)), 'onnx_trt_ep', device=device
        ).artefacts[0]
        for device in ('cpu', 'cuda')
    }
    model = replace(engine, artefacts=(*engine.artefacts, onnx_on['cuda'], onnx_on['cpu']))
    gate = EngineGate(HOST)

    def chosen(providers: ProviderSet, model: ModelBundle) -> str:
        return OnnxTrtEpRuntime(config, gate=gate, providers=providers).compile_engine(model, BUILD).path.name

    assert chosen(ProviderSet.CPU, model) == 'cpu.onnx'
    assert chosen(ProviderSet.GPU, model) == 'cuda.onnx'
    assert chosen(ProviderSet.GPU, engine).endswith('.engine')
    with pytest.raises(RuntimeUnavailableError):
        chosen(ProviderSet.CPU, engine)
    with pytest.raises(RuntimeUnavailableError):
        OnnxTrtEpRuntime(config).compile_engine(engine, BUILD)


@pytest.mark.parametrize(('disallow', 'error'), [(False, GpuUnavailableError), (True, EngineDeserializeError)])
def test_risk2_host_without_a_gpu_is_told_before_any_session(
    config: C7InferenceConfig,
    tmp_path: Path,
    fake_gpu: FakeGpu,
    monkeypatch: pytest.MonkeyPatch,
    disallow: bool,
    error: type[C7Error],
) -> None:
    fake = fake_gpu()
    monkeypatch.setattr(ort_providers, 'require_gpu', cuda_module.require_gpu)
    monkeypatch.setattr(cuda_module, 'gpu_devices', list)
    config = replace(config, ort_disallow_cpu_fallback=disallow)
    refused = refusal(config, bare_bundle(tmp_path), ProviderSet.GPU)
    assert type(refused) is error
    assert 'no NVIDIA GPU' in refused.message
    assert fake.attempts == []


def test_ac6_retry_of_onnxruntime_1_17_is_off_too(config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu) -> None:
    fake = fake_gpu(raises={TENSORRT: 'no libnvinfer'}, ignores_enable_fallback=True)
    _, handle = load(config, bare_bundle(tmp_path))
    assert fake.retries == 0
    assert providers_asked(fake) == [[TENSORRT, CUDA, CPU], [CUDA, CPU]]
    assert handle.facts.active_provider == CUDA


# --- where the graph landed, before ONNX Runtime 1.24 -------------------------------------------------


def test_risk2_profiled_warm_up_run_tells_where_the_graph_is(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    fake_gpu(profile={TENSORRT: 2, CUDA: 5, CPU: 1})
    _, handle = load(config, bare_bundle(tmp_path), ProviderSet.GPU)
    assert handle.facts.active_provider == TENSORRT
    assert handle.facts.cpu_nodes == 1
    assert any('1 of 8' in note for note in handle.facts.notes)
    assert not list(tmp_path.glob('c7-profile-*'))


def test_ac6_graph_that_the_warm_up_run_found_on_cuda_is_not_on_tensorrt(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    named_gpu(profile={CUDA: 2})
    caplog.set_level(logging.INFO)
    model = bare_bundle(tmp_path)
    _, handle = load(config, model, ProviderSet.GPU)
    assert handle.facts.active_provider == CUDA
    assert any(record.levelno == logging.INFO and CUDA in record.getMessage() for record in caplog.records)
    assert not cache_of(config, model).exists()


def test_risk2_graph_that_the_warm_up_run_found_on_the_cpu_is_refused(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    named_gpu(profile={CPU: 2})
    model = bare_bundle(tmp_path)
    error = refusal(config, model, ProviderSet.GPU)
    assert 'CPU alone' in str(error)
    assert not list(tmp_path.glob('c7-profile-*'))
    assert not cache_of(config, model).exists()


def test_risk2_session_without_a_gpu_is_not_profiled(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu
) -> None:
    fake = fake_gpu()
    load(config, bare_bundle(tmp_path), ProviderSet.CPU)
    assert fake.sessions[0]._profile is None


# --- bound inputs and outputs -------------------------------------------------------------------------


def identity(kind: int, shape: list[int]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    return model_of([helper.make_node('Identity', ['x'], ['y'])], [value('x', kind, shape)], [value('y', kind, shape)])


@pytest.mark.parametrize('shape', [[], [1], [0, 3], [2, 3]])
@pytest.mark.parametrize('kind', [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL, TensorProto.INT8])
def test_r1_bound_tensors_of_any_shape_round_trip(
    config: C7InferenceConfig, tmp_path: Path, kind: int, shape: list[int]
) -> None:
    runtime, handle = load(config, bare_bundle(tmp_path, identity(kind, shape)))
    for value in (1, 0, 1):
        x = np.full(shape, value, handle.inputs[0].dtype)
        x.flags.writeable = False
        np.testing.assert_array_equal(runtime.infer(handle, {'x': x})['y'], x)


def test_r1_outputs_stay_at_one_place_and_never_in_the_callers(config: C7InferenceConfig, tmp_path: Path) -> None:
    runtime, handle = load(config, bare_bundle(tmp_path, identity(TensorProto.FLOAT, [2, 3])))
    x = np.ones((2, 3), np.float32)
    first = runtime.infer(handle, {'x': x})['y']
    second = runtime.infer(handle, {'x': x * 2})['y']
    assert first.__array_interface__['data'] == second.__array_interface__['data']
    assert not np.shares_memory(first, x)
    np.testing.assert_array_equal(x, np.ones((2, 3)))


def test_r1_output_sizes_that_depend_on_the_data_follow_it(config: C7InferenceConfig, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    model = model_of(
        [helper.make_node('NonZero', ['x'], ['points']), helper.make_node('Neg', ['x'], ['negative'])],
        [value('x', TensorProto.FLOAT, [3, 4])],
        [value('points', TensorProto.INT64, [2, 'count']), value('negative', TensorProto.FLOAT, [3, 4])],
    )
    runtime, handle = load(config, bare_bundle(tmp_path, model))
    for count in (3, 0, 12, 1):
        x = np.zeros((3, 4), np.float32)
        x.reshape(-1)[:count] = 1
        outputs = runtime.infer(handle, {'x': x})
        assert outputs['points'].shape == (2, count)
        np.testing.assert_array_equal(outputs['negative'], -x)


def test_r1_input_that_the_network_ignores_is_taken(config: C7InferenceConfig, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    model = model_of(
        [helper.make_node('Neg', ['x'], ['y'])],
        [value('x', TensorProto.FLOAT, [2]), value('unused', TensorProto.FLOAT, [2])],
        [value('y', TensorProto.FLOAT, [2])],
    )
    runtime, handle = load(config, bare_bundle(tmp_path, model))
    x = np.ones(2, np.float32)
    np.testing.assert_array_equal(runtime.infer(handle, {'x': x, 'unused': x})['y'], -x)


def test_r1_requests_never_go_through_a_run_that_tries_other_providers(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_arrays: dict[str, NDArray]
) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError('session.run was called')

    monkeypatch.setattr(onnxruntime.InferenceSession, 'run', run)
    runtime, handle = load(config, bare_bundle(tmp_path))
    assert runtime.infer(handle, request_arrays)
