"""What a demo run found, and whether that is good, as table, Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ['DemoReport', 'FrameCount', 'expected_alerts', 'stage_percentiles']

STAGES = ('queue', 'decode', 'preprocess', 'hand_off', 'engine', 'hand_back', 'message', 'total')
"""From the entry of the image callback to the finished message; message: what the total holds beside the others."""
_PERCENTILES = (50, 95, 99)
_FRAMES_REMARK = (
    'Dropped by policy: a newer image of the same camera came first, or it was too old. Refused: malformed, or every\n'
    'runtime failed it. Lost: nothing accounts for it.'
)
_STAGES_REMARK = (
    'One thread answers all cameras in turn: queue is the wait for it. message: filling the answer, without sending\n'
    'it; publish on /diagnostics is both. Percentiles of stages do not add up to those of their total.'
)
_PICTURE_REMARK = (
    'Each circle is a detected point, larger and redder where its score is higher. What is grey lies outside of what '
    'the network saw. Beside the image: what the network answered before points were picked from it.'
)
_ON_CPU = (
    'No runtime on a GPU could serve, so the CPU does, and the alerts say so. '
    'Without an NVIDIA GPU, that is as it should be.'
)


@dataclass(frozen=True, slots=True)
class FrameCount:
    """
    Account for the frames of one topic, from the replay to the answers.

    :param sent: what the replay published.
    :param answered: frames whose answer arrived.
    :param repeated: answers beyond one for the same frame.
    :param dropped: dropped by policy, by the node's own count.
    :param refused: refused as malformed, likewise.
    :param unanswered: accepted but failed by every runtime, likewise.
    :param lost_before_node: frames that never arrived, likewise; None for unknown.
    """

    topic: str
    sent: int
    answered: int
    repeated: int
    dropped: int
    refused: int
    unanswered: int
    lost_before_node: int | None

    @property
    def lost(self) -> int:
        """Frames that nothing accounts for."""
        return self.sent - self.answered - self.dropped - self.refused - self.unanswered


@dataclass(frozen=True, slots=True)
class DemoReport:
    """
    Hold everything a demo run found.

    :param stages: topic → stage → (p50, p95, p99) in milliseconds.
    :param records: kinds of flight records, in the order they came, with their payloads.
    :param standing_alerts: alerts on /diagnostics when the last frame was answered.
    :param node_exit_code: after SIGINT.
    :param pace: of the replay, 1 for real time.
    :param seconds: how long each part of the demo took.
    """

    frames: tuple[FrameCount, ...]
    stages: Mapping[str, Mapping[str, tuple[float, float, float]]]
    model: str
    weights_digest: str
    runtimes: tuple[str, ...]
    providers: tuple[str, ...]
    is_fallback: bool
    records: tuple[tuple[str, Mapping[str, Any]], ...]
    standing_alerts: tuple[str, ...]
    diagnostics_message: str
    node_exit_code: int
    transport: str
    pace: float
    seconds: Mapping[str, float]

    @property
    def dropped(self) -> int:
        """Frames that the node dropped by policy, since newer ones had come."""
        return sum(count.dropped for count in self.frames)

    def problems(self) -> list[str]:
        """Return one sentence for each thing that did not go as it must; empty when all is well."""
        problems = []
        for count in self.frames:
            if count.lost:
                problems.append(f'{count.topic}: {count.lost} of {count.sent} frames were lost.')
            if count.lost_before_node:
                problems.append(f'{count.topic}: {count.lost_before_node} frames were lost on the way to the node.')
            if count.repeated:
                problems.append(f'{count.topic}: {count.repeated} frames were answered more than once.')
            if count.answered != count.sent:
                problems.append(f'{count.topic}: {count.sent} frames went in and {count.answered} answers came out.')
        kinds = [kind for kind, _ in self.records]
        for alert in expected_alerts(self.runtimes, self.providers, self.is_fallback):
            if kinds.count(alert) != 1:
                problems.append(f'{alert} was recorded {kinds.count(alert)} times on ~/fdr, not once.')
            if alert not in self.standing_alerts:
                problems.append(f'{alert} is not on /diagnostics.')
        if 'c7.session_ended' not in kinds:
            problems.append('the node did not record the end of its session.')
        if self.node_exit_code != 0:
            problems.append(f'the node ended with code {self.node_exit_code} after SIGINT, not 0.')
        return problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return {
            **asdict(self),
            'frames': [{**asdict(count), 'lost': count.lost} for count in self.frames],
            'records': [{'kind': kind, 'payload': payload} for kind, payload in self.records],
            'problems': self.problems(),
        }

    def text(self, style: str = 'simple_outline') -> str:
        """
        Return the report as tables.

        :param style: a table format of tabulate: ``simple_outline`` for a terminal, ``github`` for Markdown.
        """
        from tabulate import tabulate

        frames = tabulate(
            [self._frame_row(count) for count in self.frames],
            headers=['frames', 'in', 'out', 'dropped by policy', 'refused', 'lost'],
            tablefmt=style,
        )
        stages = tabulate(
            [
                [topic if stage == STAGES[0] else '', stage, *values[stage]]
                for topic, values in self.stages.items()
                for stage in STAGES
            ],
            headers=['latency, ms', 'stage', *(f'p{percentile}' for percentile in _PERCENTILES)],
            tablefmt=style,
            floatfmt='.2f',
        )
        if style == 'github':
            facts = tabulate(self._facts(), headers=['', ''], tablefmt=style)
        else:
            facts = tabulate(self._facts(), tablefmt=style, maxcolwidths=[None, 96])
        return '\n\n'.join([frames, _FRAMES_REMARK, stages, _STAGES_REMARK, facts])

    @staticmethod
    def _frame_row(count: FrameCount) -> list[object]:
        return [count.topic, count.sent, count.answered, count.dropped, count.refused + count.unanswered, count.lost]

    def _facts(self) -> list[tuple[str, str]]:
        alerts = dict.fromkeys(kind for kind, _ in self.records if kind in self.standing_alerts)
        return [
            ('runtime', ', '.join(self.runtimes) + (' (as fallback)' if self.is_fallback else '')),
            ('provider', ', '.join(self.providers)),
            *([('', _ON_CPU)] if 'CPUExecutionProvider' in self.providers else []),
            ('model', f'{self.model}, weights {self.weights_digest[:19]}…'),
            ('alerts', ', '.join(alerts) or 'none'),
            ('diagnostics', self.diagnostics_message),
            ('transport', self.transport),
            ('replay', 'in real time' if self.pace == 1 else f'at {self.pace:g} of real time'),
            ('node', f'ended with code {self.node_exit_code} after SIGINT'),
        ]

    def markdown(self) -> str:
        """Return the report as a Markdown document."""
        problems = self.problems()
        verdict = 'All frames answered.' if not problems else '\n'.join(f'- **{problem}**' for problem in problems)
        parts = ['# Demo flight', verdict, self.text('github'), '![detections](detections.png)', _PICTURE_REMARK]
        return '\n\n'.join(parts) + '\n'


def expected_alerts(runtimes: Sequence[str], providers: Sequence[str], is_fallback: bool) -> tuple[str, ...]:
    """Return the alerts that must have been raised where these answered (AC-5, Risk-2)."""
    alerts = []
    if is_fallback and 'onnx_trt_ep' in runtimes:
        alerts.append('c7.fallback_to_onnx_trt_ep')
    if 'CPUExecutionProvider' in providers:
        alerts.append('c7.cpu_fallback')
    return tuple(alerts)


def stage_percentiles(answers: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """
    Return p50, p95 and p99 in milliseconds of every stage.

    :param answers: each with nanoseconds by stage as ``ns``, of all stages but the message.
    """
    inside = [stage for stage in STAGES if stage not in ('message', 'total')]
    columns = {stage: np.array([answer['ns'][stage] / 1e6 for answer in answers]) for stage in (*inside, 'total')}
    columns['message'] = columns['total'] - sum(columns[stage] for stage in inside)
    result = {}
    for stage in STAGES:
        p50, p95, p99 = np.percentile(columns[stage], _PERCENTILES)
        result[stage] = (float(p50), float(p95), float(p99))
    return result
