"""Operators of an ONNX model that draw random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ['random_operators']

_RANDOM_DOMAINS = ('', 'ai.onnx', 'com.microsoft', 'org.pytorch.aten', 'org.pytorch.prims', 'aten')
_RANDOM = (
    *('RandomNormal', 'RandomNormalLike', 'RandomUniform', 'RandomUniformLike', 'Multinomial', 'Bernoulli'),
    # Of com.microsoft: it draws the next token of a language model.
    'Sampling',
)
_DROPOUTS = {'Dropout': 2, 'TrainableDropout': 2, 'BitmaskDropout': 2, 'BiasDropout': 4, 'BitmaskBiasDropout': 4}
"""Place of the input that says whether they train."""
_ATEN = ('ATen', 'ATenOp')
_RANDOM_WORDS = ('rand', 'multinomial', 'bernoulli', 'dropout', 'normal', 'rrelu', 'exponential', 'poisson')


def random_operators(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> tuple[str, ...]:
    """
    Name the random ones among ``nodes``, which are all of the model, subgraphs and functions included.

    Dropout counts in training mode, and where the mode is computed while the model runs.
    """
    own = {(function.domain, function.name) for function in model.functions}
    # The oldest version decides: Dropout trained by default before 7, never from 7 to 11, by an input since 12.
    imports = (*model.opset_import, *(entry for function in model.functions for entry in function.opset_import))
    opset = min((entry.version for entry in imports if entry.domain in ('', 'ai.onnx')), default=1)
    # Each graph and function has names of its own, so that one name may stand for several values.
    values: dict[str, list[onnx.TensorProto | None]] = {}
    for node in nodes:
        constant = next((each.t for each in node.attribute if each.name == 'value'), None)
        for name in node.output:
            values.setdefault(name, []).append(constant if node.op_type == 'Constant' else None)
    for graph in _graphs(model, nodes):
        for tensor in graph.initializer:
            values.setdefault(tensor.name, []).append(tensor)
    return tuple(
        f'{node.op_type} {(node.name or ", ".join(node.output))!r}'
        for node in nodes
        if (node.domain, node.op_type) not in own and _is_random(node, opset, values)
    )


def _is_random(node: onnx.NodeProto, opset: int, values: Mapping[str, Sequence[onnx.TensorProto | None]]) -> bool:
    if node.domain not in _RANDOM_DOMAINS:
        return False
    if node.op_type in _ATEN:
        # PyTorch's operators, exported as they are, are named in an attribute.
        operator = next((each.s.decode(errors='replace') for each in node.attribute if each.name == 'operator'), '')
        return any(word in operator for word in _RANDOM_WORDS)
    if node.op_type not in _DROPOUTS:
        return node.op_type in _RANDOM
    if not node.domain and opset < 7:
        return not any(each.name == 'is_test' and each.i for each in node.attribute)
    place = _DROPOUTS[node.op_type]
    if (not node.domain and opset < 12) or len(node.input) <= place or not node.input[place]:
        return False
    return any(mode is None or _is_true(mode) for mode in values.get(node.input[place], (None,)))


def _is_true(tensor: onnx.TensorProto) -> bool:
    from onnx import numpy_helper

    try:
        return bool(numpy_helper.to_array(tensor).any())
    except Exception:  # what onnx raises for a damaged tensor is its to choose; such a mode is not known
        return True


def _graphs(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.GraphProto]:
    yield model.graph
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.g, *attribute.graphs)
