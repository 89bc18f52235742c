"""The steps of the runtime chain, and where the engine of each lives (F-1, F-2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.protocol import EngineFacts, ProviderSet
from gps_denied_c7.tensors import TensorSpec

__all__ = ['ORT_LABEL', 'Rung', 'RungHost', 'build_rungs']

ORT_LABEL = 'onnx_trt_ep'


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the chain: a strategy on a set of providers."""

    strategy: str
    providers: ProviderSet

    @property
    def name(self) -> str:
        """As ``onnx_trt_ep/cpu``."""
        return f'{self.strategy}/{self.providers.value}'

    @property
    def on_gpu(self) -> bool:
        """Whether its engine may run on a GPU."""
        return self.providers is not ProviderSet.CPU


def build_rungs(config: C7InferenceConfig, bundle: ModelBundle) -> tuple[Rung, ...]:
    """
    Return the rungs in order of preference (F-2).

    GPU rungs are preferred to the CPU, since a CPU session must not outrank another strategy's GPU.
    A bare ``.onnx`` has no bundle that names its tensors, so ONNX Runtime alone can run it.
    """
    strategies = config.runtime_chain if bundle.inputs else (ORT_LABEL,)
    rungs = [Rung(strategy, ProviderSet.GPU) for strategy in strategies]
    if not config.ort_disallow_cpu_fallback:
        rungs.append(Rung(ORT_LABEL, ProviderSet.CPU))
    return tuple(rungs)


class RungHost(Protocol):
    """
    Where a rung's engine lives.

    It raises errors of this package's family; whatever else escapes it costs the rung, not the node.
    For one thread, except :meth:`kill`.
    """

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Canonical inputs, known once loaded."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Canonical outputs, known once loaded."""

    @property
    def alive(self) -> bool:
        """Whether it can still answer; never waits."""

    @property
    def ran_ns(self) -> tuple[int, int]:
        """When the engine began and ended the run of the last answer, by the steady clock; zeros where unknown."""

    @property
    def request_arrays(self) -> Mapping[str, NDArray]:
        """Arrays by name that a request is read from without a copy; empty where there are none yet."""

    def load(self) -> EngineFacts:
        """Load the engine and warm it up."""

    def begin(self, inputs: Mapping[str, NDArray]) -> None:
        """Hand one request over, which is read before this returns or out of :attr:`request_arrays`."""

    def poll(self, timeout_s: float | None) -> dict[str, NDArray] | None:
        """Return the answer, valid until the next :meth:`begin`; None where it is not there in time."""

    def responds(self, patience_s: float) -> bool:
        """Ask for a sign of life regularly while no request runs; False ``patience_s`` after that; never waits."""

    def kill(self) -> None:
        """Begin to end a request or a load that does not return, and the engine with it; never waits."""

    def release(self) -> None:
        """Begin to free everything; never waits for a process; safe to repeat."""

    def join(self, timeout_s: float) -> bool:
        """Wait until nothing is left of what was released; False where something is after ``timeout_s``."""
