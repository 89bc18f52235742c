"""Configure and activate the node by itself, and retry until it works (N-2)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

from gps_denied_c7.engines.store import fallback_directory
from gps_denied_c7.errors import C7Error
from gps_denied_c7.failover.file_watch import fingerprint, model_files
from gps_denied_c7.stalled_reads import read_or_give_up

__all__ = ['Autostart', 'start_conditions']

_LOOK_S = 1.0
_READ_S = 2.0


def start_conditions(values: Mapping[str, Any]) -> Hashable:
    """
    Return what changes as soon as a parameter or a file changes that a start depends on.

    Where a mount has stalled, it is another one each time: the attempt says so.

    :param values: of all parameters, by name.
    """
    caches = [values['engine_cache_dir'], values['ort_trt_cache_dir']]

    def look() -> Hashable:
        files, directories = model_files(values['model_path'])
        return fingerprint(files, [*directories, *caches, *map(fallback_directory, map(Path, caches))])

    try:
        return repr(values), read_or_give_up('what a start depends on', look, limit_s=_READ_S)
    except C7Error:
        return object()


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
                # Read before the attempt: a change during it is a reason for another one.
                before = self._conditions()
                if self._attempt():
                    return
                wait = self._lasting()
            except Exception as error:
                self._on_failure(error)
            if self._stopped.is_set():
                # Stopped in the middle of the attempt: that the node is not active is not a failure.
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
