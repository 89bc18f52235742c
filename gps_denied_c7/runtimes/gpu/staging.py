"""Tensors on both sides: GPU memory, and page-locked memory of the host."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gps_denied_c7.runtimes.gpu.cuda import Cuda, CudaError, address_of

__all__ = ['StagedTensor']

_log = logging.getLogger(__name__)


class StagedTensor:
    """
    Hold a tensor on both sides: GPU memory at an address that stays, and page-locked memory of the host.

    :param stream: whose order the copies keep.
    :param inward: it is copied to the GPU, else from it.
    :raises CudaError: no memory.
    """

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: DTypeLike, stream: Any, *, inward: bool) -> None:
        self.host = cuda.pinned(shape, dtype)
        """The array that :meth:`copy` reads or fills."""
        self.address = cuda.device_memory(self.host.nbytes)
        """Of the GPU's memory."""
        # Given up on the way back, where the answer goes to what is placed.
        self._own = self.host if inward else None
        self._cuda = cuda
        self._stream = stream
        self._inward = inward
        self._locked = 0
        self.copy = self._make_copy()
        """Put the copy on the stream."""

    def fill(self, array: NDArray) -> bool:
        """
        Have what is copied to the GPU hold ``array``: nothing is to be done where it lies there.

        What was placed is its owner's, and not written to: another array than that is copied from memory of its own.
        The stream must be idle.

        :return: whether that is a change of where the copy reads.
        """
        if array is self.host or address_of(array) == address_of(self.host):
            return False
        assert self._own is not None
        moved = self.host is not self._own
        if moved:
            self._unlock()
            self.host = self._own
            self.copy = self._make_copy()
        np.copyto(self.host, array)
        return moved

    def place(self, array: NDArray) -> bool:
        """
        Copy from or to ``array`` from now on; the stream must be idle.

        :param array: shaped as its own; kept until another takes its place. One that is copied to the GPU is only read.
        :return: whether that is a change; False also for an array that does not do, and for pages that the driver does
            not lock.
        """
        fits = (array.shape, array.dtype) == (self.host.shape, self.host.dtype) and array.nbytes
        fits = fits and array.flags.c_contiguous and (self._inward or array.flags.writeable)
        if not fits or address_of(array) == address_of(self.host):
            return False
        try:
            self._cuda.lock_pages(array)
        except CudaError as error:
            _log.info('tensors of %d bytes are copied once more: %s', array.nbytes, error)
            return False
        self._unlock()
        self.host, self._locked = array, address_of(array)
        self.copy = self._make_copy()
        return True

    def release(self) -> None:
        """Free the GPU's memory and unlock what was placed, once the stream is idle; safe to repeat."""
        self._unlock()
        address, self.address = self.address, 0
        if address:
            self._cuda.try_call('cudaFree', address)

    def _make_copy(self) -> Callable[[], None]:
        if self._inward:
            return self._cuda.copy_to_device(self.address, self.host, self._stream)
        return self._cuda.copy_to_host(self.host, self.address, self._stream)

    def _unlock(self) -> None:
        locked, self._locked = self._locked, 0
        if locked:
            self._cuda.try_call('cudaHostUnregister', locked)
