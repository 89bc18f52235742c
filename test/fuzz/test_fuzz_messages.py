"""N-7: any bytes that are published as an image message are an image, or refused, or dropped by the middleware."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from support.fuzz_images import FILES, decode_file, decode_raw
from support.fuzz_mutations import damaged, fuzz

pytest.importorskip('rclpy', reason='no ROS here')

import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from gps_denied_c7.demo.ros_domain import free_domain_id
from gps_denied_c7.image.decode import RawImage
from gps_denied_c7.ros.callbacks import Untaken
from gps_denied_c7.ros.fastdds import ports_in_force
from gps_denied_c7.ros.messages import taken_image
from gps_denied_c7.ros.rcl import Rcl, UnreadableMessageError

QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
LAST = 'the last one'
CDR_HEADER_BYTES = 4
_PATIENCE_S = 20.0


def _raw(encoding: str, step: int) -> bytes:
    image = Image(width=9, height=4, encoding=encoding, step=step, data=bytes(4 * step))
    image.header.frame_id = 'camera'
    return bytes(serialize_message(image))


RAW = (_raw('mono8', 9), _raw('bgr8', 30), _raw('bayer_rggb16', 18))
COMPRESSED = tuple(
    bytes(serialize_message(CompressedImage(format='jpeg', data=content))) for content in (FILES[1], FILES[5])
)


class Wire:
    """A publisher and a subscription of one type, and the node's way to take from it."""

    def __init__(self, node: Any, message_type: type, topic: str) -> None:
        self._subscription = node.create_subscription(message_type, topic, print, QOS, callback_group=Untaken())
        self._publisher = node.create_publisher(message_type, topic, QOS)
        deadline = time.monotonic() + _PATIENCE_S
        while not self._publisher.get_subscription_count():
            assert time.monotonic() < deadline, 'the two ends did not match'
        self._rcl, self._type = Rcl(message_type), message_type
        self._last = message_type()
        self._last.header.frame_id = LAST

    def use(self, content: bytes) -> int:
        """Publish some bytes and one good message, and return how many images came before that; each is decoded."""
        # Fast CDR 2.3, as on Kilted, reads beyond a message that ends with its header but claims padding: any node's
        # middleware does, before the node is told of a message.
        assume(len(content) != CDR_HEADER_BYTES)
        self._publisher.publish(content)
        self._publisher.publish(self._last)
        found, deadline = 0, time.monotonic() + _PATIENCE_S
        while True:
            assert time.monotonic() < deadline, 'the good message did not come'
            try:
                taken = self._rcl.take_new(self._subscription, self._type)
            except UnreadableMessageError as error:
                assert 'cannot be read' in str(error)
                continue
            if taken is None:
                continue
            image = taken_image(taken[0])
            if image.header.frame_id == LAST:
                return found
            found += 1
            # Its fields are whole: they go into the answer.
            serialize_message(String(data=image.header.frame_id + image.encoding))
            assert len(image.picture.data) <= len(content)
            if isinstance(image.picture, RawImage):
                decode_raw(image.picture)
            else:
                decode_file(*image.picture)


@pytest.fixture(scope='module')
def wires() -> Iterator[dict[type, Wire]]:
    context = rclpy.Context()
    with free_domain_id(ports_in_force(os.environ)) as number:
        rclpy.init(context=context, domain_id=number)
        node = rclpy.create_node('fuzz', context=context, start_parameter_services=False, enable_rosout=False)
        yield {Image: Wire(node, Image, '/raw'), CompressedImage: Wire(node, CompressedImage, '/compressed')}
        node.destroy_node()
        context.try_shutdown()


def test_whole_messages_are_read(wires: dict[type, Wire]) -> None:
    assert all(wires[Image].use(message) == 1 for message in RAW)
    assert all(wires[CompressedImage].use(message) == 1 for message in COMPRESSED)


@fuzz(700)
@given(content=st.sampled_from(RAW).flatmap(lambda message: damaged(message, (*RAW, *COMPRESSED))))
def test_n7_any_damaged_image_message_is_read_or_not(wires: dict[type, Wire], content: bytes) -> None:
    assert wires[Image].use(content) <= 1


@fuzz(500)
@given(content=st.sampled_from(COMPRESSED).flatmap(lambda message: damaged(message, (*RAW, *COMPRESSED))))
def test_n7_any_damaged_compressed_message_is_read_or_not(wires: dict[type, Wire], content: bytes) -> None:
    assert wires[CompressedImage].use(content) <= 1


@fuzz(400)
@given(
    content=st.sampled_from(RAW).flatmap(lambda message: damaged(message[4:], RAW)) | st.sampled_from(RAW),
    encapsulation=st.sampled_from((0, 2, 3, 6, 7, 8, 9, 10, 11, 255)) | st.integers(0, 255),
    options=st.binary(min_size=2, max_size=2),
)
def test_n7_any_other_encapsulation_is_read_or_not(
    wires: dict[type, Wire], content: bytes, encapsulation: int, options: bytes
) -> None:
    assert wires[Image].use(bytes((0, encapsulation)) + options + content) <= 1
