"""What the tests of ONNX Runtime's strategy share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gps_denied_c7.runtimes.gpu import tensorrt_library
from gps_denied_c7.runtimes.ort import runtime as ort_runtime
from support.fake_tensorrt import FakeCudaThisMachineHasNone, FakeTensorrtThisMachineCannotRun
from support.ort_sessions import (
    FakeGpu,
    NamedGpu,
)


@pytest.fixture
def named_gpu(fake_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    """Give the stand-in a GPU and a TensorRT with names, so that its engine cache can be told apart."""
    monkeypatch.setattr(ort_runtime, 'open_cuda', lambda label: NamedGpu())
    monkeypatch.setattr(ort_runtime, 'linked_tensorrt', lambda ort: '8.6.2')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    return fake_gpu


@pytest.fixture
def own_builder(named_gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeTensorrtThisMachineCannotRun:
    """Have Python's TensorRT be the one that ONNX Runtime loads."""
    fake = FakeTensorrtThisMachineCannotRun(FakeCudaThisMachineHasNone(), '8.6.2')
    monkeypatch.setitem(sys.modules, 'tensorrt', fake)
    monkeypatch.setattr(tensorrt_library, '_logger', None)
    return fake
