"""R-4: PyTorch on the artefact of its device and precision, loaded from the bytes that were looked through."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import EngineDeserializeError, InferenceError, RuntimeUnavailableError
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.in_process import InProcessHost
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineCacheEntry, EngineHandle, ProviderSet
from gps_denied_c7.runtimes.pt.runtime import PytorchFp16Runtime
from gps_denied_c7.tensors import TensorSpec
from support import source_tree
from support.onnx_models import INPUTS, OUTPUTS, SHAPE, bundle_around
from support.torch_models import REQUEST, arithmetic, write_program

DATA = source_tree.DATA / 'torch'
IMAGE = TensorSpec('image', 'float32', (1, 1, 8, 8))
LAYERS = tuple(TensorSpec(output, 'float32', (1, 4, 8, 8)) for output in ('scores', 'descriptors'))

needs_torch = pytest.mark.skipif(importlib.util.find_spec('torch') is None, reason='torch is not installed')


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Torch as on a host without a GPU."""
    torch = pytest.importorskip('torch')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    return torch


def bundle_of(directory: Path, *artefacts: tuple[str, str]) -> ModelBundle:
    """Return a bundle of (device, precision) artefacts, each a copy of one real file."""
    weights = f'sha256:{"0" * 64}'
    listed = []
    for number, (device, precision) in enumerate(artefacts):
        path = directory / f'{number}.pt2'
        path.write_bytes((DATA / 'stripped.pt2').read_bytes())
        listed.append(
            Artefact.of_file(
                path, strategy='pytorch_fp16', weights_digest=weights, device=device, precision=precision
            )
        )
    return ModelBundle(
        name='arithmetic', root=directory, weights_digest=weights, inputs=INPUTS, outputs=OUTPUTS,
        artefacts=tuple(listed),
    )


def load(runtime: PytorchFp16Runtime, model: ModelBundle) -> EngineHandle:
    return runtime.deserialize_engine(runtime.compile_engine(model, BuildConfig()))


# --- which artefact, on which device: needs no torch ----------------------------------------------


@pytest.mark.parametrize(
    ('providers', 'artefacts', 'chosen'),
    [
        (ProviderSet.GPU, [('cpu', 'fp32'), ('cuda', 'fp32'), ('cuda', 'fp16')], 2),
        (ProviderSet.GPU, [('cpu', 'fp32'), ('sm87', 'fp16')], 1),
        (ProviderSet.GPU, [('cpu', 'fp32'), ('any', 'fp32')], 1),
        (ProviderSet.GPU, [('cpu', 'fp32')], None),
        (ProviderSet.CPU, [('cuda', 'fp16'), ('cpu', 'fp16'), ('cpu', 'fp32')], 2),
        (ProviderSet.CPU, [('cuda', 'fp16')], None),
        (ProviderSet.ANY, [('cpu', 'fp32')], 0),
    ],
)
def test_r4_one_artefact_per_device_and_precision(
    config: C7InferenceConfig, tmp_path: Path, providers: ProviderSet, artefacts: list[tuple[str, str]],
    chosen: int | None,
) -> None:
    runtime = PytorchFp16Runtime(config, providers=providers)
    model = bundle_of(tmp_path, *artefacts)
    if chosen is None:
        with pytest.raises(RuntimeUnavailableError) as caught:
            runtime.compile_engine(model, BuildConfig())
        assert caught.value.remedy
    else:
        assert runtime.compile_engine(model, BuildConfig()).path == model.artefacts[chosen].path


@pytest.mark.parametrize(('device', 'chosen'), [(True, 1), (False, 0)])
def test_r4_library_use_takes_the_gpu_where_there_is_one(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: bool, chosen: int
) -> None:
    monkeypatch.setitem(sys.modules, 'torch', SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: device)))
    model = bundle_of(tmp_path, ('cpu', 'fp32'), ('cuda', 'fp16'))
    assert PytorchFp16Runtime(config).compile_engine(model, BuildConfig()).path == model.artefacts[chosen].path


@pytest.mark.parametrize(('providers', 'device'), [(ProviderSet.GPU, 'cpu'), (ProviderSet.CPU, 'cuda')])
def test_r4_an_artefact_of_the_other_device_is_refused(
    config: C7InferenceConfig, tmp_path: Path, providers: ProviderSet, device: str
) -> None:
    model = bundle_of(tmp_path, (device, 'fp32'))
    with pytest.raises(EngineDeserializeError, match='was made for') as caught:
        PytorchFp16Runtime(config, providers=providers).deserialize_engine(
            EngineCacheEntry(model.artefacts[0].path, None, model)
        )
    assert caught.value.remedy


@pytest.mark.parametrize('providers', [ProviderSet.CPU, ProviderSet.ANY])
def test_risk2_a_refused_cpu_costs_no_work(config: C7InferenceConfig, tmp_path: Path, providers: ProviderSet) -> None:
    model = bundle_of(tmp_path, ('cpu', 'fp32'))
    strict = dataclasses.replace(config, ort_disallow_cpu_fallback=True)
    with pytest.raises(EngineDeserializeError, match='ort_disallow_cpu_fallback'):
        load(PytorchFp16Runtime(strict, providers=providers), model)


def test_r5_a_torch_that_does_not_import_is_unavailable(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'broken' / 'torch').mkdir(parents=True)
    (tmp_path / 'broken' / 'torch' / '__init__.py').write_text('raise OSError("libcudart.so.13: cannot open")\n')
    monkeypatch.delitem(sys.modules, 'torch', raising=False)
    monkeypatch.syspath_prepend(tmp_path / 'broken')
    with pytest.raises(RuntimeUnavailableError, match=r'libcudart\.so\.13') as caught:
        load(PytorchFp16Runtime(config), bundle_of(tmp_path, ('any', 'fp32')))
    assert isinstance(caught.value.__cause__, OSError)


# --- on a real torch ------------------------------------------------------------------------------


@pytest.mark.parametrize(('providers', 'device'), [(ProviderSet.GPU, 'any'), (ProviderSet.GPU, 'cuda'),
                                                   (ProviderSet.ANY, 'cuda')])
def test_r4_a_gpu_rung_without_cuda_is_refused_before_loading(
    config: C7InferenceConfig, tmp_path: Path, without_gpu: Any, monkeypatch: pytest.MonkeyPatch,
    providers: ProviderSet, device: str,
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('loaded')

    monkeypatch.setattr('torch.export.pt2_archive._package.load_pt2', never)
    with pytest.raises(EngineDeserializeError, match='needs CUDA') as caught:
        load(PytorchFp16Runtime(config, providers=providers), bundle_of(tmp_path, (device, 'fp16')))
    assert 'driver' in caught.value.remedy


def test_risk2_the_cpu_is_reported_as_such(config: C7InferenceConfig, tmp_path: Path, without_gpu: Any) -> None:
    handle = load(PytorchFp16Runtime(config, providers=ProviderSet.CPU), bundle_of(tmp_path, ('cpu', 'fp32')))
    assert handle.facts.cpu_only
    assert handle.facts.active_provider == 'cpu'
    assert handle.facts.requested_providers == ('cpu',)
    strict = dataclasses.replace(config, ort_disallow_cpu_fallback=True)
    with pytest.raises(EngineDeserializeError, match='ort_disallow_cpu_fallback'):
        load(PytorchFp16Runtime(strict), bundle_of(tmp_path, ('any', 'fp32')))


def test_risk2_the_chain_raises_the_same_cpu_alert(
    config: C7InferenceConfig, without_gpu: Any
) -> None:
    records: list[str] = []
    model = bundle_around(DATA / 'layers.pt2', 'pytorch_fp16', inputs=(IMAGE,), outputs=LAYERS, device='cpu')
    rung = Rung('pytorch_fp16', ProviderSet.CPU)
    chain = RuntimeChain(
        model, config,
        lambda rung: InProcessHost(PytorchFp16Runtime(config, providers=rung.providers), model, BuildConfig()),
        emit=lambda kind, **payload: records.append(kind), rungs=(rung,),
    )
    chain.load()
    for _ in range(3):
        assert chain.infer({'image': np.ones((1, 1, 8, 8), np.float32)}).runtime_label == 'pytorch_fp16'
    chain.release()
    assert records == ['c7.cpu_fallback']


@needs_torch
@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_r4_either_precision_takes_and_gives_what_the_bundle_says(
    config: C7InferenceConfig, tmp_path: Path, request_arrays: dict[str, NDArray], precision: str
) -> None:
    path = write_program(tmp_path / 'model.pt2', precision=precision)
    runtime = PytorchFp16Runtime(config, providers=ProviderSet.CPU)
    handle = load(runtime, bundle_around(path, 'pytorch_fp16'))
    assert handle.inputs == INPUTS and handle.outputs == OUTPUTS
    outputs = runtime.infer(handle, request_arrays)
    np.testing.assert_array_equal(outputs['total'], request_arrays['left'] + request_arrays['right'])
    third = runtime.infer(handle, {**request_arrays, 'right': np.full(SHAPE, 3.0, np.float32)})['ratio']
    exact = np.array_equal(third, request_arrays['left'] / np.float32(3))
    assert exact == (precision == 'fp32'), 'computed in the precision of the artefact'


@needs_torch
def test_r4_a_bundle_of_half_precision_stays_so(config: C7InferenceConfig, tmp_path: Path) -> None:
    path = write_program(tmp_path / 'model.pt2', precision='fp16')
    inputs = tuple(TensorSpec(spec.name, 'float16', spec.shape) for spec in INPUTS)
    outputs = tuple(TensorSpec(spec.name, 'float16', spec.shape) for spec in OUTPUTS)
    runtime = PytorchFp16Runtime(config, providers=ProviderSet.CPU)
    handle = load(runtime, bundle_around(path, 'pytorch_fp16', inputs=inputs, outputs=outputs))
    found = runtime.infer(handle, {name: array.astype(np.float16) for name, array in REQUEST.items()})
    assert found['total'].dtype == np.float16


@needs_torch
@pytest.mark.parametrize('name', ['arithmetic.pt2', 'stripped.pt2', 'traced.pt'])
def test_r4_files_of_each_kind_run(
    config: C7InferenceConfig, request_arrays: dict[str, NDArray], name: str
) -> None:
    runtime = PytorchFp16Runtime(config, providers=ProviderSet.CPU)
    handle = load(runtime, bundle_around(DATA / name, 'pytorch_fp16'))
    outputs = runtime.infer(handle, request_arrays)
    np.testing.assert_array_equal(outputs['ratio'], request_arrays['left'] / request_arrays['right'])


@needs_torch
@pytest.mark.parametrize('name', ['layers.pt2', 'scripted.pt', 'frozen.pt'])
def test_r4_files_with_weights_agree_with_each_other(config: C7InferenceConfig, name: str) -> None:
    runtime = PytorchFp16Runtime(config, providers=ProviderSet.CPU)
    found = {}
    for file in ('layers.pt2', name):
        handle = load(runtime, bundle_around(DATA / file, 'pytorch_fp16', inputs=(IMAGE,), outputs=LAYERS))
        sample = {'image': np.random.default_rng(1).random((1, 1, 8, 8), np.float32)}
        found[file] = {key: value.copy() for key, value in runtime.infer(handle, sample).items()}
    for key, value in found['layers.pt2'].items():
        np.testing.assert_allclose(found[name][key], value, rtol=1e-5, atol=1e-6)


@needs_torch
def test_r4_a_tuple_gives_numbered_outputs(
    config: C7InferenceConfig, tmp_path: Path, request_arrays: dict[str, NDArray]
) -> None:
    path = write_program(tmp_path / 'model.pt2', arithmetic(as_tuple=True))
    names = {'output_0': 'total', 'output_1': 'ratio'}
    runtime = PytorchFp16Runtime(config)
    handle = load(runtime, bundle_around(path, 'pytorch_fp16', io_names=names))
    assert list(runtime.infer(handle, request_arrays)) == ['total', 'ratio']


@needs_torch
def test_r4_loads_the_bytes_that_were_scanned(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_arrays: dict[str, NDArray]
) -> None:
    """A file that is exchanged after the scan is not what is loaded."""
    from gps_denied_c7.runtimes.pt import runtime as pt_runtime

    model = bundle_of(tmp_path, ('cpu', 'fp32'))
    path = model.artefacts[0].path
    read = pt_runtime.read_torch_archive

    def read_then_exchange(*args: Any) -> Any:
        archive = read(*args)
        path.write_bytes(b'exchanged')
        return archive

    monkeypatch.setattr(pt_runtime, 'read_torch_archive', read_then_exchange)
    runtime = PytorchFp16Runtime(config, providers=ProviderSet.CPU)
    assert runtime.infer(load(runtime, model), request_arrays)


@needs_torch
def test_r4_a_network_with_a_free_axis_is_refused(config: C7InferenceConfig, tmp_path: Path) -> None:
    """F-5, and sizes that are not fixed are expressions, which torch would evaluate."""
    import torch

    path = tmp_path / 'model.pt2'
    pair = tuple(torch.from_numpy(array) for array in REQUEST.values())
    axis = {1: torch.export.Dim('rows', min=2, max=9)}
    torch.export.save(torch.export.export(arithmetic(), pair, dynamic_shapes=(axis, axis)), path)
    with pytest.raises(EngineDeserializeError, match='not fixed') as caught:
        load(PytorchFp16Runtime(config), bundle_around(path, 'pytorch_fp16'))
    assert 'fixed shapes' in caught.value.remedy


@needs_torch
def test_r4_a_network_that_changes_its_own_state_is_refused(config: C7InferenceConfig, tmp_path: Path) -> None:
    import torch

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer('count', torch.zeros(1))

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> Any:
            self.count += 1
            return {'total': left + right + self.count, 'ratio': left / right}

    path = tmp_path / 'model.pt2'
    pair = tuple(torch.from_numpy(array) for array in REQUEST.values())
    torch.export.save(torch.export.export(Counting(), pair).run_decompositions(), path)
    with pytest.raises(EngineDeserializeError, match='its own state'):
        load(PytorchFp16Runtime(config), bundle_around(path, 'pytorch_fp16'))


@needs_torch
def test_r4_memory_that_runs_out_is_a_typed_error(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_arrays: dict[str, NDArray]
) -> None:
    import torch

    runtime = PytorchFp16Runtime(config, providers=ProviderSet.CPU)
    model = bundle_of(tmp_path, ('cpu', 'fp32'))
    handle = load(runtime, model)
    engine = runtime._engines[handle].engine

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError('CUDA out of memory.')

    with monkeypatch.context() as patch:
        patch.setattr(type(engine.program), '__call__', full)
        with pytest.raises(InferenceError) as caught:
            runtime.infer(handle, request_arrays)
        assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
        with pytest.raises(EngineDeserializeError) as caught_loading:
            load(runtime, model)
        assert isinstance(caught_loading.value.__cause__, torch.OutOfMemoryError)
    with monkeypatch.context() as patch:
        # While the weights are read, where torch.export.load would swallow it.
        patch.setattr('torch.export.pt2_archive._package._load_state_dict', full)
        with pytest.raises(EngineDeserializeError) as caught_reading:
            load(runtime, model)
        assert isinstance(caught_reading.value.__cause__, torch.OutOfMemoryError)
    assert runtime.infer(handle, request_arrays)


@needs_torch
def test_r4_the_export_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    path = write_program(tmp_path / 'model.pt2')
    assert str(source_tree.REPOSITORY).encode() not in path.read_bytes()
    assert b'stack_trace' not in path.read_bytes()
    again = write_program(tmp_path / 'again.pt2')
    assert path.read_bytes() == again.read_bytes(), 'the same network gives the same digest'
