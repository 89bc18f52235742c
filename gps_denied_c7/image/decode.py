"""Image bytes to pixels, the one decoder for every camera, bag and test (N-9)."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.image.buffers import Scratch
from gps_denied_c7.image.encodings import BAYER, BT601, COLOUR, NV24, TABLE, YUV, Encoding
from gps_denied_c7.image.jpeg import JPEG_START, decode_jpeg, import_simplejpeg
from gps_denied_c7.image.png import PNG_SIGNATURE, decode_png

__all__ = [
    'ENCODINGS',
    'MAX_PIXELS',
    'MAX_SIDE',
    'ODDITIES',
    'ORDERS',
    'REASONS',
    'Pixels',
    'RawImage',
    'check_compressed',
    'check_image',
    'decode_compressed',
    'decode_image',
    'decode_picture',
    'import_decoders',
    'is_out_of_memory',
]

MAX_SIDE = 16384
"""Longest side of an image in pixels: beyond any camera, below OpenCV's limits."""
MAX_PIXELS = 1 << 26
"""Most pixels of an image, 64 Mpx: what a few bytes of header may make a decoder allocate."""


@dataclass(frozen=True, slots=True)
class RawImage:
    """
    Hold the fields of an uncompressed image message.

    :param width: pixels.
    :param height: rows; for nv12, nv21 and nv24 either of the picture or of the buffer (3/2 of the picture's, or 3).
    :param encoding: as ``sensor_msgs/image_encodings`` spells it.
    :param step: bytes from one row to the next, padding included.
    :param is_bigendian: byte order of 16-bit values.
    :param data: any contiguous buffer of bytes; only read, never copied without need.
    """

    width: int
    height: int
    encoding: str
    step: int
    is_bigendian: bool
    data: Any


@dataclass(frozen=True, slots=True)
class Pixels:
    """
    Hold a decoded image.

    :param array: H×W or H×W×C, uint8 or uint16 in native byte order; rows may be padded. Read-only,
        often a view of the message's buffer, which it keeps alive.
    :param order: of the channels: ``gray``, ``rgb``, ``bgr``, ``rgba`` or ``bgra``.
    """

    array: NDArray
    order: str


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """
    Hold what a decoder made of one picture.

    :param size: width and height of the decoded image in pixels.
    :param planes: what :meth:`Preprocessor.resize` makes of it, (channels, rows, columns) uint8 or uint16; read-only,
        valid until ``release``.
    :param pixels: of the decoded image, a copy; None where they were not asked for.
    :param oddities: faults of the file that were tolerated, of :data:`ODDITIES`.
    :param release: gives the memory of the planes back to the decoder; safe to repeat, from any thread.
    """

    size: tuple[int, int]
    planes: NDArray
    pixels: Pixels | None
    oddities: tuple[str, ...] = ()
    release: Callable[[], None] = lambda: None


ENCODINGS = tuple(TABLE)
"""Every raw encoding that can be decoded."""

ORDERS = {'gray': 1, 'rgb': 3, 'bgr': 3, 'rgba': 4, 'bgra': 4}
"""Channels of each order that :class:`Pixels` may have."""

REASONS = ('encoding', 'size', 'data', 'message', 'decode_time', 'decode_memory', 'decoder')
"""Why a decoder may refuse an image."""

ODDITIES = (
    'no_end_mark', 'padding_before_end', 'bytes_after_end', 'bytes_between_segments', 'bytes_before_restart',
    'scan_parameters', 'jfif_version', 'bad_checksum',
)  # fmt: skip
"""Faults of a file that are tolerated: its pixels are there and right."""

# The message, the native byte order, and three channels for one.
_MOST_COPIES = 5
_WRITE_AGAIN = 'Check whether other programs can read the file, or have the publisher write another format.'
# The stock publishers write fewer than 40 characters.
_MAX_FORMAT = 1024
_MEASURED = re.compile(r'(8|16|32|64)[USF](C\d*)?')


def check_image(image: RawImage, memory_bytes: int | None = None) -> None:
    """
    Look for what makes an image undecodable, without touching its pixels.

    :param memory_bytes: refuse what needs more with the copies that decoding makes; None for no limit.
    :raises ImageRejectedError: ``encoding`` (unknown), ``size`` (zero, too large, odd where chroma is
        shared, too small for Bayer), ``data`` (step × height is not the number of bytes, or rows are shorter than
        the pixels in them) or ``decode_memory``.
    """
    encoding, rows, data = _layout(image)
    if memory_bytes is None or _MOST_COPIES * data.nbytes <= memory_bytes:
        return
    native = encoding.depth == 1 or (image.is_bigendian == (sys.byteorder == 'big') and image.step % 2 == 0)
    size = data.nbytes + (0 if native else rows * image.width * encoding.channels * encoding.depth)
    if encoding.conversion:
        pictures = 2 if encoding is NV24 else 1
        size += pictures * 3 * encoding.depth * image.width * rows * encoding.rows[1] // encoding.rows[0]
    _require_memory(image.width, image.height, size, memory_bytes)


def decode_image(image: RawImage, scratch: Scratch | None = None) -> Pixels:
    """
    Return the pixels of a raw image, without a copy for mono, rgb(a) and bgr(a) in native byte order.

    Bayer and YUV become BGR as OpenCV converts them, which is what rosbags-image and cv_bridge give. ``8UC3`` and
    ``8UC4`` are BGR and BGRA, as cv_bridge writes them; ``16UC1`` is grey, also where its values are depths.

    :param scratch: where converted pixels are kept; the result is then valid until its next use.
    :raises ImageRejectedError: as :func:`check_image`.
    """
    encoding, rows, data = _layout(image)
    dtype = np.dtype(f'u{encoding.depth}').newbyteorder('>' if image.is_bigendian else '<')
    pixel = encoding.channels * encoding.depth
    array: NDArray = np.ndarray(
        (rows, image.width, encoding.channels), dtype, data, strides=(image.step, pixel, encoding.depth)
    )
    if encoding.channels == 1:
        array = array[:, :, 0]
    scratch = scratch or Scratch()
    if not (array.dtype.isnative and array.flags.aligned):
        # OpenCV takes neither foreign byte order nor rows that begin in the middle of a value.
        native = scratch.array('native', array.shape, array.dtype.newbyteorder('='))
        np.copyto(native, array)
        array = native
    return _pixels(array, encoding, scratch)


def _pixels(array: NDArray, encoding: Encoding, scratch: Scratch) -> Pixels:
    if encoding.conversion:
        array = _convert(array, encoding, scratch)
    array.setflags(write=False)
    return Pixels(array, encoding.order)


def _convert(array: NDArray, encoding: Encoding, scratch: Scratch) -> NDArray:
    import cv2

    rows, width = array.shape[:2]
    height = rows * encoding.rows[1] // encoding.rows[0]
    converted = scratch.array('converted', (height, width, 3), array.dtype)
    if encoding is NV24:
        # A row of chroma fills two rows of the buffer, the padding of both at its end.
        chroma = as_strided(array[height:], (height, width, 2), (2 * array.strides[0], 2, 1))
        yuv = scratch.array('yuv', (height, width, 3), array.dtype)
        # OpenCV's own conversions take what is below black for black.
        np.maximum(array[:height], 16, out=yuv[:, :, 0])
        yuv[:, :, 1:] = chroma
        return cv2.transform(yuv, BT601, dst=converted)
    return cv2.cvtColor(array, getattr(cv2, str(encoding.conversion)), dst=converted)


def _encoding(name: str) -> Encoding:
    encoding = TABLE.get(name)
    if encoding is None:
        measured = 'holds numbers of which none is defined as black or white' if _MEASURED.fullmatch(name) else ''
        raise ImageRejectedError(
            'encoding',
            f'encoding {name!r} {measured or "is unknown"}.',
            remedy=f'Publish one of {", ".join(ENCODINGS)}.',
        )
    return encoding


def _layout(image: RawImage) -> tuple[Encoding, int, memoryview]:
    """Check an image against its encoding; return that, the rows in the buffer, and the buffer."""
    encoding = _encoding(image.encoding)
    width, height, step = image.width, image.height, image.step
    _check_size(width, height)
    data = _buffer(image.data)
    of_buffer, of_picture = encoding.rows
    rows = height * of_buffer // of_picture
    # Where the buffer has more rows than the picture, publishers disagree on which of the two height is.
    if height % of_buffer == 0 and data.nbytes == step * height:
        rows = height
        if encoding.planar and step * of_picture == width * of_buffer:
            raise ImageRejectedError(
                'data', f'step {step} includes the chroma plane; {image.encoding} needs step {width}.'
            )
    if (encoding.subsampled and width % 2) or rows % of_buffer:
        raise ImageRejectedError(
            'size', f'{width}x{height}: {image.encoding} needs an even size.'
        )
    if min(width, height) < encoding.smallest:
        raise ImageRejectedError(
            'size', f'{width}x{height} is too small for {image.encoding}: OpenCV would return it black.'
        )
    needed = width * encoding.channels * encoding.depth
    if step < needed:
        raise ImageRejectedError(
            'data',
            f'step {step} is less than the {needed} bytes of {width} pixels in {image.encoding}.',
            remedy='Correct step, width or encoding in the driver.',
        )
    if data.nbytes != step * rows:
        raise ImageRejectedError(
            'data',
            f'{data.nbytes} bytes, where step {step} x {rows} rows make {step * rows}.',
            remedy='The message is cut short, or step or height is wrong in the driver.',
        )
    return encoding, rows, data


def _check_size(width: int, height: int) -> None:
    if width <= 0 or height <= 0:
        raise ImageRejectedError('size', f'{width}x{height} has no pixels.')
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageRejectedError(
            'size',
            f'{width}x{height} is larger than {MAX_SIDE} pixels a side or {MAX_PIXELS} in all.',
            remedy='Scale the images in the driver.',
        )


def _require_memory(width: int, height: int, size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise ImageRejectedError(
            'decode_memory',
            f'decoding {width}x{height} pixels needs {size} bytes, more than the limit of {limit}.',
            remedy='Send smaller images, or raise decoder_memory_mb.',
        )


def _buffer(data: Any) -> memoryview:
    try:
        return memoryview(data).cast('B')
    except (TypeError, ValueError) as error:
        raise ImageRejectedError('data', f'{type(data).__name__} is not a buffer of bytes: {error}.') from error


def check_compressed(format: str, data: Any) -> None:
    """
    Look for what makes a compressed image undecodable, in a time that does not depend on it.

    Reads the length and the first bytes; the rest may still be damaged.

    :param format: of the message, as ``jpeg`` or ``bgr8; png compressed bgr8``. The content says which of the two it
        is; the encoding before a semicolon says what the pixels mean.
    :raises ImageRejectedError: ``encoding`` (neither JPEG nor PNG, or the encoding named cannot be had from it) or
        ``data`` (no buffer, or not what ``format`` says).
    """
    _content(format, _recognise(format, _buffer(data)))


def decode_compressed(format: str, data: Any, scratch: Scratch | None = None) -> Pixels:
    """
    Return the pixels of a JPEG or PNG, as image_transport's subscriber and cv_bridge give them.

    A plain ``jpeg`` or ``png`` is grey, BGR or BGRA, in the depth of the file. Where ``format`` names an encoding, the
    result is what :func:`decode_image` makes of the subscriber's image. ``compressed bgr`` says that the file has its
    colours in place; without it, red and blue are exchanged in the file, as early publishers left them. Values of a
    16-bit encoding are 256 times those of a JPEG. A Bayer mosaic in a PNG is demosaiced. In a JPEG it is refused: newer
    publishers put a grey picture there, and compression mixes the colours of a mosaic. YUV is BGR in a file that says
    ``compressed bgr``, and refused in others. A grey file is grey where three colours are named, as for cv_bridge.

    A picture is not turned as its EXIF orientation says: neither of the two does so. A damaged file is refused, where
    the two may return half of it; docs/reference/compressed-images.md says what is damage.

    :param format: of the message.
    :param scratch: where a JPEG or a demosaiced picture is kept; the result is then valid until its next use.
    :raises ImageRejectedError: as :func:`check_compressed`; ``size`` (zero or too large, from the header, before
        anything is allocated); ``data`` also where the file is damaged or cut short, or has other channels or another
        depth than the encoding named; ``decoder`` (simplejpeg is not installed).
    :raises MemoryError: decoding needs more than there is.
    """
    return decode_picture(format, data, scratch)[0]


def import_decoders() -> None:
    """Import what :func:`decode_picture` uses, so that the first picture need not wait for it."""
    import cv2

    cv2.setNumThreads(1)
    with contextlib.suppress(ImageRejectedError):
        # Where it is missing, decoding each JPEG raises the error.
        import_simplejpeg()


def decode_picture(
    format: str, data: Any, scratch: Scratch | None = None, memory_bytes: int | None = None
) -> tuple[Pixels, tuple[str, ...]]:
    """
    Return what :func:`decode_compressed` returns, and which faults of the file were tolerated.

    :param memory_bytes: refuse what needs more, before it is allocated; None for no limit.
    :return: pixels, and some of :data:`ODDITIES`.
    :raises ImageRejectedError: as :func:`decode_compressed`, and ``decode_memory``.
    :raises MemoryError: likewise.
    """
    import cv2

    buffer = _recognise(format, _buffer(data))
    named = _content(format, buffer)
    scratch = scratch or Scratch()

    def admit(width: int, height: int, size: int) -> None:
        _check_size(width, height)
        _require_memory(width, height, size, memory_bytes)

    try:
        array, oddities = (
            decode_jpeg(buffer, scratch, admit) if buffer[:2] == JPEG_START else decode_png(buffer, admit)
        )
    except cv2.error as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise ImageRejectedError('data', f'OpenCV cannot decode it: {error}', remedy=_WRITE_AGAIN) from error
    if array is None:
        raise ImageRejectedError(
            'data', f'OpenCV cannot decode {format!r} of {buffer.nbytes} bytes.', remedy=_WRITE_AGAIN
        )
    height, width = array.shape[:2]
    channels = array.shape[2] if array.ndim == 3 else 1
    found = Encoding({1: 'gray', 3: 'bgr', 4: 'bgra'}[channels], array.itemsize, channels)
    encoding = named or found
    if encoding.channels == 3 and found.channels == 1:
        # Grey has no order of colours that could be wrong.
        encoding = Encoding('gray', encoding.depth)
    from_8_bits = named is not None and named.depth == 2 and 'jpeg' in format
    if (found.channels, found.depth) != (encoding.channels, 1 if from_8_bits else encoding.depth):
        raise ImageRejectedError(
            'data',
            f'{format!r} holds {channels} channels of {8 * array.itemsize} bits.',
            remedy='Name the encoding of the picture before the semicolon, or publish jpeg or png without one.',
        )
    if min(array.shape[:2]) < encoding.smallest:
        raise ImageRejectedError('size', f'{width}x{height} is too small for {format!r}: it would come out black.')
    if from_8_bits:
        array = np.multiply(array, 256, dtype=np.uint16)
    return _pixels(array, encoding, scratch), oddities


def is_out_of_memory(error: Exception) -> bool:
    """Return whether OpenCV found no memory; it raises ``cv2.error`` then."""
    import cv2

    return isinstance(error, cv2.error) and getattr(error, 'code', None) == cv2.Error.StsNoMem


def _recognise(format: str, data: memoryview) -> memoryview:
    """Return ``data`` where it begins like a JPEG or PNG."""
    if len(format) > _MAX_FORMAT:
        raise ImageRejectedError('encoding', f'a compressed format of {len(format)} characters: {format!r:.100}.')
    if 'compresseddepth' in format.lower():
        raise ImageRejectedError(
            'encoding', f'{format!r} is a depth image.', remedy='Subscribe to the camera, not to its depth stream.'
        )
    if data[:2] == JPEG_START or data[:8] == PNG_SIGNATURE:
        return data
    if any(name in format.lower() for name in ('jpeg', 'jpg', 'png')):
        raise ImageRejectedError(
            'data',
            f'{data.nbytes} bytes said to be {format!r} are neither JPEG nor PNG.',
            remedy="Check the publisher's log: it sends 0 bytes where it cannot compress an encoding.",
        )
    raise ImageRejectedError('encoding', f'compressed format {format!r} is unknown.', remedy='Publish JPEG or PNG.')


def _content(format: str, data: memoryview) -> Encoding | None:
    """Return what a file holds according to the format, None where that names no encoding."""
    name, semicolon, compression = format.partition(';')
    if not semicolon:
        return None
    encoding = _encoding(name)
    bgr = 'compressed bgr' in compression
    if name in BAYER and data[:2] == JPEG_START:
        raise ImageRejectedError(
            'encoding',
            f'{format!r} is a Bayer image compressed as JPEG, which mixes its colours.',
            remedy='Set the compressed transport of the driver to png, or compress what image_proc has demosaiced.',
        )
    if name in YUV and not bgr:
        raise ImageRejectedError(
            'encoding',
            f'{format!r} has lost the colours of {name}.',
            remedy='Have the driver publish rgb8, bgr8 or mono8.',
        )
    if name in YUV or name in COLOUR:
        # The publisher drops alpha, so that the file has three channels.
        return Encoding('bgr' if bgr else 'rgb', encoding.depth, channels=3)
    return encoding
