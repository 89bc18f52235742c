"""
Where thermal states come from: a Jetson's sysfs, NVML through a helper process, or nothing.

Both kinds are read by a thread of their own, since a sysfs read goes through the board's power processor and an
NVML call through the driver, and either can hang. Readers of the state never wait: its age grows meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gps_denied_c7.child_environment import SAFE_DIRECTORY, python_child, worker_environment
from gps_denied_c7.monitoring.thermal import (
    LatestReading,
    ThermalLevel,
    ThermalReading,
    ThermalSource,
    UnknownThermalState,
    worst,
)

__all__ = ['JetsonThermal', 'NvmlThermal', 'find_thermal_source', 'read_jetson']

_PERIOD_S = 1.0
_HANG_S = 5.0
_BACKOFF_S = (1.0, 60.0)
_OVER_CURRENT_LASTS_S = 5.0
_MAX_LINE = 65536

# nvidia-ml-py, nvml.h: reasons by bit, with the level that each comes to. A power cap holds any GPU's clocks at
# full load and is not about heat.
_NVML_REASONS = {
    0x04: ('software power cap', ThermalLevel.NOMINAL),
    0x08: ('hardware slowdown', ThermalLevel.CRITICAL),
    0x20: ('software thermal slowdown', ThermalLevel.THROTTLED),
    0x40: ('hardware thermal slowdown', ThermalLevel.CRITICAL),
    0x80: ('hardware power brake', ThermalLevel.CRITICAL),
}

# The kernel's trip types: from "passive" on it holds clocks down, at the others the board is about to shut down.
_TRIPS = {
    'passive': ThermalLevel.THROTTLED, 'hot': ThermalLevel.CRITICAL, 'critical': ThermalLevel.CRITICAL,
}
_OVER_CURRENT_NAME = 'soctherm_oc'
_OVER_CURRENT = {1: 'undervoltage', 2: 'average over-current', 3: 'instantaneous over-current'}
_JUNCTION = ('tj-thermal', 'gpu-thermal', 'gpu-therm')

_log = logging.getLogger(__name__)


def find_thermal_source(root: Path = Path('/')) -> ThermalSource:
    """
    Return the thermal source of this host, not started.

    :param root: where ``sys``, ``proc`` and ``dev`` lie.
    """
    if _is_jetson(root / 'sys'):
        return JetsonThermal(root / 'sys')
    if any((root / path).exists() for path in ('proc/driver/nvidia/version', 'dev/nvidiactl', 'dev/nvidia0')):
        return NvmlThermal()
    return UnknownThermalState()


# --- Jetson ---------------------------------------------------------------------------------------


def read_jetson(sys_root: Path) -> tuple[ThermalReading, dict[int, int]]:
    """
    Read every thermal zone and over-current counter once; what cannot be read is left out.

    A zone is judged by its own trip points, the junction ``tj-thermal`` among them. Some zones always fail to
    read, as that of a powered-down unit.

    :return: the reading, and how many over-current events each of the counters 1 to 3 has seen since boot.
    """
    temperatures: dict[str, float] = {}
    levels, reasons = [], []
    for zone in sorted((sys_root / 'class' / 'thermal').glob('thermal_zone*')):
        name, millidegrees = _text(zone / 'type'), _integer(zone / 'temp')
        if name is None or millidegrees is None:
            continue
        temperatures[name] = millidegrees / 1000
        trips = _reached_trips(zone, millidegrees)
        if trips is None:
            continue
        levels.append(worst([ThermalLevel.NOMINAL, *(_TRIPS[trip] for trip in trips)]))
        reasons += [f'{name} at its {trip} trip point' for trip in trips]
    counts: dict[int, int] = {}
    for monitor in sorted((sys_root / 'class' / 'hwmon').glob('hwmon*')):
        if _text(monitor / 'name') == _OVER_CURRENT_NAME:
            for number in _OVER_CURRENT:
                if (count := _integer(monitor / f'oc{number}_event_cnt')) is not None:
                    counts[number] = counts.get(number, 0) + count
    return ThermalReading(worst(levels), temperatures, tuple(reasons)), counts


class JetsonThermal(LatestReading):
    """
    Read a Jetson's thermal zones and over-current counters once a second.

    The counters are cumulative: what they have gained since the last reading is a reason for THROTTLED for 5 s.

    :param sys_root: where ``class/thermal`` and ``class/hwmon`` lie.
    :param monotonic: steady clock in seconds.
    """

    def __init__(
        self,
        sys_root: Path = Path('/sys'),
        *,
        period_s: float = _PERIOD_S,
        stale_s: float = _HANG_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__('jetson-sysfs', stale_s=stale_s, monotonic=monotonic)
        self._root = sys_root
        self._period_s = period_s
        self._counts: dict[int, int] | None = None
        self._event_at: dict[int, float] = {}
        self._stopping = threading.Event()

    def start(self) -> None:
        """Begin reading, in the background; once."""
        threading.Thread(target=self._run, name='c7-thermal', daemon=True).start()

    def stop(self) -> None:
        """End reading without waiting for a read that hangs; safe to repeat."""
        self._stopping.set()

    def read(self) -> None:
        """Take one reading; may block."""
        reading, counts = read_jetson(self._root)
        now = self._monotonic()
        for number, count in counts.items():
            # The first reading shows what happened since boot, which does not count; a counter may start over.
            if self._counts is not None and count > self._counts.get(number, count):
                self._event_at[number] = now
        self._counts = counts
        events = [
            _OVER_CURRENT[number]
            for number, at in sorted(self._event_at.items())
            if now - at <= _OVER_CURRENT_LASTS_S
        ]
        if events:
            level = worst([reading.level, ThermalLevel.THROTTLED])
            reading = ThermalReading(level, reading.temperatures_c, (*reading.reasons, *events))
        self.put(reading)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.read()
            except Exception:
                # The age of the last reading grows, which is what its readers look at.
                _log.exception('the thermal zones could not be read')
            self._stopping.wait(self._period_s)


def _is_jetson(sys_root: Path) -> bool:
    zones = {(_text(zone / 'type') or '').lower() for zone in (sys_root / 'class' / 'thermal').glob('thermal_zone*')}
    return bool(zones & set(_JUNCTION)) or any(
        _text(monitor / 'name') == _OVER_CURRENT_NAME for monitor in (sys_root / 'class' / 'hwmon').glob('hwmon*')
    )


def _reached_trips(zone: Path, millidegrees: int) -> list[str] | None:
    """Return the types of the trip points that are reached, None where the zone has none to be judged by."""
    judged, reached = False, []
    for file in sorted(zone.glob('trip_point_*_type')):
        kind = _text(file)
        limit = _integer(file.with_name(file.name.removesuffix('type') + 'temp'))
        # A trip point at or below freezing is one that is switched off.
        if kind in _TRIPS and limit is not None and limit > 0:
            judged = True
            if millidegrees >= limit and kind not in reached:
                reached.append(kind)
    return reached if judged else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(errors='replace').strip()
    except OSError:
        return None


def _integer(file: Path) -> int | None:
    try:
        return int(_text(file) or '')
    except ValueError:
        return None


# --- NVML -----------------------------------------------------------------------------------------


class NvmlThermal(LatestReading):
    """
    Listen to a helper process that asks NVML once a second.

    The helper is replaced, with growing pauses, when it ends or says nothing for ``hang_s``. It is killed, and left
    behind where that does not end it: a process inside a hung driver call may not die.

    :param arguments: of :mod:`gps_denied_c7.monitoring.nvml_helper`, which writes one JSON object a line.
    :param hang_s: seconds of silence that mean a hung call; also how long a reading holds.
    :param backoff_s: first and longest pause in seconds before a new helper.
    """

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        hang_s: float = _HANG_S,
        backoff_s: tuple[float, float] = _BACKOFF_S,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__('nvml', stale_s=hang_s)
        self._arguments = tuple(arguments)
        self._hang_s = hang_s
        self._backoff_s = backoff_s
        self._environment = environment
        self._stopping = threading.Event()
        # Its other end is closed to wake the listener.
        self._wake, self._waker = os.pipe()
        self._thread: threading.Thread | None = None
        self._last_warning = ''
        self._killed: list[subprocess.Popen[bytes]] = []
        self.helpers_started = 0

    def start(self) -> None:
        """Begin listening, in the background; once."""
        # The helper dies with this thread (its parent-death signal is the thread's), so the thread owns it.
        self._thread = threading.Thread(target=self._run, name='c7-thermal', daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the helper without waiting for a call that hangs; safe to repeat."""
        if not self._stopping.is_set():
            self._stopping.set()
            os.close(self._waker)
            if self._thread is not None:
                self._thread.join(1.0)

    def _run(self) -> None:
        pause_s = self._backoff_s[0]
        while not self._stopping.is_set():
            any_reading, final = False, False
            try:
                any_reading, final = self._listen()
            except Exception:
                _log.exception('the NVML helper could not be read')
            if final:
                return
            pause_s = self._backoff_s[0] if any_reading else min(self._backoff_s[1], pause_s * 2)
            self._stopping.wait(pause_s)

    def _listen(self) -> tuple[bool, bool]:
        """Run one helper to its end; return whether it gave a reading, and whether another one would fail too."""
        self.helpers_started += 1
        inherited = worker_environment(os.environ) if self._environment is None else self._environment
        command, environ = python_child('gps_denied_c7.monitoring.nvml_helper', *self._arguments, environ=inherited)
        helper = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Away from the terminal's Ctrl-C, which is the node's to handle.
            start_new_session=True,
            env=environ,
            cwd=SAFE_DIRECTORY,
        )
        assert helper.stdout is not None
        try:
            return self._read(helper.stdout)
        finally:
            helper.kill()
            helper.stdout.close()
            self._killed = [other for other in (*self._killed, helper) if not _gone(other)]

    def _read(self, pipe: IO[bytes]) -> tuple[bool, bool]:
        any_reading, pending = False, b''
        # Not select, which knows no descriptor from 1024 on.
        waiting = select.poll()
        for descriptor in (pipe.fileno(), self._wake):
            waiting.register(descriptor, select.POLLIN)
        while True:
            ready = waiting.poll(self._hang_s * 1e3)
            if self._stopping.is_set():
                return any_reading, True
            if not ready:
                self._warn(f'the NVML helper has sent no reading for {self._hang_s:.0f} s and is restarted')
                return any_reading, False
            chunk = os.read(pipe.fileno(), 4096)
            if not chunk:
                return any_reading, False
            *lines, pending = (pending + chunk).split(b'\n')
            if len(pending) > _MAX_LINE:
                raise ValueError('the NVML helper writes no lines')
            for line in lines:
                said = json.loads(line)
                if 'unavailable' in said:
                    self._warn(f'thermal state unknown: {said["unavailable"]}')
                    return any_reading, bool(said.get('final'))
                self.put(_nvml_reading(said))
                any_reading = True

    def _warn(self, text: str) -> None:
        # The same trouble returns with every new helper.
        if text != self._last_warning:
            self._last_warning = text
            _log.warning('%s', text)


def _gone(helper: subprocess.Popen[bytes]) -> bool:
    try:
        helper.wait(0.5)
    except subprocess.TimeoutExpired:
        return False
    return True


def _nvml_reading(said: Mapping[str, Any]) -> ThermalReading:
    mask = int(said['reasons'])
    found = [reason for bit, reason in _NVML_REASONS.items() if mask & bit]
    temperatures = {str(name): float(value) for name, value in said['temperatures_c'].items()}
    return ThermalReading(
        worst([ThermalLevel.NOMINAL, *(level for _, level in found)]), temperatures, tuple(name for name, _ in found)
    )
