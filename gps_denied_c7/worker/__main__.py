"""
Run one engine in a process of its own: ``python -m gps_denied_c7.worker --channel FD`` (F-1).

Started by :mod:`gps_denied_c7.worker.process` alone. Vendor libraries run and crash here; the node then
has its frames answered by another worker. Until its parent's death is its own, it imports nothing large.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading

from gps_denied_c7.worker.child import SPARE_NAME, WORKER_NAME, begin_child, name_process

__all__ = ['main']

_LOWEST_PRIORITY = 19


def main(arguments: list[str] | None = None) -> int:
    """Serve until the channel is closed from the other end."""
    parser = argparse.ArgumentParser(prog='gps_denied_c7.worker', description='Run one engine for a node.')
    parser.add_argument('--channel', type=int, required=True, help='descriptor of the socket to the node')
    parser.add_argument('--lifetime', type=int, required=True, help='descriptor that is closed when the node ends')
    parser.add_argument('--spare', metavar='STRATEGY', help='import what it needs, say so, and wait')
    options = parser.parse_args(arguments)
    begin_child(WORKER_NAME, options.lifetime)
    if options.spare:
        _import_unhurried(options.spare)
    from gps_denied_c7.worker.channel import Channel, ChannelClosedError, Ready
    from gps_denied_c7.worker.protocol import WORKER_PROTOCOL

    channel = Channel(socket.socket(fileno=options.channel), WORKER_PROTOCOL, in_child=True)
    with contextlib.suppress(ChannelClosedError):
        channel.send(Ready())
        if options.spare:
            channel.wait()
            name_process(WORKER_NAME)
        from gps_denied_c7.worker.server import EngineService

        EngineService(channel).run()
    # The order in which vendor libraries run their static destructors must not matter.
    os._exit(0)


def _import_unhurried(strategy: str) -> None:
    """Import everything for ``strategy`` at the lowest priority."""
    name_process(SPARE_NAME)
    # Without privileges a lowered priority cannot be raised again: so it is that of a thread, which ends.
    importing = threading.Thread(target=_import_for, args=(strategy,), name='c7-import')
    importing.start()
    importing.join()


def _import_for(strategy: str) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    from gps_denied_c7.runtimes.registry import import_strategy
    from gps_denied_c7.worker import server as worker_server  # noqa: F401

    import_strategy(strategy)


if __name__ == '__main__':
    sys.exit(main())
