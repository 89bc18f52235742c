"""One budget for the GPU memory of all engines: what each holds, and which is refused before it is loaded (F-3)."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable

from gps_denied_c7.errors import GpuMemoryError

__all__ = ['GpuMemoryBudget', 'GpuMemoryClaim']

# What an engine is taken to need until it has been measured, as a part of the budget: one that serves, its standby and
# one that is to take over fit, with something left for one that is larger.
_UNMEASURED_PART = 4
# A driver frees the memory of a process that was killed within about a second.
_LEAVING_S = 2.0


class GpuMemoryBudget:
    """
    Share one budget among engines in processes of their own; safe to call from any thread.

    An engine claims what it needs before it is loaded: what it was measured to take the last time, and a quarter of
    the budget before that. Once loaded it holds what it has really taken, until it is gone. Where what is left does
    not do, the memory of engines that are being ended is waited for.

    :param total_bytes: of all claims together.
    """

    def __init__(self, total_bytes: int) -> None:
        self._lock = threading.Condition()
        self._total_bytes = total_bytes
        self._claims: list[GpuMemoryClaim] = []
        self._measured: dict[Hashable, int] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes of GPU memory for all engines together."""
        return self._total_bytes

    def resize(self, total_bytes: int) -> None:
        """Change the budget for claims to come; what is held stays held."""
        with self._lock:
            self._total_bytes = total_bytes

    def held(self) -> list[tuple[str, int]]:
        """Return the name and the bytes of each claim, in the order in which they were made."""
        with self._lock:
            return [(claim.name, claim.held_bytes) for claim in self._claims]

    def claim(self, name: str, *, key: Hashable, file_bytes: int = 0) -> GpuMemoryClaim:
        """
        Set aside what an engine needs.

        :param name: of the engine, for logs and errors.
        :param key: equal for engines that take the same memory: the model and the rung.
        :param file_bytes: size of its file, the least that it can need.
        :raises GpuMemoryError: it does not fit beside what others hold.
        """
        with self._lock:
            needed = self._measured.get(key) or max(file_bytes, self._total_bytes // _UNMEASURED_PART)
            left = self._wait_for(needed)
            if needed > left:
                raise self._refused(name, needed, left)
            claim = GpuMemoryClaim(self, name, key, needed, left)
            self._claims.append(claim)
            return claim

    def _settle(self, claim: GpuMemoryClaim, measured: int) -> None:
        with self._lock:
            self._measured[claim.key] = max(measured, self._measured.get(claim.key, 0))
            left = self._wait_for(measured, but=claim)
            if measured > left:
                raise self._refused(claim.name, measured, left)
            claim.held_bytes = measured

    def _release(self, claim: GpuMemoryClaim) -> None:
        with self._lock:
            if claim in self._claims:
                self._claims.remove(claim)
                self._lock.notify_all()

    def _wait_for(self, needed: int, *, but: GpuMemoryClaim | None = None) -> int:
        """Return what is left, after those that are leaving have left where that makes the difference."""
        end = time.monotonic() + _LEAVING_S
        while True:
            left = self._left(but=but)
            leaving = sum(claim.held_bytes for claim in self._claims if claim.leaving and claim is not but)
            if not left < needed <= left + leaving or not self._lock.wait(end - time.monotonic()):
                return left

    def _left(self, *, but: GpuMemoryClaim | None = None) -> int:
        return self._total_bytes - sum(claim.held_bytes for claim in self._claims if claim is not but)

    def _refused(self, name: str, needed: int, left: int) -> GpuMemoryError:
        others = ', '.join(f'{claim.name} {_mib(claim.held_bytes)}' for claim in self._claims if claim.name != name)
        return GpuMemoryError(
            f'{name} needs {_mib(needed)} of GPU memory, and {_mib(max(0, left))} of the {_mib(self._total_bytes)} '
            f'for all engines are left{f" beside {others}" if others else ""}.',
            needed_bytes=needed,
            left_bytes=left,
            remedy='Raise gpu_memory_budget_bytes, build a smaller engine, or switch hot_standby off.',
        )


class GpuMemoryClaim:
    """
    Hold a part of a budget for one engine.

    :param limit_bytes: the most that the engine may take: all that is not held by others.
    """

    def __init__(self, budget: GpuMemoryBudget, name: str, key: Hashable, held_bytes: int, limit_bytes: int) -> None:
        self._budget = budget
        self.name = name
        self.key = key
        self.held_bytes = held_bytes
        self.limit_bytes = limit_bytes
        self.leaving = False

    def settle(self, measured_bytes: int | None) -> None:
        """
        Hold what the engine was measured to take instead; None where that could not be measured.

        :raises GpuMemoryError: it is more than others leave. The next claim of its kind is refused at once.
        """
        if measured_bytes is not None:
            self._budget._settle(self, measured_bytes)

    def leave(self) -> None:
        """Note that the engine is being ended: its part is held until it is gone, and worth waiting for."""
        self.leaving = True

    def release(self) -> None:
        """Give it back, once the engine's process is gone; safe to repeat."""
        self._budget._release(self)


def _mib(count: int) -> str:
    return f'{count / 2**20:.0f} MiB'
