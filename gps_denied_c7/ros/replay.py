"""The ``c7_replay`` executable: play a rosbag2 onto its topics as the raw CDR it was recorded as."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rclpy
from builtin_interfaces.msg import Time
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock

from gps_denied_c7.ros.bag import Bag, BagError, BagTopic
from gps_denied_c7.ros.dds import apply_profile, transport_warnings, tune_allocator
from gps_denied_c7.ros.signals import on_first_signal

__all__ = ['ReplayOptions', 'ReplayReport', 'Replayer', 'TopicReport', 'main']

CLOCK_TOPIC = '/clock'
_DEFAULT_CLOCK_HZ = 40.0
_DEFAULT_DEPTH = 10
_DEFAULT_WAIT_S = 5.0
_POLL_S = 0.02
_QUIET_S = 1.0
_SETTLE_S = 0.5
_ACK_S = 5.0

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
    """

    rate: float = 1.0
    loop: bool = False
    topics: tuple[str, ...] = ()
    remap: dict[str, str] = field(default_factory=dict)
    clock_hz: float = 0.0
    wait_matched_s: float = _DEFAULT_WAIT_S
    require_matched: bool = False


@dataclass(slots=True)
class TopicReport:
    """
    Count what went out on one topic.

    :param topic: the name published on.
    :param recorded: messages of it in the bag.
    :param matched: subscriptions when the first message was due.
    :param bytes: of CDR, all messages together.
    :param span_s: from the first to the last message sent, steady clock.
    :param acknowledged: every reliable subscriber acknowledged everything; True where there is none.
    """

    topic: str
    msgtype: str
    recorded: int
    reliable: bool
    matched: int = 0
    sent: int = 0
    bytes: int = 0
    span_s: float = 0.0
    acknowledged: bool = True

    @property
    def rate_hz(self) -> float:
        """Messages per second that were really sent."""
        return (self.sent - 1) / self.span_s if self.sent > 1 and self.span_s > 0 else 0.0


@dataclass(slots=True)
class ReplayReport:
    """
    Tell what a replay did.

    :param skipped: topic → why it was left out.
    :param loops: passes through the bag that were completed.
    :param latest_s: how far behind its time the latest message went out.
    :param interrupted: name of the signal that ended it early, '' where none did.
    """

    bag: str
    rate: float
    topics: list[TopicReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    loops: int = 0
    latest_s: float = 0.0
    interrupted: str = ''

    def to_json(self) -> dict[str, Any]:
        """Return the report as the object that ``--json`` writes."""
        topics = [{**asdict(topic), 'rate_hz': round(topic.rate_hz, 3)} for topic in self.topics]
        return {**asdict(self), 'topics': topics}

    def lines(self) -> list[str]:
        """Return the report as text."""
        lines = []
        for topic in self.topics:
            text = f'{topic.topic}: sent {topic.sent} of {topic.recorded}'
            text += f' x {self.loops}' if self.loops > 1 else ''
            text += f', {topic.bytes / 1e6:.1f} MB in {topic.span_s:.2f} s'
            text += f' = {topic.rate_hz:.2f} Hz' if topic.rate_hz else ''
            text += '' if topic.matched else ', nobody subscribed'
            text += '' if topic.acknowledged else ', not acknowledged by all'
            lines.append(text)
        lines += [f'{name}: skipped, {reason}' for name, reason in self.skipped.items()]
        lines.append(f'latest message {self.latest_s * 1e3:.1f} ms behind its time')
        return lines


class _Outlet:
    """One topic's publisher and what went through it."""

    def __init__(self, publisher: Publisher, report: TopicReport) -> None:
        self.publisher = publisher
        self.report = report
        self._first_ns: int | None = None

    def send(self, data: bytes) -> None:
        self.publisher.publish(data)
        now_ns = time.monotonic_ns()
        if self._first_ns is None:
            self._first_ns = now_ns
        self.report.sent += 1
        self.report.bytes += len(data)
        self.report.span_s = (now_ns - self._first_ns) / 1e9


class Replayer:
    """
    Play one bag through one node.

    Nothing is spun: a publisher needs no executor, and the calling thread keeps the pace.

    :param stop: ends the replay as soon as it is set.
    :raises BagError: nothing in the bag can be played as asked.
    """

    def __init__(self, node: Node, bag: Bag, options: ReplayOptions, stop: threading.Event) -> None:
        self._bag = bag
        self._options = options
        self._stop = stop
        self._node = node
        self.report = ReplayReport(str(bag.path), options.rate)
        self._outlets = self._open(node)
        self._clock = node.create_publisher(Clock, CLOCK_TOPIC, _DEFAULT_DEPTH) if options.clock_hz else None
        self._next_clock_ns = 0

    # -- what is played

    def _open(self, node: Node) -> dict[str, _Outlet]:
        topics, options = self._bag.topics, self._options
        if unknown := [name for name in (*options.topics, *options.remap) if name not in topics]:
            raise BagError(f'{self._bag.path} has no {", ".join(unknown)}.', remedy=f'It has {", ".join(topics)}.')
        outlets = {}
        for name, topic in topics.items():
            if (options.topics and name not in options.topics) or not topic.count:
                continue
            if name == CLOCK_TOPIC and options.clock_hz:
                self.report.skipped[name] = 'since --clock publishes it'
                continue
            try:
                message_type = _message_type(topic.msgtype)
                outlets[name] = self._outlet(node, topic, message_type)
            except BagError as error:
                self.report.skipped[name] = str(error)
                _logger.warning('%s is skipped: %s', name, error)
        if not outlets:
            raise BagError(
                f'{self._bag.path}: nothing is left to play.',
                remedy='; '.join(f'{name}: {reason}' for name, reason in self.report.skipped.items()),
            )
        return outlets

    def _outlet(self, node: Node, topic: BagTopic, message_type: Any) -> _Outlet:
        qos = QoSProfile(
            depth=topic.qos.depth or _DEFAULT_DEPTH,
            reliability=ReliabilityPolicy.RELIABLE if topic.qos.reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if topic.qos.transient_local else DurabilityPolicy.VOLATILE,
        )
        name = self._options.remap.get(topic.name, topic.name)
        try:
            publisher = node.create_publisher(message_type, name, qos)
        except Exception as error:
            # A message package without its compiled type support fails only here, with errors of many types.
            raise BagError(
                f'{topic.msgtype} cannot be published: {error}.', remedy='Build its package again.'
            ) from error
        report = TopicReport(publisher.topic_name, topic.msgtype, topic.count, topic.qos.reliable)
        self.report.topics.append(report)
        _warn_of_another_definition(node, report.topic, topic)
        return _Outlet(publisher, report)

    # -- when

    def wait_matched(self) -> None:
        """
        Wait until subscribers have matched, and a little longer.

        Discovery is two-sided: a publisher that sees its subscriber may not be seen by it yet, and what it sends
        then is lost without a trace.

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
        missing = [outlet.report.topic for outlet in self._outlets.values() if not outlet.report.matched]
        if missing and (named or not any(counts)) and not self._stop.is_set():
            self._nobody(missing)
        self._stop.wait(_SETTLE_S if any(counts) else 0.0)

    def _nobody(self, missing: list[str]) -> None:
        problem = f'nobody subscribes to {", ".join(missing)}.'
        remedy = (
            f'Check the names, that ROS_DOMAIN_ID is {os.environ.get("ROS_DOMAIN_ID", "0")} over there too, and that '
            'no subscriber asks for more than is offered here (best effort or volatile, as recorded).'
        )
        if self._options.require_matched:
            raise BagError(problem, remedy=remedy)
        if self._options.wait_matched_s:
            _logger.warning('%s %s', problem, remedy)

    def play(self, on_sent: Callable[[], object] = lambda: None) -> None:
        """
        Send every message when its time has come, on the steady clock; over and over where the options loop.

        :param on_sent: called after each message.
        :raises BagError: the bag is damaged or incomplete; what came before was sent.
        """
        while not self._stop.is_set():
            self._play_once(on_sent)
            if self._stop.is_set():
                return
            self.report.loops += 1
            if self.report.loops == 1:
                self._check_complete()
            if not self._options.loop:
                return

    def _check_complete(self) -> None:
        short = [
            f'{name} has {outlet.report.sent} of {outlet.report.recorded}'
            for name, outlet in self._outlets.items()
            if outlet.report.sent != outlet.report.recorded
        ]
        if short:
            raise BagError(
                f'{self._bag.path} holds other messages than its metadata says: {", ".join(short)}.',
                remedy='Run ros2 bag reindex on it, or name its storage file instead of the directory.',
            )

    def _play_once(self, on_sent: Callable[[], object]) -> None:
        start_ns = first_ns = None
        for name, time_ns, data in self._bag.messages(self._outlets):
            if start_ns is None or first_ns is None:
                start_ns, first_ns = time.monotonic_ns(), time_ns
                self._next_clock_ns = start_ns
            due_ns = start_ns + round((time_ns - first_ns) / self._options.rate)
            if not self._sleep_until(due_ns, start_ns, first_ns):
                return
            late_ns = time.monotonic_ns() - due_ns
            self.report.latest_s = max(self.report.latest_s, late_ns / 1e9)
            self._outlets[name].send(data)
            on_sent()

    def _sleep_until(self, due_ns: int, start_ns: int, first_ns: int) -> bool:
        """Wait for ``due_ns`` while keeping ``/clock`` going; False where the replay was stopped."""
        while not self._stop.is_set():
            now_ns = time.monotonic_ns()
            if self._clock is not None and now_ns >= self._next_clock_ns:
                bag_ns = first_ns + round((now_ns - start_ns) * self._options.rate)
                self._clock.publish(Clock(clock=Time(sec=bag_ns // 10**9, nanosec=bag_ns % 10**9)))
                self._next_clock_ns = now_ns + round(1e9 / self._options.clock_hz)
            if now_ns >= due_ns:
                return True
            until_ns = due_ns if self._clock is None else min(due_ns, self._next_clock_ns)
            self._stop.wait(max(0, until_ns - now_ns) / 1e9)
        return False

    def finish(self) -> None:
        """Wait until reliable subscribers have everything, and best-effort ones had time to read the last message."""
        timeout = Duration(seconds=_ACK_S)
        for outlet in self._outlets.values():
            if outlet.report.reliable and outlet.report.sent:
                outlet.report.acknowledged = outlet.publisher.wait_for_all_acked(timeout)
        # The last messages lie in this process's shared memory, which goes with it.
        time.sleep(_SETTLE_S if any(outlet.report.sent for outlet in self._outlets.values()) else 0.0)


def _message_type(name: str) -> Any:
    """Return the Python class of a message type such as ``sensor_msgs/msg/Image``."""
    package, _, rest = name.partition('/')
    kind, _, message = rest.rpartition('/')
    try:
        return getattr(importlib.import_module(f'{package}.{kind or "msg"}'), message)
    except (ImportError, AttributeError, ValueError) as error:
        debian = f'ros-{os.environ.get("ROS_DISTRO", "$ROS_DISTRO")}-{package.replace("_", "-")}'
        raise BagError(
            f'{name} is not installed.', remedy=f'sudo apt-get install {debian}, or source the workspace that has it.'
        ) from error


def _warn_of_another_definition(node: Node, name: str, topic: BagTopic) -> None:
    """Warn where the bag's message definition is not the installed one: raw CDR would be read wrongly."""
    for info in node.get_publishers_info_by_topic(name):
        # Humble's endpoint info has no type hash.
        if info.node_name == node.get_name() and (installed := getattr(info, 'topic_type_hash', None)):
            if topic.type_hash and str(installed) != topic.type_hash:
                _logger.warning(
                    '%s: %s was recorded with another definition (%s) than is installed (%s); values may be wrong',
                    name, topic.msgtype, topic.type_hash, installed,
                )  # fmt: skip
            return


class _Signals:
    """Note the first SIGINT or SIGTERM; rclpy's own handlers would shut the context down under a publisher."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.received: signal.Signals | None = None
        on_first_signal((signal.SIGINT, signal.SIGTERM), self._note)

    def _note(self, number: signal.Signals) -> None:
        self.received = number
        self.stop.set()


def main(args: Sequence[str] | None = None) -> int:
    """
    Run ``c7_replay``.

    :return: 0 when all was sent, or a loop was ended by a signal; 1 for a bag that cannot be played, 2 for a command
        line that cannot be used, 128 + signal number when interrupted before the end.
    """
    own, ros = _split_arguments(sys.argv[1:] if args is None else args)
    parsed = _parser().parse_args(own)
    logging.basicConfig(format='c7_replay: %(message)s', level=logging.INFO)
    options = ReplayOptions(
        rate=parsed.rate,
        loop=parsed.loop,
        topics=tuple(parsed.topics or ()),
        remap=dict(parsed.remap or ()),
        clock_hz=parsed.clock or 0.0,
        wait_matched_s=_DEFAULT_WAIT_S if parsed.wait_matched is None else parsed.wait_matched,
        require_matched=bool(parsed.wait_matched),
    )
    signals = _Signals()
    _logger.info(apply_profile(os.environ).reason)
    tune_allocator()
    try:
        with Bag(parsed.bag) as bag:
            rclpy.init(args=ros, signal_handler_options=SignalHandlerOptions.NO)
            try:
                report = _run(bag, options, signals, show_progress=parsed.progress, json_path=parsed.json)
            finally:
                rclpy.try_shutdown()
    except BagError as error:
        _logger.error('%s', error)
        return 1
    if signals.received is not None and not (options.loop and report.loops):
        return 128 + signals.received
    return 0


def _run(
    bag: Bag, options: ReplayOptions, signals: _Signals, *, show_progress: bool | None, json_path: Path | None
) -> ReplayReport:
    from tqdm import tqdm

    node = rclpy.create_node('c7_replay', start_parameter_services=False, enable_rosout=False)
    try:
        replayer = Replayer(node, bag, options, signals.stop)
        for warning in transport_warnings(os.environ):
            _logger.warning('%s', warning)
        replayer.wait_matched()
        total = None if options.loop else sum(topic.recorded for topic in replayer.report.topics)
        disable = None if show_progress is None else not show_progress
        try:
            with tqdm(total=total, unit='msg', desc=bag.path.name, disable=disable) as bar:
                replayer.play(bar.update)
        finally:
            replayer.finish()
            report = replayer.report
            report.interrupted = signals.received.name if signals.received else ''
            for line in report.lines():
                _logger.info('%s', line)
            if json_path is not None:
                json_path.write_text(json.dumps(report.to_json(), indent=2) + '\n', encoding='utf-8')
        return report
    finally:
        node.destroy_node()


def _split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Part the command line into this program's arguments and those that follow ``--ros-args``.

    rclpy's own splitting takes any ``a:=b`` for itself, which is what ``--remap`` takes as well.
    """
    if '--ros-args' not in arguments:
        return list(arguments), []
    begin = arguments.index('--ros-args')
    end = arguments.index('--', begin) if '--' in arguments[begin:] else len(arguments)
    return [*arguments[:begin], *arguments[end + 1 :]], list(arguments[begin:end])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='c7_replay', description='Play a rosbag2 (sqlite3 or mcap) onto its topics, as recorded.'
    )
    parser.add_argument('bag', type=Path, help='bag directory, or one .mcap or .db3 file')
    parser.add_argument('--rate', type=_positive, default=1.0, metavar='FACTOR', help='of the recorded pace')
    parser.add_argument('--loop', action='store_true', help='start over at the end, until interrupted')
    parser.add_argument('--topics', nargs='+', metavar='TOPIC', help='play these only, and wait for their readers')
    parser.add_argument('--remap', nargs='+', type=_remapping, metavar='FROM:=TO', help='publish under other names')
    parser.add_argument(
        '--clock', nargs='?', type=_positive, const=_DEFAULT_CLOCK_HZ, metavar='HZ',
        help=f"publish the bag's time on /clock, {_DEFAULT_CLOCK_HZ:g} times a second where HZ is not given",
    )  # fmt: skip
    parser.add_argument(
        '--wait-matched', type=_not_negative, metavar='SECONDS',
        help='give up when no subscriber came by then (on each of --topics, else on any); 0: do not wait. '
        f'Default: wait {_DEFAULT_WAIT_S:g} s, then play anyway',
    )  # fmt: skip
    parser.add_argument('--progress', action=argparse.BooleanOptionalAction, help='default: on a terminal')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the report there too')
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text} is not a positive number')
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text} is negative or no number')
    return value


def _remapping(text: str) -> tuple[str, str]:
    source, separator, target = text.partition(':=')
    if not (source and separator and target):
        raise argparse.ArgumentTypeError(f'{text} is not FROM:=TO')
    return source, target


if __name__ == '__main__':
    sys.exit(main())
