"""
The socket between a node and a child process, and its messages, one packet for each (F-1).

Messages are typed, versioned, and read as if an attacker had sent them.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from gps_denied_c7._json import FieldError, Reader, as_array, reader_of
from gps_denied_c7.errors import C7Error, InferenceError

__all__ = [
    'PACKET_BYTES', 'PROTOCOL_VERSION', 'Channel', 'ChannelClosedError', 'ChildProtocol', 'MessageError', 'MessageSet',
    'Ready',
]  # fmt: skip

PROTOCOL_VERSION = 1
"""Of all messages to and from children; to be raised with each change of a message, which a test notices."""
PACKET_BYTES = 1 << 16
"""Longest message."""

# Plain whole numbers: on Python's flags each operation is four calls, and several are done for every frame.
_DO_NOT_WAIT = int(socket.MSG_DONTWAIT)
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC)
# With this flag, the kernel returns the full size also of a packet that it cuts off.
_FULL_SIZE = int(socket.MSG_TRUNC)
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * array.array('i').itemsize)


class MessageError(InferenceError):
    """A packet that does not hold a message which its sender may send."""


@dataclass(frozen=True, slots=True)
class Ready:
    """
    Say that a child can take its first message; the first message of every child.

    :param version: of the protocol that the child speaks. This message stays the same in all versions.
    """

    version: int = PROTOCOL_VERSION


class MessageSet:
    """
    Encode and decode the messages of one direction.

    A message is a frozen dataclass. Its packet is a JSON array: the name of the class, then its fields in order.

    :param kinds: the classes of these messages.
    :param packed: the class of one more, which is sent with every frame: a named tuple of whole numbers of 0 to
        2**64 - 1. They travel as bytes; None for no such message.
    """

    def __init__(self, kinds: Sequence[type], *, packed: Any = None) -> None:
        # Types in annotations are resolved with the first message: the modules that hold them import this one.
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._readers: dict[str, Reader] = {}
        self.packed = packed
        # JSON begins with no zero byte.
        self._struct = struct.Struct(f'<x{len(packed._fields) if packed is not None else 0}Q')
        self._encoder = json.JSONEncoder(separators=(',', ':'), default=as_array)

    @property
    def kinds(self) -> tuple[type, ...]:
        """The classes of all messages."""
        return (*self._kinds.values(), *([self.packed] if self.packed is not None else []))

    def encode(self, message: Any) -> bytes:
        """
        Return the packet of a message.

        :raises InferenceError: it is longer than the other end takes.
        """
        kind = type(message)
        if kind is self.packed:
            return self._struct.pack(*message)
        assert self._kinds[kind.__name__] is kind
        data = self._encoder.encode([kind.__name__, *as_array(message)]).encode()
        if len(data) > PACKET_BYTES:
            raise InferenceError(
                f'a message of {len(data)} bytes is longer than {PACKET_BYTES}: {data!r:.100}',
                remedy='Export the model with fewer tensors, or shorter names.',
            )
        return data

    def decode(self, packet: bytes | bytearray | memoryview) -> Any:
        """
        Return the message of a packet.

        :raises MessageError: unreadable, of an unknown kind, or with a field that is missing, extra or of another type.
        """
        if len(packet) == self._struct.size and packet[0] == 0 and self.packed is not None:
            return self.packed(*self._struct.unpack(packet))
        try:
            value = json.loads(str(packet, 'utf-8'))
            if type(value) is not list or not value or type(value[0]) is not str:
                raise ValueError('it is not a list that begins with a name')
            name, *values = value
            if name not in self._kinds:
                raise ValueError(f'its kind is unknown, known are {list(self._kinds)}')
            if name not in self._readers:
                self._readers[name] = reader_of(self._kinds[name], arrays=True)
            return self._readers[name](values)
        except FieldError as error:
            where = f'{name}{error.path}'
            raise MessageError(f'an invalid message: {where} {error.message}: {_beginning(packet)}') from error
        except (ValueError, RecursionError) as error:
            raise MessageError(f'a message that cannot be read ({error}): {_beginning(packet)}') from error


def _beginning(packet: bytes | bytearray | memoryview) -> str:
    return f'{bytes(packet[:200])!r:.100}'


class ChildProtocol:
    """
    Hold what a node and one kind of child send each other.

    :param module: that the child runs.
    :param to_child: the messages of the node.
    :param from_child: the messages of the child, besides :class:`Ready`.
    :param packed: of each, the message that is sent with every frame.
    """

    def __init__(
        self,
        module: str,
        *,
        to_child: Sequence[type],
        from_child: Sequence[type],
        packed: tuple[type | None, type | None] = (None, None),
    ) -> None:
        self.module = module
        self.to_child = MessageSet(to_child, packed=packed[0])
        self.from_child = MessageSet((Ready, *from_child), packed=packed[1])


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
        flags = 0 if block else _DO_NOT_WAIT
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
        flags = _RECEIVE if block else _RECEIVE | _DO_NOT_WAIT
        ancillary: list[tuple[int, int, bytes]] = []
        try:
            if self._takes_descriptors:
                # Not socket.recv_fds, which drops its flags.
                size, ancillary, result, _ = self._end.recvmsg_into([self._packet], _ANCILLARY_BYTES, flags)
                cut = bool(result & _CUT)
            else:
                size = self._end.recv_into(self._packet, 0, flags | _FULL_SIZE)
                cut = size > PACKET_BYTES
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelClosedError(f'a message could not be received: {error}.') from error
        descriptors = _descriptors_of(ancillary) if ancillary else []
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

    def serve(self, handlers: Mapping[type, Callable[[Any, list[int]], None]]) -> NoReturn:
        """
        Hand each message that comes to the handler of its class, with its descriptors, which that then owns.

        :raises ChannelClosedError: the other end is closed.
        """
        while True:
            received = self.receive()
            assert received is not None
            message, descriptors = received
            handlers[type(message)](message, descriptors)

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
    descriptors = array.array('i')
    for level, what, content in ancillary:
        if (level, what) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
    return list(descriptors)
