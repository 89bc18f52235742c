"""The subscription to one image topic: cheap checks, what was missed, and a queue that overruns (N-3, N-7)."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rclpy.exceptions import InvalidHandle
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.pipeline.mailbox import Frame, FrameSlots
from gps_denied_c7.ros.callbacks import CallbackGuard, PromptCallbackGroup, SubscriptionReady, Untaken, yield_gil
from gps_denied_c7.ros.events import EventReporter
from gps_denied_c7.ros.loss_counter import MessagesLost, MissedMessages
from gps_denied_c7.ros.messages import (
    ReceivedImage,
    check_message,
    check_stamp,
    received_image,
    stamp_ns,
    taken_image,
)
from gps_denied_c7.ros.parameters import LiveSettings
from gps_denied_c7.ros.rcl import Rcl, UnreadableMessageError

__all__ = ['DEFAULT_QOS', 'ImageSubscription', 'queue_depth']

DEFAULT_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)

_LOOP_S = 1.0
# A queue that is full once is a moment in which this process was held up; so often in so many seconds, it is too much.
_OVERRUNS, _OVERRUN_S = 10, 1.0

# Humble's callbacks get the message alone: where rclpy takes the messages, loss is unknown there.
_HAS_MESSAGE_INFO = hasattr(Subscription, 'CallbackType')


class _Queue:
    """
    Hold one subscription, whose middleware keeps some of the newest messages, and what has an executor handle it.

    :param make_ready: makes what tells that a message waits; None where rclpy takes them.
    """

    def __init__(
        self,
        node: Node,
        subscription: Subscription,
        lost: MessagesLost,
        make_ready: Callable[[_Queue], SubscriptionReady] | None,
    ) -> None:
        self.subscription = subscription
        self.qos: QoSProfile = subscription.qos_profile
        self.keeps_all = self.qos.history == HistoryPolicy.KEEP_ALL
        self.lost = lost
        self.closed = False
        self._node = node
        self._make_ready = make_ready
        self._ready: SubscriptionReady | None = None

    def listen(self) -> None:
        """Have an executor handle messages, and losses after them: it handles in turn what is ready."""
        if self._make_ready is not None:
            self._ready = self._make_ready(self)
        self.lost.listen()

    @property
    def backlog(self) -> int:
        """Messages that are taken at a time, at most."""
        return max(1, self.qos.depth)

    def close(self) -> None:
        """End the subscription; safe to repeat."""
        if not self.closed:
            self.closed = True
            if self._ready is not None:
                self._ready.close()
            self.lost.close()
            self._node.destroy_subscription(self.subscription)


class ImageSubscription:
    """
    Subscribe to one image topic and fill its slot.

    The callback must return at once, since it shares the executor with the services: it looks at the
    message's shape, not at its pixels, and leaves everything else to the threads behind ``sink``.

    Of a queue of several images, the oldest is taken first, and each is copied out of it. Where a camera sends more
    than can be copied, what is answered is therefore that much older than need be: another subscription, whose queue
    holds the newest image alone, then takes the place of the first, unless another depth was asked for.

    :param message_type: Image or CompressedImage.
    :param sink: takes the images; may be exchanged at any time, see :attr:`sink`.
    :param memory_bytes: that decoding one raw image may take in this process.
    :param admits: whether an image that has come now may cost CPU time; otherwise it is left out.
    :param rcl: takes the messages, and knows their types; rclpy takes them, and copies them once more, where None.
    :param live: returns the live settings.
    :param events: reports refused images, stamps that jump backwards, and a queue that is full repeatedly.
    """

    def __init__(
        self,
        node: Node,
        topic: str,
        message_type: type[Image] | type[CompressedImage],
        sink: FrameSlots,
        *,
        statistics: Statistics,
        memory_bytes: int,
        admits: Callable[[str], bool],
        rcl: Rcl | None,
        guard: CallbackGuard,
        live: Callable[[], LiveSettings],
        events: EventReporter,
    ) -> None:
        self._node = node
        self._rcl = rcl
        self._memory_bytes = memory_bytes
        self._admits = admits
        self._statistics = statistics
        self._guard = guard
        self._live = live
        self._events = events
        self._overruns: deque[float] = deque(maxlen=_OVERRUNS)
        self._missed = MissedMessages()
        self._last_stamp_ns: int | None = None
        self.topic = topic
        self.message_type = message_type
        self.sink = sink
        self.opened_ns = time.monotonic_ns()
        self.last_received_ns: int | None = None
        self.last_lost_ns: int | None = None
        self._lost_before = 0
        # One after the other, so that a camera's frames stay in order, and at once.
        self._group = PromptCallbackGroup()
        self._queues_lock, self._count_lock = threading.Lock(), threading.Lock()
        self._closed = False
        # Of activations before this one: what was not known of their images stays unknown.
        self._continued = statistics.received(topic) > 0
        self._earlier = statistics.missed(topic) if self._continued else (0, 0)
        # The first message may arrive before create_subscription has returned.
        self._queue: _Queue | None = None
        self._next_queue: _Queue | None = None
        # rclpy writes the overrides of one topic into the profile it is given.
        queue = self._open(copy.copy(DEFAULT_QOS), QoSOverridingOptions.with_default_policies())
        self._serve(queue)
        self._listen(queue)

    @property
    def silent_s(self) -> float:
        """Seconds since the last image, or since the subscription was opened."""
        return (time.monotonic_ns() - (self.last_received_ns or self.opened_ns)) / 1e9

    @property
    def qos(self) -> QoSProfile:
        """The profile in force, overrides included."""
        assert self._queue is not None
        return self._queue.qos

    def close(self) -> None:
        """End the subscription."""
        with self._queues_lock:
            self._closed = True
            for queue in (self._queue, self._next_queue):
                if queue is not None:
                    queue.close()
        self.count_missed()

    def count_missed(self) -> None:
        """Have the statistics hold what was lost and pushed out so far; from any thread."""
        with self._count_lock:
            lost, pushed_out = self._missed.counted()
            if lost is not None and lost > self._lost_before:
                self._lost_before = lost
                if self._missed.distinguishes:
                    self.last_lost_ns = time.monotonic_ns()
            if not self._missed.begun and self._continued:
                lost, pushed_out = lost or 0, 0
            earlier_lost, earlier_pushed_out = self._earlier
            self._statistics.set_missed(self.topic, _sum(earlier_lost, lost), _sum(earlier_pushed_out, pushed_out))

    def _open(self, qos: QoSProfile, overriding: QoSOverridingOptions | None = None) -> _Queue:
        name = f'image callback {self.topic}'
        on_message: Callable[..., None] = self._on_message_with_info if _HAS_MESSAGE_INFO else self._on_message
        subscription = self._node.create_subscription(
            self.message_type,
            self.topic,
            self._guard(name, on_message),
            qos,
            callback_group=self._group if self._rcl is None else Untaken(),
            qos_overriding_options=overriding,
        )

        def make_ready(queue: _Queue) -> SubscriptionReady:
            on_ready = self._guard(name, lambda: self._on_ready(queue))
            return SubscriptionReady(self._node, subscription, self._group, on_ready)

        on_lost = self._guard(f'lost images of {self.topic}', self.count_missed)
        lost = MessagesLost(self._node, subscription, self._group, on_lost)
        return _Queue(self._node, subscription, lost, make_ready if self._rcl is not None else None)

    def _listen(self, queue: _Queue) -> _Queue:
        """Have an executor handle a queue, which is closed where that fails."""
        try:
            queue.listen()
        except BaseException:
            queue.close()
            raise
        return queue

    def _serve(self, queue: _Queue) -> None:
        """Take images from this queue, and no longer from the one before."""
        with self._queues_lock:
            if queue.closed or queue is self._queue:
                return
            before, self._queue, self._next_queue = self._queue, queue, None
            self._missed.count_from(queue.lost)
            if before is not None:
                before.close()

    def _on_ready(self, queue: _Queue) -> None:
        if queue is not self._queue:
            self._serve(queue)
        for _ in range(queue.backlog):
            # Where one still waits for its turn, others may have queued up behind this one, and the newest wins.
            behind = self.sink.has(self.topic)
            if not self._take(queue) or not behind:
                return
        # Of a queue of one, what is taken is the newest, however many were pushed out before.
        if queue.backlog > 1 or queue.keeps_all:
            self._note_overrun(queue)

    def _note_overrun(self, queue: _Queue) -> None:
        """Take note that as many images waited as the queue holds."""
        self._overruns.append(time.monotonic())
        if len(self._overruns) == _OVERRUNS and self._overruns[-1] - self._overruns[0] <= _OVERRUN_S:
            self._overruns.clear()
            by_default = not queue.keeps_all and queue.qos.depth == DEFAULT_QOS.depth
            if by_default:
                self._keep_the_newest_alone()
            self._events.overrun(self.topic, queue_depth(queue.qos), keeps_newest=by_default)

    def _keep_the_newest_alone(self) -> None:
        """Open a queue of one, which is served as soon as it has an image: until then the other goes on."""
        with self._queues_lock:
            if self._closed or self._next_queue is not None:
                return
            qos = copy.copy(self.qos)
            qos.depth = 1
            self._next_queue = self._listen(self._open(qos))

    def _take(self, queue: _Queue) -> bool:
        """Take one message; return whether there was one."""
        assert self._rcl is not None
        try:
            taken = self._rcl.take_new(queue.subscription, self.message_type)
        except InvalidHandle:  # closed while its message was waiting
            return False
        except UnreadableMessageError as error:
            self._statistics.count(self.topic, 'received')
            self._missed.gaps.note_unreadable()
            remedy = 'Build the publisher with the same sensor_msgs as this node.'
            self._events.refused(self.topic, ImageRejectedError('message', error.message, remedy=remedy))
            return True
        if taken is None:
            return False
        message, info = taken
        # It may have come to the queue before this one, too, and a middleware may deliver a message twice.
        if not self._missed.gaps.has_passed(info):
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
            check_message(message, self._memory_bytes)
        except ImageRejectedError as error:
            self._events.refused(self.topic, error)
        else:
            if self._admits(self.topic):
                self._put(Frame(self.topic, message, received_ns, now_ns))
            else:
                self._statistics.count(self.topic, 'over_share')
            self._note_stamp(stamp_ns(message.header))
        if self._missed.note(info, self._publishers(info)):
            self.count_missed()

    def _put(self, frame: Frame) -> None:
        waiting = self.sink.has(self.topic)
        if not self.sink.put(frame):
            self._statistics.count(self.topic, 'closed')
        elif not waiting:
            # What follows delays no answer, and the thread that takes the frame may have been notified.
            yield_gil()

    def _publishers(self, info: dict[str, Any] | None) -> int:
        """Return how many publishers a message may be of, 1 where it says so itself or the number is unknown."""
        # Subscriptions of Humble do not report it; its rclpy gives no sequence numbers either.
        subscription = self._queue.subscription if self._queue is not None else None
        if info and not info.get('publisher_gid') and hasattr(subscription, 'get_publisher_count'):
            with contextlib.suppress(InvalidHandle):  # closed while its message was handled
                return int(subscription.get_publisher_count())  # type: ignore[union-attr]
        return 1

    def _note_stamp(self, stamp: int) -> None:
        last, self._last_stamp_ns = self._last_stamp_ns, stamp
        if last is not None and (backwards_s := (last - stamp) / 1e9) > _LOOP_S:
            self._events.time_reset(self.topic, backwards_s)


def _sum(earlier: int | None, now: int | None) -> int | None:
    return None if earlier is None or now is None else earlier + now


def queue_depth(qos: QoSProfile) -> str:
    """Return how many messages a middleware keeps for a subscription with ``qos``."""
    return 'all' if qos.history == HistoryPolicy.KEEP_ALL else str(qos.depth)
