"""
JPEGs as working cameras send them: odd, some against the letter of the standard, and each the whole picture.

UVC cameras leave out the Huffman tables, and some the end mark; drivers hand on whole buffers, with zeros behind the
picture; AVI writers put their own first segment; others restart, comment, pad and append.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from support.hostile import jpeg_parts as jpeg
from support.hostile.jpeg_parts import Part

__all__ = ['ODDITIES', 'CameraStream', 'camera_stream']

AVI1 = Part(jpeg.APP0, b'AVI1\x00' + bytes(9))


@dataclass(frozen=True, slots=True)
class CameraStream:
    """
    One picture of an odd stream.

    :param data: as the camera sends it.
    :param plain: the same picture, as a file without any oddity.
    """

    oddity: str
    data: bytes
    plain: bytes


def camera_stream(oddity: str, seed: int = 1, width: int = 64, height: int = 48) -> CameraStream:
    """Return a picture of that size, one for each seed."""
    chance = random.Random(f'{oddity} {seed}')
    options: dict = {}
    if oddity in _SAMPLED:
        options = {'sampling': _SAMPLED[oddity]}
    elif oddity.startswith('restart'):
        options = {'restart_marker_blocks': chance.choice([1, 2, 3])}
    elif oddity == 'progressive':
        options = {'progressive': True}
    plain = _plain(chance.randrange(1000), width, height, 1 if oddity == 'grey' else 3, **options)
    return CameraStream(oddity, ODDITIES[oddity](plain, chance), plain)


def _plain(seed: int, width: int, height: int, channels: int, sampling: int | None = None, **options: object) -> bytes:
    pixels = jpeg.scene(seed, width, height, channels)
    if sampling is None:
        return jpeg.encoded(pixels, **options)
    # Pillow has no name for some of the samplings.
    done, content = cv2.imencode(
        '.jpg', np.ascontiguousarray(pixels[:, :, ::-1]), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    )
    assert done
    return content.tobytes()


_SAMPLED = {
    'sampled 4:4:4': cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    'sampled 4:2:2': cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    'sampled 4:2:0': cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    'sampled 4:1:1': cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
    'sampled 4:4:0': cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
}


def _as_it_is(plain: bytes, chance: random.Random) -> bytes:
    return plain


def _zeros(chance: random.Random) -> bytes:
    return bytes(chance.choice([1, 2, 7, 512, 4096, 100_000]))


def _without_tables(plain: bytes, chance: random.Random) -> bytes:
    return jpeg.join(jpeg.without(jpeg.split(plain), jpeg.DHT))


def _avi(plain: bytes, chance: random.Random) -> bytes:
    return jpeg.join([AVI1, *jpeg.without(jpeg.split(plain), jpeg.DHT, jpeg.APP0)])


def _uvc_buffer(plain: bytes, chance: random.Random) -> bytes:
    """Return what a UVC driver hands on: no tables, and the rest of its buffer behind the end mark."""
    return jpeg.join(jpeg.without(jpeg.split(plain), jpeg.DHT, jpeg.APP0)) + _zeros(chance)


def _uvc_without_end(plain: bytes, chance: random.Random) -> bytes:
    return jpeg.join(jpeg.without(jpeg.split(plain), jpeg.DHT), end=_zeros(chance))


def _comments(plain: bytes, chance: random.Random) -> bytes:
    parts: list[Part | bytes] = list(jpeg.split(plain))
    for _ in range(chance.randrange(1, 6)):
        content = chance.randbytes(chance.choice([0, 1, 100, 65_533]))
        parts.insert(chance.randrange(len(parts)), Part(chance.choice([jpeg.COM, 0xE5, 0xEC, 0xED]), content))
    return jpeg.join(parts)


def _fill(plain: bytes, chance: random.Random) -> bytes:
    parts: list[Part | bytes] = []
    for part in jpeg.split(plain):
        parts += [b'\xff' * chance.choice([0, 1, 2, 9]), part]
    return jpeg.join(parts, end=b'\xff' * chance.choice([1, 3]) + jpeg.EOI)


def _exif(plain: bytes, chance: random.Random) -> bytes:
    """Return the picture with a thumbnail, an end mark of its own within."""
    thumbnail = jpeg.encoded(jpeg.scene(chance.randrange(1000), 32, 24))
    # One directory of the picture with its orientation, which is not obeyed, and one of the thumbnail.
    first = struct.pack('>HHHIHHI', 1, 0x0112, 3, 1, chance.randrange(1, 9), 0, 26)
    second = struct.pack('>HHHIIHHIII', 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail), 0)
    exif = Part(jpeg.APP1, b'Exif\x00\x00MM\x00*\x00\x00\x00\x08' + first + second + thumbnail)
    return jpeg.join([exif, *jpeg.without(jpeg.split(plain), jpeg.APP0)])


def _profile(plain: bytes, chance: random.Random) -> bytes:
    pieces = [Part(0xE2, b'ICC_PROFILE\x00' + bytes((index, 3)) + chance.randbytes(500)) for index in (1, 2, 3)]
    return jpeg.join([*pieces, *jpeg.split(plain)])


def _pictures_behind(plain: bytes, chance: random.Random) -> bytes:
    """Return several pictures in one file, as phones and thermal cameras write them."""
    return plain + jpeg.encoded(jpeg.scene(chance.randrange(1000), 640, 480)) + _zeros(chance)


def _tables_apart(plain: bytes, chance: random.Random) -> bytes:
    """Return every table in a segment of its own, or all in one."""
    parts = jpeg.split(plain)
    tables = [part for part in parts if part.marker == jpeg.DHT]
    at = jpeg.place(parts, jpeg.DHT)
    rest = jpeg.without(parts, jpeg.DHT)
    together = [Part(jpeg.DHT, b''.join(part.body for part in tables))]
    return jpeg.join([*rest[:at], *(together if len(tables) > 1 else _one_by_one(tables[0])), *rest[at:]])


def _one_by_one(tables: Part) -> list[Part]:
    found, body = [], tables.body
    while body:
        size = 17 + sum(body[1:17])
        found.append(Part(jpeg.DHT, body[:size]))
        body = body[size:]
    return found


def _restart_at_the_end(plain: bytes, chance: random.Random) -> bytes:
    """Return the picture with one restart marker more, behind its last interval."""
    parts = jpeg.split(plain)
    at = jpeg.place(parts, jpeg.SOS)
    restarts = sum(parts[at].scan.count(bytes((0xFF, mark))) for mark in range(0xD0, 0xD8))
    return jpeg.join(jpeg.replaced(parts, at, scan=parts[at].scan + bytes((0xFF, 0xD0 + restarts % 8))))


def _other_names(plain: bytes, chance: random.Random) -> bytes:
    """Return the picture whose components are numbered from 0, with nothing that says JFIF."""
    parts = jpeg.without(jpeg.split(plain), jpeg.APP0)
    for marker, start, step in ((jpeg.SOF0, 6, 3), (jpeg.SOS, 1, 2)):
        at = jpeg.place(parts, marker)
        body = bytearray(parts[at].body)
        for index in range(3):
            body[start + step * index] = index
        parts = jpeg.replaced(parts, at, body=bytes(body))
    return jpeg.join(parts)


ODDITIES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    'plain': _as_it_is,
    'no Huffman tables': _without_tables,
    'no Huffman tables, AVI1': _avi,
    'no Huffman tables, zeros behind the end': _uvc_buffer,
    'no Huffman tables, no end mark, zeros': _uvc_without_end,
    'no end mark': lambda plain, chance: plain[:-2],
    'half an end mark': lambda plain, chance: plain[:-1],
    'no end mark, zeros': lambda plain, chance: plain[:-2] + _zeros(chance),
    'zeros before the end mark': lambda plain, chance: plain[:-2] + _zeros(chance) + jpeg.EOI,
    'zeros behind the end mark': lambda plain, chance: plain + _zeros(chance),
    'zeros before and behind the end mark': lambda plain, chance: plain[:-2] + bytes(6) + jpeg.EOI + _zeros(chance),
    'two end marks': lambda plain, chance: plain + jpeg.EOI,
    'rubbish behind the end mark': lambda plain, chance: plain + chance.randbytes(chance.choice([1, 100, 5000])),
    'pictures behind the end mark': _pictures_behind,
    'comments': _comments,
    'fill bytes': _fill,
    'Exif with a thumbnail': _exif,
    'colour profile': _profile,
    'tables together or apart': _tables_apart,
    'no first segment': lambda plain, chance: jpeg.join(jpeg.without(jpeg.split(plain), jpeg.APP0)),
    'components numbered from 0': _other_names,
    'restart markers': _as_it_is,
    'restart marker at the end': _restart_at_the_end,
    'progressive': _as_it_is,
    'grey': _as_it_is,
    **dict.fromkeys(_SAMPLED, _as_it_is),
}
"""What makes the odd stream of a plain file."""
