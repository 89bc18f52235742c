"""The shapes of a model's outputs that follow from its operators, whatever its exporter declared."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gps_denied_c7.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ['infer_output_shapes', 'skeleton_of']

# Tensors up to this size may be shapes that inference reads; larger ones are weights.
_SHAPE_BYTES = 1024

_log = logging.getLogger(__name__)


_NO_SHAPES: Mapping[str, Sequence[int | None]] = {}


def infer_output_shapes(
    skeleton: bytes, inputs: Sequence[TensorSpec], given: Mapping[str, Sequence[int | None]] = _NO_SHAPES
) -> dict[str, tuple[int | None, ...] | None]:
    """
    Return the shape of each output that follows from the operators alone.

    A file may declare the size that an output had for the exporter's example image.

    :param skeleton: of the model, as :func:`skeleton_of` makes it.
    :param inputs: of the model; an axis that is free in ``given``, too, has length one.
    :param given: shapes that the bundle gives inputs, by name: the sizes of axes that are free.
    :return: by output name; None for an axis whose size depends on the data, or for an output whose number of axes
        is unknown.
    """
    import onnx

    model = onnx.ModelProto.FromString(skeleton)
    shapes_in = {spec.name: _fed(spec.axes, given.get(spec.name, ())) for spec in inputs}
    for value in model.graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, shapes_in.get(value.name, ()), strict=False):
            axis.dim_value = size
    names = [value.name for value in model.graph.output]
    passed_through = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    # As outputs, they have no shape, which would be taken for that of the input.
    made = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in model.graph.output]
    del model.graph.output[:]
    model.graph.output.extend(value for value in made if value.name not in passed_through)
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        # Each output is then allocated again for each request, which is right for any shape.
        _log.info('shapes of the outputs cannot be inferred: %s', error)
    shapes = {value.name: _known_shape(value) for value in model.graph.output}
    return {name: shapes.get(name) for name in names}


def _fed(axes: Sequence[int | None], given: Sequence[int | None]) -> list[int]:
    return [own or wanted or 1 for own, wanted in itertools.zip_longest(axes, given[: len(axes)])]


def skeleton_of(model: onnx.ModelProto) -> bytes:
    """Return the model without large tensors and without what it declares of shapes beyond its inputs; changes it."""
    from onnx import helper

    graph = model.graph
    given = {value.name for value in graph.input}
    small = []
    for tensor in graph.initializer:
        if tensor.ByteSize() <= _SHAPE_BYTES and tensor.data_location != tensor.EXTERNAL:
            small.append(tensor)
        elif tensor.name not in given:
            # As an input, it has a type and a shape, and no values.
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    for index, node in reversed(list(enumerate(graph.node))):
        # Some exporters keep weights in these.
        if node.op_type == 'Constant' and node.attribute[:1] and node.ByteSize() > _SHAPE_BYTES:
            tensor = node.attribute[0].t
            if node.attribute[0].name == 'value' and node.output[:1] and node.domain in ('', 'ai.onnx'):
                graph.input.append(helper.make_tensor_value_info(node.output[0], tensor.data_type, list(tensor.dims)))
                del graph.node[index]
    kept = [type(tensor).FromString(tensor.SerializeToString()) for tensor in small]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    for value in graph.output:
        if value.type.HasField('tensor_type'):
            value.type.tensor_type.ClearField('shape')
    return bytes(model.SerializeToString())


def _known_shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField('shape'):
        return None
    return tuple(axis.dim_value if axis.HasField('dim_value') else None for axis in tensor.shape.dim)
