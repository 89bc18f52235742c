"""Files that are too large, or that a disk or mount never hands out, cost the node neither its life nor its answers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

from support.harness import running_node, wait_until
from support.stalled_mount import stalled_mount

CAMERA = '/camera/image_raw'
MIB = 1 << 20


def sparse(path: Path, size: int) -> Path:
    """Make a file of that size without a byte on the disk."""
    path.touch()
    os.truncate(path, size)
    return path


def peak_bytes(process) -> int:
    """Return the most memory that the node process itself has had."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{process.process.pid}/status').read_text())[1]) << 10


def test_n10_a_model_path_of_eight_terabytes_holds_up_nothing(demo_bundle, tmp_path):
    """Its size alone refuses it, in the background, and the parameter goes back."""
    folder = tmp_path / 'net'
    folder.mkdir()
    sparse(folder / 'model.json', 8 << 40)
    with running_node({'model_path': demo_bundle, 'cpu_threads': 1}) as (process, peer):
        peer.start()
        for number, path in enumerate((str(sparse(tmp_path / 'net.onnx', 8 << 40)), str(folder)), 1):
            assert peer.set_parameter('model_path', path).successful
            assert peer.set_parameter('latency_warn_ms', float(number)).successful
            wait_until(lambda count=number: len(peer.payloads('c7.model_swapped')) == count, 'the outcome')
            record = peer.payloads('c7.model_swapped')[-1]
            assert (record['outcome'], record['model_path']) == ('failed', path)
            assert str(8 << 40) in record['reason'], 'the size'
            assert peer.get_parameter('model_path').string_value == demo_bundle
            wait_until(lambda: 'the swap to' in peer.message('Runtime'), 'the failure on diagnostics')
        assert peer.change_state('deactivate') and peer.change_state('cleanup')
        assert peer.set_parameter('model_path', str(folder)).successful
        assert not peer.change_state('configure')
        wait_until(lambda: str(8 << 40) in peer.message('Runtime'), 'the size on diagnostics')
        assert peer.set_parameter('model_path', demo_bundle).successful
        assert peer.change_state('configure')


def test_n10_a_model_on_a_mount_that_does_not_answer_holds_up_nothing(demo_bundle, tmp_path):
    """While active as a swap, and at a configure, which fails in time; what is named next is served."""
    parameters = {'model_path': demo_bundle, 'cpu_threads': 1, 'load_timeout_s': 4.0}
    with stalled_mount(tmp_path / 'nfs') as mount, running_node(parameters) as (process, peer):
        path = str(mount / 'net')
        peer.start()
        assert peer.set_parameter('model_path', path).successful
        wait_until(lambda: peer.values('Runtime').get('model_swap') == 'loading', 'the swap under way')
        assert 'under way' in peer.set_parameter('model_path', '/another').reason
        assert peer.set_parameter('latency_warn_ms', 5.0).successful and peer.state() == 'active'
        record = peer.wait_record('c7.model_swapped')
        assert record['outcome'] == 'failed' and path in record['reason']
        assert peer.get_parameter('model_path').string_value == demo_bundle
        assert peer.change_state('deactivate') and peer.change_state('cleanup')

        other = str(mount / 'other')
        assert peer.set_parameter('model_path', other).successful
        future = peer.ask_change_state('configure')
        assert peer.state() == 'configuring'
        assert peer.set_parameter('latency_warn_ms', 6.0).successful
        assert peer.get_parameter('model_path').string_value == other
        wait_until(future.done, 'the end of configure')
        assert not future.result().success and other in peer.message('Runtime')
        assert 'its thread keeps waiting' in process.output()
        assert peer.set_parameter('model_path', demo_bundle).successful
        assert peer.change_state('configure') and peer.change_state('activate') and peer.change_state('deactivate')


def test_n2_autostart_says_that_the_mount_of_its_model_stalls_and_starts_with_another(demo_bundle, tmp_path):
    with (
        stalled_mount(tmp_path / 'nfs') as mount,
        running_node({'model_path': str(mount / 'net'), 'autostart': True, 'cpu_threads': 1}) as (process, peer),
    ):
        wait_until(lambda: 'configure failed' in process.output(), 'the node to say why it is not active')
        wait_until(lambda: str(mount / 'net') in peer.message('Runtime'), 'diagnostics to say so too')
        assert peer.set_parameter('model_path', demo_bundle).successful
        peer.wait_state('active')


def test_n8_a_signal_ends_a_node_whose_model_does_not_come(tmp_path):
    with (
        stalled_mount(tmp_path / 'nfs') as mount,
        running_node({'model_path': str(mount / 'net')}) as (process, peer),
    ):
        peer.ask_change_state('configure')
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert peer.wait_record('c7.session_ended')['lifecycle_state'] == 'configuring'


def test_m1_a_golden_file_of_gigabytes_does_not_kill_the_node(demo_bundle, tmp_path):
    root = tmp_path / 'net'
    shutil.copytree(demo_bundle, root)
    described = json.loads((root / 'model.json').read_text())
    file = sparse(root / described['golden'][0]['outputs']['path'], 2 << 30)
    with running_node({'model_path': str(root), 'cpu_threads': 1}) as (process, peer):
        assert not peer.change_state('configure')
        assert peak_bytes(process) < 400 * MIB
        message = peer.message('Runtime')
        assert f'{file}: has {2 << 30} bytes' in message and f'more than {256 * MIB}' in message


def test_n10_a_bare_model_of_a_million_empty_nodes_does_not_kill_a_flying_node(demo_bundle, tmp_path):
    """Three megabytes, of which a parser makes a gigabyte."""
    nodes = b'\x0a\x00' * 1_500_000
    size = len(nodes)
    length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21])
    # The documentation of the model says as a model does that keeps weights in other files.
    path = tmp_path / 'net.onnx'
    path.write_bytes(b'\x08\x08\x3a' + length + nodes + b'\x32\x0a\x0a\x08location')
    with running_node({'model_path': demo_bundle, 'cpu_threads': 1}) as (process, peer):
        peer.start()
        assert peer.set_parameter('model_path', str(path)).successful
        record = peer.wait_record('c7.model_swapped')
        assert record['outcome'] == 'failed' and '1000000 nodes' in record['reason']
        assert peak_bytes(process) < 400 * MIB and peer.state() == 'active'
