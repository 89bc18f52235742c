"""``c7_engine verify``: check engines, caches and bundles."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.ground.command_arguments import Command, add_image_size, image_settings
from gps_denied_c7.ground.command_line import path_argument
from gps_denied_c7.ground.command_output import print_json
from gps_denied_c7.ground.trial import TrialRun, figures, read_picture
from gps_denied_c7.ground.verify import Checks, verify
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.text import plain

__all__ = ['COMMAND']


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
    parser.add_argument(
        '--any-host', action='store_true',
        help='check for damage and for write access of other users, not whether this machine can use it',
    )  # fmt: skip
    parser.add_argument(
        '--digests-only', action='store_true', help='do not run or load the model of a bundle; check its files only'
    )


def _run(options: argparse.Namespace) -> int:
    # Determined once at most, and only if there is an engine.
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
        settings=image_settings(options),
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
        print(f'{len(verdicts)} verified, {refused} refused')
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
    'load it ("served"). A directory is searched one level deep. Changes nothing.',
    add_arguments=_add_arguments,
    run=_run,
)
