"""Each kind of damage in docs/reference/compressed-images.md gives the documented result."""

from __future__ import annotations

import io
import re
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.image.decode import ODDITIES, decode_picture
from support.source_tree import REPOSITORY

END = b'\xff\xd9'


def scene(width=131, height=97, channels=3):
    """A random picture, smooth enough for JPEG, with a scan of some kB."""
    noise = np.random.default_rng(5).integers(0, 255, (height, width, channels)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def encoded(suffix, picture, *options):
    done, file = cv2.imencode(suffix, picture, list(options))
    assert done
    return file.tobytes()


def pillow(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def at(file, marker):
    """Start and end of the first segment of a kind."""
    start = file.index(bytes((0xFF, marker)))
    return start, start + 2 + int.from_bytes(file[start + 2 : start + 4], 'big')


def without(file, marker):
    """Leave out every segment of a kind before the scan."""
    while bytes((0xFF, marker)) in file[: file.index(b'\xff\xda')]:
        start, end = at(file, marker)
        file = file[:start] + file[end:]
    return file


def put(file, place, content):
    return file[:place] + content + file[place:]


def segment(marker, content):
    return bytes((0xFF, marker)) + struct.pack('>H', len(content) + 2) + content


def changed(file, place, content):
    return file[:place] + content + file[place + len(content) :]


def restart(number):
    return bytes((0xFF, 0xD0 + number))


PICTURE = scene()
BASELINE = simplejpeg.encode_jpeg(PICTURE, 85, 'BGR', '420')
STOCK = encoded('.jpg', PICTURE)
PROGRESSIVE = pillow(Image.fromarray(PICTURE), 'JPEG', progressive=True)
INTERVALS = encoded('.jpg', PICTURE, cv2.IMWRITE_JPEG_RST_INTERVAL, 3)
LAST_NUMBER = len(re.findall(rb'\xff[\xd0-\xd7]', INTERVALS)) % 8
CMYK = pillow(Image.fromarray(PICTURE).convert('CMYK'), 'JPEG')
SCAN = at(BASELINE, 0xDA)[1]
MIDDLE = (SCAN + len(BASELINE)) // 2
LAST_SCAN = PROGRESSIVE.rindex(b'\xff\xda')
ONE, TWO, THREE = (INTERVALS.index(restart(number)) for number in (1, 2, 3))
FRAME = at(BASELINE, 0xC0)[0]


def each_interval(content):
    return re.sub(rb'\xff[\xd0-\xd7]', lambda found: content + found[0], INTERVALS)


def lasting_codes():
    """All ones: no code of the standard tables; stuffed, as within a scan."""
    return changed(BASELINE, MIDDLE, b'\xff\0' * 20)


# File, and the one whose pixels are expected.
JPEGS = {
    'scan cut, end mark there': (BASELINE[:MIDDLE] + END, BASELINE),
    'scan cut, no end mark': (BASELINE[:MIDDLE], BASELINE),
    'last byte of the scan missing': (BASELINE[:-3] + END, BASELINE),
    'scan cut and filled with zeros to its length': (
        BASELINE[:MIDDLE] + bytes(len(BASELINE) - MIDDLE - 2) + END, BASELINE
    ),
    'scan cut and filled with more zeros than its length': (BASELINE[:MIDDLE] + bytes(20000) + END, BASELINE),
    'part of the scan filled with zeros': (changed(BASELINE, MIDDLE - 300, bytes(200)), BASELINE),
    'next picture begins within the scan': (BASELINE[:MIDDLE] + BASELINE, BASELINE),
    'cut within its headers': (BASELINE[: FRAME + 9], BASELINE),
    'no end mark': (BASELINE[:-2], BASELINE),
    'half an end mark': (BASELINE[:-1], BASELINE),
    'zeros before the end mark': (BASELINE[:-2] + bytes(700) + END, BASELINE),
    'FF before the end mark': (BASELINE[:-2] + b'\xff' * 700 + END, BASELINE),
    'few bytes left behind the last block': (BASELINE[:-2] + b'\x12\x34\x56\x78' + END, BASELINE),
    'many bytes left behind the last block': (BASELINE[:-2] + b'\x12\x34\x56\x78' * 9 + END, BASELINE),
    'no end mark, zeros instead': (BASELINE[:-2] + bytes(700), BASELINE),
    'zeros after the end mark': (BASELINE + bytes(700), BASELINE),
    'second picture after the end mark': (BASELINE + PROGRESSIVE, BASELINE),
    'bytes between segments': (put(BASELINE, FRAME, b'\x12\x34\x56'), BASELINE),
    'restart marker between segments': (put(BASELINE, FRAME, restart(3)), BASELINE),
    'restart interval missing': (INTERVALS[:ONE] + INTERVALS[TWO:], INTERVALS),
    'restart interval twice': (INTERVALS[:TWO] + INTERVALS[ONE:], INTERVALS),
    'eight restart intervals missing': (INTERVALS[:TWO] + INTERVALS[INTERVALS.index(restart(2), THREE) :], INTERVALS),
    'restart marker missing': (INTERVALS[:TWO] + INTERVALS[TWO + 2 :], INTERVALS),
    'restart markers without an announcement': (without(INTERVALS, 0xDD), INTERVALS),
    'restart marker before the end mark': (INTERVALS[:-2] + restart(LAST_NUMBER) + END, INTERVALS),
    'restart interval cut': (INTERVALS[: TWO - 20] + INTERVALS[TWO:], INTERVALS),
    'few bytes left behind each restart interval': (each_interval(b'\x12\x34'), INTERVALS),
    'many bytes left behind a restart interval': (put(INTERVALS, TWO, b'\x12\x34' * 9), INTERVALS),
    'few bytes left behind one restart interval, another one cut': (
        INTERVALS[:ONE] + b'\x12\x34' + INTERVALS[ONE : TWO - 20] + INTERVALS[TWO:], INTERVALS
    ),
    'marker inside the scan': (put(BASELINE, MIDDLE, segment(0xFE, b'comment')), BASELINE),
    'no Huffman tables (Motion JPEG)': (without(BASELINE, 0xC4), BASELINE),
    'code that its Huffman tables do not have': (lasting_codes(), BASELINE),
    'no quantization tables': (without(BASELINE, 0xDB), BASELINE),
    'zeros in a quantization table': (changed(BASELINE, at(BASELINE, 0xDB)[0] + 5, bytes(3)), BASELINE),
    'scan header with wrong parameters': (changed(BASELINE, SCAN - 3, b'\0\0\0'), BASELINE),
    'unknown JFIF version': (changed(STOCK, STOCK.index(b'JFIF\0') + 5, b'\x09'), STOCK),
    'damaged colour profile': (put(BASELINE, 2, segment(0xE2, b'ICC_PROFILE\0\x05\x02ab')), BASELINE),
    'damaged EXIF': (put(BASELINE, 2, segment(0xE1, b'Exif\0\0MM\0*\xff\xff\xff\xff')), BASELINE),
    'unknown application segments and comments': (
        put(BASELINE, FRAME, segment(0xEC, bytes(500)) + segment(0xFE, b'\xff\xd9\xff\xd8') + segment(0xE0, b'AVI1')),
        BASELINE,
    ),
    'progressive': (PROGRESSIVE, PROGRESSIVE),
    'progressive, last scan missing': (PROGRESSIVE[:LAST_SCAN] + END, PROGRESSIVE),
    'progressive, no end mark': (PROGRESSIVE[:-2], PROGRESSIVE),
    'progressive, a scan cut': (PROGRESSIVE[: LAST_SCAN - 40] + PROGRESSIVE[LAST_SCAN:], PROGRESSIVE),
    'more than 32 scans': (PROGRESSIVE[:-2] + PROGRESSIVE[LAST_SCAN:-2] * 30 + END, PROGRESSIVE),
    'two frame headers': (put(BASELINE, FRAME, BASELINE[slice(*at(BASELINE, 0xC0))]), BASELINE),
    'CMYK': (CMYK, CMYK),
    # No writer here makes these; the frame header says what they are.
    'arithmetic coding': (changed(BASELINE, FRAME + 1, b'\xc9'), BASELINE),
    'lossless': (changed(BASELINE, FRAME + 1, b'\xc3'), BASELINE),
    '12 bits': (changed(changed(BASELINE, FRAME + 4, b'\x0c'), FRAME + 1, b'\xc1'), BASELINE),
    'colours sampled in an unknown way': (changed(BASELINE, FRAME + 10, b'\1\x22\0\2\x21\1\3\x12\1'), BASELINE),
    'header of 65500x65500': (changed(BASELINE, FRAME + 5, struct.pack('>HH', 65500, 65500)), BASELINE),
}


def chunk(kind, content, error=0):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content) ^ error)


def chunks_of(file):
    position, chunks = 8, []
    while position < len(file):
        size = int.from_bytes(file[position : position + 4], 'big')
        chunks.append((file[position + 4 : position + 8], file[position + 8 : position + 8 + size]))
        position += 12 + size
    return chunks


def png_of(*chunks):
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*parts) for parts in chunks)


def interlaced(picture):
    """No writer at hand interlaces. PNG specification, 8.2; BGR to RGB, no filter."""
    rows = b''
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    for x, y, across, down in passes:
        for row in picture[y::down, x::across, ::-1]:
            rows += b'\0' + row.tobytes()
    height, width = picture.shape[:2]
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 1)
    return png_of((b'IHDR', header), (b'IDAT', zlib.compress(rows)), LAST)


COLOUR = encoded('.png', PICTURE)
HEADER, LAST = chunks_of(COLOUR)[0], (b'IEND', b'')
DATA = b''.join(content for kind, content in chunks_of(COLOUR) if kind == b'IDAT')
ROWS = zlib.decompress(DATA)
ROW = 1 + 3 * PICTURE.shape[1]
INDEXED = pillow(Image.fromarray(PICTURE).quantize(16), 'PNG')
WIDE = encoded('.png', PICTURE.astype(np.uint16) * 257 + 3)
TEXT = (b'tEXt', b'a\0b')
BOMB = zlib.compress(bytes(1 << 26))


def with_data(data):
    return png_of(HEADER, (b'IDAT', data), LAST)


def with_chunks(*chunks):
    return png_of(HEADER, *chunks, (b'IDAT', DATA), LAST)


def replaced(file, wanted, make):
    return png_of(*(make(content) if kind == wanted else (kind, content) for kind, content in chunks_of(file)))


PNGS = {
    'cut within its data': (COLOUR[: len(COLOUR) // 2], COLOUR),
    'end chunk missing': (COLOUR[:-12], COLOUR),
    'wrong checksum of its header': (replaced(COLOUR, b'IHDR', lambda content: (b'IHDR', content, 1)), COLOUR),
    'wrong checksum of its data': (replaced(COLOUR, b'IDAT', lambda content: (b'IDAT', content, 1)), COLOUR),
    'wrong checksum of its palette': (replaced(INDEXED, b'PLTE', lambda content: (b'PLTE', content, 1)), INDEXED),
    'wrong checksum of a text chunk': (with_chunks((*TEXT, 1)), COLOUR),
    'data stream cut, checksums right': (with_data(DATA[: len(DATA) // 2]), COLOUR),
    'data stream without its own checksum': (with_data(DATA[:-4]), COLOUR),
    'data of fewer rows than the header says': (with_data(zlib.compress(ROWS[: -2 * ROW])), COLOUR),
    'data of more rows than the header says': (with_data(zlib.compress(ROWS + ROWS[:ROW])), COLOUR),
    'bytes after the data stream': (with_data(DATA + b'abc'), COLOUR),
    'filter that does not exist': (with_data(zlib.compress(changed(ROWS, 3 * ROW, b'\x05'))), COLOUR),
    'text between its data chunks': (
        png_of(HEADER, (b'IDAT', DATA[:50]), TEXT, (b'IDAT', DATA[50:]), LAST), COLOUR
    ),
    'unknown critical chunk': (with_chunks((b'ABCD', b'')), COLOUR),
    'kind that does not exist': (png_of((b'IHDR', changed(HEADER[1], 9, b'\x05')), (b'IDAT', DATA), LAST), COLOUR),
    'two headers': (with_chunks(HEADER), COLOUR),
    'two palettes': (with_chunks((b'PLTE', bytes(9)), (b'PLTE', bytes(9))), COLOUR),
    'palette after the data': (png_of(HEADER, (b'IDAT', DATA), (b'PLTE', bytes(9)), LAST), COLOUR),
    'no palette': (png_of(*(part for part in chunks_of(INDEXED) if part[0] != b'PLTE')), INDEXED),
    'pixel outside of its palette': (replaced(INDEXED, b'PLTE', lambda content: (b'PLTE', content[:6])), INDEXED),
    'transparency of the wrong length': (with_chunks((b'tRNS', b'\0')), COLOUR),
    'bytes after the end chunk': (COLOUR + bytes(700), COLOUR),
    'data in chunks of one byte': (
        png_of(HEADER, *((b'IDAT', DATA[place : place + 1]) for place in range(len(DATA))), LAST), COLOUR
    ),
    'interlaced': (interlaced(PICTURE), COLOUR),
    '16 bits': (WIDE, WIDE),
    'palette with transparency': (
        file := pillow(Image.fromarray(PICTURE).quantize(16), 'PNG', transparency=bytes([0, 128])), file
    ),
    'text chunk that inflates to 64 MiB': (with_chunks((b'zTXt', b'a\0\0' + BOMB)), COLOUR),
    'colour profile that inflates to 64 MiB': (with_chunks((b'iCCP', b'a\0\0' + BOMB)), COLOUR),
    '65,000 text chunks': (with_chunks(*[TEXT] * 65000), COLOUR),
    '70,000 text chunks': (with_chunks(*[TEXT] * 70000), COLOUR),
    'animation': (
        pillow(
            Image.fromarray(PICTURE[..., ::-1]), 'PNG', save_all=True, append_images=[Image.new('RGB', (131, 97))]
        ),
        COLOUR,
    ),
    'header of 65500x65500': (
        png_of((b'IHDR', struct.pack('>II', 65500, 65500) + HEADER[1][8:]), (b'IDAT', DATA), LAST), COLOUR
    ),
}


def rows_of(section):
    """The rows of the table under a heading of the document: kind to result."""
    text = (REPOSITORY / 'docs/reference/compressed-images.md').read_text(encoding='utf-8')
    part = text.partition(f'\n### {section}\n')[2].partition('\n#')[0]
    return dict(re.fullmatch(r'\| (.+?) \| (.+?) \|', line).groups() for line in part.splitlines() if line[:2] == '| ')


def result_of(file, expected):
    """What comes of a file, in the words of the document."""
    try:
        pixels, oddities = decode_picture('', file)
    except ImageRejectedError as error:
        assert error.remedy
        return f'refused: `{error.reason}`'
    right = cv2.imdecode(np.frombuffer(expected, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels.array.dtype == right.dtype
    np.testing.assert_array_equal(pixels.array, right)
    return ', '.join(['answered', *(f'`{oddity}`' for oddity in oddities)])


@pytest.mark.parametrize('kind', JPEGS)
def test_a_jpeg_is_answered_whole_or_refused_as_the_document_says(kind):
    assert result_of(*JPEGS[kind]) == rows_of('JPEG')[kind]


@pytest.mark.parametrize('kind', PNGS)
def test_a_png_is_answered_whole_or_refused_as_the_document_says(kind):
    assert result_of(*PNGS[kind]) == rows_of('PNG')[kind]


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(64, 200),
    height=st.integers(64, 200),
    options=st.tuples(st.integers(5, 100), st.sampled_from([0, 0, 1, 20]), st.integers(0, 1)),
    cut=st.floats(0, 1),
    filler=st.sampled_from([b'', b'\xff', b'\0', END]),
    count=st.integers(1, 20000),
    end=st.sampled_from([b'', END]),
)
def test_a_scan_that_was_cut_is_never_answered(width, height, options, cut, filler, count, end):
    """Whatever fills what is missing; the tables are those of the standard, as cameras have them, or progressive."""
    quality, interval, progressive = options
    file = encoded(
        '.jpg', scene(width, height), cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval,
        cv2.IMWRITE_JPEG_PROGRESSIVE, progressive,
    )  # fmt: skip
    start = at(file, 0xDA)[1]
    # Of a progressive scan, zeros may be codes that say nothing.
    filler = b'' if progressive and filler == b'\0' else filler
    kept = int(cut * (len(file) - 3 - start))
    # Zeros may stand for what is left of the last blocks.
    kept = kept // 2 if filler == b'\0' else kept
    damaged = file[: start + kept] + filler * count + end
    assert result_of(damaged, file).startswith(('refused', 'answered'))


def test_each_row_of_the_document_is_tested():
    for section, kinds in (('JPEG', JPEGS), ('PNG', PNGS)):
        assert {kind for kind in rows_of(section) if kind != 'file'} == set(kinds)
        assert len(kinds) >= 24


def test_each_oddity_is_in_the_document():
    results = ' '.join((*rows_of('JPEG').values(), *rows_of('PNG').values()))
    assert set(re.findall(r'`(\w+)`', results)) - {'data', 'size', 'encoding'} == set(ODDITIES)
