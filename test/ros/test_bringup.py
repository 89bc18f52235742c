"""Deliverable of a drone's first minute: configure, activate, answer a flight, alert, end; and again after SIGKILL."""

from __future__ import annotations

import array
import signal
import time
from pathlib import Path

import pytest
import yaml
from rcl_interfaces.srv import GetParameters, ListParameters
from rclpy.parameter import parameter_value_to_python

from gps_denied_c7.ros.node import DEFAULT_NODE_NAME
from gps_denied_c7.ros.parameter_table import PARAMETERS
from support.harness import Peer, image
from support.scenario import IMAGE_TOPIC, check_alerts, check_answers, record_flight, replay


@pytest.fixture(scope='module')
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short flight."""
    return record_flight(tmp_path_factory.mktemp('flight'))


@pytest.mark.parametrize('autostart', [True, False])
def test_a_flight_is_answered_and_the_fallback_is_told(domain_id, peer, start_node, demo_bundle, bag, autostart):
    """N-1, N-2, N-3, F-2, N-8: configure, active, inference over a replayed bag, both alerts, exit code 0."""
    node = start_node({'image_topics': [IMAGE_TOPIC], 'model_path': demo_bundle, 'autostart': autostart})
    if not autostart:
        assert peer.state() == 'unconfigured'
        peer.start()
    peer.wait_state('active')
    report = replay(bag, domain_id)
    (topic,) = report['topics']
    assert topic['sent'] == topic['recorded'] == 15
    check_answers(peer, topic['sent'])
    check_alerts(peer)
    late = Peer(domain_id)
    check_alerts(late)
    late.close()
    node.signal(signal.SIGINT)
    assert node.wait() == 0
    assert 'c7.session_ended' in peer.kinds()


def test_a_killed_node_started_again_is_active_again(domain_id, start_node, demo_bundle):
    """N-2, F-7: what launch's respawn does, done by hand; nothing of the dead process stands in the way."""
    parameters = {'image_topics': [IMAGE_TOPIC], 'model_path': demo_bundle, 'autostart': True}
    sessions = []
    for _ in range(2):
        node = start_node(parameters)
        started = time.monotonic()
        peer = Peer(domain_id)
        peer.wait_state('active')
        print(f'active {time.monotonic() - started:.2f} s after its start')
        peer.wait_matched(IMAGE_TOPIC)
        assert peer.ask(IMAGE_TOPIC, image(width=640, height=480)).runtime_label == 'onnx_trt_ep'
        check_alerts(peer)
        sessions.append({record.session_id for record in peer.records})
        node.signal(signal.SIGKILL)
        assert node.wait() == -signal.SIGKILL
        peer.close()
    first, second = sessions
    assert len(first) == len(second) == 1
    assert first != second


def test_every_parameter_is_told_in_one_call_and_can_be_given_back(domain_id, start_node, tmp_path):
    """N-10: what ``ros2 param dump`` prints starts the next node; rclpy tells nothing where one parameter is unset."""

    def told(peer: Peer) -> dict:
        names = sorted(peer.call(ListParameters, 'list_parameters', ListParameters.Request()).result.names)
        answer = peer.call(GetParameters, 'get_parameters', GetParameters.Request(names=names))
        values = [parameter_value_to_python(value) for value in answer.values]
        assert len(values) == len(names) > len(PARAMETERS)
        plain = [list(value) if isinstance(value, array.array) else value for value in values]
        return dict(zip(names, plain, strict=True))

    file = tmp_path / 'dumped.yaml'
    parameters = []
    for arguments in (('-p', 'preprocess.width:=320'), ('--params-file', str(file))):
        node = start_node(arguments=arguments)
        peer = Peer(domain_id)
        parameters.append(told(peer))
        file.write_text(yaml.dump({DEFAULT_NODE_NAME: {'ros__parameters': parameters[-1]}}))
        assert 'cannot be used' not in node.output()
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        peer.close()
    assert parameters[0]['preprocess.width'] == 320
    assert repr(parameters[0]) == repr(parameters[1])
