"""The two ends of the benchmark: what the cameras send, and what the listener notes."""

from __future__ import annotations

import time

import pytest
import rclpy
from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from gps_denied_c7_msgs.msg import Tensor, TensorList
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import Image
from std_msgs.msg import Header

from gps_denied_c7.bench.camera import QOS, Cameras
from gps_denied_c7.bench.listener import Listener
from support.harness import wait_until


@pytest.fixture
def node(ros_context):
    made = rclpy.create_node('bench_ends', context=ros_context, start_parameter_services=False)
    yield made
    made.destroy_node()


def test_images_arrive_with_the_stamps_that_the_camera_returns(node):
    cameras = Cameras(node, {'one': ['/image']}, 32, 24, 'rgb8')
    subscription = node.create_subscription(Image, '/image', lambda message: None, QOS)
    assert cameras.wait_matched('one', 10.0)
    sent = cameras.send('one', 100.0, 0.05)
    arrived = [wait_until(lambda: subscription.handle.take_message(Image, False), 'an image')[0] for _ in sent]
    assert [image.header.stamp.sec * 10**9 + image.header.stamp.nanosec for image in arrived] == sent
    assert len(sent) == 5 and len({bytes(image.data) for image in arrived}) == 4, 'the fifth is the first again'
    assert {(image.width, image.height, image.encoding, image.step, len(image.data)) for image in arrived} == {
        (32, 24, 'rgb8', 96, 2304)
    }


def test_the_listener_notes_answers_and_diagnostics_by_contestant(node, ros_context):
    listener = Listener(node, ['a', 'b'])
    publishers = {name: node.create_publisher(TensorList, f'/{name}/tensors', 5) for name in 'ab'}
    diagnostics = node.create_publisher(DiagnosticArray, '/diagnostics', 5)
    for publisher in (*publishers.values(), diagnostics):
        wait_until(lambda publisher=publisher: publisher.get_subscription_count() == 1, 'a match')
    durations = {'queue_ns': 100, 'decode_ns': 101, 'preprocess_ns': 102, 'hand_off_ns': 103, 'engine_ns': 104}
    answer = TensorList(
        inference_ns=312,
        total_ns=700,
        header=Header(stamp=Time(sec=17, nanosec=5)),
        receive_stamp=Time(sec=17, nanosec=9),
        tensors=[Tensor(data=bytes(3)), Tensor(data=bytes(40))],
        **durations,
    )
    began_ns = time.time_ns()
    publishers['a'].publish(answer)
    publishers['b'].publish(TensorList())
    publishers['b'].publish(TensorList())
    status = DiagnosticStatus(name='/a: Runtime', values=[KeyValue(key='provider', value='CPU')])
    diagnostics.publish(DiagnosticArray(status=[status]))
    executor = SingleThreadedExecutor(context=ros_context)
    executor.add_node(node)
    found = {'a': [], 'b': []}
    while len(found['a']) < 1 or len(found['b']) < 2 or not listener.statuses('a'):
        executor.spin_once(timeout_sec=5.0)
        for name in found:
            found[name] += listener.collect(name)
    executor.shutdown()
    (first,) = found['a']
    second = 10**9
    assert began_ns < first.pop('arrival_ns') < time.time_ns()
    stages = {**durations, 'hand_back_ns': 105, 'total_ns': 700}
    assert first == {'stamp_ns': 17 * second + 5, 'receive_ns': 17 * second + 9, 'bytes': 43, **stages}
    assert [each['bytes'] for each in found['b']] == [0, 0]
    assert listener.statuses('a') == {'Runtime': {'provider': 'CPU'}} and not listener.statuses('b')
