"""Load the engines of a chain and self-test them, in the calling thread or in one of their own (F-1, F-5)."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import NO_THREADS_REMEDY, C7Error, EngineDeserializeError, WorkerDiedError
from gps_denied_c7.failover.file_watch import FileWatch
from gps_denied_c7.failover.rungs import Rung, RungHost
from gps_denied_c7.failover.self_test import Proof
from gps_denied_c7.runtimes.protocol import EngineFacts

__all__ = ['EngineLoad', 'EngineLoader', 'RungEngine']

_SHORTEST_LOAD_S = 2.0
_WARM_UPS = 4
_LATE = 3.0
_CANCEL_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class RungEngine:
    """
    One loaded engine of a rung, and the request that it runs.

    :param deadline_s: seconds after which a request counts as late, from its hand-over.
    :param hang_s: seconds after which it counts as hung.
    :param load_began_ns: when its load began, by the chain's clock.
    :param began_ns: hand-over of the request that it runs besides the serving engine's.
    :param expected: what the serving engine answered to that request, where the two are compared.
    :param agreements: live frames on which it gave the serving engine's answer.
    :param request: number of the chain's request that it was handed last.
    :param late_answer: its answer to that, where it was late.
    """

    rung: Rung
    host: RungHost
    facts: EngineFacts
    deadline_s: float
    hang_s: float
    load_began_ns: int = 0
    began_ns: int = 0
    expected: dict[str, NDArray] | None = None
    agreements: int = 0
    request: int = 0
    late_answer: dict[str, NDArray] | None = None

    @property
    def gpu_bytes(self) -> int:
        """GPU memory that its process takes, as far as that is known."""
        return self.facts.gpu_memory_bytes or 0

    def age_s(self, now_ns: int) -> float:
        """Return the seconds since the request that it runs was handed over."""
        return (now_ns - self.began_ns) / 1e9


@dataclass(eq=False, slots=True)
class EngineLoad:
    """
    One engine that is being loaded.

    :param done: set once ``engine`` or ``error`` is, by a load in a thread of its own.
    :param cancelled: it is not needed any more; its engine is freed.
    """

    rung: Rung
    done: threading.Event = field(default_factory=threading.Event)
    host: RungHost | None = None
    engine: RungEngine | None = None
    error: BaseException | None = None
    cancelled: bool = False

    def kill(self) -> None:
        """End the load where it has come to a host."""
        if self.host is not None:
            self.host.kill()


class EngineLoader:
    """
    Load and self-test engines; load an engine again where its worker dies meanwhile.

    The engine or something else may have killed the worker; only another attempt shows which.

    :param host_factory: makes the host of a rung; it may raise a C7Error instead. Called from several threads.
    :param proof: what an engine has to pass.
    :param attempts: how often a rung is loaded in a row while its workers die.
    :param given_up: returns whether no load is to be tried again.
    :param retire: frees a host that cannot be used; called from several threads.
    :param files: watches the files that engines are made of.
    :param monotonic_ns: steady clock in nanoseconds.
    """

    def __init__(
        self,
        config: C7InferenceConfig,
        host_factory: Callable[[Rung], RungHost],
        proof: Proof,
        *,
        attempts: Callable[[Rung], int],
        given_up: Callable[[], bool],
        retire: Callable[[Rung, RungHost], None],
        files: FileWatch,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._config = config
        self._isolated = config.isolation == 'process'
        self._host_factory = host_factory
        self._proof = proof
        self._attempts = attempts
        self._given_up = given_up
        self._retire = retire
        self._files = files
        self._refused: dict[Rung, Hashable] = {}
        self._refusing = threading.Lock()
        self._monotonic_ns = monotonic_ns
        self._longest_s: dict[Rung, float] = {}
        self.loads: list[EngineLoad] = []
        """Loads under way, and those that have ended until the chain takes their result; only to be read."""
        self.version = 0
        """Changes whenever ``loads`` does, and when refusals are forgotten."""

    def longest_s(self) -> tuple[tuple[str, float], ...]:
        """Return by rung the seconds of the longest load, from the start of its worker to its last self-test."""
        return tuple((rung.name, seconds) for rung, seconds in self._longest_s.copy().items())

    def refused(self, rung: Rung) -> bool:
        """Return whether loading ``rung`` would fail again until a file changes, and none has; never waits."""
        if rung not in self._refused:
            return False
        latest = self._files.latest()
        with self._refusing:
            # Its load may have ended well just now, in a thread of its own.
            if rung not in self._refused:
                return False
            if self._refused[rung] is None:
                # It failed before the first look had ended.
                self._refused[rung] = latest
            return latest in (None, self._refused[rung])

    def refused_by(self) -> Hashable:
        """Return the state of the files by which rungs are refused, None where none is; never waits."""
        return self._files.latest() if self._refused else None

    def forget_refusals(self) -> None:
        """Allow another attempt for every rung."""
        self._refused.clear()
        self.version += 1

    def start(self, rung: Rung) -> EngineLoad:
        """Begin to load an engine in a thread of its own."""
        load = self._add(rung)
        try:
            self._run_in_thread(load)
        except RuntimeError as error:
            load.error = EngineDeserializeError(f'{rung.name} cannot be loaded now: {error}.', remedy=NO_THREADS_REMEDY)
            load.done.set()
        return load

    @contextlib.contextmanager
    def listed(self, rung: Rung) -> Iterator[EngineLoad]:
        """List a load that the calling thread does by :meth:`load`, so that another thread can end it."""
        load = self._add(rung)
        try:
            yield load
        finally:
            self.take(load)

    def find(self, rung: Rung) -> EngineLoad | None:
        """Return a load of ``rung`` that was not taken, None where there is none."""
        return next((load for load in self.loads if load.rung == rung), None)

    def take(self, load: EngineLoad) -> None:
        """Forget a load whose result the caller uses."""
        self.loads.remove(load)
        self.version += 1

    def load(self, load: EngineLoad) -> RungEngine:
        """
        Load and self-test an engine in the calling thread.

        :raises C7Error: it cannot be loaded, or fails its self-test.
        :raises WorkerDiedError: its workers died, as often as it was tried.
        """
        # A rung that has been loaded before is known to need about so long; one that hangs meanwhile is not waited for.
        known_s = self._longest_s.get(load.rung)
        limit_s = self._config.load_timeout_s if known_s is None else max(_SHORTEST_LOAD_S, _LATE * known_s)
        attempts = self._attempts(load.rung)
        files = self._files.latest()
        while True:
            attempts -= 1
            limit_s = min(limit_s, self._config.load_timeout_s)
            watchdog = threading.Timer(limit_s, load.kill)
            watchdog.daemon = True
            try:
                if known_s is not None and self._isolated:
                    watchdog.start()
                engine = self._try(load)
                with self._refusing:
                    self._refused.pop(load.rung, None)
                return engine
            except WorkerDiedError as error:
                if self._given_up() or load.cancelled:
                    # It was ended on purpose.
                    _log.debug('the load of %s was cancelled: %s', load.rung.name, error)
                    raise
                _log.error('%s died while it was being loaded: %s', load.rung.name, error)
                if not attempts:
                    raise
                limit_s *= 2
            except C7Error as error:
                if error.lasting:
                    # Those of before the attempt: a change meanwhile is worth another one.
                    self._refused[load.rung] = self._files.seen if files is None else files
                raise
            finally:
                watchdog.cancel()

    def kill_all(self) -> None:
        """Begin to end all loads; from any thread."""
        for load in list(self.loads):
            load.kill()

    def cancel(self, loads: Sequence[EngineLoad]) -> None:
        """End loads whose engines are not needed any more."""
        self.loads = [load for load in self.loads if load not in loads]
        self.version += 1
        for load in loads:
            load.cancelled = True
            load.kill()
        end = time.monotonic() + _CANCEL_S
        for load in loads:
            # One that ends later frees its engine itself.
            if load.done.wait(max(0.0, end - time.monotonic())) and load.engine is not None:
                self._retire(load.rung, load.engine.host)

    def _add(self, rung: Rung) -> EngineLoad:
        load = EngineLoad(rung)
        self.loads.append(load)
        self.version += 1
        return load

    def _run_in_thread(self, load: EngineLoad) -> None:
        """Load in a thread of its own; tests with a clock of their own replace this. Raises RuntimeError for none."""
        threading.Thread(target=self._run, args=(load,), name='c7-load', daemon=True).start()

    def _run(self, load: EngineLoad) -> None:
        try:
            load.engine = self.load(load)
        except BaseException as error:
            load.error = error
        load.done.set()
        if load.cancelled and load.engine is not None:
            self._retire(load.rung, load.engine.host)

    def _try(self, load: EngineLoad) -> RungEngine:
        started_ns = self._monotonic_ns()
        host = load.host = self._host_factory(load.rung)
        try:
            facts = host.load()
            limit_s = self._config.load_timeout_s
            warm_up_s = self._proof.run(host, limit_s)
            if self._isolated:
                # Not the first, in which a worker and its node come to know where tensors lie.
                warm_up_s = max(self._proof.time(host, limit_s) for _ in range(_WARM_UPS))
        except BaseException:
            self._retire(load.rung, host)
            raise
        took_s = (self._monotonic_ns() - started_ns) / 1e9
        self._longest_s[load.rung] = max(self._longest_s.get(load.rung, 0.0), took_s)
        deadline_s = max(self._config.inference_deadline_ms / 1e3, _LATE * warm_up_s)
        hang_s = max(self._config.hang_timeout_ms / 1e3, _LATE * deadline_s)
        return RungEngine(load.rung, host, facts, deadline_s, hang_s, started_ns)
