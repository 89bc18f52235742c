"""
PNG to pixels, or a refusal: libpng warns about much of what is wrong and goes on.

A file is walked chunk by chunk, every checksum is verified, and libpng gets the chunks alone that decide about pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import ImageRejectedError

__all__ = ['PNG_SIGNATURE', 'decode_png']

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
# What a file of any honest size needs.
_MAX_CHUNKS = 1 << 16
# Colour type to the bits that a value may have. PNG specification, 11.2.2.
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_GREY, _COLOUR, _PALETTE = 0, 2, 3
# Bytes of tRNS for each; kinds with alpha have none, and a palette's has one for some of its colours.
_TRANSPARENT_BYTES = {_GREY: 2, _COLOUR: 6}
_CHECKED = (b'IHDR', b'PLTE', b'tRNS', b'IDAT', b'IEND')


@dataclass(slots=True)
class _File:
    """
    Hold what a walk over a file finds.

    :param header: content of IHDR.
    :param colours: of the palette, 0 where there is none.
    :param pieces: chunks that decide about pixels, from the signature to the last of the data.
    """

    header: bytes
    pieces: list[Any]
    colours: int = 0
    oddities: set[str] = field(default_factory=set)

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return self.header[8]

    @property
    def colour(self) -> int:
        """Colour type."""
        return self.header[9]


def decode_png(data: memoryview, admit: Callable[[int, int, int], None]) -> tuple[NDArray | None, tuple[str, ...]]:
    """
    Return the pixels of a PNG as ``cv2.imdecode(..., IMREAD_UNCHANGED)`` does, and which faults were tolerated.

    OpenCV itself, from 4.5 on, refuses a file whose data is cut or cannot be inflated.

    :param data: the whole file.
    :param admit: called with width, height and the bytes that decoding takes, before anything is allocated; raises
        where that is too much.
    :return: H×W, H×W×3 or H×W×4, uint8 or uint16, or None where OpenCV does not decode it; names of
        :data:`gps_denied_c7.image.decode.ODDITIES`.
    :raises ImageRejectedError: ``data`` (damaged, cut short), or what ``admit`` raises.
    :raises cv2.error: OpenCV cannot decode it.
    """
    file = _walk(data, admit)
    array = _decode(file.pieces)
    if array is not None and 0 < file.colours < 1 << file.bits and file.colour == _PALETTE:
        _check_indices(file)
    return array, tuple(sorted(file.oddities))


def _decode(pieces: list[Any]) -> NDArray | None:
    import cv2

    content = b''.join((*pieces, _chunk(b'IEND', b'')))
    array: NDArray | None = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    return array


def _walk(data: memoryview, admit: Callable[[int, int, int], None]) -> _File:
    # Chunk: length, type, content, CRC. PNG specification, 5.3.
    file: _File | None = None
    before, position = b'', len(PNG_SIGNATURE)
    seen = set()
    for _ in range(_MAX_CHUNKS):
        start, length = position, int.from_bytes(data[position : position + 4], 'big')
        position += 12 + length
        if position > data.nbytes:
            _refuse(f'cut short: {data.nbytes} bytes without an end chunk.')
        kind = bytes(data[start + 4 : start + 8])
        whole = zlib.crc32(data[start + 4 : position - 4]) == int.from_bytes(data[position - 4 : position], 'big')
        if not whole and kind in _CHECKED:
            _refuse(f'the checksum of its {kind.decode()} chunk is wrong.')
        if file is None:
            if kind != b'IHDR' or length != 13:
                _refuse('it does not begin with its header.')
            file = _read_header(bytes(data[start + 8 : position - 4]), len(data), admit)
        elif kind in seen and (kind != b'IDAT' or before != kind):
            _refuse(f'its {kind.decode()} chunk comes twice.')
        elif kind in (b'PLTE', b'tRNS') and b'IDAT' in seen:
            _refuse(f'its {kind.decode()} chunk comes after the data.')
        elif kind == b'PLTE':
            file.colours = _colours(length)
        elif kind == b'tRNS' and length != _TRANSPARENT_BYTES.get(file.colour, min(length, file.colours or length)):
            _refuse(f'its tRNS chunk has {length} bytes.')
        elif kind == b'IEND':
            if b'IDAT' not in seen or (file.colour == _PALETTE and not file.colours):
                _refuse('it has no data, or no palette.')
            if position < data.nbytes:
                file.oddities.add('bytes_after_end')
            return file
        elif kind not in _CHECKED:
            if not kind.isalpha() or not kind[0] & 0x20:
                _refuse(f'chunk {kind!r} is unknown, and a decoder must not ignore it.')
            if not whole:
                file.oddities.add('bad_checksum')
        before = kind
        # A chunk that libpng would warn of, and ignore, is left out too.
        if kind in _CHECKED and not (kind == b'tRNS' and file.colour > _PALETTE):
            seen.add(kind)
            file.pieces.append(data[start:position])
    _refuse(f'more than {_MAX_CHUNKS} chunks.')


def _read_header(header: bytes, size: int, admit: Callable[[int, int, int], None]) -> _File:
    width, height = int.from_bytes(header[:4], 'big'), int.from_bytes(header[4:8], 'big')
    bits, colour, compression, filters, interlace = header[8:]
    if bits not in _DEPTHS.get(colour, ()) or compression or filters or interlace > 1:
        _refuse(f'its header is impossible: {bits} bits with colour type {colour}.')
    # Palettes and transparency become colours of three or four values.
    values = width * height * (1 if colour == _GREY else 4)
    admit(width, height, size + values * (2 if bits == 16 else 1))
    return _File(header, [PNG_SIGNATURE])


def _colours(length: int) -> int:
    if length % 3 or not 3 <= length <= 3 * 256:
        _refuse(f'its palette has {length} bytes.')
    return length // 3


def _check_indices(file: _File) -> None:
    """Look for pixels whose colour the palette lacks; libpng makes them black."""
    header = file.header[:9] + bytes((_GREY,)) + file.header[10:]
    data = [piece for piece in file.pieces[2:] if piece[4:8] == b'IDAT']
    grey = _decode([PNG_SIGNATURE, _chunk(b'IHDR', header), *data])
    # Grey of a few bits is spread over 0 to 255.
    if grey is None or int(grey.max()) // (255 // ((1 << file.bits) - 1)) >= file.colours:
        _refuse(f'a pixel has a colour that is not among the {file.colours} of the palette.')


def _chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return len(content).to_bytes(4, 'big') + kind + content + crc.to_bytes(4, 'big')


def _refuse(what: str) -> NoReturn:
    raise ImageRejectedError('data', f'PNG is damaged: {what}', remedy='Look for data loss between camera and node.')
