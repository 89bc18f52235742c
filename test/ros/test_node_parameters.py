"""N-10 and §2's names over DDS: parameter files, remaps, namespaces, QoS overrides, and changes that take effect."""

from __future__ import annotations

import functools
import struct
import time

import pytest
import yaml
from builtin_interfaces.msg import Time
from rcl_interfaces.msg import ParameterType
from rcl_interfaces.srv import DescribeParameters, ListParameters
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from gps_denied_c7.monitoring.cpu_latency import CpuLatencyRequest
from gps_denied_c7.ros.image_subscription import ImageSubscription
from gps_denied_c7.ros.parameter_table import PARAMETERS
from support.harness import LocalNode, NodeProcess, Peer, free_domain_id, image, running_node, wait_until
from support.networks import copying

CAMERA = '/camera/image_raw'


@pytest.fixture(scope='module')
def module_peer(tmp_path_factory):
    """An active node with default settings, left active with them by every test that uses it."""
    model = copying(tmp_path_factory.mktemp('model'))
    with running_node({'model_path': model, 'autostart': True, 'cpu_threads': 1}) as (_, peer):
        peer.wait_state('active')
        peer.wait_matched(CAMERA)
        yield peer


@pytest.fixture
def active(module_peer):
    yield module_peer
    assert module_peer.state() == 'active'


def test_n10_every_parameter_is_listed_and_described(active):
    names = [declaration.name for declaration in PARAMETERS]
    listed = active.call(ListParameters, 'list_parameters', ListParameters.Request()).result.names
    assert set(names) <= set(listed)
    described = active.call(DescribeParameters, 'describe_parameters', DescribeParameters.Request(names=names))
    for descriptor, declaration in zip(described.descriptors, PARAMETERS, strict=True):
        assert descriptor.name == declaration.name
        assert descriptor.description and descriptor.type != ParameterType.PARAMETER_NOT_SET


def test_n10_a_latency_limit_takes_effect_at_once(active):
    assert active.ask(CAMERA, image())
    active.wait_level('Latency', 'OK')
    assert active.set_parameter('latency_warn_ms', 0.001).successful
    active.wait_level('Latency', 'WARN')
    assert active.set_parameter('latency_warn_ms', 0.0).successful
    active.wait_level('Latency', 'OK')


def test_n10_a_limit_on_stamps_from_the_future_takes_effect_at_once(active):
    ahead = image()
    ahead.header.stamp = Time(sec=int(time.time()) + 600)
    assert active.ask(CAMERA, ahead).header == ahead.header
    assert active.set_parameter('max_stamp_ahead_s', 60.0).successful
    active.publisher(CAMERA).publish(ahead)
    assert active.wait_record('c7.image_refused')['reason'] == 'stamp'
    assert active.set_parameter('max_stamp_ahead_s', 0.0).successful
    assert active.ask(CAMERA, ahead).header == ahead.header
    assert active.set_parameter('max_stamp_ahead_s', 3600.0).successful


def test_n10_what_is_not_live_is_refused_with_the_reason_while_active(active):
    for name, value in (
        ('image_topics', ['/other']), ('cpu_threads', 2),
        ('preprocess.resize', 'letterbox'), ('ort_disallow_cpu_fallback', True),
    ):  # fmt: skip
        refused = active.set_parameter(name, value)
        assert not refused.successful
        assert name in refused.reason and 'active' in refused.reason and 'cleanup' in refused.reason
    assert not active.set_parameter('autostart', False).successful
    assert active.get_parameter('model_path').string_value.endswith('copying.onnx')
    assert active.ask(CAMERA, image(2)).header.stamp.sec == 2


def test_n10_the_next_configure_takes_what_was_set_meanwhile(active):
    assert active.change_state('deactivate')
    refused = active.set_parameter('image_topics', ['/other'])
    assert not refused.successful and 'inactive' in refused.reason
    assert active.change_state('cleanup')
    assert active.set_parameter('image_topics', ['/other/image_raw']).successful
    assert active.set_parameter('preprocess.resize', 'letterbox').successful
    active.start()
    active.wait_matched('/other/image_raw')
    assert active.node.count_subscribers(CAMERA) == 0
    wide = image(3, width=256, height=48)
    answer = active.ask('/other/image_raw', wide)
    assert answer.source_topic == '/other/image_raw'
    assert answer.network_to_image[0] == answer.network_to_image[4] == 4.0, 'letterbox scales both axes alike'
    assert active.change_state('deactivate') and active.change_state('cleanup')
    assert active.set_parameter('image_topics', ['camera/image_raw']).successful
    assert active.set_parameter('preprocess.resize', '').successful
    active.start()
    active.wait_matched(CAMERA)
    answer = active.ask(CAMERA, wide)
    assert (answer.network_to_image[0], answer.network_to_image[4]) == (4.0, 1.0), 'the model stretches'


def test_a_parameter_file_namespace_name_remap_and_qos_override(tmp_path):
    """All of what a launch file hands over, on one node."""
    file = tmp_path / 'params.yaml'
    parameters = {
        'model_path': copying(tmp_path),
        'image_topics': ['image', 'front/image'],
        'autostart': True,
        'cpu_threads': 1,
        'qos_overrides': {'/drone/down': {'subscription': {'reliability': 'reliable', 'depth': 17}}},
    }
    file.write_text(yaml.safe_dump({'/**': {'ros__parameters': parameters}}))
    arguments = ('--params-file', str(file), '-r', '__ns:=/drone', '-r', '__node:=eye', '-r', 'image:=down')
    with running_node(arguments=arguments, node='/drone/eye') as (_, peer):
        peer.wait_state('active')
        assert peer.get_parameter('qos_overrides./drone/down.subscription.depth').integer_value == 17
        peer.wait_matched('/drone/down')
        assert peer.ask('/drone/down', image()).source_topic == '/drone/down'
        profiles = {
            topic: peer.node.get_subscriptions_info_by_topic(topic)[0].qos_profile
            for topic in ('/drone/down', '/drone/front/image')
        }
        assert profiles['/drone/down'].reliability == ReliabilityPolicy.RELIABLE
        assert profiles['/drone/front/image'].reliability == ReliabilityPolicy.BEST_EFFORT, 'an override of one alone'
        assert peer.get_parameter('qos_overrides./drone/front/image.subscription.depth').integer_value == 5
        peer.wait_record('c7.session_started')
        assert {record.node for record in peer.records} == {'/drone/eye'}
        # A second life keeps the overrides.
        assert peer.change_state('deactivate') and peer.change_state('activate')
        peer.wait_matched('/drone/down')
        info = peer.node.get_subscriptions_info_by_topic('/drone/down')
        assert [each.qos_profile.reliability for each in info] == [ReliabilityPolicy.RELIABLE]


def test_n10_wrong_start_values_keep_the_node_up(tmp_path):
    """Wrong types, wrong ranges, wrong names: told, and to be put right while it runs."""
    file = tmp_path / 'params.yaml'
    parameters = {
        'image_topics': 'camera/image_raw',
        'model_path': copying(tmp_path),
        'cpu_threads': 4096,
        'max_queue_age_ms': 'soon',
        'no_such_parameter': 1,
    }
    file.write_text(yaml.safe_dump({'/**': {'ros__parameters': parameters}}))
    with running_node(arguments=('--params-file', str(file))) as (process, peer):
        for name, right in (('image_topics', ['camera/image_raw']), ('cpu_threads', 1), ('max_queue_age_ms', 0.0)):
            assert not peer.change_state('configure')
            wait_until(lambda name=name: name in peer.message('Runtime'), f'{name} on diagnostics')
            assert peer.level('Runtime') == 'ERROR'
            assert f'{name}: the start value' in process.output()
            assert peer.set_parameter(name, right).successful
        peer.start()
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image())


def test_n10_a_qos_override_that_cannot_be_used_fails_activate(tmp_path):
    """The node stays up and names it; QoS parameters can be given at start only."""
    parameters = {'model_path': copying(tmp_path), f'qos_overrides.{CAMERA}.subscription.reliability': 'sometimes'}
    with running_node(parameters) as (_, peer):
        peer.start('inactive')
        assert not peer.change_state('activate')
        assert peer.state() == 'inactive'
        assert 'sometimes' in peer.wait_record('c7.start_failed')['reason']


def test_a_publisher_that_cannot_reach_the_node_is_named(tmp_path):
    """In log and diagnostics, instead of silence: QoS that does not match, and another type."""
    parameters = {
        'model_path': copying(tmp_path), 'autostart': True,
        'image_topics': ['camera/image_raw', 'front/compressed'], 'image_topic_types': ['auto', 'compressed'],
        f'qos_overrides.{CAMERA}.subscription.reliability': 'reliable',
    }  # fmt: skip
    with running_node(parameters) as (process, peer):
        peer.wait_state('active')
        best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
        deaf = peer.node.create_publisher(Image, CAMERA, best_effort)
        peer.wait_level(f'Stream {CAMERA}', 'ERROR')
        assert '/test_peer' in peer.message(f'Stream {CAMERA}')
        assert 'reliab' in peer.message(f'Stream {CAMERA}').lower()
        wait_until(lambda: f'{CAMERA}: /test_peer' in process.output(), 'the publisher named in the log')

        peer.node.create_publisher(Image, '/front/compressed', 1)
        peer.wait_level('Stream /front/compressed', 'ERROR')
        assert 'sensor_msgs/msg/Image' in peer.message('Stream /front/compressed')
        wait_until(lambda: '/front/compressed: /test_peer' in process.output(), 'the type named in the log')

        # The alert lasts as long as its cause.
        peer.node.destroy_publisher(deaf)
        wait_until(lambda: peer.level(f'Stream {CAMERA}') != 'ERROR', 'the alert to go')
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image())


def test_two_nodes_side_by_side(tmp_path):
    """In namespaces of their own, each with its camera, its record and its diagnostics."""
    model = copying(tmp_path)
    with free_domain_id() as domain_id:
        parameters = {'model_path': model, 'autostart': True, 'cpu_threads': 1}
        processes = [NodeProcess(domain_id, parameters, ('-r', f'__ns:=/{name}')) for name in ('front', 'down')]
        peers = [Peer(domain_id, f'/{name}/c7_inference') for name in ('front', 'down')]
        try:
            for peer, name in zip(peers, ('front', 'down'), strict=True):
                peer.wait_state('active')
                peer.wait_matched(f'/{name}/camera/image_raw')
            for number in range(1, 4):
                for peer, name in zip(peers, ('front', 'down'), strict=True):
                    answer = peer.ask(f'/{name}/camera/image_raw', image(number))
                    assert (answer.source_topic, answer.frame_seq) == (f'/{name}/camera/image_raw', number - 1)
            assert [len(peer.tensors) for peer in peers] == [3, 3]
            for peer in peers:
                peer.wait_level('Runtime', 'WARN')
                peer.wait_record('c7.cpu_fallback')
                assert {record.node for record in peer.records} == {peer.node_name}
            assert len({record.session_id for peer in peers for record in peer.records}) == 2
            assert peers[0].change_state('deactivate')
            assert (peers[0].state(), peers[1].state()) == ('inactive', 'active')
            assert peers[1].ask('/down/camera/image_raw', image(9))
        finally:
            for peer in peers:
                peer.close()
            for process in processes:
                process.close()


@pytest.fixture(scope='module')
def idle(tmp_path_factory):
    """A node that is left unconfigured by every test that uses it."""
    with running_node({'model_path': copying(tmp_path_factory.mktemp('model'))}) as (_, peer):
        yield peer
        assert peer.state() == 'unconfigured'


def refused_for(peer, topic, reason):
    """Have configure fail for a topic, and its reason on diagnostics."""
    assert peer.set_parameter('image_topics', [topic]).successful
    assert not peer.change_state('configure')
    wait_until(lambda: reason in peer.message('Runtime'), f'{reason} on diagnostics')
    assert peer.level('Runtime') == 'ERROR'


@pytest.mark.parametrize('topic', ['a//b', '{bogus}/image', 'x' * 300])
def test_n1_a_topic_that_cannot_be_resolved_is_named(idle, topic):
    refused_for(idle, topic, f"image_topics: '{topic}' cannot be resolved")


@pytest.mark.parametrize('topic', ['~/tensors', '/diagnostics', '/rosout'])
def test_n1_a_topic_of_the_node_itself_is_no_image_topic(idle, topic):
    """Refused with the reason on configure, where the middleware would say "invalid allocator" on every activate."""
    refused_for(idle, topic, topic.replace('~', idle.node_name))
    assert 'topics of this node itself' in idle.message('Runtime')


@pytest.fixture
def held(monkeypatch):
    """What the kernel was asked for, in turn; on other machines the device may not be written."""
    asked = []
    monkeypatch.setattr(CpuLatencyRequest, 'hold', lambda self, latency_us: asked.append(latency_us))
    monkeypatch.setattr(CpuLatencyRequest, 'drop', lambda self: asked.append(None))
    return asked


def test_cores_are_held_awake_while_the_node_is_active(ros_context, tmp_path, held, monkeypatch):
    local = LocalNode(
        ros_context,
        model_path=copying(tmp_path),
        image_topics=['/left', '/right'],
        cpu_threads=1,
        cpu_wakeup_latency_us=20,
        isolation='none',
    )
    try:
        assert local.node.transition('configure') and set(held) <= {None}
        assert local.node.transition('activate') and held[-1] == 20
        assert local.set('cpu_wakeup_latency_us', 5).successful and held[-1] == 5
        asked = len(held)
        assert local.set('latency_warn_ms', 7.0).successful and len(held) == asked
        assert local.set('cpu_wakeup_latency_us', -1).successful and held[-1] is None
        assert not local.set('cpu_wakeup_latency_us', -2).successful
        assert local.set('cpu_wakeup_latency_us', 0).successful and held[-1] == 0
        assert local.node.transition('deactivate') and held[-1] is None
        assert local.set('cpu_wakeup_latency_us', 30).successful and held[-1] is None
        assert local.node.transition('activate') and held[-1] == 30
        with monkeypatch.context() as patched:
            patched.setattr(ImageSubscription, 'close', lambda self: 1 / 0)
            local.node.transition('deactivate')
        assert held[-1] is None, 'whatever fails, and fails again in the error processing'
    finally:
        local.close()
    assert held[-1] is None


def test_cores_that_cannot_be_held_awake_are_a_notice_and_no_failure(ros_context, near_peer, tmp_path, monkeypatch):
    missing = functools.partialmethod(CpuLatencyRequest.__init__, tmp_path / 'missing')
    monkeypatch.setattr(CpuLatencyRequest, '__init__', missing)
    local = LocalNode(
        ros_context, model_path=copying(tmp_path), cpu_threads=1, cpu_wakeup_latency_us=20, isolation='none'
    )
    try:
        assert local.node.transition('configure') and local.node.transition('activate')
        wait_until(lambda: 'udev' in near_peer.values('Runtime').get('notice 1', ''), 'the remedy')
        (tmp_path / 'missing').write_bytes(b'')
        assert local.set('cpu_wakeup_latency_us', 20).successful, 'asked for again, once it may be'
        wait_until(lambda: 'notice 1' not in near_peer.values('Runtime'), 'the notice to end')
        assert (tmp_path / 'missing').read_bytes() == struct.pack('i', 20)
    finally:
        local.close()
