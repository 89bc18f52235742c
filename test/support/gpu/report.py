"""Turn the GPU suite's results into docs/gpu-results.md and docs/notes/gpu-findings.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from support.source_tree import REPOSITORY

__all__ = ['RESULTS', 'read_results', 'render', 'render_findings', 'write_report']

DOCS = REPOSITORY / 'docs'
RESULTS = DOCS / 'gpu-results.jsonl'

Figures = Mapping[str, Any]

_HEAD = """# Results on a GPU

The GPU suite (`test/gpu/`) writes this page from the results of its runs in [gpu-results.jsonl](gpu-results.jsonl);
do not edit it. To add a run, on a machine with an NVIDIA GPU, once in each environment:

```sh
C7_GPU_RESULTS=docs/gpu-results.jsonl python3 -m pytest -m gpu test/gpu -rs
```

An environment is a GPU and a Python with one vendor stack, named above its tables; the latest run of each result
counts. Tests of a stack that an environment lacks are skipped with the reason. Latencies are of one process on one
machine: compare within an environment. The network is shaped like SuperPoint: 1.3 million weights, 640x480 in, 6 MB
of float32 out. [Findings](notes/gpu-findings.md) lists what else the tests recorded;
[notes](notes/performance.md#tensorrt-builds) explains the time of cold sessions.
"""

_FINDINGS_HEAD = """# Findings on a GPU

The GPU suite writes this page, for maintainers, together with the [results](../gpu-results.md); do not edit it.
"""

_LONGEST = 240


def read_results(lines: Iterable[str]) -> dict[str, dict[str, Figures]]:
    """Return figures by environment and name, in the order of their first appearance; a later run replaces one."""
    environments: dict[str, dict[str, Figures]] = {}
    for line in filter(str.strip, lines):
        result = json.loads(line)
        versions = ', '.join(f'{name} {version}' for name, version in sorted(result['versions'].items()))
        environments.setdefault(f'{result["gpu"]}; {versions}; {result["platform"]}', {})[result['name']] = (
            result['figures']
        )
    return environments


def render(environments: dict[str, dict[str, Figures]]) -> str:
    """Return the results as Markdown."""
    parts = [_HEAD, _summary(environments), _stages(environments)]
    for name, results in _unstaged(environments):
        if rows := [row for result, figures in results.items() for row in _durations(result, figures)]:
            parts += [name, _table(('durations', 'p50', 'p95', 'p99', 'largest', 'n', 'unit'), rows)]
    return _page(parts)


def render_findings(environments: dict[str, dict[str, Figures]]) -> str:
    """Return as Markdown what is neither a duration nor a requirement."""
    parts = [_FINDINGS_HEAD]
    for name, results in _unstaged(environments):
        others = [(result, _line(figures)) for result, figures in results.items()]
        parts += [name, _table(('what', 'found'), [(result, text) for result, text in others if text])]
    return _page(parts)


def write_report(lines: Iterable[str], docs: Path = DOCS) -> None:
    """Write both pages."""
    environments = read_results(lines)
    (docs / 'gpu-results.md').write_text(render(environments), encoding='utf-8')
    (docs / 'notes' / 'gpu-findings.md').write_text(render_findings(environments), encoding='utf-8')


def _unstaged(environments: dict[str, dict[str, Figures]]) -> Iterator[tuple[str, dict[str, Figures]]]:
    """Yield the heading of each environment, and its results that are not stages of one whole."""
    for name, every in environments.items():
        gpu, versions = name.split('; ', 1)
        results = {result: figures for result, figures in every.items() if not result.startswith(_STAGED)}
        yield f'## {gpu}\n\n{versions}', results


def _page(parts: Iterable[str]) -> str:
    return '\n\n'.join(part.strip() for part in parts) + '\n'


def _short(environment: str) -> str:
    """Return the GPU and the Python of an environment, which tell those of one machine apart."""
    gpu, _, rest = environment.partition('; ')
    python = next((part for part in rest.replace(';', ',').split(', ') if part.startswith('python ')), '')
    gpu_runtime = next((part for part in rest.split(', ') if part.startswith('onnxruntime-gpu ')), '')
    return ', '.join(filter(None, (gpu.removeprefix('NVIDIA '), python, gpu_runtime)))


# --- what is required -------------------------------------------------------------------------------------------------


def _largest_share(figures: Figures) -> float | None:
    shares = [value for name, value in figures.items() if name.endswith('percent_of_range')]
    shares += [100 * value for name, value in figures.items() if name.endswith('share_of_range')]
    return max(shares) if shares else None


def _largest_value(figures: Figures) -> float | None:
    return max((100 * value for value in figures.values() if isinstance(value, float)), default=None)


def _ratio(name: str) -> Callable[[Figures], float | None]:
    return lambda figures: figures.get('ratio_of_p50_to_bare_loop', {}).get(name)


def _p95(figures: Figures) -> float | None:
    durations = figures.get('load')
    return durations.get('p95_s') if isinstance(durations, dict) else None


# Requirement, result that shows it (any that starts so, where it ends in a colon), how to read that, unit, and the most
# that is allowed.
_REQUIRED: tuple[tuple[str, str, Callable[[Figures], float | None], str, float], ...] = (
    ('failures of the conformance suite:', 'conformance: ', lambda figures: figures.get('failed'), '', 0),
    ('TensorRT FP16 against the CPU in FP32', 'tensorrt accuracy fp16', _largest_share, '% of range', 1.0),
    ('ONNX Runtime TensorRT FP16 against the CPU in FP32', 'r3_fp16_tensorrt_ep_against_cpu_fp32', _largest_value,
     '% of range', 1.0),
    ('torch FP16 against the CPU in FP32', 'pytorch_fp16 fp16 against CPU FP32', _largest_share, '% of range', 1.0),
    ('mutated engines past the gate', 'mutated engines through the gate', lambda figures: figures.get('passed'), '', 0),
    ('TensorrtRuntime.infer in place, of the bare loop', 'tensorrt latency fp16', _ratio('infer, inputs in place'),
     'x p50', 1.10),
    ('ONNX Runtime TensorRT, of TensorRT itself', 'r3_tensorrt_ep_infer',
     lambda figures: figures.get('ratio_to_direct'), 'x p50', 1.5),
    ('session of an .onnx, cold', 'r3_session_cold', _p95, 's p95', 30.0),
    ('session of an .onnx, warm', 'r3_session_warm_onnx', _p95, 's p95', 5.0),
    ('session of an .engine', 'r3_session_engine', _p95, 's p95', 5.0),
    ('GPU memory left after engines were killed over', 'chaos: an engine fails over',
     lambda figures: figures.get('gpu_memory_left_mib'), 'MiB', 64),
    ('GPU memory left after damaged engines', 'chaos: damaged engines past the gate',
     lambda figures: figures.get('gpu_memory_left_mib'), 'MiB', 64),
    ('GPU memory left after spinning kernels', 'chaos: a kernel that never ends',
     lambda figures: figures.get('gpu_memory_left_mib'), 'MiB', 64),
)  # fmt: skip


def _summary(environments: dict[str, dict[str, Figures]]) -> str:
    rows = []
    for what, result, read, unit, most in _REQUIRED:
        found = [
            (name, each.removeprefix(result), results[each])
            for name, results in environments.items()
            for each in results
            if each == result or (result.endswith(': ') and each.startswith(result))
        ]
        for name, which, figures in found:
            value = read(figures)
            if value is not None:
                rows.append((f'{what} {which}'.strip(), _short(name), f'{value:.3g} {unit}', f'{most:g} {unit}',
                             'yes' if value <= most else '**no**'))  # fmt: skip
    table = _table(('requirement', 'where', 'measured', 'at most', 'holds'), rows)
    return f'## Against the requirements\n\n{table}'


# --- where the time goes ---------------------------------------------------------------------------------------------

# Results whose durations are stages of one whole.
_STAGED = ('node, ', 'tensorrt stages')
_STAGE_REMARKS = """\
For an engine alone, each stage of a request is waited for separately; `infer, in place` is all of them in one call,
without the copies before and after. A worker's engine writes its answers into the memory that it shares with the
node, whose pages are locked, and reads its requests there if the GPU can lock read-only mappings (`tensors in
shared memory`).

In the node, `hand off` ends when the worker's engine begins; `engine` includes the copies to and from the GPU and
the GPU's check for non-finite values; `hand back` ends with the tensors in the node; `publish` makes a message of 6
MB of tensors and passes it to DDS; `camera to listener` ends in another Python process that has the tensors."""


def _stages(environments: dict[str, dict[str, Figures]]) -> str:
    tables = [_STAGE_REMARKS]
    for start in _STAGED:
        for name, results in environments.items():
            staged = {result: figures for result, figures in results.items() if result.startswith(start)}
            stages = list(dict.fromkeys(stage for figures in staged.values() for stage in figures))
            rows = [
                (stage.replace('_', ' '), *(_p50_p95(figures.get(stage)) for figures in staged.values()))
                for stage in stages
                if any(_is_durations(figures.get(stage)) for figures in staged.values())
            ]
            if rows:
                what = 'a frame' if start == _STAGED[0] else 'an engine alone'
                tables.append(f'{_short(name)}, {what}, p50 / p95 in ms:')
                heads = (result.removeprefix(start).strip() for result in staged)
                tables.append(_table(('stage', *heads), rows))
    return '## Where the time goes\n\n' + '\n\n'.join(tables)


def _p50_p95(durations: Any) -> str:
    return f'{durations["p50_ms"]:.2f} / {durations["p95_ms"]:.2f}' if _is_durations(durations) else ''


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [f'| {" | ".join(head)} |', f'|{"---|" * len(head)}']
    return '\n'.join([*lines, *(f'| {" | ".join(row)} |' for row in rows)])


def _is_durations(value: object) -> bool:
    return isinstance(value, dict) and any(name in value for name in ('p50_ms', 'p50_s'))


def _durations(result: str, figures: Figures) -> Iterator[tuple[str, ...]]:
    nested = {name: value for name, value in figures.items() if _is_durations(value)}
    if _is_durations(figures):
        nested[''] = figures
    for name, value in nested.items():
        unit = 'ms' if 'p50_ms' in value else 's'
        numbers = (_value(value.get(f'{key}_{unit}', '')) for key in ('p50', 'p95', 'p99', 'max'))
        yield (': '.join(filter(None, (result, '' if name == 'all' else _words(name)))), *numbers,
               str(value.get('n', '')), unit)  # fmt: skip


def _line(figures: Figures) -> str:
    percentiles = {f'{key}_{unit}' for key in ('p50', 'p95', 'p99', 'max') for unit in ('ms', 's')} | {'n'}
    left_out = percentiles if _is_durations(figures) else set()
    return '; '.join(
        f'{_words(name)} {_value(value)}'.strip()
        for name, value in figures.items()
        if name not in left_out and not _is_durations(value) and value not in ('', [], {})
    )


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
    text = ' '.join(str(value).replace('|', '\\|').split())
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]}…'


if __name__ == '__main__':
    files = [Path(name) for name in sys.argv[1:]] or [RESULTS]
    write_report([line for file in files for line in file.read_text(encoding='utf-8').splitlines()])
