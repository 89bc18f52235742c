"""Build TensorRT engines from ONNX, for this host: into the engine cache, or for the caller."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import gps_denied_c7
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate, plan_version
from gps_denied_c7.engines.manifest import EngineManifest, HostProfile, same_tensorrt
from gps_denied_c7.engines.store import EngineCache, engine_model_name
from gps_denied_c7.errors import (
    EngineContentError,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    RuntimeUnavailableError,
)
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.onnx_file import OnnxModel, read_onnx
from gps_denied_c7.runtimes.gpu.cuda import Cuda, open_cuda
from gps_denied_c7.runtimes.gpu.tensorrt_library import (
    dtype_name,
    error_recorder,
    import_tensorrt,
    listening,
    vendor_logger,
)
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineCacheEntry
from gps_denied_c7.runtimes.trt.fp16 import to_half_precision
from gps_denied_c7.runtimes.trt.progress_reports import BuildWatch
from gps_denied_c7.tensors import TensorSpec

__all__ = [
    'PRECISIONS',
    'Plan',
    'PlanRequest',
    'build_engine',
    'build_plan',
    'source_artefact',
    'source_shapes',
    'workspace_bytes',
]

LABEL = 'tensorrt'
PRECISIONS = ('fp16', 'fp32')

_log = logging.getLogger(__name__)

Shapes = Mapping[str, Sequence[int | None]]


def source_artefact(model: ModelBundle) -> Artefact:
    """
    Return the ``.onnx`` of a bundle that engines are built from: the one for TensorRT, else ONNX Runtime's.

    :raises RuntimeUnavailableError: there is none.
    :raises ModelBundleError: there is one, but of other weights.
    """
    for strategy in (LABEL, 'onnx_trt_ep'):
        for artefact in model.artefacts_for(strategy):
            if artefact.path.suffix == '.onnx' and artefact.device != 'cpu':
                return artefact
    raise RuntimeUnavailableError(
        LABEL,
        f'model {model.name!r} has no .onnx to build an engine from.',
        remedy='Add its .onnx to model.json, or an .engine built for this host.',
    )


def source_shapes(model: ModelBundle, source: Artefact) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes that a bundle gives its inputs, by the source's own names; empty for a bare ``.onnx``."""
    return {source.own_name(spec.name): spec.axes for spec in model.inputs}


def build_engine(
    model: ModelBundle,
    config: C7InferenceConfig,
    build: BuildConfig,
    *,
    gate: EngineGate | None = None,
    cache: EngineCache | None = None,
    convert: bool | None = None,
) -> EngineCacheEntry:
    """
    Build an engine of ``model`` for this host and publish it in the cache; takes seconds to many minutes.

    Batch is 1 and every free axis is fixed to the bundle's size. The entry returned has passed the gate.

    :param build: precision, and what is called with the progress; ``allow_build`` must be set.
    :param gate: the gate of this host, None to make one.
    :param cache: where the engine goes, None for ``config.engine_cache_dir``.
    :param convert: give the model itself float16 types, instead of asking TensorRT to choose them; None does
        what this TensorRT wants.
    :raises RuntimeUnavailableError: no GPU, no TensorRT, or nothing to build from.
    :raises EngineDeserializeError: TensorRT refused the model, or the engine could not be kept.
    :raises EngineSchemaMismatchError: the ``.onnx`` is not the one that the bundle names.
    """
    if not build.allow_build or build.precision not in PRECISIONS:
        raise EngineDeserializeError(
            f'an engine of precision {build.precision!r} was not built: building is not allowed here, or the precision '
            'is unknown.',
            remedy=f'Run c7_engine build on the ground with --precision {" or ".join(PRECISIONS)}.',
        )
    cuda = open_cuda(LABEL)
    gate = gate or EngineGate(local_host_profile(cuda))
    cache = cache or EngineCache.at(config.engine_cache_dir)
    # Before minutes are spent on an engine that cannot be kept.
    cache.writable_directory()
    source = source_artefact(model)
    onnx_model = read_onnx(source.path, source.sha256, source.external_data)
    shapes = source_shapes(model, source)
    if not shapes:
        onnx_model, shapes = onnx_model.for_image(model.image)
    trt = import_tensorrt(LABEL)
    request = PlanRequest(
        model=onnx_model,
        name=model.name,
        precision=build.precision,
        convert=convert,
        shapes=shapes,
        workspace_bytes=workspace_bytes(config),
        optimization_level=config.builder_optimization_level,
    )
    started = time.monotonic()
    with BuildWatch(build.progress) as watch:
        built = build_plan(trt, request, gate.host, cache, watch)
        watch.phase = 'publishing the engine'
        manifest = _manifest(built, request, gate, cuda, trt)
        cached = cache.publish(built.plan, manifest)
        # An engine that this gate refuses now would be found out in flight.
        gate.admit(cached.path, engine_sha256=manifest.engine_sha256, source_sha256=onnx_model.content_sha256)
    _log.info('built %s in %.1f s (%d bytes)', cached.path, time.monotonic() - started, len(built.plan))
    return EngineCacheEntry(cached.path, manifest.engine_sha256, model, build, source)


def workspace_bytes(config: C7InferenceConfig) -> int:
    """Return the scratch memory that a builder may use: as much for TensorRT alone as below ONNX Runtime (AC-8)."""
    return config.gpu_memory_budget_bytes // 4


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """
    Say what is to be built.

    :param name: of the model, for messages.
    :param precision: ``fp16`` or ``fp32``.
    :param shapes: wanted shape by input name; of a free axis without one, the first is the batch, which is 1.
    :param workspace_bytes: scratch memory that the builder, and later the engine, may use.
    :param optimization_level: 0 to 5, how hard the builder searches.
    :param convert: as in :func:`build_engine`.
    :param whole: refuse, before it is built, a network that cannot stand for the model: one whose outputs have a free
        axis, or whose tensors have other types than the model's, as TensorRT before 10 makes int32 of int64.
    """

    model: OnnxModel
    name: str
    precision: str
    shapes: Shapes
    workspace_bytes: int
    optimization_level: int
    convert: bool | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """
    Hold what a build gave.

    :param plan: the engine's bytes.
    :param inputs: every axis fixed.
    :param outputs: as the network names them; an axis may be free where its size depends on the data.
    :param flags: of the builder.
    """

    plan: bytes = field(repr=False)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    flags: tuple[str, ...]


def build_plan(
    trt: ModuleType, request: PlanRequest, host: HostProfile, cache: EngineCache, watch: BuildWatch
) -> Plan:
    """
    Build an engine with TensorRT's own builder; takes seconds to many minutes.

    :param host: what tactics were timed on; those of earlier builds there are used, and the new ones kept.
    :param cache: where timings lie.
    :param watch: called with the progress.
    :raises EngineDeserializeError: TensorRT refused the model.
    """
    level = request.optimization_level
    plan, timings = _Builder(trt, watch).build(request, cache.read_timing_cache(host, level))
    if timings:
        cache.write_timing_cache(host, level, timings)
    return plan


class _Builder:
    """Take a request through TensorRT's parser and builder."""

    def __init__(self, trt: ModuleType, watch: BuildWatch) -> None:
        self._trt = trt
        self._watch = watch
        self._logger = vendor_logger(trt)
        self._errors = error_recorder(trt)

    def build(self, request: PlanRequest, known_timings: bytes) -> tuple[Plan, bytes]:
        """Return the engine, and the timings of its tactics."""
        trt = self._trt
        builder = trt.Builder(self._logger)
        if builder is None:
            raise EngineDeserializeError('TensorRT made no builder.', remedy='See the log for the reason.')
        builder.error_recorder = self._errors
        # From 9 on precision is the model's own (strong typing), from 11 on always; before, a flag asks for it.
        strong = hasattr(trt.NetworkDefinitionCreationFlag, 'STRONGLY_TYPED')
        by_flag = not strong and hasattr(trt.BuilderFlag, 'FP16')
        half = request.precision == 'fp16'
        convert = half and (not by_flag if request.convert is None else request.convert)
        self._watch.phase = 'reading the model'
        content = to_half_precision(request.model) if convert else request.model.self_contained()
        network = builder.create_network(_network_flags(trt))
        # The network's weights lie in the parser's memory: it lives as long as the build.
        parser = trt.OnnxParser(network, self._logger)
        self._parse(parser, content, request.name)
        inputs, outputs = self._tensors(network, request)
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
        flags = [
            request.precision,
            f'workspace={request.workspace_bytes}',
            'typing=strong' if strong else 'typing=weak',
            *(['converted'] if convert else []),
        ]
        # From TensorRT 8.6 on.
        if hasattr(config, 'builder_optimization_level'):
            config.builder_optimization_level = request.optimization_level
            flags.append(f'optimization_level={request.optimization_level}')
        if half and by_flag:
            config.set_flag(trt.BuilderFlag.FP16)
        if not half and hasattr(trt.BuilderFlag, 'TF32'):
            # TensorFloat-32 has the mantissa of float16, and is on by default.
            config.clear_flag(trt.BuilderFlag.TF32)
        self._fix_shapes(builder, config, network, inputs)
        timings = self._attach_timings(config, known_timings)
        self._watch.attach(trt, config)
        self._watch.phase = 'building the engine'
        with listening(self._watch.note):
            serialised = builder.build_serialized_network(network, config)
        if serialised is None:
            raise EngineDeserializeError(
                f'TensorRT built no engine of {request.name!r}: {self._reasons()}',
                remedy='Raise gpu_memory_budget_bytes where memory was short; else build with precision fp32, or '
                'use the .onnx.',
            )
        self._watch.phase = 'writing the engine'
        plan = Plan(bytes(serialised), inputs, outputs, tuple(flags))
        return plan, b'' if timings is None else bytes(timings.serialize())

    def _parse(self, parser: Any, content: bytes, name: str) -> None:
        if parser.parse(content):
            return
        operators = _operators(content)
        errors = [_parser_error(parser.get_error(index), operators) for index in range(parser.num_errors)]
        raise EngineContentError(
            f"TensorRT's parser refused {name!r}: {'; '.join(errors) or self._reasons()}.",
            remedy='Export the model with operators that this TensorRT knows, or use the .onnx.',
        )

    def _tensors(
        self, network: Any, request: PlanRequest
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Return the network's tensors, the inputs with the sizes that they are built for."""
        inputs = []
        for index in range(network.num_inputs):
            spec = _spec(network.get_input(index))
            wanted = request.shapes.get(spec.name, (None,) * len(spec.axes))
            shape = tuple(
                have if have is not None else 1 if axis == 0 and want is None else want
                for axis, (have, want) in enumerate(zip(spec.axes, wanted, strict=False))
            )
            if len(wanted) != len(spec.axes) or None in shape:
                raise EngineContentError(
                    f'input {spec.name!r} has free axes: {spec.shape}, and the bundle says {tuple(wanted)}.',
                    remedy='Give its sizes under inputs in a model.json, or export the model with fixed ones.',
                )
            inputs.append(dataclasses.replace(spec, shape=shape))
        outputs = tuple(_spec(network.get_output(index)) for index in range(network.num_outputs))
        if request.whole:
            _require_whole(request.model, inputs, outputs)
        return tuple(inputs), outputs

    def _fix_shapes(self, builder: Any, config: Any, network: Any, inputs: Sequence[TensorSpec]) -> None:
        """Give each input with a free axis one size; nothing else is ever asked of the engine."""
        free = [
            inputs[index]
            for index in range(network.num_inputs)
            if any(size < 0 for size in tuple(network.get_input(index).shape))
        ]
        if not free:
            return
        profile = builder.create_optimization_profile()
        for spec in free:
            profile.set_shape(spec.name, spec.shape, spec.shape, spec.shape)
        if config.add_optimization_profile(profile) < 0:
            raise EngineDeserializeError(
                f'TensorRT refused the shapes {[(spec.name, spec.shape) for spec in free]}: {self._reasons()}',
                remedy='Correct the sizes under inputs in model.json.',
            )

    def _attach_timings(self, config: Any, known: bytes) -> Any:
        """Give the builder what was measured before, or an empty cache to fill; None where it takes neither."""
        for content in (known, b'') if known else (b'',):
            cache = config.create_timing_cache(content)
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
            _log.info('TensorRT does not take the %s timing cache', 'known' if content else 'empty')
        return None

    def _reasons(self) -> str:
        return '; '.join(self._errors.messages()) or 'it gave no reason, see the log'


def _network_flags(trt: ModuleType) -> int:
    kinds = trt.NetworkDefinitionCreationFlag
    # Needed up to 8 (the first) and from 9 on (the second); where a version does without one, it has lost the name.
    names = [name for name in ('EXPLICIT_BATCH', 'STRONGLY_TYPED') if hasattr(kinds, name)]
    return sum(1 << int(getattr(kinds, name)) for name in names)


def _require_whole(model: OnnxModel, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    for spec in outputs:
        if spec.shape is None or None in spec.shape:
            raise EngineContentError(f'output {spec.name!r} has free axes: {spec.shape}.')
    for spec in (*inputs, *outputs):
        if model.dtypes.get(spec.name) != spec.dtype:
            raise EngineContentError(
                f'TensorRT makes {spec.dtype} of {spec.name!r}, which is {model.dtypes.get(spec.name)} in the model.'
            )


def _spec(tensor: Any) -> TensorSpec:
    dtype = dtype_name(tensor.dtype)
    if dtype is None or getattr(tensor, 'is_shape_tensor', False):
        raise EngineContentError(
            f'tensor {tensor.name!r} of type {tensor.dtype} cannot cross into NumPy, or holds a shape.',
            remedy='Export the model with plain inputs and outputs of float32, float16 or integers.',
        )
    return TensorSpec(tensor.name, dtype, tuple(None if size < 0 else int(size) for size in tuple(tensor.shape)))


def _operators(content: bytes) -> list[str]:
    """Return the operator of each node: TensorRT 8 names a node by its number alone."""
    import onnx

    return [node.op_type for node in onnx.load_from_string(content).graph.node]


def _parser_error(error: Any, operators: list[str]) -> str:
    number = error.node()
    where = f'node {number}' if number >= 0 else 'the model'
    if 0 <= number < len(operators):
        where += f' ({operators[number]})'
    return f'{where}: {error.desc()} ({error.code()})'


def _manifest(built: Plan, request: PlanRequest, gate: EngineGate, cuda: Cuda, trt: ModuleType) -> EngineManifest:
    host = gate.host
    gpu = cuda.gpu_facts()
    return EngineManifest(
        model=engine_model_name(request.name),
        engine_sha256=hashlib.sha256(built.plan).hexdigest(),
        engine_bytes=len(built.plan),
        source_sha256=request.model.content_sha256,
        precision=request.precision,
        gpu=host.gpu,
        sm=host.sm,
        tensorrt=_plan_tensorrt(built.plan, host.tensorrt),
        platform=host.platform,
        inputs=built.inputs,
        outputs=built.outputs,
        builder_flags=built.flags,
        versions={
            'gps_denied_c7': gps_denied_c7.__version__,
            'tensorrt': str(trt.__version__),
            'cuda_driver': gpu.driver,
            'cuda_runtime': gpu.runtime,
        },
    )


def _plan_tensorrt(plan: bytes, host: str) -> str:
    """Return the version that the plan itself carries, with its build number, where that is this host's."""
    found = plan_version(plan)
    if found is None or not same_tensorrt(host, found):
        raise EngineSchemaMismatchError(
            'plan_version', expected=host, found=found, remedy='Install one TensorRT alone, and build again.'
        )
    return found
