"""``c7_engine sweep``: remove engines from the caches."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.store import EngineCache, fallback_directory
from gps_denied_c7.ground.command_arguments import Command, not_negative, size
from gps_denied_c7.ground.command_line import path_argument
from gps_denied_c7.ground.command_output import print_json
from gps_denied_c7.ground.sweep import Caches, Criteria, SweepReport, sweep
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.text import plain

__all__ = ['COMMAND']

_DAY_S = 86400.0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = C7InferenceConfig()
    parser.add_argument(
        '--older-than', type=not_negative, metavar='DAYS', help='engines written more than DAYS days ago'
    )
    parser.add_argument(
        '--max-size', type=size, metavar='BYTES',
        help='the oldest engines, until the rest takes at most BYTES, for example 500M or 20G',
    )  # fmt: skip
    parser.add_argument(
        '--not-for-this-host', action='store_true',
        help='engines built for another GPU, TensorRT or platform; needs the GPU',
    )  # fmt: skip
    parser.add_argument('--dry-run', action='store_true', help='print what would be removed, remove nothing')
    where = f"default: {{}}, and the user's own cache that replaces it ({fallback_directory(Path('…')).parent})"
    parser.add_argument('--cache', type=path_argument, metavar='DIR', help=where.format(defaults.engine_cache_dir))
    parser.add_argument('--ort-cache', type=path_argument, metavar='DIR', help=where.format(defaults.ort_trt_cache_dir))


def _run(options: argparse.Namespace) -> int:
    defaults = C7InferenceConfig()
    caches = Caches(
        engines=[options.cache] if options.cache else EngineCache.at(defaults.engine_cache_dir).directories,
        ort=[options.ort_cache]
        if options.ort_cache
        else (defaults.ort_trt_cache_dir, fallback_directory(defaults.ort_trt_cache_dir)),
    )
    criteria = Criteria(
        older_than_s=None if options.older_than is None else options.older_than * _DAY_S,
        max_bytes=options.max_size,
        not_for=local_host_profile() if options.not_for_this_host else None,
    )
    report = sweep(caches, criteria, now_s=time.time(), dry_run=options.dry_run)
    if options.json:
        print_json(**report.to_json())
    else:
        _print_sweep(report)
    return 1 if report.failed or report.refused else 0


def _print_sweep(report: SweepReport) -> None:
    for removal in report.removed:
        print(f'{"would remove" if report.dry_run else "removed"} {plain(removal.item.path)}')
        print(f'  {removal.item.kind}, {_size(removal.item.bytes)}: {removal.reason}')
    for removal in report.failed:
        print(f'NOT removed {plain(removal.item.path)}\n  {plain(removal.problem)} ({removal.reason})')
    for path, problem in report.refused:
        print(f'NOT swept {plain(path)}\n  {plain(problem)}')
    for path in report.foreign:
        print(f'not touched {plain(path)}\n  not written by a cache')
    print(
        f'{len(report.removed)} {"would be removed" if report.dry_run else "removed"} ({_size(report.freed_bytes)}), '
        f'{len(report.kept) + len(report.failed)} kept ({_size(report.kept_bytes)})'
    )


def _size(count: int) -> str:
    value, unit = float(count), 'bytes'
    for larger in ('KiB', 'MiB', 'GiB', 'TiB'):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f'{count} bytes' if unit == 'bytes' else f'{value:.1f} {unit}'


COMMAND = Command(
    name='sweep',
    summary='remove engines from both caches by age, size or machine',
    description='Remove engines from the engine cache and from the cache of ONNX Runtime that meet one of the\n'
    'conditions given. Without a condition, only the remains of interrupted builds are removed (older than an\n'
    'hour). Files that no cache has written are not touched.',
    add_arguments=_add_arguments,
    run=_run,
)
