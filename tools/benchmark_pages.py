"""
Put the benchmark's last runs into docs/: tables between marks in the pages, plots beside them.

    python3 tools/environment.py run python3 tools/benchmark_pages.py --last bench_output --matrix full

What is written by hand around the marks stays as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gps_denied_c7.bench.report import SECTIONS, BenchReport

__all__ = ['PARTS', 'Part', 'main', 'put']

DOCS = Path(__file__).resolve().parents[1] / 'docs'


@dataclass(frozen=True, slots=True)
class Part:
    """
    Say which part of a report goes where.

    :param page: in docs/, with the marks ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.
    :param sections: of the report.
    :param heading: of what these sections are part of.
    """

    page: str
    sections: tuple[str, ...]
    heading: str = '##'

    @property
    def plots(self) -> tuple[str, ...]:
        """The plots that these sections show; they go into a folder of the part's name."""
        return tuple(plot for section in self.sections for plot in SECTIONS[section])


PARTS: Mapping[str, Part] = {
    'last': Part('benchmarks.md', ('limits', 'cases')),
    'awake': Part('benchmarks.md', ('limits',), heading='###'),
    'many': Part('benchmarks.md', ('limits',), heading='###'),
    'growth': Part('benchmarks.md', ('series',)),
    'matrix': Part('benchmark-matrix.md', ('overview',), heading='#'),
    'again': Part('benchmark-matrix.md', ('overview',)),
}


def put(docs: Path, name: str, run: Path) -> None:
    """
    Put the report of ``run`` into its page, and its plots into a folder beside.

    :raises ValueError: the page lacks its marks, the run lacks a plot, or another version wrote its report.
    :raises OSError: a file cannot be read or written.
    """
    part = PARTS[name]
    report = BenchReport.from_json(json.loads((run / 'report.json').read_text(encoding='utf-8')))
    if missing := [plot for plot in part.plots if plot not in report.pictures]:
        raise ValueError(f'{run} has no {", ".join(missing)}: run the benchmark as the page says.')
    page = docs / part.page
    before, begin, rest = page.read_text(encoding='utf-8').partition(f'<!-- {name}: begin -->\n')
    _, end, after = rest.partition(f'<!-- {name}: end -->\n')
    if not end:
        raise ValueError(f'{page} has no marks for {name!r}.')
    # The page has a heading of its own.
    _, _, text = report.markdown(part.heading, sections=part.sections, folder=f'benchmarks/{name}/').partition('\n\n')
    folder = docs / 'benchmarks' / name
    folder.mkdir(parents=True, exist_ok=True)
    for plot in part.plots:
        shutil.copyfile(run / plot, folder / plot)
    page.write_text(f'{before}{begin}\n{text}\n{end}{after}', encoding='utf-8')


def main(arguments: list[str] | None = None, docs: Path = DOCS) -> int:
    """Put each run that is named into its page."""
    parser = argparse.ArgumentParser(prog='benchmark_pages', description=(__doc__ or '').split('\n\n')[0])
    for name, part in PARTS.items():
        parser.add_argument(
            f'--{name}', type=Path, metavar='DIRECTORY', help=f'--output of a run; its tables go into {part.page}'
        )
    for name, run in vars(parser.parse_args(arguments)).items():
        if run is not None:
            try:
                put(docs, name, run)
            except (OSError, ValueError) as error:
                print(f'benchmark_pages: {error}', file=sys.stderr)
                return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
