"""The report of ``c7_replay``, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gps_denied_c7.ros.bag.storage import time_text

__all__ = ['Gap', 'ReplayReport', 'TopicReport']


@dataclass(slots=True)
class TopicReport:
    """
    Count what went out on one topic.

    :param topic: the name published on.
    :param recorded: messages of it in the bag, as the storage files tell.
    :param matched: subscriptions when the first message was due.
    :param first_matched_s: when the first subscription was seen, in seconds after the first message of the bag was
        due; None where there was none until the end.
    :param sent_unmatched: messages that went out while there was no subscription.
    :param bytes: of CDR, all messages together.
    :param span_s: from the first to the last message sent, steady clock.
    :param name: of the topic in the bag.
    :param mismatched: nodes that subscribe and receive nothing, each with the type or QoS that does not match.
    :param acknowledged: every reliable subscriber acknowledged everything; True where there is none.
    """

    topic: str
    msgtype: str
    recorded: int
    reliable: bool
    name: str = ''
    matched: int = 0
    first_matched_s: float | None = None
    sent: int = 0
    sent_unmatched: int = 0
    mismatched: list[str] = field(default_factory=list)
    bytes: int = 0
    span_s: float = 0.0
    acknowledged: bool = True

    @property
    def rate_hz(self) -> float:
        """Messages per second that were really sent."""
        return (self.sent - 1) / self.span_s if self.sent > 1 and self.span_s > 0 else 0.0

    def subscribers(self) -> str:
        """Say what subscribers could not receive, '' if they were there from the start."""
        mismatched = f', not received by {"; ".join(self.mismatched)}' if self.mismatched else ''
        if self.first_matched_s is None:
            return mismatched or ', no subscriber'
        if not self.sent_unmatched:
            return mismatched
        if self.matched:
            return f', {self.sent_unmatched} of them while there was no subscriber{mismatched}'
        since = f'the first subscriber came {self.first_matched_s:.2f} s after the start'
        return f', {self.sent_unmatched} of them without a subscriber: {since}{mismatched}'


@dataclass(frozen=True, slots=True)
class Gap:
    """
    Describe a silence in the bag that was shortened.

    :param after_ns: bag time of the last message before it.
    :param recorded_s: its length in the bag.
    :param played_s: what was played of it, in bag time.
    """

    after_ns: int
    recorded_s: float
    played_s: float

    def __str__(self) -> str:
        before, after = time_text(self.after_ns), time_text(self.after_ns + round(self.recorded_s * 1e9))
        return f'no message for {_duration(self.recorded_s)} ({before} to {after}), shortened to {self.played_s:g} s'


@dataclass(slots=True)
class ReplayReport:
    """
    Hold what a replay did.

    :param skipped: topic → why it, or a part of it, was left out.
    :param missing: sentences, one for each part of what was asked for that was not in the bag or could not be sent.
    :param notes: sentences about what is odd in the bag and lost nothing.
    :param gaps: the first silences that were cut short, ``gap_count`` in all.
    :param bag_incomplete: parts of the bag are lost, and it may have held more than ``recorded`` says.
    :param loops: passes through the bag that were completed.
    :param latest_s: how far behind its time the latest message went out.
    :param interrupted: name of the signal that ended it early, '' where none did.
    :param error: why nothing was played, '' where something was.
    """

    bag: str
    rate: float
    topics: list[TopicReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    gap_count: int = 0
    bag_incomplete: bool = False
    loops: int = 0
    latest_s: float = 0.0
    interrupted: str = ''
    error: str = ''

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for was in the bag and was sent, once at least."""
        return bool(self.loops) and not self.missing and not self.error

    def to_json(self) -> dict[str, Any]:
        """Return the report as the object that ``--json`` writes."""
        topics = [{**asdict(topic), 'rate_hz': round(topic.rate_hz, 3)} for topic in self.topics]
        return {**asdict(self), 'topics': topics, 'complete': self.complete}

    def lines(self) -> list[str]:
        """Return the report as text."""
        lines = []
        for topic in self.topics:
            least = 'at least ' if self.bag_incomplete and topic.sent >= topic.recorded else ''
            name = topic.topic if topic.name in ('', topic.topic) else f'{topic.topic} ({topic.name} in the bag)'
            text = f'{name}: sent {topic.sent} of {least}{topic.recorded}'
            text += f' x {self.loops}' if self.loops > 1 else ''
            text += f', {topic.bytes / 1e6:.1f} MB in {topic.span_s:.2f} s'
            text += f' = {topic.rate_hz:.2f} Hz' if topic.rate_hz else ''
            text += topic.subscribers()
            text += '' if topic.acknowledged else ', not acknowledged by all subscribers'
            lines.append(text)
        lines += [f'{name}: skipped, {reason}' for name, reason in self.skipped.items()]
        lines += [f'missing: {sentence}' for sentence in self.missing]
        lines += [f'gaps shortened: {self.gap_count}, see --max-gap'] if self.gap_count else []
        lines.append(f'longest delay of a message: {self.latest_s * 1e3:.1f} ms')
        return lines


def _duration(seconds: float) -> str:
    """Return a length of time in the unit that suits it."""
    for name, length in (('years', 365.25 * 86400), ('days', 86400), ('hours', 3600), ('minutes', 60)):
        if seconds >= 2 * length:
            return f'{seconds / length:.1f} {name}'
    return f'{seconds:.1f} s'
