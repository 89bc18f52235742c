"""
What a subscription missed, and why: lost on its way, or pushed out of the middleware's queue by newer messages.

Gaps between publication sequence numbers show how many messages are missing. The middleware's status of messages lost
shows how many never arrived (DDS 1.4, 2.2.4.1, SAMPLE_LOST); messages that a full queue drops are not among those.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.exceptions import InvalidHandle
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.subscription import Subscription
from rclpy.waitable import NumberOfEntities

from gps_denied_c7.ros.callbacks import HandleWaitable

__all__ = ['MessagesLost', 'MissedMessages', 'SequenceGaps']

_log = logging.getLogger(__name__)


class SequenceGaps:
    """
    Count messages that were published and never taken, from publication sequence numbers.

    Each publisher numbers its own messages. Where the sender of a message is unknown, as with rclpy on
    Jazzy, more than one publisher makes the count unknown, and unknown is never reported as 0.
    """

    def __init__(self) -> None:
        self._last: dict[bytes, int] = {}
        self._missing: int | None = None
        self._unknown = False
        self._unreadable = 0

    def note_unreadable(self) -> None:
        """Take a message that came and could not be read, its number included: it is not missing."""
        self._unreadable += 1

    def note(self, info: dict[str, Any] | None, publishers: int) -> int | None:
        """Take one message's info and return how many are missing so far, None for unknown."""
        number, key = _origin(info)
        self._unknown = self._unknown or number is None or (not key and publishers > 1)
        if self._unknown or number is None:
            return None
        last = self._last.get(key)
        # A number that does not grow is from a restarted publisher, which begins a new count.
        gap = number - last - 1 if last is not None and number > last else 0
        missing = max(0, gap - self._unreadable)
        self._unreadable = 0
        self._last[key] = number
        self._missing = (self._missing or 0) + missing
        return self._missing

    def has_passed(self, info: dict[str, Any] | None) -> bool:
        """
        Return whether this message of its publisher, or one after it, was taken before.

        False where the middleware does not say which publisher sent it, or gives no numbers.
        """
        number, key = _origin(info)
        return number is not None and any(key) and number <= self._last.get(key, -1)

    def begins(self, info: dict[str, Any] | None) -> bool:
        """Return whether a publisher's count would begin with this message: its first, or the first after a restart."""
        number, key = _origin(info)
        return number is not None and (key not in self._last or number <= self._last[key])


def _origin(info: dict[str, Any] | None) -> tuple[int | None, bytes]:
    gid = (info or {}).get('publisher_gid')
    return (info or {}).get('publication_sequence_number'), bytes(gid['data']) if gid else b''


class MessagesLost(HandleWaitable):
    """
    Follow how many messages of a subscription never arrived, as its middleware counts them.

    Once the middleware has been asked for this count, each loss ends every wait for the subscription until the count is
    taken: by an executor, from :meth:`listen` on, or by :meth:`look`. Only the thread that takes the subscription's
    messages is to do so: it holds the interpreter meanwhile, and another would wait for an image that is being copied.

    :param subscription: kept until :meth:`close`.
    :param group: of the callback that takes the count.
    :param on_lost: called when it has changed.
    """

    def __init__(
        self, node: Node, subscription: Subscription, group: CallbackGroup, on_lost: Callable[[], None]
    ) -> None:
        event = _loss_event(subscription)
        super().__init__(node, group, 'event', NumberOfEntities(num_events=1), event, on_lost)
        self._topic = subscription.topic
        self._total = None if event is None else 0

    @property
    def total(self) -> int | None:
        """How many so far, also after :meth:`close`; None where the middleware does not count them."""
        return self._total

    def listen(self) -> None:
        """Have the node's executor take the count when something was lost."""
        if self._handle is not None:
            super().listen()

    def look(self) -> None:
        """Update the total to what the middleware has counted so far."""
        if self._handle is not None:
            try:
                with self._handle:
                    status = self._handle.take_event()
            except InvalidHandle:  # closed
                return
            except rclpy_implementation.RCLError as error:
                _log.warning('%s: lost images are no longer counted: %s', self._topic, error)
                self.close()
                return
            self._total = status.total_count if status is not None else self._total

    def close(self) -> None:
        """Stop counting, and release the subscription; safe to repeat."""
        super().close()
        if self._handle is not None:
            self._handle.destroy_when_not_in_use()

    async def execute(self, taken_data: None) -> None:
        """Take the count, and call back."""
        self.look()
        await super().execute(taken_data)


def _loss_event(subscription: Subscription) -> Any:
    """Return the handle of the event that a message was lost, None where the middleware has none."""
    # The second is Humble's name of it.
    make = getattr(rclpy_implementation, 'EventHandle', None) or getattr(rclpy_implementation, 'QoSEvent', None)
    kind = rclpy_implementation.rcl_subscription_event_type_t.RCL_SUBSCRIPTION_MESSAGE_LOST
    if make is None:
        return None
    try:
        with subscription.handle:
            return make(subscription.handle, kind)
    except rclpy_implementation.RCLError as error:
        _log.info(
            '%s: lost images are not distinguished from those that the queue drops: %s', subscription.topic, error
        )
        return None


class MissedMessages:
    """
    Distinguish the messages of a topic that were lost from those that a full queue pushed out.

    For the one thread that takes the messages, except for :meth:`counted`. A loss may be counted before the message
    after it is taken: such a loss hides as many that were pushed out, until that message comes. If a second
    publisher begins just then, such messages are counted as both.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.gaps = SequenceGaps()
        self.begun = False
        """Whether a message has come; before, what was pushed out cannot be known."""
        self._missing: int | None = None
        self._source: MessagesLost | None = None
        self._shift = 0
        self._in_no_gap = 0
        self._pushed_out = 0

    @property
    def distinguishes(self) -> bool:
        """Whether the middleware counts what was lost; otherwise what was pushed out is called lost, too."""
        return self._source is not None and self._source.total is not None

    def count_from(self, source: MessagesLost) -> None:
        """Count losses by ``source``; where there was one before, by that one until now and by this one from now on."""
        before = self._source
        if before is not None:
            before.look()
            source.look()
        with self._lock:
            lost = self._lost()
            self._source, self._shift = source, 0
            if before is not None:
                self._shift = (lost or 0) - (self._lost() or 0)

    def note(self, info: dict[str, Any] | None, publishers: int) -> bool:
        """Take one message's info; return whether :meth:`counted` may have changed."""
        begins, first, self.begun = self.gaps.begins(info), not self.begun, True
        missing = self.gaps.note(info, publishers)
        if missing == self._missing and not begins and not first:
            return False
        if self._source is not None:
            self._source.look()
        with self._lock:
            lost = self._lost() or 0
            if begins:
                # A loss without a gap happened before a publisher's first message that came, or after its last.
                self._in_no_gap = lost - ((self._missing or 0) - self._pushed_out)
            self._missing = missing
            self._pushed_out = max(self._pushed_out, (missing or 0) - (lost - self._in_no_gap))
        return True

    def counted(self) -> tuple[int | None, int | None]:
        """Return how many were lost and how many pushed out so far, None for unknown; from any thread."""
        with self._lock:
            lost = self._lost()
            if lost is None:
                return self._missing, None
            return lost, None if self._missing is None else self._pushed_out

    def _lost(self) -> int | None:
        total = self._source.total if self._source is not None else None
        return None if total is None else total + self._shift
