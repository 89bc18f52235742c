"""JPEG files taken apart and put together again, and some that no encoder writes (ISO/IEC 10918-1, annexes B, F, G)."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SOI, EOI = b'\xff\xd8', b'\xff\xd9'
SOF0, SOF2, DHT, SOS, DQT, DNL, DRI, APP0, APP1, COM = 0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xE1, 0xFE
SOFS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JFIF = b'JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00'


@dataclass(frozen=True, slots=True)
class Part:
    """
    One marker segment.

    :param body: what follows its length.
    :param scan: of a start of scan, the entropy-coded bytes with their restart markers.
    """

    marker: int
    body: bytes
    scan: bytes = b''

    def __bytes__(self) -> bytes:
        return bytes((0xFF, self.marker)) + struct.pack('>H', len(self.body) + 2) + self.body + self.scan


def split(jpeg: bytes) -> list[Part]:
    """Return the segments of a well-formed JPEG, without start and end marks."""
    found, position = [], 2
    while jpeg[position + 1] != 0xD9:
        marker, length = jpeg[position + 1], int.from_bytes(jpeg[position + 2 : position + 4], 'big')
        body, position = jpeg[position + 4 : position + 2 + length], position + 2 + length
        end = position
        while marker == SOS and not (jpeg[end] == 0xFF and jpeg[end + 1] not in (0, *range(0xD0, 0xD8))):
            end = jpeg.index(b'\xff', end + 1)
        found.append(Part(marker, body, jpeg[position:end]))
        position = end
    return found


def join(parts: Iterable[Part | bytes], end: bytes = EOI) -> bytes:
    """Return the file; bytes among the parts stay as they are."""
    return SOI + b''.join(map(bytes, parts)) + end


def without(parts: Iterable[Part], *markers: int) -> list[Part]:
    """Return the parts but those of these markers."""
    return [part for part in parts if part.marker not in markers]


def place(parts: list[Part], *markers: int) -> int:
    """Return where the first part with one of these markers is."""
    return next(index for index, part in enumerate(parts) if part.marker in markers)


def replaced(parts: list[Part], index: int, **fields: Any) -> list[Part]:
    """Return the parts, of one of which some fields are others."""
    part = parts[index]
    changed = {'marker': part.marker, 'body': part.body, 'scan': part.scan, **fields}
    return [*parts[:index], Part(**changed), *parts[index + 1 :]]


def scene(seed: int, width: int, height: int, channels: int = 3) -> NDArray[np.uint8]:
    """Return a picture with smooth parts, edges and some noise, H×W or H×W×3 uint8."""
    chance = np.random.default_rng(seed)
    coarse = chance.integers(0, 256, (max(2, height // 16), max(2, width // 16), channels), np.uint8)
    smooth = [np.asarray(Image.fromarray(coarse[:, :, index]).resize((width, height))) for index in range(channels)]
    noisy = np.stack(smooth, axis=-1) + chance.normal(0.0, 6.0, (height, width, channels))
    pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def encoded(pixels: NDArray[np.uint8], **options: Any) -> bytes:
    """Return a JPEG of RGB or grey pixels, as Pillow writes it: baseline, usual Huffman tables, unless asked."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG', **{'quality': 85, **options})
    return file.getvalue()


def decoded(jpeg: bytes) -> NDArray[np.uint8]:
    """Return RGB or grey pixels, as Pillow decodes them; whatever libjpeg cannot read raises OSError."""
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image if image.mode == 'L' else image.convert('RGB'))


def header(marker: int, width: int, height: int, *, components: int = 1, precision: int = 8) -> Part:
    """Return a frame header, every component sampled once."""
    of_each = b''.join(bytes((index + 1, 0x11, 0)) for index in range(components))
    return Part(marker, struct.pack('>BHHB', precision, height, width, components) + of_each)


def flat_quantisation() -> Part:
    """Return a quantisation table of ones."""
    return Part(DQT, b'\x00' + b'\x01' * 64)


def huffman(kind: int, symbols_by_length: dict[int, bytes]) -> Part:
    """Return a Huffman table number 0; ``kind`` is 0 for DC, 1 for AC."""
    counts = bytes(len(symbols_by_length.get(length, b'')) for length in range(1, 17))
    return Part(
        DHT, bytes((kind << 4,)) + counts + b''.join(symbols_by_length[key] for key in sorted(symbols_by_length))
    )


def coded(bits: NDArray[np.uint8] | str) -> bytes:
    """Return the entropy-coded bytes of bits, filled up with ones and stuffed."""
    values = np.frombuffer(bits.encode(), np.uint8) - 48 if isinstance(bits, str) else bits
    filled = np.concatenate((values, np.ones(-len(values) % 8, np.uint8)))
    return np.packbits(filled).tobytes().replace(b'\xff', b'\xff\x00')


def scan_header(components: Iterable[int], first: int, last: int, high: int, low: int) -> bytes:
    """Return the body of a start of scan."""
    chosen = list(components)
    of_each = b''.join(bytes((index + 1, 0)) for index in chosen)
    return bytes((len(chosen),)) + of_each + bytes((first, last, high << 4 | low))


def _runs_of_nothing(blocks: int) -> bytes:
    """Return an AC scan in which so many blocks end at once, as runs of end-of-band codes of 4 bits each."""
    bits = ''
    while blocks:
        power = min(14, blocks.bit_length() - 1)
        run = min(blocks, (2 << power) - 1)
        bits += f'{14 - power:04b}' + (f'{run - (1 << power):0{power}b}' if power else '')
        blocks -= run
    return coded(bits)


def bands(scans: int, components: int) -> list[tuple[int, int, int, int, int]]:
    """
    Return component, first and last coefficient, and high and low bit of about so many AC scans.

    Together they bring every bit of every coefficient once, in an order that the standard allows: some coefficients at
    a time where that makes enough scans, else one at a time and all of them from the highest bit on.
    """
    groups = scans // components
    if groups <= 63:
        edges = [1 + 63 * group // groups for group in range(groups + 1)]
        levels = [(0, 0)]
    else:
        edges = list(range(1, 65))
        deepest = min(13, -(-groups // 63) - 1)
        levels = [(0, deepest), *((bit + 1, bit) for bit in reversed(range(deepest)))]
    return [
        (component, first, end - 1, *level)
        for level in levels
        for first, end in itertools.pairwise(edges)
        for component in range(components)
    ]


def flat_progressive(width: int, height: int, scans: int, components: int = 1) -> bytes:
    """
    Return a progressive JPEG of one colour, valid in every bit, whose decoder goes over the whole picture in each scan.

    An AC scan takes 18 bits for 32767 blocks.
    """
    blocks = -(-width // 8) * -(-height // 8)
    parts: list[Part | bytes] = [
        Part(APP0, JFIF), flat_quantisation(), header(SOF2, width, height, components=components),
        huffman(0, {1: b'\x00'}), huffman(1, {4: bytes(power << 4 for power in reversed(range(15)))}),
        Part(SOS, scan_header(range(components), 0, 0, 0, 0), coded(np.zeros(blocks * components, np.uint8))),
    ]  # fmt: skip
    nothing = _runs_of_nothing(blocks)
    for component, first, last, high, low in bands(scans - 1, components):
        parts.append(Part(SOS, scan_header([component], first, last, high, low), nothing))
    return join(parts)


def noisy_progressive(seed: int, width: int, height: int, scans: int) -> bytes:
    """Return a valid grey progressive JPEG of up to 64 scans, each of which brings half the blocks a 1 or -1."""
    chance = np.random.default_rng(seed)
    blocks = -(-width // 8) * -(-height // 8)
    # So many zeros before the coefficient, which is the last one of its scan: 0 to 7, one code of 4 bits for each.
    symbols = bytes((0, *(zeros << 4 | 1 for zeros in range(8))))
    parts: list[Part | bytes] = [
        Part(APP0, JFIF),
        Part(DQT, b'\x00' + b'\x20' * 64),
        header(SOF2, width, height),
        huffman(0, {1: b'\x00'}),
        huffman(1, {4: symbols}),
        Part(SOS, scan_header([0], 0, 0, 0, 0), coded(np.zeros(blocks, np.uint8))),
    ]
    for _, first, last, high, low in bands(scans - 1, 1):
        # Either the code for nothing in this block, or that of the zeros and the sign.
        found = chance.random(blocks) < 0.5
        code = symbols.index((last - first) << 4 | 1)
        rows = np.zeros((blocks, 5), np.uint8)
        rows[found, :4] = [code >> bit & 1 for bit in (3, 2, 1, 0)]
        rows[found, 4] = chance.integers(0, 2, int(found.sum()), np.uint8)
        kept = np.ones_like(rows, bool)
        kept[~found, 4] = False
        parts.append(Part(SOS, scan_header([0], first, last, high, low), coded(rows[kept])))
    return join(parts)


def flat_baseline(width: int, height: int, components: int = 1) -> bytes:
    """Return a valid baseline JPEG of one colour: 2 bits for each block."""
    blocks = -(-width // 8) * -(-height // 8) * components
    return join([
        Part(APP0, JFIF), flat_quantisation(), header(SOF0, width, height, components=components),
        huffman(0, {1: b'\x00'}), huffman(1, {1: b'\x00'}),
        Part(SOS, scan_header(range(components), 0, 63, 0, 0), coded(np.zeros(2 * blocks, np.uint8))),
    ])  # fmt: skip
