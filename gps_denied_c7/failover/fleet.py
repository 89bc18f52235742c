"""The engines of a chain and the role of each; :meth:`Fleet.move` alone changes one (F-3, F-4)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from gps_denied_c7.failover.loader import EngineLoad, EngineLoader, RungEngine
from gps_denied_c7.failover.retiring import RetiringEngines
from gps_denied_c7.failover.rungs import Rung

__all__ = ['MOVES', 'Fleet', 'FleetSnapshot', 'Role']

_log = logging.getLogger(__name__)


class Role(str, Enum):
    """What an engine is there for; it has one role at a time."""

    LOADING = 'loading'
    SERVING = 'serving'
    STANDBY = 'standby'
    SHADOW = 'shadow'
    LATE = 'late'
    RETIRING = 'retiring'
    STUCK = 'stuck'


MOVES = {
    (Role.LOADING, Role.SERVING): 'first usable rung',
    (Role.LOADING, Role.STANDBY): 'preferred as standby',
    (Role.LOADING, Role.SHADOW): 'better than the serving rung',
    (Role.LOADING, Role.RETIRING): 'not needed any more',
    (Role.STANDBY, Role.SERVING): 'the serving engine failed or is late, or the GPU is lost',
    (Role.SHADOW, Role.SERVING): 'agrees on three live frames, or no other engine is usable',
    (Role.SHADOW, Role.STANDBY): 'no longer better than the serving rung',
    (Role.SERVING, Role.STANDBY): 'a better rung serves',
    (Role.SERVING, Role.LATE): 'no answer within its deadline',
    (Role.LATE, Role.STANDBY): 'answers at last',
    (Role.SERVING, Role.RETIRING): 'failed or died',
    (Role.STANDBY, Role.RETIRING): 'died, hangs, frees memory, or a preferred one is loaded',
    (Role.SHADOW, Role.RETIRING): 'disagrees, fails, or frees memory',
    (Role.LATE, Role.RETIRING): 'hangs or fails',
    (Role.RETIRING, Role.STUCK): 'its process does not end',
}
"""Every change of role that there is, with its reason."""


class FleetSnapshot(NamedTuple):
    """Hold which engine had which role at one moment; ``retiring`` counts those that are not gone, stuck or not."""

    serving: RungEngine | None
    standby: RungEngine | None
    shadow: RungEngine | None
    late: tuple[RungEngine, ...]
    loading: tuple[EngineLoad, ...]
    retiring: int


class Fleet:
    """
    Know the role of each engine.

    What is LOADING is known by ``loader``, and what is RETIRING or STUCK by ``reaper``.
    """

    def __init__(self, loader: EngineLoader, reaper: RetiringEngines) -> None:
        self._loader = loader
        self._reaper = reaper
        self.version = 0
        """Changes with each move."""
        self.serving: RungEngine | None = None
        self.standby: RungEngine | None = None
        self.shadow: RungEngine | None = None
        self.late: tuple[RungEngine, ...] = ()

    def role(self, engine: RungEngine) -> Role:
        """Return the role of an engine that is not RETIRING."""
        if engine is self.serving:
            return Role.SERVING
        if engine is self.standby:
            return Role.STANDBY
        if engine is self.shadow:
            return Role.SHADOW
        return Role.LATE if engine in self.late else Role.LOADING

    def move(self, engine: RungEngine, role: Role, why: str) -> None:
        """
        Give ``engine`` another role; one that is RETIRING is ended, without waiting for it.

        :param why: for the log.
        """
        before = self.role(engine)
        assert (before, role) in MOVES, f'{engine.rung.name}: {before.value} to {role.value}'
        _log.debug('%s: %s, was %s: %s', engine.rung.name, role.value, before.value, why)
        self.version += 1
        if before is Role.LATE:
            self.late = tuple(each for each in self.late if each is not engine)
        elif before is not Role.LOADING:
            setattr(self, before.value, None)
        if role is Role.RETIRING:
            self._reaper.add(engine.rung, engine.host)
        elif role is Role.LATE:
            self.late += (engine,)
        else:
            assert getattr(self, role.value) is None, f'two engines are {role.value}'
            setattr(self, role.value, engine)

    def engines(self) -> Iterator[RungEngine]:
        """Yield those that are loaded and not RETIRING."""
        yield from filter(None, (self.serving, *self.late, self.standby, self.shadow))

    def newly_stuck(self) -> list[Rung]:
        """Forget retiring engines that are gone; return the rungs of those that are STUCK since the last call."""
        return self._reaper.look()

    def gpu_hangs(self) -> bool:
        """Return whether an engine on the GPU is STUCK."""
        return any(rung.on_gpu for rung in self._reaper.stuck())

    def snapshot(self) -> FleetSnapshot:
        """Return the roles of this moment; from any thread."""
        loading = tuple(self._loader.loads)
        return FleetSnapshot(self.serving, self.standby, self.shadow, self.late, loading, len(self._reaper))
