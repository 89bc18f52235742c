"""Tell whether files have changed since an attempt that failed because of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import site
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.store import fallback_directory
from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.bundle_json import MODEL_JSON
from gps_denied_c7.model.files import expand_home

__all__ = ['FileWatch', 'bundle_files', 'cache_directories', 'fingerprint', 'model_files']

_MOST_ENTRIES = 4096
_DEPTH = 4
# What ldconfig writes when a package brings shared libraries.
_LIBRARIES = '/etc/ld.so.cache'
_LOOK_EVERY_S = 5.0


def bundle_files(bundle: ModelBundle) -> tuple[Path, ...]:
    """Return every file of a bundle, whether it is there or not."""
    files = [Path(bundle.root) / MODEL_JSON]
    for artefact in bundle.artefacts:
        files += [artefact.path, *(artefact.path.parent / name for name in artefact.external_data)]
        files.append(artefact.path.with_name(f'{artefact.path.name}.json'))
    for case in bundle.golden:
        files += [case.inputs.path, case.outputs.path]
    return tuple(files)


def model_files(path: str) -> tuple[list[Path], list[Path]]:
    """Return which files and directories :func:`fingerprint` has to look at for a ``model_path`` of any kind."""
    if not path:
        return [], []
    model = _at_home(path).absolute()
    if os.path.isdir(model):
        return [model], [model]
    if model.suffix == '.json':
        return [model], [model.parent]
    # A bare model may keep weights in other files below; which, only the model says. Those named like it come first.
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        names = sorted(os.listdir(model.parent))
    beside = [model.parent / name for name in names if name.startswith(model.stem)]
    return [model, *beside[:_MOST_ENTRIES]], [model.parent] if os.path.lexists(model) else []


def cache_directories(config: C7InferenceConfig) -> tuple[Path, ...]:
    """Return where built engines may lie."""
    configured = (Path(config.engine_cache_dir), Path(config.ort_trt_cache_dir))
    return (*configured, *map(fallback_directory, configured))


def fingerprint(files: Iterable[Path | str], directories: Iterable[Path | str] = ()) -> Hashable:
    """
    Return a value that changes as soon as a file is made, removed, replaced or written, or its permissions change.

    Nothing is read but the entries of directories. It waits as long as a file system does.

    :param files: ``~`` is the home directory, here and in ``directories``.
    :param directories: all below them counts, four levels deep, without hidden directories; of very many files some.
        Where packages and shared libraries are installed is added.
    """
    paths, below = [_at_home(file) for file in files], [_at_home(directory) for directory in directories]
    parents = {parent for path in (*paths, *below) for parent in path.parents}
    found = [(str(path), _state(path)) for path in paths]
    # Owner and permissions alone: other files in these directories do not matter.
    found += [(str(parent), _state(parent)[:3]) for parent in sorted(parents)]
    # A user's own may be made later, and workers look there then.
    packages = {entry for entry in (*sys.path, site.getusersitepackages()) if entry.endswith('-packages')}
    found += [(entry, _state(entry)) for entry in (*sorted(packages), _LIBRARIES)]
    for directory in below:
        found += itertools.islice(_below(str(directory), _DEPTH), _MOST_ENTRIES)
    return tuple(found)


def _at_home(path: Path | str) -> Path:
    try:
        return expand_home(path)
    except ModelBundleError:
        return Path(path)


def _state(path: Path | str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        return (getattr(error, 'errno', None) or -1,)
    whose = status.st_mode, status.st_uid, status.st_gid
    return *whose, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _below(directory: str, depth: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with os.scandir(directory) as entries:
            paths = sorted((entry.is_dir(), entry.path) for entry in entries)
    except OSError:
        yield directory, _state(directory)[:3]
        return
    # Files first: where there is too much below, the nearest counts.
    for is_directory, path in paths:
        # What a directory itself says changes with the files in it that come and go, as a lock does; in hidden ones
        # programs keep their logs and caches, as below a home directory in which a model lies.
        if is_directory and depth > 1 and not os.path.basename(path).startswith('.'):
            yield from _below(path, depth - 1)
        else:
            yield path, _state(path)


class FileWatch:
    """
    Know the latest fingerprint without waiting for a file system, which may have stalled; for any thread.

    :param look: returns a fingerprint; called from a thread of its own.
    """

    def __init__(self, look: Callable[[], Hashable]) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._looking = False
        self._looked_at = float('-inf')
        self.seen: Hashable = None
        """Result of the last look, None before the first has ended."""

    def latest(self) -> Hashable:
        """Return the result of the last look; start another one if that is some seconds ago."""
        with self._lock:
            due = not self._looking and time.monotonic() - self._looked_at > _LOOK_EVERY_S
            self._looking = self._looking or due
        if due:
            try:
                threading.Thread(target=self._run, name='c7-files', daemon=True).start()
            except RuntimeError:  # no thread is left: another time
                self._looking = False
        return self.seen

    def _run(self) -> None:
        try:
            self.seen = self._look()
        finally:
            self._looked_at = time.monotonic()
            self._looking = False
