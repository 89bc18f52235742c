"""What this host is, read without touching a vendor library."""

from __future__ import annotations

import platform
import socket
from importlib import metadata
from pathlib import Path

import gps_denied_c7

__all__ = ['describe_gpu', 'hardware_id', 'package_versions']

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
