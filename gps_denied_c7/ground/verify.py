"""``c7_engine verify``: check engines, caches and bundles as the node does before a flight (G-3)."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.manifest import EngineName, HostProfile, manifest_path, read_manifest
from gps_denied_c7.engines.ort_store import LISTING_NAME, BuiltFor, verify_cache
from gps_denied_c7.errors import (
    C7Error,
    EngineSchemaMismatchError,
    InferenceError,
    ModelBundleError,
    RuntimeUnavailableError,
)
from gps_denied_c7.ground.command_line import (
    Command,
    add_answer_timeout,
    add_image_size,
    image_settings,
    path_argument,
    print_json,
)
from gps_denied_c7.ground.compatibility import mismatches
from gps_denied_c7.ground.golden import noise_picture
from gps_denied_c7.ground.reference import ANSWER_TIMEOUT_S, reference_answers
from gps_denied_c7.ground.trial import TrialRun, figures, read_picture, run_picture, served_model
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.bundle_json import MODEL_JSON
from gps_denied_c7.model.files import BundleFile
from gps_denied_c7.model.onnx_file import read_onnx
from gps_denied_c7.pipeline.model_fit import ImageSettings, fit_bundle
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.runtimes.pt.archive_scan.archive import read_torch_archive
from gps_denied_c7.text import plain

__all__ = ['COMMAND', 'Checks', 'Verdict', 'verify']

_MODEL_DIGEST = re.compile(r'[0-9a-f]{64}')
_REBUILD = 'Build it again on this host.'
_TORCH = ('.pt2', '.pt')

Host = Callable[[], HostProfile]
_Check = tuple[Path, str, Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    Say whether a file or directory is what it claims to be, and may be loaded here.

    :param kind: ``engine``, ``ort_cache``, ``bundle``, ``artefact``, ``golden``, ``answers`` or ``served``, which says
        whether the node would serve the bundle.
    :param refusal: what is wrong, empty where it was admitted.
    :param remedy: what to do about it.
    :param run: what the model answered, where that was asked for.
    """

    path: Path
    kind: str
    refusal: str = ''
    remedy: str = ''
    run: TrialRun | None = None

    @property
    def admitted(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.refusal

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON can hold it."""
        values = {name: getattr(self, name) for name in ('kind', 'refusal', 'remedy', 'admitted')}
        run = {'run': self.run.to_json()} if self.run is not None else {}
        return {**values, 'path': str(self.path), **run}


@dataclass(frozen=True, slots=True)
class Checks:
    """
    Say how far a verification goes.

    :param host: returns what engines must have been built for, or raises RuntimeUnavailableError; None to look
        for damage alone, so that engines of other hosts can be verified.
    :param run_models: whether golden answers are computed again, and the model loaded as the node would, which takes
        the model's own time.
    :param run: have the model answer :attr:`picture`.
    :param picture: None for noise of the model's own size.
    :param answer_timeout_s: seconds that plain ONNX Runtime may take for one answer.
    :param settings: sizes for a bare ``.onnx`` that leaves them free.
    """

    host: Host | None
    run_models: bool = True
    run: bool = False
    picture: Pixels | None = None
    answer_timeout_s: int = ANSWER_TIMEOUT_S
    settings: ImageSettings = field(default_factory=ImageSettings)

    @property
    def loads_models(self) -> bool:
        """Whether a model is loaded as the node would."""
        return self.run or (self.run_models and self.host is not None)


def verify(path: Path, checks: Checks) -> Iterator[Verdict]:
    """
    Yield a verdict for each engine, ONNX Runtime cache and bundle at ``path``.

    A directory is looked through one level deep: for ``.engine`` files, for what ONNX Runtime's TensorRT provider
    cached (one directory for each model), and for bundles; a bare ``.onnx`` only where it is named. Nothing is changed.
    No engine is loaded but by the workers that serve a bundle; its ``.onnx`` answers its golden requests in a process
    of its own.

    :raises ModelBundleError: there is nothing at ``path`` that could be verified.
    """
    # os.path, since Path.is_file() raises where a directory may not be read, and for a name that is too long.
    bare = path.suffix == '.onnx' and not os.path.isdir(path)
    if bare or path.name == MODEL_JSON or os.path.lexists(path / MODEL_JSON):
        yield from _verify_bundle(path, checks)
    elif path.suffix == '.engine' or (not os.path.isdir(path) and os.path.exists(manifest_path(path))):
        yield _verdict(path, 'engine', partial(_admit, path, checks.host))
    elif os.path.isdir(path):
        found = False
        for verdict in _verify_directory(path, checks):
            found = True
            yield verdict
        if not found:
            raise ModelBundleError(f'{path} holds no engine, cache or bundle.', remedy='Correct the path.')
    else:
        what = 'is not an .engine, an .onnx, a cache or a bundle' if os.path.lexists(path) else 'does not exist'
        raise ModelBundleError(f'{path} {what}.', remedy='Correct the path.')


def _verify_directory(path: Path, checks: Checks) -> Iterator[Verdict]:
    if _MODEL_DIGEST.fullmatch(path.name) or os.path.exists(path / LISTING_NAME):
        yield _verdict(path, 'ort_cache', partial(_check_cache, path, checks.host))
        return
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise ModelBundleError(f'{path}: {error.strerror}.', remedy='Run as a user that may read it.') from error
    for entry in entries:
        engine = entry.with_name(entry.name.removesuffix('.json'))
        if entry.suffix == '.engine':
            yield from verify(entry, checks)
        elif engine.suffix == '.engine' and engine != entry and not os.path.lexists(engine):
            yield from verify(engine, checks)
        elif os.path.isdir(entry) and (_MODEL_DIGEST.fullmatch(entry.name) or os.path.isfile(entry / MODEL_JSON)):
            yield from verify(entry, checks)


def _verify_bundle(path: Path, checks: Checks) -> Iterator[Verdict]:
    try:
        bundle = ModelBundle.load(path)
    except C7Error as error:
        yield Verdict(path, 'bundle', error.message, error.remedy)
        return
    yield Verdict(path, 'bundle')
    files: list[_Check] = [
        (artefact.path, 'artefact', partial(_check_artefact, bundle, artefact, checks.host))
        for artefact in bundle.artefacts
    ]
    for index, case in enumerate(bundle.golden):
        files.append((case.inputs.path, 'golden', partial(bundle.golden_inputs, index)))
        files.append((case.outputs.path, 'golden', partial(bundle.golden_outputs, index)))
    whole = yield from _verdicts(files)
    if whole and checks.run_models and bundle.golden:
        check = partial(_check_answers, bundle, timeout_s=checks.answer_timeout_s)
        models = [artefact for artefact in bundle.artefacts if artefact.path.suffix == '.onnx']
        yield from _verdicts([(one.path, 'answers', partial(check, one)) for one in models])
    # Also of a bundle that is refused above: the node may do without the file that is wrong.
    verdict = _served(path, bundle, checks)
    # That model.json says nothing against it does not show that the node serves it.
    if checks.loads_models or not verdict.admitted:
        yield verdict


def _verdicts(checks: Sequence[_Check]) -> Generator[Verdict, None, bool]:
    """Yield the verdict of each check, and return whether all were admitted."""
    whole = True
    for path, kind, check in checks:
        verdict = _verdict(path, kind, check)
        whole = whole and verdict.admitted
        yield verdict
    return whole


def _served(path: Path, bundle: ModelBundle, checks: Checks) -> Verdict:
    """Ask what a configure of the node asks: on this host with its engines, else as far as model.json tells."""
    run: TrialRun | None = None
    try:
        if checks.loads_models:
            with served_model(bundle, checks.settings) as model:
                spec = model.preprocessor.spec
                if checks.run:
                    picture = checks.picture or Pixels(noise_picture(spec.width, spec.height, 0), 'rgb')
                    run = run_picture(model, picture)
        else:
            fit_bundle(bundle, checks.settings)
            bundle.check_golden_sizes()
            for index in range(len(bundle.golden)):
                bundle.golden_case(index)
    except C7Error as error:
        return Verdict(path, 'served', error.message, error.remedy)
    return Verdict(path, 'served', run=run)


def _check_answers(bundle: ModelBundle, artefact: Artefact, timeout_s: int) -> None:
    """Compare the golden answers with those of plain session.run, which shares no code with what made them."""
    requests = [
        {artefact.own_name(name): array for name, array in bundle.golden_inputs(index).items()}
        for index in range(len(bundle.golden))
    ]
    problems = []
    model = read_onnx(artefact.path, artefact.sha256, artefact.external_data)
    source = str(artefact.path) if model.external_data else model.source
    for index, answer in enumerate(reference_answers(source, requests, timeout_s=timeout_s).answers):
        if isinstance(answer, InferenceError):
            problems.append(f'{bundle.golden[index].name!r}: {answer.message}')
            continue
        found = {artefact.canonical_name(name): array for name, array in (answer or {}).items()}
        problems += [
            f'{bundle.golden[index].name!r}: {problem}'
            for problem in bundle.compare(found, bundle.golden_outputs(index))
        ]
    if problems:
        raise ModelBundleError(
            f'the golden answers are not those of plain session.run without optimisation: {" ".join(problems[:8])}',
            remedy='Make the bundle again; compare the versions of the two ONNX Runtimes.',
        )


def _verdict(path: Path, kind: str, check: Callable[[], object]) -> Verdict:
    try:
        check()
    except C7Error as error:
        return Verdict(path, kind, error.message, error.remedy)
    except OSError as error:
        return Verdict(path, kind, f'{path}: {error.strerror}.', 'Run as a user that may read it.')
    return Verdict(path, kind)


def _admit(path: Path, host: Host | None, engine_sha256: str | None = None) -> None:
    """Take an engine through the gate of the host that it was built for, then through this one's."""
    EngineName.parse(path.name)
    manifest = read_manifest(path)
    own = HostProfile(manifest.gpu, manifest.sm, manifest.tensorrt, manifest.platform)
    EngineGate(own).admit(path, engine_sha256=engine_sha256)
    _compare(own, host)


def _check_cache(path: Path, host: Host | None) -> None:
    listing = verify_cache(path).listing
    if listing.built_for.model_sha256 != path.resolve().name:
        raise EngineSchemaMismatchError(
            'model_sha256', expected=path.resolve().name, found=listing.built_for.model_sha256, remedy=_REBUILD
        )
    _compare(listing.built_for, host)


def _compare(built: HostProfile | BuiltFor, host: Host | None) -> None:
    if host is None:
        return
    try:
        here = host()
    except RuntimeUnavailableError as error:
        raise C7Error(
            f'it is undamaged, but no engine runs on this host: {error.message}',
            remedy='Verify it on the drone, or check for damage only (--any-host).',
        ) from error
    for name, expected, found in mismatches(built, here):
        raise EngineSchemaMismatchError(name, expected=expected, found=found, remedy=_REBUILD)


def _check_artefact(bundle: ModelBundle, artefact: Artefact, host: Host | None) -> None:
    """Look at an artefact as its runtime will before it loads it; only engines are made for one host."""
    if artefact.weights_digest != bundle.weights_digest:
        raise ModelBundleError(
            f'{artefact.path} was made from weights {artefact.weights_digest}, the bundle holds '
            f'{bundle.weights_digest}: the node will not use it.',
            remedy='Build it again from these weights, or remove it from model.json.',
        )
    if artefact.path.suffix == '.engine':
        _admit(artefact.path, host, artefact.sha256)
    elif artefact.path.suffix == '.onnx':
        if random := read_onnx(artefact.path, artefact.sha256, artefact.external_data).random:
            raise ModelBundleError(
                f'answers to the same image differ from run to run, because of {", ".join(random[:8])}.',
                remedy='Export the model in evaluation mode, and make the bundle again.',
            )
    elif artefact.path.suffix in _TORCH:
        read_torch_archive(artefact.path, artefact.sha256)
    else:
        BundleFile(artefact.path, artefact.sha256).verify()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'paths', type=path_argument, nargs='*', metavar='PATH',
        help='model bundle (directory), .onnx or .engine file, engine cache, or cache of ONNX Runtime',
    )  # fmt: skip
    parser.add_argument(
        '--run', type=path_argument, nargs='?', const=True, dest='run_picture', metavar='PICTURE',
        help='run the model on a JPEG or PNG on this machine, as the node would, and print its outputs; without '
        'PICTURE: on an image of noise. Write it after the paths',
    )  # fmt: skip
    add_image_size(parser)
    add_answer_timeout(parser)
    parser.add_argument(
        '--any-host', action='store_true',
        help='check for damage and for write access of other users, not whether this machine can use it',
    )  # fmt: skip
    parser.add_argument(
        '--digests-only', action='store_true', help='do not run or load the model of a bundle; check its files only'
    )


def _run(options: argparse.Namespace) -> int:
    # Determined once at most, and only if there is an engine.
    host = None if options.any_host else lru_cache(maxsize=1)(local_host_profile)
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
        answer_timeout_s=options.answer_timeout,
        settings=ImageSettings(image_settings(options)),
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
        print_json(verdicts=[verdict.to_json() for verdict in verdicts], refused=refused)
    else:
        print(f'{len(verdicts)} checked, {refused} refused')
    return 1 if refused else 0


def _print_run(run: TrialRun) -> None:
    width, height = run.source_size
    print(f'         picture of {width}x{height}: {run.seconds * 1e3:.1f} ms, {run.runtime} on {run.provider}')
    for name, array in run.outputs.items():
        summary = figures(array)
        numbers = [f'{key} {summary[key]:.6g}' for key in ('min', 'mean', 'max') if key in summary]
        numbers += [f'{summary["not_finite"]} not finite'] if summary['not_finite'] else []
        first = ' '.join(value if isinstance(value, str) else f'{value:.6g}' for value in summary['first'])
        numbers.append(f'first {first}' if first else 'empty')
        size = 'x'.join(map(str, array.shape)) or 'a scalar'
        print(f'           {plain(name)} {array.dtype} {size}: {", ".join(numbers)}')


COMMAND = Command(
    name='verify',
    summary='check engines, caches and bundles, and whether the node would serve them here',
    description='Check that engines, caches and model bundles are whole, and that this machine can use them; one line\n'
    'for each check. For a bundle, its golden answers are also computed again, and it is loaded as the node would\n'
    'load it: "served" is ok if the node would use the bundle, even without a file that is refused. A directory is\n'
    'searched one level deep. Changes nothing.',
    add_arguments=_add_arguments,
    run=_run,
)
