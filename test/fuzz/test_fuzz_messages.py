"""N-7: any bytes that come as an image message are an image or refused, whoever reads them: the node or rclpy."""

from __future__ import annotations

import pytest
from fuzz_mutations import damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_images import FILES, decode_file, decode_raw

pytest.importorskip('rclpy', reason='no ROS here')

from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.decoding import RawImage
from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.ros.messages import read_image


def _raw(encoding: str, step: int) -> bytes:
    image = Image(width=9, height=4, encoding=encoding, step=step, data=bytes(4 * step))
    image.header.frame_id = 'camera'
    return bytes(serialize_message(image))


RAW = (_raw('mono8', 9), _raw('bgr8', 30), _raw('bayer_rggb16', 18))
COMPRESSED = tuple(
    bytes(serialize_message(CompressedImage(format='jpeg', data=content))) for content in (FILES[1], FILES[5])
)


def use(serialised: bytes, message_type: type) -> bool:
    """Return whether a message is read; then its picture is decoded, or refused."""
    try:
        message = read_image(serialised, message_type)
    except ImageRejectedError as error:
        assert error.reason == 'message' and message_type.__name__ in str(error)
        return False
    # Its fields are whole: they go into the answer.
    serialize_message(message.header)
    assert len(message.picture.data) <= len(serialised)
    if isinstance(message.picture, RawImage):
        decode_raw(message.picture)
    else:
        decode_file(*message.picture)
    return True


def test_whole_messages_are_read() -> None:
    assert all(use(message, Image) for message in RAW)
    assert all(use(message, CompressedImage) for message in COMPRESSED)


@fuzz(700)
@given(content=st.sampled_from(RAW).flatmap(lambda message: damaged(message, (*RAW, *COMPRESSED))))
def test_n7_any_damaged_image_message_is_read_or_refused(content: bytes) -> None:
    use(content, Image)


@fuzz(500)
@given(content=st.sampled_from(COMPRESSED).flatmap(lambda message: damaged(message, (*RAW, *COMPRESSED))))
def test_n7_any_damaged_compressed_message_is_read_or_refused(content: bytes) -> None:
    use(content, CompressedImage)


@fuzz(400)
@given(
    content=st.sampled_from(RAW).flatmap(lambda message: damaged(message[4:], RAW)) | st.sampled_from(RAW),
    encapsulation=st.sampled_from((0, 2, 3, 6, 7, 8, 9, 10, 11, 255)) | st.integers(0, 255),
    options=st.binary(min_size=2, max_size=2),
)
def test_n7_any_other_encapsulation_is_read_by_rclpy_or_refused(
    content: bytes, encapsulation: int, options: bytes
) -> None:
    use(bytes((0, encapsulation)) + options + content, Image)
