"""N-7, N-9: any fields and any bytes are pixels of the size that was checked, or an image refused with its reason."""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.image.decode import (
    ENCODINGS,
    MAX_SIDE,
    RawImage,
)
from support.fuzz_images import FILES, JPEGS, decode_file, decode_raw
from support.fuzz_mutations import damaged, fuzz

SIDES = st.integers(0, 40) | st.sampled_from((MAX_SIDE, MAX_SIDE + 1, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, -1))


@fuzz(600)
@given(
    encoding=st.sampled_from((*ENCODINGS, '', 'MONO8', 'rgb8\0', '32FC1', '\ud800')) | st.text(max_size=8),
    width=SIDES,
    height=SIDES,
    extra_step=st.integers(-3, 20) | st.sampled_from((1 << 31, -(1 << 31))),
    pixel=st.integers(0, 8),
    rows=st.sampled_from(((1, 1), (3, 2), (2, 3), (0, 1))),
    extra_data=st.sampled_from((0, 0, 0, 0, 1, -1, 7, -100)),
    big=st.booleans(),
    kind=st.sampled_from(('bytes', 'bytearray', 'array', 'strided', 'text', 'none')),
)
def test_n7_any_geometry_is_decoded_or_refused(
    encoding: str, width: int, height: int, extra_step: int, pixel: int, rows: tuple[int, int], extra_data: int,
    big: bool, kind: str,
) -> None:  # fmt: skip
    step = width * pixel + extra_step
    size = step * (height * rows[0] // rows[1]) + extra_data
    content = random.Random(step).randbytes(min(max(size, 0), 1 << 20))
    data = {
        'bytes': content, 'bytearray': bytearray(content), 'array': np.frombuffer(content, np.uint8),
        'strided': np.frombuffer(content, np.uint8)[::2], 'text': 'x', 'none': None,
    }[kind]  # fmt: skip
    decode_raw(RawImage(width, height, encoding, step, big, data))


VALUES = {
    'rgb': 3, 'bgr': 3, 'rgba': 4, 'bgra': 4, 'uyvy': 2, 'yuv422': 2, 'yuyv': 2, 'yuv422_yuy2': 2,
    '8UC3': 3, '8UC4': 4, '16UC3': 3, '16UC4': 4,
}  # fmt: skip


@fuzz(500)
@given(
    encoding=st.sampled_from(ENCODINGS),
    width=st.integers(1, 33),
    height=st.integers(1, 33),
    padding=st.integers(0, 17),
    big=st.booleans(),
    cut=st.sampled_from((0, 0, 0, 1)),
)
def test_n7_every_encoding_of_every_small_size_is_decoded_or_refused(
    encoding: str, width: int, height: int, padding: int, big: bool, cut: int
) -> None:
    depth = 2 if encoding.endswith('16') or encoding.startswith('16') else 1
    channels = VALUES.get(encoding, VALUES.get(encoding.rstrip('0123456789'), 1))
    step = width * channels * depth + padding
    rows = height * {'nv12': 3, 'nv21': 3, 'nv24': 6}.get(encoding, 2) // 2
    taken = decode_raw(RawImage(width, height, encoding, step, big, bytes(step * rows - cut)))
    assert not (cut and taken)


FORMATS = st.sampled_from(
    (
        'jpeg', 'png', 'bgr8; jpeg compressed bgr8', 'rgb8; png compressed rgb8', 'mono16; jpeg compressed mono8',
        'bayer_rggb8; png compressed ', 'bayer_gbrg16; png compressed ', '16UC1; png compressed ',
        'nv12; png compressed ', '32FC1; png compressed ', '16UC1; compressedDepth', ';', '', '\ud800',
    )
)  # fmt: skip


@fuzz(700)
@given(content=st.sampled_from(FILES).flatmap(lambda file: damaged(file, FILES)), format=FORMATS)
def test_n7_any_damaged_file_is_decoded_or_refused(content: bytes, format: str) -> None:
    decode_file(format, content)


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack('>H', (len(content) + 2) & 0xFFFF) + content


def frame(width: int, height: int, marker: int = 0xC0) -> bytes:
    return segment(marker, struct.pack('>BHHB', 8, height, width, 1) + b'\x01\x11\x00')


def segments_of(jpeg: bytes) -> list[bytes]:
    """Return a JPEG's segments, scans with their data."""
    pieces, position = [], 2
    while jpeg[position + 1] != 0xD9:
        end = position + 2 + int.from_bytes(jpeg[position + 2 : position + 4], 'big')
        while not (jpeg[end] == 0xFF and jpeg[end + 1] not in (0, *range(0xD0, 0xD8))):
            end += 1
        pieces.append(jpeg[position:end])
        position = end
    return pieces


PIECES = tuple(piece for jpeg in JPEGS for piece in segments_of(jpeg))
DIMENSIONS = st.sampled_from((0, 1, 8, 47, 20000, 30000, 65500, 65535))
EXTRA = st.one_of(
    st.builds(frame, DIMENSIONS, DIMENSIONS, st.sampled_from((0xC0, 0xC1, 0xC2, 0xC9, 0xCF))),
    st.builds(segment, st.integers(0, 255), st.binary(max_size=40)),
    st.sampled_from((b'\xff\x01', b'\xff\xd8', b'\xff\xd0', b'\xff\xff', b'\xff\x00', b'\xff\xd9', b'x')),
    st.sampled_from(PIECES),
)


@fuzz(700)
@given(
    jpeg=st.sampled_from(JPEGS).map(segments_of),
    extras=st.lists(st.tuples(st.integers(0, 30), EXTRA), min_size=1, max_size=6),
    format=FORMATS,
)
def test_n7_jpeg_segments_in_any_order_are_decoded_or_refused(
    jpeg: list[bytes], extras: list[tuple[int, bytes]], format: str
) -> None:
    pieces = list(jpeg)
    for at, extra in extras:
        pieces.insert(at % (len(pieces) + 1), extra)
    decode_file(format, b'\xff\xd8' + b''.join(pieces) + b'\xff\xd9')


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


CHUNKS = st.one_of(
    st.builds(
        lambda width, height, depth, colour, lace: chunk(
            b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, lace)
        ),
        DIMENSIONS, DIMENSIONS, st.sampled_from((1, 2, 4, 8, 16, 3)), st.integers(0, 7), st.integers(0, 2),
    ),
    st.builds(
        chunk,
        st.sampled_from((b'PLTE', b'tRNS', b'eXIf', b'gAMA', b'iCCP', b'zTXt', b'bKGD', b'acTL', b'fcTL', b'fdAT',
                         b'IDAT', b'IEND')),
        st.binary(max_size=40),
    ),
    st.builds(lambda size: chunk(b'IDAT', zlib.compress(bytes(size))), st.sampled_from((0, 1, 700, 1 << 20))),
    st.builds(lambda w, h, x, y: chunk(b'fcTL', struct.pack('>IIIIIHHBB', 0, w, h, x, y, 1, 1, 0, 0)),
              DIMENSIONS, DIMENSIONS, DIMENSIONS, DIMENSIONS),
    st.just(chunk(b'acTL', struct.pack('>II', 2, 0))),
)  # fmt: skip


@fuzz(500)
@given(chunks=st.lists(CHUNKS, max_size=5), with_header=st.booleans(), format=FORMATS)
def test_n7_png_chunks_with_right_checksums_are_decoded_or_refused(
    chunks: list[bytes], with_header: bool, format: str
) -> None:
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 17, 13, 8, 2, 0, 0, 0)) if with_header else b''
    body = chunk(b'IDAT', zlib.compress(bytes(13 * (17 * 3 + 1)))) if with_header else b''
    decode_file(format, b'\x89PNG\r\n\x1a\n' + header + b''.join(chunks) + body + chunk(b'IEND', b''))
