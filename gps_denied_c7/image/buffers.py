"""Work buffers that are made once and used for every frame."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ['Scratch']

# A 4K image of 8-bit colour takes 25 MB.
_KEPT_BYTES = 32 << 20


class Scratch:
    """
    Lend work arrays by name, from memory that grows to the largest one asked for.

    Freshly mapped megabytes cost more in page faults than in copying. Cameras of different sizes
    share the memory, so that taking turns costs nothing. For one thread.

    :param kept_bytes: larger arrays are made again each time, so that one very large image does not keep its memory.
    """

    def __init__(self, kept_bytes: int = _KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._memory: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """Return a C-contiguous array with arbitrary contents, valid until ``name`` is asked for again."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or memory.size < size:
            memory = np.empty(size, np.uint8)
            if size <= self._kept_bytes:
                self._memory[name] = memory
        return memory[:size].view(dtype).reshape(shape)
