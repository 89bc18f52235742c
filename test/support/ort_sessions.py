"""Load models with OnnxTrtEpRuntime as the tests of its parts do, on the real library or on the stand-in for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.errors import (
    C7Error,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    RuntimeUnavailableError,
)
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.gpu.cuda import GpuFacts
from gps_denied_c7.runtimes.ort.runtime import OnnxTrtEpRuntime
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineHandle, ProviderSet
from support.fake_onnxruntime import TENSORRT, FakeOnnxRuntimeThisMachineHasNoCuda

FakeGpu = Callable[..., FakeOnnxRuntimeThisMachineHasNoCuda]

BUILD = BuildConfig(allow_build=True)
NO_BUILD = BuildConfig()
ONE_ENGINE = {'placement': {TENSORRT: 2}}
NAMES = {'left': 'input.1', 'right': 'input.2', 'total': '37', 'ratio': '38'}
TENSORRT_OPTIONS = {
    'trt_engine_cache_enable',
    'trt_engine_cache_path',
    'trt_max_workspace_size',
    'trt_fp16_enable',
}


def load(
    config: C7InferenceConfig,
    model: ModelBundle,
    providers: ProviderSet = ProviderSet.ANY,
    build: BuildConfig = BUILD,
    gate: EngineGate | None = None,
) -> tuple[OnnxTrtEpRuntime, EngineHandle]:
    runtime = OnnxTrtEpRuntime(config, providers=providers, gate=gate)
    return runtime, runtime.deserialize_engine(runtime.compile_engine(model, build))


def refusal(config: C7InferenceConfig, model: ModelBundle, *arguments: object, **options: object) -> C7Error:
    with pytest.raises((EngineDeserializeError, EngineSchemaMismatchError, RuntimeUnavailableError)) as caught:
        load(config, model, *arguments, **options)
    assert caught.value.remedy
    return caught.value


@dataclass(frozen=True)
class NamedGpu:
    """A GPU that says what it is, and offers no memory: tensors are copied by ONNX Runtime."""

    facts: GpuFacts = GpuFacts('Orin', 87, '12.2', '11.8')

    def gpu_facts(self) -> GpuFacts:
        return self.facts


def cache_of(config: C7InferenceConfig, model: ModelBundle) -> Path:
    return config.ort_trt_cache_dir / model.artefacts[0].sha256


def providers_asked(fake: FakeOnnxRuntimeThisMachineHasNoCuda) -> list[list[str]]:
    return [attempt['providers'] for attempt in fake.attempts]
