"""
The engines that ONNX Runtime's TensorRT provider runs, kept between sessions, and whether they may be loaded (G-2).

The provider loads whatever engine lies in its cache under the right name, unread, and that name leaves the
weights and the shapes out. So each model digest has a directory of its own, and what a build wrote there is
listed with digests, for exactly what it was built from, for and by. Only a directory that is still what its
listing says is warm; anything else is deleted and counts as cold.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gps_denied_c7.engines.sealed_json import SealedRecord, check_tensors
from gps_denied_c7.engines.store import fallback_directory, make_private_directory
from gps_denied_c7.engines.trusted_files import read_trusted, trusted_directory
from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.model.files import sync_directory, write_atomically
from gps_denied_c7.tensors import TensorSpec

__all__ = [
    'LISTING_NAME',
    'WHOLE_ENGINE',
    'BuiltFor',
    'CacheBuild',
    'CacheListing',
    'CachedFile',
    'OrtEngineCache',
    'VerifiedCache',
    'WholeGraph',
    'read_listing',
    'verify_cache',
]

LISTING_NAME = 'listing.json'
# An engine that TensorRT's own builder made of a whole model; the provider, whose names are others, never finds it.
WHOLE_ENGINE = 'whole.engine'

_LISTING_LIMIT_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20
_REBUILD = 'Build it again: configure once with build_on_configure.'


_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltFor:
    """
    Say what a cache was built from, for and by; each field has to be the same when it is used.

    :param model_sha256: hex digest of the model, external weights included.
    :param precision: as ``fp16``.
    :param axes: size by name of each free axis, which was fixed before the build.
    :param onnxruntime: version.
    :param tensorrt: version of the library that ONNX Runtime loads, as ``8.6.0``.
    :param gpu: name of the GPU as NVML spells it.
    :param sm: compute capability as major × 10 + minor.
    :param driver: version of the GPU's driver, or ``unknown``.
    :param platform: as ``linux-x86_64``.
    """

    model_sha256: str
    precision: str
    axes: Mapping[str, int]
    onnxruntime: str
    tensorrt: str
    gpu: str
    sm: int
    driver: str
    platform: str


@dataclass(frozen=True, slots=True)
class CachedFile:
    """Name a file of the cache, its hex digest and its size in bytes."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class WholeGraph:
    """
    Say that one engine is the whole model, so that an EPContext node can stand for all of it.

    :param engine: the engine's file name.
    :param inputs: the model's own inputs, every axis fixed.
    :param outputs: the model's own outputs, every axis fixed.
    """

    engine: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check(self) -> None:
        """Raise ValueError for an engine that lacks inputs or outputs."""
        check_tensors(self.inputs, self.outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheListing(SealedRecord):
    """
    List what a build wrote; it lies among those files as ``listing.json``.

    The file is canonical JSON that carries a digest of itself, so that any changed byte is noticed.

    :param whole_graph: None where the graph became several engines, or runs elsewhere in part.
    """

    record = 'listing'
    remedy = _REBUILD

    built_for: BuiltFor
    files: tuple[CachedFile, ...]
    whole_graph: WholeGraph | None = None

    def check(self) -> None:
        """Raise ValueError where no file is listed."""
        if not self.files:
            raise ValueError('no file is listed')


@dataclass(frozen=True, slots=True)
class VerifiedCache:
    """
    Hold a cache directory whose every file was found as listed.

    :param plan: the bytes of the engine that is the whole graph, as hashed; None where there is no such one.
    """

    directory: Path
    listing: CacheListing
    plan: bytes | None = field(repr=False)

    @property
    def is_for_provider(self) -> bool:
        """Whether the provider finds its engines here by itself, and so builds none."""
        return all(file.name != WHOLE_ENGINE for file in self.listing.files)

    def require_unchanged(self) -> None:
        """
        Read and hash each file once more, after the provider has opened it by its path.

        :raises EngineSchemaMismatchError: one is not what it was.
        """
        _read_listed(self.directory, self.listing)


class OrtEngineCache:
    """
    Find, judge and make the cache directory of a model.

    :param roots: directories below which each model digest has its own, in this order; a new one is made
        below the first that can be written.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(roots)

    @classmethod
    def at(cls, configured: Path) -> OrtEngineCache:
        """Return the cache at a configured place, with the user's own cache behind it where that cannot be written."""
        return cls((configured, fallback_directory(configured)))

    def find(self, built_for: BuiltFor) -> tuple[VerifiedCache | None, list[str]]:
        """
        Return the warm cache of a model, or None; each file is read and hashed (about 1 s per GB).

        A directory that is not what it should be is deleted, unless it belongs to a build that is under
        way, or cannot be.

        :return: the cache, and what was found wrong elsewhere, one sentence each.
        """
        notes: list[str] = []
        for root in self._roots:
            directory = root / built_for.model_sha256
            try:
                if not directory.exists():
                    continue
                return verify_cache(directory, built_for), notes
            except (EngineSchemaMismatchError, OSError) as error:
                found = error.message if isinstance(error, EngineSchemaMismatchError) else str(error)
                notes.append(f'The engine cache {directory} is not used: {found} {_discard(directory)}')
                _log.warning('%s', notes[-1])
        return None, notes

    def begin(self, built_for: BuiltFor) -> tuple[CacheBuild | None, list[str]]:
        """
        Make an empty directory that only this process builds in, below the first root that can be written.

        :return: the build, or None where nothing can be kept; and why not where it should be, one sentence each.
        """
        notes: list[str] = []
        for root in self._roots:
            try:
                make_private_directory(root)
                directory = trusted_directory(root) / built_for.model_sha256
                directory.mkdir(mode=0o755)
                build = CacheBuild(directory, built_for)
            except (EngineSchemaMismatchError, OSError) as error:
                found = error.message if isinstance(error, EngineSchemaMismatchError) else str(error)
                notes.append(f'Built engines are not kept in {root}: {found}')
                continue
            if notes:
                _log.warning('%s: %s', directory, ' '.join(notes))
            return build, notes
        _log.warning('Built engines are not kept. %s', ' '.join(notes))
        return None, notes


class CacheBuild:
    """
    Own a directory while engines are built in it; either ``record`` or ``close`` ends that.

    :raises OSError: another process has taken it meanwhile.
    """

    def __init__(self, directory: Path, built_for: BuiltFor) -> None:
        self.directory = directory
        self.built_for = built_for
        # Held until the listing is written, so that files without a listing show whether their build is under way or
        # has died: the kernel releases the lock when its holder dies.
        self._lock: int | None = _lock(directory)

    def keep(self, plan: bytes) -> None:
        """
        Add an engine that is the whole model to what is to be listed.

        :raises EngineDeserializeError: it cannot be written; the directory is gone then.
        """
        try:
            (self.directory / WHOLE_ENGINE).write_bytes(plan)
        except OSError as error:
            self.close()
            raise EngineDeserializeError(f'The built engine is not kept: {error}') from error

    def record(self, whole_graph: tuple[Sequence[TensorSpec], Sequence[TensorSpec]] | None) -> CacheListing:
        """
        List what was written, durably, and give the directory up.

        :param whole_graph: the model's own inputs and outputs where a single engine is all of it.
        :raises EngineDeserializeError: nothing was written, or it cannot be kept; the directory is gone then.
        """
        try:
            files = tuple(_settle(self.directory, name) for name in sorted(os.listdir(self.directory)))
            engines = [file.name for file in files if file.name.endswith('.engine')]
            if not engines:
                raise EngineDeserializeError('TensorRT wrote no engine into its cache.')
            listing = CacheListing(
                built_for=self.built_for, files=files, whole_graph=_as_whole_graph(engines, whole_graph)
            )
            write_atomically(self.directory / LISTING_NAME, listing.to_json())
            sync_directory(self.directory)
            sync_directory(self.directory.parent)
        except (OSError, ModelBundleError, EngineSchemaMismatchError) as error:
            self.close()
            raise EngineDeserializeError(f'The built engines are not kept: {error}') from error
        except EngineDeserializeError:
            self.close()
            raise
        self._unlock()
        return listing

    def close(self) -> None:
        """Delete what was not recorded; safe to repeat."""
        if self._lock is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def read_listing(directory: Path) -> CacheListing:
    """
    Return the listing of a model's cache directory; its other files are not read.

    :raises EngineSchemaMismatchError: there is none, it is damaged, or another user could have written it.
    """
    return CacheListing.from_json(read_trusted(directory / LISTING_NAME, _LISTING_LIMIT_BYTES))


def verify_cache(directory: Path, built_for: BuiltFor | None = None) -> VerifiedCache:
    """
    Check that a model's cache directory is what its listing says; each file is read and hashed.

    :param built_for: what it must have been built for, None to look for damage alone.
    :raises EngineSchemaMismatchError: naming the first thing that differs.
    :raises OSError: the directory cannot be read.
    """
    real = trusted_directory(directory)
    listing = read_listing(real)
    built_for = built_for or listing.built_for
    for part in dataclasses.fields(BuiltFor):
        expected, found = getattr(built_for, part.name), getattr(listing.built_for, part.name)
        if expected != found:
            raise _mismatch(part.name, expected, found)
    names = {file.name for file in listing.files}
    if names != set(os.listdir(real)) - {LISTING_NAME}:
        raise _mismatch('files', sorted(names), sorted(set(os.listdir(real)) - {LISTING_NAME}))
    return VerifiedCache(real, listing, _read_listed(real, listing))


def _read_listed(directory: Path, listing: CacheListing) -> bytes | None:
    """Check the digest of each file that is listed, and return the engine that is the whole graph."""
    plan = None
    for file in listing.files:
        content = read_trusted(directory / file.name, file.size)
        digest = hashlib.sha256(content).hexdigest()
        if digest != file.sha256:
            raise _mismatch(f'sha256 of {file.name}', file.sha256, digest)
        if listing.whole_graph is not None and file.name == listing.whole_graph.engine:
            plan = content
    return plan


def _discard(directory: Path) -> str:
    """Delete a directory that cannot be trusted, and return the result as a sentence."""
    try:
        lock = _lock(directory)
    except BlockingIOError:
        return 'It is left alone, since another process is building there.'
    except OSError as error:
        return f'It could not be deleted: {error.strerror}.'
    try:
        shutil.rmtree(directory)
    except OSError as error:
        return f'It could not be deleted: {error.strerror}.'
    finally:
        os.close(lock)
    return 'It was deleted.'


def _lock(directory: Path) -> int:
    """Take a directory for this process, or raise BlockingIOError where another has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _settle(directory: Path, name: str) -> CachedFile:
    """Bring a file that the provider wrote onto the disk, closed to other writers, and hash it."""
    descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, 'rb', buffering=0) as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise _mismatch('file', 'a regular file', f'{stat.filemode(info.st_mode)} {name}')
        # The provider leaves the mode to the umask, and what a group may write is not loaded.
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
        digest, size = hashlib.sha256(), 0
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return CachedFile(name, digest.hexdigest(), size)


def _as_whole_graph(
    engines: list[str], specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]] | None
) -> WholeGraph | None:
    if specs is None or len(engines) != 1:
        return None
    if any(spec.shape is None or None in spec.shape for role in specs for spec in role):
        return None
    inputs, outputs = specs
    return WholeGraph(engines[0], tuple(inputs), tuple(outputs))


def _mismatch(name: str, expected: object, found: object) -> EngineSchemaMismatchError:
    return EngineSchemaMismatchError(name, expected=expected, found=found, remedy=_REBUILD)
