"""Weights that an ONNX model keeps in other files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError
from gps_denied_c7.model.external_data import PROTOBUF_LIMIT_BYTES

if TYPE_CHECKING:
    import mmap

    import onnx

__all__ = ['put_inside', 'require_promised', 'require_protobuf', 'take_in_weights']

# Types by the bits of an element, as ONNX numbers them; strings are not kept in other files.
_TYPES_OF_BITS = {
    2: (25, 26),
    4: (21, 22, 23),
    8: (2, 3, 9, 17, 18, 19, 20, 24),
    16: (4, 5, 10, 16),
    32: (1, 6, 12),
    64: (7, 11, 13, 14),
    128: (15,),
}
_BITS = {kind: bits for bits, kinds in _TYPES_OF_BITS.items() for kind in kinds}
# Those that every ONNX Runtime can be handed, from the first on; what has no name here is none of them.
_NUMPY_TYPES = ('', 'float32', 'uint8', 'int8', 'uint16', 'int16', 'int32', 'int64', '', 'bool', 'float16', 'float64',
                'uint32', 'uint64')  # fmt: skip
_LARGE_BYTES = 1 << 16
_PLACES_OF_DATA = ('data_location', 'external_data', 'float_data', 'int32_data', 'string_data', 'int64_data',
                   'double_data', 'uint64_data')  # fmt: skip
_NUMBER = re.compile(r'[0-9]{1,19}', re.ASCII)


def require_promised(locations: Sequence[str], external_data: Mapping[str, str]) -> None:
    if set(locations) != set(external_data):
        raise EngineSchemaMismatchError(
            'external_data',
            expected=sorted(external_data),
            found=list(locations),
            remedy='Make the bundle again (c7_engine bundle), or write the SHA-256 of each of these files under '
            'external_data of the artefact in model.json.',
        )


def take_in_weights(
    path: Path, model: onnx.ModelProto, tensors: Sequence[onnx.TensorProto], files: Mapping[str, mmap.mmap | bytes]
) -> dict[str, NDArray]:
    """
    Take external weights into a model, but those that a session can be handed: large ones of its main graph.

    :param tensors: every constant of the model, those of the main graph first.
    :return: the ones left out, by name, as views of the files.
    :raises EngineDeserializeError: a constant does not lie in its file as it says, or the rest is too large.
    """
    used = _names_used(model.graph)
    weights: dict[str, NDArray] = {}
    inside: list[tuple[onnx.TensorProto, memoryview]] = []
    for index, tensor in enumerate(tensors):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        content = _bytes_of(path, tensor, files)
        dtype = _NUMPY_TYPES[tensor.data_type] if tensor.data_type < len(_NUMPY_TYPES) else ''
        # ONNX infers shapes from the values of small ones, and ONNX Runtime refuses to be handed what no node reads.
        if index < len(model.graph.initializer) and dtype and len(content) >= _LARGE_BYTES and tensor.name in used:
            array = np.frombuffer(content, dtype).reshape(tuple(tensor.dims))
            weights[tensor.name] = np.require(array, requirements='A')
        else:
            inside.append((tensor, content))
    size = model.ByteSize() + sum(len(content) for _, content in inside)
    require_protobuf(size)
    for tensor, content in inside:
        put_inside(tensor, bytes(content))
    return weights


def _bytes_of(path: Path, tensor: onnx.TensorProto, files: Mapping[str, mmap.mmap | bytes]) -> memoryview:
    """Return the bytes of an external constant."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    content = memoryview(files[entries['location']])
    numbers = []
    for key in ('offset', 'length'):
        text = entries.get(key, '0')
        if not (isinstance(text, str) and _NUMBER.fullmatch(text)):
            raise _misplaced(path, tensor, f'says {key} {text!r}')
        numbers.append(int(text))
    offset, length = numbers
    bits = _BITS.get(tensor.data_type)
    if bits is None or any(axis < 0 for axis in tensor.dims):
        raise _misplaced(path, tensor, f'has data type {tensor.data_type} and shape {list(tensor.dims)}')
    size = -(-math.prod(tensor.dims) * bits // 8)
    # ONNX Runtime, too, takes a length of 0 as one that is not given.
    if length not in (0, size):
        raise _misplaced(path, tensor, f'says length {length}, where its shape {list(tensor.dims)} needs {size}')
    if offset + size > len(content):
        raise _misplaced(path, tensor, f'ends at byte {offset + size}, where the file has {len(content)}')
    return content[offset : offset + size]


def _misplaced(path: Path, tensor: onnx.TensorProto, problem: str) -> EngineDeserializeError:
    return EngineDeserializeError(
        f'{path}: the constant {str(tensor.name)[:200]!r} in an external file {problem}.'[:2000],
        remedy='Export the model again, and copy all of its files.',
    )


def put_inside(tensor: onnx.TensorProto, content: bytes) -> None:
    """Give a constant its bytes in place of where they lie."""
    for field_name in _PLACES_OF_DATA:
        tensor.ClearField(field_name)
    tensor.raw_data = content


def require_protobuf(size: int) -> None:
    if size > PROTOBUF_LIMIT_BYTES - (1 << 20):
        raise EngineDeserializeError(
            f'the model with its weights inside has {size} bytes, and no ONNX file can have 2 GiB.',
            remedy='Export it in half precision, with its weights in the main graph, or load it with onnx_trt_ep.',
        )


def _names_used(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that a graph gives or its nodes read, those of their subgraphs included."""
    names = {value.name for value in graph.output}
    graphs = [graph]
    while graphs:
        for node in graphs.pop().node:
            names.update(node.input)
            for attribute in node.attribute:
                graphs += (attribute.g, *attribute.graphs)
    return names
