"""
How arrays get into an ONNX Runtime session and out again: bound wherever the shape of an output is certain.

``run`` allocates each output again and copies it through pageable memory, which for dense outputs costs more
than the network: 1.44 ms on an H200, of which the engine ran 0.19. It also tries other providers by itself
when one fails, which a bound run does not.

A bound output has one shape, and ONNX Runtime refuses a run that needs another one. It writes nothing to a bound
output that is an input of the graph. ``run`` answers all of these: ONNX Runtime allocates such outputs itself.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import EngineDeserializeError
from gps_denied_c7.runtimes.gpu.cuda import Cuda
from gps_denied_c7.runtimes.gpu.nonfinite import FiniteCheck, watch_outputs
from gps_denied_c7.runtimes.gpu.staging import StagedTensor
from gps_denied_c7.tensors import TensorSpec, nearly_equal

__all__ = ['GpuIo', 'HostIo', 'TensorIo', 'compare_runs']

# What every ONNX Runtime's binding calls an NVIDIA GPU, and the first that this process sees.
_GPU = ('cuda', 0)
# Share of an output's range by which two runs of one session may differ.
_SAME = 1e-4

_log = logging.getLogger(__name__)


class TensorIo(ABC):
    """
    Run a session on NumPy arrays; one thread at a time.

    :param session: what is run.
    :param outputs: those that are wanted, by the session's own names; one of a certain shape gets a place of its own.
    """

    def __init__(self, session: Any, outputs: Sequence[TensorSpec]) -> None:
        self.seen_finite = False
        """Whether the GPU has seen every output of the last run that has to be finite to be so."""
        self.unsure: set[str] = set()
        """Outputs that came in another shape than their place has, which they have lost since."""
        self._session = session
        self._binding = session.io_binding()
        self._names = tuple(spec.name for spec in outputs)
        self._outputs: dict[str, Any] = {}

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """
        Run one request, all by the session's own names; the arrays returned are valid until the next run.

        A shape that surprises costs this request a second run, and the output its place.
        """
        self.seen_finite = False
        try:
            outputs = self._run_bound(inputs)
        except Exception as error:
            if not self.placed:
                raise
            outputs = self._run_surprised(inputs, error)
        for name in self._free:
            if any(np.may_share_memory(outputs[name], array) for array in inputs.values()):
                # The caller owns the request's memory, and may fill it again while this answer is read.
                outputs[name] = outputs[name].copy()
        return outputs

    def run_plain(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request as a user of ONNX Runtime would, with nothing bound; the arrays are the caller's."""
        found = self._session.run(list(self._names), dict(inputs))
        return dict(zip(self._names, found, strict=True))

    def unbind(self, names: Collection[str]) -> None:
        """Have ONNX Runtime allocate these outputs from now on."""
        for name in self.placed & set(names):
            self._unplace(name)
        self._bind_outputs()

    @property
    def placed(self) -> frozenset[str]:
        """Outputs that have a place of their own."""
        return frozenset(self._outputs)

    @abstractmethod
    def place(self, arrays: Mapping[str, NDArray]) -> None:
        """
        Read later requests from these arrays and write answers there, by name, where that saves a copy.

        They are kept as long as they are bound.
        """

    @abstractmethod
    def release(self) -> None:
        """Give back what was bound, while the session still exists; safe to repeat."""

    @abstractmethod
    def _run_bound(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request with every placed output in its place."""

    @abstractmethod
    def _place(self, name: str) -> NDArray:
        """Return the host memory of a placed output."""

    @abstractmethod
    def _bind_place(self, name: str) -> None:
        """Bind a placed output to its place."""

    @abstractmethod
    def _unplace(self, name: str) -> None:
        """Free an output's place; the stream is idle."""

    def _run_surprised(self, inputs: Mapping[str, NDArray], error: Exception) -> dict[str, NDArray]:
        try:
            outputs = self.run_plain(inputs)
        except Exception:
            # The places were not at fault.
            raise error from None
        placed = self.placed
        changed = {name for name in placed if self._place(name).shape != outputs[name].shape} or set(placed)
        _log.warning('outputs %s are allocated for each request from now on: %.300s', sorted(changed), error)
        self.unsure |= changed
        self.unbind(changed)
        return outputs

    def _bind_outputs(self) -> None:
        self._binding.clear_binding_outputs()
        self._free = tuple(name for name in self._names if name not in self._outputs)
        for name in sorted(self.placed):
            self._bind_place(name)

    def _bind_free(self) -> None:
        # Bound again each time: what the last run has put there would be taken for a buffer of the wanted size.
        for name in self._free:
            self._binding.bind_output(name)

    def _fetch_free(self) -> dict[str, NDArray]:
        if not self._free:
            return {}
        # The binding returns outputs in the order in which they were bound first, these after those in their places.
        values = self._binding.get_outputs()[-len(self._free) :]
        return {name: value.numpy() for name, value in zip(self._free, values, strict=True)}


class HostIo(TensorIo):
    """
    Bind host memory: inputs where they lie, outputs in arrays that are made once.

    :param session: on the CPU, or on a GPU that it copies an input to whenever that is bound.
    """

    def __init__(self, ort: ModuleType, session: Any, outputs: Sequence[TensorSpec]) -> None:
        super().__init__(session, outputs)
        self._ort = ort
        self._on_cpu = session.get_providers() == ['CPUExecutionProvider']
        self._inputs: dict[str, tuple[NDArray, tuple[int, ...], np.dtype[Any]]] = {}
        self._outputs: dict[str, NDArray] = {
            spec.name: np.zeros(spec.sizes, spec.dtype) for spec in outputs if spec.sizes is not None
        }
        # Kept as long as they are bound, since they own nothing and are owned by nothing.
        self._values: dict[str, Any] = {}
        self._bind_outputs()

    def place(self, arrays: Mapping[str, NDArray]) -> None:
        """Bind these arrays instead of its own outputs, where they are shaped as those are; see TensorIo."""
        for name, own in self._outputs.items():
            if name in arrays and (arrays[name].shape, arrays[name].dtype) == (own.shape, own.dtype):
                self._outputs[name] = arrays[name]
                self._bind_place(name)

    def release(self) -> None:
        """Unbind everything; see TensorIo."""
        self._binding = self._session = None
        self._values, self._inputs, self._outputs = {}, {}, {}

    def _run_bound(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        for name, array in inputs.items():
            known = self._inputs.get(name)
            same = known is not None and known[0] is array and known[1:] == (array.shape, array.dtype)
            if not self._on_cpu or not same:
                self._binding.bind_cpu_input(name, array)
                self._inputs[name] = array, array.shape, array.dtype
        self._bind_free()
        self._session.run_with_iobinding(self._binding)
        return {**self._outputs, **self._fetch_free()}

    def _place(self, name: str) -> NDArray:
        return self._outputs[name]

    def _bind_place(self, name: str) -> None:
        value = self._ort.OrtValue.ortvalue_from_numpy(self._outputs[name])
        self._binding.bind_ortvalue_output(name, value)
        self._values[name] = value

    def _unplace(self, name: str) -> None:
        del self._outputs[name], self._values[name]


class GpuIo(TensorIo):
    """
    Bind GPU memory at fixed addresses, with page-locked host memory on the other side of each copy.

    :param cuda: the GPU that the session runs on, which is the first one visible.
    :param finite: names of the outputs that have to be finite.
    :raises CudaError: no memory.
    """

    def __init__(self, cuda: Cuda, session: Any, outputs: Sequence[TensorSpec], finite: Collection[str]) -> None:
        super().__init__(session, outputs)
        self.notes: list[str] = []
        self._cuda = cuda
        self._inputs: dict[str, StagedTensor] = {}
        self._outputs: dict[str, StagedTensor] = {}
        self._answer: dict[str, NDArray] = {}
        self._check: FiniteCheck | None = None
        self._stream = cuda.new_stream()
        try:
            for spec in outputs:
                if spec.sizes is not None:
                    self._outputs[spec.name] = StagedTensor(cuda, spec.sizes, spec.dtype, self._stream, inward=False)
            self._answer = {name: tensor.host for name, tensor in self._outputs.items()}
            self._bind_outputs()
            if set(finite) <= self.placed:
                watched = {name: self._outputs[name] for name in finite}
                self._check = watch_outputs(cuda, watched, self._stream, self.notes)
        except BaseException:
            self.release()
            raise

    def place(self, arrays: Mapping[str, NDArray]) -> None:
        """Have the pages of these arrays locked, and copied from and to; see TensorIo."""
        for name, tensor in (*self._inputs.items(), *self._outputs.items()):
            if name in arrays:
                tensor.place(arrays[name])
        self._answer = {name: tensor.host for name, tensor in self._outputs.items()}

    def release(self) -> None:
        """Unbind and free everything, also after an error that has cost the CUDA context; see TensorIo."""
        self._binding = self._session = None
        stream, self._stream = self._stream, None
        if stream is not None:
            self._cuda.try_call('cudaStreamSynchronize', stream)
        self._drop_check()
        for tensor in (*self._inputs.values(), *self._outputs.values()):
            tensor.release()
        # The pinned arrays give their memory back when the last view of them goes.
        self._inputs, self._outputs, self._answer = {}, {}, {}
        if stream is not None:
            self._cuda.try_call('cudaStreamDestroy', stream)

    def _run_bound(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        for name, array in inputs.items():
            if name not in self._inputs:
                self._inputs[name] = StagedTensor(self._cuda, array.shape, array.dtype, self._stream, inward=True)
            self._inputs[name].fill(array)
            self._inputs[name].copy()
        self._wait()
        for name in inputs:
            # Bound again each time: an input that a node on the CPU reads is copied there when it is bound.
            staged = self._inputs[name]
            self._binding.bind_input(name, *_GPU, staged.host.dtype.type, staged.host.shape, staged.address)
        self._bind_free()
        # Binding only queues that copy, on a stream of ONNX Runtime's own.
        self._wait_for_device()
        self._session.run_with_iobinding(self._binding)
        # Nor does a run promise that copies from the CPU to bound outputs have ended.
        self._wait_for_device()
        if self._check is not None:
            self._check.reset()
            self._check.enqueue()
        for tensor in self._outputs.values():
            tensor.copy()
        self._wait()
        self.seen_finite = self._check is not None and not self._check.found
        return {**self._answer, **self._fetch_free()}

    def _place(self, name: str) -> NDArray:
        return self._outputs[name].host

    def _bind_place(self, name: str) -> None:
        staged = self._outputs[name]
        self._binding.bind_output(name, *_GPU, staged.host.dtype.type, staged.host.shape, staged.address)

    def _unplace(self, name: str) -> None:
        # It may be one of those that the GPU looks at.
        self._drop_check()
        self._cuda.try_call('cudaStreamSynchronize', self._stream)
        self._outputs.pop(name).release()
        del self._answer[name]

    def _wait(self) -> None:
        self._cuda.call('cudaStreamSynchronize', self._stream)

    def _wait_for_device(self) -> None:
        self._cuda.call('cudaDeviceSynchronize')

    def _drop_check(self) -> None:
        check, self._check = self._check, None
        if check is not None:
            check.release()


def compare_runs(io: TensorIo, inputs: Mapping[str, NDArray], *, random: bool = False) -> Iterator[str]:
    """
    Run one request as frames are run and as ``session.run`` does, and yield what is to be said of the difference.

    :param random: the network throws dice, so that two runs may be equal by chance and the next one not.
    :raises EngineDeserializeError: outputs differ, also where nothing is bound.
    """
    try:
        plain = io.run_plain(inputs)
    except Exception:
        # A network may refuse a request of this kind, as one without detections; that says nothing about places.
        return
    found = {name: array.copy() for name, array in io.run(inputs).items()}
    if not (wrong := _different(found, plain)):
        return
    changing = 'Outputs {} differ from run to run, so that they cannot be compared.'
    if differing := wrong & _different(io.run_plain(inputs), plain):
        yield changing.format(sorted(differing))
        wrong -= differing
    if placed := wrong & io.placed:
        io.unbind(placed)
        wrong &= _different(io.run(inputs), plain)
        if placed - wrong:
            yield f'Outputs {sorted(placed - wrong)} are not written where they are bound, and are allocated each time.'
    if wrong and random:
        yield changing.format(sorted(wrong))
    elif wrong:
        raise EngineDeserializeError(
            f'outputs {sorted(wrong)} are wrong when ONNX Runtime runs with IO binding.',
            remedy='Use another runtime, and report this with the model.',
        )


def _different(found: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> set[str]:
    return {name for name, array in expected.items() if not nearly_equal(found[name], array, _SAME)}
