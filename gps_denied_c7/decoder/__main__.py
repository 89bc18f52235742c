"""
Decode the pictures of one camera in a process of its own: ``python -m gps_denied_c7.decoder --channel FD``.

Started by :mod:`gps_denied_c7.decoder.client` alone. What a picture does to the decoder, it does here. Until its
parent's death is its own, it imports nothing large.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import socket
import sys

from gps_denied_c7.worker.child import begin_child

__all__ = ['DECODER_NAME', 'main']

DECODER_NAME = 'c7-decoder'
"""What the kernel calls the process (``ps -o comm``)."""

# Of all processes of a node, the kernel ends this one first where memory runs out: a picture is lost, no engine.
_MOST_EXPENDABLE = '1000'
_LARGEST_HEAP_BYTES = 1 << 26
# Room for the libraries. The size in a file's header is checked first: that error says more than a failed allocation.
_SLACK_BYTES = 1 << 25


def main(arguments: list[str] | None = None) -> int:
    """Serve until the channel is closed from the other end."""
    parser = argparse.ArgumentParser(prog='gps_denied_c7.decoder', description='Decode images for a node.')
    parser.add_argument('--channel', type=int, required=True, help='descriptor of the socket to the node')
    parser.add_argument('--lifetime', type=int, required=True, help='descriptor that is closed when the node ends')
    parser.add_argument('--memory', type=int, required=True, help='bytes that decoding may take')
    options = parser.parse_args(arguments)
    begin_child(DECODER_NAME, options.lifetime)
    with open('/proc/self/oom_score_adj', 'w', encoding='ascii') as score:
        score.write(_MOST_EXPENDABLE)
    _keep_heap()
    # A camera may use one core at most.
    os.environ.update(OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1')
    from gps_denied_c7.decoder.protocol import DECODER_PROTOCOL
    from gps_denied_c7.decoder.server import DecoderService
    from gps_denied_c7.worker.channel import Channel, ChannelClosedError

    channel = Channel(socket.socket(fileno=options.channel), DECODER_PROTOCOL, in_child=True)
    service = DecoderService(channel, options.memory)
    _limit_memory(options.memory)
    with contextlib.suppress(ChannelClosedError):
        service.run()
    os._exit(0)


def _keep_heap() -> None:
    """Have malloc keep the memory of a picture for the next one: mapping it again took a third of the time of a PNG."""
    # mallopt(3), malloc.h of glibc.
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, _LARGEST_HEAP_BYTES // 2)
    libc.mallopt(trim_threshold, _LARGEST_HEAP_BYTES)


def _limit_memory(size: int) -> None:
    """Make allocations fail beyond ``size`` bytes and what the libraries have already."""
    # Not RLIMIT_AS, which counts the shared segments too; the node limits those.
    with open('/proc/self/status', encoding='ascii') as status:
        fields = dict(line.split(':', 1) for line in status)
    limit = int(fields['VmData'].split()[0]) * 1024 + size + _SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == '__main__':
    sys.exit(main())
