"""Image messages whose fields do not fit together, or are as large as a message can be: one for every number."""

from __future__ import annotations

import random
from collections.abc import Callable

from sensor_msgs.msg import Image

__all__ = ['KINDS', 'hostile_message']

_BYTES = {'mono8': 1, 'rgb8': 3, 'mono16': 2, 'rgba16': 8, 'bayer_rggb8': 1, 'nv12': 1, 'nv24': 1, 'yuv422_yuy2': 2}


def hostile_message(number: int) -> tuple[str, Image]:
    """Return kind and message of a number; its stamp is left to the caller."""
    kinds = sorted(KINDS)
    kind, chance = kinds[number % len(kinds)], random.Random(number)
    return kind, KINDS[kind](chance)


def _image(width: int, height: int, encoding: str, step: int, size: int, **fields: object) -> Image:
    message = Image(width=width, height=height, encoding=encoding, step=step, **fields)
    message.data.frombytes(bytes(size))
    return message


def _sizes(chance: random.Random) -> Image:
    sides = (0, 1, 48, 64, 16384, 16385, 65536, (1 << 31) - 1, (1 << 32) - 1)
    width, height = chance.choice(sides), chance.choice(sides)
    return _image(width, height, chance.choice(sorted(_BYTES)), chance.choice((0, width)), chance.choice((0, 1, 3072)))


def _steps(chance: random.Random) -> Image:
    step = chance.choice((0, 1, 63, 64, 65, 1 << 16, 1 << 31, (1 << 32) - 1))
    return _image(64, 48, chance.choice(sorted(_BYTES)), step, chance.choice((0, 3072, 9216, 3071, 1 << 20)))


def _encodings(chance: random.Random) -> Image:
    texts = (
        '', ' ', 'x' * (4 << 20), 'é' * (1 << 20), 'mono8\nFATAL: forged', '\x1b[31mmono8', 'MONO8', '32FC1', '64FC4',
        '8UC512', 'bayer_rggb12', '\u202emono8', 'rgb8' * 5000, "'; DROP", '{}', '%s%n',
    )  # fmt: skip
    return _image(64, 48, chance.choice(texts), 64, 3072)


def _large(chance: random.Random) -> Image:
    encoding, width, height = chance.choice(
        [('mono8', 8192, 8192), ('rgb8', 4096, 4096), ('nv24', 4096, 4096), ('rgba16', 2048, 2048),
         ('bayer_rggb8', 8192, 4096), ('mono16', 16384, 2048), ('yuv422_yuy2', 4096, 8192)]
    )  # fmt: skip
    step = width * _BYTES[encoding]
    rows = {'nv24': 3, 'nv12': 3}.get(encoding, 1) * height // {'nv12': 2}.get(encoding, 1)
    return _image(width, height, encoding, step, step * rows)


def _planes(chance: random.Random) -> Image:
    width, height = chance.choice((1, 2, 63, 64)), chance.choice((1, 2, 47, 48))
    encoding = chance.choice(('nv12', 'nv21', 'nv24', 'yuv422', 'bayer_gbrg16', 'bayer_bggr8'))
    size = width * height * chance.choice((1, 2, 3)) // chance.choice((1, 2))
    return _image(width, height, encoding, width, size, is_bigendian=chance.choice((0, 1, 255)))


def _frames(chance: random.Random) -> Image:
    message = _image(64, 48, 'mono8', 64, 3072)
    message.header.frame_id = chance.choice(('x' * (4 << 20), '\n' * 1000, '\x1b]0;title\x07', '\u202e', 'é'))
    return message


KINDS: dict[str, Callable[[random.Random], Image]] = {
    'sizes': _sizes,
    'steps': _steps,
    'encodings': _encodings,
    'large': _large,
    'planes': _planes,
    'frame ids': _frames,
}
"""What makes each kind from a random number generator."""
