"""How long a worker may take to load an engine, or to build one: a build that hangs is ended (F-1, F-5)."""

from __future__ import annotations

import time

from gps_denied_c7.errors import EngineDeserializeError
from gps_denied_c7.runtimes.protocol import BuildProgress

__all__ = ['LoadTimeout']

# A builder may measure one tactic, or time one layer, for minutes and show nothing meanwhile.
_LONGEST_STEP_S = 600.0


class LoadTimeout:
    """
    Know when a load has taken too long; with each new step of a build its time begins again.

    :param limit_s: seconds that a load may take.
    :param builds: whether building is allowed, so that its steps count.
    """

    def __init__(self, limit_s: float, *, builds: bool) -> None:
        self._limit_s = limit_s
        self._builds = builds
        self._step: tuple[str, float | None] | None = None
        self.deadline = time.monotonic() + limit_s
        """When the load is given up, by the steady clock in seconds."""

    def note(self, progress: BuildProgress) -> None:
        """Take what a worker reports about once a second, also while its builder hangs: only a new step counts."""
        step = progress.phase, progress.fraction
        if self._builds and step != self._step:
            self._step, self._limit_s = step, max(self._limit_s, _LONGEST_STEP_S)
            self.deadline = time.monotonic() + self._limit_s

    def error(self, name: str) -> EngineDeserializeError:
        """Return the error of the worker ``name``, which was killed at the deadline."""
        stood = f' The build had reached: {self._step[0]}.' if self._step is not None else ''
        return EngineDeserializeError(
            f'{name} did not load, or report a new step, within {self._limit_s:.0f} s and was killed.{stood}',
            remedy='Raise load_timeout_s, or build the engine before the flight (c7_engine build).',
        )
