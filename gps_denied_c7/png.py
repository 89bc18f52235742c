"""
PNG to pixels, or a refusal: how much of a damaged file comes out depends on the version of libpng and OpenCV.

Every checksum is looked at and the data is inflated here; libpng then gets a file of the chunks that decide about
pixels, with the data stored uncompressed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import ImageRejectedError

__all__ = ['PNG_SIGNATURE', 'decode_png']

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
# What a file of any honest size needs.
_MAX_CHUNKS = 1 << 16
# Colour type to values of a pixel and the bits that each may have. PNG specification, 11.2.2.
_KINDS = {0: (1, (1, 2, 4, 8, 16)), 2: (3, (8, 16)), 3: (1, (1, 2, 4, 8)), 4: (2, (8, 16)), 6: (4, (8, 16))}
_GREY, _PALETTE = 0, 3
# Bytes of tRNS for each; kinds with alpha have none, and a palette's has one for some of its colours.
_TRANSPARENT_BYTES = {0: 2, 2: 6}
# First column and row, and steps, of the passes of an interlaced picture. PNG specification, 8.2.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_FILTERS = 5
_CRITICAL = (b'IHDR', b'PLTE', b'IDAT', b'IEND')


@dataclass(slots=True)
class _File:
    """Hold what a walk over a file finds; ``header`` is the content of IHDR, ``rows`` those of each pass."""

    header: bytes
    width: int
    height: int
    rows: list[tuple[int, int]]
    palette: bytes | None = None
    transparency: bytes | None = None
    data: list[memoryview] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return self.header[8]

    @property
    def colour(self) -> int:
        """Colour type."""
        return self.header[9]

    @property
    def size(self) -> int:
        """Bytes of the inflated data: each row has one before it that names its filter."""
        return sum(count * (1 + length) for count, length in self.rows)

    def note(self, oddity: str) -> None:
        if oddity not in self.oddities:
            self.oddities.append(oddity)


def decode_png(data: memoryview, admit: Callable[[int, int, int], None]) -> tuple[NDArray | None, tuple[str, ...]]:
    """
    Return the pixels of a PNG as ``cv2.imdecode(..., IMREAD_UNCHANGED)`` does, and which faults were tolerated.

    :param data: the whole file.
    :param admit: told width, height and the bytes that decoding takes before anything is allocated; raises where that
        is too much.
    :return: H×W, H×W×3 or H×W×4, uint8 or uint16, or None where OpenCV does not decode it; names of
        :data:`gps_denied_c7.decoding.ODDITIES`.
    :raises ImageRejectedError: ``data`` (damaged, cut short), or what ``admit`` raises.
    :raises cv2.error: OpenCV cannot decode it.
    """
    import cv2

    file = _walk(data, admit)
    inflated = _inflate(file)
    _check_filters(file, inflated)
    stored = zlib.compress(inflated, 0)
    del inflated
    content = _written(
        (b'IHDR', file.header), (b'PLTE', file.palette), (b'tRNS', file.transparency), (b'IDAT', stored)
    )
    array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is not None and file.colour == _PALETTE:
        _check_indices(file, stored)
    return array, tuple(file.oddities)


def _walk(data: memoryview, admit: Callable[[int, int, int], None]) -> _File:
    # Chunk: length, type, content, CRC. PNG specification, 5.3.
    file: _File | None = None
    position, closed = len(PNG_SIGNATURE), False
    for _ in range(_MAX_CHUNKS):
        length = int.from_bytes(data[position : position + 4], 'big')
        end = position + 12 + length
        if end > data.nbytes:
            _refuse(f'cut short: {data.nbytes} bytes without an end chunk.')
        kind, content = bytes(data[position + 4 : position + 8]), data[position + 8 : end - 4]
        whole = zlib.crc32(data[position + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], 'big')
        position = end
        if file is None:
            if kind != b'IHDR' or length != 13 or not whole:
                _refuse('it does not begin with a whole header.')
            file = _read_header(bytes(content), admit)
            continue
        if not whole:
            if kind in (*_CRITICAL, b'tRNS'):
                _refuse(f'the checksum of its {kind.decode()} chunk is wrong.')
            file.note('bad_checksum')
        if kind == b'IEND':
            if not file.data or (file.colour == _PALETTE and not file.palette):
                _refuse('it has no data, or no palette.')
            if position < data.nbytes:
                file.note('bytes_after_end')
            return file
        if kind == b'IDAT':
            if closed:
                _refuse('other chunks lie between those of its data.')
            file.data.append(content)
            continue
        closed = bool(file.data)
        if kind == b'PLTE' or kind == b'tRNS':
            known = file.palette if kind == b'PLTE' else file.transparency
            if closed or known is not None:
                _refuse(f'its {kind.decode()} chunk comes twice, or after the data.')
            if kind == b'PLTE':
                if length % 3 or not 3 <= length <= 768:
                    _refuse(f'its palette has {length} bytes.')
                file.palette = bytes(content)
            elif file.colour in (_GREY, 2, _PALETTE):
                colours = len(file.palette or b'') // 3
                if length != _TRANSPARENT_BYTES.get(file.colour, min(length, colours)):
                    _refuse(f'its tRNS chunk has {length} bytes.')
                file.transparency = bytes(content)
        elif not kind.isalpha() or not kind[0] & 0x20:
            _refuse(f'chunk {kind!r} is none that a decoder may leave out.')
    _refuse(f'more than {_MAX_CHUNKS} chunks.')


def _read_header(header: bytes, admit: Callable[[int, int, int], None]) -> _File:
    width, height = int.from_bytes(header[:4], 'big'), int.from_bytes(header[4:8], 'big')
    bits, colour, compression, filters, interlace = header[8:]
    values, depths = _KINDS.get(colour, (0, ()))
    if bits not in depths or compression or filters or interlace > 1:
        _refuse(f'its header names a kind that does not exist: {bits} bits, colour type {colour}.')
    passes = _PASSES if interlace else ((0, 0, 1, 1),)
    sizes = ((-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in passes)
    rows = [(down, (across * values * bits + 7) // 8) for across, down in sizes if across > 0 and down > 0]
    file = _File(header, width, height, rows)
    # Palettes and transparency become colours of three or four values. Inflated and stored data exist side by side.
    channels = 4 if colour else 1
    admit(width, height, 2 * file.size + width * height * channels * (2 if bits == 16 else 1))
    return file


def _inflate(file: _File) -> bytes:
    size, stream = file.size, zlib.decompressobj()
    try:
        # One more than there should be, to see whether there is more.
        inflated = stream.decompress(b''.join(file.data), size + 1)
        if len(inflated) == size and not stream.eof:
            inflated += stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        _refuse(f'its data cannot be inflated: {error}.')
    if len(inflated) != size or not stream.eof:
        _refuse(f'its data is not that of {file.width}x{file.height} pixels.')
    if stream.unused_data:
        file.note('bytes_after_data')
    return inflated


def _check_filters(file: _File, inflated: bytes) -> None:
    values, position = np.frombuffer(inflated, np.uint8), 0
    for count, length in file.rows:
        end = position + count * (1 + length)
        if values[position : end : 1 + length].max() >= _FILTERS:
            _refuse('a row names a filter that does not exist.')
        position = end


def _check_indices(file: _File, stored: bytes) -> None:
    """Look for pixels whose colour the palette lacks; libpng makes them black."""
    import cv2

    colours, largest = len(file.palette or b'') // 3, (1 << file.bits) - 1
    if colours > largest:
        return
    as_grey = _written((b'IHDR', file.header[:9] + bytes((_GREY,)) + file.header[10:]), (b'IDAT', stored))
    # Grey of a few bits is spread over 0 to 255.
    grey = cv2.imdecode(np.frombuffer(as_grey, np.uint8), cv2.IMREAD_UNCHANGED)
    if grey is None or int(grey.max()) // (255 // largest) >= colours:
        _refuse(f'a pixel has a colour that is not among the {colours} of the palette.')


def _written(*chunks: tuple[bytes, bytes | None]) -> bytes:
    pieces = [PNG_SIGNATURE]
    for kind, content in (*chunks, (b'IEND', b'')):
        if content is not None:
            crc = zlib.crc32(content, zlib.crc32(kind))
            pieces += [len(content).to_bytes(4, 'big'), kind, content, crc.to_bytes(4, 'big')]
    return b''.join(pieces)


def _refuse(what: str) -> NoReturn:
    raise ImageRejectedError('data', f'PNG is damaged: {what}', remedy='Look for loss on the way here.')
