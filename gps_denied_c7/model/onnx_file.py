"""ONNX models as ONNX Runtime is handed them: read once, checked, and never a way around the gate."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import EngineContentError, EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.host_memory import require_memory
from gps_denied_c7.model.external_data import (
    PROTOBUF_LIMIT_BYTES,
    content_sha256,
    external_locations,
    find_external,
    model_contents,
    put_inside,
    read_sealed,
    require_promised,
    require_protobuf,
    require_protobuf_size,
    take_in_weights,
)
from gps_denied_c7.model.files import file_size, read_file
from gps_denied_c7.model.image_input import image_axes
from gps_denied_c7.model.onnx_scan import scan_onnx
from gps_denied_c7.model.random_operators import random_operators
from gps_denied_c7.model.shape_inference import skeleton_of
from gps_denied_c7.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ['OnnxModel', 'ep_context_model', 'read_onnx']

_COPY_AGAIN = 'Copy or export the model again.'
_FREE_SOME = 'Free memory, or export the model in half precision.'
_FEWER_NODES = 'Free memory, or export the model with fewer nodes.'

# Of memory that a parsed message takes at most, with what is gathered of it here.
_MESSAGE_BYTES = 1024

# Oldest versions that know EPContext and every later ONNX Runtime reads: 1.17 stops at IR 9, opset 20.
_IR_VERSION = 8
_OPSET = 17


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """
    Hold a model file that was read and checked, with every byte that its digests cover.

    :param source: what a session is made from: the very bytes whose digest was taken. Where weights lie in other
        files, a copy of the model with all of them inside but ``weights``.
    :param sha256: hex digest of the model file.
    :param inputs: axes by input name; an int where fixed, a text where free and named, else None.
    :param dtypes: NumPy's name of the type of each input and output, but of those that NumPy lacks.
    :param external_data: hex digest of each external file with weights, by its name in the model.
    :param weights: by name, weights of the main graph that a session has to be handed with ``source``: read-only
        views of sealed copies of the external files.
    :param skeleton: what shapes are inferred from (:mod:`gps_denied_c7.model.shape_inference`).
    :param random: operators that make the same request have other answers, as ``Dropout 'drop1'``.
    """

    source: bytes = field(repr=False)
    sha256: str
    inputs: Mapping[str, tuple[int | str | None, ...]]
    dtypes: Mapping[str, str]
    external_data: Mapping[str, str]
    weights: Mapping[str, NDArray] = field(repr=False)
    skeleton: bytes = field(default=b'', repr=False)
    random: tuple[str, ...] = ()

    @property
    def content_sha256(self) -> str:
        """The hex digest of the model with its external weights; without those it is the model file's own."""
        return content_sha256(self.sha256, self.external_data)

    def self_contained(self) -> bytes:
        """
        Return the model with all weights inside.

        :raises EngineContentError: it would be too large for a protobuf.
        """
        if not self.weights:
            return self.source
        import onnx

        size = len(self.source) + sum(array.nbytes for array in self.weights.values())
        require_protobuf(size)
        model = onnx.ModelProto.FromString(self.source)
        for tensor in model.graph.initializer:
            if tensor.name in self.weights:
                put_inside(tensor, self.weights[tensor.name].tobytes())
        return model.SerializeToString()

    def with_axes(self, sizes: Mapping[str, int]) -> OnnxModel:
        """Return the model with these axes fixed wherever its inputs and outputs name them."""
        if not sizes:
            return self
        import onnx

        model = onnx.ModelProto.FromString(self.source)
        for value in (*model.graph.input, *model.graph.output):
            for axis in value.type.tensor_type.shape.dim:
                if axis.dim_param in sizes:
                    axis.dim_value = sizes[axis.dim_param]
        return dataclasses.replace(self, source=model.SerializeToString())

    def for_image(self, image: Mapping[str, Any]) -> tuple[OnnxModel, dict[str, tuple[int | None, ...]]]:
        """
        Return the model with a name for each free axis of its images, and the wanted shape of each by input name.

        :param image: of ``width``, ``height``, ``colour`` and ``layout`` what is given.
        """
        import onnx

        given = {name: image[name] for name in ('width', 'height', 'colour', 'layout') if name in image}
        images = {name: axes for name, axes in self.inputs.items() if len(axes) == 4 and not all(map(_fixed, axes[1:]))}
        if not given or not images:
            return self, {}
        model = onnx.ModelProto.FromString(self.source)
        inputs = dict(self.inputs)
        for value in model.graph.input:
            if value.name not in images:
                continue
            for index, axis in enumerate(value.type.tensor_type.shape.dim):
                # A session takes a size only by the axis's name. Some exporters write a free axis as 0 or -1.
                if not _fixed(images[value.name][index]) and not axis.dim_param:
                    axis.dim_param = f'c7_{value.name}_{index}'
            inputs[value.name] = tuple(
                axis.dim_value if axis.HasField('dim_value') else axis.dim_param
                for axis in value.type.tensor_type.shape.dim
            )
        shapes = {
            name: image_axes([axis if _fixed(axis) else None for axis in axes], **given)  # type: ignore[misc]
            for name, axes in images.items()
        }
        return dataclasses.replace(self, source=model.SerializeToString(), inputs=inputs), shapes

    def dimension_overrides(self, shapes: Mapping[str, Sequence[int | None]]) -> dict[str, int]:
        """
        Return a size for each named free axis, so that shapes are fixed before a session is made (F-5).

        :param shapes: wanted shape by input name; without one, the leading axis is the batch, which is 1.
        :raises EngineSchemaMismatchError: one axis name would need two sizes.
        """
        sizes: dict[str, int] = {}
        for name, axes in self.inputs.items():
            for index, (axis, wanted) in enumerate(zip(axes, shapes.get(name, (None,)), strict=False)):
                size = 1 if index == 0 and wanted is None else wanted
                if not isinstance(axis, str) or size is None:
                    continue
                if sizes.setdefault(axis, size) != size:
                    raise EngineSchemaMismatchError(
                        f'axis {axis}',
                        expected=sizes[axis],
                        found=f'{size} in input {name!r}',
                        remedy='Correct the shapes under inputs in model.json.',
                    )
        return sizes


def read_onnx(path: Path, sha256: str | None, external_data: Mapping[str, str] | None = None) -> OnnxModel:
    """
    Read an ``.onnx`` file and its external weights, each once, and check what they are before ONNX Runtime sees them.

    :param sha256: hex digest that the file must have, None where the digest is unknown.
    :param external_data: hex digest that each external file must have, by its name in the model; only read where
        ``sha256`` is given.
    :raises EngineSchemaMismatchError: another digest, or other external files.
    :raises EngineContentError: missing, unreadable, damaged, too large for a protobuf, with an engine inside,
        or with external weights that lie elsewhere or are not what the model says.
    """
    data = _read(path)
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise EngineSchemaMismatchError('model_sha256', expected=sha256, found=found, remedy=_COPY_AGAIN)
    model = _parse(path, data)
    nodes, tensors = model_contents(model)
    if any(node.op_type == 'EPContext' for node in nodes):
        raise EngineContentError(
            f'{path} carries a compiled engine (EPContext), which the gate has not checked.',
            remedy='Name the .engine file itself, or the .onnx that it was built from.',
        )
    try:
        locations = external_locations(path, tensors)
        if sha256 is not None:
            require_promised(locations, external_data or {})
        read = {location: read_sealed(find_external(path, location)) for location in locations}
    except ModelBundleError as error:
        raise EngineContentError(error.message, remedy=error.remedy) from error
    digests = {location: digest for location, (_, digest) in read.items()}
    if sha256 is not None:
        for location, expected in (external_data or {}).items():
            if digests[location] != expected:
                raise EngineSchemaMismatchError(
                    f'sha256 of {location}', expected=expected, found=digests[location], remedy=_COPY_AGAIN
                )
    weights: dict[str, NDArray] = {}
    if read:
        weights = take_in_weights(path, model, tensors, {location: content for location, (content, _) in read.items()})
        data = model.SerializeToString()
    return OnnxModel(
        source=data,
        sha256=found,
        inputs={
            value.name: tuple(
                axis.dim_value if axis.HasField('dim_value') else axis.dim_param or None
                for axis in value.type.tensor_type.shape.dim
            )
            for value in model.graph.input
        },
        dtypes=_dtypes((*model.graph.input, *model.graph.output)),
        external_data=digests,
        weights=weights,
        random=random_operators(model, nodes),
        skeleton=skeleton_of(model),
    )


def ep_context_model(
    plan: bytes, *, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], sm: int
) -> bytes:
    """
    Return an ONNX model of one EPContext node around an engine (G-4).

    :param plan: the engine's bytes, which lie inside the model (``embed_mode`` 1): what was hashed is what is run.
    :param name: of the model.
    :param inputs: the engine's own input tensors.
    :param outputs: the engine's own output tensors.
    :param sm: compute capability as major × 10 + minor.
    :raises EngineContentError: the engine is too large for a protobuf.
    """
    from onnx import helper

    if len(plan) > PROTOBUF_LIMIT_BYTES - (1 << 20):
        raise EngineContentError(
            f'the engine of {name!r} has {len(plan)} bytes, and an ONNX model around it must stay below 2 GiB.',
            remedy='Load it with the tensorrt runtime, or use the .onnx.',
        )
    node = helper.make_node(
        'EPContext',
        inputs=[spec.name for spec in inputs],
        outputs=[spec.name for spec in outputs],
        domain='com.microsoft',
        name=name,
        main_context=1,
        embed_mode=1,
        ep_cache_context=plan,
        source='TensorrtExecutionProvider',
        hardware_architecture=str(sm),
    )
    values, answers = (
        [
            helper.make_tensor_value_info(
                spec.name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), list(spec.axes)
            )
            for spec in specs
        ]
        for specs in (inputs, outputs)
    )
    graph = helper.make_graph([node], name, values, answers)
    opsets = [helper.make_opsetid('', _OPSET), helper.make_opsetid('com.microsoft', 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION).SerializeToString()


def _read(path: Path) -> bytes:
    try:
        require_protobuf_size(path, size := file_size(path))
        # The file, the parsed model, and the copy that a session is made from.
        require_memory(path, size, copies=2, remedy=_FREE_SOME)
        return read_file(path)
    except ModelBundleError as error:
        raise EngineContentError(error.message, remedy=error.remedy) from error


def _parse(path: Path, data: bytes) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    # A worker that dies of a model is started again and again; a reason that lasts is given once.
    try:
        messages = scan_onnx(path, data).messages
        what = f'the parsed model {path} ({messages} nodes, attributes and other parts)'
        require_memory(what, messages * _MESSAGE_BYTES, remedy=_FEWER_NODES)
        model = onnx.ModelProto.FromString(data)
    except ModelBundleError as error:
        raise EngineContentError(error.message, remedy=error.remedy) from error
    except DecodeError as error:
        raise EngineContentError(f'{path} is damaged or no ONNX model: {error}.', remedy=_COPY_AGAIN) from error
    if not model.HasField('graph'):
        raise EngineContentError(f'{path} holds no graph ({len(data)} bytes).', remedy=_COPY_AGAIN)
    return model


def _fixed(axis: int | str | None) -> bool:
    return isinstance(axis, int) and axis > 0


def _dtypes(values: Iterable[onnx.ValueInfoProto]) -> dict[str, str]:
    from onnx import helper

    types: dict[str, str] = {}
    for value in values:
        try:
            types[value.name] = str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        except KeyError:
            continue
    return types
