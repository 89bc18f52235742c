"""§7: a thermal snapshot has an age, says "unknown" when it knows nothing, and never blocks its reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gps_denied_c7.monitoring.thermal import LatestReading, ThermalLevel, ThermalReading, UnknownThermalState, worst
from gps_denied_c7.monitoring.thermal_sources import JetsonThermal, NvmlThermal, find_thermal_source, read_jetson
from support.waiting import wait_until


class FakeSysfsThisMachineIsNoJetson:
    """A sysfs tree with the names and units of a Jetson Orin's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.zones = 0
        (root / 'class' / 'thermal').mkdir(parents=True)
        monitor = root / 'class' / 'hwmon' / 'hwmon2'
        monitor.mkdir(parents=True)
        (monitor / 'name').write_text('soctherm_oc\n')
        self.monitor = monitor
        for number in (1, 2, 3):
            self.events(number, 0)

    def zone(self, name: str, celsius: float | None, **trips: float) -> Path:
        folder = self.root / 'class' / 'thermal' / f'thermal_zone{self.zones}'
        self.zones += 1
        folder.mkdir()
        (folder / 'type').write_text(f'{name}\n')
        if celsius is None:
            # Reading a directory fails as a powered-down unit's zone does: with an OSError.
            (folder / 'temp').mkdir()
        else:
            self.heat(folder, celsius)
        for number, (kind, limit) in enumerate(trips.items()):
            (folder / f'trip_point_{number}_type').write_text(f'{kind}\n')
            (folder / f'trip_point_{number}_temp').write_text(f'{round(limit * 1000)}\n')
        return folder

    def heat(self, folder: Path, celsius: float) -> None:
        (folder / 'temp').write_text(f'{round(celsius * 1000)}\n')

    def events(self, number: int, count: int) -> None:
        (self.monitor / f'oc{number}_event_cnt').write_text(f'{count}\n')


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfsThisMachineIsNoJetson:
    return FakeSysfsThisMachineIsNoJetson(tmp_path / 'sys')


# --- the snapshot ---------------------------------------------------------------------------------


def test_thermal_is_unknown_before_the_first_reading() -> None:
    state = LatestReading('nvml').thermal_state()
    assert (state.level, state.source, state.age_s) == (ThermalLevel.UNKNOWN, 'nvml', float('inf'))


def test_thermal_age_grows_and_an_old_reading_says_nothing_about_now(clock: Clock) -> None:
    latest = LatestReading('nvml', stale_s=5.0, monotonic=clock)
    latest.put(ThermalReading(ThermalLevel.THROTTLED, {'gpu': 91.0}, ('hot',)))
    clock.now += 4.0
    assert (latest.thermal_state().level, latest.thermal_state().age_s) == (ThermalLevel.THROTTLED, 4.0)
    clock.now += 2.0
    state = latest.thermal_state()
    assert (state.level, state.age_s) == (ThermalLevel.UNKNOWN, 6.0)
    assert state.temperatures_c == {'gpu': 91.0}


def test_thermal_without_a_source_is_unknown() -> None:
    source = UnknownThermalState()
    source.start()
    assert source.thermal_state().level is ThermalLevel.UNKNOWN
    assert source.thermal_state().source == 'none'
    source.stop()


def test_thermal_levels_have_an_order() -> None:
    assert worst([]) is ThermalLevel.UNKNOWN
    assert worst([ThermalLevel.NOMINAL, ThermalLevel.UNKNOWN]) is ThermalLevel.NOMINAL
    assert worst([ThermalLevel.CRITICAL, ThermalLevel.THROTTLED]) is ThermalLevel.CRITICAL


# --- Jetson ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('celsius', 'level'),
    [
        (60.0, ThermalLevel.NOMINAL), (98.9, ThermalLevel.NOMINAL), (99.0, ThermalLevel.THROTTLED),
        (104.5, ThermalLevel.CRITICAL),
    ],
)
def test_thermal_jetson_zone_is_judged_by_its_own_trip_points(
    sysfs: FakeSysfsThisMachineIsNoJetson, celsius: float, level: ThermalLevel
) -> None:
    sysfs.zone('tj-thermal', celsius, active=51.0, passive=99.0, critical=104.5)
    reading, _ = read_jetson(sysfs.root)
    assert reading.level is level
    assert reading.temperatures_c == {'tj-thermal': celsius}
    assert bool(reading.reasons) == (level is not ThermalLevel.NOMINAL)


def test_thermal_jetson_zone_that_fails_to_read_is_left_out(sysfs: FakeSysfsThisMachineIsNoJetson) -> None:
    sysfs.zone('gpu-thermal', None, passive=99.0)
    sysfs.zone('tj-thermal', 61.5, passive=99.0)
    broken = sysfs.zone('cv0-thermal', 1.0)
    (broken / 'temp').write_text('no number\n')
    reading, _ = read_jetson(sysfs.root)
    assert reading.temperatures_c == {'tj-thermal': 61.5}
    assert reading.level is ThermalLevel.NOMINAL


@pytest.mark.parametrize('trips', [{}, {'active': 40.0}, {'passive': 0.0}, {'passive': -274.0}])
def test_thermal_jetson_without_limits_is_unknown(
    sysfs: FakeSysfsThisMachineIsNoJetson, trips: dict[str, float]
) -> None:
    sysfs.zone('tj-thermal', 70.0, **trips)
    reading, _ = read_jetson(sysfs.root)
    assert reading.level is ThermalLevel.UNKNOWN
    assert reading.temperatures_c == {'tj-thermal': 70.0}


def test_thermal_jetson_over_current_counts_only_what_is_new(
    sysfs: FakeSysfsThisMachineIsNoJetson, clock: Clock
) -> None:
    sysfs.zone('tj-thermal', 60.0, passive=99.0)
    sysfs.events(2, 17)
    source = JetsonThermal(sysfs.root, stale_s=60.0, monotonic=clock)
    source.read()
    assert source.thermal_state().level is ThermalLevel.NOMINAL, 'since boot is no news'
    sysfs.events(2, 18)
    sysfs.events(1, 1)
    source.read()
    state = source.thermal_state()
    assert state.level is ThermalLevel.THROTTLED
    assert state.reasons == ('undervoltage', 'average over-current')
    clock.now += 6.0
    source.read()
    assert source.thermal_state().level is ThermalLevel.NOMINAL
    sysfs.events(2, 0)
    source.read()
    assert source.thermal_state().level is ThermalLevel.NOMINAL, 'a counter that started over is no event'


def test_thermal_jetson_reads_in_the_background(sysfs: FakeSysfsThisMachineIsNoJetson) -> None:
    zone = sysfs.zone('tj-thermal', 60.0, passive=99.0)
    source = JetsonThermal(sysfs.root, period_s=0.01)
    assert source.thermal_state().age_s == float('inf')
    source.start()
    try:
        wait_until(lambda: source.thermal_state().level is ThermalLevel.NOMINAL, 'a first reading')
        sysfs.heat(zone, 100.0)
        wait_until(lambda: source.thermal_state().level is ThermalLevel.THROTTLED, 'the heat')
    finally:
        source.stop()


def test_thermal_jetson_read_that_hangs_blocks_nobody(sysfs: FakeSysfsThisMachineIsNoJetson) -> None:
    """A FIFO in the place of a file: its reader waits for ever."""
    zone = sysfs.zone('tj-thermal', 60.0, passive=99.0)
    source = JetsonThermal(sysfs.root, period_s=0.01, stale_s=0.2)
    source.start()
    wait_until(lambda: source.thermal_state().level is ThermalLevel.NOMINAL, 'a first reading')
    # In one step: a reading in between would find a zone that cannot be read, which is another case.
    os.mkfifo(zone / 'fifo')
    (zone / 'fifo').rename(zone / 'temp')
    wait_until(lambda: source.thermal_state().level is ThermalLevel.UNKNOWN, 'the age to be seen')
    assert source.thermal_state().temperatures_c == {'tj-thermal': 60.0}
    source.stop()
    # Lets the thread go.
    os.close(os.open(zone / 'temp', os.O_RDWR))


def test_thermal_source_of_this_host(sysfs: FakeSysfsThisMachineIsNoJetson, tmp_path: Path) -> None:
    (sysfs.monitor / 'name').write_text('coretemp\n')
    sysfs.zone('x86_pkg_temp', 50.0, passive=90.0)
    assert isinstance(find_thermal_source(tmp_path), UnknownThermalState)
    (tmp_path / 'dev').mkdir()
    (tmp_path / 'dev' / 'nvidiactl').touch()
    assert isinstance(find_thermal_source(tmp_path), NvmlThermal)
    sysfs.zone('tj-thermal', 50.0)
    assert isinstance(find_thermal_source(tmp_path), JetsonThermal)


# --- NVML -----------------------------------------------------------------------------------------


