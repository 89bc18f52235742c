"""What an engine file says of itself: its name, and the manifest beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gps_denied_c7.engines.sealed_json import SealedRecord, check_tensors
from gps_denied_c7.engines.trusted_files import REBUILD, read_trusted
from gps_denied_c7.errors import EngineSchemaMismatchError
from gps_denied_c7.tensors import TensorSpec

__all__ = [
    'EngineManifest',
    'EngineName',
    'HostProfile',
    'manifest_path',
    'read_manifest',
    'same_tensorrt',
    'version_numbers',
]

_MANIFEST_LIMIT_BYTES = 1 << 20

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
                raise EngineSchemaMismatchError(name, expected=f'text like {pattern}', found=value, remedy=REBUILD)

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
class EngineManifest(SealedRecord):
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
    :param builder_flags: flags of the build.
    :param versions: other versions by name, as ``cuda`` and ``driver``; recorded, not compared.
    """

    record = 'manifest'
    remedy = REBUILD

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

    def check(self) -> None:
        """Raise ValueError for an engine that lacks inputs or outputs."""
        check_tensors(self.inputs, self.outputs)

    @property
    def engine_name(self) -> EngineName:
        """The file name that an engine with this manifest has."""
        return EngineName(self.model, self.precision, self.sm, self.tensorrt, self.source_sha256[:12])


def manifest_path(engine: Path) -> Path:
    """Return where the manifest of ``engine`` lies."""
    return engine.with_name(f'{engine.name}.json')


def read_manifest(engine: Path) -> EngineManifest:
    """
    Return the manifest of ``engine``; the engine itself need not be there.

    :raises EngineSchemaMismatchError: there is none, it is damaged, or another user could have written it.
    """
    return EngineManifest.from_json(read_trusted(manifest_path(engine), _MANIFEST_LIMIT_BYTES))


def same_tensorrt(one: str, other: str) -> bool:
    """Tell whether two version texts are of one TensorRT, as far as both say; three numbers at least."""
    numbers, others = version_numbers(one), version_numbers(other)
    # Python's tensorrt gives three numbers, its C library and the plan four: compare what both know.
    known = min(len(numbers), len(others))
    return known >= 3 and numbers[:known] == others[:known]


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with, for comparison."""
    leading = re.match(r'\d+(?:\.\d+)*', version)
    return tuple(int(part) for part in leading[0].split('.')) if leading else ()
