"""Compressed and raw images on topics of any name, each answered as plain ONNX Runtime answers what cv2 decodes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.ros import image_topics
from support.harness import LocalNode, Peer, image, reliable, running_node, tensor, wait_until
from support.networks import HEIGHT, WIDTH, copying

FRONT, NAMED = '/front/image', '/down/image_raw/compressed'
# The network gets the pixels as they are, so that its answer can be compared bit for bit.
AS_THEY_ARE = {'preprocess.scale': 1.0}


def compressed(picture: np.ndarray, number: int = 1, suffix: str = '.png') -> CompressedImage:
    message = CompressedImage(format='png' if suffix == '.png' else 'jpeg')
    message.header.stamp.sec = number
    message.header.frame_id = f'camera {number}'
    message.data = cv2.imencode(suffix, picture)[1].tobytes()
    return message


def texture(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8), np.uint8)
    return np.kron(blocks, np.ones((8, 8), np.uint8))


def raw(picture: np.ndarray, number: int = 1) -> Image:
    height, width = picture.shape
    return image(number, width=width, height=height, step=width, data=picture.tobytes())


def expected(model: str, picture: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    return session.run(['copy'], {'image': picture[None, None].astype(np.float32)})[0]


def decoded(message: CompressedImage) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_UNCHANGED)


def counters(peer, topic):
    return {name: int(value) for name, value in peer.values(f'Stream {topic}').items() if value.isdigit()}


def decoders(process) -> list[int]:
    """Return the process ids of the decoders of a node."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            name, _, fields = stat.read_text().partition('(')[2].rpartition(')')
            if name == 'c7-decoder' and int(fields.split()[1]) == process.process.pid:
                found.append(int(stat.parent.name))
    return found


@contextlib.contextmanager
def participant(peer) -> Iterator[Peer]:
    """A peer of its own: Fast DDS has one type for a topic in a participant."""
    with contextlib.closing(Peer(peer.context.get_domain_id())) as other:
        yield other


def test_the_type_is_that_of_the_publisher_or_of_a_setting_whatever_the_name_of_the_topic(tmp_path):
    """Publishers come before the subscription and after it; each image is answered, those of no match are named."""
    model = copying(tmp_path)
    early, compressed_only, raw_only = '/early/image', '/fixed/image', '/fixed/image/compressed'
    types = {FRONT: 'auto', NAMED: 'auto', early: 'auto', compressed_only: 'compressed', raw_only: 'raw'}
    parameters = {
        'model_path': model, 'image_topics': list(types), 'image_topic_types': list(types.values()),
        'cpu_threads': 1, **AS_THEY_ARE, **reliable(*types),
        **{f'qos_overrides.{topic}.subscription.depth': 7 for topic in types},
    }  # fmt: skip
    published = {FRONT: CompressedImage, NAMED: Image, early: CompressedImage, compressed_only: CompressedImage}
    with running_node(parameters) as (process, peer):
        peer.publisher(early, CompressedImage)
        peer.start()
        wait_until(
            lambda: peer.values(f'Stream {early}').get('type') == 'sensor_msgs/msg/CompressedImage',
            'the node to hear of a publisher',
        )
        # Discovery may have taken until after that activation; the next has the publisher before it, and counts anew.
        assert all(peer.change_state(step) for step in ('deactivate', 'cleanup', 'configure', 'activate'))
        wait_until(lambda: peer.values(f'Stream {FRONT}').get('type') == 'sensor_msgs/msg/Image', 'its name to count')
        assert peer.values(f'Stream {NAMED}')['type'] == 'sensor_msgs/msg/CompressedImage'
        for topic, message_type in {**published, raw_only: Image}.items():
            peer.wait_matched(topic, message_type)
            for number in range(1, 6):
                dice = random.Random(f'{topic} {number}')
                picture = texture(dice.randrange(1 << 30))
                question = raw(picture, number)
                if message_type is CompressedImage:
                    question = compressed(picture, number, dice.choice(['.png', '.jpg']))
                    picture = decoded(question)
                answer = peer.ask(topic, question)
                assert (answer.source_topic, answer.header) == (topic, question.header)
                np.testing.assert_array_equal(tensor(answer, 'copy'), expected(model, picture))
        changed = {FRONT: 'CompressedImage', NAMED: 'Image'}
        for topic in types:
            known = {
                'type_changes': str(int(topic in changed)), 'queue_depth': '7', 'answered': '5',
                'lost_before_node': '0', 'dropped_by_policy': '0',
            }  # fmt: skip
            peer.wait_values(f'Stream {topic}', known)
            assert process.output().count(f'{topic} is published as') == int(topic in changed)
        records = {record['topic']: record for record in peer.payloads('c7.stream_retyped')}
        assert {topic: record['type'] for topic, record in records.items()} == {
            topic: f'sensor_msgs/msg/{name}' for topic, name in changed.items()
        }
        assert len(peer.payloads('c7.stream_retyped')) == 2
        assert len(decoders(process)) == 3, 'that of the topic which turned out to be raw has ended'

        with participant(peer) as other:
            for topic, message_type, said in (
                (compressed_only, Image, 'Image, not sensor_msgs/msg/CompressedImage'),
                (raw_only, String, 'String, not sensor_msgs/msg/Image'),
                (FRONT, Image, 'Image, not sensor_msgs/msg/CompressedImage'),
            ):
                other.publisher(topic, message_type)
                peer.wait_level(f'Stream {topic}', 'ERROR')
                assert said in peer.message(f'Stream {topic}')
                if message_type is not String and topic != raw_only:
                    answer = peer.ask(topic, compressed(texture(5)))
                    np.testing.assert_array_equal(tensor(answer, 'copy'), expected(model, texture(5)))


def test_another_publisher_of_the_other_type_takes_over_and_counters_go_on(tmp_path):
    """What was pushed out of the middleware's queue before stays counted, and is not counted twice."""
    model = copying(tmp_path)
    parameters = {'model_path': model, 'image_topics': [FRONT], 'cpu_threads': 1, **AS_THEY_ARE}
    with running_node(parameters | reliable(FRONT, depth=5)) as (process, peer), participant(peer) as other:
        peer.start()
        peer.wait_matched(FRONT, Image)
        peer.ask(FRONT, raw(texture(1)))
        process.signal(signal.SIGSTOP)
        for number in range(2, 32):
            peer.publisher(FRONT).publish(raw(texture(number), number))
            time.sleep(0.005)
        process.signal(signal.SIGCONT)

        def all_counted():
            """Diagnostics may come while the node is still taking what its queue has kept."""
            counted = counters(peer, FRONT)
            pushed, received = (counted.get(name, 0) for name in ('dropped_in_queue', 'received'))
            return (pushed, received) if pushed + received == 31 else None

        pushed, received = wait_until(all_counted, 'each image to be received or pushed out')
        assert pushed > 0
        second = other.publisher(FRONT, CompressedImage)
        peer.wait_level(f'Stream {FRONT}', 'ERROR')
        peer.node.destroy_publisher(peer._publishers.pop(FRONT))
        wait_until(lambda: second.get_subscription_count() > 0, 'a subscription of the other type')
        time.sleep(0.3)
        before = len(peer.tensors)
        second.publish(compressed(texture(6)))
        wait_until(lambda: len(peer.tensors) > before, 'an answer')
        np.testing.assert_array_equal(tensor(peer.tensors[before], 'copy'), expected(model, texture(6)))
        known = {
            'received': str(received + 1), 'dropped_in_queue': str(pushed), 'lost_before_node': '0', 'type_changes': '1'
        }  # fmt: skip
        peer.wait_values(f'Stream {FRONT}', known)


def test_a_swap_to_a_model_of_another_size_answers_every_compressed_image_as_the_model_that_it_names_does(tmp_path):
    """N-10: live frames for the new model come out of the decoder, too; none is answered with the wrong tensor."""
    models, sizes = [], {}
    for width, height in ((32, 24), (64, 48)):
        (tmp_path / str(width)).mkdir()
        models.append(copying(tmp_path / str(width), width=width, height=height))
        sizes[ModelBundle.load(Path(models[-1])).weights_digest] = (height, width)
    small, large = models
    parameters = {'model_path': small, 'image_topics': [NAMED], 'cpu_threads': 1, **AS_THEY_ARE}
    with running_node(parameters | reliable(NAMED)) as (process, peer):
        peer.start()
        publisher = peer.wait_matched(NAMED, CompressedImage)
        over, sent = threading.Event(), [0]

        def fly() -> None:
            while not over.wait(1 / 40):
                sent[0] += 1
                publisher.publish(compressed(np.full((96, 128), sent[0] % 250, np.uint8), sent[0]))

        camera = threading.Thread(target=fly)
        camera.start()
        try:
            for round_, path in enumerate((large, small), 1):
                wait_until(lambda: len(peer.tensors) > 5, 'answers')
                assert peer.set_parameter('model_path', path).successful
                wait_until(lambda: len(peer.payloads('c7.model_swapped')) == round_, 'the swap', 60.0)  # noqa: B023
                start = len(peer.tensors)
                wait_until(lambda: len(peer.tensors) > start + 5, 'answers of the new model')  # noqa: B023
        finally:
            over.set()
            camera.join()
        assert [record['outcome'] for record in peer.payloads('c7.model_swapped')] == ['swapped', 'swapped']
        assert 'takes over after its self-test, without live frames' not in process.output(), 'live frames came'

        def settled():
            counted = counters(peer, NAMED)
            return (
                counted.get('received') == sent[0]
                and counted['answered'] + counted['dropped_by_policy'] == sent[0]
                and len(peer.tensors) == counted['answered'] and counted
            )  # fmt: skip

        counted = wait_until(settled, 'every image to be accounted for')
        assert counted['unanswered'] == 0
        answers = list(peer.tensors)
        assert [answer.frame_seq for answer in answers] == list(range(len(answers)))
        assert {answer.weights_digest for answer in answers} == set(sizes)
        for answer in answers:
            values = tensor(answer, 'copy')
            assert values.shape[2:] == sizes[answer.weights_digest]
            np.testing.assert_array_equal(values, np.full_like(values, 255.0 * (answer.header.stamp.sec % 250)))


def test_a_decoder_that_dies_or_hangs_costs_its_image_and_holds_up_neither_others_nor_the_end(tmp_path):
    model = copying(tmp_path)
    parameters = {
        'model_path': model, 'image_topics': [NAMED, FRONT], 'cpu_threads': 1, 'decode_timeout_ms': 60_000.0,
        # A decoder that starts anew may cost more than a share of a slow machine.
        'image_cpu_share': 0.0, **AS_THEY_ARE,
    }  # fmt: skip
    with running_node(parameters | reliable(NAMED, FRONT)) as (process, peer):
        peer.start()

        def stop_with_an_image() -> int:
            """Have the decoder stop, one image in its hand and one behind it, and the other topic go on."""
            peer.wait_matched(NAMED, CompressedImage)
            peer.wait_matched(FRONT, Image)
            peer.ask(NAMED, compressed(texture(1)))
            (pid,) = decoders(process)
            os.kill(pid, signal.SIGSTOP)
            received = counters(peer, NAMED).get('received', 0)
            for number in (2, 3):
                peer.publisher(NAMED).publish(compressed(texture(number), number))
                time.sleep(0.1)
            for number in range(5):
                answer = peer.ask(FRONT, raw(texture(number)))
                assert answer.source_topic == FRONT
            wait_until(lambda: counters(peer, NAMED)['received'] >= received + 2, 'both to be received')
            return pid

        pid = stop_with_an_image()
        before = len(peer.tensors)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: counters(peer, NAMED).get('refused decoder') == 1, 'the first to be refused')
        wait_until(lambda: len(peer.tensors) > before, 'the second to be answered')
        assert peer.tensors[before].header.stamp.sec == 3
        np.testing.assert_array_equal(tensor(peer.tensors[before], 'copy'), expected(model, texture(3)))

        stop_with_an_image()
        assert peer.change_state('deactivate')
        assert decoders(process) == []
        wait_until(lambda: counters(peer, NAMED).get('dropped_at_close') == 2, 'both to be counted')
        assert peer.change_state('activate')
        pid = stop_with_an_image()
        process.signal(signal.SIGINT)
        assert process.wait() == 0
        assert not Path(f'/proc/{pid}').exists()


def test_a_camera_that_costs_more_than_its_share_is_slowed_and_named_and_the_other_keeps_all_of_its_images(tmp_path):
    model = copying(tmp_path)
    parameters = {
        'model_path': model, 'image_topics': [NAMED, FRONT], 'cpu_threads': 1, 'image_cpu_share': 0.02, **AS_THEY_ARE,
    }  # fmt: skip
    with running_node(parameters | reliable(NAMED, FRONT)) as (process, peer):
        peer.start()
        hog = peer.wait_matched(NAMED, CompressedImage)
        peer.wait_matched(FRONT, Image)
        # Noise of two megapixels: tens of milliseconds for zlib.
        noise = compressed(np.random.default_rng(1).integers(0, 256, (1024, 2048), np.uint8))
        over, sent = threading.Event(), [0]

        def fly() -> None:
            while not over.wait(0.05):
                sent[0] += 1
                noise.header.stamp.sec = sent[0]
                hog.publish(noise)

        camera = threading.Thread(target=fly)
        camera.start()
        plain = 0
        try:

            def slowed() -> bool:
                nonlocal plain
                plain += 1
                answered = [each for each in peer.tensors if each.source_topic == FRONT]
                peer.publisher(FRONT).publish(raw(texture(plain), plain))
                wait_until(
                    lambda: sum(each.source_topic == FRONT for each in list(peer.tensors)) > len(answered), 'an answer'
                )
                return plain >= 40 and 'slowed' in peer.message(f'Stream {NAMED}')

            wait_until(slowed, 'the hog to be slowed')
        finally:
            over.set()
            camera.join()
        assert peer.level(f'Stream {NAMED}') == 'WARN'
        assert 'ms of CPU time' in peer.message(f'Stream {NAMED}')
        assert 'image_cpu_share' in peer.message(f'Stream {NAMED}')

        def settled():
            counted = {topic: counters(peer, topic) for topic in (NAMED, FRONT)}
            hogged = counted[NAMED]
            done = hogged['received'] == sent[0] == hogged['answered'] + hogged['dropped_by_policy']
            return done and counted[FRONT].get('answered') == plain and counted

        counted = wait_until(settled, 'every image to be accounted for')
        assert counted[NAMED]['dropped_over_share'] > counted[NAMED]['answered'] >= 1
        assert counted[FRONT]['dropped_by_policy'] == 0
        record = peer.wait_record('c7.camera_slowed')
        assert record['topic'] == NAMED and record['image_ms'] > 1.0
        assert process.output().count(f'{NAMED} is slowed') == 1
        assert not [each for each in peer.payloads('c7.camera_slowed') if each['topic'] == FRONT]
        # At once, and to the end.
        assert peer.set_parameter('image_cpu_share', 0.0).successful
        assert peer.wait_record('c7.camera_no_longer_slowed')['topic'] == NAMED
        peer.ask(NAMED, noise)
        peer.wait_level(f'Stream {NAMED}', 'OK')
        assert peer.values(f'Stream {NAMED}')['image_cpu_share_cores'] == 'no limit'


def test_raw_images_that_take_long_are_made_ready_beside_those_of_others(
    ros_context, near_peer, tmp_path, monkeypatch
):
    """With the same answers, in order, and none lost on the way."""
    monkeypatch.setattr(image_topics, '_LONG_MS', 0.0001)
    model = copying(tmp_path)
    overrides = reliable(FRONT, '/left/image')
    local = LocalNode(
        ros_context, model_path=model, image_topics=[FRONT, '/left/image'], cpu_threads=1, **AS_THEY_ARE, **overrides
    )
    try:
        near_peer.start()
        near_peer.wait_matched(FRONT)
        near_peer.wait_matched('/left/image')
        stream = local.streams.stream(FRONT)
        before, number, deadline = stream.sink, 0, time.monotonic() + 30.0
        while stream.sink is before or number < 40:
            assert time.monotonic() < deadline
            number += 1
            answer = near_peer.ask(FRONT, raw(texture(number), number))
            assert (answer.header.stamp.sec, answer.frame_seq) == (number, number - 1)
            np.testing.assert_array_equal(tensor(answer, 'copy'), expected(model, texture(number)))
        assert near_peer.ask('/left/image', raw(texture(1))).source_topic == '/left/image'
        assert local.node.transition('deactivate')
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith('c7-decode')]
    finally:
        local.close()


def test_a_node_without_compressed_topics_starts_no_decoder_and_no_thread_for_one(ros_context, near_peer, tmp_path):
    local = LocalNode(ros_context, model_path=copying(tmp_path), image_topics=[FRONT, '/left/image'], cpu_threads=1)
    try:
        near_peer.start()
        near_peer.wait_matched(FRONT)
        for number in range(1, 10):
            near_peer.ask(FRONT, image(number))
        assert not [thread.name for thread in threading.enumerate() if 'decode' in thread.name]
        assert all(local.streams.stream(topic).sink is local.streams._slots for topic in (FRONT, '/left/image'))
    finally:
        local.close()
