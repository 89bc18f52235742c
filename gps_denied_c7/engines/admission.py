"""
The gate: what an engine file proves before a vendor library sees its bytes (G-1).

An engine (a TensorRT plan) is native code, and TensorRT runs many damaged ones without complaint. So an
engine is admitted only whole, with a manifest beside it, from a directory that no other user can write, and
for exactly this host. The manifest guards against damage; against tampering the directory does.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from gps_denied_c7.engines.manifest import EngineManifest, EngineName, HostProfile, read_manifest, same_tensorrt
from gps_denied_c7.engines.trusted_files import REBUILD, read_trusted, trusted_directory
from gps_denied_c7.errors import EngineSchemaMismatchError

__all__ = ['AdmittedEngine', 'EngineGate', 'plan_version']

# The first 28 bytes of a plan: the magic, then at 24 to 27 the TensorRT version that wrote it.
_PLAN_MAGIC = b'ftrt'
_PLAN_VERSION = slice(24, 28)
_PLAN_HEADER_BYTES = 28


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
    """
    Admit engine files built for one host.

    :param host: what an engine must have been built for.
    """

    def __init__(self, host: HostProfile) -> None:
        self.host = host

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
        _compare('sm', self.host.sm, name.sm)
        if not same_tensorrt(self.host.tensorrt, name.tensorrt):
            raise EngineSchemaMismatchError(
                'tensorrt', expected=self.host.tensorrt, found=name.tensorrt, remedy=REBUILD
            )
        directory = trusted_directory(path.parent)
        manifest = read_manifest(directory / path.name)
        promised = manifest.engine_name
        for part in dataclasses.fields(EngineName):
            _compare(part.name, getattr(promised, part.name), getattr(name, part.name))
        _compare('gpu', self.host.gpu, manifest.gpu)
        _compare('platform', self.host.platform, manifest.platform)
        if source_sha256 is not None:
            _compare('source_sha256', source_sha256, manifest.source_sha256)
        if engine_sha256 is not None:
            _compare('engine_sha256', engine_sha256, manifest.engine_sha256)
        plan = read_trusted(directory / path.name, manifest.engine_bytes)
        _compare('engine_bytes', manifest.engine_bytes, len(plan))
        _compare('engine_sha256', manifest.engine_sha256, hashlib.sha256(plan).hexdigest())
        _check_plan_header(plan, manifest.tensorrt)
        return AdmittedEngine(plan, manifest, path)


def plan_version(plan: bytes) -> str | None:
    """Return the TensorRT version that a plan's header gives, four numbers, or None for anything else."""
    if len(plan) < _PLAN_HEADER_BYTES or not plan.startswith(_PLAN_MAGIC):
        return None
    return '.'.join(str(number) for number in plan[_PLAN_VERSION])


def _compare(name: str, expected: object, found: object) -> None:
    if expected != found:
        raise EngineSchemaMismatchError(name, expected=expected, found=found, remedy=REBUILD)


def _check_plan_header(plan: bytes, tensorrt: str) -> None:
    if len(plan) < _PLAN_HEADER_BYTES:
        raise EngineSchemaMismatchError(
            'plan_header', expected=f'{_PLAN_HEADER_BYTES} bytes', found=f'{len(plan)} bytes', remedy=REBUILD
        )
    _compare('plan_magic', _PLAN_MAGIC, plan[: len(_PLAN_MAGIC)])
    version = plan_version(plan)
    if version is None or not same_tensorrt(tensorrt, version):
        raise EngineSchemaMismatchError('plan_version', expected=tensorrt, found=version, remedy=REBUILD)
