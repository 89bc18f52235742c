"""c7_demo end to end: real flight, real node, real DDS; every frame accounted for, nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gps_denied_c7.demo import child_process
from gps_denied_c7.demo.child_process import Child, DemoError, wait_for
from gps_denied_c7.demo.ros_domain import child_environment, free_domain_id
from gps_denied_c7.ros.fastdds import OWN_PORTS, ports_in_force
from support.harness import wait_until
from support.left_behind import processes_naming

cv2 = pytest.importorskip('cv2')

needs_ros = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('rclpy', 'gps_denied_c7_msgs', 'onnxruntime')),
    reason='needs rclpy, gps_denied_c7_msgs and onnxruntime',
)
DEMO = [sys.executable, '-m', 'gps_denied_c7.demo.run']


@needs_ros
def test_every_frame_is_answered(tmp_path):
    """Deliverable 7: exit 0, frames in = frames out, 0 lost, both alerts, table and picture in the folder."""
    output = tmp_path / 'out'
    run = subprocess.run(
        [*DEMO, '--output', str(output), '--duration', '3', '--rate', '3', '--hd-rate', '1', '--no-progress'],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((output / 'report.json').read_text())
    assert report['problems'] == []
    assert {count['topic']: (count['sent'], count['answered'], count['lost']) for count in report['frames']} == {
        '/camera/image_raw': (9, 9, 0),
        '/camera_hd/image_raw': (3, 3, 0),
    }
    assert report['runtimes'] == ['onnx_trt_ep'] and report['is_fallback']
    kinds = [record['kind'] for record in report['records']]
    assert kinds[0] == 'c7.session_started' and kinds[-1] == 'c7.session_ended'
    assert report['node_exit_code'] == 0
    for words in ('dropped by policy', 'p99', 'onnx_trt_ep (as fallback)', 'c7.fallback_to_onnx_trt_ep'):
        assert words in run.stdout
    assert '/camera_hd/image_raw' in (output / 'report.md').read_text()
    picture = cv2.imread(str(output / 'detections.png'))
    assert picture.shape[1] > 1400 and picture.std() > 20
    with np.load(output / 'tensors.npz') as tensors:
        assert (tensors['/camera_hd/image_raw|0|scores'] > 0).sum() > 50
    assert processes_naming(output) == []


def test_a_child_that_starts_after_its_parent_has_died_does_nothing():
    """Here its parent is another process than the one that it is to die with."""
    for parent, output in ((os.getpid(), b'ran\n'), (1 << 30, b'')):
        command = [*child_process._DIES_WITH_PARENT, str(parent), 'echo', 'ran']
        done = subprocess.run(command, capture_output=True, check=False)
        assert (done.stdout, done.stderr) == (output, b'')


@needs_ros
@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_demo_leaves_no_process_behind(tmp_path, number, code):
    """Whatever ends the demo ends the node, the observer and the replay."""
    output = tmp_path / 'out'
    command = [*DEMO, '--output', str(output), '--duration', '60', '--rate', '1', '--hd-rate', '0', '--no-progress']
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_until(lambda: (output / 'replay.log').exists(), 'the replay', 120.0)
        wait_until(lambda: len(processes_naming(output)) >= 4, 'demo, node, observer and replay', 60.0)
        demo.send_signal(number)
        text, _ = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert demo.returncode == code, text
    assert 'Traceback' not in text
    wait_until(lambda: processes_naming(output) == [], 'the children to end', 20.0)


@needs_ros
def test_what_is_not_the_demos_is_left_alone(tmp_path):
    (tmp_path / 'bundle').mkdir()
    (tmp_path / 'bundle' / 'precious').write_text('kept')
    run = subprocess.run([*DEMO, '--output', str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert 'holds bundle, not made by c7_demo' in run.stderr
    assert (tmp_path / 'bundle' / 'precious').read_text() == 'kept'


def test_a_child_that_ends_early_is_told_with_its_log(tmp_path, monkeypatch):
    (tmp_path / 'broken_child.py').write_text("import sys; print('the reason', file=sys.stderr); sys.exit(3)")
    monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=os.pathsep)
    with Child('broken_child', [], os.environ, log=tmp_path / 'log') as child:
        with pytest.raises(DemoError, match='(?s)broken_child ended with code 3.*the reason') as caught:
            wait_for(lambda: False, 30.0, 'nothing', child)
        assert str(tmp_path / 'log') in caught.value.remedy


def test_a_signal_is_not_lost_while_a_child_is_started(tmp_path, monkeypatch):
    """What a handler raises in a hook of a fork, Python prints and forgets: none runs."""
    (tmp_path / 'quiet_child.py').write_text('')
    code = """
import os
os.register_at_fork(before=lambda: print('a hook'))
from gps_denied_c7.demo.child_process import Child
with Child('quiet_child', [], os.environ) as child:
    print('ended with', child.wait(30))
"""
    monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=os.pathsep)
    ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert ended.stdout == 'ended with 0\n', ended.stderr


def test_a_child_that_ignores_signals_is_killed(tmp_path, monkeypatch):
    ignore = 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); '
    script = f"{ignore}print('up', flush=True); time.sleep(60)"
    (tmp_path / 'stubborn_child.py').write_text(script)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=os.pathsep)
    with Child('stubborn_child', [], os.environ, log=tmp_path / 'log') as child:
        wait_for(lambda: 'up' in child.tail(), 30.0, 'the child', child)
        assert child.stop(timeout_s=0.3) == -9


def test_domains_are_not_given_twice():
    with free_domain_id(OWN_PORTS) as one, free_domain_id(OWN_PORTS) as other:
        assert one != other and {one, other} <= set(OWN_PORTS.domains)


@pytest.mark.parametrize('ports', [OWN_PORTS, ports_in_force({})])
@pytest.mark.parametrize('offset', [0, 11, 60])
def test_a_domain_in_use_is_passed_over(ports, offset):
    """A socket of any participant, at any address."""
    with free_domain_id(ports) as one, free_domain_id(ports) as two, free_domain_id(ports) as three:
        some = (one, two, three)
    ports = dataclasses.replace(ports, domains=some)

    def found() -> int | None:
        """Other tests that run meanwhile may hold the third for a while."""
        with contextlib.suppress(DemoError), free_domain_id(ports) as number:
            return number
        return None

    with contextlib.ExitStack() as taken:
        for number in some[:2]:
            participant = taken.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            participant.bind(('127.0.0.1', ports.of(number)[offset]))
        for _ in range(4):
            assert wait_until(found, 'the third domain', 60.0) == three


def test_a_domain_whose_port_in_shared_memory_is_in_use_is_passed_over(tmp_path):
    """Containers may share /dev/shm and nothing else."""
    with free_domain_id(OWN_PORTS) as number:
        ports = dataclasses.replace(OWN_PORTS, domains=range(number, number + 1))
    # Of the last participant that there may be: no killed one has left it.
    lock = Path(f'/dev/shm/fastdds_port{ports.of(number)[-1]}_el')
    try:
        with lock.open('x') as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(DemoError, match='in use'), free_domain_id(ports):
                pass
    except FileExistsError:
        pytest.skip('another program has the domain that this test uses')
    finally:
        lock.unlink(missing_ok=True)


def test_children_stay_on_this_host(tmp_path, monkeypatch):
    """§8: their own ROS_DOMAIN_ID, localhost only."""
    monkeypatch.setenv('ROS_DISTRO', 'jazzy')
    environ = child_environment(31, tmp_path, processes=1)
    assert environ['ROS_DOMAIN_ID'] == '31' and environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] == 'LOCALHOST'
    monkeypatch.setenv('ROS_DISTRO', 'humble')
    assert child_environment(31, tmp_path, processes=1)['ROS_LOCALHOST_ONLY'] == '1'


def test_little_shared_memory_is_shared_out(tmp_path, monkeypatch):
    """In a container's 64 MiB the shipped segment fits no process; a smaller one fits all."""
    from gps_denied_c7.demo import ros_domain
    from gps_denied_c7.ros.dds_memory import HostTransport
    from gps_denied_c7.ros.fastdds import segment_size

    for name in ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE', 'FASTDDS_BUILTIN_TRANSPORTS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv('RMW_IMPLEMENTATION', raising=False)

    def environment(free: int) -> dict[str, str]:
        monkeypatch.setattr(ros_domain.HostTransport, 'read', lambda: HostTransport(free, 0, None))
        return child_environment(31, tmp_path, processes=3)

    def asked(environ: dict[str, str]) -> int:
        [path] = [value for name, value in environ.items() if name.endswith('DEFAULT_PROFILES_FILE')]
        return segment_size(Path(path))

    assert asked(environment(1 << 30)) == 64 << 20
    assert 3 * 1.06 * asked(environment(64 << 20)) < 64 << 20
    assert asked(environment(64 << 20)) > 2 * 1920 * 1080 * 3
    with pytest.raises(DemoError, match='shm-size'):
        environment(16 << 20)
