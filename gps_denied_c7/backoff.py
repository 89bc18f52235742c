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

    def __contains__(self, what: Hashable) -> bool:
        """Return whether ``what`` has failed since it was last reset."""
        return what in self._pauses

    def begin(self, what: Hashable, bounds_s: tuple[float, float]) -> None:
        """
        Begin the next pause of ``what``, twice as long as the last one.

        :param bounds_s: first and longest pause; one that has been over for as long as the longest is forgotten.
        """
        first, longest = bounds_s
        now_ns = self._monotonic_ns()
        end_ns, pause_s = self._pauses.get(what, (0, 0.0))
        close = pause_s and now_ns - end_ns < longest * 1e9
        pause_s = min(longest, 2 * pause_s) if close else first
        self._pauses[what] = (now_ns + int(pause_s * 1e9), pause_s)

    def over(self, what: Hashable) -> bool:
        """Return whether ``what`` may be tried now."""
        return self._monotonic_ns() >= self._pauses.get(what, (0, 0.0))[0]

    def reset(self, what: Hashable) -> None:
        """Have the next pause of ``what`` be the shortest again; it may be tried at once."""
        self._pauses.pop(what, None)

    def clear(self) -> None:
        """Forget everything."""
        self._pauses.clear()
