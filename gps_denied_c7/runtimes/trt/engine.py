"""One TensorRT engine on the GPU: its buffers, its requests and its CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from gps_denied_c7.engines.admission import AdmittedEngine
from gps_denied_c7.errors import EngineContentError, EngineDeserializeError, InferenceError
from gps_denied_c7.runtimes.gpu.cuda import Cuda, CudaError
from gps_denied_c7.runtimes.gpu.nonfinite import FiniteCheck, watch_outputs
from gps_denied_c7.runtimes.gpu.staging import StagedTensor
from gps_denied_c7.runtimes.gpu.tensorrt_library import dtype_name, error_recorder, vendor_logger
from gps_denied_c7.tensors import TensorSpec, nearly_equal

__all__ = ['BUILD_REMEDY', 'TensorrtEngine']

BUILD_REMEDY = 'Build one on the ground with: c7_engine build'
_log = logging.getLogger(__name__)

# How far a graph's answer may lie from the plain run's, in parts of the output's range: kernels that add up in another
# order each time differ in the last bits of float16.
_GRAPH_TOLERANCE = 1e-2


class TensorrtEngine:
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
        watched = {name: self.outputs[name] for name in finite}
        self._check = watch_outputs(self._cuda, watched, self._stream, self.notes)

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
        """Copy from and to these arrays from now on, where that is possible; a graph is captured again."""
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
        """Replace a graph that has the previous addresses."""
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
            raise EngineContentError(f'tensor {name!r} {problem}.', remedy=f'{BUILD_REMEDY}.')

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
            raise EngineContentError(
                f'input {name!r} has free axes: the engine says {tuple(own)}, the bundle {tuple(wanted)}.',
                remedy='Give its sizes under inputs in model.json.',
            )
        return tuple(int(size) for size in shape)

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(int(size) for size in tuple(self._context.get_tensor_shape(name)))
        if any(size < 0 for size in shape):
            raise EngineContentError(
                f'tensor {name!r} has shape {shape} even with fixed inputs: its size depends on the data.',
                remedy='Export the model with outputs of fixed size, or use the .onnx.',
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
        return EngineDeserializeError(f'{what}: {said}', remedy=f'{BUILD_REMEDY}.')

    def _said(self) -> str:
        """Return, and forget, what TensorRT reported."""
        messages = self._errors.messages()
        self._errors.clear()
        return f'TensorRT says: {"; ".join(messages)}.' if messages else ''


def _context_bytes(engine: Any) -> int:
    """Return what an execution context takes; 10.1 renamed it and 11 dropped the old name."""
    return int(engine.device_memory_size_v2 if hasattr(engine, 'device_memory_size_v2') else engine.device_memory_size)
