"""How far a build of TensorRT is, from what it logs or monitors."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

from gps_denied_c7.runtimes.protocol import BuildProgress

__all__ = ['BuildWatch']

_log = logging.getLogger(__name__)

_REPORT_EVERY_S = 1.0
# What TensorRT before 10, which has no progress monitor, logs on its way, and what it is then about to do.
_PHASES = (
    ('Original:', 'simplifying the graph'),
    ('Graph construction and optimization completed', 'preparing the layers'),
    ('Computing costs', 'timing tactics'),
    ('Engine generation completed', 'writing the engine'),
)


class BuildWatch:
    """
    Report once a second how far a build is.

    The first report is made before anything is built, which may keep every other thread from running.

    :param report: takes a BuildProgress; None for no reports. What it raises is logged, the build goes on.
    :param phase: what comes first.
    """

    def __init__(self, report: Callable[[BuildProgress], None] | None, phase: str = 'starting') -> None:
        self.phase = phase
        self.fraction: float | None = None
        self._report = report
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._tactics = 0
        self._monitor: Any = None
        self._thread = threading.Thread(target=self._run, name='c7-build-progress', daemon=True)

    def __enter__(self) -> BuildWatch:
        self._report_now()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def note(self, message: str) -> None:
        """Take a log message of TensorRT's builder as a sign of progress."""
        if self._monitor is not None:
            return
        for beginning, phase in _PHASES:
            if beginning in message:
                self.phase = phase
        if 'Timing Runner' in message:
            self._tactics += 1
            self.phase = f'timing tactics, {self._tactics} so far'

    def attach(self, trt: ModuleType, config: Any) -> None:
        """Have TensorRT report by itself, where it can (from 10 on)."""
        if hasattr(trt, 'IProgressMonitor') and hasattr(config, 'progress_monitor'):
            self._monitor = _monitor_class(trt)(self)
            config.progress_monitor = self._monitor

    def _run(self) -> None:
        while not self._ended.wait(_REPORT_EVERY_S):
            self._report_now()

    def _report_now(self) -> None:
        if self._report is None:
            return
        try:
            self._report(BuildProgress(self.phase, time.monotonic() - self._started, self.fraction))
        except Exception:
            _log.exception('reporting the progress of a build failed')


def _monitor_class(trt: ModuleType) -> type:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Pass TensorRT's phases on; called from any thread, by C++ code that lets no exception through."""

        def __init__(self, watch: BuildWatch) -> None:
            trt.IProgressMonitor.__init__(self)
            self._watch = watch
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._watch.phase = phase_name
            if parent_phase is None:
                self._watch.fraction = 0.0

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            # The phase that was started first is the whole.
            if phase_name == next(iter(self._steps), None) and self._steps[phase_name]:
                self._watch.fraction = min(1.0, (step + 1) / self._steps[phase_name])
            return True

    return Monitor
