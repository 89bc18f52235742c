"""Bars of where the time goes and of how the contestants compare, drawn with OpenCV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.bench.cases import BARE, CAMERAS, FORTY_LINES, RATE, SHIPPED
from gps_denied_c7.bench.figures import (
    STAGES,
    CaseResult,
    Result,
    compared,
    has_overview,
    ratio_p50,
    ratio_p99,
    series_of,
)

__all__ = ['draw_plots', 'latency_plot', 'ratio_plot', 'scaling_plot', 'throughput_plot']

_PAPER, _INK, _FAINT = (255, 255, 255), (44, 40, 38), (150, 146, 144)
# One colour for each stage, blue, green, red.
_COLOURS = (
    (180, 119, 31), (199, 199, 199), (44, 160, 44), (75, 190, 220), (180, 119, 227), (40, 39, 214), (194, 182, 247),
    (189, 103, 148), (14, 127, 255),
)  # fmt: skip
_WIDTH, _LABELS, _ROW, _TITLE = 1280, 400, 24, 34
_RIGHT = 150
_GAP = 12
# In a picture of series: where names and bars begin, and the columns of figures behind the bars.
_NAMES, _BARS = 130, 320
# The ends of the axis of ratios, which is logarithmic, and its lines.
_LEAST_RATIO, _MOST_RATIO, _RATIO_LINES = 0.05, 4.0, (0.1, 0.2, 0.5, 1.0, 2.0)
_DOT = 4
_COLUMNS = ((860, 'p50 / p99, ms'), (985, 'answered / sent, Hz'), (1150, 'lost or dropped'))


def draw_plots(directory: Path, cases: Sequence[CaseResult]) -> dict[str, str]:
    """Write the plots that these cases give, and return file name to caption."""
    import cv2

    drawn = {
        'latency.png': ('Camera-to-tensors latency by stage, p50; the line ends at p99', latency_plot(cases)),
        'scaling.png': (
            'Latency by stage, p50, with answers per second; each series has one scale, the line ends at p99',
            scaling_plot(cases),
        ),
        'ratios.png': (
            'Latency of this node against that of the forty lines, a dot (p50) and a ring (p99) for each case',
            ratio_plot(cases) if has_overview(cases) else None,
        ),
        'throughput.png': ('Answers per second at saturation', throughput_plot(cases)),
    }
    written = {}
    for name, (caption, picture) in drawn.items():
        if picture is not None:
            cv2.imwrite(str(directory / name), picture)
            written[name] = caption
    return written


def latency_plot(cases: Sequence[CaseResult]) -> NDArray | None:
    """Return stacked bars, one group for each case and one bar for each contestant; None without any answer."""
    groups = [
        (case, [result for result in case.results.values() if result.latency and result.stages]) for case in cases
    ]
    groups = [(case, results) for case, results in groups if results]
    if not groups:
        return None
    height = _TITLE + sum(_TITLE + _ROW * len(results) + 12 for _, results in groups) + 12
    picture = np.full((height, _WIDTH, 3), _PAPER, np.uint8)
    _legend(picture)
    top = _TITLE
    room = _WIDTH - _LABELS - _RIGHT
    for case, results in groups:
        _write(picture, case.case.title, (12, top + 22), bold=True)
        top += _TITLE
        longest = max(result.latency.p99 for result in results if result.latency)
        for result in results:
            assert result.latency is not None
            _write(picture, result.title, (24, top + 15))
            end = _stacked(picture, result, (_LABELS, top), room / longest)
            _write(picture, f'{result.latency.p50:.1f} / {result.latency.p99:.1f} ms', (end + 8, top + 15))
            top += _ROW
        top += 12
    return picture


def throughput_plot(cases: Sequence[CaseResult]) -> NDArray | None:
    """Return bars of answers per second for the saturated cases, None where there are none."""
    groups = [case for case in cases if case.case.is_saturated and case.results]
    if not groups:
        return None
    height = sum(_TITLE + _ROW * len(case.results) + 12 for case in groups) + 12
    picture = np.full((height, _WIDTH, 3), _PAPER, np.uint8)
    top = 0
    for case in groups:
        _write(picture, case.case.title, (12, top + 22), bold=True)
        top += _TITLE
        most = max(result.answered_hz for result in case.results.values()) or 1.0
        for result in case.results.values():
            end = _LABELS + round(result.answered_hz / most * (_WIDTH - _LABELS - _RIGHT))
            _write(picture, result.title, (24, top + 15))
            colour = _FAINT if result.name == BARE else _COLOURS[0]
            _rectangle(picture, (_LABELS, top + 3), (end, top + _ROW - 5), colour)
            _write(picture, f'{result.answered_hz:.1f} / s', (end + 8, top + 15))
            top += _ROW
        top += 12
    return picture


def ratio_plot(cases: Sequence[CaseResult]) -> NDArray | None:
    """
    Return dots for latencies against the forty lines', a row for each network and image, a colour for each rate.

    A dot is the ratio of p50, a ring that of p99; left of the line at 1 this node is the faster. None for fewer than
    two cases to compare.
    """
    import cv2

    comparable = compared(cases)
    if len(comparable) < 2:
        return None
    rates = list(dict.fromkeys(case.case.words[RATE] for case in comparable))
    rows: dict[str, list[CaseResult]] = {}
    for case in comparable:
        others = [word for axis, word in case.case.words.items() if axis not in (RATE, CAMERAS)]
        rows.setdefault(', '.join(others), []).append(case)
    bottom = 2 * _TITLE + _ROW * len(rows)
    picture = np.full((bottom + _GAP, _WIDTH, 3), _PAPER, np.uint8)
    left = 12
    for rate, colour in zip(rates, _COLOURS, strict=False):
        cv2.circle(picture, (left + 6, 17), _DOT, colour, cv2.FILLED, cv2.LINE_AA)
        left = _write(picture, rate, (left + 18, 22)) + 18
    _write(picture, 'dot: p50, ring: p99, of this node / of the forty lines', (left + 18, 22), colour=_FAINT)
    for ratio in _RATIO_LINES:
        at = _ratio_at(ratio)
        cv2.line(picture, (at, 2 * _TITLE - 6), (at, bottom), _INK if ratio == 1.0 else _FAINT, 1)
        _write(picture, f'{ratio:g}', (at - 8, 2 * _TITLE - 12), colour=_FAINT)
    for number, (row, of_row) in enumerate(rows.items()):
        middle = 2 * _TITLE + _ROW * number + _ROW // 2
        _write(picture, row, (24, middle + 4))
        for case in of_row:
            colour = _COLOURS[rates.index(case.case.words[RATE]) % len(_COLOURS)]
            pair = case.results[SHIPPED], case.results[FORTY_LINES]
            for found, thickness in ((ratio_p50(*pair), cv2.FILLED), (ratio_p99(*pair), 1)):
                if found is not None:
                    cv2.circle(picture, (_ratio_at(found), middle), _DOT, colour, thickness, cv2.LINE_AA)
    return picture


def _ratio_at(ratio: float) -> int:
    """Return where on the axis of ratios one lies, pixels from the left; those beyond an end lie at the end."""
    inside = min(max(ratio, _LEAST_RATIO), _MOST_RATIO)
    share = np.log(inside / _LEAST_RATIO) / np.log(_MOST_RATIO / _LEAST_RATIO)
    return _LABELS + round((_WIDTH - _LABELS - 2 * _GAP) * float(share))


def scaling_plot(cases: Sequence[CaseResult]) -> NDArray | None:
    """
    Return stacked bars, one group for each series; None where no case is a point of any.

    All bars of a series have one scale, so that they show how its figures grow from point to point. A contestant
    without any answer has no bar, and its figures say so.
    """
    groups = series_of(cases)
    if not groups:
        return None
    rows = [(series, [(point, _compared(point)) for point in points]) for series, points in groups.items()]
    heights = [_TITLE + sum(_ROW * len(results) + _GAP for _, results in points) for _, points in rows]
    picture = np.full((_TITLE + sum(heights) + _GAP * len(rows), _WIDTH, 3), _PAPER, np.uint8)
    _legend(picture)
    top = _TITLE
    for series, points in rows:
        _write(picture, f'{series}: {points[0][0].case.constants(series)}', (12, top + 22), bold=True)
        for left, text in _COLUMNS:
            _write(picture, text, (left, top + 22), colour=_FAINT)
        top += _TITLE
        p99s = [result.latency.p99 for _, results in points for result in results if result.latency]
        scale = (_COLUMNS[0][0] - _BARS - _GAP) / max(p99s, default=1.0)
        for point, results in points:
            _write(picture, point.case.point(series), (24, top + 15))
            for result in results:
                _write(picture, result.title, (_NAMES, top + 15))
                if result.latency and result.stages:
                    _stacked(picture, result, (_BARS, top), scale)
                for (left, _), text in zip(_COLUMNS, _figures(point, result), strict=True):
                    _write(picture, text, (left, top + 15))
                top += _ROW
            top += _GAP
        top += _GAP
    return picture


def _compared(case: CaseResult) -> list[Result]:
    return [case.results[name] for name in (FORTY_LINES, SHIPPED) if name in case.results]


def _figures(case: CaseResult, result: Result) -> tuple[str, str, str]:
    """Return what the columns of a picture of series say."""
    latency = f'{result.latency.p50:.1f} / {result.latency.p99:.1f}' if result.latency else 'no answer'
    return latency, f'{result.answered_hz:.1f} / {case.total_hz:g}', f'{result.missing_percent:.1f} %'


def _legend(picture: NDArray) -> None:
    left = 12
    for stage, colour in zip(STAGES, _COLOURS, strict=True):
        _rectangle(picture, (left, 10), (left + 14, 24), colour)
        left = _write(picture, stage, (left + 20, 22)) + 18


def _stacked(picture: NDArray, result: Result, at: tuple[int, int], scale: float) -> int:
    """
    Draw the stages of a result behind one another, p50, with a line to its p99, and return where that ends.

    :param at: left end of the bar and top of its row.
    :param scale: pixels for each millisecond.
    """
    assert result.latency is not None
    left, top = at
    x = float(left)
    for stage, colour in zip(STAGES, _COLOURS, strict=True):
        wide = max(0.0, result.stages[stage].p50) * scale
        _rectangle(picture, (round(x), top + 3), (round(x + wide), top + _ROW - 5), colour)
        x += wide
    end = left + round(result.latency.p99 * scale)
    _rectangle(picture, (round(x), top + _ROW // 2 - 1), (end, top + _ROW // 2), _INK)
    return end


def _rectangle(picture: NDArray, start: tuple[int, int], end: tuple[int, int], colour: tuple[int, int, int]) -> None:
    import cv2

    if end[0] > start[0]:
        cv2.rectangle(picture, start, end, colour, cv2.FILLED)


def _write(
    picture: NDArray,
    text: str,
    at: tuple[int, int],
    *,
    bold: bool = False,
    colour: tuple[int, int, int] = _INK,
) -> int:
    """Write a line of text and return where it ends."""
    import cv2

    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.46
    cv2.putText(picture, text, at, font, size, colour, 2 if bold else 1, cv2.LINE_AA)
    return int(at[0] + cv2.getTextSize(text, font, size, 1)[0][0])
