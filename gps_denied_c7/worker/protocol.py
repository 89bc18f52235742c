"""How a node and its worker processes talk: small packets over a socket pair, with descriptors beside them (F-1)."""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from gps_denied_c7 import errors
from gps_denied_c7._json import decode_json
from gps_denied_c7.errors import (
    C7Error,
    EngineSchemaMismatchError,
    GpuUnavailableError,
    InferenceError,
    RuntimeUnavailableError,
)

__all__ = ['Channel', 'ChannelClosedError', 'error_from_json', 'error_to_json', 'plain_text']

_PACKET_BYTES = 1 << 16
_TEXT_CHARACTERS = 8000
# Packets of these sizes that begin with what no JSON begins with: numbers alone.
_NUMBERS_MARK = 0
_NUMBERS = {layout.size: layout for layout in (struct.Struct(f'<B{count}Q') for count in range(1, 4))}
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * array.array('i').itemsize)


class ChannelClosedError(C7Error):
    """The process at the other end is gone."""


class Channel:
    """
    Send and receive packets, each one JSON object, or up to three numbers alone: what is said with every frame.

    A packet arrives whole or not at all. What comes from a worker is data only: nothing in it is executed.

    :param end: one end of a ``SOCK_SEQPACKET`` pair, owned by this object.
    :param takes_descriptors: whether any are received; those that come all the same are closed by the kernel.
    """

    def __init__(self, end: socket.socket, *, takes_descriptors: bool = True) -> None:
        self._end = end
        self._takes_descriptors = takes_descriptors
        # A packet is read into one place, so that none costs an allocation of the largest one's size.
        self._packet = bytearray(_PACKET_BYTES)

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return two connected channels: the node's, which takes no descriptors, and its worker's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours, takes_descriptors=False), cls(theirs)

    def fileno(self) -> int:
        """Return the descriptor, to be polled."""
        return self._end.fileno()

    def send(self, packet: Mapping[str, Any], descriptors: Iterable[int] = (), *, block: bool = True) -> None:
        """
        Send ``packet``; a copy of each descriptor goes with it.

        :param block: wait where many packets lie unread at the other end.
        :raises ChannelClosedError: nobody is there to receive it.
        :raises InferenceError: it would have to wait, or is longer than the other end takes.
        """
        data = json.dumps(packet, separators=(',', ':')).encode()
        if len(data) > _PACKET_BYTES:
            raise InferenceError(f'a packet of {len(data)} bytes is longer than {_PACKET_BYTES}: {data!r:.100}')
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', descriptors))]
        try:
            # Not socket.send_fds, which drops its flags.
            self._end.sendmsg([data], beside, 0 if block else socket.MSG_DONTWAIT)
        except BlockingIOError as error:
            raise InferenceError('a packet could not be sent: the other end reads none.') from error
        except OSError as error:
            raise ChannelClosedError(f'a packet could not be sent: {error}.') from error

    def send_numbers(self, *numbers: int) -> None:
        """
        Send one to three numbers of 0 to 2**64 - 1, without waiting.

        :raises ChannelClosedError: nobody is there to receive it.
        :raises InferenceError: it would have to wait.
        """
        try:
            self._end.send(_NUMBERS[1 + 8 * len(numbers)].pack(_NUMBERS_MARK, *numbers), socket.MSG_DONTWAIT)
        except BlockingIOError as error:
            raise InferenceError('a packet could not be sent: the other end reads none.') from error
        except OSError as error:
            raise ChannelClosedError(f'a packet could not be sent: {error}.') from error

    def receive(self, *, block: bool = True) -> tuple[dict[str, Any] | tuple[int, ...], list[int]] | None:
        """
        Return the next packet and its descriptors, which the caller then owns; None when none waits.

        :raises ChannelClosedError: the other end is closed.
        :raises InferenceError: the packet cannot be read.
        """
        flags = socket.MSG_CMSG_CLOEXEC | (0 if block else socket.MSG_DONTWAIT)
        ancillary: list[tuple[int, int, bytes]] = []
        kind = 0
        try:
            if self._takes_descriptors:
                # Not socket.recv_fds, which drops its flags.
                size, ancillary, kind, _ = self._end.recvmsg_into([self._packet], _ANCILLARY_BYTES, flags)
            else:
                # Told its full size, one that was cut off is seen.
                size = self._end.recv_into(self._packet, 0, flags | socket.MSG_TRUNC)
                kind = socket.MSG_TRUNC if size > _PACKET_BYTES else 0
        except BlockingIOError:
            return None
        except OSError as error:
            raise ChannelClosedError(f'a packet could not be received: {error}.') from error
        if size in _NUMBERS and not ancillary and self._packet[0] == _NUMBERS_MARK:
            return _NUMBERS[size].unpack_from(self._packet)[1:], []
        descriptors = array.array('i')
        for level, what, content in ancillary:
            if (level, what) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        data = bytes(self._packet[:size])
        try:
            if not data:
                raise ChannelClosedError('the other end is closed.')
            if kind & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError(f'cut off: longer than {_PACKET_BYTES} bytes, or with more descriptors than are taken')
            packet = decode_json(data.decode())
            if not isinstance(packet, dict):
                raise ValueError('no object')
        except (ChannelClosedError, ValueError) as error:
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(error, ChannelClosedError):
                raise
            raise InferenceError(f'a packet cannot be read ({error}): {data!r:.100}') from error
        return packet, list(descriptors)

    def wait(self) -> None:
        """Wait until a packet has come or the other end is closed, and leave it there."""
        # Not select, which knows no descriptor from 1024 on.
        waiting = select.poll()
        waiting.register(self._end, select.POLLIN)
        waiting.poll()

    def close(self) -> None:
        """Close this end; safe to repeat."""
        with contextlib.suppress(OSError):
            self._end.close()


def error_to_json(error: BaseException) -> dict[str, Any]:
    """Return what :func:`error_from_json` makes an error of the same kind from."""
    if not isinstance(error, C7Error):
        return {'kind': 'InferenceError', 'message': f'{type(error).__name__}: {error}'[:_TEXT_CHARACTERS]}
    fields = {name: getattr(error, name, '') for name in ('label', 'field', 'expected', 'found')}
    return {
        'kind': type(error).__name__,
        'message': error.message[:_TEXT_CHARACTERS],
        'remedy': error.remedy[:_TEXT_CHARACTERS],
        'fields': {name: str(value)[:_TEXT_CHARACTERS] for name, value in fields.items()},
        'lasting': error.lasting,
    }


def plain_text(value: object) -> str:
    """Return what a worker told as text that can be written anywhere, halves of surrogate pairs spelled out."""
    return str(value).encode('utf-8', 'backslashreplace').decode()


def error_from_json(value: Any) -> C7Error:
    """Return the error that a worker met; of the base's kind where nobody knows the one it names."""
    value = value if isinstance(value, dict) else {'message': repr(value)[:200]}
    message, remedy = plain_text(value.get('message', '')), plain_text(value.get('remedy', ''))
    kind = getattr(errors, str(value.get('kind')), InferenceError)
    fields = value.get('fields')
    fields = fields if isinstance(fields, dict) else {}
    error: C7Error
    if kind is EngineSchemaMismatchError:
        error = EngineSchemaMismatchError(
            str(fields.get('field', '')), expected=fields.get('expected'), found=fields.get('found')
        )
    elif kind in (RuntimeUnavailableError, GpuUnavailableError):
        error = kind(str(fields.get('label', '')), '')
    elif kind in (errors.EngineDeserializeError, errors.ModelBundleError, InferenceError):
        error = kind('')
    else:
        error = InferenceError('')
    # The text was made where the error was met.
    error.message, error.remedy = message, remedy
    error.is_lasting = value.get('lasting', error.is_lasting) is True
    error.args = (f'{message} {remedy}' if remedy else message,)
    return error
