"""§8: tests, demo and benchmark meet no participant of anybody else, in whichever domain it lives, now or later."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from gps_denied_c7.demo import ros_domain, run
from gps_denied_c7.demo.child_process import DemoError
from gps_denied_c7.demo.ros_domain import child_environment, free_domain_id, free_ports
from gps_denied_c7.ros.fastdds import OWN_PORTS, named_profile, ports_in_force, uses_fast_dds
from support.harness import NodeProcess, Peer, image, wait_until
from support.networks import copying

pytestmark = pytest.mark.skipif(not uses_fast_dds(os.environ), reason='only Fast DDS can use ports of its own')
CAMERA = '/camera/image_raw'

# A node as others run it, of the name that ours has, with what ours would talk to.
FOREIGN = """
import json, sys, threading, rclpy
from diagnostic_msgs.msg import DiagnosticArray
from gps_denied_c7_msgs.msg import TensorList
from lifecycle_msgs.srv import ChangeState
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
rclpy.init()
node = rclpy.create_node(sys.argv[1])
heard = []
def change(request, response):
    heard.append(f'transition {request.transition.label}')
    return response
node.create_service(ChangeState, '/c7_inference/change_state', change)
node.create_subscription(DiagnosticArray, '/diagnostics', lambda message: heard.append('diagnostics'), 10)
node.create_subscription(TensorList, '/c7_inference/tensors', lambda message: heard.append('tensors'), 10)
images = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
node.create_subscription(Image, sys.argv[2], lambda message: heard.append('image'), images)
camera = node.create_publisher(Image, sys.argv[2], images)
threading.Thread(target=rclpy.spin, args=(node,), daemon=True).start()
for _ in sys.stdin:
    found = {'nodes': sorted(node.get_node_names()), 'heard': heard, 'subscribers': camera.get_subscription_count()}
    print(json.dumps(found), flush=True)
"""


@dataclass(frozen=True)
class Foreign:
    """Two plain nodes of somebody else in one domain, which find each other."""

    domain_id: int
    looking: subprocess.Popen

    def finds(self) -> dict:
        """Return what the first of them sees and has heard."""
        self.looking.stdin.write('\n')
        self.looking.stdin.flush()
        return json.loads(self.looking.stdout.readline())


@pytest.fixture
def plain(monkeypatch) -> None:
    """The environment of a user who has set nothing."""
    monkeypatch.delenv('ROS_DOMAIN_ID')
    monkeypatch.delenv(named_profile(os.environ))


@pytest.fixture
def foreign() -> Iterator[Foreign]:
    environ = dict(os.environ)
    del environ[named_profile(environ)]
    with contextlib.ExitStack() as stack:
        try:
            # No more in anybody's domain than the tests.
            number = stack.enter_context(free_domain_id(_same_numbers(ports_in_force(environ))))
        except DemoError as error:
            pytest.skip(str(error))
        environ['ROS_DOMAIN_ID'] = str(number)
        nodes = []
        for name in ('c7_inference', 'other'):
            command = [sys.executable, '-c', FOREIGN, name, CAMERA]
            node = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(node)
            stack.callback(node.kill)
            nodes.append(node)
        found = Foreign(number, nodes[0])
        each_other = {'nodes': ['c7_inference', 'other'], 'heard': [], 'subscribers': 2}
        wait_until(lambda: found.finds() == each_other, 'the foreign nodes to find each other')
        yield found


def _same_numbers(ports):
    """Return ``ports`` with the domains that have a number in common with those of our own."""
    return type(ports)(ports.base, ports.gain, OWN_PORTS.domains)


def test_a_foreign_node_in_the_same_domain_meets_no_test(foreign, tmp_path):
    """It finds nothing, receives nothing, and is sent no transition."""
    process, peer = NodeProcess(foreign.domain_id, {'model_path': copying(tmp_path), 'cpu_threads': 1}), None
    try:
        peer = Peer(foreign.domain_id)
        peer.start()
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image(1)).header.stamp.sec == 1
        assert peer.publisher(CAMERA).get_subscription_count() == 1
        assert foreign.finds() == {'nodes': ['c7_inference', 'other'], 'heard': [], 'subscribers': 2}
    finally:
        if peer is not None:
            peer.close()
        process.close()


def test_a_foreign_node_in_the_domain_of_the_demo_meets_no_demo(foreign, plain, tmp_path, monkeypatch):
    """Though there is no other domain left to choose: what somebody starts later is there, too."""
    only = type(OWN_PORTS)(OWN_PORTS.base, OWN_PORTS.gain, range(foreign.domain_id, foreign.domain_id + 1))

    @contextlib.contextmanager
    def that_one(ports):
        assert ports == OWN_PORTS
        yield only.domains[0]

    monkeypatch.setattr(run, 'free_domain_id', that_one)
    options = run.DemoOptions(output=tmp_path / 'out', duration_s=1.0, rate_hz=3.0, hd_rate_hz=0.0)
    assert run.run_demo(options, print).problems() == []
    assert foreign.finds() == {'nodes': ['c7_inference', 'other'], 'heard': [], 'subscribers': 2}


@pytest.mark.parametrize('transports', ['', 'DEFAULT'])
def test_children_of_demo_and_benchmark_use_ports_of_their_own(plain, tmp_path, monkeypatch, transports):
    monkeypatch.setenv('ROS_DISCOVERY_SERVER', '192.0.2.1:11811')
    monkeypatch.setenv('ROS_STATIC_PEERS', '192.0.2.1')
    ports = free_ports(os.environ)
    environ = child_environment(31, tmp_path, 2, ports=ports, transports=transports)
    assert ports_in_force(environ) == ports == OWN_PORTS
    assert not set(environ) & set(ros_domain.FOREIGN_NETWORK)


def test_a_profile_or_rmw_that_the_user_chose_is_left_and_its_ports_are_searched(plain, tmp_path, monkeypatch):
    standard = ports_in_force({})
    assert free_ports({'RMW_IMPLEMENTATION': 'rmw_cyclonedds_cpp'}) == standard
    mine = tmp_path / 'mine.xml'
    mine.write_text('<dds><profiles/></dds>')
    monkeypatch.setenv('FASTRTPS_DEFAULT_PROFILES_FILE', str(mine))
    assert free_ports(os.environ) == standard
    assert child_environment(31, tmp_path, 2, ports=standard)['FASTRTPS_DEFAULT_PROFILES_FILE'] == str(mine)


def test_ports_of_our_own_are_of_no_plain_participant():
    """Fast DDS takes ports for single endpoints from the 400 below the base, plain participants from 7000 on."""
    plain = ports_in_force({})
    last = OWN_PORTS.of(OWN_PORTS.domains[-1])
    assert OWN_PORTS.base - 400 >= 1024 and last.stop <= plain.base - 400
    # 32 participants of a domain are looked for by default.
    assert OWN_PORTS.gain >= 12 + 2 * 32


@pytest.mark.parametrize(('said', 'domain_id'), [('', None), ('42', 42)])
def test_the_demo_honours_ros_domain_id(monkeypatch, said, domain_id):
    monkeypatch.setenv('ROS_DOMAIN_ID', said)
    asked = []

    def run_demo(options, *_, **__):
        asked.append(options.domain_id)
        raise DemoError('enough')

    monkeypatch.setattr(run, 'run_demo', run_demo)
    assert run.main([]) == 2
    assert asked == [domain_id]
