"""The benchmark's pages: a run replaces what the run before has left between the marks, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gps_denied_c7.bench.cases import FORTY_LINES, SHIPPED, Case
from gps_denied_c7.bench.figures import CaseResult, Result
from gps_denied_c7.bench.report import BenchReport
from gps_denied_c7.monitoring.metrics import percentiles
from support.source_tree import REPOSITORY


@pytest.fixture(scope='module')
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location('benchmark_pages', REPOSITORY / 'tools' / 'benchmark_pages.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of one case with its plots."""
    results = {
        name: Result(name=name, title=name, latency=percentiles([12.0]), sent=9, answered=9, stages={})
        for name in (FORTY_LINES, SHIPPED)
    }
    case = CaseResult(Case(width=1920, height=1080, encoding='rgb8', model_ms=5), 5.1, 30.0, results)
    plots = {'latency.png': 'how long', 'throughput.png': 'how many'}
    directory = tmp_path / 'run'
    directory.mkdir()
    report = BenchReport((case,), {'machine': '2 cores'}, 12.3, plots)
    (directory / 'report.json').write_text(json.dumps(report.to_json()))
    for name in plots:
        (directory / name).write_bytes(name.encode())
    return directory


@pytest.fixture
def docs(tmp_path) -> Path:
    directory = tmp_path / 'docs'
    directory.mkdir()
    (directory / 'benchmarks.md').write_text(
        '# Page\n\nby hand\n\n<!-- last: begin -->\nold\n<!-- last: end -->\n\nby hand, too\n'
    )
    return directory


def test_a_run_replaces_the_one_before(pages, run, docs):
    for _ in range(2):
        assert pages.main(['--last', str(run)], docs) == 0
    page = (docs / 'benchmarks.md').read_text()
    assert page.startswith('# Page\n\nby hand\n\n<!-- last: begin -->\n\n- machine: 2 cores\n')
    assert page.endswith('\n<!-- last: end -->\n\nby hand, too\n')
    assert 'old' not in page and page.count('### Limits') == 1 and '1920x1080 rgb8' in page
    for name in ('latency.png', 'throughput.png'):
        assert f'](benchmarks/last/{name})' in page
        assert (docs / 'benchmarks' / 'last' / name).read_bytes() == name.encode()


def test_a_page_without_marks_is_left_alone(pages, run, docs, capsys):
    (docs / 'benchmarks.md').write_text('# Page\n')
    assert pages.main(['--last', str(run)], docs) == 1
    assert "no marks for 'last'" in capsys.readouterr().err
    assert (docs / 'benchmarks.md').read_text() == '# Page\n' and not (docs / 'benchmarks').exists()


def test_a_run_without_its_plots_is_refused(pages, run, docs, capsys):
    """As one that measured something else."""
    before = (docs / 'benchmarks.md').read_text()
    assert pages.main(['--growth', str(run)], docs) == 1
    assert 'has no scaling.png' in capsys.readouterr().err
    assert (docs / 'benchmarks.md').read_text() == before


@pytest.mark.parametrize('name', ['last', 'awake', 'many', 'growth', 'matrix', 'again'])
def test_each_part_has_its_place(pages, name):
    """And the plots that the page shows there are the part's own."""
    part = pages.PARTS[name]
    page = (REPOSITORY / 'docs' / part.page).read_text()
    assert page.count(f'<!-- {name}: begin -->\n') == page.count(f'<!-- {name}: end -->\n') == 1
    text = page.partition(f'<!-- {name}: begin -->\n')[2].partition(f'<!-- {name}: end -->\n')[0]
    assert all(f'](benchmarks/{name}/{plot})' in text for plot in part.plots)
    assert all((REPOSITORY / 'docs' / 'benchmarks' / name / plot).exists() for plot in part.plots)
