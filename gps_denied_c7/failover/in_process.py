"""Where engines live: in this process (``isolation: none``)."""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Callable, Mapping

from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.errors import InferenceError, RuntimeUnavailableError
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import ThermalStatePublisher
from gps_denied_c7.runtimes.base import BaseRuntime
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.runtimes.protocol import (
    BuildConfig,
    BuildProgress,
    EngineFacts,
    EngineHandle,
    InferenceRuntime,
)
from gps_denied_c7.runtimes.registry import create_runtime
from gps_denied_c7.tensors import TensorSpec

__all__ = ['InProcessHost', 'SynchronousHost', 'in_process_hosts']

_log = logging.getLogger(__name__)


class SynchronousHost(abc.ABC):
    """Give the two halves of a request to an engine that answers in the calling thread."""

    ran_ns: tuple[int, int] = (0, 0)
    """When the engine began and ended its last run, by the steady clock; zeros where unknown."""

    _request: Mapping[str, NDArray] | None = None

    @property
    def alive(self) -> bool:
        """Whether it can still answer: as long as this process can."""
        return True

    @property
    def request_arrays(self) -> Mapping[str, NDArray]:
        """No arrays are read in place."""
        return {}

    @abc.abstractmethod
    def infer(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request; outputs are views valid until the next call."""

    def begin(self, inputs: Mapping[str, NDArray]) -> None:
        """Keep the request for :meth:`poll`; its arrays are read there."""
        self._request = inputs

    def poll(self, timeout_s: float | None) -> dict[str, NDArray] | None:
        """Run the request, however long it takes; None where none was begun."""
        request, self._request = self._request, None
        return None if request is None else self.infer(request)

    def responds(self, patience_s: float) -> bool:
        """Return True: it runs in the thread that asks."""
        return True

    def kill(self) -> None:
        """Say that what runs in this process cannot be ended."""
        _log.warning('an engine cannot be ended with isolation none; with isolation process its worker is killed.')

    def join(self, timeout_s: float) -> bool:
        """Return True: what is released in this process is gone."""
        return True


class InProcessHost(SynchronousHost):
    """Run a rung's engine in the calling thread of this process; a vendor crash ends the process."""

    def __init__(self, runtime: InferenceRuntime, bundle: ModelBundle, build: BuildConfig) -> None:
        self._runtime = runtime
        self._bundle = bundle
        self._build = build
        self._handle: EngineHandle | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Canonical inputs of the loaded engine, empty before."""
        return self._handle.inputs if self._handle else ()

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Canonical outputs of the loaded engine, empty before."""
        return self._handle.outputs if self._handle else ()

    def load(self) -> EngineFacts:
        """Compile where allowed, deserialise and warm up."""
        self._handle = self._runtime.deserialize_engine(self._runtime.compile_engine(self._bundle, self._build))
        return self._handle.facts

    def infer(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request; outputs are views valid until the next call."""
        if self._handle is None:
            raise InferenceError('no engine is loaded.')
        outputs = self._runtime.infer(self._handle, inputs)
        self.ran_ns = self._handle.ran_ns
        return outputs

    def place(
        self, *, inputs: Mapping[str, NDArray] | None = None, outputs: Mapping[str, NDArray] | None = None
    ) -> None:
        """Have later requests read from these arrays and answers written there; see BaseRuntime."""
        if self._handle is not None and isinstance(self._runtime, BaseRuntime):
            self._runtime.place(self._handle, inputs=inputs, outputs=outputs)

    def release(self) -> None:
        """Free the engine; safe to repeat."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._runtime.release_engine(handle)


def in_process_hosts(
    bundle: ModelBundle,
    config: C7InferenceConfig,
    thermal: ThermalStatePublisher,
    *,
    on_build: Callable[[BuildProgress], None] | None = None,
) -> Callable[[Rung], InProcessHost]:
    """
    Return the host factory that RuntimeChain wants; it raises RuntimeUnavailableError for an absent strategy.

    :param on_build: called with the progress of a build, from a thread of the builder's own.
    """
    build = BuildConfig(allow_build=config.build_on_configure, progress=on_build)
    local_gate = functools.cache(_local_gate)

    def make(rung: Rung) -> InProcessHost:
        gate = local_gate() if rung.on_gpu else None
        runtime = create_runtime(rung.strategy, config, thermal=thermal, gate=gate, providers=rung.providers)
        return InProcessHost(runtime, bundle, build)

    return make


def _local_gate() -> EngineGate | None:
    """Return the gate for engine files of this host, None where none can be loaded."""
    try:
        return EngineGate(local_host_profile())
    except RuntimeUnavailableError as error:
        _log.debug('engine files cannot be loaded here: %s', error)
        return None
