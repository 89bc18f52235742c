"""What callbacks wait for, and how they run: in a few threads, each once, none lets an exception out (N-4, N-5)."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rclpy.callback_groups import CallbackGroup, MutuallyExclusiveCallbackGroup
from rclpy.context import Context
from rclpy.exceptions import InvalidHandle
from rclpy.executors import (
    ConditionReachedException,
    Executor,
    ExternalShutdownException,
    ShutdownException,
    TimeoutException,
)
from rclpy.node import Node
from rclpy.subscription import Subscription
from rclpy.waitable import NumberOfEntities, Waitable

__all__ = [
    'CallbackGuard', 'HandleWaitable', 'PoolExecutor', 'PromptCallbackGroup', 'SubscriptionReady', 'Untaken',
    'yield_gil',
]  # fmt: skip

# stop, and whatever else changes what is waited for, ends a wait; this is for what might not.
_WAKE_S = 1.0
_YIELD_S = 0.001
_PAUSE_S = 0.001

Callback = TypeVar('Callback', bound=Callable[..., Any])

# Seconds for which the callback of a thread has yielded so far.
_yielded = threading.local()


class CallbackGuard:
    """
    Wrap callbacks so that an exception is reported instead of ending ``spin()``.

    :param report: takes the callback's name and the exception; must not raise.
    """

    def __init__(self, report: Callable[[str, Exception], None]) -> None:
        self._report = report

    def __call__(self, name: str, callback: Callback) -> Callback:
        """
        Return ``callback`` guarded; a failed call returns its last argument if that is a service response.

        rclpy looks at the signature to decide what a callback receives, so the wrapper keeps it.
        """

        @functools.wraps(callback)
        def guarded(*args: Any) -> Any:
            try:
                return callback(*args)
            except Exception as error:
                self._report(name, error)
                return args[1] if len(args) == 2 else None

        return guarded  # type: ignore[return-value]


def yield_gil() -> None:
    """
    Release the GIL long enough for a notified thread to start its next call that runs without it.

    For callbacks; a PoolExecutor subtracts the time from its own pause.
    """
    time.sleep(_PAUSE_S)
    _yielded.seconds = getattr(_yielded, 'seconds', 0.0) + _PAUSE_S


class PromptCallbackGroup(MutuallyExclusiveCallbackGroup):
    """
    Hold callbacks that return at once, one at a time: a PoolExecutor runs them in the thread that spins.

    That saves one thread wake-up on an image's way to the inference thread.
    """


class PoolExecutor(Executor):
    """
    Spin in one thread, run callbacks in a pool of others, or in that one where they are of a PromptCallbackGroup.

    rclpy's MultiThreadedExecutor hands a callback to its pool again and again until one of the threads
    has begun with it. To begin, the thread needs the interpreter's lock, which the loop keeps taking from
    it: measured beside an inference thread, every callback was handed over eight times, and occasionally
    thousands of them queued up and nothing was served for a second. Here each is handed over once, and
    the loop pauses: each new wait holds the interpreter for a third of a millisecond, which delays the callback
    and the thread that it notifies (0.45 ms to the inference thread, 0.23 with the pause).

    :param threads: how many callbacks run at the same time.
    :param on_escape: called with each exception that a callback raised; spinning continues.
    :param pause_s: seconds after each callback, less those that it yielded itself; 0 if no thread waits for the GIL.
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
        self._stopped = False

    def spin(self) -> None:
        """Spin until :meth:`stop` or the end of the context."""
        while not self._stopped:
            try:
                self.spin_once(timeout_sec=_WAKE_S)
            except ExternalShutdownException:
                return
            except Exception as error:
                if not self.context.ok():
                    # Its end is not always reported as such: anything made for the next wait fails.
                    return
                self._escaped(error)
                # If it fails repeatedly, other threads must be able to continue.
                time.sleep(_YIELD_S)

    def stop(self) -> None:
        """End :meth:`spin`, from any thread."""
        self._stopped = True
        self.wake()

    def _is_stopped(self) -> bool:
        return self._stopped

    def spin_once(self, timeout_sec: float | None = None) -> None:
        """Wait for a callback that is ready and hand it to the pool."""
        try:
            # A wait that is notified goes on until a callback is ready, or the condition holds.
            ready: tuple[Any, Any, Any] = self.wait_for_ready_callbacks(
                timeout_sec=timeout_sec, condition=self._is_stopped
            )
        except (ShutdownException, TimeoutException, ConditionReachedException):
            return
        task, entity, _ = ready
        if isinstance(getattr(entity, 'callback_group', None), PromptCallbackGroup):
            _yielded.seconds = 0.0
            self._execute(task)
            time.sleep(max(0.0, self._pause_s - _yielded.seconds))
            return
        if task in self._handed_over or task.done():
            # Every thread is busy. Without a pause, this loop would starve them.
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
        # InvalidHandle: a subscription that was closed while its message was being handled.
        if not isinstance(error, InvalidHandle):
            self._on_escape(error)


class Untaken(CallbackGroup):
    """Have executors leave the messages of subscriptions alone, though not their events."""

    def can_execute(self, entity: Any) -> bool:
        """Return whether an executor may wait for ``entity``."""
        return not isinstance(entity, Subscription)

    def beginning_execution(self, entity: Any) -> bool:
        """Let any number of callbacks run at the same time."""
        return True

    def ending_execution(self, entity: Any) -> None:
        """Do nothing: nothing waits for the end of a callback."""


class HandleWaitable(Waitable):
    """
    Have an executor wait for a handle of rcl, and call back in its turn.

    :param group: of the callback.
    :param kind: as a wait set names it, ``subscription`` or ``event``.
    :param room: that it takes in a wait set.
    :param handle: kept while an executor waits for it; destroyed by the code that made it, after :meth:`close`.
    :param callback: what it raises goes to the executor.
    """

    def __init__(
        self,
        node: Node,
        group: CallbackGroup,
        kind: str,
        room: NumberOfEntities,
        handle: Any,
        callback: Callable[[], None],
    ) -> None:
        super().__init__(group)
        self._node = node
        self._kind = kind
        self._room = room
        self._handle = handle
        self._callback = callback
        self._index: int | None = None
        self._listens = False

    def listen(self) -> None:
        """Have the node's executor call back from now on."""
        self._node.add_waitable(self)
        self._listens = True

    def close(self) -> None:
        """Call back no more; safe to repeat."""
        if self._listens:
            self._listens = False
            self._node.remove_waitable(self)

    def __enter__(self) -> None:
        """Keep the handle while an executor waits for it."""
        self._handle.__enter__()

    def __exit__(self, *exception: Any) -> None:
        """Let it be destroyed again."""
        self._handle.__exit__(*exception)

    def get_num_entities(self) -> NumberOfEntities:
        """Return how much room it takes in a wait set."""
        return self._room

    def add_to_wait_set(self, wait_set: Any) -> None:
        """Have an executor wait for the handle, unless it has gone: rclpy asks even where entering failed."""
        self._index = None
        with contextlib.suppress(InvalidHandle), self._handle:
            self._index = getattr(wait_set, f'add_{self._kind}')(self._handle)

    def is_ready(self, wait_set: Any) -> bool:
        """Return whether the executor is to call back."""
        return self._index is not None and bool(wait_set.is_ready(self._kind, self._index))

    def take_data(self) -> None:
        """Take nothing yet: rclpy never serves a waitable again of which this has failed."""

    async def execute(self, taken_data: None) -> None:
        """Call back."""
        self._callback()


class SubscriptionReady(HandleWaitable):
    """
    Call back when a subscription has a message, and leave taking it to the callback.

    :param subscription: of an :class:`Untaken` group; destroyed by the code that made it, after :meth:`close`.
    :param group: of the callback.
    :param callback: what it raises goes to the executor.
    """

    def __init__(
        self, node: Node, subscription: Subscription, group: CallbackGroup, callback: Callable[[], None]
    ) -> None:
        super().__init__(
            node, group, 'subscription', NumberOfEntities(num_subs=1), subscription.handle, callback
        )
        self.listen()
