"""A mount that never answers: FUSE without a program behind it, where this user may mount one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_MNT_DETACH = 2


@contextlib.contextmanager
def stalled_mount(directory: Path) -> Iterator[Path]:
    """
    Mount over ``directory``; every look below it hangs until this ends, then fails.

    Skips the test where there is no FUSE, or no permission to mount.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    directory.mkdir(exist_ok=True)
    try:
        connection = os.open('/dev/fuse', os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f'no FUSE here: {error}')
    options = f'fd={connection},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}'
    if libc.mount(b'stalled', os.fsencode(directory), b'fuse', 0, options.encode()):
        os.close(connection)
        pytest.skip(f'a FUSE file system cannot be mounted: {os.strerror(ctypes.get_errno())}')
    try:
        yield directory
    finally:
        # With its program gone, the kernel ends every call that waits for it.
        os.close(connection)
        while libc.umount2(os.fsencode(directory), _MNT_DETACH):
            assert ctypes.get_errno() != 22, 'it was mounted'
            time.sleep(0.01)
