"""
R-2: TensorRT called directly; here as far as a machine without a GPU goes.

Order, ownership and errors are proven over stand-ins that compute in NumPy; what TensorRT itself does, by the
GPU suite.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.manifest import EngineManifest, HostProfile, manifest_path
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.errors import (
    EngineDeserializeError,
    EngineSchemaMismatchError,
    InferenceError,
    RuntimeUnavailableError,
)
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.onnx_file import read_onnx
from gps_denied_c7.runtimes.gpu import cuda as cuda_module
from gps_denied_c7.runtimes.gpu import tensorrt_library
from gps_denied_c7.runtimes.gpu.cuda import Cuda, gpu_devices, open_cuda
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.runtimes.protocol import BuildConfig, BuildProgress, EngineCacheEntry, EngineHandle
from gps_denied_c7.runtimes.trt.build import build_engine
from gps_denied_c7.runtimes.trt.fp16 import to_half_precision
from gps_denied_c7.runtimes.trt.runtime import TensorrtRuntime
from support.fake_tensorrt import FakeCudaThisMachineHasNone, FakeTensorrtThisMachineCannotRun, broken, plan_of
from support.onnx_models import INPUTS, OUTPUTS, SHAPE, arithmetic, bare_bundle, bundle_around, write_model
from support.shared_arrays import shared
from support.source_tree import REPOSITORY

HOST = HostProfile(gpu='Fake GPU', sm=90, tensorrt='8.6.0', platform='linux-x86_64')
BUILD = BuildConfig(allow_build=True, precision='fp32')
MODULES = (
    *('trt/runtime.py', 'trt/engine.py', 'trt/build.py', 'trt/progress_reports.py', 'gpu/tensorrt_library.py'),
    *('gpu/cuda.py', 'gpu/staging.py', 'gpu/nonfinite.py'),
)


@pytest.fixture
def cuda() -> FakeCudaThisMachineHasNone:
    return FakeCudaThisMachineHasNone()


@pytest.fixture
def trt(
    cuda: FakeCudaThisMachineHasNone, monkeypatch: pytest.MonkeyPatch
) -> FakeTensorrtThisMachineCannotRun:
    """Put both stand-ins where the real ones would be."""
    fake = FakeTensorrtThisMachineCannotRun(cuda)
    install(fake, monkeypatch)
    return fake


def install(fake: FakeTensorrtThisMachineCannotRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'tensorrt', fake)
    monkeypatch.setattr(tensorrt_library, '_logger', None)
    monkeypatch.setattr(cuda_module, 'gpu_devices', lambda: ['/dev/nvidia0'])
    monkeypatch.setattr(cuda_module, '_import_bindings', lambda label: (fake.cuda, fake.cuda))
    monkeypatch.setattr('platform.machine', lambda: 'x86_64')


def manifest_of(plan: bytes, source_sha256: str = '5' * 64, **changes: object) -> EngineManifest:
    manifest = EngineManifest(
        model='arithmetic',
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        engine_bytes=len(plan),
        source_sha256=source_sha256,
        precision='fp32',
        gpu=HOST.gpu,
        sm=HOST.sm,
        tensorrt='8.6.0.12',
        platform=HOST.platform,
        inputs=INPUTS,
        outputs=OUTPUTS,
    )
    return replace(manifest, **changes)


def engine_file(directory: Path, **changes: object) -> Path:
    plan = plan_of()
    return EngineCache((directory,)).publish(plan, manifest_of(plan, **changes)).path


def runtime_of(config: C7InferenceConfig, gate: EngineGate | None = None) -> TensorrtRuntime:
    return TensorrtRuntime(config, gate=gate or EngineGate(HOST))


@pytest.fixture
def loaded(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path
) -> tuple[TensorrtRuntime, EngineHandle]:
    return load(config, tmp_path)


def load(config: C7InferenceConfig, directory: Path) -> tuple[TensorrtRuntime, EngineHandle]:
    runtime = runtime_of(config)
    model = bundle_around(engine_file(directory), 'tensorrt')
    return runtime, runtime.deserialize_engine(runtime.compile_engine(model, BuildConfig()))


# --- a host without a GPU ---------------------------------------------------------------------------


@pytest.fixture
def untouchable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have every import of a vendor library fail the test: TensorRT crashes where there is no GPU."""
    for package in ('tensorrt', 'cuda'):
        (tmp_path / 'vendor' / package).mkdir(parents=True)
        (tmp_path / 'vendor' / package / '__init__.py').write_text('raise AssertionError("touched")\n')
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(tmp_path / 'vendor')
    monkeypatch.setattr(cuda_module, 'gpu_devices', list)


def test_r2_without_a_gpu_nothing_is_compiled_and_nothing_touched(
    untouchable: None, config: C7InferenceConfig, tmp_path: Path
) -> None:
    for gate in (None, EngineGate(HOST)):
        with pytest.raises(RuntimeUnavailableError) as caught:
            TensorrtRuntime(config, gate=gate).compile_engine(bare_bundle(tmp_path), BUILD)
        assert 'no NVIDIA GPU' in str(caught.value)
        assert caught.value.remedy


def test_r2_without_a_gpu_an_admitted_engine_never_reaches_the_deserialiser(
    untouchable: None, config: C7InferenceConfig, tmp_path: Path
) -> None:
    model = bundle_around(engine_file(tmp_path / 'engines'), 'tensorrt')
    with pytest.raises(RuntimeUnavailableError) as caught:
        runtime_of(config).deserialize_engine(entry_of(model))
    assert 'no NVIDIA GPU' in str(caught.value)


def entry_of(model: ModelBundle) -> EngineCacheEntry:
    artefact = model.artefacts[0]
    return EngineCacheEntry(artefact.path, artefact.sha256, model)


def test_g1_the_gate_comes_before_everything_else(
    untouchable: None, config: C7InferenceConfig, tmp_path: Path
) -> None:
    path = engine_file(tmp_path / 'engines')
    path.write_bytes(path.read_bytes()[:-1] + b'!')
    with pytest.raises(EngineSchemaMismatchError) as caught:
        runtime_of(config).deserialize_engine(replace(entry_of(bundle_around(path, 'tensorrt')), sha256=None))
    assert caught.value.field == 'engine_sha256'


def test_r2_host_profile_without_a_gpu_says_so(untouchable: None) -> None:
    with pytest.raises(RuntimeUnavailableError, match='no NVIDIA GPU'):
        local_host_profile()


def test_r2_a_gpu_is_told_by_its_device_files(tmp_path: Path) -> None:
    for name in ('nvidiactl', 'nvram', 'null'):
        (tmp_path / name).touch()
    assert gpu_devices(tmp_path) == []
    (tmp_path / 'nvidia0').touch()
    assert gpu_devices(tmp_path) == [str(tmp_path / 'nvidia0')]


@pytest.mark.parametrize(
    ('devices', 'status', 'says'),
    [
        (0, None, 'CUDA sees no GPU'),
        (1, 'cudaErrorNoDevice', 'CUDA sees no GPU'),
        (1, 'cudaErrorInvalidValue', 'cudaErrorInvalidValue'),
    ],
)
def test_r2_gpu_that_cuda_does_not_see(
    trt: FakeTensorrtThisMachineCannotRun, devices: int, status: str | None, says: str
) -> None:
    trt.cuda.devices = devices
    if status:
        trt.cuda.fails['cudaGetDeviceCount'] = trt.cuda.cudaError_t[status]
    with pytest.raises(RuntimeUnavailableError, match=says):
        open_cuda('tensorrt')


def test_r2_cuda_python_is_taken_under_either_name(
    cuda: FakeCudaThisMachineHasNone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_module, 'gpu_devices', lambda: ['/dev/nvidia0'])
    names = {'cuda': SimpleNamespace(__path__=[]), 'cuda.cudart': cuda, 'cuda.cuda': cuda}
    for name in ('cuda.bindings', 'cuda.bindings.runtime', 'cuda.bindings.driver'):
        monkeypatch.setitem(sys.modules, name, None)
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert open_cuda('tensorrt').runtime is cuda
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RuntimeUnavailableError, match='cuda-python does not import'):
        open_cuda('tensorrt')


# --- the API --------------------------------------------------------------------------------------------


def attributes_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_r2_only_the_name_based_api_is_called() -> None:
    """TensorRT 10 removed every call with "binding" in its name, and the enqueueing calls older than v3."""
    used = {name for file in MODULES for name in attributes_of(REPOSITORY / 'gps_denied_c7' / 'runtimes' / file)}
    gone = {'execute', 'execute_async', 'execute_v2', 'execute_async_v2', 'max_workspace_size', 'build_engine'}
    assert not {name for name in used if 'binding' in name.lower() and name != '_import_bindings'}
    assert not used & gone
    assert {'num_io_tensors', 'get_tensor_name', 'set_tensor_address', 'execute_async_v3'} <= used


@pytest.mark.skipif(importlib.util.find_spec('tensorrt') is None, reason='TensorRT is not installed')
def test_r2_what_is_called_is_in_the_tensorrt_that_is_installed() -> None:
    import tensorrt

    wanted = {
        'Runtime': ('deserialize_cuda_engine', 'error_recorder'),
        'ICudaEngine': (
            'create_execution_context', 'error_recorder', 'get_tensor_dtype', 'get_tensor_format',
            'get_tensor_location', 'get_tensor_mode', 'get_tensor_name', 'get_tensor_profile_shape',
            'get_tensor_shape', 'num_io_tensors',
        ),
        'IExecutionContext': (
            'error_recorder', 'execute_async_v3', 'get_tensor_shape', 'set_input_shape', 'set_tensor_address',
        ),
        'Builder': (
            'build_serialized_network', 'create_builder_config', 'create_network', 'create_optimization_profile',
            'error_recorder',
        ),
        'IBuilderConfig': (
            'add_optimization_profile', 'clear_flag', 'create_timing_cache', 'set_flag', 'set_memory_pool_limit',
            'set_timing_cache',
        ),
        'OnnxParser': ('get_error', 'num_errors', 'parse', 'parse_from_file'),
        'ParserError': ('code', 'desc', 'node'),
        'IErrorRecorder': (
            'clear', 'get_error_code', 'get_error_desc', 'has_overflowed', 'num_errors', 'report_error',
        ),
        'ITimingCache': ('serialize',),
        'TensorFormat': ('LINEAR',),
        'TensorIOMode': ('INPUT',),
        'TensorLocation': ('DEVICE',),
        'MemoryPoolType': ('WORKSPACE',),
        'ErrorCodeTRT': ('SUCCESS', 'INTERNAL_ERROR'),
    }
    missing = [f'{kind}.{name}' for kind, names in wanted.items() for name in names
               if not hasattr(getattr(tensorrt, kind), name)]
    assert not missing
    assert any(hasattr(tensorrt.ICudaEngine, name) for name in ('device_memory_size', 'device_memory_size_v2'))
    assert all(hasattr(tensorrt.DataType, name) for name in ('FLOAT', 'HALF', 'INT32', 'INT8', 'BOOL'))
    recorder = tensorrt_library.error_recorder(tensorrt)
    recorder.report_error(tensorrt.ErrorCodeTRT.INTERNAL_ERROR, 'out of paper')
    assert recorder.messages() == ['INTERNAL_ERROR: out of paper']
    assert isinstance(recorder, tensorrt.IErrorRecorder)
    # Through the binding, as C++ asks.
    assert tensorrt.IErrorRecorder.num_errors(recorder) == 1
    assert tensorrt.IErrorRecorder.get_error_desc(recorder, 0) == 'out of paper'
    assert not tensorrt.IErrorRecorder.has_overflowed(recorder)
    tensorrt.IErrorRecorder.clear(recorder)
    assert tensorrt.IErrorRecorder.num_errors(recorder) == 0


def test_r2_error_recorder_keeps_the_last_errors(trt: FakeTensorrtThisMachineCannotRun) -> None:
    recorder = tensorrt_library.error_recorder(trt)
    for number in range(tensorrt_library.ERROR_LIMIT + 3):
        recorder.report_error(trt.ErrorCodeTRT.INTERNAL_ERROR, f'error {number}')
    assert recorder.num_errors() == recorder.get_num_errors() == tensorrt_library.ERROR_LIMIT
    assert recorder.messages()[0] == 'INTERNAL_ERROR: error 3'
    assert recorder.has_overflowed()
    assert recorder.get_error_desc(99) == ''
    recorder.clear()
    assert recorder.messages() == [] and not recorder.has_overflowed()


def test_n8_the_one_vendor_logger_forwards_and_lets_nothing_out(
    trt: FakeTensorrtThisMachineCannotRun, caplog: pytest.LogCaptureFixture
) -> None:
    logger = tensorrt_library.vendor_logger(trt)
    assert tensorrt_library.vendor_logger(trt) is logger
    heard: list[str] = []

    def failing(message: str) -> None:
        heard.append(message)
        raise KeyError(message)

    with caplog.at_level(logging.DEBUG), tensorrt_library.listening(failing):
        logger.log(SimpleNamespace(name='ERROR'), 'a layer is missing')
    with caplog.at_level(logging.DEBUG):
        logger.log(SimpleNamespace(name='WARNING'), 'a layer is slow')
        logger.log(SimpleNamespace(name='INFO'), 'memory')
    assert heard == ['a layer is missing']
    levels = {record.getMessage(): record.levelname for record in caplog.records if record.name.endswith('tensorrt')}
    assert levels['a layer is slow'] == 'WARNING'
    assert levels['memory'] == 'DEBUG'


# --- running --------------------------------------------------------------------------------------------


def test_r2_answers_by_name_through_a_graph(
    loaded: tuple[TensorrtRuntime, EngineHandle],
    cuda: FakeCudaThisMachineHasNone,
    request_arrays: dict[str, NDArray],
) -> None:
    runtime, handle = loaded
    assert handle.inputs == INPUTS and handle.outputs == OUTPUTS
    assert handle.facts.active_provider == 'TensorRT'
    assert handle.facts.notes == ()
    cuda.log.clear()
    outputs = runtime.infer(handle, request_arrays)
    np.testing.assert_allclose(outputs['total'], request_arrays['left'] + request_arrays['right'])
    assert cuda.log == ['cudaGraphLaunch', 'cudaStreamSynchronize']


def test_r2_order_of_loading(loaded: object, cuda: FakeCudaThisMachineHasNone) -> None:
    """Run once, plainly and to its end, before the capture; each run copies in, executes, looks, copies out."""
    log = cuda.log
    assert log.index('Runtime') < log.index('deserialize') < log.index('context')
    run = ['cudaMemcpyAsync'] * 2 + ['execute'] + ['cuLaunchKernel'] * 2 + ['cudaMemcpyAsync'] * 2
    plain = log.index('execute')
    assert log[plain - 2 : plain + 6] == [*run, 'cudaStreamSynchronize']
    begin = log.index('cudaStreamBeginCapture')
    captured = [name for name in log[begin : log.index('cudaStreamEndCapture')] if name != 'execute captured']
    assert captured == ['cudaStreamBeginCapture', *run]
    assert begin > plain + 5


def test_r2_release_gives_everything_back_in_order_and_twice(
    loaded: tuple[TensorrtRuntime, EngineHandle],
    cuda: FakeCudaThisMachineHasNone,
    request_arrays: dict[str, NDArray],
) -> None:
    runtime, handle = loaded
    kept = runtime.infer(handle, request_arrays)['total']
    cuda.log.clear()
    runtime.release_engine(handle)
    gc.collect()
    order = ['cudaStreamSynchronize', 'cudaGraphExecDestroy', '~Context', 'cudaFree', 'cudaStreamDestroy', '~Engine']
    assert [cuda.log.index(name) for name in order] == sorted(cuda.log.index(name) for name in order)
    assert cuda.log.index('~Engine') < cuda.log.index('~Runtime')
    assert not cuda.memory and not cuda.live
    assert len(cuda.pinned) == 1, 'the view that the test kept, and nothing else'
    assert kept.shape == SHAPE
    del kept
    assert not cuda.pinned
    cuda.log.clear()
    runtime.release_engine(handle)
    assert cuda.log == []


def test_r2_inputs_filled_in_place_are_not_copied(
    loaded: tuple[TensorrtRuntime, EngineHandle],
    request_arrays: dict[str, NDArray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime, handle = loaded
    buffers = {name: tensor.host for name, tensor in runtime._bound(handle).engine.inputs.items()}
    for name, array in request_arrays.items():
        buffers[name][...] = array

    def refuse(*arguments: object) -> None:
        raise AssertionError('copied')

    monkeypatch.setattr(np, 'copyto', refuse)
    np.testing.assert_allclose(runtime.infer(handle, buffers)['total'], sum(request_arrays.values()))
    views = {name: array[:] for name, array in buffers.items()}
    np.testing.assert_allclose(runtime.infer(handle, views)['total'], sum(request_arrays.values()))


def test_r2_a_capture_that_fails_leaves_an_engine_without_a_graph(
    trt: FakeTensorrtThisMachineCannotRun,
    config: C7InferenceConfig,
    tmp_path: Path,
    request_arrays: dict[str, NDArray],
) -> None:
    trt.refuses = {'execute captured'}
    runtime, handle = load(config, tmp_path)
    assert len(handle.facts.notes) == 1 and handle.facts.notes[0].startswith('No CUDA graph')
    np.testing.assert_allclose(runtime.infer(handle, request_arrays)['total'], sum(request_arrays.values()))
    assert 'cudaGraphLaunch' not in trt.log
    assert trt.log.index('cudaStreamEndCapture') < trt.log.index('cudaGetLastError')
    runtime.release_engine(handle)
    gc.collect()
    assert not trt.cuda.memory and not trt.cuda.live


def test_r2_a_capture_that_breaks_the_engine_is_found_out_while_loading(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = trt.works

    def break_for_good(what: str, recorder: object = None) -> bool:
        if what == 'execute captured':
            trt.refuses = {'execute captured', 'execute'}
        return works(what, recorder)

    monkeypatch.setattr(trt, 'works', break_for_good)
    with pytest.raises(EngineDeserializeError, match='warm-up run failed'):
        load(config, tmp_path)
    gc.collect()
    assert not trt.cuda.memory and not trt.cuda.live


@pytest.mark.parametrize('call', ['cudaStreamEndCapture', 'cudaGraphInstantiateWithFlags'])
def test_r2_a_graph_that_cannot_be_made_is_noted(
    trt: FakeTensorrtThisMachineCannotRun,
    config: C7InferenceConfig,
    tmp_path: Path,
    request_arrays: dict[str, NDArray],
    call: str,
) -> None:
    with broken(trt.cuda, call, 'cudaErrorStreamCaptureUnsupported'):
        if call == 'cudaStreamEndCapture':
            trt.cuda._capturing = None
        runtime, handle = load(config, tmp_path)
    assert 'cudaErrorStreamCaptureUnsupported' in handle.facts.notes[0]


def test_r2_a_graph_with_another_answer_is_not_used(
    trt: FakeTensorrtThisMachineCannotRun,
    config: C7InferenceConfig,
    tmp_path: Path,
    request_arrays: dict[str, NDArray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = trt.cuda._do_cudaGraphLaunch

    def wrong(executable: object, stream: object) -> None:
        original(executable, stream)
        for address, block in trt.cuda.pinned.items():
            if len(block) == 48:
                trt.cuda.pinned[address][3] = 0x45

    monkeypatch.setattr(trt.cuda, '_do_cudaGraphLaunch', wrong)
    runtime, handle = load(config, tmp_path)
    assert 'its answer differs' in handle.facts.notes[0]
    monkeypatch.undo()
    np.testing.assert_allclose(runtime.infer(handle, request_arrays)['total'], sum(request_arrays.values()))


@pytest.fixture
def places(request_arrays: dict[str, NDArray]) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    """A request and room for its answer as two processes share them: on pages of their own, the request read-only."""
    _, request = shared(request_arrays, writable=False)
    _, answer = shared({spec.name: np.zeros(spec.shape, spec.dtype) for spec in OUTPUTS}, writable=True)
    return request, answer


def test_f1_what_is_placed_is_copied_from_and_to(
    loaded: tuple[TensorrtRuntime, EngineHandle],
    cuda: FakeCudaThisMachineHasNone,
    places: tuple[dict[str, NDArray], dict[str, NDArray]],
) -> None:
    """R-2: by a graph captured anew, and nothing else touches the values on the way."""
    runtime, handle = loaded
    request, answer = places
    runtime.place(handle, inputs=request)
    runtime.place(handle, outputs=answer)
    assert len(cuda.locked) == 4
    # The first to come there lets go of where answers lay before.
    runtime.infer(handle, request)
    for array in answer.values():
        array[...] = 0
    cuda.log.clear()
    found = runtime.infer(handle, request)
    assert cuda.log == ['cudaGraphLaunch', 'cudaStreamSynchronize']
    assert all(np.shares_memory(found[name], array) for name, array in answer.items())
    np.testing.assert_allclose(answer['total'], request['left'] + request['right'])
    runtime.place(handle, inputs=request, outputs=answer)
    assert 'cudaStreamBeginCapture' not in cuda.log, 'they are there already'
    elsewhere = {name: array + 1 for name, array in request.items()}
    for _ in range(2):
        cuda.log.clear()
        np.testing.assert_allclose(runtime.infer(handle, elsewhere)['total'], sum(elsewhere.values()))
    assert cuda.log == ['cudaGraphLaunch', 'cudaStreamSynchronize']
    assert len(cuda.locked) == 2, 'requests come elsewhere now'
    runtime.release_engine(handle)
    assert not cuda.locked


def test_f1_pages_that_the_driver_does_not_lock_cost_a_copy(
    loaded: tuple[TensorrtRuntime, EngineHandle],
    cuda: FakeCudaThisMachineHasNone,
    places: tuple[dict[str, NDArray], dict[str, NDArray]],
) -> None:
    runtime, handle = loaded
    request, answer = places
    with broken(cuda, 'cudaHostRegister', 'cudaErrorNotSupported'):
        runtime.place(handle, inputs=request, outputs=answer)
    cuda.log.clear()
    found = runtime.infer(handle, request)
    assert cuda.log == ['cudaGraphLaunch', 'cudaStreamSynchronize']
    assert not any(np.shares_memory(found[name], array) for name, array in answer.items())
    np.testing.assert_allclose(found['total'], request['left'] + request['right'])


def test_f1_a_graph_that_cannot_be_captured_anew_is_gone(
    loaded: tuple[TensorrtRuntime, EngineHandle],
    trt: FakeTensorrtThisMachineCannotRun,
    places: tuple[dict[str, NDArray], dict[str, NDArray]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The one of before has the addresses of before."""
    runtime, handle = loaded
    request, answer = places
    trt.refuses = {'execute captured'}
    runtime.place(handle, inputs=request, outputs=answer)
    assert 'No CUDA graph' in caplog.text
    trt.cuda.log.clear()
    runtime.infer(handle, request)
    assert 'cudaGraphLaunch' not in trt.cuda.log
    np.testing.assert_allclose(answer['total'], request['left'] + request['right'])


def test_r2_what_tensorrt_reports_is_in_the_exception(
    loaded: tuple[TensorrtRuntime, EngineHandle],
    trt: FakeTensorrtThisMachineCannotRun,
    config: C7InferenceConfig,
    tmp_path: Path,
    request_arrays: dict[str, NDArray],
) -> None:
    trt.refuses = {'execute captured'}
    runtime, handle = load(config, tmp_path / 'plain')
    trt.refuses = {'execute'}
    for _ in range(2):
        with pytest.raises(InferenceError) as failed:
            runtime.infer(handle, request_arrays)
        assert str(failed.value).count('INTERNAL_ERROR: a reason of TensorRT (execute)') == 1
    trt.refuses = set()
    assert runtime.infer(handle, request_arrays)


@pytest.mark.parametrize('what', ['deserialize', 'context', 'set_input_shape', 'execute'])
def test_r2_a_load_that_fails_says_why_and_frees_everything(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path, what: str
) -> None:
    trt.refuses = {what}
    if what == 'set_input_shape':
        trt.shape = (-1, 3, 4)
    with pytest.raises(EngineDeserializeError) as kept:
        load(config, tmp_path)
    assert f'a reason of TensorRT ({what})' in str(kept.value)
    gc.collect()
    assert not trt.cuda.memory and not trt.cuda.live and not trt.cuda.pinned
    assert trt.log.count('~Engine') == (what != 'deserialize')


@pytest.mark.parametrize('call', ['cudaMemcpyAsync', 'cudaStreamSynchronize', 'cudaGraphLaunch'])
def test_r2_cuda_errors_name_themselves_and_release_still_works(
    loaded: tuple[TensorrtRuntime, EngineHandle],
    trt: FakeTensorrtThisMachineCannotRun,
    config: C7InferenceConfig,
    tmp_path: Path,
    request_arrays: dict[str, NDArray],
    call: str,
) -> None:
    runtime, handle = loaded
    if call == 'cudaMemcpyAsync':
        trt.refuses = {'execute captured'}
        runtime, handle = load(config, tmp_path / 'plain')
    with broken(trt.cuda, call):
        with pytest.raises(InferenceError, match='cudaErrorIllegalAddress') as caught:
            runtime.infer(handle, request_arrays)
        assert caught.value.__cause__ is not None
        runtime.release_engine(handle)
    with pytest.raises(InferenceError, match='released'):
        runtime.infer(handle, request_arrays)


@pytest.mark.parametrize('call', ['cudaMalloc', 'cudaHostAlloc'])
def test_r2_memory_that_is_not_there_is_an_error_of_loading(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path, call: str
) -> None:
    with broken(trt.cuda, call), pytest.raises(EngineDeserializeError, match=call):
        load(config, tmp_path)
    gc.collect()
    assert not trt.cuda.memory and not trt.cuda.live and not trt.cuda.pinned


def test_r2_an_engine_beyond_the_budget_is_refused_before_its_context(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path
) -> None:
    with pytest.raises(EngineDeserializeError, match='budget'):
        load(replace(config, gpu_memory_budget_bytes=100), tmp_path)
    assert 'deserialize' not in trt.log
    with pytest.raises(EngineDeserializeError, match='budget'):
        load(replace(config, gpu_memory_budget_bytes=1 << 16), tmp_path)
    assert 'context' not in trt.log


def test_f5_free_axes_are_fixed_before_use(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path
) -> None:
    """To the bundle's sizes, else to the one that was built; a batch without either is 1."""
    trt.shape = (-1, 3, 4)
    _, handle = load(config, tmp_path)
    assert [spec.shape for spec in (*handle.inputs, *handle.outputs)] == [SHAPE] * 4
    assert trt.log.count('set_input_shape') == 2
    trt.shape = (1, -1, 4)
    free = tuple(replace(spec, shape=(1, None, 4)) for spec in INPUTS)
    model = bundle_around(engine_file(tmp_path / 'free'), 'tensorrt', inputs=free)
    assert runtime_of(config).deserialize_engine(entry_of(model)).inputs == INPUTS
    trt.profile = [(1, 1, 4), (1, 3, 4), (1, 9, 4)]
    with pytest.raises(EngineDeserializeError, match='free axes'):
        runtime_of(config).deserialize_engine(entry_of(model))


@pytest.mark.parametrize(
    ('attribute', 'value', 'says'),
    [('format', 'CHW4', 'memory layout'), ('dtype', SimpleNamespace(name='BF16'), 'NumPy lacks')],
)
def test_r2_tensors_that_would_be_misread_are_refused(
    trt: FakeTensorrtThisMachineCannotRun,
    config: C7InferenceConfig,
    tmp_path: Path,
    attribute: str,
    value: object,
    says: str,
) -> None:
    setattr(trt, attribute, value)
    with pytest.raises(EngineDeserializeError, match=says):
        load(config, tmp_path)


# --- non-finite outputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize('works', [True, False])
def test_r1_non_finite_outputs_are_found_on_the_gpu_or_else_here(
    trt: FakeTensorrtThisMachineCannotRun,
    config: C7InferenceConfig,
    tmp_path: Path,
    request_arrays: dict[str, NDArray],
    works: bool,
) -> None:
    """A kernel that finds nothing is found out while loading."""
    trt.cuda.kernel_works = works
    runtime, handle = load(config, tmp_path)
    assert ('The CPU checks the outputs for NaN' in ' '.join(handle.facts.notes)) is not works
    for value in (np.nan, np.inf, 0.0):
        bad = {**request_arrays, 'right': request_arrays['right'].copy()}
        bad['right'][0, 2, 3] = value
        bad['left'] = np.full(SHAPE, 3.0, np.float32)
        if value == np.inf:
            bad['left'][0, 0, 0] = np.inf
        with pytest.raises(InferenceError, match='non-finite'):
            runtime.infer(handle, bad)
        assert runtime.infer(handle, request_arrays)


def test_r1_outputs_that_the_gpu_saw_are_not_read_again(
    loaded: tuple[TensorrtRuntime, EngineHandle],
    request_arrays: dict[str, NDArray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(array: NDArray) -> bool:
        raise AssertionError('read')

    monkeypatch.setattr('gps_denied_c7.tensors.is_finite', refuse)
    runtime, handle = loaded
    runtime.infer(handle, request_arrays)


def test_r1_a_driver_that_compiles_no_kernel_is_noted(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path
) -> None:
    with broken(trt.cuda, 'cuModuleLoadData', 'cudaErrorInvalidValue'):
        _, handle = load(config, tmp_path)
    assert 'cuModuleLoadData' in handle.facts.notes[0]


# --- where the engine comes from ------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> ModelBundle:
    """A bundle with an .onnx for ONNX Runtime alone, whose tensors have other names."""
    names = {'left': 'l', 'right': 'r', 'total': 't', 'ratio': 'q'}
    path = write_model(tmp_path / 'own.onnx', arithmetic(names))
    return bundle_around(path, 'onnx_trt_ep', io_names={own: name for name, own in names.items()})


def with_engine(model: ModelBundle, path: Path) -> ModelBundle:
    engine = Artefact.of_file(path, strategy='tensorrt', weights_digest=model.weights_digest, device='cuda')
    return replace(model, artefacts=(*model.artefacts, engine))


def test_r2_the_bundles_engine_for_this_host_comes_first(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle, tmp_path: Path
) -> None:
    own = engine_file(tmp_path / 'own')
    other = engine_file(tmp_path / 'other', sm=87)
    engine_file(config.engine_cache_dir, source_sha256=model.artefacts[0].sha256)
    entry = runtime_of(config).compile_engine(with_engine(with_engine(model, other), own), BUILD)
    assert entry.path == own and entry.sha256 and entry.source is None


def test_r2_then_the_cached_engine_of_this_very_model(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle, tmp_path: Path
) -> None:
    digest = model.artefacts[0].sha256
    names = tuple(replace(spec, name=own) for spec, own in zip(INPUTS, ('l', 'r'), strict=True))
    path = engine_file(config.engine_cache_dir, source_sha256=digest, inputs=names)
    for changes in ({'sm': 87}, {'tensorrt': '8.6.1.6'}, {'precision': 'fp16'}, {'source_sha256': '7' * 64}):
        engine_file(config.engine_cache_dir, **{'source_sha256': digest, 'inputs': names, **changes})
    build = BuildConfig(precision='fp32')
    entry = runtime_of(config).compile_engine(model, build)
    assert entry.path == path
    assert entry.source == model.artefacts[0]
    assert runtime_of(config).compile_engine(with_engine(model, engine_file(tmp_path, sm=87)), build).path == path


def test_r2_a_cached_engine_of_the_same_graph_with_other_weights_is_not_taken(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle
) -> None:
    """The .onnx may be the same to the last bit where its weights lie in other files."""
    one, other = (replace(model.artefacts[0], external_data={'own.weights': digit * 64}) for digit in 'ab')
    names = tuple(replace(spec, name=own) for spec, own in zip(INPUTS, ('l', 'r'), strict=True))
    path = engine_file(config.engine_cache_dir, source_sha256=one.content_sha256, inputs=names)
    build = BuildConfig(precision='fp32')
    assert runtime_of(config).compile_engine(replace(model, artefacts=(one,)), build).path == path
    with pytest.raises(RuntimeUnavailableError):
        runtime_of(config).compile_engine(replace(model, artefacts=(other,)), build)


def test_r2_an_engine_is_built_from_the_weights_that_were_hashed(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path
) -> None:
    onnx = pytest.importorskip('onnx')
    weights = np.full((256, 256), 2.0, np.float32)
    graph = arithmetic()
    graph.graph.initializer.append(onnx.numpy_helper.from_array(weights, 'w'))
    graph.graph.node.append(onnx.helper.make_node('Identity', ['w'], ['kept']))
    onnx.save_model(graph, tmp_path / 'own.onnx', save_as_external_data=True, location='own.weights', size_threshold=0)
    bundle = bundle_around(tmp_path / 'own.onnx', 'onnx_trt_ep')
    entry = runtime_of(config).compile_engine(bundle, BUILD)
    held = onnx.ModelProto.FromString(trt.built['model']).graph.initializer[0]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(held), weights)
    (tmp_path / 'own.weights').write_bytes(bytes(weights.nbytes))
    with pytest.raises(EngineSchemaMismatchError, match=r'own\.weights'):
        runtime_of(config).compile_engine(bundle, replace(BUILD, precision='fp16'))
    assert runtime_of(config).compile_engine(bundle, BUILD).path == entry.path


def test_f5_nothing_is_built_unless_it_is_allowed(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle
) -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        runtime_of(config).compile_engine(model, BuildConfig())
    assert 'c7_engine build' in caught.value.remedy
    assert 'Builder' not in trt.log
    entry = runtime_of(config).compile_engine(model, BUILD)
    assert entry.path.parent == config.engine_cache_dir
    assert trt.log.count('build') == 1
    assert runtime_of(config).compile_engine(model, BUILD).path == entry.path
    assert runtime_of(config).compile_engine(model, BuildConfig(precision='fp32')).path == entry.path
    assert trt.log.count('build') == 1, 'a built engine is taken from the cache'


def test_r2_engines_for_other_hosts_alone_are_refused_by_the_gate(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path
) -> None:
    """The user reads what differs, and what is recorded is a refused engine."""
    model = bundle_around(engine_file(tmp_path, sm=87), 'tensorrt')
    runtime = runtime_of(config)
    with pytest.raises(EngineSchemaMismatchError) as caught:
        runtime.deserialize_engine(runtime.compile_engine(model, BuildConfig()))
    assert (caught.value.field, caught.value.expected, caught.value.found) == ('sm', 90, 87)


def test_r2_a_damaged_cached_engine_is_refused_or_where_allowed_built_again(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle
) -> None:
    runtime = runtime_of(config)
    path = runtime.compile_engine(model, BUILD).path
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b'!')
    with pytest.raises(EngineSchemaMismatchError):
        runtime.deserialize_engine(runtime.compile_engine(model, BuildConfig(precision='fp32')))
    assert runtime.compile_engine(model, BUILD).path == path
    assert path.read_bytes() == whole


def test_m1_a_cached_engine_has_its_sources_tensor_names(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path
) -> None:
    """The bundle calls the engine's left and right a and b."""
    path = write_model(tmp_path / 'own.onnx', arithmetic())
    inputs = tuple(replace(spec, name=name) for spec, name in zip(INPUTS, ('a', 'b'), strict=True))
    model = bundle_around(path, 'onnx_trt_ep', inputs=inputs, io_names={'left': 'a', 'right': 'b'})
    runtime = runtime_of(config)
    handle = runtime.deserialize_engine(runtime.compile_engine(model, BUILD))
    arrays = {'a': np.full(SHAPE, 6.0, np.float32), 'b': np.full(SHAPE, 2.0, np.float32)}
    assert (runtime.infer(handle, arrays)['ratio'] == 3.0).all()


# --- building -------------------------------------------------------------------------------------------


def build_with(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle, **changes: object
) -> EngineManifest:
    entry = build_engine(model, config, replace(BUILD, **changes))
    return EngineManifest.from_json(manifest_path(entry.path).read_bytes())


@pytest.mark.parametrize(
    ('version', 'precision', 'network_flags', 'flags', 'converted'),
    [
        ('8.6.0', 'fp16', 1, {'tf32', 'fp16'}, False),
        ('8.6.0', 'fp32', 1, set(), False),
        ('10.16.1', 'fp16', 3, {'tf32'}, True),
        ('10.16.1', 'fp32', 3, set(), False),
        ('11.0.0', 'fp16', 3, {'tf32'}, True),
        ('11.0.0', 'fp32', 3, set(), False),
    ],
)
def test_r2_precision_is_asked_for_as_each_version_wants(
    cuda: FakeCudaThisMachineHasNone,
    config: C7InferenceConfig,
    model: ModelBundle,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    precision: str,
    network_flags: int,
    flags: set[str],
    converted: bool,
) -> None:
    """By a flag before strong typing, and by the model's own types since, which 11 leaves as the only way."""
    trt = FakeTensorrtThisMachineCannotRun(cuda, version)
    install(trt, monkeypatch)
    manifest = build_with(trt, config, model, precision=precision)
    assert trt.built['network_flags'] == network_flags
    assert trt.built['config'].flags == flags
    assert (trt.built['model'] != model.artefacts[0].path.read_bytes()) is converted
    assert ('converted' in manifest.builder_flags) is converted
    assert manifest.precision == precision
    assert manifest.tensorrt.startswith(version)


def test_r2_workspace_comes_from_the_budget(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle
) -> None:
    manifest = build_with(trt, replace(config, gpu_memory_budget_bytes=400 << 20), model)
    assert trt.built['config'].limits == {'workspace': 100 << 20}
    assert f'workspace={100 << 20}' in manifest.builder_flags


@pytest.mark.parametrize(('version', 'known'), [('8.5.2', False), ('8.6.0', True), ('10.3.0', True), ('11.0.0', True)])
def test_r2_builder_is_told_how_hard_to_search(
    cuda: FakeCudaThisMachineHasNone,
    config: C7InferenceConfig,
    model: ModelBundle,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    known: bool,
) -> None:
    trt = FakeTensorrtThisMachineCannotRun(cuda, version)
    install(trt, monkeypatch)
    manifest = build_with(trt, replace(config, builder_optimization_level=1), model)
    assert getattr(trt.built['config'], 'builder_optimization_level', None) == (1 if known else None)
    assert ('optimization_level=1' in manifest.builder_flags) is known


def test_r2_timings_are_kept_beside_the_engines_and_damaged_ones_dropped(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle
) -> None:
    build_with(trt, config, model)
    assert trt.built['config'].timings == b''
    build_with(trt, config, model)
    assert trt.built['config'].timings == b'measured'
    trt.refuses = {'known timings'}
    build_with(trt, config, model)
    assert trt.built['config'].timings == b'', 'of another GPU, says TensorRT'
    trt.refuses = set()
    (file,) = config.engine_cache_dir.glob('*.timing')
    file.write_bytes(file.read_bytes()[:-1] + b'!')
    build_with(trt, config, model)
    assert trt.built['config'].timings == b''


def test_f5_free_axes_are_built_for_one_size(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, tmp_path: Path
) -> None:
    trt.shape = (-1, 3, -1)
    shape = ('batch', 3, 'width')
    free = tuple(replace(spec, shape=(None, 3, 4)) for spec in INPUTS)
    model = bundle_around(write_model(tmp_path / 'free.onnx', arithmetic(shape=shape)), 'onnx_trt_ep', inputs=free)
    manifest = build_with(trt, config, model)
    assert trt.built['profile'] == dict.fromkeys(('left', 'right'), ((1, 3, 4),) * 3)
    assert [spec.shape for spec in manifest.inputs] == [(1, 3, 4)] * 2
    unknown = replace(model, inputs=tuple(replace(spec, shape=(None, 3, None)) for spec in INPUTS))
    with pytest.raises(EngineDeserializeError, match='free axes'):
        build_with(trt, config, unknown)


def test_r2_the_parsers_errors_are_in_the_exception(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle
) -> None:
    trt.refuses = {'parse'}
    with pytest.raises(EngineDeserializeError, match='node 3: no such operator') as caught:
        build_engine(model, config, BUILD)
    assert caught.value.remedy


def test_r2_a_build_that_fails_says_why_and_leaves_nothing(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle
) -> None:
    trt.refuses = {'build'}
    with pytest.raises(EngineDeserializeError, match=r'a reason of TensorRT \(build\)'):
        build_engine(model, config, BUILD)
    assert list(config.engine_cache_dir.iterdir()) == []


@pytest.mark.parametrize('version', ['8.6.0', '10.16.1'])
def test_f5_progress_is_reported(
    cuda: FakeCudaThisMachineHasNone,
    config: C7InferenceConfig,
    model: ModelBundle,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
) -> None:
    trt = FakeTensorrtThisMachineCannotRun(cuda, version)
    install(trt, monkeypatch)
    monkeypatch.setattr('gps_denied_c7.runtimes.trt.progress_reports._REPORT_EVERY_S', 0.005)
    heard: list[BuildProgress] = []
    works = trt.works

    def slow(what: str, recorder: object = None) -> bool:
        if what == 'build':
            if version.startswith('8'):
                trt_logger = tensorrt_library.vendor_logger(trt)
                trt_logger.log(SimpleNamespace(name='VERBOSE'), '--------------- Timing Runner: conv (CaskConv)')
            wait_for(lambda: 'actic' in heard[-1].phase)
        return works(what, recorder)

    monkeypatch.setattr(trt, 'works', slow)
    build_engine(model, config, replace(BUILD, progress=heard.append))
    assert [progress.elapsed_s for progress in heard] == sorted(progress.elapsed_s for progress in heard)
    phases = ' '.join(progress.phase for progress in heard)
    if version.startswith('8'):
        assert 'timing tactics, 1 so far' in phases
    else:
        assert 'Tactic Selection' in phases
        assert 0.5 in [progress.fraction for progress in heard]


def test_f5_a_listener_that_fails_does_not_cost_the_build(
    trt: FakeTensorrtThisMachineCannotRun,
    config: C7InferenceConfig,
    model: ModelBundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[BuildProgress] = []
    works = trt.works

    def failing(progress: BuildProgress) -> None:
        heard.append(progress)
        raise KeyError(progress)

    def slow(what: str, recorder: object = None) -> bool:
        if what == 'build':
            wait_for(lambda: len(heard) > 2)
        return works(what, recorder)

    monkeypatch.setattr(trt, 'works', slow)
    monkeypatch.setattr('gps_denied_c7.runtimes.trt.progress_reports._REPORT_EVERY_S', 0.005)
    assert build_engine(model, config, replace(BUILD, progress=failing)).path.is_file()


def test_r2_an_engine_that_cannot_be_kept_is_not_built(
    trt: FakeTensorrtThisMachineCannotRun, config: C7InferenceConfig, model: ModelBundle, tmp_path: Path
) -> None:
    file = tmp_path / 'file'
    file.touch()
    with pytest.raises(EngineDeserializeError, match='no engine can be kept'):
        build_engine(model, config, BUILD, cache=EngineCache((file,)))
    assert 'Builder' not in trt.log


def test_r2_half_precision_keeps_inputs_and_outputs(tmp_path: Path) -> None:
    import onnx

    path = write_model(tmp_path / 'net.onnx', arithmetic())
    before = list(sys.path)
    half = onnx.ModelProto.FromString(to_half_precision(read_onnx(path, None)))
    onnx.checker.check_model(half, full_check=True)
    assert sys.path == before
    assert {value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)} == {1}
    assert 'Cast' in {node.op_type for node in half.graph.node}


def test_r2_host_profile(trt: FakeTensorrtThisMachineCannotRun) -> None:
    profile = local_host_profile()
    assert profile == HOST
    facts = Cuda(trt.cuda, trt.cuda).gpu_facts()
    assert (facts.driver, facts.runtime) == ('12.4', '11.8')


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
