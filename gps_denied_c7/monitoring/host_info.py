"""What this host is, read without touching a vendor library."""

from __future__ import annotations

import os
import platform
import socket
from importlib import metadata
from pathlib import Path

import gps_denied_c7

__all__ = ['describe_gpu', 'hardware_id', 'package_versions', 'usable_cores']

_PACKAGES = ('onnxruntime', 'onnxruntime-gpu', 'tensorrt', 'torch', 'numpy', 'opencv-python-headless')


def describe_gpu(proc: Path = Path('/proc')) -> str:
    """
    Return the name of the GPU, or ``no GPU``.

    The NVIDIA driver lists its devices below ``/proc/driver/nvidia/gpus`` and a Jetson names its board
    in the device tree; both are plain files, so that a hung driver library cannot hang the reader.
    """
    for information in sorted(proc.glob('driver/nvidia/gpus/*/information')):
        for line in information.read_text(errors='replace').splitlines():
            if line.startswith('Model:'):
                return line.partition(':')[2].strip()
    board = proc / 'device-tree' / 'model'
    if board.is_file():
        name = board.read_bytes().rstrip(b'\0').decode(errors='replace')
        if 'jetson' in name.lower() or 'orin' in name.lower():
            return name
    return 'no GPU'


def hardware_id() -> str:
    """Return host name and GPU, as diagnostics want them."""
    return f'{socket.gethostname()} ({describe_gpu()})'


def package_versions() -> dict[str, str]:
    """Return the versions of this package, Python and every installed inference package."""
    versions = {'gps_denied_c7': gps_denied_c7.__version__, 'python': platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def usable_cores(proc: Path = Path('/proc'), cgroups: Path = Path('/sys/fs/cgroup')) -> float:
    """
    Return how many cores this process may use at a time: those of its affinity, and no more than its control groups
    allow (``cpu.max`` of version 2, ``cpu.cfs_quota_us`` of version 1), which may be part of a core.
    """
    cores = float(len(os.sched_getaffinity(0)))
    try:
        lines = (proc / 'self' / 'cgroup').read_text().splitlines()
    except OSError:
        return cores
    for line in lines:
        _, controllers, path = line.split(':', 2)
        if controllers and 'cpu' not in controllers.split(','):
            continue
        # A container may show its own group as the root of all: every existing level is read.
        group = cgroups / ('cpu' if controllers else '') / path.lstrip('/')
        for level in (group, *group.parents):
            if not level.is_relative_to(cgroups):
                break
            cores = min(cores, _quota(level))
    return cores


def _quota(group: Path) -> float:
    """Return the cores that one control group allows, infinity where it has no limit."""
    for names in (('cpu.max',), ('cpu.cfs_quota_us', 'cpu.cfs_period_us')):
        try:
            quota, period = ' '.join((group / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            return int(quota) / int(period)
    return float('inf')
