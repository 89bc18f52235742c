"""
What a worker writes on its standard streams, logged at a limited rate (N-8).

A vendor's library may write anything, up to 100 MB a second. The pipe is always emptied, so that no worker waits for
the log; lines beyond the limit are counted instead. Records of this package have a level. Errors among them have a
limit of their own, which other output cannot use up.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import time
from collections.abc import Callable

from gps_denied_c7.worker.child import LOG_MARK

__all__ = ['WorkerLog']

_MARK = LOG_MARK.encode()
_F_SETPIPE_SZ = 1031
_PIPE_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_LINE_BYTES = 2000
# A line counts as one, and one more for each of these many bytes.
_BYTES_EACH = 256
_REPORT_EVERY_S = 10.0
# Pause between reads while most lines are left out: each read wakes this process up.
_PAUSE_S = 0.002

_log = logging.getLogger(__name__)


class _Share:
    """Let through ``rate`` a second on average, and ``burst`` at once."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._at = burst, clock()

    def open(self) -> bool:
        """Return whether something would be let through now."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        return self._left >= 1.0

    def take(self, cost: float) -> bool:
        """Return whether it is let through; a long line may be paid for later."""
        if not self.open():
            return False
        self._left -= cost
        return True


class WorkerLog:
    """
    Log what comes out of a pipe, its own records with their level and vendors' lines as warnings.

    :param name: returns what each line begins with; of a worker, which may be renamed.
    :param clock: steady, in seconds.
    """

    def __init__(self, name: Callable[[], str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        # Errors may also use the limit of our other records, and these the limit of vendors' lines; not the reverse.
        self._noise = _Share(20.0, 200.0, clock)
        self._ours = _Share(20.0, 200.0, clock)
        self._errors = _Share(5.0, 100.0, clock)
        self._rest = b''
        self._skipping = False
        self._lines_out = self._bytes_out = 0
        self._out_since = 0.0

    def run(self, descriptor: int) -> None:
        """Log until the last writer has closed the pipe; closes the descriptor."""
        buffer = bytearray(_READ_BYTES)
        try:
            with contextlib.suppress(OSError):  # the user has no more pages for pipes
                fcntl.fcntl(descriptor, _F_SETPIPE_SZ, _PIPE_BYTES)
            waiting = select.poll()
            waiting.register(descriptor, select.POLLIN)
            while True:
                if not waiting.poll(self._due_in_ms()):
                    self._report()
                    continue
                size = os.readv(descriptor, [buffer])
                if not size:
                    break
                before = self._bytes_out
                self.feed(buffer, size)
                if self._bytes_out - before > size // 2 and size < _READ_BYTES:
                    time.sleep(_PAUSE_S)
                if self._due_in_ms() == 0:
                    self._report()
            self.finish()
        finally:
            os.close(descriptor)

    def feed(self, buffer: bytearray, size: int) -> None:
        """Take the first ``size`` bytes of ``buffer``, which follow the previous ones."""
        position = 0
        if self._skipping:
            end = buffer.find(b'\n', 0, size)
            self._skipping = end < 0
            position = size if end < 0 else end + 1
            self._leave_out(0, position)
        while position < size:
            if not self._rest and not self._open(bytes(buffer[position : position + 3])):
                position = self._skip(buffer, position, size)
                continue
            end = buffer.find(b'\n', position, size)
            stop = size if end < 0 else end
            line = self._rest + bytes(buffer[position : min(stop, position + _LINE_BYTES - len(self._rest))])
            if end < 0 and len(line) < _LINE_BYTES:
                self._rest = line
                return
            self._rest = b''
            # The rest of a line without an end, or with a far one, is read and left out.
            cut = len(line) >= _LINE_BYTES
            self._line(line, cut)
            self._skipping = end < 0
            position = size if end < 0 else end + 1

    def finish(self) -> None:
        """Log a line that has no end, and say what was left out."""
        if self._rest:
            self._line(self._rest, cut=False)
            self._rest = b''
        self._report()

    def _shares(self, beginning: bytes) -> tuple[_Share, ...]:
        if not beginning.startswith(_MARK):
            return (self._noise,)
        number, _, _ = beginning[1:4].partition(b' ')
        serious = number[:1] in b'456789' or len(number) > 2
        return (self._errors, self._ours, self._noise) if number and serious else (self._ours, self._noise)

    def _open(self, beginning: bytes) -> bool:
        return any(share.open() for share in self._shares(beginning))

    def _skip(self, buffer: bytearray, position: int, size: int) -> int:
        """Return where the next line begins that may be logged; the bytes in front of it are counted only."""
        marks = [_MARK] if self._ours.open() else [_MARK + b'4', _MARK + b'5'] if self._errors.open() else []
        found = [place for mark in marks if (place := buffer.find(b'\n' + mark, position, size)) >= 0]
        end = min(found) + 1 if found else size
        if not found:
            # The last line may go on in the next chunk, and may be one of ours.
            begins = buffer.rfind(b'\n', position, size) + 1
            if begins > position and buffer[begins : begins + 1] == _MARK:
                end = begins
            else:
                self._skipping = buffer[size - 1 : size] != b'\n'
        self._leave_out(buffer.count(b'\n', position, end) + (end == size and self._skipping), end - position)
        if end < size and not found:
            self._rest, end = bytes(buffer[end:size])[:_LINE_BYTES], size
        return end

    def _line(self, line: bytes, cut: bool) -> None:
        cost = 1.0 + len(line) / _BYTES_EACH
        if not any(share.take(cost) for share in self._shares(line[:4])):
            self._leave_out(1, len(line) + 1)
            return
        level, text = logging.WARNING, line.decode('utf-8', 'replace').rstrip()
        if text.startswith(LOG_MARK):
            number, _, text = text[1:].partition(' ')
            if number.isascii() and number.isdigit():
                level = min(int(number[:3]), logging.CRITICAL)
        if text:
            _log.log(level, '%s: %s%s', self._name(), text, ' …' if cut else '')

    def _leave_out(self, lines: int, size: int) -> None:
        if not self._lines_out and not self._bytes_out:
            self._out_since = self._clock()
        self._lines_out += lines
        self._bytes_out += size

    def _due_in_ms(self) -> int | None:
        if not self._lines_out and not self._bytes_out:
            return None
        return max(0, int((self._out_since + _REPORT_EVERY_S - self._clock()) * 1e3))

    def _report(self) -> None:
        """Say how much was left out, where a line was; the rest of a long line says so itself."""
        if self._lines_out:
            _log.warning(
                '%s: left out %s lines (%s bytes) of its output within %.0f s.',
                self._name(), f'{self._lines_out:,}', f'{self._bytes_out:,}', self._clock() - self._out_since,
            )  # fmt: skip
        self._lines_out = self._bytes_out = 0
