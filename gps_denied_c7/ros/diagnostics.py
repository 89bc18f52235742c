"""Diagnostic statuses, each a function of one immutable snapshot, and when they are published."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.node import Node

from gps_denied_c7.failover.memory_budget import GpuMemoryBudget
from gps_denied_c7.failover.status import ChainState, ChainStatus
from gps_denied_c7.monitoring.metrics import Percentiles, StatisticsSnapshot, StreamCounters
from gps_denied_c7.monitoring.thermal import ThermalLevel, ThermalState
from gps_denied_c7.monitoring.thermal_policy import ThermalPolicy
from gps_denied_c7.pipeline.image_share import CameraCost
from gps_denied_c7.pipeline.model_swap import SwapStatus
from gps_denied_c7.ros.events import SHARE_REMEDY, SILENT_S, EventReporter
from gps_denied_c7.ros.frame_policy import FrameDropPolicy
from gps_denied_c7.ros.image_subscription import queue_depth
from gps_denied_c7.ros.image_topics import ImageTopics, type_name
from gps_denied_c7.runtimes.protocol import BuildProgress
from gps_denied_c7.text import plain

__all__ = [
    'DiagnosticsPublisher',
    'Report',
    'StreamHealth',
    'latency_report',
    'runtime_report',
    'stream_health',
    'stream_report',
    'thermal_report',
]

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR


@dataclass(frozen=True, slots=True)
class Report:
    """
    Hold one status before it gets its node's name.

    :param name: as ``Runtime``.
    :param level: DiagnosticStatus.OK, WARN or ERROR.
    """

    name: str
    level: bytes
    message: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StreamHealth:
    """
    Describe one image stream at one moment.

    :param silent_s: seconds since the last image, or since the stream was opened.
    :param refused_s: seconds since an image was last refused, None when none was.
    :param unanswered_s: seconds since an accepted image was last left without an answer, None when none was.
    :param lost_s: seconds since an image was last found to be lost on its way, None when none was.
    :param too_old: images dropped for their header stamps' age since one was not.
    :param mismatches: publishers that cannot reach the subscription, and why.
    :param queue_depth: how many images the middleware keeps for the node; ``closed`` while the stream is.
    :param message_type: with which the topic is subscribed, empty while it is not.
    :param cost: of its images, None while the streams are closed.
    """

    topic: str
    counters: StreamCounters
    silent_s: float
    refused_s: float | None
    unanswered_s: float | None
    lost_s: float | None
    too_old: int
    mismatches: tuple[str, ...]
    queue_depth: str
    message_type: str = ''
    cost: CameraCost | None = None


_MOST_VALUES = 256
_TROUBLE_LASTS_S = 3.0
_TOO_OLD_IN_A_ROW = 10
_CALLBACKS_FAILED = "but callbacks have failed: see 'failures in ...' below and the log"
_LOSS_REMEDY = "large images need the node's DDS profile in the camera driver too"


def stream_health(
    topic: str,
    snapshot: StatisticsSnapshot,
    streams: ImageTopics | None,
    events: EventReporter,
    policy: FrameDropPolicy,
) -> StreamHealth:
    """
    Return the state of one topic now.

    :param streams: None while they are closed.
    """
    stream = streams.stream(topic) if streams is not None else None
    now_ns = time.monotonic_ns()
    lost_ns = stream.last_lost_ns if stream else None
    return StreamHealth(
        topic=topic,
        counters=snapshot.streams.get(topic, StreamCounters()),
        silent_s=stream.silent_s if stream else 0.0,
        refused_s=events.refused_s(topic),
        unanswered_s=events.unanswered_s(topic),
        lost_s=None if lost_ns is None else (now_ns - lost_ns) / 1e9,
        too_old=policy.too_old_in_a_row(topic),
        mismatches=streams.mismatches(topic) if streams is not None else (),
        queue_depth=queue_depth(stream.qos) if stream else 'closed',
        message_type=type_name(stream.message_type) if stream else '',
        cost=streams.share.cost(topic) if streams is not None else None,
    )


def runtime_report(
    lifecycle_state: str,
    chain: ChainStatus | None,
    start_problem: str,
    callback_failures: Mapping[str, int],
    notices: tuple[str, ...] = (),
    building: BuildProgress | None = None,
    swap: SwapStatus | None = None,
    gpu_memory: GpuMemoryBudget | None = None,
) -> Report:
    """
    Judge the runtime: what serves, and what is wrong with it.

    :param start_problem: why the last configure or activate failed, empty when it did not.
    :param notices: lasting notes on the host, each a full sentence with its remedy.
    :param building: progress of the engine that is being built now, None if none is.
    :param swap: the latest swap of the model since configure, None before the first.
    :param gpu_memory: the budget that engines hold parts of.
    """
    values: dict[str, Any] = {'lifecycle_state': lifecycle_state}
    if building is not None:
        values |= {'building': building.phase, 'building_s': f'{building.elapsed_s:.0f}'}
    if swap is not None:
        values |= {'model_swap': swap.phase.value, 'model_swap_path': swap.path, 'model_swap_reason': swap.reason}
    if gpu_memory is not None:
        held = [f'{rung} {taken / 2**20:.0f}' for rung, taken in gpu_memory.held()]
        values |= {
            'gpu_memory_budget_mib': f'{gpu_memory.total_bytes / 2**20:.0f}',
            'gpu_memory_held_mib': ', '.join(held) or 'none',
        }
    if chain is not None:
        values |= _chain_values(chain)
    values |= {f'failures in {callback}': count for callback, count in callback_failures.items()}
    values |= {f'notice {number}': notice for number, notice in enumerate(notices, 1)}
    level, message = _judge_runtime(lifecycle_state, chain, start_problem)
    if building is not None:
        level, message = WARN, f'building an engine, which may take many minutes: {building}'
    if level == OK and (callback_failures or notices):
        level, message = WARN, notices[0] if notices else f'{message}, {_CALLBACKS_FAILED}'
    if swap is not None and swap.under_way:
        message = f'{message}; a swap to {swap.path} is under way ({swap.phase.value})'
    elif swap is not None and swap.unsuccessful:
        level, message = max(level, WARN), f'{message}; the swap to {swap.path} {swap.phase.value}: {swap.reason}'
    return Report('Runtime', level, message, values)


def _chain_values(chain: ChainStatus) -> dict[str, Any]:
    facts = chain.facts
    values: dict[str, Any] = {
        'model': chain.model_name,
        'weights_digest': chain.weights_digest,
        'chain_state': chain.state.value,
        'runtime': chain.active.strategy if chain.active else 'none',
        'provider': facts.active_provider if facts else 'none',
        'requested_providers': ', '.join(facts.requested_providers) if facts else '',
        'cpu_nodes': 'unknown' if facts is None or facts.cpu_nodes is None else facts.cpu_nodes,
        'worker_pid': chain.worker_pid or 'none',
        'standby': chain.standby.name if chain.standby else 'none',
        'standby_pid': chain.standby_pid or 'none',
        'is_fallback': chain.is_fallback,
        'alerts': ', '.join(chain.alerts),
        'switches': chain.switches,
        'gpu_lost': chain.gpu_lost,
    }
    values |= {f'longest_load_s {rung}': f'{seconds:.3f}' for rung, seconds in chain.longest_load_s}
    values |= {f'out {rung}': reason for rung, reason in chain.failures}
    return values


def _judge_runtime(lifecycle_state: str, chain: ChainStatus | None, start_problem: str) -> tuple[bytes, str]:
    if start_problem:
        return ERROR, start_problem
    if chain is None or chain.state is ChainState.UNLOADED:
        return OK, lifecycle_state
    if chain.state is ChainState.EXHAUSTED or chain.active is None or chain.facts is None:
        return ERROR, f'no usable runtime: {"; ".join(f"{rung}: {reason}" for rung, reason in chain.failures)}'
    serving = f'{chain.active.strategy} on {chain.facts.active_provider}'
    if chain.alerts:
        return WARN, f'fallback: {serving} ({", ".join(chain.alerts)})'
    if chain.is_fallback:
        return WARN, f'fallback: {serving}'
    return OK, serving


def stream_report(health: StreamHealth, *, active: bool) -> Report:
    """Judge one image stream."""
    counters = health.counters
    values: dict[str, Any] = {
        'received': counters.received,
        'accepted': counters.accepted,
        'answered': counters.answered,
        'unanswered': counters.unanswered,
        'dropped_by_policy': counters.dropped_by_policy,
        'dropped_replaced': counters.replaced,
        'dropped_in_queue': _known(counters.pushed_out),
        'dropped_too_old': counters.too_old,
        'dropped_shed': counters.shed,
        'dropped_over_share': counters.over_share,
        'dropped_at_close': counters.closed,
        'lost_before_node': _known(counters.lost),
        'type': health.message_type or 'closed',
        'type_changes': counters.retyped,
        'queue_depth': health.queue_depth,
        'silent_s': f'{health.silent_s:.1f}',
    }
    cost = health.cost
    if cost is not None:
        values |= {
            'image_cpu_ms': 'unknown' if cost.image_ms is None else f'{cost.image_ms:.1f}',
            'image_cpu_cores': f'{cost.used_cores:.2f}',
            'image_cpu_share_cores': 'no limit' if cost.share_cores is None else f'{cost.share_cores:.2f}',
        }
    values |= {f'refused {reason}': count for reason, count in counters.refused.items()}
    values |= {f'odd {fault}': count for fault, count in counters.odd.items()}
    slowed = active and cost is not None and cost.slowed
    level, message = OK, 'images arrive' if active else 'closed'
    if active and health.mismatches:
        level, message = ERROR, f'publishers whose images cannot reach this node: {"; ".join(health.mismatches)}'
    elif active and _is_recent(health.unanswered_s):
        level, message = ERROR, f'images are not answered, so far {counters.unanswered}; the log has the reason'
    elif slowed or (active and _is_recent(health.refused_s)):
        refused = ', '.join(f'{count} × {reason}' for reason, count in counters.refused.items())
        reasons = [f'images are being refused: so far {refused}'] if _is_recent(health.refused_s) else []
        if slowed:
            reasons.append(f'slowed: its images need more CPU time than its share ({cost}). {SHARE_REMEDY}')
        level, message = WARN, '; '.join(reasons)
    elif active and _is_recent(health.lost_s):
        level, message = WARN, f'images are lost between camera and node, so far {counters.lost}; {_LOSS_REMEDY}'
    elif active and health.silent_s > SILENT_S:
        level, message = WARN, f'no image for {health.silent_s:.0f} s; check that the camera publishes {health.topic}'
    elif active and health.too_old >= _TOO_OLD_IN_A_ROW:
        level, message = WARN, (
            f'the last {health.too_old} images were older than max_frame_age_ms; for a bag set use_sim_time, otherwise '
            'synchronise the clocks'
        )
    return Report(f'Stream {health.topic}', level, message, values)


def _known(count: int | None) -> int | str:
    return 'unknown' if count is None else count


def _is_recent(since_s: float | None) -> bool:
    return since_s is not None and since_s < _TROUBLE_LASTS_S


def latency_report(stages: Mapping[str, Percentiles], warn_ms: float) -> Report:
    """
    Judge the time from image callback to published tensors.

    :param warn_ms: p95 of the total in milliseconds that is too long, 0 for none.
    """
    values: dict[str, Any] = {}
    for stage, figures in stages.items():
        for name in ('p50', 'p95', 'p99'):
            values[f'{stage}_{name}_ms'] = f'{getattr(figures, name):.3f}'
    total = stages.get('total')
    if total is None:
        return Report('Latency', OK, 'no frame answered yet', values)
    values['frames'] = total.count
    message = f'p50 {total.p50:.1f} ms, p95 {total.p95:.1f} ms'
    if warn_ms and total.p95 > warn_ms:
        return Report('Latency', WARN, f'{message}, above latency_warn_ms {warn_ms:.1f}', values)
    return Report('Latency', OK, message, values)


def thermal_report(
    state: ThermalState, policy: str = ThermalPolicy.REPORT.value, answered_of: int = 1
) -> Report:
    """
    Judge the thermal state; an unknown state is reported as unknown, not as good.

    :param policy: of ThermalPolicy.
    :param answered_of: one frame of so many is answered, because of heat.
    """
    if policy == ThermalPolicy.OFF:
        return Report('Thermal', OK, 'not monitored (thermal_policy off)')
    level = {ThermalLevel.THROTTLED: WARN, ThermalLevel.CRITICAL: ERROR}.get(state.level, OK)
    message = state.level.value
    if state.reasons:
        message += f': {", ".join(state.reasons)}'
    if answered_of > 1:
        level, message = max(level, WARN), f'{message}; one frame of {answered_of} is answered'
    values: dict[str, Any] = {
        'source': state.source,
        'level': state.level.value,
        'age_s': 'unknown' if math.isinf(state.age_s) else f'{state.age_s:.1f}',
        'policy': policy,
        'answered': f'1 of {answered_of}',
    }
    values |= {f'{zone} (°C)': f'{temperature:.1f}' for zone, temperature in state.temperatures_c.items()}
    return Report('Thermal', level, message, values)


class DiagnosticsPublisher:
    """
    Publish reports on ``/diagnostics`` once a second and at once on a change of level.

    :param collect: returns the reports of this moment; must not block.
    :param hardware_id: host and GPU.
    """

    def __init__(self, node: Node, collect: Callable[[], list[Report]], hardware_id: str) -> None:
        self._node = node
        self._collect = collect
        self._hardware_id = hardware_id
        self._publisher = node.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self._levels: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def publish(self, *, only_changes: bool = False) -> None:
        """
        Publish every report now.

        :param only_changes: not if the level of each is that of the last time.
        """
        with self._lock:
            reports = self._collect()
            levels = {report.name: report.level for report in reports}
            if only_changes and levels == self._levels:
                return
            self._levels = levels
            message = DiagnosticArray()
            message.header.stamp = self._node.get_clock().now().to_msg()
            message.status = [self._status(report) for report in reports]
            self._publisher.publish(message)

    def _status(self, report: Report) -> DiagnosticStatus:
        return DiagnosticStatus(
            name=plain(f'{self._node.get_fully_qualified_name()}: {report.name}'),
            level=report.level,
            message=plain(report.message),
            hardware_id=plain(self._hardware_id),
            values=[
                KeyValue(key=plain(key), value=plain(value))
                for key, value in itertools.islice(report.values.items(), _MOST_VALUES)
            ],
        )
