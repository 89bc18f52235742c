"""Counters and latency windows, written by the frame path and read as one immutable snapshot."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ['STAGES', 'Percentiles', 'Statistics', 'StatisticsSnapshot', 'StreamCounters', 'percentiles']

STAGES = ('queue', 'decode', 'preprocess', 'hand_off', 'engine', 'hand_back', 'publish', 'total')

_WINDOW = 512


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """
    Count the frames of one topic since the node was configured.

    ``received = refused + replaced + over_share + too_old + shed + closed + accepted + waiting``, where an image waits
    while it is decoded beside the inference thread, and ``accepted = answered + unanswered + in hand``.

    :param over_share: images left out since those of this topic cost more than their share of CPU time.
    :param retyped: how often the topic was subscribed again because its publisher has another message type.
    :param pushed_out: images that never were received, since newer ones pushed them out of the middleware's queue;
        None where unknown.
    :param lost: messages lost before the node, None where unknown.
    :param refused: images refused, by reason.
    :param odd: images decoded in spite of a fault, by kind of fault; they are answered.
    """

    received: int = 0
    accepted: int = 0
    answered: int = 0
    unanswered: int = 0
    replaced: int = 0
    too_old: int = 0
    shed: int = 0
    over_share: int = 0
    closed: int = 0
    retyped: int = 0
    pushed_out: int | None = None
    lost: int | None = None
    refused: Mapping[str, int] = field(default_factory=dict)
    odd: Mapping[str, int] = field(default_factory=dict)

    @property
    def dropped_by_policy(self) -> int:
        """Frames that a newer one replaced, over the share, too old, left out in heat, or waiting at the close."""
        dropped = self.replaced + self.over_share + self.too_old + self.shed + self.closed
        return dropped + (self.pushed_out or 0)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Hold percentiles in milliseconds, over ``count`` values."""

    p50: float
    p95: float
    p99: float
    count: int


def percentiles(milliseconds: Sequence[float] | NDArray) -> Percentiles | None:
    """Return the percentiles of some values, None where there are none."""
    if not len(milliseconds):
        return None
    p50, p95, p99 = (float(value) for value in np.percentile(milliseconds, (50, 95, 99)))
    return Percentiles(p50, p95, p99, len(milliseconds))


@dataclass(frozen=True, slots=True)
class StatisticsSnapshot:
    """Hold everything counted, at one moment."""

    streams: Mapping[str, StreamCounters]
    stages: Mapping[str, Percentiles]
    callback_failures: Mapping[str, int]


def _counters(topics: tuple[str, ...] = ()) -> defaultdict[str, Counter[str]]:
    return defaultdict(Counter, {topic: Counter() for topic in topics})


class Statistics:
    """Collect counts and durations from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts, self._refused, self._odd = _counters(), _counters(), _counters()
        self._missed: dict[str, tuple[int | None, int | None]] = {}
        self._stages: dict[str, deque[int]] = {stage: deque(maxlen=_WINDOW) for stage in STAGES}
        self._callback_failures: Counter[str] = Counter()

    def open_streams(self, topics: tuple[str, ...]) -> None:
        """Begin counting ``topics`` from zero and forget older ones."""
        with self._lock:
            self._counts, self._refused, self._odd = _counters(topics), _counters(), _counters()
            self._missed = {}
            for window in self._stages.values():
                window.clear()

    def count(self, topic: str, event: str, by: int = 1) -> int:
        """Add to one StreamCounters field of ``topic`` and return the new value."""
        with self._lock:
            counts = self._counts[topic]
            counts[event] += by
            return counts[event]

    def refuse(self, topic: str, reason: str) -> None:
        """Count one refused image."""
        with self._lock:
            self._refused[topic][reason] += 1

    def note_odd(self, topic: str, fault: str) -> None:
        """Count one image that was decoded in spite of a fault."""
        with self._lock:
            self._odd[topic][fault] += 1

    def set_missed(self, topic: str, lost: int | None, pushed_out: int | None) -> None:
        """Set how many messages were lost before the node, and how many pushed out of its queue, None for unknown."""
        with self._lock:
            self._missed[topic] = lost, pushed_out

    def received(self, topic: str) -> int:
        """Return how many images of ``topic`` were received."""
        with self._lock:
            return self._counts.get(topic, Counter())['received']

    def missed(self, topic: str) -> tuple[int | None, int | None]:
        """Return what :meth:`set_missed` has set."""
        with self._lock:
            return self._missed.get(topic, (None, None))

    def callback_failed(self, callback: str) -> None:
        """Count one exception that a callback raised."""
        with self._lock:
            self._callback_failures[callback] += 1

    def observe(self, durations_ns: Mapping[str, int]) -> None:
        """Add one frame's durations in nanoseconds, by stage."""
        with self._lock:
            for stage, duration in durations_ns.items():
                self._stages[stage].append(duration)

    def snapshot(self) -> StatisticsSnapshot:
        """Return a copy of everything."""
        with self._lock:
            counts = {topic: dict(counter) for topic, counter in self._counts.items()}
            refused = {topic: dict(counter) for topic, counter in self._refused.items()}
            odd = {topic: dict(counter) for topic, counter in self._odd.items()}
            missed = dict(self._missed)
            windows = {stage: np.array(window, dtype=np.int64) for stage, window in self._stages.items()}
            failures = dict(self._callback_failures)
        streams = {}
        for topic, counter in counts.items():
            lost, pushed_out = missed.get(topic, (None, None))
            streams[topic] = StreamCounters(
                **counter, refused=refused.get(topic, {}), odd=odd.get(topic, {}), lost=lost, pushed_out=pushed_out
            )
        stages = {stage: percentiles(window / 1e6) for stage, window in windows.items()}
        return StatisticsSnapshot(streams, {stage: found for stage, found in stages.items() if found}, failures)
