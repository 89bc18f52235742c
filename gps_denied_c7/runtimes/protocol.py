"""What an inference runtime is: the Protocol that every strategy meets, and the data it passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol, runtime_checkable

from numpy.typing import NDArray

from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import ThermalState
from gps_denied_c7.tensors import TensorSpec

__all__ = [
    'BuildConfig',
    'BuildProgress',
    'EngineCacheEntry',
    'EngineFacts',
    'EngineHandle',
    'InferenceRuntime',
    'ProviderSet',
]


class ProviderSet(str, Enum):
    """Which hardware a rung may use."""

    ANY = 'any'
    """Ask for the GPU, accept what comes (library use, outside a chain)."""
    GPU = 'gpu'
    """Ask for the GPU; an engine that ends up on the CPU alone is refused."""
    CPU = 'cpu'
    """The CPU alone."""


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """
    Say how far the building of an engine is.

    :param phase: what the vendor library does now, as it names it.
    :param elapsed_s: seconds since the build began.
    :param fraction: 0 to 1, None where the library does not tell.
    """

    phase: str
    elapsed_s: float
    fraction: float | None = None

    def __str__(self) -> str:
        done = '' if self.fraction is None else f'{self.fraction:.0%}, '
        return f'{self.phase} ({done}{self.elapsed_s:.0f} s)'


@dataclass(frozen=True, slots=True)
class BuildConfig:
    """
    Say what may be built and how.

    :param allow_build: engines may be compiled now (minutes); never set in flight.
    :param precision: ``fp16`` or ``fp32``, the precision asked of a newly built engine.
    :param progress: called with the progress of a build, about once a second, from a thread of the builder's own.
    """

    allow_build: bool = False
    precision: str = 'fp16'
    progress: Callable[[BuildProgress], None] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class EngineCacheEntry:
    """
    Point to one loadable artefact on disk.

    :param path: the file: ``.engine``, ``.onnx``, ``.pt2`` or TorchScript.
    :param sha256: hex digest that the file's bytes must have, or None where its maker gave none.
    :param model: the bundle it belongs to.
    :param build: what may be built while it loads.
    :param source: the bundle's artefact that the file was built from, whose tensor names it has; None for
        a file of the bundle itself.
    :param external_data: hex digest of each file that an ``.onnx`` keeps weights in, by its name in the model; it must
        name all of them where ``sha256`` is given.
    """

    path: Path
    sha256: str | None
    model: ModelBundle
    build: BuildConfig = BuildConfig()
    source: Artefact | None = None
    external_data: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """
    Report what a loaded engine is, without judging it; alerts are made elsewhere from these.

    :param active_provider: what executes the graph, as ``TensorrtExecutionProvider``.
    :param requested_providers: what was asked for, best first.
    :param cpu_only: no part of the graph runs on a GPU.
    :param cpu_nodes: graph nodes left to the CPU by a GPU session, None where unknown.
    :param notes: refusals and other remarks met while loading, one sentence each.
    :param load_s: seconds from the file to the end of the warm-up run.
    :param gpu_memory_bytes: GPU memory that its process takes, None where that is not known.
    """

    active_provider: str
    requested_providers: tuple[str, ...]
    cpu_only: bool
    cpu_nodes: int | None
    notes: tuple[str, ...]
    load_s: float
    gpu_memory_bytes: int | None = None


class EngineHandle(Protocol):
    """An opaque loaded engine; only the runtime that made it can use it, from one thread."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Canonical inputs, in the bundle's order."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Canonical outputs, in the bundle's order."""

    @property
    def facts(self) -> EngineFacts:
        """What was loaded."""

    @property
    def ran_ns(self) -> tuple[int, int]:
        """When its last run began and ended by the steady clock, in nanoseconds: the vendor's part of a request."""


@runtime_checkable
class InferenceRuntime(Protocol):
    """
    Load engines of one strategy and run them.

    Vendor exceptions never leave a runtime: they are the ``__cause__`` of an error from
    :mod:`gps_denied_c7.errors`.
    """

    def compile_engine(self, model: ModelBundle, build_config: BuildConfig) -> EngineCacheEntry:
        """
        Return the artefact of ``model`` that this strategy loads, building it where that is allowed.

        :raises RuntimeUnavailableError: the bundle has no artefact for this strategy and none may be built.
        :raises EngineDeserializeError: the build failed.
        """

    def deserialize_engine(self, entry: EngineCacheEntry) -> EngineHandle:
        """
        Load ``entry``, run it once to warm it up, and return its handle.

        :raises EngineSchemaMismatchError: the file is not what its name, manifest or digest promise.
        :raises EngineDeserializeError: the vendor library refused it, or only refused hardware took it.
        """

    def infer(self, handle: EngineHandle, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """
        Run one request.

        :param inputs: C-contiguous arrays by canonical name; owned by the caller, only read.
        :return: read-only arrays by canonical name, views of the runtime's buffers: valid until the
            next ``infer`` or ``release_engine`` on this handle. Copy what must live longer.
        :raises InferenceError: inputs that do not fit, a vendor error, or an output that is
            non-finite or of the wrong shape or dtype; also a foreign or released handle.
        """

    def release_engine(self, handle: EngineHandle) -> None:
        """Free the engine; a foreign or released handle is a silent no-op."""

    def thermal_state(self) -> ThermalState:
        """Return the injected publisher's latest snapshot."""

    def current_runtime_label(self) -> str:
        """Return the strategy's label, whatever provider is active."""
