"""N-3: the newest image wins, also over those that wait before the node; loss is counted where numbers tell."""

import itertools
from types import SimpleNamespace

import pytest
import rclpy
from harness import image, wait_until
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.ros import streams
from gps_denied_c7.ros.rcl import Rcl
from gps_denied_c7.ros.streams import ImageStream, SequenceGaps
from gps_denied_c7.slots import FrameSlots
from gps_denied_c7.statistics import Statistics

TOPIC = '/camera/image_raw'


def info(number, gid=None):
    message_info = {'publication_sequence_number': number}
    if gid is not None:
        message_info['publisher_gid'] = {'data': gid}
    return message_info


def test_no_gap_is_no_loss():
    gaps = SequenceGaps()
    assert [gaps.note(info(number), 1) for number in (7, 8, 9)] == [0, 0, 0]


def test_a_gap_is_what_is_missing():
    gaps = SequenceGaps()
    assert [gaps.note(info(number), 1) for number in (1, 2, 5, 6, 10)] == [0, 0, 2, 2, 5]


def test_what_could_not_be_read_is_not_lost():
    gaps = SequenceGaps()
    gaps.note_unreadable()
    assert gaps.note(info(2), 1) == 0
    gaps.note_unreadable()
    assert gaps.note(info(4), 1) == 0
    assert gaps.note(info(6), 1) == 1, 'it was one message, once'
    gaps.note_unreadable()
    assert gaps.note(info(9), 1) == 2


def test_what_was_published_before_the_first_message_is_not_lost():
    assert SequenceGaps().note(info(1000), 1) == 0


def test_a_restarted_publisher_begins_a_new_count():
    gaps = SequenceGaps()
    for number in (100, 101):
        gaps.note(info(number), 1)
    assert gaps.note(info(1), 1) == 0
    assert gaps.note(info(3), 1) == 1


def test_two_publishers_that_cannot_be_told_apart_make_loss_unknown():
    gaps = SequenceGaps()
    gaps.note(info(1), 1)
    assert gaps.note(info(50), 2) is None
    assert gaps.note(info(51), 1) is None, 'what was missed meanwhile stays unknown'


def test_two_publishers_that_name_themselves_are_counted_apart():
    gaps = SequenceGaps()
    for number in range(1, 4):
        assert gaps.note(info(number, b'a'), 2) == 0
        assert gaps.note(info(number + 100, b'b'), 2) == 0
    assert gaps.note(info(6, b'a'), 2) == 2


def test_no_number_is_unknown():
    """Humble's callbacks get no message info."""
    assert SequenceGaps().note(None, 1) is None
    assert SequenceGaps().note({'publication_sequence_number': None}, 1) is None


@pytest.fixture
def stream(ros_context):
    """A stream whose images nobody takes but the test, what it told, and a publisher that has reached it."""
    node = rclpy.create_node('stream', context=ros_context, start_parameter_services=False)
    statistics, refused, overruns = Statistics(), [], []
    statistics.open_streams((TOPIC,))
    slots = FrameSlots([TOPIC], on_replaced=lambda frame: statistics.count(TOPIC, 'replaced'))
    made = ImageStream(
        node,
        TOPIC,
        slots,
        statistics,
        rcl=Rcl(Image, CompressedImage),
        guard=lambda name, callback: callback,
        live=lambda: SimpleNamespace(max_stamp_ahead_s=0.0),
        on_refused=lambda topic, error: refused.append(error.reason),
        on_time_reset=lambda topic, backwards_s: None,
        on_overrun=lambda *what: overruns.append(what),
    )
    publisher = node.create_publisher(Image, TOPIC, QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE))
    wait_until(lambda: publisher.get_subscription_count() == 1, 'a match')
    yield SimpleNamespace(
        node=node,
        ready=made._on_ready,
        publish=publisher.publish,
        counted=lambda: statistics.snapshot().streams[TOPIC],
        waiting=lambda: (frame := slots.take(0.0)) and frame.message.header.sec,
        refused=refused,
        overruns=overruns,
    )
    made.close()
    node.destroy_node()


def test_images_that_wait_behind_one_another_give_way_to_the_newest(stream):
    stream.publish(image(1))
    stream.ready()
    for number in range(2, 6):
        stream.publish(image(number))
    stream.ready()
    assert stream.waiting() == 5 and stream.waiting() is None
    counted = stream.counted()
    assert (counted.received, counted.replaced, counted.lost) == (5, 4, 0)


def test_an_image_nothing_waits_before_is_handed_on_at_once(stream):
    """Looking for a second one would cost the first its time."""
    for number in (1, 2):
        stream.publish(image(number))
    stream.ready()
    assert stream.counted().received == 1 and stream.waiting() == 1
    stream.ready()
    assert stream.counted().received == 2 and stream.waiting() == 2


def test_an_executor_leaves_every_image_to_the_stream(stream, ros_context):
    executor = SingleThreadedExecutor(context=ros_context)
    executor.add_node(stream.node)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Subscription, 'callback', property(lambda self: pytest.fail('rclpy has taken an image')))
        for number in range(1, 21):
            stream.publish(image(number))
            while stream.counted().received < number:
                executor.spin_once(timeout_sec=5.0)
    executor.shutdown()
    assert stream.waiting() == 20 and stream.counted().lost == 0


def test_a_publisher_that_never_pauses_does_not_keep_the_callback(stream):
    """As many as the middleware keeps are taken, no more: others wait for the executor, too."""
    stream.publish(image(1))
    stream.ready()
    take, numbers = ImageStream._take, iter(range(2, 100))

    def taken_while_more_arrive(self):
        stream.publish(image(next(numbers)))
        return take(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ImageStream, '_take', taken_while_more_arrive)
        stream.ready()
    assert stream.counted().received == 1 + 5


@pytest.fixture
def full_turns(stream, monkeypatch):
    """A way to have the callback find the queue full again and again, so many seconds apart."""
    take, numbers, now = ImageStream._take, itertools.count(2), [1000.0]

    def taken_while_more_arrive(self):
        stream.publish(image(next(numbers)))
        return take(self)

    def turns(count, apart_s):
        with monkeypatch.context() as patched:
            patched.setattr(ImageStream, '_take', taken_while_more_arrive)
            patched.setattr(streams.time, 'monotonic', lambda: now[0])
            for _ in range(count):
                stream.ready()
                now[0] += apart_s

    stream.publish(image(1))
    stream.ready()
    return turns


def test_a_queue_that_is_full_again_and_again_is_told(stream, full_turns):
    full_turns(9, apart_s=0.1)
    assert stream.overruns == []
    full_turns(1, apart_s=0.1)
    assert stream.overruns == [(TOPIC, 5)]
    full_turns(19, apart_s=0.1)
    assert stream.overruns == 2 * [(TOPIC, 5)]


def test_a_queue_that_is_full_now_and_then_is_not(stream, full_turns):
    """As after each moment in which the process was held up."""
    full_turns(40, apart_s=0.12)
    assert stream.overruns == []
    full_turns(10, apart_s=0.05)
    assert stream.overruns == [(TOPIC, 5)]


def test_n7_a_message_that_cannot_be_read_is_refused_and_not_lost(stream):
    stream.publish(image(1))
    stream.ready()
    stream.publish(bytes(serialize_message(image(2)))[:30])
    stream.ready()
    assert stream.refused == ['message']
    stream.publish(image(3))
    stream.ready()
    counted = stream.counted()
    assert stream.waiting() == 3 and (counted.received, counted.replaced, counted.lost) == (3, 1, 0)
