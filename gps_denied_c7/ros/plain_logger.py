"""A node's ROS logger, whose every line prints and ends, whatever text from outside is in it."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from rclpy.logging import LoggingSeverity, get_logger

from gps_denied_c7.monitoring.flight_record import cause_of
from gps_denied_c7.text import PlainText, plain

__all__ = ['PlainLogger']

_DEBUG = LoggingSeverity.DEBUG
_RosLogger: Any = type(get_logger('gps_denied_c7'))

# Have ROS show where the node logged, not this file; its own comment allows others to add theirs.
getattr(sys.modules[_RosLogger.__module__], '_internal_callers', []).append(os.path.realpath(__file__))


_BURST, _WINDOW_S = 10, 5.0
_BEGINNING_CHARACTERS = 200
_MOST_CAUSES = 512


class PlainLogger(_RosLogger):  # type: ignore[misc]
    """
    Log as rclpy's logger of the same name does, each message as :func:`plain` makes it.

    A PlainText has been made so by its author, as a message with a traceback, and is left as it is. Messages that
    differ in numbers alone are logged ten times in five seconds at most, those at DEBUG excepted; the next one after
    that says how many were left out.
    """

    def __init__(self, name: str = '') -> None:
        super().__init__(name)
        self._lock = threading.Lock()
        self._causes: dict[tuple[str, str], list[float]] = {}

    # rclpy fixes the severity of a call site, so each level has a call of its own.

    def debug(self, message: str, **kwargs: Any) -> bool:
        """Log at DEBUG."""
        return self.is_enabled_for(_DEBUG) and bool(super().debug(_plain(message), **kwargs))

    def info(self, message: str, **kwargs: Any) -> bool:
        """Log at INFO."""
        return (text := self._admit('info', message)) is not None and bool(super().info(text, **kwargs))

    def warning(self, message: str, **kwargs: Any) -> bool:
        """Log at WARN."""
        return (text := self._admit('warning', message)) is not None and bool(super().warning(text, **kwargs))

    warn = warning

    def error(self, message: str, **kwargs: Any) -> bool:
        """Log at ERROR."""
        return (text := self._admit('error', message)) is not None and bool(super().error(text, **kwargs))

    def fatal(self, message: str, **kwargs: Any) -> bool:
        """Log at FATAL."""
        return (text := self._admit('fatal', message)) is not None and bool(super().fatal(text, **kwargs))

    def _admit(self, level: str, message: str) -> str | None:
        """Return what is logged of a message, None if similar messages have just been logged often enough."""
        text = _plain(message)
        # A level that is switched off costs what this does; few messages come there.
        key, now = (level, cause_of(text[:_BEGINNING_CHARACTERS])), time.monotonic()
        with self._lock:
            began, logged, left_out = self._causes.pop(key, (now, 0, 0))
            if now - began >= _WINDOW_S:
                began, logged = now, 0
            admitted = logged < _BURST
            # The latest is last, so that the first is the one to forget.
            self._causes[key] = [began, logged + 1, 0 if admitted else left_out + 1]
            if len(self._causes) > _MOST_CAUSES:
                del self._causes[next(iter(self._causes))]
        if not admitted:
            return None
        if not left_out:
            return text
        first, newline, others = text.partition('\n')
        return f'{first} ({left_out:,.0f} similar messages left out){newline}{others}'


def _plain(message: str) -> str:
    return message if isinstance(message, PlainText) else plain(message)
