"""Models whose weights lie in files of their own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from gps_denied_c7.config import C7InferenceConfig

CONFIG = C7InferenceConfig(cpu_threads=1)
SHAPE = [1, 256]
value = helper.make_tensor_value_info


def external(name: str, array: NDArray, location: str = 'net.weights', **entries: object) -> TensorProto:
    """Return a tensor whose values lie elsewhere; ``entries`` are the other keys."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, text in {'location': location, **entries}.items():
        tensor.external_data.add(key=key, value=str(text))
    return tensor


def write(path: Path, nodes: list[onnx.NodeProto], tensors: list[TensorProto], **more: object) -> Path:
    graph = helper.make_graph(
        nodes, 'graph', [value('x', TensorProto.FLOAT, SHAPE)], [value('y', TensorProto.FLOAT, None)], tensors, **more
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def scaled(path: Path, factor: float, size: int = 256, location: str = 'net.weights') -> Path:
    """Write y = mean(x @ w) with all of w the same."""
    weights = np.full((256, size), factor, np.float32)
    (path.parent / location).parent.mkdir(parents=True, exist_ok=True)
    (path.parent / location).write_bytes(weights.tobytes())
    nodes = [helper.make_node('MatMul', ['x', 'w'], ['h']), helper.make_node('ReduceMax', ['h'], ['y'], keepdims=0)]
    return write(path, nodes, [external('w', weights, location)])


def rename_over(path: Path, content: bytes) -> None:
    (path.parent / 'new').write_bytes(content)
    os.replace(path.parent / 'new', path)


def outside(directory: Path) -> None:
    (directory.parent / 'secret').write_bytes(bytes(1 << 18))
    (directory / 'net.weights').symlink_to('../secret')
