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


Conditions = tuple[Hashable, Hashable]


def start_conditions(values: Mapping[str, Any]) -> Conditions:
    """
    Return two values: one changes with any parameter, one with any file that a start depends on.

    Where a mount has stalled, the second is another one each time: the attempt says so.

    :param values: of all parameters, by name.
    """
    caches = [values['engine_cache_dir'], values['ort_trt_cache_dir']]

    def look() -> Hashable:
        files, directories = model_files(values['model_path'])
        return fingerprint(files, [*directories, *caches, *map(fallback_directory, map(Path, caches))])

    try:
        return repr(values), read_or_give_up('what a start depends on', look, limit_s=_READ_S)
    except C7Error:
        return repr(values), object()


class Autostart:
    """
    Configure and activate from a thread of its own, with back-off between attempts.

    It ends with the first success, and when another client requests a transition. After an attempt that would fail
    again with the same files and parameters, the next one waits until these have changed. A changed parameter ends
    each wait at once.

    :param lasting: whether the last attempt would fail again until ``conditions`` change.
    :param conditions: as :func:`start_conditions` returns them.
    """

    def __init__(
        self, node: ResponsiveLifecycleNode, *, lasting: Callable[[], bool], conditions: Callable[[], Conditions]
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
            before, lasting = None, False
            try:
                # Read before the attempt: a change during it is a reason for another one.
                before = self._conditions()
                if self._attempt():
                    return
                lasting = self._lasting()
            except Exception as error:
                self._node.report_callback_failure('autostart', error)
            if self._stopped.is_set():
                # Stopped in the middle of the attempt: that the node is not active is not a failure.
                return
            when = 'when a parameter, the model or an engine file changes' if lasting else f'in {pause_s:.0f} s'
            self._node.get_logger().error(f'not active; next attempt {when}')
            afresh = self._wait(before, pause_s, lasting=lasting)
            pause_s = _FIRST_PAUSE_S if afresh else min(2 * pause_s, _LONGEST_PAUSE_S)

    def _wait(self, before: Conditions | None, pause_s: float, *, lasting: bool) -> bool:
        """
        Wait ``pause_s``, and where the failure is lasting also for a change; a changed parameter ends it at once.

        :return: whether the shortest pause comes next: a parameter has changed, or this wait was longer than any pause.
        """
        began = time.monotonic()
        while not self._stopped.wait(_LOOK_S):
            now, waited_s = self._conditions(), time.monotonic() - began
            if before is not None and now[0] != before[0]:
                return True
            if waited_s >= pause_s and not (lasting and now == before):
                return waited_s > _LONGEST_PAUSE_S
        return False

    def _attempt(self) -> bool:
        if self._node.lifecycle_state == 'unconfigured' and not self._node.transition('configure'):
            return False
        if self._node.lifecycle_state == 'inactive' and not self._stopped.is_set():
            self._node.transition('activate')
        return self._node.lifecycle_state in ('active', 'finalized')
