"""Weights that an ``.onnx`` keeps in other files: found near it, hashed, and read once into sealed memory."""

from __future__ import annotations

import fcntl
import hashlib
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import EngineContentError, EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.host_memory import require_memory
from gps_denied_c7.model.files import file_digest, file_sha256, file_size, open_regular, read_file, read_pieces
from gps_denied_c7.model.onnx_scan import NAME_AGAIN, one_location, scan_onnx

if TYPE_CHECKING:
    import onnx

__all__ = [
    'PROTOBUF_LIMIT_BYTES',
    'check_location',
    'content_sha256',
    'external_locations',
    'find_external',
    'model_contents',
    'names_read',
    'onnx_digests',
    'put_inside',
    'read_sealed',
    'require_promised',
    'require_protobuf',
    'require_protobuf_size',
    'take_in_weights',
]

# A protobuf message ends at 2 GiB: a larger model keeps its weights in external files.
PROTOBUF_LIMIT_BYTES = (1 << 31) - 1

# The key of an external file's name, as protobuf writes it: field 1, eight bytes. Only a model with it is scanned.
_LOCATION_KEY = b'\x0a\x08location'
# The node itself reads a model whose weights lie in other files: what is left in it is its graph.
_GRAPH_LIMIT_BYTES = 256 << 20
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

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


def content_sha256(sha256: str, external_data: Mapping[str, str]) -> str:
    """
    Return a hex digest of a model with its external weights; without those it is the model file's own.

    :param sha256: hex digest of the model file.
    :param external_data: hex digest of each external file, by the name that the model gives it.
    """
    if not external_data:
        return sha256
    digest = hashlib.sha256(sha256.encode())
    for location, found in sorted(external_data.items()):
        digest.update(f'\0{location}\0{found}'.encode())
    return digest.hexdigest()


def onnx_digests(path: Path) -> tuple[str, dict[str, str]]:
    """
    Return the hex digest of an ``.onnx`` and that of each external file that it names; all are read (1 s per GB).

    :raises ModelBundleError: a file is missing, cannot be read, is too large, or does not lie with the model.
    """
    require_protobuf_size(path, file_size(path))
    sha256, external = file_digest(path, _LOCATION_KEY)
    if not external:
        return sha256, {}
    if (size := file_size(path)) > _GRAPH_LIMIT_BYTES:
        raise ModelBundleError(
            f'{path}: has {size} bytes beside its weights in other files, more than {_GRAPH_LIMIT_BYTES}.',
            remedy='Make a bundle of it (c7_engine bundle), or export it with all weights in other files.',
        )
    content = read_file(path, limit=_GRAPH_LIMIT_BYTES)
    # What else is wrong with it, its loader says.
    locations = scan_onnx(path, content).locations
    files = {location: find_external(path, _checked(path, location)) for location in locations}
    digests: dict[Path, str] = {}
    for file in set(files.values()):
        _require_memory(file, file_size(file))
        digests[file] = file_sha256(file)
    return hashlib.sha256(content).hexdigest(), {location: digests[file] for location, file in files.items()}


def require_protobuf_size(path: Path, size: int) -> None:
    """Refuse a file that is too large for an ONNX model, by ModelBundleError."""
    if size > PROTOBUF_LIMIT_BYTES:
        raise ModelBundleError(
            f'{path} has {size} bytes, and no ONNX file can have 2 GiB.',
            remedy='Export the model with its weights as external data.',
        )


def model_contents(model: onnx.ModelProto) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return every node and every constant, those of subgraphs and functions too; the main graph's weights first."""
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    graphs = [model.graph]
    pending = [node for function in model.functions for node in function.node]
    attributes = [attribute for function in model.functions for attribute in function.attribute_proto]
    while graphs or pending or attributes:
        for graph in graphs:
            pending += graph.node
            tensors += graph.initializer
            for sparse in graph.sparse_initializer:
                tensors += (sparse.values, sparse.indices)
        graphs = []
        attributes += (attribute for node in pending for attribute in node.attribute)
        for attribute in attributes:
            # Reading an absent one would make it.
            if attribute.HasField('t'):
                tensors.append(attribute.t)
            if attribute.HasField('g'):
                graphs.append(attribute.g)
            if attribute.HasField('sparse_tensor'):
                tensors += (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            tensors += attribute.tensors
            graphs += attribute.graphs
            for sparse in attribute.sparse_tensors:
                tensors += (sparse.values, sparse.indices)
        nodes += pending
        pending, attributes = [], []
    return nodes, tensors


def names_read(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the tensors that nodes read, those of an outer graph that their subgraphs read included."""
    names: set[str] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        names.update(node.input)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                pending += graph.node
    return names


def external_locations(model: Path, tensors: Sequence[onnx.TensorProto]) -> list[str]:
    """
    Return the names of the external files that these constants of a model lie in.

    :raises ModelBundleError: a constant names none or several, or one that could not lie with the model.
    """
    found = set()
    for tensor in tensors:
        if tensor.data_location == tensor.EXTERNAL:
            # Protobuf returns text that is not UTF-8 as bytes.
            names = [entry.value for entry in tensor.external_data if entry.key == 'location']
            found.add(_checked(model, one_location(model, names)))
    return sorted(found)


def _checked(model: Path, location: str) -> str:
    try:
        check_location(location)
    except ModelBundleError as error:
        raise ModelBundleError(f'{model} keeps weights in {error.message}', remedy=error.remedy) from error
    return location


def check_location(location: str) -> None:
    """Refuse the name of an external file that could lead out of its model's directory, by ModelBundleError."""
    parts = PurePosixPath(location).parts
    if not parts or location.startswith('/') or '..' in parts or '\0' in location:
        raise ModelBundleError(f'{location[:200]!r}, outside its own directory.', remedy=NAME_AGAIN)


def find_external(model: Path, location: str) -> Path:
    """
    Return the real path of an external file: beside the model as named, else beside the file that this is a link to.

    Links are followed where they end in one of these two directories, as in the caches of model hubs, where the
    model and its weights are links into one directory.

    :raises ModelBundleError: it is not there, or lies elsewhere.
    """
    try:
        places = [model.absolute().parent, model.resolve().parent]
        target = next((place / location for place in places if os.path.lexists(place / location)), None)
        real = target.resolve(strict=True) if target else None
        inside = real is not None and any(real.is_relative_to(place.resolve()) for place in places)
    except FileNotFoundError:
        real = None
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelBundleError(
            f'{model} keeps weights in {location[:200]!r}, which cannot be followed: {error}.',
            remedy='Copy that file beside the model.',
        ) from error
    if real is None:
        raise ModelBundleError(
            f'{model} keeps weights in {location[:200]!r}, which is not there.',
            remedy='Copy that file beside the model.',
        )
    if not inside:
        raise ModelBundleError(
            f'{model} keeps weights in {location!r}, a link to {real}, outside its own directory.',
            remedy='Copy the file itself beside the model.',
        )
    return real


def read_sealed(path: Path) -> tuple[mmap.mmap | bytes, str]:
    """
    Copy a file into memory that cannot be changed any more, and return a read-only map of it with its hex digest.

    The digest is that of the copy. The memory is given back with the last view of the map.

    :raises ModelBundleError: the file is missing, unreadable, no regular file, or larger than the memory available.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        _require_memory(path, size)
        descriptor = os.memfd_create('c7-weights', os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            for chunk in read_pieces(path, file):
                digest.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[os.write(descriptor, view) :]
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
            # Private: before Linux 6.7, what is sealed against writing cannot be mapped as shared.
            sealed = mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) if size else b''
        finally:
            os.close(descriptor)
    return sealed, digest.hexdigest()


def _require_memory(path: Path, size: int) -> None:
    require_memory(path, size, remedy='Free memory, or export the model in half precision.')


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
    :raises EngineContentError: a constant does not lie in its file as it says, or the rest is too large.
    """
    used = names_read(model.graph.node) | {value.name for value in model.graph.output}
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


def _misplaced(path: Path, tensor: onnx.TensorProto, problem: str) -> EngineContentError:
    return EngineContentError(
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
        raise EngineContentError(
            f'the model with its weights inside has {size} bytes, and no ONNX file can have 2 GiB.',
            remedy='Export it in half precision, with its weights in the main graph, or load it with onnx_trt_ep.',
        )
