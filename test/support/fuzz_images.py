"""Images as files, and what the node does with an image of any bytes."""

from __future__ import annotations

import cv2
import numpy as np

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.image.buffers import Scratch
from gps_denied_c7.image.decode import (
    MAX_PIXELS,
    MAX_SIDE,
    RawImage,
    check_compressed,
    check_image,
    decode_compressed,
    decode_image,
)

REASONS = {'encoding', 'size', 'data'}
SCRATCH = Scratch()


def decode_raw(image: RawImage) -> bool:
    """Return whether an image is decoded; check and decoder agree, and the pixels lie where the message ends."""
    try:
        check_image(image)
    except ImageRejectedError as error:
        assert error.reason in REASONS and str(error)
        try:
            decode_image(image)
        except ImageRejectedError as again:
            assert again.reason == error.reason
            return False
        raise AssertionError('refused by the check, taken by the decoder') from error
    for scratch in (None, SCRATCH):
        pixels = decode_image(image, scratch)
        assert pixels.array.shape[1] == image.width
        assert pixels.array.shape[0] in (image.height, image.height * 2 // 3)
        assert not pixels.array.flags.writeable
        # Every pixel can be read.
        assert int(pixels.array.max()) >= 0
    return True


def _encoded(suffix: str, shape: tuple[int, ...], dtype: type = np.uint8, *options: int) -> bytes:
    noise = np.random.default_rng(3).integers(0, np.iinfo(dtype).max, shape, dtype)
    done, content = cv2.imencode(suffix, noise, list(options))
    assert done
    return content.tobytes()


JPEGS = (
    _encoded('.jpg', (33, 47, 3)),
    _encoded('.jpg', (32, 48)),
    _encoded('.jpg', (33, 47, 3), np.uint8, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    _encoded('.jpg', (33, 47, 3), np.uint8, cv2.IMWRITE_JPEG_RST_INTERVAL, 1),
)
PNGS = (
    _encoded('.png', (13, 17, 3)),
    _encoded('.png', (13, 17)),
    _encoded('.png', (13, 17, 4)),
    _encoded('.png', (13, 17, 3), np.uint16),
)
FILES = (*JPEGS, *PNGS)


def decode_file(format: str, content: bytes) -> bool:
    """Return whether a compressed image is decoded; its pixels then lie within the limits of the check."""
    try:
        check_compressed(format, content)
    except ImageRejectedError as error:
        assert error.reason in REASONS and str(error)
        return False
    try:
        pixels = decode_compressed(format, content)
    except ImageRejectedError as error:
        assert error.reason in REASONS and str(error)
        return False
    height, width = pixels.array.shape[:2]
    assert max(width, height) <= MAX_SIDE and width * height <= MAX_PIXELS
    assert not pixels.array.flags.writeable
    return True
