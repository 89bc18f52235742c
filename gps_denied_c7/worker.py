"""
Run one engine in a process of its own: ``python -m gps_denied_c7.worker --channel FD`` (F-1).

Started by :mod:`gps_denied_c7.worker_process` alone. Vendor libraries live and die here; whoever started this
process has its frames answered by another one then. Until its parent's death is its own, it imports nothing large.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import resource
import signal
import socket
import sys
import threading

from gps_denied_c7.worker_channel import Channel, ChannelClosedError

__all__ = ['LOG_MARK', 'SPARE_NAME', 'WORKER_NAME', 'begin_child', 'die_with_parent', 'main']

LOG_MARK = '\x1e'
"""Begins each line on standard error that comes from :mod:`logging`: mark, level number, blank, text."""

WORKER_NAME, SPARE_NAME = 'c7-worker', 'c7-spare'
"""What the process is called by the kernel (``ps -o comm``): with an engine or on the way to one, and without."""

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_LOWEST_PRIORITY = 19


def die_with_parent() -> None:
    """Have the kernel end this process with the thread that started it, also while it hangs in a driver."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def begin_child(name: str, lifetime: int) -> None:
    """
    Make this process one that ends with the node, leaves no core and marks its log lines.

    :param name: what the kernel calls it, 15 characters at most.
    :param lifetime: descriptor that is closed when the node ends.
    """
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _name_process(name)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Marked())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    threading.Thread(target=_end_with, args=(lifetime,), name='c7-lifetime', daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Serve until the channel is closed from the other end."""
    parser = argparse.ArgumentParser(prog='gps_denied_c7.worker', description='Run one engine for a node.')
    parser.add_argument('--channel', type=int, required=True, help='descriptor of the socket to the node')
    parser.add_argument('--lifetime', type=int, required=True, help='descriptor that is closed when the node ends')
    parser.add_argument('--spare', metavar='STRATEGY', help='import what it needs, say so, and wait')
    options = parser.parse_args(arguments)
    begin_child(WORKER_NAME, options.lifetime)
    channel = Channel(socket.socket(fileno=options.channel))
    if options.spare:
        _get_ready(options.spare, channel)
    from gps_denied_c7.worker_service import EngineService

    with contextlib.suppress(ChannelClosedError):
        EngineService(channel).run()
    # The order in which vendor libraries run their static destructors must not matter.
    os._exit(0)


def _get_ready(strategy: str, channel: Channel) -> None:
    """Import everything for ``strategy`` without taking the processor from anybody, say so, and wait for a task."""
    _name_process(SPARE_NAME)
    # Without privileges a priority is given up for good: a thread's own is, and ends with it.
    importing = threading.Thread(target=_import_for, args=(strategy,), name='c7-import')
    importing.start()
    importing.join()
    with contextlib.suppress(ChannelClosedError):
        channel.send({'say': 'ready'})
    channel.wait()
    _name_process(WORKER_NAME)


def _import_for(strategy: str) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    from gps_denied_c7 import worker_service  # noqa: F401
    from gps_denied_c7.runtimes.registry import import_strategy

    import_strategy(strategy)


def _name_process(name: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())


class _Marked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines() or ['']
        return '\n'.join(f'{LOG_MARK}{record.levelno} {line}' for line in lines)


def _end_with(descriptor: int) -> None:
    os.read(descriptor, 1)
    os._exit(1)


if __name__ == '__main__':
    sys.exit(main())
