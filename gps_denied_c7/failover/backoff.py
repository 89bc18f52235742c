"""Pauses between attempts that fail, each twice as long as the one before while they come close together."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

__all__ = ['Backoff']


class Backoff:
    """
    Say when something that has failed may be tried again.

    :param monotonic_ns: steady clock in nanoseconds.
    """

    def __init__(self, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._pauses: dict[Hashable, tuple[int, float]] = {}
        self._attempts: dict[Hashable, int] = {}
        self.version = 0
        """Changes whenever a pause begins or is cancelled."""

    def ends(self) -> dict[Hashable, int]:
        """Return by what has failed when its pause ends, by the steady clock; it may be over."""
        return {what: end_ns for what, (end_ns, _) in self._pauses.items()}

    def begin(self, what: Hashable, bounds_s: tuple[float, float]) -> None:
        """
        Begin the next pause of ``what``, twice as long as the last one.

        :param bounds_s: first and longest pause. After one that had been over for as long as the longest when the
            attempt began that has failed now, or when what had succeeded failed, the first comes again.
        """
        first, longest = bounds_s
        now_ns = self._monotonic_ns()
        end_ns, pause_s = self._pauses.get(what, (0, 0.0))
        # An attempt may take longer than any pause: that time does not count as time without a failure.
        close = pause_s > 0 and self._attempts.pop(what, now_ns) - end_ns < longest * 1e9
        pause_s = min(longest, 2 * pause_s) if close else first
        self.version += 1
        self._pauses[what] = (now_ns + int(pause_s * 1e9), pause_s)

    def left_s(self, what: Hashable) -> float:
        """Return the seconds that are left of the pause of ``what``, 0 where it is over."""
        return max(0, self._pauses.get(what, (0, 0.0))[0] - self._monotonic_ns()) / 1e9

    def may_begin(self, what: Hashable) -> bool:
        """Return whether ``what`` may be tried now; True counts as the begin of an attempt."""
        if self.left_s(what):
            return False
        self._attempts[what] = self._monotonic_ns()
        return True

    def succeed(self, what: Hashable) -> None:
        """End the attempt: whatever ``what`` fails with from now on is another failure."""
        self._attempts.pop(what, None)

    def reset(self, what: Hashable) -> None:
        """Have the next pause of ``what`` be the shortest again; it may be tried at once."""
        if self._pauses.pop(what, None) is not None:
            self.version += 1
        self._attempts.pop(what, None)

    def snapshot(self) -> Callable[[], None]:
        """Return a function that reverts every change from now on."""
        pauses, attempts = self._pauses.copy(), self._attempts.copy()

        def take_back() -> None:
            self._pauses, self._attempts = pauses, attempts
            self.version += 1

        return take_back

    def clear(self) -> None:
        """Forget everything."""
        self._pauses.clear()
        self.version += 1
        self._attempts.clear()
