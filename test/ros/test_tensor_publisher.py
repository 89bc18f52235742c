"""§6, N-1: answers arrive as they were given, whichever way they leave, and only while the publisher is active."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from gps_denied_c7_msgs.msg import TensorList
from harness import image, tensor, wait_until
from rclpy.lifecycle import LifecycleNode
from rclpy.serialization import deserialize_message, serialize_message
from test_messages import result

from gps_denied_c7.ros.rcl import Rcl
from gps_denied_c7.ros.tensor_publisher import TensorPublisher


@pytest.fixture
def node(ros_context):
    made = LifecycleNode('tensor_publisher', context=ros_context)
    yield made
    made.destroy_node()


def as_message_objects(monkeypatch):
    """A middleware that ends its messages with padding."""
    monkeypatch.setattr('gps_denied_c7.ros.messages.serialize_message', lambda each: serialize_message(each) + bytes(4))
    return Rcl()


@pytest.fixture(
    params=[lambda patch: Rcl(), lambda patch: None, as_message_objects], ids=['rcl', 'rclpy', 'message objects']
)
def published(request, node, monkeypatch):
    """A lifecycle publisher, what publishes answers on it, and a way to have the next that arrived."""
    publisher = node.create_lifecycle_publisher(TensorList, 'tensors', 5)
    subscription = node.create_subscription(TensorList, 'tensors', lambda message: None, 5)
    wait_until(lambda: publisher.get_subscription_count() == 1, 'a match')

    def arrived():
        taken = subscription.handle.take_message(TensorList, False)
        return taken and taken[0]

    return publisher, TensorPublisher(publisher, request.param(monkeypatch)), arrived


def test_answers_of_any_size_arrive_as_they_were_given(published):
    publisher, answers, arrived = published
    publisher.on_activate(None)
    for number, size in ((1, 3), (2, 300_000), (3, 0), (4, 700_000)):
        outputs = {'x': np.arange(size, dtype=np.float32), 'none': np.zeros((0, 2), np.uint8)}
        answers.publish(result(image(number), outputs))
        message = wait_until(arrived, f'answer {number}')
        assert message.header == image(number).header and [each.name for each in message.tensors] == ['x', 'none']
        np.testing.assert_array_equal(tensor(message, 'x'), outputs['x'])


def test_outputs_that_nobody_asked_for_are_left_out(published):
    publisher, answers, arrived = published
    publisher.on_activate(None)
    answers.publish(result(image(1), {name: np.zeros(2, np.float32) for name in 'abc'}), {'c', 'a'})
    assert [each.name for each in wait_until(arrived, 'the answer').tensors] == ['a', 'c']


def test_n1_nothing_leaves_unless_the_publisher_is_active(published):
    publisher, answers, arrived = published
    answers.publish(result(image(1), {}))
    publisher.on_activate(None)
    answers.publish(result(image(2), {}))
    assert wait_until(arrived, 'the second').header.stamp.sec == 2
    publisher.on_deactivate(None)
    answers.publish(result(image(3), {}))
    publisher.on_activate(None)
    answers.publish(result(image(4), {}))
    assert wait_until(arrived, 'the fourth').header.stamp.sec == 4
    assert arrived() is None


def test_answers_of_two_threads_do_not_mix(node):
    """One whose engine hung until after the node was activated again publishes beside the new one."""
    publisher = node.create_lifecycle_publisher(TensorList, 'tensors', 5)
    publisher.on_activate(None)
    first_is_leaving, sent = threading.Event(), []

    class Slow:
        def publish(self, publisher, message):
            first_is_leaving.set()
            time.sleep(0.05)
            sent.append(deserialize_message(bytes(message), TensorList).header.stamp.sec)

    answers = TensorPublisher(publisher, Slow())
    first = threading.Thread(target=answers.publish, args=(result(image(1), {}),))
    first.start()
    assert first_is_leaving.wait(5.0)
    answers.publish(result(image(2), {}))
    first.join()
    assert sent == [1, 2]
