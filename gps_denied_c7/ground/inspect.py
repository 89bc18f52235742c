"""``c7_engine inspect``: describe an engine file, and what the gate of a host would refuse (G-3)."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gps_denied_c7.engines.admission import plan_version
from gps_denied_c7.engines.manifest import (
    EngineManifest,
    EngineName,
    HostProfile,
    manifest_path,
    read_manifest,
    same_tensorrt,
)
from gps_denied_c7.engines.trusted_files import read_trusted, trusted_directory
from gps_denied_c7.errors import EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.ground.command_line import Command, path_argument, print_field, print_json, print_manifest
from gps_denied_c7.ground.compatibility import known_host, mismatches
from gps_denied_c7.model.files import open_regular, read_file
from gps_denied_c7.text import plain

__all__ = ['COMMAND', 'EngineReport', 'Refusal', 'inspect_engine']

_NO_LIMIT = 1 << 62
_REMEDY = 'Build the engine again on this host, or use the .onnx.'

_HEADER_BYTES = 512
_MANIFEST_LIMIT_BYTES = 1 << 20
_KINDS = {
    b'\xff\xd8\xff': 'a JPEG picture',
    b'\x89PNG': 'a PNG picture',
    b'PK\x03\x04': 'a zip archive',
    b'\x7fELF': 'a program or library',
    b'SQLite format 3': 'a SQLite database',
}

_T = TypeVar('_T')


@dataclass(frozen=True, slots=True)
class Refusal:
    """Say what was compared, and how it came out."""

    field: str
    expected: object
    found: object
    remedy: str


@dataclass(frozen=True, slots=True)
class EngineReport:
    """
    Describe an engine file, whole or not.

    :param name: what its file name says, None for another name.
    :param manifest: None where there is none that can be read.
    :param size: of the file in bytes.
    :param sha256: hex digest of the file as it is.
    :param plan: TensorRT version in the plan's header, None if it is not a plan.
    :param refusals: everything that the gate would refuse; empty where it would accept the file.
    """

    path: Path
    name: EngineName | None
    manifest: EngineManifest | None
    size: int
    sha256: str
    plan: str | None
    refusals: tuple[Refusal, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return {
            'path': str(self.path),
            'name': dataclasses.asdict(self.name) if self.name else None,
            'manifest': dataclasses.asdict(self.manifest) if self.manifest else None,
            'plan': {'bytes': self.size, 'sha256': self.sha256, 'tensorrt': self.plan},
            'refused': [
                {name: _json_value(value) for name, value in dataclasses.asdict(refusal).items()}
                for refusal in self.refusals
            ],
        }


def inspect_engine(path: Path, host: HostProfile) -> EngineReport:
    """
    Read an engine file and its manifest, and compare them with each other and with ``host``; loads nothing.

    :param host: its parts empty (``sm`` 0) where they are not known, which are then not compared.
    :raises ModelBundleError: the file cannot be read at all, or has nothing of an engine: neither a plan's header nor a
        manifest nor the name.
    :raises EngineDeserializeError: it is larger than the memory that is left.
    """
    _refuse_foreign(path)
    refusals: list[Refusal] = []

    def checked(step: Callable[[], _T]) -> _T | None:
        try:
            return step()
        except EngineSchemaMismatchError as error:
            refusals.append(Refusal(error.field, error.expected, error.found, error.remedy))
            return None

    # What is refused is still shown: read again, without checking which users may write it.
    name = checked(lambda: EngineName.parse(path.name))
    checked(lambda: trusted_directory(path.parent))
    content = checked(lambda: read_trusted(path, _NO_LIMIT))
    if content is None:
        content = read_file(path)
    manifest = checked(lambda: read_manifest(path)) or _untrusted_manifest(path)
    sha256, version = hashlib.sha256(content).hexdigest(), plan_version(content)
    compared: list[tuple[str, object, object]] = []
    if manifest is not None:
        promised = manifest.engine_name
        if name is not None:
            compared += [
                (part.name, getattr(promised, part.name), getattr(name, part.name))
                for part in dataclasses.fields(EngineName)
            ]
        compared += [
            ('engine_bytes', manifest.engine_bytes, len(content)),
            ('engine_sha256', manifest.engine_sha256, sha256),
        ]
        built = HostProfile(manifest.gpu, manifest.sm, manifest.tensorrt, manifest.platform)
        compared += mismatches(built, host)
    elif name is not None:
        compared += mismatches(HostProfile('', name.sm, name.tensorrt, ''), host)
    refusals += [Refusal(field, expected, found, _REMEDY) for field, expected, found in compared if expected != found]
    if version is None:
        refusals.append(Refusal('plan_header', 'a plan of TensorRT', content[:28], _REMEDY))
    elif manifest is not None and not same_tensorrt(manifest.tensorrt, version):
        refusals.append(Refusal('plan_version', manifest.tensorrt, version, _REMEDY))
    return EngineReport(path, name, manifest, len(content), sha256, version, tuple(refusals))


def _refuse_foreign(path: Path) -> None:
    """Refuse what is plainly something else, before all of it is read."""
    if os.path.isdir(path):
        raise ModelBundleError(f'{path} is a directory.', remedy='Name a file in it, or run c7_engine verify.')
    with open_regular(path) as file:
        begin = file.read(_HEADER_BYTES)
    if path.suffix == '.engine' or plan_version(begin) is not None or os.path.lexists(manifest_path(path)):
        return
    kind = next((kind for magic, kind in _KINDS.items() if begin.startswith(magic)), '')
    if not begin:
        kind = 'empty'
    elif path.suffix == '.onnx':
        kind = 'called an ONNX model'
    elif not kind:
        kind = 'text' if begin.decode(errors='replace').replace('\n', ' ').isprintable() else 'of another kind'
    raise ModelBundleError(
        f'{path} is not a TensorRT engine; it is {kind}.',
        remedy='Name an .engine file; c7_engine verify checks models and bundles.',
    )


def _untrusted_manifest(engine: Path) -> EngineManifest | None:
    try:
        return EngineManifest.from_json(read_file(manifest_path(engine), limit=_MANIFEST_LIMIT_BYTES))
    except (EngineSchemaMismatchError, ModelBundleError):
        return None


def _json_value(value: object) -> object:
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', type=path_argument, metavar='FILE', help='.engine file')


def _run(options: argparse.Namespace) -> int:
    host, unknown = known_host()
    report = inspect_engine(options.file, host)
    if options.json:
        print_json(**report.to_json(), host=dataclasses.asdict(host), unknown=list(unknown))
    else:
        _print_report(report, unknown)
    if report.plan is None:
        print(f'c7_engine inspect: {plain(report.path)} is not a TensorRT engine.', file=sys.stderr)
    return 1 if report.plan is None else 0


def _print_report(report: EngineReport, unknown: Sequence[str]) -> None:
    print(plain(report.path))
    if report.manifest is not None:
        print_manifest(report.manifest)
    elif report.name is not None:
        print_field('model', f'{report.name.model}, {report.name.precision} (by the file name)')
        print_field('built on', f'SM {report.name.sm}, TensorRT {report.name.tensorrt} (by the file name)')
    print_field('header', f'plan of TensorRT {report.plan}' if report.plan else 'not a TensorRT plan')
    print_field('file', f'{report.size} bytes, sha256 {report.sha256}')
    print('this host would refuse it:' if report.refusals else 'this host finds nothing wrong with it')
    for refusal in report.refusals:
        print_field(refusal.field, f'expected {refusal.expected!r}, found {refusal.found!r}. {refusal.remedy}')
    if unknown:
        print('not compared with this host:')
        for reason in unknown:
            print(f'  {reason}')


COMMAND = Command(
    name='inspect',
    summary='describe an engine file, and whether this machine would refuse it',
    description='Describe an engine file by its name, its manifest (the .json beside it), its header and its digest,\n'
    'and list what this machine would refuse. Loads nothing: works without a GPU and without TensorRT.',
    add_arguments=_add_arguments,
    run=_run,
)
