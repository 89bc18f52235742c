"""Take the node to active without being asked, for as long as it takes (N-2)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable

__all__ = ['Autostart']

_LOOK_S = 1.0


class Autostart:
    """
    Configure and activate from a thread of its own, with back-off between attempts.

    It ends with the first success, and when another client requests a transition. After an attempt that would fail
    again with the same files and parameters, the next one waits until these have changed.

    :param state: returns the lifecycle state's label.
    :param transition: runs ``configure`` or ``activate`` and returns whether it succeeded.
    :param lasting: whether the last attempt would fail again until ``conditions`` change.
    :param conditions: returns a value that changes as soon as a file or a parameter changes.
    :param on_wait: called when the next attempt waits for such a change.
    :param on_failure: called with an unexpected exception; the next attempt follows all the same.
    :param backoff_s: first and longest pause in seconds.
    """

    def __init__(
        self,
        state: Callable[[], str],
        transition: Callable[[str], bool],
        *,
        on_pause: Callable[[float], object] = lambda pause_s: None,
        lasting: Callable[[], bool] = lambda: False,
        conditions: Callable[[], Hashable] = lambda: None,
        on_wait: Callable[[], object] = lambda: None,
        on_failure: Callable[[Exception], None],
        backoff_s: tuple[float, float] = (1.0, 30.0),
    ) -> None:
        self._state = state
        self._transition = transition
        self._on_pause = on_pause
        self._lasting = lasting
        self._conditions = conditions
        self._on_wait = on_wait
        self._on_failure = on_failure
        self._backoff_s = backoff_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name='c7-autostart', daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Make no further attempt; one that is under way goes on."""
        self._stopped.set()

    @property
    def running(self) -> bool:
        """Whether further attempts will be made."""
        return self._thread.is_alive() and not self._stopped.is_set()

    def _run(self) -> None:
        first_s, longest_s = self._backoff_s
        pause_s = first_s
        while not self._stopped.is_set():
            wait = False
            try:
                # Before the attempt: what changes meanwhile is worth another one.
                before = self._conditions()
                if self._attempt():
                    return
                wait = self._lasting()
            except Exception as error:
                self._on_failure(error)
            if self._stopped.is_set():
                # Stopped in the middle of the attempt: that it has not come to active is no failure.
                return
            if wait:
                self._on_wait()
                changed_after_s = self._wait_for_change(before, pause_s)
                pause_s = first_s if changed_after_s > longest_s else min(2 * pause_s, longest_s)
                continue
            self._on_pause(pause_s)
            self._stopped.wait(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    def _wait_for_change(self, before: Hashable, least_s: float) -> float:
        """Wait until the conditions are others, for ``least_s`` at least; return for how many seconds."""
        began = time.monotonic()
        self._stopped.wait(least_s)
        while not self._stopped.is_set() and self._conditions() == before:
            self._stopped.wait(_LOOK_S)
        return time.monotonic() - began

    def _attempt(self) -> bool:
        if self._state() == 'unconfigured' and not self._transition('configure'):
            return False
        if self._state() == 'inactive' and not self._stopped.is_set():
            self._transition('activate')
        return self._state() in ('active', 'finalized')
