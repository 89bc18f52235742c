"""R-3, G-2, G-4: engines of TensorRT that ONNX Runtime is given: cached, verified, built, or left to the provider."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.ort_store import LISTING_NAME, WHOLE_ENGINE, CacheListing
from gps_denied_c7.model import onnx_file
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.ort import runtime as ort_runtime
from gps_denied_c7.runtimes.protocol import BuildConfig, BuildProgress, ProviderSet
from support.external_weights import scaled
from support.fake_onnxruntime import CPU, CUDA, TENSORRT
from support.fake_tensorrt import FakeTensorrtThisMachineCannotRun
from support.onnx_models import (
    INPUTS,
    OUTPUTS,
    arithmetic,
    bare_bundle,
    bundle_around,
    write_model,
)
from support.ort_sessions import (
    BUILD,
    NAMES,
    NO_BUILD,
    ONE_ENGINE,
    TENSORRT_OPTIONS,
    FakeGpu,
    NamedGpu,
    cache_of,
    load,
    providers_asked,
    refusal,
)

pytestmark = pytest.mark.filterwarnings('ignore:Specified provider')


def is_around_an_engine(attempt: dict[str, object]) -> bool:
    model = onnx.load_model_from_string(attempt['source'])
    return [node.op_type for node in model.graph.node] == ['EPContext']


@pytest.mark.parametrize('behaviour', [ONE_ENGINE, {'profile': {TENSORRT: 1}}, {'profile': {TENSORRT: 3, CPU: 1}}])
def test_g2_what_a_build_wrote_is_listed(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, behaviour: dict[str, object]
) -> None:
    named_gpu(**behaviour)
    model = bare_bundle(tmp_path)
    load(config, model)
    directory = cache_of(config, model)
    listing = CacheListing.from_json((directory / LISTING_NAME).read_bytes())
    assert {file.name: file.sha256 for file in listing.files} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.name != LISTING_NAME
    }
    found = listing.built_for
    assert (found.onnxruntime, found.tensorrt, found.gpu, found.sm) == ('1.17.1', '8.6.2', 'Orin', 87)
    assert (listing.whole_graph is not None) == (CPU not in behaviour.get('profile', {}))


def test_ac2_tensorrt_is_asked_for_where_its_cache_is_verified(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, request_arrays: dict[str, NDArray]
) -> None:
    fake = named_gpu()
    model = bare_bundle(tmp_path)
    load(config, model)
    fake.attempts.clear()
    runtime, handle = load(config, model, ProviderSet.GPU, NO_BUILD)
    assert providers_asked(fake) == [[TENSORRT, CUDA, CPU]]
    options = fake.attempts[0]['options'][TENSORRT]
    assert set(options) == TENSORRT_OPTIONS
    assert (options['trt_engine_cache_enable'], Path(options['trt_engine_cache_path'])) == (
        True,
        cache_of(config, model),
    )
    assert handle.facts.active_provider == TENSORRT
    assert len(fake.builds) == 1
    assert runtime.infer(handle, request_arrays)


def missing(directory: Path) -> None:
    next(directory.glob('*.profile')).unlink()


def extra(directory: Path) -> None:
    (directory / 'other.engine').write_bytes(b'ftrt')


def changed(directory: Path) -> None:
    path = next(directory.glob('*.engine'))
    path.write_bytes(path.read_bytes()[:-1] + b'?')


def unlisted(directory: Path) -> None:
    (directory / LISTING_NAME).unlink()


def relisted(directory: Path) -> None:
    path = directory / LISTING_NAME
    path.write_bytes(path.read_bytes().replace(b'"sm": 87', b'"sm": 90'))


def group_writable(directory: Path) -> None:
    directory.chmod(0o775)


def group_writable_engine(directory: Path) -> None:
    next(directory.glob('*.engine')).chmod(0o664)


def linked(directory: Path) -> None:
    path = next(directory.glob('*.engine'))
    path.rename(directory.parent / 'elsewhere')
    path.symlink_to(directory.parent / 'elsewhere')


DAMAGES = [missing, extra, changed, unlisted, relisted, group_writable, group_writable_engine, linked]


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('behaviour', [ONE_ENGINE, {}])
def test_g2_cache_that_is_not_what_was_listed_is_deleted_and_cold(
    config: C7InferenceConfig,
    tmp_path: Path,
    named_gpu: FakeGpu,
    damage: Callable[[Path], None],
    behaviour: dict[str, object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = named_gpu(**behaviour)
    model = bare_bundle(tmp_path)
    load(config, model)
    damage(cache_of(config, model))
    fake.attempts.clear()
    _, handle = load(config, model, build=NO_BUILD)
    assert providers_asked(fake) == [[CUDA, CPU]]
    assert not cache_of(config, model).exists()
    assert any('is not used' in note and 'deleted' in note for note in handle.facts.notes)
    assert any(str(cache_of(config, model)) in record.getMessage() for record in caplog.records)
    load(config, model)
    assert len(fake.builds) == 2
    load(config, model, build=NO_BUILD)
    assert len(fake.builds) == 2


@pytest.mark.parametrize('field', ['onnxruntime', 'tensorrt', 'gpu', 'sm', 'driver', 'precision'])
def test_g2_cache_built_for_something_else_is_deleted_and_cold(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    fake = named_gpu(**ONE_ENGINE)
    model = bare_bundle(tmp_path)
    load(config, model)
    build = BuildConfig(precision='fp32' if field == 'precision' else 'fp16')
    facts = {'gpu': {'name': 'Thor'}, 'sm': {'sm': 110}}.get(field, {})
    monkeypatch.setattr(ort_runtime, 'open_cuda', lambda label: NamedGpu(replace(NamedGpu().facts, **facts)))
    if field == 'tensorrt':
        monkeypatch.setattr(ort_runtime, 'linked_tensorrt', lambda ort: '10.3.0')
    if field == 'driver':
        monkeypatch.setattr(ort_runtime, 'driver_version', lambda: '999.1')
    if field == 'onnxruntime':
        fake.__version__ = '1.18.0'
    fake.attempts.clear()
    _, handle = load(config, model, build=build)
    assert providers_asked(fake) == [[CUDA, CPU]]
    assert not cache_of(config, model).exists()
    assert any(field in note for note in handle.facts.notes)


def test_g2_cache_built_for_other_shapes_is_cold(config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu) -> None:
    fake = named_gpu(**ONE_ENGINE)
    path = write_model(tmp_path / 'free.onnx', arithmetic(shape=('batch', 'rows', 4)))
    load(config, bundle_around(path, 'onnx_trt_ep'))
    fake.attempts.clear()
    larger = [tuple(replace(spec, shape=(1, 5, 4)) for spec in specs) for specs in (INPUTS, OUTPUTS)]
    load(config, bundle_around(path, 'onnx_trt_ep', inputs=larger[0], outputs=larger[1]), build=NO_BUILD)
    assert providers_asked(fake) == [[CUDA, CPU]]


def test_g2_external_weights_are_part_of_the_caches_digest(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu
) -> None:
    fake = named_gpu(**ONE_ENGINE)
    path = scaled(tmp_path / 'net.onnx', 2.0)
    load(config, ModelBundle.load(path))
    load(config, ModelBundle.load(path), build=NO_BUILD)
    assert len(fake.builds) == 1
    fake.attempts.clear()
    scaled(path, 3.0)
    load(config, ModelBundle.load(path), build=NO_BUILD)
    assert providers_asked(fake) == [[CUDA, CPU]]


def test_g2_cache_exchanged_while_the_provider_opens_it_is_not_served(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu
) -> None:
    fake = named_gpu(placement={TENSORRT: 2}, engines=2)
    model = bare_bundle(tmp_path)
    load(config, model)
    engine = min(cache_of(config, model).glob('*.engine'))
    fake.InferenceSession._build = lambda session, options: engine.write_bytes(b'another')
    _, handle = load(config, model, build=NO_BUILD)
    assert handle.facts.active_provider != TENSORRT
    assert any(engine.name in note for note in handle.facts.notes)


def test_g2_read_only_provisioned_cache_is_used(config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu) -> None:
    fake = named_gpu(**ONE_ENGINE)
    model = bare_bundle(tmp_path)
    load(config, model)
    directory = cache_of(config, model)
    for path in (*directory.iterdir(), directory, directory.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in (directory.parent, directory, *directory.iterdir())}
    _, handle = load(config, model, build=NO_BUILD)
    assert handle.facts.active_provider == TENSORRT
    assert len(fake.builds) == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_g2_failed_build_leaves_nothing(config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu) -> None:
    fake = named_gpu(run_raises=RuntimeError('CUDA error 2: out of memory'))
    model = bare_bundle(tmp_path)
    refusal(config, model)
    assert len(fake.builds) == 1
    assert not cache_of(config, model).exists()


@pytest.mark.parametrize('behaviour', [{'raises': {TENSORRT: 'no libnvinfer'}}, {'silent': (TENSORRT,)}])
def test_g2_refused_tensorrt_leaves_nothing(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, behaviour: dict[str, object]
) -> None:
    named_gpu(**behaviour)
    model = bare_bundle(tmp_path)
    _, handle = load(config, model)
    assert handle.facts.active_provider == CUDA
    assert not cache_of(config, model).exists()


def test_g2_build_of_another_process_is_left_alone(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu
) -> None:
    fake = named_gpu()
    model = bare_bundle(tmp_path)
    directory = cache_of(config, model)
    directory.mkdir(parents=True)
    (directory / 'half.engine').write_bytes(b'ftrt')
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _, handle = load(config, model)
    finally:
        os.close(descriptor)
    assert (directory / 'half.engine').exists()
    assert handle.facts.active_provider == TENSORRT
    assert Path(fake.attempts[0]['options'][TENSORRT]['trt_engine_cache_path']) != directory
    assert any('another process is building' in note for note in handle.facts.notes)


def test_g2_gpu_that_cannot_be_told_keeps_no_cache(
    config: C7InferenceConfig, tmp_path: Path, fake_gpu: FakeGpu
) -> None:
    fake = fake_gpu()
    _, handle = load(config, bare_bundle(tmp_path))
    assert fake.attempts[0]['options'][TENSORRT]['trt_engine_cache_enable'] is False
    assert any('their versions are unknown' in note for note in handle.facts.notes)
    assert not config.ort_trt_cache_dir.exists()


@pytest.mark.parametrize('build', [BUILD, NO_BUILD])
@pytest.mark.parametrize('behaviour', [ONE_ENGINE, {'profile': {TENSORRT: 1}}])
def test_g4_verified_engine_that_is_the_whole_model_is_served_as_epcontext(
    config: C7InferenceConfig,
    tmp_path: Path,
    named_gpu: FakeGpu,
    behaviour: dict[str, object],
    build: BuildConfig,
    request_arrays: dict[str, NDArray],
) -> None:
    fake = named_gpu(**behaviour)
    path = write_model(tmp_path / 'renamed.onnx', arithmetic(NAMES, shape=('batch', 3, 4)))
    model = bundle_around(path, 'onnx_trt_ep', io_names={own: name for name, own in NAMES.items()})
    load(config, model)
    fake.attempts.clear()
    runtime, handle = load(config, model, ProviderSet.GPU, build)
    (attempt,) = fake.attempts
    assert attempt['providers'] == [TENSORRT, CUDA, CPU]
    assert set(attempt['options'][TENSORRT]) == TENSORRT_OPTIONS
    assert attempt['session_options'].graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = onnx.load_model_from_string(attempt['source'])
    onnx.checker.check_model(proto)
    (node,) = proto.graph.node
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert (node.op_type, attributes['embed_mode'], attributes['hardware_architecture']) == ('EPContext', 1, b'87')
    assert attributes['ep_cache_context'] == next(cache_of(config, model).glob('*.engine')).read_bytes()
    assert (handle.inputs, handle.outputs) == (INPUTS, OUTPUTS)
    assert handle.facts.requested_providers == (TENSORRT, CUDA, CPU)
    assert handle.facts.active_provider == TENSORRT
    assert len(fake.builds) == 1
    assert list(runtime.infer(handle, request_arrays)) == ['total', 'ratio']


@pytest.mark.parametrize(
    'behaviour',
    [
        {'placement': {TENSORRT: 2}, 'engines': 2},
        {'placement': {TENSORRT: 1, CUDA: 1}},
        {'placement': {TENSORRT: 1, CPU: 1}},
        {'profile': {TENSORRT: 1, CPU: 1}},
        {'profile': {TENSORRT: 2}, 'engines': 2},
        {'profile': None},
    ],
)
def test_g4_engines_that_are_not_the_whole_model_come_from_the_plain_cache(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, behaviour: dict[str, object]
) -> None:
    fake = named_gpu(**behaviour)
    model = bare_bundle(tmp_path)
    load(config, model)
    built = len(fake.builds)
    _, handle = load(config, model, build=NO_BUILD)
    assert not any(is_around_an_engine(attempt) for attempt in fake.attempts)
    assert handle.facts.active_provider == TENSORRT
    assert len(fake.builds) == built


def test_g4_engine_with_an_axis_that_stays_free_comes_from_the_plain_cache(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu
) -> None:
    fake = named_gpu(**ONE_ENGINE)
    model = bare_bundle(tmp_path, arithmetic(shape=(None, 3, 4)))
    load(config, model)
    load(config, model, build=NO_BUILD)
    assert not any(is_around_an_engine(attempt) for attempt in fake.attempts)


def test_g4_refused_engine_falls_back_to_the_plain_cache(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu
) -> None:
    fake = named_gpu(**ONE_ENGINE)
    model = bare_bundle(tmp_path)
    load(config, model)
    fake.attempts.clear()
    fake.behaviour.engine_raises = RuntimeError('could not deserialize engine from binary data')
    _, handle = load(config, model, ProviderSet.GPU, NO_BUILD)
    assert [is_around_an_engine(attempt) for attempt in fake.attempts] == [True, False]
    assert handle.facts.active_provider == TENSORRT
    assert any('could not deserialize' in note for note in handle.facts.notes)
    assert len(fake.builds) == 1


def test_ac6_tensorrt_that_refuses_a_warm_cache_gives_cuda(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    fake = named_gpu(**ONE_ENGINE)
    model = bare_bundle(tmp_path)
    load(config, model)
    fake.attempts.clear()
    fake.behaviour.raises = {TENSORRT: 'libnvinfer.so.10: cannot open shared object file'}
    fake.behaviour.placement = {CUDA: 2}
    caplog.set_level(logging.INFO)
    _, handle = load(config, model, ProviderSet.GPU, NO_BUILD)
    assert providers_asked(fake) == [[TENSORRT, CUDA, CPU], [TENSORRT, CUDA, CPU], [CUDA, CPU]]
    assert handle.facts.active_provider == CUDA
    assert handle.facts.requested_providers == (TENSORRT, CUDA, CPU)
    assert sum('libnvinfer.so.10' in note for note in handle.facts.notes) == 2
    lines = [record for record in caplog.records if CUDA in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.INFO]


# --- G-2, G-4: the engine that TensorRT's own builder makes of a whole model ---------------------------


def builds(trt: FakeTensorrtThisMachineCannotRun) -> int:
    return trt.log.count('build')


def kept(config: C7InferenceConfig, model: ModelBundle) -> list[str]:
    return sorted(path.name for path in cache_of(config, model).iterdir())


@pytest.mark.parametrize('behaviour', [{}, ONE_ENGINE, {'profile': {TENSORRT: 1}}, {'profile': None}])
def test_g4_cold_model_is_built_by_tensorrt_and_served_as_epcontext(
    config: C7InferenceConfig,
    tmp_path: Path,
    named_gpu: FakeGpu,
    own_builder: FakeTensorrtThisMachineCannotRun,
    request_arrays: dict[str, NDArray],
    behaviour: dict[str, object],
) -> None:
    fake = named_gpu(**behaviour)
    model = bare_bundle(tmp_path)
    told: list[BuildProgress] = []
    _, handle = load(config, model, ProviderSet.GPU, BuildConfig(allow_build=True, progress=told.append))
    assert [is_around_an_engine(attempt) for attempt in fake.attempts] == [True]
    assert providers_asked(fake) == [[TENSORRT, CUDA, CPU]]
    assert handle.facts.active_provider == TENSORRT
    assert (builds(own_builder), fake.builds) == (1, [])
    assert told
    assert own_builder.built['config'].limits['workspace'] == config.gpu_memory_budget_bytes // 4
    assert kept(config, model) == [LISTING_NAME, WHOLE_ENGINE]
    fake.attempts.clear()
    runtime, handle = load(config, model, ProviderSet.GPU, NO_BUILD)
    (attempt,) = fake.attempts
    assert is_around_an_engine(attempt)
    assert (handle.inputs, handle.outputs) == (INPUTS, OUTPUTS)
    assert (builds(own_builder), fake.builds) == (1, [])
    assert list(runtime.infer(handle, request_arrays)) == ['total', 'ratio']


def test_g4_timings_of_earlier_builds_are_used_and_kept(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, own_builder: FakeTensorrtThisMachineCannotRun
) -> None:
    named_gpu()
    load(config, bare_bundle(tmp_path))
    assert own_builder.built['config'].timings == b''
    (tmp_path / 'other').mkdir()
    load(config, bare_bundle(tmp_path / 'other', arithmetic(producer='another')))
    assert own_builder.built['config'].timings == b'measured'


def test_g2_provider_that_builds_does_so_outside_of_a_cache_that_is_not_its_own(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, own_builder: FakeTensorrtThisMachineCannotRun
) -> None:
    fake = named_gpu()
    model = bare_bundle(tmp_path)
    load(config, model)
    fake.behaviour.engine_raises = RuntimeError('could not deserialize engine from binary data')
    load(config, model)
    assert len(fake.builds) == 1
    assert kept(config, model) == [LISTING_NAME, WHOLE_ENGINE]


@pytest.mark.parametrize(('refuses', 'says'), [('parse', 'no such operator'), ('build', 'INTERNAL_ERROR')])
def test_g4_model_that_tensorrt_refuses_is_built_by_the_provider(
    config: C7InferenceConfig,
    tmp_path: Path,
    named_gpu: FakeGpu,
    own_builder: FakeTensorrtThisMachineCannotRun,
    refuses: str,
    says: str,
) -> None:
    fake = named_gpu(**ONE_ENGINE)
    own_builder.refuses.add(refuses)
    model = bare_bundle(tmp_path)
    _, handle = load(config, model)
    assert [is_around_an_engine(attempt) for attempt in fake.attempts] == [False]
    assert len(fake.builds) == 1
    assert WHOLE_ENGINE not in kept(config, model)
    assert any('builds the engine itself' in note and says in note for note in handle.facts.notes)


@pytest.mark.parametrize(('allowed', 'tells'), [(BUILD, True), (NO_BUILD, False)])
def test_f5_a_provider_that_builds_is_told_of(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, allowed: BuildConfig, tells: bool
) -> None:
    """It says nothing itself, for minutes."""
    named_gpu()
    told: list[BuildProgress] = []
    load(config, bare_bundle(tmp_path), build=replace(allowed, progress=told.append))
    assert [progress.phase for progress in told] == [f'{TENSORRT} builds'] * tells
    told.clear()
    load(config, bare_bundle(tmp_path), build=replace(BUILD, progress=told.append))
    assert bool(told) is not tells


@pytest.mark.parametrize(
    ('differs', 'model', 'says'),
    [
        ({'__version__': '10.3.0'}, {}, ('10.3.0', '8.6.2')),
        ({'shape': (-1, 3, 4)}, {'shape': (None, 3, 4)}, ('free axes',)),
        # TensorRT 8 makes float32 of float64 and int32 of int64.
        ({}, {'dtype': TensorProto.DOUBLE}, ('float32', 'float64')),
    ],
    ids=['another TensorRT than the provider loads', 'an output of free size', 'types that TensorRT changes'],
)
def test_g4_what_tensorrt_cannot_build_whole_is_left_to_the_provider_before_anything_is_built(
    config: C7InferenceConfig,
    tmp_path: Path,
    named_gpu: FakeGpu,
    own_builder: FakeTensorrtThisMachineCannotRun,
    differs: dict[str, object],
    model: dict[str, Any],
    says: tuple[str, ...],
) -> None:
    fake = named_gpu()
    for name, value in differs.items():
        setattr(own_builder, name, value)
    bundle = bare_bundle(tmp_path, arithmetic(**model))
    _, handle = load(config, bundle)
    assert (builds(own_builder), len(fake.builds)) == (0, 1)
    assert {spec.dtype for spec in handle.outputs} == {'float64' if 'dtype' in model else 'float32'}
    assert any(all(word in note for word in says) for note in handle.facts.notes)


def test_g4_built_engine_too_large_for_a_model_around_it_is_built_by_the_provider(
    config: C7InferenceConfig,
    tmp_path: Path,
    named_gpu: FakeGpu,
    own_builder: FakeTensorrtThisMachineCannotRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = named_gpu()
    monkeypatch.setattr(onnx_file, 'PROTOBUF_LIMIT_BYTES', (1 << 20) + 200)
    model = bare_bundle(tmp_path)
    _, handle = load(config, model)
    assert (builds(own_builder), len(fake.builds)) == (1, 1)
    assert any('builds the engine itself' in note and '2 GiB' in note for note in handle.facts.notes)
    load(config, model, build=NO_BUILD)
    assert len(fake.builds) == 1


def test_g4_built_engine_is_not_kept_in_memory(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, own_builder: FakeTensorrtThisMachineCannotRun
) -> None:
    named_gpu()
    runtime, handle = load(config, bare_bundle(tmp_path))
    assert builds(own_builder) == 1
    assert runtime._engines[handle].engine.built is None


def test_f5_named_axes_are_fixed_in_what_tensorrt_builds(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, own_builder: FakeTensorrtThisMachineCannotRun
) -> None:
    named_gpu()
    load(config, bare_bundle(tmp_path, arithmetic(shape=('batch', 3, 4))))
    graph = onnx.load_model_from_string(own_builder.built['model']).graph
    for value in (*graph.input, *graph.output):
        assert [axis.dim_value for axis in value.type.tensor_type.shape.dim] == [1, 3, 4]


def test_g4_built_engine_that_the_provider_refuses_is_built_by_it_and_not_kept(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, own_builder: FakeTensorrtThisMachineCannotRun
) -> None:
    fake = named_gpu(**ONE_ENGINE, engine_raises=RuntimeError('could not deserialize engine'))
    model = bare_bundle(tmp_path)
    _, handle = load(config, model)
    assert [is_around_an_engine(attempt) for attempt in fake.attempts] == [True, False]
    assert len(fake.builds) == 1
    assert handle.facts.active_provider == TENSORRT
    assert WHOLE_ENGINE not in kept(config, model)
    _, handle = load(config, model, build=NO_BUILD)
    assert len(fake.builds) == 1


def test_g4_built_engine_that_fails_its_warm_up_leaves_nothing(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, own_builder: FakeTensorrtThisMachineCannotRun
) -> None:
    named_gpu(run_raises=RuntimeError('CUDA error 2: out of memory'))
    model = bare_bundle(tmp_path)
    refusal(config, model)
    assert builds(own_builder) == 1
    assert not cache_of(config, model).exists()


def test_f5_refused_engine_of_a_warm_cache_is_never_built_again_in_flight(
    config: C7InferenceConfig, tmp_path: Path, named_gpu: FakeGpu, own_builder: FakeTensorrtThisMachineCannotRun
) -> None:
    """The provider would not find its own engine in a cache that holds TensorRT's, and would build."""
    fake = named_gpu()
    model = bare_bundle(tmp_path)
    load(config, model)
    fake.attempts.clear()
    fake.behaviour.engine_raises = RuntimeError('could not deserialize engine from binary data')
    fake.behaviour.profile = {CUDA: 3}
    _, handle = load(config, model, ProviderSet.GPU, NO_BUILD)
    assert providers_asked(fake) == [[TENSORRT, CUDA, CPU], [CUDA, CPU]]
    assert handle.facts.active_provider == CUDA
    assert (builds(own_builder), fake.builds) == (1, [])
    assert kept(config, model) == [LISTING_NAME, WHOLE_ENGINE]


def test_g2_full_disk_costs_the_built_engine_and_not_the_session(
    config: C7InferenceConfig,
    tmp_path: Path,
    named_gpu: FakeGpu,
    own_builder: FakeTensorrtThisMachineCannotRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named_gpu()
    model = bare_bundle(tmp_path)

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, 'write_bytes', full)
    _, handle = load(config, model)
    assert handle.facts.active_provider == TENSORRT
    assert any('not kept' in note and 'No space left' in note for note in handle.facts.notes)
    assert not cache_of(config, model).exists()
