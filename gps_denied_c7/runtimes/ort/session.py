"""A session of ONNX Runtime: made as it was planned, where its graph landed, its tensors, and all that goes with it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.ort_store import CacheBuild
from gps_denied_c7.errors import EngineContentError, EngineDeserializeError
from gps_denied_c7.model.onnx_file import OnnxModel
from gps_denied_c7.model.onnx_types import ONNX_DTYPES, no_output_left
from gps_denied_c7.model.shape_inference import infer_output_shapes
from gps_denied_c7.runtimes.ort.io_binding import TensorIo
from gps_denied_c7.runtimes.ort.providers import CPU, TENSORRT, Attempt, SessionPlan, provider_options
from gps_denied_c7.runtimes.trt.progress_reports import BuildWatch
from gps_denied_c7.tensors import TensorSpec

__all__ = [
    'Placement', 'Session', 'certain_outputs', 'open_session', 'output_names', 'profiled_placement', 'specs',
]  # fmt: skip

_ERRORS_ONLY = 3
_OF_MODEL = ('Fail', 'InvalidArgument', 'InvalidGraph', 'InvalidProtobuf', 'NotImplemented')
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Placement:
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
class Session:
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
    placement: Placement | None
    build: CacheBuild | None
    built: bytes | None
    profile: tempfile.TemporaryDirectory[str] | None
    io: TensorIo | None = None
    random: bool = False

    def release(self) -> None:
        """Free everything; ONNX Runtime frees a session, GPU memory included, when its last reference goes."""
        if self.io is not None:
            self.io.release()
        self.io = self.session = self.built = None
        if self.profile is not None:
            self.profile.cleanup()
        if self.build is not None:
            self.build.close()


def open_session(
    ort: ModuleType, plan: SessionPlan, config: C7InferenceConfig, notes: list[str], *, gpu_remedy: str
) -> Session:
    """
    Return a session made in the first way of the plan that works.

    :param notes: gets what is to be said of the others.
    :param gpu_remedy: what to do where the last way is on a GPU.
    :raises EngineDeserializeError: none works.
    """
    *better, last = plan.attempts
    for attempt in better:
        try:
            return _session(ort, plan, attempt, config, notes)
        except Exception as error:
            notes.append(f'A session on {attempt} was refused: {error}.')
    try:
        return _session(ort, plan, last, config, notes)
    except Exception as error:
        kind = EngineContentError if last.providers == (CPU,) and _is_of_model(error) else EngineDeserializeError
        raise kind(
            f'ONNX Runtime refused {plan.path} on {last}: {error}. {" ".join(notes)}',
            remedy='Export the model again.' if last.providers == (CPU,) else gpu_remedy,
        ) from error


def _is_of_model(error: Exception) -> bool:
    """Tell whether a session was refused for what the model says, which no other attempt changes."""
    # Its own errors by name, as they are in no module of their own; it wraps a want of memory into a failure, too.
    return type(error).__name__ in _OF_MODEL and 'Exception during' not in str(error)


def _session(
    ort: ModuleType, plan: SessionPlan, attempt: Attempt, config: C7InferenceConfig, notes: list[str]
) -> Session:
    options = _session_options(ort, plan, attempt, config)
    profile = None
    if attempt.providers != (CPU,) and not _reports_placement(ort.InferenceSession):
        profile = _profile_runs(options)
    every = provider_options(plan, attempt, config)
    watch = BuildWatch(plan.progress, f'{TENSORRT} builds') if attempt.builds else contextlib.nullcontext()
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
            raise EngineDeserializeError(f'ONNX Runtime did not activate {TENSORRT}, although it was requested')
        if attempt.warm is not None:
            attempt.warm.require_unchanged()
    except BaseException:
        if profile is not None:
            profile.cleanup()
        raise
    absent = [name for name in attempt.providers if name not in came]
    notes += [f'ONNX Runtime did not activate {name}, although it was requested.' for name in absent]
    return Session(
        session=session,
        path=plan.path,
        came=tuple(came),
        takes_cpu=plan.takes_cpu,
        certain=attempt.engine,
        inputs=(),
        outputs=(),
        placement=_reported_placement(session),
        build=plan.build,
        built=attempt.built,
        profile=profile,
    )


def _session_options(ort: ModuleType, plan: SessionPlan, attempt: Attempt, config: C7InferenceConfig) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = config.cpu_threads or max(1, len(os.sched_getaffinity(0)) - 1)
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Up to 1.18 memory planned by one request spoils the answers to later ones, where lengths depend on the data.
    options.enable_mem_pattern = False
    # Spinning threads take CPU time from the flight software.
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
    for axis, size in plan.axes.items():
        options.add_free_dimension_override_by_name(axis, size)
    return options


@functools.lru_cache(maxsize=4)
def _strict(session: type[Any]) -> type[Any]:
    """Return the session class without its retry on other providers, which 1.17 cannot switch off."""

    class StrictSession(session):  # type: ignore[misc]
        @property
        def _enable_fallback(self) -> bool:
            return False

        @_enable_fallback.setter
        def _enable_fallback(self, value: bool) -> None:
            # 1.17 silently takes enable_fallback=0 and sets this to True; run() reads it too.
            pass

    return StrictSession


# --- where its graph landed ------------------------------------------------------------------------


def _reports_placement(session: Any) -> bool:
    """Return whether sessions of this class say where their graph landed, as from ONNX Runtime 1.24 on."""
    return hasattr(session, 'get_provider_graph_assignment_info')


def _reported_placement(session: Any) -> Placement | None:
    """Return where the graph landed, None before ONNX Runtime 1.24, which cannot say before it has run."""
    if not _reports_placement(session):
        return None
    nodes: Counter[str] = Counter()
    engines = 0
    for subgraph in session.get_provider_graph_assignment_info():
        nodes[subgraph.ep_name] += len(subgraph.get_nodes())
        engines += subgraph.ep_name == TENSORRT
    return Placement(nodes, engines) if nodes else None


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


def profiled_placement(session: Any) -> Placement | None:
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
    return Placement(nodes, nodes[TENSORRT]) if nodes else None


# --- its tensors ----------------------------------------------------------------------------------


def output_names(engine: Session, asked: Collection[str]) -> list[str]:
    """
    Return the names of the outputs that are numeric tensors, and of those that were asked for; log the others.

    :raises EngineContentError: none is left.
    """
    kinds = {argument.name: argument.type for argument in engine.session.get_outputs()}
    names = [name for name, kind in kinds.items() if kind in ONNX_DTYPES or name in asked]
    left_out = {name: kind for name, kind in kinds.items() if name not in names}
    if not names:
        problem, remedy = no_output_left(left_out)
        raise EngineContentError(problem, remedy=remedy)
    if left_out:
        _log.warning('%s: the outputs %s are not numeric tensors, and left out', engine.path, sorted(left_out))
    return names


def certain_outputs(
    engine: Session, wanted: Collection[str], model: OnnxModel | None, given: Mapping[str, Sequence[int | None]]
) -> tuple[TensorSpec, ...]:
    """
    Return the wanted outputs, each size as far as operators and ONNX Runtime agree on it.

    :param given: shapes that the bundle gives inputs, by name: the sizes of axes that are free and have no name.
    """
    declared = specs([argument for argument in engine.session.get_outputs() if argument.name in wanted])
    if engine.certain or model is None:
        return declared
    inferred = infer_output_shapes(model.skeleton, engine.inputs, given)
    return tuple(dataclasses.replace(spec, shape=_certain_shape(spec, inferred.get(spec.name))) for spec in declared)


def _certain_shape(declared: TensorSpec, inferred: tuple[int | None, ...] | None) -> tuple[int | None, ...] | None:
    if inferred is None or len(inferred) != len(declared.axes):
        # ONNX Runtime reports an output of unknown rank as it reports a scalar.
        return None if inferred is None or declared.axes else inferred
    return tuple(
        size if other in (None, size) else None for size, other in zip(inferred, declared.axes, strict=True)
    )


def specs(arguments: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """
    Return what a session says of its inputs or outputs.

    :raises EngineContentError: NumPy lacks the type of one.
    """
    for argument in arguments:
        if argument.type not in ONNX_DTYPES:
            raise EngineContentError(
                f'tensor {argument.name!r} is a {argument.type}, which NumPy has no type for.',
                remedy=f'Export the model with one of {sorted(set(ONNX_DTYPES.values()))}.',
            )
    return tuple(
        TensorSpec(
            argument.name,
            ONNX_DTYPES[argument.type],
            tuple(size if isinstance(size, int) else None for size in argument.shape),
        )
        for argument in arguments
    )
