"""A memory cgroup of a size of one's own, of either version, for what is started within."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ['MemoryGroup', 'NoMemoryGroupError', 'memory_group']

_ROOT = Path('/sys/fs/cgroup')
_PROCESSES = 'cgroup.procs'


class NoMemoryGroupError(Exception):
    """No memory cgroup can be made here; says why, and what can be done."""


class MemoryGroup:
    """
    One memory cgroup.

    :param path: its directory.
    :param outside: directory of the one in which this process was before.
    """

    def __init__(self, path: Path, outside: Path, limit_bytes: int) -> None:
        self.path = path
        self._outside = outside
        self._is_v1 = (path / 'memory.limit_in_bytes').exists()
        if self._is_v1:
            self._write('memory.limit_in_bytes', limit_bytes)
            # There only where the kernel counts swap.
            with contextlib.suppress(OSError):
                self._write('memory.memsw.limit_in_bytes', limit_bytes)
        else:
            self._write('memory.max', limit_bytes)
            with contextlib.suppress(OSError):
                self._write('memory.swap.max', 0)

    def add(self, pid: int) -> None:
        """Have a process live in the group; what it has allocated before stays counted where it was."""
        self._write(_PROCESSES, pid)

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have what this process starts meanwhile live in the group, with all that it starts later."""
        self.add(os.getpid())
        try:
            yield
        finally:
            (self._outside / _PROCESSES).write_text(str(os.getpid()))

    def processes(self) -> list[int]:
        """Return the ids of the processes in the group."""
        return [int(word) for word in (self.path / _PROCESSES).read_text().split()]

    @property
    def peak_bytes(self) -> int:
        """Most memory that was in use, cached files included."""
        names = ('memory.max_usage_in_bytes', 'memory.peak', 'memory.current')
        return int(next(self.path / name for name in names if (self.path / name).exists()).read_text())

    @property
    def kills(self) -> int:
        """Processes of the group that the kernel has killed since memory ran out."""
        text = (self.path / ('memory.oom_control' if self._is_v1 else 'memory.events')).read_text()
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith('oom_kill ')), 0)

    def close(self) -> None:
        """Kill what is left in the group and remove it."""
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.1)


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """
    Make a memory cgroup, and remove it with all that still runs in it.

    :raises NoMemoryGroupError: that is not allowed here, or the kernel has no such thing.
    """
    group = _made(limit_bytes)
    try:
        yield group
    finally:
        group.close()


def _made(limit_bytes: int) -> MemoryGroup:
    problems = []
    for outside, places in _places():
        for place in places:
            path = place / f'c7_test_{os.getpid()}'
            try:
                path.mkdir()
            except OSError as error:
                problems.append(f'{path}: {error.strerror}')
                continue
            try:
                if not any((path / name).exists() for name in ('memory.limit_in_bytes', 'memory.max')):
                    (place / 'cgroup.subtree_control').write_text('+memory')
                group = MemoryGroup(path, outside, limit_bytes)
                with group.entered():
                    return group
            except OSError as error:
                problems.append(f'{path}: {error.strerror}')
                path.rmdir()
    raise NoMemoryGroupError(
        f'no memory cgroup can be made here ({"; ".join(problems) or "the kernel has none"}). Run it as root, in a '
        'container with --privileged, or within "systemd-run --user --scope -p Delegate=yes".'
    )


def _places() -> Iterator[tuple[Path, list[Path]]]:
    """Yield the group of this process in each hierarchy that may count memory, and where another can be made."""
    for line in Path('/proc/self/cgroup').read_text().splitlines():
        _, controllers, own = line.split(':', 2)
        if controllers and 'memory' not in controllers.split(','):
            continue
        root = _ROOT / 'memory' if controllers else _ROOT
        # In a container, the path may be of the host's.
        outside = root / own.lstrip('/') if (root / own.lstrip('/') / _PROCESSES).exists() else root
        if (outside / _PROCESSES).exists():
            yield outside, [outside, *(parent for parent in outside.parents if parent.is_relative_to(root))]
