"""CUDA through cuda-python: one GPU, pinned memory, a stream, a graph, and every error checked."""

from __future__ import annotations

import ctypes
import importlib
import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gps_denied_c7.errors import GpuUnavailableError, RuntimeUnavailableError

__all__ = [
    'QUAD_BYTES', 'Cuda', 'CudaError', 'GpuFacts', 'address_of', 'gpu_devices', 'gpu_stack_remedy', 'open_cuda',
    'require_gpu',
]  # fmt: skip

QUAD_BYTES = 16
"""GPU memory is a whole number of these, so that a kernel can read four words of 32 bits at a time to its end."""

# cuda-python 12.8 renamed its modules and 13 dropped the old names.
_MODULES = (('cuda.bindings.runtime', 'cuda.bindings.driver'), ('cuda.cudart', 'cuda.cuda'))

# A discrete GPU, the nodes of a Jetson, and the paravirtual GPU of WSL.
_DEVICE_NODES = ('nvidia[0-9]*', 'nvhost-gpu', 'nvhost-ctrl-gpu', 'nvgpu', 'dxg')

# cudaHostRegisterReadOnly, since CUDA 11.1; bindings may lack its name.
_REGISTER_READ_ONLY = 8

_log = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """
    A CUDA call that failed.

    :param name: as ``cudaErrorIllegalAddress``.
    """

    def __init__(self, call: str, name: str, text: str) -> None:
        super().__init__(f'{call}: {name} ({text})')
        self.name = name


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """
    Describe the GPU.

    :param name: as NVML spells it.
    :param sm: compute capability as major × 10 + minor.
    :param driver: newest CUDA version that the driver serves, as ``12.2``.
    :param runtime: CUDA version of the runtime library that answers here, as ``11.8``.
    """

    name: str
    sm: int
    driver: str
    runtime: str


def gpu_devices(dev: Path = Path('/dev')) -> list[str]:
    """Return the device files of NVIDIA GPUs; a look at file names, which no hung driver can delay."""
    return sorted(str(path) for pattern in _DEVICE_NODES for path in dev.glob(pattern))


def gpu_stack_remedy(install: str) -> str:
    """
    Return what to do where a package for the GPU is missing, or finds none.

    :param install: how the packages are installed.
    """
    if gpu_devices():
        return install
    return f'This host has no NVIDIA GPU, so nothing has to be installed. On a host with one: {install}'


def require_gpu(label: str) -> None:
    """
    Refuse a host without a GPU, before any vendor library is called.

    :param label: the runtime that asks, for the error.
    :raises GpuUnavailableError: there is none.
    """
    if not gpu_devices():
        raise GpuUnavailableError(
            label,
            'this host has no NVIDIA GPU (none of /dev/nvidia*, /dev/nvhost-gpu, /dev/dxg).',
            remedy='Run on a host with one, or give the container access to it.',
        )


def open_cuda(label: str) -> Cuda:
    """
    Return access to the first visible GPU.

    TensorRT's own entry points crash on a host without a GPU (8.6: segmentation fault in Runtime and
    in the deserialiser), so they may be called after this alone.

    :param label: the runtime that asks, for the error.
    :raises GpuUnavailableError: no GPU, or no driver for it; says which.
    :raises RuntimeUnavailableError: no cuda-python.
    """
    require_gpu(label)
    runtime, driver = _import_bindings(label)
    cuda = Cuda(runtime, driver)
    try:
        count = cuda.device_count()
    except RuntimeError as error:  # CudaError, or cuda-python's own where it finds no driver library
        raise GpuUnavailableError(
            label, f'CUDA does not start: {error}.', remedy='Install a driver that fits the CUDA version.'
        ) from error
    if count == 0:
        raise GpuUnavailableError(label, 'CUDA sees no GPU.', remedy='Look at CUDA_VISIBLE_DEVICES.')
    return cuda


def _import_bindings(label: str) -> tuple[ModuleType, ModuleType]:
    reasons = []
    for runtime, driver in _MODULES:
        try:
            return importlib.import_module(runtime), importlib.import_module(driver)
        except ImportError as error:
            reasons.append(str(error))
    raise RuntimeUnavailableError(
        label,
        f'cuda-python does not import: {"; ".join(reasons)}.',
        remedy='pip install -r requirements/gpu.txt',
    )


class Cuda:
    """
    Call the CUDA runtime and driver with every status checked; all on the device that is current.

    :param runtime: cuda-python's runtime module.
    :param driver: cuda-python's driver module.
    """

    def __init__(self, runtime: ModuleType, driver: ModuleType) -> None:
        self.runtime = runtime
        self.driver = driver
        self._to_device = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._to_host = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost

    def call(self, name: str, *arguments: Any) -> Any:
        """
        Call a function of the runtime or driver API; return what follows its status: nothing, one value or a tuple.

        :param name: those of the runtime API begin with ``cuda``, the driver's with ``cu``.
        :raises CudaError: the status is not success.
        """
        api = self.runtime if name.startswith('cuda') else self.driver
        return self._checked(name, getattr(api, name)(*arguments))

    def refuse(self, call: str, status: Any) -> NoReturn:
        """Raise CudaError for the status that ``call`` returned."""
        if call.startswith('cuda'):
            name, text = self.runtime.cudaGetErrorName(status)[1], self.runtime.cudaGetErrorString(status)[1]
        else:
            name, text = self.driver.cuGetErrorName(status)[1], self.driver.cuGetErrorString(status)[1]
        raise CudaError(call, _text(name), _text(text))

    def device_count(self) -> int:
        """Return how many GPUs this process may use."""
        status, count = self.runtime.cudaGetDeviceCount()
        if int(status) == int(self.runtime.cudaError_t.cudaErrorNoDevice):
            return 0
        self._checked('cudaGetDeviceCount', (status,))
        return int(count)

    def gpu_facts(self) -> GpuFacts:
        """Return what the current GPU is."""
        device = self.call('cudaGetDevice')
        attributes = self.runtime.cudaDeviceAttr
        major = self.call('cudaDeviceGetAttribute', attributes.cudaDevAttrComputeCapabilityMajor, device)
        minor = self.call('cudaDeviceGetAttribute', attributes.cudaDevAttrComputeCapabilityMinor, device)
        name = self.call('cudaGetDeviceProperties', device).name
        return GpuFacts(
            name=name.decode(errors='replace').rstrip('\0') if isinstance(name, bytes) else str(name),
            sm=10 * int(major) + int(minor),
            driver=_version(self.call('cudaDriverGetVersion')),
            runtime=_version(self.call('cudaRuntimeGetVersion')),
        )

    def memory(self) -> tuple[int, int]:
        """Return the GPU's free and total memory in bytes."""
        free, total = self.call('cudaMemGetInfo')
        return int(free), int(total)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """
        Return a zeroed array in page-locked memory.

        The memory is given back when the last view of it is gone: a caller that kept one past its
        time reads stale values, not freed memory.
        """
        dtype = np.dtype(dtype)
        size = max(1, math.prod(shape) * dtype.itemsize)
        address = int(self.call('cudaHostAlloc', size, self.runtime.cudaHostAllocDefault))
        block = (ctypes.c_uint8 * size).from_address(address)
        # At exit the driver takes the memory back, maybe before this could ask it to.
        weakref.finalize(block, self.try_call, 'cudaFreeHost', address).atexit = False
        array = np.asarray(block)[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        array[...] = np.zeros((), dtype)
        return array

    def device_memory(self, size: int) -> int:
        """Return the address of ``size`` zeroed bytes on the GPU, rounded up so that whole quads can be read."""
        size = max(QUAD_BYTES, -(-size // QUAD_BYTES) * QUAD_BYTES)
        address = int(self.call('cudaMalloc', size))
        try:
            self.call('cudaMemset', address, 0, size)
        except CudaError:
            self.try_call('cudaFree', address)
            raise
        return address

    def lock_pages(self, array: NDArray) -> None:
        """
        Page-lock memory that is there already, so that it is copied from and to without a stopover.

        To be undone with ``cudaHostUnregister`` and the array's address, before its memory is given back.

        :param array: on pages of its own, since none may be locked twice.
        :raises CudaError: the driver cannot, as for read-only memory on some GPUs.
        """
        flags = self.runtime.cudaHostRegisterDefault if array.flags.writeable else _REGISTER_READ_ONLY
        try:
            self.call('cudaHostRegister', address_of(array), array.nbytes, flags)
        except CudaError:
            self.runtime.cudaGetLastError()
            raise

    def copy_to_device(self, address: int, array: NDArray, stream: Any) -> Callable[[], None]:
        """Return a call that copies a pinned array to the GPU, in the order of ``stream``."""
        return self._copy(address, address_of(array), array.nbytes, self._to_device, stream)

    def copy_to_host(self, array: NDArray, address: int, stream: Any) -> Callable[[], None]:
        """Return a call that copies from the GPU to a pinned array, in the order of ``stream``."""
        return self._copy(address_of(array), address, array.nbytes, self._to_host, stream)

    def new_stream(self) -> Any:
        """Return a stream that does not wait for the default one."""
        return self.call('cudaStreamCreateWithFlags', self.runtime.cudaStreamNonBlocking)

    def capture(self, stream: Any, body: Callable[[], None]) -> Any:
        """
        Return an executable graph of what ``body`` puts on ``stream``; nothing of it runs.

        :raises Exception: what ``body`` raises, or CudaError where something in it cannot be captured;
            the stream can be used again either way.
        """
        runtime = self.runtime
        # Thread-local: what other threads do with CUDA meanwhile must not spoil the capture.
        self.call('cudaStreamBeginCapture', stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            body()
        except BaseException:
            status, graph = runtime.cudaStreamEndCapture(stream)
            if int(status) == 0 and int(graph):
                self.try_call('cudaGraphDestroy', graph)
            # A capture that broke leaves its error, which would fail the next call.
            runtime.cudaGetLastError()
            raise
        try:
            graph = self.call('cudaStreamEndCapture', stream)
        except CudaError:
            runtime.cudaGetLastError()
            raise
        try:
            return self._instantiate(graph)
        finally:
            self.try_call('cudaGraphDestroy', graph)

    def try_call(self, name: str, *arguments: Any) -> None:
        """Call a function that gives something back; a failure is logged, since nothing can be done about it."""
        try:
            self.call(name, *arguments)
        except CudaError as error:
            _log.warning('%s', error)

    def _instantiate(self, graph: Any) -> Any:
        if hasattr(self.runtime, 'cudaGraphInstantiateWithFlags'):
            return self.call('cudaGraphInstantiateWithFlags', graph, 0)
        return self.call('cudaGraphInstantiate', graph, 0)

    def _copy(self, target: int, source: int, size: int, kind: Any, stream: Any) -> Callable[[], None]:
        memcpy = self.runtime.cudaMemcpyAsync

        def copy() -> None:
            (status,) = memcpy(target, source, size, kind, stream)
            if status:
                self.refuse('cudaMemcpyAsync', status)

        return copy

    def _checked(self, call: str, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if int(status) != 0:
            self.refuse(call, status)
        return values[0] if len(values) == 1 else tuple(values) or None


def address_of(array: NDArray) -> int:
    """Return where the first value of ``array`` lies."""
    return int(array.__array_interface__['data'][0])


def _text(value: Any) -> str:
    return value.decode(errors='replace') if isinstance(value, bytes) else str(value)


def _version(number: int) -> str:
    return f'{number // 1000}.{number % 1000 // 10}'
