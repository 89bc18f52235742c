"""
Make a model bundle (M-1) from an ONNX model: what it takes and gives, what it must answer, and how exactly.

The golden answer is ONNX Runtime's on the CPU. The request is a picture made from a seed, or the user's own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.bundle import (
    AllClose,
    Artefact,
    BundleFile,
    ModelBundle,
    OutputRule,
    default_preprocessing,
    file_sha256,
    image_input,
    write_bundle,
)
from gps_denied_c7.bundle_files import read_npz, write_atomically
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.decoding import Pixels
from gps_denied_c7.engine_cache import engine_model_name
from gps_denied_c7.errors import EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.preprocessing import PreprocessingSpec, Preprocessor
from gps_denied_c7.runtime import BuildConfig, ProviderSet
from gps_denied_c7.runtimes import create_runtime
from gps_denied_c7.runtimes.onnx_model import read_onnx
from gps_denied_c7.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ['TOLERANCES', 'BundleRequest', 'MadeBundle', 'default_rule', 'make_bundle', 'noise_picture']

STRATEGY = 'onnx_trt_ep'

TOLERANCES = {'fp32': 0.005, 'fp16': 0.01}
"""
Largest error allowed by default, as a share of an output's range, by the precision that engines compute in.

A feature network of SuperPoint's shape differs by 0.6 % in FP16 on a GPU. FP32 there may mean TF32, whose
mantissa is FP16's, so its share is half of FP16's and no less.
"""

_PROTOBUF_LIMIT_BYTES = (1 << 31) - 1
_OCTAVES = (64, 32, 16, 8, 4, 2, 1)

Shape = Sequence[int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRequest:
    """
    Say what bundle is wanted.

    :param model: the ``.onnx`` file.
    :param output: directory to be made; it must not exist, or be empty.
    :param name: of the network, the file's where None.
    :param image_size: width and height in pixels, for a model that leaves them free.
    :param shapes: full shape by input name, for a model that leaves axes free.
    :param precision: the coarsest that engines of this bundle may compute in, of ``TOLERANCES``.
    :param rules: for outputs that the default rule does not suit.
    :param golden_input: ``.npz`` with one request, one array for each input; None for a picture made from ``seed``.
    :param preprocessing: settings of PreprocessingSpec that differ from ``default_preprocessing``.
    """

    model: Path
    output: Path
    name: str | None = None
    image_size: tuple[int, int] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    precision: str = 'fp16'
    rules: Sequence[OutputRule] = ()
    golden_input: Path | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class MadeBundle:
    """
    Hold a bundle that was written.

    :param notes: what its user should know, one sentence each.
    """

    bundle: ModelBundle
    notes: tuple[str, ...]


def make_bundle(request: BundleRequest) -> MadeBundle:
    """
    Write the bundle and prove that it answers its own golden request; the directory appears whole or not at all.

    The same model, request and versions give the same bytes.

    :raises C7Error: of whatever kind: the model is damaged, leaves sizes free that were not given, is not fed by
        one image, fails on the golden request, needs a rule that was not given, or the directory cannot be written.
    """
    notes: list[str] = []
    name = request.name or engine_model_name(request.model.stem)
    if name != engine_model_name(name):
        raise ModelBundleError(f'name: {name!r} is no plain name.', remedy='Use A-Z a-z 0-9 . _ - only.')
    source = _self_contained(request.model, notes)
    arrays = _read_request(request.golden_input)
    inputs = _fixed_inputs(source, request, arrays)
    preprocessing = default_preprocessing(inputs).replace(**request.preprocessing)
    golden = arrays or {image_input(inputs, preprocessing).name: _image_tensor(preprocessing, request.seed)}
    with _staged(request.output) as stage:
        path = stage / f'{name}.onnx'
        write_atomically(path, _with_fixed_inputs(source, inputs, notes))
        artefact = Artefact.of_file(
            path,
            strategy=STRATEGY,
            weights_digest=f'sha256:{hashlib.sha256(source).hexdigest()}',
            precision=_precision_of(source),
        )
        unproven = ModelBundle(
            name=name, root=stage, weights_digest=artefact.weights_digest, inputs=inputs, artefacts=(artefact,)
        )
        outputs, answer = _answer(unproven, golden)
        bundle = write_bundle(
            stage,
            name=name,
            weights_digest=artefact.weights_digest,
            inputs=inputs,
            outputs=outputs,
            preprocessing=preprocessing,
            artefacts=[artefact],
            rules=_rules(request, outputs, answer, notes),
            golden_inputs={spec.name: golden[spec.name] for spec in inputs},
            golden_outputs=answer,
        )
        _prove(bundle)
    return MadeBundle(ModelBundle.load(request.output), tuple(notes))


def default_rule(output: str, golden: NDArray, precision: str) -> AllClose:
    """
    Return the rule for a dense floating-point output: a share of the range of its golden answer.

    :param precision: of ``TOLERANCES``.
    :raises ModelBundleError: the output holds no floating-point numbers, for which a share means nothing.
    """
    if golden.dtype.kind != 'f':
        raise ModelBundleError(
            f'output {output!r} holds {golden.dtype} values, for which no tolerance follows from the range.',
            remedy=f'Give --rule {output}=set_overlap,min_iou=0.9,members=values, or {output}=allclose,rtol=0,atol=0.',
        )
    values = golden.astype(np.float64)
    spread = float(np.ptp(values)) if values.size else 0.0
    # An answer that is the same everywhere has no range; its own size is the next best measure.
    scale = spread or float(np.abs(values).max(initial=0.0)) or 1.0
    return AllClose(output, rtol=0.0, atol=float(f'{TOLERANCES[precision] * scale:.3g}'))


def noise_picture(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """
    Return an RGB picture (height, width, 3) with structure at every scale, full contrast, the same for one seed.

    White noise alone is gone after a network's first pooling.
    """
    # RandomState's stream is frozen, that of the newer generators may change between versions (NEP 19).
    noise = np.random.RandomState(seed)
    total = np.zeros((height, width, 3), np.int64)
    for cell in _OCTAVES:
        blocks = noise.randint(0, 256, (-(-height // cell), -(-width // cell), 3)).astype(np.int64)
        total += blocks.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    low, high = int(total.min()), int(total.max())
    return ((total - low) * 255 // max(1, high - low)).astype(np.uint8)


def _self_contained(path: Path, notes: list[str]) -> bytes:
    """Return the model's bytes with its weights inside, so that one digest covers all of it."""
    checked = read_onnx(path, None)
    if isinstance(checked.source, bytes):
        return checked.source
    import onnx

    real = path.resolve()
    size = sum((real.parent / file).stat().st_size for file in checked.external_files)
    if size > _PROTOBUF_LIMIT_BYTES - (1 << 24):
        raise ModelBundleError(
            f'{path} keeps {size} bytes of weights in other files, and one ONNX file can have no 2 GiB.',
            remedy='Export the model in half precision, or split it.',
        )
    model = onnx.load(str(real))
    notes.append(f'The weights in {", ".join(checked.external_files)} were taken into the .onnx, under its digest.')
    return bytes(model.SerializeToString(deterministic=True))


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Hand out a directory beside ``output`` that takes its place where nothing was raised."""
    target = output.absolute()
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise ModelBundleError(
                f'{output} exists already and is no empty directory.', remedy='Remove it, or name another one.'
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f'.{target.name[:100]}.'))
    except OSError as error:
        raise ModelBundleError(f'{output} cannot be made: {error.strerror}.', remedy='Name another one.') from error
    try:
        yield stage
        os.chmod(stage, 0o755)
        os.rename(stage, target)
    except OSError as error:
        raise ModelBundleError(f'{output} cannot be made: {error.strerror}.', remedy='Name another one.') from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _read_request(path: Path | None) -> dict[str, NDArray]:
    if path is None:
        return {}
    arrays = read_npz(BundleFile(path.absolute(), file_sha256(path)))
    if not arrays:
        raise ModelBundleError(f'{path} holds no array.', remedy='Save one array for each input of the model.')
    return arrays


def _fixed_inputs(
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
            shape = _agreed(spec, shape, request.shapes[spec.name], 'was given')
        if request.image_size is not None and len(shape) == 4:
            shape = _agreed(spec, shape, _image_shape(shape, request.image_size), 'follows from the size given')
        if spec.name in arrays:
            shape = _agreed(spec, shape, arrays[spec.name].shape, 'has the golden request')
        if shape[:1] == (None,):
            shape = (1, *shape[1:])
        if None in shape:
            raise ModelBundleError(
                f'input {spec.name!r} leaves sizes free: {_spelled(spec.axes)}.',
                remedy='Give --input-size WIDTHxHEIGHT for an image, or '
                f'--input-size {spec.name}=1x3x480x640 with every axis.',
            )
        fixed.append(TensorSpec(spec.name, spec.dtype, tuple(shape)))
    return tuple(fixed)


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
            f'input {value.name!r} is no tensor of numbers with a known number of axes.',
            remedy='Export the model with one image input.',
        )
    # Some exporters write a free axis as 0 or -1.
    axes = tuple(axis.dim_value if axis.dim_value > 0 else None for axis in tensor.shape.dim)
    return TensorSpec(value.name, dtype.name, axes)


def _with_fixed_inputs(model: bytes, inputs: Sequence[TensorSpec], notes: list[str]) -> bytes:
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
        notes.append(f'The model in the bundle takes {name!r} as {_spelled(shapes[name])}, which was free before.')
    return bytes(fixed.SerializeToString(deterministic=True))


def _image_shape(shape: Shape, size: tuple[int, int]) -> Shape:
    width, height = size
    # Channels first is the exporters' habit; only a last axis of 1 or 3 behind a larger second one says otherwise.
    if shape[3] in (1, 3) and shape[1] not in (1, 3):
        return (shape[0], height, width, shape[3])
    return (shape[0], shape[1], height, width)


def _agreed(spec: TensorSpec, have: Shape, given: Shape, how: str) -> tuple[int | None, ...]:
    fits = len(have) == len(given) and all(None in axes or axes[0] == axes[1] for axes in zip(have, given, strict=True))
    if not fits:
        raise ModelBundleError(
            f'input {spec.name!r} is {_spelled(have)}, but {_spelled(given)} {how}.', remedy='Make them agree.'
        )
    return tuple(want if axis is None else axis for axis, want in zip(have, given, strict=True))


def _spelled(shape: Shape) -> str:
    return 'x'.join('?' if axis is None else str(axis) for axis in shape) or 'a scalar'


def _precision_of(model: bytes) -> str:
    """Return what the model computes in, by the operators and weights in its main graph."""
    import onnx

    graph = onnx.ModelProto.FromString(model).graph
    if any(node.op_type in ('QuantizeLinear', 'DequantizeLinear', 'QLinearConv') for node in graph.node):
        return 'int8'
    kinds = {tensor.data_type for tensor in graph.initializer}
    for precision, kind in (('fp32', onnx.TensorProto.FLOAT), ('fp16', onnx.TensorProto.FLOAT16)):
        if kind in kinds:
            return precision
    return 'bf16' if onnx.TensorProto.BFLOAT16 in kinds else 'fp32'


def _image_tensor(preprocessing: PreprocessingSpec, seed: int) -> NDArray:
    """Return a picture as the node would feed it."""
    tensor = np.zeros(preprocessing.tensor_shape, preprocessing.dtype)
    picture = noise_picture(preprocessing.width, preprocessing.height, seed)
    Preprocessor(preprocessing).run(Pixels(picture, 'rgb'), tensor)
    return tensor


def _answer(
    bundle: ModelBundle, golden_inputs: Mapping[str, NDArray], *, times: int = 1
) -> tuple[tuple[TensorSpec, ...], dict[str, NDArray]]:
    """Return the outputs and their values, owned by the caller, from ONNX Runtime on the CPU, asked so often."""
    # One thread adds in one order, so that the same request has the same answer.
    config = C7InferenceConfig(cpu_threads=1)
    runtime = create_runtime(STRATEGY, config, providers=ProviderSet.CPU)
    try:
        handle = runtime.deserialize_engine(runtime.compile_engine(bundle, BuildConfig()))
    except EngineSchemaMismatchError as error:
        raise ModelBundleError(f'the model contradicts itself: {error.message}', remedy=error.remedy) from error
    try:
        for _ in range(times):
            outputs = runtime.infer(handle, golden_inputs)
        return handle.outputs, {name: array.copy() for name, array in outputs.items()}
    finally:
        runtime.release_engine(handle)


def _rules(
    request: BundleRequest, outputs: Sequence[TensorSpec], answer: Mapping[str, NDArray], notes: list[str]
) -> list[OutputRule]:
    given = {rule.output: rule for rule in request.rules}
    names = [spec.name for spec in outputs]
    if unknown := sorted(set(given) - set(names)):
        raise ModelBundleError(f'a rule was given for {unknown}, the outputs are {names}.', remedy='Correct the name.')
    return [given.get(spec.name) or _derived_rule(spec, answer[spec.name], request, notes) for spec in outputs]


def _derived_rule(spec: TensorSpec, golden: NDArray, request: BundleRequest, notes: list[str]) -> OutputRule:
    if spec.shape is None or None in spec.shape:
        raise ModelBundleError(
            f'output {spec.name!r} has a size that depends on the image ({_spelled(spec.shape or ())}), so that '
            'comparing it element by element means nothing.',
            remedy=f'Give --rule {spec.name}=matched_distance,max_distance=1.5,min_fraction=0.95, or the like.',
        )
    rule = default_rule(spec.name, golden, request.precision)
    if golden.size and np.ptp(golden.astype(np.float64)) == 0:
        notes.append(
            f'Output {spec.name!r} is {golden.flat[0]} everywhere for this request, which proves little: '
            'give --golden-input.'
        )
    elif np.array_equal(golden, np.rint(golden)):
        notes.append(
            f'Output {spec.name!r} holds whole numbers only. Where they are places or indices, whose order may '
            f'change with the precision, give --rule {spec.name}=matched_distance,max_distance=1.5,min_fraction=0.95.'
        )
    return rule


def _prove(bundle: ModelBundle) -> None:
    """Answer the golden request from the bundle as written."""
    # Twice: every session of a model that throws dice begins with the same throw.
    _, found = _answer(bundle, bundle.golden_inputs(), times=2)
    if problems := bundle.compare(found):
        raise ModelBundleError(
            f'the model gives another answer to the same request: {" ".join(problems)}',
            remedy='Take what is random out of the model.',
        )
