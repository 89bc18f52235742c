"""``c7_engine build``: build a model's TensorRT engine for this machine (G-3)."""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import asdict

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.manifest import read_manifest
from gps_denied_c7.ground.command_line import (
    Command,
    add_image_size,
    image_settings,
    path_argument,
    positive_size,
    print_json,
    print_manifest,
    whole_number,
)
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.pipeline.model_fit import ImageSettings, fit_bundle
from gps_denied_c7.runtimes.protocol import BuildConfig, BuildProgress
from gps_denied_c7.runtimes.trt.build import PRECISIONS, build_engine
from gps_denied_c7.text import plain

__all__ = ['COMMAND']

_QUIET_PROGRESS_S = 10.0
# TensorRT's own default: a build on the ground may take its time.
_ON_THE_GROUND = 3


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = C7InferenceConfig()
    parser.add_argument('model', type=path_argument, metavar='MODEL', help='model bundle (directory) or .onnx file')
    parser.add_argument(
        '--precision', choices=PRECISIONS, default=PRECISIONS[0],
        help='what the engine computes in; default: %(default)s',
    )  # fmt: skip
    parser.add_argument(
        '--cache', type=path_argument, metavar='DIR', help=f'engine cache; default: {defaults.engine_cache_dir}'
    )
    parser.add_argument(
        '--workspace', type=positive_size, default=defaults.gpu_memory_budget_bytes // 4, metavar='BYTES',
        help='GPU memory that the builder and the engine may use as scratch, for example 512M or 2G; default: 1G',
    )  # fmt: skip
    parser.add_argument(
        '--optimization-level', type=whole_number(0, 5), default=_ON_THE_GROUND, metavar='LEVEL',
        help="how long TensorRT's builder searches for fast kernels, 0 to 5; default: %(default)s, which takes 1.5 "
        f'times as long as {defaults.builder_optimization_level}, the level of build_on_configure, for engines that '
        'are a few percent faster',
    )  # fmt: skip
    add_image_size(parser)


def _run(options: argparse.Namespace) -> int:
    config = C7InferenceConfig(
        engine_cache_dir=options.cache or C7InferenceConfig().engine_cache_dir,
        # The builder gets a quarter of the budget.
        gpu_memory_budget_bytes=4 * options.workspace,
        builder_optimization_level=options.optimization_level,
    )
    build = BuildConfig(allow_build=True, precision=options.precision, progress=_Progress())
    started_s = time.monotonic()
    bundle = fit_bundle(ModelBundle.load(options.model), ImageSettings(image_settings(options)))
    entry = build_engine(bundle, config, build)
    seconds = time.monotonic() - started_s
    manifest = read_manifest(entry.path)
    if options.json:
        print_json(path=str(entry.path), seconds=round(seconds, 1), manifest=asdict(manifest))
    else:
        print(plain(entry.path))
        print(f'  built in {seconds:.1f} s')
        print_manifest(manifest)
    return 0


class _Progress:
    """Print the progress of a build to standard error: on one line of a terminal, else when the phase changes."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = ('', 0.0)

    def __call__(self, progress: BuildProgress) -> None:
        if self._terminal:
            print(f'\r\x1b[K{progress}', end='', file=sys.stderr, flush=True)
            return
        # Without its numbers: not one line for each tactic.
        phase = re.sub(r'\d+', '', progress.phase)
        last_phase, last_s = self._last
        if phase != last_phase or progress.elapsed_s - last_s >= _QUIET_PROGRESS_S:
            self._last = (phase, progress.elapsed_s)
            print(progress, file=sys.stderr, flush=True)


COMMAND = Command(
    name='build',
    summary="build a model's TensorRT engine for this machine",
    description='Build the TensorRT engine of a model for this machine, and put it into the engine cache, where the\n'
    'node finds it. Needs an NVIDIA GPU and TensorRT, and takes seconds to many minutes: do it on the ground.',
    add_arguments=_add_arguments,
    run=_run,
)
