"""Forward the library's and the vendors' log records to the ROS logger (N-8), and log where no file can be written."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

from gps_denied_c7.text import plain, with_traceback

__all__ = ['RosLogHandler', 'forward_to', 'log_files_problem']


class RosLogHandler(logging.Handler):
    """
    Hand records of Python's logging to one ROS logger at the level that fits.

    A message becomes one line, whatever is in it; a traceback follows in lines that are indented.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger
        self._emitting = threading.local()

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of one record."""
        return with_traceback(record.getMessage(), record.exc_info[1] if record.exc_info else None)

    def handleError(self, record: logging.LogRecord) -> None:
        """Print a record that could not be forwarded to standard error."""
        error = sys.exc_info()[1]
        with contextlib.suppress(OSError, ValueError):
            text = f'{record.levelname}: {record.msg} {record.args or ""} (not forwarded: {error})'
            print(plain(text), file=sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Forward one record; a failure must not reach the code that logged."""
        if getattr(self._emitting, 'now', False):
            # A record logged while another one is formatted would recurse without end.
            return
        self._emitting.now = True
        try:
            text = self.format(record)
            # rclpy fixes the severity of a call site, so each level has a call of its own.
            if record.levelno >= logging.CRITICAL:
                self._logger.fatal(text)
            elif record.levelno >= logging.ERROR:
                self._logger.error(text)
            elif record.levelno >= logging.WARNING:
                self._logger.warning(text)
            elif record.levelno >= logging.INFO:
                self._logger.info(text)
            else:
                self._logger.debug(text)
        except Exception:
            self.handleError(record)
        finally:
            self._emitting.now = False


def forward_to(logger: Any) -> RosLogHandler:
    """Forward every record of this process to ``logger`` and return the handler, to be removed at the end."""
    handler = RosLogHandler(logger)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    # Each ROS logger filters by its own level; third parties' records are logged from WARNING up.
    logging.getLogger('gps_denied_c7').setLevel(logging.DEBUG)
    return handler


def log_files_problem(environ: Mapping[str, str]) -> str:
    """
    Say why ROS cannot write its log files here, with the remedy; empty where it can.

    rcl refuses to start then, as under systemd, which sets no HOME, or on a read-only file system. The
    directory is found and made as rcutils does.
    """
    home = environ.get('HOME', '')
    directory = environ.get('ROS_LOG_DIR') or os.path.join(environ.get('ROS_HOME') or '~/.ros', 'log')
    remedy = 'Set ROS_LOG_DIR to a directory that this user may write.'
    if directory.startswith('~'):
        if not home:
            return f'No log files are written: HOME is not set. {remedy}'
        directory = home + directory[1:]
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return ''
    except OSError as error:
        return f'No log files are written: {error}. {remedy}'
