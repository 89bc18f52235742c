"""Find NaN and infinity on the GPU, with a kernel in PTX that the driver compiles for whatever GPU there is."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from gps_denied_c7.errors import EngineDeserializeError
from gps_denied_c7.runtimes.gpu.cuda import QUAD_BYTES, Cuda, address_of
from gps_denied_c7.runtimes.gpu.staging import StagedTensor
from gps_denied_c7.tensors import is_finite

__all__ = ['FiniteCheck', 'watch_outputs']

_KERNEL_NAME = b'find_non_finite'

# IEEE 754: a value is NaN or infinite where every bit of its exponent is set, and only there. A word holds one
# float32, or two float16 with a mask for each half.
_MASKS = {'float32': (0x7F800000, 0x7F800000), 'float16': (0x00007C00, 0x7C000000)}

_WORD = b"""
    and.b32 %%t, %%w%(word)d, %%low;
    setp.eq.u32 %%p, %%t, %%low;
    @%%p mov.u32 %%found, 1;
    and.b32 %%t, %%w%(word)d, %%high;
    setp.eq.u32 %%p, %%t, %%high;
    @%%p mov.u32 %%found, 1;"""

# Each thread walks over every n-th quad, n being the number of threads, and writes the flag only where it found
# something, so that a good frame costs no traffic over the bus. All threads write the same value.
_KERNEL = b"""\
.version 6.0
.target sm_50
.address_size 64

.visible .entry find_non_finite(
    .param .u64 data,
    .param .u32 quads,
    .param .u32 low,
    .param .u32 high,
    .param .u64 flag)
{
    .reg .pred %%p;
    .reg .b32 %%i, %%stride, %%quads, %%low, %%high, %%found, %%t, %%w<4>;
    .reg .b64 %%data, %%flag, %%at;

    ld.param.u64 %%data, [data];
    ld.param.u32 %%quads, [quads];
    ld.param.u32 %%low, [low];
    ld.param.u32 %%high, [high];
    ld.param.u64 %%flag, [flag];
    cvta.to.global.u64 %%data, %%data;
    cvta.to.global.u64 %%flag, %%flag;
    mov.u32 %%i, %%ctaid.x;
    mov.u32 %%stride, %%ntid.x;
    mov.u32 %%t, %%tid.x;
    mad.lo.u32 %%i, %%i, %%stride, %%t;
    mov.u32 %%t, %%nctaid.x;
    mul.lo.u32 %%stride, %%stride, %%t;
    mov.u32 %%found, 0;
next:
    setp.ge.u32 %%p, %%i, %%quads;
    @%%p bra done;
    mul.wide.u32 %%at, %%i, 16;
    add.u64 %%at, %%data, %%at;
    ld.global.v4.u32 {%%w0, %%w1, %%w2, %%w3}, [%%at];%(words)s
    add.u32 %%i, %%i, %%stride;
    bra.uni next;
done:
    setp.eq.u32 %%p, %%found, 0;
    @%%p ret;
    st.global.u32 [%%flag], 1;
    ret;
}
""" % {b'words': b''.join(_WORD % {b'word': word} for word in range(4))}
_THREADS = 256
_MAX_BLOCKS = 1024


class FiniteCheck:
    """
    Look for NaN and infinity on the GPU, in the order of a stream.

    The processor would need longer to read the outputs of a frame than the GPU needs to make them.

    :param checks: GPU address, bytes and NumPy dtype of each tensor, allocated by :meth:`Cuda.device_memory`.
    :raises CudaError: the driver cannot compile or load the kernel.
    """

    def __init__(self, cuda: Cuda, checks: list[tuple[int, int, str]], stream: Any) -> None:
        self._cuda = cuda
        self._found = cuda.pinned((1,), np.uint32)
        self._stream = cuda.driver.CUstream(int(stream))
        self._module: Any = cuda.call('cuModuleLoadData', _KERNEL + b'\0')
        self._kernel = cuda.call('cuModuleGetFunction', self._module, _KERNEL_NAME)
        self._launches = [self._launch(*check) for check in checks]

    @classmethod
    def proven(cls, cuda: Cuda, outputs: Mapping[str, StagedTensor], stream: Any) -> FiniteCheck | None:
        """
        Return a check of these outputs that was right for a NaN at the end of each, and for none.

        :param outputs: by name; the last value of each is overwritten.
        :return: None where one has a type that it cannot read.
        :raises CudaError: as the constructor.
        :raises EngineDeserializeError: it missed or made up a NaN.
        """
        hosts = {name: tensor.host for name, tensor in outputs.items()}
        floats = {name: host for name, host in hosts.items() if host.dtype.kind == 'f' and host.size}
        if any(str(host.dtype) not in _MASKS for host in floats.values()):
            return None
        wanted = [(outputs[name].address, host.nbytes, str(host.dtype)) for name, host in floats.items()]
        check = cls(cuda, wanted, stream)
        try:
            for name in floats:
                check._prove(name, outputs[name], stream)
        except BaseException:
            check.release()
            raise
        return check

    def _prove(self, name: str, tensor: StagedTensor, stream: Any) -> None:
        for value in (np.nan, 0.0):
            tensor.host.reshape(-1)[-1] = value
            self._cuda.copy_to_device(tensor.address, tensor.host, stream)()
            self.reset()
            self.enqueue()
            self._cuda.call('cudaStreamSynchronize', stream)
            if self.found == is_finite(tensor.host):
                raise EngineDeserializeError(f'the GPU missed or made up a NaN in {name!r}.')

    @property
    def found(self) -> bool:
        """Whether the last run found one; to be read after the stream was synchronised."""
        return bool(self._found[0])

    def reset(self) -> None:
        """Forget what was found; to be called before each run."""
        self._found[0] = 0

    def enqueue(self) -> None:
        """Put the look at every tensor on the stream."""
        launch_kernel = self._cuda.driver.cuLaunchKernel
        for blocks, _, parameters in self._launches:
            (status,) = launch_kernel(
                self._kernel, blocks, 1, 1, _THREADS, 1, 1, 0, self._stream, ctypes.addressof(parameters), 0
            )
            if status:
                self._cuda.refuse('cuLaunchKernel', status)

    def release(self) -> None:
        """Unload the kernel; safe to repeat."""
        module, self._module = self._module, None
        if module is not None:
            self._cuda.try_call('cuModuleUnload', module)

    def _launch(self, address: int, size: int, dtype: str) -> tuple[int, tuple[Any, ...], Any]:
        """Return the grid, and what a launch passes, in memory that stays where it is."""
        quads = -(-size // QUAD_BYTES)
        low, high = _MASKS[dtype]
        values = (
            ctypes.c_uint64(address),
            ctypes.c_uint32(quads),
            ctypes.c_uint32(low),
            ctypes.c_uint32(high),
            ctypes.c_uint64(address_of(self._found)),
        )
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        return min(_MAX_BLOCKS, -(-quads // _THREADS)), values, pointers


def watch_outputs(
    cuda: Cuda, outputs: Mapping[str, StagedTensor], stream: Any, notes: list[str]
) -> FiniteCheck | None:
    """
    Have the GPU look for NaN and infinity in these outputs, where it can.

    :param outputs: as for :meth:`FiniteCheck.proven`.
    :param notes: gets the reason where it cannot.
    """
    try:
        return FiniteCheck.proven(cuda, outputs, stream)
    except Exception as error:
        notes.append(f'The CPU checks the outputs for NaN and infinity, since the GPU cannot: {error}')
        return None
