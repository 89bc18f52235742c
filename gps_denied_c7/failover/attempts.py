"""One request of a chain: which engines were asked for its answer, and the result of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from gps_denied_c7.errors import InferenceError, WorkerDiedError, error_and_causes, join_reasons
from gps_denied_c7.failover.loader import RungEngine
from gps_denied_c7.failover.policy import Attempted, Outcome
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.failover.status import Transaction

__all__ = ['LateError', 'Request', 'pid_of', 'without_frames']

_STOPPED = ', stopped'

ErrorT = TypeVar('ErrorT', bound=BaseException)


class LateError(InferenceError):
    """The serving engine has not answered yet, and another one is there, or it was the last to be tried."""


class _Attempt(NamedTuple):
    """
    Hold the result of one engine that was asked.

    :param process: its worker, and whether that was stopped then.
    :param fresh: its load began after the request did.
    """

    engine: RungEngine
    process: str
    fresh: bool
    error: Exception


class Request:
    """
    Hold what a request has cost up to now.

    :param number: of the request, counted by the chain.
    :param switch: the transaction that it is.
    """

    __slots__ = ('_attempts', '_reloads', 'number', 'started_ns', 'switch', 'take_back')

    def __init__(self, number: int, started_ns: int, switch: Transaction) -> None:
        self.number = number
        self.started_ns = started_ns
        self.switch = switch
        self.take_back: Callable[[], None] | None = None
        """Reverts the blame of engines since the first attempt failed; None before."""
        self._attempts: list[_Attempt] = []
        self._reloads: dict[Rung, int] = {}

    def fresh(self, engine: RungEngine) -> bool:
        """Return whether an engine was loaded for this request."""
        return engine.load_began_ns > self.started_ns

    def answered_by(self, engine: RungEngine | None) -> bool:
        """Return whether an engine that was late has meanwhile answered this very request."""
        return engine is not None and engine.late_answer is not None and engine.request == self.number

    def note(self, engine: RungEngine, error: Exception, *, standby: RungEngine | None) -> Attempted:
        """Note an attempt that came to nothing; return what the policy has to know of it."""
        rung, late = engine.rung, isinstance(error, LateError)
        died = isinstance(error, WorkerDiedError)
        attempted = Attempted(
            rung,
            Outcome.LATE if late else Outcome.DIED if died else Outcome.FAILED,
            fresh=self.fresh(engine),
            again=self.asked(rung),
            reloads=self._reloads.get(rung, 0),
            alive=late or engine.host.alive,
            standby_answered=self.answered_by(standby),
        )
        if late:
            without_frames(error)
        self._attempts.append(_Attempt(engine, _process(engine), attempted.fresh, error))
        self.switch.because(rung.name, str(error))
        return attempted

    def note_reload(self, rung: Rung) -> None:
        """Note that ``rung`` was loaded for this request."""
        self._reloads[rung] = self._reloads.get(rung, 0) + 1

    def asked(self, rung: Rung | None) -> bool:
        """Return whether an engine of ``rung`` came to nothing."""
        return any(attempt.engine.rung == rung for attempt in self._attempts)

    def error(self, serving: Rung, now_ns: int) -> InferenceError:
        """Return what the usable rungs made of this request, while ``serving``, which passes its self-test, goes on."""
        stopped = any(_STOPPED in attempt.process for attempt in self._attempts)
        error = InferenceError(
            f'no runtime can answer this request, while {serving.name} still passes its self-test: '
            f'{join_reasons(_describe(attempt, now_ns) for attempt in self._attempts)}.',
            remedy='A worker process is stopped by a signal or a debugger: resume it with kill -CONT PID.'
            if stopped
            else 'Run the model on this input outside of this package, and correct it.',
        )
        error.__cause__ = self._attempts[-1].error
        return error


def _describe(attempt: _Attempt, now_ns: int) -> tuple[str, str]:
    """Return which engine was asked, and its result up to now."""
    engine, reason = attempt.engine, str(attempt.error)
    if isinstance(attempt.error, LateError):
        reason = f'no answer for {engine.age_s(now_ns):.1f} s{"" if engine.host.alive else ", killed"}'
    loaded = ', loaded for this request' if attempt.fresh else ''
    return f'{engine.rung.name}{attempt.process}{loaded}', reason


def pid_of(engine: RungEngine | None) -> int | None:
    """Return the process of an engine, None where it lives in this one."""
    return getattr(engine.host, 'pid', None) if engine is not None else None


def _process(engine: RungEngine) -> str:
    """Name the worker of an engine, and say whether it is stopped: that, not the request, is why it is late."""
    if (pid := pid_of(engine)) is None:
        return ''
    try:
        state = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]
    except OSError:
        state = ''
    return f' (pid {pid}{_STOPPED if state in ("T", "t") else ""})'


def without_frames(error: ErrorT) -> ErrorT:
    """
    Have ``error`` and its causes hold on to no frame that they passed, and to no tensors there.

    It is kept for as long as it is true; and among those frames is one that holds it, a circle that lets hundreds of
    megabytes of dead workers' tensors pile up before the interpreter looks for it.
    """
    for link in error_and_causes(error):
        link.__traceback__ = None
    return error
