"""§7 on a real GPU: NVML through its helper process."""

from __future__ import annotations

import importlib.util
import time

import pytest

from gps_denied_c7.monitoring.thermal import ThermalLevel
from gps_denied_c7.monitoring.thermal_sources import NvmlThermal, find_thermal_source
from support.gpu.results import record


def test_thermal_nvml_reads_this_gpu() -> None:
    if importlib.util.find_spec('pynvml') is None:
        pytest.skip('nvidia-ml-py is not installed in this Python')
    source = find_thermal_source()
    if not isinstance(source, NvmlThermal):
        pytest.skip(f'this host is read by {type(source).__name__}')
    started = time.monotonic()
    source.start()
    try:
        while source.thermal_state().level is ThermalLevel.UNKNOWN and time.monotonic() - started < 30.0:
            time.sleep(0.02)
        first_s = time.monotonic() - started
        state = source.thermal_state()
        record(
            'NVML through its helper', first_reading_s=round(first_s, 3), level=state.level.value,
            temperatures_c=state.temperatures_c, reasons=list(state.reasons),
        )
        assert state.level is not ThermalLevel.UNKNOWN
        assert 0.0 < state.temperatures_c['gpu'] < 120.0
        time.sleep(2.5)
        assert source.thermal_state().age_s < 2.5, 'a newer reading'
    finally:
        source.stop()
