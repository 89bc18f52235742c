"""Take the node to active without being asked, for as long as it takes (N-2)."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ['Autostart']


class Autostart:
    """
    Configure and activate from a thread of its own, with back-off between attempts.

    It ends with the first success, and when somebody else takes the lifecycle over.

    :param state: returns the lifecycle state's label.
    :param transition: runs ``configure`` or ``activate`` and returns whether it succeeded.
    :param on_failure: told an exception that nobody expected; the next attempt comes all the same.
    :param backoff_s: first and longest pause in seconds.
    """

    def __init__(
        self,
        state: Callable[[], str],
        transition: Callable[[str], bool],
        *,
        on_pause: Callable[[float], object] = lambda pause_s: None,
        on_failure: Callable[[Exception], None],
        backoff_s: tuple[float, float] = (1.0, 30.0),
    ) -> None:
        self._state = state
        self._transition = transition
        self._on_pause = on_pause
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
        pause_s, longest_s = self._backoff_s
        while not self._stopped.is_set():
            try:
                if self._attempt():
                    return
            except Exception as error:
                self._on_failure(error)
            self._on_pause(pause_s)
            self._stopped.wait(pause_s)
            pause_s = min(2 * pause_s, longest_s)

    def _attempt(self) -> bool:
        if self._state() == 'unconfigured' and not self._transition('configure'):
            return False
        if self._state() == 'inactive' and not self._stopped.is_set():
            self._transition('activate')
        return self._state() in ('active', 'finalized')
