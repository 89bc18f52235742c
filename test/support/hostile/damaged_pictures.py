"""
Pictures of which something was lost or changed on the way, with what is to become of each.

The decisions follow from the formats' specifications alone. Refused is what is not the whole picture, or where that
cannot be told. Taken is what is provably whole; whether it is counted as odd is a matter of taste. Either is right
where a decoder does something sensible with a file that is only against the letter of the specification.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from enum import Enum

import numpy as np

from support.hostile import jpeg_parts as jpeg
from support.hostile import png_parts as png
from support.hostile.jpeg_parts import Part

__all__ = ['DAMAGE', 'Decision', 'damaged_picture']

SIDE = (64, 48)


class Decision(Enum):
    """What becomes of a picture."""

    REFUSED = 'refused'
    TAKEN = 'taken'
    EITHER = 'either'


def damaged_picture(kind: str, seed: int = 1) -> tuple[Decision, bytes, bytes]:
    """Return what is to become of it, the damaged picture, and the whole one (64x48, colour)."""
    decision, whole, damage = DAMAGE[kind]
    chance = random.Random(f'{kind} {seed}')
    content = whole(chance.randrange(1000))
    return decision, damage(content, chance), content


Damage = Callable[[bytes, random.Random], bytes]

# --- JPEG -----------------------------------------------------------------------------------------


def _baseline(seed: int) -> bytes:
    return jpeg.encoded(jpeg.scene(seed, *SIDE))


def _restarting(seed: int) -> bytes:
    return jpeg.encoded(jpeg.scene(seed, *SIDE), restart_marker_blocks=2)


def _progressive(seed: int) -> bytes:
    return jpeg.encoded(jpeg.scene(seed, *SIDE), progressive=True)


def _scan_cut(share: float, end: bytes) -> Damage:
    def damage(whole: bytes, chance: random.Random) -> bytes:
        parts = jpeg.split(whole)
        at = jpeg.place(parts, jpeg.SOS)
        scan = parts[at].scan
        kept = scan[: max(1, int(len(scan) * (share + chance.uniform(-0.05, 0.05))))]
        return jpeg.join(jpeg.replaced(parts, at, scan=kept.removesuffix(b'\xff')), end)

    return damage


def _last_bytes_missing(whole: bytes, chance: random.Random) -> bytes:
    """Return the picture without the last blocks."""
    return whole[: -2 - chance.randrange(12, 40)].removesuffix(b'\xff') + jpeg.EOI


def _no_scan_data(whole: bytes, chance: random.Random) -> bytes:
    parts = jpeg.split(whole)
    return jpeg.join(jpeg.replaced(parts, jpeg.place(parts, jpeg.SOS), scan=b''))


def _rubbish_before_the_end(whole: bytes, chance: random.Random) -> bytes:
    return whole[:-2] + bytes(chance.choices(range(1, 255), k=40)) + jpeg.EOI


def _cut_within_a_scan(whole: bytes, chance: random.Random) -> bytes:
    return whole[: int(len(whole) * 0.6)].removesuffix(b'\xff') + jpeg.EOI


def _no_code(whole: bytes, chance: random.Random) -> bytes:
    """Return a scan with a code of ones alone, which no Huffman table has."""
    return _in_scan(whole, chance, b'\xff\x00' * 12, replace=True)


def _end_mark_in_scan(whole: bytes, chance: random.Random) -> bytes:
    return _in_scan(whole, chance, jpeg.EOI, replace=True)


def _start_mark_in_scan(whole: bytes, chance: random.Random) -> bytes:
    return _in_scan(whole, chance, jpeg.SOI, replace=False)


def _in_scan(whole: bytes, chance: random.Random, piece: bytes, *, replace: bool) -> bytes:
    parts = jpeg.split(whole)
    at = jpeg.place(parts, jpeg.SOS)
    scan = parts[at].scan
    middle = len(scan) // 2 + chance.randrange(len(scan) // 4)
    while scan[middle - 1] == 0xFF:
        middle -= 1
    after = scan[middle + len(piece) :] if replace else scan[middle:]
    return jpeg.join(jpeg.replaced(parts, at, scan=scan[:middle] + piece + after))


def _hole(whole: bytes, chance: random.Random) -> bytes:
    """Return the picture without a stretch in the middle of its scan, as a lost packet leaves it."""
    parts = jpeg.split(whole)
    at = jpeg.place(parts, jpeg.SOS)
    scan, size = parts[at].scan, 0
    start = len(scan) // 3 + chance.randrange(len(scan) // 8)
    size = len(scan) // 3
    return jpeg.join(jpeg.replaced(parts, at, scan=scan[:start].removesuffix(b'\xff') + scan[start + size :]))


def _other_header(change: Callable[[bytes], bytes]) -> Damage:
    def damage(whole: bytes, chance: random.Random) -> bytes:
        parts = jpeg.split(whole)
        at = jpeg.place(parts, *jpeg.SOFS)
        return jpeg.join(jpeg.replaced(parts, at, body=change(parts[at].body)))

    return damage


def _sized(width: int, height: int) -> Damage:
    return _other_header(lambda body: body[:1] + struct.pack('>HH', height, width) + body[5:])


def _other_process(marker: int) -> Damage:
    def damage(whole: bytes, chance: random.Random) -> bytes:
        parts = jpeg.split(whole)
        return jpeg.join(jpeg.replaced(parts, jpeg.place(parts, *jpeg.SOFS), marker=marker))

    return damage


def _missing(*markers: int) -> Damage:
    return lambda whole, chance: jpeg.join(jpeg.without(jpeg.split(whole), *markers))


def _number_of_lines_behind(whole: bytes, chance: random.Random) -> bytes:
    parts = jpeg.split(whole)
    at = jpeg.place(parts, *jpeg.SOFS)
    body = parts[at].body
    lines = Part(jpeg.DNL, body[1:3])
    return jpeg.join([*jpeg.replaced(parts, at, body=body[:1] + bytes(2) + body[3:]), lines])


def _two_headers(whole: bytes, chance: random.Random) -> bytes:
    parts = jpeg.split(whole)
    at = jpeg.place(parts, *jpeg.SOFS)
    return jpeg.join([*parts[: at + 1], *parts[at:]])


def _overfull_table(whole: bytes, chance: random.Random) -> bytes:
    parts = jpeg.split(whole)
    return jpeg.join([Part(jpeg.DHT, b'\x00' + b'\x05' + bytes(15) + bytes(5)), *jpeg.without(parts, jpeg.DHT)])


def _segment_length(length: int) -> Damage:
    def damage(whole: bytes, chance: random.Random) -> bytes:
        at = whole.index(b'\xff\xdb') + 2
        return whole[:at] + struct.pack('>H', length) + whole[at + 2 :]

    return damage


def _zero_steps(whole: bytes, chance: random.Random) -> bytes:
    parts = jpeg.split(whole)
    tables = [Part(jpeg.DQT, bytes((number,)) + bytes(64)) for number in (0, 1)]
    return jpeg.join([*tables, *jpeg.without(parts, jpeg.DQT)])


def _restarts(kind: str) -> Damage:
    def damage(whole: bytes, chance: random.Random) -> bytes:
        parts = jpeg.split(whole)
        at = jpeg.place(parts, jpeg.SOS)
        scan = parts[at].scan
        if kind == 'none announced':
            return jpeg.join(jpeg.without(parts, jpeg.DRI))
        if kind == 'interval missing':
            first, second = scan.index(b'\xff\xd1'), scan.index(b'\xff\xd2')
            return jpeg.join(jpeg.replaced(parts, at, scan=scan[:first] + scan[second:]))
        mark = scan.index(b'\xff\xd2')
        piece = b'\xff\xd6' if kind == 'wrong number' else b''
        return jpeg.join(jpeg.replaced(parts, at, scan=scan[:mark] + piece + scan[mark + 2 :]))

    return damage


def _never_there(whole: bytes, chance: random.Random) -> bytes:
    """Return a plain picture that says to have restart markers, of which there is none."""
    parts = jpeg.split(whole)
    return jpeg.join([Part(jpeg.DRI, b'\x00\x01'), *parts])


def _scans_missing(kept: int) -> Damage:
    """Return what is left of a progressive picture of ten scans, between two of which the rest was lost."""

    def damage(whole: bytes, chance: random.Random) -> bytes:
        parts = jpeg.split(whole)
        scans = [index for index, part in enumerate(parts) if part.marker == jpeg.SOS]
        return jpeg.join(parts[: scans[kept - 1] + 1])

    return damage


def _one_scan_missing(whole: bytes, chance: random.Random) -> bytes:
    parts = jpeg.split(whole)
    scans = [index for index, part in enumerate(parts) if part.marker == jpeg.SOS]
    # Not a first one of a band: what refines it would not be understood.
    lost = scans[-1] if chance.random() < 0.5 else scans[chance.choice([6, 7])]
    return jpeg.join(parts[:lost] + parts[lost + 1 :])


def _chroma_missing(whole: bytes, chance: random.Random) -> bytes:
    """Return a picture whose header names three colours, and which ends after the scan of the first."""
    flat = jpeg.split(jpeg.flat_baseline(*SIDE, 3))
    at = jpeg.place(flat, jpeg.SOS)
    blocks = SIDE[0] * SIDE[1] // 64
    zeros = jpeg.coded(np.zeros(2 * blocks, np.uint8))
    return jpeg.join(jpeg.replaced(flat, at, body=jpeg.scan_header([0], 0, 63, 0, 0), scan=zeros))


def _sampling_of_nothing(body: bytes) -> bytes:
    return body[:7] + b'\x00' + body[8:]


# --- PNG ------------------------------------------------------------------------------------------


def _png(seed: int) -> bytes:
    return png.encoded(jpeg.scene(seed, *SIDE), png.chunk(b'tEXt', b'a\x00b'), pieces=3)


def _chunks(change: Callable[[list[tuple[bytes, bytes]], random.Random], list[tuple[bytes, bytes]]]) -> Damage:
    return lambda whole, chance: png.join(change(png.split(whole), chance))


def _checksum(kind: bytes) -> Damage:
    def damage(whole: bytes, chance: random.Random) -> bytes:
        start = whole.index(kind) - 4
        at = start + 8 + int.from_bytes(whole[start : start + 4], 'big')
        return whole[:at] + bytes((whole[at] ^ 1 << chance.randrange(8),)) + whole[at + 1 :]

    return damage


def _data(change: Callable[[bytes, random.Random], bytes], *, raw: bool = False) -> Damage:
    """Return what changes the compressed data, or the lines in it; every checksum of a chunk is right."""

    def damage(whole: bytes, chance: random.Random) -> bytes:
        chunks = png.split(whole)
        content = b''.join(content for kind, content in chunks if kind == b'IDAT')
        changed = zlib.compress(change(zlib.decompress(content), chance)) if raw else change(content, chance)
        return png.join([*(one for one in chunks if one[0] != b'IDAT'), (b'IDAT', changed)])

    return damage


def _png_header(**fields: int) -> Damage:
    def damage(whole: bytes, chance: random.Random) -> bytes:
        names = ('width', 'height', 'depth', 'colour', 'compression', 'filtering', 'interlace')
        values = dict(zip(names, struct.unpack('>IIBBBBB', png.split(whole)[0][1]), strict=True)) | fields
        return png.join([(b'IHDR', struct.pack('>IIBBBBB', *values.values())), *png.split(whole)[1:]])

    return damage


def _last_lines_missing(lines: bytes, chance: random.Random) -> bytes:
    return lines[: -(1 + 3 * SIDE[0]) * chance.randrange(1, 40)]


def _chunk_too_long(whole: bytes, chance: random.Random) -> bytes:
    return whole.replace(b'\x00\x00\x00\x03tEXt', b'\x7f\xff\xff\xfftEXt')


def _flipped(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) // 4, len(content) - 8)
    return content[:at] + bytes((content[at] ^ 1 << chance.randrange(8),)) + content[at + 1 :]


def _palette(last: int) -> Damage:
    """Return a picture of a palette of four colours, of which pixels name up to ``last``; without a palette for 0."""

    def damage(whole: bytes, chance: random.Random) -> bytes:
        width, height = SIDE
        lines = b''.join(b'\x00' + bytes(chance.randrange(last or 4) for _ in range(width)) for _ in range(height))
        palette = png.chunk(b'PLTE', bytes(range(12))) if last else b''
        return png.file(png.header(width, height, 8, png.PALETTE), palette, png.chunk(b'IDAT', zlib.compress(lines)))

    return damage


R, T, E = Decision.REFUSED, Decision.TAKEN, Decision.EITHER
DAMAGE: dict[str, tuple[Decision, Callable[[int], bytes], Damage]] = {
    'JPEG, 90 % of the scan lost, end mark': (R, _baseline, _scan_cut(0.1, jpeg.EOI)),
    'JPEG, 90 % of the scan lost, no end mark': (R, _baseline, _scan_cut(0.1, b'')),
    'JPEG, 90 % of the scan lost, zeros behind': (R, _baseline, _scan_cut(0.1, bytes(4096))),
    'JPEG, 90 % of the scan lost, zeros and end mark': (R, _baseline, _scan_cut(0.1, bytes(4096) + jpeg.EOI)),
    'JPEG, half of the scan lost, end mark': (R, _baseline, _scan_cut(0.5, jpeg.EOI)),
    'JPEG, half of the scan lost, no end mark': (R, _baseline, _scan_cut(0.5, b'')),
    'JPEG, last blocks missing': (R, _baseline, _last_bytes_missing),
    'JPEG, no scan data': (R, _baseline, _no_scan_data),
    'JPEG, hole in the scan': (R, _baseline, _hole),
    'JPEG, code that no table has': (R, _baseline, _no_code),
    'JPEG, marker within the scan': (R, _baseline, _end_mark_in_scan),
    'JPEG, start mark within the scan': (R, _baseline, _start_mark_in_scan),
    'JPEG, rubbish before the end mark': (R, _baseline, _rubbish_before_the_end),
    'JPEG, header says twice the height': (R, _baseline, _sized(64, 96)),
    'JPEG, header says half the height': (R, _baseline, _sized(64, 24)),
    'JPEG, header says twice the width': (R, _baseline, _sized(128, 48)),
    'JPEG, no height, number of lines behind': (E, _baseline, _number_of_lines_behind),
    'JPEG, no height': (R, _baseline, _sized(64, 0)),
    'JPEG, no width': (R, _baseline, _sized(0, 48)),
    'JPEG, two frame headers': (R, _baseline, _two_headers),
    'JPEG, no frame header': (R, _baseline, _missing(*jpeg.SOFS)),
    'JPEG, no scan': (R, _baseline, _missing(jpeg.SOS)),
    'JPEG, no quantisation tables': (R, _baseline, _missing(jpeg.DQT)),
    'JPEG, quantisation by zero': (E, _baseline, _zero_steps),
    'JPEG, Huffman table overfull': (R, _baseline, _overfull_table),
    'JPEG, segment of length 0': (R, _baseline, _segment_length(0)),
    'JPEG, segment longer than the file': (R, _baseline, _segment_length(65535)),
    'JPEG, said to be progressive': (R, _baseline, _other_process(0xC2)),
    'JPEG, said to be lossless': (R, _baseline, _other_process(0xC3)),
    'JPEG, said to be arithmetic': (R, _baseline, _other_process(0xC9)),
    'JPEG, said to be of 12 bits': (R, _baseline, _other_header(lambda body: b'\x0c' + body[1:])),
    'JPEG, component of sampling 0': (R, _baseline, _other_header(_sampling_of_nothing)),
    'JPEG, restart interval missing': (R, _restarting, _restarts('interval missing')),
    'JPEG, restart marker of a wrong number': (E, _restarting, _restarts('wrong number')),
    'JPEG, restart marker missing': (R, _restarting, _restarts('marker missing')),
    'JPEG, restarts not announced': (R, _restarting, _restarts('none announced')),
    'JPEG, restarts announced, none there': (R, _baseline, _never_there),
    'JPEG, progressive, first scan alone': (R, _progressive, _scans_missing(1)),
    'JPEG, progressive, half of the scans': (R, _progressive, _scans_missing(5)),
    'JPEG, progressive, last scan missing': (R, _progressive, _scans_missing(9)),
    'JPEG, progressive, one refinement missing': (R, _progressive, _one_scan_missing),
    'JPEG, progressive, cut within a scan': (R, _progressive, _cut_within_a_scan),
    'JPEG, scans of two colours missing': (R, _baseline, _chroma_missing),
    'JPEG, two start marks': (R, _baseline, lambda whole, chance: jpeg.SOI + whole),
    'JPEG, zeros before the start mark': (R, _baseline, lambda whole, chance: bytes(8) + whole),
    'JPEG, no end mark': (T, _baseline, lambda whole, chance: whole[:-2]),
    'JPEG, zeros before the end mark': (T, _baseline, lambda whole, chance: whole[:-2] + bytes(100) + jpeg.EOI),
    'JPEG, rubbish behind the end mark': (T, _baseline, lambda whole, chance: whole + chance.randbytes(500)),
    'PNG, header checksum wrong': (R, _png, _checksum(b'IHDR')),
    'PNG, data checksum wrong': (R, _png, _checksum(b'IDAT')),
    'PNG, checksum of a text wrong': (E, _png, _checksum(b'tEXt')),
    'PNG, checksum of the end wrong': (E, _png, lambda whole, chance: whole[:-1] + b'\x00'),
    'PNG, cut in its data': (R, _png, lambda whole, chance: whole[: len(whole) // 2]),
    'PNG, data lost, end there': (R, _png, _data(lambda content, chance: content[: len(content) // 2])),
    'PNG, one data chunk lost': (R, _png, _chunks(lambda chunks, chance: chunks[:3] + chunks[4:])),
    'PNG, last data chunk lost': (R, _png, _chunks(lambda chunks, chance: chunks[:-1])),
    'PNG, no data': (R, _png, _chunks(lambda chunks, chance: chunks[:-3])),
    'PNG, no end': (E, _png, lambda whole, chance: whole[:-12]),
    'PNG, bit flipped in its data': (R, _png, _data(_flipped)),
    'PNG, checksum of its data wrong': (R, _png, _data(lambda content, chance: content[:-1] + b'\x00')),
    'PNG, last lines missing': (R, _png, _data(_last_lines_missing, raw=True)),
    'PNG, more lines than its height': (E, _png, _data(lambda lines, chance: lines + lines[:193], raw=True)),
    'PNG, filter of no meaning': (R, _png, _data(lambda lines, chance: lines[:193] + b'\x09' + lines[194:], raw=True)),
    'PNG, header says twice the height': (R, _png, _png_header(height=96)),
    'PNG, header says half the height': (E, _png, _png_header(height=24)),
    'PNG, header says 16 bits': (R, _png, _png_header(depth=16)),
    'PNG, header says 3 bits': (R, _png, _png_header(depth=3)),
    'PNG, header says colour type 5': (R, _png, _png_header(colour=5)),
    'PNG, header says another compression': (R, _png, _png_header(compression=1)),
    'PNG, header says another interlace': (R, _png, _png_header(interlace=2)),
    'PNG, no width': (R, _png, _png_header(width=0)),
    'PNG, two headers': (R, _png, _chunks(lambda chunks, chance: [chunks[0], *chunks])),
    'PNG, unknown critical chunk': (R, _png, _chunks(lambda chunks, chance: [chunks[0], (b'QQQQ', b''), *chunks[1:]])),
    'PNG, no palette': (R, _png, _palette(0)),
    'PNG, colours beyond the palette': (E, _png, _palette(200)),
    'PNG, chunk longer than the file': (R, _png, _chunk_too_long),
    'PNG, sent as text': (R, _png, lambda whole, chance: whole.replace(b'\r\n', b'\n')),
    'PNG, rubbish behind the end': (T, _png, lambda whole, chance: whole + chance.randbytes(500)),
}  # fmt: skip
"""Decision, what makes the whole picture of a seed, and what damages it."""
