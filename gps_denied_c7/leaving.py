"""Engines that are being ended, which no frame waits for (F-4)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from gps_denied_c7.rungs import Rung, RungHost

__all__ = ['LeavingEngines']

_UNKILLABLE_S = 2.0

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Leaving:
    """One of them; ``stuck`` once it has taken too long."""

    rung: Rung
    host: RungHost
    pid: int | None
    since_ns: int
    stuck: bool = False


class LeavingEngines:
    """
    See engines to their end, and tell of those whose driver does not let go of them.

    :param emit: takes ``(record kind, payload fields)``, as FdrRecorder.emit does.
    :param monotonic_ns: steady clock in nanoseconds.
    """

    def __init__(
        self, *, emit: Callable[..., None], monotonic_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._emit = emit
        self._monotonic_ns = monotonic_ns
        self._leaving: list[_Leaving] = []

    def __len__(self) -> int:
        """Return how many have not come to their end."""
        return len(self._leaving)

    def add(self, rung: Rung, host: RungHost) -> None:
        """Have an engine ended; never waits; from any thread."""
        pid = getattr(host, 'pid', None)
        host.release()
        if not host.join(0.0) and all(leaving.host is not host for leaving in self._leaving):
            self._leaving.append(_Leaving(rung, host, pid, self._monotonic_ns()))

    def look(self) -> list[Rung]:
        """Forget those that are gone; return the rungs of those that have taken too long since the last look."""
        stuck = []
        for leaving in list(self._leaving):
            if leaving.host.join(0.0):
                self._leaving.remove(leaving)
            elif not leaving.stuck and self._monotonic_ns() - leaving.since_ns > _UNKILLABLE_S * 1e9:
                self._tell(leaving)
                stuck.append(leaving.rung)
        return stuck

    def stuck(self) -> list[Rung]:
        """Return the rungs of those that have taken too long."""
        return [leaving.rung for leaving in self._leaving if leaving.stuck]

    def wait(self) -> None:
        """Wait for all of them, for a while, and tell of those that stay."""
        end = time.monotonic() + _UNKILLABLE_S
        for leaving in list(self._leaving):
            if leaving.host.join(max(0.0, end - time.monotonic())):
                self._leaving.remove(leaving)
            elif not leaving.stuck:
                self._tell(leaving)

    def _tell(self, leaving: _Leaving) -> None:
        leaving.stuck = True
        rung, pid = leaving.rung.name, leaving.pid
        _log.error('a worker of %s (pid %s) cannot be ended; it holds its memory until its driver lets go.', rung, pid)
        self._emit('c7.worker_unkillable', rung=rung, pid=pid)
