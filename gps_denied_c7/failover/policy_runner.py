"""Carry out what the policy decides: load, move and end engines, begin pauses (F-2 to F-6)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import replace

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error
from gps_denied_c7.failover import policy
from gps_denied_c7.failover.attempts import pid_of, without_frames
from gps_denied_c7.failover.backoff import Backoff
from gps_denied_c7.failover.file_watch import FileWatch, bundle_files, cache_directories, fingerprint
from gps_denied_c7.failover.fleet import Fleet, Role
from gps_denied_c7.failover.gpu_health import GpuHealth
from gps_denied_c7.failover.loader import EngineLoader, RungEngine
from gps_denied_c7.failover.policy_view import (
    Actions,
    Cancel,
    ClearPause,
    Failed,
    Gpu,
    Load,
    Move,
    Pause,
    Switch,
    TrustGpu,
    View,
)
from gps_denied_c7.failover.retiring import RetiringEngines
from gps_denied_c7.failover.rungs import Rung, RungHost
from gps_denied_c7.failover.self_test import Proof
from gps_denied_c7.failover.status import ChainReports, ChainStatus, Transaction
from gps_denied_c7.model.bundle import ModelBundle

__all__ = ['PolicyRunner', 'log_unexpected']

_ATTEMPTS, _LAST_ATTEMPTS = 2, 6
_STUCK = 'a worker cannot be ended'

_log = logging.getLogger(__name__)


class PolicyRunner:
    """
    Hold the engines of a chain, and have them loaded, moved and ended as the policy says.

    For one thread at a time, but :meth:`kill_all`. Parameters are those of RuntimeChain.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        config: C7InferenceConfig,
        host_factory: Callable[[Rung], RungHost],
        rungs: tuple[Rung, ...],
        *,
        emit: Callable[..., None],
        on_change: Callable[[ChainStatus], None],
        monotonic_ns: Callable[[], int],
        make_loader: Callable[..., EngineLoader],
    ) -> None:
        self._config = config
        self._isolated = config.isolation == 'process'
        self._rungs = rungs
        self._now_ns = monotonic_ns
        self._reaper = RetiringEngines(emit=emit, monotonic_ns=monotonic_ns)
        self._proof = Proof(bundle)
        self._gpu = GpuHealth(config.gpu_fault_window_s, monotonic_ns)
        self.closing = False
        """Set while the chain is released: no engine is loaded any more."""
        self.backoff = Backoff(monotonic_ns)
        self.loader = make_loader(
            config, host_factory, self._proof,
            attempts=self._attempts, given_up=lambda: self.closing, retire=self._reaper.add,
            files=FileWatch(lambda: fingerprint(bundle_files(bundle), cache_directories(config))),
            monotonic_ns=monotonic_ns,
        )  # fmt: skip
        self.fleet = Fleet(self.loader, self._reaper)
        self.reports = ChainReports(
            bundle, rungs,
            emit=emit, on_change=on_change, complete=self._complete, monotonic_ns=monotonic_ns,
            cpu_is_a_choice=config.ort_disallow_cpu_fallback,
        )  # fmt: skip
        self._view = View(rungs)
        self._view_of: tuple[object, ...] = ()
        self._view_files: Hashable = None
        self._view_ends_ns = 0
        self._settled: View | None = None

    def _complete(self, status: ChainStatus) -> ChainStatus:
        fleet = self.fleet
        return replace(
            status,
            gpu_lost=self._gpu.lost,
            longest_load_s=self.loader.longest_s(),
            worker_pid=pid_of(fleet.serving),
            standby_pid=pid_of(fleet.standby),
        )

    # --- what the policy sees, and what it decides ------------------------------------------------

    def view(self) -> View:
        """Return what the policy sees now: the view before where nothing in it has changed."""
        fleet, now_ns = self.fleet, self._now_ns()
        active, gpu, files = self.reports.latest.active, self._gpu_state(), self.loader.refused_by()
        view_of = (fleet.version, self.backoff.version, self.loader.version, active, gpu, self.closing)
        if view_of == self._view_of and now_ns < self._view_ends_ns and files is self._view_files:
            return self._view
        pauses = self.backoff.ends()
        self._view = View(
            self._rungs, active, fleet.serving, fleet.standby, fleet.shadow, fleet.late, tuple(self.loader.loads), gpu,
            refused=frozenset(filter(self.loader.refused, self._rungs)), pauses=pauses, now_ns=now_ns,
            isolated=self._isolated, hot_standby=self._config.hot_standby, closing=self.closing,
        )  # fmt: skip
        self._view_of, self._view_files = view_of, files
        self._view_ends_ns = min((end_ns for end_ns in pauses.values() if end_ns > now_ns), default=1 << 63)
        return self._view

    def _gpu_state(self) -> Gpu:
        if not self._gpu.lost:
            return Gpu.OK
        return Gpu.HUNG if self.fleet.gpu_hangs() else Gpu.LOST

    def reconcile(self) -> None:
        """Change the serving engine where that is better, between two frames."""
        for decide in policy.RECONCILE:
            if actions := decide(self.view()):
                self.apply(actions)

    def upkeep(self) -> None:
        """Begin to load what is missing; nothing is decided twice about the same view."""
        if (view := self.view()) is not self._settled:
            self._settled = view
            self.apply(policy.upkeep(view))

    def apply(self, actions: Actions) -> None:
        """Carry out what the policy decides."""
        standby = self.fleet.standby
        for action in actions:
            match action:
                case Move(engine, Role.SERVING, why):
                    self._serve(engine, why)
                    standby = self.fleet.standby
                case Move(engine, role, why):
                    self.fleet.move(engine, role, why)
                case Load(rung, pause):
                    standby = self._report_standby(standby)
                    if pause is not None:
                        self.backoff.may_begin(pause)
                    self.loader.start(rung)
                case Cancel(loads):
                    self.loader.cancel(loads)
                case Pause(what):
                    self._pause(what)
                case ClearPause(what):
                    self.backoff.reset(what)
                case Failed(rung, error):
                    self.reports.failures[rung.name] = without_frames(error)
                case TrustGpu(rung):
                    _log.warning('%s works: the GPU is back.', rung.name)
                    self._gpu.restore()
                case Switch(why, switched):
                    self._switch(why, switched)
                    standby = self.fleet.standby
        self._report_standby(standby)

    def _report_standby(self, before: RungEngine | None) -> RungEngine | None:
        """Report the standby where it is another than before; return it."""
        standby = self.fleet.standby
        if standby is not before:
            self.reports.set(standby=standby.rung if standby is not None else None)
        return standby

    def _switch(self, why: str, actions: Actions) -> None:
        serving = self.fleet.serving
        assert serving is not None
        transaction = Transaction(self.fleet, self.reports, self._now_ns())
        transaction.because(serving.rung.name, why)
        self.apply(actions)
        transaction.end()

    def _serve(self, engine: RungEngine, why: str) -> None:
        if engine is self.fleet.shadow:
            self.backoff.succeed(('promotion', engine.rung))
        self.fleet.move(engine, Role.SERVING, why)
        self.reports.serves(engine, self.fleet.standby)
        self.apply(policy.after_serving(self.view()))

    def _pause(self, what: object) -> None:
        promotion = isinstance(what, tuple) and what[0] == 'promotion'
        self.backoff.begin(what, self._config.promotion_backoff_s if promotion else self._config.restart_backoff_s)

    def retire_serving(self, why: str) -> None:
        """End the serving engine where there is one."""
        if (engine := self.fleet.serving) is not None:
            self.fleet.move(engine, Role.RETIRING, why)

    # --- failures ---------------------------------------------------------------------------------

    def note_fault(self, rung: Rung) -> None:
        """Note that an engine has failed: two of different rungs lose the GPU."""
        if rung.on_gpu and self._gpu.note_fault(rung):
            self.apply(policy.suspend_gpu(self.view()))

    def lose_gpu(self) -> None:
        """Take the GPU for lost, since a worker on it cannot be ended."""
        self._gpu.mark_lost(_STUCK)
        self.apply(policy.suspend_gpu(self.view()))

    def fail_serving(self, error: Exception) -> Rung:
        """Retire the serving engine and blame it; return its rung."""
        engine = self.fleet.serving
        assert engine is not None
        rung = engine.rung
        log_unexpected(rung, error)
        self.fleet.move(engine, Role.RETIRING, 'failed')
        self.reports.failures[rung.name] = without_frames(error)
        self.note_fault(rung)
        self.apply(policy.pause_after_failure(rung, self.view()))
        return rung

    def blame_snapshot(self) -> Callable[[], None]:
        """Return a function that reverts all blame of engines from now on: the request may prove to be at fault."""
        restore_gpu, restore_pauses, gpu_hung = self._gpu.snapshot(), self.backoff.snapshot(), self.fleet.gpu_hangs()

        def take_back() -> None:
            restore_gpu()
            restore_pauses()
            if self.fleet.gpu_hangs() and not gpu_hung:
                # Whatever the request is, the driver holds what it has.
                self._gpu.mark_lost(_STUCK)

        return take_back

    def passes_self_test(self, engine: RungEngine) -> bool:
        """Return whether an engine, which has failed a request, still works."""
        try:
            self.self_test(engine)
        except Exception as error:
            _log.error('%s fails its self-test: %s', engine.rung.name, error)
            return False
        return True

    def self_test(self, engine: RungEngine) -> None:
        """Have an engine answer the first golden request; raise as :meth:`Proof.check`."""
        self._proof.check(engine.host, engine.hang_s)

    def try_gpu_again(self) -> None:
        """Trust the GPU where nothing serves, so that nothing is risked, unless a worker on it cannot be ended."""
        if not self.fleet.gpu_hangs():
            self._gpu.restore()

    def _attempts(self, rung: Rung) -> int:
        """Return how often ``rung`` is loaded in a row while its workers die; there is nothing after the last one."""
        return _LAST_ATTEMPTS if rung == self._rungs[-1] else _ATTEMPTS

    # --- the end ----------------------------------------------------------------------------------

    def kill_all(self) -> None:
        """Begin to end a request and all loads, so that their callers return; from any thread."""
        self.closing = True
        if (engine := self.fleet.serving) is not None:
            engine.host.kill()
        self.loader.kill_all()

    def release(self) -> None:
        """End every engine and load, and forget every failure."""
        for engine in tuple(self.fleet.engines()):
            self.fleet.move(engine, Role.RETIRING, 'the chain is released')
        self.loader.cancel(self.loader.loads)
        self._reaper.wait()
        self.loader.forget_refusals()
        self.backoff.clear()
        self._proof.forget()
        self._gpu.restore()
        self.reports.unloaded()
        # They hold on to engines.
        self._view, self._view_of, self._settled = View(self._rungs), (), None


def log_unexpected(rung: Rung, error: Exception) -> None:
    """Log an error that is none of this package's, with its traceback."""
    if not isinstance(error, C7Error):
        _log.error('%s raised an unexpected error', rung.name, exc_info=error)
