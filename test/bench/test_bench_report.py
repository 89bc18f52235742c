"""The report: what was missed is named, everything in it comes back from its JSON, plots show what was measured."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gps_denied_c7.bench.cases import BARE, FORTY_LINES, SHIPPED, Case
from gps_denied_c7.bench.figures import STAGES, CaseResult, Result, percentiles
from gps_denied_c7.bench.plots import draw_plots, latency_plot, throughput_plot
from gps_denied_c7.bench.report import BenchReport

CASE = Case(width=1920, height=1080, encoding='rgb8', model_ms=5)


def made(name: str, p50: float, **fields: object) -> Result:
    return Result(
        name=name,
        title=f'the {name}',
        latency=percentiles([p50] * 3),
        p50_by_repetition=(p50,) * 3,
        answered_hz=29.5,
        stages={stage: percentiles([p50 / len(STAGES)]) for stage in STAGES},
        outside=percentiles([1.0]),
        sent=100,
        answered=98,
        cpu_ms_per_answer={'contestant': 7.5},
        **fields,
    )


@pytest.fixture
def report() -> BenchReport:
    results = {
        BARE: Result(name=BARE, title='the bare engine', latency=percentiles([5.0]), p50_by_repetition=(5.0,) * 3),
        FORTY_LINES: made(FORTY_LINES, 20.0, lost=2),
        SHIPPED: made(SHIPPED, 12.0, dropped=2, memory_mb=123.4),
    }
    missed = {FORTY_LINES: made(FORTY_LINES, 20.0, lost=2), SHIPPED: made(SHIPPED, 25.0, dropped=1, lost=1)}
    saturated = dataclasses.replace(CASE, model_ms=30, rate_hz=0)
    cases = (CaseResult(CASE, 5.1, 30.0, results), CaseResult(saturated, 30.0, 54.0, missed))
    return BenchReport(cases, {'machine': '2 cores'}, 12.34, {})


def test_what_was_missed_stands_out(report):
    lines = report.markdown().splitlines()
    [met] = [line for line in lines if 'latency p50 / forty lines' in line and '30 Hz' in line]
    [missed] = [line for line in lines if 'latency p50 / forty lines' in line and 'saturation' in line]
    assert '0.60 x' in met and 'missed' not in met
    assert '**1.25 x**' in missed and '**missed**' in missed
    assert '2 of 6 missed.' in lines


def test_tables_hold_frames_ratios_and_stages(report):
    table = report.case_table(report.cases[0])
    [node] = [line for line in table.splitlines() if 'the node' in line]
    cells = [cell.strip() for cell in node.split('|')[1:-1]]
    assert cells == ['the node', '12.00', '12.00', '12.00', '0.60', '0.60', '29.5', '100', '98', '2', '0']
    [forty] = [line for line in table.splitlines() if 'the forty_lines' in line]
    assert 'cannot tell' in forty
    stages = report.stage_table(report.cases[0])
    assert all(stage in stages for stage in STAGES) and '123' in stages and '7.50' in stages


def test_a_report_survives_json(report):
    assert BenchReport.from_json(json.loads(json.dumps(report.to_json()))).cases == report.cases


def test_plots_have_a_bar_for_each(report, tmp_path):
    cv2 = pytest.importorskip('cv2')
    written = draw_plots(tmp_path, report.cases)
    assert set(written) == {'latency.png', 'throughput.png'}
    for name in written:
        picture = cv2.imread(str(tmp_path / name))
        assert picture.shape[1] > 1000 and picture.std() > 10
    fewer = latency_plot(report.cases[:1])
    assert fewer.shape[0] < latency_plot(report.cases).shape[0]


def test_nothing_to_show_gives_no_plot(report):
    assert throughput_plot(report.cases[:1]) is None
    assert latency_plot(()) is None
