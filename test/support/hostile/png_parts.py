"""PNG files, chunk by chunk (PNG specification, third edition, clauses 5, 8 and 11)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b'\x89PNG\r\n\x1a\n'
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
END = b'\x00\x00\x00\x00IEND\xaeB`\x82'
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def chunk(kind: bytes, content: bytes = b'', crc: int | None = None) -> bytes:
    """Return a chunk; ``crc`` where it is to be another than the right one."""
    right = zlib.crc32(kind + content)
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', right if crc is None else crc)


def header(
    width: int, height: int, depth: int = 8, colour: int = RGB, *, compression: int = 0, filtering: int = 0,
    interlace: int = 0,
) -> bytes:  # fmt: skip
    """Return the header chunk."""
    return chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, compression, filtering, interlace))


def file(*chunks: bytes, end: bytes = END) -> bytes:
    """Return the file of these chunks."""
    return SIGNATURE + b''.join(chunks) + end


def rows(pixels: NDArray) -> bytes:
    """Return the scan lines of H×W(×C) uint8 or uint16 pixels, unfiltered."""
    lines = pixels.astype(pixels.dtype.newbyteorder('>')).reshape(len(pixels), -1).view(np.uint8)
    return b''.join(b'\x00' + line.tobytes() for line in lines)


def encoded(pixels: NDArray, *extra: bytes, pieces: int = 1) -> bytes:
    """Return a PNG of grey, RGB or RGBA pixels, uint8 or uint16, with chunks of one's own after its header."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    colour = {1: GREY, 3: RGB, 4: RGBA}[channels]
    start = header(pixels.shape[1], pixels.shape[0], 8 * pixels.itemsize, colour)
    return file(start, *extra, *data_chunks(zlib.compress(rows(pixels)), pieces))


def data_chunks(content: bytes, pieces: int = 1) -> list[bytes]:
    """Return compressed data as so many chunks."""
    size = max(1, -(-len(content) // pieces))
    return [chunk(b'IDAT', content[start : start + size]) for start in range(0, len(content), size)]


def split(png: bytes) -> list[tuple[bytes, bytes]]:
    """Return kind and content of each chunk but the end."""
    found, position = [], len(SIGNATURE)
    while png[position + 4 : position + 8] != b'IEND':
        length = int.from_bytes(png[position : position + 4], 'big')
        found.append((png[position + 4 : position + 8], png[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def join(chunks: Iterable[tuple[bytes, bytes]], end: bytes = END) -> bytes:
    """Return the file of kinds and contents."""
    return file(*(chunk(kind, content) for kind, content in chunks), end=end)


def repeated(block: bytes, times: int) -> bytes:
    """Return a zlib stream of ``block`` so many times, at the cost of compressing it once: a few bytes for each."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = compressor.compress(block) + compressor.flush(zlib.Z_FULL_FLUSH)
    checksum = 1
    for _ in range(times):
        checksum = zlib.adler32(block, checksum)
    return b'\x78\x9c' + piece * times + b'\x03\x00' + struct.pack('>I', checksum)


def flat(width: int, height: int, depth: int, colour: int, *, filtering: int = 0) -> bytes:
    """Return the compressed data of a picture of one colour, every line filtered alike."""
    line = bytes((filtering,)) + bytes(-(-width * depth * CHANNELS[colour] // 8))
    together = max(1, (1 << 20) // len(line))
    whole, rest = divmod(height, together)
    if not rest:
        return repeated(line * together, whole)
    return repeated(line, height) if height < 256 else zlib.compress(line * height, 9)


def flat_interlaced(width: int, height: int, depth: int, colour: int) -> bytes:
    """Return the compressed data of an interlaced picture of one colour."""
    size = 0
    for x, y, across, down in _PASSES:
        columns, lines = max(0, -(-(width - x) // across)), max(0, -(-(height - y) // down))
        size += lines * (1 + -(-columns * depth * CHANNELS[colour] // 8)) if columns else 0
    whole, rest = divmod(size, 1 << 20)
    return repeated(bytes(1 << 20), whole) if not rest else zlib.compress(bytes(size), 9)
