"""N-3: the newest image wins, also over those that wait before the node, and those that are given up are counted."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.pipeline.mailbox import FrameSlots
from gps_denied_c7.ros import image_subscription
from gps_denied_c7.ros.callbacks import SubscriptionReady
from gps_denied_c7.ros.events import EventReporter
from gps_denied_c7.ros.image_subscription import ImageSubscription, queue_depth
from gps_denied_c7.ros.loss_counter import MessagesLost
from gps_denied_c7.ros.rcl import Rcl
from support.harness import image, wait_until

TOPIC = '/camera/image_raw'


@pytest.fixture
def stream(ros_context, request):
    """A stream whose images nobody takes but the test, what it told, and a publisher that has reached it."""
    overrides = [Parameter(f'qos_overrides.{TOPIC}.subscription.{name}', value=value)
                 for name, value in getattr(request, 'param', {}).items()]  # fmt: skip
    node = rclpy.create_node(
        'stream', context=ros_context, start_parameter_services=False, parameter_overrides=overrides
    )
    statistics, refused, overruns, admitting = Statistics(), [], [], [True]
    statistics.open_streams((TOPIC,))

    def record(kind, **payload):
        if kind == 'c7.image_refused':
            refused.append(payload['reason'])
        elif kind == 'c7.stream_overrun':
            overruns.append((payload['topic'], payload['queue_depth'], payload['keeps_newest']))

    slots = FrameSlots([TOPIC], on_replaced=lambda frame: statistics.count(TOPIC, 'replaced'))
    opened = functools.partial(
        ImageSubscription,
        node,
        TOPIC,
        Image,
        slots,
        statistics=statistics,
        memory_bytes=1 << 30,
        admits=lambda topic: admitting[0],
        rcl=Rcl(Image, CompressedImage),
        guard=lambda name, callback: callback,
        live=lambda: SimpleNamespace(max_stamp_ahead_s=0.0),
        events=EventReporter(statistics, record, node.get_logger),
    )
    made = opened()
    publisher = node.create_publisher(Image, TOPIC, QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE))
    wait_until(lambda: publisher.get_subscription_count() == 1, 'a match')

    def listeners(count, until=wait_until):
        until(lambda: publisher.get_subscription_count() == count, f'{count} subscriptions')

    yield SimpleNamespace(
        node=node,
        listeners=listeners,
        waitables=lambda: [one for one in node.waitables if isinstance(one, MessagesLost | SubscriptionReady)],
        ready=lambda: made._on_ready(made._queue),
        made=made,
        open=opened,
        publish=publisher.publish,
        counted=lambda: statistics.snapshot().streams[TOPIC],
        waiting=lambda: (frame := slots.take(0.0)) and frame.message.header.sec,
        refused=refused,
        admitting=admitting,
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


def test_who_answers_an_image_comes_before_what_is_noted_of_it(stream, monkeypatch):
    """The inference thread needs the interpreter, too; one that has an image before it was not woken."""
    order = []
    yields = lambda: order.append(f'yields to {stream.made.sink.has(TOPIC)}')  # noqa: E731
    monkeypatch.setattr(image_subscription, 'yield_gil', yields)
    monkeypatch.setattr(stream.made, '_note_stamp', lambda stamp: order.append('notes'))
    for number, done in ((1, ['yields to True', 'notes']), (2, ['notes'])):
        stream.publish(image(number))
        stream.ready()
        assert order == done
        order.clear()


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
    take, numbers = ImageSubscription._take, iter(range(2, 100))

    def taken_while_more_arrive(self, queue):
        stream.publish(image(next(numbers)))
        return take(self, queue)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ImageSubscription, '_take', taken_while_more_arrive)
        stream.ready()
    assert stream.counted().received == 1 + 5


@pytest.fixture
def full_turns(stream, monkeypatch):
    """A way to have the callback find the queue full again and again, so many seconds apart."""
    take, numbers, now = ImageSubscription._take, itertools.count(2), [1000.0]

    def taken_while_more_arrive(self, queue):
        stream.publish(image(next(numbers)))
        return take(self, queue)

    def turns(count, apart_s):
        with monkeypatch.context() as patched:
            patched.setattr(ImageSubscription, '_take', taken_while_more_arrive)
            patched.setattr(image_subscription.time, 'monotonic', lambda: now[0])
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
    assert stream.overruns == [(TOPIC, '5', True)]
    full_turns(19, apart_s=0.1)
    assert stream.overruns == 2 * [(TOPIC, '5', True)]
    assert len(list(stream.node.subscriptions)) == 2, 'one more, however often it is told'


def test_a_queue_that_is_full_now_and_then_is_not(stream, full_turns):
    """As after each moment in which the process was held up."""
    full_turns(40, apart_s=0.12)
    assert stream.overruns == []
    full_turns(10, apart_s=0.05)
    assert stream.overruns == [(TOPIC, '5', True)]


@pytest.fixture
def spin(stream, ros_context):
    """Serve the stream's callbacks as the node does, until something holds."""
    executor = SingleThreadedExecutor(context=ros_context)
    executor.add_node(stream.node)

    def until(condition, what):
        wait_until(lambda: executor.spin_once(timeout_sec=0.01) or condition(), what)

    yield until
    executor.shutdown()


def test_a_camera_that_overruns_the_queue_is_answered_by_its_newest_image_alone(stream, full_turns, spin):
    full_turns(10, apart_s=0.05)
    before = stream.counted()
    assert before.pushed_out == before.lost == 0
    assert stream.made.qos.depth == 5, 'until the new queue has an image'
    for number in range(91, 94):
        stream.publish(image(number))
    stream.listeners(2)
    stream.publish(image(100))
    spin(lambda: stream.made.qos.depth == 1, 'the new queue to be served')
    # A subscription ends when no executor waits for it any longer.
    stream.listeners(1, until=spin)
    for number in range(101, 105):
        stream.publish(image(number))
    stream.ready()
    counted = stream.counted()
    # What waited in the first queue when the second took over was pushed out, if it was not taken before.
    assert counted.received + counted.pushed_out == before.received + 3 + 1 + 4 and counted.lost == 0
    assert counted.pushed_out >= 3
    assert stream.waiting() == 104 and stream.waiting() is None
    assert stream.made.qos.reliability == ReliabilityPolicy.BEST_EFFORT
    assert stream.overruns == [(TOPIC, '5', True)]


def test_an_image_that_came_to_both_queues_is_answered_once(stream, full_turns, spin):
    full_turns(10, apart_s=0.05)
    stream.listeners(2)
    while stream.waiting():
        pass
    stream.publish(image(100))
    first, second = stream.made._queue, stream.made._next_queue
    for _ in range(6):
        stream.made._on_ready(first)
    before = stream.counted()
    assert stream.waiting() == 100
    stream.made._on_ready(second)
    assert stream.waiting() is None and stream.counted() == before
    stream.made._on_ready(first)
    assert stream.counted() == before, 'an executor that saw an image before the queue was closed comes for it'
    stream.publish(image(101))
    stream.ready()
    assert stream.waiting() == 101 and stream.counted().pushed_out == before.pushed_out


def test_an_image_that_the_middleware_delivers_twice_is_answered_once(stream, monkeypatch):
    """As Fast DDS did once, of a publisher that it had just matched; seen by its publication sequence number."""
    take_new, infos = stream.made._rcl.take_new, []

    def numbered_as_before(*arguments):
        if (taken := take_new(*arguments)) is None:
            return None
        infos.append(taken[1])
        return taken[0], infos[0]

    stream.publish(image(1))
    with monkeypatch.context() as patched:
        patched.setattr(stream.made._rcl, 'take_new', numbered_as_before)
        stream.ready()
        stream.publish(image(1))
        stream.ready()
    assert len(infos) == 2 and stream.counted().received == 1
    assert stream.waiting() == 1 and stream.waiting() is None
    stream.publish(image(2))
    stream.ready()
    assert stream.waiting() == 2


@pytest.mark.parametrize('stream', [{'depth': 7}, {'history': 'keep_all'}], indirect=True, ids=str)
def test_a_queue_that_was_asked_for_stays(stream, full_turns):
    full_turns(10, apart_s=0.05)
    assert stream.overruns == [(TOPIC, queue_depth(stream.made.qos), False)]
    assert queue_depth(stream.made.qos) in ('7', 'all') and stream.made._next_queue is None
    stream.listeners(1)


@pytest.mark.parametrize('stream', [{'depth': 1}], indirect=True, ids=str)
def test_a_queue_of_one_does_not_overrun(stream, full_turns):
    """Of those that pushed one another out, the newest is taken."""
    full_turns(20, apart_s=0.05)
    assert stream.overruns == []


@pytest.mark.parametrize('stream', [{'history': 'keep_all', 'depth': 1}], indirect=True, ids=str)
def test_a_queue_that_keeps_all_overruns_whatever_its_depth(stream, full_turns):
    full_turns(10, apart_s=0.05)
    assert stream.overruns == [(TOPIC, 'all', False)]


def test_a_stream_that_is_closed_leaves_neither_queue(stream, full_turns):
    full_turns(10, apart_s=0.05)
    stream.listeners(2)
    opened = stream.made._next_queue
    stream.made.close()
    stream.listeners(0)
    stream.made._on_ready(opened)
    stream.made._next_queue = None
    stream.made._keep_the_newest_alone()
    assert stream.made._next_queue is None
    assert list(stream.node.subscriptions) == stream.waitables() == []


def test_a_stream_opened_anew_goes_on_counting(stream, full_turns):
    full_turns(1, apart_s=0.1)
    for number in range(50, 60):
        stream.publish(image(number))
    stream.ready()
    before = stream.counted()
    assert before.pushed_out == 5 and before.lost == 0
    stream.made.close()
    for _ in range(2):
        unused = stream.open()
        unused.count_missed()
        assert (stream.counted().pushed_out, stream.counted().lost) == (5, 0), 'nothing came, and nothing is forgotten'
        unused.close()
    again = stream.open()
    stream.listeners(1)
    stream.publish(image(60))
    again._on_ready(again._queue)
    assert stream.counted().pushed_out == 5 and stream.counted().lost == 0
    for number in range(61, 70):
        stream.publish(image(number))
    again._on_ready(again._queue)
    assert stream.counted().pushed_out == 5 + 4
    again.close()


def test_a_loss_is_recent_until_there_is_another(stream, monkeypatch):
    lost = [0]
    monkeypatch.setattr(MessagesLost, 'total', property(lambda self: lost[0]))
    stream.made.count_missed()
    assert stream.made.last_lost_ns is None
    lost[0] = 3
    stream.made.count_missed()
    when = stream.made.last_lost_ns
    assert when is not None and stream.counted().lost == 3
    stream.made.count_missed()
    assert stream.made.last_lost_ns == when
    lost[0] = 5
    stream.made.close()
    assert stream.counted().lost == 5 and stream.made.last_lost_ns > when


def test_where_the_middleware_does_not_count_losses_a_gap_is_one_and_no_alert(stream, monkeypatch):
    """It may as well be what the queue pushed out."""
    monkeypatch.setattr(MessagesLost, 'total', None)
    for number in range(1, 8):
        stream.publish(image(number))
    stream.ready()
    stream.ready()
    counted = stream.counted()
    assert (counted.lost, counted.pushed_out, stream.made.last_lost_ns) == (0, None, None)
    for number in range(8, 18):
        stream.publish(image(number))
    stream.ready()
    assert stream.counted().lost > 0 and stream.made.last_lost_ns is None


def test_what_could_not_be_told_stays_unknown_when_the_stream_is_opened_anew(stream, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(MessagesLost, 'total', None)
        stream.publish(image(1))
        stream.ready()
        assert (stream.counted().lost, stream.counted().pushed_out) == (0, None)
        stream.made.close()
    again = stream.open()
    stream.listeners(1)
    stream.publish(image(2))
    again._on_ready(again._queue)
    assert (stream.counted().lost, stream.counted().pushed_out) == (0, None)
    again.close()


def test_a_queue_that_cannot_be_opened_leaves_no_subscription(stream, full_turns, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError('no memory')

    with monkeypatch.context() as patched:
        patched.setattr(image_subscription, 'SubscriptionReady', refuse)
        with pytest.raises(RuntimeError):
            full_turns(10, apart_s=0.05)
    stream.listeners(1)
    assert len(list(stream.node.subscriptions)) == 1 and len(stream.waitables()) == 2
    full_turns(10, apart_s=0.05)
    stream.listeners(2)


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
