"""
Compressed images that cost a decoder much more than their size tells, or are nothing at all: one for every number.

``hostile_picture(n)`` is the same on every machine; consecutive numbers go through all kinds. Most are valid files.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from support.hostile import jpeg_parts as jpeg
from support.hostile import png_parts as png
from support.hostile.jpeg_parts import Part

__all__ = ['KINDS', 'STARVING', 'Picture', 'hostile_picture', 'starving_picture']


@dataclass(frozen=True, slots=True)
class Picture:
    """
    What a hostile camera sends.

    :param kind: of :data:`KINDS`.
    :param format: of the message.
    """

    kind: str
    format: str
    data: bytes


Content = bytes | tuple[str, bytes]


def hostile_picture(number: int) -> Picture:
    """Return the picture of a number."""
    kinds = sorted(KINDS)
    return _made(kinds[number % len(kinds)], random.Random(number))


def starving_picture(kind: str) -> Picture:
    """Return a picture of one kind of :data:`STARVING`, at its worst."""
    content = STARVING[kind]()
    return Picture(kind, 'png' if content[:4] == b'\x89PNG' else 'jpeg', content)


def _made(kind: str, chance: random.Random) -> Picture:
    content = KINDS[kind](chance)
    format, data = content if isinstance(content, tuple) else (_format(content), content)
    return Picture(kind, format, data)


def _format(data: bytes) -> str:
    return 'png' if data[:4] == b'\x89PNG' else 'jpeg'


def _sides(chance: random.Random) -> tuple[int, int]:
    return chance.choice([(64, 48), (640, 480), (1920, 1080), (4096, 4096), (8192, 8192), (16384, 4096), (4096, 16384)])


# --- JPEG ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _noisy_progressive(seed: int, width: int, height: int, scans: int) -> bytes:
    return jpeg.noisy_progressive(seed, width, height, scans)


@functools.lru_cache(maxsize=8)
def _plain_jpeg(seed: int, width: int, height: int, **options: object) -> bytes:
    return jpeg.encoded(jpeg.scene(seed, width, height), **options)


def _progressive_flat(chance: random.Random) -> bytes:
    width, height = _sides(chance)
    return jpeg.flat_progressive(width, height, chance.choice([10, 31, 32, 33, 60]), chance.choice([1, 3]))


def _progressive_hundreds_of_scans(chance: random.Random) -> bytes:
    width, height = _sides(chance)
    return jpeg.flat_progressive(width, height, chance.choice([100, 400, 800]), chance.choice([1, 3]))


def _progressive_noise(chance: random.Random) -> bytes:
    size = chance.choice([(640, 480), (1920, 1080)])
    return _noisy_progressive(chance.randrange(2), *size, chance.choice([10, 32, 64]))


def _progressive_repeated(chance: random.Random) -> bytes:
    """Return what an encoder wrote, with its scans again and again, which libjpeg warns of and decodes."""
    parts = jpeg.split(_plain_jpeg(chance.randrange(3), 640, 480, progressive=True))
    scans = [part for part in parts if part.marker in (jpeg.SOS, jpeg.DHT)]
    return jpeg.join([*parts, *scans * chance.choice([1, 2, 10, 100])])


def _many_segments(chance: random.Random) -> bytes:
    marker = chance.choice([jpeg.COM, 0xE2, 0xEF, jpeg.DRI, jpeg.DQT, jpeg.DHT])
    parts = jpeg.split(_plain_jpeg(chance.randrange(3), 640, 480))
    bodies = {
        jpeg.DRI: b'\x00\x00', jpeg.DQT: b'\x03' + b'\x01' * 64, jpeg.DHT: b'\x13' + b'\x01' + bytes(15) + b'\x00',
    }  # fmt: skip
    many = [Part(marker, bodies.get(marker, bytes(chance.randrange(8))))] * chance.choice([4000, 20_000, 65_000])
    at = chance.choice([0, jpeg.place(parts, *jpeg.SOFS), jpeg.place(parts, jpeg.SOS), len(parts)])
    return jpeg.join([*parts[:at], *many, *parts[at:]])


def _large_segments(chance: random.Random) -> bytes:
    parts = jpeg.split(_plain_jpeg(chance.randrange(3), 640, 480))
    return jpeg.join([*[Part(chance.choice([jpeg.COM, 0xE2]), chance.randbytes(65_533))] * 60, *parts])


def _fill_bytes(chance: random.Random) -> bytes:
    parts = jpeg.split(_plain_jpeg(chance.randrange(3), 640, 480))
    at = chance.randrange(len(parts) + 1)
    return jpeg.join([*parts[:at], b'\xff' * chance.choice([10_000, 1_000_000, 4_000_000]), *parts[at:]])


def _stuffed_scan(chance: random.Random) -> bytes:
    """Return a file whose scan is megabytes of stuffed bytes or restart markers that stand for nothing."""
    parts = jpeg.split(_plain_jpeg(chance.randrange(3), 640, 480))
    at = jpeg.place(parts, jpeg.SOS)
    nothing = chance.choice([b'\xff\x00', b'\xff\xd0', b'\xff\xd3\xff\xd0', b'\x00', b'\xff\x01']) * 500_000
    return jpeg.join(jpeg.replaced(parts, at, scan=parts[at].scan[: chance.randrange(2000)] + nothing))


def _header_of_another_size(chance: random.Random) -> bytes:
    parts = jpeg.split(_plain_jpeg(chance.randrange(3), 640, 480, progressive=chance.random() < 0.5))
    at = jpeg.place(parts, *jpeg.SOFS)
    width, height = chance.choice(
        [(8192, 8192), (16384, 4096), (16384, 16384), (65535, 65535), (65535, 1), (1, 65535), (65500, 1000), (0, 480)]
    )
    body = parts[at].body
    return jpeg.join(jpeg.replaced(parts, at, body=body[:1] + struct.pack('>HH', height, width) + body[5:]))


def _many_components(chance: random.Random) -> bytes:
    components, sampling = chance.choice([(4, 0x44), (10, 0x11), (255, 0x11), (3, 0x44), (3, 0x14)])
    of_each = b''.join(bytes((index & 255, sampling, 0)) for index in range(components))
    frame = Part(chance.choice([0xC0, 0xC2]), struct.pack('>BHHB', 8, 4096, 4096, components) + of_each)
    parts = jpeg.split(_plain_jpeg(chance.randrange(3), 640, 480))
    return jpeg.join([frame, *jpeg.without(parts, *jpeg.SOFS)])


def _flat_baseline(chance: random.Random) -> bytes:
    return jpeg.flat_baseline(*_sides(chance), chance.choice([1, 3]))


@functools.lru_cache(maxsize=2)
def _large(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (1024, 1024, 3), np.uint8)
    return jpeg.encoded(np.tile(noise, (3, 4, 1)), progressive=bool(seed))


def _large_and_honest(chance: random.Random) -> bytes:
    return _large(chance.randrange(2))


def _restarts(chance: random.Random) -> bytes:
    """Return a file whose restart markers are every block, too many, too few, or of the wrong numbers."""
    pixels = jpeg.scene(chance.randrange(3), 640, 480)
    parts = jpeg.split(jpeg.encoded(pixels, restart_marker_blocks=1))
    at = jpeg.place(parts, jpeg.SOS)
    scan = bytearray(parts[at].scan)
    marks = [index + 1 for index in range(len(scan) - 1) if scan[index] == 0xFF and 0xD0 <= scan[index + 1] <= 0xD7]
    kind = chance.choice(['every', 'wrong', 'same', 'interval', 'none'])
    if kind in ('wrong', 'same'):
        for mark in chance.sample(marks, max(1, int(len(marks) * chance.random()))):
            scan[mark] = 0xD0 + (chance.randrange(8) if kind == 'wrong' else 0)
    parts = jpeg.replaced(parts, at, scan=bytes(scan))
    if kind in ('interval', 'none'):
        number = chance.choice([1, 2, 7, 65535]) if kind == 'interval' else 0
        parts = jpeg.replaced(parts, jpeg.place(parts, jpeg.DRI), body=struct.pack('>H', number))
    return jpeg.join(parts)


def _arithmetic(chance: random.Random) -> bytes:
    """Return a large picture whose arithmetic code has run out at once: the decoder goes on with zeros."""
    width, height = _sides(chance)
    marker, last, scans = chance.choice([(0xC9, 63, 1), (0xCA, 0, 30)])
    parts = [jpeg.flat_quantisation(), jpeg.header(marker, width, height)]
    for number in range(scans):
        band = number if marker == 0xCA else 0
        parts.append(
            Part(jpeg.SOS, jpeg.scan_header([0], band, band or last, 0, 0), chance.randbytes(40).replace(b'\xff', b''))
        )
    return jpeg.join(parts)


def _other_process(chance: random.Random) -> bytes:
    """Return a file that says to be coded in a way that nobody uses, or in 12 or 16 bits."""
    parts = jpeg.split(_plain_jpeg(chance.randrange(3), 640, 480))
    at = jpeg.place(parts, *jpeg.SOFS)
    if chance.random() < 0.3:
        return jpeg.join(jpeg.replaced(parts, at, body=bytes((chance.choice([2, 12, 16, 255]),)) + parts[at].body[1:]))
    return jpeg.join(jpeg.replaced(parts, at, marker=chance.choice(sorted(jpeg.SOFS - {0xC0}))))


def _exif_and_profile(chance: random.Random) -> bytes:
    """Return a file with pictures in its Exif data, and a colour profile in 255 pieces."""
    parts = jpeg.split(_plain_jpeg(chance.randrange(3), 640, 480))
    inner = jpeg.flat_progressive(16384, 4096, 31)[:60_000]
    exif = Part(jpeg.APP1, b'Exif\x00\x00MM\x00*' + struct.pack('>I', chance.choice([8, 0, 0xFFFFFFFF])) + inner)
    pieces = [
        Part(0xE2, b'ICC_PROFILE\x00' + bytes((number & 255, 255)) + chance.randbytes(chance.choice([10, 5000])))
        for number in range(1, 256)
    ]
    return jpeg.join([*[exif] * chance.choice([1, 100]), *pieces, *parts])


def _damaged(data: bytes, chance: random.Random) -> bytes:
    kind = chance.choice(['cut', 'flip', 'flips', 'hole', 'twice', 'swap'])
    at, end = sorted((chance.randrange(len(data)), chance.randrange(len(data))))
    if kind == 'cut':
        return data[:at] + chance.choice([b'', jpeg.EOI, png.END])
    if kind == 'hole':
        return data[:at] + data[end:]
    if kind == 'twice':
        return data[:end] + data[at:]
    if kind == 'swap':
        return data[:at] + data[end:] + data[at:end]
    damaged = bytearray(data)
    for _ in range(1 if kind == 'flip' else 200):
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def _damaged_jpeg(chance: random.Random) -> bytes:
    options = chance.choice([{}, {'progressive': True}, {'restart_marker_blocks': 40}, {'optimize': True}])
    return _damaged(_plain_jpeg(chance.randrange(3), 640, 480, **options), chance)


# --- PNG ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _flat_png(width: int, height: int, depth: int, colour: int, filtering: int = 0, interlace: int = 0) -> bytes:
    data = (
        png.flat_interlaced(width, height, depth, colour)
        if interlace
        else png.flat(width, height, depth, colour, filtering=filtering)
    )
    palette = [png.chunk(b'PLTE', bytes(range(6)))] if colour == png.PALETTE else []
    start = png.header(width, height, depth, colour, interlace=interlace)
    return png.file(start, *palette, *png.data_chunks(data, 1 + len(data) // 65_536))


def _png_large(chance: random.Random) -> bytes:
    width, height = chance.choice([(8192, 8192), (16384, 4096), (4096, 16384)])
    depth, colour = chance.choice([(16, png.GREY), (16, png.RGB), (16, png.RGBA), (8, png.RGBA), (1, png.PALETTE)])
    return _flat_png(width, height, depth, colour, chance.choice([0, 0, 4]))


def _png_interlaced(chance: random.Random) -> bytes:
    size = chance.choice([1024, 4096, 8192])
    return _flat_png(size, size, *chance.choice([(16, png.RGB), (8, png.GREY), (16, png.RGBA)]), interlace=1)


def _png_many_chunks(chance: random.Random) -> bytes:
    number = chance.choice([4000, 30_000, 65_000, 65_600, 200_000])
    pixels = jpeg.scene(chance.randrange(3), 640, 480)
    kind = chance.choice(['tEXt', 'prVt', 'IDAT', 'empty', 'sPLT'])
    if kind == 'IDAT':
        return png.encoded(pixels, pieces=number)
    one = {
        'tEXt': png.chunk(b'tEXt', b'a\x00b'), 'prVt': png.chunk(b'prVt'), 'empty': png.chunk(b'IDAT'),
        'sPLT': png.chunk(b'sPLT', b'a\x00\x08' + bytes(6)),
    }[kind]  # fmt: skip
    return png.encoded(pixels, one * number)


@functools.lru_cache(maxsize=4)
def _bomb(megabytes: int) -> bytes:
    return png.repeated(bytes(1 << 20), megabytes)


def _png_bomb(chance: random.Random) -> bytes:
    bomb = _bomb(chance.choice([1, 7, 100, 1000]))
    kind, start = chance.choice(
        [(b'zTXt', b'a\x00\x00'), (b'iTXt', b'a\x00\x01\x00\x00\x00'), (b'iCCP', b'a\x00\x00'), (b'eXIf', b'MM\x00*')]
    )
    one = png.chunk(kind, start + bomb)
    return png.encoded(jpeg.scene(chance.randrange(3), 64, 48), one * chance.choice([1, 5]))


def _png_more_data(chance: random.Random) -> bytes:
    """Return a small picture with a gigabyte behind its last line."""
    width, height = chance.choice([(1, 1), (64, 48)])
    return png.file(png.header(width, height, 8, png.GREY), *png.data_chunks(_bomb(chance.choice([100, 1000]))))


def _png_less_data(chance: random.Random) -> bytes:
    """Return a huge header with next to no data."""
    sides = [(8192, 8192), (16384, 4096), (1 << 31, 1), ((1 << 31) - 1, (1 << 31) - 1), (0, 5), (1_000_000, 60)]
    size = chance.choice(sides)
    depth, colour = chance.choice([(16, png.RGBA), (8, png.RGB), (1, png.GREY), (3, png.RGB), (8, 7)])
    return png.file(
        png.header(*size, depth, colour), png.chunk(b'IDAT', zlib.compress(bytes(chance.choice([0, 9000]))))
    )


@functools.lru_cache(maxsize=2)
def _flat_data(width: int, height: int) -> bytes:
    return png.flat(width, height, 8, png.RGB)


def _apng(chance: random.Random) -> bytes:
    width, height = chance.choice([(64, 48), (8192, 4096)])
    frames = chance.choice([2, 50, 0xFFFFFFFF])
    first = png.chunk(b'fcTL', struct.pack('>IIIIIHHBB', 0, width, height, 0, 0, 1, 30, 0, 0))
    later = []
    for index in range(1, min(frames, 20)):
        size = chance.choice([(width, height), (1 << 31, 9)])
        later.append(png.chunk(b'fcTL', struct.pack('>IIIIIHHBB', 2 * index - 1, *size, 0, 0, 1, 30, 2, 1)))
        later.append(png.chunk(b'fdAT', struct.pack('>I', 2 * index) + _flat_data(width, height)))
    start = png.header(width, height, 8, png.RGB) + png.chunk(b'acTL', struct.pack('>II', frames, 0)) + first
    return png.file(start, png.chunk(b'IDAT', _flat_data(width, height)), *later)


def _png_bad_checksum(chance: random.Random) -> bytes:
    text = png.chunk(b'tEXt', b'a\x00b', crc=chance.randrange(1 << 32)) * chance.choice([1, 60_000])
    return png.encoded(jpeg.scene(chance.randrange(3), 64, 48), text)


def _damaged_png(chance: random.Random) -> bytes:
    pixels = jpeg.scene(chance.randrange(3), 160, 120, chance.choice([1, 3, 4]))
    return _damaged(png.encoded(pixels if chance.random() < 0.5 else pixels.astype(np.uint16) * 257, pieces=9), chance)


# --- neither ------------------------------------------------------------------------------------------


def _wrong_format(chance: random.Random) -> tuple[str, bytes]:
    data = _plain_jpeg(chance.randrange(3), 64, 48)
    texts = [
        '', ';', 'png', 'bmp', 'x' * (4 << 20), '\u202e\n[FATAL] forged', '\x1b[2J', 'a\nb', 'jpeg;' * 100_000,
        '16UC1; compressedDepth', 'bayer_rggb8; jpeg compressed ', 'nv12; png compressed ', '32FC1; jpeg compressed',
        'mono16; jpeg compressed mono8', 'rgb8;' + ' ' * 1_000_000, 'rgb8; jpeg compressed bgr8', 'é' * 300,
    ]  # fmt: skip
    return chance.choice(texts), data


def _other_file(chance: random.Random) -> tuple[str, bytes]:
    content = io.BytesIO()
    kind = chance.choice(['GIF', 'BMP', 'TIFF', 'WEBP', 'PPM', 'ICO'])
    Image.fromarray(jpeg.scene(1, 64, 48)).save(content, kind)
    return chance.choice(['jpeg', 'png', kind.lower(), 'rgb8; jpeg compressed bgr8']), content.getvalue()


def _empty(chance: random.Random) -> tuple[str, bytes]:
    data = [
        b'',
        b'\xff',
        b'\xff\xd8',
        b'\xff\xd8\xff',
        b'\xff\xd8\xff\xd9',
        png.SIGNATURE,
        png.file(),
        b'\x89PNG',
        b'\n',
    ]
    return chance.choice(['jpeg', 'png', '', 'rgb8; jpeg compressed bgr8']), chance.choice(data)


def _noise(chance: random.Random) -> tuple[str, bytes]:
    start = chance.choice([b'', jpeg.SOI, png.SIGNATURE, png.SIGNATURE + png.header(64, 48)])
    return chance.choice(['jpeg', 'png']), start + chance.randbytes(chance.choice([10, 1000, 1_000_000]))


def _mixture(chance: random.Random) -> bytes:
    """Return one file within or behind another."""
    first = _plain_jpeg(chance.randrange(3), 64, 48)
    second = chance.choice([_flat_png(4096, 4096, 16, png.RGB), jpeg.flat_progressive(4096, 4096, 31), first])
    return chance.choice([first + second, first[:-2] + second, first[:2] + second, second[:-20] + first])


KINDS: dict[str, Callable[[random.Random], Content]] = {
    'progressive, flat': _progressive_flat,
    'progressive, hundreds of scans': _progressive_hundreds_of_scans,
    'progressive, noise': _progressive_noise,
    'progressive, scans repeated': _progressive_repeated,
    'JPEG, many segments': _many_segments,
    'JPEG, large segments': _large_segments,
    'JPEG, fill bytes': _fill_bytes,
    'JPEG, stuffed scan': _stuffed_scan,
    'JPEG, header of another size': _header_of_another_size,
    'JPEG, many components': _many_components,
    'JPEG, flat and large': _flat_baseline,
    'JPEG, large and honest': _large_and_honest,
    'JPEG, restarts': _restarts,
    'JPEG, arithmetic code': _arithmetic,
    'JPEG, other process': _other_process,
    'JPEG, Exif and profile': _exif_and_profile,
    'JPEG, damaged': _damaged_jpeg,
    'PNG, large': _png_large,
    'PNG, interlaced': _png_interlaced,
    'PNG, many chunks': _png_many_chunks,
    'PNG, bomb in text or profile': _png_bomb,
    'PNG, more data than lines': _png_more_data,
    'PNG, less data than lines': _png_less_data,
    'PNG, animated': _apng,
    'PNG, bad checksum': _png_bad_checksum,
    'PNG, damaged': _damaged_png,
    'wrong format': _wrong_format,
    'other file': _other_file,
    'empty': _empty,
    'noise': _noise,
    'two files in one': _mixture,
}
"""What makes each kind from a random number generator: the file, with its format where that is not what it is."""

STARVING: dict[str, Callable[[], bytes]] = {
    'progressive 2160p of 32 scans': lambda: jpeg.noisy_progressive(1, 3840, 2160, 32),
    'progressive 8192x8192 of 32 scans, flat': lambda: jpeg.flat_progressive(8192, 8192, 32),
    'PNG 8192x8192, 16 bits': lambda: _flat_png(8192, 8192, 16, png.GREY),
    'PNG 8192x8192, 16 bits, colour': lambda: _flat_png(8192, 8192, 16, png.RGB),
    'PNG of 65,000 chunks': lambda: png.encoded(jpeg.scene(1, 640, 480), png.chunk(b'tEXt', b'a\x00b') * 65_000),
    'PNG, interlaced 4096x4096, colour': lambda: _flat_png(4096, 4096, 16, png.RGB, interlace=1),
    'JPEG, large and honest': lambda: _large(0),
    'JPEG of 65,000 segments': lambda: jpeg.join([Part(jpeg.COM, b'')] * 65_000 + jpeg.split(_plain_jpeg(1, 640, 480))),
    'JPEG that lost 90 % of its scan': lambda: (whole := _plain_jpeg(1, 1920, 1080))[: len(whole) // 10] + jpeg.EOI,
    'JPEG, flat 8192x8192': lambda: jpeg.flat_baseline(8192, 8192),
    'PNG, bad checksums': lambda: png.encoded(jpeg.scene(1, 64, 48), png.chunk(b'tEXt', b'a\x00b', crc=1) * 60_000),
    'no picture at all': lambda: bytes(1_000_000),
}
"""One picture for each kind of hostile camera: what starves others at 20 Hz."""
