"""T-1: NVML is asked by a process of its own, which may hang or die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gps_denied_c7.monitoring.thermal import ThermalLevel
from gps_denied_c7.monitoring.thermal_sources import NvmlThermal
from support.source_tree import REPOSITORY
from support.waiting import wait_until

FAKE_PYNVML = '''
"""A stand-in for nvidia-ml-py: this machine has no NVIDIA driver."""
import os
import time

NVML_TEMPERATURE_GPU = 0


class NVMLError(Exception):
    pass


def nvmlInit():
    if os.environ['FAKE_NVML'] == 'no driver':
        raise NVMLError('Driver Not Loaded')


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetTemperature(device, sensor):
    return 71


def nvmlDeviceGetCurrentClocksEventReasons(device):
    asked = os.environ['FAKE_NVML']
    if asked == 'crash':
        os.abort()
    if asked == 'hang' and os.path.exists(os.environ['FAKE_NVML_MARKER']):
        open(os.environ['FAKE_NVML_MARKER'] + '.hangs', 'w').close()
        time.sleep(3600)
    open(os.environ['FAKE_NVML_MARKER'], 'w').close()
    return 0 if asked in ('hang', 'crash') else int(asked, 16)
'''


@pytest.fixture
def helper(tmp_path: Path) -> Iterator[Callable[..., NvmlThermal]]:
    """Make a source whose helper uses the stand-in."""
    (tmp_path / 'pynvml.py').write_text(FAKE_PYNVML)
    sources: list[NvmlThermal] = []

    def make(asked: str, *, modules: Path = tmp_path, **options: object) -> NvmlThermal:
        environment = {
            **os.environ, 'FAKE_NVML': asked, 'FAKE_NVML_MARKER': str(tmp_path / 'asked'),
            'PYTHONPATH': os.pathsep.join([str(modules), str(REPOSITORY), os.environ.get('PYTHONPATH', '')]),
        }
        sources.append(NvmlThermal(('--period', '0.05'), environment=environment, **options))
        sources[-1].start()
        return sources[-1]

    yield make
    for source in sources:
        source.stop()


@pytest.mark.parametrize(
    ('mask', 'level', 'reasons'),
    [
        ('0x0', ThermalLevel.NOMINAL, ()),
        ('0x1', ThermalLevel.NOMINAL, ()),
        ('0x4', ThermalLevel.NOMINAL, ('software power cap',)),
        ('0x24', ThermalLevel.THROTTLED, ('software power cap', 'software thermal slowdown')),
        ('0x48', ThermalLevel.CRITICAL, ('hardware slowdown', 'hardware thermal slowdown')),
        ('0x80', ThermalLevel.CRITICAL, ('hardware power brake',)),
    ],
)
def test_thermal_nvml_reasons_come_to_a_level(
    helper: Callable[..., NvmlThermal], mask: str, level: ThermalLevel, reasons: tuple[str, ...]
) -> None:
    source = helper(mask)
    wait_until(lambda: source.thermal_state().temperatures_c, 'a reading')
    state = source.thermal_state()
    assert (state.level, state.source, state.reasons) == (level, 'nvml', reasons)
    assert state.temperatures_c == {'gpu': 71.0}


def test_thermal_nvml_call_that_hangs_blocks_nobody_and_its_helper_is_replaced(
    helper: Callable[..., NvmlThermal],
) -> None:
    source = helper('hang', hang_s=3.0, backoff_s=(0.05, 0.1))
    wait_until(lambda: source.thermal_state().level is ThermalLevel.NOMINAL, 'the one reading')
    wait_until(lambda: source.thermal_state().level is ThermalLevel.UNKNOWN, 'the age to be seen')
    assert source.thermal_state().age_s > 3.0
    wait_until(lambda: source.helpers_started >= 2, 'another helper')


def test_thermal_nvml_helper_that_dies_is_replaced_with_pauses(helper: Callable[..., NvmlThermal]) -> None:
    source = helper('crash', backoff_s=(0.01, 0.1))
    wait_until(lambda: source.helpers_started >= 3, 'three helpers')
    assert source.thermal_state().level is ThermalLevel.UNKNOWN


def test_thermal_nvml_without_a_driver_is_tried_again_and_told_once(
    helper: Callable[..., NvmlThermal], caplog: pytest.LogCaptureFixture
) -> None:
    source = helper('no driver', backoff_s=(0.01, 0.02))
    wait_until(lambda: source.helpers_started >= 3, 'three helpers')
    assert [record.message for record in caplog.records] == ['thermal state unknown: NVML: Driver Not Loaded.']


def test_thermal_nvml_package_that_is_missing_is_final(
    helper: Callable[..., NvmlThermal], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none' / 'pynvml.py').write_text('raise ImportError("No module named pynvml")\n')
    source = helper('0x0', modules=tmp_path / 'none', backoff_s=(0.01, 0.01))
    wait_until(lambda: caplog.records, 'the remedy')
    assert 'requirements/gpu.txt' in caplog.records[0].message
    source._thread.join(5.0)
    assert not source._thread.is_alive()
    assert source.helpers_started == 1


def test_thermal_nvml_stop_ends_the_helper_at_once(helper: Callable[..., NvmlThermal]) -> None:
    source = helper('hang', hang_s=3600.0)
    wait_until(lambda: source.thermal_state().temperatures_c, 'a reading')
    source.stop()
    source.stop()
    source._thread.join(5.0)
    assert not source._thread.is_alive()
    assert not source._killed, 'the helper is dead and reaped'


def test_thermal_nvml_helper_dies_with_its_parent(tmp_path: Path) -> None:
    """Also with a parent that is killed while the helper hangs in the driver."""
    (tmp_path / 'pynvml.py').write_text(FAKE_PYNVML)
    (tmp_path / 'asked').touch()
    program = """
import subprocess, sys
helper = subprocess.Popen([sys.executable, '-m', 'gps_denied_c7.monitoring.nvml_helper'], start_new_session=True)
print(helper.pid, flush=True)
helper.wait()
"""
    environment = {
        **os.environ, 'FAKE_NVML': 'hang', 'FAKE_NVML_MARKER': str(tmp_path / 'asked'),
        'PYTHONPATH': os.pathsep.join([str(tmp_path), str(REPOSITORY), os.environ.get('PYTHONPATH', '')]),
    }
    parent = subprocess.Popen([sys.executable, '-c', program], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    helper_pid = int(parent.stdout.readline())
    wait_until((tmp_path / 'asked.hangs').exists, 'the helper to hang')
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()

    def gone() -> bool:
        try:
            return Path(f'/proc/{helper_pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
        except FileNotFoundError:
            return True

    wait_until(gone, 'the end of the helper')


def test_thermal_state_is_never_waited_for(helper: Callable[..., NvmlThermal]) -> None:
    """Readers from many threads while helpers come and go."""
    source = helper('crash', backoff_s=(0.01, 0.01))
    ages: list[float] = []
    threads = [
        threading.Thread(target=lambda: ages.extend(source.thermal_state().age_s for _ in range(1000)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert len(ages) == 4000
