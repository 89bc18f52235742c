"""Tensors that two processes see: named arrays in one sealed block of anonymous memory (F-1)."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import InferenceError

__all__ = ['SharedTensors', 'TensorLayout', 'segment_bytes']

# Pages that a driver locks for one tensor must not hold another's.
_ALIGNMENT = mmap.PAGESIZE
_SMALLEST_BYTES = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_ITEM_BYTES = {np.dtype(code).name: np.dtype(code).itemsize for code in '?bBhHiIlLqQefd'}
_MAX_RANK = 32
# NumPy counts with the axes of no size left out.
_MAX_BYTES = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """
    Say where each tensor of a segment lies.

    :param tensors: name, NumPy type name, shape and offset in bytes of each.
    """

    tensors: tuple[tuple[str, str, tuple[int, ...], int], ...]

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray], rooms: Mapping[str, int] | None = None) -> TensorLayout:
        """
        Lay ``arrays`` out one after another, each on memory pages of its own.

        :param rooms: bytes kept for each by name, where they are more than it has.
        """
        tensors, offset = [], 0
        for name, array in arrays.items():
            tensors.append((name, array.dtype.name, array.shape, offset))
            offset += segment_bytes((max(array.nbytes, rooms[name] if rooms else 0),))
        return cls(tuple(tensors))

    @classmethod
    def single(cls, name: str, dtype: str, shape: tuple[int, ...]) -> TensorLayout:
        """Lay one tensor out at the beginning of its segment."""
        return cls(((name, dtype, shape, 0),))

    def check(self) -> None:
        """
        Raise InferenceError for tensors that are impossible or overlap.

        For a layout that came from another process.
        """
        taken = []
        for name, dtype, shape, offset in self.tensors:
            possible = dtype in _ITEM_BYTES and offset >= 0 and len(shape) <= _MAX_RANK and min(shape, default=0) >= 0
            size = _nbytes(dtype, shape) if possible else 0
            if not possible or (size or _nbytes(dtype, [axis or 1 for axis in shape])) > _MAX_BYTES:
                raise InferenceError(f'tensor {name!r} has an impossible layout: {dtype} {shape} at {offset}.')
            if size:
                taken.append((offset, offset + size))
        taken.sort()
        if any(end > start for (_, end), (start, _) in itertools.pairwise(taken)):
            raise InferenceError(f'tensors overlap: {self.tensors!r:.200}.')

    @property
    def size(self) -> int:
        """Bytes up to the end of the last tensor."""
        return max((offset + _nbytes(dtype, shape) for _, dtype, shape, offset in self.tensors), default=0)


class SharedTensors:
    """
    Map a sealed block of memory that has no name and cannot shrink.

    Nothing of it stays behind when its last process ends, and no process can make another's access
    fail. The process that creates it sends the descriptor and may then close its own.

    :param descriptor: of a memfd, owned by this object from now on.
    :param writable: map it for writing.
    :raises InferenceError: not a sealed memfd.
    """

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        self.descriptor = descriptor
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise InferenceError('a tensor segment is not sealed.')
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._memory = mmap.mmap(descriptor, 0, access=access)
        except BaseException:
            os.close(descriptor)
            raise
        self.size = len(self._memory)

    @classmethod
    def create(cls, size: int, *, writable: bool) -> SharedTensors:
        """
        Reserve ``size`` bytes now, so that no later access can find the memory gone.

        :raises OSError: no memory.
        """
        descriptor = os.memfd_create('c7-tensors', os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(descriptor, 0, max(size, _SMALLEST_BYTES))
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, writable=writable)

    def arrays(self, layout: TensorLayout) -> dict[str, NDArray]:
        """
        Return views by name; read-only where the segment was mapped so, valid as long as they are kept.

        :raises InferenceError: a tensor lies outside of the segment.
        """
        views = {}
        for name, dtype, shape, offset in layout.tensors:
            if offset + _nbytes(dtype, shape) > self.size:
                raise InferenceError(f'tensor {name!r} reaches past the {self.size} bytes of its segment.')
            count = math.prod(shape)
            views[name] = np.frombuffer(self._memory, dtype, count, offset).reshape(shape)
        return views

    def close(self) -> None:
        """Give the descriptor and, as soon as the last view is gone, the memory back; safe to repeat."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        # Views that are still held keep the mapping until they go.
        with contextlib.suppress(BufferError):
            self._memory.close()


def segment_bytes(rooms: Iterable[int]) -> int:
    """Return the bytes of a segment for tensors of these sizes, each on memory pages of its own."""
    return sum(-(-room // _ALIGNMENT) * _ALIGNMENT for room in rooms)


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return (_ITEM_BYTES.get(dtype) or np.dtype(dtype).itemsize) * math.prod(shape)
