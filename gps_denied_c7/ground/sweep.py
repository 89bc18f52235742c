"""
``c7_engine sweep``: remove engines from the caches, TensorRT's own and ONNX Runtime's, by age, size and host (G-3).

Only what the caches themselves write is removed, recognised by name; everything else is reported and not touched.
The manifest or the listing, without which no engine is admitted, is removed first: an interrupted sweep leaves
nothing that looks complete.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.manifest import HostProfile
from gps_denied_c7.engines.store import LOCK_NAME, EngineCache, fallback_directory
from gps_denied_c7.engines.trusted_files import trusted_directory
from gps_denied_c7.errors import EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.ground.cache_items import CacheItem, list_engines, list_ort
from gps_denied_c7.ground.command_line import Command, not_negative, path_argument, print_json, size
from gps_denied_c7.ground.compatibility import mismatches
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.text import plain

__all__ = ['COMMAND', 'Caches', 'Criteria', 'Removal', 'SweepReport', 'sweep']

LEFTOVER_AGE_S = 3600.0
"""How old a half-written item must be to count as left over, in seconds: a younger one may be under way."""

_DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Criteria:
    """
    Say what is removed: items that meet any of these. Leftovers of interrupted builds always go.

    :param older_than_s: seconds since an item was written.
    :param max_bytes: that may be left in all caches together; the oldest go first.
    :param not_for: the host whose items stay, all others go.
    """

    older_than_s: float | None = None
    max_bytes: int | None = None
    not_for: HostProfile | None = None


@dataclass(frozen=True, slots=True)
class Caches:
    """Name the directories: of engine files, and of ONNX Runtime's engines (one below it for each model)."""

    engines: Sequence[Path]
    ort: Sequence[Path]


@dataclass(frozen=True, slots=True)
class Removal:
    """Say why an item is removed, and what prevented it."""

    item: CacheItem
    reason: str
    problem: str = ''


@dataclass(slots=True)
class SweepReport:
    """
    Hold what a sweep did.

    :param removed: gone, or to go in a dry run.
    :param failed: what should have been removed and could not.
    :param kept: what stays.
    :param foreign: paths in the caches that are not theirs, left alone.
    :param refused: directories that were not swept, and why.
    """

    dry_run: bool
    removed: list[Removal] = field(default_factory=list)
    failed: list[Removal] = field(default_factory=list)
    kept: list[CacheItem] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def freed_bytes(self) -> int:
        """Bytes that were freed, or would be."""
        return sum(removal.item.bytes for removal in self.removed)

    @property
    def kept_bytes(self) -> int:
        """Bytes that stay, what could not be removed included."""
        return sum(item.bytes for item in self.kept) + sum(removal.item.bytes for removal in self.failed)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""

        def described(item: CacheItem) -> dict[str, Any]:
            return {'kind': item.kind, 'path': str(item.path), 'bytes': item.bytes, 'written_s': item.written_s}

        return {
            'dry_run': self.dry_run,
            'removed': [described(removal.item) | {'reason': removal.reason} for removal in self.removed],
            'failed': [
                described(removal.item) | {'reason': removal.reason, 'problem': removal.problem}
                for removal in self.failed
            ],
            'kept': [described(item) for item in self.kept],
            'foreign': [str(path) for path in self.foreign],
            'refused': [{'path': str(path), 'problem': problem} for path, problem in self.refused],
            'freed_bytes': self.freed_bytes,
            'kept_bytes': self.kept_bytes,
        }


def sweep(caches: Caches, criteria: Criteria, *, now_s: float, dry_run: bool = False) -> SweepReport:
    """
    Remove from the caches what ``criteria`` name, and say what was done.

    A directory that others can write is not swept: files with our names there may be another user's. Nothing is
    raised for what cannot be removed, it is reported.

    :param now_s: seconds since the epoch.
    """
    report = SweepReport(dry_run)
    items: list[CacheItem] = []
    seen: set[Path] = set()
    for directories, listed in ((caches.engines, list_engines), (caches.ort, list_ort)):
        for directory in directories:
            if not os.path.lexists(directory):
                continue
            try:
                real = trusted_directory(directory)
                if real not in seen:
                    found, foreign = listed(real)
                    items += found
                    report.foreign += foreign
                seen.add(real)
            except (EngineSchemaMismatchError, OSError) as error:
                report.refused.append((directory, str(error)))
    for item, reason in _choose(items, criteria, now_s):
        if reason is None:
            report.kept.append(item)
            continue
        try:
            if not dry_run:
                _remove(item)
            report.removed.append(Removal(item, reason))
        except _InUseError:
            report.kept.append(item)
        except OSError as error:
            report.failed.append(Removal(item, reason, error.strerror or str(error)))
    return report


def _choose(
    items: Sequence[CacheItem], criteria: Criteria, now_s: float
) -> Iterator[tuple[CacheItem, str | None]]:
    """Yield each item with the reason why it goes, None where it stays; oldest first."""
    ordered = sorted(items, key=lambda item: (item.written_s, str(item.path)))
    reasoned = [(item, _reason(item, criteria, now_s)) for item in ordered]
    left = sum(item.bytes for item, reason in reasoned if reason is None)
    for item, reason in reasoned:
        if reason is None and criteria.max_bytes is not None and left > criteria.max_bytes and item.kind != 'leftover':
            reason = f'the caches hold more than {criteria.max_bytes} bytes'
            left -= item.bytes
        yield item, reason


def _reason(item: CacheItem, criteria: Criteria, now_s: float) -> str | None:
    age_s = now_s - item.written_s
    if item.kind == 'leftover':
        return 'left over from an interrupted build or copy' if age_s > LEFTOVER_AGE_S else None
    if criteria.not_for is not None and (difference := _not_for(item, criteria.not_for)):
        return f'not for this host: {difference}'
    if criteria.older_than_s is not None and age_s > criteria.older_than_s:
        return f'written {age_s / _DAY_S:.1f} days ago'
    return None


def _not_for(item: CacheItem, host: HostProfile) -> str | None:
    """Say in what an item differs from what this host needs, None where it does not, or is unknown."""
    if item.built_for is None:
        return None
    differs = mismatches(item.built_for, host)
    return ', '.join(f'{name} {found}, here {expected}' for name, expected, found in differs) or None


class _InUseError(Exception):
    """An item is being written at this moment."""


def _remove(item: CacheItem) -> None:
    """
    Remove an item.

    :raises _InUseError: it was written again since it was listed, or is being built.
    :raises OSError: it cannot be removed.
    """
    with _locked(item) as directory:
        for name, info in item.files:
            try:
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError as error:
                raise _InUseError(name) from error
            if (found.st_ino, found.st_mtime_ns, found.st_size) != (info.st_ino, info.st_mtime_ns, info.st_size):
                raise _InUseError(name)
        for name, _ in item.files:
            os.unlink(name, dir_fd=directory)
            # Synced one by one: a power cut must not undo the first removal and keep the second.
            os.fsync(directory)
        if item.path == item.directory:
            os.rmdir(item.path)


@contextmanager
def _locked(item: CacheItem) -> Iterator[int]:
    """Hold the lock that writers of the directory take, and yield its descriptor."""
    directory = os.open(item.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if item.path == item.directory:
            # ONNX Runtime's directories are locked themselves, for as long as a build takes.
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _InUseError(item.path) from error
            yield directory
            return
        lock = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644, dir_fd=directory)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
        finally:
            os.close(lock)
    finally:
        os.close(directory)


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
    for named in filter(None, (options.cache, options.ort_cache)):
        if not os.path.lexists(named):
            raise ModelBundleError(f'{named} does not exist.', remedy='Correct the path.')
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
