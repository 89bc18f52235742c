"""Answer fewer frames while the host is too hot, and say how many (§7)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from gps_denied_c7.monitoring.thermal import ThermalLevel, ThermalState

__all__ = ['FrameShedding', 'ThermalPolicy']

_MAX_STEP = 4
_HOLD_S = 5.0
_RECOVER_S = 20.0


class ThermalPolicy(str, Enum):
    """What is done about heat; never another strategy."""

    OFF = 'off'
    """Nothing is reported."""
    REPORT = 'report'
    """Diagnostics and flight records say so."""
    SHED = 'shed'
    """And frames are left out until it has cooled down."""


@dataclass(slots=True)
class _Topic:
    left_out: int = 0
    due: float = float('-inf')


class FrameShedding:
    """
    Decide which frames to leave out.

    At step n one frame of 2ⁿ is answered, but never fewer than ``min_rate_hz`` of each topic, as far as that many
    arrive. THROTTLED takes one step at once and another one every 5 s that it lasts, up to 4; CRITICAL takes all
    of them at once. Each 20 s without either gives one step back: heat comes back faster than it goes. In an
    unknown state no frame is left out.

    :param monotonic: steady clock in seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._step = 0
        self._changed_at = float('-inf')
        self._hot_at = float('-inf')
        self._topics: dict[str, _Topic] = {}

    @property
    def step(self) -> int:
        """One frame of ``2 ** step`` is answered."""
        return self._step

    def reset(self) -> None:
        """Forget the heat: every frame is answered."""
        with self._lock:
            self._step = 0
            self._topics.clear()

    def drops(self, topic: str, state: ThermalState, min_rate_hz: float) -> bool:
        """
        Return whether the current frame is left out.

        :param state: the latest thermal state.
        :param min_rate_hz: frames a second that each topic keeps.
        """
        with self._lock:
            now = self._monotonic()
            self._follow(state.level, now)
            kept = self._topics.setdefault(topic, _Topic())
            interval = 1 / min_rate_hz
            if kept.left_out + 1 < 2**self._step and now < kept.due:
                kept.left_out += 1
                return True
            kept.left_out = 0
            # From when it was due, not from now: frames come when they come, and the rate must not fall below.
            kept.due = kept.due + interval if now - interval < kept.due <= now else now + interval
            return False

    def _follow(self, level: ThermalLevel, now: float) -> None:
        if level is ThermalLevel.CRITICAL:
            self._hot_at = self._changed_at = now
            self._step = _MAX_STEP
        elif level is ThermalLevel.THROTTLED:
            self._hot_at = now
            if self._step == 0 or (self._step < _MAX_STEP and now - self._changed_at >= _HOLD_S):
                self._step += 1
                self._changed_at = now
        elif self._step and now - max(self._hot_at, self._changed_at) >= _RECOVER_S:
            self._step -= 1
            self._changed_at = now
