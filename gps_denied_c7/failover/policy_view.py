"""What the policy of a chain sees, and the actions that it answers with."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from gps_denied_c7.failover.fleet import Role
from gps_denied_c7.failover.loader import EngineLoad, RungEngine
from gps_denied_c7.failover.rungs import Rung

__all__ = [
    'HURRIED', 'RESTART', 'Action', 'Actions', 'Cancel', 'ClearPause', 'Failed', 'Gpu', 'Load', 'Move', 'Pause',
    'PauseState', 'Purpose', 'Switch', 'TrustGpu', 'View',
]  # fmt: skip

RESTART, HURRIED = 'restart', 'hurried'


class Purpose(Enum):
    """What a rung is wanted for."""

    SERVE = 'serve, or be standby'
    SHADOW = 'shadow, to serve later'
    LOAD = 'be loaded in the background'
    LOAD_NOW = 'be loaded to serve at once'


class Gpu(Enum):
    """Whether engines on the GPU are trusted: HUNG is lost with a worker on it that cannot be ended."""

    OK = 'ok'
    LOST = 'lost'
    HUNG = 'hung'


class PauseState(Enum):
    """Whether something that has failed may be tried again; NONE: it has not failed."""

    NONE = 'none'
    RUNNING = 'running'
    DUE = 'due'


@dataclass(frozen=True, slots=True)
class View:
    """
    Show all that decides what a chain does.

    :param active: rung that serves or, while it is being replaced, served last; None while exhausted or unloaded.
    :param loads: engines that are being loaded.
    :param refused: rungs whose load would fail again until a file changes.
    :param pauses: when each pause ends, by ``('standby', rung)``, ``('promotion', rung)``, HURRIED or RESTART.
    :param now_ns: steady clock, as of ``pauses``.
    """

    rungs: tuple[Rung, ...]
    active: Rung | None = None
    serving: RungEngine | None = None
    standby: RungEngine | None = None
    shadow: RungEngine | None = None
    late: tuple[RungEngine, ...] = ()
    loads: tuple[EngineLoad, ...] = ()
    gpu: Gpu = Gpu.OK
    refused: frozenset[Rung] = frozenset()
    pauses: Mapping[Hashable, int] = field(default_factory=dict)
    now_ns: int = 0
    isolated: bool = True
    hot_standby: bool = True
    closing: bool = False

    def pause(self, what: Hashable) -> PauseState:
        """Return the state of a pause."""
        if (end_ns := self.pauses.get(what)) is None:
            return PauseState.NONE
        return PauseState.RUNNING if end_ns > self.now_ns else PauseState.DUE

    def pause_left_ns(self, what: Hashable) -> int:
        """Return the nanoseconds that are left of a pause, 0 where it is over or never was."""
        return max(0, self.pauses.get(what, 0) - self.now_ns)

    def better(self, rung: Rung) -> bool:
        """Return whether ``rung`` is preferred to the one that serves; False where none does."""
        return self.serving is not None and self.rungs.index(rung) < self.rungs.index(self.serving.rung)

    def eligible(self, rung: Rung, purpose: Purpose) -> bool:
        """
        Return whether ``rung`` may be used for ``purpose``.

        A lost GPU is not used, except in a chain of GPU rungs only, and for a shadow beside an engine on the CPU.
        """
        usable = self.gpu is Gpu.OK or not rung.on_gpu or all(each.on_gpu for each in self.rungs)
        if purpose is Purpose.SERVE:
            return usable
        if purpose is Purpose.LOAD_NOW:
            return usable and rung not in self.refused
        if purpose is Purpose.LOAD:
            beside = Purpose.SHADOW if self.better(rung) else Purpose.SERVE
            return rung not in self.refused and self.eligible(rung, beside)
        cpu_serves = self.serving is not None and not self.serving.rung.on_gpu
        return usable or (cpu_serves and self.gpu is not Gpu.HUNG)

    def rungs_after(self, rung: Rung) -> tuple[Rung, ...]:
        """Return the rungs that come after ``rung``."""
        return self.rungs[self.rungs.index(rung) + 1 :]

    def preference(self, rung: Rung) -> tuple[bool, int]:
        """Order rungs for the standby: the chain's order, another engine of the active rung last (F-3)."""
        return rung == self.active, self.rungs.index(rung)


@dataclass(frozen=True, slots=True)
class Move:
    """Give an engine another role."""

    engine: RungEngine
    role: Role
    why: str


@dataclass(frozen=True, slots=True)
class Load:
    """Begin to load a rung in the background; ``pause`` is the one that was waited for."""

    rung: Rung
    pause: Hashable = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """End loads."""

    loads: tuple[EngineLoad, ...]


@dataclass(frozen=True, slots=True)
class Pause:
    """Begin the next pause of something that has failed."""

    what: Hashable


@dataclass(frozen=True, slots=True)
class ClearPause:
    """End a pause: the next one is the shortest again."""

    what: Hashable


@dataclass(frozen=True, slots=True)
class Failed:
    """Keep the reason why a rung does not serve."""

    rung: Rung
    error: BaseException


@dataclass(frozen=True, slots=True)
class TrustGpu:
    """Take the GPU for usable again: an engine on it has passed its self-test and agreed on live frames."""

    rung: Rung


@dataclass(frozen=True, slots=True)
class Switch:
    """Do ``actions``, which have another engine serve, as one transaction."""

    why: str
    actions: tuple[Action, ...]


Action = Move | Load | Cancel | Pause | ClearPause | Failed | TrustGpu | Switch
Actions = tuple[Action, ...]
