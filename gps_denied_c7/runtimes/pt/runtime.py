"""PyTorch on the GPU in FP16, and on the CPU where an artefact was made for it (R-4)."""

from __future__ import annotations

import gc
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import EngineContentError, EngineDeserializeError, InferenceError, RuntimeUnavailableError
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.runtimes.base import BaseRuntime, LoadedEngine
from gps_denied_c7.runtimes.protocol import EngineCacheEntry, EngineFacts, ProviderSet
from gps_denied_c7.runtimes.pt.archive_scan.archive import ArchiveKind, TorchArchive, read_torch_archive
from gps_denied_c7.runtimes.tensor_mapping import own_specs
from gps_denied_c7.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ['PytorchFp16Runtime']

_CPU, _CUDA = 'cpu', 'cuda'
_REQUIREMENTS = 'pip install -r requirements/gpu.txt'
_EXPORT_AGAIN = 'Export the model again with fixed shapes (gps_denied_c7.runtimes.pt.export).'

Tensors = Sequence['torch.Tensor']


@dataclass(slots=True)
class _Program:
    """
    Hold a network that takes and returns tensors by position.

    :param module: the vendor's object.
    :param state: weights and constants, the arguments in front of the inputs.
    :param output_names: None where only a run can tell.
    :param cpu_nodes: operators that the file places on the CPU, None where unknown.
    """

    module: Any
    state: tuple[torch.Tensor, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output_names: tuple[str, ...] | None
    cpu_nodes: int | None = None

    def __call__(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Run on tensors in the order of ``inputs`` and return the outputs by name."""
        found = self.module(*self.state, *inputs)
        if isinstance(found, dict):
            return found
        outputs = tuple(found) if isinstance(found, tuple | list) else (found,)
        names = self.output_names or _numbered(len(outputs))
        return dict(zip(names, outputs, strict=True))


@dataclass(slots=True)
class _Engine:
    """
    Hold a loaded network with the buffers that its requests go through.

    :param stream: where all its work is queued, None on the CPU.
    :param arriving: host buffer and device tensor by input name; the host buffer is pinned where there is a GPU.
    :param leaving: host buffer by output name, made by the first run.
    :param wide: names of tensors that the bundle calls float32.
    :param finite: whether the device found every output of the last run finite.
    """

    program: _Program | None
    device: str
    stream: Any
    arriving: dict[str, tuple[torch.Tensor, torch.Tensor]]
    wide: frozenset[str]
    leaving: dict[str, torch.Tensor] = field(default_factory=dict)
    finite: bool = False

    @property
    def module(self) -> Any:
        """The vendor's object, None once released."""
        return self.program.module if self.program else None


class PytorchFp16Runtime(BaseRuntime[_Engine]):
    """
    Run ``.pt2`` programs of torch.export and TorchScript ``.pt`` files, one artefact per device and precision.

    A file is read once, its digest taken and its contents checked before torch is imported, and torch
    loads those very bytes (:mod:`gps_denied_c7.runtimes.pt.archive_scan.archive` says what trust remains). Inputs
    and outputs that the bundle calls float32 may be float16 in the file: they are cast on the device.
    """

    label = 'pytorch_fp16'

    def _choose(self, artefacts: Sequence[Artefact]) -> Artefact | None:
        on_cpu = [artefact for artefact in artefacts if artefact.device in (_CPU, 'any')]
        on_gpu = [artefact for artefact in artefacts if artefact.device != _CPU]
        # FP16 is what a GPU is fast at, and what a CPU is slow at.
        on_gpu.sort(key=lambda artefact: artefact.precision != 'fp16')
        on_cpu.sort(key=lambda artefact: artefact.precision == 'fp16')
        if self._providers is ProviderSet.GPU:
            return next(iter(on_gpu), None)
        if self._providers is ProviderSet.CPU or not (on_gpu and self._sees_gpu()):
            return next(iter(on_cpu or (on_gpu if self._providers is ProviderSet.ANY else ())), None)
        return on_gpu[0]

    def _load(self, entry: EngineCacheEntry) -> LoadedEngine[_Engine]:
        artefact = next((own for own in entry.model.artefacts_for(self.label) if own.path == entry.path), None)
        made_for = artefact.device if artefact else 'any'
        self._refuse_device(entry, made_for)
        archive = read_torch_archive(entry.path, entry.sha256)
        torch = self._import_torch()
        device = self._device(torch, entry, made_for)
        if device == _CPU:
            torch.set_num_threads(self._config.cpu_threads or max(1, len(os.sched_getaffinity(0)) - 1))
        else:
            # Shapes are fixed, so that the search for the fastest convolution ends with the warm-up run.
            torch.backends.cudnn.benchmark = True
            share = self._config.gpu_memory_budget_bytes / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        # Half precision in the file, single in the bundle: cast at the boundary.
        declared = own_specs(entry.model.inputs, artefact), own_specs(entry.model.outputs, artefact)
        own_dtypes = {spec.name: spec.dtype for specs in declared for spec in specs}
        stream = torch.cuda.Stream() if device == _CUDA else None
        with _on(torch, stream), torch.inference_mode():
            program = _open(torch, archive, device, declared)
            inputs = tuple(_widened(spec, own_dtypes) for spec in program.inputs)
            outputs = tuple(_widened(spec, own_dtypes) for spec in program.outputs)
            wide = frozenset(name for name, dtype in own_dtypes.items() if dtype == 'float32')
            arriving = {
                own.name: _buffers(torch, own, spec, device) for own, spec in zip(program.inputs, inputs, strict=True)
            }
        facts = EngineFacts(
            active_provider=device,
            requested_providers=(_CPU,) if self._providers is ProviderSet.CPU else (_CUDA,),
            cpu_only=device == _CPU,
            cpu_nodes=program.cpu_nodes,
            notes=() if device == _CUDA else (f'{entry.path.name} runs on the CPU.',),
            load_s=0.0,
        )
        return LoadedEngine(_Engine(program, device, stream, arriving, wide), inputs, outputs, facts)

    def _run(self, engine: _Engine, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        import torch

        assert engine.program is not None
        with _on(torch, engine.stream), torch.inference_mode():
            for name, (host, device) in engine.arriving.items():
                np.copyto(host.numpy(), inputs[name])
                if device is not host:
                    # Moved first where the types differ: copy_ alone would cast on the CPU.
                    same = device.dtype == host.dtype
                    device.copy_(host if same else host.to(device.device, non_blocking=True), non_blocking=True)
            found = engine.program([device for _, device in engine.arriving.values()])
            for name, tensor in found.items():
                if not isinstance(tensor, torch.Tensor):
                    raise InferenceError(f'output {name!r} is a {type(tensor).__name__}, not a tensor.')
                if tensor.dtype == torch.float16 and name in engine.wide:
                    tensor = tensor.float()
                _leave(torch, engine, name, tensor)
            if engine.stream is not None:
                finite = [tensor.isfinite().all() for tensor in found.values() if tensor.is_floating_point()]
                # Waits for the stream; nothing else is copied back for it.
                engine.finite = bool(torch.stack(finite).all()) if finite else True
                engine.stream.synchronize()
        return {name: engine.leaving[name].numpy() for name in found}

    def _found_finite(self, engine: _Engine) -> bool:
        # An overflow of half precision is an infinity that stays one when it is widened.
        return engine.finite

    def _free(self, engine: _Engine) -> None:
        """Drop every tensor and give the memory back to the driver, not only to torch's own pool."""
        stream = engine.stream
        engine.program = engine.stream = None
        engine.arriving.clear()
        engine.leaving.clear()
        # Graph modules refer to themselves.
        gc.collect()
        if stream is not None:
            import torch

            stream.synchronize()
            del stream
            torch.cuda.empty_cache()

    def _refuse_device(self, entry: EngineCacheEntry, made_for: str) -> None:
        """Refuse what no look into the file could change."""
        if self._providers is ProviderSet.GPU and made_for == _CPU:
            raise EngineContentError(
                f'{entry.path} was made for the CPU, and a GPU was asked for.', remedy='Export one for cuda.'
            )
        if self._providers is ProviderSet.CPU and made_for not in (_CPU, 'any'):
            raise EngineContentError(
                f'{entry.path} was made for {made_for}, and the CPU was asked for.', remedy='Export one for the CPU.'
            )
        if self._config.ort_disallow_cpu_fallback and (self._providers is ProviderSet.CPU or made_for == _CPU):
            raise self._cpu_refused(entry)

    def _device(self, torch: ModuleType, entry: EngineCacheEntry, made_for: str) -> str:
        if self._providers is ProviderSet.CPU or made_for == _CPU:
            return _CPU
        if torch.cuda.is_available():
            return _CUDA
        if self._providers is ProviderSet.GPU or made_for != 'any':
            raise EngineDeserializeError(
                f'{entry.path} needs CUDA, and torch {torch.__version__} finds no GPU here.',
                remedy='Check the driver and the CUDA build of torch.',
            )
        if self._config.ort_disallow_cpu_fallback:
            raise self._cpu_refused(entry)
        return _CPU

    def _cpu_refused(self, entry: EngineCacheEntry) -> EngineDeserializeError:
        return EngineDeserializeError(
            f'{entry.path} would run on the CPU, and ort_disallow_cpu_fallback refuses it.',
            remedy='Provide a GPU and an artefact for it, or set ort_disallow_cpu_fallback to false.',
        )

    def _sees_gpu(self) -> bool:
        return bool(self._import_torch().cuda.is_available())

    def _import_torch(self) -> ModuleType:
        try:
            import torch
        except Exception as error:  # a broken CUDA library may raise anything
            raise RuntimeUnavailableError(
                self.label, f'torch does not import: {error}.', remedy=_REQUIREMENTS
            ) from error
        return torch


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f'output_{number}' for number in range(count))


def _on(torch: ModuleType, stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _widened(spec: TensorSpec, canonical: Mapping[str, str]) -> TensorSpec:
    if spec.dtype == 'float16' and canonical.get(spec.name) == 'float32':
        return TensorSpec(spec.name, 'float32', spec.shape)
    return spec


def _buffers(
    torch: ModuleType, own: TensorSpec, boundary: TensorSpec, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the buffer that a request's array is copied into, and the tensor that the network reads."""
    sizes = [axis or 1 for axis in own.axes]
    host = torch.zeros(sizes, dtype=getattr(torch, boundary.dtype), pin_memory=device == _CUDA)
    if device == _CPU and own.dtype == boundary.dtype:
        return host, host
    return host, torch.zeros(sizes, dtype=getattr(torch, own.dtype), device=device)


def _leave(torch: ModuleType, engine: _Engine, name: str, tensor: torch.Tensor) -> None:
    """Queue the copy of an output into its host buffer, which is made where there is none that fits."""
    host = engine.leaving.get(name)
    if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=engine.device == _CUDA)
        engine.leaving[name] = host
    host.copy_(tensor, non_blocking=True)


def _open(
    torch: ModuleType, archive: TorchArchive, device: str, declared: tuple[Sequence[TensorSpec], Sequence[TensorSpec]]
) -> _Program:
    with warnings.catch_warnings():
        # Deprecations that concern the exporter of the file.
        warnings.simplefilter('ignore')
        if archive.kind is ArchiveKind.EXPORT:
            return _open_export(torch, archive.content, device)
        return _open_torchscript(torch, archive.content, device, *declared)


def _open_export(torch: ModuleType, content: bytes, device: str) -> _Program:
    """
    Load a program of torch.export and return its bare graph.

    Not ``torch.export.load``: that swallows errors, out of memory among them, and tries an older layout instead.
    Not ``ExportedProgram.module()``: that compiles guards and takes 0.3 ms a call for what the specs say already.
    """
    from torch.export.passes import move_to_device_pass
    from torch.export.pt2_archive._package import load_pt2

    program = move_to_device_pass(load_pt2(io.BytesIO(content)).exported_programs['model'], device)
    # The pass changes the nodes alone, and not the Python made from them.
    program.graph_module.recompile()
    signature = program.graph_signature
    kinds = {spec.kind.name for spec in signature.output_specs}
    if kinds != {'USER_OUTPUT'}:
        raise EngineContentError(f'the program changes its own state ({sorted(kinds)}).', remedy=_EXPORT_AGAIN)
    values = {node.name: node.meta.get('val') for node in program.graph.nodes}
    state, names = [], []
    for spec in signature.input_specs:
        if spec.kind.name == 'USER_INPUT':
            names.append(spec.arg.name)
        elif names:
            raise EngineContentError('the program mixes weights and inputs.', remedy=_EXPORT_AGAIN)
        else:
            held = program.constants if spec.target in program.constants else program.state_dict
            state.append(held[spec.target].detach())
    structure = program.module_call_graph[0].signature.out_spec
    keys = tuple(structure.context) if structure.type is dict else _numbered(len(signature.user_outputs))
    found = [values.get(name) for name in signature.user_outputs]
    computing = [node for node in program.graph.nodes if node.op == 'call_function']
    places = [value.device.type for node in computing if isinstance(value := node.meta.get('val'), torch.Tensor)]
    return _Program(
        module=program.graph_module,
        state=tuple(state),
        inputs=tuple(_spec(torch, name, values.get(name)) for name in names),
        outputs=tuple(_spec(torch, name, value) for name, value in zip(keys, found, strict=True)),
        output_names=keys,
        cpu_nodes=places.count(_CPU) if device == _CUDA else None,
    )


def _open_torchscript(
    torch: ModuleType, content: bytes, device: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> _Program:
    """Load TorchScript; it names its arguments and little else, so that the bundle's specs stand for the rest."""
    module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    names = [argument.name for argument in module.forward.schema.arguments[1:]]
    by_name = {spec.name: spec for spec in inputs}
    if surplus := [name for name in names if name not in by_name]:
        raise EngineContentError(
            f'the TorchScript takes {names}; nothing says what {surplus[0]!r} is.',
            remedy='Name every input in model.json, with io_names where the names differ.',
        )
    held = {tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()}
    narrowed = {'float32': 'float16'} if held == {torch.float16} else {}
    own = tuple(
        TensorSpec(name, narrowed.get(spec.dtype, spec.dtype), tuple(axis or 1 for axis in spec.axes))
        for name, spec in ((name, by_name[name]) for name in names)
    )

    def run(*tensors: Any) -> Any:
        # The optimising executor would compile kernels in the second and third request, in flight.
        with torch.jit.optimized_execution(False):
            return module(*tensors)

    return _Program(run, (), own, tuple(outputs), None)


def _spec(torch: ModuleType, name: str, value: Any) -> TensorSpec:
    if not isinstance(value, torch.Tensor):
        raise EngineContentError(f'{name!r} is not a tensor.', remedy='Export a model of tensors alone.')
    if not all(isinstance(axis, int) for axis in value.shape):
        raise EngineContentError(f'{name!r} has a free axis: {tuple(value.shape)}.', remedy=_EXPORT_AGAIN)
    return TensorSpec(name, str(value.dtype).removeprefix('torch.'), tuple(value.shape))
