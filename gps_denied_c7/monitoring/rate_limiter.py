"""Log lines of one kind at a limited rate."""

from __future__ import annotations

import time
from typing import Any

__all__ = ['RateLimiter']

_WINDOW_S = 5.0
_MOST_KEYS = 1000


class RateLimiter:
    """Let one event per key pass in each window and count the rest."""

    def __init__(self, window_s: float = _WINDOW_S) -> None:
        self._window_s = window_s
        self._seen: dict[Any, tuple[float, int]] = {}

    def pass_now(self, key: Any) -> str | None:
        """Return how the line ends that may be logged now, with the number held back before; None holds it back."""
        now = time.monotonic()
        if len(self._seen) > _MOST_KEYS:
            # Keys may hold names from outside, of which there is no end.
            self._seen = {key: seen for key, seen in self._seen.copy().items() if now - seen[0] < self._window_s}
        last, held = self._seen.get(key, (float('-inf'), 0))
        if now - last < self._window_s:
            self._seen[key] = (last, held + 1)
            return None
        self._seen[key] = (now, 0)
        return f' ({held} more since the last message)' if held else ''
