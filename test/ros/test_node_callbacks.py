"""N-5: whatever a callback raises, the node stays active, counts it, records it and goes on answering."""

from __future__ import annotations

import pytest
import rclpy
from lifecycle_msgs.srv import GetState
from rcl_interfaces.msg import Parameter as ParameterMsg
from rcl_interfaces.srv import SetParameters, SetParametersAtomically
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image

from gps_denied_c7.monitoring.thermal import UnknownThermalState
from support.harness import LocalNode, image, wait_until
from support.networks import copying

CAMERA = '/camera/image_raw'
RELIABLE = {f'qos_overrides.{CAMERA}.subscription.reliability': 'reliable'}


class Boom(Exception):
    """What the broken callbacks raise."""


def boom(*args, **kwargs):
    raise Boom('out of a callback')


class FragileThermal(UnknownThermalState):
    """A thermal source whose reader raises while it is told to."""

    broken = False

    def thermal_state(self):
        if self.broken:
            boom()
        return super().thermal_state()


@pytest.fixture
def thermal():
    return FragileThermal()


@pytest.fixture
def peer(near_peer):
    return near_peer


@pytest.fixture
def local(ros_context, tmp_path, thermal):
    node = LocalNode(
        ros_context, thermal=thermal, model_path=copying(tmp_path), cpu_threads=1, use_sim_time=True, **RELIABLE,
        # No callback of these is in a worker.
        isolation='none',
    )  # fmt: skip
    assert node.node.transition('configure') and node.node.transition('activate')
    yield node
    node.close()


@pytest.fixture
def active(local, peer):
    """The active node's peer; at the end the node is still active and answers."""
    peer.wait_matched(CAMERA)
    assert peer.ask(CAMERA, image(1))
    yield peer
    assert peer.state() == 'active'
    assert peer.ask(CAMERA, image(2)).header.stamp.sec == 2


def recorded(peer, callback):
    return [record for record in peer.payloads('c7.callback_failed') if record['callback'] == callback]


def counted(peer, callback):
    """Wait until the failure is on diagnostics and in the flight record."""
    value = wait_until(lambda: peer.values('Runtime').get(f'failures in {callback}'), f'{callback} on diagnostics')
    wait_until(lambda: recorded(peer, callback), f'{callback} recorded')
    assert all('Boom' in record['error'] for record in peer.payloads('c7.callback_failed'))
    return int(value)


def test_n5_image_callback(active, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr('gps_denied_c7.ros.image_subscription.check_message', boom)
        for number in range(3):
            active.publisher(CAMERA).publish(image(10 + number))
        wait_until(lambda: active.values('Runtime').get(f'failures in image callback {CAMERA}') == '3', 'all three')
    counted(active, f'image callback {CAMERA}')
    assert len(active.payloads('c7.callback_failed')) == 1, 'a repeating kind is merged'


def test_n5_diagnostics_timer(active, thermal):
    thermal.broken = True
    wait_until(lambda: recorded(active, 'diagnostics timer'), 'the timer, not only a change of level, to fail')
    thermal.broken = False
    counted(active, 'diagnostics timer')
    active.wait_level('Runtime', 'WARN')


def test_n5_publishing_a_change_of_level(active, local, thermal):
    thermal.broken = True
    assert local.node.transition('deactivate'), 'a diagnostics failure must not fail a transition'
    thermal.broken = False
    counted(active, 'diagnostics')
    assert local.node.transition('activate')
    active.wait_matched(CAMERA)


def test_n5_lifecycle_service(active, local, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(local.node, '_state_machine', None)
        answer = active.call(GetState, 'get_state', GetState.Request())
    assert answer.current_state.label == '', 'answered, although with nothing'
    wait_until(lambda: 'failures in service get_state' in active.values('Runtime'), 'the service on diagnostics')
    assert active.state() == 'active'


def test_n5_parameter_service(active, local, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(local.node, 'get_parameter', boom)
        patch.setattr(local.node, 'describe_parameter', boom)
        with pytest.raises(IndexError):
            active.get_parameter('model_path')
    counted(active, 'service get_parameters')
    assert active.get_parameter('model_path').string_value.endswith('copying.onnx')


def test_n5_on_set_parameters_callback(active, local):
    """A broken one refuses, so that ros2 param set has an answer to show."""
    local.node._settings._apply, original = boom, local.node._settings._apply
    result = active.set_parameter('latency_warn_ms', 5.0)
    assert not result.successful and 'Boom' in result.reason
    counted(active, 'on-set-parameters callback')
    local.node._settings._apply = original
    assert active.set_parameter('latency_warn_ms', 5.0).successful


def test_n5_a_parameter_message_that_is_none(active):
    """Its type is no number of ParameterType, so that rclpy raises before any callback of ours."""
    broken = ParameterMsg(name='latency_warn_ms')
    broken.value.type = 99
    for service_type, service in (
        (SetParameters, 'set_parameters'),
        (SetParametersAtomically, 'set_parameters_atomically'),
    ):
        active.call(service_type, service, service_type.Request(parameters=[broken]))
        callback = f'failures in service {service}'
        wait_until(lambda callback=callback: callback in active.values('Runtime'), callback)


def test_n5_transition_callback(active, local, monkeypatch):
    assert local.node.transition('deactivate')
    with monkeypatch.context() as patch:
        patch.setattr('gps_denied_c7.ros.answering.ImageSubscription', boom)
        assert not active.change_state('activate')
    assert active.state() == 'inactive'
    counted(active, 'transition activate')
    assert active.change_state('activate')
    active.wait_matched(CAMERA)


def test_n5_subscription_event_callback(active, local, monkeypatch):
    """rclpy's own, which nothing wraps: it escapes to the spin loop, which goes on."""
    (subscription,) = [each for each in local.node.subscriptions if each.topic_name == CAMERA]
    for handler in subscription.event_handlers:
        monkeypatch.setattr(handler, 'callback', boom)
    active.node.create_publisher(Image, CAMERA, QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT))
    counted(active, 'executor')


def test_n5_publisher_event_callback(active, local, monkeypatch):
    (publisher,) = [each for each in local.node.publishers if each.topic_name.endswith('/tensors')]
    for handler in publisher.event_handlers:
        monkeypatch.setattr(handler, 'callback', boom)
    too_much = QoSProfile(depth=1, durability=rclpy.qos.DurabilityPolicy.TRANSIENT_LOCAL)
    active.node.create_subscription(type(active.tensors[0]), publisher.topic_name, print, too_much)
    counted(active, 'executor')


def test_n5_clock_callback(active, local, monkeypatch):
    """rclpy's own subscription, for simulated time."""
    (subscription,) = [each for each in local.node.subscriptions if each.topic_name == '/clock']
    monkeypatch.setattr(subscription, 'callback', boom)
    active.wait_matched('/clock', Clock)
    active.publisher('/clock', Clock).publish(Clock())
    counted(active, 'executor')


def test_n5_decoding_in_the_inference_thread(active, monkeypatch):
    """A frame that meets an unexpected error is counted as unanswered, never forgotten."""
    with monkeypatch.context() as patch:
        patch.setattr('gps_denied_c7.ros.messages.decode_image', boom)
        active.publisher(CAMERA).publish(image(10))
        wait_until(lambda: active.values(f'Stream {CAMERA}').get('unanswered') == '1', 'the frame to be counted')
    assert active.values(f'Stream {CAMERA}')['accepted'] == '2'


def test_n5_publishing_tensors(active, local, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(local.node._answers, 'publish', boom)
        active.publisher(CAMERA).publish(image(10))
        wait_until(lambda: active.values(f'Stream {CAMERA}').get('unanswered') == '1', 'the frame to be counted')


def test_n5_autostart(ros_context, peer, tmp_path, monkeypatch):
    """The thread survives an attempt that raises, and tries again."""
    local = LocalNode(ros_context, model_path=copying(tmp_path), cpu_threads=1, autostart=True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(local.node, 'trigger_configure', boom)
            local.node.begin()
            counted(peer, 'autostart')
        peer.wait_state('active')
    finally:
        local.close()
