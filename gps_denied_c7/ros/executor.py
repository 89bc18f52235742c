"""Run callbacks in a few threads, each of them once (N-4, N-5)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.context import Context
from rclpy.exceptions import InvalidHandle
from rclpy.executors import Executor, ExternalShutdownException, ShutdownException, TimeoutException

__all__ = ['PoolExecutor', 'PromptCallbackGroup', 'give_way']

_WAKE_S = 0.2
_YIELD_S = 0.001
_PAUSE_S = 0.001

# What the callback that runs in a thread has given way so far.
_given = threading.local()


def give_way() -> None:
    """
    Let go of the interpreter for as long as whoever was woken just now needs to come to what runs without it.

    For callbacks; a PoolExecutor takes it off its own pause.
    """
    time.sleep(_PAUSE_S)
    _given.seconds = getattr(_given, 'seconds', 0.0) + _PAUSE_S


class PromptCallbackGroup(MutuallyExclusiveCallbackGroup):
    """
    Hold callbacks that return at once, one at a time: a PoolExecutor runs them in the thread that spins.

    That saves an image the wake-up of one thread more, on its way to the one that answers it.
    """


class PoolExecutor(Executor):
    """
    Spin in one thread, run callbacks in a pool of others, or in that one where they are of a PromptCallbackGroup.

    rclpy's MultiThreadedExecutor hands a callback to its pool again and again until one of the threads
    has begun with it. To begin, the thread needs the interpreter's lock, which the loop keeps taking from
    it: measured beside an inference thread, every callback was handed over eight times, and now and then
    thousands of them queued up and nothing was served for a second. Here each is handed over once, and
    the loop pauses: it takes the interpreter for a third of a millisecond each time that it waits anew, which
    the callback, and whoever it has woken, would wait for (0.45 ms to the inference thread, 0.23 with it).

    :param threads: how many callbacks run at the same time.
    :param on_escape: called with each exception that a callback let out; spinning goes on.
    :param pause_s: seconds after each callback, less what it gave way itself; 0 where nobody waits for the interpreter.
    """

    def __init__(
        self,
        threads: int,
        *,
        on_escape: Callable[[Exception], None],
        context: Context | None = None,
        pause_s: float = _PAUSE_S,
    ) -> None:
        super().__init__(context=context)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix='c7-callback')
        self._on_escape = on_escape
        self._pause_s = pause_s
        self._handed_over: set[Any] = set()

    def spin_until(self, stopped: Callable[[], bool]) -> None:
        """Spin until ``stopped``, which is looked at several times a second, or the end of the context."""
        while not stopped():
            try:
                self.spin_once(timeout_sec=_WAKE_S)
            except ExternalShutdownException:
                return
            except Exception as error:
                if not self.context.ok():
                    # Its end is not always told as such: whatever is made for the next wait fails.
                    return
                self._escaped(error)
                # Where it fails again and again, others are to get on.
                time.sleep(_YIELD_S)

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Wait for a callback that is ready and hand it to the pool."""
        try:
            ready: tuple[Any, Any, Any] = self.wait_for_ready_callbacks(timeout_sec=timeout_sec)
        except (ShutdownException, TimeoutException):
            return
        task, entity, _ = ready
        if isinstance(getattr(entity, 'callback_group', None), PromptCallbackGroup):
            _given.seconds = 0.0
            self._execute(task)
            time.sleep(max(0.0, self._pause_s - _given.seconds))
            return
        if task in self._handed_over or task.done():
            # Every thread is busy. Without a pause, this loop would keep them from getting on.
            time.sleep(_YIELD_S)
            return
        self._handed_over.add(task)
        ended = threading.Event()
        self._pool.submit(self._run, task, ended)
        ended.wait(_YIELD_S)
        time.sleep(self._pause_s)

    def shutdown(self, timeout_sec: float | None = None) -> bool:
        """Run no further callback; those that run are left to end."""
        ended: bool = super().shutdown(timeout_sec)
        self._pool.shutdown(wait=False)
        return ended

    def _run(self, task: Any, ended: threading.Event) -> None:
        try:
            self._execute(task)
        finally:
            self._handed_over.discard(task)
            ended.set()

    def _execute(self, task: Any) -> None:
        task()
        if task.done() and (error := task.exception()) is not None:
            self._escaped(error)

    def _escaped(self, error: Exception) -> None:
        # InvalidHandle: a subscription that was closed while its message was in hand.
        if not isinstance(error, InvalidHandle):
            self._on_escape(error)
