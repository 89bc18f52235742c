"""
Where built engines lie, and how they get there.

An engine is found by its name and manifest, which say what it was built from and for; whether it may be
loaded is the gate's to decide. It is published as a whole: the manifest, without which the gate admits
nothing, comes last, after the engine's bytes are on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gps_denied_c7.engines.manifest import (
    EngineManifest,
    EngineName,
    HostProfile,
    manifest_path,
    read_manifest,
    same_tensorrt,
    version_numbers,
)
from gps_denied_c7.engines.trusted_files import read_trusted, trusted_directory
from gps_denied_c7.errors import C7Error, EngineDeserializeError, EngineSchemaMismatchError
from gps_denied_c7.model.files import sync_directory, unfinished_file

__all__ = [
    'LOCK_NAME',
    'TIMING_SUFFIX',
    'CachedEngine',
    'EngineCache',
    'engine_model_name',
    'fallback_directory',
    'make_private_directory',
]

TIMING_SUFFIX = '.timing'
"""How the name of a timing cache ends."""
LOCK_NAME = '.lock'
"""Held with flock while files are put in place."""

_TIMING_LIMIT_BYTES = 256 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size
_MODEL_NAME_LENGTH = 128

_log = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[int | None]]


@dataclass(frozen=True, slots=True)
class CachedEngine:
    """Point to an engine in a cache, not yet admitted by the gate."""

    path: Path
    manifest: EngineManifest


class EngineCache:
    """
    Keep engine files in directories that no other user can write.

    :param directories: where engines are looked for, in this order; built ones go to the first that can be written.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = tuple(directories)

    @classmethod
    def at(cls, configured: Path) -> EngineCache:
        """Return the cache at a configured place, with the user's own cache behind it where that cannot be written."""
        return cls((configured, fallback_directory(configured)))

    def find(
        self, host: HostProfile, *, precision: str, source_sha256: str, shapes: Shapes | None = None
    ) -> CachedEngine | None:
        """
        Return the engine built from a model for this host, the newest TensorRT build first, or None.

        Only names and manifests are read. An engine whose manifest is damaged or missing is passed over
        with a warning.

        :param shapes: wanted shape by the file's own input name; None on an axis takes what there is.
        """
        wanted = shapes or {}
        found = [
            engine
            for directory in self.directories
            for engine in _engines_in(directory, host, precision, source_sha256)
            if all(spec.takes(wanted[spec.name]) for spec in engine.manifest.inputs if spec.name in wanted)
        ]
        return max(found, key=lambda engine: version_numbers(engine.manifest.tensorrt), default=None)

    def publish(self, plan: bytes, manifest: EngineManifest) -> CachedEngine:
        """
        Put an engine and its manifest in place, durably; if the process dies meanwhile, the gate admits nothing of it.

        An older engine of the same name is replaced.

        :raises EngineDeserializeError: no directory can be written.
        """
        name = str(manifest.engine_name)
        directory = self.writable_directory()
        try:
            with (
                unfinished_file(directory, name, plan) as engine,
                unfinished_file(directory, f'{name}.json', manifest.to_json()) as note,
                # Two builders that end at once must not mix their files.
                _locked(directory),
            ):
                os.replace(engine, directory / name)
                sync_directory(directory)
                os.replace(note, manifest_path(directory / name))
                sync_directory(directory)
        except OSError as error:
            raise EngineDeserializeError(
                f'the engine could not be kept in {directory}: {error.strerror or error}.',
                remedy='Make room, or name another directory in engine_cache_dir.',
            ) from error
        return CachedEngine(directory / name, manifest)

    def read_timing_cache(self, host: HostProfile, level: int) -> bytes:
        """
        Return what TensorRT measured in earlier builds on such a host; empty where that is absent or damaged.

        :param level: of optimisation: what a builder at a lower one found best is not what one at a higher would.
        """
        for directory in self.directories:
            path = directory / _timing_name(host, level)
            try:
                if path.exists():
                    trusted_directory(directory)
                    content = read_trusted(path, _TIMING_LIMIT_BYTES)
                    timings = content[_DIGEST_BYTES:]
                    if hashlib.sha256(timings).digest() == content[:_DIGEST_BYTES]:
                        return timings
                    _log.warning('%s is damaged; timings are measured again.', path)
            except (EngineSchemaMismatchError, OSError) as error:
                _log.warning('%s: timings are measured again: %s', path, error)
        return b''

    def write_timing_cache(self, host: HostProfile, level: int, content: bytes) -> None:
        """Keep what TensorRT measured; a failure costs only the next build's time, so it is logged."""
        try:
            directory = self.writable_directory()
            name = _timing_name(host, level)
            with unfinished_file(directory, name, hashlib.sha256(content).digest() + content) as part:
                os.replace(part, directory / name)
        except (C7Error, OSError) as error:
            _log.warning('the timing cache was not kept: %s', error)

    def writable_directory(self) -> Path:
        """
        Return the first directory that can be written and that the gate would read from, making it where needed.

        :raises EngineDeserializeError: there is none; says why for each.
        """
        problems: list[str] = []
        for directory in self.directories:
            try:
                make_private_directory(directory)
                real = trusted_directory(directory)
                if os.access(real, os.W_OK | os.X_OK):
                    if problems:
                        _log.warning('engines are kept in %s, since %s', real, '; '.join(problems))
                    return real
                problems.append(f'{directory} cannot be written')
            except (OSError, EngineSchemaMismatchError) as error:
                problems.append(f'{directory}: {error}')
        raise EngineDeserializeError(
            f'no engine can be kept: {"; ".join(problems)}.', remedy='Name a directory of your own in engine_cache_dir.'
        )


def fallback_directory(configured: Path) -> Path:
    """Return where a cache lies that cannot lie where it was configured: below the user's cache directory."""
    base = os.environ.get('XDG_CACHE_HOME', '')
    # The XDG specification has relative paths ignored.
    root = Path(base) if os.path.isabs(base) else Path('~/.cache').expanduser()
    return root / 'gps-denied' / configured.name


def make_private_directory(directory: Path) -> None:
    """
    Make a directory and its parents such that the gate trusts them, whatever the umask allows to the group.

    :raises OSError: it cannot be made.
    """
    for level in (*reversed(directory.parents), directory):
        if not level.is_dir():
            level.mkdir(mode=0o755, exist_ok=True)


def engine_model_name(name: str) -> str:
    """Return a model's name as an engine file can carry it."""
    plain = re.sub(r'[^A-Za-z0-9._-]', '_', name).lstrip('._-')
    return plain[:_MODEL_NAME_LENGTH] or 'model'


def _engines_in(
    directory: Path, host: HostProfile, precision: str, source_sha256: str
) -> Iterator[CachedEngine]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    for file_name in names:
        try:
            name = EngineName.parse(file_name)
        except EngineSchemaMismatchError:
            continue
        if (name.precision, name.sm, name.digest) != (precision, host.sm, source_sha256[:12]):
            continue
        if not same_tensorrt(host.tensorrt, name.tensorrt):
            continue
        path = directory / file_name
        try:
            manifest = read_manifest(path)
        except EngineSchemaMismatchError as error:
            _log.warning('%s is not used: %s', path, error)
            continue
        found = (manifest.engine_name, manifest.source_sha256, manifest.gpu, manifest.platform)
        if found == (name, source_sha256, host.gpu, host.platform):
            yield CachedEngine(path, manifest)


def _timing_name(host: HostProfile, level: int) -> str:
    gpu = re.sub(r'[^A-Za-z0-9]+', '_', host.gpu).strip('_')
    return f'{gpu}-sm{host.sm}-trt{host.tensorrt}-{host.platform}-level{level}{TIMING_SUFFIX}'


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    # The kernel gives the lock back when its holder dies.
    descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
