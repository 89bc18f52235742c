"""ONNX Runtime on its TensorRT, CUDA and CPU execution providers (R-3)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from gps_denied_c7.engines.admission import AdmittedEngine
from gps_denied_c7.engines.manifest import same_tensorrt
from gps_denied_c7.engines.ort_store import (
    BuiltFor,
    CacheBuild,
    OrtEngineCache,
    VerifiedCache,
    driver_version,
    linked_tensorrt,
    platform_name,
)
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.errors import C7Error, EngineDeserializeError, GpuUnavailableError, RuntimeUnavailableError
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.onnx_file import OnnxModel, ep_context_model, read_onnx
from gps_denied_c7.runtimes.base import BaseRuntime, LoadedEngine, fix_shapes, own_input_shapes
from gps_denied_c7.runtimes.gpu.cuda import open_cuda, require_gpu
from gps_denied_c7.runtimes.gpu.tensorrt_library import import_tensorrt
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.runtimes.ort.io_binding import GpuIo, HostIo, TensorIo
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineCacheEntry, EngineFacts, ProviderSet
from gps_denied_c7.runtimes.trt.build import BuildWatch, PlanRequest, build_plan, workspace_bytes
from gps_denied_c7.tensors import TensorSpec, nearly_equal

__all__ = ['CPU', 'CUDA', 'TENSORRT', 'OnnxTrtEpRuntime']

TENSORRT = 'TensorrtExecutionProvider'
CUDA = 'CUDAExecutionProvider'
CPU = 'CPUExecutionProvider'

_GPU_FIRST = (TENSORRT, CUDA, CPU)

# ONNX Runtime's element types; those that NumPy lacks are refused.
_DTYPES = {
    'tensor(bool)': 'bool',
    'tensor(double)': 'float64',
    'tensor(float)': 'float32',
    'tensor(float16)': 'float16',
    **{f'tensor({sign}int{bits})': f'{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64)},
}

_ERRORS_ONLY = 3
# Share of an output's range by which two runs of one session may differ.
_SAME = 1e-4
_ALLOW_CPU = 'Install the GPU stack (requirements/gpu.txt), or let ort_disallow_cpu_fallback be false.'

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """
    One way to make a session.

    :param source: the model's bytes.
    :param weights: what these leave out, by name.
    :param engine: the model is one TensorRT engine in an EPContext node.
    :param built: that engine's bytes where it was built just now, to be kept if this is the way that works.
    :param cache: where the TensorRT provider may read and write engines.
    :param warm: what that directory was found to hold, None where the provider builds, for minutes and in silence.
    """

    providers: tuple[str, ...]
    source: bytes
    weights: Mapping[str, NDArray] = dataclasses.field(default_factory=dict)
    engine: bool = False
    built: bytes | None = None
    cache: Path | None = None
    warm: VerifiedCache | None = None

    @property
    def builds(self) -> bool:
        return TENSORRT in self.providers and not self.engine and self.warm is None

    def __str__(self) -> str:
        return f'{list(self.providers)}{" around the engine" if self.engine else ""}'


@dataclass(frozen=True, slots=True)
class _Request:
    """
    What is to be loaded, and every way to try it, best first.

    :param axes: size of each free axis by name.
    :param build: the cache directory that this load may fill.
    :param progress: called with the progress of a build.
    """

    path: Path
    attempts: tuple[_Attempt, ...]
    digest: str
    precision: str
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    build: CacheBuild | None = None
    progress: Callable[[BuildProgress], None] | None = None
    notes: tuple[str, ...] = ()

    @property
    def requested(self) -> tuple[str, ...]:
        return self.attempts[0].providers

    @property
    def takes_cpu(self) -> bool:
        return self.attempts[-1].providers == (CPU,)


@dataclass(frozen=True, slots=True)
class _Placement:
    """
    Say where a graph landed.

    :param nodes: graph nodes by provider.
    :param engines: TensorRT engines that the graph became.
    """

    nodes: Counter[str]
    engines: int

    @property
    def is_one_engine(self) -> bool:
        return self.engines == 1 and not any(count for name, count in self.nodes.items() if name != TENSORRT)


@dataclass(slots=True, eq=False)
class _Session:
    """
    A session with all that goes when it goes.

    :param came: its providers.
    :param takes_cpu: it may run on the CPU alone.
    :param certain: its outputs have the shapes that it declares, which an engine's have.
    :param outputs: those that are wanted, None where a size is not certain.
    :param placement: where the graph landed, None where that is not known, or not yet.
    :param build: the cache directory that it may have filled.
    :param built: the engine that is to be kept there.
    :param profile: where it writes what ran, until that has been read.
    :param random: it has operators that throw dice.
    """

    session: Any
    path: Path
    came: tuple[str, ...]
    takes_cpu: bool
    certain: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    placement: _Placement | None
    build: CacheBuild | None
    built: bytes | None
    profile: tempfile.TemporaryDirectory[str] | None
    io: TensorIo | None = None
    random: bool = False

    def release(self) -> None:
        """Free everything; ONNX Runtime frees a session, GPU memory included, when its last reference goes."""
        self.built = None
        io, self.io = self.io, None
        if io is not None:
            io.release()
        self.session = None
        profile, self.profile = self.profile, None
        if profile is not None:
            profile.cleanup()
        build, self.build = self.build, None
        if build is not None:
            build.close()


class OnnxTrtEpRuntime(BaseRuntime[_Session]):
    """
    Run ``.onnx`` models, and ``.engine`` files through the TensorRT provider.

    ONNX Runtime's own retry on other providers drops the options and tells nobody, so it is off: the
    retries here keep them, and what came is compared with what was asked for. The provider's engine cache
    is used where it is what its listing says; an engine in it that is the whole model is loaded as such,
    which takes a fraction of a second where the cache alone takes ten.

    Where engines may be built, a model becomes one by TensorRT's own builder, if Python has the TensorRT that
    ONNX Runtime loads: it tells how far it is, knows the timings of earlier builds, and can be told how long
    to search. What it does not take, the provider builds.
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

    def _load(self, entry: EngineCacheEntry) -> LoadedEngine[_Session]:
        if self._providers is ProviderSet.CPU and self._config.ort_disallow_cpu_fallback:
            raise EngineDeserializeError(
                'the CPU was asked for, and ort_disallow_cpu_fallback refuses it.', remedy=_ALLOW_CPU
            )
        # Each is read and judged before ONNX Runtime is touched.
        model: OnnxModel | None = None
        if entry.path.suffix == '.engine':
            request = self._engine_request(self._admit(entry))
            ort = self._import_onnxruntime()
        elif entry.path.suffix == '.onnx':
            model = read_onnx(entry.path, entry.sha256, entry.external_data)
            model, shapes = _for_image(model, entry, self.label)
            axes = model.dimension_overrides(shapes)
            ort = self._import_onnxruntime()
            request = self._model_request(ort, entry, model, axes)
        else:
            raise EngineDeserializeError(
                f'{entry.path} is neither .onnx nor .engine.', remedy='Correct the artefact in model.json.'
            )
        try:
            self._refuse_absent_gpu(ort, request)
            return self._open(ort, request, entry, model)
        except BaseException:
            if request.build is not None:
                request.build.close()
            raise

    def _run(self, engine: _Session, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        assert engine.io is not None
        return engine.io.run(inputs)

    def _place(self, engine: _Session, arrays: Mapping[str, NDArray]) -> None:
        if engine.io is not None:
            engine.io.place(arrays)

    def _compare(self, engine: _Session, probes: Iterator[dict[str, NDArray]]) -> Sequence[str]:
        """Compare bound runs with plain ones: what a bound output does not get right, ONNX Runtime allocates."""
        assert engine.io is not None
        remarks: list[str] = []
        for inputs in probes:
            remarks += _compare_runs(engine.io, inputs, random=engine.random)
        # Each says it of another request.
        return tuple(dict.fromkeys(remarks))

    def _unsure(self, engine: _Session) -> Collection[str]:
        return engine.io.unsure if engine.io is not None else ()

    def _found_finite(self, engine: _Session) -> bool:
        return engine.io is not None and engine.io.seen_finite

    def _free(self, engine: _Session) -> None:
        engine.release()

    # --- what is asked for ------------------------------------------------------------------------

    def _admit(self, entry: EngineCacheEntry) -> AdmittedEngine:
        if self._providers is ProviderSet.CPU:
            raise EngineDeserializeError(
                f'{entry.path} runs on a GPU alone, and the CPU was asked for.', remedy='Fly the .onnx.'
            )
        if self._gate is None:
            raise EngineDeserializeError(
                f'{entry.path} cannot be checked: this runtime was made without an engine gate.',
                remedy='Give the runtime the gate of this host, or fly the .onnx.',
            )
        return self._gate.admit(entry.path, engine_sha256=entry.sha256)

    def _engine_request(self, admitted: AdmittedEngine) -> _Request:
        manifest = admitted.manifest
        model = ep_context_model(
            admitted.plan, name=manifest.model, inputs=manifest.inputs, outputs=manifest.outputs, sm=manifest.sm
        )
        # CUDA and the CPU cannot run a model that is one engine.
        attempt = _Attempt((TENSORRT,), model, engine=True)
        return _Request(admitted.path, (attempt,), manifest.source_sha256, manifest.precision)

    def _model_request(
        self, ort: ModuleType, entry: EngineCacheEntry, model: OnnxModel, axes: Mapping[str, int]
    ) -> _Request:
        notes: list[str] = []
        if model.random:
            notes.append(f'The same image has other answers each time, because of {", ".join(model.random[:8])}.')
        digest, precision = model.content_sha256, entry.build.precision
        if self._providers is ProviderSet.CPU:
            attempt = _Attempt((CPU,), model.source, model.weights)
            return _Request(entry.path, (attempt,), digest, precision, axes, notes=tuple(notes))
        attempts = [_Attempt((CUDA, CPU), model.source, model.weights)]
        if self._providers is ProviderSet.ANY and not self._config.ort_disallow_cpu_fallback:
            attempts.append(_Attempt((CPU,), model.source, model.weights))
        warm, build = None, None
        if TENSORRT in ort.get_available_providers():
            warm, build = self._engine_cache(ort, entry, digest, axes, notes)
        ready = warm if warm and warm.is_for_provider else None
        if ready or entry.build.allow_build:
            cache = ready.directory if ready else build.directory if build else None
            attempts.insert(0, _Attempt(_GPU_FIRST, model.source, model.weights, cache=cache, warm=ready))
        elif warm is None:
            # The provider builds whatever its cache lacks, for minutes, and loads unread what lies there.
            notes.append(f'{TENSORRT} was not asked for: its cache is not verified and building is not allowed.')
        if warm and warm.plan is not None and (whole := warm.listing.whole_graph):
            around = ep_context_model(
                warm.plan,
                name=entry.path.stem,
                inputs=whole.inputs,
                outputs=whole.outputs,
                sm=warm.listing.built_for.sm,
            )
            attempts.insert(0, _Attempt(_GPU_FIRST, around, engine=True))
        elif build and (built := self._build_whole(entry, model, build.built_for, notes)):
            attempts.insert(0, built)
        progress = entry.build.progress
        return _Request(entry.path, tuple(attempts), digest, precision, axes, build, progress, tuple(notes))

    def _engine_cache(
        self, ort: ModuleType, entry: EngineCacheEntry, digest: str, axes: Mapping[str, int], notes: list[str]
    ) -> tuple[VerifiedCache | None, CacheBuild | None]:
        """Return the warm cache of a model, or a new one where it may be built, or neither."""
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
            notes.append(f'Built engines are neither used nor kept, since they cannot be told apart: {error}')
            return None, None
        cache = OrtEngineCache.at(self._config.ort_trt_cache_dir)
        warm, found = cache.find(built_for)
        notes += found
        if warm or not entry.build.allow_build:
            return warm, None
        build, found = cache.begin(built_for)
        notes += found
        return None, build

    def _build_whole(
        self, entry: EngineCacheEntry, model: OnnxModel, built_for: BuiltFor, notes: list[str]
    ) -> _Attempt | None:
        """Have TensorRT's own builder make one engine of the model; None, and why, where the provider has to build."""
        try:
            request = PlanRequest(
                model=model.with_axes(built_for.axes),
                name=entry.model.name,
                precision=entry.build.precision,
                shapes=_for_image(model, entry, self.label)[1],
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
            around = ep_context_model(
                plan.plan, name=entry.path.stem, inputs=plan.inputs, outputs=plan.outputs, sm=built_for.sm
            )
        except Exception as error:
            # Its remedy is for who wants an engine of TensorRT's, and this model will be served.
            notes.append(f'{TENSORRT} builds by itself: {getattr(error, "message", error)}')
            _log.warning('%s: %s', entry.path, notes[-1])
            return None
        return _Attempt(_GPU_FIRST, around, engine=True, built=plan.plan)

    def _import_onnxruntime(self) -> ModuleType:
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeUnavailableError(
                self.label, f'onnxruntime does not import: {error}.', remedy='pip install -r requirements/runtime.txt'
            ) from error
        return onnxruntime

    def _refuse_absent_gpu(self, ort: ModuleType, request: _Request) -> None:
        """Refuse before any session where this host, or this build of ONNX Runtime, rules out what is needed."""
        if request.takes_cpu:
            return
        available = ort.get_available_providers()
        needed = [name for name in request.requested if name != CPU]
        if set(needed) & set(available):
            self._require_gpu()
            return
        lack = f'{request.path} needs {" or ".join(needed)}, and this onnxruntime has only {available}.'
        if self._config.ort_disallow_cpu_fallback:
            raise EngineDeserializeError(lack, remedy=self._gpu_remedy())
        # As lasting as a package that is not installed: no later attempt is worth a process of its own.
        raise RuntimeUnavailableError(self.label, lack, remedy=self._gpu_remedy())

    def _require_gpu(self) -> None:
        try:
            require_gpu(self.label)
        except GpuUnavailableError as error:
            if self._config.ort_disallow_cpu_fallback:
                raise EngineDeserializeError(error.message, remedy=_ALLOW_CPU) from error
            raise

    def _gpu_remedy(self) -> str:
        if self._config.ort_disallow_cpu_fallback:
            return _ALLOW_CPU
        return 'Install the GPU stack (requirements/gpu.txt).'

    # --- making a session -------------------------------------------------------------------------

    def _open(
        self, ort: ModuleType, request: _Request, entry: EngineCacheEntry, model: OnnxModel | None
    ) -> LoadedEngine[_Session]:
        """Make a session on the best providers that come up, each time with the full options, and bind it."""
        notes = list(request.notes)
        engine = self._best_session(ort, request, notes)
        try:
            # Known by now from ONNX Runtime 1.24 on; before that, the warm-up run will tell.
            provider = self._landed(engine, notes)
            engine.inputs = _specs(engine.session.get_inputs())
            if not entry.model.inputs:
                # Before shapes are computed from a guess.
                fix_shapes(engine.inputs)
            wanted = self._wanted(entry, [argument.name for argument in engine.session.get_outputs()])
            given = own_input_shapes(entry, self.label)
            engine.random = model is not None and bool(model.random)
            engine.outputs = _certain_outputs(engine, set(wanted.values()), model, given)
            finite = [own for name, own in wanted.items() if name not in self._non_finite(entry)]
            engine.io = self._bind_tensors(ort, engine, provider, finite, notes)
        except BaseException:
            engine.release()
            raise
        facts = EngineFacts(
            active_provider=provider,
            requested_providers=request.requested,
            cpu_only=provider == CPU,
            cpu_nodes=None,
            notes=tuple(notes),
            load_s=0.0,
        )
        return LoadedEngine(engine, engine.inputs, engine.outputs, facts)

    def _best_session(self, ort: ModuleType, request: _Request, notes: list[str]) -> _Session:
        *better, last = request.attempts
        for attempt in better:
            try:
                return self._session(ort, request, attempt, notes)
            except Exception as error:
                notes.append(f'A session on {attempt} was refused: {error}.')
        try:
            return self._session(ort, request, last, notes)
        except Exception as error:
            raise EngineDeserializeError(
                f'ONNX Runtime refused {request.path} on {last}: {error}. {" ".join(notes)}',
                remedy='Export the model again.' if last.providers == (CPU,) else self._gpu_remedy(),
            ) from error

    def _session(self, ort: ModuleType, request: _Request, attempt: _Attempt, notes: list[str]) -> _Session:
        options = self._session_options(ort, request, attempt)
        profile = None
        if attempt.providers != (CPU,) and not _reports_placement(ort.InferenceSession):
            profile = _profile_runs(options)
        every = self._provider_options(request, attempt)
        watch = BuildWatch(request.progress, f'{TENSORRT} builds') if attempt.builds else contextlib.nullcontext()
        try:
            with watch:
                session = _strict(ort.InferenceSession)(
                    attempt.source,
                    sess_options=options,
                    providers=[(name, every[name]) for name in attempt.providers],
                    enable_fallback=0,
                )
            came = session.get_providers()
            if attempt.engine and TENSORRT not in came:
                raise EngineDeserializeError(f'{TENSORRT} did not come')
            if attempt.warm is not None:
                attempt.warm.require_unchanged()
        except BaseException:
            if profile is not None:
                profile.cleanup()
            raise
        notes += [f'{name} was asked for and did not come.' for name in attempt.providers if name not in came]
        return _Session(
            session=session,
            path=request.path,
            came=tuple(came),
            takes_cpu=request.takes_cpu,
            certain=attempt.engine,
            inputs=(),
            outputs=(),
            placement=_reported_placement(session),
            build=request.build,
            built=attempt.built,
            profile=profile,
        )

    def _provider_options(self, request: _Request, attempt: _Attempt) -> dict[str, dict[str, Any]]:
        budget = self._config.gpu_memory_budget_bytes
        # One directory for each model digest: ONNX Runtime's own cache key leaves the weights out.
        directory = attempt.cache or self._config.ort_trt_cache_dir / request.digest
        return {
            TENSORRT: {
                'trt_engine_cache_enable': attempt.cache is not None,
                'trt_engine_cache_path': str(directory),
                'trt_max_workspace_size': workspace_bytes(self._config),
                'trt_fp16_enable': request.precision == 'fp16',
            },
            # Outside of that limit, the search for the fastest convolution would take what the greediest one wants: 10
            # GiB for a 1.3 million weight network on an H100. Now it is 32 MB.
            CUDA: {'gpu_mem_limit': budget, 'cudnn_conv_use_max_workspace': '0'},
            CPU: {},
        }

    def _session_options(self, ort: ModuleType, request: _Request, attempt: _Attempt) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._config.cpu_threads or max(1, len(os.sched_getaffinity(0)) - 1)
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        # Spinning threads burn the cores that fly the drone.
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        if _reports_placement(ort.InferenceSession):
            options.add_session_config_entry('session.record_ep_graph_assignment_info', '1')
        if attempt.weights:
            # ONNX Runtime copies them while it makes the session, and reads no file.
            values = [ort.OrtValue.ortvalue_from_numpy(array) for array in attempt.weights.values()]
            options.add_external_initializers(list(attempt.weights), values)
        if attempt.engine:
            # One node leaves nothing to optimise, and every pass would copy the engine inside it.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            return options
        for axis, size in request.axes.items():
            options.add_free_dimension_override_by_name(axis, size)
        return options

    # --- what came --------------------------------------------------------------------------------

    def _landed(self, engine: _Session, notes: Sequence[str]) -> str:
        """Return the provider that runs the graph, as far as that is known, or refuse a CPU that is not wanted."""
        active = [name for name in engine.came if name in (TENSORRT, CUDA)]
        if engine.placement is not None:
            active = [name for name in active if engine.placement.nodes[name]]
        if active:
            return active[0]
        if not engine.takes_cpu:
            raise EngineDeserializeError(
                f'{engine.path} came up on the CPU alone: {" ".join(notes)}', remedy=self._gpu_remedy()
            )
        return CPU

    def _bind_tensors(
        self, ort: ModuleType, engine: _Session, provider: str, finite: Sequence[str], notes: list[str]
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

    def _witness(self, engine: _Session, facts: EngineFacts) -> EngineFacts:
        notes = list(facts.notes)
        if engine.profile is not None:
            engine.placement = _profiled_placement(engine.session)
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


@functools.lru_cache(maxsize=4)
def _strict(session: type[Any]) -> type[Any]:
    """Return the session class without its retry on other providers, which 1.17 cannot be told to leave off."""

    class StrictSession(session):  # type: ignore[misc]
        @property
        def _enable_fallback(self) -> bool:
            return False

        @_enable_fallback.setter
        def _enable_fallback(self, value: bool) -> None:
            # 1.17 takes enable_fallback=0 without a word and sets this to True; run() reads it too.
            pass

    return StrictSession


def _keep_build(engine: _Session, provider: str, notes: list[str]) -> None:
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
        build.record((engine.inputs, _specs(engine.session.get_outputs())) if whole else None)
    except EngineDeserializeError as error:
        notes.append(error.message)
        _log.warning('%s: %s', engine.path, error)


def _reports_placement(session: Any) -> bool:
    return hasattr(session, 'get_provider_graph_assignment_info')


def _reported_placement(session: Any) -> _Placement | None:
    """Return where the graph landed, None before ONNX Runtime 1.24, which cannot say before it has run."""
    if not _reports_placement(session):
        return None
    nodes: Counter[str] = Counter()
    engines = 0
    for subgraph in session.get_provider_graph_assignment_info():
        nodes[subgraph.ep_name] += len(subgraph.get_nodes())
        engines += subgraph.ep_name == TENSORRT
    return _Placement(nodes, engines) if nodes else None


def _profile_runs(options: Any) -> tempfile.TemporaryDirectory[str] | None:
    """Have a session write down what it runs; that ends with the first run, and costs it about a millisecond."""
    try:
        profile = tempfile.TemporaryDirectory(prefix='c7-profile-', ignore_cleanup_errors=True)
    except OSError as error:
        _log.warning('where the graph runs will not be known: %s', error)
        return None
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(profile.name) / 'run')
    return profile


def _profiled_placement(session: Any) -> _Placement | None:
    """Return which provider ran which nodes, as the session wrote it down, None where it did not."""
    try:
        events = json.loads(Path(session.end_profiling()).read_text(errors='replace'))
        ran = {
            (event['name'], event['args'].get('node_index')): event['args']['provider']
            for event in events
            if event.get('cat') == 'Node' and 'provider' in event.get('args', {})
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning('where the graph runs is not known: %s', error)
        return None
    nodes = Counter(ran.values())
    # A fused engine is one node to the executor.
    return _Placement(nodes, nodes[TENSORRT]) if nodes else None


def _compare_runs(io: TensorIo, inputs: Mapping[str, NDArray], *, random: bool = False) -> Iterator[str]:
    """
    Run one request as frames are run and as ``session.run`` does, and yield what is to be said of the difference.

    :param random: the network throws dice, so that two runs may be equal by chance and the next one not.
    :raises EngineDeserializeError: outputs differ, also where nothing is bound.
    """
    try:
        plain = io.run_plain(inputs)
    except Exception:
        # A network may refuse a request of this kind, as one without detections; that says nothing about places.
        return
    found = {name: array.copy() for name, array in io.run(inputs).items()}
    if not (wrong := _different(found, plain)):
        return
    changing = 'Outputs {} differ from run to run, so that they cannot be compared.'
    if differing := wrong & _different(io.run_plain(inputs), plain):
        yield changing.format(sorted(differing))
        wrong -= differing
    if placed := wrong & io.placed:
        io.unbind(placed)
        wrong &= _different(io.run(inputs), plain)
        if placed - wrong:
            yield f'Outputs {sorted(placed - wrong)} are not written where they are bound, and are allocated each time.'
    if wrong and random:
        yield changing.format(sorted(wrong))
    elif wrong:
        raise EngineDeserializeError(
            f'outputs {sorted(wrong)} of a bound run are not those of a plain one.',
            remedy='Report this with the model, and use another runtime.',
        )


def _different(found: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> set[str]:
    return {name for name, array in expected.items() if not nearly_equal(found[name], array, _SAME)}


def _for_image(
    model: OnnxModel, entry: EngineCacheEntry, label: str
) -> tuple[OnnxModel, Mapping[str, tuple[int | None, ...]]]:
    """Return the wanted input shapes by name, and the model with a name for each free axis that gets its size so."""
    shapes = own_input_shapes(entry, label)
    return (model, shapes) if shapes else model.for_image(entry.model.image)


def _certain_outputs(
    engine: _Session, wanted: Collection[str], model: OnnxModel | None, given: Mapping[str, Sequence[int | None]]
) -> tuple[TensorSpec, ...]:
    """
    Return the wanted outputs, each size as far as operators and ONNX Runtime agree on it.

    :param given: shapes that the bundle gives inputs, by name: the sizes of axes that are free and have no name.
    """
    declared = _specs([argument for argument in engine.session.get_outputs() if argument.name in wanted])
    if engine.certain or model is None:
        return declared
    fed = {
        spec.name: [
            own or wanted or 1
            for own, wanted in itertools.zip_longest(spec.axes, given.get(spec.name, ())[: len(spec.axes)])
        ]
        for spec in engine.inputs
    }
    inferred = model.output_shapes(fed)
    return tuple(dataclasses.replace(spec, shape=_certain_shape(spec, inferred.get(spec.name))) for spec in declared)


def _certain_shape(declared: TensorSpec, inferred: tuple[int | None, ...] | None) -> tuple[int | None, ...] | None:
    if inferred is None or len(inferred) != len(declared.axes):
        # ONNX Runtime reports an output of unknown rank as it reports a scalar.
        return None if inferred is None or declared.axes else inferred
    return tuple(
        size if other in (None, size) else None for size, other in zip(inferred, declared.axes, strict=True)
    )


def _specs(arguments: Sequence[Any]) -> tuple[TensorSpec, ...]:
    for argument in arguments:
        if argument.type not in _DTYPES:
            raise EngineDeserializeError(
                f'tensor {argument.name!r} is a {argument.type}, which NumPy has no type for.',
                remedy='Where it is an output that is not needed, name those that are in output_tensors; else export '
                f'the model with one of {sorted(set(_DTYPES.values()))}.',
            )
    return tuple(
        TensorSpec(
            argument.name,
            _DTYPES[argument.type],
            tuple(size if isinstance(size, int) else None for size in argument.shape),
        )
        for argument in arguments
    )
