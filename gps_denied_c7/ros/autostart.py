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
from gps_denied_c7.ros.lifecycle import ResponsiveLifecycleNode
from gps_denied_c7.stalled_reads import read_or_give_up

__all__ = ['Autostart', 'start_conditions']

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
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

    :param lasting: whether the last attempt would fail again until ``conditions`` change.
    :param conditions: returns a value that changes as soon as a file or a parameter changes.
    """

    def __init__(
        self, node: ResponsiveLifecycleNode, *, lasting: Callable[[], bool], conditions: Callable[[], Hashable]
    ) -> None:
        self._node = node
        self._lasting = lasting
        self._conditions = conditions
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
        pause_s = _FIRST_PAUSE_S
        while not self._stopped.is_set():
            wait = False
            try:
                # Read before the attempt: a change during it is a reason for another one.
                before = self._conditions()
                if self._attempt():
                    return
                wait = self._lasting()
            except Exception as error:
                self._node.report_callback_failure('autostart', error)
            if self._stopped.is_set():
                # Stopped in the middle of the attempt: that the node is not active is not a failure.
                return
            if wait:
                self._node.get_logger().error(
                    'not active; next attempt when a parameter, the model or an engine file changes'
                )
                changed_after_s = self._wait_for_change(before, pause_s)
                if changed_after_s > _LONGEST_PAUSE_S:
                    pause_s = _FIRST_PAUSE_S
                    continue
            else:
                self._node.get_logger().error(f'not active; next attempt in {pause_s:.0f} s')
                self._stopped.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _wait_for_change(self, before: Hashable, least_s: float) -> float:
        """Wait until the conditions are others, for ``least_s`` at least; return for how many seconds."""
        began = time.monotonic()
        self._stopped.wait(least_s)
        while not self._stopped.is_set() and self._conditions() == before:
            self._stopped.wait(_LOOK_S)
        return time.monotonic() - began

    def _attempt(self) -> bool:
        if self._node.lifecycle_state == 'unconfigured' and not self._node.transition('configure'):
            return False
        if self._node.lifecycle_state == 'inactive' and not self._stopped.is_set():
            self._node.transition('activate')
        return self._node.lifecycle_state in ('active', 'finalized')
