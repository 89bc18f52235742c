"""
Sweep the caches of built engines, TensorRT's own and ONNX Runtime's, by age, size and host (G-3).

Only what the caches themselves write is removed, recognised by name; everything else is reported and not touched.
The manifest or the listing, without which no engine is admitted, is removed first: an interrupted sweep leaves
nothing that looks complete.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gps_denied_c7.engines.manifest import EngineName, HostProfile, manifest_path, read_manifest
from gps_denied_c7.engines.ort_store import LISTING_NAME, WHOLE_ENGINE, BuiltFor, CacheListing, read_listing
from gps_denied_c7.engines.store import LOCK_NAME, PART_SUFFIX, TIMING_SUFFIX
from gps_denied_c7.engines.trusted_files import trusted_directory
from gps_denied_c7.errors import EngineSchemaMismatchError
from gps_denied_c7.ground.compatibility import mismatches

__all__ = ['CacheItem', 'Caches', 'Criteria', 'Removal', 'SweepReport', 'list_cache', 'sweep']

LEFTOVER_AGE_S = 3600.0
"""How old a half-written item must be to count as left over, in seconds: a younger one may be under way."""

_DAY_S = 86400.0

_PART = re.compile(r'\.[A-Za-z0-9][A-Za-z0-9._-]*\.[A-Za-z0-9_]{8}' + re.escape(PART_SUFFIX), re.ASCII)
_TIMING = re.compile(
    r'\w+-sm(?P<sm>\d{2,3})-trt(?P<tensorrt>\d+(?:\.\d+){2,3})-(?P<platform>\w+-\w+)(?:-level\d)?'
    + re.escape(TIMING_SUFFIX),
    re.ASCII,
)
_MODEL_DIGEST = re.compile(r'[0-9a-f]{64}')
# The provider's own files, an engine of TensorRT's own builder, and a listing that was never finished.
_ORT_FILE = re.compile(
    r'TensorrtExecutionProvider_.+\.(?:engine|profile|timing)|'
    + re.escape(WHOLE_ENGINE)
    + r'|\.'
    + re.escape(LISTING_NAME)
    + r'\.[a-z0-9_]{8}',
    re.ASCII,
)


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
class CacheItem:
    """
    Describe what is kept or removed as one.

    :param kind: ``engine``, ``timing``, ``ort_cache`` or ``leftover``.
    :param path: the file or directory that gives it its name.
    :param files: names below ``directory`` in the order of removal, with what they were when listed.
    :param written_s: when its newest file was written, seconds since the epoch.
    :param bytes: size of its files.
    :param built_for: what it was built for, None where that is unknown.
    """

    kind: str
    path: Path
    directory: Path
    files: tuple[tuple[str, os.stat_result], ...]
    written_s: float
    bytes: int
    built_for: HostProfile | BuiltFor | None = None


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
    for directories, kind in ((caches.engines, 'engines'), (caches.ort, 'ort')):
        for directory in directories:
            if not os.path.lexists(directory):
                continue
            try:
                real = trusted_directory(directory)
                if real not in seen:
                    found, foreign = list_cache(real, kind)
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


def list_cache(directory: Path, kind: str) -> tuple[list[CacheItem], list[Path]]:
    """
    Return what a cache directory holds: its items, and the paths that are not the cache's own.

    :param directory: a real path.
    :param kind: ``engines`` or ``ort``.
    :raises OSError: it cannot be read.
    """
    return (_list_engines if kind == 'engines' else _list_ort)(directory)


def _list_engines(directory: Path) -> tuple[list[CacheItem], list[Path]]:
    entries = _regular_files(directory)
    items, foreign = [], [directory / name for name, info in entries.items() if info is None]
    for name, info in entries.items():
        if info is None or name == LOCK_NAME:
            continue
        engine_name = name.removesuffix('.json')
        if _is_engine(engine_name):
            note = manifest_path(Path(engine_name)).name
            pair = tuple((part, found) for part in (note, engine_name) if (found := entries.get(part)) is not None)
            if len(pair) == 1:
                items.append(_item('leftover', directory / name, directory, pair))
            elif name == engine_name:
                items.append(_item('engine', directory / name, directory, pair, _engine_host(directory / name)))
        elif match := _TIMING.fullmatch(name):
            host = HostProfile('', int(match['sm']), match['tensorrt'], match['platform'])
            items.append(_item('timing', directory / name, directory, ((name, info),), host))
        elif _PART.fullmatch(name):
            items.append(_item('leftover', directory / name, directory, ((name, info),)))
        else:
            foreign.append(directory / name)
    return items, foreign


def _list_ort(directory: Path) -> tuple[list[CacheItem], list[Path]]:
    items: list[CacheItem] = []
    foreign: list[Path] = []
    for name in sorted(os.listdir(directory)):
        path = directory / name
        if not _MODEL_DIGEST.fullmatch(name) or not stat.S_ISDIR(path.lstat().st_mode):
            foreign.append(path)
            continue
        entries = _regular_files(path)
        listing = _listing(path)
        listed = {file.name for file in listing.files} if listing else set()
        strange = [
            path / entry
            for entry, info in entries.items()
            if info is None or not (entry == LISTING_NAME or entry in listed or _ORT_FILE.fullmatch(entry))
        ]
        if strange:
            foreign += strange
            continue
        # The listing first: without it the rest counts as cold.
        names = sorted(entries, key=lambda entry: (entry != LISTING_NAME, entry))
        files = tuple((entry, info) for entry in names if (info := entries[entry]) is not None)
        kind = 'ort_cache' if LISTING_NAME in entries else 'leftover'
        items.append(_item(kind, path, path, files, listing.built_for if listing else None))
    return items, foreign


def _item(
    kind: str,
    path: Path,
    directory: Path,
    files: tuple[tuple[str, os.stat_result], ...],
    built_for: HostProfile | BuiltFor | None = None,
) -> CacheItem:
    written_s = max((info.st_mtime for _, info in files), default=0.0) or path.stat().st_mtime
    return CacheItem(kind, path, directory, files, written_s, sum(info.st_size for _, info in files), built_for)


def _regular_files(directory: Path) -> dict[str, os.stat_result | None]:
    """Return what each entry is, None for anything but a regular file."""
    entries: dict[str, os.stat_result | None] = {}
    for name in sorted(os.listdir(directory)):
        try:
            info = os.lstat(directory / name)
        except FileNotFoundError:
            # A builder renamed it meanwhile.
            continue
        entries[name] = info if stat.S_ISREG(info.st_mode) else None
    return entries


def _is_engine(name: str) -> bool:
    try:
        EngineName.parse(name)
    except EngineSchemaMismatchError:
        return False
    return True


def _engine_host(engine: Path) -> HostProfile:
    """Return what an engine was built for, by its manifest, or as far as its name tells."""
    name = EngineName.parse(engine.name)
    try:
        manifest = read_manifest(engine)
    except EngineSchemaMismatchError:
        return HostProfile('', name.sm, name.tensorrt, '')
    return HostProfile(manifest.gpu, name.sm, name.tensorrt, manifest.platform)


def _listing(directory: Path) -> CacheListing | None:
    try:
        return read_listing(directory)
    except EngineSchemaMismatchError:
        return None


def _choose(
    items: Sequence[CacheItem], criteria: Criteria, now_s: float
) -> Iterator[tuple[CacheItem, str | None]]:
    """Yield each item with the reason why it goes, None where it stays; oldest first."""
    ordered = sorted(items, key=lambda item: (item.written_s, str(item.path)))
    reasons = {id(item): _reason(item, criteria, now_s) for item in ordered}
    left = sum(item.bytes for item in ordered if reasons[id(item)] is None)
    for item in ordered:
        reason = reasons[id(item)]
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
