"""
JPEG to pixels, or a refusal: libjpeg-turbo would make a picture of half a file too.

libjpeg warns about damage and goes on, and reports the first warning only. Here a file is first walked segment by
segment and repaired, so that what is left of the decoder's warnings is about the scans themselves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from numpy.typing import NDArray

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.image.buffers import Scratch

__all__ = ['JPEG_START', 'decode_jpeg', 'import_simplejpeg']

JPEG_START = b'\xff\xd8'

_END = b'\xff\xd9'
_SOI, _EOI, _SOS, _DHT, _DQT, _DAC, _DRI, _APP0, _APP14 = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xCC, 0xDD, 0xE0, 0xEE
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_DHT, 0xC8, _DAC}
# What decides about pixels; libjpeg reads profiles and other comments too, and stops at a damaged one.
_KEPT = _FRAMES | {_SOS, _DHT, _DQT, _DRI, _APP0, _APP14}
# FF 00 is a stuffed FF within a scan and FF FF is fill; FF 01 and the restart markers FF D0..D7 have no length.
_MARKER = re.compile(rb'\xff[^\x00\x01\xff\xd0-\xd7]')
_RESTART = re.compile(rb'\xff([\xd0-\xd7])')
_MARKER_OR_RESTART = re.compile(rb'\xff[^\x00\x01\xff]')
# What a file of any honest size needs.
_MAX_SEGMENTS = 1 << 12
# A decoder goes over the whole image for each scan, also an empty one. Progressive files have about ten.
_MAX_SCANS = 32
# USB cameras leave as many behind a scan or a restart interval whose blocks are all there. More bytes that are not
# padding are left where a decoder has lost its place in the data.
_FEW_BYTES = 4
# With most Huffman tables, zeros are codes of ever more small coefficients: no picture has as many.
_ZEROS = bytes(32)
_END_OF_BLOCK, _SIXTEEN_ZEROS = 0x00, 0xF0
_COEFFICIENTS = (1 << 64) - 1
_MAX_SIDE = 65535
_EXTRANEOUS = re.compile(r'(\d+) extraneous bytes before marker 0x([0-9a-f]{2})')


@dataclass(slots=True)
class _File:
    """
    Hold what a walk over a file finds.

    :param pieces: of the file in order: segments with their markers, entropy-coded data of scans.
    :param scans: places of the entropy-coded data in ``pieces``.
    :param factors: horizontal and vertical sampling factor of each component.
    :param zero_codes: by id of a Huffman table of AC coefficients, the symbol whose code is zeros alone.
    :param no_zeros: whether the tables of the current scan make zeros implausible as data.
    :param missing: by id of a component, a bit for each coefficient that is not there to its last bit.
    """

    width: int = 0
    height: int = 0
    frame: int = 0
    frame_piece: int = 0
    interval: int = 0
    pieces: list[bytes] = field(default_factory=lambda: [JPEG_START])
    scans: list[int] = field(default_factory=list)
    factors: list[tuple[int, int]] = field(default_factory=list)
    missing: dict[int, int] = field(default_factory=dict)
    zero_codes: dict[int, int] = field(default_factory=dict)
    no_zeros: bool = False
    oddities: set[str] = field(default_factory=set)

    def content(self) -> bytes:
        return b''.join((*self.pieces, _END))


def import_simplejpeg() -> Any:
    """
    Return the module that decodes JPEG.

    :raises ImageRejectedError: ``decoder`` where it is not installed.
    """
    try:
        import simplejpeg
    except ImportError as error:
        raise ImageRejectedError(
            'decoder',
            f'JPEG needs simplejpeg, which cannot be imported ({error}).',
            remedy='Install it: pip install simplejpeg, or pip install -r requirements/runtime.txt.',
        ) from error
    return simplejpeg


def decode_jpeg(
    data: memoryview, scratch: Scratch, admit: Callable[[int, int, int], None]
) -> tuple[NDArray, tuple[str, ...]]:
    """
    Return the pixels of a JPEG as ``cv2.imdecode(..., IMREAD_UNCHANGED)`` does, and which faults were tolerated.

    :param data: the whole file.
    :param scratch: where the pixels are kept; they are valid until its next use.
    :param admit: called with width, height and the bytes that decoding takes, before anything is allocated; raises
        where that is too much.
    :return: H×W grey or H×W×3 BGR, uint8; names of :data:`gps_denied_c7.image.decode.ODDITIES`.
    :raises ImageRejectedError: ``data`` (damaged, cut short), ``encoding`` (a kind of JPEG that is not decoded),
        ``decoder`` (simplejpeg is not installed), or what ``admit`` raises.
    """
    # ISO/IEC 10918-1, annex B.
    file = _walk(data)
    channels = 3 if len(file.factors) > 1 else 1
    admit(file.width, file.height, _memory(file, channels) + data.nbytes)
    if any(file.missing.values()):
        _refuse('scans are missing: some coefficients of its colours are not complete.')
    shape = (file.height, file.width, channels)
    array = scratch.array('jpeg', shape, 'uint8')
    decode = import_simplejpeg().decode_jpeg
    colour = 'BGR' if channels == 3 else 'GRAY'
    try:
        _tidy(file, lambda content, strict: decode(content, colour, buffer=array, strict=strict))
    except ImageRejectedError:
        raise
    except ValueError as error:
        if 'Insufficient memory' in str(error):
            raise MemoryError(str(error)) from error
        if 'subsampling' in str(error):
            raise ImageRejectedError(
                'encoding',
                f'a JPEG with the sampling factors {file.factors} is not decoded.',
                remedy='Have the publisher write 4:2:0, 4:2:2, 4:4:0, 4:1:1 or 4:4:4.',
            ) from error
        _refuse(f'{error}.')
    return array if channels == 3 else array[:, :, 0], tuple(sorted(file.oddities))


def _tidy(file: _File, decode: Callable[[bytes, bool], Any]) -> None:
    """Decode without a warning, where the file allows, after taking out what stands behind whole scans."""
    try:
        decode(file.content(), True)
        return
    except ValueError as error:
        extraneous = _EXTRANEOUS.search(str(error))
        if extraneous is None:
            raise
        if int(extraneous[2], 16) == _EOI:
            last = file.scans[-1]
            file.pieces[last] = _without_padding(file.pieces[last], int(extraneous[1]))
            file.oddities.add('padding_before_end')
            decode(file.content(), True)
            return
        if not file.interval or len(file.scans) != 1 or file.frame == _PROGRESSIVE:
            raise
    _check_intervals(file)
    file.oddities.add('bytes_before_restart')
    decode(file.content(), False)


def _without_padding(scan: bytes, extra: int) -> bytes:
    """
    Return entropy-coded data without what follows its last block.

    Where a scan was cut and filled up, as many of the fill bytes were taken for blocks as were needed. So the whole run
    of equal bytes goes, and what remains has to be enough.

    :param extra: bytes that the decoder did not need, or a few more.
    :raises ImageRejectedError: ``data`` where they are neither padding nor few.
    """
    run = len(scan) - len(scan.rstrip(scan[-1:]))
    if run > extra:
        # The last byte of the data itself may look the same.
        return scan[: len(scan) - run + 1]
    if run < extra > _FEW_BYTES:
        _refuse(f'{extra} bytes are left after its last block.')
    return scan[:-extra]


def _check_intervals(file: _File) -> None:
    """
    Decode each restart interval as a picture of its own, one row of blocks high.

    :raises ImageRejectedError: ``data`` where one is not whole, or there are more or fewer than there should be.
    :raises ValueError: likewise.
    """
    factors = file.factors
    # With one component, a block is the unit, whatever its sampling factor. ISO/IEC 10918-1, A.2.
    across, down = (8 * max(sides) if len(factors) > 1 else 8 for sides in zip(*factors, strict=True))
    units = -(-file.width // across) * -(-file.height // down)
    if file.interval * across > _MAX_SIDE:
        _refuse(f'it has faults in restart intervals of {file.interval} blocks, too long to check one by one.')
    scan = file.scans[0]
    # No fill bytes: they would be taken for the data's.
    parts = re.split(rb'\xff+[\xd0-\xd7]', file.pieces[scan])
    if not parts[-1]:
        # One more marker, as the decoder allows before the end.
        parts.pop()
    if len(parts) != -(-units // file.interval):
        _refuse(f'{len(parts)} restart intervals, and the picture needs {-(-units // file.interval)}.')
    decode = import_simplejpeg().decode_jpeg
    for number, part in enumerate(parts):
        blocks = min(file.interval, units - number * file.interval)
        small = _File(interval=file.interval, pieces=list(file.pieces[: scan + 1]), scans=[scan])
        frame = bytearray(small.pieces[file.frame_piece])
        frame[5:9] = down.to_bytes(2, 'big') + (blocks * across).to_bytes(2, 'big')
        small.pieces[file.frame_piece] = bytes(frame)
        small.pieces[scan] = part
        try:
            decode(small.content(), 'GRAY')
        except ValueError as error:
            extraneous = _EXTRANEOUS.search(str(error))
            if extraneous is None:
                raise
            small.pieces[scan] = _without_padding(part, int(extraneous[1]))
            decode(small.content(), 'GRAY')


def _walk(data: memoryview) -> _File:
    # Segment by segment: the end mark of a thumbnail inside APP1 is not the end of the image.
    file = _File()
    position, scan_start = len(JPEG_START), 0
    for _ in range(_MAX_SEGMENTS):
        # Most files have no restart markers: one pass over a scan, and no other to look for them.
        found = _MARKER_OR_RESTART.search(data, position)
        restarts = found is not None and _RESTART.match(found[0]) is not None
        if restarts:
            found = _MARKER.search(data, position)
        start = data.nbytes if found is None else found.start()
        if scan_start:
            _take_scan(file, data[scan_start:start], restarts)
        elif bytes(data[position:start]).strip(b'\xff'):
            file.oddities.add('bytes_between_segments')
        if found is None:
            if not file.scans:
                _refuse(f'cut short: {data.nbytes} bytes without a scan.')
            file.oddities.add('no_end_mark')
            return file
        marker, position, scan_start = found[0][1], found.end(), 0
        if marker == _SOI:
            _refuse('another picture begins before its end.')
        if marker == _EOI:
            if not file.scans:
                _refuse('it ends before its first scan.')
            if position < data.nbytes:
                file.oddities.add('bytes_after_end')
            return file
        length = int.from_bytes(data[position : position + 2], 'big')
        segment = data[position + 2 : position + length]
        if length < 2 or segment.nbytes != length - 2:
            _refuse(f'segment FF {marker:02X} is cut short or has no length.')
        if marker in _KEPT:
            _take_segment(file, marker, bytes(segment))
        position += length
        scan_start = position if marker == _SOS else 0
    _refuse(f'more than {_MAX_SEGMENTS} segments.')


def _take_segment(file: _File, marker: int, segment: bytes) -> None:
    if marker in _FRAMES:
        _take_frame(file, marker, segment)
    elif marker == _SOS:
        segment = _take_scan_header(file, segment)
    elif marker == _DHT:
        _take_tables(file, segment)
    elif marker == _DQT:
        _check_quantization(segment)
    elif marker == _DRI:
        file.interval = int.from_bytes(segment[:2], 'big')
    elif marker == _APP0 and segment[:5] == b'JFIF\0' and segment[5:6] not in (b'\1', b''):
        # The decoder warns of it, and reads it all the same.
        segment = segment[:5] + b'\1' + segment[6:]
        file.oddities.add('jfif_version')
    file.pieces.append(bytes((0xFF, marker)) + (len(segment) + 2).to_bytes(2, 'big') + segment)


def _take_frame(file: _File, marker: int, segment: bytes) -> None:
    if file.frame:
        # Which of them the decoder would believe, and allocate for, is its own affair.
        _refuse('it has two frame headers.')
    if len(segment) < 6 or len(segment) != 6 + 3 * segment[5] or not segment[5]:
        _refuse('its frame header is damaged.')
    if marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or segment[0] != 8:
        kind = 'lossless' if marker in (0xC3, 0xC7, 0xCB, 0xCF) else 'arithmetic' if marker > 0xC8 else 'hierarchical'
        kind = f'{segment[0]}-bit' if marker <= _PROGRESSIVE else kind
        raise ImageRejectedError(
            'encoding',
            f'a JPEG of the {kind} kind is not decoded.',
            remedy='Have the publisher write baseline or progressive JPEG of 8 bits with Huffman codes, or PNG.',
        )
    file.height, file.width = int.from_bytes(segment[1:3], 'big'), int.from_bytes(segment[3:5], 'big')
    file.frame, file.frame_piece = marker, len(file.pieces)
    for number, factors in zip(segment[6::3], segment[7::3], strict=True):
        file.factors.append((factors >> 4 or 1, factors & 15 or 1))
        file.missing[number] = _COEFFICIENTS


def _take_tables(file: _File, segment: bytes) -> None:
    while len(segment) > 17:
        kind, symbols = segment[0], sum(segment[1:17])
        if kind >> 4:
            file.zero_codes[kind & 15] = segment[17]
        segment = segment[17 + symbols :]


def _check_quantization(segment: bytes) -> None:
    while segment:
        wide = segment[0] >> 4
        values = segment[1:129] if wide else segment[1:65]
        segment = segment[1 + len(values) :]
        # The decoder multiplies with it, and the picture comes out flat.
        if 0 in (memoryview(values[: len(values) & ~1]).cast('H') if wide else values):
            _refuse('a quantization table has a zero.')


def _take_scan_header(file: _File, segment: bytes) -> bytes:
    """Note which coefficients a scan brings; return its header as the decoder wants it."""
    if not file.frame:
        _refuse('a scan precedes the frame header.')
    if len(segment) < 6 or len(segment) != 4 + 2 * segment[0]:
        _refuse('the header of a scan is damaged.')
    if len(file.scans) == _MAX_SCANS:
        _refuse(f'more than {_MAX_SCANS} scans.')
    first, last, bits = segment[-3:]
    if file.frame != _PROGRESSIVE and (first, last, bits) != (0, 63, 0):
        # A sequential scan has all coefficients, whatever it says.
        first, last, bits = 0, 63, 0
        segment = segment[:-3] + bytes((first, last, bits))
        file.oddities.add('scan_parameters')
    brought = ((1 << (last + 1)) - 1) & ~((1 << first) - 1) if first <= last < 64 and not bits & 15 else 0
    # Without tables, those of the standard hold, where zeros are the code of a small coefficient.
    file.no_zeros = file.frame != _PROGRESSIVE and any(
        file.zero_codes.get(table & 15, 1) not in (_END_OF_BLOCK, _SIXTEEN_ZEROS) for table in segment[2:-3:2]
    )
    for number in segment[1:-3:2]:
        if number in file.missing:
            file.missing[number] &= ~brought
    return segment


def _take_scan(file: _File, scan: memoryview, restarts: bool) -> None:
    # Fill bytes before the marker that ends it; of a file that is cut, half an end mark.
    data = bytes(scan).rstrip(b'\xff')
    if file.no_zeros:
        data = _without_zeros(file, data)
    file.scans.append(len(file.pieces))
    file.pieces.append(data)
    for number, restart in enumerate(_RESTART.finditer(data) if restarts else ()):
        if not file.interval:
            _refuse('it has restart intervals that it did not announce.')
        if restart[1][0] != 0xD0 + number % 8:
            _refuse('a restart interval is missing, or one too many.')


def _without_zeros(file: _File, data: bytes) -> bytes:
    """Leave zeros behind a scan out, of which the decoder might take some for blocks that are missing."""
    end = len(data.rstrip(b'\0'))
    if data.find(_ZEROS, 0, end) >= 0:
        _refuse('a part of its scan is zeros.')
    if len(data) - end <= 2:
        return data
    file.oddities.add('padding_before_end')
    # The last byte of the data itself may be zero.
    return data[: end + 1]


def _memory(file: _File, channels: int) -> int:
    """Return the bytes that decoding takes beside the compressed ones: pixels, and coefficients of several scans."""
    pixels = file.width * file.height
    size = pixels * channels + (pixels * 4 if len(file.factors) > 3 else 0)
    if file.frame == _PROGRESSIVE or len(file.scans) > 1:
        across, down = (max(sides) for sides in zip(*file.factors, strict=True))
        size += sum(2 * pixels * x * y // (across * down) for x, y in file.factors)
    return size


def _refuse(what: str) -> NoReturn:
    raise ImageRejectedError('data', f'JPEG is damaged: {what}', remedy='Look for data loss between camera and node.')
