"""
Plan a session of ONNX Runtime: which execution providers are tried, best first, and with which options.

Planning is pure. It reads no file, builds no engine and calls no library: :class:`Engines` says which engines of
TensorRT are available.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import AdmittedEngine
from gps_denied_c7.engines.ort_store import CacheBuild, VerifiedCache
from gps_denied_c7.errors import EngineDeserializeError, RuntimeUnavailableError
from gps_denied_c7.model.onnx_file import OnnxModel, ep_context_model
from gps_denied_c7.runtimes.gpu.cuda import gpu_stack_remedy, require_gpu
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineCacheEntry, ProviderSet
from gps_denied_c7.runtimes.trt.build import workspace_bytes
from gps_denied_c7.tensors import TensorSpec

__all__ = [
    'CPU',
    'CUDA',
    'TENSORRT',
    'Attempt',
    'Engines',
    'SessionPlan',
    'around_engine',
    'gpu_remedy',
    'plan_engine',
    'plan_model',
    'provider_options',
    'require_providers',
]

TENSORRT = 'TensorrtExecutionProvider'
CUDA = 'CUDAExecutionProvider'
CPU = 'CPUExecutionProvider'

_GPU_FIRST = (TENSORRT, CUDA, CPU)


@dataclass(frozen=True, slots=True)
class Attempt:
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
        """Whether the TensorRT provider builds while the session is made."""
        return TENSORRT in self.providers and not self.engine and self.warm is None

    def __str__(self) -> str:
        return f'{list(self.providers)}{" with the prebuilt engine" if self.engine else ""}'


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """
    What is to be loaded, and every way to try it, best first.

    :param axes: size of each free axis by name.
    :param build: the cache directory that this load may fill.
    :param progress: called with the progress of a build.
    :param notes: remarks for the engine's facts.
    """

    path: Path
    attempts: tuple[Attempt, ...]
    digest: str
    precision: str
    axes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    build: CacheBuild | None = None
    progress: Callable[[BuildProgress], None] | None = None
    notes: tuple[str, ...] = ()

    @property
    def requested(self) -> tuple[str, ...]:
        """Providers of the best way."""
        return self.attempts[0].providers

    @property
    def takes_cpu(self) -> bool:
        """Whether the last way is the CPU alone."""
        return self.attempts[-1].providers == (CPU,)


@dataclass(frozen=True, slots=True)
class Engines:
    """
    Say which engines of TensorRT are available for a model.

    :param warm: those of earlier builds, verified.
    :param build: where new ones may be kept.
    :param built: the way around the engine that the whole model became just now.
    """

    warm: VerifiedCache | None = None
    build: CacheBuild | None = None
    built: Attempt | None = None


def plan_engine(admitted: AdmittedEngine) -> SessionPlan:
    """Return the one way to run an ``.engine`` file: CUDA and the CPU cannot run a model that is one engine."""
    manifest = admitted.manifest
    model = ep_context_model(
        admitted.plan, name=manifest.model, inputs=manifest.inputs, outputs=manifest.outputs, sm=manifest.sm
    )
    attempt = Attempt((TENSORRT,), model, engine=True)
    return SessionPlan(admitted.path, (attempt,), manifest.source_sha256, manifest.precision)


def plan_model(
    entry: EngineCacheEntry,
    model: OnnxModel,
    axes: Mapping[str, int],
    engines: Engines,
    *,
    providers: ProviderSet,
    disallow_cpu: bool,
    notes: Sequence[str] = (),
) -> SessionPlan:
    """
    Return every way to run an ``.onnx``: around a whole engine, on TensorRT, on CUDA, on the CPU.

    :param axes: size of each free axis by name.
    :param providers: the hardware that it may use.
    :param disallow_cpu: do not plan a session on the CPU alone.
    :param notes: what finding and building ``engines`` left to be said.
    """
    notes = list(notes)
    if providers is ProviderSet.CPU:
        attempts = [Attempt((CPU,), model.source, model.weights)]
    else:
        attempts = [*_on_tensorrt(entry, model, engines, notes), Attempt((CUDA, CPU), model.source, model.weights)]
        if providers is ProviderSet.ANY and not disallow_cpu:
            attempts.append(Attempt((CPU,), model.source, model.weights))
    return SessionPlan(
        path=entry.path,
        attempts=tuple(attempts),
        digest=model.content_sha256,
        precision=entry.build.precision,
        axes=axes,
        build=engines.build,
        progress=entry.build.progress,
        notes=tuple(notes),
    )


def _on_tensorrt(entry: EngineCacheEntry, model: OnnxModel, engines: Engines, notes: list[str]) -> Iterator[Attempt]:
    warm = engines.warm
    if warm and warm.plan is not None and (whole := warm.listing.whole_graph):
        yield around_engine(warm.plan, entry, whole.inputs, whole.outputs, warm.listing.built_for.sm)
    elif engines.built:
        yield engines.built
    ready = warm if warm and warm.is_for_provider else None
    if ready or entry.build.allow_build:
        cache = ready.directory if ready else engines.build.directory if engines.build else None
        yield Attempt(_GPU_FIRST, model.source, model.weights, cache=cache, warm=ready)
    elif warm is None:
        # The provider builds whatever its cache lacks, for minutes, and loads unread what lies there.
        notes.append(f'{TENSORRT} is not used: its cache holds no verified engine, and build_on_configure is off.')


def around_engine(
    plan: bytes,
    entry: EngineCacheEntry,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    sm: int,
    *,
    new: bool = False,
) -> Attempt:
    """
    Return the way around one engine that is the whole model.

    :param plan: its bytes.
    :param sm: of the GPU that it was built on.
    :param new: it was built just now, and is to be kept where this way works.
    """
    model = ep_context_model(plan, name=entry.path.stem, inputs=inputs, outputs=outputs, sm=sm)
    return Attempt(_GPU_FIRST, model, engine=True, built=plan if new else None)


def provider_options(plan: SessionPlan, attempt: Attempt, config: C7InferenceConfig) -> dict[str, dict[str, Any]]:
    """Return the options of every provider, by name."""
    budget = config.gpu_memory_budget_bytes
    # One directory for each model digest: ONNX Runtime's own cache key leaves the weights out.
    directory = attempt.cache or config.ort_trt_cache_dir / plan.digest
    return {
        TENSORRT: {
            'trt_engine_cache_enable': attempt.cache is not None,
            'trt_engine_cache_path': str(directory),
            'trt_max_workspace_size': workspace_bytes(config),
            'trt_fp16_enable': plan.precision == 'fp16',
        },
        # Outside of that limit, the search for the fastest convolution would take what the greediest one wants: 10
        # GiB for a 1.3 million weight network on an H100. Now it is 32 MB.
        CUDA: {'gpu_mem_limit': budget, 'cudnn_conv_use_max_workspace': '0'},
        CPU: {},
    }


def require_providers(ort: ModuleType, plan: SessionPlan, config: C7InferenceConfig, label: str) -> None:
    """
    Refuse, before any session, what this host or this build of ONNX Runtime cannot run without the CPU.

    :raises RuntimeUnavailableError: there is no provider for a GPU, or no GPU.
    :raises EngineDeserializeError: the same, where ``ort_disallow_cpu_fallback`` has it refused.
    """
    if plan.takes_cpu:
        return
    available = ort.get_available_providers()
    needed = [name for name in plan.requested if name != CPU]
    try:
        if not set(needed) & set(available):
            # As lasting as a package that is not installed: no later attempt is worth a process of its own.
            raise RuntimeUnavailableError(
                label,
                f'{plan.path} needs {" or ".join(needed)}, and this onnxruntime has only {available}.',
                remedy=gpu_remedy(config),
            )
        require_gpu(label)
    except RuntimeUnavailableError as error:
        if config.ort_disallow_cpu_fallback:
            raise EngineDeserializeError(error.message, remedy=gpu_remedy(config)) from error
        raise


def gpu_remedy(config: C7InferenceConfig) -> str:
    """Return what to do where a model does not run on a GPU."""
    if config.ort_disallow_cpu_fallback:
        return 'Install the GPU stack (requirements/gpu.txt), or set ort_disallow_cpu_fallback to false.'
    return gpu_stack_remedy('pip install -r requirements/gpu.txt')
