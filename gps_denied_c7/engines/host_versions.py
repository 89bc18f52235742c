"""Versions on this host that engine files depend on."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path
from types import ModuleType

from gps_denied_c7.errors import EngineDeserializeError

__all__ = ['driver_version', 'linked_tensorrt', 'platform_name']

_PROVIDER_LIBRARY = 'libonnxruntime_providers_tensorrt.so'
_NEEDED = re.compile(rb'\0(libnvinfer\.so\.\d+)\0')


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
