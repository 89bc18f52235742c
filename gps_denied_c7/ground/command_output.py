"""What the commands of ``c7_engine`` print alike: JSON, fields, engines and tensors."""

from __future__ import annotations

import json
from typing import Any

from gps_denied_c7.engines.manifest import EngineManifest
from gps_denied_c7.ground.input_shapes import shape_text
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.text import plain

__all__ = ['print_field', 'print_json', 'print_manifest', 'spelled']

def print_json(**values: Any) -> None:
    """Print one JSON object."""
    print(json.dumps(values, indent=2))


def print_field(name: str, value: str) -> None:
    """Print one line of a description."""
    print(f'  {name:<10} {plain(value)}')


def print_manifest(manifest: EngineManifest) -> None:
    """Print what a manifest says of its engine."""
    print_field('model', f'{manifest.model}, {manifest.precision}')
    print_field('source', f'sha256 {manifest.source_sha256}')
    print_field('engine', f'{manifest.engine_bytes} bytes, sha256 {manifest.engine_sha256}')
    print_field('built on', f'{manifest.gpu} (SM {manifest.sm}), TensorRT {manifest.tensorrt}, {manifest.platform}')
    print_field('with', ', '.join(manifest.builder_flags))
    print_field('versions', ', '.join(f'{name} {version}' for name, version in sorted(manifest.versions.items())))
    for role, specs in (('input', manifest.inputs), ('output', manifest.outputs)):
        for spec in specs:
            print_field(role, spelled(spec))


def spelled(spec: TensorSpec) -> str:
    """Return name, type and shape of a tensor as text."""
    return f'{spec.name} {spec.dtype} {shape_text(spec.shape)}'
