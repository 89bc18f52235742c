"""When each message of a bag is due."""

from __future__ import annotations

import time

from gps_denied_c7.ros.replay_report import Gap

__all__ = ['Pace']


class Pace:
    """
    Map bag time onto the steady clock; a silence longer than ``max_gap_s`` of bag time is cut down to that.

    :ivar start_ns: steady time of the first message of the first pass, 0 before it.
    :ivar due_ns: steady time of the message that :meth:`advance` was called for.
    """

    def __init__(self, rate: float, max_gap_s: float) -> None:
        self.start_ns = self.due_ns = 0
        self._rate = rate
        self._max_gap_s = max_gap_s
        self.restart()

    def restart(self) -> None:
        """Begin another pass with the next message."""
        self._latest_ns: int | None = None
        self._anchor = self._after_gap = (0, 0)

    def advance(self, time_ns: int) -> Gap | None:
        """Set ``due_ns`` for a message of this bag time; return the silence before it if it is cut down."""
        gap = None
        if self._latest_ns is None:
            self.due_ns = time.monotonic_ns()
            self.start_ns = self.start_ns or self.due_ns
            self._anchor = self._after_gap = (self.due_ns, time_ns)
        elif (time_ns - self._latest_ns) / 1e9 > self._max_gap_s:
            gap = Gap(self._latest_ns, (time_ns - self._latest_ns) / 1e9, self._max_gap_s)
            self.due_ns = self._due(self._latest_ns) + round(self._max_gap_s * 1e9 / self._rate)
            self._after_gap = (self.due_ns, time_ns)
        else:
            self.due_ns = self._due(time_ns)
        self._latest_ns = time_ns if self._latest_ns is None else max(self._latest_ns, time_ns)
        return gap

    def arrive(self) -> bool:
        """Let bag time jump to the message due now, if a silence before it was cut down; tell whether it did."""
        jumped, self._anchor = self._anchor != self._after_gap, self._after_gap
        return jumped

    def bag_ns(self, now_ns: int) -> int:
        """Return the bag time at this steady time."""
        return self._anchor[1] + round((now_ns - self._anchor[0]) * self._rate)

    def _due(self, time_ns: int) -> int:
        return self._anchor[0] + round((time_ns - self._anchor[1]) / self._rate)
