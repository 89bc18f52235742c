"""Test pictures of different kinds, the same ones for one seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ['FLAT', 'golden_pictures', 'noise_picture']

FLAT = ('black', 'white')
_OCTAVES = (64, 32, 16, 8, 4, 2, 1)


def golden_pictures(width: int, height: int, seed: int) -> dict[str, NDArray[np.uint8]]:
    """
    Return RGB pictures (height, width, 3) of different kinds by name, the same for one seed.

    ``noise``: structure at every scale. ``black``, ``white``: nothing at all. ``blobs``: a few squares and discs on
    grey, for few detections. ``checkerboard``: corners everywhere. ``stripes``: edges without corners.
    """
    rows, columns = np.mgrid[:height, :width]
    chance = np.random.RandomState(seed)
    blobs = np.full((height, width, 3), 96, np.uint8)
    for index in range(6):
        y, x, size = chance.randint(height), chance.randint(width), chance.randint(2, max(3, min(height, width) // 10))
        away = np.abs(np.stack((rows - y, columns - x)))
        inside = away.max(axis=0) <= size if index % 2 else np.square(away).sum(axis=0) <= size * size
        blobs[inside] = chance.randint(0, 256, 3)
    cell = max(2, min(height, width) // 24)
    boards = {
        'checkerboard': (rows // cell + columns // cell) % 2,
        # Ever wider: 1, 2, 3 … cells.
        'stripes': np.floor(np.sqrt(2.0 * (rows + 2 * columns) / cell)) % 2,
    }
    return {
        'noise': noise_picture(width, height, seed),
        'black': np.zeros((height, width, 3), np.uint8),
        'white': np.full((height, width, 3), 255, np.uint8),
        'blobs': blobs,
        **{name: np.repeat((board * 255).astype(np.uint8)[..., None], 3, axis=2) for name, board in boards.items()},
    }


def noise_picture(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """
    Return an RGB picture (height, width, 3) with structure at every scale, full contrast, the same for one seed.

    White noise alone is gone after a network's first pooling.
    """
    # RandomState's stream is frozen, that of the newer generators may change between versions (NEP 19).
    noise = np.random.RandomState(seed)
    total = np.zeros((height, width, 3), np.int64)
    for cell in _OCTAVES:
        blocks = noise.randint(0, 256, (-(-height // cell), -(-width // cell), 3)).astype(np.int64)
        total += blocks.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    low, high = int(total.min()), int(total.max())
    return ((total - low) * 255 // max(1, high - low)).astype(np.uint8)
