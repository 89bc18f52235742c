"""TensorRT, called directly (R-2)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from gps_denied_c7.engines.admission import AdmittedEngine, EngineGate
from gps_denied_c7.engines.manifest import EngineName, same_tensorrt
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.errors import (
    EngineDeserializeError,
    EngineSchemaMismatchError,
    InferenceError,
    RuntimeUnavailableError,
)
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.base import BaseRuntime, LoadedEngine, own_input_shapes
from gps_denied_c7.runtimes.gpu.cuda import Cuda, CudaError, open_cuda
from gps_denied_c7.runtimes.gpu.nonfinite import FiniteCheck
from gps_denied_c7.runtimes.gpu.staging import StagedTensor
from gps_denied_c7.runtimes.gpu.tensorrt_library import dtype_name, error_recorder, import_tensorrt, vendor_logger
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineCacheEntry, EngineFacts, EngineHandle
from gps_denied_c7.runtimes.trt.build import build_engine, source_artefact, source_shapes
from gps_denied_c7.tensors import TensorSpec, nearly_equal

__all__ = ['PROVIDER', 'TensorrtRuntime']

PROVIDER = 'TensorRT'

_BUILD = 'Build one on the ground with: c7_engine build'
# How far a graph's answer may lie from the plain run's, in parts of the output's range: kernels that add up in another
# order each time differ in the last bits of float16.
_GRAPH_TOLERANCE = 1e-2

_log = logging.getLogger(__name__)


class TensorrtRuntime(BaseRuntime['_Engine']):
    """
    Run ``.engine`` files, and build them where that is allowed.

    An engine comes from the bundle, else from the engine cache, else it is built. Its bytes pass the gate
    before anything of TensorRT sees them, and no part of TensorRT is called on a host without a GPU.
    """

    label = 'tensorrt'

    def input_buffers(self, handle: EngineHandle) -> dict[str, NDArray]:
        """
        Return the pinned memory that requests are copied into, by canonical input name.

        Who fills these and passes them to :meth:`infer` saves that copy. Writable; no request may run
        meanwhile; good until ``release_engine``.

        :raises InferenceError: a foreign or released handle.
        """
        bound = self._bound(handle)
        buffers = {name: bound.engine.inputs[own].own for name, own in bound.own_inputs.items()}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def _compile(self, model: ModelBundle, build_config: BuildConfig) -> EngineCacheEntry:
        open_cuda(self.label)
        gate = self._require_gate()
        artefacts = [artefact for artefact in model.artefacts_for(self.label) if artefact.path.suffix == '.engine']
        if chosen := self._choose(artefacts):
            return EngineCacheEntry(chosen.path, chosen.sha256, model, build_config)
        try:
            source = source_artefact(model)
        except RuntimeUnavailableError:
            if not artefacts:
                raise
        else:
            if entry := self._cached(model, source, build_config, gate):
                return entry
            if build_config.allow_build:
                return build_engine(model, self._config, build_config, gate=gate)
        if artefacts:
            # All for other hosts: the gate says what differs.
            return EngineCacheEntry(artefacts[0].path, artefacts[0].sha256, model, build_config)
        host = gate.host
        raise RuntimeUnavailableError(
            self.label,
            f'there is no {build_config.precision} engine of {model.name!r} for SM {host.sm} and TensorRT '
            f'{host.tensorrt} in the bundle or in {self._config.engine_cache_dir}.',
            remedy=f'{_BUILD}; or set build_on_configure.',
        )

    def _choose(self, artefacts: Sequence[Artefact]) -> Artefact | None:
        """Return the artefact whose name says that it was built for this host."""
        host = self._require_gate().host
        for artefact in artefacts:
            try:
                name = EngineName.parse(artefact.path.name)
            except EngineSchemaMismatchError:
                continue
            if name.sm == host.sm and same_tensorrt(name.tensorrt, host.tensorrt):
                return artefact
        return None

    def _cached(
        self, model: ModelBundle, source: Artefact, build: BuildConfig, gate: EngineGate
    ) -> EngineCacheEntry | None:
        found = EngineCache.at(self._config.engine_cache_dir).find(
            gate.host,
            precision=build.precision,
            source_sha256=source.content_sha256,
            shapes=source_shapes(model, source),
        )
        if found is None:
            return None
        if build.allow_build:
            # Where an engine may be built, a damaged one is replaced instead of refused.
            try:
                gate.admit(found.path, source_sha256=source.content_sha256)
            except EngineSchemaMismatchError as error:
                _log.warning('%s is built again: %s', found.path, error)
                return None
        return EngineCacheEntry(found.path, found.manifest.engine_sha256, model, build, source)

    def _require_gate(self) -> EngineGate:
        if self._gate is None:
            raise RuntimeUnavailableError(
                self.label,
                'it was made without the gate that engine files have to pass.',
                remedy='Give it the EngineGate of this host.',
            )
        return self._gate

    def _load(self, entry: EngineCacheEntry) -> LoadedEngine[_Engine]:
        if entry.path.suffix != '.engine':
            raise EngineDeserializeError(
                f'{entry.path} is no .engine.', remedy='Correct the artefact in model.json, or take another runtime.'
            )
        source_sha256 = entry.source.content_sha256 if entry.source else None
        admitted = self._require_gate().admit(entry.path, engine_sha256=entry.sha256, source_sha256=source_sha256)
        cuda = open_cuda(self.label)
        trt = import_tensorrt(self.label)
        engine = _Engine(cuda, trt)
        try:
            engine.load(admitted, own_input_shapes(entry, self.label), self._config.gpu_memory_budget_bytes)
            wanted = self._wanted(entry, [spec.name for spec in engine.output_specs])
            finite = [own for name, own in wanted.items() if name not in self._non_finite(entry)]
            engine.take_out(wanted.values(), finite)
        except BaseException:
            engine.release()
            raise
        facts = EngineFacts(
            active_provider=PROVIDER,
            requested_providers=(PROVIDER,),
            cpu_only=False,
            cpu_nodes=0,
            notes=tuple(engine.notes),
            load_s=0.0,
        )
        return LoadedEngine(engine, engine.input_specs, engine.output_specs, facts)

    def _run(self, engine: _Engine, inputs: Mapping[str, NDArray]) -> Mapping[str, NDArray]:
        return engine.run(inputs)

    def _settle(self, engine: _Engine) -> Sequence[str]:
        return engine.capture()

    def _place(self, engine: _Engine, arrays: Mapping[str, NDArray]) -> None:
        engine.place(arrays)

    def _found_finite(self, engine: _Engine) -> bool:
        return engine.seen_finite

    def _free(self, engine: _Engine) -> None:
        engine.release()


class _Engine:
    """
    Hold one engine with its context, stream and memory; used by one thread at a time.

    TensorRT's objects must go in the order context, engine, runtime, and none of them before the stream is
    idle and the graph that refers to them is gone.
    """

    def __init__(self, cuda: Cuda, trt: ModuleType) -> None:
        self.input_specs: tuple[TensorSpec, ...] = ()
        self.output_specs: tuple[TensorSpec, ...] = ()
        self.inputs: dict[str, StagedTensor] = {}
        self.outputs: dict[str, StagedTensor] = {}
        self._leaving: dict[str, StagedTensor] = {}
        self._answer: dict[str, NDArray] = {}
        self.notes: list[str] = []
        self.seen_finite = False
        self._cuda = cuda
        self._trt = trt
        # One for all three, which belong to one thread at a time: whichever reports, the messages are this engine's.
        self._errors = error_recorder(trt)
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._stream: Any = None
        self._graph: Any = None
        self._check: FiniteCheck | None = None

    def load(self, admitted: AdmittedEngine, shapes: Mapping[str, Sequence[int | None]], budget_bytes: int) -> None:
        """
        Deserialise bytes that passed the gate, fix every shape and make room for one request.

        :param shapes: wanted shape by the engine's own input name.
        :param budget_bytes: GPU memory that the engine may take.
        :raises EngineDeserializeError: with what TensorRT said.
        """
        self._require_memory(len(admitted.plan), budget_bytes, admitted)
        self._runtime = self._trt.Runtime(vendor_logger(self._trt))
        self._runtime.error_recorder = self._errors
        self._engine = self._runtime.deserialize_cuda_engine(admitted.plan)
        if self._engine is None:
            raise self._refused(f'TensorRT refused {admitted.path}')
        self._engine.error_recorder = self._errors
        self._require_memory(_context_bytes(self._engine), budget_bytes, admitted)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise self._refused(f'TensorRT made no execution context for {admitted.path}')
        self._context.error_recorder = self._errors
        self._fix_shapes(shapes)
        self._stream = self._cuda.new_stream()
        for spec in (*self.input_specs, *self.output_specs):
            self._make_room(spec)

    def take_out(self, names: Collection[str], finite: Collection[str]) -> None:
        """
        Say which outputs leave the GPU with each request, and which of those have to be finite; before the first run.

        TensorRT writes all of them.
        """
        self._leaving = {name: tensor for name, tensor in self.outputs.items() if name in names}
        self._answer = {name: tensor.host for name, tensor in self._leaving.items()}
        self._watch_outputs(finite)

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request; the arrays returned are views of pinned memory, valid until the next run."""
        moved = [self.inputs[name].fill(array) for name, array in inputs.items()]
        if any(moved):
            self._capture_anew()
        self.seen_finite = False
        if self._check is not None:
            self._check.reset()
        try:
            if self._graph is None:
                self._enqueue()
            else:
                self._launch()
            (status,) = self._cuda.runtime.cudaStreamSynchronize(self._stream)
            if status:
                self._cuda.refuse('cudaStreamSynchronize', status)
        except (CudaError, InferenceError) as error:
            # What is on the stream already may still read and write the memory of the tensors.
            self._cuda.try_call('cudaStreamSynchronize', self._stream)
            if isinstance(error, InferenceError):
                raise
            raise InferenceError(
                f'CUDA failed the request: {error}. {self._said()}'.strip(),
                remedy='Where CUDA errors repeat, the process must be started again: its CUDA context is lost.',
            ) from error
        self.seen_finite = self._check is not None and not self._check.found
        return self._answer

    def place(self, arrays: Mapping[str, NDArray]) -> None:
        """Copy from and to these arrays from now on, where that is possible; a graph is captured anew."""
        staged = {**self.inputs, **self._leaving}
        placed = [staged[name].place(array) for name, array in arrays.items()]
        if not any(placed):
            return
        self._answer = {name: tensor.host for name, tensor in self._leaving.items()}
        self._capture_anew()

    def capture(self) -> list[str]:
        """
        Turn what a request does into one CUDA graph, after the first run; go on without where that fails.

        :return: why there is none, empty where there is.
        """
        expected = {name: array.copy() for name, array in self._answer.items()}
        try:
            self._graph = self._cuda.capture(self._stream, self._enqueue)
        except Exception as error:
            self._errors.clear()
            # Whatever the attempt has left behind shows now, not in flight.
            self.run({})
            return [f'No CUDA graph: {error}']
        self.run({})
        if different := [
            name for name in expected if not nearly_equal(self._answer[name], expected[name], _GRAPH_TOLERANCE)
        ]:
            self._drop_graph()
            self.run({})
            return [f'No CUDA graph: its answer differs in {different}.']
        return []

    def _capture_anew(self) -> None:
        """Replace a graph that has the addresses of before."""
        if self._graph is None:
            return
        self._drop_graph()
        self.run({})
        for remark in self.capture():
            _log.warning('%s', remark)

    def release(self) -> None:
        """Free everything; safe to repeat, also after an error that has cost the CUDA context."""
        cuda = self._cuda
        if self._stream is not None:
            cuda.try_call('cudaStreamSynchronize', self._stream)
        self._drop_graph()
        check, self._check = self._check, None
        if check is not None:
            check.release()
        self._context = None
        for tensor in (*self.inputs.values(), *self.outputs.values()):
            tensor.release()
        # The pinned arrays give their memory back when the last view of them goes.
        self.inputs, self.outputs, self._leaving, self._answer = {}, {}, {}, {}
        stream, self._stream = self._stream, None
        if stream is not None:
            cuda.try_call('cudaStreamDestroy', stream)
        self._engine = None
        self._runtime = None

    # --- loading ----------------------------------------------------------------------------------

    def _require_memory(self, wanted: int, budget_bytes: int, admitted: AdmittedEngine) -> None:
        free, _ = self._cuda.memory()
        if wanted > budget_bytes or wanted > free:
            raise EngineDeserializeError(
                f'{admitted.path} needs {wanted} bytes of GPU memory; the budget is {budget_bytes}, {free} are free.',
                remedy='Raise gpu_memory_budget_bytes, free GPU memory, or build a smaller engine.',
            )

    def _fix_shapes(self, shapes: Mapping[str, Sequence[int | None]]) -> None:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        for name in names:
            self._require_plain(name)
        for name in inputs:
            own = tuple(self._engine.get_tensor_shape(name))
            if all(size >= 0 for size in own):
                continue
            shape = self._input_shape(name, own, shapes.get(name, (None,) * len(own)))
            if not self._context.set_input_shape(name, shape):
                raise self._refused(f'the engine does not take input {name!r} with shape {shape}')
        self.input_specs = tuple(self._spec(name) for name in inputs)
        self.output_specs = tuple(self._spec(name) for name in outputs)

    def _require_plain(self, name: str) -> None:
        """Refuse what could not be handed over as an array: it would be misread, or crash."""
        engine, trt = self._engine, self._trt
        problem = ''
        if dtype_name(engine.get_tensor_dtype(name)) is None:
            problem = f'has type {engine.get_tensor_dtype(name)}, which NumPy lacks'
        elif engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            problem = 'holds a shape and lies on the host'
        elif engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
            problem = f'has the memory layout {engine.get_tensor_format(name)}'
        if problem:
            raise EngineDeserializeError(f'tensor {name!r} {problem}.', remedy=f'{_BUILD}.')

    def _input_shape(self, name: str, own: Sequence[int], wanted: Sequence[int | None]) -> tuple[int, ...]:
        """Fix each free axis: to what the bundle says, else to the one size it was built for, else a batch to 1."""
        smallest, _, largest = (tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0))
        shape = []
        for axis, (size, want, low, high) in enumerate(zip(own, wanted, smallest, largest, strict=False)):
            if size >= 0:
                shape.append(size)
            elif want is not None:
                shape.append(want)
            elif low == high:
                shape.append(low)
            elif axis == 0:
                shape.append(1)
        if len(shape) != len(own) or len(wanted) != len(own):
            raise EngineDeserializeError(
                f'input {name!r} has free axes: the engine says {tuple(own)}, the bundle {tuple(wanted)}.',
                remedy='Give its sizes under inputs in model.json.',
            )
        return tuple(int(size) for size in shape)

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(int(size) for size in tuple(self._context.get_tensor_shape(name)))
        if any(size < 0 for size in shape):
            raise EngineDeserializeError(
                f'tensor {name!r} has shape {shape} even with fixed inputs: its size depends on the data.',
                remedy='Export the model with outputs of fixed size, or fly the .onnx.',
            )
        dtype = dtype_name(self._engine.get_tensor_dtype(name))
        assert dtype is not None
        return TensorSpec(name, dtype, shape)

    def _make_room(self, spec: TensorSpec) -> None:
        shape = tuple(size for size in spec.axes if size is not None)
        inward = spec in self.input_specs
        tensor = StagedTensor(self._cuda, shape, spec.dtype, self._stream, inward=inward)
        (self.inputs if inward else self.outputs)[spec.name] = tensor
        if not self._context.set_tensor_address(spec.name, tensor.address):
            raise self._refused(f'TensorRT does not take the memory for {spec.name!r}')

    def _watch_outputs(self, finite: Collection[str]) -> None:
        """Have the GPU look for NaN and infinity, where it can."""
        try:
            self._check = FiniteCheck.proven(self._cuda, {name: self.outputs[name] for name in finite}, self._stream)
        except Exception as error:
            self.notes.append(f'The processor looks for non-finite outputs, since the GPU cannot: {error}')

    # --- running ----------------------------------------------------------------------------------

    def _enqueue(self) -> None:
        """Put one request on the stream: copies in, network, check, copies out."""
        for tensor in self.inputs.values():
            tensor.copy()
        if not self._context.execute_async_v3(int(self._stream)):
            raise InferenceError(
                f'TensorRT failed the request. {self._said()}', remedy='The next runtime of the chain can serve it.'
            )
        if self._check is not None:
            self._check.enqueue()
        for tensor in self._leaving.values():
            tensor.copy()

    def _launch(self) -> None:
        (status,) = self._cuda.runtime.cudaGraphLaunch(self._graph, self._stream)
        if status:
            self._cuda.refuse('cudaGraphLaunch', status)

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.try_call('cudaGraphExecDestroy', graph)

    def _refused(self, what: str) -> EngineDeserializeError:
        said = self._said() or 'it gave no reason, see the log.'
        return EngineDeserializeError(f'{what}: {said}', remedy=f'{_BUILD}.')

    def _said(self) -> str:
        """Return, and forget, what TensorRT reported."""
        messages = self._errors.messages()
        self._errors.clear()
        return f'TensorRT says: {"; ".join(messages)}.' if messages else ''


def _context_bytes(engine: Any) -> int:
    """Return what an execution context takes; 10.1 renamed it and 11 dropped the old name."""
    return int(engine.device_memory_size_v2 if hasattr(engine, 'device_memory_size_v2') else engine.device_memory_size)
