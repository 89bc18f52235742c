"""Have another engine serve: the standby, one that is loaded now, or the shadow (F-2, F-7)."""

from __future__ import annotations

import logging
from collections.abc import Callable

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import GpuMemoryError
from gps_denied_c7.failover import policy
from gps_denied_c7.failover.attempts import without_frames
from gps_denied_c7.failover.engine_watch import EngineWatch
from gps_denied_c7.failover.fleet import Role
from gps_denied_c7.failover.loader import EngineLoad, RungEngine
from gps_denied_c7.failover.policy_runner import PolicyRunner, log_unexpected
from gps_denied_c7.failover.policy_view import RESTART, Move, Pause, Purpose
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.failover.status import ChainState, Transaction

__all__ = ['Switchover']

_log = logging.getLogger(__name__)


class Switchover:
    """Find the engine that serves next; may wait as long as a load takes."""

    def __init__(
        self,
        runner: PolicyRunner,
        watch: EngineWatch,
        config: C7InferenceConfig,
        rungs: tuple[Rung, ...],
        monotonic_ns: Callable[[], int],
    ) -> None:
        self._runner = runner
        self._watch = watch
        self._config = config
        self._isolated = config.isolation == 'process'
        self._rungs = rungs
        self._now_ns = monotonic_ns
        self._fleet, self._loader, self._reports = runner.fleet, runner.loader, runner.reports

    def after_failure(self, error: Exception) -> None:
        """
        Replace the serving engine, which failed without a frame; its rung may also be loaded again.

        :raises ChainExhaustedError: no rung works.
        """
        serving = self._fleet.serving
        assert serving is not None
        switch = Transaction(self._fleet, self._reports, self._now_ns())
        switch.because(serving.rung.name, str(error))
        failed = self._runner.fail_serving(error)
        self.replace_serving((*self._runner.view().rungs_after(failed), failed))
        switch.end()

    def restart(self, *, at_once: bool = False) -> None:
        """
        Have an engine serve where none does.

        :param at_once: wait for no pause, and try also what was refused before.
        :raises ChainExhaustedError: no rung works, or the pause is not over.
        """
        before = self._reports.latest
        if at_once:
            self._loader.forget_refusals()
        exhausted = before.state is ChainState.EXHAUSTED
        if exhausted and not at_once and not self.may_restart():
            raise self._reports.exhausted_error()
        switch = Transaction(self._fleet, self._reports, before.since_ns)
        if exhausted:
            self._runner.try_gpu_again()
            switch.because('none', 'the chain was exhausted')
        self.replace_serving(self._rungs)
        switch.end()

    def may_restart(self) -> bool:
        """Return whether an exhausted chain has an engine that was loaded meanwhile, or one to try after its pause."""
        if self._fleet.standby is not None:
            return True
        view = self._runner.view()
        return len(view.refused) < len(view.rungs) and self._runner.backoff.may_begin(RESTART)

    def replace_serving(self, candidates: tuple[Rung, ...]) -> bool:
        """
        Have the standby serve, or the first of ``candidates`` that works; return whether one had to be loaded.

        :raises ChainExhaustedError: none works.
        """
        self._watch.take_loads()
        standby = self._fleet.standby
        view = self._runner.view()
        if standby is not None and standby.host.alive and view.eligible(standby.rung, Purpose.SERVE):
            self.serve_standby('the engine before failed')
            return False
        self.walk(candidates)
        return True

    def serve_standby(self, why: str) -> None:
        """Have the standby serve."""
        standby = self._fleet.standby
        assert standby is not None
        self._runner.apply((Move(standby, Role.SERVING, why),))

    def walk(self, candidates: tuple[Rung, ...], *, beside: Callable[[int], bool] = lambda lack_bytes: False) -> None:
        """
        Load and self-test the first of ``candidates`` that works, else have the shadow serve.

        :param beside: frees memory of another chain; returns whether it did.
        :raises ChainExhaustedError: none works.
        """
        self._runner.retire_serving('replaced')
        end_ns = self._now_ns() + int(self._config.configure_budget_s * 1e9)
        for position, rung in enumerate(candidates):
            if not self._runner.view().eligible(rung, Purpose.LOAD_NOW):
                continue
            if self._runner.closing:
                break
            last = position == len(candidates) - 1
            try:
                engine = self._load_within(rung, None if last else (end_ns - self._now_ns()) / 1e9, beside)
            except Exception as error:
                log_unexpected(rung, error)
                self._reports.failures[rung.name] = without_frames(error)
                self._reports.rejected(rung, error, quiet=self._runner.closing)
                continue
            if engine is not None:
                self._runner.apply((Move(engine, Role.SERVING, 'is the first usable rung'),))
                return
            _log.warning('%s is still loading; the next rung serves meanwhile.', rung.name)
        if self._serve_shadow():
            return
        self._runner.apply((Pause(RESTART),))
        raise self._reports.exhausted(quiet=self._runner.closing)

    def _serve_shadow(self) -> bool:
        """Have the shadow serve at once where nothing else does and it can be asked."""
        engine = self._fleet.shadow
        if engine is None or self._runner.closing:
            return False
        self._watch.poll_shadow(engine)
        if self._fleet.shadow is None:
            return False
        if engine.expected is not None or not engine.host.alive:
            self._fleet.move(engine, Role.RETIRING, 'it cannot be asked now')
            return False
        trust = policy.trust_gpu(engine, self._runner.view())
        self._runner.apply((*trust, Move(engine, Role.SERVING, 'no other is usable')))
        return True

    def _load_within(self, rung: Rung, budget_s: float | None, beside: Callable[[int], bool]) -> RungEngine | None:
        """Load ``rung``; None where it goes on loading in the background."""
        load = self._loader.find(rung)
        if load is None:
            if budget_s is None or not self._isolated or self._config.build_on_configure:
                return self._load_here(rung, beside)
            load = self._loader.start(rung)
        if not load.done.wait(None if budget_s is None else max(0.0, budget_s)):
            return None
        self._loader.take(load)
        if isinstance(load.error, GpuMemoryError):
            return self._load_here(rung, beside)
        if load.error is not None:
            raise load.error
        return load.engine

    def _load_here(self, rung: Rung, beside: Callable[[int], bool]) -> RungEngine:
        with self._loader.listed(rung) as load:
            try:
                return self._loader.load(load)
            except GpuMemoryError as error:
                if not self.make_room(error.lack_bytes, load) and not beside(error.lack_bytes):
                    raise
                return self._loader.load(load)

    def make_room(self, lack_bytes: int, but: EngineLoad | None = None) -> bool:
        """Free what does not serve, as far as needed; return False where all of it would not be enough."""
        actions = policy.make_room(lack_bytes, self._runner.view(), but=but)
        for action in actions or ():
            if isinstance(action, Move):
                _log.warning('%s is unloaded: another engine lacks GPU memory.', action.engine.rung.name)
        self._runner.apply(actions or ())
        return actions is not None
