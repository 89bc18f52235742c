"""Compare the host that an engine was built for with this host, as far as both are known."""

from __future__ import annotations

import dataclasses

from gps_denied_c7.engines.manifest import HostProfile, same_tensorrt
from gps_denied_c7.engines.ort_store import BuiltFor
from gps_denied_c7.errors import RuntimeUnavailableError
from gps_denied_c7.monitoring.host_info import package_versions
from gps_denied_c7.runtimes.host_profile import driver_version, local_host_profile, platform_name, tensorrt_version

__all__ = ['known_host', 'mismatches']


def known_host() -> tuple[HostProfile, tuple[str, ...]]:
    """
    Return what is known of this host, its parts empty (``sm`` 0) where they are not, and why they are not.

    It works without a GPU and without TensorRT; where there is a GPU, CUDA provides its name.
    """
    try:
        return local_host_profile(), ()
    except RuntimeUnavailableError as error:
        reasons = [error.message]
    try:
        tensorrt = tensorrt_version()
    except RuntimeUnavailableError as error:
        tensorrt = ''
        reasons += [error.message] if error.message not in reasons else []
    return HostProfile('', 0, tensorrt, platform_name()), tuple(reasons)


def mismatches(built: HostProfile | BuiltFor, host: HostProfile) -> list[tuple[str, object, object]]:
    """
    Return the differences: name, expected here, found there. What is unknown on either side is not compared.

    :param built: an engine's host, or what ONNX Runtime's engines were built for, by and from.
    """
    here: dict[str, object] = dataclasses.asdict(host)
    if isinstance(built, BuiltFor):
        versions = package_versions()
        # ONNX Runtime may link another TensorRT than Python's: only its own version counts.
        del here['tensorrt']
        here['driver'] = driver_version()
        here['onnxruntime'] = versions.get('onnxruntime-gpu') or versions.get('onnxruntime')
    pairs = ((name, expected, getattr(built, name)) for name, expected in here.items())
    return [
        (name, expected, found)
        for name, expected, found in pairs
        if _is_known(expected) and _is_known(found) and not _same(name, expected, found)
    ]


def _is_known(value: object) -> bool:
    return value not in ('', 0, None, 'unknown')


def _same(name: str, expected: object, found: object) -> bool:
    return same_tensorrt(str(expected), str(found)) if name == 'tensorrt' else expected == found
