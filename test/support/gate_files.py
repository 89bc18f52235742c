"""An engine file with its manifest as the gate wants them, of bytes that no TensorRT ever wrote."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from gps_denied_c7.engines.manifest import EngineManifest, HostProfile, manifest_path
from gps_denied_c7.tensors import TensorSpec

HOST = HostProfile(gpu='Orin', sm=87, tensorrt='8.6.2', platform='linux-aarch64')
SOURCE_SHA256 = hashlib.sha256(b'the .onnx').hexdigest()
# A plan's header as TensorRT 8.6.2.3 writes it; the rest stands for the engine.
PLAN = b'ftrt' + bytes(20) + bytes([8, 6, 2, 3]) + bytes(range(256)) * 4


def manifest_of(plan: bytes = PLAN, **changes: object) -> EngineManifest:
    manifest = EngineManifest(
        model='superpoint-v1',
        engine_sha256=hashlib.sha256(plan).hexdigest(),
        engine_bytes=len(plan),
        source_sha256=SOURCE_SHA256,
        precision='fp16',
        gpu='Orin',
        sm=87,
        tensorrt='8.6.2.3',
        platform='linux-aarch64',
        inputs=(TensorSpec('image', 'float32', (1, 1, 480, 640)),),
        outputs=(TensorSpec('scores', 'float32', (1, 65, 60, None)),),
        builder_flags=('fp16', 'workspace=1073741824'),
        versions={'cuda': '12.2'},
    )
    return dataclasses.replace(manifest, **changes)


def write_engine(directory: Path, manifest: EngineManifest, plan: bytes = PLAN, name: str | None = None) -> Path:
    path = directory / (name or str(manifest.engine_name))
    path.write_bytes(plan)
    manifest_path(path).write_bytes(manifest.to_json())
    path.chmod(0o644)
    manifest_path(path).chmod(0o644)
    return path
