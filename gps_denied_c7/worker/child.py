"""What every child process of the node does first, and how its log lines are marked."""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import sys
import threading

from gps_denied_c7.parent_death import die_with_parent

__all__ = ['LOG_MARK', 'SPARE_NAME', 'WORKER_NAME', 'begin_child', 'name_process']

LOG_MARK = '\x1e'
"""Begins each line on standard error that comes from :mod:`logging`: mark, level number, blank, text."""

WORKER_NAME, SPARE_NAME = 'c7-worker', 'c7-spare'
"""What the process is called by the kernel (``ps -o comm``): with an engine or on the way to one, and without."""

_PR_SET_NAME = 15


def begin_child(name: str, lifetime: int) -> None:
    """
    Make this process one that ends with the node, leaves no core and marks its log lines.

    :param name: what the kernel calls it, 15 characters at most.
    :param lifetime: descriptor that is closed when the node ends.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    name_process(name)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Marked())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    threading.Thread(target=_end_with, args=(lifetime,), name='c7-lifetime', daemon=True).start()


def name_process(name: str) -> None:
    """Have the kernel call this process ``name``, 15 characters at most."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


class _Marked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines() or ['']
        return '\n'.join(f'{LOG_MARK}{record.levelno} {line}' for line in lines)


def _end_with(descriptor: int) -> None:
    os.read(descriptor, 1)
    os._exit(1)
