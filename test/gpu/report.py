"""Turn the GPU suite's results into docs/gpu-results.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ['read_results', 'render', 'write_report']

REPORT = Path(__file__).parents[2] / 'docs' / 'gpu-results.md'

_HEAD = """# Results on a GPU

Written by the GPU suite (`test/gpu/`) from its own run; do not edit. To repeat it on a machine with an NVIDIA GPU:

```sh
C7_GPU_RESULTS=results.jsonl python3 -m pytest -m gpu test/gpu -rs    # once in each environment that is to be tested
python3 test/gpu/report.py results.jsonl                             # writes this file from all of them
```

An environment is a Python with one vendor stack: what each run had is said above its table. Tests of a stack that an
environment lacks are skipped with the reason. Latencies are of one process on one machine; compare within a table.
"""


def read_results(lines: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Return results by environment, in the order of their first appearance; a later run replaces an earlier one."""
    environments: dict[str, dict[str, dict[str, Any]]] = {}
    for line in filter(str.strip, lines):
        result = json.loads(line)
        versions = ', '.join(f'{name} {version}' for name, version in sorted(result['versions'].items()))
        environments.setdefault(f'{result["gpu"]}; {versions}', {})[result['name']] = result
    return {name: list(results.values()) for name, results in environments.items()}


def render(environments: dict[str, list[dict[str, Any]]]) -> str:
    """Return the report as Markdown."""
    parts = [_HEAD]
    for name, results in environments.items():
        gpu, _, versions = name.partition('; ')
        parts.append(f'## {gpu}\n\n{versions}; {results[0]["platform"]}\n\n| what | measured |\n|---|---|')
        parts[-1] += ''.join(f'\n| {result["name"]} | {_figures(result["figures"])} |' for result in results)
        parts[-1] += '\n'
    return '\n'.join(parts)


def write_report(lines: Iterable[str], path: Path = REPORT) -> None:
    """Write the report of all results."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(render(read_results(lines)), encoding='utf-8')


def _figures(figures: dict[str, Any]) -> str:
    return '; '.join(f'{_words(name)} {_value(value)}' for name, value in figures.items())


def _words(name: str) -> str:
    for unit in ('ms', 's', 'percent', 'mib'):
        if name.endswith(f'_{unit}'):
            return f'{name.removesuffix(f"_{unit}").replace("_", " ")} ({unit})'
    return name.replace('_', ' ')


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f'{value:.4g}'
    if isinstance(value, dict):
        return ', '.join(f'{name} {_value(inner)}' for name, inner in value.items())
    if isinstance(value, list):
        return ', '.join(map(_value, value))
    return str(value).replace('|', '\\|').replace('\n', ' ')


if __name__ == '__main__':
    write_report([line for file in sys.argv[1:] for line in Path(file).read_text(encoding='utf-8').splitlines()])
