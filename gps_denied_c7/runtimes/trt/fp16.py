"""ONNX models in half precision, for vendors that take the precision from the model's own types."""

from __future__ import annotations

import graphlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gps_denied_c7.errors import EngineContentError
from gps_denied_c7.model.external_data import names_read
from gps_denied_c7.model.onnx_file import OnnxModel

if TYPE_CHECKING:
    import onnx

__all__ = ['to_half_precision']

# Sums of squares: 65504, the largest float16, is soon reached.
_KEPT_IN_FLOAT = ('ReduceL2', 'ReduceSumSquare', 'LpNormalization', 'LayerNormalization', 'InstanceNormalization')


def to_half_precision(model: OnnxModel) -> bytes:
    """
    Return ``model`` with float16 weights and arithmetic; its inputs and outputs keep their types.

    The conversion is that of ONNX Runtime's own tools, which a build needs beside TensorRT.

    :raises EngineContentError: it cannot be converted.
    """
    import onnx

    with _unchanged_path():
        from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    try:
        proto = onnx.ModelProto.FromString(model.self_contained())
        converted = convert_float_to_float16(
            proto, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_KEPT_IN_FLOAT]
        )
        _sort_nodes(converted.graph)
        content: bytes = converted.SerializeToString()
        return content
    except Exception as error:  # what the converter and protobuf raise is theirs to choose
        raise EngineContentError(
            f'the model could not be converted to float16: {error}.',
            remedy='Build it with precision fp32, or export it in float16.',
        ) from error


@contextmanager
def _unchanged_path() -> Iterator[None]:
    # onnxruntime.transformers puts its own directory, with modules of common names, on the import path.
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


def _sort_nodes(graph: onnx.GraphProto) -> None:
    """Put each node behind those that it needs, as ONNX demands; the converter appends its casts at the end."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    # Sorted: names come from a set, and the same model is to become the same bytes.
    needs = {
        index: sorted(makers[name] for name in names_read([node]) if name in makers)
        for index, node in enumerate(graph.node)
    }
    order = graphlib.TopologicalSorter(needs).static_order()
    nodes = [graph.node[index] for index in order]
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
