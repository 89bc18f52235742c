"""The node talks to no other host but by DDS, and writes where the documentation says so alone."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable

import pytest

from gps_denied_c7.ros.fastdds import ports_in_force
from support import harness
from support.harness import image, running_node
from support.networks import copying
from support.tracing import Trace, elsewhere, why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

CAMERA = '/camera/image_raw'
# Of RTPS, for discovery.
MULTICAST = '239.255.0.1'


def foreign(addresses: Iterable[tuple[str, int]]) -> set[tuple[str, int]]:
    """Return the addresses that are neither of this host nor of DDS's discovery, or have no port of DDS."""
    ports = ports_in_force(os.environ)
    dds = range(ports.base - 400, ports.of(ports.domains[-1]).stop)
    return {
        (address, port) for address, port in addresses
        if port not in dds or not (ipaddress.ip_address(address).is_loopback or address == MULTICAST)
    }  # fmt: skip


def test_the_node_and_its_workers_stay_on_this_host_and_in_the_named_directories(home, tmp_path, monkeypatch):
    """With the executable, and DDS as the tests use it."""
    trace, cache, logs = Trace(tmp_path / 'trace'), tmp_path / 'cache', tmp_path / 'logs'
    monkeypatch.setenv('ROS_LOG_DIR', str(logs))
    executable = shutil.which('c7_inference_node')
    node = [executable] if executable else [sys.executable, '-m', 'gps_denied_c7.ros.node_main']
    start = subprocess.Popen

    def start_traced(words, **options):
        return start([*trace.command, *node, *words[3:]], **options)

    parameters = {
        'model_path': copying(tmp_path), 'cpu_threads': 1, 'engine_cache_dir': str(cache / 'engines'),
        'ort_trt_cache_dir': str(cache / 'ort'),
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(harness.subprocess, 'Popen', start_traced)
        with running_node(parameters) as (process, peer):
            patch.undo()
            peer.start()
            peer.wait_matched(CAMERA)
            for number in range(1, 6):
                assert peer.ask(CAMERA, image(number)).header.stamp.sec == number
            assert peer.change_state('deactivate') and peer.change_state('cleanup')
            process.signal(signal.SIGTERM)
            assert process.wait() == 0
    assert foreign(trace.addresses()) == set()
    assert elsewhere(trace, cache, logs) == set()
    assert list(home.iterdir()) == []
