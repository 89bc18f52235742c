"""Caches with engines that no TensorRT ever wrote: published by the real code, with a plan's header before noise."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

from gps_denied_c7.engines.manifest import EngineManifest, HostProfile, manifest_path
from gps_denied_c7.engines.ort_store import LISTING_NAME, BuiltFor, OrtEngineCache
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.tensors import TensorSpec

__all__ = ['HOST', 'SOURCE', 'age', 'fake_plan', 'manifest_of', 'publish_engine', 'publish_ort_cache']

HOST = HostProfile(gpu='Orin', sm=87, tensorrt='8.6.2', platform='linux-aarch64')
SOURCE = hashlib.sha256(b'the model').hexdigest()


def fake_plan(size: int = 1000, *, version: str = '8.6.2.3', seed: int = 0) -> bytes:
    """Return bytes that pass for a plan at the gate: the header that TensorRT writes, then noise."""
    header = b'ftrt' + bytes(20) + bytes(int(number) for number in version.split('.'))
    return header + random.Random(seed).randbytes(size - len(header))


def manifest_of(plan: bytes, **changes: object) -> EngineManifest:
    values: dict[str, object] = {
        'model': 'superpoint',
        'engine_sha256': hashlib.sha256(plan).hexdigest(),
        'engine_bytes': len(plan),
        'source_sha256': SOURCE,
        'precision': 'fp16',
        'gpu': HOST.gpu,
        'sm': HOST.sm,
        'tensorrt': '8.6.2.3',
        'platform': HOST.platform,
        'inputs': (TensorSpec('image', 'float32', (1, 1, 480, 640)),),
        'outputs': (TensorSpec('scores', 'float32', (1, 65, 60, 80)),),
        'builder_flags': ('fp16', 'workspace=1073741824'),
        'versions': {'cuda_runtime': '12.2'},
    }
    return EngineManifest(**{**values, **changes})  # type: ignore[arg-type]


def publish_engine(directory: Path, plan: bytes | None = None, **changes: object) -> Path:
    """Publish an engine and return its path; ``changes`` go into its manifest."""
    content = fake_plan(version=str(changes.get('tensorrt', '8.6.2.3'))) if plan is None else plan
    return EngineCache((directory,)).publish(content, manifest_of(content, **changes)).path


def publish_ort_cache(root: Path, model: bytes = b'the model', size: int = 1000, **changes: object) -> Path:
    """Record what ONNX Runtime's TensorRT provider would have written for a model, and return its directory."""
    values: dict[str, object] = {
        'model_sha256': hashlib.sha256(model).hexdigest(),
        'precision': 'fp16',
        'axes': {},
        'onnxruntime': '1.17.1',
        'tensorrt': '8.6.2',
        'gpu': HOST.gpu,
        'sm': HOST.sm,
        'driver': 'unknown',
        'platform': HOST.platform,
    }
    build, notes = OrtEngineCache((root,)).begin(BuiltFor(**{**values, **changes}))  # type: ignore[arg-type]
    assert build is not None, notes
    name = 'TensorrtExecutionProvider_TRTKernel_graph_main_graph_123_0_0_fp16_sm87'
    (build.directory / f'{name}.engine').write_bytes(fake_plan(size))
    (build.directory / f'{name}.profile').write_bytes(b'profile')
    build.record(None)
    assert (build.directory / LISTING_NAME).is_file()
    return build.directory


def age(path: Path, days: float, *, now_s: float) -> None:
    """Make a file and its manifest, or every file of a directory, so old."""
    written_s = now_s - days * 86400
    files = [*path.iterdir(), path] if path.is_dir() else [path]
    if manifest_path(path).exists():
        files.append(manifest_path(path))
    for file in files:
        os.utime(file, (written_s, written_s))
