"""A well-formed engine file that no TensorRT ever wrote: the gate looks at it, nothing can run it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from gps_denied_c7.engines.manifest import EngineManifest, HostProfile, manifest_path
from gps_denied_c7.model.bundle import ModelBundle
from support.onnx_models import INPUTS, OUTPUTS, bundle_around

HOST = HostProfile(gpu='Orin', sm=87, tensorrt='8.6.2', platform='linux-aarch64')
PLAN = b'ftrt' + bytes(20) + bytes([8, 6, 2, 3]) + b'the engine'


def write_engine(directory: Path, **changes: object) -> ModelBundle:
    manifest = EngineManifest(
        model='arithmetic',
        engine_sha256=hashlib.sha256(PLAN).hexdigest(),
        engine_bytes=len(PLAN),
        source_sha256='a' * 64,
        precision='fp16',
        gpu=HOST.gpu,
        sm=HOST.sm,
        tensorrt='8.6.2.3',
        platform=HOST.platform,
        inputs=INPUTS,
        outputs=OUTPUTS,
    )
    manifest = replace(manifest, **changes)
    path = directory / str(manifest.engine_name)
    path.write_bytes(PLAN)
    manifest_path(path).write_bytes(manifest.to_json())
    path.chmod(0o644)
    manifest_path(path).chmod(0o644)
    return bundle_around(path, 'onnx_trt_ep')
