"""The versions of this host that decide whether an engine may be loaded."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import ModuleType

import pytest

from gps_denied_c7.errors import EngineDeserializeError
from gps_denied_c7.runtimes.host_profile import driver_version, linked_tensorrt, platform_name


@pytest.mark.parametrize(
    ('text', 'version'),
    [
        ('NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n', '535.183.01'),
        ('NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build\n', '580.65'),
        ('', 'unknown'),
        (None, 'unknown'),
    ],
)
def test_driver_version_is_the_kernels(tmp_path: Path, text: str | None, version: str) -> None:
    if text is not None:
        (tmp_path / 'driver/nvidia').mkdir(parents=True)
        (tmp_path / 'driver/nvidia/version').write_text(text)
    assert driver_version(tmp_path) == version


class Library:
    def __init__(self, number: int) -> None:
        self._number = number

    def getInferLibVersion(self) -> int:
        return self._number


def onnxruntime_with(directory: Path, provider: bytes | None) -> ModuleType:
    module = ModuleType('onnxruntime')
    module.__file__ = str(directory / '__init__.py')
    (directory / 'capi').mkdir()
    if provider is not None:
        (directory / 'capi' / 'libonnxruntime_providers_tensorrt.so').write_bytes(provider)
    return module


@pytest.mark.parametrize(
    ('soname', 'number', 'version'),
    [('libnvinfer.so.8', 8502, '8.5.2'), ('libnvinfer.so.8', 8600, '8.6.0'), ('libnvinfer.so.10', 101304, '10.13.4')],
)
def test_tensorrt_version_is_that_of_the_library_which_onnxruntime_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soname: str, number: int, version: str
) -> None:
    libraries = {soname: Library(number)}
    monkeypatch.setattr(ctypes, 'CDLL', libraries.__getitem__)
    module = onnxruntime_with(tmp_path, b'\x7fELF\0libcudart.so.12\0' + soname.encode() + b'\0libm.so.6\0')
    assert linked_tensorrt(module) == version


@pytest.mark.parametrize('provider', [None, b'', b'\0libnvinfer.so.99\0'])
def test_tensorrt_version_that_cannot_be_had_is_an_error(tmp_path: Path, provider: bytes | None) -> None:
    with pytest.raises(EngineDeserializeError):
        linked_tensorrt(onnxruntime_with(tmp_path, provider))


def test_platform_is_named_as_in_manifests() -> None:
    assert platform_name() == f'linux-{os.uname().machine}'
