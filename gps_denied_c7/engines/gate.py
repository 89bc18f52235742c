"""
The gate: what an engine file proves before a vendor library sees its bytes (G-1).

An engine (a TensorRT plan) is native code, and TensorRT runs many damaged ones without complaint. So an
engine is admitted only whole, with a manifest beside it, from a directory that nobody else can write, and
for exactly this host. The manifest guards against damage; against tampering the directory does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gps_denied_c7._json import Fields, parse_json
from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.host_memory import require_memory
from gps_denied_c7.tensors import TensorSpec

__all__ = [
    'AdmittedEngine',
    'EngineGate',
    'EngineManifest',
    'EngineName',
    'HostProfile',
    'manifest_path',
    'plan_version',
    'read_manifest',
    'read_trusted',
    'same_tensorrt',
    'trusted_directory',
]

MANIFEST_SCHEMA = 1

# The first 28 bytes of a plan: the magic, then at 24 to 27 the TensorRT version that wrote it.
_PLAN_MAGIC = b'ftrt'
_PLAN_VERSION = slice(24, 28)
_PLAN_HEADER_BYTES = 28

_MANIFEST_LIMIT_BYTES = 1 << 20

_REBUILD = 'Build the engine again on this host, or fly the .onnx.'

_VERSION = r'\d{1,4}(?:\.\d{1,4}){2,3}'
_FIELDS = {
    'model': r'[A-Za-z0-9][A-Za-z0-9._-]*',
    'precision': r'[a-z][a-z0-9]*',
    'sm': r'[1-9]\d{1,2}',
    'tensorrt': _VERSION,
    'digest': r'[0-9a-f]{12}',
}
_NAME = re.compile(
    '(?P<model>{model})-(?P<precision>{precision})-sm(?P<sm>{sm})-trt(?P<tensorrt>{tensorrt})-(?P<digest>{digest})'
    r'\.engine'.format(**_FIELDS),
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class HostProfile:
    """
    Say what an engine must have been built for to run here.

    :param gpu: the GPU's name as NVML spells it.
    :param sm: compute capability as major × 10 + minor, so 87 for 8.7.
    :param tensorrt: version of the TensorRT library that will load the engine, as ``8.6.0`` or ``8.6.0.12``.
    :param platform: as ``linux-aarch64``.
    """

    gpu: str
    sm: int
    tensorrt: str
    platform: str


@dataclass(frozen=True, slots=True)
class EngineName:
    """
    Name an engine file: ``<model>-<precision>-sm<SM>-trt<version>-<digest>.engine``.

    :param model: letters, digits, ``.``, ``_`` and ``-``.
    :param precision: as ``fp16``.
    :param sm: compute capability as major × 10 + minor.
    :param tensorrt: three or four numbers.
    :param digest: the first 12 hex digits of the source's SHA-256, known before the engine is built.
    :raises EngineSchemaMismatchError: a field that no file name can carry.
    """

    model: str
    precision: str
    sm: int
    tensorrt: str
    digest: str

    def __post_init__(self) -> None:
        for name, pattern in _FIELDS.items():
            value = getattr(self, name)
            if not re.fullmatch(pattern, str(value), re.ASCII):
                raise EngineSchemaMismatchError(name, expected=f'text like {pattern}', found=value, remedy=_REBUILD)

    def __str__(self) -> str:
        return f'{self.model}-{self.precision}-sm{self.sm}-trt{self.tensorrt}-{self.digest}.engine'

    @classmethod
    def parse(cls, file_name: str) -> EngineName:
        """Read a file name (without its directory), or raise EngineSchemaMismatchError."""
        match = _NAME.fullmatch(file_name)
        if match is None:
            raise EngineSchemaMismatchError(
                'file_name',
                expected='<model>-<precision>-sm<SM>-trt<version>-<digest12>.engine',
                found=file_name,
                remedy='Keep the name that the engine was built under.',
            )
        return cls(
            model=match['model'],
            precision=match['precision'],
            sm=int(match['sm']),
            tensorrt=match['tensorrt'],
            digest=match['digest'],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineManifest:
    """
    Record what an engine is and where it came from; it lies beside the engine as ``<engine>.json``.

    The file is canonical JSON that carries a digest of itself, so that any changed byte is noticed.

    :param model: the model's name.
    :param engine_sha256: hex digest of the engine file.
    :param engine_bytes: size of the engine file in bytes.
    :param source_sha256: hex digest of the model file that the engine was built from.
    :param precision: as ``fp16``.
    :param gpu: name of the GPU that it was built on.
    :param sm: compute capability as major × 10 + minor.
    :param tensorrt: version of the TensorRT that built it, three or four numbers.
    :param platform: as ``linux-x86_64``.
    :param inputs: the engine's own input tensors.
    :param outputs: the engine's own output tensors.
    :param builder_flags: what the builder was told.
    :param versions: other versions by name, as ``cuda`` and ``driver``; recorded, not compared.
    """

    model: str
    engine_sha256: str
    engine_bytes: int
    source_sha256: str
    precision: str
    gpu: str
    sm: int
    tensorrt: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    builder_flags: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the manifest file's bytes."""
        content = {'schema': MANIFEST_SCHEMA, **dataclasses.asdict(self)}
        digest = hashlib.sha256(_canonical(content)).hexdigest()
        return _canonical(content | {'manifest_sha256': digest})

    @classmethod
    def from_json(cls, content: bytes) -> EngineManifest:
        """Read a manifest file's bytes, or raise EngineSchemaMismatchError for the first thing wrong in them."""
        try:
            fields = Fields(parse_json(content), '')
            schema = fields.integer('schema')
            if schema != MANIFEST_SCHEMA:
                raise EngineSchemaMismatchError(
                    'manifest_schema', expected=MANIFEST_SCHEMA, found=schema, remedy=_REBUILD
                )
            versions = fields.object('versions')
            manifest = cls(
                model=fields.text('model'),
                engine_sha256=fields.text('engine_sha256'),
                engine_bytes=fields.integer('engine_bytes'),
                source_sha256=fields.text('source_sha256'),
                precision=fields.text('precision'),
                gpu=fields.text('gpu'),
                sm=fields.integer('sm'),
                tensorrt=fields.text('tensorrt'),
                platform=fields.text('platform'),
                inputs=tuple(_spec(item) for item in fields.objects('inputs')),
                outputs=tuple(_spec(item) for item in fields.objects('outputs')),
                builder_flags=tuple(fields.take('builder_flags')),
                versions={name: versions.text(name) for name in versions.names()},
            )
            found = fields.text('manifest_sha256')
        except (ModelBundleError, TypeError) as error:
            raise EngineSchemaMismatchError(
                'manifest', expected='a whole manifest', found=str(error), remedy=_REBUILD
            ) from error
        # Canonical JSON has one spelling, so any changed byte shows, an unknown key too.
        expected = manifest.to_json()
        if content != expected:
            raise EngineSchemaMismatchError(
                'manifest_sha256', expected=json.loads(expected)['manifest_sha256'], found=found, remedy=_REBUILD
            )
        return manifest

    @property
    def engine_name(self) -> EngineName:
        """The file name that an engine with this manifest has."""
        return EngineName(self.model, self.precision, self.sm, self.tensorrt, self.source_sha256[:12])


@dataclass(frozen=True, slots=True)
class AdmittedEngine:
    """
    Hold an engine that passed the gate.

    :param plan: the very bytes that were checked; load these, never the path again.
    :param manifest: what they are.
    :param path: where they were read, for messages.
    """

    plan: bytes = field(repr=False)
    manifest: EngineManifest
    path: Path


class EngineGate:
    """Admit engine files built for one host."""

    def __init__(self, host: HostProfile) -> None:
        self._host = host

    @property
    def host(self) -> HostProfile:
        """What an engine must have been built for."""
        return self._host

    def admit(
        self, path: Path, *, engine_sha256: str | None = None, source_sha256: str | None = None
    ) -> AdmittedEngine:
        """
        Check the engine at ``path`` and return its bytes; cheap checks first, then one sequential read.

        :param engine_sha256: hex digest that the file must have, where the caller was promised one.
        :param source_sha256: hex digest of the model that it must have been built from, where known.
        :raises EngineSchemaMismatchError: naming the first field that differs, expected and found.
        """
        name = EngineName.parse(path.name)
        self._compare_host(name.sm, name.tensorrt)
        directory = trusted_directory(path.parent)
        manifest = read_manifest(directory / path.name)
        promised = manifest.engine_name
        for part in dataclasses.fields(EngineName):
            _compare(part.name, getattr(promised, part.name), getattr(name, part.name))
        _compare('gpu', self._host.gpu, manifest.gpu)
        _compare('platform', self._host.platform, manifest.platform)
        if source_sha256 is not None:
            _compare('source_sha256', source_sha256, manifest.source_sha256)
        if engine_sha256 is not None:
            _compare('engine_sha256', engine_sha256, manifest.engine_sha256)
        plan = read_trusted(directory / path.name, manifest.engine_bytes)
        _compare('engine_bytes', manifest.engine_bytes, len(plan))
        _compare('engine_sha256', manifest.engine_sha256, hashlib.sha256(plan).hexdigest())
        _check_plan_header(plan, manifest.tensorrt)
        return AdmittedEngine(plan, manifest, path)

    def _compare_host(self, sm: int, tensorrt: str) -> None:
        _compare('sm', self._host.sm, sm)
        if not same_tensorrt(self._host.tensorrt, tensorrt):
            raise EngineSchemaMismatchError('tensorrt', expected=self._host.tensorrt, found=tensorrt, remedy=_REBUILD)


def manifest_path(engine: Path) -> Path:
    """Return where the manifest of ``engine`` lies."""
    return engine.with_name(f'{engine.name}.json')


def read_manifest(engine: Path) -> EngineManifest:
    """
    Return the manifest of ``engine``; the engine itself need not be there.

    :raises EngineSchemaMismatchError: there is none, it is damaged, or somebody else could have written it.
    """
    return EngineManifest.from_json(read_trusted(manifest_path(engine), _MANIFEST_LIMIT_BYTES))


def plan_version(plan: bytes) -> str | None:
    """Return the TensorRT version that a plan's header gives, four numbers, or None for what is no plan."""
    if len(plan) < _PLAN_HEADER_BYTES or not plan.startswith(_PLAN_MAGIC):
        return None
    return '.'.join(str(number) for number in plan[_PLAN_VERSION])


def same_tensorrt(one: str, other: str) -> bool:
    """Tell whether two version texts are of one TensorRT, as far as both say; three numbers at least."""
    return _same_version(_numbers(one), _numbers(other))


def _compare(name: str, expected: object, found: object) -> None:
    if expected != found:
        raise EngineSchemaMismatchError(name, expected=expected, found=found, remedy=_REBUILD)


def _numbers(version: str) -> tuple[int, ...]:
    leading = re.match(r'\d+(?:\.\d+)*', version)
    return tuple(int(part) for part in leading[0].split('.')) if leading else ()


def _same_version(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    # Python's tensorrt gives three numbers, its C library and the plan four: compare what both know.
    known = min(len(one), len(other))
    return known >= 3 and one[:known] == other[:known]


def _check_plan_header(plan: bytes, tensorrt: str) -> None:
    if len(plan) < _PLAN_HEADER_BYTES:
        raise EngineSchemaMismatchError(
            'plan_header', expected=f'{_PLAN_HEADER_BYTES} bytes', found=f'{len(plan)} bytes', remedy=_REBUILD
        )
    _compare('plan_magic', _PLAN_MAGIC, plan[: len(_PLAN_MAGIC)])
    if not _same_version(_numbers(tensorrt), tuple(plan[_PLAN_VERSION])):
        raise EngineSchemaMismatchError('plan_version', expected=tensorrt, found=plan_version(plan), remedy=_REBUILD)


def trusted_directory(directory: Path) -> Path:
    """
    Return the real path of ``directory``.

    :raises EngineSchemaMismatchError: it is not there, or somebody else could replace what lies in it.
    """
    try:
        real = directory.resolve(strict=True)
        levels = [(level, level.stat()) for level in (real, *real.parents)]
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineSchemaMismatchError(
            'directory', expected='a readable directory', found=str(error), remedy='Check engine_cache_dir.'
        ) from error
    for level, info in levels:
        # In a sticky directory, as /tmp, only its owner can rename or remove an entry: safe above, not at the end.
        _check_ownership(level, info, sticky_is_safe=level != real)
    return real


def _check_ownership(path: Path, info: os.stat_result, *, sticky_is_safe: bool = False) -> None:
    trusted = sorted({0, os.geteuid()})
    if info.st_uid not in trusted:
        raise EngineSchemaMismatchError(
            'owner',
            expected=f'uid {" or ".join(map(str, trusted))}',
            found=f'uid {info.st_uid} on {path}',
            remedy='An engine is native code: chown it and its directories to root or to the user that flies.',
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (sticky_is_safe and info.st_mode & stat.S_ISVTX):
        raise EngineSchemaMismatchError(
            'mode',
            expected='writable by its owner alone',
            found=f'{stat.filemode(info.st_mode)} on {path}',
            remedy=f'An engine is native code: chmod go-w {path}.',
        )


def read_trusted(path: Path, limit: int) -> bytes:
    """
    Read a regular file in one go; neither a link is followed nor a pipe waited for.

    :param limit: bytes that it may have at most.
    :raises EngineSchemaMismatchError: it is none, too large, or somebody else could have written it.
    :raises EngineDeserializeError: there is no memory for it now.
    """
    try:
        # O_NONBLOCK matters to a FIFO only, whose open would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, 'rb') as file:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise EngineSchemaMismatchError(
                    'file', expected='a regular file', found=f'{stat.filemode(info.st_mode)} {path}', remedy=_REBUILD
                )
            _check_ownership(path, info)
            if info.st_size > limit:
                raise EngineSchemaMismatchError(
                    'file', expected=f'at most {limit} bytes', found=f'{info.st_size} bytes in {path}', remedy=_REBUILD
                )
            require_memory(path, info.st_size, remedy='Free some, or use a smaller engine.')
            # No more: it may have become longer since, up to whatever size.
            return file.read(info.st_size)
    except ModelBundleError as error:
        raise EngineDeserializeError(error.message, remedy=error.remedy) from error
    except (OSError, ValueError) as error:
        raise EngineSchemaMismatchError('file', expected='a regular file', found=str(error), remedy=_REBUILD) from error


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode() + b'\n'


def _spec(fields: Fields) -> TensorSpec:
    return TensorSpec(fields.text('name'), fields.text('dtype'), tuple(fields.take('shape')))
