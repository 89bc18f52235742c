"""Handle signals where they can do no harm."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable

__all__ = ['on_first_signal']


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
