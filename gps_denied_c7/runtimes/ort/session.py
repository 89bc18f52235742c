"""Make a session as it was planned, and free it with all that goes with it."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.ort_store import CacheBuild
from gps_denied_c7.errors import EngineDeserializeError
from gps_denied_c7.runtimes.ort.io_binding import TensorIo
from gps_denied_c7.runtimes.ort.placement import Placement, profile_runs, reported_placement, reports_placement
from gps_denied_c7.runtimes.ort.session_plan import CPU, TENSORRT, Attempt, SessionPlan, provider_options
from gps_denied_c7.runtimes.trt.build_watch import BuildWatch
from gps_denied_c7.tensors import TensorSpec

__all__ = ['Session', 'open_session']

_ERRORS_ONLY = 3


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
        raise EngineDeserializeError(
            f'ONNX Runtime refused {plan.path} on {last}: {error}. {" ".join(notes)}',
            remedy='Export the model again.' if last.providers == (CPU,) else gpu_remedy,
        ) from error


def _session(
    ort: ModuleType, plan: SessionPlan, attempt: Attempt, config: C7InferenceConfig, notes: list[str]
) -> Session:
    options = _session_options(ort, plan, attempt, config)
    profile = None
    if attempt.providers != (CPU,) and not reports_placement(ort.InferenceSession):
        profile = profile_runs(options)
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
            raise EngineDeserializeError(f'{TENSORRT} did not come')
        if attempt.warm is not None:
            attempt.warm.require_unchanged()
    except BaseException:
        if profile is not None:
            profile.cleanup()
        raise
    notes += [f'{name} was asked for and did not come.' for name in attempt.providers if name not in came]
    return Session(
        session=session,
        path=plan.path,
        came=tuple(came),
        takes_cpu=plan.takes_cpu,
        certain=attempt.engine,
        inputs=(),
        outputs=(),
        placement=reported_placement(session),
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
    if reports_placement(ort.InferenceSession):
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
