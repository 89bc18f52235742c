"""
How arrays get into an ONNX Runtime session and out again: bound, never through ``session.run``.

``run`` allocates every output anew and copies it through pageable memory, which for dense outputs costs more
than the network: 1.44 ms on an H200, of which the engine ran 0.19. It also tries other providers of its own
accord when one fails, which a bound run does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.runtimes.cuda import Cuda, FiniteCheck, StagedTensor
from gps_denied_c7.tensors import TensorSpec

__all__ = ['GpuIo', 'HostIo', 'TensorIo']

# What every ONNX Runtime's binding calls an NVIDIA GPU, and the first that this process sees.
_GPU = ('cuda', 0)


class TensorIo(Protocol):
    """Run a session on NumPy arrays; one thread at a time."""

    seen_finite: bool
    """Whether the GPU has seen every output of the last run to be finite."""

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request, all by the session's own names; the arrays returned are valid until the next run."""
        ...

    def place(self, arrays: Mapping[str, NDArray]) -> None:
        """
        Read later requests from these arrays and write answers there, by name, where that saves a copy.

        They are kept as long as they are bound.
        """
        ...

    def release(self) -> None:
        """Give back what was bound, while the session still exists; safe to repeat."""
        ...


class HostIo:
    """
    Bind host memory: inputs where they lie, outputs in arrays that are made once.

    An output whose size depends on the data has no place of its own; ONNX Runtime makes it anew each time.

    :param session: on the CPU, or on a GPU that it copies an input to whenever that is bound.
    :param outputs: the session's own outputs, None where an axis is free.
    """

    seen_finite = False

    def __init__(self, ort: ModuleType, session: Any, outputs: Sequence[TensorSpec]) -> None:
        self._ort = ort
        self._session = session
        self._binding = session.io_binding()
        self._free = [spec.name for spec in outputs if None in spec.shape]
        self._on_cpu = session.get_providers() == ['CPUExecutionProvider']
        self._inputs: dict[str, tuple[NDArray, tuple[int, ...], np.dtype[Any]]] = {}
        self._outputs: dict[str, NDArray] = {}
        # Kept as long as they are bound, since they own nothing and are owned by nothing.
        self._values: dict[str, Any] = {}
        self._bind({spec.name: np.zeros(_sizes(spec), spec.dtype) for spec in outputs if None not in spec.shape})

    def _bind(self, outputs: Mapping[str, NDArray]) -> None:
        for name, array in outputs.items():
            value = self._ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_output(name, value)
            self._values[name], self._outputs[name] = value, array

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request; see TensorIo."""
        for name, array in inputs.items():
            known = self._inputs.get(name)
            same = known is not None and known[0] is array and known[1:] == (array.shape, array.dtype)
            if not self._on_cpu or not same:
                self._binding.bind_cpu_input(name, array)
                self._inputs[name] = array, array.shape, array.dtype
        _bind_free(self._binding, self._free)
        self._session.run_with_iobinding(self._binding)
        return {**self._outputs, **_fetch_free(self._binding, self._free)}

    def place(self, arrays: Mapping[str, NDArray]) -> None:
        """Bind these arrays instead of its own outputs, where they are shaped as those are; see TensorIo."""
        self._bind({
            name: arrays[name]
            for name, own in self._outputs.items()
            if name in arrays and (arrays[name].shape, arrays[name].dtype) == (own.shape, own.dtype)
        })  # fmt: skip

    def release(self) -> None:
        """Unbind everything; see TensorIo."""
        self._binding = self._session = None
        self._values, self._inputs, self._outputs = {}, {}, {}


class GpuIo:
    """
    Bind GPU memory at fixed addresses, with page-locked host memory on the other side of each copy.

    :param cuda: the GPU that the session runs on, which is the first one visible.
    :param outputs: the session's own outputs, None where an axis is free.
    :raises CudaError: no memory.
    """

    def __init__(self, cuda: Cuda, session: Any, outputs: Sequence[TensorSpec]) -> None:
        self.seen_finite = False
        self.notes: list[str] = []
        self._cuda = cuda
        self._session = session
        self._binding = session.io_binding()
        self._free = [spec.name for spec in outputs if None in spec.shape]
        self._inputs: dict[str, StagedTensor] = {}
        self._outputs: dict[str, StagedTensor] = {}
        self._answer: dict[str, NDArray] = {}
        self._check: FiniteCheck | None = None
        self._stream = cuda.new_stream()
        try:
            for spec in outputs:
                if None not in spec.shape:
                    self._add_output(spec)
            self._watch_outputs()
        except BaseException:
            self.release()
            raise

    def run(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request; see TensorIo."""
        for name, array in inputs.items():
            if name not in self._inputs:
                self._inputs[name] = StagedTensor(self._cuda, array.shape, array.dtype, self._stream, inward=True)
            self._inputs[name].fill(array)
            self._inputs[name].copy()
        self._wait()
        for name in inputs:
            # Bound anew each time: an input that a node on the CPU reads is copied there when it is bound.
            staged = self._inputs[name]
            self._binding.bind_input(name, *_GPU, staged.host.dtype.type, staged.host.shape, staged.address)
        _bind_free(self._binding, self._free)
        self.seen_finite = False
        self._session.run_with_iobinding(self._binding)
        if self._check is not None:
            self._check.reset()
            self._check.enqueue()
        for tensor in self._outputs.values():
            tensor.copy()
        self._wait()
        self.seen_finite = self._check is not None and not self._check.found
        return {**self._answer, **_fetch_free(self._binding, self._free)}

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
        check, self._check = self._check, None
        if check is not None:
            check.release()
        for tensor in (*self._inputs.values(), *self._outputs.values()):
            tensor.release()
        # The pinned arrays give their memory back when the last view of them goes.
        self._inputs, self._outputs, self._answer = {}, {}, {}
        if stream is not None:
            self._cuda.try_call('cudaStreamDestroy', stream)

    def _add_output(self, spec: TensorSpec) -> None:
        staged = StagedTensor(self._cuda, _sizes(spec), spec.dtype, self._stream, inward=False)
        self._outputs[spec.name], self._answer[spec.name] = staged, staged.host
        self._binding.bind_output(spec.name, *_GPU, staged.host.dtype.type, staged.host.shape, staged.address)

    def _wait(self) -> None:
        self._cuda.call('cudaStreamSynchronize', self._stream)

    def _watch_outputs(self) -> None:
        """Have the GPU look for NaN and infinity, where it can."""
        if self._free:
            return
        try:
            self._check = FiniteCheck.proven(self._cuda, self._outputs, self._stream)
        except Exception as error:
            self.notes.append(f'The processor looks for non-finite outputs, since the GPU cannot: {error}')


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(size for size in spec.shape if size is not None)


def _bind_free(binding: Any, names: Sequence[str]) -> None:
    # Bound anew each time: what the last run has put there would be taken for a buffer of the wanted size.
    for name in names:
        binding.bind_output(name)


def _fetch_free(binding: Any, names: Sequence[str]) -> dict[str, NDArray]:
    # The binding keeps the order in which names were first bound, and these came after all that have a place.
    values = binding.get_outputs()[-len(names) :] if names else []
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}
