"""Thermal state of the host, as a snapshot that never blocks its reader."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

__all__ = [
    'LatestReading',
    'ThermalLevel',
    'ThermalReading',
    'ThermalSource',
    'ThermalState',
    'ThermalStatePublisher',
    'UnknownThermalState',
    'worst',
]


class ThermalLevel(str, Enum):
    """How hot the compute part is, judged by the source's own limits."""

    UNKNOWN = 'unknown'
    NOMINAL = 'nominal'
    THROTTLED = 'throttled'
    CRITICAL = 'critical'


@dataclass(frozen=True, slots=True)
class ThermalState:
    """
    Hold one thermal reading.

    :param level: the judgement.
    :param source: where it was read, as ``jetson-sysfs``, ``nvml`` or ``none``.
    :param age_s: seconds since the reading, infinite where there never was one.
    :param temperatures_c: degrees Celsius by zone name.
    :param reasons: why clocks are held down, as the source calls it; also where it is not about heat.
    """

    level: ThermalLevel
    source: str
    age_s: float
    temperatures_c: dict[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


class ThermalStatePublisher(Protocol):
    """Return the latest thermal snapshot."""

    def thermal_state(self) -> ThermalState:
        """Return the latest snapshot with its age; never reads a sensor, never blocks."""
        ...


class ThermalSource(ThermalStatePublisher, Protocol):
    """A publisher that reads something while it runs."""

    def start(self) -> None:
        """Begin reading, in the background; once."""
        ...

    def stop(self) -> None:
        """End reading without waiting for a read that hangs; safe to repeat."""
        ...


class UnknownThermalState:
    """Say honestly that no thermal source is read on this host."""

    def start(self) -> None:
        """Read nothing."""

    def stop(self) -> None:
        """Read nothing."""

    def thermal_state(self) -> ThermalState:
        """Return the level UNKNOWN from no source."""
        return ThermalState(ThermalLevel.UNKNOWN, source='none', age_s=float('inf'))


@dataclass(frozen=True, slots=True)
class ThermalReading:
    """Hold what a source read at one moment; fields as in ThermalState."""

    level: ThermalLevel
    temperatures_c: dict[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


class LatestReading:
    """
    Keep the newest reading of a source, and its age.

    A reading that nothing has renewed says nothing about now: beyond ``stale_s`` the level is UNKNOWN, while
    the temperatures stay, with their age. Safe from any thread.

    :param source: as ThermalState names it.
    :param stale_s: seconds for which a reading holds.
    :param monotonic: steady clock in seconds.
    """

    def __init__(
        self, source: str, *, stale_s: float = 5.0, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._source = source
        self._stale_s = stale_s
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._taken: tuple[float, ThermalReading] | None = None

    def put(self, reading: ThermalReading) -> None:
        """Replace the reading."""
        with self._lock:
            self._taken = (self._monotonic(), reading)

    def thermal_state(self) -> ThermalState:
        """Return the latest snapshot with its age; never reads a sensor, never blocks."""
        with self._lock:
            taken = self._taken
        if taken is None:
            return ThermalState(ThermalLevel.UNKNOWN, self._source, float('inf'))
        age_s, reading = max(0.0, self._monotonic() - taken[0]), taken[1]
        level = reading.level if age_s <= self._stale_s else ThermalLevel.UNKNOWN
        return ThermalState(level, self._source, age_s, dict(reading.temperatures_c), reading.reasons)


def worst(levels: Iterable[ThermalLevel]) -> ThermalLevel:
    """Return the most severe of ``levels``; any known one outweighs UNKNOWN, which none at all comes to."""
    order = list(ThermalLevel)
    return max(levels, key=order.index, default=ThermalLevel.UNKNOWN)
