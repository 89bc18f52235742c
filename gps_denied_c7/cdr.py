"""
Plain CDR, in which ROS 2 messages travel, read and written without copying what is large.

rclpy makes a message object of a serialised one by copying its bytes three times, and the other way round twice; for an
image or a dense output that is milliseconds. The rules are those of the OMG's DDS-XTypes 1.3, 7.4.1 (XCDR1): four bytes
of header, then each value aligned to its own size, counted from behind the header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import CdrError

__all__ = ['CdrReader', 'CdrWriter', 'is_plain_cdr']

_HEADER_BYTES = 4
_LITTLE_ENDIAN = b'\x00\x01'


def is_plain_cdr(message: bytes | memoryview) -> bool:
    """Return whether a serialised message is XCDR1 in little-endian byte order, the one form read and written here."""
    return message[:2] == _LITTLE_ENDIAN


class CdrReader:
    """
    Read the fields of a serialised message one after the other.

    Each method reads the next field; one that does not fit into the bytes raises CdrError and nothing is read beyond
    them.

    :param message: header included; what :meth:`octets` returns are views of it, which keep it alive.
    :raises CdrError: the message is not plain CDR.
    """

    def __init__(self, message: bytes | memoryview) -> None:
        _require_plain(message)
        self._data = memoryview(message)
        self._end = _HEADER_BYTES

    def uint8(self) -> int:
        """Return an ``octet``, ``uint8`` or ``bool`` as a number."""
        return self._data[self._next(1)]

    def int32(self) -> int:
        """Return an ``int32``."""
        return int(struct.unpack_from('<i', self._data, self._next(4, 4))[0])

    def uint32(self) -> int:
        """Return a ``uint32``."""
        return int(struct.unpack_from('<I', self._data, self._next(4, 4))[0])

    def string(self) -> str:
        """Return a ``string`` as rclpy does: up to its first zero, bytes that are not UTF-8 replaced."""
        return str(bytes(self.octets()).partition(b'\0')[0], 'utf-8', 'replace')

    def octets(self) -> memoryview:
        """Return a ``uint8[]`` as a read-only view."""
        length = self.uint32()
        at = self._next(length)
        return self._data[at : at + length]

    def _next(self, size: int, alignment: int = 1) -> int:
        at = _aligned(self._end, alignment)
        if at + size > self._data.nbytes:
            raise CdrError(f'a field of {size} bytes at {at} ends beyond the message of {self._data.nbytes}.')
        self._end = at + size
        return at


class CdrWriter:
    """
    Append fields to a serialised message.

    :param begun: the message so far, header included; plain CDR.
    :raises CdrError: it is not.
    """

    def __init__(self, begun: bytes) -> None:
        _require_plain(begun)
        self._parts: list[bytes | memoryview] = [begun]
        self._end = len(begun)

    def uint32(self, value: int) -> None:
        """Append a ``uint32``."""
        self._align(4)
        self._append(struct.pack('<I', value))

    def int64s(self, values: Iterable[int]) -> None:
        """Append an ``int64[]``."""
        values = tuple(values)
        self.uint32(len(values))
        if values:
            # The padding belongs to the first element: an empty sequence has none.
            self._align(8)
            self._append(struct.pack(f'<{len(values)}q', *values))

    def string(self, text: str) -> None:
        """Append a ``string``."""
        encoded = text.encode() + b'\0'
        self.uint32(len(encoded))
        self._append(encoded)

    def octets(self, values: NDArray) -> None:
        """
        Append an array's bytes as a ``uint8[]``, in C order and little-endian.

        :param values: of any dtype and shape; must stay as it is until the message has been written.
        """
        little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder('<'))
        self.uint32(little.nbytes)
        if little.size:
            self._append(little.data.cast('B'))

    @property
    def nbytes(self) -> int:
        """Length of the message so far, header included."""
        return self._end

    def message(self) -> bytes:
        """Return the whole message; large fields are copied now, once."""
        return b''.join(self._parts)

    def write_into(self, buffer: memoryview) -> None:
        """
        Write the whole message; large fields are copied now, once.

        :param buffer: writable, of ``nbytes`` bytes.
        """
        at = 0
        for part in self._parts:
            buffer[at : at + len(part)] = part
            at += len(part)

    def _align(self, alignment: int) -> None:
        self._append(bytes(_aligned(self._end, alignment) - self._end))

    def _append(self, part: bytes | memoryview) -> None:
        self._parts.append(part)
        self._end += len(part)


def _require_plain(message: bytes | memoryview) -> None:
    if not is_plain_cdr(message):
        raise CdrError(f'encapsulation {message[:2].hex()!r} is not plain little-endian CDR.')


def _aligned(position: int, alignment: int) -> int:
    return position + -(position - _HEADER_BYTES) % alignment
