"""R-4 on a real GPU: conformance in both precisions, agreement with the CPU, speed, and memory that comes back."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import EngineDeserializeError, InferenceError
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineHandle, ProviderSet
from gps_denied_c7.runtimes.pt.archive_scan.archive import ArchiveKind, read_torch_archive
from gps_denied_c7.runtimes.pt.export import export_program
from gps_denied_c7.runtimes.pt.runtime import PytorchFp16Runtime
from gps_denied_c7.tensors import TensorSpec
from support import conformance
from support.gpu.results import percentiles, record
from support.gpu.torch_networks import superpoint
from support.onnx_models import INPUTS, OUTPUTS, SHAPE, bundle_around
from support.torch_models import REQUEST, arithmetic, write_program

LABEL = 'pytorch_fp16'
RUNS = 300


@pytest.fixture(scope='module')
def torch() -> Any:
    torch = pytest.importorskip('torch', reason='torch is not installed in this Python')
    if not torch.cuda.is_available():
        pytest.skip(f'torch {torch.__version__} finds no CUDA device')
    return torch


@pytest.fixture
def config(tmp_path: Path) -> C7InferenceConfig:
    return C7InferenceConfig(engine_cache_dir=tmp_path / 'engine_cache', ort_trt_cache_dir=tmp_path / 'ort_trt_cache')


@pytest.fixture
def request_arrays() -> dict[str, NDArray]:
    return {
        'left': np.arange(12, dtype=np.float32).reshape(SHAPE),
        'right': np.full(SHAPE, 2.0, np.float32),
    }


def load(runtime: PytorchFp16Runtime, model: ModelBundle) -> EngineHandle:
    return runtime.deserialize_engine(runtime.compile_engine(model, BuildConfig()))


# --- conformance ----------------------------------------------------------------------------------


@pytest.fixture(params=['fp32 made for cuda', 'fp16 made for cuda', 'fp16 made anywhere', 'TorchScript'])
def subject(
    torch: Any, request: pytest.FixtureRequest, config: C7InferenceConfig, tmp_path: Path
) -> conformance.Subject:
    """What the conformance suite runs on: the GPU rung with an artefact of each kind."""
    device = 'cuda' if 'cuda' in request.param else 'any'
    if request.param == 'TorchScript':
        path = tmp_path / 'arithmetic.pt'
        torch.jit.trace(
            arithmetic(), tuple(torch.from_numpy(array) for array in REQUEST.values()), strict=False
        ).save(str(path))
    else:
        path = write_program(
            tmp_path / 'arithmetic.pt2', precision=request.param[:4], device='cuda' if device == 'cuda' else 'cpu'
        )
    runtime = PytorchFp16Runtime(config, thermal=conformance.FixedThermal(), providers=ProviderSet.GPU)
    return conformance.Subject(runtime, bundle_around(path, LABEL, device=device))


# A TorchScript file names neither its shapes nor its outputs: there the warm-up run tells, with another error.
_NEED_SPECS = ('test_m1_engine_that_contradicts_the_bundle_is_refused',)

globals().update(conformance.suite(without=_NEED_SPECS))


def test_m1_a_bundle_that_contradicts_the_file_is_refused(subject: conformance.Subject) -> None:
    outputs = (OUTPUTS[0], TensorSpec('ratio', 'float32', (1, 4, 3)))
    with pytest.raises((EngineDeserializeError, conformance.EngineSchemaMismatchError)) as caught:
        replace(subject, model=replace(subject.model, outputs=outputs)).load()
    assert caught.value.remedy


# --- what only a GPU can show ---------------------------------------------------------------------


@pytest.fixture(scope='module')
def flying(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], ModelBundle]:
    """A network of what flies, by (device, precision)."""
    from support.gpu.superpoint import superpoint_inputs, superpoint_outputs, write_superpoint

    folder = tmp_path_factory.mktemp('superpoint')
    module = superpoint(write_superpoint(folder / 'superpoint.onnx'))
    inputs = superpoint_inputs()
    zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in inputs}
    bundles = {}
    for device, precision in (('cpu', 'fp32'), ('cuda', 'fp32'), ('cuda', 'fp16')):
        path = folder / f'superpoint-{device}-{precision}.pt2'
        export_program(module, zeros, path, precision=precision, device=device)
        bundles[device, precision] = bundle_around(
            path, LABEL, inputs=inputs, outputs=superpoint_outputs(), device=device
        )
    return bundles


@pytest.fixture
def frame() -> dict[str, NDArray]:
    from support.gpu.superpoint import image

    return {'image': image(seed=3)}


@pytest.fixture
def gpu(torch: Any, config: C7InferenceConfig) -> Iterator[PytorchFp16Runtime]:
    runtime = PytorchFp16Runtime(config, providers=ProviderSet.GPU)
    yield runtime
    for handle in list(runtime._engines):
        runtime.release_engine(handle)


def test_r4_facts_name_the_gpu(gpu: PytorchFp16Runtime, flying: dict[tuple[str, str], ModelBundle]) -> None:
    handle = load(gpu, flying['cuda', 'fp16'])
    assert handle.facts.active_provider == 'cuda'
    assert not handle.facts.cpu_only
    assert handle.facts.cpu_nodes == 0
    assert handle.facts.notes == ()


@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_r4_agrees_with_the_cpu_within_one_percent_of_each_outputs_range(
    gpu: PytorchFp16Runtime, config: C7InferenceConfig, flying: dict[tuple[str, str], ModelBundle],
    frame: dict[str, NDArray], precision: str,
) -> None:
    on_cpu = PytorchFp16Runtime(config, providers=ProviderSet.CPU)
    expected = on_cpu.infer(load(on_cpu, flying['cpu', 'fp32']), frame)
    found = gpu.infer(load(gpu, flying['cuda', precision]), frame)
    figures: dict[str, float] = {}
    for name, reference in expected.items():
        figures[f'{name}_range'] = float(np.ptp(reference))
        figures[f'{name}_largest_difference'] = float(np.abs(found[name] - reference).max())
        figures[f'{name}_share_of_range'] = figures[f'{name}_largest_difference'] / figures[f'{name}_range']
    record(f'{LABEL} {precision} against CPU FP32', **figures)
    assert all(value < 0.01 for name, value in figures.items() if name.endswith('share_of_range')), figures
    exact = all(np.array_equal(found[name], reference) for name, reference in expected.items())
    assert not exact, 'the GPU has computed'


@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_r4_speed(
    torch: Any, gpu: PytorchFp16Runtime, flying: dict[tuple[str, str], ModelBundle], frame: dict[str, NDArray],
    precision: str,
) -> None:
    handle = load(gpu, flying['cuda', precision])
    for _ in range(20):
        gpu.infer(handle, frame)
    durations = []
    for _ in range(RUNS):
        start = time.perf_counter()
        gpu.infer(handle, frame)
        durations.append(time.perf_counter() - start)
    record(f'{LABEL} {precision} infer', load_s=round(handle.facts.load_s, 3), **percentiles(durations))
    assert len(durations) == RUNS


def test_r4_memory_comes_back_after_release(
    torch: Any, gpu: PytorchFp16Runtime, flying: dict[tuple[str, str], ModelBundle], frame: dict[str, NDArray]
) -> None:
    def used() -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return torch.cuda.memory_reserved(), total - free

    # The first load brings what stays: the context, the libraries' kernels and work space.
    handle = load(gpu, flying['cuda', 'fp16'])
    gpu.infer(handle, frame)
    gpu.release_engine(handle)
    before, device_before = used()
    handles = [load(gpu, flying['cuda', precision]) for precision in ('fp16', 'fp32')]
    for handle in handles:
        gpu.infer(handle, frame)
    loaded, device_loaded = used()
    for handle in handles:
        gpu.release_engine(handle)
    after, device_after = used()
    record(
        f'{LABEL} memory', loaded_bytes=loaded - before, left_bytes=after - before,
        device_loaded_bytes=device_loaded - device_before, device_left_bytes=device_after - device_before,
    )
    assert loaded - before > 5_000_000
    # Rounded up to the allocator's blocks.
    assert after - before <= 4 << 20


def test_r4_a_budget_that_is_too_small_is_a_typed_error_and_the_next_load_works(
    torch: Any, config: C7InferenceConfig, flying: dict[tuple[str, str], ModelBundle], frame: dict[str, NDArray]
) -> None:
    torch.cuda.empty_cache()
    tight = PytorchFp16Runtime(replace(config, gpu_memory_budget_bytes=1 << 20), providers=ProviderSet.GPU)
    with pytest.raises(EngineDeserializeError) as caught:
        load(tight, flying['cuda', 'fp32'])
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    roomy = PytorchFp16Runtime(config, providers=ProviderSet.GPU)
    handle = load(roomy, flying['cuda', 'fp16'])
    assert roomy.infer(handle, frame)
    roomy.release_engine(handle)


def test_r4_requests_run_on_a_stream_of_their_own_through_pinned_memory(
    torch: Any, gpu: PytorchFp16Runtime, flying: dict[tuple[str, str], ModelBundle], frame: dict[str, NDArray]
) -> None:
    handles = [load(gpu, flying['cuda', 'fp16']) for _ in range(2)]
    engines = [gpu._engines[handle].engine for handle in handles]
    streams = {engine.stream.cuda_stream for engine in engines} | {torch.cuda.default_stream().cuda_stream}
    assert len(streams) == 3
    first = gpu.infer(handles[0], frame)['scores']
    assert gpu.infer(handles[0], frame)['scores'].__array_interface__ == first.__array_interface__, 'one buffer'
    for engine in engines[:1]:
        assert all(host.is_pinned() for host, _ in engine.arriving.values())
        assert all(host.is_pinned() for host in engine.leaving.values())


def test_r4_an_overflow_of_half_precision_is_an_inference_error(
    torch: Any, gpu: PytorchFp16Runtime, tmp_path: Path, request_arrays: dict[str, NDArray]
) -> None:
    path = write_program(tmp_path / 'model.pt2', precision='fp16', device='cuda')
    handle = load(gpu, bundle_around(path, LABEL, device='cuda'))
    with pytest.raises(InferenceError, match='non-finite'):
        gpu.infer(handle, {**request_arrays, 'left': np.full(SHAPE, 60000.0, np.float32),
                           'right': np.full(SHAPE, 60000.0, np.float32)})
    assert gpu.infer(handle, request_arrays)


def test_r4_a_file_made_on_the_cpu_moves_with_the_devices_that_it_names(
    torch: Any, gpu: PytorchFp16Runtime, tmp_path: Path, request_arrays: dict[str, NDArray]
) -> None:
    """A constant that the graph makes on a device by name."""

    class Naming(torch.nn.Module):
        def forward(self, left: Any, right: Any) -> Any:
            steps = torch.arange(4, device=left.device, dtype=torch.float32)
            return {'total': left + right + steps, 'ratio': left / right}

    path = write_program(tmp_path / 'model.pt2', Naming())
    outputs = gpu.infer(load(gpu, bundle_around(path, LABEL)), request_arrays)
    np.testing.assert_allclose(
        outputs['total'], request_arrays['left'] + request_arrays['right'] + np.arange(4, dtype=np.float32)
    )


def test_r4_files_as_this_torch_writes_them_are_admitted_and_run(
    torch: Any, gpu: PytorchFp16Runtime, tmp_path: Path, request_arrays: dict[str, NDArray]
) -> None:
    """Plain torch.export.save and TorchScript, whatever release of torch runs here."""
    pair = tuple(torch.from_numpy(array) for array in REQUEST.values())
    torch.export.save(torch.export.export(arithmetic(), pair), tmp_path / 'plain.pt2')
    torch.jit.trace(arithmetic(), pair, strict=False).save(str(tmp_path / 'traced.pt'))
    kinds = {}
    for name in ('plain.pt2', 'traced.pt'):
        kinds[name] = read_torch_archive(tmp_path / name, None).kind
        model = bundle_around(tmp_path / name, LABEL, inputs=INPUTS, outputs=OUTPUTS)
        outputs = gpu.infer(load(gpu, model), request_arrays)
        np.testing.assert_array_equal(outputs['ratio'], request_arrays['left'] / request_arrays['right'])
    record(f'{LABEL} archive layout', torch=torch.__version__, admitted=sorted(kinds))
    assert kinds == {'plain.pt2': ArchiveKind.EXPORT, 'traced.pt': ArchiveKind.TORCHSCRIPT}
