"""A directory that is complete, or not made at all."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.model.files import PART_SUFFIX

__all__ = ['staged_directory']

_log = logging.getLogger(__name__)


@contextmanager
def staged_directory(output: Path) -> Iterator[Path]:
    """
    Yield a directory beside ``output``, which becomes ``output`` if nothing is raised; remove what a kill left.

    :raises ModelBundleError: ``output`` exists, or cannot be made.
    """
    target = output.absolute()
    prefix = f'.{target.name[:100]}.'
    try:
        _remove_left_over(target.parent, prefix)
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise ModelBundleError(
                f'{output} exists already and is not an empty directory.', remedy='Remove it, or name another one.'
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix, suffix=PART_SUFFIX))
        try:
            with _locked(stage):
                yield stage
                os.chmod(stage, 0o755)
                os.rename(stage, target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise ModelBundleError(f'{output} cannot be made: {error.strerror}.', remedy='Name another one.') from error


def _remove_left_over(parent: Path, prefix: str) -> None:
    for path in parent.glob(f'{glob.escape(prefix)}????????{PART_SUFFIX}'):
        try:
            with _locked(path):
                shutil.rmtree(path)
        except OSError as error:
            _log.info('%s stays: %s', path, error.strerror)
        else:
            _log.warning('removed %s, which an interrupted run had left', path)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """
    Hold the lock of a directory that is being made; it ends with this process.

    :raises OSError: another process holds it, or it is not a directory.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
