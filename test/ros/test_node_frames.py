"""N-3, N-7: every frame that leaves its slot is answered once and in order; what is no image costs nobody else."""

from __future__ import annotations

import random
import re
import struct
import time

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.errors import InferenceError
from gps_denied_c7.failover.in_process import InProcessHost
from support.harness import LocalNode, image, reliable, running_node, tensor, wait_until
from support.networks import HEIGHT, WHITE, WIDTH, copying, failing_on_white, slow

LEFT, RIGHT, JPEG = '/left/image_raw', '/right/image_raw', '/front/image_raw/compressed'


def counters(peer, topic):
    """Return the numbers of a stream's diagnostic status, 0 where one is not there."""
    return {name: int(value) for name, value in peer.values(f'Stream {topic}').items() if value.isdigit()}


def compressed(number=1, *, format='jpeg', data=None, **fields):
    message = CompressedImage(format=format)
    message.header.stamp.sec = number
    if data is None:
        picture = np.full((HEIGHT, WIDTH), 40 + number % 100, np.uint8)
        data = cv2.imencode('.png' if 'png' in format else '.jpg', picture)[1].tobytes()
    message.data = data
    for name, value in fields.items():
        setattr(message, name, value)
    return message


@pytest.fixture(scope='module')
def module_peer(tmp_path_factory):
    """One active node on three topics for the tests of this module, which each leave it active."""
    model = copying(tmp_path_factory.mktemp('model'))
    parameters = {'model_path': model, 'image_topics': [LEFT, RIGHT, JPEG], 'cpu_threads': 1, 'autostart': True}
    with running_node(parameters | reliable(LEFT, RIGHT, JPEG)) as (_, peer):
        peer.wait_state('active')
        for topic, message_type in ((LEFT, Image), (RIGHT, Image), (JPEG, CompressedImage)):
            peer.wait_matched(topic, message_type)
        yield peer


@pytest.fixture
def active(module_peer):
    yield module_peer
    assert module_peer.state() == 'active'
    assert 'failures in' not in str(module_peer.values('Runtime')), module_peer.values('Runtime')


def test_n3_frames_of_every_topic_are_answered_once_in_order_and_numbered_without_gap(active):
    publish = {LEFT: image, RIGHT: image, JPEG: compressed}
    first = len(active.tensors)
    start = {topic: sum(answer.source_topic == topic for answer in active.tensors) for topic in publish}
    for number in range(1, 31):
        for topic, make in publish.items():
            active.publisher(topic).publish(make(number))
        # Not faster than the node, so that policy drops none.
        wait_until(lambda number=number: len(active.tensors) >= first + 3 * number, f'three answers to {number}')
    for topic in publish:
        answers = [answer for answer in active.tensors[first:] if answer.source_topic == topic]
        assert [answer.header.stamp.sec for answer in answers] == list(range(1, 31))
        assert [answer.frame_seq for answer in answers] == [start[topic] + index for index in range(30)]


@pytest.mark.parametrize('format', ['jpeg', 'png', 'rgb8; jpeg compressed bgr8'])
def test_n3_compressed_images(active, format):
    answer = active.ask(JPEG, compressed(7, format=format))
    assert (answer.source_topic, answer.source_encoding) == (JPEG, format)
    assert (answer.source_width, answer.source_height) == (WIDTH, HEIGHT)
    np.testing.assert_allclose(tensor(answer, 'copy'), 47, atol=1.5)


@pytest.mark.parametrize(
    ('encoding', 'channels', 'value'), [('mono8', 1, 1), ('rgb8', 3, 1), ('bgra8', 4, 1), ('mono16', 2, 257)]
)
def test_n3_raw_encodings_and_sizes(active, encoding, channels, value):
    """A grey picture stays that grey, whatever carries it; the matrix tells the size it had."""
    width, height = 2 * WIDTH, 3 * HEIGHT
    if encoding == 'mono16':
        data = struct.pack('<H', 90 * value) * (width * height)
    else:
        data = bytes([90]) * (width * height * channels)
    question = image(9, width=width, height=height, encoding=encoding, step=width * channels, data=data)
    answer = active.ask(LEFT, question)
    np.testing.assert_allclose(tensor(answer, 'copy'), 90, atol=0.5)
    assert (answer.source_width, answer.source_height, answer.source_encoding) == (width, height, encoding)
    matrix = np.array(answer.network_to_image).reshape(2, 3)
    np.testing.assert_allclose(matrix @ [(WIDTH - 1) / 2, (HEIGHT - 1) / 2, 1], [(width - 1) / 2, (height - 1) / 2])


def test_n3_loss_with_two_publishers_is_counted_for_each(active):
    """Each numbers its own messages: there is no gap between the numbers of two."""
    active.ask(LEFT, image())
    wait_until(lambda: active.values(f'Stream {LEFT}').get('lost_before_node') == '0', 'no loss from one publisher')
    second = active.node.create_publisher(Image, LEFT, QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE))
    wait_until(lambda: second.get_subscription_count() == 1, 'the second publisher to match')
    received = counters(active, LEFT)['received']
    for _ in range(5):
        active.ask(LEFT, image())
        answered = len(active.tensors)
        second.publish(image())
        wait_until(lambda answered=answered: len(active.tensors) > answered, 'an answer to the second publisher')
    wait_until(lambda: counters(active, LEFT)['received'] >= received + 10, 'newer diagnostics')
    assert active.values(f'Stream {LEFT}')['lost_before_node'] == '0'
    active.node.destroy_publisher(second)


def malformed(number: int) -> dict[str, tuple[str, Image | CompressedImage]]:
    """Return one image of each kind that is none, with the reason under which it is to be counted."""
    jpeg = compressed().data.tobytes()
    far = Time(sec=int(time.time()) + 1_000_000)
    broken = {
        'unknown encoding': ('encoding', image(number, encoding='32FC7')),
        'empty encoding': ('encoding', image(number, encoding='')),
        'text that is no encoding': ('encoding', image(number, encoding='€' * 100)),
        'too few bytes': ('data', image(number, data=bytes(100))),
        'too many bytes': ('data', image(number, data=bytes(WIDTH * HEIGHT + 1))),
        'no bytes': ('data', image(number, data=b'')),
        'step below the row': ('data', image(number, step=WIDTH - 1, data=bytes((WIDTH - 1) * HEIGHT))),
        'step that would overflow': ('data', image(number, step=2**32 - 1)),
        'zero width': ('size', image(number, width=0, step=0, data=b'')),
        'zero height': ('size', image(number, height=0, data=b'')),
        'absurd size': ('size', image(number, width=2**32 - 1, height=2**32 - 1, data=b'\0' * 64)),
        'odd width where chroma is shared': (
            'size', image(number, width=63, encoding='yuv422', step=126, data=bytes(126 * 48)),
        ),
        'bayer too small': ('size', image(number, width=2, height=2, encoding='bayer_rggb8', step=2, data=bytes(4))),
        'rgb8 with the bytes of mono8': ('data', image(number, encoding='rgb8')),
    }  # fmt: skip
    for name, stamp in {
        'zero stamp': Time(),
        'negative stamp': Time(sec=-5),
        'nanosec of a second': Time(sec=5, nanosec=1_000_000_000),
        'nanosec at its limit': Time(sec=5, nanosec=2**32 - 1),
        'far future': far,
        'end of time': Time(sec=2**31 - 1, nanosec=999_999_999),
    }.items():
        message = image(number)
        message.header.stamp = stamp
        broken[name] = ('stamp', message)
    for name, (reason, data) in {
        'truncated JPEG': ('data', jpeg[:-20]),
        'JPEG without scan': ('data', jpeg[:100] + b'\xff\xd9'),
        'JPEG of noise': ('data', b'\xff\xd8' + random.Random(number).randbytes(500)),
        'no JPEG at all': ('data', bytes(300)),
        'no data': ('data', b''),
        'damaged PNG': ('data', compressed(format='png').data.tobytes()[:-6]),
    }.items():
        broken[name] = (reason, compressed(number, data=data))
    broken['unknown compression'] = ('encoding', compressed(number, format='h265', data=b'\0' * 64))
    broken['JPEG with a bad stamp'] = ('stamp', compressed(0))
    return broken


def test_n7_a_thousand_malformed_images_of_every_kind(active):
    """Each refused and counted under its reason, each good image in between answered, warnings rate-limited."""
    rounds = 1000 // len(malformed(1)) + 1
    before = {topic: counters(active, topic) for topic in (LEFT, JPEG)}
    expected = {topic: dict.fromkeys(('encoding', 'size', 'data', 'stamp'), 0) for topic in (LEFT, JPEG)}
    first = len(active.tensors)
    for number in range(1, rounds + 1):
        # Good images in the middle; one frame in the slot at a time, so that none is replaced.
        for index, (reason, message) in enumerate(malformed(number).values()):
            topic = LEFT if isinstance(message, Image) else JPEG
            active.publisher(topic).publish(message)
            expected[topic][reason] += 1
            if index == 10:
                active.publisher(RIGHT).publish(image(number))
                active.publisher(LEFT).publish(image(number))
        wait_until(lambda number=number: len(active.tensors) >= first + 2 * number, 'the good images to be answered')
    assert sum(sum(reasons.values()) for reasons in expected.values()) >= 1000
    for topic in (LEFT, RIGHT):
        stamps = [answer.header.stamp.sec for answer in active.tensors[first:] if answer.source_topic == topic]
        assert stamps == list(range(1, rounds + 1))
    for topic, reasons in expected.items():
        for reason, count in reasons.items():
            name = f'refused {reason}'
            # What only a decoder can refuse waits for it, where a newer one may take its place.
            names = (name, 'dropped_replaced') if (topic, reason) == (JPEG, 'data') else (name,)
            wait_until(
                lambda topic=topic, names=names, count=count: (
                    sum(counters(active, topic).get(name, 0) - before[topic].get(name, 0) for name in names) == count
                ),
                f'{topic}: {count} × {name}, not {counters(active, topic)}',
            )
            if count:
                record = next(
                    record
                    for record in active.payloads('c7.image_refused')
                    if (record['topic'], record['reason']) == (topic, reason)
                )
                assert record['message']
    active.wait_level(f'Stream {LEFT}', 'WARN')


def test_n7_warnings_are_rate_limited_and_say_how_many(tmp_path):
    model = copying(tmp_path)
    parameters = {'model_path': model, 'image_topics': [LEFT], 'autostart': True}
    with running_node(parameters | reliable(LEFT)) as (process, peer):
        peer.wait_state('active')
        publisher = peer.wait_matched(LEFT)
        began = time.monotonic()
        for _ in range(300):
            publisher.publish(image(encoding='32FC7'))
            publisher.publish(image(width=0))
            time.sleep(0.002)
        wait_until(lambda: counters(peer, LEFT).get('refused size') == 300, 'all to be counted')
        windows = 1 + int((time.monotonic() - began) / 5.0)
        assert 2 <= process.output().count('image refused') <= 2 * windows, 'one warning for each reason and window'
        assert len(peer.payloads('c7.image_refused')) == 2
        time.sleep(5.0)
        publisher.publish(image(width=0))

        def said() -> int:
            lines = [line for line in process.output().splitlines() if 'image refused: 0x' in line]
            held = [re.search(r'\((\d+) more since the last message\)', line) for line in lines]
            return len(lines) + sum(int(found[1]) for found in held if found)

        wait_until(lambda: said() == 301, 'the count of what was held back')
        wait_until(lambda: 'refused' in peer.message(f'Stream {LEFT}'), 'the refusals on diagnostics')
        assert peer.level(f'Stream {LEFT}') == 'WARN'


def test_n7_messages_that_are_no_cdr(active):
    """Damaged on their way: dropped by the middleware or refused, and the stream goes on."""
    whole = serialize_message(image(3))
    dice = random.Random(7)
    broken = [b'', b'\0', whole[:4], whole[:20], whole[: len(whole) // 2], b'\xff' * 200, b'\0\1\0\0' + b'\xff' * 400]
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(dice.randrange(1, 6)):
            # The header and the lengths of strings and data.
            changed[dice.randrange(0, 60)] = dice.randrange(256)
        broken.append(bytes(changed))
    for data in broken:
        if data:
            active.publisher(LEFT).publish(data)
            time.sleep(0.01)
    assert active.ask(LEFT, image(77)) is not None
    wait_until(lambda: active.tensors[-1].header.stamp.sec == 77, 'the image after them')


def test_n3_policy_drops_are_counted_and_every_frame_is_accounted_for(tmp_path):
    """A camera faster than the network: the newest wins, and nothing is called lost that was dropped."""
    parameters = {'model_path': slow(tmp_path, multiplications=24), 'image_topics': [LEFT, RIGHT], 'cpu_threads': 1}
    with running_node(parameters | reliable(LEFT, RIGHT)) as (_, peer):
        peer.start()
        left, right = peer.wait_matched(LEFT), peer.wait_matched(RIGHT)
        for number in range(1, 121):
            left.publish(image(number))
            if number % 10 == 0:
                right.publish(image(number))
            time.sleep(1 / 60)
        wait_until(lambda: counters(peer, LEFT).get('received') == 120, 'every image to be received')
        wait_until(lambda: peer.tensors and peer.tensors[-1].header.stamp.sec == 120, 'the newest to be answered')
        wait_until(
            lambda: (c := counters(peer, LEFT))['answered'] + c['dropped_by_policy'] == 120, 'the books to balance'
        )
        counted = counters(peer, LEFT)
        assert counted['dropped_replaced'] == counted['dropped_by_policy'] > 20
        assert counted['accepted'] == counted['answered'] and counted['unanswered'] == 0
        assert counted['lost_before_node'] == 0
        for topic in (LEFT, RIGHT):
            answers = [answer for answer in peer.tensors if answer.source_topic == topic]
            assert [answer.frame_seq for answer in answers] == list(range(len(answers)))
            stamps = [answer.header.stamp.sec for answer in answers]
            assert stamps == sorted(set(stamps))
        # The slow camera is not starved by the fast one: where both wait they take turns, however slow this machine is.
        assert counters(peer, RIGHT)['answered'] >= min(12, counted['answered']) // 2

        assert peer.set_parameter('max_queue_age_ms', 5.0).successful

        def frames_wait_too_long():
            left.publish(image(200))
            right.publish(image(200))
            time.sleep(1 / 60)
            return counters(peer, RIGHT)['dropped_too_old'] > 5

        wait_until(frames_wait_too_long, 'frames too old to be dropped')


def test_f7_images_without_an_answer_do_not_cost_those_that_have_one(tmp_path):
    """F-2, F-7: the network is not finite for some images; they are told and counted, the others answered."""
    with running_node(
        {'model_path': failing_on_white(tmp_path), 'image_topics': [LEFT], 'cpu_threads': 1} | reliable(LEFT)
    ) as (process, peer):
        peer.start()
        peer.wait_matched(LEFT)
        for number in range(1, 4):
            assert peer.ask(LEFT, image(number, data=bytes(WIDTH * HEIGHT))).header.stamp.sec == number
            peer.publisher(LEFT).publish(image(number, data=WHITE))
            # In its slot, the next image would replace it.
            wait_until(lambda number=number: counters(peer, LEFT)['unanswered'] == number, 'it to be counted')
        assert counters(peer, LEFT)['answered'] == 3
        assert [answer.frame_seq for answer in peer.tensors] == [0, 2, 4], 'a gap is an unanswered frame'
        told = [status for message in peer.diagnostics for status in message.status if LEFT in status.name]
        assert any(s.level == DiagnosticStatus.ERROR and 'images are not answered' in s.message for s in told)
        assert 'non-finite' in peer.wait_record('c7.frame_unanswered')['reason']
        assert len(peer.payloads('c7.frame_unanswered')) == 1, 'a repeating kind is merged'
        assert process.output().count('no runtime can answer this request') >= 1
        assert peer.level('Runtime') == 'WARN' and peer.values('Runtime')['switches'] == '0'
        assert 'c7.chain_exhausted' not in peer.kinds()
        peer.wait_level(f'Stream {LEFT}', 'WARN')


def test_f7_all_rungs_fail_while_active(ros_context, near_peer, tmp_path, monkeypatch):
    """Stay active, answer services, ERROR on diagnostics, count the unanswered, come back."""
    local = LocalNode(
        ros_context, model_path=copying(tmp_path), image_topics=[LEFT], cpu_threads=1, isolation='none'
    )
    peer = near_peer
    try:
        peer.start()
        peer.wait_matched(LEFT)
        assert peer.ask(LEFT, image(1)).frame_seq == 0

        def broken(*args):
            raise InferenceError('the engine is broken.')

        with monkeypatch.context() as patch:
            patch.setattr(InProcessHost, 'infer', broken)
            peer.publisher(LEFT).publish(image(2))
            peer.wait_level('Runtime', 'ERROR')
            assert 'the engine is broken' in peer.message('Runtime')
            assert 'the engine is broken' in peer.wait_record('c7.chain_exhausted')['reason']
            assert peer.state() == 'active'
            wait_until(lambda: counters(peer, LEFT)['unanswered'] == 1, 'the frame to be counted')
        # Without a frame, the chain is tried again after its pause.
        peer.wait_level('Runtime', 'WARN')
        assert peer.wait_record('c7.runtime_switched')['from'] == 'none'
        answer = peer.ask(LEFT, image(3))
        assert answer.frame_seq >= 2, 'a gap in the numbering is a frame that no runtime answered'
        counted = wait_until(lambda: (c := counters(peer, LEFT))['answered'] == 2 and c, 'the second answer')
        assert counted['accepted'] == counted['answered'] + counted['unanswered']
    finally:
        local.close()
