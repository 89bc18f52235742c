"""What a chain reports: its status, alerts and flight records (F-8, AC-5, Risk-2)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from gps_denied_c7.errors import (
    ChainExhaustedError,
    GpuMemoryError,
    RuntimeUnavailableError,
    join_reasons,
)
from gps_denied_c7.failover.fleet import Fleet
from gps_denied_c7.failover.loader import RungEngine
from gps_denied_c7.failover.rungs import ORT_LABEL, Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.protocol import EngineFacts

__all__ = ['ChainReports', 'ChainState', 'ChainStatus', 'Transaction']

_log = logging.getLogger(__name__)


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
    :param standby: the rung of the engine that answers when the serving one does not, None where there is none.
    :param switches: changes of the serving rung since the chain was loaded.
    :param gpu_lost: GPU rungs do not serve until one of them has agreed with the CPU on live frames.
    :param longest_load_s: seconds by rung, from the start of its worker to its last self-test.
    :param worker_pid: the process whose engine serves, None where there is none, or it lives in this process.
    :param standby_pid: likewise, of the standby.
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
    standby: Rung | None = None
    switches: int = 0
    gpu_lost: bool = False
    longest_load_s: tuple[tuple[str, float], ...] = ()
    worker_pid: int | None = None
    standby_pid: int | None = None


class ChainReports:
    """
    Keep the status of a chain and why its rungs do not serve, and emit its records.

    :param emit: takes ``(record kind, payload fields)``.
    :param on_change: called with the new status after every change.
    :param complete: adds what changes without a call of this class.
    :param cpu_is_a_choice: whether a parameter alone keeps the CPU from serving.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        rungs: tuple[Rung, ...],
        *,
        emit: Callable[..., None],
        on_change: Callable[[ChainStatus], None],
        complete: Callable[[ChainStatus], ChainStatus],
        monotonic_ns: Callable[[], int],
        cpu_is_a_choice: bool,
    ) -> None:
        self._model_name = bundle.name
        self._rungs = rungs
        self._emit = emit
        self._on_change = on_change
        self._complete = complete
        self._monotonic_ns = monotonic_ns
        self._cpu_is_a_choice = cpu_is_a_choice
        self._announced: frozenset[str] = frozenset()
        self.failures: dict[str, BaseException] = {}
        """Why a rung does not serve, by its name."""
        self.latest = ChainStatus(bundle.name, bundle.weights_digest, ChainState.UNLOADED)
        """The latest status, without what changes by itself."""

    def status(self) -> ChainStatus:
        """Return the latest status, complete; from any thread."""
        return self._complete(self.latest)

    def set(self, **changes: object) -> None:
        """Change the status."""
        status = replace(
            self.latest,
            since_ns=self._monotonic_ns(),
            failures=tuple(
                (rung.name, str(self.failures[rung.name])) for rung in self._rungs if rung.name in self.failures
            ),
            **changes,  # type: ignore[arg-type]
        )
        if 'active' in changes:
            status = replace(
                status,
                is_fallback=status.active is not None and status.active != self._rungs[0],
                alerts=self._standing_alerts(status.active, status.facts) if status.active and status.facts else (),
            )
        self.latest = status
        self._on_change(self.status())

    def serves(self, engine: RungEngine, standby: RungEngine | None) -> None:
        """Report the engine that serves from now on."""
        rung, facts = engine.rung, engine.facts
        self.failures.pop(rung.name, None)
        for note in facts.notes:
            _log.info('%s: %s', rung.name, note)
        _log.info('%s serves %s on %s.', rung.name, self._model_name, facts.active_provider)
        self.set(
            state=ChainState.READY, active=rung, facts=facts, standby=standby.rung if standby is not None else None
        )

    def unloaded(self) -> None:
        """Report that nothing is loaded; forget every failure."""
        self.failures.clear()
        self._announced = frozenset()
        self.set(state=ChainState.UNLOADED, active=None, facts=None, standby=None, switches=0)

    def switched(self, before: str, reason: str, started_ns: int, frames_affected: int) -> None:
        """Record that another engine serves (F-8)."""
        # An engine that was late and answered at last has served all along, whichever was asked meanwhile.
        self._announced &= frozenset(self.latest.alerts)
        self.set(switches=self.latest.switches + 1)
        assert self.latest.active is not None
        self._emit(
            'c7.runtime_switched',
            **{
                'from': before,
                'to': self.latest.active.name,
                'reason': reason,
                'gap_ms': round((self._monotonic_ns() - started_ns) / 1e6, 3),
                'frames_affected': frames_affected,
            },
        )

    def announce(self) -> None:
        """
        Emit the alerts that stand since this frame (AC-5, Risk-2).

        One that stands already is not repeated by another rung of which it is true as well.
        """
        fresh = [kind for kind in self.latest.alerts if kind not in self._announced]
        if not fresh:
            return
        self._announced |= frozenset(fresh)
        facts = self.latest.facts
        assert facts is not None
        reason = join_reasons(self.latest.failures)
        for kind in fresh:
            _log.warning('%s: %s runs on %s, because %s', kind, self._model_name, facts.active_provider, reason)
            asked = {'requested_providers': list(facts.requested_providers)} if kind == 'c7.cpu_fallback' else {}
            self._emit(kind, model_name=self._model_name, active_provider=facts.active_provider, reason=reason, **asked)

    def rejected(self, rung: Rung, error: Exception, *, quiet: bool) -> None:
        """
        Report that ``rung`` could not be loaded to serve.

        :param quiet: the chain is being closed: write no record.
        """
        _log.warning('%s cannot be used: %s', rung.name, error)
        if isinstance(error, GpuMemoryError):
            self.memory_refused(rung, error, quiet=quiet)
        elif not isinstance(error, RuntimeUnavailableError) and not quiet:
            self._emit('c7.engine_rejected', model_name=self._model_name, rung=rung.name, reason=str(error))

    def memory_refused(self, rung: Rung, error: GpuMemoryError, *, quiet: bool) -> None:
        """Report that ``rung`` does not fit into the GPU memory; see :meth:`rejected`."""
        if not quiet:
            self._emit(
                'c7.memory_refused',
                rung=rung.name,
                needed_bytes=error.needed_bytes,
                left_bytes=error.left_bytes,
                reason=error.message,
            )

    def promotion_delayed(self, rung: Rung, reason: str) -> None:
        """Report why a better engine does not serve yet."""
        _log.warning('%s does not serve yet: %s', rung.name, reason)
        self._emit('c7.promotion_delayed', rung=rung.name, reason=reason)

    def exhausted(self, *, quiet: bool) -> ChainExhaustedError:
        """Report that no rung is usable; return the error that says so. See :meth:`rejected`."""
        self.set(state=ChainState.EXHAUSTED, active=None, facts=None)
        error = self.exhausted_error()
        if not quiet:
            self._emit('c7.chain_exhausted', model_name=self._model_name, reason=str(error))
        return error

    def exhausted_error(self) -> ChainExhaustedError:
        """Return why no rung is usable."""
        causes = [(rung.name, self.failures[rung.name]) for rung in self._rungs if rung.name in self.failures]
        return ChainExhaustedError(causes, remedy=self._remedy())

    def _remedy(self) -> str:
        if self._cpu_is_a_choice:
            return 'Set ort_disallow_cpu_fallback to false to use the CPU meanwhile.'
        if all(isinstance(cause, RuntimeUnavailableError) for cause in self.failures.values()):
            return 'Install one of the runtimes, see requirements/.'
        return ''

    def _standing_alerts(self, rung: Rung, facts: EngineFacts) -> tuple[str, ...]:
        alerts = []
        if rung.strategy == ORT_LABEL and self._rungs[0].strategy != ORT_LABEL:
            alerts.append('c7.fallback_to_onnx_trt_ep')
        if facts.cpu_only:
            alerts.append('c7.cpu_fallback')
        return tuple(alerts)


class Transaction:
    """
    Compare which engine serves before and after, and record the change once (F-8).

    A change from A to B and back to A is not recorded; A to B to C is one record, from A to C.

    :param started_ns: when the gap began, by the steady clock.
    :param frames_affected: frames that waited for it.
    """

    def __init__(self, fleet: Fleet, reports: ChainReports, started_ns: int, *, frames_affected: int = 0) -> None:
        self._fleet = fleet
        self._reports = reports
        self._before = fleet.serving
        self._started_ns = started_ns
        self._frames_affected = frames_affected
        self._cause: tuple[str, str] | None = None

    def because(self, before: str, reason: str) -> None:
        """Name what served before, and why it does not any more; the first reason counts."""
        self._cause = self._cause or (before, reason)

    def end(self) -> None:
        """Record what has changed."""
        if self._fleet.serving is not self._before and self._cause is not None:
            self._reports.switched(*self._cause, self._started_ns, self._frames_affected)
