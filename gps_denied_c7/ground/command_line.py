"""What the command lines of this package share: arguments, log, and what the commands of ``c7_engine`` print."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gps_denied_c7.engines.manifest import EngineManifest
from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.ground.input_shapes import shape_text
from gps_denied_c7.ground.reference import ANSWER_TIMEOUT_S
from gps_denied_c7.model.files import expand_home
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.text import plain

__all__ = [
    'Command', 'add_answer_timeout', 'add_image_size', 'image_settings', 'input_size', 'log_to_stderr', 'not_negative',
    'number', 'numbers', 'path_argument', 'positive_size', 'print_field', 'print_json', 'print_manifest',
    'print_tensors', 'size', 'whole_number',
]  # fmt: skip

_NUMBER = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?', re.ASCII | re.IGNORECASE)
_TOO_MANY_BYTES = 1 << 60
_UNITS = {'': 1, 'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}


def path_argument(text: str) -> Path:
    """Return the path that an argument names, ``~`` being the home directory; for argparse's ``type``."""
    if not text:
        raise argparse.ArgumentTypeError('the path is empty')
    try:
        return expand_home(text)
    except ModelBundleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _OneLine(logging.Formatter):
    """Have one line for each message: names and errors from files may hold line breaks and terminal codes."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def log_to_stderr(program: str, level: int) -> None:
    """Have what is logged from ``level`` on printed to standard error, one line each, behind the program's name."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine(f'{program}: %(message)s'))
    logging.basicConfig(handlers=[handler], level=level)


@dataclass(frozen=True, slots=True)
class Command:
    """
    Describe one command of ``c7_engine``.

    :param summary: one line in the list of commands.
    :param run: runs it and returns the exit status; raises a C7Error for what is refused.
    :param notes: shown below the arguments in the command's help.
    """

    name: str
    summary: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    notes: str = ''


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that :func:`image_settings` reads."""
    parser.add_argument(
        '--input-size', type=_image_size, metavar='WIDTHxHEIGHT',
        help='image size for an .onnx that accepts any, like preprocess.width and preprocess.height of the node',
    )  # fmt: skip
    parser.add_argument('--colour', choices=('gray', 'rgb', 'bgr'), help='channels for an .onnx that leaves them free')


def add_answer_timeout(parser: argparse.ArgumentParser) -> None:
    """Add the argument that limits how long one answer of plain ONNX Runtime takes."""
    parser.add_argument(
        '--answer-timeout', type=whole_number(1, 10**6), default=ANSWER_TIMEOUT_S, metavar='SECONDS',
        help='time limit for each answer of plain ONNX Runtime, so that a model with an endless loop is refused; '
        'default: %(default)s',
    )  # fmt: skip


def image_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the pre-processing settings that were given for a model that leaves its sizes free."""
    given: dict[str, Any] = {} if options.colour is None else {'colour': options.colour}
    if options.input_size is not None:
        given['width'], given['height'] = options.input_size
    return given


def number(text: str) -> float:
    """Read a finite number, or a fraction such as ``1/255``."""
    above, slash, below = text.partition('/')
    value = math.nan
    if all(_NUMBER.fullmatch(part) for part in (above, below if slash else '1')):
        with suppress(ZeroDivisionError):
            value = float(above) / float(below or 1)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f'{text} is not a finite number')
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Read numbers with commas between them."""
    return tuple(number(part) for part in text.split(','))


def not_negative(text: str) -> float:
    """Read a finite number from 0 on."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'{text} is negative')
    return value


def whole_number(least: int, greatest: int) -> Callable[[str], int]:
    """Return what reads a whole number in this range."""

    def read(text: str) -> int:
        if not re.fullmatch(r'\d{1,18}', text, re.ASCII) or not least <= int(text) <= greatest:
            raise argparse.ArgumentTypeError(f'{text} is not a whole number from {least} to {greatest}')
        return int(text)

    return read


def size(text: str) -> int:
    """Read a number of bytes such as ``500M``, in binary units."""
    # With more digits it would be more than any disk or memory has, and more than vendors' libraries take.
    match = re.fullmatch(r'(\d{1,15}(?:\.\d+)?)(?: (?=\S))?([KMGT]?)(?:i?B)?', text, re.ASCII | re.IGNORECASE)
    value = int(float(match[1]) * _UNITS[match[2].upper()]) if match is not None else _TOO_MANY_BYTES
    if value >= _TOO_MANY_BYTES:
        raise argparse.ArgumentTypeError(f'{text} is not a size in bytes such as 500M or 20G')
    return value


def positive_size(text: str) -> int:
    """Read a number of bytes above 0."""
    value = size(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f'{text} is not above 0')
    return value


def input_size(text: str) -> tuple[str, tuple[int, ...]]:
    """Read ``WIDTHxHEIGHT``, with the name '', or ``NAME=1x3x480x640``."""
    name, _, axes = text.rpartition('=')
    if not re.fullmatch(r'[1-9]\d{0,8}(x[1-9]\d{0,8})*', axes, re.ASCII):
        raise argparse.ArgumentTypeError(f'{text} is neither WIDTHxHEIGHT nor NAME=1x3x480x640')
    shape = tuple(int(part) for part in axes.split('x'))
    if not name and len(shape) != 2:
        raise argparse.ArgumentTypeError(f'{text} names no input: write NAME={axes}')
    return name, shape


def _image_size(text: str) -> tuple[int, int]:
    name, shape = input_size(text)
    if name or len(shape) != 2:
        raise argparse.ArgumentTypeError(f'{text} is not WIDTHxHEIGHT')
    return shape[0], shape[1]


def print_json(**values: Any) -> None:
    """Print one JSON object."""
    print(json.dumps(values, indent=2))


def print_field(name: str, value: str) -> None:
    """Print one line of a description."""
    print(f'  {name:<10} {plain(value)}')


def print_manifest(manifest: EngineManifest) -> None:
    """Print what a manifest says of its engine."""
    print_field('model', f'{manifest.model}, {manifest.precision}')
    print_field('source', f'sha256 {manifest.source_sha256}')
    print_field('engine', f'{manifest.engine_bytes} bytes, sha256 {manifest.engine_sha256}')
    print_field('built on', f'{manifest.gpu} (SM {manifest.sm}), TensorRT {manifest.tensorrt}, {manifest.platform}')
    print_field('with', ', '.join(manifest.builder_flags))
    print_field('versions', ', '.join(f'{name} {version}' for name, version in sorted(manifest.versions.items())))
    print_tensors(manifest.inputs, manifest.outputs)


def print_tensors(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Print name, type and shape of each tensor."""
    for role, specs in (('input', inputs), ('output', outputs)):
        for spec in specs:
            print_field(role, f'{spec.name} {spec.dtype} {shape_text(spec.shape)}')
