"""What engine files must have been built for to run on this host: its GPU, its platform, its versions."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

from gps_denied_c7.engines.manifest import HostProfile
from gps_denied_c7.errors import EngineDeserializeError, RuntimeUnavailableError
from gps_denied_c7.runtimes.gpu.cuda import Cuda, open_cuda
from gps_denied_c7.runtimes.gpu.tensorrt_library import import_tensorrt

__all__ = ['driver_version', 'linked_tensorrt', 'local_host_profile', 'platform_name', 'tensorrt_version']

_LABEL = 'tensorrt'
_DISTRIBUTIONS = ('tensorrt', 'tensorrt-cu13', 'tensorrt-cu12', 'tensorrt-cu11')
_NUMBERS = re.compile(r'\d+(?:\.\d+){2,3}')
_PROVIDER_LIBRARY = 'libonnxruntime_providers_tensorrt.so'
_NEEDED = re.compile(rb'\0(libnvinfer\.so\.\d+)\0')


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
        platform=platform_name(),
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


def linked_tensorrt(onnxruntime: ModuleType) -> str:
    """
    Return the version of the TensorRT library that this ONNX Runtime loads, as ``8.6.0``.

    Python's ``tensorrt`` may be another one, or absent. The provider's library names the one it needs, and
    that one is asked; this loads it into the process, as a session would a moment later.

    :raises EngineDeserializeError: there is no such provider, or its TensorRT does not load.
    """
    provider = Path(getattr(onnxruntime, '__file__', None) or '').parent / 'capi' / _PROVIDER_LIBRARY
    try:
        needed = _NEEDED.search(provider.read_bytes())
    except OSError as error:
        raise EngineDeserializeError(f'{provider}: {error.strerror}.') from error
    if needed is None:
        raise EngineDeserializeError(f'{provider} names no TensorRT library.')
    name = needed[1].decode()
    try:
        number = int(ctypes.CDLL(name).getInferLibVersion())
    except (OSError, AttributeError) as error:
        raise EngineDeserializeError(f'{name}: {error}.') from error
    # 8600 up to TensorRT 9, 100300 from 10 on.
    major = 10000 if number >= 100000 else 1000
    return f'{number // major}.{number % major // 100}.{number % 100}'


def driver_version(proc: Path = Path('/proc')) -> str:
    """Return the version of the NVIDIA driver's kernel module, ``unknown`` where the kernel does not say."""
    try:
        text = (proc / 'driver/nvidia/version').read_text(errors='replace')
    except OSError:
        return 'unknown'
    found = re.search(r'\b\d+\.\d+(?:\.\d+)?\b', text)
    return found[0] if found else 'unknown'


def platform_name() -> str:
    """Return as ``linux-x86_64``."""
    return f'{platform.system().lower()}-{platform.machine()}'
