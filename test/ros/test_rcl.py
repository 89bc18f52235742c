"""Messages taken and published through rcl itself: the same as through rclpy, in buffers kept as long as needed."""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import rclpy
from harness import LocalNode, image, tensor, wait_until
from networks import copying
from rclpy.exceptions import InvalidHandle
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import Image

from gps_denied_c7.ros import rcl as rcl_module
from gps_denied_c7.ros.rcl import BufferPool, Rcl, RclError, SubscriptionReady, Untaken, load_rcl

TOPIC = '/camera/image_raw'
RELIABLE = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE)


@pytest.fixture
def rcl():
    return Rcl()


@pytest.fixture
def node(ros_context):
    made = rclpy.create_node('rcl_under_test', context=ros_context, start_parameter_services=False)
    yield made
    made.destroy_node()


@pytest.fixture
def ends(node):
    """A matched publisher and a subscription of which no executor takes."""
    group = Untaken()
    subscription = node.create_subscription(Image, TOPIC, lambda message: None, RELIABLE, callback_group=group)
    publisher = node.create_publisher(Image, TOPIC, RELIABLE)
    wait_until(lambda: publisher.get_subscription_count() == 1, 'a match')
    return publisher, subscription


def numbered(number, size=64):
    return image(number, width=size, height=size, step=size, data=bytes([number % 256]) * size * size)


def taken(pool, subscription):
    return wait_until(lambda: pool.take(subscription), 'a message')


def test_what_rclpy_publishes_is_taken_byte_for_byte(rcl, ends):
    publisher, subscription = ends
    pool = BufferPool(rcl)
    for number, size in ((1, 64), (2, 640), (3, 16)):
        publisher.publish(numbered(number, size))
        message, info = taken(pool, subscription)
        assert message.readonly and deserialize_message(bytes(message), Image) == numbered(number, size)
        assert info['publication_sequence_number'] == number


def test_what_is_published_arrives_in_rclpy(rcl, ends):
    publisher, subscription = ends
    for number in (1, 2):
        message = bytearray(serialize_message(numbered(number, 640)))
        rcl.publish(publisher, memoryview(message))
        message[:] = bytes(len(message))
        arrived, _ = wait_until(lambda: subscription.handle.take_message(Image, False), 'a message')
        assert arrived == numbered(number, 640), 'the bytes were free again when publish returned'


def test_no_message_is_none(rcl, ends):
    assert BufferPool(rcl).take(ends[1]) is None


def test_publishers_are_told_apart(rcl, ends, node):
    publisher, subscription = ends
    second = node.create_publisher(Image, TOPIC, RELIABLE)
    wait_until(lambda: second.get_subscription_count() == 1, 'the second to match')
    pool = BufferPool(rcl)
    found = {}
    for number in range(1, 4):
        for name, each in (('first', publisher), ('second', second)):
            each.publish(numbered(number))
            _, info = taken(pool, subscription)
            assert info['publication_sequence_number'] == number
            found.setdefault(name, set()).add(info['publisher_gid']['data'])
    (first,), (other,) = found.values()
    assert first != other


def address(message):
    return np.frombuffer(message, np.uint8).ctypes.data


def test_a_buffer_is_used_again_only_once_nothing_looks_at_its_message(rcl, ends):
    publisher, subscription = ends
    pool = BufferPool(rcl)
    kept, starts = [], set()
    for number in range(1, 9):
        publisher.publish(numbered(number))
        message, _ = taken(pool, subscription)
        starts.add(address(message))
        # A part of it keeps all of it.
        kept.append(message[-64:])
        del message
    assert len(starts) == 8 and not pool._free
    for number, part in enumerate(kept, 1):
        assert bytes(part) == bytes([number]) * 64
    del part, kept
    assert len(pool._free) == 3, 'the others are freed'
    assert {array.buffer for array in pool._free} < starts
    expected = pool._free[-1].buffer
    publisher.publish(numbered(9))
    message, _ = taken(pool, subscription)
    assert address(message) == expected and len(pool._free) == 2


def test_one_buffer_is_enough_for_messages_that_are_let_go(rcl, ends):
    publisher, subscription = ends
    pool = BufferPool(rcl)
    starts = set()
    for number in range(50):
        publisher.publish(numbered(number))
        starts.add(address(taken(pool, subscription)[0]))
    assert len(starts) == 1 and len(pool._free) == 1


def test_a_closed_pool_keeps_nothing(rcl, ends, monkeypatch):
    publisher, subscription = ends
    finalised = []
    monkeypatch.setattr(rcl, 'finalise', lambda array: finalised.append(array.buffer))
    pool = BufferPool(rcl)
    for number in (1, 2):
        publisher.publish(numbered(number))
    first, second = taken(pool, subscription)[0], taken(pool, subscription)[0]
    starts = [address(first), address(second)]
    del first
    pool.close()
    assert finalised == starts[:1], 'the other one is still looked at'
    assert deserialize_message(bytes(second), Image) == numbered(2)
    del second
    assert finalised == starts and not pool._free


def test_a_buffer_outlives_its_pool(rcl, ends):
    publisher, subscription = ends
    publisher.publish(numbered(7))
    message, _ = taken(BufferPool(rcl), subscription)
    gc.collect()
    assert deserialize_message(bytes(message), Image) == numbered(7)


def test_an_empty_message_is_an_empty_view(rcl, ends, monkeypatch):
    """Whether a middleware delivers one or not: no buffer begins without memory."""
    monkeypatch.setattr(rcl, '_take', lambda *arguments: 0)
    message, _ = BufferPool(rcl).take(ends[1])
    assert message.nbytes == 0 and message.readonly


def test_a_failure_of_rcl_is_told_in_its_own_words(rcl):
    gone = SimpleNamespace(handle=nullcontext(), topic=TOPIC)
    gone.handle.pointer = None
    message = memoryview(bytearray(serialize_message(numbered(1))))
    # Twice, since rcl would complain about a text that is overwritten.
    for _ in range(2):
        with pytest.raises(RclError, match=rf'rcl returned \d+ for a message on {TOPIC}: publisher pointer'):
            rcl.publish(gone, message)
    assert b'not set' in rcl._error().str


def test_a_closed_subscription_is_no_longer_taken_of(rcl, ends, node):
    _, subscription = ends
    node.destroy_subscription(subscription)
    with pytest.raises(InvalidHandle):
        BufferPool(rcl).take(subscription)


def test_an_executor_calls_back_and_takes_nothing_itself(rcl, ends, node, ros_context):
    publisher, subscription = ends
    pool = BufferPool(rcl)
    numbers = []

    def on_ready():
        message, _ = pool.take(subscription)
        numbers.append(deserialize_message(bytes(message), Image).header.stamp.sec)

    ready = SubscriptionReady(node, subscription, node.default_callback_group, on_ready)
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
    message, _ = taken(pool, subscription)
    assert deserialize_message(bytes(message), Image) == numbered(6)
    executor.shutdown()


def test_an_executor_goes_on_where_the_subscription_went_first(ends, node, ros_context):
    """rclpy asks whoever it could not enter to add itself to the wait set all the same."""
    publisher, subscription = ends
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
    fields = [*rcl_module._Uint8Array._fields_]
    fields[1], fields[2] = fields[2], fields[1]
    swapped = type('Swapped', (ctypes.Structure,), {'_fields_': fields})
    monkeypatch.setattr(rcl_module, '_Uint8Array', swapped)


def other_library(monkeypatch):
    monkeypatch.setattr(rcl_module, '_LIBRARIES', ('no_such_rcl', 'rcutils'))


def other_functions(monkeypatch):
    monkeypatch.setattr(rcl_module, '_LIBRARIES', ('rcutils', 'rcl'))


@pytest.mark.parametrize(
    ('break_it', 'word'),
    [(other_layout, 'laid out'), (other_library, 'no_such_rcl'), (other_functions, 'undefined symbol')],
)
def test_where_rcl_cannot_be_called_rclpy_does_it(break_it, word, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    break_it(monkeypatch)
    with pytest.raises(RclError, match=word):
        Rcl()
    assert load_rcl() is None
    assert 'rclpy copies them once more' in caplog.text and word in caplog.text


@pytest.mark.parametrize('direct', [True, False])
def test_the_node_answers_with_and_without(direct, ros_context, near_peer, tmp_path, monkeypatch):
    if not direct:
        monkeypatch.setattr('gps_denied_c7.ros.node.load_rcl', lambda: None)
    local = LocalNode(
        ros_context,
        model_path=copying(tmp_path),
        cpu_threads=1,
        **{f'qos_overrides.{TOPIC}.subscription.reliability': 'reliable'},
    )
    try:
        assert local.node.transition('configure') and local.node.transition('activate')
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
        expected = {'received': '4', 'lost_before_node': '0' if told_apart else 'unknown'}
        wait_until(lambda: near_peer.values(f'Stream {TOPIC}').items() >= expected.items(), 'loss of two to be known')
        near_peer.node.destroy_publisher(second)
        # Both ways end with the streams, and begin anew.
        (stream,) = local.node._streams
        assert local.node.transition('deactivate')
        if direct:
            # An executor that saw a message before the stream was closed comes for it afterwards.
            stream._on_ready()
        assert local.node.transition('activate')
        near_peer.wait_matched(TOPIC)
        assert near_peer.ask(TOPIC, image(5)).header.frame_id == 'camera 5'
    finally:
        local.close()
