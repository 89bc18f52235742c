"""What a run found, as JSON and as Markdown tables with the limits beside the figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gps_denied_c7.bench.cases import BARE, FORTY_LINES, SHIPPED
from gps_denied_c7.bench.figures import (
    STAGES,
    CaseResult,
    Result,
    compared,
    has_overview,
    ratio_p50,
    ratio_p99,
    series_of,
    verdicts,
)

__all__ = ['SECTIONS', 'BenchReport']

SECTIONS: Mapping[str, tuple[str, ...]] = {
    'limits': (),
    'overview': ('ratios.png',),
    'series': ('scaling.png',),
    'cases': ('latency.png', 'throughput.png'),
}
"""The parts of a report, and the plots that each shows."""

_SCHEMA_VERSION = 4

_HOW = (
    'A ratio or difference of p50, or of answers per second, is the median over the repetitions, of each with the one '
    'that was measured beside it; one of p99 is of all repetitions together. They need not be those of the medians '
    'below.'
)


@dataclass(frozen=True, slots=True)
class BenchReport:
    """
    Hold a whole run.

    :param facts: about machine, versions and settings, for the reader.
    :param pictures: file names of the plots with what each shows.
    """

    cases: tuple[CaseResult, ...]
    facts: Mapping[str, str]
    seconds: float
    pictures: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return {
            'schema_version': _SCHEMA_VERSION,
            'facts': dict(self.facts),
            'seconds': round(self.seconds, 1),
            'limits': [asdict(verdict) for verdict in verdicts(self.cases)],
            'cases': [case.to_json() for case in self.cases],
            'pictures': dict(self.pictures),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BenchReport:
        """
        Read what :meth:`to_json` wrote.

        :raises ValueError: another version wrote it.
        """
        if values.get('schema_version') != _SCHEMA_VERSION:
            raise ValueError(f'a report of schema {values.get("schema_version")}, not {_SCHEMA_VERSION}: run it again.')
        cases = tuple(CaseResult.from_json(case) for case in values['cases'])
        return cls(cases, values['facts'], values['seconds'], values.get('pictures', {}))

    def limits_table(self, style: str = 'github') -> str:
        """Return each limit with what was measured; what was missed is set in bold."""
        def mark(text: str, met: bool) -> str:
            return text if met or style != 'github' else f'**{text}**'

        rows = [
            [one.what, one.where, one.limit, mark(one.measured, one.met), mark('met' if one.met else 'missed', one.met)]
            for one in verdicts(self.cases)
        ]
        return _table(['limit on', 'case', 'limit', 'measured', ''], rows, style)

    def case_table(self, case: CaseResult) -> str:
        """Return latency, throughput and frames of each contestant in one case."""
        reference = case.results.get(FORTY_LINES)
        rows = []
        for result in case.results.values():
            ratios = ['', '']
            if reference is not None and result.sent and result is not reference:
                ratios = [_number(ratio_p50(result, reference)), _number(ratio_p99(result, reference))]
            frames = _frames(result) if result.sent else ['', '', '', '']
            latency = _latency(result, 'p50', 'p95', 'p99')
            rows.append([result.title, *latency, *ratios, f'{result.answered_hz:.1f}', *frames])
        headers = [
            '', 'p50 ms', 'p95', 'p99', 'p50 / forty', 'p99 / forty', 'answers/s', 'sent', 'answered',
            'dropped by policy', 'lost',
        ]  # fmt: skip
        return _table(headers, rows)

    def stage_table(self, case: CaseResult) -> str:
        """Return where the time of one case goes, p50 in milliseconds, with processor time and memory."""
        rows = []
        for result in case.results.values():
            if result.stages:
                stages = [f'{result.stages[stage].p50:.2f}' for stage in STAGES]
                own = _number(result.cpu_ms_per_answer.get('contestant'))
                rows.append([result.title, *stages, own, _number(result.memory_mb, 0), _number(result.idle_percent, 1)])
        headers = ['p50, ms', *STAGES, 'CPU ms / answer', 'memory MB', 'idle, % of a core']
        return _table(headers, rows)

    def overview_table(self) -> str:
        """Return the forty lines beside this node, a row for each case in which both answered."""
        cases = compared(self.cases)
        axes = list(dict.fromkeys(axis for case in cases for axis in case.case.words))
        rows = []
        for case in cases:
            forty, node = case.results[FORTY_LINES], case.results[SHIPPED]
            rows.append(
                [
                    *(case.case.words.get(axis, '') for axis in axes),
                    *(text for one in (forty, node) for text in _latency(one, 'p50', 'p99')),
                    *(_ratio(ratio) for ratio in (ratio_p50(node, forty), ratio_p99(node, forty))),
                    *(f'{one.answered_hz:.1f}' for one in (forty, node)),
                    *[node.dropped, node.lost, forty.lost],
                ]
            )
        headers = [
            *axes, 'forty p50', 'forty p99', 'node p50', 'node p99', 'p50 / forty', 'p99 / forty', 'forty/s', 'node/s',
            'dropped', 'lost', 'forty lost',
        ]  # fmt: skip
        return _table(headers, rows)

    def series_table(self, series: str) -> str:
        """Return how the figures of the forty lines and of this node grow along one series, a row for each point."""
        rows = []
        for case in series_of(self.cases)[series]:
            bare, forty, node = (case.results.get(name) for name in (BARE, FORTY_LINES, SHIPPED))
            stages = [node.stages.get(stage) if node else None for stage in STAGES]
            rows.append(
                [
                    case.case.point(series),
                    _number(bare.latency.p50 if bare and bare.latency else None),
                    *(text for one in (forty, node) for text in _latency(one, 'p50', 'p99')),
                    f'{case.total_hz:g}',
                    *(_number(one.answered_hz if one else None, 1) for one in (forty, node)),
                    *(_number(stage.p50 if stage else None) for stage in stages),
                    *([node.dropped, node.lost] if node else ['', '']),
                    forty.lost if forty else '',
                ]
            )
        headers = [
            series, 'engine p50', 'forty p50', 'forty p99', 'node p50', 'node p99', 'sent/s', 'forty/s', 'node/s',
            *STAGES, 'dropped', 'lost', 'forty lost',
        ]  # fmt: skip
        return _table(headers, rows)

    def markdown(self, heading: str = '#', *, sections: Collection[str] = SECTIONS, folder: str = '') -> str:
        """
        Return the report as a Markdown document, or a part of one.

        :param heading: of the whole, one sign for each level.
        :param sections: which of :data:`SECTIONS` it has; facts about the run precede them.
        :param folder: where the plots lie from where the document does, ending in a slash; '' for beside it.
        """
        parts = [f'{heading} Benchmark', '\n'.join(f'- {name}: {value}' for name, value in self.facts.items())]
        if 'limits' in sections:
            missed = [one for one in verdicts(self.cases) if not one.met]
            verdict = 'Every limit was met.' if not missed else f'{len(missed)} of {len(verdicts(self.cases))} missed.'
            parts += [f'{heading}# Limits', verdict, self.limits_table(), _HOW]
        if 'overview' in sections and has_overview(self.cases):
            parts += [f'{heading}# Overview', _overview(compared(self.cases)), *self._plots('overview', folder)]
            parts.append(self.overview_table())
        if 'series' in sections and (every := series_of(self.cases)):
            parts += [f'{heading}# Growth', *self._plots('series', folder)]
            for series, points in every.items():
                constants = points[0].case.constants(series)
                remark = f'{constants}. Times in ms; stages (p50), dropped by policy and lost are those of this node.'
                parts += [f'{heading}## By {series}', remark, self.series_table(series)]
        if 'cases' in sections:
            parts += [f'{heading}# Case by case', *self._plots('cases', folder)]
            for case in self.cases:
                parts += [f'{heading}## {case.case.title}', self._remark(case), self.case_table(case)]
                if any(result.stages for result in case.results.values()):
                    parts.append(self.stage_table(case))
        return '\n\n'.join(filter(None, parts)) + '\n'

    def _plots(self, section: str, folder: str) -> list[str]:
        return [f'![{self.pictures[name]}]({folder}{name})' for name in SECTIONS[section] if name in self.pictures]

    @staticmethod
    def _remark(case: CaseResult) -> str:
        text = f'{case.sent_hz:g} images a second and camera; the engine alone took {case.engine_ms:.2f} ms'
        return f'{text} when the network was made.'


def _table(headers: Sequence[str], rows: Sequence[Sequence[object]], style: str = 'github') -> str:
    from tabulate import tabulate

    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)


def _overview(cases: Sequence[CaseResult]) -> str:
    """Return in a sentence how often the node takes no longer than the forty lines."""
    pairs = [(case.results[SHIPPED], case.results[FORTY_LINES]) for case in cases]
    found = [[ratio(*pair) for pair in pairs] for ratio in (ratio_p50, ratio_p99)]
    no_longer = [sum(one is not None and one <= 1.0 for one in ratios) for ratios in found]
    return (
        f'This node takes no longer than the forty lines in {no_longer[0]} of {len(cases)} cases by p50, in '
        f'{no_longer[1]} by p99. Times in ms; dropped by policy and lost are those of this node, and of the forty '
        'lines what their queue pushed out as well.'
    )


def _ratio(value: float | None) -> str:
    """Return a ratio of two times; one above 1 is set in bold."""
    text = _number(value)
    return f'**{text}**' if value is not None and value > 1.0 else text


def _number(value: float | None, digits: int = 2) -> str:
    return '' if value is None else f'{value:.{digits}f}'


def _latency(result: Result | None, *names: str) -> Sequence[str]:
    """Return percentiles of the latency by name."""
    if result is None or result.latency is None:
        return ['–'] * len(names)
    return [f'{getattr(result.latency, name):.2f}' for name in names]


def _frames(result: Result) -> Sequence[object]:
    dropped = 'not counted' if result.dropped is None else result.dropped
    return [result.sent, result.answered, dropped, result.lost]
