"""Arrays as the node and a worker share them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from numpy.typing import NDArray

from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout

__all__ = ['shared']


def shared(arrays: Mapping[str, NDArray], *, writable: bool) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
    """Return ``arrays`` in memory that two see: as its owner does, who may write, and as the other does."""
    layout = TensorLayout.of(arrays)
    segment = SharedTensors.create(layout.size, writable=True)
    own = segment.arrays(layout)
    for name, array in own.items():
        array[...] = arrays[name]
    return own, SharedTensors(os.dup(segment.descriptor), writable=writable).arrays(layout)
