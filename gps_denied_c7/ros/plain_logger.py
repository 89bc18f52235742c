"""A node's ROS logger, whose every line prints and ends, whatever text from outside is in it."""

from __future__ import annotations

import os
import sys
from typing import Any

from rclpy.logging import get_logger

from gps_denied_c7.text import PlainText, plain

__all__ = ['PlainLogger']

_RosLogger: Any = type(get_logger('gps_denied_c7'))

# Have ROS show where the node logged, not this file; its own comment allows others to add theirs.
getattr(sys.modules[_RosLogger.__module__], '_internal_callers', []).append(os.path.realpath(__file__))


class PlainLogger(_RosLogger):  # type: ignore[misc]
    """
    Log as rclpy's logger of the same name does, each message as :func:`plain` makes it.

    A PlainText has been made so by its author, as a message with a traceback, and is left as it is.
    """

    # rclpy fixes the severity of a call site, so each level has a call of its own.

    def debug(self, message: str, **kwargs: Any) -> bool:
        """Log at DEBUG."""
        return bool(super().debug(_plain(message), **kwargs))

    def info(self, message: str, **kwargs: Any) -> bool:
        """Log at INFO."""
        return bool(super().info(_plain(message), **kwargs))

    def warning(self, message: str, **kwargs: Any) -> bool:
        """Log at WARN."""
        return bool(super().warning(_plain(message), **kwargs))

    warn = warning

    def error(self, message: str, **kwargs: Any) -> bool:
        """Log at ERROR."""
        return bool(super().error(_plain(message), **kwargs))

    def fatal(self, message: str, **kwargs: Any) -> bool:
        """Log at FATAL."""
        return bool(super().fatal(_plain(message), **kwargs))


def _plain(message: str) -> str:
    return message if isinstance(message, PlainText) else plain(message)
