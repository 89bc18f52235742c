"""``c7_engine bundle``: make a model bundle from an ``.onnx``."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from gps_denied_c7._json import Fields
from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.ground.bundle_request import BundleRequest
from gps_denied_c7.ground.command_arguments import Command, input_size, number, numbers
from gps_denied_c7.ground.command_line import path_argument
from gps_denied_c7.ground.command_output import print_field, print_json, spelled
from gps_denied_c7.ground.make_bundle import make_bundle
from gps_denied_c7.ground.output_rules import TOLERANCES
from gps_denied_c7.ground.trial import served_model
from gps_denied_c7.image.preprocess_spec import LETTERBOX_ANCHORS, LETTERBOX_SCALINGS, Interpolation, ResizeMode
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.compare import OutputRule, rule_from_json, rule_to_json
from gps_denied_c7.pipeline.model_fit import ImageSettings
from gps_denied_c7.text import plain

__all__ = ['COMMAND']

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
    parser.add_argument('--seed', type=int, default=0, help='seed of the random test images; default: %(default)s')
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
    with _interrupted_by_signals():
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
            ),
            accept=_serve,
        )
    if options.json:
        print_json(path=str(options.output), notes=list(result.notes), model=result.bundle.to_json())
    else:
        print(plain(options.output))
        _print_bundle(result.bundle, result.notes)
    return 0


def _print_bundle(bundle: ModelBundle, notes: Sequence[str]) -> None:
    print_field('model', f'{bundle.name}, weights {bundle.weights_digest}')
    for role, specs in (('input', bundle.inputs), ('output', bundle.outputs)):
        for spec in specs:
            print_field(role, spelled(spec))
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


def _serve(bundle: ModelBundle) -> None:
    with served_model(bundle, ImageSettings()):
        pass


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """
    Let SIGTERM and SIGHUP end a command as Ctrl-C does, so that it removes unfinished files.

    Not for a build: these signals end it at once inside the vendor's library, and no unfinished engine is ever loaded.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {}
    # Only the main thread may set handlers; a SIGHUP that is ignored, as under nohup, stays ignored.
    with suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _rule(text: str) -> OutputRule:
    output, _, rest = text.partition('=')
    kind, *settings = rest.split(',')
    values: dict[str, Any] = {'kind': kind}
    for setting in settings:
        name, _, value = setting.partition('=')
        values[name] = _plain(value)
    try:
        return rule_from_json(output, Fields(values, output))
    except ModelBundleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _plain(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
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
