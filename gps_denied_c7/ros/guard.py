"""No callback lets an exception out (N-5)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ['CallbackGuard', 'RateLimiter']

_MOST_KEYS = 1000

Callback = TypeVar('Callback', bound=Callable[..., Any])


class CallbackGuard:
    """
    Wrap callbacks so that an exception is reported instead of ending ``spin()``.

    :param report: takes the callback's name and the exception; must not raise.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        self._report = report

    def __call__(self, name: str, callback: Callback) -> Callback:
        """
        Return ``callback`` guarded; a failed call returns its last argument if that is a service response.

        rclpy looks at the signature to decide what a callback receives, so the wrapper keeps it.
        """

        @functools.wraps(callback)
        def guarded(*args: Any) -> Any:
            try:
                return callback(*args)
            except Exception as error:
                self._report(name, error)
                return args[1] if len(args) == 2 else None

        return guarded  # type: ignore[return-value]


class RateLimiter:
    """Let one event per key pass in each window and count the rest."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: dict[Any, tuple[float, int]] = {}

    def pass_now(self, key: Any) -> int | None:
        """Return how many events of ``key`` were held back since the last that passed; None holds this one back."""
        now = time.monotonic()
        if len(self._seen) > _MOST_KEYS:
            # Keys may hold names from outside, of which there is no end.
            self._seen = {key: seen for key, seen in self._seen.copy().items() if now - seen[0] < self._window_s}
        last, held = self._seen.get(key, (float('-inf'), 0))
        if now - last < self._window_s:
            self._seen[key] = (last, held + 1)
            return None
        self._seen[key] = (now, 0)
        return held
