"""What the caches of built engines hold, TensorRT's own and ONNX Runtime's, recognised by name."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from gps_denied_c7.engines.manifest import EngineName, HostProfile, manifest_path, read_manifest
from gps_denied_c7.engines.ort_store import LISTING_NAME, WHOLE_ENGINE, BuiltFor, CacheListing, read_listing
from gps_denied_c7.engines.store import LOCK_NAME, TIMING_SUFFIX
from gps_denied_c7.errors import EngineSchemaMismatchError
from gps_denied_c7.model.files import PART_SUFFIX

__all__ = ['CacheItem', 'list_engines', 'list_ort']

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
    + r'\.[a-z0-9_]{8}(?:'
    + re.escape(PART_SUFFIX)
    + ')?',
    re.ASCII,
)


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


def list_engines(directory: Path) -> tuple[list[CacheItem], list[Path]]:
    """
    Return what a directory of engine files holds: the cache's items, and the paths that are not its own.

    :param directory: a real path.
    :raises OSError: it cannot be read.
    """
    entries = _regular_files(directory)
    items, foreign = [], [directory / name for name, info in entries.items() if info is None]
    for name, info in entries.items():
        if info is None or name == LOCK_NAME:
            continue
        engine = directory / name.removesuffix('.json')
        if (engine_name := _engine_name(engine)) is not None:
            note = manifest_path(engine).name
            pair = tuple((part, found) for part in (note, engine.name) if (found := entries.get(part)) is not None)
            if len(pair) == 1:
                items.append(_item('leftover', directory / name, directory, pair))
            elif name == engine.name:
                items.append(_item('engine', engine, directory, pair, _engine_host(engine, engine_name)))
        elif match := _TIMING.fullmatch(name):
            host = HostProfile('', int(match['sm']), match['tensorrt'], match['platform'])
            items.append(_item('timing', directory / name, directory, ((name, info),), host))
        elif _PART.fullmatch(name):
            items.append(_item('leftover', directory / name, directory, ((name, info),)))
        else:
            foreign.append(directory / name)
    return items, foreign


def list_ort(directory: Path) -> tuple[list[CacheItem], list[Path]]:
    """Return the same of a directory of ONNX Runtime's engines, whose items are directories, one for each model."""
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


def _engine_name(engine: Path) -> EngineName | None:
    try:
        return EngineName.parse(engine.name)
    except EngineSchemaMismatchError:
        return None


def _engine_host(engine: Path, name: EngineName) -> HostProfile:
    """Return what an engine was built for, by its manifest, or as far as its name tells."""
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
