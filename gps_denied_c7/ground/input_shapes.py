"""The inputs of a model for a bundle: every axis fixed, so that no runtime has any left to choose (F-5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.ground.bundle_request import BundleRequest
from gps_denied_c7.model.image_input import image_axes, image_layout
from gps_denied_c7.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ['Shape', 'fixed_inputs', 'shape_text', 'with_fixed_inputs']

Shape = Sequence[int | None]


def fixed_inputs(
    model: bytes, request: BundleRequest, arrays: Mapping[str, NDArray]
) -> tuple[TensorSpec, ...]:
    """Return the model's inputs with every axis fixed, by what was given where the model leaves it free."""
    declared = _declared_inputs(model)
    known = [spec.name for spec in declared]
    for given, what in ((request.shapes, 'a shape'), (arrays, 'an array of the golden request')):
        if unknown := sorted(set(given) - set(known)):
            raise ModelBundleError(f'{what} was given for {unknown}, the inputs are {known}.', remedy='Correct it.')
    if arrays and (missing := sorted(set(known) - set(arrays))):
        raise ModelBundleError(f'the golden request lacks {missing}.', remedy='Save one array for each input.')
    fixed = []
    for spec in declared:
        shape: Shape = spec.axes
        if spec.name in request.shapes:
            shape = _agreed(spec, shape, request.shapes[spec.name], '--input-size gives')
        if request.image_size is not None and len(shape) == 4:
            width, height = request.image_size
            place = 2 if image_layout(shape) == 'nchw' else 1
            wanted = (*shape[:place], height, width, *shape[place + 2 :])
            shape = _agreed(spec, shape, wanted, '--input-size gives')
        if spec.name in arrays:
            shape = _agreed(spec, shape, arrays[spec.name].shape, 'the golden request has')
        if len(shape) == 4:
            shape = image_axes(shape, colour=request.preprocessing.get('colour'))
        if shape[:1] == (None,):
            shape = (1, *shape[1:])
        if None in shape:
            raise _left_free(spec, shape)
        fixed.append(TensorSpec(spec.name, spec.dtype, tuple(shape)))
    return tuple(fixed)


def with_fixed_inputs(model: bytes, inputs: Sequence[TensorSpec], notes: list[str]) -> bytes:
    """Return the model with the sizes of ``inputs``, so that no runtime has any left to choose (F-5)."""
    import onnx

    free = {spec.name for spec in _declared_inputs(model) if None in spec.axes}
    if not free:
        return model
    fixed = onnx.ModelProto.FromString(model)
    shapes = {spec.name: spec.axes for spec in inputs}
    for value in fixed.graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, shapes.get(value.name, ()), strict=False):
            axis.dim_value = size or 1
    for name in sorted(free):
        notes.append(
            f'The model in the bundle takes {name!r} as {shape_text(shapes[name])}; the original leaves sizes free.'
        )
    return bytes(fixed.SerializeToString(deterministic=True))


def shape_text(shape: Shape | None) -> str:
    """Return a shape as ``1x3x?x?``, ``?`` for a free axis."""
    if shape is None:
        return 'any number of axes'
    return 'x'.join('?' if axis is None else str(axis) for axis in shape) or 'a scalar'


def _declared_inputs(model: bytes) -> list[TensorSpec]:
    import onnx

    graph = onnx.ModelProto.FromString(model).graph
    # Exporters before IR 4 listed the weights among the inputs.
    weights = {tensor.name for tensor in graph.initializer}
    return [_declared(value) for value in graph.input if value.name not in weights]


def _declared(value: onnx.ValueInfoProto) -> TensorSpec:
    from onnx import helper

    tensor = value.type.tensor_type
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        dtype = np.dtype(object)
    if dtype.kind not in 'biuf' or not tensor.HasField('shape'):
        raise ModelBundleError(
            f'input {value.name!r} is not a numeric tensor with a known number of axes.',
            remedy='Export the model with one image input.',
        )
    # Some exporters write a free axis as 0 or -1.
    axes = tuple(axis.dim_value if axis.dim_value > 0 else None for axis in tensor.shape.dim)
    return TensorSpec(value.name, dtype.name, axes)


def _left_free(spec: TensorSpec, shape: Shape) -> ModelBundleError:
    """Say which sizes of an input are still open, by what they mean where it may be an image."""
    every = f'--input-size {spec.name}=1x3x480x640 with every axis'
    if len(shape) != 4:
        return ModelBundleError(
            f'input {spec.name!r} ({shape_text(spec.axes)}) leaves sizes free.',
            remedy=f'Give every axis, as --input-size {spec.name}={"x".join(str(axis or 1) for axis in shape)}.',
        )
    sides = ('height', 'width')
    names = ('batch', 'channels', *sides) if image_layout(shape) == 'nchw' else ('batch', *sides, 'channels')
    free = [name for name, axis in zip(names, shape, strict=True) if axis is None]
    if free == ['channels']:
        ways = f'--colour rgb (3 channels) or --colour gray (1 channel), or {every}'
    else:
        ways = f'--input-size WIDTHxHEIGHT{" and --colour rgb or gray" if "channels" in free else ""}, or {every}'
    return ModelBundleError(
        f'input {spec.name!r} ({shape_text(spec.axes)}) leaves its {" and its ".join(free)} free.',
        remedy=f'Give {ways}.',
    )


def _agreed(spec: TensorSpec, have: Shape, given: Shape, source: str) -> tuple[int | None, ...]:
    fits = len(have) == len(given) and all(None in axes or axes[0] == axes[1] for axes in zip(have, given, strict=True))
    if not fits:
        raise ModelBundleError(
            f'input {spec.name!r} is {shape_text(have)}, but {source} {shape_text(given)}.',
            remedy='Give the shape of the model, or correct --input-size or the golden request.',
        )
    return tuple(want if axis is None else axis for axis, want in zip(have, given, strict=True))
