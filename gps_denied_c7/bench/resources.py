"""Processor time and memory of a process and everything below it, from /proc."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ['cpu_seconds', 'descendants', 'memory_mb']

_TICKS = os.sysconf('SC_CLK_TCK')
_PROC = Path('/proc')


def descendants(pid: int) -> list[int]:
    """Return a process and all its children, theirs included."""
    found = [pid]
    for own in found:
        for children in (_PROC / str(own) / 'task').glob('*/children'):
            # A thread or process that has ended meanwhile has no children.
            with contextlib.suppress(OSError):
                found += [int(child) for child in children.read_text().split()]
    return found


def cpu_seconds(pid: int) -> float:
    """
    Return the processor seconds of a process and its descendants, user and system.

    Of those that have ended, what their parent has waited for.
    """
    total = 0
    for one in descendants(pid):
        with contextlib.suppress(OSError):
            fields = (_PROC / str(one) / 'stat').read_text().rpartition(')')[2].split()
            # Its own, and of children that are gone.
            total += sum(map(int, fields[11:15]))
    return total / _TICKS


def memory_mb(pid: int) -> float:
    """Return the proportional set size of a process and its descendants, shared pages counted once in all."""
    total = 0
    for one in descendants(pid):
        with contextlib.suppress(OSError):
            for line in (_PROC / str(one) / 'smaps_rollup').read_text().splitlines():
                if line.startswith('Pss:'):
                    total += int(line.split()[1])
    return total / 1024
