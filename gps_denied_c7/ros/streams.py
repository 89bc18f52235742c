"""Image subscriptions: cheap checks, loss by sequence number, publishers that cannot match (N-3, N-7)."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rclpy.exceptions import InvalidHandle
from rclpy.node import Node
from rclpy.qos import QoSCompatibility, QoSProfile, ReliabilityPolicy, qos_check_compatible
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.ros.executor import PromptCallbackGroup
from gps_denied_c7.ros.guard import CallbackGuard
from gps_denied_c7.ros.messages import (
    ReceivedImage,
    check_message,
    check_stamp,
    image_type,
    received_image,
    stamp_ns,
    taken_image,
)
from gps_denied_c7.ros.parameters import LiveSettings
from gps_denied_c7.ros.rcl import Rcl, SubscriptionReady, UnreadableMessageError, Untaken
from gps_denied_c7.slots import Frame, FrameSlots
from gps_denied_c7.statistics import Statistics

__all__ = ['DEFAULT_QOS', 'ImageStream', 'SequenceGaps', 'publisher_mismatches']

DEFAULT_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)

_LOOP_S = 1.0
# A queue that is full once is a moment in which this process was held up; so often in so many seconds, it is too much.
_OVERRUNS, _OVERRUN_S = 10, 1.0

# Humble's callbacks get the message alone: where rclpy takes the messages, loss is unknown there.
_HAS_MESSAGE_INFO = hasattr(Subscription, 'CallbackType')


class SequenceGaps:
    """
    Count messages that were published and never arrived, from publication sequence numbers.

    Each publisher numbers its own messages. Where nobody says which one sent a message, as rclpy on
    Jazzy, more than one publisher makes the count unknown, and unknown is never told as 0.
    """

    def __init__(self) -> None:
        self._last: dict[bytes, int] = {}
        self._lost: int | None = None
        self._unknown = False
        self._unreadable = 0

    def note_unreadable(self) -> None:
        """Take a message that came and could not be read, its number included: it is none of the lost."""
        self._unreadable += 1

    def note(self, info: dict[str, Any] | None, publishers: int) -> int | None:
        """Take one message's info and return all losses so far, None for unknown."""
        number = info.get('publication_sequence_number') if info else None
        gid = (info or {}).get('publisher_gid')
        self._unknown = self._unknown or number is None or (gid is None and publishers > 1)
        if self._unknown or number is None:
            return None
        key = bytes(gid['data']) if gid else b''
        last = self._last.get(key)
        # A number that does not grow is a publisher started anew, which begins a new count.
        gap = number - last - 1 if last is not None and number > last else 0
        lost = max(0, gap - self._unreadable)
        self._unreadable = 0
        self._last[key] = number
        self._lost = (self._lost or 0) + lost
        return self._lost


class ImageStream:
    """
    Subscribe to one image topic and fill its slot.

    The callback must return at once, since it shares the executor with the services: it looks at the
    message's shape, not at its pixels, and leaves everything else to the inference thread.

    :param rcl: takes the messages, and knows their types; rclpy takes them, and copies them once more, where None.
    :param live: returns the live settings.
    :param on_refused: told the topic and every refused image's error.
    :param on_time_reset: told the topic and by how many seconds its stamps jumped backwards.
    :param on_overrun: told the topic and the depth of its queue where that is full again and again: images come faster
        than they can be taken.
    """

    def __init__(
        self,
        node: Node,
        topic: str,
        slots: FrameSlots,
        statistics: Statistics,
        *,
        rcl: Rcl | None,
        guard: CallbackGuard,
        live: Callable[[], LiveSettings],
        on_refused: Callable[[str, ImageRejectedError], None],
        on_time_reset: Callable[[str, float], None],
        on_overrun: Callable[[str, int], None],
    ) -> None:
        self._node = node
        self._rcl = rcl
        self._type = image_type(topic)
        self._slots = slots
        self._statistics = statistics
        self._live = live
        self._on_refused = on_refused
        self._on_time_reset = on_time_reset
        self._on_overrun = on_overrun
        self._overruns: deque[float] = deque(maxlen=_OVERRUNS)
        self._gaps = SequenceGaps()
        self._last_stamp_ns: int | None = None
        self.topic = topic
        self.opened_ns = time.monotonic_ns()
        self.last_received_ns: int | None = None
        # One after the other, so that a camera's frames stay in order, and at once.
        group = PromptCallbackGroup()
        name = f'image callback {topic}'
        on_message: Callable[..., None] = self._on_message_with_info if _HAS_MESSAGE_INFO else self._on_message
        # The first message may arrive before create_subscription has returned.
        self._subscription: Subscription | None = None
        self._subscription = node.create_subscription(
            self._type,
            topic,
            guard(name, on_message),
            # rclpy writes the overrides of one topic into the profile it is given.
            copy.copy(DEFAULT_QOS),
            callback_group=group if rcl is None else Untaken(),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )
        self._ready: SubscriptionReady | None = None
        if rcl is not None:
            self._backlog = max(1, self.qos.depth)
            self._ready = SubscriptionReady(node, self._subscription, group, guard(name, self._on_ready))

    @property
    def qos(self) -> QoSProfile:
        """The profile in force, overrides included."""
        assert self._subscription is not None
        return self._subscription.qos_profile

    def close(self) -> None:
        """End the subscription."""
        if self._ready is not None:
            self._ready.close()
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)

    def _on_ready(self) -> None:
        for _ in range(self._backlog):
            # Where one still waits for its turn, others may have queued up behind this one, and the newest wins.
            behind = self._slots.has(self.topic)
            if not self._take() or not behind:
                return
        self._note_overrun()

    def _note_overrun(self) -> None:
        """Take note that as many images waited as the queue holds."""
        self._overruns.append(time.monotonic())
        often = len(self._overruns) == _OVERRUNS and self._overruns[-1] - self._overruns[0] <= _OVERRUN_S
        # Of a queue of one, what is taken is the newest, however many were pushed out before.
        if often and self._backlog > 1:
            self._overruns.clear()
            self._on_overrun(self.topic, self._backlog)

    def _take(self) -> bool:
        """Take one message; return whether there was one."""
        assert self._rcl is not None and self._subscription is not None
        try:
            taken = self._rcl.take_new(self._subscription, self._type)
        except InvalidHandle:  # closed while its message was waiting
            return False
        except UnreadableMessageError as error:
            self._statistics.count(self.topic, 'received')
            self._gaps.note_unreadable()
            remedy = 'Build the publisher with the same sensor_msgs as this node.'
            self._on_refused(self.topic, ImageRejectedError('message', error.message, remedy=remedy))
            return True
        if taken is None:
            return False
        message, info = taken
        self._receive(taken_image(message), info)
        return True

    def _on_message_with_info(self, message: Image | CompressedImage, info: dict[str, Any]) -> None:
        self._receive(received_image(message), info)

    def _on_message(self, message: Image | CompressedImage) -> None:
        self._receive(received_image(message), None)

    def _receive(self, message: ReceivedImage, info: dict[str, Any] | None) -> None:
        received_ns = time.monotonic_ns()
        now_ns = self._node.get_clock().now().nanoseconds
        self.last_received_ns = received_ns
        self._statistics.count(self.topic, 'received')
        try:
            check_stamp(message.header, now_ns, self._live().max_stamp_ahead_s)
            check_message(message)
        except ImageRejectedError as error:
            self._on_refused(self.topic, error)
        else:
            if not self._slots.put(Frame(self.topic, message, received_ns, now_ns)):
                self._statistics.count(self.topic, 'closed')
            # What nobody answers by is left for when the inference thread is on its way.
            self._note_stamp(stamp_ns(message.header))
        self._statistics.set_lost(self.topic, self._gaps.note(info, self._publishers(info)))

    def _publishers(self, info: dict[str, Any] | None) -> int:
        """Return how many publishers a message may be of, 1 where it says so itself or nobody can tell."""
        # Humble's subscriptions do not tell; its rclpy gives no sequence numbers either.
        if info and not info.get('publisher_gid') and hasattr(self._subscription, 'get_publisher_count'):
            with contextlib.suppress(InvalidHandle):  # closed while its message was in hand
                return int(self._subscription.get_publisher_count())  # type: ignore[union-attr]
        return 1

    def _note_stamp(self, stamp: int) -> None:
        last, self._last_stamp_ns = self._last_stamp_ns, stamp
        if last is not None and (backwards_s := (last - stamp) / 1e9) > _LOOP_S:
            self._on_time_reset(self.topic, backwards_s)


def publisher_mismatches(node: Node, topic: str, qos: QoSProfile) -> list[str]:
    """
    Name every publisher of ``topic`` that cannot reach a subscription with ``qos``, and why.

    DDS keeps such endpoints apart without a word to either side.
    """
    wanted = image_type(topic)
    type_name = f'sensor_msgs/msg/{wanted.__name__}'
    problems = []
    for publisher in node.get_publishers_info_by_topic(topic):
        name = f'{publisher.node_namespace.rstrip("/")}/{publisher.node_name}'
        if publisher.topic_type != type_name:
            problems.append(f'{name} publishes {publisher.topic_type}, not {type_name}')
            continue
        compatibility, reason = qos_check_compatible(publisher.qos_profile, qos)
        if compatibility == QoSCompatibility.ERROR:
            problems.append(f'{name} offers a QoS that cannot match: {reason.strip()}')
    return problems
