"""N-7: what is not the whole picture is refused; what a working camera sends is decoded, however odd it is."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.image.decode import decode_compressed
from support.hostile import jpeg_parts as jpeg
from support.hostile.camera_streams import ODDITIES, camera_stream
from support.hostile.damaged_pictures import DAMAGE, Decision, damaged_picture
from support.hostile.hostile_pictures import KINDS, STARVING, hostile_picture

SEEDS = 3


def reference(content: bytes) -> np.ndarray:
    """Return the pixels of a whole file as Pillow decodes it, in OpenCV's order."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image)
    return pixels if pixels.ndim == 2 else pixels[:, :, ::-1]


@pytest.mark.parametrize('kind', DAMAGE)
def test_n7_a_damaged_picture_is_refused_or_as_it_was(kind: str) -> None:
    for seed in range(SEEDS):
        decision, damaged, whole = damaged_picture(kind, seed)
        assert damaged != whole
        try:
            pixels = decode_compressed(kind[:4].strip(' ,').lower(), damaged).array
        except ImageRejectedError as error:
            assert decision is not Decision.TAKEN, f'{seed}: {error}'
            continue
        assert decision is not Decision.REFUSED, f'{seed} is answered'
        if decision is Decision.TAKEN:
            np.testing.assert_array_equal(pixels, reference(whole))


@pytest.mark.parametrize('oddity', ODDITIES)
def test_n7_an_odd_picture_of_a_working_camera_is_decoded(oddity: str) -> None:
    for seed, size in enumerate([(64, 48), (160, 120), (61, 47), (8, 200)]):
        stream = camera_stream(oddity, seed, *size)
        pixels = decode_compressed('jpeg', stream.data).array
        np.testing.assert_array_equal(pixels, reference(stream.plain), err_msg=f'{seed}, {size}')


def test_the_pictures_that_are_meant_to_be_valid_are() -> None:
    """Pillow is not the product: what it reads as one colour, or as noise, is what was meant to be written."""
    flat = jpeg.decoded(jpeg.flat_progressive(200, 100, 190, 3))
    assert flat.shape == (100, 200, 3) and len(np.unique(flat)) == 1
    assert len(np.unique(jpeg.decoded(jpeg.flat_baseline(200, 100)))) == 1
    assert jpeg.decoded(jpeg.noisy_progressive(1, 640, 480, 32)).std() > 5
    assert {hostile_picture(number).kind for number in range(len(KINDS))} == set(KINDS)
    assert hostile_picture(5) == hostile_picture(5) and STARVING
