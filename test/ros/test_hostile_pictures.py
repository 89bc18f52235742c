"""N-3, N-7: pictures that cost too much, or are none, cost themselves alone; those of working cameras are answered."""

from __future__ import annotations

import time
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from gps_denied_c7_msgs.msg import TensorList
from sensor_msgs.msg import CompressedImage, Image

from support.harness import NodeProcess, Peer, image, running_node, tensor, wait_until
from support.hostile.camera_streams import ODDITIES, camera_stream
from support.hostile.hostile_messages import KINDS as MESSAGES
from support.hostile.hostile_messages import hostile_message
from support.hostile.hostile_pictures import KINDS as PICTURES
from support.hostile.hostile_pictures import hostile_picture
from support.networks import HEIGHT, WIDTH, copying

CAMERA, RAW, PLAIN = '/hostile/image_raw/compressed', '/hostile/image_raw', '/plain/image_raw'
# The others differ in nothing but how long they take.
TOO_SLOW_TO_MAKE = ('PNG, animated', 'PNG, interlaced')


@pytest.fixture(scope='module')
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NodeProcess, Peer]]:
    """An active node of a network that answers with the image, with a camera of pictures and two of plain images."""
    reliable = {f'qos_overrides.{topic}.subscription.reliability': 'reliable' for topic in (CAMERA, RAW, PLAIN)}
    model = copying(tmp_path_factory.mktemp('model'))
    parameters = {'model_path': model, 'cpu_threads': 1, 'image_topics': [CAMERA, RAW, PLAIN], **reliable}
    with running_node(parameters) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA, CompressedImage)
        peer.wait_matched(RAW)
        peer.wait_matched(PLAIN)
        yield process, peer


def compressed(number: int, format: str, data: bytes) -> CompressedImage:
    message = CompressedImage(format=format)
    message.header.stamp.sec = number
    message.data.frombytes(data)
    return message


def ends(peer: Peer, topic: str) -> int:
    """Return how many images of a topic have been answered, refused, dropped or lost, and counted so."""
    counted = ('answered', 'unanswered', 'lost_before_node')
    values = {key: int(value) for key, value in peer.values(f'Stream {topic}').items() if value.isdigit()}
    return sum(
        count for key, count in values.items()
        if key in counted or key.startswith(('refused ', 'dropped_')) and key != 'dropped_by_policy'
    )  # fmt: skip


def test_n7_every_odd_picture_of_a_working_camera_is_answered(node: tuple[NodeProcess, Peer]) -> None:
    _, peer = node
    for seed, oddity in enumerate(ODDITIES):
        stream = camera_stream(oddity, seed, WIDTH, HEIGHT)
        answer = peer.ask(CAMERA, compressed(seed + 1, 'jpeg', stream.data), timeout_s=15.0)
        pixels = cv2.imdecode(np.frombuffer(stream.plain, np.uint8), cv2.IMREAD_UNCHANGED)
        grey = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
        assert answer.header.stamp.sec == seed + 1, oddity
        np.testing.assert_array_equal(np.rint(tensor(answer, 'copy')[0, 0]), grey, err_msg=oddity)


@pytest.mark.once
def test_n3_every_hostile_picture_costs_itself_alone_and_is_accounted_for(node: tuple[NodeProcess, Peer]) -> None:
    process, peer = node
    told = len(peer.diagnostics)
    wait_until(lambda: len(peer.diagnostics) > told + 1, 'diagnostics that know of what came before')
    before = {topic: ends(peer, topic) for topic in (CAMERA, RAW, PLAIN)}
    messages = [(RAW, hostile_message(number)[1]) for number in range(len(MESSAGES))]
    pictures = [hostile_picture(number) for number in range(len(PICTURES))]
    pictures = [picture for picture in pictures if picture.kind not in TOO_SLOW_TO_MAKE]
    given: list[tuple[str, Image | CompressedImage]] = [
        *messages, *((CAMERA, compressed(0, picture.format, picture.data)) for picture in pictures),
    ]  # fmt: skip
    for number, (topic, message) in enumerate(given, 1000):
        message.header.stamp.sec = number
        peer.publisher(topic, type(message)).publish(message)
        time.sleep(0.1)
        plain = bytes(np.random.default_rng(number).integers(0, 256, WIDTH * HEIGHT, np.uint8))
        peer.publisher(PLAIN).publish(image(number, data=plain))
    sent = {RAW: len(messages), CAMERA: len(pictures)}
    sent[PLAIN] = len(given)

    def missing() -> dict[str, int]:
        return {topic: count for topic in sent if (count := sent[topic] - ends(peer, topic) + before[topic])}

    deadline = time.monotonic() + 60.0
    while missing() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not missing()
    assert process.process.poll() is None and peer.state() == 'active'
    stream = camera_stream('plain', 1, WIDTH, HEIGHT)

    def answered() -> list[TensorList]:
        # Again and again, as a camera does: what came before has cost more than its share.
        peer.publisher(CAMERA, CompressedImage).publish(compressed(9999, 'jpeg', stream.data))
        time.sleep(0.2)
        return [answer for answer in list(peer.tensors) if answer.header.stamp.sec == 9999]

    answer, *_ = wait_until(answered, 'the healthy picture')
    grey = cv2.cvtColor(cv2.imdecode(np.frombuffer(stream.plain, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2GRAY)
    np.testing.assert_array_equal(np.rint(tensor(answer, 'copy')[0, 0]), grey)
