"""The report: what was missed is named, everything in it comes back from its JSON, plots show what was measured."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gps_denied_c7.bench.cases import BARE, CAMERAS, FORTY_LINES, IMAGE_SIZE, OUTPUT_SIZE, SHIPPED, Case, scaling_cases
from gps_denied_c7.bench.figures import STAGES, CaseResult, Result
from gps_denied_c7.bench.plots import draw_plots, latency_plot, ratio_plot, scaling_plot, throughput_plot
from gps_denied_c7.bench.report import BenchReport
from gps_denied_c7.monitoring.metrics import percentiles

CASE = Case(width=1920, height=1080, encoding='rgb8', model_ms=5)


def made(name: str, p50: float, **fields: object) -> Result:
    return Result(
        name=name,
        title=f'the {name}',
        latency=percentiles([p50] * 3),
        p50_by_repetition=(p50,) * 3,
        answered_hz_by_repetition=(29.5,),
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
    assert 'not counted' in forty
    stages = report.stage_table(report.cases[0])
    assert all(stage in stages for stage in STAGES) and '123' in stages and '7.50' in stages


@pytest.fixture
def scaling() -> BenchReport:
    """Every scaling case; what has more cameras or outputs takes longer."""
    cases = []
    for case in scaling_cases():
        p50 = 10.0 * case.cameras + 10.0 * case.dense_maps
        results = {
            BARE: Result(name=BARE, title='the bare engine', latency=percentiles([5.0])),
            FORTY_LINES: made(FORTY_LINES, 2 * p50, lost=2),
            SHIPPED: made(SHIPPED, p50, dropped=3, lost=1),
        }
        cases.append(CaseResult(case, 5.0, 30.0, results))
    return BenchReport(tuple(cases), {}, 1.0, {})


def rows(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table's rows, its heading first."""
    lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()]
    return [lines[0], *lines[2:]]


def test_a_series_has_a_row_for_each_point(scaling):
    heading, *points = rows(scaling.series_table(CAMERAS))
    assert heading[0] == CAMERAS and heading[9:18] == list(STAGES)
    assert [point[0] for point in points] == ['1 camera', '2 cameras', '3 cameras', '4 cameras', '6 cameras']
    stages = [f'{30 / len(STAGES):.2f}'] * len(STAGES)
    assert points[2] == [
        '3 cameras', '5.00', '60.00', '60.00', '30.00', '30.00', '90', '29.5', '29.5', *stages, '3', '1', '2',
    ]  # fmt: skip


def test_a_point_of_two_series_is_in_both_tables(scaling):
    [camera] = [point for point in rows(scaling.series_table(CAMERAS)) if point[0] == '1 camera']
    [output] = [point for point in rows(scaling.series_table(OUTPUT_SIZE)) if point[0] == '1 KB']
    assert camera[1:] == output[1:]


def test_series_come_before_the_cases(scaling, report):
    headings = [line for line in scaling.markdown().splitlines() if line.startswith('##')]
    assert headings[:5] == ['## Limits', '## Growth', '### By image size', '### By cameras', '### By output size']
    assert headings[5:] == ['## Case by case', *(f'### {case.case.title}' for case in scaling.cases)]
    assert all(scaling.series_table(series) in scaling.markdown() for series in (IMAGE_SIZE, CAMERAS, OUTPUT_SIZE))
    assert 'Growth' not in report.markdown()


def test_a_part_of_a_report_has_its_own_plots(scaling):
    """Where the document is told that they lie."""
    plots = {'latency.png': 'how long', 'ratios.png': 'beside others', 'scaling.png': 'how it grows'}
    shown = dataclasses.replace(scaling, pictures=plots)
    text = shown.markdown('##', sections=('series',), folder='plots/')
    titles = [line for line in text.splitlines() if line.startswith('#')]
    assert titles == ['## Benchmark', '### Growth', *(f'#### By {one}' for one in (IMAGE_SIZE, CAMERAS, OUTPUT_SIZE))]
    assert '![how it grows](plots/scaling.png)' in text and text.count('.png') == 1
    assert '![how long](latency.png)' in shown.markdown() and 'ratios' not in shown.markdown(), 'there is no overview'


def test_a_series_shows_what_is_known(scaling):
    """A contestant that answered nothing, or does not compete, leaves its cells empty."""
    case = scaling.cases[-1]
    silent = Result(name=SHIPPED, title='silent', latency=None, sent=90, lost=90, dropped=0)
    only = dataclasses.replace(case, results={SHIPPED: silent})
    _, point = rows(BenchReport((only,), {}, 1.0, {}).series_table(OUTPUT_SIZE))
    assert point == ['12 MB', '', '–', '–', '–', '–', '30', '', '0.0', *[''] * len(STAGES), '0', '90', '']
    assert scaling_plot((only,)) is not None


@pytest.fixture
def matrix() -> BenchReport:
    """Ten cases, in three of which the node takes longer; and three more, in which there is nothing to compare."""
    cases = []
    for number in range(10):
        case = dataclasses.replace(CASE, rate_hz=(10.0, 30.0, 60.0, 0.0)[number % 4], cameras=1 + number % 2)
        node = made(SHIPPED, 30.0 if number < 3 else 5.0, dropped=number, lost=1)
        cases.append(CaseResult(case, 5.0, 30.0, {FORTY_LINES: made(FORTY_LINES, 20.0, lost=2), SHIPPED: node}))
    silent = Result(name=FORTY_LINES, title='silent', latency=None, sent=90, lost=90)
    of_series = dataclasses.replace(cases[0], case=dataclasses.replace(CASE, series=(CAMERAS,)))
    alone = dataclasses.replace(cases[0], results={SHIPPED: cases[0].results[SHIPPED]})
    unanswered = dataclasses.replace(cases[0], results={**cases[0].results, FORTY_LINES: silent})
    return BenchReport((*cases, of_series, alone, unanswered), {}, 1.0, {})


def test_many_cases_have_an_overview(matrix, report):
    heading, *cases = rows(matrix.overview_table())
    assert heading[:5] == [IMAGE_SIZE, 'model', OUTPUT_SIZE, 'rate', CAMERAS]
    assert len(cases) == 10
    words = ['1920x1080 rgb8', '5 ms model', 'small outputs', '10 Hz', '1 camera']
    figures = ['20.00', '20.00', '30.00', '30.00', '**1.50**', '**1.50**', '29.5', '29.5', '0', '1', '2']
    assert cases[0] == [*words, *figures]
    assert cases[3][3:] == ['saturation', '2 cameras', '20.00', '20.00', '5.00', '5.00', '0.25', '0.25',
                            '29.5', '29.5', '3', '1', '2']  # fmt: skip
    text = matrix.markdown()
    assert matrix.overview_table() in text and 'in 7 of 10 cases by p50, in 7 by p99' in text
    assert 'Overview' not in report.markdown()
    few = BenchReport(matrix.cases[1:], {}, 1.0, {})
    assert 'Overview' not in few.markdown(), 'nine cases can be read one by one'


def test_the_plot_of_ratios_shows_who_is_faster(matrix, report):
    """A dot left of the line at 1 for a node that is faster, in the colour of its rate; slower ones right of it."""
    pytest.importorskip('cv2')

    def where(picture, colour):
        return (picture[68:] == colour).all(axis=2).nonzero()[1]

    (line,) = {int(column) for column in where(ratio_plot(matrix.cases), (44, 40, 38)) if column > 500}
    ten, thirty = (180, 119, 31), (199, 199, 199)
    slower, faster = matrix.cases[0], matrix.cases[5]
    assert slower.case.rate_hz == 10.0 and faster.case.rate_hz == 30.0
    picture = ratio_plot((slower, faster))
    assert where(picture, ten).min() > line > where(picture, thirty).max()
    assert ratio_plot(report.cases).shape[0] > picture.shape[0], 'another network has a row of its own'
    assert ratio_plot(matrix.cases[10:]) is None and ratio_plot(report.cases[:1]) is None


def test_ratios_beyond_the_axis_are_drawn_at_its_ends(matrix):
    pytest.importorskip('cv2')
    first, second = matrix.cases[:2]
    for p50 in (1e-3, 1e5):
        extreme = dataclasses.replace(first, results={**first.results, SHIPPED: made(SHIPPED, p50)})
        dots = (ratio_plot((extreme, second))[68:] == (180, 119, 31)).all(axis=2).nonzero()[1]
        assert dots.min() > 350 and dots.max() < 1280


def test_a_report_survives_json(report, scaling):
    assert BenchReport.from_json(json.loads(json.dumps(scaling.to_json()))).cases == scaling.cases
    assert BenchReport.from_json(json.loads(json.dumps(report.to_json()))).cases == report.cases
    with pytest.raises(ValueError, match='schema 2'):
        BenchReport.from_json({**report.to_json(), 'schema_version': 2})


def test_plots_have_a_bar_for_each(report, tmp_path):
    cv2 = pytest.importorskip('cv2')
    written = draw_plots(tmp_path, report.cases)
    assert set(written) == {'latency.png', 'throughput.png'}, 'two cases have no overview'
    for name in written:
        picture = cv2.imread(str(tmp_path / name))
        assert picture.shape[1] > 1000 and picture.std() > 10
    fewer = latency_plot(report.cases[:1])
    assert fewer.shape[0] < latency_plot(report.cases).shape[0]


def test_many_cases_have_their_picture(matrix, tmp_path):
    pytest.importorskip('cv2')
    assert 'ratios.png' in draw_plots(tmp_path, matrix.cases)
    assert '](ratios.png)' in dataclasses.replace(matrix, pictures={'ratios.png': 'beside others'}).markdown()


def test_the_plot_of_series_grows_with_their_points(scaling, tmp_path):
    cv2 = pytest.importorskip('cv2')
    assert 'scaling.png' in draw_plots(tmp_path, scaling.cases)
    whole = cv2.imread(str(tmp_path / 'scaling.png'))
    assert whole.std() > 10
    heights = [scaling_plot(scaling.cases[:count]).shape[0] for count in range(1, len(scaling.cases) + 1)]
    assert heights == sorted(set(heights)) and heights[-1] == whole.shape[0]
    shared = [case for case in scaling.cases if len(case.case.series) == 2]
    alone = [dataclasses.replace(case, case=dataclasses.replace(case.case, series=(CAMERAS,))) for case in shared]
    assert scaling_plot(shared).shape[0] > scaling_plot(alone).shape[0]


def test_bars_of_a_series_have_one_scale(scaling):
    """The engine of six cameras is drawn twice as long as that of three."""
    pytest.importorskip('cv2')
    cameras = [case for case in scaling.cases if case.case.cameras in (3, 6)]
    picture = scaling_plot(cameras)[40:]
    lengths = (picture == (40, 39, 214)).all(axis=2).sum(axis=1)
    lengths = list(dict.fromkeys(int(length) for length in lengths if length))
    assert len(lengths) == 3, 'forty lines and node of each; one takes as long as the other with half the cameras'
    assert lengths == pytest.approx([lengths[0], lengths[0] / 2, 2 * lengths[0]], abs=2)
    assert max(lengths) * len(STAGES) > 500, 'the longest takes the room there is'


def test_nothing_to_show_gives_no_plot(report):
    assert throughput_plot(report.cases[:1]) is None
    assert latency_plot(()) is None
    assert scaling_plot(report.cases) is None
