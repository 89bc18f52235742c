"""How a process of this package ends: on the first signal, and in time even where something hangs (N-8)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable

__all__ = ['NodeStop', 'end_in_time', 'on_first_signal']

_GIVE_UP_S = 3.6
# Of the time for an end: the part after which the current frame is abandoned, and the part for the last record.
_END_FRAME_S = 1.6
_SAY_GOODBYE_S = 1.0


def on_first_signal(numbers: Iterable[signal.Signals], act: Callable[[signal.Signals], None]) -> None:
    """
    Call ``act`` once, in a thread of its own, with the first of ``numbers`` that the process gets.

    A handler written in Python runs in the main thread between any two bytecodes, inside another handler and under
    locks that it may itself want: one that sets a threading.Event for which that thread waits can block forever. So
    the handlers do nothing, and a thread learns of signals from the descriptor that the interpreter writes them to.

    To be called from the main thread, once in a process: there is one such descriptor.
    """
    awaited = frozenset(numbers)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in awaited:
        signal.signal(number, lambda number, frame: None)
    # The parent process may have blocked them, and blocked signals stay blocked here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)

    def watch() -> None:
        # Other signals with a handler are written as well.
        while (number := os.read(reader, 1)[0]) not in awaited:
            pass
        act(signal.Signals(number))

    threading.Thread(target=watch, name='c7-signals', daemon=True).start()


class NodeStop:
    """
    Turn the first SIGINT, SIGTERM or SIGHUP into a clean shutdown within 4 s (N-8).

    SIGHUP, which a terminal that is closed sends, is left alone where it was ignored before, as by nohup.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.reason = ''
        ending = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            ending.append(signal.SIGHUP)
        on_first_signal(ending, self._end)

    def _end(self, number: signal.Signals) -> None:
        self.reason = number.name
        self._asked.set()
        # An engine or a DDS teardown that hangs must not hold the process; all records are out by now.
        time.sleep(_GIVE_UP_S)
        os._exit(0)

    def wait(self) -> None:
        """Wait for a signal."""
        self._asked.wait()


def end_in_time(shut_down: Callable[[], object], abandon: Callable[[], object], timeout_s: float) -> bool:
    """
    Run ``shut_down`` in a thread of its own, which is left behind where it does not end.

    :param abandon: called where it takes too long, to end what it waits for.
    :param timeout_s: seconds for all of it, and for the last record after it.
    :return: whether it ended.
    """
    done = threading.Event()

    def run() -> None:
        shut_down()
        done.set()

    try:
        threading.Thread(target=run, name='c7-shutdown', daemon=True).start()
    except RuntimeError:
        # No memory for one more thread: shut down in this one, which may be cut short.
        run()
    for_frame_s = max(0.0, timeout_s - _END_FRAME_S)
    if not done.wait(for_frame_s):
        abandon()
    return done.wait(max(0.0, timeout_s - for_frame_s - _SAY_GOODBYE_S))
