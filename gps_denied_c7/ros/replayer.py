"""Play a rosbag2 onto its topics as the raw CDR it was recorded as."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from builtin_interfaces.msg import Time
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy
from rclpy.validate_topic_name import validate_topic_name
from rosgraph_msgs.msg import Clock

from gps_denied_c7.ros.bag import Bag, BagError, BagTopic, OfferedQos
from gps_denied_c7.ros.bag.storage import count_text
from gps_denied_c7.ros.replay_report import Gap, ReplayReport, TopicReport
from gps_denied_c7.ros.replay_types import message_type, mismatched_subscribers, other_definitions

__all__ = ['DEFAULT_MAX_GAP_S', 'DEFAULT_WAIT_S', 'ReplayOptions', 'Replayer']

CLOCK_TOPIC = '/clock'
DEFAULT_WAIT_S = 5.0
DEFAULT_MAX_GAP_S = 10.0
_DEFAULT_DEPTH = 10
_POLL_S = 0.02
_QUIET_S = 1.0
_SETTLE_S = 0.5
_ACK_S = 5.0
_GAPS_LISTED = 20
_LONGEST_WAIT_S = 3600.0
_MAX_DEPTH = 5000
_INFINITE_NS = 2**63 - 1

_logger = logging.getLogger('c7_replay')


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """
    Say how a bag is played.

    :param rate: factor on the recorded pace.
    :param loop: start over at the end, until stopped.
    :param topics: names in the bag to play; all where empty.
    :param remap: name in the bag → name to publish on.
    :param clock_hz: publish the bag's time on ``/clock`` this often, 0 for not at all.
    :param wait_matched_s: seconds to wait for subscribers before the first message.
    :param require_matched: give up where they don't come, instead of playing anyway.
    :param max_gap_s: a longer silence between two messages, in bag time, is cut down to this.
    """

    rate: float = 1.0
    loop: bool = False
    topics: tuple[str, ...] = ()
    remap: dict[str, str] = field(default_factory=dict)
    clock_hz: float = 0.0
    wait_matched_s: float = DEFAULT_WAIT_S
    require_matched: bool = False
    max_gap_s: float = DEFAULT_MAX_GAP_S


class _Outlet:
    """One topic's publisher and what went through it."""

    def __init__(self, publisher: Publisher, qos: QoSProfile, report: TopicReport) -> None:
        self.publisher = publisher
        self.report = report
        self._qos = qos
        self.refused: dict[str, int] = {}
        self._first_ns: int | None = None

    def send(self, data: bytes, since_start_s: float) -> None:
        """Publish one message; one that the middleware refuses is counted, and the others are still sent."""
        unmatched = not self.look(since_start_s)
        try:
            self.publisher.publish(data)
        except Exception as error:
            # rclpy, rmw and DDS each have errors of their own for a message that is too large or malformed.
            why = str(error) or type(error).__name__
            self.refused[why] = self.refused.get(why, 0) + 1
            return
        now_ns = time.monotonic_ns()
        if self._first_ns is None:
            self._first_ns = now_ns
        self.report.sent += 1
        self.report.sent_unmatched += unmatched
        self.report.bytes += len(data)
        self.report.span_s = (now_ns - self._first_ns) / 1e9

    def look(self, since_start_s: float) -> int:
        """Return how many subscriptions there are now, and note when the first one was seen."""
        count = self.publisher.get_subscription_count()
        if count and self.report.first_matched_s is None:
            self.report.first_matched_s = max(0.0, since_start_s)
        return count

    def look_for_mismatched(self, node: Node) -> None:
        """Note which subscribers there are now that receive nothing."""
        found = mismatched_subscribers(node, self.report.topic, self.report.msgtype, self._qos)
        self.report.mismatched = sorted({*self.report.mismatched, *found})


class _Pace:
    """
    Map bag time onto the steady clock; a silence longer than ``max_gap_s`` of bag time is cut down to that.

    :ivar start_ns: steady time of the first message of the first pass, 0 before it.
    :ivar due_ns: steady time of the message that :meth:`advance` was called for.
    """

    def __init__(self, rate: float, max_gap_s: float) -> None:
        self.start_ns = self.due_ns = 0
        self._rate = rate
        self._max_gap_s = max_gap_s
        self.restart()

    def restart(self) -> None:
        """Begin another pass with the next message."""
        self._latest_ns: int | None = None
        self._anchor = self._after_gap = (0, 0)

    def advance(self, time_ns: int) -> Gap | None:
        """Set ``due_ns`` for a message of this bag time; return the silence before it if it is cut down."""
        gap = None
        if self._latest_ns is None:
            self.due_ns = time.monotonic_ns()
            self.start_ns = self.start_ns or self.due_ns
            self._anchor = self._after_gap = (self.due_ns, time_ns)
        elif (time_ns - self._latest_ns) / 1e9 > self._max_gap_s:
            gap = Gap(self._latest_ns, (time_ns - self._latest_ns) / 1e9, self._max_gap_s)
            self.due_ns = self._due(self._latest_ns) + round(self._max_gap_s * 1e9 / self._rate)
            self._after_gap = (self.due_ns, time_ns)
        else:
            self.due_ns = self._due(time_ns)
        self._latest_ns = time_ns if self._latest_ns is None else max(self._latest_ns, time_ns)
        return gap

    def arrive(self) -> bool:
        """Let bag time jump to the message due now, if a silence before it was cut down; tell whether it did."""
        jumped, self._anchor = self._anchor != self._after_gap, self._after_gap
        return jumped

    def bag_ns(self, now_ns: int) -> int:
        """Return the bag time at this steady time."""
        return self._anchor[1] + round((now_ns - self._anchor[0]) * self._rate)

    def _due(self, time_ns: int) -> int:
        return self._anchor[0] + round((time_ns - self._anchor[1]) / self._rate)


class Replayer:
    """
    Play one bag through one node.

    Nothing is spun: a publisher needs no executor, and the calling thread keeps the pace.

    :param stop: ends the replay when it is set.
    :param report: filled in as the replay goes.
    :raises BagError: nothing in the bag can be played as asked.
    """

    def __init__(
        self, node: Node, bag: Bag, options: ReplayOptions, stop: threading.Event, report: ReplayReport
    ) -> None:
        self._bag = bag
        self._node = node
        self._options = options
        self._stop = stop
        self.report = report
        report.notes, report.missing = bag.notes, bag.missing
        self._names = {CLOCK_TOPIC: ('--clock', '')} if options.clock_hz else {}
        self._outlets = self._open()
        self._clock = node.create_publisher(Clock, CLOCK_TOPIC, _DEFAULT_DEPTH) if options.clock_hz else None
        self._clock_in_range = True
        self._next_clock_ns = 0
        self._pace = _Pace(options.rate, options.max_gap_s)

    # -- what is played

    def _open(self) -> dict[str, _Outlet]:
        topics, options = self._bag.topics, self._options
        known = {**self._bag.left_out, **topics}
        if unknown := [name for name in (*options.topics, *options.remap) if name not in known]:
            raise BagError(f'{self._bag.path} has no {", ".join(unknown)}.', remedy=f'It has {", ".join(known)}.')
        wanted = [name for name in known if not options.topics or name in options.topics]
        for name in wanted:
            if name in self._bag.left_out:
                self._skip(name, self._bag.left_out[name])
        outlets = {}
        for name in wanted:
            topic = topics.get(name)
            if topic is None or not topic.count:
                if name in options.topics:
                    self.report.skipped.setdefault(name, 'the bag has no message on it')
            elif name == CLOCK_TOPIC and options.clock_hz:
                self.report.skipped[name] = 'since --clock publishes it'
            else:
                try:
                    outlets[name] = self._outlet(topic, message_type(topic.msgtype))
                except BagError as error:
                    self._skip(name, str(error))
        if not outlets:
            raise BagError(
                f'{self._bag.path}: nothing can be played.',
                remedy='; '.join(f'{name}: {reason}' for name, reason in self.report.skipped.items()),
            )
        return outlets

    def _skip(self, name: str, why: str) -> None:
        self.report.skipped[name] = why
        _logger.warning('%s is skipped: %s', name, why)
        if name in self._options.topics or name in self._options.remap:
            self.report.missing.append(f'{name}, which was requested: {why}')

    def _outlet(self, topic: BagTopic, type_: Any) -> _Outlet:
        qos, node = _profile(topic.qos, topic.count), self._node
        name = self._options.remap.get(topic.name, topic.name)
        try:
            validate_topic_name(name)
            full_name = node.resolve_topic_name(name)
        except Exception as error:
            # A name that is too long is an error of rcl's, which has no type of its own.
            raise BagError(
                f'{name} is not a name that ROS allows: {" ".join(str(error).split())}.',
                remedy=f'Name another one: --remap {topic.name}:=/other.',
            ) from error
        other, msgtype = self._names.setdefault(full_name, (topic.name, topic.msgtype))
        if msgtype != topic.msgtype:
            raise BagError(
                f'{other} is published on {full_name} already{f", as {msgtype}" if msgtype else ""}.',
                remedy=f'Name another one: --remap {topic.name}:=/other.',
            )
        try:
            publisher = node.create_publisher(type_, name, qos)
        except Exception as error:
            # A message package without its compiled type support fails only here, with errors of many types.
            raise BagError(
                f'{topic.msgtype} cannot be published: {error}.', remedy='Build its package again.'
            ) from error
        report = TopicReport(publisher.topic_name, topic.msgtype, topic.count, topic.qos.reliable, topic.name)
        self.report.topics.append(report)
        self.report.notes += other_definitions(node, report.topic, topic)
        return _Outlet(publisher, qos, report)

    # -- when

    def wait_matched(self) -> None:
        """
        Wait until subscribers have matched, and a little longer.

        Discovery is two-sided: a publisher that sees its subscriber may not be seen by it yet, and what it sends
        then is lost silently.

        :raises BagError: they did not come and the options require them.
        """
        named = bool(self._options.topics)
        deadline = time.monotonic() + self._options.wait_matched_s
        counts, changed = [0] * len(self._outlets), time.monotonic()
        while not self._stop.is_set():
            found = [outlet.publisher.get_subscription_count() for outlet in self._outlets.values()]
            now = time.monotonic()
            if found != counts:
                counts, changed = found, now
            # Not every topic of a bag has a reader; where none was named, those that come within a second count.
            if all(counts) or (any(counts) and not named and now - changed > _QUIET_S) or now >= deadline:
                break
            self._stop.wait(_POLL_S)
        for outlet, count in zip(self._outlets.values(), counts, strict=True):
            outlet.report.matched = count
            outlet.look(0.0)
            outlet.look_for_mismatched(self._node)
            if outlet.report.mismatched:
                _logger.warning('%s is not received by %s.', outlet.report.topic, '; '.join(outlet.report.mismatched))
        missing = [outlet.report.topic for outlet in self._outlets.values() if not outlet.report.matched]
        if missing and (named or not any(counts)) and not self._stop.is_set():
            self._report_unmatched(missing)
        self._stop.wait(_SETTLE_S if any(counts) else 0.0)

    def _report_unmatched(self, missing: list[str]) -> None:
        mismatched = {
            text for outlet in self._outlets.values() if outlet.report.topic in missing
            for text in outlet.report.mismatched
        }  # fmt: skip
        problem = f'there is no subscriber to {", ".join(missing)}.'
        domain = os.environ.get('ROS_DOMAIN_ID', '0')
        remedy = f'Check the names, and that the subscribers have ROS_DOMAIN_ID {domain} too.'
        if mismatched:
            problem = f'no subscriber to {", ".join(missing)} matches: {"; ".join(sorted(mismatched))}.'
            remedy = 'Change the subscribers: use the recorded type, and a QoS no stricter than the recorded one.'
        if self._options.require_matched:
            raise BagError(problem, remedy=remedy)
        if self._options.wait_matched_s:
            _logger.warning('%s %s', problem, remedy)

    def play(self, on_sent: Callable[[], object] = lambda: None) -> None:
        """
        Send every message when its time has come, on the steady clock; over and over where the options loop.

        :param on_sent: called after each message.
        """
        while not self._stop.is_set():
            self._play_once(on_sent)
            if self._stop.is_set():
                return
            self.report.loops += 1
            if self.report.loops == 1:
                self._note_missing()
            if not self._options.loop or not any(outlet.report.sent for outlet in self._outlets.values()):
                return

    def _note_missing(self) -> None:
        """Compare what was sent in one whole pass with what was recorded."""
        self._note_lost()
        for name, outlet in self._outlets.items():
            report = outlet.report
            for why, count in outlet.refused.items():
                self.report.missing.append(f'{count_text({name: count})} could not be published: {why}.')
            report.recorded = max(report.recorded, report.sent)
            if report.sent < report.recorded:
                self.report.missing.append(f'{name}: {report.recorded - report.sent} of {report.recorded} messages.')

    def _note_lost(self) -> None:
        """Take over what the bag has found to be lost so far."""
        named = set(self.report.missing)
        self.report.missing += [sentence for sentence in self._bag.missing if sentence not in named]
        self.report.bag_incomplete = bool(self._bag.missing)

    def _play_once(self, on_sent: Callable[[], object]) -> None:
        pace = self._pace
        pace.restart()
        self._next_clock_ns = 0
        for name, time_ns, data in self._bag.messages(self._outlets):
            if (gap := pace.advance(time_ns)) is not None:
                self._note_gap(gap)
            if not self._sleep_until(pace.due_ns):
                return
            if pace.arrive():
                # The message after the gap must not arrive while /clock is still before it.
                self._publish_clock(time.monotonic_ns())
            now_ns = time.monotonic_ns()
            self.report.latest_s = max(self.report.latest_s, (now_ns - pace.due_ns) / 1e9)
            self._outlets[name].send(data, (now_ns - pace.start_ns) / 1e9)
            on_sent()

    def _note_gap(self, gap: Gap) -> None:
        if self.report.loops:
            return
        self.report.gap_count += 1
        if self.report.gap_count <= _GAPS_LISTED:
            self.report.gaps.append(gap)
            _logger.warning('%s (--max-gap)', gap)

    def _publish_clock(self, now_ns: int) -> None:
        """Publish the bag's time, if asked to; a time that its 32 bits of seconds cannot hold is not published."""
        if self._clock is None:
            return
        seconds, nanoseconds = divmod(self._pace.bag_ns(now_ns), 10**9)
        if -(2**31) <= seconds < 2**31:
            self._clock.publish(Clock(clock=Time(sec=seconds, nanosec=nanoseconds)))
        elif self._clock_in_range:
            self._clock_in_range = False
            self.report.notes.append(f'{CLOCK_TOPIC} cannot hold times like {seconds} s, and was not published then.')
            _logger.warning('%s', self.report.notes[-1])
        self._next_clock_ns = now_ns + round(1e9 / self._options.clock_hz)

    def _sleep_until(self, due_ns: int) -> bool:
        """Wait for ``due_ns`` while keeping ``/clock`` going; False where the replay was stopped."""
        while not self._stop.is_set():
            now_ns = time.monotonic_ns()
            if now_ns >= self._next_clock_ns:
                self._publish_clock(now_ns)
            if now_ns >= due_ns:
                return True
            until_ns = due_ns if self._clock is None else min(due_ns, self._next_clock_ns)
            self._stop.wait(min(_LONGEST_WAIT_S, max(0, until_ns - now_ns) / 1e9))
        return False

    def finish(self) -> None:
        """Wait until reliable subscribers have everything, and best-effort ones had time to read the last message."""
        if not self.report.loops:
            self._note_lost()
        timeout = Duration(seconds=_ACK_S)
        begun_ns = self._pace.start_ns or time.monotonic_ns()
        since_start_s = (time.monotonic_ns() - begun_ns) / 1e9
        for outlet in self._outlets.values():
            outlet.look(since_start_s)
            outlet.look_for_mismatched(self._node)
            if outlet.report.reliable and outlet.report.sent:
                outlet.report.acknowledged = outlet.publisher.wait_for_all_acked(timeout)
        # The last messages lie in this process's shared memory, which goes with it.
        time.sleep(_SETTLE_S if any(outlet.report.sent for outlet in self._outlets.values()) else 0.0)


def _profile(offered: OfferedQos, count: int) -> QoSProfile:
    """
    Return what to offer in place of the recorded publishers.

    As in rosbag2, deadline, lease and lifespan are not stretched where the replay is slower or pauses: a subscriber
    with a deadline sees it missed, and a message that outlives its lifespan is dropped.
    """
    deadline, lifespan, lease = (
        # Not the default of 0: rclpy's check of what matches takes that for less than infinite.
        Duration(nanoseconds=time_ns or _INFINITE_NS)
        for time_ns in (offered.deadline_ns, offered.lifespan_ns, offered.lease_ns)
    )
    return QoSProfile(
        depth=min(offered.depth, max(count, _DEFAULT_DEPTH), _MAX_DEPTH) or _DEFAULT_DEPTH,
        reliability=ReliabilityPolicy.RELIABLE if offered.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if offered.transient_local else DurabilityPolicy.VOLATILE,
        liveliness=LivelinessPolicy.MANUAL_BY_TOPIC if offered.manual else LivelinessPolicy.AUTOMATIC,
        deadline=deadline,
        lifespan=lifespan,
        liveliness_lease_duration=lease,
    )
