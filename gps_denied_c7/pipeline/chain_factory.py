"""How chains are made for models: in workers or in this process, within one budget of GPU memory."""

from __future__ import annotations

from collections.abc import Callable

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.in_process import in_process_hosts
from gps_denied_c7.failover.memory_budget import GpuMemoryBudget
from gps_denied_c7.failover.rungs import ORT_LABEL, Rung, RungHost
from gps_denied_c7.failover.status import ChainStatus
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import ThermalStatePublisher
from gps_denied_c7.runtimes.protocol import BuildProgress
from gps_denied_c7.worker.client import worker_hosts
from gps_denied_c7.worker.spare import SpareWorker

__all__ = ['ChainFactory']


class ChainFactory:
    """
    Make chains, and keep what they share: the GPU memory budget and a spare worker.

    The budget lives as long as this process: an engine that could not be ended still holds its part after a cleanup.

    :param emit: writes a flight record.
    :param on_change: called with the status of a chain whenever it changes.
    """

    def __init__(
        self,
        thermal: ThermalStatePublisher,
        *,
        emit: Callable[..., None],
        on_change: Callable[[ChainStatus], None],
    ) -> None:
        self.gpu_memory = GpuMemoryBudget(C7InferenceConfig().gpu_memory_budget_bytes)
        self.building: BuildProgress | None = None
        """How far the engine is that is being built now, None where none is."""
        self._thermal = thermal
        self._emit = emit
        self._on_change = on_change
        self._spare: SpareWorker | None = None

    def configure(self, config: C7InferenceConfig) -> None:
        """Take over what holds for all chains made from now on."""
        self.gpu_memory.resize(config.gpu_memory_budget_bytes)
        # ONNX Runtime has the last rung of every chain, and most engines that are loaded in flight.
        wanted = config.spare_worker and config.isolation == 'process' and ORT_LABEL not in config.disabled_runtimes
        self._spare = SpareWorker(ORT_LABEL) if wanted else None

    def make(self, bundle: ModelBundle, config: C7InferenceConfig) -> RuntimeChain:
        """Return a chain for ``bundle`` that is not loaded yet."""
        return RuntimeChain(bundle, config, self._hosts(bundle, config), emit=self._emit, on_change=self._on_change)

    def load(self, chain: RuntimeChain) -> None:
        """
        Load a chain, showing the progress of its builds meanwhile.

        :raises C7Error: as :meth:`RuntimeChain.load`.
        """
        try:
            chain.load()
        finally:
            self.building = None

    def close(self) -> None:
        """End the spare worker; safe to repeat."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()

    def _hosts(self, bundle: ModelBundle, config: C7InferenceConfig) -> Callable[[Rung], RungHost]:
        if config.isolation == 'none':
            return in_process_hosts(bundle, config, self._thermal, on_build=self._note_build)
        return worker_hosts(bundle, config, memory=self.gpu_memory, spare=self._spare, on_build=self._note_build)

    def _note_build(self, progress: BuildProgress) -> None:
        self.building = progress
