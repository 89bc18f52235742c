"""§5: what befalls a node in the field besides the death of a worker costs it neither its state nor a frame."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gps_denied_c7.demo.network import write_demo_bundle
from measure import chaos
from support.harness import NodeProcess, Peer, free_domain_id, image, running_node, wait_until
from support.memory_group import MemoryGroup, NoMemoryGroupError, memory_group
from support.networks import WHITE, copying, greedy_on_white
from support.source_tree import TESTS

CAMERA = '/camera/image_raw'


def wait_standby(peer: Peer) -> None:
    """Wait for the second engine."""
    wait_until(lambda: peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby')


def in_a_mount_namespace(mount: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code where ``mount``, words of the shell, has changed the file systems for it alone."""
    words = ['unshare', '--mount', 'sh', '-c', f'{mount} && exec "$@"', 'sh', sys.executable, '-c', script, *arguments]
    path = [str(TESTS), *filter(None, [os.environ.get('PYTHONPATH')])]
    environ = {**os.environ, 'PYTHONPATH': os.pathsep.join(path)}
    return subprocess.run(words, env=environ, capture_output=True, text=True, timeout=120)


def needs_mounts() -> None:
    """Skip where this user may not mount anything."""
    with contextlib.suppress(OSError):
        if not subprocess.run(['unshare', '--mount', 'true'], capture_output=True).returncode:
            return
    pytest.skip('needs the right to make mount namespaces')


@pytest.mark.parametrize('damage', ['truncated', 'bit flipped', 'replaced', 'gone'])
def test_f7_a_model_that_is_damaged_under_the_node_is_refused_and_taken_back_when_it_is_whole(tmp_path, damage):
    """F-7, M-1: what is loaded goes on; with every engine dead the node stays active, and recovers with the file."""
    bundle = write_demo_bundle(tmp_path / 'bundle')
    (model,) = bundle.glob('*.onnx')
    whole = model.read_bytes()
    with running_node({'model_path': str(bundle), 'cpu_threads': 1}) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        wait_standby(peer)
        if damage == 'truncated':
            model.write_bytes(whole[: len(whole) // 2])
        elif damage == 'bit flipped':
            model.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        elif damage == 'replaced':
            shutil.copy(copying(tmp_path, width=640, height=480), model)
        else:
            model.unlink()
        assert peer.ask(CAMERA, image(1, width=640, height=480)).header.stamp.sec == 1
        for worker in chaos.workers(process):
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: 'no usable runtime' in peer.message('Runtime'), 'the end of the last engine')
        assert peer.level('Runtime') == 'ERROR'
        peer.publisher(CAMERA).publish(image(2, width=640, height=480))
        assert peer.wait_record('c7.frame_unanswered')
        assert peer.state() == 'active'
        model.write_bytes(whole)
        wait_until(lambda: peer.values('Runtime')['chain_state'] == 'ready', 'the engine to be loaded again', 60.0)
        assert peer.ask(CAMERA, image(3, width=640, height=480)).header.stamp.sec == 3


def test_n10_a_storm_of_parameters_costs_no_frame(tmp_path):
    """N-10, N-4: settings that take effect, are refused and are nonsense, while images come."""
    with running_node({'model_path': copying(tmp_path), 'cpu_threads': 1}) as (_, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        over = threading.Event()
        outcomes: list[bool] = []

        def storm() -> None:
            settings = [
                ('latency_warn_ms', 10.0), ('latency_warn_ms', -1.0), ('isolation', 'none'), ('cpu_threads', 2),
                ('max_queue_age_ms', 1000.0), ('thermal_policy', 'boil'), ('thermal_policy', 'shed'),
            ]  # fmt: skip
            while not over.is_set():
                outcomes.extend(peer.set_parameter(*setting).successful for setting in settings)

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            for number in range(1, 101):
                assert peer.ask(CAMERA, image(number)).header.stamp.sec == number
        finally:
            over.set()
            thread.join()
        wait_until(lambda: peer.values(f'Stream {CAMERA}').get('answered') == '100', 'the count of the answers')
        assert peer.state() == 'active'
        assert (peer.get_parameter('isolation').string_value, peer.get_parameter('cpu_threads').integer_value) == (
            'process', 1,
        )  # fmt: skip
        assert outcomes[:7] == [True, False, False, False, True, False, True]
        assert 'c7.callback_failed' not in peer.kinds()


def test_two_nodes_at_one_camera_do_not_feel_each_other(tmp_path):
    """F-1: each has engines of its own, and those of one may die."""
    model = copying(tmp_path)
    with contextlib.ExitStack() as stack:
        domain_id = stack.enter_context(free_domain_id())
        nodes = {}
        for name in ('north', 'south'):
            process = NodeProcess(domain_id, {'model_path': model, 'cpu_threads': 1}, ('-r', f'__node:={name}'))
            stack.callback(process.close)
            peer = Peer(domain_id, f'/{name}')
            stack.callback(peer.close)
            nodes[name] = process, peer
        for _, peer in nodes.values():
            peer.start()
            wait_standby(peer)
        camera = nodes['north'][1].publisher(CAMERA)
        wait_until(lambda: camera.get_subscription_count() == 2, 'both subscriptions')

        def both_answer() -> bool:
            # The other end may match a moment later.
            camera.publish(image(1))
            return all(peer.tensors for _, peer in nodes.values())

        wait_until(both_answer, 'both to answer')
        for worker in chaos.workers(nodes['north'][0]):
            os.kill(worker, signal.SIGKILL)
        camera.publish(image(2))
        for _, peer in nodes.values():
            wait_until(lambda peer=peer: peer.tensors[-1].header.stamp.sec == 2, 'the answer after it')
            assert peer.state() == 'active'
        assert nodes['south'][1].values('Runtime')['switches'] == '0'


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a memory control group with a limit; skip where that is not allowed."""
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(memory_group(limit_bytes))
        except NoMemoryGroupError as error:
            pytest.skip(str(error))
        yield group


def test_f1_where_memory_runs_out_it_is_a_worker_that_is_taken(tmp_path):
    """F-1: the engine that wants more than there is, never the node; what it was asked costs itself alone."""
    with memory_cgroup(1 << 30) as group, running_node(
        {'model_path': greedy_on_white(tmp_path, gigabytes=4), 'cpu_threads': 1, 'hot_standby': False}
    ) as (process, peer):  # fmt: skip
        group.add(process.process.pid)
        peer.start()
        peer.wait_matched(CAMERA)
        (worker,) = chaos.workers(process)
        peer.publisher(CAMERA).publish(image(1, data=WHITE))
        wait_until(lambda: not Path(f'/proc/{worker}').exists(), 'the worker to be taken')
        assert peer.ask(CAMERA, image(2)).header.stamp.sec == 2
        assert peer.state() == 'active'
        assert process.process.poll() is None
        peer.close()
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


_FLIES = """
import sys
from support.harness import image, running_node
with running_node({'model_path': sys.argv[1], 'cpu_threads': 1}) as (process, peer):
    peer.start()
    peer.wait_matched('/camera/image_raw')
    for number in range(1, 31):
        answer = peer.ask('/camera/image_raw', image(number, width=640, height=480))
        assert answer.header.stamp.sec == number
    print('notices:', [value for name, value in peer.values('Runtime').items() if name.startswith('notice')])
"""


def test_a_container_with_64_mib_of_shared_memory_is_enough_to_fly(tmp_path):
    """F-1: tensors lie in memory without a name, which Docker's small /dev/shm does not bound; Fast DDS is told of."""
    needs_mounts()
    bundle = write_demo_bundle(tmp_path / 'bundle')
    done = in_a_mount_namespace('mount -t tmpfs -o size=64m c7-shm /dev/shm', _FLIES, str(bundle))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '/dev/shm' in done.stdout


def test_a_full_disk_grounds_nobody(tmp_path):
    """N-1: neither logs nor caches nor temporary files can be written."""
    needs_mounts()
    bundle, full = write_demo_bundle(tmp_path / 'bundle'), tmp_path / 'full'
    full.mkdir()
    fill = f'mount -t tmpfs -o size=64k c7-full {full} && cat /dev/zero > {full}/filled 2> /dev/null; true'
    home = f'export HOME={full} ROS_HOME={full}/ros XDG_CACHE_HOME={full}/cache'
    done = in_a_mount_namespace(f'{{ {fill}; }} && {home}', _FLIES, str(bundle))
    assert done.returncode == 0, done.stdout + done.stderr
