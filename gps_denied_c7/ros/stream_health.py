"""The state of the image topics, gathered from the parts that count."""

from __future__ import annotations

import time

from gps_denied_c7.monitoring.metrics import StatisticsSnapshot, StreamCounters
from gps_denied_c7.ros.diagnostics import StreamHealth
from gps_denied_c7.ros.events import EventReporter
from gps_denied_c7.ros.frame_policy import FrameDropPolicy
from gps_denied_c7.ros.image_stream import queue_depth, type_name
from gps_denied_c7.ros.stream_set import StreamSet

__all__ = ['answered_of', 'stream_health']


def stream_health(
    topic: str,
    snapshot: StatisticsSnapshot,
    streams: StreamSet | None,
    events: EventReporter,
    policy: FrameDropPolicy,
) -> StreamHealth:
    """
    Return the state of one topic now.

    :param streams: None while they are closed.
    """
    stream = streams.stream(topic) if streams is not None else None
    now_ns = time.monotonic_ns()
    since_ns = (stream.last_received_ns or stream.opened_ns) if stream else now_ns
    lost_ns = stream.last_lost_ns if stream else None
    return StreamHealth(
        topic=topic,
        counters=snapshot.streams.get(topic, StreamCounters()),
        silent_s=(now_ns - since_ns) / 1e9,
        refused_s=events.refused_s(topic),
        unanswered_s=events.unanswered_s(topic),
        lost_s=None if lost_ns is None else (now_ns - lost_ns) / 1e9,
        too_old=policy.too_old_in_a_row(topic),
        mismatches=streams.mismatches(topic) if streams is not None else (),
        queue_depth=queue_depth(stream.qos) if stream else 'closed',
        message_type=type_name(stream.message_type) if stream else '',
        cost=streams.share.cost(topic) if streams is not None else None,
    )


def answered_of(snapshot: StatisticsSnapshot) -> str:
    """Say how many of the images that arrived on all topics were answered."""
    streams = snapshot.streams.values()
    answered, received = sum(each.answered for each in streams), sum(each.received for each in streams)
    return f'{answered} of {received} images answered since configure'
