"""
The runtime chain as it was before fleet, policy and chain were parted: what the lock-step test compares with.

Its errors are worded as they are now; nothing else has changed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import (
    C7Error,
    ChainExhaustedError,
    GpuMemoryError,
    InferenceError,
    RuntimeUnavailableError,
    WorkerDiedError,
    error_and_causes,
    join_reasons,
)
from gps_denied_c7.failover.backoff import Backoff
from gps_denied_c7.failover.file_watch import FileWatch, bundle_files, cache_directories, fingerprint
from gps_denied_c7.failover.gpu_health import GpuHealth
from gps_denied_c7.failover.loader import EngineLoad, EngineLoader, RungEngine
from gps_denied_c7.failover.retiring import RetiringEngines
from gps_denied_c7.failover.rungs import ORT_LABEL, Rung, RungHost, build_rungs
from gps_denied_c7.failover.self_test import Proof
from gps_denied_c7.failover.status import ChainState, ChainStatus
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.protocol import EngineFacts
from gps_denied_c7.tensors import TensorSpec

__all__ = ['Answer', 'RuntimeChain']

_ATTEMPTS, _LAST_ATTEMPTS = 2, 6
_DEATHS = 3
_SHADOWED_FRAMES = 3
_GIVEN_UP = 10.0
_LOOK_S = 0.02
_RESTART, _HURRIED = 'restart', 'hurried'
_STOPPED = ', stopped'

ErrorT = TypeVar('ErrorT', bound=BaseException)

_log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """
    Hold the outputs of one request and who made them.

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
        """Who made it: all but the outputs and the time of the run, so that two answers can be compared at once."""
        return self[1:-1]


class _LateError(InferenceError):
    """The serving engine has not answered yet, and another one is there, or it was the last to be tried."""


class _Attempt(NamedTuple):
    """
    Hold what came of one engine that was asked to answer a request.

    :param process: its worker, and whether that was stopped then.
    :param fresh: its load began after the request did.
    """

    engine: RungEngine
    process: str
    fresh: bool
    error: Exception


class RuntimeChain:
    """
    Serve every request from the best rung that works, and say when that changes.

    Runtimes report facts; this class, which owns the rung that serves, emits the alerts (F-8).
    With ``isolation: process`` a second engine stands by (F-3): it answers the same frame where the first one
    dies, fails or is late, and a better rung that was out comes back once it has answered live frames as the
    serving one did (F-6). A late engine stands by again when its answer comes, and is killed when it does not (F-4).
    A request may be at fault instead of an engine: the last usable rung is kept where it fails one and still
    passes its proof, so that one image cannot silence all that follow it. Engines that were there before it may all
    have been stopped: a request is given up for being late only when one that was loaded for it hangs too.
    :meth:`status` never blocks. The other methods take turns and may last as long as an engine
    takes to load.

    :param rungs: by preference, from :func:`build_rungs`.
    :param host_factory: makes the host of a rung; it may raise a C7Error instead. Called from several threads.
    :param emit: takes ``(record kind, payload fields)``, as FdrRecorder.emit does.
    :param on_change: called with the new status after every change of rung or state.
    :param monotonic_ns: steady clock in nanoseconds.
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
    ) -> None:
        self._bundle = bundle
        self._config = config
        self._isolated = config.isolation == 'process'
        self._rungs = build_rungs(config, bundle) if rungs is None else rungs
        self._emit = emit
        self._on_change = on_change
        self._monotonic_ns = monotonic_ns
        self._turn = threading.RLock()
        self._closing = False
        self._engine: RungEngine | None = None
        self._standby: RungEngine | None = None
        self._candidate: RungEngine | None = None
        self._late: list[RungEngine] = []
        self._retiring = RetiringEngines(emit=emit, monotonic_ns=monotonic_ns)
        self._gpu = GpuHealth(config.gpu_fault_window_s, monotonic_ns)
        self._backoff = Backoff(monotonic_ns)
        self._proof = Proof(bundle)
        self._loader = EngineLoader(
            config, host_factory, self._proof,
            attempts=self._attempts, given_up=lambda: self._closing, retire=self._retiring.add,
            files=FileWatch(lambda: fingerprint(bundle_files(bundle), cache_directories(config))),
            monotonic_ns=monotonic_ns,
        )  # fmt: skip
        self._announced: frozenset[str] = frozenset()
        self._failures: dict[str, BaseException] = {}
        self._beside: RuntimeChain | None = None
        self._request = 0
        self._status = ChainStatus(bundle.name, bundle.weights_digest, ChainState.UNLOADED)

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The rungs by preference."""
        return self._rungs

    def status(self) -> ChainStatus:
        """Return the latest status without waiting for anything."""
        return replace(
            self._status,
            gpu_lost=self._gpu.lost,
            longest_load_s=self._loader.longest_s(),
            worker_pid=_pid(self._engine),
            standby_pid=_pid(self._standby),
        )

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Canonical inputs: the bundle's, or what the engine of a bare model reports."""
        return self._bundle.inputs or (self._engine.host.inputs if self._engine else ())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Canonical outputs: the bundle's, or what the engine of a bare model reports."""
        return self._bundle.outputs or (self._engine.host.outputs if self._engine else ())

    def request_arrays(self) -> Mapping[str, NDArray]:
        """
        Return arrays by name that the next request is best written into; empty where there are none.

        They stay readable whatever becomes of the engine, so that a frame can go to the next one.
        """
        engine = self._engine
        return engine.host.request_arrays if engine is not None else {}

    def load(self, *, beside: RuntimeChain | None = None) -> None:
        """
        Load and prove the first usable rung (N-1 configure).

        A better rung that needs longer than ``configure_budget_s`` goes on loading in the background (F-5).

        :param beside: another chain, which serves meanwhile and has what stands by give way where GPU memory is
            short. What stands by here is loaded with the first :meth:`infer` only.
        :raises ChainExhaustedError: no rung is usable; nothing stays loaded.
        """
        with self._turn:
            self._beside = beside
            try:
                self._walk(self._rungs)
            finally:
                self._beside = None
            if beside is None:
                self._order_loads()

    def shadow(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """
        Run one request whose answer reaches no consumer: no alert, no other engine tried (N-10).

        :param inputs: arrays by canonical name, only read.
        :return: read-only arrays by canonical name, valid until the chain's next call.
        :raises InferenceError: nothing is loaded, or the engine fails the request or hangs.
        """
        with self._turn:
            engine = self._engine
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

        :return: whether anything was freed. What stands by is loaded again after a pause.
        """
        with self._turn:
            return self._make_room(lack_bytes)

    def prove(self) -> None:
        """
        Prove the serving rung with one inference, and walk on where that fails (N-1 activate).

        :raises ChainExhaustedError: no rung is usable.
        """
        with self._turn:
            if self._engine is None:
                self._restart(at_once=True)
                return
            try:
                self._proof.check(self._engine.host, self._engine.hang_s)
            except Exception as error:
                started_ns = self._monotonic_ns()
                failed = self._fail_serving(error)
                # It may have died by chance: loaded afresh it is proven again, after those that come next.
                self._replace_serving((*self._after(failed), failed))
                self._record_switch(failed.name, str(error), started_ns, frames_affected=0)

    def infer(self, inputs: Mapping[str, NDArray]) -> Answer:
        """
        Answer one request, moving to the next engine as often as it takes (F-2).

        What can wait until the answer has been handed on is left to :meth:`maintain`. Where all engines are late, the
        request waits for another to be loaded, which has as long as ``load_timeout_s``, and gets that one's answer.

        :param inputs: arrays by canonical name, only read; the same frame goes to every engine tried.
        :raises InferenceError: every usable rung failed this request, and one that passes its proof all the
            same goes on serving.
        :raises ChainExhaustedError: every rung failed, or all had failed and the pause before the
            next attempt is not over.
        """
        with self._turn:
            if self._engine is None:
                self._take_loads()
                self._restart()
            started_ns = self._monotonic_ns()
            self._request += 1
            take_back: Callable[[], None] | None = None
            attempts: list[_Attempt] = []
            loaded_afresh: dict[Rung, int] = {}
            first = self._engine
            while True:
                engine = self._engine
                assert engine is not None
                fresh = engine.load_began_ns > started_ns
                try:
                    outputs = self._ask(engine, inputs, last=fresh)
                except _LateError as late:
                    _log.error('%s', late)
                    take_back = take_back or self._blame_snapshot()
                    attempts.append(_Attempt(engine, _process(engine), fresh, _without_frames(late)))
                    if fresh and not self._has_answered(self._standby):
                        # It was proven while the others did not answer: the request is what it hangs on.
                        self._drop_serving()
                        self._replace_serving((engine.rung, *self._after(engine.rung)))
                        take_back()
                        self._blame_request(attempts, started_ns)
                    self._late.append(engine)
                    self._engine = None
                    self._serve_standby()
                    if (answer := self._answer_at_last()) is not None:
                        outputs = answer
                        break
                    continue
                except Exception as error:
                    take_back = take_back or self._blame_snapshot()
                    rung = engine.rung
                    others, again = self._after(rung), any(attempt.engine.rung == rung for attempt in attempts)
                    attempts.append(_Attempt(engine, _process(engine), fresh, error))
                    if self._closing:
                        raise
                    # A proof is written where the frame may have been.
                    in_place = engine.host.request_arrays
                    inputs = {
                        name: array.copy() if array is in_place.get(name) else array for name, array in inputs.items()
                    }
                    if (again or not others) and engine.host.alive and self._passes_proof(engine):
                        take_back()
                        self._blame_request(attempts, started_ns)
                    _log.error('%s failed a frame: %s', rung.name, error)
                    self._fail_serving(error)
                    # Where no other is usable, the rung itself may be, loaded afresh.
                    # Dead by chance once more, or by this very request: so often and no further.
                    died = isinstance(error, WorkerDiedError)
                    spent = again and loaded_afresh.get(rung, 0) >= (_DEATHS if died else 1)
                    if spent and died and not others:
                        self._replace_serving((rung,))
                        if any(attempt.engine.rung == self._serving() for attempt in attempts):
                            # Afresh it passes its proof once more: the request is what it does not survive.
                            take_back()
                            self._blame_request(attempts, started_ns)
                        continue
                    if self._replace_serving(others if spent else (*others, rung)):
                        serving = self._serving()
                        loaded_afresh[serving] = loaded_afresh.get(serving, 0) + 1
                    continue
                break
            if self._engine is not first:
                self._record_first_switch(attempts, started_ns)
            self._backoff.reset(_RESTART)
            self._announce()
            self._shadow(inputs, outputs)
            return self._answer(outputs)

    def maintain(self) -> None:
        """
        Look after the engines, and try an exhausted chain again when its pause is over.

        To be called after each :meth:`infer`, once its answer has been handed on, and several times a second
        while no frame comes.
        """
        with self._turn:
            if self._closing:
                # What is ended now is ended on purpose.
                return
            self._between_frames()
            engine = self._engine
            if engine is not None and not engine.host.alive:
                error = InferenceError(f'{engine.rung.name} died while no frame came.')
                _log.error('%s', error)
                started_ns = self._monotonic_ns()
                failed = self._fail_serving(error)
                try:
                    self._replace_serving((*self._after(failed), failed))
                    self._record_switch(failed.name, str(error), started_ns, frames_affected=0)
                except ChainExhaustedError as exhausted:
                    _log.error('%s', exhausted)
            elif self._status.state is ChainState.EXHAUSTED and self._may_restart():
                try:
                    self._restart()
                except ChainExhaustedError as error:
                    _log.error('%s', error)
            self._order_loads()

    def release(self, timeout_s: float = 2.0) -> None:
        """
        Free every engine and forget every failure; safe to repeat.

        :param timeout_s: seconds to wait for a request that is still running; a worker is killed in half of them.
        :raises InferenceError: the request still runs; its engine stays loaded until it returns.
        """
        if not self._turn.acquire(timeout=timeout_s / 2):
            self._closing = True
            if (engine := self._engine) is not None:
                engine.host.kill()
            self._loader.kill_all()
            if not self._turn.acquire(timeout=timeout_s / 2):
                raise InferenceError(
                    f'{self._status.active.name if self._status.active else "the chain"} still runs a request '
                    f'after {timeout_s:.1f} s; its engine cannot be freed.',
                    remedy='Restart the node to get its memory back.',
                )
        try:
            self._closing = True
            self._drop_all()
            self._failures.clear()
            self._loader.forget_refusals()
            self._backoff.clear()
            self._proof.forget()
            self._gpu.restore()
            self._set_status(state=ChainState.UNLOADED, active=None, facts=None, standby=None, switches=0)
        finally:
            self._closing = False
            self._turn.release()

    def _blame_snapshot(self) -> Callable[[], None]:
        """Return what takes back all that engines are blamed for from now on: the request may prove to be at fault."""
        restore_gpu, restore_pauses, gpu_hung = self._gpu.snapshot(), self._backoff.snapshot(), self._gpu_hangs()

        def take_back() -> None:
            restore_gpu()
            restore_pauses()
            if self._gpu_hangs() and not gpu_hung:
                # Whatever the request is, the driver holds what it has.
                self._gpu.mark_lost('a worker cannot be ended')

        return take_back

    # --- one request ------------------------------------------------------------------------------

    def _ask(self, engine: RungEngine, inputs: Mapping[str, NDArray], *, last: bool) -> dict[str, NDArray]:
        """
        Return the answer of ``engine``; where it is late, wait while another one is being loaded (F-4).

        :param last: no other engine is to be tried: it has all of its hang limit.
        :raises _LateError: it is late and another engine stands by, or it was the last and has hung.
        :raises InferenceError: it failed, or has hung for so long that loading it afresh is the better bet.
        """
        engine.began_ns, engine.request, engine.late_answer = self._monotonic_ns(), self._request, None
        engine.host.begin(inputs)
        outputs = engine.host.poll(engine.deadline_s)
        while outputs is None:
            if self._closing:
                raise InferenceError(f'{engine.rung.name} still runs a request while the chain is released.')
            self._look_after_others()
            hung = self._age_s(engine) > engine.hang_s
            if (hung if last else self._standby is not None) or self._has_answered(self._standby):
                limit_s = engine.hang_s if hung else engine.deadline_s
                raise _LateError(f'{engine.rung.name} did not answer within {limit_s * 1e3:.0f} ms.')
            if self._age_s(engine) > _GIVEN_UP * engine.hang_s:
                # Nothing could be loaded beside it in all that time; its memory may be what is missing.
                raise InferenceError(f'{engine.rung.name} has not answered for {self._age_s(engine):.1f} s.')
            if self._standby is None and ((self._config.hot_standby and not self._late) or hung):
                self._order_standby(hurry=True)
            outputs = engine.host.poll(_LOOK_S)
        return outputs

    def _answer_at_last(self) -> dict[str, NDArray] | None:
        """Return what the engine that serves again has meanwhile answered to this very request, None where nothing."""
        engine = self._engine
        if engine is None or not self._has_answered(engine):
            return None
        outputs, engine.late_answer = engine.late_answer, None
        return outputs

    def _has_answered(self, engine: RungEngine | None) -> bool:
        """Return whether an engine that was late has meanwhile answered this very request."""
        return engine is not None and engine.late_answer is not None and engine.request == self._request

    def _age_s(self, engine: RungEngine) -> float:
        return (self._monotonic_ns() - engine.began_ns) / 1e9

    # --- walking the chain ------------------------------------------------------------------------

    def _replace_serving(self, candidates: tuple[Rung, ...]) -> bool:
        """Have the standby serve, or the first of ``candidates`` that works; return whether one had to be loaded."""
        self._take_loads()
        if self._standby is not None and self._standby.host.alive and self._may_serve(self._standby.rung):
            self._serve_standby()
            return False
        self._walk(candidates)
        return True

    def _serve_standby(self) -> None:
        engine, self._standby = self._standby, None
        assert engine is not None
        self._serve(engine)

    def _walk(self, candidates: tuple[Rung, ...]) -> None:
        """Load and prove the first of ``candidates`` that works, else take what was to take over, or raise."""
        self._drop_serving()
        end_ns = self._monotonic_ns() + int(self._config.configure_budget_s * 1e9)
        for position, rung in enumerate(candidates):
            if not self._may_serve(rung) or self._loader.refused(rung):
                continue
            if self._closing:
                break
            last = position == len(candidates) - 1
            try:
                engine = self._load_within(rung, None if last else (end_ns - self._monotonic_ns()) / 1e9)
            except Exception as error:
                self._reject(rung, error)
                continue
            if engine is not None:
                self._serve(engine)
                return
            _log.warning('%s is still loading; the next rung serves meanwhile.', rung.name)
        if self._serve_candidate():
            return
        self._backoff.begin(_RESTART, self._config.restart_backoff_s)
        self._set_status(state=ChainState.EXHAUSTED, active=None, facts=None)
        exhausted = self._exhausted()
        if not self._closing:
            self._emit('c7.chain_exhausted', model_name=self._bundle.name, reason=str(exhausted))
        raise exhausted

    def _serve_candidate(self) -> bool:
        """Have the engine that was to take over serve at once where nothing else does and it can be asked."""
        engine = self._candidate
        if engine is None or self._closing:
            return False
        self._hear_candidate(engine)
        if self._candidate is None or engine.expected is not None or not engine.host.alive:
            self._drop_candidate()
            return False
        self._take_over(engine)
        return True

    def _take_over(self, engine: RungEngine) -> None:
        """Have the candidate serve; where the GPU was lost, its proofs have shown that it is back."""
        self._candidate = None
        self._backoff.succeed(('promotion', engine.rung))
        if not self._may_serve(engine.rung):
            _log.warning('%s works: the GPU is back.', engine.rung.name)
            self._gpu.restore()
        self._serve(engine)

    def _load_within(self, rung: Rung, budget_s: float | None) -> RungEngine | None:
        """Load ``rung``; None where it goes on loading in the background."""
        load = self._loader.find(rung)
        if load is None:
            if budget_s is None or not self._isolated or self._config.build_on_configure:
                return self._load_here(rung)
            load = self._loader.start(rung)
        if not load.done.wait(None if budget_s is None else max(0.0, budget_s)):
            return None
        self._loader.take(load)
        if isinstance(load.error, GpuMemoryError):
            return self._load_here(rung)
        if load.error is not None:
            raise load.error
        return load.engine

    def _load_here(self, rung: Rung) -> RungEngine:
        with self._loader.listed(rung) as load:
            try:
                return self._loader.load(load)
            except GpuMemoryError as error:
                if not self._make_room(error.lack_bytes, load) and not self._make_room_beside(error.lack_bytes):
                    raise
                return self._loader.load(load)

    def _make_room(self, lack_bytes: int, but: EngineLoad | None = None) -> bool:
        """Free the candidate, the standby and what is being loaded, as far as it takes; False where it is no use."""
        others = [engine for engine in (self._candidate, self._standby) if engine is not None]
        loads = [load for load in self._loader.loads if load is not but and load.rung.on_gpu]
        if not loads and sum(engine.gpu_bytes for engine in others) < lack_bytes:
            return False
        for engine in others:
            if lack_bytes <= 0:
                return True
            if taken := engine.gpu_bytes:
                _log.warning('%s gives way: another engine lacks GPU memory.', engine.rung.name)
                self._free(engine)
                lack_bytes -= taken
        if lack_bytes > 0:
            self._loader.cancel(loads)
            for load in loads:
                self._postpone_load(load.rung)
        return True

    def _make_room_beside(self, lack_bytes: int) -> bool:
        return self._beside is not None and self._beside.make_room(lack_bytes)

    def _free(self, engine: RungEngine) -> None:
        """Free an engine that does not serve, and do not load it again at once."""
        if engine is self._standby:
            self._drop_standby()
            self._postpone('standby', engine.rung)
        else:
            self._drop_candidate()
            self._postpone('promotion', engine.rung)

    def _attempts(self, rung: Rung) -> int:
        """Return how often ``rung`` is loaded in a row while its workers die; there is nothing after the last one."""
        return _LAST_ATTEMPTS if rung == self._rungs[-1] else _ATTEMPTS

    def _serve(self, engine: RungEngine) -> None:
        self._engine = engine
        self._failures.pop(engine.rung.name, None)
        for note in engine.facts.notes:
            _log.info('%s: %s', engine.rung.name, note)
        _log.info('%s serves %s on %s.', engine.rung.name, self._bundle.name, engine.facts.active_provider)
        standby = self._standby
        self._set_status(
            state=ChainState.READY,
            active=engine.rung,
            facts=engine.facts,
            standby=standby.rung if standby is not None else None,
        )
        candidate = self._candidate
        if candidate is not None and not self._is_better(candidate.rung):
            if candidate.expected is None:
                self._candidate = None
                self._stand_by(candidate)
            else:
                self._drop_candidate()

    def _may_serve(self, rung: Rung) -> bool:
        return not self._gpu.lost or not rung.on_gpu or self._flies_gpu_only()

    def _may_take_over(self, rung: Rung) -> bool:
        """Return whether ``rung`` may be proven beside what serves: on a lost GPU beside the CPU, unless it hangs."""
        cpu_serves = self._engine is not None and not self._engine.rung.on_gpu
        return self._may_serve(rung) or (cpu_serves and not self._gpu_hangs())

    def _gpu_hangs(self) -> bool:
        return any(rung.on_gpu for rung in self._retiring.stuck())

    def _flies_gpu_only(self) -> bool:
        return all(rung.on_gpu for rung in self._rungs)

    def _after(self, failed: Rung) -> tuple[Rung, ...]:
        return self._rungs[self._rungs.index(failed) + 1 :]

    # --- the other engines ------------------------------------------------------------------------

    def _look_after_others(self) -> None:
        """Take what came of loads, late answers and shadowed frames; never waits."""
        self._take_loads()
        for rung in self._retiring.look():
            self._lose_gpu(rung, 'a worker cannot be ended')
        for engine in list(self._late):
            self._look_after_late(engine)
        if self._standby is not None:
            self._look_after_standby(self._standby)
        if self._candidate is not None:
            self._hear_candidate(self._candidate)

    def _look_after_standby(self, engine: RungEngine) -> None:
        """Drop one that could not answer if it were asked."""
        if not engine.host.alive:
            _log.error('%s died standing by.', engine.rung.name)
        elif not engine.host.responds(engine.hang_s):
            _log.error('%s, standing by, gives no sign of life and is killed.', engine.rung.name)
            self._note_fault(engine.rung)
        elif self._may_serve(engine.rung):
            return
        self._drop_standby()

    def _look_after_late(self, engine: RungEngine) -> None:
        try:
            engine.late_answer = engine.host.poll(0.0)
        except Exception as error:
            _log.error('%s, which was late, failed: %s', engine.rung.name, error)
            self._late.remove(engine)
            self._note_fault(engine.rung)
            self._retiring.add(engine.rung, engine.host)
            return
        if engine.late_answer is not None:
            self._late.remove(engine)
            _log.warning('%s answered after %.0f ms.', engine.rung.name, self._age_s(engine) * 1e3)
            self._stand_by(engine)
        elif self._age_s(engine) > engine.hang_s:
            self._late.remove(engine)
            _log.error('%s has not answered for %.1f s and is killed.', engine.rung.name, self._age_s(engine))
            self._note_fault(engine.rung)
            self._retiring.add(engine.rung, engine.host)

    def _hear_candidate(self, engine: RungEngine) -> None:
        """Compare what the engine that is to take over made of a live frame, where it has answered."""
        if engine.expected is None:
            return
        try:
            outputs = engine.host.poll(0.0)
            if outputs is None and self._age_s(engine) > engine.hang_s:
                raise InferenceError(f'it did not answer within {engine.hang_s:.1f} s.')
            if outputs is None:
                return
            if problems := self._bundle.compare(outputs, engine.expected, specs=engine.host.outputs):
                raise InferenceError(
                    f'it disagrees on a live frame: {" ".join(problems)}',
                    remedy='' if self._bundle.rules else 'Where that is close enough, give rules in a model bundle.',
                )
        except Exception as error:
            self._drop_candidate(str(error))
            return
        engine.expected = None
        engine.agreements += 1

    def _between_frames(self) -> None:
        """Change what serves where no frame is under way: away from a lost GPU, or to a better engine (F-6)."""
        self._look_after_others()
        if self._candidate is not None and self._candidate.agreements >= _SHADOWED_FRAMES:
            self._promote(self._candidate)
        self._leave_lost_gpu()

    def _leave_lost_gpu(self) -> None:
        """Have the CPU serve where the GPU was lost by another engine than the one that serves (F-2)."""
        engine, standby = self._engine, self._standby
        if engine is None or self._may_serve(engine.rung):
            return
        if standby is None:
            # It answers meanwhile, so that no frame waits for the load.
            self._order_standby()
            return
        started_ns = self._monotonic_ns()
        self._drop_serving()
        self._serve_standby()
        self._record_switch(engine.rung.name, 'the GPU is lost', started_ns, frames_affected=0)

    def _promote(self, engine: RungEngine) -> None:
        """Have a better rung serve from the next frame on; the one that served stands by."""
        started_ns = self._monotonic_ns()
        before, self._engine = self._engine, None
        assert before is not None
        self._take_over(engine)
        self._record_switch(before.rung.name, f'{engine.rung.name} is usable again', started_ns, frames_affected=0)
        self._drop_standby()
        self._stand_by(before)

    def _shadow(self, inputs: Mapping[str, NDArray], outputs: Mapping[str, NDArray]) -> None:
        """Give a better rung the frame that was just answered, to be compared later."""
        engine = self._candidate
        if engine is None:
            return
        self._hear_candidate(engine)
        if self._candidate is None or engine.expected is not None or engine.agreements >= _SHADOWED_FRAMES:
            # One that runs a request when it takes over could not be asked.
            return
        try:
            engine.began_ns = self._monotonic_ns()
            engine.host.begin(inputs)
        except Exception as error:
            self._drop_candidate(str(error))
            return
        engine.expected = {name: array.copy() for name, array in outputs.items()}

    def _drop_candidate(self, fault: str | None = None) -> None:
        """Free the engine that was to take over, and say why it does not where it is at fault."""
        engine, self._candidate = self._candidate, None
        if engine is None:
            return
        if fault is not None:
            _log.warning('%s does not take over yet: %s', engine.rung.name, fault)
            self._emit('c7.promotion_delayed', rung=engine.rung.name, reason=fault)
            self._postpone('promotion', engine.rung)
        self._retiring.add(engine.rung, engine.host)

    def _stand_by(self, engine: RungEngine, *, ordered: bool = False) -> None:
        """Have ``engine`` stand by where one is wanted; an ordered one takes the place of one less preferred."""
        standby, wanted = self._standby, ordered or self._config.hot_standby
        if standby is not None and ordered and self._preference(engine.rung) < self._preference(standby.rung):
            self._retiring.add(standby.rung, standby.host)
            standby = None
        if standby is None and wanted and self._may_serve(engine.rung):
            self._standby = engine
            self._set_status(standby=engine.rung)
        else:
            self._retiring.add(engine.rung, engine.host)

    def _drop_standby(self) -> None:
        engine, self._standby = self._standby, None
        if engine is not None:
            self._retiring.add(engine.rung, engine.host)
            self._set_status(standby=None)

    def _preference(self, rung: Rung) -> tuple[bool, int]:
        """Order rungs by which should stand by: one worker more of the same where no other is usable (F-3)."""
        return rung == self._status.active, self._rungs.index(rung)

    # --- loads in the background ------------------------------------------------------------------

    def _order_loads(self) -> None:
        """Begin what is missing: an engine that stands by (F-3), then better ones to serve (F-6) and to stand by."""
        engine = self._engine
        if not self._isolated or engine is None or self._closing:
            return
        if self._config.hot_standby and self._standby is None and not self._late:
            self._order_standby()
        if self._loader.loads:
            return
        wanted = list(self._rungs[: self._rungs.index(engine.rung)]) if self._candidate is None else []
        if self._standby is not None:
            standing_by = self._preference(self._standby.rung)
            wanted += [rung for rung in self._after(engine.rung) if self._preference(rung) < standing_by]
        for rung in wanted:
            if not self._loader.loads and self._may_try(rung) and self._due('promotion', rung):
                self._loader.start(rung)

    def _order_standby(self, *, hurry: bool = False) -> None:
        """
        Begin to load the most preferred engine that may stand by, unless one is being loaded.

        :param hurry: a frame waits for it: where each has failed and pauses, the one whose pause ends first is loaded,
            unless that was done so shortly before that the frames may be late because of it.
        """
        engine, loads = self._engine, self._loader.loads
        if not self._isolated or engine is None or any(not self._is_better(load.rung) for load in loads):
            return
        # Two engines of unknown size that are loaded at once could take the memory of the one that serves.
        gpu_taken = any(load.rung.on_gpu for load in loads)
        rungs = (*self._after(engine.rung), engine.rung)
        wanted = [rung for rung in rungs if self._may_try(rung) and not (gpu_taken and rung.on_gpu)]
        rung = min(wanted, key=self._standby_order, default=None)
        if rung is None:
            return
        if not self._due('standby', rung):
            if not hurry or not self._backoff.may_begin(_HURRIED):
                return
            self._backoff.begin(_HURRIED, self._config.restart_backoff_s)
        self._loader.start(rung)

    def _standby_order(self, rung: Rung) -> tuple[float, bool, int]:
        return (self._backoff.left_s(('standby', rung)), *self._preference(rung))

    def _may_try(self, rung: Rung) -> bool:
        """Return whether loading ``rung`` beside the engine that serves may come to something."""
        allowed = self._may_take_over(rung) if self._is_better(rung) else self._may_serve(rung)
        return allowed and not self._loader.refused(rung)

    def _take_loads(self) -> None:
        for load in [load for load in self._loader.loads if load.done.is_set()]:
            if load not in self._loader.loads:
                # It has given way to one before it.
                continue
            self._loader.take(load)
            better = self._is_better(load.rung)
            if load.engine is not None and better and self._may_take_over(load.rung):
                self._drop_candidate()
                self._candidate = load.engine
            elif load.engine is not None:
                self._backoff.reset(('standby', load.rung))
                self._backoff.reset(('promotion', load.rung))
                self._backoff.reset(_HURRIED)
                self._stand_by(load.engine, ordered=True)
            elif load.error is not None:
                if isinstance(load.error, GpuMemoryError):
                    self._record_lack(load.rung, load.error)
                    if better and self._make_room(load.error.lack_bytes):
                        # A better engine is worth more than one that stands by; with nothing left to free, it waits.
                        self._loader.start(load.rung)
                        continue
                self._postpone_load(load.rung)
                if better:
                    self._failures[load.rung.name] = _without_frames(load.error)
                _log.info('%s could not be loaded beside: %s', load.rung.name, load.error)

    def _is_better(self, rung: Rung) -> bool:
        serving = self._engine
        return serving is not None and self._rungs.index(rung) < self._rungs.index(serving.rung)

    def _due(self, purpose: str, rung: Rung) -> bool:
        if (purpose, rung) not in self._backoff.ends() and purpose == 'promotion':
            # It has just failed: its first attempt is one pause away.
            self._postpone(purpose, rung)
        return self._backoff.may_begin((purpose, rung))

    def _postpone_load(self, rung: Rung) -> None:
        self._postpone('standby' if self._standby is None and not self._is_better(rung) else 'promotion', rung)

    def _postpone(self, purpose: str, rung: Rung) -> None:
        promotion = purpose == 'promotion'
        bounds_s = self._config.promotion_backoff_s if promotion else self._config.restart_backoff_s
        self._backoff.begin((purpose, rung), bounds_s)

    # --- failures ---------------------------------------------------------------------------------

    def _passes_proof(self, engine: RungEngine) -> bool:
        try:
            self._proof.check(engine.host, engine.hang_s)
        except Exception as error:
            _log.error('%s fails its proof: %s', engine.rung.name, error)
            return False
        return True

    def _blame_request(self, attempts: Sequence[_Attempt], started_ns: int) -> NoReturn:
        """Raise what the usable rungs made of a request, while one that passes its proof goes on serving."""
        serving = self._serving()
        if attempts[0].engine is not self._engine:
            self._record_first_switch(attempts, started_ns)
        self._backoff.reset(_RESTART)
        stopped = any(_STOPPED in attempt.process for attempt in attempts)
        raise InferenceError(
            f'no runtime can answer this request, while {serving.name} still passes its self-test: '
            f'{join_reasons(map(self._describe, attempts))}.',
            remedy='A worker process is stopped by a signal or a debugger: resume it with kill -CONT PID.'
            if stopped
            else 'Run the model on this input outside of this package, and correct it.',
        ) from attempts[-1].error

    def _describe(self, attempt: _Attempt) -> tuple[str, str]:
        """Return which engine was asked, and what came of it up to now."""
        engine, reason = attempt.engine, str(attempt.error)
        if isinstance(attempt.error, _LateError):
            reason = f'no answer for {self._age_s(engine):.1f} s{"" if engine.host.alive else ", killed"}'
        loaded = ', loaded for this request' if attempt.fresh else ''
        return f'{engine.rung.name}{attempt.process}{loaded}', reason

    def _record_first_switch(self, attempts: Sequence[_Attempt], started_ns: int) -> None:
        first = attempts[0]
        self._record_switch(first.engine.rung.name, str(first.error), started_ns, frames_affected=1)

    def _restart(self, *, at_once: bool = False) -> None:
        before = self._status
        if at_once:
            self._loader.forget_refusals()
        if before.state is ChainState.EXHAUSTED and not at_once and not self._may_restart():
            raise self._exhausted()
        if before.state is ChainState.EXHAUSTED and not self._gpu_hangs():
            # Nothing serves, so nothing is risked by trying what was given up for the CPU's sake.
            self._gpu.restore()
        self._replace_serving(self._rungs)
        if before.state is ChainState.EXHAUSTED:
            self._record_switch('none', 'the chain was exhausted', before.since_ns, frames_affected=0)

    def _may_restart(self) -> bool:
        """Return whether an exhausted chain has an engine that was loaded meanwhile, or one to try after its pause."""
        if self._standby is not None:
            return True
        return not all(map(self._loader.refused, self._rungs)) and self._backoff.may_begin(_RESTART)

    def _fail_serving(self, error: Exception) -> Rung:
        rung = self._serving()
        _log_unexpected(rung, error)
        self._drop_serving()
        self._failures[rung.name] = _without_frames(error)
        self._note_fault(rung)
        if self._may_serve(rung):
            self._postpone('promotion', rung)
        return rung

    def _note_fault(self, rung: Rung) -> None:
        if rung.on_gpu and self._gpu.note_fault(rung):
            self._leave_gpu_alone()

    def _lose_gpu(self, rung: Rung, why: str) -> None:
        if rung.on_gpu:
            self._gpu.mark_lost(why)
            self._leave_gpu_alone()

    def _leave_gpu_alone(self) -> None:
        """Have no engine on the GPU that was lost take over, for a pause."""
        if self._candidate is not None and not self._may_serve(self._candidate.rung):
            self._drop_candidate()
        for each in self._rungs:
            if not self._may_serve(each):
                self._postpone('promotion', each)

    def _reject(self, rung: Rung, error: Exception) -> None:
        _log_unexpected(rung, error)
        self._failures[rung.name] = _without_frames(error)
        _log.warning('%s is out: %s', rung.name, error)
        if isinstance(error, GpuMemoryError):
            self._record_lack(rung, error)
        elif not isinstance(error, RuntimeUnavailableError) and not self._closing:
            self._emit('c7.engine_rejected', model_name=self._bundle.name, rung=rung.name, reason=str(error))

    def _record_lack(self, rung: Rung, error: GpuMemoryError) -> None:
        if not self._closing:
            self._emit(
                'c7.memory_refused',
                rung=rung.name,
                needed_bytes=error.needed_bytes,
                left_bytes=error.left_bytes,
                reason=error.message,
            )

    # --- what is told to others -------------------------------------------------------------------

    def _announce(self) -> None:
        """
        Emit the alerts that stand since this frame (AC-5, Risk-2).

        One that stands already is not repeated by another rung of which it is true as well.
        """
        fresh = [kind for kind in self._status.alerts if kind not in self._announced]
        if not fresh:
            return
        self._announced |= frozenset(fresh)
        facts = self._status.facts
        assert facts is not None
        reason = join_reasons(self._status.failures)
        for kind in fresh:
            _log.warning('%s: %s runs on %s, because %s', kind, self._bundle.name, facts.active_provider, reason)
            asked = {'requested_providers': list(facts.requested_providers)} if kind == 'c7.cpu_fallback' else {}
            self._emit(
                kind, model_name=self._bundle.name, active_provider=facts.active_provider, reason=reason, **asked
            )

    def _standing_alerts(self, rung: Rung, facts: EngineFacts) -> tuple[str, ...]:
        alerts = []
        if rung.strategy == ORT_LABEL and self._rungs[0].strategy != ORT_LABEL:
            alerts.append('c7.fallback_to_onnx_trt_ep')
        if facts.cpu_only:
            alerts.append('c7.cpu_fallback')
        return tuple(alerts)

    def _record_switch(self, before: str, reason: str, started_ns: int, *, frames_affected: int) -> None:
        # An engine that was late and answered at last has served all along, whoever was asked meanwhile.
        self._announced &= frozenset(self._status.alerts)
        self._set_status(switches=self._status.switches + 1)
        self._emit(
            'c7.runtime_switched',
            **{
                'from': before,
                'to': self._serving().name,
                'reason': reason,
                'gap_ms': round((self._monotonic_ns() - started_ns) / 1e6, 3),
                'frames_affected': frames_affected,
            },
        )

    def _answer(self, outputs: Mapping[str, NDArray]) -> Answer:
        status, engine = self._status, self._engine
        assert status.facts is not None and engine is not None
        return Answer(
            outputs=outputs,
            runtime_label=self._serving().strategy,
            active_provider=status.facts.active_provider,
            is_fallback=status.is_fallback,
            model_name=status.model_name,
            weights_digest=status.weights_digest,
            ran_ns=engine.host.ran_ns,
        )

    def _exhausted(self) -> ChainExhaustedError:
        return ChainExhaustedError(
            [(rung.name, self._failures[rung.name]) for rung in self._rungs if rung.name in self._failures],
            remedy=self._remedy(),
        )

    def _remedy(self) -> str:
        if self._config.ort_disallow_cpu_fallback:
            return 'Set ort_disallow_cpu_fallback to false to use the CPU meanwhile.'
        if all(isinstance(cause, RuntimeUnavailableError) for cause in self._failures.values()):
            return 'Install one of the runtimes, see requirements/.'
        return ''

    def _serving(self) -> Rung:
        assert self._status.active is not None
        return self._status.active

    def _drop_serving(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            self._retiring.add(engine.rung, engine.host)

    def _drop_all(self) -> None:
        self._drop_serving()
        others = [*self._late, *filter(None, (self._standby, self._candidate))]
        self._late, self._standby, self._candidate, self._announced = [], None, None, frozenset()
        for engine in others:
            self._retiring.add(engine.rung, engine.host)
        self._loader.cancel(self._loader.loads)
        self._retiring.wait()

    def _set_status(self, **changes: object) -> None:
        status = replace(
            self._status,
            since_ns=self._monotonic_ns(),
            failures=tuple(
                (rung.name, str(self._failures[rung.name])) for rung in self._rungs if rung.name in self._failures
            ),
            **changes,  # type: ignore[arg-type]
        )
        if 'active' in changes:
            status = replace(
                status,
                is_fallback=status.active is not None and status.active != self._rungs[0],
                alerts=self._standing_alerts(status.active, status.facts) if status.active and status.facts else (),
            )
        self._status = status
        self._on_change(self.status())


def _pid(engine: RungEngine | None) -> int | None:
    return getattr(engine.host, 'pid', None) if engine is not None else None


def _process(engine: RungEngine) -> str:
    """Name the worker of an engine, and say whether it is stopped: that, not the request, is why it is late."""
    if (pid := _pid(engine)) is None:
        return ''
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except OSError:
        state = ''
    return f' (pid {pid}{_STOPPED if state in ("T", "t") else ""})'


def _without_frames(error: ErrorT) -> ErrorT:
    """
    Have ``error`` and its causes hold on to no frame that they passed, and to no tensors there.

    It is kept for as long as it is true; and among those frames is one that holds it, a circle that lets hundreds of
    megabytes of dead workers' tensors pile up before the interpreter looks for it.
    """
    for link in error_and_causes(error):
        link.__traceback__ = None
    return error


def _log_unexpected(rung: Rung, error: Exception) -> None:
    if not isinstance(error, C7Error):
        _log.error('%s raised an unexpected error', rung.name, exc_info=error)
