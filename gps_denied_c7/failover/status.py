"""The state of a runtime chain at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.runtimes.protocol import EngineFacts

__all__ = ['ChainState', 'ChainStatus']


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
