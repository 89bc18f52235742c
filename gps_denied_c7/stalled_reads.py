"""
Reads that may never return: a network mount whose server is gone, a FUSE program that does not answer.

The kernel cannot end such a read. So it runs in a thread of its own, which is left behind when it stalls.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from gps_denied_c7.errors import NO_THREADS_REMEDY, C7Error, forget_locals

__all__ = ['STALLED_S', 'StalledReadError', 'note_progress', 'read_or_give_up']

STALLED_S = 10.0
"""Seconds without a byte after which a read is given up."""

_LOOK_S = 0.1
_REMEDY = 'Check the disk or network mount that holds it, or name a file elsewhere.'

_SLOW_REMEDY = f'{_REMEDY} If it is only slow, raise load_timeout_s.'

_T = TypeVar('_T')
_log = logging.getLogger(__name__)
_current = threading.local()
_left_behind: dict[str, _Read] = {}
_lock = threading.Lock()


class StalledReadError(C7Error):
    """A file could not be read in time; its content is unknown."""


class _Read:
    """One read in a thread of its own."""

    def __init__(self, what: str, work: Callable[[], object]) -> None:
        self.what = what
        self._work = work
        self.began_s = self.last_s = time.monotonic()
        self.given_up = False
        self.result: object = None
        self.error: BaseException | None = None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, name='c7-read', daemon=True)

    def _run(self) -> None:
        _current.read = self
        try:
            self.result = self._work()
        except BaseException as error:
            # Files of hundreds of megabytes, maybe.
            forget_locals(error)
            self.error = error
        finally:
            self.done.set()
            if self.given_up:
                # What it read is used no more, and may be large.
                self.result = None
                _log.warning('%s: the read that was given up has ended.', self.what)


def note_progress() -> None:
    """Say that bytes came; a read that was given up meanwhile ends here, by StalledReadError."""
    read: _Read | None = getattr(_current, 'read', None)
    if read is not None:
        read.last_s = time.monotonic()
        if read.given_up:
            raise StalledReadError(f'{read.what}: its read was given up.')


def read_or_give_up(
    what: str,
    work: Callable[[], _T],
    *,
    limit_s: float,
    cancelled: threading.Event | None = None,
) -> _T:
    """
    Return what ``work`` returns, or raise what it raises, as long as its reads go on.

    :param what: the file, for messages; where an earlier read of it was left behind and still hangs, no other begins.
    :param work: calls :func:`note_progress` after each piece.
    :param limit_s: seconds for all of it.
    :param cancelled: gives up at once when it is set.
    :raises StalledReadError: it stalls, takes too long, or was cancelled; its thread is left behind.
    """
    with _lock:
        for name in [name for name, earlier in _left_behind.items() if earlier.done.is_set()]:
            del _left_behind[name]
        before = _left_behind.get(what)
    if before is not None:
        raise StalledReadError(f'{what}: an earlier read still hangs.', remedy=_REMEDY)
    read = _Read(what, work)
    try:
        read.thread.start()
    except RuntimeError as error:
        raise C7Error(f'{what} cannot be read now: {error}.', remedy=NO_THREADS_REMEDY) from error
    while not read.done.wait(_LOOK_S):
        now_s = time.monotonic()
        if cancelled is not None and cancelled.is_set():
            why, remedy = 'its read was cancelled', ''
        elif now_s - read.last_s > STALLED_S:
            why, remedy = f'no data came for {STALLED_S:g} s', _REMEDY
        elif now_s - read.began_s > limit_s:
            why, remedy = f'it was not read within {limit_s:g} s', _SLOW_REMEDY
        else:
            continue
        read.given_up = True
        with _lock:
            _left_behind[what] = read
        _log.error('%s: %s; its thread keeps waiting.', what, why)
        raise StalledReadError(f'{what}: {why}.', remedy=remedy)
    if read.error is not None:
        raise read.error
    return read.result  # type: ignore[return-value]
