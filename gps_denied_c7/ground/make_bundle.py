"""
``c7_engine bundle``: make a model bundle (M-1) from an ONNX model: what it takes, what it must answer, and how exactly.

The golden answers are those of plain ONNX Runtime in a process of its own (:mod:`reference`), to pictures of different
kinds: noise, flat ones, ones that give few and many detections, and the user's own. What the node would run has to give
the same answers before the bundle is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gps_denied_c7._json import Fields
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.store import engine_model_name
from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.ground.bundle_request import BundleRequest
from gps_denied_c7.ground.command_line import (
    Command,
    add_answer_timeout,
    input_size,
    number,
    numbers,
    path_argument,
    print_field,
    print_json,
    print_tensors,
    whole_number,
)
from gps_denied_c7.ground.golden import answer_cases, golden_cases
from gps_denied_c7.ground.input_shapes import fixed_inputs, with_fixed_inputs
from gps_denied_c7.ground.output_rules import TOLERANCES, certain_outputs, output_rules, refuse_empty, stable_cases
from gps_denied_c7.ground.staged_directory import staged_directory
from gps_denied_c7.ground.trial import served_model
from gps_denied_c7.image.preprocess_spec import LETTERBOX_ANCHORS, LETTERBOX_SCALINGS, Interpolation, ResizeMode
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle, write_bundle
from gps_denied_c7.model.compare import OutputRule, rule_from_json, rule_to_json
from gps_denied_c7.model.external_data import find_external
from gps_denied_c7.model.files import BundleFile, file_sha256, read_npz, write_atomically
from gps_denied_c7.model.image_input import default_preprocessing
from gps_denied_c7.model.onnx_file import OnnxModel, read_onnx
from gps_denied_c7.pipeline.model_fit import ImageSettings, fit_tensors
from gps_denied_c7.runtimes.protocol import BuildConfig, ProviderSet
from gps_denied_c7.runtimes.registry import create_runtime
from gps_denied_c7.text import plain

__all__ = ['COMMAND', 'MadeBundle', 'make_bundle']

STRATEGY = 'onnx_trt_ep'
_QUANTISED = (
    *('QuantizeLinear', 'DequantizeLinear', 'DynamicQuantizeLinear'),
    *('QLinearConv', 'QLinearMatMul', 'ConvInteger', 'MatMulInteger'),
)

_NOTES = """Golden answers are computed by plain ONNX Runtime on the CPU, without optimisation, in a separate
process, for test images (noise, black, white, blobs, checkerboard, stripes) and yours. Every engine
has to reproduce them. A floating-point output may differ by a share of its range: {fp32:.1%} if engines
compute in fp32 only, {fp16:.1%} if fp16 is allowed, and at least by four rounding steps of that precision.
Give a --rule for an output that holds whole numbers, whose size depends on the image, or that lists
keypoints (their order may change):
  --rule scores=allclose,rtol=0.01,atol=0.001
  --rule keypoints=matched_distance,max_distance=1.5,min_fraction=0.95
  --rule labels=set_overlap,min_iou=0.9,members=values        (members: nonzero, values, or top_k with k=N)
  --rule boxes=default        (a general comparison without numbers to set)
""".format(**TOLERANCES)


@dataclass(frozen=True, slots=True)
class MadeBundle:
    """
    Hold a bundle that was written.

    :param notes: what its user should know, one sentence each.
    """

    bundle: ModelBundle
    notes: tuple[str, ...]


def make_bundle(request: BundleRequest, accept: Callable[[ModelBundle], None] = lambda bundle: None) -> MadeBundle:
    """
    Write the bundle and check that the node's runtime gives its golden answers; it is complete or not made at all.

    The same model, request and versions give the same bytes.

    :param accept: called with the bundle before it is moved to its place; raises a C7Error to refuse it.
    :raises C7Error: of any kind: the model is damaged, random, leaves sizes free that were not given, is not fed
        by one image, fails on a request that was given or on all others, is answered differently by the runtime, tests
        too little, needs a rule that was not given, or the directory cannot be written.
    """
    notes: list[str] = []
    name = request.name or engine_model_name(request.model.stem)
    if name != engine_model_name(name):
        raise ModelBundleError(f'name: {name!r} is not a plain name.', remedy='Use A-Z a-z 0-9 . _ - only.')
    model = _in_few_files(request.model, notes)
    _refuse_random(model)
    source = model.source
    arrays = _read_request(request.golden_input)
    inputs = fixed_inputs(source, request, arrays)
    preprocessing = default_preprocessing(inputs).replace(**request.preprocessing)
    with staged_directory(request.output) as stage:
        path = stage / f'{name}.onnx'
        for location in model.external_data:
            _copy(find_external(request.model, location), stage / location)
        content = with_fixed_inputs(source, inputs, notes)
        write_atomically(path, content)
        artefact = Artefact.of_file(
            path,
            strategy=STRATEGY,
            weights_digest=f'sha256:{model.content_sha256}',
            precision=_precision_of(source),
        )
        if artefact.external_data.items() - model.external_data.items():
            raise ModelBundleError(
                f'the weights of {request.model} changed while they were read.', remedy='Run it again.'
            )
        whole = str(path) if model.external_data else content
        outputs, cases = answer_cases(whole, list(golden_cases(request, inputs, preprocessing, arrays)), request, notes)
        outputs = certain_outputs(outputs, model, inputs)
        rules = output_rules(request, outputs, cases, artefact.precision, notes)
        cases = stable_cases(request, rules, cases, notes)
        refuse_empty(request, rules, cases, notes)
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


def _in_few_files(path: Path, notes: list[str]) -> OnnxModel:
    """Return the model with its weights inside, so that one digest covers all of it, or with files of their own."""
    model = read_onnx(path, None)
    if not model.external_data:
        return model
    files = ', '.join(model.external_data)
    try:
        source = model.self_contained()
    except EngineDeserializeError:
        notes.append(f'The weights stay in {files}, under their own digests: one ONNX file is limited to 2 GiB.')
        source, left = model.source, model.external_data
    else:
        notes.append(f'The weights in {files} were copied into the .onnx, under its digest.')
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


def _read_request(path: Path | None) -> dict[str, NDArray]:
    if path is None:
        return {}
    arrays = read_npz(BundleFile(path.absolute(), file_sha256(path)))
    if not arrays:
        raise ModelBundleError(f'{path} holds no array.', remedy='Save one array for each input of the model.')
    return arrays


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
            f'answers to the same image differ from run to run, because of {", ".join(random[:8])}'
            f'{f" and {len(random) - 8} more" if len(random) > 8 else ""}.',
            remedy='Export it in evaluation mode (model.eval()), and remove its random operators.',
        )


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
        # The first one twice: one request must not change the answer to the next.
        for index in (*range(len(bundle.golden)), 0):
            found = runtime.infer(handle, bundle.golden_inputs(index))
            if problems := bundle.compare(found, bundle.golden_outputs(index)):
                raise ModelBundleError(
                    f'the runtime of the node answers {bundle.golden[index].name!r} differently from plain session.run '
                    f'without optimisation: {" ".join(problems)}',
                    remedy='Give a wider --rule if that is close enough; else do not use this model with this '
                    'ONNX Runtime.',
                )
    finally:
        runtime.release_engine(handle)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('model', type=path_argument, metavar='MODEL.onnx', help='the exported network')
    parser.add_argument(
        '--output', type=path_argument, required=True, metavar='DIR',
        help='directory to make; it must not exist, or must be empty',
    )  # fmt: skip
    parser.add_argument('--name', help="the network's name in messages and logs; default: that of the file")
    parser.add_argument(
        '--input-size', type=input_size, action='append', default=[], metavar='[INPUT=]SIZE',
        help='for a model with free sizes: WIDTHxHEIGHT of the image, or INPUT=1x3x480x640 with every axis',
    )  # fmt: skip
    parser.add_argument(
        '--precision', choices=sorted(TOLERANCES), default='fp16',
        help='the lowest precision that engines may compute in; sets the tolerance; default: %(default)s',
    )  # fmt: skip
    parser.add_argument(
        '--rule', type=_rule, action='append', default=[], metavar='OUTPUT=KIND,…',
        help='how answers of an output are compared; see below',
    )  # fmt: skip
    parser.add_argument(
        '--golden-input', type=path_argument, metavar='FILE.npz',
        help='a golden request of your own, one array for each input',
    )  # fmt: skip
    parser.add_argument(
        '--golden-image', type=path_argument, nargs='+', action='extend', default=[], metavar='PICTURE',
        help='JPEG or PNG files for further golden requests; best: pictures like those of the flight',
    )  # fmt: skip
    parser.add_argument(
        '--allow-non-finite', action='append', default=[], metavar='OUTPUT',
        help='NaN and infinity are valid in this output, for example as a mask or "no detection"',
    )  # fmt: skip
    parser.add_argument(
        '--force', action='store_true', help='make the bundle even if its golden answers are a weak test'
    )
    parser.add_argument(
        '--seed', type=whole_number(0, 2**32 - 1), default=0, metavar='N',
        help='seed of the random test images; default: %(default)s',
    )  # fmt: skip
    add_answer_timeout(parser)
    _add_preprocessing(parser)


def _add_preprocessing(parser: argparse.ArgumentParser) -> None:
    pixels = parser.add_argument_group('pre-processing', 'value = (pixel * scale - mean) / std, with pixels in 0..255')
    pixels.add_argument(
        '--resize', choices=[mode.value for mode in ResizeMode],
        help='how images of another size are resized; default: stretch',
    )  # fmt: skip
    pixels.add_argument('--colour', choices=('gray', 'rgb', 'bgr'), help='default: rgb, or gray for one channel')
    pixels.add_argument('--mean', type=numbers, metavar='M[,M,M]', help='default: 0; negative: --mean=-1,-1,-1')
    pixels.add_argument('--std', type=numbers, metavar='S[,S,S]', help='default: 1')
    pixels.add_argument('--scale', type=number, help='default: 1/255, or 1 for a model that takes uint8')
    pixels.add_argument('--pad-value', type=number, help='pixel value of the border of letterbox; default: 0')
    pixels.add_argument(
        '--interpolation', choices=[mode.value for mode in Interpolation], metavar='NAME',
        help=f'as in training, one of {", ".join(mode.value for mode in Interpolation)}: OpenCV\'s by name, or '
        "Pillow's (torchvision with antialiasing); default: halving_linear, which averages when it shrinks an image",
    )  # fmt: skip
    pixels.add_argument('--letterbox-anchor', choices=LETTERBOX_ANCHORS, help='default: centre')
    pixels.add_argument(
        '--letterbox-scaling', choices=LETTERBOX_SCALINGS,
        help='fit enlarges a smaller image, shrink does not; default: fit',
    )  # fmt: skip


def _run(options: argparse.Namespace) -> int:
    named = {name: shape for name, shape in options.input_size if name or len(shape) != 2}
    sizes = [shape for name, shape in options.input_size if not name and len(shape) == 2]
    given = {
        'resize': options.resize,
        'colour': options.colour,
        'mean': options.mean,
        'std': options.std,
        'scale': options.scale,
        'pad_value': options.pad_value,
        'interpolation': options.interpolation,
        'letterbox_anchor': options.letterbox_anchor,
        'letterbox_scaling': options.letterbox_scaling,
    }
    with _interrupted_by_signals() as check_interrupted:

        def accept(bundle: ModelBundle) -> None:
            with served_model(bundle, ImageSettings()):
                check_interrupted()

        result = make_bundle(
            BundleRequest(
                model=options.model,
                output=options.output,
                name=options.name,
                image_size=(sizes[-1][0], sizes[-1][1]) if sizes else None,
                shapes=named,
                precision=options.precision,
                rules=options.rule,
                golden_input=options.golden_input,
                golden_images=options.golden_image,
                allow_non_finite=options.allow_non_finite,
                force=options.force,
                preprocessing={name: value for name, value in given.items() if value is not None},
                seed=options.seed,
                answer_timeout_s=options.answer_timeout,
            ),
            accept=accept,
        )
    if options.json:
        print_json(path=str(options.output), notes=list(result.notes), model=result.bundle.to_json())
    else:
        print(plain(options.output))
        _print_bundle(result.bundle, result.notes)
    return 0


def _print_bundle(bundle: ModelBundle, notes: Sequence[str]) -> None:
    print_field('model', f'{bundle.name}, weights {bundle.weights_digest}')
    print_tensors(bundle.inputs, bundle.outputs)
    assert bundle.preprocessing is not None
    print_field('pixels', ', '.join(f'{name} {value}' for name, value in bundle.preprocessing.to_json().items()))
    for rule in bundle.rules:
        settings = [f'{name} {value}' for name, value in rule_to_json(rule).items() if name != 'kind']
        print_field('rule', f'{rule.output}: {", ".join([rule.kind, *settings])}')
    print_field('golden', ', '.join(case.name for case in bundle.golden))
    if bundle.allow_non_finite:
        print_field('not finite', ', '.join(bundle.allow_non_finite))
    for note in notes:
        print_field('note', note)


@contextmanager
def _interrupted_by_signals() -> Iterator[Callable[[], None]]:
    """
    Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it removes unfinished files.

    Not for a build: these signals end it at once inside the vendor's library, and no unfinished engine is ever loaded.

    :return: raises KeyboardInterrupt where a signal has come. Python drops what a handler raises while it runs hooks of
        its own, as an import does.
    """
    interrupted = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def check() -> None:
        if interrupted:
            raise KeyboardInterrupt

    before = {}
    # Only the main thread may set handlers; a SIGHUP that is ignored, as under nohup, stays ignored.
    with suppress(ValueError):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, interrupt)
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rule(text: str) -> OutputRule:
    output, _, rest = text.partition('=')
    kind, *settings = rest.split(',')
    values: dict[str, Any] = {'kind': kind}
    for setting in settings:
        name, _, value = setting.partition('=')
        values[name] = _setting(value)
    try:
        return rule_from_json(output, Fields(values, output))
    except ModelBundleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _setting(text: str) -> int | float | str:
    with suppress(argparse.ArgumentTypeError):
        return int(text) if re.fullmatch(r'-?\d{1,18}', text, re.ASCII) else number(text)
    return text


COMMAND = Command(
    name='bundle',
    summary='make a model bundle from an .onnx',
    description='Make a model bundle from an .onnx: a directory with the model, a model.json that says how images are\n'
    'prepared for it, and golden requests (test images with the answers that every engine has to give). It is\n'
    'loaded as the node would load it. The directory is complete, or is not made at all.',
    add_arguments=_add_arguments,
    run=_run,
    notes=_NOTES,
)
