"""End a process with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

__all__ = ['die_with_parent']

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """
    Have the kernel end this process with the thread that started it, also while it hangs in a library.

    :param parent: process id of the one that started it, to notice that it is dead already; None where a pipe tells.
    """
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
