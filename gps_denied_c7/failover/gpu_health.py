"""Whether the GPU is still to be trusted, from the faults of the engines on it (F-2)."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable

__all__ = ['GpuHealth']

_log = logging.getLogger(__name__)


class GpuHealth:
    """
    Take the GPU for lost where two of its rungs fail within a while, or a worker on it cannot be ended.

    :param window_s: two faults of different rungs that lie closer than this lose it.
    :param monotonic_ns: steady clock in nanoseconds.
    """

    def __init__(self, window_s: float, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._window_s = window_s
        self._monotonic_ns = monotonic_ns
        self._faults: deque[tuple[int, Hashable]] = deque(maxlen=8)
        self.lost = False

    def note_fault(self, rung: Hashable) -> bool:
        """Note that an engine of ``rung``, which is on the GPU, has failed; return whether that loses the GPU."""
        now_ns = self._monotonic_ns()
        self._faults.append((now_ns, rung))
        if len({fault for when_ns, fault in self._faults if now_ns - when_ns <= self._window_s * 1e9}) < 2:
            return False
        self.mark_lost(f'two GPU rungs failed within {self._window_s:.0f} s')
        return True

    def mark_lost(self, why: str) -> None:
        """Take it for lost."""
        _log.error('%s: the GPU is lost.', why)
        self.lost = True

    def restore(self) -> None:
        """Trust it again, and forget its faults."""
        self._faults.clear()
        self.lost = False

    def snapshot(self) -> Callable[[], None]:
        """Return a function that reverts all that is noted from now on."""
        faults, lost = tuple(self._faults), self.lost

        def take_back() -> None:
            self._faults.clear()
            self._faults.extend(faults)
            self.lost = lost

        return take_back
