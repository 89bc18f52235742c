"""ONNX Runtime on its TensorRT, CUDA and CPU execution providers (R-3)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType

from numpy.typing import NDArray

from gps_denied_c7.engines.admission import AdmittedEngine
from gps_denied_c7.engines.manifest import same_tensorrt
from gps_denied_c7.engines.ort_store import BuiltFor, OrtEngineCache
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.errors import C7Error, EngineContentError, EngineDeserializeError, RuntimeUnavailableError
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.onnx_file import OnnxModel, read_onnx
from gps_denied_c7.runtimes.base import BaseRuntime, LoadedEngine
from gps_denied_c7.runtimes.gpu.cuda import open_cuda
from gps_denied_c7.runtimes.gpu.tensorrt_library import import_tensorrt
from gps_denied_c7.runtimes.host_profile import driver_version, linked_tensorrt, local_host_profile, platform_name
from gps_denied_c7.runtimes.ort.io_binding import GpuIo, HostIo, TensorIo, compare_runs
from gps_denied_c7.runtimes.ort.providers import (
    CPU,
    CUDA,
    TENSORRT,
    Attempt,
    Engines,
    SessionPlan,
    around_engine,
    gpu_remedy,
    plan_engine,
    plan_model,
    require_providers,
)
from gps_denied_c7.runtimes.ort.session import (
    Session,
    certain_outputs,
    open_session,
    output_names,
    profiled_placement,
    specs,
)
from gps_denied_c7.runtimes.protocol import EngineCacheEntry, EngineFacts, ProviderSet
from gps_denied_c7.runtimes.tensor_mapping import fix_shapes, own_input_shapes
from gps_denied_c7.runtimes.trt.build import PlanRequest, build_plan, workspace_bytes
from gps_denied_c7.runtimes.trt.progress_reports import BuildWatch

__all__ = ['OnnxTrtEpRuntime']

_log = logging.getLogger(__name__)


class OnnxTrtEpRuntime(BaseRuntime[Session]):
    """
    Run ``.onnx`` models, and ``.engine`` files through the TensorRT provider.

    ONNX Runtime's own retry on other providers silently drops the options, so it is off: the
    retries here keep them, and the active providers are compared with the requested ones. The provider's engine cache
    is used where it is what its listing says; an engine in it that is the whole model is loaded as such,
    which takes a fraction of a second where the cache alone takes ten.

    Where engines may be built, a model becomes one by TensorRT's own builder, if Python has the TensorRT that
    ONNX Runtime loads: it reports its progress, knows the timings of earlier builds, and takes a limit for
    the search. What it does not take, the provider builds.
    """

    label = 'onnx_trt_ep'

    def _choose(self, artefacts: Sequence[Artefact]) -> Artefact | None:
        fits = [artefact for artefact in artefacts if self._device_fits(artefact)]
        models = [artefact for artefact in fits if artefact.path.suffix == '.onnx']
        engines = [artefact for artefact in fits if artefact.path.suffix == '.engine']
        if self._providers is ProviderSet.CPU or self._gate is None:
            engines = []
        # A model loads on every provider, an engine on one host alone.
        return next(iter(models + engines), None)

    def _device_fits(self, artefact: Artefact) -> bool:
        if self._providers is ProviderSet.ANY or artefact.device == 'any':
            return True
        return (artefact.device == 'cpu') == (self._providers is ProviderSet.CPU)

    def _load(self, entry: EngineCacheEntry) -> LoadedEngine[Session]:
        if self._providers is ProviderSet.CPU and self._config.ort_disallow_cpu_fallback:
            raise EngineDeserializeError(
                'the CPU was asked for, and ort_disallow_cpu_fallback refuses it.', remedy=gpu_remedy(self._config)
            )
        # Each is read and judged before ONNX Runtime is touched.
        model: OnnxModel | None = None
        if entry.path.suffix == '.engine':
            plan = plan_engine(self._admit(entry))
            ort = self._import_onnxruntime()
        elif entry.path.suffix == '.onnx':
            model = read_onnx(entry.path, entry.sha256, entry.external_data)
            shapes = own_input_shapes(entry, self.label)
            if not shapes:
                model, shapes = model.for_image(entry.model.image)
            axes = model.dimension_overrides(shapes)
            ort = self._import_onnxruntime()
            notes: list[str] = []
            if model.random:
                changing = ', '.join(model.random[:8])
                notes.append(f'The answers to the same image differ from run to run, because of {changing}.')
            engines = self._find_engines(ort, entry, model.content_sha256, axes, notes)
            if engines.build:
                built = self._build_whole(entry, model, shapes, engines.build.built_for, notes)
                engines = dataclasses.replace(engines, built=built)
            plan = plan_model(
                entry,
                model,
                axes,
                engines,
                providers=self._providers,
                disallow_cpu=self._config.ort_disallow_cpu_fallback,
                notes=notes,
            )
        else:
            raise EngineContentError(
                f'{entry.path} is neither .onnx nor .engine.', remedy='Correct the artefact in model.json.'
            )
        try:
            require_providers(ort, plan, self._config, self.label)
            return self._open(ort, plan, entry, model)
        except BaseException:
            if plan.build is not None:
                plan.build.close()
            raise

    def _run(self, engine: Session, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        assert engine.io is not None
        return engine.io.run(inputs)

    def _place(self, engine: Session, arrays: Mapping[str, NDArray]) -> None:
        if engine.io is not None:
            engine.io.place(arrays)

    def _compare(self, engine: Session, probes: Iterator[dict[str, NDArray]]) -> Sequence[str]:
        """Compare bound runs with plain ones: what a bound output does not get right, ONNX Runtime allocates."""
        assert engine.io is not None
        remarks: list[str] = []
        for inputs in probes:
            remarks += compare_runs(engine.io, inputs, random=engine.random)
        # Each says it of another request.
        return tuple(dict.fromkeys(remarks))

    def _unsure(self, engine: Session) -> Collection[str]:
        return engine.io.unsure if engine.io is not None else ()

    def _found_finite(self, engine: Session) -> bool:
        return engine.io is not None and engine.io.seen_finite

    def _free(self, engine: Session) -> None:
        engine.release()

    # --- what is asked for ------------------------------------------------------------------------

    def _admit(self, entry: EngineCacheEntry) -> AdmittedEngine:
        if self._providers is ProviderSet.CPU:
            raise EngineContentError(
                f'{entry.path} runs on a GPU alone, and the CPU was asked for.', remedy='Use the .onnx.'
            )
        if self._gate is None:
            raise EngineDeserializeError(
                f'{entry.path} cannot be checked: this runtime was made without an engine gate.',
                remedy='Give the runtime the gate of this host, or use the .onnx.',
            )
        return self._gate.admit(entry.path, engine_sha256=entry.sha256)

    # --- engines of TensorRT ----------------------------------------------------------------------

    def _find_engines(
        self, ort: ModuleType, entry: EngineCacheEntry, digest: str, axes: Mapping[str, int], notes: list[str]
    ) -> Engines:
        """Return the engines that earlier loads of a model have left, or a place for new ones where it may be built."""
        if self._providers is ProviderSet.CPU or TENSORRT not in ort.get_available_providers():
            return Engines()
        try:
            gpu = open_cuda(self.label).gpu_facts()
            built_for = BuiltFor(
                model_sha256=digest,
                precision=entry.build.precision,
                axes=axes,
                onnxruntime=ort.__version__,
                tensorrt=linked_tensorrt(ort),
                gpu=gpu.name,
                sm=gpu.sm,
                driver=driver_version(),
                platform=platform_name(),
            )
        except (C7Error, RuntimeError) as error:
            notes.append(f'Built engines are neither used nor kept, since their versions are unknown: {error}')
            return Engines()
        cache = OrtEngineCache.at(self._config.ort_trt_cache_dir)
        warm, found = cache.find(built_for)
        notes += found
        if warm or not entry.build.allow_build:
            return Engines(warm)
        build, found = cache.begin(built_for)
        notes += found
        return Engines(build=build)

    def _build_whole(
        self,
        entry: EngineCacheEntry,
        model: OnnxModel,
        shapes: Mapping[str, tuple[int | None, ...]],
        built_for: BuiltFor,
        notes: list[str],
    ) -> Attempt | None:
        """Have TensorRT's own builder make one engine of the model; None, and why, where the provider has to build."""
        try:
            request = PlanRequest(
                model=model.with_axes(built_for.axes),
                name=entry.model.name,
                precision=entry.build.precision,
                shapes=shapes,
                workspace_bytes=workspace_bytes(self._config),
                optimization_level=self._config.builder_optimization_level,
                whole=True,
            )
            host = local_host_profile(open_cuda(self.label))
            if not same_tensorrt(host.tensorrt, built_for.tensorrt):
                raise EngineDeserializeError(f'Python has TensorRT {host.tensorrt}, ONNX Runtime {built_for.tensorrt}.')
            trt = import_tensorrt(self.label)
            with BuildWatch(entry.build.progress) as watch:
                plan = build_plan(trt, request, host, EngineCache.at(self._config.engine_cache_dir), watch)
            return around_engine(plan.plan, entry, plan.inputs, plan.outputs, built_for.sm, new=True)
        except Exception as error:
            # Its remedy is about a failed build, and this model will be served.
            reason = getattr(error, 'message', error)
            notes.append(f"{TENSORRT} builds the engine itself, since TensorRT's own builder cannot: {reason}")
            _log.warning('%s: %s', entry.path, notes[-1])
            return None

    def _import_onnxruntime(self) -> ModuleType:
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeUnavailableError(
                self.label, f'onnxruntime does not import: {error}.', remedy='pip install -r requirements/runtime.txt'
            ) from error
        return onnxruntime

    # --- making a session -------------------------------------------------------------------------

    def _open(
        self, ort: ModuleType, plan: SessionPlan, entry: EngineCacheEntry, model: OnnxModel | None
    ) -> LoadedEngine[Session]:
        """Make a session on the best providers that come up, each time with the full options, and bind it."""
        notes = list(plan.notes)
        engine = open_session(ort, plan, self._config, notes, gpu_remedy=gpu_remedy(self._config))
        try:
            # Known by now from ONNX Runtime 1.24 on; before that, the warm-up run will tell.
            provider = self._landed(engine, notes)
            engine.inputs = specs(engine.session.get_inputs())
            if not entry.model.inputs:
                # Before shapes are computed from a guess.
                fix_shapes(engine.inputs)
            # A bundle names its outputs.
            own_names = () if entry.model.outputs else output_names(engine, self._config.output_tensors)
            wanted = self._wanted(entry, own_names)
            given = own_input_shapes(entry, self.label)
            engine.random = model is not None and bool(model.random)
            engine.outputs = certain_outputs(engine, set(wanted.values()), model, given)
            finite = [own for name, own in wanted.items() if name not in self._non_finite(entry)]
            engine.io = self._bind_tensors(ort, engine, provider, finite, notes)
        except BaseException:
            engine.release()
            raise
        facts = EngineFacts(
            active_provider=provider,
            requested_providers=plan.requested,
            cpu_only=provider == CPU,
            cpu_nodes=None,
            notes=tuple(notes),
            load_s=0.0,
        )
        return LoadedEngine(engine, engine.inputs, engine.outputs, facts)

    # --- what was loaded --------------------------------------------------------------------------

    def _landed(self, engine: Session, notes: Sequence[str]) -> str:
        """Return the provider that runs the graph, as far as that is known, or refuse a CPU that is not wanted."""
        active = [name for name in engine.came if name in (TENSORRT, CUDA)]
        if engine.placement is not None:
            active = [name for name in active if engine.placement.nodes[name]]
        if active:
            return active[0]
        if not engine.takes_cpu:
            raise EngineDeserializeError(
                f'{engine.path} was loaded on the CPU alone: {" ".join(notes)}', remedy=gpu_remedy(self._config)
            )
        return CPU

    def _bind_tensors(
        self, ort: ModuleType, engine: Session, provider: str, finite: Sequence[str], notes: list[str]
    ) -> TensorIo:
        if provider != CPU:
            try:
                io = GpuIo(open_cuda(self.label), engine.session, engine.outputs, finite)
            except Exception as error:
                notes.append(f'Tensors are copied through pageable memory: {error}')
            else:
                notes += io.notes
                return io
        return HostIo(ort, engine.session, engine.outputs)

    def _witness(self, engine: Session, facts: EngineFacts) -> EngineFacts:
        notes = list(facts.notes)
        if engine.profile is not None:
            engine.placement = profiled_placement(engine.session)
            engine.profile.cleanup()
            engine.profile = None
        provider = self._landed(engine, notes)
        nodes = engine.placement.nodes if engine.placement else None
        if provider != CPU and nodes and nodes[CPU]:
            notes.append(f'{nodes[CPU]} of {sum(nodes.values())} graph nodes run on {CPU}.')
            _log.warning('%s: %s', engine.path, notes[-1])
        if provider == CUDA and TENSORRT in facts.requested_providers:
            _log.info('%s: %s is not active, %s is. %s', engine.path, TENSORRT, CUDA, ' '.join(notes))
        _keep_build(engine, provider, notes)
        return dataclasses.replace(
            facts,
            active_provider=provider,
            cpu_only=provider == CPU,
            cpu_nodes=nodes[CPU] if nodes else None,
            notes=tuple(notes),
        )


def _keep_build(engine: Session, provider: str, notes: list[str]) -> None:
    """List what TensorRT has built, so that the next session may use it."""
    build, engine.build = engine.build, None
    plan, engine.built = engine.built, None
    if build is None:
        return
    if provider != TENSORRT:
        build.close()
        return
    whole = plan is not None or (engine.placement is not None and engine.placement.is_one_engine)
    try:
        if plan is not None:
            build.keep(plan)
        build.record((engine.inputs, specs(engine.session.get_outputs())) if whole else None)
    except EngineDeserializeError as error:
        notes.append(error.message)
        _log.warning('%s: %s', engine.path, error)
