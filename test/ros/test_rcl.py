"""Messages taken and published through rcl itself: the same as through rclpy, in memory kept as long as needed."""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import struct
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import rclpy
from gps_denied_c7_msgs.msg import Tensor, TensorList
from rclpy.exceptions import InvalidHandle
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import String

from gps_denied_c7.ros import c_message
from gps_denied_c7.ros import rcl as rcl_module
from gps_denied_c7.ros.c_message import LayoutError
from gps_denied_c7.ros.callbacks import SubscriptionReady, Untaken
from gps_denied_c7.ros.rcl import Rcl, RclError, UnreadableMessageError, load_rcl
from support.harness import active_node, image, tensor, wait_until
from support.networks import copying

TOPIC = '/camera/image_raw'
RELIABLE = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE)


@pytest.fixture(scope='module')
def rcl():
    return Rcl(Image, CompressedImage, Tensor, TensorList)


@pytest.fixture
def node(ros_context):
    made = rclpy.create_node('rcl_under_test', context=ros_context, start_parameter_services=False)
    yield made
    made.destroy_node()


def matched(node, message_type):
    """A publisher and a subscription of which no executor takes."""
    group = Untaken()
    subscription = node.create_subscription(message_type, TOPIC, lambda message: None, RELIABLE, callback_group=group)
    publisher = node.create_publisher(message_type, TOPIC, RELIABLE)
    wait_until(lambda: publisher.get_subscription_count() == 1, 'a match')
    return publisher, subscription


@pytest.fixture
def ends(node):
    return matched(node, Image)


def numbered(number, size=64):
    return image(number, width=size, height=size, step=size, data=bytes([number % 256]) * size * size)


def taken(rcl, subscription, message_type=Image):
    message, info = wait_until(lambda: rcl.take_new(subscription, message_type), 'a message')
    return message, message.view('data'), info


def whole(message, data):
    """The message as rclpy has it, whose data the view shows."""
    found = message.message()
    assert data.readonly and bytes(data) == bytes(found.data)
    return found


def test_what_rclpy_publishes_is_taken_field_by_field(rcl, ends):
    publisher, subscription = ends
    for number, size in ((1, 64), (2, 640), (3, 16)):
        publisher.publish(numbered(number, size))
        message, data, info = taken(rcl, subscription)
        assert whole(message, data) == numbered(number, size)
        assert info['publication_sequence_number'] == number


def test_a_message_without_data_is_taken(rcl, node):
    publisher, subscription = matched(node, CompressedImage)
    for content in (b'', b'abc', b''):
        publisher.publish(CompressedImage(format='png', data=content))
        message, data, _ = taken(rcl, subscription, CompressedImage)
        assert message.fields.format.text() == 'png' and bytes(data) == content and data.readonly


def test_what_is_published_arrives_in_rclpy(rcl, ends):
    publisher, subscription = ends
    for number in (1, 2):
        message = rcl.message(Image)
        message.assign(numbered(number, 640))
        rcl.publish(publisher, message)
        message.fields.width = 0
        ctypes.memset(message.fields.data.data, 0, message.fields.data.size)
        arrived, _ = wait_until(lambda: subscription.handle.take_message(Image, False), 'a message')
        assert arrived == numbered(number, 640), 'the message was free again when publish returned'


def test_a_borrowed_message_is_empty_until_it_is_filled(rcl, node):
    publisher, subscription = matched(node, TensorList)
    message = rcl.borrowed(TensorList)
    text = ctypes.create_string_buffer('Grüße'.encode())
    for topic in ('', 'Grüße', ''):
        if topic:
            message.fields.source_topic = c_message.CString.of(text)
        rcl.publish(publisher, message)
        arrived, _ = wait_until(lambda: subscription.handle.take_message(TensorList, False), 'a message')
        assert arrived == TensorList(source_topic=topic)
        message = rcl.borrowed(TensorList)


def test_text_that_is_no_utf8_is_read_as_rclpy_reads_it(rcl, ends):
    publisher, subscription = ends
    sent = bytes(serialize_message(image(1, encoding='mono8')))
    assert sent.count(b'mono8') == 1
    publisher.publish(sent.replace(b'mono8', b'm\xff\xc3o8'))
    message, _, _ = taken(rcl, subscription)
    assert message.fields.encoding.text() == message.message().encoding != 'mono8'


def test_messages_in_a_sequence_are_taken_as_structures(rcl, node):
    publisher, subscription = matched(node, TensorList)
    message = rcl.message(TensorList)
    for names in (['a', 'bc'], [], ['d']):
        publisher.publish(TensorList(tensors=[Tensor(name=name, data=name.encode()) for name in names]))
        wait_until(lambda: rcl.take(subscription, message), 'a message')
        found = [ctypes.string_at(each.name.data).decode() for each in rcl.elements(Tensor, message.fields.tensors)]
        assert found == names


def test_no_message_is_none(rcl, ends):
    assert rcl.take_new(ends[1], Image) is None


@pytest.mark.parametrize(
    'broken',
    [
        lambda intact: intact[:30],
        lambda intact: intact[:-10],
        lambda intact: intact.replace(struct.pack('<I', 64 * 64), struct.pack('<I', 2**31)),
        lambda intact: b'\xff' * 99,
        lambda intact: b'\0\1\0\0' + b'\xff' * 99,
    ],
    ids=['cut in its head', 'cut in its data', 'size of data', 'no CDR', 'other CDR'],
)
def test_n7_bytes_that_are_no_image_are_told_and_the_next_is_taken(rcl, ends, broken):
    publisher, subscription = ends
    intact = bytes(serialize_message(numbered(1)))
    assert broken(intact) != intact
    for number in (2, 4):
        publisher.publish(broken(intact))
        with pytest.raises(UnreadableMessageError, match=rf'a message of {TOPIC} cannot be read: .'):
            taken(rcl, subscription)
        assert rcl.take_new(subscription, Image) is None, 'it is told once'
        publisher.publish(numbered(number))
        message, data, info = taken(rcl, subscription)
        assert whole(message, data) == numbered(number) and info['publication_sequence_number'] == number
    # One that stands before a whole one is passed over with it, and leaves nothing to be told later.
    publisher.publish(broken(intact))
    publisher.publish(intact)
    assert taken(rcl, subscription)[2]['publication_sequence_number'] == 6
    assert rcl.take_new(subscription, Image) is None


def test_what_rclpy_could_not_read_is_not_told_of_another_topic(rcl, ends, node):
    other = node.create_subscription(String, '/text', lambda message: None, RELIABLE)
    publisher = node.create_publisher(String, '/text', RELIABLE)
    wait_until(lambda: publisher.get_subscription_count() == 1, 'a match')
    publisher.publish(bytes(serialize_message(String(data='some text')))[:12])
    for _ in range(100):
        assert other.handle.take_message(String, False) is None
        if rcl._error_is_set():
            break
        time.sleep(0.01)
    assert rcl._error_is_set(), 'rclpy leaves it'
    assert rcl.take_new(ends[1], Image) is None


def test_a_number_that_the_middleware_does_not_know_is_none(rcl, ends, monkeypatch):
    def take(subscription, message, info, allocation):
        info.publication_sequence_number = 2**64 - 1
        return 0

    monkeypatch.setattr(rcl, '_take', take)
    assert rcl.take(ends[1], rcl.message(Image))['publication_sequence_number'] is None


def big_endian(message):
    """The message as rosbags writes it in the other byte order."""
    fields = {name: getattr(message, name) for name in message.get_fields_and_field_types()}
    fields['data'] = np.frombuffer(message.data, np.uint8)
    store = get_typestore(Stores.ROS2_JAZZY)
    name = f'sensor_msgs/msg/{type(message).__name__}'
    return bytes(store.serialize_cdr(store.types[name](**fields), name, little_endian=False))


def test_a_message_in_another_byte_order_is_taken(rcl, ends):
    publisher, subscription = ends
    sent = big_endian(numbered(7))
    assert sent[:2] == b'\0\0'
    publisher.publish(sent)
    message, data, _ = taken(rcl, subscription)
    assert whole(message, data) == numbered(7)


def test_publishers_are_told_apart(rcl, ends, node):
    publisher, subscription = ends
    second = node.create_publisher(Image, TOPIC, RELIABLE)
    wait_until(lambda: second.get_subscription_count() == 1, 'the second to match')
    found = {}
    for number in range(1, 4):
        for name, each in (('first', publisher), ('second', second)):
            each.publish(numbered(number))
            *_, info = taken(rcl, subscription)
            assert info['publication_sequence_number'] == number
            found.setdefault(name, set()).add(info['publisher_gid']['data'])
    (first,), (other,) = found.values()
    assert first != other


def address(data):
    return np.frombuffer(data, np.uint8).ctypes.data


@pytest.fixture
def freed(rcl, monkeypatch):
    """Addresses of the images that were freed."""
    kind, found = rcl._kinds[Image], []
    destroy = kind.destroy
    monkeypatch.setattr(kind, 'destroy', lambda address: (found.append(address), destroy(address)))
    return found


def test_an_image_is_kept_as_long_as_a_part_of_it_is_looked_at(rcl, ends, freed):
    publisher, subscription = ends
    kept, starts = [], set()
    for number in range(1, 9):
        publisher.publish(numbered(number))
        data = taken(rcl, subscription)[1]
        starts.add(address(data))
        kept.append(data[-64:])
        del data
    gc.collect()
    assert len(starts) == 8 and not freed
    for number, part in enumerate(kept, 1):
        assert bytes(part) == bytes([number]) * 64
    del part
    for count in range(1, 9):
        kept.pop()
        assert len(freed) == count, 'at once: what is let go takes the next image'


def test_an_image_in_a_cycle_of_references_is_freed_once(rcl, ends, freed):
    publisher, subscription = ends
    for _ in range(3):
        publisher.publish(numbered(7))
        cycle = list(taken(rcl, subscription))
        cycle.append(cycle)
        del cycle
        gc.collect()
    assert len(freed) == 3
    publisher.publish(numbered(8))
    message, data, _ = taken(rcl, subscription)
    assert whole(message, data) == numbered(8)


def test_a_failure_of_rcl_is_told_in_its_own_words(rcl):
    gone = SimpleNamespace(handle=nullcontext(), topic=TOPIC)
    gone.handle.pointer = None
    # Twice, since rcl would complain about a text that is overwritten.
    for _ in range(2):
        with pytest.raises(RclError, match=rf'rcl returned \d+ for a message on {TOPIC}: publisher pointer'):
            rcl.publish(gone, rcl.message(Image))
    assert b'not set' in rcl._error().str
    with pytest.raises(RclError, match=rf'rcl returned \d+ for a message of {TOPIC}: subscription pointer') as caught:
        rcl.take(gone, rcl.message(Image))
    assert not isinstance(caught.value, UnreadableMessageError)


def test_a_closed_subscription_is_no_longer_taken_of(rcl, ends, node):
    _, subscription = ends
    node.destroy_subscription(subscription)
    with pytest.raises(InvalidHandle):
        rcl.take_new(subscription, Image)


def test_a_closed_publisher_is_no_longer_published_on(rcl, ends, node):
    publisher, _ = ends
    node.destroy_publisher(publisher)
    with pytest.raises(InvalidHandle):
        rcl.publish(publisher, rcl.message(Image))


def test_an_executor_calls_back_and_takes_nothing_itself(rcl, ends, node, ros_context):
    publisher, subscription = ends
    numbers = []
    ready = SubscriptionReady(
        node,
        subscription,
        node.default_callback_group,
        lambda: numbers.append(rcl.take_new(subscription, Image)[0].message().header.stamp.sec),
    )
    executor = SingleThreadedExecutor(context=ros_context)
    executor.add_node(node)
    for number in range(1, 6):
        publisher.publish(numbered(number))
    while len(numbers) < 5:
        executor.spin_once(timeout_sec=5.0)
    assert numbers == [1, 2, 3, 4, 5]
    ready.close()
    publisher.publish(numbered(6))
    executor.spin_once(timeout_sec=0.2)
    assert len(numbers) == 5
    message, data, _ = taken(rcl, subscription)
    assert whole(message, data) == numbered(6)
    executor.shutdown()


def test_an_executor_goes_on_where_the_subscription_went_first(ends, node, ros_context):
    """rclpy asks whoever it could not enter to add itself to the wait set all the same."""
    _, subscription = ends
    called = []
    ready = SubscriptionReady(node, subscription, node.default_callback_group, lambda: called.append(1))
    executor = SingleThreadedExecutor(context=ros_context)
    executor.add_node(node)
    timers = []
    timer = node.create_timer(0.01, lambda: timers.append(1))
    node.destroy_subscription(subscription)
    while len(timers) < 3:
        executor.spin_once(timeout_sec=5.0)
    assert not called
    ready.close()
    timer.destroy()
    executor.shutdown()


def other_layout(monkeypatch):
    c_message._structure.cache_clear()
    monkeypatch.setitem(c_message._BASIC, 'uint32', ctypes.c_uint64)


def other_library(monkeypatch):
    monkeypatch.setattr(rcl_module, '_LIBRARIES', ('no_such_rcl', 'rcutils'))


def other_functions(monkeypatch):
    monkeypatch.setattr(rcl_module, '_LIBRARIES', ('rcutils', 'rcl'))


@pytest.mark.parametrize(
    ('break_it', 'error', 'word'),
    [
        (other_layout, LayoutError, 'Image.header.stamp.nanosec is not where'),
        (other_library, RclError, 'no_such_rcl'),
        (other_functions, RclError, 'undefined symbol'),
    ],
)
def test_where_rcl_cannot_be_called_rclpy_does_it(break_it, error, word, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    break_it(monkeypatch)
    try:
        with pytest.raises(error, match=word):
            Rcl(Image)
        assert load_rcl(Image) is None
        assert 'rclpy copies them once more' in caplog.text and word in caplog.text
    finally:
        c_message._structure.cache_clear()


@pytest.mark.parametrize('direct', [True, False])
def test_the_node_answers_with_and_without(direct, ros_context, near_peer, tmp_path, monkeypatch):
    if not direct:
        monkeypatch.setattr('gps_denied_c7.ros.node.load_rcl', lambda *message_types: None)
    with active_node(ros_context, TOPIC, copying(tmp_path)) as local:
        near_peer.wait_matched(TOPIC)
        for number in (1, 2, 3):
            question = image(number)
            answer = near_peer.ask(TOPIC, question)
            assert answer.header == question.header
            np.testing.assert_allclose(tensor(answer, 'copy').ravel(), question.data, atol=1e-4)
        wait_until(lambda: near_peer.values(f'Stream {TOPIC}').get('lost_before_node') == '0', 'loss to be known')
        second = near_peer.node.create_publisher(Image, TOPIC, RELIABLE)
        wait_until(lambda: second.get_subscription_count() == 1, 'the second publisher to match')
        second.publish(image(4))
        # Kilted's rclpy says who sent a message, Jazzy's does not.
        info = getattr(importlib.import_module('rclpy.subscription'), 'MessageInfo', None)
        told_apart = direct or 'publisher_gid' in getattr(info, '__annotations__', ())
        pushed_out = '0' if told_apart else 'unknown'
        expected = {'received': '4', 'lost_before_node': '0', 'dropped_in_queue': pushed_out}
        near_peer.wait_values(f'Stream {TOPIC}', expected)
        near_peer.node.destroy_publisher(second)
        # Both ways end with the streams, and begin anew.
        stream = local.streams.stream(TOPIC)
        assert local.node.transition('deactivate')
        if direct:
            # An executor that saw a message before the stream was closed comes for it afterwards.
            stream._on_ready(stream._queue)
        assert local.node.transition('activate')
        near_peer.wait_matched(TOPIC)
        assert near_peer.ask(TOPIC, image(5)).header.frame_id == 'camera 5'
