"""§2, §6: flight records that outlast a flood and reach a late joiner, and diagnostics in every state."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import rclpy
from gps_denied_c7_msgs.msg import FdrRecord as Message
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy

from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.flight_record import KINDS, SCHEMA_VERSION, FdrRecord, read_payload
from gps_denied_c7.monitoring.host_info import hardware_id
from gps_denied_c7.ros.flight_recorder import FDR_QOS
from gps_denied_c7.ros.messages import to_fdr_message
from support.harness import ROOT, LocalNode, Peer, image, running_node, wait_until
from support.networks import copying

CAMERA = '/camera/image_raw'
ONE_SHOTS = ('c7.session_started', 'c7.fallback_to_onnx_trt_ep', 'c7.cpu_fallback')


def late_joiner(domain_id, wanted):
    """Return the kinds that a subscriber gets which joins now, once it has everything ``wanted``."""
    joiner = Peer(domain_id)
    try:
        wait_until(lambda: set(wanted) <= set(joiner.kinds()), f'{wanted} for a late joiner')
        return joiner.kinds()
    finally:
        joiner.close()


def test_both_alerts_reach_a_late_joiner_after_a_flood(start_node, domain_id, demo_bundle):
    """More refused images than ~/fdr is deep, then a subscriber joins; the one-shots are all there, once."""
    start_node({
        'model_path': demo_bundle, 'autostart': True, 'cpu_threads': 1,
        f'qos_overrides.{CAMERA}.subscription.reliability': 'reliable',
        f'qos_overrides.{CAMERA}.subscription.depth': 2000,
    })  # fmt: skip
    peer = Peer(domain_id)
    try:
        peer.wait_state('active')
        publisher = peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image()).is_fallback
        for kind in ONE_SHOTS:
            peer.wait_record(kind)

        def flooded():
            for number in range(20):
                publisher.publish(image(encoding=f'unheard_of_{number}'))
            return int(peer.values(f'Stream {CAMERA}').get('refused encoding', 0)) > FDR_QOS.depth

        wait_until(flooded, 'the flood to arrive')
        kinds = late_joiner(domain_id, (*ONE_SHOTS, 'c7.image_refused'))
        assert [kinds.count(kind) for kind in ONE_SHOTS] == [1, 1, 1]
        assert kinds.count('c7.image_refused') == 1, 'one cause, one record'
        (fallback,) = peer.payloads('c7.fallback_to_onnx_trt_ep')
        assert fallback['model_name'] == ModelBundle.load(demo_bundle).name
        assert fallback['active_provider'] == 'CPUExecutionProvider'
        assert 'tensorrt' in fallback['reason']
        (cpu,) = peer.payloads('c7.cpu_fallback')
        assert cpu['requested_providers'] and cpu['active_provider'] == 'CPUExecutionProvider'
    finally:
        peer.close()


@pytest.fixture
def local(ros_context):
    node = LocalNode(ros_context)
    yield node
    node.close()


def test_a_flood_of_different_causes_pushes_out_no_one_shot(local, domain_id):
    """Each cause of a repeating kind is a record of its own; more of them than the history is deep."""
    local.node.begin()
    local.node.record('c7.cpu_fallback', model_name='m', requested_providers=[], active_provider='CPU')
    for number in range(3000):
        local.node.record('c7.callback_failed', callback='timer', error=f'error {number}')
        local.node.record('c7.image_refused', topic=f'/camera_{number}', reason='size', message='')
    assert late_joiner(domain_id, ('c7.session_started', 'c7.cpu_fallback', 'c7.callback_failed'))

    # A subscriber that is slow to take what it got: its own queue must hold both histories.
    context, got = rclpy.Context(), []
    rclpy.init(context=context, domain_id=domain_id)
    node = rclpy.create_node('slow_joiner', context=context)
    node.create_subscription(Message, '/c7_inference/fdr', got.append, FDR_QOS)
    wait_until(lambda: node.count_publishers('/c7_inference/fdr') == 2, 'the publishers')
    time.sleep(2.0)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)

    def taken():
        executor.spin_once(timeout_sec=0.1)
        return {'c7.session_started', 'c7.cpu_fallback', 'c7.callback_failed'} <= {record.kind for record in got}

    try:
        wait_until(taken, 'the one-shots for a slow subscriber')
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()


def test_every_kind_reaches_a_subscriber_as_it_was_written(local, peer):
    for kind in KINDS.values():
        local.node.record(kind.name, **{name: f'value of {name}' for name in kind.required})
    for kind in KINDS.values():
        payload = peer.wait_record(kind.name)
        assert payload == {name: f'value of {name}' for name in kind.required}
    received = {record.kind: record for record in peer.records}
    for kind in KINDS.values():
        record = received[kind.name]
        assert (record.schema_version, record.severity) == (SCHEMA_VERSION, kind.severity)
        assert record.node == '/c7_inference' and record.session_id
        assert record.monotonic_ns <= time.monotonic_ns()
        assert abs(record.stamp.sec - time.time()) < 60
    numbers = sorted(record.seq for record in peer.records)
    assert numbers == list(range(len(numbers))), 'no record without its number, none twice'


def test_a_record_keeps_what_a_message_can_hold():
    record = FdrRecord(
        schema_version=1, kind='c7.session_ended', severity=20, stamp_ns=12_345_678_901, monotonic_ns=2**63,
        session_id='s', seq=2**40, node='/n', payload={'reason': 'Ctrl-C ✈', 'clean': True, 'more': [1.5, None]},
    )  # fmt: skip
    message = to_fdr_message(record)
    assert (message.stamp.sec, message.stamp.nanosec) == (12, 345_678_901)
    assert (message.monotonic_ns, message.seq) == (2**63, 2**40)
    assert read_payload(message.payload_json) == record.payload


def test_session_started_says_what_started(local, peer):
    local.node.begin(('notice one. Do this.',))
    started = peer.wait_record('c7.session_started')
    assert {'gps_denied_c7', 'python', 'numpy'} <= set(started['versions'])
    assert started['host'] == hardware_id() and socket.gethostname() in started['host']
    assert started['config_digest'].startswith('sha256:')
    wait_until(lambda: peer.values('Runtime').get('notice 1') == 'notice one. Do this.', 'the notice on diagnostics')
    assert peer.level('Runtime') == 'WARN'


def test_diagnostics_have_their_names_and_come_every_second_in_every_state(tmp_path):
    with running_node({'model_path': copying(tmp_path), 'cpu_threads': 1}) as (_, peer):
        for prepare, state in (
            (lambda: None, 'unconfigured'),
            (lambda: peer.change_state('configure'), 'inactive'),
            (lambda: peer.change_state('activate'), 'active'),
            (lambda: peer.change_state('shutdown'), 'finalized'),
        ):
            prepare()
            before = len(peer.diagnostics)
            wait_until(lambda before=before: len(peer.diagnostics) >= before + 2, f'diagnostics while {state}')
            assert peer.values('Runtime')['lifecycle_state'] == state
            names = {'Runtime', 'Latency', 'Thermal'}
            if state in ('inactive', 'active'):
                names.add(f'Stream {CAMERA}')
            latest = peer.diagnostics[-1]
            assert {status.name for status in latest.status} == {f'/c7_inference: {name}' for name in names}
            assert {status.hardware_id for status in latest.status} == {hardware_id()}
            assert all(isinstance(value.value, str) for status in latest.status for value in status.values)
        stamps = [message.header.stamp.sec + message.header.stamp.nanosec / 1e9 for message in peer.diagnostics]
        assert stamps == sorted(stamps)


def test_a_change_of_level_is_on_diagnostics_at_once(local, peer):
    """Without the timer's help."""
    peer.wait_level('Runtime', 'OK')
    local.node._timer.cancel()
    assert not local.node.transition('configure')
    wait_until(lambda: peer.level('Runtime') == 'ERROR', 'the error')
    assert local.node.transition('shutdown')
    wait_until(lambda: peer.level('Runtime') == 'OK', 'the error to go')


def test_a_record_is_json_whatever_its_values(local, peer):
    local.node.record('c7.session_ended', reason=ValueError('no JSON'), clean=float('nan'))
    payload = peer.wait_record('c7.session_ended')
    assert 'no JSON' in payload['reason']
    json.loads(peer.records[-1].payload_json, parse_constant=pytest.fail)


def test_fdr_is_there_for_a_subscriber_with_a_small_queue(local, domain_id):
    """As ros2 topic echo with transient-local: the latest records of a reader that keeps ten."""
    local.node.begin()
    for number in range(100):
        local.node.record('c7.start_failed', transition='configure', reason=f'{number}')
    joiner = Peer(domain_id)
    got = []
    try:
        joiner.node.create_subscription(
            Message, '/c7_inference/fdr', got.append,
            QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL),
        )  # fmt: skip
        wait_until(lambda: any(json.loads(each.payload_json).get('reason') == '99' for each in got), 'the last record')
    finally:
        joiner.close()


def test_n8_waiting_for_a_subscriber_that_hangs_stops_no_other_thread(ros_context, domain_id):
    """rclpy waits with the interpreter's lock held, and whoever is to end the process could not."""
    local = LocalNode(ros_context)
    local.node.begin()
    observer = subprocess.Popen(
        [sys.executable, '-m', 'gps_denied_c7.ros.observer'],
        env={
            **os.environ,
            'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
            'ROS_DOMAIN_ID': str(domain_id),
        },
        stdout=subprocess.PIPE,
        cwd=tempfile.gettempdir(),
    )
    ended = threading.Event()
    turns: list[int] = []

    def take_turns():
        while not ended.wait(0.001):
            turns.append(1)

    other = threading.Thread(target=take_turns)
    try:
        assert observer.stdout is not None
        assert any(b'c7.session_started' in line for line in observer.stdout)
        flight_recorder = local.node._recorder
        observer.send_signal(signal.SIGSTOP)
        local.node.record('c7.session_ended', reason='test', clean=True)
        other.start()
        before = len(turns)
        assert not flight_recorder.drain(0.5)
        assert len(turns) > before + 10
        observer.send_signal(signal.SIGCONT)
        assert flight_recorder.drain(30.0)
    finally:
        ended.set()
        observer.kill()
        observer.wait()
        local.close()
