"""What engine files must have been built for to run on this host."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from importlib import metadata

from gps_denied_c7.engines.manifest import HostProfile
from gps_denied_c7.errors import RuntimeUnavailableError
from gps_denied_c7.runtimes.gpu.cuda import Cuda, open_cuda
from gps_denied_c7.runtimes.gpu.tensorrt_library import import_tensorrt

__all__ = ['local_host_profile', 'tensorrt_version']

_LABEL = 'tensorrt'
_DISTRIBUTIONS = ('tensorrt', 'tensorrt-cu13', 'tensorrt-cu12', 'tensorrt-cu11')
_NUMBERS = re.compile(r'\d+(?:\.\d+){2,3}')


def local_host_profile(cuda: Cuda | None = None) -> HostProfile:
    """
    Return this host's profile; asks CUDA for the GPU, and the package's metadata for TensorRT's version.

    :param cuda: access to the GPU where the caller has it already.
    :raises RuntimeUnavailableError: no GPU, or no TensorRT.
    """
    gpu = (cuda or open_cuda(_LABEL)).gpu_facts()
    return HostProfile(
        gpu=gpu.name,
        sm=gpu.sm,
        tensorrt=tensorrt_version(),
        platform=f'{platform.system().lower()}-{platform.machine()}',
    )


def tensorrt_version() -> str:
    """
    Return the version of the TensorRT that Python would import, three or four numbers.

    :raises RuntimeUnavailableError: none is installed.
    """
    versions = [str(module.__version__)] if (module := sys.modules.get('tensorrt')) else []
    for name in _DISTRIBUTIONS:
        try:
            versions.append(metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    if not versions and importlib.util.find_spec('tensorrt'):
        # Unpacked or vendored without its metadata, the module itself must tell.
        versions = [str(import_tensorrt(_LABEL).__version__)]
    for version in versions:
        if found := _NUMBERS.match(version):
            return found[0]
    raise RuntimeUnavailableError(
        _LABEL, 'TensorRT for Python is not installed.', remedy='pip install -r requirements/gpu.txt'
    )
