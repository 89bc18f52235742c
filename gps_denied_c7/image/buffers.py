"""Work buffers that are made once and used for every frame."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ['Scratch']


class Scratch:
    """
    Lend work arrays by name, from memory that only ever grows to the largest one asked for.

    Freshly mapped megabytes cost more in page faults than in copying. Cameras of different sizes
    share the memory, so that taking turns costs nothing. For one thread.
    """

    def __init__(self) -> None:
        self._memory: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray:
        """Return a C-contiguous array with arbitrary contents, valid until ``name`` is asked for again."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or memory.size < size:
            memory = self._memory[name] = np.empty(size, np.uint8)
        return memory[:size].view(dtype).reshape(shape)
