"""Engines that are being ended, which no frame waits for (F-4)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from gps_denied_c7.failover.rungs import Rung, RungHost

__all__ = ['RetiringEngines']

_UNKILLABLE_S = 2.0

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Retiring:
    """An engine that is being ended; ``stuck`` once that has taken too long."""

    rung: Rung
    host: RungHost
    pid: int | None
    since_ns: int
    stuck: bool = False


class RetiringEngines:
    """
    Wait for engines to end, and report those whose process does not end.

    :param emit: takes ``(record kind, payload fields)``, as FdrRecorder.emit does.
    :param monotonic_ns: steady clock in nanoseconds.
    """

    def __init__(
        self, *, emit: Callable[..., None], monotonic_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._emit = emit
        self._monotonic_ns = monotonic_ns
        self._engines: list[_Retiring] = []

    def __len__(self) -> int:
        """Return how many have not come to their end."""
        return len(self._engines)

    def add(self, rung: Rung, host: RungHost) -> None:
        """Have an engine ended; never waits; from any thread."""
        pid = getattr(host, 'pid', None)
        host.release()
        if not host.join(0.0) and all(engine.host is not host for engine in self._engines):
            self._engines.append(_Retiring(rung, host, pid, self._monotonic_ns()))

    def look(self) -> list[Rung]:
        """Forget those that are gone; return the rungs of those that newly take too long."""
        stuck = []
        for engine in list(self._engines):
            if engine.host.join(0.0):
                self._engines.remove(engine)
            elif not engine.stuck and self._monotonic_ns() - engine.since_ns > _UNKILLABLE_S * 1e9:
                self._report(engine)
                stuck.append(engine.rung)
        return stuck

    def stuck(self) -> list[Rung]:
        """Return the rungs of those that have taken too long."""
        return [engine.rung for engine in self._engines if engine.stuck]

    def wait(self) -> None:
        """Wait for all of them, for a while, and report those that stay."""
        end = time.monotonic() + _UNKILLABLE_S
        for engine in list(self._engines):
            if engine.host.join(max(0.0, end - time.monotonic())):
                self._engines.remove(engine)
            elif not engine.stuck:
                self._report(engine)

    def _report(self, engine: _Retiring) -> None:
        engine.stuck = True
        rung, pid = engine.rung.name, engine.pid
        _log.error('a worker of %s (pid %s) cannot be ended; its driver still holds its memory.', rung, pid)
        self._emit('c7.worker_unkillable', rung=rung, pid=pid)
