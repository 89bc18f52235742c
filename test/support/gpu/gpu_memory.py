"""How much memory of the GPU is taken, and that it comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence

__all__ = ['free_bytes', 'process_mib', 'returned_mib', 'settled_bytes']

_LIMIT_S = 5.0
_LIMIT_MIB = 64.0


def _memory() -> tuple[int, int]:
    import pynvml

    pynvml.nvmlInit()
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
        return int(memory.used), int(memory.free)
    finally:
        pynvml.nvmlShutdown()


def settled_bytes() -> int:
    """Return the bytes of the first GPU that all processes together have taken, once nobody gives any back."""
    last, since = _memory()[0], time.monotonic()
    while time.monotonic() - since < 1.0:
        time.sleep(0.1)
        if (now := _memory()[0]) != last:
            last, since = now, time.monotonic()
    return last


def free_bytes() -> int:
    """Return the bytes of the first GPU that nobody has taken."""
    return _memory()[1]


def process_mib(pids: Sequence[int]) -> list[int]:
    """Return the MiB of the first GPU that each of these processes takes, none for those that take nothing."""
    import pynvml

    pynvml.nvmlInit()
    try:
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    finally:
        pynvml.nvmlShutdown()
    return [process.usedGpuMemory >> 20 for process in processes if process.pid in pids]


def returned_mib(before: int) -> float:
    """
    Return by how many MiB more is taken than ``before``, once that is little enough or five seconds have passed.

    :param before: from :func:`settled_bytes`.
    """
    deadline = time.monotonic() + _LIMIT_S
    while (more := (_memory()[0] - before) / 2**20) > _LIMIT_MIB and time.monotonic() < deadline:
        time.sleep(0.1)
    return round(more, 1)
