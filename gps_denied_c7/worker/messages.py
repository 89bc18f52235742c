"""The messages of a node and its child processes: typed, versioned, and read as if an attacker had sent them (F-1)."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from gps_denied_c7._typed_json import FieldError, Reader, as_array, reader_of
from gps_denied_c7.errors import InferenceError

__all__ = ['PACKET_BYTES', 'PROTOCOL_VERSION', 'ChildProtocol', 'MessageError', 'MessageSet', 'Ready']

PROTOCOL_VERSION = 1
"""Of all messages to and from children; to be raised with each change of a message, which a test notices."""
PACKET_BYTES = 1 << 16
"""Longest message."""


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

    :param kinds: the classes of all messages.
    :param packed: the one that is sent with every frame. Its fields, whole numbers of 0 to 2**64 - 1, travel as bytes.
    """

    def __init__(self, kinds: Sequence[type], *, packed: type | None = None) -> None:
        # Types in annotations are resolved with the first message: the modules that hold them import this one.
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._readers: dict[str, Reader] = {}
        self._packed = packed
        # JSON begins with no zero byte.
        self._struct = struct.Struct(f'<x{len(fields(packed)) if packed is not None else 0}Q')
        self._encoder = json.JSONEncoder(separators=(',', ':'), default=as_array)

    @property
    def kinds(self) -> tuple[type, ...]:
        """The classes of all messages."""
        return tuple(self._kinds.values())

    def encode(self, message: Any) -> bytes:
        """
        Return the packet of a message.

        :raises InferenceError: it is longer than the other end takes.
        """
        kind = type(message)
        if kind is self._packed:
            return self._struct.pack(*as_array(message))
        assert self._kinds[kind.__name__] is kind
        data = self._encoder.encode([kind.__name__, *as_array(message)]).encode()
        if len(data) > PACKET_BYTES:
            raise InferenceError(f'a message of {len(data)} bytes is longer than {PACKET_BYTES}: {data!r:.100}')
        return data

    def decode(self, packet: bytes | bytearray | memoryview) -> Any:
        """
        Return the message of a packet.

        :raises MessageError: unreadable, of an unknown kind, or with a field that is missing, extra or of another type.
        """
        if self._packed is not None and len(packet) == self._struct.size and packet[0] == 0:
            return self._packed(*self._struct.unpack(packet))
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
    :param packed: the messages that are sent with every frame, to and from the child.
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
