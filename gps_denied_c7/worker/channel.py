"""The socket between a node and a child process: one packet for each message, with descriptors beside it (F-1)."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
from collections.abc import Sequence
from typing import Any

from gps_denied_c7.errors import C7Error, InferenceError
from gps_denied_c7.worker.messages import PACKET_BYTES, ChildProtocol, MessageError

__all__ = ['Channel', 'ChannelClosedError']

_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * array.array('i').itemsize)


class ChannelClosedError(C7Error):
    """The process at the other end is gone."""


class Channel:
    """
    Send and receive messages; each arrives whole or not at all.

    :param end: one end of a ``SOCK_SEQPACKET`` pair, owned by this object.
    :param protocol: what is sent and received.
    :param in_child: this is the child's end, which alone receives descriptors; the kernel closes those that a child
        sends to the node.
    """

    def __init__(self, end: socket.socket, protocol: ChildProtocol, *, in_child: bool) -> None:
        self._end = end
        self._takes_descriptors = in_child
        self._sent, self._received = protocol.to_child, protocol.from_child
        if in_child:
            self._sent, self._received = self._received, self._sent
        # Packets are read into one place, so that none costs an allocation of the largest one's size.
        self._packet = memoryview(bytearray(PACKET_BYTES))

    @classmethod
    def pair(cls, protocol: ChildProtocol) -> tuple[Channel, Channel]:
        """Return two connected channels, the node's and its child's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours, protocol, in_child=False), cls(theirs, protocol, in_child=True)

    def fileno(self) -> int:
        """Return the descriptor, to be polled."""
        return self._end.fileno()

    def send(self, message: Any, descriptors: Sequence[int] = (), *, block: bool = True) -> None:
        """
        Send ``message``; a copy of each descriptor goes with it.

        :param block: wait where many messages lie unread at the other end.
        :raises ChannelClosedError: nothing is there to receive it.
        :raises InferenceError: it would have to wait, or is longer than the other end takes.
        """
        data = self._sent.encode(message)
        flags = 0 if block else socket.MSG_DONTWAIT
        try:
            if descriptors:
                # Not socket.send_fds, which drops its flags.
                beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', descriptors))]
                self._end.sendmsg([data], beside, flags)
            else:
                self._end.send(data, flags)
        except BlockingIOError as error:
            raise InferenceError('a message could not be sent: the other end reads none.') from error
        except OSError as error:
            raise ChannelClosedError(f'a message could not be sent: {error}.') from error

    def receive(self, *, block: bool = True) -> tuple[Any, list[int]] | None:
        """
        Return the next message and its descriptors, which the caller then owns; None where none waits.

        :raises ChannelClosedError: the other end is closed.
        :raises MessageError: the packet holds no message of the other end.
        """
        flags = socket.MSG_CMSG_CLOEXEC | (0 if block else socket.MSG_DONTWAIT)
        ancillary: list[tuple[int, int, bytes]] = []
        try:
            if self._takes_descriptors:
                # Not socket.recv_fds, which drops its flags.
                size, ancillary, result, _ = self._end.recvmsg_into([self._packet], _ANCILLARY_BYTES, flags)
                cut = bool(result & (socket.MSG_TRUNC | socket.MSG_CTRUNC))
            else:
                # With this flag, the kernel returns the full size also of a packet that it cuts off.
                size = self._end.recv_into(self._packet, 0, flags | socket.MSG_TRUNC)
                cut = size > PACKET_BYTES
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelClosedError(f'a message could not be received: {error}.') from error
        descriptors = _descriptors_of(ancillary)
        try:
            if not size:
                raise ChannelClosedError('the other end is closed.')
            if cut:
                raise MessageError(
                    f'a message longer than {PACKET_BYTES} bytes, or with more descriptors than are taken: '
                    f'{bytes(self._packet[:200])!r:.100}'
                )
            return self._received.decode(self._packet[:size]), descriptors
        except (ChannelClosedError, MessageError):
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def wait(self) -> None:
        """Wait until a message has come or the other end is closed, and leave it there."""
        # Not select, which takes no descriptor from 1024 on.
        waiting = select.poll()
        waiting.register(self._end, select.POLLIN)
        waiting.poll()

    def close(self) -> None:
        """Close this end; safe to repeat."""
        with contextlib.suppress(OSError):
            self._end.close()


def _descriptors_of(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    if not ancillary:
        return []
    descriptors = array.array('i')
    for level, what, content in ancillary:
        if (level, what) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return list(descriptors)
