"""TensorRT, called directly (R-2)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from numpy.typing import NDArray

from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.manifest import EngineName, same_tensorrt
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.errors import (
    EngineContentError,
    EngineSchemaMismatchError,
    RuntimeUnavailableError,
)
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.base import BaseRuntime, LoadedEngine
from gps_denied_c7.runtimes.gpu.cuda import open_cuda
from gps_denied_c7.runtimes.gpu.tensorrt_library import import_tensorrt
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineCacheEntry, EngineFacts
from gps_denied_c7.runtimes.tensor_mapping import own_input_shapes
from gps_denied_c7.runtimes.trt.build import build_engine, source_artefact, source_shapes
from gps_denied_c7.runtimes.trt.engine import BUILD_REMEDY, TensorrtEngine

__all__ = ['PROVIDER', 'TensorrtRuntime']

PROVIDER = 'TensorRT'

_log = logging.getLogger(__name__)


class TensorrtRuntime(BaseRuntime['TensorrtEngine']):
    """
    Run ``.engine`` files, and build them where that is allowed.

    An engine comes from the bundle, else from the engine cache, else it is built. Its bytes pass the gate
    before anything of TensorRT sees them, and no part of TensorRT is called on a host without a GPU.
    """

    label = 'tensorrt'

    def _compile(self, model: ModelBundle, build_config: BuildConfig) -> EngineCacheEntry:
        open_cuda(self.label)
        gate = self._require_gate()
        artefacts = [artefact for artefact in model.artefacts_for(self.label) if artefact.path.suffix == '.engine']
        if chosen := self._choose(artefacts):
            return EngineCacheEntry(chosen.path, chosen.sha256, model, build_config)
        try:
            source = source_artefact(model)
        except RuntimeUnavailableError:
            if not artefacts:
                raise
        else:
            if entry := self._cached(model, source, build_config, gate):
                return entry
            if build_config.allow_build:
                return build_engine(model, self._config, build_config, gate=gate)
        if artefacts:
            # All for other hosts: the gate says what differs.
            return EngineCacheEntry(artefacts[0].path, artefacts[0].sha256, model, build_config)
        host = gate.host
        raise RuntimeUnavailableError(
            self.label,
            f'there is no {build_config.precision} engine of {model.name!r} for SM {host.sm} and TensorRT '
            f'{host.tensorrt} in the bundle or in {self._config.engine_cache_dir}.',
            remedy=f'{BUILD_REMEDY}; or set build_on_configure.',
        )

    def _choose(self, artefacts: Sequence[Artefact]) -> Artefact | None:
        """Return the artefact whose name says that it was built for this host."""
        host = self._require_gate().host
        for artefact in artefacts:
            try:
                name = EngineName.parse(artefact.path.name)
            except EngineSchemaMismatchError:
                continue
            if name.sm == host.sm and same_tensorrt(name.tensorrt, host.tensorrt):
                return artefact
        return None

    def _cached(
        self, model: ModelBundle, source: Artefact, build: BuildConfig, gate: EngineGate
    ) -> EngineCacheEntry | None:
        found = EngineCache.at(self._config.engine_cache_dir).find(
            gate.host,
            precision=build.precision,
            source_sha256=source.content_sha256,
            shapes=source_shapes(model, source),
        )
        if found is None:
            return None
        if build.allow_build:
            # Where an engine may be built, a damaged one is replaced instead of refused.
            try:
                gate.admit(found.path, source_sha256=source.content_sha256)
            except EngineSchemaMismatchError as error:
                _log.warning('%s is built again: %s', found.path, error)
                return None
        return EngineCacheEntry(found.path, found.manifest.engine_sha256, model, build, source)

    def _require_gate(self) -> EngineGate:
        if self._gate is None:
            raise RuntimeUnavailableError(
                self.label,
                'it was made without the gate that engine files have to pass.',
                remedy='Give it the EngineGate of this host.',
            )
        return self._gate

    def _load(self, entry: EngineCacheEntry) -> LoadedEngine[TensorrtEngine]:
        if entry.path.suffix != '.engine':
            raise EngineContentError(
                f'{entry.path} is no .engine.', remedy='Correct the artefact in model.json, or take another runtime.'
            )
        source_sha256 = entry.source.content_sha256 if entry.source else None
        admitted = self._require_gate().admit(entry.path, engine_sha256=entry.sha256, source_sha256=source_sha256)
        cuda = open_cuda(self.label)
        trt = import_tensorrt(self.label)
        engine = TensorrtEngine(cuda, trt)
        try:
            engine.load(admitted, own_input_shapes(entry, self.label), self._config.gpu_memory_budget_bytes)
            wanted = self._wanted(entry, [spec.name for spec in engine.output_specs])
            finite = [own for name, own in wanted.items() if name not in self._non_finite(entry)]
            engine.take_out(wanted.values(), finite)
        except BaseException:
            engine.release()
            raise
        facts = EngineFacts(
            active_provider=PROVIDER,
            requested_providers=(PROVIDER,),
            cpu_only=False,
            cpu_nodes=0,
            notes=tuple(engine.notes),
            load_s=0.0,
        )
        return LoadedEngine(engine, engine.input_specs, engine.output_specs, facts)

    def _run(self, engine: TensorrtEngine, inputs: Mapping[str, NDArray]) -> Mapping[str, NDArray]:
        return engine.run(inputs)

    def _settle(self, engine: TensorrtEngine) -> Sequence[str]:
        return engine.capture()

    def _place(self, engine: TensorrtEngine, arrays: Mapping[str, NDArray]) -> None:
        engine.place(arrays)

    def _found_finite(self, engine: TensorrtEngine) -> bool:
        return engine.seen_finite

    def _free(self, engine: TensorrtEngine) -> None:
        engine.release()
