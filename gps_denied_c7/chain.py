"""The runtime chain: which rung serves, why, and since when (F-2, F-7, F-8)."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.bundle import ModelBundle
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import (
    C7Error,
    ChainExhaustedError,
    InferenceError,
    RuntimeUnavailableError,
    join_reasons,
)
from gps_denied_c7.runtime import EngineFacts, ProviderSet
from gps_denied_c7.tensors import TensorSpec

__all__ = ['Answer', 'ChainState', 'ChainStatus', 'Rung', 'RungHost', 'RuntimeChain', 'build_rungs']

ORT_LABEL = 'onnx_trt_ep'

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the chain: a strategy on a set of providers."""

    strategy: str
    providers: ProviderSet

    @property
    def name(self) -> str:
        """As ``onnx_trt_ep/cpu``."""
        return f'{self.strategy}/{self.providers.value}'


def build_rungs(config: C7InferenceConfig, bundle: ModelBundle) -> tuple[Rung, ...]:
    """
    Return the rungs in order of preference (F-2).

    Every GPU rung comes before the CPU, since a CPU session must not outrank another strategy's GPU.
    A bare ``.onnx``, whose tensors nobody has named, can be run by ONNX Runtime only.
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
    """

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Canonical inputs, known once loaded."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Canonical outputs, known once loaded."""
        ...

    def load(self) -> EngineFacts:
        """Load the engine and warm it up."""
        ...

    def infer(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request; outputs are valid until the next call."""
        ...

    def release(self) -> None:
        """Free everything; safe to repeat."""
        ...


class ChainState(str, Enum):
    """What the chain can do now."""

    UNLOADED = 'unloaded'
    READY = 'ready'
    EXHAUSTED = 'exhausted'


@dataclass(frozen=True, slots=True)
class ChainStatus:
    """
    Describe the chain at one moment.

    :param active: the rung that serves, None while unloaded or exhausted.
    :param facts: what that rung loaded.
    :param is_fallback: the serving rung is not the first of the chain.
    :param alerts: record kinds of the alerts that stand while this rung serves.
    :param failures: why each rung that was tried does not serve, in chain order.
    :param since_ns: steady clock since when, nanoseconds.
    :param switches: changes of the serving rung since the chain was loaded.
    :param gpu_lost: GPU rungs are not tried any more.
    """

    model_name: str
    weights_digest: str
    state: ChainState
    active: Rung | None = None
    facts: EngineFacts | None = None
    is_fallback: bool = False
    alerts: tuple[str, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    since_ns: int = 0
    switches: int = 0
    gpu_lost: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """
    Hold the outputs of one request and who made them.

    :param outputs: read-only arrays by canonical name, valid until the chain's next call.
    """

    outputs: Mapping[str, NDArray]
    runtime_label: str
    active_provider: str
    is_fallback: bool
    model_name: str
    weights_digest: str


class RuntimeChain:
    """
    Serve every request from the best rung that works, and say when that changes.

    Runtimes report facts; this class, which owns the rung that serves, emits the alerts (F-8).
    A request may be at fault instead of an engine: the last usable rung is kept where it fails one and still
    passes its proof, so that one image cannot silence all that follow it.
    :meth:`status` never blocks. The other methods take turns and may last as long as an engine
    takes to load.

    :param rungs: by preference, from :func:`build_rungs`.
    :param host_factory: makes the host of a rung; it may raise a C7Error instead.
    :param emit: takes ``(record kind, payload fields)``, as FdrRecorder.emit does.
    :param on_change: told the new status after every change of rung or state.
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
        self._rungs = build_rungs(config, bundle) if rungs is None else rungs
        self._host_factory = host_factory
        self._emit = emit
        self._on_change = on_change
        self._monotonic_ns = monotonic_ns
        self._turn = threading.RLock()
        self._host: RungHost | None = None
        self._announced = False
        self._failures: dict[str, BaseException] = {}
        self._golden: tuple[dict[str, NDArray], dict[str, NDArray]] | None = None
        self._gpu_faults: deque[tuple[int, Rung]] = deque(maxlen=8)
        self._retry_at_ns = 0
        self._backoff_s = 0.0
        self._status = ChainStatus(bundle.name, bundle.weights_digest, ChainState.UNLOADED)

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """The rungs by preference."""
        return self._rungs

    def status(self) -> ChainStatus:
        """Return the latest status without waiting for anything."""
        return self._status

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Canonical inputs: the bundle's, or what the engine of a bare model reports."""
        return self._bundle.inputs or (self._host.inputs if self._host else ())

    def load(self) -> None:
        """
        Load and prove the first usable rung (N-1 configure).

        :raises ChainExhaustedError: no rung is usable; nothing stays loaded.
        """
        with self._turn:
            self._walk(self._rungs)

    def prove(self) -> None:
        """
        Prove the serving rung with one inference, and walk on where that fails (N-1 activate).

        :raises ChainExhaustedError: no rung is usable.
        """
        with self._turn:
            if self._host is None:
                self._walk(self._rungs)
                return
            try:
                self._prove(self._host)
            except Exception as error:
                started_ns = self._monotonic_ns()
                failed = self._fail_serving(error)
                self._walk(self._after(failed))
                self._record_switch(failed.name, str(error), started_ns, frames_affected=0)

    def infer(self, inputs: Mapping[str, NDArray]) -> Answer:
        """
        Answer one request, moving to the next rung as often as it takes (F-2).

        :param inputs: arrays by canonical name, only read; the same frame goes to every rung tried.
        :raises InferenceError: every usable rung failed this request, and one that passes its proof all the
            same goes on serving.
        :raises ChainExhaustedError: every rung failed, or all had failed and the pause before the
            next attempt is not over.
        """
        with self._turn:
            if self._host is None:
                self._restart()
            started_ns = self._monotonic_ns()
            before = (tuple(self._gpu_faults), self._status.gpu_lost)
            failures: dict[Rung, Exception] = {}
            while True:
                host = self._host
                assert host is not None
                try:
                    outputs = host.infer(inputs)
                except Exception as error:
                    rung = self._serving()
                    others, again = self._after(rung), rung in failures
                    failures.setdefault(rung, error)
                    if (again or not others) and self._passes_proof(host):
                        self._restore_gpu(*before)
                        self._blame_request(failures, started_ns)
                    _log.error('%s failed a frame: %s', rung.name, error)
                    self._fail_serving(error)
                    # Where no other is usable, the rung itself may be, loaded afresh.
                    self._walk(others if again else (*others, rung))
                    continue
                if failures:
                    self._record_first_switch(failures, started_ns)
                self._backoff_s = 0.0
                self._announce()
                return self._answer(outputs)

    def maintain(self) -> None:
        """Try an exhausted chain again when its pause is over; to be called while no frame comes."""
        with self._turn:
            if self._status.state is ChainState.EXHAUSTED and self._monotonic_ns() >= self._retry_at_ns:
                try:
                    self._restart()
                except ChainExhaustedError as error:
                    _log.error('%s', error)

    def release(self, timeout_s: float = 2.0) -> None:
        """
        Free the serving engine and forget every failure; safe to repeat.

        :param timeout_s: seconds to wait for a request that is still running.
        :raises InferenceError: the request still runs; its engine stays loaded until it returns.
        """
        if not self._turn.acquire(timeout=timeout_s):
            raise InferenceError(
                f'{self._status.active.name if self._status.active else "the chain"} still runs a request '
                f'after {timeout_s:.1f} s; its engine cannot be freed.',
                remedy='Restart the node to get its memory back.',
            )
        try:
            self._drop_host()
            self._failures.clear()
            self._golden = None
            self._gpu_faults.clear()
            self._backoff_s = 0.0
            self._set_status(state=ChainState.UNLOADED, active=None, facts=None, gpu_lost=False, switches=0)
        finally:
            self._turn.release()

    # --- walking the chain ------------------------------------------------------------------------

    def _walk(self, candidates: tuple[Rung, ...]) -> None:
        """Load and prove the first of ``candidates`` that works, or raise ChainExhaustedError."""
        self._drop_host()
        for rung in candidates:
            if self._status.gpu_lost and rung.providers is not ProviderSet.CPU and not self._flies_gpu_only():
                continue
            try:
                self._load_rung(rung)
            except Exception as error:
                self._reject(rung, error)
                continue
            return
        first, longest = self._config.restart_backoff_s
        self._backoff_s = min(longest, self._backoff_s * 2) if self._backoff_s else first
        self._retry_at_ns = self._monotonic_ns() + int(self._backoff_s * 1e9)
        self._set_status(state=ChainState.EXHAUSTED, active=None, facts=None)
        exhausted = self._exhausted()
        self._emit('c7.chain_exhausted', model_name=self._bundle.name, reason=str(exhausted))
        raise exhausted

    def _load_rung(self, rung: Rung) -> None:
        host = self._host_factory(rung)
        try:
            facts = host.load()
            self._prove(host)
        except BaseException:
            host.release()
            raise
        self._host = host
        self._failures.pop(rung.name, None)
        self._announced = False
        for note in facts.notes:
            _log.info('%s: %s', rung.name, note)
        _log.info('%s serves %s on %s.', rung.name, self._bundle.name, facts.active_provider)
        self._set_status(state=ChainState.READY, active=rung, facts=facts)

    def _flies_gpu_only(self) -> bool:
        return all(rung.providers is not ProviderSet.CPU for rung in self._rungs)

    def _after(self, failed: Rung) -> tuple[Rung, ...]:
        return self._rungs[self._rungs.index(failed) + 1 :]

    def _passes_proof(self, host: RungHost) -> bool:
        try:
            self._prove(host)
        except Exception as error:
            _log.error('%s fails its proof: %s', self._serving().name, error)
            return False
        return True

    def _restore_gpu(self, faults: tuple[tuple[int, Rung], ...], lost: bool) -> None:
        """Forget what a request cost that fails everywhere: it is no sign of a lost GPU."""
        self._gpu_faults.clear()
        self._gpu_faults.extend(faults)
        self._status = replace(self._status, gpu_lost=lost)

    def _blame_request(self, failures: Mapping[Rung, Exception], started_ns: int) -> NoReturn:
        """Raise what the usable rungs made of a request, while the one that passes its proof goes on serving."""
        serving = self._serving()
        if next(iter(failures)) != serving:
            self._record_first_switch(failures, started_ns)
        self._backoff_s = 0.0
        cause = failures[serving]
        raise InferenceError(
            f'no runtime can answer this request, while {serving.name} still passes its proof: {cause}',
            remedy='Run the model on this input outside of this package, and correct it.',
        ) from cause

    def _record_first_switch(self, failures: Mapping[Rung, Exception], started_ns: int) -> None:
        rung, error = next(iter(failures.items()))
        self._record_switch(rung.name, str(error), started_ns, frames_affected=1)

    def _restart(self) -> None:
        before = self._status
        if before.state is ChainState.EXHAUSTED and self._monotonic_ns() < self._retry_at_ns:
            raise self._exhausted()
        if before.state is ChainState.EXHAUSTED:
            # Nothing serves, so nothing is risked by trying what was given up for the CPU's sake.
            self._gpu_faults.clear()
            self._status = replace(self._status, gpu_lost=False)
        self._walk(self._rungs)
        if before.state is ChainState.EXHAUSTED:
            self._record_switch('none', 'the chain was exhausted', before.since_ns, frames_affected=0)

    def _fail_serving(self, error: Exception) -> Rung:
        rung = self._serving()
        _log_unexpected(rung, error)
        self._drop_host()
        self._failures[rung.name] = error
        if rung.providers is not ProviderSet.CPU:
            now_ns = self._monotonic_ns()
            self._gpu_faults.append((now_ns, rung))
            window_ns = int(self._config.gpu_fault_window_s * 1e9)
            if len({fault for when_ns, fault in self._gpu_faults if now_ns - when_ns <= window_ns}) >= 2:
                _log.error('two GPU rungs failed within %.0f s: the GPU is lost.', self._config.gpu_fault_window_s)
                self._status = replace(self._status, gpu_lost=True)
        return rung

    def _reject(self, rung: Rung, error: Exception) -> None:
        _log_unexpected(rung, error)
        self._failures[rung.name] = error
        _log.warning('%s is out: %s', rung.name, error)
        if not isinstance(error, RuntimeUnavailableError):
            self._emit('c7.engine_rejected', model_name=self._bundle.name, rung=rung.name, reason=str(error))

    def _prove(self, host: RungHost) -> None:
        """Run one inference that reaches no consumer; golden inputs where the bundle has them."""
        if self._bundle.golden is not None:
            if self._golden is None:
                # Read once: an engine that is loaded must not fall with files that change on the disk.
                self._golden = (self._bundle.golden_inputs(), self._bundle.golden_outputs())
            request, answer = self._golden
            if disagreements := self._bundle.compare(host.infer(request), answer):
                raise InferenceError(
                    f'the golden outputs are not reproduced: {" ".join(disagreements)}',
                    remedy="Build the artefact again from the bundle's source weights.",
                )
            return
        # A dynamic axis is proven at length one.
        host.infer({spec.name: np.zeros([axis or 1 for axis in spec.shape], spec.dtype) for spec in host.inputs})

    # --- what is told to others -------------------------------------------------------------------

    def _announce(self) -> None:
        """Emit the alerts of a serving episode with its first frame (AC-5, Risk-2)."""
        if self._announced:
            return
        self._announced = True
        facts = self._status.facts
        assert facts is not None
        reason = join_reasons(self._status.failures)
        for kind in self._status.alerts:
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
        status = self._status
        assert status.facts is not None
        return Answer(
            outputs=outputs,
            runtime_label=self._serving().strategy,
            active_provider=status.facts.active_provider,
            is_fallback=status.is_fallback,
            model_name=status.model_name,
            weights_digest=status.weights_digest,
        )

    def _exhausted(self) -> ChainExhaustedError:
        return ChainExhaustedError(
            [(rung.name, self._failures[rung.name]) for rung in self._rungs if rung.name in self._failures],
            remedy=self._remedy(),
        )

    def _remedy(self) -> str:
        if self._config.ort_disallow_cpu_fallback:
            return 'Set ort_disallow_cpu_fallback to false to fly on the CPU meanwhile.'
        if all(isinstance(cause, RuntimeUnavailableError) for cause in self._failures.values()):
            return 'Install one of the runtimes, see requirements/.'
        return ''

    def _serving(self) -> Rung:
        assert self._status.active is not None
        return self._status.active

    def _drop_host(self) -> None:
        host, self._host = self._host, None
        if host is not None:
            host.release()

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
        self._on_change(status)


def _log_unexpected(rung: Rung, error: Exception) -> None:
    if not isinstance(error, C7Error):
        _log.error('%s raised an unexpected error', rung.name, exc_info=error)
