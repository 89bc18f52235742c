"""
Messages taken and published through rcl itself, as the C structures that it fills and reads.

rclpy makes a message object of each structure and back, which copies an image or a dense output once more, into memory
that is newly allocated and with the interpreter's lock held; its raw form does no better, since the middleware copies
such a message to a buffer and from there once more. rcl's own functions take the address of a structure, and ctypes
lets other threads run meanwhile. Otherwise rclpy's message objects are used.

rmw_message_info_t below is that of rmw/types.h, the same from Humble to Rolling except for its end, behind which is
room. rcl's functions are documented in rcl/publisher.h and rcl/subscription.h.
"""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Any, NoReturn

from rclpy.publisher import Publisher
from rclpy.subscription import Subscription

from gps_denied_c7.errors import C7Error
from gps_denied_c7.ros.c_message import BorrowedMessage, CMessage, CMessageType, CSequence, LayoutError

__all__ = ['Rcl', 'RclError', 'UnreadableMessageError', 'load_rcl']

_log = logging.getLogger(__name__)

_LIBRARIES = ('rcl', 'rcutils')
_OK = 0
_TAKE_FAILED = 401
_NO_SEQUENCE_NUMBER = 2**64 - 1
_ERROR_BYTES = 4096
_SPARE_BYTES = 64


class RclError(C7Error):
    """A function of rcl that failed, or that is not there."""


class UnreadableMessageError(RclError):
    """A message whose bytes are not what its type says; it has been dropped."""


class _MessageInfo(ctypes.Structure):
    _fields_ = [
        ('source_timestamp', ctypes.c_int64),
        ('received_timestamp', ctypes.c_int64),
        ('publication_sequence_number', ctypes.c_uint64),
        ('reception_sequence_number', ctypes.c_uint64),
        ('gid_implementation', ctypes.c_void_p),
        ('gid', ctypes.c_uint8 * 16),
        # A flag, and before it on Humble, where a gid has 24 bytes, the rest of that.
        ('rest', ctypes.c_uint8 * _SPARE_BYTES),
    ]


class _ErrorString(ctypes.Structure):
    _fields_ = [('str', ctypes.c_char * _ERROR_BYTES)]


class Rcl:
    """
    Call the rcl that rclpy has loaded.

    :param message_types: those that are taken or published, and those in their sequences.
    :raises RclError: it is not where it is looked for.
    :raises LayoutError: one of the types is not laid out as known here.
    """

    def __init__(self, *message_types: type) -> None:
        try:
            # Only what is in the process already: another copy would know nothing of rclpy's handles.
            rcl, rcutils = (ctypes.CDLL(f'lib{name}.so', mode=os.RTLD_NOW | os.RTLD_NOLOAD) for name in _LIBRARIES)
            self._take = rcl.rcl_take
            self._publish = rcl.rcl_publish
            self._error_is_set = rcutils.rcutils_error_is_set
            self._error = rcutils.rcutils_get_error_string
            self._reset_error = rcutils.rcutils_reset_error
        except (OSError, AttributeError) as error:
            raise RclError(f'rcl cannot be called: {error}.') from error
        self._take.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(_MessageInfo), ctypes.c_void_p]
        self._publish.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self._error_is_set.restype = ctypes.c_bool
        self._error.restype = _ErrorString
        self._kinds = {message_type: CMessageType(message_type) for message_type in message_types}

    def message(self, message_type: type) -> CMessage:
        """
        Return a new message of one of the types.

        :raises MemoryError: no memory for it.
        """
        return CMessage(self._kinds[message_type])

    def borrowed(self, message_type: type) -> BorrowedMessage:
        """Return a new message of one of the types that owns nothing it points to."""
        return BorrowedMessage(self._kinds[message_type])

    def structures(self, message_type: type, count: int) -> Any:
        """Return an array of the structures of one of the types, all zero: what a sequence of messages points to."""
        return (self._kinds[message_type].structure * count)()

    def elements(self, message_type: type, sequence: CSequence) -> Any:
        """Return the structures that a sequence of messages points to, valid as long as its message."""
        return (self._kinds[message_type].structure * sequence.size).from_address(sequence.data or 0)

    def take(self, subscription: Subscription, message: CMessage) -> dict[str, Any] | None:
        """
        Take the next message of a subscription.

        :param message: of the subscription's type; what it held is freed or overwritten.
        :return: what rclpy calls the message's info, None where there was no message.
        :raises UnreadableMessageError: there was one, and none after it, that the middleware says it could not read.
        :raises RclError: rcl failed.
        :raises InvalidHandle: the subscription has been destroyed.
        """
        info = _MessageInfo()
        # An error that rclpy has left of another subscription's message is not reported for this one.
        self._reset_error()
        with subscription.handle:
            code = self._take(subscription.handle.pointer, message.address, info, None)
        if code == _TAKE_FAILED:
            if self._error_is_set():
                self._fail(f'a message of {subscription.topic} cannot be read', UnreadableMessageError)
            return None
        if code != _OK:
            self._fail(f'rcl returned {code} for a message of {subscription.topic}')
        number = info.publication_sequence_number
        return {
            'publication_sequence_number': None if number == _NO_SEQUENCE_NUMBER else number,
            'publisher_gid': {'data': bytes(info.gid)},
        }

    def take_new(self, subscription: Subscription, message_type: type) -> tuple[CMessage, dict[str, Any]] | None:
        """
        Take the next message of a subscription into a structure of its own.

        :param message_type: of the subscription, one of those that are known.
        :return: the message and what rclpy calls its info; None where there was no message.
        :raises UnreadableMessageError: there was one, and none after it, that the middleware could not read.
        :raises RclError: rcl failed.
        :raises InvalidHandle: the subscription has been destroyed.
        :raises MemoryError: no memory for one message more.
        """
        taken = self.message(message_type)
        untouched = bytes(taken.fields)
        info = self.take(subscription, taken)
        if info is None:
            if bytes(taken.fields) != untouched:
                # It began to read one: rcl does not report every reason.
                raise UnreadableMessageError(f'a message of {subscription.topic} cannot be read: it ends too early.')
            return None
        return taken, info

    def publish(self, publisher: Publisher, message: CMessage | BorrowedMessage) -> None:
        """
        Publish a message, which is only read, and may be changed on return.

        :raises RclError: rcl failed.
        :raises InvalidHandle: the publisher has been destroyed.
        """
        with publisher.handle:
            code = self._publish(publisher.handle.pointer, message.address, None)
        if code != _OK:
            self._fail(f'rcl returned {code} for a message on {publisher.topic}')

    def _fail(self, what: str, error: type[RclError] = RclError) -> NoReturn:
        text = self._error().str.decode('utf-8', 'replace')
        self._reset_error()
        raise error(f'{what}: {text}.')


def load_rcl(*message_types: type) -> Rcl | None:
    """Return what calls rcl for some types, None where it cannot be called."""
    try:
        return Rcl(*message_types)
    except (RclError, LayoutError) as error:
        _log.warning('images and answers take longer, since rclpy copies them once more: %s', error)
        return None
