"""
Make a model bundle (M-1) from an ONNX model: what it takes and gives, what it must answer, and how exactly.

The golden answers are those of plain ONNX Runtime in a process of its own (:mod:`reference`), to pictures of different
kinds: noise, flat ones, ones that give few and many detections, and the user's own. What the node would run has to give
the same answers before the bundle is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.store import engine_model_name
from gps_denied_c7.errors import (
    EngineDeserializeError,
    EngineSchemaMismatchError,
    InferenceError,
    ModelBundleError,
)
from gps_denied_c7.ground.reference import reference_answers
from gps_denied_c7.ground.trial import read_picture
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess import PreprocessingSpec, Preprocessor
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.bundle_write import write_bundle
from gps_denied_c7.model.compare import Alike, AllClose, OutputRule, compare_output
from gps_denied_c7.model.external_data import find_external
from gps_denied_c7.model.files import GOLDEN_LIMIT_BYTES, BundleFile, file_sha256, read_npz, write_atomically
from gps_denied_c7.model.image_input import default_preprocessing, image_axes, image_input, image_layout
from gps_denied_c7.model.onnx_file import OnnxModel, read_onnx
from gps_denied_c7.pipeline.model_fit import ImageSettings, fit_tensors
from gps_denied_c7.runtimes.protocol import BuildConfig, ProviderSet
from gps_denied_c7.runtimes.registry import create_runtime
from gps_denied_c7.tensors import TensorSpec, check_finite

if TYPE_CHECKING:
    import onnx

__all__ = [
    'TOLERANCES',
    'BundleRequest',
    'MadeBundle',
    'default_rule',
    'golden_pictures',
    'make_bundle',
    'noise_picture',
]

STRATEGY = 'onnx_trt_ep'

TOLERANCES = {'fp32': 0.005, 'fp16': 0.01}
"""
Largest error allowed by default, as a share of an output's range, by the precision that engines compute in.

A feature network of SuperPoint's shape differs by 0.6 % in FP16 on a GPU. FP32 there may mean TF32, whose
mantissa is FP16's, so its share is half of FP16's and no less.
"""

# One step of each arithmetic relative to the value: 10 bits of mantissa in FP16 and in TF32, which FP32 may mean on a
# GPU, 7 in BF16; 8 bits with a sign in INT8.
_STEPS = {'fp32': 2.0**-10, 'fp16': 2.0**-10, 'bf16': 2.0**-7, 'int8': 2.0**-7}
_FLOOR_STEPS = 4
_SMALLEST_NORMAL = {'fp16': 2.0**-14}
"""Below it FP16 has fewer bits, and an engine may answer zero."""

_FLAT = ('black', 'white')
_QUANTISED = (
    *('QuantizeLinear', 'DequantizeLinear', 'DynamicQuantizeLinear'),
    *('QLinearConv', 'QLinearMatMul', 'ConvInteger', 'MatMulInteger'),
)
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
    :param golden_input: ``.npz`` with one request, one array for each input, to be answered before all others.
    :param golden_images: JPEG or PNG files to be answered too, pre-processed as the node would.
    :param allow_non_finite: outputs in which NaN and infinities are meant.
    :param force: make the bundle also where its golden answers prove little.
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
    golden_images: Sequence[Path] = ()
    allow_non_finite: Sequence[str] = ()
    force: bool = False
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


@dataclass(frozen=True, slots=True)
class _Case:
    """
    One golden request and its answer.

    :param given: the user gave it, and is told where it cannot be used.
    :param answer_to_rounded: to the same request in half precision, which is how the engines of a GPU see it.
    """

    name: str
    inputs: dict[str, NDArray]
    given: bool = False
    answer: dict[str, NDArray] = field(default_factory=dict)
    answer_to_rounded: dict[str, NDArray] = field(default_factory=dict)


def make_bundle(request: BundleRequest, accept: Callable[[ModelBundle], None] = lambda bundle: None) -> MadeBundle:
    """
    Write the bundle and prove that what the node runs gives its golden answers; it appears whole or not at all.

    The same model, request and versions give the same bytes.

    :param accept: called with the bundle before it is in its place, raises a C7Error to refuse it.
    :raises C7Error: of whatever kind: the model is damaged, random, leaves sizes free that were not given, is not fed
        by one image, fails on a request that was given or on all others, is answered otherwise by the runtime, proves
        too little, needs a rule that was not given, or the directory cannot be written.
    """
    notes: list[str] = []
    name = request.name or engine_model_name(request.model.stem)
    if name != engine_model_name(name):
        raise ModelBundleError(f'name: {name!r} is no plain name.', remedy='Use A-Z a-z 0-9 . _ - only.')
    model = _in_few_files(request.model, notes)
    _refuse_random(model)
    source = model.source
    arrays = _read_request(request.golden_input)
    inputs = _fixed_inputs(source, request, arrays)
    preprocessing = default_preprocessing(inputs).replace(**request.preprocessing)
    with _staged(request.output) as stage:
        path = stage / f'{name}.onnx'
        for location in model.external_data:
            _copy(find_external(request.model, location), stage / location)
        content = _with_fixed_inputs(source, inputs, notes)
        write_atomically(path, content)
        artefact = Artefact.of_file(
            path,
            strategy=STRATEGY,
            weights_digest=f'sha256:{model.content_sha256}',
            precision=_precision_of(source),
        )
        if artefact.external_data.items() - model.external_data.items():
            raise ModelBundleError(f'the weights of {request.model} changed meanwhile.', remedy='Make it once more.')
        whole = str(path) if model.external_data else content
        outputs, cases = _answered(whole, list(_cases(request, inputs, preprocessing, arrays)), request, notes)
        outputs = _certain(outputs, model, inputs)
        rules = _rules(request, outputs, cases, artefact.precision, notes)
        cases = _stable(request, rules, cases, notes)
        _weigh(request, rules, cases, notes)
        bundle = write_bundle(
            stage,
            name=name,
            weights_digest=artefact.weights_digest,
            inputs=inputs,
            outputs=outputs,
            preprocessing=preprocessing,
            artefacts=[artefact],
            rules=rules,
            golden={case.name: (case.inputs, case.answer) for case in cases},
            allow_non_finite=request.allow_non_finite,
        )
        _prove(bundle)
        accept(bundle)
    return MadeBundle(ModelBundle.load(request.output), tuple(notes))


def default_rule(output: str, golden: NDArray | Sequence[NDArray], precision: str, computed_in: str = '') -> AllClose:
    """
    Return the rule for a dense floating-point output: a share of the range of its golden answers.

    The tolerance is ``max(TOLERANCES[precision] * (max - min), floor)``, over the finite values of all answers. The
    floor is what rounding alone costs: four steps of the arithmetic, each ``2**-10`` of the greatest magnitude in FP16
    and TF32 and ``2**-7`` in BF16 and INT8, but in FP16 no less than ``2**-14``, its smallest normal number. An answer
    of 1000 +- 0.01 so gets 3.9 in FP16, an INT8 network with answers in -1 to 1 gets 0.031.

    :param golden: its answer, or its answers to several requests.
    :param precision: the coarsest that engines may compute in, of ``TOLERANCES``.
    :param computed_in: what the model itself computes in, where that is coarser: ``bf16`` or ``int8``.
    :raises ModelBundleError: the output holds no floating-point numbers, for which a share means nothing.
    """
    arrays = [golden] if isinstance(golden, np.ndarray) else list(golden)
    if kinds := {array.dtype.name for array in arrays if array.dtype.kind != 'f'}:
        raise ModelBundleError(
            f'output {output!r} holds {min(kinds)} values, for which no tolerance follows from the range.',
            remedy=f'Give --rule {output}=set_overlap,min_iou=0.9,members=values, {output}=allclose,rtol=0,atol=0, '
            f'or {output}=default.',
        )
    spread, greatest = _extent(arrays)
    # An answer that is the same everywhere has no range; its own size is the next best measure.
    tolerance = max(TOLERANCES[precision] * (spread or greatest or 1.0), _floor(greatest, precision, computed_in))
    return AllClose(output, rtol=0.0, atol=float(f'{tolerance:.3g}'))


def _floor(greatest: float, precision: str, computed_in: str) -> float:
    step = max(_STEPS[precision], _STEPS.get(computed_in, 0.0))
    return max(_FLOOR_STEPS * step * greatest, _SMALLEST_NORMAL.get(precision, 0.0))


def _extent(arrays: Sequence[NDArray]) -> tuple[float, float]:
    """Return the range of the finite values of all arrays, and the greatest magnitude among them."""
    low, high = np.inf, -np.inf
    for array in arrays:
        finite = array[np.isfinite(array)].astype(np.float64)
        low, high = min(low, finite.min(initial=np.inf)), max(high, finite.max(initial=-np.inf))
    return (float(high - low), float(max(abs(low), abs(high)))) if low <= high else (0.0, 0.0)


def golden_pictures(width: int, height: int, seed: int) -> dict[str, NDArray[np.uint8]]:
    """
    Return RGB pictures (height, width, 3) of different kinds by name, the same for one seed.

    ``noise``: structure at every scale. ``black``, ``white``: nothing at all. ``blobs``: a few squares and discs on
    grey, for few detections. ``checkerboard``: corners everywhere. ``stripes``: edges without corners.
    """
    rows, columns = np.mgrid[:height, :width]
    chance = np.random.RandomState(seed)
    blobs = np.full((height, width, 3), 96, np.uint8)
    for index in range(6):
        y, x, size = chance.randint(height), chance.randint(width), chance.randint(2, max(3, min(height, width) // 10))
        away = np.abs(np.stack((rows - y, columns - x)))
        inside = away.max(axis=0) <= size if index % 2 else np.square(away).sum(axis=0) <= size * size
        blobs[inside] = chance.randint(0, 256, 3)
    cell = max(2, min(height, width) // 24)
    boards = {
        'checkerboard': (rows // cell + columns // cell) % 2,
        # Ever wider: 1, 2, 3 … cells.
        'stripes': np.floor(np.sqrt(2.0 * (rows + 2 * columns) / cell)) % 2,
    }
    return {
        'noise': noise_picture(width, height, seed),
        'black': np.zeros((height, width, 3), np.uint8),
        'white': np.full((height, width, 3), 255, np.uint8),
        'blobs': blobs,
        **{name: np.repeat((board * 255).astype(np.uint8)[..., None], 3, axis=2) for name, board in boards.items()},
    }


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


def _in_few_files(path: Path, notes: list[str]) -> OnnxModel:
    """Return the model with its weights inside, so that one digest covers all of it, or with files of their own."""
    model = read_onnx(path, None)
    if not model.external_data:
        return model
    files = ', '.join(model.external_data)
    try:
        source = model.self_contained()
    except EngineDeserializeError:
        notes.append(f'The weights stay in {files}, under digests of their own: one ONNX file can have no 2 GiB.')
        source, left = model.source, model.external_data
    else:
        notes.append(f'The weights in {files} were taken into the .onnx, under its digest.')
        left = {}
    return dataclasses.replace(
        model, source=source, sha256=hashlib.sha256(source).hexdigest(), external_data=left, weights={}
    )


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise ModelBundleError(f'{source} cannot be copied to {target}: {error.strerror}.') from error


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
            width, height = request.image_size
            place = 2 if image_layout(shape) == 'nchw' else 1
            wanted = (*shape[:place], height, width, *shape[place + 2 :])
            shape = _agreed(spec, shape, wanted, 'follows from the size given')
        if spec.name in arrays:
            shape = _agreed(spec, shape, arrays[spec.name].shape, 'has the golden request')
        if len(shape) == 4:
            shape = image_axes(shape, colour=request.preprocessing.get('colour'))
        if shape[:1] == (None,):
            shape = (1, *shape[1:])
        if None in shape:
            raise _left_free(spec, shape)
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


def _left_free(spec: TensorSpec, shape: Shape) -> ModelBundleError:
    """Say which sizes of an input are still open, by what they mean where it may be an image."""
    every = f'--input-size {spec.name}=1x3x480x640 with every axis'
    if len(shape) != 4:
        return ModelBundleError(
            f'input {spec.name!r} ({_spelled(spec.axes)}) leaves sizes free.',
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
        f'input {spec.name!r} ({_spelled(spec.axes)}) leaves its {" and its ".join(free)} free.',
        remedy=f'Give {ways}.',
    )


def _agreed(spec: TensorSpec, have: Shape, given: Shape, how: str) -> tuple[int | None, ...]:
    fits = len(have) == len(given) and all(None in axes or axes[0] == axes[1] for axes in zip(have, given, strict=True))
    if not fits:
        raise ModelBundleError(
            f'input {spec.name!r} is {_spelled(have)}, but {_spelled(given)} {how}.', remedy='Make them agree.'
        )
    return tuple(want if axis is None else axis for axis, want in zip(have, given, strict=True))


def _spelled(shape: Shape | None) -> str:
    if shape is None:
        return 'any number of axes'
    return 'x'.join('?' if axis is None else str(axis) for axis in shape) or 'a scalar'


def _precision_of(model: bytes) -> str:
    """Return what the model computes in, by the operators and weights in its main graph."""
    import onnx

    graph = onnx.ModelProto.FromString(model).graph
    if any(node.op_type in _QUANTISED for node in graph.node):
        return 'int8'
    kinds = {tensor.data_type for tensor in graph.initializer}
    for precision, kind in (('fp32', onnx.TensorProto.FLOAT), ('fp16', onnx.TensorProto.FLOAT16)):
        if kind in kinds:
            return precision
    return 'bf16' if onnx.TensorProto.BFLOAT16 in kinds else 'fp32'


def _refuse_random(model: OnnxModel) -> None:
    if random := model.random:
        raise ModelBundleError(
            f'the model gives other answers to the same image each time, because of {", ".join(random[:8])}'
            f'{f" and {len(random) - 8} more" if len(random) > 8 else ""}.',
            remedy='Export it in evaluation mode (model.eval()), and take what is random out of it.',
        )


def _cases(
    request: BundleRequest, inputs: Sequence[TensorSpec], preprocessing: PreprocessingSpec, given: dict[str, NDArray]
) -> Iterator[_Case]:
    if given:
        for spec in inputs:
            if problem := spec.mismatch(given[spec.name]):
                raise ModelBundleError(f'{request.golden_input}: {problem}.', remedy='Save it as the model takes it.')
        yield _Case('request', given, given=True)
    image, preprocessor = image_input(inputs, preprocessing).name, Preprocessor(preprocessing)
    for number, path in enumerate(request.golden_images, 1):
        tensor = _tensor(preprocessor, read_picture(path))
        yield _Case(f'image{number}-{engine_model_name(path.stem)[:80]}', {image: tensor}, given=True)
    if len(inputs) > 1:
        return
    pictures = golden_pictures(preprocessing.width, preprocessing.height, request.seed)
    for name, picture in pictures.items():
        yield _Case(name, {image: _tensor(preprocessor, Pixels(picture, 'rgb'))})


def _tensor(preprocessor: Preprocessor, pixels: Pixels) -> NDArray:
    """Return a picture as the node would feed it."""
    tensor = np.zeros(preprocessor.spec.tensor_shape, preprocessor.spec.dtype)
    preprocessor.run(pixels, tensor)
    return tensor


def _answered(
    model: bytes | str, cases: Sequence[_Case], request: BundleRequest, notes: list[str]
) -> tuple[tuple[TensorSpec, ...], list[_Case]]:
    """Return the outputs, and the cases with their answers that can be used; the others are noted."""
    size = sum(array.nbytes for case in cases for array in case.inputs.values())
    requests = [each for case in cases for each in (case.inputs, _rounded(case.inputs))]
    reference = reference_answers(model, requests, limit_bytes=max(0, 2 * (GOLDEN_LIMIT_BYTES - size)))
    names = [spec.name for spec in reference.outputs]
    if names and (unknown := sorted(set(request.allow_non_finite) - set(names))):
        raise ModelBundleError(
            f'non-finite values were allowed for {unknown}, the outputs are {names}.', remedy='Correct the name.'
        )
    usable, faults = [], []
    for case, *answers in zip(cases, reference.answers[::2], reference.answers[1::2], strict=True):
        both = []
        try:
            for answer in answers:
                if isinstance(answer, InferenceError):
                    raise answer
                if answer is None:
                    raise ModelBundleError(f'golden tensors of more than {GOLDEN_LIMIT_BYTES >> 20} MB are not kept.')
                check_finite({name: value for name, value in answer.items() if name not in request.allow_non_finite})
                both.append(answer)
        except (InferenceError, ModelBundleError) as error:
            if case.given:
                raise ModelBundleError(
                    f'the golden request {case.name!r} cannot be used: {error.message}',
                    remedy='Give others or fewer; where non-finite values are meant, give --allow-non-finite OUTPUT.',
                ) from error
            faults.append(f'The picture {case.name!r} was left out of the golden requests: {error.message}')
        else:
            usable.append(replace(case, answer=both[0], answer_to_rounded=both[1]))
    if not usable:
        raise ModelBundleError(
            f'the model answers no golden request. {faults[0]}',
            remedy='Give --golden-image with pictures that it was made for; where non-finite values are meant, '
            '--allow-non-finite OUTPUT.',
        )
    notes += faults
    if reference.left_out:
        notes.append(f'The outputs {list(reference.left_out)} are no tensors of numbers, and not part of the bundle.')
    return reference.outputs, usable


def _rounded(inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
    return {
        name: array.astype(np.float16).astype(array.dtype) if array.dtype.kind == 'f' else array
        for name, array in inputs.items()
    }


def _stable(
    request: BundleRequest, rules: Sequence[OutputRule], cases: Sequence[_Case], notes: list[str]
) -> list[_Case]:
    """Leave out the requests that no engine in half precision could answer, as where all scores tie at a choice."""
    stable: list[_Case] = []
    unstable: list[str] = []
    for case in cases:
        problems = [
            f'output {rule.output!r}: {problem}.'
            for rule in rules
            if (
                problem := compare_output(
                    rule,
                    case.answer_to_rounded[rule.output],
                    case.answer[rule.output],
                    allow_non_finite=rule.output in request.allow_non_finite,
                )
            )
        ]
        why = f'half precision of its input alone changes the answer beyond the rules: {" ".join(problems)}'
        if not problems:
            stable.append(case)
        elif not case.given:
            unstable.append(f'The picture {case.name!r} was left out of the golden requests: {why}')
        else:
            _refuse(
                request, f'the golden request {case.name!r} proves little: {why}', 'give wider rules', notes
            )
            stable.append(case)
    if unstable and all(case.name in _FLAT for case in stable):
        _refuse(request, f'too few golden requests are left. {unstable[0]}', 'give wider rules', notes)
    notes += unstable
    return stable or list(cases)


def _certain(
    outputs: Sequence[TensorSpec], model: OnnxModel, inputs: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    """Return the outputs as they were seen, but for sizes that depend on the data by what the operators say."""
    inferred = model.output_shapes({spec.name: [size or 1 for size in spec.axes] for spec in inputs})
    certain = []
    for spec in outputs:
        shape, seen = inferred.get(spec.name), spec.shape
        if shape is not None and seen is not None and len(shape) == len(seen):
            seen = tuple(size if size == other else None for size, other in zip(shape, seen, strict=True))
        certain.append(dataclasses.replace(spec, shape=seen))
    return tuple(certain)


def _rules(
    request: BundleRequest, outputs: Sequence[TensorSpec], cases: Sequence[_Case], computed_in: str, notes: list[str]
) -> list[OutputRule]:
    given = {rule.output: rule for rule in request.rules}
    names = [spec.name for spec in outputs]
    if unknown := sorted(set(given) - set(names)):
        raise ModelBundleError(f'a rule was given for {unknown}, the outputs are {names}.', remedy='Correct the name.')
    return [
        given.get(spec.name)
        or _derived_rule(spec, [case.answer[spec.name] for case in cases], request, computed_in, notes)
        for spec in outputs
    ]


def _derived_rule(
    spec: TensorSpec, golden: Sequence[NDArray], request: BundleRequest, computed_in: str, notes: list[str]
) -> OutputRule:
    shape: Shape | None = spec.shape
    if shape is None or None in shape:
        raise ModelBundleError(
            f'output {spec.name!r} has a size that depends on the image ({_spelled(shape)}), so that comparing '
            'it element by element means nothing.',
            remedy=f'Give --rule {spec.name}=matched_distance,max_distance=1.5,min_fraction=0.95, or the like; '
            f'--rule {spec.name}=default compares by a rule of thumb.',
        )
    rule = default_rule(spec.name, golden, request.precision, computed_in)
    spread, greatest = _extent(golden)
    if spread <= 2 * _floor(greatest, request.precision, computed_in):
        # A constant in the middle would pass.
        _refuse(
            request,
            f'output {spec.name!r} is nearly constant: it changes by {spread:.3g} about {greatest:.3g} over '
            f'{len(golden)} golden requests, which rounding alone may do to it (tolerance {rule.atol:g}).',
            f'give a --rule for {spec.name}',
            notes,
        )
    if computed_in == 'int8':
        notes.append(
            f'Output {spec.name!r} is compared by the default rule: in INT8 single values differ by many steps, '
            'so that no bound for each means much.'
        )
        return Alike(spec.name)
    if all(np.array_equal(array, np.rint(array)) for array in golden):
        notes.append(
            f'Output {spec.name!r} holds whole numbers only. Where they are places or indices, whose order may '
            f'change with the precision, give --rule {spec.name}=matched_distance,max_distance=1.5,min_fraction=0.95.'
        )
    return rule


def _weigh(request: BundleRequest, rules: Sequence[OutputRule], cases: Sequence[_Case], notes: list[str]) -> None:
    """Refuse golden answers that prove nothing: empty ones, or one answer that passes for all others."""
    stuck = []
    for rule in rules:
        answers = [case.answer[rule.output] for case in cases]
        if not any(array.size for array in answers):
            _refuse(
                request,
                f'output {rule.output!r} is empty for all {len(cases)} golden requests, which proves nothing.',
                '',
                notes,
            )
        allowed = rule.output in request.allow_non_finite
        if len(cases) > 1 and not any(
            compare_output(rule, array, answers[0], allow_non_finite=allowed) for array in answers[1:]
        ):
            stuck.append(rule.output)
    if len(stuck) == len(rules) and stuck:
        _refuse(
            request,
            f'the answer to one golden request passes for that to each of the {len(cases)}: '
            'an engine that always answers the same would pass.',
            'give narrower rules',
            notes,
        )
    elif stuck:
        notes.append(f'Outputs {stuck} are the same for all golden requests, within their rules.')


def _refuse(request: BundleRequest, problem: str, otherwise: str, notes: list[str]) -> None:
    if not request.force:
        ways = ['Give --golden-image with pictures that the network was made for', otherwise, 'or --force']
        raise ModelBundleError(problem, remedy=f'{", ".join(filter(None, ways))}.')
    notes.append(f'{problem[0].upper()}{problem[1:]}')


def _prove(bundle: ModelBundle) -> None:
    """Answer the golden requests from the bundle as written, by what the node would run."""
    # One thread adds in one order, so that the same request has the same answer.
    config = C7InferenceConfig(cpu_threads=1)
    runtime = create_runtime(STRATEGY, config, providers=ProviderSet.CPU)
    try:
        handle = runtime.deserialize_engine(runtime.compile_engine(bundle, BuildConfig()))
    except EngineSchemaMismatchError as error:
        raise ModelBundleError(f'the model contradicts itself: {error.message}', remedy=error.remedy) from error
    try:
        fit_tensors(bundle, handle.inputs, handle.outputs, ImageSettings())
        # The first one twice: what an answer leaves behind must not reach the next.
        for index in (*range(len(bundle.golden)), 0):
            found = runtime.infer(handle, bundle.golden_inputs(index))
            if problems := bundle.compare(found, bundle.golden_outputs(index)):
                raise ModelBundleError(
                    f'what the node runs answers {bundle.golden[index].name!r} otherwise than plain session.run does '
                    f'without optimisation: {" ".join(problems)}',
                    remedy='Give a wider --rule where that is close enough; else do not fly this model with this '
                    'ONNX Runtime.',
                )
    finally:
        runtime.release_engine(handle)
