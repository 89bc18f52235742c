"""Read files that no other user could have written: place, owner and mode are checked first (G-1)."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.host_memory import require_memory

__all__ = ['REBUILD', 'read_trusted', 'trusted_directory']

REBUILD = 'Build the engine again on this host, or use the .onnx.'
"""What to do about an engine file that is not as it should be."""


def trusted_directory(directory: Path) -> Path:
    """
    Return the real path of ``directory``.

    :raises EngineSchemaMismatchError: it is not there, or another user could replace what lies in it.
    """
    try:
        real = directory.resolve(strict=True)
        levels = [(level, level.stat()) for level in (real, *real.parents)]
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineSchemaMismatchError(
            'directory', expected='a readable directory', found=str(error), remedy='Check engine_cache_dir.'
        ) from error
    for level, info in levels:
        # In a sticky directory, as /tmp, only its owner can rename or remove an entry: safe above, not at the end.
        _check_ownership(level, info, sticky_is_safe=level != real)
    return real


def _check_ownership(path: Path, info: os.stat_result, *, sticky_is_safe: bool = False) -> None:
    trusted = sorted({0, os.geteuid()})
    if info.st_uid not in trusted:
        raise EngineSchemaMismatchError(
            'owner',
            expected=f'uid {" or ".join(map(str, trusted))}',
            found=f'uid {info.st_uid} on {path}',
            remedy='An engine is native code: chown it and its directories to root or to the user of the node.',
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (sticky_is_safe and info.st_mode & stat.S_ISVTX):
        raise EngineSchemaMismatchError(
            'mode',
            expected='writable by its owner alone',
            found=f'{stat.filemode(info.st_mode)} on {path}',
            remedy=f'An engine is native code: chmod go-w {path}.',
        )


def read_trusted(path: Path, limit: int) -> bytes:
    """
    Read a regular file in one go; neither a link is followed nor a pipe waited for.

    :param limit: bytes that it may have at most.
    :raises EngineSchemaMismatchError: not a regular file, too large, or another user could have written it.
    :raises EngineDeserializeError: there is no memory for it now.
    """
    try:
        # O_NONBLOCK matters to a FIFO only, whose open would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, 'rb') as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise EngineSchemaMismatchError(
                    'file', expected='a regular file', found=f'{stat.filemode(info.st_mode)} {path}', remedy=REBUILD
                )
            _check_ownership(path, info)
            if info.st_size > limit:
                raise EngineSchemaMismatchError(
                    'file', expected=f'at most {limit} bytes', found=f'{info.st_size} bytes in {path}', remedy=REBUILD
                )
            require_memory(path, info.st_size, remedy='Free memory, or use a smaller engine.')
            # No more: it may have become longer since, up to whatever size.
            return file.read(info.st_size)
    except ModelBundleError as error:
        raise EngineDeserializeError(error.message, remedy=error.remedy) from error
    except (OSError, ValueError) as error:
        raise EngineSchemaMismatchError('file', expected='a regular file', found=str(error), remedy=REBUILD) from error
