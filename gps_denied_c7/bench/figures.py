"""The figures that are compared, from stamps, durations and counters."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gps_denied_c7._json import reader_of
from gps_denied_c7.bench.cases import BARE, FORTY_LINES, IN_PROCESS, SHIPPED, SHIPPED_TRANSPORT, Case
from gps_denied_c7.monitoring.metrics import Percentiles, percentiles

__all__ = [
    'STAGES',
    'Block',
    'CaseResult',
    'Result',
    'Verdict',
    'compared',
    'has_overview',
    'ratio_p50',
    'ratio_p99',
    'series_of',
    'stages_of',
    'summarise',
    'summarise_bare',
    'verdicts',
]

STAGES = (
    'transport in', 'queue', 'decode', 'pre-process', 'hand-off', 'engine', 'hand-back', 'message', 'publish',
)  # fmt: skip
"""
From the camera's stamp to the tensors in the subscriber's hands.

transport in: to callback entry; queue: to leaving the slot; hand-off: until the engine runs, as in a worker process;
hand-back: from its end to the outputs in the node's hands, with the look at each value, which on a GPU is part of the
engine's run; message: filling the TensorList; publish: the publish call, transport out and reading in the subscriber.
"""

_MS = 1e-6
_MANY = 10
_INSIDE = ('queue', 'decode', 'preprocess', 'hand_off', 'engine', 'hand_back')
_OUTSIDE_MS = {(480, 'mono8'): 1.5, (1080, 'rgb8'): 4.0}


@dataclass(frozen=True, slots=True)
class Block:
    """
    Hold one uninterrupted measurement of one contestant.

    :param stamps: header stamps of the frames that count, nanoseconds, in the order sent.
    :param warm_up: frames sent just before them, which do not count.
    :param answers: everything that came meanwhile and a little after, as the listener noted it.
    :param cpu_s: processor seconds by process, warm-up and settling included.
    :param elapsed_s: time in which they were spent.
    """

    stamps: Sequence[int]
    warm_up: int
    answers: Sequence[Mapping[str, int]]
    cpu_s: Mapping[str, float]
    elapsed_s: float

    @property
    def counted(self) -> list[Mapping[str, int]]:
        """The answers to the frames that count."""
        sent = set(self.stamps)
        return [answer for answer in self.answers if answer['stamp_ns'] in sent]

    @property
    def latencies_ms(self) -> list[float]:
        """Camera-to-tensors latency of each of these."""
        return [(answer['arrival_ns'] - answer['stamp_ns']) * _MS for answer in self.counted]

    @property
    def answered_hz(self) -> float:
        """
        Answers per second from the first frame that counts to the last one.

        One that arrived after the end counts for the part of its time that lay before it, and so at the beginning: a
        second and a half has room for 45 answers of 30 ms, and a whole one more or less would be two percent. The time
        of the very first one is its latency.
        """
        arrivals = sorted(answer['arrival_ns'] for answer in self.answers)
        if not arrivals or len(self.stamps) < 2:
            return 0.0
        ends = self.stamps[0], self.stamps[-1]
        known = [min(answer['stamp_ns'] for answer in self.answers), *arrivals]
        before, after = np.interp(ends, known, np.arange(len(known)))
        return float((after - before) / ((ends[1] - ends[0]) * 1e-9))


def stages_of(answer: Mapping[str, int]) -> dict[str, float]:
    """Return what each of STAGES took for one answer, milliseconds; they add up to its latency."""
    inside = [answer[f'{stage}_ns'] for stage in _INSIDE]
    durations = [
        answer['receive_ns'] - answer['stamp_ns'],
        *inside,
        answer['total_ns'] - sum(inside),
        answer['arrival_ns'] - answer['receive_ns'] - answer['total_ns'],
    ]
    return {stage: duration * _MS for stage, duration in zip(STAGES, durations, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """
    Hold what one contestant did in one case.

    :param latency: camera to tensors, all repetitions together; of one inference for the bare engine.
    :param p50_by_repetition: milliseconds, in the order measured.
    :param answered_hz_by_repetition: answers per second while frames were being sent, in the order measured.
    :param stages: by name, as STAGES.
    :param outside: callback entry to the message being complete, the engine's own run left out.
    :param publish_call_ms: p50 of message and publish call together, by the node's own diagnostics; None for others.
    :param sent: frames of all repetitions, warm-up included.
    :param dropped: by policy, by the node's own count; None for contestants that do not count it.
    :param lost: neither answered nor dropped by policy: lost on the way, or pushed out of a queue.
    :param cpu_ms_per_answer: processor time by process, for each answer.
    :param cpu_percent: of one core, by process.
    :param memory_mb: proportional set size, workers included.
    :param start_s: from the start of the process to its subscriptions being matched; of the node as shipped alone.
    :param idle_percent: of one core, active and without images.
    """

    name: str
    title: str
    latency: Percentiles | None
    p50_by_repetition: tuple[float, ...] = ()
    answered_hz_by_repetition: tuple[float, ...] = ()
    stages: Mapping[str, Percentiles] = field(default_factory=dict)
    outside: Percentiles | None = None
    publish_call_ms: float | None = None
    sent: int = 0
    answered: int = 0
    dropped: int | None = None
    lost: int = 0
    lost_before_node: str = ''
    cpu_ms_per_answer: Mapping[str, float] = field(default_factory=dict)
    cpu_percent: Mapping[str, float] = field(default_factory=dict)
    memory_mb: float | None = None
    start_s: float | None = None
    idle_percent: float | None = None

    @property
    def answered_hz(self) -> float:
        """Answers per second, median of the repetitions; 0 without any."""
        return float(np.median(self.answered_hz_by_repetition)) if self.answered_hz_by_repetition else 0.0

    @property
    def missing_percent(self) -> float:
        """Frames of a hundred sent that were lost or dropped."""
        return 100.0 * (self.lost + (self.dropped or 0)) / max(self.sent, 1)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """
    Hold a case with the result of each contestant.

    :param engine_ms: what the network took when it was made.
    """

    case: Case
    engine_ms: float
    sent_hz: float
    results: Mapping[str, Result]

    @property
    def total_hz(self) -> float:
        """Images sent per second by all cameras together."""
        return self.sent_hz * self.case.cameras

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            'name': self.case.name,
            'case': asdict(self.case),
            'engine_ms': self.engine_ms,
            'sent_hz': self.sent_hz,
            'results': {name: asdict(result) for name, result in self.results.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CaseResult:
        """
        Read what :meth:`to_json` wrote.

        :raises ValueError: it is anything else.
        """
        fields = {name: value for name, value in values.items() if name != 'name'}
        case: CaseResult = reader_of(cls)(fields)  # type: ignore[arg-type]
        return case


def series_of(cases: Sequence[CaseResult]) -> dict[str, list[CaseResult]]:
    """Return the points of each series by its name, in the order measured; a case may be a point of several."""
    series: dict[str, list[CaseResult]] = {}
    for case in cases:
        for name in case.case.series:
            series.setdefault(name, []).append(case)
    return series


def compared(cases: Sequence[CaseResult]) -> list[CaseResult]:
    """Return the cases in which both the forty lines and the node as shipped answered, points of series left out."""
    return [
        case
        for case in cases
        if not case.case.series and all(_answered(case, name) for name in (FORTY_LINES, SHIPPED))
    ]


def has_overview(cases: Sequence[CaseResult]) -> bool:
    """Return whether there are too many comparable cases to read one by one."""
    return len(compared(cases)) >= _MANY


def _answered(case: CaseResult, name: str) -> bool:
    return name in case.results and case.results[name].latency is not None


def summarise_bare(name: str, title: str, repetitions: Sequence[Sequence[int]]) -> Result:
    """Return the figures of the bare engine from the nanoseconds of its inferences, one list a repetition."""
    milliseconds = [[duration * _MS for duration in durations] for durations in repetitions]
    pooled = [value for values in milliseconds for value in values]
    return Result(
        name=name,
        title=title,
        latency=percentiles(pooled),
        p50_by_repetition=tuple(float(np.median(values)) for values in milliseconds),
        answered_hz_by_repetition=tuple(1000.0 * len(values) / sum(values) for values in milliseconds),
        answered=len(pooled),
    )


def summarise(
    name: str,
    title: str,
    blocks: Sequence[Block],
    *,
    statuses: Sequence[Mapping[str, Mapping[str, str]]] | None = None,
    memory_mb: float | None = None,
    start_s: float | None = None,
    idle_percent: float | None = None,
) -> Result:
    """
    Return the figures of a contestant.

    :param blocks: one without stamps counts among frames sent and answered, and nowhere else.
    :param statuses: of the node's diagnostics when each of its processes ended, None for a contestant that has none.
    """
    everything, blocks = blocks, [block for block in blocks if block.stamps]
    counted = [answer for block in blocks for answer in block.counted]
    split = [stages_of(answer) for answer in counted]
    sent = sum(len(block.stamps) + block.warm_up for block in everything)
    answered = sum(len(block.answers) for block in everything)
    dropped: int | None = None
    lost_before: list[str] = []
    if statuses is not None:
        streams = [
            values for process in statuses for status, values in process.items() if status.startswith('Stream ')
        ]
        dropped = sum(int(values.get('dropped_by_policy', 0)) for values in streams)
        lost_before = [values.get('lost_before_node', 'unknown') for values in streams]
    publish_ms = [
        float(process['Latency']['publish_p50_ms'])
        for process in statuses or ()
        if 'publish_p50_ms' in process.get('Latency', {})
    ]
    elapsed = sum(block.elapsed_s for block in blocks)
    spent = {key: sum(block.cpu_s[key] for block in blocks) for key in (blocks[0].cpu_s if blocks else ())}
    p50s = [percentiles(block.latencies_ms) for block in blocks]
    stages = {stage: percentiles([one[stage] for one in split]) for stage in STAGES}
    return Result(
        name=name,
        title=title,
        latency=percentiles([value for block in blocks for value in block.latencies_ms]),
        p50_by_repetition=tuple(figures.p50 for figures in p50s if figures),
        answered_hz_by_repetition=tuple(block.answered_hz for block in blocks),
        stages={stage: figures for stage, figures in stages.items() if figures},
        outside=percentiles([(answer['total_ns'] - answer['engine_ns']) * _MS for answer in counted]),
        publish_call_ms=float(np.median(publish_ms)) if publish_ms else None,
        sent=sent,
        answered=answered,
        dropped=dropped,
        lost=max(0, sent - answered - (dropped or 0)),
        lost_before_node=', '.join(dict.fromkeys(lost_before)),
        cpu_ms_per_answer={key: 1000.0 * seconds / max(answered, 1) for key, seconds in spent.items()},
        cpu_percent={key: 100.0 * seconds / max(elapsed, 1e-9) for key, seconds in spent.items()},
        memory_mb=memory_mb,
        start_s=start_s,
        idle_percent=idle_percent,
    )


def ratio_p50(result: Result, reference: Result) -> float | None:
    """Return the median over repetitions of the p50 of one against that of the other, measured right after it."""
    return _paired(operator.truediv, result.p50_by_repetition, reference.p50_by_repetition)


def _paired(compare: Callable[[float, float], float], ours: Sequence[float], others: Sequence[float]) -> float | None:
    """Return the median of what repetitions that were measured beside one another compare as, None without any."""
    values = [compare(one, other) for one, other in zip(ours, others, strict=False)]
    return float(np.median(values)) if values else None


def ratio_p99(result: Result, reference: Result) -> float | None:
    """Return the p99 of one against that of the other, all repetitions together."""
    if result.latency is None or reference.latency is None:
        return None
    return result.latency.p99 / reference.latency.p99


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    Hold a limit beside what was measured.

    :param limit: as text, as ``<= 0.7``.
    :param measured: as text.
    :param where: the case it was measured in.
    """

    what: str
    limit: str
    measured: str
    met: bool
    where: str


def verdicts(cases: Sequence[CaseResult]) -> list[Verdict]:
    """Return every limit that these cases can tell anything about."""
    found: list[Verdict] = []
    shipped = []
    for case in cases:
        if node := case.results.get(SHIPPED):
            shipped.append(node)
            for compare in (_against_forty_lines, _outside_engine, _throughput, _isolation, _transport):
                found += compare(case, node)
    found += _lasting('active and idle', 'of one core', [one.idle_percent for one in shipped], 2.0, ' %')
    found += _lasting('process start to active', '', [one.start_s for one in shipped], 3.0, ' s')
    return found


def _at_most(what: str, measured: float | None, limit: float, where: str, unit: str = '') -> list[Verdict]:
    if measured is None:
        return []
    return [Verdict(what, f'≤ {limit:g}{unit}', f'{measured:.2f}{unit}', measured <= limit, where)]


def _lasting(what: str, of: str, values: Sequence[float | None], limit: float, unit: str) -> list[Verdict]:
    measured = [value for value in values if value is not None]
    if not measured:
        return []
    return _at_most(f'{what}, median', float(np.median(measured)), limit, of or 'all cases', unit)


def _against_forty_lines(case: CaseResult, node: Result) -> list[Verdict]:
    reference = case.results.get(FORTY_LINES)
    if reference is None:
        return []
    at_1080p = case.case.height == 1080 and case.case.encoding == 'rgb8'
    strict = at_1080p and case.case.model_ms == 5 and not case.case.is_overloaded
    limit = 0.7 if strict and not case.case.large_outputs else 1.0
    return [
        *_at_most('latency p50 / forty lines', ratio_p50(node, reference), limit, case.case.title, ' x'),
        *_at_most('latency p99 / forty lines', ratio_p99(node, reference), limit, case.case.title, ' x'),
    ]


def _outside_engine(case: CaseResult, node: Result) -> list[Verdict]:
    limit = _OUTSIDE_MS.get((case.case.height, case.case.encoding))
    if limit is None or node.outside is None or case.case.is_overloaded or case.case.large_outputs:
        return []
    # With several cameras a frame waits while another one's is answered, which is not the node's work.
    if case.case.transport != SHIPPED_TRANSPORT or case.case.cameras > 1:
        return []
    # Callback entry to publish returned: the message's own durations end before the publish call.
    message = node.stages['message'].p50
    measured = node.outside.p50 + max(0.0, (node.publish_call_ms or message) - message)
    return _at_most('in the node outside the engine, p50', measured, limit, case.case.title, ' ms')


def _throughput(case: CaseResult, node: Result) -> list[Verdict]:
    bare = case.results.get(BARE)
    if bare is None or not case.case.is_saturated or case.case.model_ms < 30:
        return []
    ratio = _paired(operator.truediv, node.answered_hz_by_repetition, bare.answered_hz_by_repetition)
    if ratio is None:
        return []
    return [Verdict('answers per second / bare engine', '≥ 0.9 x', f'{ratio:.2f} x', ratio >= 0.9, case.case.title)]


def _isolation(case: CaseResult, node: Result) -> list[Verdict]:
    inside = case.results.get(IN_PROCESS)
    if inside is None or case.case.is_overloaded:
        return []
    difference = _paired(operator.sub, node.p50_by_repetition, inside.p50_by_repetition)
    return _at_most('isolation process - none, p50', difference, 0.3, case.case.title, ' ms')


def _transport(case: CaseResult, node: Result) -> list[Verdict]:
    if case.case.height != 1080 or case.case.transport != SHIPPED_TRANSPORT:
        return []
    if case.case.cameras > 1 or case.case.is_overloaded:
        return []
    measured = f'{node.lost} of {node.sent}'
    return [Verdict('lost by transport', '0', measured, node.lost == 0, case.case.title)]
