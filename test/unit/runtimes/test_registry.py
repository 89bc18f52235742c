"""R-5: the factory resolves a label when asked, and says which strategy is absent and why."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import sys
from pathlib import Path

import pytest

from gps_denied_c7.config import RUNTIME_LABELS, C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.errors import RuntimeUnavailableError
from gps_denied_c7.runtimes.gpu import cuda
from gps_denied_c7.runtimes.ort.providers import gpu_remedy
from gps_denied_c7.runtimes.protocol import BuildConfig, InferenceRuntime, ProviderSet
from gps_denied_c7.runtimes.registry import create_runtime
from support.engine_files import HOST, write_engine
from support.onnx_models import bare_bundle
from support.source_tree import REPOSITORY

PACKAGES = {
    'tensorrt': ('tensorrt', 'requirements/gpu.txt'),
    'onnx_trt_ep': ('onnxruntime', 'requirements/runtime.txt'),
    'pytorch_fp16': ('torch', 'requirements/gpu.txt'),
}


def refusal(label: str, config: C7InferenceConfig) -> RuntimeUnavailableError:
    with pytest.raises(RuntimeUnavailableError) as caught:
        create_runtime(label, config)
    assert caught.value.label == label
    assert caught.value.remedy
    return caught.value


def test_r5_label_gives_its_runtime(config: C7InferenceConfig) -> None:
    runtime = create_runtime('onnx_trt_ep', config)
    assert isinstance(runtime, InferenceRuntime)
    assert runtime.current_runtime_label() == 'onnx_trt_ep'


def test_r5_runtime_gets_what_its_caller_chose(config: C7InferenceConfig, tmp_path: Path) -> None:
    engine = write_engine(tmp_path)
    with pytest.raises(RuntimeUnavailableError):
        create_runtime('onnx_trt_ep', config).compile_engine(engine, BuildConfig())
    runtime = create_runtime('onnx_trt_ep', config, gate=EngineGate(HOST))
    assert runtime.compile_engine(engine, BuildConfig()).path == engine.artefacts[0].path
    runtime = create_runtime('onnx_trt_ep', config, providers=ProviderSet.CPU)
    handle = runtime.deserialize_engine(runtime.compile_engine(bare_bundle(tmp_path), BuildConfig()))
    assert handle.facts.requested_providers == ('CPUExecutionProvider',)


@pytest.mark.parametrize('label', RUNTIME_LABELS)
def test_r5_absent_package_is_named_with_its_requirements_file(
    label: str, config: C7InferenceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, requirements = PACKAGES[label]
    monkeypatch.setitem(sys.modules, package, None)
    error = refusal(label, config)
    assert package in str(error)
    assert requirements in str(error)
    assert (REPOSITORY / requirements).is_file()


@pytest.mark.parametrize('label', RUNTIME_LABELS)
def test_r5_switched_off_strategy_says_so(label: str, config: C7InferenceConfig) -> None:
    switched_off = C7InferenceConfig(disabled_runtimes=(label,), ort_trt_cache_dir=config.ort_trt_cache_dir)
    assert 'disabled_runtimes' in str(refusal(label, switched_off))


@pytest.mark.parametrize('label', RUNTIME_LABELS)
def test_r5_making_a_runtime_imports_no_vendor_library(
    label: str, config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ('tensorrt', 'cuda', 'torch', 'onnxruntime', 'onnx'):
        (tmp_path / package).mkdir()
        (tmp_path / package / '__init__.py').write_text('raise AssertionError("imported")\n')
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert create_runtime(label, config).current_runtime_label() == label


def test_r5_mere_directory_of_the_name_is_no_package(
    config: C7InferenceConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'onnxruntime').mkdir()
    monkeypatch.delitem(sys.modules, 'onnxruntime', raising=False)
    finder = importlib.machinery.PathFinder.find_spec
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name: finder(name, [str(tmp_path)] if name == 'onnxruntime' else None)
    )
    assert 'onnxruntime' in str(refusal('onnx_trt_ep', config))


def test_r5_unknown_label(config: C7InferenceConfig) -> None:
    error = refusal('openvino', config)
    assert all(label in error.remedy for label in RUNTIME_LABELS)


@pytest.mark.parametrize('label', ['tensorrt', 'pytorch_fp16'])
def test_r5_packages_for_a_gpu_are_asked_for_where_there_is_one(
    label: str, config: C7InferenceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, requirements = PACKAGES[label]
    monkeypatch.setitem(sys.modules, package, None)
    for devices in (['/dev/nvidia0'], []):
        monkeypatch.setattr(cuda, 'gpu_devices', lambda found=devices: found)
        remedy = refusal(label, config).remedy
        assert f'pip install -r {requirements}' in remedy
        assert ('no NVIDIA GPU' in remedy) is (not devices)


def test_r5_onnx_runtime_without_a_gpu_asks_for_nothing_on_a_host_that_has_none(
    config: C7InferenceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for devices in (['/dev/nvidia0'], []):
        monkeypatch.setattr(cuda, 'gpu_devices', lambda found=devices: found)
        assert 'pip install -r requirements/gpu.txt' in gpu_remedy(config)
        assert ('This host has no NVIDIA GPU, so nothing has to be installed' in gpu_remedy(config)) is (not devices)
    required = dataclasses.replace(config, ort_disallow_cpu_fallback=True)
    assert gpu_remedy(required).endswith('or set ort_disallow_cpu_fallback to false.')
