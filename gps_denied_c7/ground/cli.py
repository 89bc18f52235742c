"""The ``c7_engine`` executable: build, inspect, verify and sweep engines, make model bundles (G-3, M-1)."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gps_denied_c7._json import Fields
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.manifest import EngineManifest, read_manifest
from gps_denied_c7.engines.store import EngineCache, fallback_directory
from gps_denied_c7.errors import C7Error, ModelBundleError
from gps_denied_c7.ground.command_line import log_to_stderr, path_argument
from gps_denied_c7.ground.compatibility import known_host
from gps_denied_c7.ground.inspect import EngineReport, inspect_engine
from gps_denied_c7.ground.make_bundle import TOLERANCES, BundleRequest, make_bundle
from gps_denied_c7.ground.sweep import Caches, Criteria, SweepReport, sweep
from gps_denied_c7.ground.trial import TrialRun, figures, read_picture, served_model
from gps_denied_c7.ground.verify import Checks, verify
from gps_denied_c7.image.preprocess import LETTERBOX_ANCHORS, LETTERBOX_SCALINGS, Interpolation, ResizeMode
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.compare import OutputRule, rule_from_json, rule_to_json
from gps_denied_c7.pipeline.model_fit import ImageSettings, fit_bundle
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.runtimes.protocol import BuildConfig, BuildProgress
from gps_denied_c7.runtimes.trt.build import PRECISIONS, build_engine
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.text import plain

__all__ = ['main']

_DAY_S = 86400.0
_UNITS = {'': 1, 'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}
_QUIET_PROGRESS_S = 10.0
# TensorRT's own choice: nobody waits for a build on the ground.
_ON_THE_GROUND = 3

_EXIT_CODES = """exit status:
  0    done; nothing was refused
  1    refused or failed; the text says why and what to do
  2    the command line is wrong
  130  interrupted; what was unfinished is removed

With --json, one JSON object goes to standard output, whatever the outcome; progress and errors go to standard
error. In every path, ~ is the home directory. More on one command: c7_engine COMMAND --help
"""

_BUNDLE_NOTES = """Golden answers are computed by plain ONNX Runtime on the CPU, without optimisation, in a process
of its own, for test images (noise, black, white, blobs, checkerboard, stripes) and yours. Every engine has
to repeat them. A floating-point output may differ by a share of its range, {fp32:.1%} where engines compute in
fp32 only, {fp16:.1%} where fp16 is allowed, and by four steps of that arithmetic at least. Give a --rule for an output
that holds whole numbers, whose size depends on the image, or that lists keypoints (their order may change):
  --rule scores=allclose,rtol=0.01,atol=0.001
  --rule keypoints=matched_distance,max_distance=1.5,min_fraction=0.95
  --rule labels=set_overlap,min_iou=0.9,members=values        (members: nonzero, values, or top_k with k=N)
  --rule boxes=default        (compares by a rule of thumb, as for outputs without a rule)
""".format(**TOLERANCES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    log_to_stderr('c7_engine', logging.INFO if options.verbose else logging.WARNING)
    try:
        status = _status(options)
        # Here, where a failure is still told; Python's own flush comes after the exit status. It may be closed.
        print(end='', flush=True)
        return status
    except OSError as error:
        if error.filename is None and sys.stdout is not None:
            # Python must not find out again at exit that nothing can be written.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f'c7_engine {options.command}: {plain(_unwritten(error))}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'c7_engine {options.command}: interrupted', file=sys.stderr)
        return 130


def _status(options: argparse.Namespace) -> int:
    """Run the command and tell of what it refuses; return the exit status."""
    try:
        status: int = options.run(options)
        return status
    except C7Error as error:
        print(f'c7_engine {options.command}: {plain(error)}', file=sys.stderr)
        if options.json:
            print(json.dumps({'error': {'message': error.message, 'remedy': error.remedy}}, indent=2))
        return 1


def _unwritten(error: OSError) -> str:
    """Say what failed; an error of writing to standard output is one without a file's name."""
    if error.filename is not None:
        return f'{error.filename}: {error.strerror}.'
    return f'standard output cannot be written: {error.strerror}. Send it elsewhere; what the command did stays done.'


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """
    Have SIGTERM and SIGHUP end a command as Ctrl-C does, so that it removes what is unfinished.

    Not for a build: they end it at once, in the middle of a vendor's library, and it leaves nothing that is loaded.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {}
    # Only the main thread may; a hang-up that is ignored, as below nohup, stays so.
    with suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- build ----------------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> int:
    config = C7InferenceConfig(
        engine_cache_dir=options.cache or C7InferenceConfig().engine_cache_dir,
        # A quarter of the budget is the builder's.
        gpu_memory_budget_bytes=4 * options.workspace,
        builder_optimization_level=options.optimization_level,
    )
    build = BuildConfig(allow_build=True, precision=options.precision, progress=_Progress())
    started_s = time.monotonic()
    entry = build_engine(fit_bundle(ModelBundle.load(options.model), _image_settings(options)), config, build)
    seconds = time.monotonic() - started_s
    manifest = read_manifest(entry.path)
    if options.json:
        _print_json(path=str(entry.path), seconds=round(seconds, 1), manifest=asdict(manifest))
    else:
        print(plain(entry.path))
        print(f'  built in {seconds:.1f} s')
        _print_manifest(manifest)
    return 0


class _Progress:
    """Tell on standard error how far a build is: on one line of a terminal, else whenever the phase changes."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = ('', 0.0)

    def __call__(self, progress: BuildProgress) -> None:
        if self._terminal:
            print(f'\r\x1b[K{progress}', end='', file=sys.stderr, flush=True)
            return
        # Without what it counts: every tactic is no news.
        phase = re.sub(r'\d+', '', progress.phase)
        last_phase, last_s = self._last
        if phase != last_phase or progress.elapsed_s - last_s >= _QUIET_PROGRESS_S:
            self._last = (phase, progress.elapsed_s)
            print(progress, file=sys.stderr, flush=True)


# --- inspect --------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    host, unknown = known_host()
    report = inspect_engine(options.file, host)
    if options.json:
        _print_json(**report.to_json(), host=asdict(host), unknown=list(unknown))
    else:
        _print_report(report, unknown)
    if report.plan is None:
        print(f'c7_engine inspect: {plain(report.path)} is no TensorRT engine.', file=sys.stderr)
    return 1 if report.plan is None else 0


def _print_report(report: EngineReport, unknown: Sequence[str]) -> None:
    print(plain(report.path))
    if report.manifest is not None:
        _print_manifest(report.manifest)
    elif report.name is not None:
        _print_field('model', f'{report.name.model}, {report.name.precision} (by the file name)')
        _print_field('built on', f'SM {report.name.sm}, TensorRT {report.name.tensorrt} (by the file name)')
    _print_field('header', f'plan of TensorRT {report.plan}' if report.plan else 'none of a TensorRT plan')
    _print_field('file', f'{report.size} bytes, sha256 {report.sha256}')
    print('the gate of this host would refuse:' if report.refusals else 'the gate of this host finds nothing wrong')
    for refusal in report.refusals:
        _print_field(refusal.field, f'expected {refusal.expected!r}, found {refusal.found!r}. {refusal.remedy}')
    if unknown:
        print('not compared with this host:')
        for reason in unknown:
            print(f'  {reason}')


def _print_manifest(manifest: EngineManifest) -> None:
    _print_field('model', f'{manifest.model}, {manifest.precision}')
    _print_field('source', f'sha256 {manifest.source_sha256}')
    _print_field('engine', f'{manifest.engine_bytes} bytes, sha256 {manifest.engine_sha256}')
    _print_field('built on', f'{manifest.gpu} (SM {manifest.sm}), TensorRT {manifest.tensorrt}, {manifest.platform}')
    _print_field('with', ', '.join(manifest.builder_flags))
    _print_field('versions', ', '.join(f'{name} {version}' for name, version in sorted(manifest.versions.items())))
    for role, specs in (('input', manifest.inputs), ('output', manifest.outputs)):
        for spec in specs:
            _print_field(role, _told(spec))


def _told(spec: TensorSpec) -> str:
    shape = 'of any rank' if spec.shape is None else 'x'.join('?' if axis is None else str(axis) for axis in spec.shape)
    return f'{spec.name} {spec.dtype} {shape}'


def _print_field(name: str, value: str) -> None:
    print(f'  {name:<10} {plain(value)}')


# --- verify ---------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    # Asked at most once, and only where an engine is met.
    host = None if options.any_host else functools.lru_cache(maxsize=1)(local_host_profile)
    paths, picture = options.paths, options.run_picture
    if not paths and isinstance(picture, Path):
        # verify --run BUNDLE
        paths, picture = [picture], True
    if not paths:
        options.error('the following arguments are required: PATH')
    checks = Checks(
        host,
        run_models=not options.digests_only,
        run=bool(picture),
        picture=read_picture(picture) if isinstance(picture, Path) else None,
        settings=_image_settings(options),
    )
    verdicts = []
    for path in paths:
        for verdict in verify(path, checks):
            verdicts.append(verdict)
            if not options.json:
                mark = 'ok' if verdict.admitted else 'REFUSED'
                print(f'{mark:<8} {verdict.kind:<9} {plain(verdict.path)}', flush=True)
                if not verdict.admitted:
                    print(f'         {plain(f"{verdict.refusal} {verdict.remedy}".rstrip())}', flush=True)
                if verdict.run is not None:
                    _print_run(verdict.run)
    refused = sum(not verdict.admitted for verdict in verdicts)
    if checks.run and not refused and not any(verdict.run for verdict in verdicts):
        raise ModelBundleError('there is no model to run at these paths.', remedy='Name a bundle or an .onnx.')
    if options.json:
        _print_json(verdicts=[verdict.to_json() for verdict in verdicts], refused=refused)
    else:
        print(f'{len(verdicts)} verified, {refused} refused')
    return 1 if refused else 0


def _print_run(run: TrialRun) -> None:
    width, height = run.source_size
    print(f'         a picture of {width}x{height}: {run.seconds * 1e3:.1f} ms, {run.runtime} on {run.provider}')
    for name, array in run.outputs.items():
        told = figures(array)
        numbers = [f'{key} {told[key]:.6g}' for key in ('min', 'mean', 'max') if key in told]
        numbers += [f'{told["not_finite"]} not finite'] if told['not_finite'] else []
        first = ' '.join(value if isinstance(value, str) else f'{value:.6g}' for value in told['first'])
        numbers.append(f'first {first}' if first else 'empty')
        size = 'x'.join(map(str, array.shape)) or 'a scalar'
        print(f'           {plain(name)} {array.dtype} {size}: {", ".join(numbers)}')


def _image_settings(options: argparse.Namespace) -> ImageSettings:
    given: dict[str, Any] = {} if options.colour is None else {'colour': options.colour}
    if options.input_size is not None:
        given['width'], given['height'] = options.input_size
    return ImageSettings(given)


# --- sweep ----------------------------------------------------------------------------------------


def _sweep(options: argparse.Namespace) -> int:
    defaults = C7InferenceConfig()
    caches = Caches(
        engines=[options.cache] if options.cache else EngineCache.at(defaults.engine_cache_dir).directories,
        ort=[options.ort_cache]
        if options.ort_cache
        else (defaults.ort_trt_cache_dir, fallback_directory(defaults.ort_trt_cache_dir)),
    )
    criteria = Criteria(
        older_than_s=None if options.older_than is None else options.older_than * _DAY_S,
        max_bytes=options.max_size,
        not_for=local_host_profile() if options.not_for_this_host else None,
    )
    report = sweep(caches, criteria, now_s=time.time(), dry_run=options.dry_run)
    if options.json:
        _print_json(**report.to_json())
    else:
        _print_sweep(report)
    return 1 if report.failed or report.refused else 0


def _print_sweep(report: SweepReport) -> None:
    for removal in report.removed:
        print(f'{"would remove" if report.dry_run else "removed"} {plain(removal.item.path)}')
        print(f'  {removal.item.kind}, {_size(removal.item.bytes)}: {removal.reason}')
    for removal in report.failed:
        print(f'NOT removed {plain(removal.item.path)}\n  {plain(removal.problem)} ({removal.reason})')
    for path, problem in report.refused:
        print(f'NOT swept {plain(path)}\n  {plain(problem)}')
    for path in report.foreign:
        print(f'left alone {plain(path)}\n  not written by a cache')
    print(
        f'{len(report.removed)} {"would be removed" if report.dry_run else "removed"} ({_size(report.freed_bytes)}), '
        f'{len(report.kept) + len(report.failed)} stay ({_size(report.kept_bytes)})'
    )


def _size(count: int) -> str:
    value, unit = float(count), 'bytes'
    for larger in ('KiB', 'MiB', 'GiB', 'TiB'):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f'{count} bytes' if unit == 'bytes' else f'{value:.1f} {unit}'


# --- bundle ---------------------------------------------------------------------------------------


def _bundle(options: argparse.Namespace) -> int:
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
    with _ended_in_order():
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
    bundle = result.bundle
    if options.json:
        _print_json(path=str(options.output), notes=list(result.notes), model=bundle.to_json())
        return 0
    print(plain(options.output))
    _print_field('model', f'{bundle.name}, weights {bundle.weights_digest}')
    for role, specs in (('input', bundle.inputs), ('output', bundle.outputs)):
        for spec in specs:
            _print_field(role, _told(spec))
    assert bundle.preprocessing is not None
    _print_field('pixels', ', '.join(f'{name} {value}' for name, value in bundle.preprocessing.to_json().items()))
    for rule in bundle.rules:
        settings = [f'{name} {value}' for name, value in rule_to_json(rule).items() if name != 'kind']
        _print_field('rule', f'{rule.output}: {", ".join([rule.kind, *settings])}')
    _print_field('golden', ', '.join(case.name for case in bundle.golden))
    if bundle.allow_non_finite:
        _print_field('not finite', ', '.join(bundle.allow_non_finite))
    for note in result.notes:
        _print_field('note', note)
    return 0


def _serve(bundle: ModelBundle) -> None:
    with served_model(bundle, ImageSettings()):
        pass


# --- command line ---------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='c7_engine',
        description='Make and check what the inference node loads: model bundles and TensorRT engines.',
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    defaults = C7InferenceConfig()

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, description: str, notes: str = ''
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=f'{notes}\n{_EXIT_CODES.partition("With --json")[0].rstrip()}'.lstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run, error=added.error)
        added.add_argument('--json', action='store_true', help='print one JSON object instead of text')
        added.add_argument('--verbose', action='store_true', help='say more on standard error')
        return added

    build = command(
        'build', _build, "build a model's TensorRT engine for this machine",
        'Build the TensorRT engine of a model for this machine, and put it into the engine cache, where the node\n'
        'finds it. Needs an NVIDIA GPU and TensorRT, and takes seconds to many minutes: do it on the ground.',
    )  # fmt: skip
    build.add_argument('model', type=path_argument, metavar='MODEL', help='model bundle (directory) or .onnx file')
    build.add_argument(
        '--precision', choices=PRECISIONS, default=PRECISIONS[0],
        help='what the engine computes in; default: %(default)s',
    )  # fmt: skip
    build.add_argument(
        '--cache', type=path_argument, metavar='DIR', help=f'engine cache; default: {defaults.engine_cache_dir}'
    )
    build.add_argument(
        '--workspace', type=_positive_bytes, default=defaults.gpu_memory_budget_bytes // 4, metavar='BYTES',
        help='GPU memory that the builder and the engine may use as scratch, as 512M or 2G; default: 1G',
    )  # fmt: skip
    build.add_argument(
        '--optimization-level', type=int, choices=range(6), default=_ON_THE_GROUND,
        help="how long TensorRT's builder searches for fast kernels, 0 to 5; default: %(default)s, which takes half as "
        f'long again as {defaults.builder_optimization_level}, the level of build_on_configure, for engines that are '
        'some percent faster',
    )  # fmt: skip

    _add_image_size(build)

    inspect = command(
        'inspect', _inspect, 'show what an engine file is, and what this machine would refuse',
        'Show what an engine file is by its name, its manifest (the .json beside it), its header and its digest, and\n'
        'what of that this machine would refuse. Loads nothing: works without a GPU and without TensorRT.',
    )  # fmt: skip
    inspect.add_argument('file', type=path_argument, metavar='FILE', help='.engine file')

    check = command(
        'verify', _verify, 'check engines, caches and bundles, and whether the node would serve them here',
        'Check that engines, caches and model bundles are whole, and that this machine can use them; one line for\n'
        'each check. A bundle also has its golden answers computed again, and is loaded the way that the node would\n'
        'load it ("served"). A directory is looked through one level deep. Changes nothing.',
    )  # fmt: skip
    check.add_argument(
        'paths', type=path_argument, nargs='*', metavar='PATH',
        help='model bundle (directory), .onnx or .engine file, engine cache, or cache of ONNX Runtime',
    )  # fmt: skip
    check.add_argument(
        '--run', type=path_argument, nargs='?', const=True, dest='run_picture', metavar='PICTURE',
        help='have the model answer a JPEG or PNG on this machine, the way that the node would, and print its '
        'outputs; without PICTURE: an image of noise. Write it after the paths',
    )  # fmt: skip
    _add_image_size(check)
    check.add_argument(
        '--any-host', action='store_true',
        help='look for damage and for others who could write there, not for whether this machine can use it',
    )  # fmt: skip
    check.add_argument(
        '--digests-only', action='store_true', help='do not run or load the model of a bundle; look at its files alone'
    )

    clean = command(
        'sweep', _sweep, 'remove engines from both caches by age, size or machine',
        'Remove engines from the engine cache and from the cache of ONNX Runtime, where they meet one of the\n'
        'conditions given. Without a condition, only what interrupted builds have left is removed (older than an\n'
        'hour). Files that no cache has written are left alone.',
    )  # fmt: skip
    clean.add_argument(
        '--older-than', type=_not_negative, metavar='DAYS', help='that were written longer ago than this'
    )
    clean.add_argument(
        '--max-size', type=_bytes, metavar='BYTES', help='the oldest, until the rest is within this, as 500M or 20G'
    )
    clean.add_argument(
        '--not-for-this-host', action='store_true',
        help='that were built for another GPU, TensorRT or platform; needs the GPU',
    )  # fmt: skip
    clean.add_argument('--dry-run', action='store_true', help='say what would be removed, remove nothing')
    where = f"default: {{}}, and the user's own cache that stands in for it ({fallback_directory(Path('…')).parent})"
    clean.add_argument('--cache', type=path_argument, metavar='DIR', help=where.format(defaults.engine_cache_dir))
    clean.add_argument('--ort-cache', type=path_argument, metavar='DIR', help=where.format(defaults.ort_trt_cache_dir))

    make = command(
        'bundle', _bundle, 'make a model bundle from an .onnx',
        'Make a model bundle from an .onnx: a directory with the model, a model.json that says how images are\n'
        'prepared for it, and golden requests (test images with the answers that every engine has to give). It is\n'
        'loaded the way that the node would load it; the directory appears whole or not at all.',
        _BUNDLE_NOTES,
    )  # fmt: skip
    make.add_argument('model', type=path_argument, metavar='MODEL.onnx', help='the exported network')
    make.add_argument(
        '--output', type=path_argument, required=True, metavar='DIR',
        help='directory to make; must not exist, or be empty',
    )  # fmt: skip
    make.add_argument('--name', help="the network's name in messages and logs; default: that of the file")
    make.add_argument(
        '--input-size', type=_input_size, action='append', default=[], metavar='[INPUT=]SIZE',
        help='for a model that leaves sizes free: WIDTHxHEIGHT of the image, or INPUT=1x3x480x640 with every axis',
    )  # fmt: skip
    make.add_argument(
        '--precision', choices=sorted(TOLERANCES), default='fp16',
        help='the coarsest that engines may compute in, which decides the tolerance; default: %(default)s',
    )  # fmt: skip
    make.add_argument(
        '--rule', type=_rule, action='append', default=[], metavar='OUTPUT=KIND,…',
        help='how answers of an output are compared; see below',
    )  # fmt: skip
    make.add_argument(
        '--golden-input', type=path_argument, metavar='FILE.npz',
        help='a golden request of your own, one array for each input',
    )  # fmt: skip
    make.add_argument(
        '--golden-image', type=path_argument, nargs='+', action='extend', default=[], metavar='PICTURE',
        help='JPEG or PNG files for further golden requests; best: what the camera will see',
    )  # fmt: skip
    make.add_argument(
        '--allow-non-finite', action='append', default=[], metavar='OUTPUT',
        help='NaN and infinity mean something in this output, as a mask or "no detection"',
    )  # fmt: skip
    make.add_argument(
        '--force', action='store_true', help='make the bundle even if its golden answers prove little'
    )
    make.add_argument('--seed', type=int, default=0, help='of the random test images; default: %(default)s')
    pixels = make.add_argument_group('pre-processing', 'value = (pixel * scale - mean) / std, with pixels in 0..255')
    pixels.add_argument(
        '--resize', choices=[mode.value for mode in ResizeMode], help='of images of another size; default: stretch'
    )
    pixels.add_argument('--colour', choices=('gray', 'rgb', 'bgr'), help='default: rgb, or gray for one channel')
    pixels.add_argument('--mean', type=_numbers, metavar='M[,M,M]', help='default: 0; negative: --mean=-1,-1,-1')
    pixels.add_argument('--std', type=_numbers, metavar='S[,S,S]', help='default: 1')
    pixels.add_argument('--scale', type=_number, help='default: 1/255, or 1 for a model that takes uint8')
    pixels.add_argument('--pad-value', type=_number, help='pixel value of the border of letterbox; default: 0')
    pixels.add_argument(
        '--interpolation', choices=[mode.value for mode in Interpolation], metavar='NAME',
        help=f'as in training, of {", ".join(mode.value for mode in Interpolation)}: OpenCV\'s by name, or Pillow\'s '
        '(torchvision with antialiasing); default: halving_linear, which averages where an image shrinks',
    )  # fmt: skip
    pixels.add_argument('--letterbox-anchor', choices=LETTERBOX_ANCHORS, help='default: centre')
    pixels.add_argument(
        '--letterbox-scaling', choices=LETTERBOX_SCALINGS,
        help='fit enlarges a smaller image, shrink does not; default: fit',
    )  # fmt: skip
    return parser


def _add_image_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--input-size', type=_image_size, metavar='WIDTHxHEIGHT',
        help='size of the image for an .onnx that takes any, as preprocess.width and preprocess.height of the node',
    )  # fmt: skip
    parser.add_argument('--colour', choices=('gray', 'rgb', 'bgr'), help='likewise, where the channels are free')


def _number(text: str) -> float:
    above, _, below = text.partition('/')
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f'{text} is no number') from None


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(','))


def _not_negative(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float('inf'):
        raise argparse.ArgumentTypeError(f'{text} is negative or no number')
    return value


def _bytes(text: str) -> int:
    match = re.fullmatch(r'(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?', text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f'{text} is no size in bytes, as 500M or 20G')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _positive_bytes(text: str) -> int:
    value = _bytes(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f'{text} is nothing')
    return value


def _input_size(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, size = text.rpartition('=')
    if not re.fullmatch(r'[1-9]\d{0,8}(x[1-9]\d{0,8})*', size, re.ASCII):
        raise argparse.ArgumentTypeError(f'{text} is neither WIDTHxHEIGHT nor NAME=1x3x480x640')
    shape = tuple(int(part) for part in size.split('x'))
    if not name and len(shape) != 2:
        raise argparse.ArgumentTypeError(f'{text} names no input: write NAME={size}')
    return name, shape


def _image_size(text: str) -> tuple[int, int]:
    name, shape = _input_size(text)
    if name or len(shape) != 2:
        raise argparse.ArgumentTypeError(f'{text} is not WIDTHxHEIGHT')
    return shape[0], shape[1]


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


def _print_json(**values: Any) -> None:
    print(json.dumps(values, indent=2))


if __name__ == '__main__':
    sys.exit(main())
