"""How much memory this process can still take, by the machine and by its memory cgroups; asked before a large read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from gps_denied_c7.errors import ModelBundleError

__all__ = ['available_memory', 'require_memory']

_SMALL_BYTES = 8 << 20
_AVAILABLE = re.compile(r'^MemAvailable:\s*(\d+) kB$', re.MULTILINE)
# Names of what a group may have and has, and of the file cache that the kernel reclaims first: cgroup v2, then v1.
_FILES = {
    'cgroup2': ('memory.max', 'memory.current', ('inactive_file', 'active_file')),
    'cgroup': ('memory.limit_in_bytes', 'memory.usage_in_bytes', ('total_inactive_file', 'total_active_file')),
}


def require_memory(what: object, size: int, *, remedy: str, copies: int = 1) -> None:
    """
    Refuse a read that would not fit, before the kernel ends a process for it.

    :param what: the file, for the message.
    :param size: its bytes.
    :param copies: how often they lie in memory at once.
    :raises ModelBundleError: with the numbers.
    """
    needed = size * copies
    if needed <= _SMALL_BYTES:
        return
    left, where = available_memory()
    if left is not None and needed > left:
        times = f', {copies} times at once,' if copies > 1 else ''
        raise ModelBundleError(
            f'{what}: not enough memory: {size} bytes{times} are needed, {left} are left in {where}.', remedy=remedy
        ) from MemoryError(f'{needed} bytes')  # which may pass: lasting errors wait for a file


def available_memory(root: Path = Path('/')) -> tuple[int | None, str]:
    """
    Return the bytes that this process can still take, and what sets the limit; None if the kernel does not report it.

    File cache counts as free, in the machine (``MemAvailable``) and in each memory cgroup, v1 and v2, up to the root.

    :param root: where ``proc`` and ``sys`` lie.
    """
    found = _AVAILABLE.search(_text(root / 'proc/meminfo'))
    left = [(int(found[1]) << 10, 'this machine')] if found else []
    left += [(room, f'the memory cgroup {group}') for group, room in _groups(root)]
    return min(left, default=(None, ''))


def _groups(root: Path) -> Iterator[tuple[str, int]]:
    own = _own_groups(root)
    for line in _text(root / 'proc/self/mountinfo').splitlines():
        mount, _, source = line.partition(' - ')
        kind, _, options = (source.split(' ') + ['', '', ''])[:3]
        if kind not in _FILES or (kind == 'cgroup' and 'memory' not in options.split(',')) or kind not in own:
            continue
        inner, point = mount.split(' ')[3:5]
        # A container sees the files of its own group at the mount point, with or without a namespace of its own.
        group = PurePosixPath(own[kind])
        below = group.relative_to(inner) if group.is_relative_to(inner) else PurePosixPath()
        for level in (below, *below.parents):
            room = _room(root / point.lstrip('/') / level, *_FILES[kind])
            if room is not None:
                yield f'/{level}'.removesuffix('/.') or '/', room


def _own_groups(root: Path) -> dict[str, str]:
    """Return the path of this process's group by the kind of its hierarchy."""
    groups = {}
    for line in _text(root / 'proc/self/cgroup').splitlines():
        number, controllers, path = (line.split(':', 2) + ['', ''])[:3]
        if number == '0' and not controllers:
            groups['cgroup2'] = path
        elif 'memory' in controllers.split(','):
            groups['cgroup'] = path
    return groups


def _room(group: Path, limit_name: str, usage_name: str, cache_names: tuple[str, ...]) -> int | None:
    limit, usage = _text(group / limit_name).strip(), _text(group / usage_name).strip()
    # 'max' means no limit.
    if not limit.isdecimal() or not usage.isdecimal():
        return None
    statistics = dict(line.split(' ', 1) for line in _text(group / 'memory.stat').splitlines() if ' ' in line)
    cache = sum(int(statistics.get(name, 0)) for name in cache_names)
    return max(0, int(limit) - max(0, int(usage) - cache))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ''
