"""What the runtime tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import RuntimeUnavailableError
from gps_denied_c7.runtimes.ort import providers as ort_providers
from gps_denied_c7.runtimes.ort import runtime as ort_runtime
from support.fake_onnxruntime import FakeOnnxRuntimeThisMachineHasNoCuda, GpuBehaviour


@pytest.fixture
def config(tmp_path: Path) -> C7InferenceConfig:
    return C7InferenceConfig(
        isolation='none',
        engine_cache_dir=tmp_path / 'engine_cache', ort_trt_cache_dir=tmp_path / 'ort_trt_cache', cpu_threads=1
    )


@pytest.fixture
def request_arrays() -> dict[str, NDArray]:
    return {
        'left': np.arange(12, dtype=np.float32).reshape(1, 3, 4),
        'right': np.full((1, 3, 4), 2.0, np.float32),
    }


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeOnnxRuntimeThisMachineHasNoCuda]:
    """Put a stand-in with GPU providers in the place of onnxruntime; of the GPU itself nothing can be learned."""

    def no_cuda(label: str) -> None:
        raise RuntimeUnavailableError(label, 'this test has no GPU.')

    monkeypatch.setattr(ort_runtime, 'open_cuda', no_cuda)
    monkeypatch.setattr(ort_providers, 'require_gpu', lambda label: None)

    def install(**behaviour: object) -> FakeOnnxRuntimeThisMachineHasNoCuda:
        fake = FakeOnnxRuntimeThisMachineHasNoCuda(GpuBehaviour(**behaviour))
        monkeypatch.setitem(sys.modules, 'onnxruntime', fake)
        return fake

    return install
