"""The shared memory of Fast DDS on this host: what this process has, what is missing, what killed processes left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gps_denied_c7.ros.fastdds import (
    BUILTIN_TRANSPORTS,
    PROFILE_NAME,
    named_profile,
    profile_path,
    profile_variable,
    segment_size,
    uses_fast_dds,
)

__all__ = [
    'HD_IMAGE_BYTES', 'MORE_SHM', 'SEGMENT_OVERHEAD', 'HostTransport', 'SweptSegments', 'sweep_segments',
    'transport_warnings',
]  # fmt: skip

HD_IMAGE_BYTES = 1920 * 1080 * 3
_FRAMES_IN_FLIGHT = 4
_SEGMENT = re.compile(r'fast(?:rtps|dds)_[0-9a-f]{16}')
# So long after its lock file a process has certainly locked it.
_SETTLED_S = 10.0

SEGMENT_OVERHEAD = 1.06
"""What a segment takes of /dev/shm for each byte asked for; 1.047 measured with Fast DDS 2.14."""


@dataclass(frozen=True, slots=True)
class HostTransport:
    """
    Hold what this host and process have for carrying images.

    :param shm_free_bytes: free space in /dev/shm, None where there is no /dev/shm.
    :param segment_bytes: largest shared-memory segment that Fast DDS made for this process, 0 where it made none.
    :param rmem_max_bytes: net.core.rmem_max, the limit on a socket's receive buffer; None where unknown.
    """

    shm_free_bytes: int | None
    segment_bytes: int
    rmem_max_bytes: int | None

    @classmethod
    def read(cls) -> HostTransport:
        """Look at this process, which must have a DDS participant by now, and its host."""
        try:
            shm = os.statvfs('/dev/shm')
            free: int | None = shm.f_bavail * shm.f_frsize
        except OSError:
            free = None
        try:
            rmem: int | None = int(Path('/proc/sys/net/core/rmem_max').read_text())
        except (OSError, ValueError):
            rmem = None
        return cls(free, max(_own_segments(), default=0), rmem)


def _own_segments() -> list[int]:
    """Return the sizes of this process's segments: it holds open the lock files of its own, and of no others."""
    sizes = []
    for descriptor in Path('/proc/self/fd').glob('*'):
        with contextlib.suppress(OSError):
            # A descriptor or segment that was closed meanwhile, as the one of this very listing, does not count.
            if lock := re.fullmatch(rf'(/dev/shm/{_SEGMENT.pattern})_el', os.readlink(descriptor)):
                sizes.append(os.stat(lock[1]).st_size)
    return sizes


@dataclass(frozen=True, slots=True)
class SweptSegments:
    """
    Count the shared memory that Fast DDS left behind.

    :param removed: segments whose processes had been killed, and which are gone now.
    :param removed_bytes: what they had taken of /dev/shm.
    :param refused: segments of the kind that another user owns.
    """

    removed: int = 0
    removed_bytes: int = 0
    refused: int = 0

    def __str__(self) -> str:
        """Say what was done, and what only another user can do; empty if there was nothing to do."""
        parts = []
        if self.removed:
            parts.append(
                f'Removed {self.removed} shared-memory segments of Fast DDS ({_mb(self.removed_bytes)}), whose '
                f'processes had been killed.'
            )
        if self.refused:
            parts.append(
                f'{self.refused} more belong to another user; free their memory with: sudo fastdds shm clean'
            )
        return ' '.join(parts)


def sweep_segments(folder: Path = Path('/dev/shm')) -> SweptSegments:
    """
    Remove the segments that Fast DDS has left behind where processes were killed.

    A killed process cannot do it, and each segment holds 70 MB of memory until another process does: a node that is
    restarted repeatedly would fill the host's. A living process holds a lock (flock) on the file beside its
    segment, in other containers too; the kernel drops it with the process. Sound with Fast DDS 2.14 and 3.2.
    """
    removed = removed_bytes = refused = 0
    for lock in folder.glob('fast*_el'):
        segment = lock.with_name(lock.name.removesuffix('_el'))
        if not _SEGMENT.fullmatch(segment.name):
            continue
        try:
            # Any user may have put anything there.
            with open(os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), 'rb') as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or time.time() - found.st_mtime < _SETTLED_S:
                    continue
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size = segment.stat().st_size if segment.exists() else 0
                segment.unlink(missing_ok=True)
                lock.unlink()
        except PermissionError:
            refused += 1
        except OSError:
            # It is in use, or another process sweeps as well.
            continue
        else:
            removed, removed_bytes = removed + 1, removed_bytes + size
    return SweptSegments(removed, removed_bytes, refused)


def transport_warnings(
    environ: Mapping[str, str], *, image_bytes: int = HD_IMAGE_BYTES, host: HostTransport | None = None
) -> tuple[str, ...]:
    """
    Say why images would be lost before they reach this process, each with its remedy; empty where all is well.

    :param environ: the environment in which the process made its DDS participant.
    :param image_bytes: size of the largest image expected.
    :param host: what to judge, read from this process where None; it must have its DDS participant by then.
    """
    if not uses_fast_dds(environ) or environ.get(BUILTIN_TRANSPORTS):
        return ()
    host = HostTransport.read() if host is None else host
    needed = _FRAMES_IN_FLIGHT * image_bytes
    if host.segment_bytes >= needed:
        return _room_for_others(host)
    warnings = [_why_no_segment(environ, host, needed)]
    if host.rmem_max_bytes is not None and host.rmem_max_bytes < needed:
        warnings.append(
            f'Images that come over UDP are lost as well: net.core.rmem_max is {host.rmem_max_bytes}. Raise it: '
            f'sudo sysctl -w net.core.rmem_max={needed} net.core.rmem_default={needed}'
        )
    return tuple(warnings)


def _room_for_others(host: HostTransport) -> tuple[str, ...]:
    if host.shm_free_bytes is None or host.shm_free_bytes >= host.segment_bytes:
        return ()
    return (
        f'/dev/shm has {_mb(host.shm_free_bytes)} left, and the next process that uses the DDS profile needs '
        f'{_mb(host.segment_bytes)}; it would lose large images. {MORE_SHM}',
    )


MORE_SHM = (
    'Give the container more of it (docker run --shm-size=1g), or remove the segments of killed processes '
    '(fastdds shm clean).'
)
"""What to do about too little room in /dev/shm."""


def _why_no_segment(environ: Mapping[str, str], host: HostTransport, needed: int) -> str:
    what = f'Large images will be lost: {_FRAMES_IN_FLIGHT} of them take {_mb(needed)},'
    variable = named_profile(environ)
    if not variable:
        shipped = profile_path()
        return (
            f'{what} the default shared memory of Fast DDS holds {_mb(host.segment_bytes or 1 << 19)}. '
            f'Start this process with {profile_variable(environ)}={shipped or PROFILE_NAME}'
        )
    profile = Path(environ[variable])
    asked = segment_size(profile)
    if not (profile.is_file() and os.access(profile, os.R_OK)):
        return (
            f'{what} and {variable} names {profile}, which cannot be read. Correct it, or unset it: the node then '
            'takes the shipped profile.'
        )
    if asked < needed:
        state = f'gives {_mb(asked)} of shared memory' if asked else 'has no segment_size for shared memory'
        return f'{what} and {variable} names {profile}, which {state}. Set its segment_size to {needed}.'
    if host.shm_free_bytes is None or host.shm_free_bytes < asked * SEGMENT_OVERHEAD:
        free = host.shm_free_bytes
        room = 'there is no /dev/shm' if free is None else f'/dev/shm has {_mb(free)} left'
        return f'{what} the DDS profile asks for {_mb(asked)}, and {room}. {MORE_SHM}'
    return (
        f'{what} and this process did not get the shared memory that {profile} asks for. Set '
        f'{profile_variable(environ)} before the process starts, and look for RTPS_TRANSPORT_SHM errors in the output '
        'of the process.'
    )


def _mb(size: float) -> str:
    return f'{size / 1e6:.1f} MB'
