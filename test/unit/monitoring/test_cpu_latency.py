"""What the kernel is asked for, on its own device where it may be written."""

import os
import struct
from pathlib import Path

import pytest

from gps_denied_c7.monitoring.cpu_latency import CPU_LATENCY_DEVICE, CpuLatencyError, CpuLatencyRequest

needs_device = pytest.mark.skipif(
    not os.access(CPU_LATENCY_DEVICE, os.R_OK | os.W_OK), reason=f'{CPU_LATENCY_DEVICE} may not be written'
)


def in_force() -> int:
    """Return what the kernel holds cores to, microseconds: the lowest of all requests."""
    return struct.unpack('i', CPU_LATENCY_DEVICE.read_bytes()[:4])[0]


@pytest.fixture
def request_of_ours():
    before, request = in_force(), CpuLatencyRequest()
    if before < 1000:
        pytest.skip(f'somebody else holds the cores to {before} µs')
    yield request
    request.drop()
    assert in_force() == before


@needs_device
def test_a_request_lasts_until_it_is_dropped(request_of_ours):
    request_of_ours.hold(700)
    assert in_force() == 700
    request_of_ours.hold(900)
    assert in_force() == 900, 'the one before is gone'
    request_of_ours.drop()
    request_of_ours.drop()
    assert in_force() >= 1000


@needs_device
def test_no_child_inherits_it(request_of_ours):
    request_of_ours.hold(700)
    assert not os.get_inheritable(request_of_ours._file)


@pytest.mark.parametrize('device', ['missing', '/dev/full', '/proc/version'])
def test_a_device_that_cannot_be_written_is_told_with_the_remedy(tmp_path, device):
    request = CpuLatencyRequest(tmp_path / device)
    files = set(os.listdir('/proc/self/fd'))
    with pytest.raises(CpuLatencyError, match='(?s)20 µs.*leave cpu_wakeup_latency_us out') as caught:
        request.hold(20)
    assert isinstance(caught.value.__cause__, OSError)
    assert set(os.listdir('/proc/self/fd')) == files
    request.drop()


@needs_device
def test_a_request_that_is_refused_leaves_none(request_of_ours):
    request_of_ours.hold(700)
    request_of_ours._device = Path('/dev/full')
    with pytest.raises(CpuLatencyError):
        request_of_ours.hold(600)
    assert in_force() >= 1000
