"""The runtime chain: which rung serves, why, and since when (F-2, F-7, F-8)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import ChainExhaustedError, InferenceError
from gps_denied_c7.failover import policy
from gps_denied_c7.failover.attempts import LateError, Request
from gps_denied_c7.failover.engine_watch import EngineWatch
from gps_denied_c7.failover.fleet import FleetSnapshot, Role
from gps_denied_c7.failover.loader import EngineLoader, RungEngine
from gps_denied_c7.failover.policy import Next, Wait
from gps_denied_c7.failover.policy_runner import PolicyRunner
from gps_denied_c7.failover.policy_view import RESTART
from gps_denied_c7.failover.rungs import Rung, RungHost, build_rungs
from gps_denied_c7.failover.standby import hurried_load
from gps_denied_c7.failover.status import ChainState, ChainStatus, Transaction
from gps_denied_c7.failover.switchover import Switchover
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.tensors import TensorSpec

__all__ = ['Answer', 'RuntimeChain']

_LOOK_S = 0.02

_log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """
    Hold the outputs of one request and which engine made them.

    :param outputs: read-only arrays by canonical name, valid until the chain's next call.
    :param ran_ns: when the engine's run that made them began and ended, by the steady clock; zeros where unknown.
    """

    outputs: Mapping[str, NDArray]
    runtime_label: str
    active_provider: str
    is_fallback: bool
    model_name: str
    weights_digest: str
    ran_ns: tuple[int, int] = (0, 0)

    @property
    def maker(self) -> tuple[object, ...]:
        """What made it: all but the outputs and the time of the run, so that two answers can be compared at once."""
        return self[1:-1]


class RuntimeChain:
    """
    Serve every request from the best rung that works, and report each change.

    Runtimes report facts; this class, which owns the rung that serves, emits the alerts (F-8).
    With ``isolation: process`` a second engine is the standby (F-3): it answers the same frame where the first one
    dies, fails or is late, and a better rung that was out comes back once it has answered live frames as the
    serving one did (F-6). A late engine becomes the standby when its answer comes, and is killed when none comes (F-4).
    A request may be at fault instead of an engine: the last usable rung is kept where it fails one and still
    passes its self-test, so that one image cannot silence all that follow it. Engines that were there before it may
    all have been stopped: a request is given up for being late only when one that was loaded for it hangs too.
    :meth:`status` and :meth:`snapshot` never block. The other methods take turns and may last as long as an engine
    takes to load.

    :param rungs: by preference, from :func:`build_rungs`.
    :param host_factory: makes the host of a rung; it may raise a C7Error instead. Called from several threads.
    :param emit: takes ``(record kind, payload fields)``, as FdrRecorder.emit does.
    :param on_change: called with the new status after every change of rung or state.
    :param monotonic_ns: steady clock in nanoseconds.
    :param make_loader: makes what loads its engines, from the arguments of EngineLoader.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        config: C7InferenceConfig,
        host_factory: Callable[[Rung], RungHost],
        *,
        emit: Callable[..., None],
        on_change: Callable[[ChainStatus], None] = lambda status: None,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        rungs: tuple[Rung, ...] | None = None,
        make_loader: Callable[..., EngineLoader] = EngineLoader,
    ) -> None:
        self._bundle = bundle
        self._rungs = build_rungs(config, bundle) if rungs is None else rungs
        self._monotonic_ns = monotonic_ns
        # A chain that is loaded beside another one takes its own lock, then that of the other in make_room; the other
        # one, which knows nothing of the first, never the other way round.
        self._turn = threading.RLock()
        self._requests = 0
        self._runner = PolicyRunner(
            bundle, config, host_factory, self._rungs,
            emit=emit, on_change=on_change, monotonic_ns=monotonic_ns, make_loader=make_loader,
        )  # fmt: skip
        self._watch = EngineWatch(self._runner, bundle, monotonic_ns)
        self._switchover = Switchover(self._runner, self._watch, config, self._rungs, monotonic_ns)
        self._fleet, self._reports = self._runner.fleet, self._runner.reports

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The rungs by preference."""
        return self._rungs

    def status(self) -> ChainStatus:
        """Return the latest status without waiting for anything."""
        return self._reports.status()

    def snapshot(self) -> FleetSnapshot:
        """Return the engines and their roles without waiting for anything."""
        return self._fleet.snapshot()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Canonical inputs: the bundle's, or what the engine of a bare model reports."""
        engine = self._fleet.serving
        return self._bundle.inputs or (engine.host.inputs if engine else ())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Canonical outputs: the bundle's, or what the engine of a bare model reports."""
        engine = self._fleet.serving
        return self._bundle.outputs or (engine.host.outputs if engine else ())

    def request_arrays(self) -> Mapping[str, NDArray]:
        """
        Return arrays by name that the next request is best written into; empty where there are none.

        They stay readable whatever happens to the engine, so that a frame can go to the next one.
        """
        engine = self._fleet.serving
        return engine.host.request_arrays if engine is not None else {}

    def load(self, *, beside: RuntimeChain | None = None) -> None:
        """
        Load and self-test the first usable rung (N-1 configure).

        A better rung that needs longer than ``configure_budget_s`` goes on loading in the background (F-5).

        :param beside: another chain, which serves meanwhile, and whose standby and shadow are unloaded where GPU
            memory is short. The standby of this one is loaded with the first :meth:`infer` only.
        :raises ChainExhaustedError: no rung is usable; nothing stays loaded.
        """
        with self._turn:
            if beside is None:
                self._switchover.walk(self._rungs)
                self._runner.upkeep()
            else:
                self._switchover.walk(self._rungs, beside=beside.make_room)

    def shadow(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """
        Run one request whose answer reaches no consumer: no alert, no other engine tried (N-10).

        :param inputs: arrays by canonical name, only read.
        :return: read-only arrays by canonical name, valid until the chain's next call.
        :raises InferenceError: nothing is loaded, or the engine fails the request or hangs.
        """
        with self._turn:
            engine = self._fleet.serving
            if engine is None:
                raise InferenceError('no engine is loaded.')
            engine.host.begin(inputs)
            outputs = engine.host.poll(engine.hang_s)
            if outputs is None:
                engine.host.kill()
                raise InferenceError(f'{engine.rung.name} did not answer a live frame within {engine.hang_s:.1f} s.')
            return outputs

    def make_room(self, lack_bytes: int) -> bool:
        """
        Free what does not serve where that gives another engine the GPU memory that it lacks (F-3).

        :return: whether anything was freed. The standby is loaded again after a pause.
        """
        with self._turn:
            return self._switchover.make_room(lack_bytes)

    def prove(self) -> None:
        """
        Self-test the serving engine with one inference, and replace it where that fails (N-1 activate).

        :raises ChainExhaustedError: no rung is usable.
        """
        with self._turn:
            engine = self._fleet.serving
            if engine is None:
                self._switchover.restart(at_once=True)
                return
            try:
                self._runner.self_test(engine)
            except Exception as error:
                # It may have died by chance: it is loaded and tested again, after the rungs that come next.
                self._switchover.after_failure(error)

    # --- one request ------------------------------------------------------------------------------

    def infer(self, inputs: Mapping[str, NDArray]) -> Answer:
        """
        Answer one request, moving to the next engine as often as it takes (F-2).

        What can wait until the answer has been handed on is left to :meth:`maintain`. Where all engines are late, the
        request waits for another to be loaded, which has as long as ``load_timeout_s``, and gets that one's answer.

        :param inputs: arrays by canonical name, only read; the same frame goes to every engine tried.
        :raises InferenceError: every usable rung failed this request, and one that passes its self-test all the
            same goes on serving.
        :raises ChainExhaustedError: every rung failed, or all had failed and the pause before the
            next attempt is not over.
        """
        with self._turn:
            if self._fleet.serving is None:
                self._watch.take_loads()
                self._switchover.restart()
            started_ns = self._monotonic_ns()
            self._requests += 1
            request = Request(
                self._requests, started_ns, Transaction(self._fleet, self._reports, started_ns, frames_affected=1)
            )
            outputs = None
            while outputs is None:
                engine = self._fleet.serving
                assert engine is not None
                try:
                    outputs = self._ask(engine, inputs, request)
                except LateError as late:
                    outputs = self._recover_late(request, engine, late)
                except Exception as error:
                    inputs = self._recover_failed(request, engine, error, inputs)
            request.switch.end()
            self._runner.backoff.reset(RESTART)
            self._reports.announce()
            self._watch.give_to_shadow(inputs, outputs)
            return self._answer(outputs)

    def _ask(self, engine: RungEngine, inputs: Mapping[str, NDArray], request: Request) -> dict[str, NDArray]:
        """
        Return the answer of ``engine``; where it is late, wait while another one is being loaded (F-4).

        :raises LateError: it is late and there is a standby, or it was loaded for this request and has hung.
        :raises InferenceError: it failed, or has hung for so long that it is loaded again.
        """
        runner, fleet = self._runner, self._fleet
        engine.began_ns, engine.request, engine.late_answer = self._monotonic_ns(), request.number, None
        engine.host.begin(inputs)
        outputs = engine.host.poll(engine.deadline_s)
        while outputs is None:
            if runner.closing:
                raise InferenceError(f'{engine.rung.name} still runs a request while the chain is released.')
            self._watch.look()
            age_s = engine.age_s(self._monotonic_ns())
            hung = age_s > engine.hang_s
            wait = policy.while_waiting(
                engine, age_s, runner.view(),
                last=request.fresh(engine), standby_answered=request.answered_by(fleet.standby),
            )  # fmt: skip
            if wait is Wait.LATE:
                limit_s = engine.hang_s if hung else engine.deadline_s
                raise LateError(f'{engine.rung.name} did not answer within {limit_s * 1e3:.0f} ms.')
            if wait is Wait.ABANDON:
                raise InferenceError(f'{engine.rung.name} has not answered for {age_s:.1f} s.')
            runner.apply(hurried_load(runner.view(), hung=hung))
            outputs = engine.host.poll(_LOOK_S)
        return outputs

    def _recover_late(self, request: Request, engine: RungEngine, late: LateError) -> dict[str, NDArray] | None:
        """Have the standby serve in place of a late engine; return its answer where it has given one, late itself."""
        runner, fleet = self._runner, self._fleet
        _log.error('%s', late)
        request.take_back = request.take_back or runner.blame_snapshot()
        attempt = request.note(engine, late, standby=fleet.standby)
        step = policy.after_attempt(attempt, runner.view())
        if step.next is Next.REPLACE_FOR_LATER:
            runner.retire_serving('hangs on a request that it was loaded for')
            self._switchover.replace_serving(step.candidates)
            self._give_up(request)
        fleet.move(engine, Role.LATE, str(late))
        self._switchover.serve_standby(str(late))
        standby = fleet.serving
        if standby is None or not request.answered_by(standby):
            return None
        outputs, standby.late_answer = standby.late_answer, None
        return outputs

    def _recover_failed(
        self, request: Request, engine: RungEngine, error: Exception, inputs: Mapping[str, NDArray]
    ) -> Mapping[str, NDArray]:
        """Replace an engine that failed a request or died; return the inputs, copied out of its memory."""
        runner = self._runner
        request.take_back = request.take_back or runner.blame_snapshot()
        attempt = request.note(engine, error, standby=self._fleet.standby)
        if runner.closing:
            raise error
        # A self-test is written where the frame may have been.
        in_place = engine.host.request_arrays
        inputs = {name: array.copy() if array is in_place.get(name) else array for name, array in inputs.items()}
        step = policy.after_attempt(attempt, runner.view())
        if step.next is Next.SELF_TEST:
            attempt = attempt._replace(passed=runner.passes_self_test(engine))
            step = policy.after_attempt(attempt, runner.view())
        if step.next is Next.BLAME_REQUEST:
            self._give_up(request)
        _log.error('%s failed a frame: %s', engine.rung.name, error)
        runner.fail_serving(error)
        loaded = self._switchover.replace_serving(step.candidates)
        serving = self._serving()
        if step.next is Next.RELOAD:
            if request.asked(serving):
                # It was loaded again and passes its self-test: the request is what it does not survive.
                self._give_up(request)
        elif loaded:
            request.note_reload(serving)
        return inputs

    def _give_up(self, request: Request) -> None:
        """Raise what the usable rungs made of a request, and blame no engine for it."""
        assert request.take_back is not None
        request.take_back()
        request.switch.end()
        self._runner.backoff.reset(RESTART)
        raise request.error(self._serving(), self._monotonic_ns())

    def _answer(self, outputs: Mapping[str, NDArray]) -> Answer:
        status, engine = self._reports.latest, self._fleet.serving
        assert status.facts is not None and engine is not None
        return Answer(
            outputs=outputs,
            runtime_label=engine.rung.strategy,
            active_provider=status.facts.active_provider,
            is_fallback=status.is_fallback,
            model_name=status.model_name,
            weights_digest=status.weights_digest,
            ran_ns=engine.host.ran_ns,
        )

    def _serving(self) -> Rung:
        engine = self._fleet.serving
        assert engine is not None
        return engine.rung

    # --- between requests -------------------------------------------------------------------------

    def maintain(self) -> None:
        """
        Look after the engines, and try an exhausted chain again when its pause is over.

        To be called after each :meth:`infer`, once its answer has been handed on, and several times a second
        while no frame comes.
        """
        with self._turn:
            runner = self._runner
            if runner.closing:
                # What is ended now is ended on purpose.
                return
            self._watch.look()
            runner.reconcile()
            engine = self._fleet.serving
            try:
                if engine is not None and not engine.host.alive:
                    error = InferenceError(f'{engine.rung.name} died while no frame came.')
                    _log.error('%s', error)
                    self._switchover.after_failure(error)
                elif self._reports.latest.state is ChainState.EXHAUSTED and self._switchover.may_restart():
                    self._switchover.restart()
            except ChainExhaustedError as exhausted:
                _log.error('%s', exhausted)
            runner.upkeep()

    def release(self, timeout_s: float = 2.0) -> None:
        """
        Free every engine and forget every failure; safe to repeat.

        :param timeout_s: seconds to wait for a request that is still running; a worker is killed in half of them.
        :raises InferenceError: the request still runs; its engine stays loaded until it returns.
        """
        runner = self._runner
        if not self._turn.acquire(timeout=timeout_s / 2):
            runner.kill_all()
            if not self._turn.acquire(timeout=timeout_s / 2):
                active = self._reports.latest.active
                raise InferenceError(
                    f'{active.name if active else "the chain"} still runs a request '
                    f'after {timeout_s:.1f} s; its engine cannot be freed.',
                    remedy='Restart the node to get its memory back.',
                )
        try:
            runner.closing = True
            runner.release()
        finally:
            runner.closing = False
            self._turn.release()
