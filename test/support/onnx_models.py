"""Small ONNX models whose answers are known by construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.tensors import TensorSpec

SHAPE = (1, 3, 4)
INPUTS = (TensorSpec('left', 'float32', SHAPE), TensorSpec('right', 'float32', SHAPE))
OUTPUTS = (TensorSpec('total', 'float32', SHAPE), TensorSpec('ratio', 'float32', SHAPE))


def arithmetic(
    names: Mapping[str, str] | None = None,
    shape: Sequence[int | str | None] = SHAPE,
    dtype: int = TensorProto.FLOAT,
    producer: str = '',
) -> onnx.ModelProto:
    """Return total = left + right and ratio = left / right; ``names`` renames tensors."""
    left, right, total, ratio = ((names or {}).get(name, name) for name in ('left', 'right', 'total', 'ratio'))
    return model_of(
        [
            helper.make_node('Add', [left, right], [total], name='add'),
            helper.make_node('Div', [left, right], [ratio], name='div'),
        ],
        [helper.make_tensor_value_info(name, dtype, shape) for name in (left, right)],
        [helper.make_tensor_value_info(name, dtype, shape) for name in (total, ratio)],
        producer=producer,
    )


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initialisers: Sequence[onnx.TensorProto] = (),
    producer: str = '',
) -> onnx.ModelProto:
    """Return a model that ONNX Runtime 1.17 still reads."""
    graph = helper.make_graph(nodes, 'graph', inputs, outputs, initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8, producer_name=producer)


def write_model(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def bare_bundle(directory: Path, model: onnx.ModelProto | None = None) -> ModelBundle:
    """Write a bare ``.onnx`` and return its bundle."""
    return ModelBundle.load(write_model(directory / 'arithmetic.onnx', model or arithmetic()))


def bundle_around(
    path: Path,
    strategy: str,
    *,
    inputs: tuple[TensorSpec, ...] = INPUTS,
    outputs: tuple[TensorSpec, ...] = OUTPUTS,
    io_names: Mapping[str, str] | None = None,
    device: str = 'any',
) -> ModelBundle:
    """Return a bundle that holds one artefact, the file at ``path``."""
    weights = f'sha256:{"0" * 64}'
    artefact = Artefact.of_file(
        path, strategy=strategy, weights_digest=weights, device=device, io_names=dict(io_names or {})
    )
    return ModelBundle(
        name='arithmetic',
        root=path.parent,
        weights_digest=weights,
        inputs=inputs,
        outputs=outputs,
        artefacts=(artefact,),
    )
