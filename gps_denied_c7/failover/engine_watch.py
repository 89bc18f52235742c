"""Look after the engines of a chain: ended loads, late answers, the standby and the shadow (F-3, F-4, F-6)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from numpy.typing import NDArray

from gps_denied_c7.errors import GpuMemoryError, InferenceError
from gps_denied_c7.failover import policy
from gps_denied_c7.failover.fleet import Role
from gps_denied_c7.failover.loader import RungEngine
from gps_denied_c7.failover.policy_runner import PolicyRunner
from gps_denied_c7.failover.policy_view import Move, Pause, Purpose
from gps_denied_c7.failover.standby import make_standby
from gps_denied_c7.model.bundle import ModelBundle

__all__ = ['EngineWatch']

_log = logging.getLogger(__name__)


class EngineWatch:
    """
    Ask the engines that do not serve, and apply what the policy decides about them; never waits.

    :param bundle: its rules say whether a shadow agrees.
    """

    def __init__(self, runner: PolicyRunner, bundle: ModelBundle, monotonic_ns: Callable[[], int]) -> None:
        self._runner = runner
        self._bundle = bundle
        self._now_ns = monotonic_ns
        self._fleet, self._loader, self._reports = runner.fleet, runner.loader, runner.reports

    def look(self) -> None:
        """Take the results of loads, late answers and shadowed frames; never waits."""
        fleet = self._fleet
        self.take_loads()
        for rung in fleet.newly_stuck():
            if rung.on_gpu:
                self._runner.lose_gpu()
        for engine in fleet.late:
            self._poll_late(engine)
        if fleet.standby is not None:
            self._check_standby(fleet.standby)
        if fleet.shadow is not None:
            self.poll_shadow(fleet.shadow)

    def take_loads(self) -> None:
        """Decide about the loads in the background that have ended."""
        if not self._loader.loads:
            return
        for load in [load for load in self._loader.loads if load.done.is_set()]:
            if load not in self._loader.loads:
                # It was cancelled for one before it.
                continue
            self._loader.take(load)
            lack_bytes = None
            if load.error is not None:
                _log.info('%s could not be loaded in the background: %s', load.rung.name, load.error)
                if isinstance(load.error, GpuMemoryError):
                    self._reports.memory_refused(load.rung, load.error, quiet=self._runner.closing)
                    lack_bytes = load.error.lack_bytes
            self._runner.apply(policy.after_load(load, self._runner.view(), lack_bytes=lack_bytes))

    def _poll_late(self, engine: RungEngine) -> None:
        try:
            engine.late_answer = engine.host.poll(0.0)
        except Exception as error:
            why = f'failed: {error}'
        else:
            age_s = engine.age_s(self._now_ns())
            if engine.late_answer is not None:
                _log.warning('%s answered after %.0f ms.', engine.rung.name, age_s * 1e3)
                self._runner.apply(make_standby(engine, self._runner.view(), ordered=False))
                return
            if age_s <= engine.hang_s:
                return
            why = f'has not answered for {age_s:.1f} s and is killed.'
        _log.error('%s, which was late, %s', engine.rung.name, why)
        self._runner.note_fault(engine.rung)
        self._fleet.move(engine, Role.RETIRING, why)

    def _check_standby(self, engine: RungEngine) -> None:
        """Retire one that could not answer if it were asked."""
        if not engine.host.alive:
            why = 'died'
            _log.error('the standby %s died.', engine.rung.name)
        elif not engine.host.responds(engine.hang_s):
            why = 'hangs'
            _log.error('the standby %s does not respond and is killed.', engine.rung.name)
            self._runner.note_fault(engine.rung)
        elif not self._runner.view().eligible(engine.rung, Purpose.SERVE):
            why = 'the GPU is lost'
        else:
            return
        self._runner.apply((Move(engine, Role.RETIRING, why),))

    def poll_shadow(self, engine: RungEngine) -> None:
        """Compare what the shadow made of a live frame, where it has answered."""
        if engine.expected is None:
            if not engine.host.alive:
                self._drop_shadow(engine, 'its worker died.')
            return
        try:
            outputs = engine.host.poll(0.0)
            if outputs is None and engine.age_s(self._now_ns()) > engine.hang_s:
                raise InferenceError(f'it did not answer within {engine.hang_s:.1f} s.')
            if outputs is None:
                return
            if problems := self._bundle.compare(outputs, engine.expected, specs=engine.host.outputs):
                raise InferenceError(
                    f'it disagrees on a live frame: {" ".join(problems)}',
                    remedy='' if self._bundle.rules else 'Where that is close enough, give rules in a model bundle.',
                )
        except Exception as error:
            self._drop_shadow(engine, str(error))
            return
        engine.expected = None
        engine.agreements += 1

    def give_to_shadow(self, inputs: Mapping[str, NDArray], outputs: Mapping[str, NDArray]) -> None:
        """Give the shadow a frame that was just answered with ``outputs``, to be compared later."""
        engine = self._fleet.shadow
        if engine is None:
            return
        self.poll_shadow(engine)
        if self._fleet.shadow is None or engine.expected is not None or engine.agreements >= policy.SHADOWED_FRAMES:
            # One that runs a request when it takes over could not be asked.
            return
        try:
            engine.began_ns = self._now_ns()
            engine.host.begin(inputs)
        except Exception as error:
            self._drop_shadow(engine, str(error))
            return
        engine.expected = {name: array.copy() for name, array in outputs.items()}

    def _drop_shadow(self, engine: RungEngine, fault: str) -> None:
        """Retire a shadow that is at fault, and pause."""
        self._reports.promotion_delayed(engine.rung, fault)
        self._runner.apply((Pause(('promotion', engine.rung)), Move(engine, Role.RETIRING, fault)))
