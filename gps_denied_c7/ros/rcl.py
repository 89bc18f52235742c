"""
Serialised messages taken and published through rcl itself, in buffers that are used again.

rclpy has a raw form of both, but copies a message once more on its way: from what rcl filled into ``bytes``, or from
``bytes`` into a string, each newly allocated and with the interpreter's lock held. rcl's own functions take the address
of a buffer, and ctypes lets other threads run meanwhile. Whoever cannot have them uses rclpy's raw form.

The structures below are those of rcutils/types/uint8_array.h, rcutils/allocator.h and rmw/types.h, the same from Humble
to Rolling but for the end of rmw_message_info_t; each has room behind it. rcl's functions are documented in
rcl/publisher.h and rcl/subscription.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Callable
from typing import Any, NoReturn

from rclpy.callback_groups import CallbackGroup
from rclpy.exceptions import InvalidHandle
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.subscription import Subscription
from rclpy.waitable import NumberOfEntities, Waitable

from gps_denied_c7.errors import C7Error

__all__ = ['BufferPool', 'Rcl', 'RclError', 'SubscriptionReady', 'Untaken', 'load_rcl']

_log = logging.getLogger(__name__)

_LIBRARIES = ('rcl', 'rcutils')
_OK = 0
_TAKE_FAILED = 401
_NO_SEQUENCE_NUMBER = 2**64 - 1
_ERROR_BYTES = 4096
_SMALLEST_BYTES = 64
_SPARE_BYTES = 64
# One waits in the slot, one is being answered, one is being received.
_BUFFERS = 3


class RclError(C7Error):
    """A function of rcl that failed, or that is not there."""


class _Allocator(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ('allocate', 'deallocate', 'reallocate', 'zero_allocate', 'state')]


class _Uint8Array(ctypes.Structure):
    _fields_ = [
        ('buffer', ctypes.c_void_p),
        ('buffer_length', ctypes.c_size_t),
        ('buffer_capacity', ctypes.c_size_t),
        ('allocator', _Allocator),
        ('rest', ctypes.c_uint8 * _SPARE_BYTES),
    ]


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

    :raises RclError: it is not where it is looked for, or its structures are not those known here.
    """

    def __init__(self) -> None:
        try:
            # Only what is in the process already: another copy would know nothing of rclpy's handles.
            rcl, rcutils = (ctypes.CDLL(f'lib{name}.so', mode=os.RTLD_NOW | os.RTLD_NOLOAD) for name in _LIBRARIES)
            self._take = rcl.rcl_take_serialized_message
            self._publish = rcl.rcl_publish_serialized_message
            self._allocator = rcutils.rcutils_get_default_allocator
            self._initialise = rcutils.rcutils_uint8_array_init
            self._finalise = rcutils.rcutils_uint8_array_fini
            self._error = rcutils.rcutils_get_error_string
            self._reset_error = rcutils.rcutils_reset_error
        except (OSError, AttributeError) as error:
            raise RclError(f'rcl cannot be called: {error}.') from error
        array = ctypes.POINTER(_Uint8Array)
        self._take.argtypes = [ctypes.c_void_p, array, ctypes.POINTER(_MessageInfo), ctypes.c_void_p]
        self._publish.argtypes = [ctypes.c_void_p, array, ctypes.c_void_p]
        self._allocator.restype = _Allocator
        self._initialise.argtypes = [array, ctypes.c_size_t, ctypes.POINTER(_Allocator)]
        self._finalise.argtypes = [array]
        self._error.restype = _ErrorString
        probe = self.buffer()
        if (bool(probe.buffer), probe.buffer_length, probe.buffer_capacity) != (True, 0, _SMALLEST_BYTES):
            raise RclError('rcl cannot be called: its buffers are not laid out as from Humble to Rolling.')
        self.finalise(probe)

    def buffer(self) -> _Uint8Array:
        """Return a small empty buffer, which rcl grows as it needs to; the caller finalises it."""
        array = _Uint8Array()
        code = self._initialise(array, _SMALLEST_BYTES, self._allocator())
        if code != _OK:
            self._fail(code, 'a buffer')
        return array

    def finalise(self, array: _Uint8Array) -> None:
        """Free a buffer's memory."""
        self._finalise(array)

    def take(self, subscription: Subscription, array: _Uint8Array) -> dict[str, Any] | None:
        """
        Take the next message of a subscription into a buffer.

        :return: what rclpy calls the message's info, None where there was no message.
        :raises RclError: rcl failed.
        """
        info = _MessageInfo()
        with subscription.handle:
            code = self._take(subscription.handle.pointer, array, info, None)
        if code == _TAKE_FAILED:
            self._reset_error()
            return None
        if code != _OK:
            self._fail(code, f'a message of {subscription.topic}')
        number = info.publication_sequence_number
        return {
            'publication_sequence_number': None if number == _NO_SEQUENCE_NUMBER else number,
            'publisher_gid': {'data': bytes(info.gid)},
        }

    def publish(self, publisher: Publisher, message: memoryview) -> None:
        """
        Publish a serialised message.

        :param message: writable, contiguous; only read, and free again on return.
        :raises RclError: rcl failed.
        """
        start = ctypes.addressof(ctypes.c_uint8.from_buffer(message))
        array = _Uint8Array(start, message.nbytes, message.nbytes)
        with publisher.handle:
            code = self._publish(publisher.handle.pointer, array, None)
        if code != _OK:
            self._fail(code, f'a message on {publisher.topic}')

    def _fail(self, code: int, what: str) -> NoReturn:
        text = self._error().str.decode('utf-8', 'replace')
        self._reset_error()
        raise RclError(f'rcl returned {code} for {what}: {text}.')


def load_rcl() -> Rcl | None:
    """Return what calls rcl, None where it cannot be called."""
    try:
        return Rcl()
    except RclError as error:
        _log.warning('images and answers take longer, since rclpy copies them once more: %s', error)
        return None


class BufferPool:
    """
    Take messages into buffers that are used again once nobody looks at the message any more; from one thread.

    A buffer keeps the size of the largest message it has held.
    """

    def __init__(self, rcl: Rcl) -> None:
        self._rcl = rcl
        self._free: list[_Uint8Array] = []
        self._closed = False

    def take(self, subscription: Subscription) -> tuple[memoryview, dict[str, Any]] | None:
        """
        Return the next message of a subscription and its info, None where there is none.

        :return: a read-only view; its buffer is kept as long as it, or a part of it, is.
        :raises RclError: rcl failed.
        """
        try:
            array = self._free.pop()
        except IndexError:
            array = self._rcl.buffer()
        loan = _Loan(self, array)
        info = self._rcl.take(subscription, array)
        return None if info is None else (loan.view(), info)

    def close(self) -> None:
        """Free every buffer, those of messages that somebody still looks at once nobody does; from any thread."""
        self._closed = True
        # Another thread may be taking the last one.
        with contextlib.suppress(IndexError):
            while True:
                self._rcl.finalise(self._free.pop())

    def give_back(self, array: _Uint8Array) -> None:
        """Keep a buffer for the next message, or free it where enough of them wait; from any thread."""
        if self._closed or len(self._free) >= _BUFFERS:
            self._rcl.finalise(array)
        else:
            self._free.append(array)

    def __del__(self) -> None:
        self.close()


class _Loan:
    """Give a buffer back when the last view of it has gone."""

    def __init__(self, pool: BufferPool, array: _Uint8Array) -> None:
        self._pool = pool
        self._array = array

    def view(self) -> memoryview:
        # Of its capacity, which hardly ever changes: ctypes makes a type for each length.
        content = (ctypes.c_uint8 * self._array.buffer_capacity).from_address(self._array.buffer)
        # A memoryview keeps what it looks at, and that keeps the buffer.
        content.loan = self
        return memoryview(content).cast('B')[: self._array.buffer_length].toreadonly()

    def __del__(self) -> None:
        self._pool.give_back(self._array)


class Untaken(CallbackGroup):
    """Have executors leave the messages of subscriptions alone, though not their events."""

    def can_execute(self, entity: Any) -> bool:
        """Return whether an executor may wait for ``entity``."""
        return not isinstance(entity, Subscription)

    def beginning_execution(self, entity: Any) -> bool:
        """Let any number of callbacks run at the same time."""
        return True

    def ending_execution(self, entity: Any) -> None:
        """Do nothing: nobody waits for the end of a callback."""


class SubscriptionReady(Waitable):
    """
    Call back when a subscription has a message, and leave taking it to the callback.

    :param subscription: of an :class:`Untaken` group; destroyed by whoever made it, after :meth:`close`.
    :param group: of the callback.
    :param callback: lets no exception out.
    """

    def __init__(
        self, node: Node, subscription: Subscription, group: CallbackGroup, callback: Callable[[], None]
    ) -> None:
        super().__init__(group)
        self._node = node
        self._subscription = subscription
        self._callback = callback
        self._index: int | None = None
        node.add_waitable(self)

    def close(self) -> None:
        """Call back no more."""
        self._node.remove_waitable(self)

    def __enter__(self) -> None:
        """Keep the subscription while an executor waits for it."""
        self._subscription.handle.__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Let it be destroyed again."""
        self._subscription.handle.__exit__(*exception)

    def get_num_entities(self) -> NumberOfEntities:
        """Return how much room it takes in a wait set."""
        return NumberOfEntities(num_subs=1)

    def add_to_wait_set(self, wait_set: Any) -> None:
        """Have an executor wait for the subscription, unless it has gone: rclpy asks even where entering failed."""
        self._index = None
        with contextlib.suppress(InvalidHandle), self._subscription.handle:
            self._index = wait_set.add_subscription(self._subscription.handle)

    def is_ready(self, wait_set: Any) -> bool:
        """Return whether a message has come."""
        return self._index is not None and bool(wait_set.is_ready('subscription', self._index))

    def take_data(self) -> None:
        """Take nothing yet: rclpy never serves a waitable again of which this has failed."""

    async def execute(self, taken_data: None) -> None:
        """Call back."""
        self._callback()
