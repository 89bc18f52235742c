"""N-8: SIGINT and SIGTERM in every lifecycle state end the process with code 0, and the peer hears of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from gps_denied_c7.config import ISOLATIONS
from measure import chaos
from support.harness import ROOT, LocalNode, image, running_node, wait_until
from support.networks import WHITE, copying, hanging_on_white, slow_to_load

CAMERA = '/camera/image_raw'
SIGNALS = (signal.SIGINT, signal.SIGTERM)
END_OF_TERMINAL = signal.SIGHUP


def end(process, peer, number):
    """Send the signal, check the end, and return the payload of c7.session_ended."""
    wait_until(lambda: 'c7.session_started' in peer.kinds(), 'the peer to have joined')
    started = time.monotonic()
    process.signal(number)
    code = process.wait(30.0)
    print(f'{number.name}: ended after {time.monotonic() - started:.2f} s')
    assert code == 0
    ended = peer.wait_record('c7.session_ended')
    assert peer.kinds()[-1] == 'c7.session_ended'
    assert ended['reason'] == number.name
    return ended


@pytest.mark.parametrize('number', SIGNALS)
def test_n8_unconfigured(number):
    with running_node() as (process, peer):
        peer.wait_state('unconfigured')
        assert end(process, peer, number)['clean']


@pytest.mark.parametrize('number', SIGNALS)
def test_n8_waiting_to_be_configured(number, tmp_path):
    """Autostart waits for the model to change after its first attempt."""
    with running_node({'model_path': str(tmp_path / 'missing.onnx'), 'autostart': True}) as (process, peer):
        wait_until(lambda: 'next attempt when' in process.output(), 'the pause')
        assert end(process, peer, number)['clean']


@pytest.mark.parametrize('number', SIGNALS)
def test_n8_configuring(number, tmp_path):
    """ONNX Runtime is busy with the model for long after the process has to be gone."""
    model = slow_to_load(tmp_path, multiplications=2000)
    with running_node({'model_path': model, 'autostart': True}) as (process, peer):
        peer.wait_state('configuring')
        ended = end(process, peer, number)
        assert not ended['clean'] and ended['lifecycle_state'] == 'configuring'


@pytest.mark.parametrize('number', SIGNALS)
def test_n8_inactive(number, tmp_path):
    with running_node({'model_path': copying(tmp_path)}) as (process, peer):
        peer.start('inactive')
        ended = end(process, peer, number)
        assert ended['clean'] and ended['lifecycle_state'] == 'finalized'


@pytest.mark.parametrize('number', SIGNALS)
def test_n8_activating(number, tmp_path):
    """The proof of the loaded engine takes its time: its worker stands still."""
    with running_node({'model_path': copying(tmp_path), 'hang_timeout_ms': 60_000.0}) as (process, peer):
        peer.start('inactive')
        for worker in chaos.workers(process):
            os.kill(worker, signal.SIGSTOP)
        peer.ask_change_state('activate')
        peer.wait_state('activating')
        end(process, peer, number)


@pytest.mark.parametrize('number', [*SIGNALS, END_OF_TERMINAL])
def test_n8_active(number, tmp_path):
    with running_node({'model_path': copying(tmp_path), 'autostart': True}) as (process, peer):
        peer.wait_state('active')
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image())
        assert end(process, peer, number)['clean']
        wait_until(lambda: peer.node.count_publishers('/c7_inference/fdr') == 0, 'the node to have left the domain')


def test_n8_the_shared_memory_of_dds_goes_with_the_process(tmp_path):
    """Tens of megabytes of /dev/shm for each process, which nobody else gives back."""
    with running_node({'autostart': True, 'model_path': copying(tmp_path)}) as (process, peer):
        peer.wait_state('active')
        held = process.shared_memory()
        if not held:
            pytest.skip('this RMW reserves no shared memory in /dev/shm')
        end(process, peer, signal.SIGINT)
        assert [path for path in held if path.exists()] == []


@pytest.mark.parametrize('number', SIGNALS)
@pytest.mark.parametrize('isolation', ISOLATIONS)
def test_n8_active_with_a_hung_engine(number, isolation, tmp_path):
    """A worker is killed; what hangs in the node's own process is left behind, and the record says so."""
    parameters = {
        'model_path': hanging_on_white(tmp_path), 'autostart': True, 'isolation': isolation,
        # Nobody else ends it meanwhile.
        'inference_deadline_ms': 60_000.0, 'hang_timeout_ms': 60_000.0,
    }  # fmt: skip
    with running_node(parameters) as (process, peer):
        peer.wait_state('active')
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image(1))
        peer.publisher(CAMERA).publish(image(2, data=WHITE))
        wait_until(lambda: peer.values(f'Stream {CAMERA}').get('accepted') == '2', 'the engine to be given the frame')
        assert peer.state() == 'active'
        assert end(process, peer, number)['clean'] is (isolation == 'process')


@pytest.mark.parametrize('number', SIGNALS)
def test_n8_deactivating_with_a_hung_engine(number, tmp_path):
    parameters = {'model_path': hanging_on_white(tmp_path), 'autostart': True, 'isolation': 'none'}
    with running_node(parameters) as (process, peer):
        peer.wait_state('active')
        peer.wait_matched(CAMERA)
        peer.publisher(CAMERA).publish(image(2, data=WHITE))
        wait_until(lambda: peer.values(f'Stream {CAMERA}').get('accepted') == '1', 'the engine to be given the frame')
        peer.ask_change_state('deactivate')
        peer.wait_state('deactivating')
        assert not end(process, peer, number)['clean']


@pytest.mark.parametrize('number', SIGNALS)
def test_n8_finalized(number):
    with running_node() as (process, peer):
        assert peer.change_state('shutdown')
        assert end(process, peer, number)['clean']


def test_n8_a_second_signal_changes_nothing(tmp_path):
    """Both at once used to hang the process: one handler interrupts the other."""
    with running_node({'model_path': copying(tmp_path), 'autostart': True}) as (process, peer):
        peer.wait_state('active')
        wait_until(lambda: 'c7.session_started' in peer.kinds(), 'the peer to have joined')
        for _ in range(10):
            process.signal(signal.SIGINT)
            process.signal(signal.SIGTERM)
        assert process.wait(30.0) == 0
        assert peer.wait_record('c7.session_ended')['clean']
        assert peer.kinds().count('c7.session_ended') == 1


def wrapped(command, *arguments, domain_id, **env):
    """Start the node by a shell ``command`` that ends in ``exec "$@"``."""
    words = [sys.executable, '-m', 'gps_denied_c7.ros.node_main', *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ('HOME', 'ROS_HOME', 'ROS_LOG_DIR')}
    environment |= {
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        'ROS_DOMAIN_ID': str(domain_id),
        **env,
    }
    return subprocess.Popen(['bash', '-c', command, 'bash', *words], env=environment, cwd=tempfile.gettempdir())


@pytest.mark.parametrize(
    ('command', 'problem'),
    [
        ('exec "$@" <&- >&- 2>&-', 'HOME is not set'),
        ('export HOME=/proc/nowhere; exec "$@"', '/proc/nowhere'),
        ('export ROS_LOG_DIR=/proc/nowhere; exec "$@" >/dev/full 2>&1', '/proc/nowhere'),
        ('trap "" HUP; exec "$@"', 'HOME is not set'),
    ],
)
def test_n8_an_environment_that_keeps_no_log_costs_no_node(command, problem, domain_id, peer):
    """A service manager sets no HOME, a root file system is read-only, a terminal is gone: it starts and ends."""
    process = wrapped(command, domain_id=domain_id)
    try:
        peer.wait_state('unconfigured')
        wait_until(lambda: problem in str(peer.values('Runtime')), 'the reason on diagnostics')
        if 'HUP' in command:
            process.send_signal(signal.SIGHUP)
        assert peer.state() == 'unconfigured'
        process.send_signal(signal.SIGTERM)
        assert process.wait(30.0) == 0
        assert peer.wait_record('c7.session_ended')['reason'] == 'SIGTERM'
    finally:
        process.kill()
        process.wait()


def test_n8_an_end_without_memory_for_a_thread(ros_context, near_peer, monkeypatch):
    local = LocalNode(ros_context)
    near_peer.wait_state('unconfigured')

    def start(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', start)
        assert local.node.end('test', timeout_s=5.0)
    assert near_peer.wait_record('c7.session_ended')['lifecycle_state'] == 'finalized'
    local.close()


def test_n1_a_hung_engine_is_left_behind_and_a_new_one_loaded(tmp_path):
    """Deactivate and cleanup come back; the node says so, and configures and answers again."""
    parameters = {'model_path': hanging_on_white(tmp_path), 'cpu_threads': 1, 'isolation': 'none'}
    with running_node(parameters) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        peer.publisher(CAMERA).publish(image(2, data=WHITE))
        wait_until(lambda: peer.values(f'Stream {CAMERA}').get('accepted') == '1', 'the engine to be given the frame')
        assert peer.change_state('deactivate')
        assert 'its thread keeps running' in process.output()
        assert peer.change_state('cleanup')
        assert 'cannot be freed' in process.output()
        peer.start()
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image(3)).header.stamp.sec == 3
        assert not end(process, peer, signal.SIGINT)['clean'], 'something was left behind'
