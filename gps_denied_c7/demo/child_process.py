"""Child processes of the demo: started without a fork of Python's, logged, ended one by one and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gps_denied_c7.child_environment import SAFE_DIRECTORY, python_child
from gps_denied_c7.errors import C7Error, in_one_line

__all__ = ['Child', 'DemoError', 'run_program', 'wait_for']

_KILL_AFTER_S = 10.0
# Has the kernel end a child when the demo is killed, which could not end it itself then. Not in a preexec_fn: the fork
# that one needs runs Python's hooks, and what a signal's handler raises there is lost. util-linux is essential.
# The shell looks whether that was too late: the parent of a process that has lost its own is another one.
_DIES_WITH_PARENT = ('setpriv', '--pdeathsig', 'KILL', '--', 'sh', '-c', '[ "$PPID" = "$0" ] && exec "$@"')


class DemoError(C7Error):
    """The demo could not be carried out."""


class Child:
    """
    Run one Python module as a process; a context manager that ends it.

    :param log: file that gets its error output, and its output unless that is piped; None for this process's own.
    :param pipe: give its output to ``stdout`` instead.
    :param commands: take its input from ``stdin``.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], environ: Mapping[str, str], *,
        log: Path | None = None, pipe: bool = False, commands: bool = False,
    ) -> None:  # fmt: skip
        self.name = module.rpartition('.')[2]
        self.log = log
        with log.open('wb') if log else contextlib.nullcontext() as errors:
            command, environment = python_child(module, *arguments, environ=environ)
            self.process = subprocess.Popen(
                [*_DIES_WITH_PARENT, str(os.getpid()), *command], env=environment, cwd=SAFE_DIRECTORY, text=True,
                stdin=subprocess.PIPE if commands else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else errors, stderr=errors,
                # Ctrl-C goes to a whole foreground group; the demo ends its children itself, in order.
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.process.poll() is None:
            self.stop()

    def stop(self, number: signal.Signals = signal.SIGINT, timeout_s: float = _KILL_AFTER_S) -> int:
        """Send ``number`` and return the exit code; a process that does not end is killed (then -9)."""
        self.process.send_signal(number)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = _KILL_AFTER_S) -> int:
        """Wait for the end and return the exit code; a process that does not end is killed (then -9)."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def check_alive(self) -> None:
        """Raise DemoError if the process has ended."""
        if (code := self.process.poll()) is not None:
            raise DemoError(f'{self.name} ended with code {code}.\n{self.tail()}', remedy=self._where())

    def tail(self, lines: int = 25) -> str:
        """Return the end of its log."""
        if self.log is None:
            return ''
        return '\n'.join(self.log.read_text(encoding='utf-8', errors='replace').splitlines()[-lines:])

    def _where(self) -> str:
        return f'Its whole log is {self.log}.' if self.log else ''


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str, *children: Child) -> None:
    """
    Wait until ``condition`` holds.

    :raises DemoError: it did not within ``timeout_s`` seconds, or one of ``children`` ended.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        for child in children:
            child.check_alive()
        if time.monotonic() > deadline:
            logs = '\n'.join(child.tail() for child in children)
            raise DemoError(f'waited {timeout_s:.0f} s for {what}.\n{logs}')
        time.sleep(0.02)


def run_program(name: str, work: Callable[[], int]) -> int:
    """
    Do the work of a program that starts children, and return its exit status; an error of ours is 2, Ctrl-C 130.

    Children have sessions of their own, so they are ended by leaving their context managers, on SIGTERM too.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # A shell starts what runs in the background with SIGINT ignored, and Python would leave it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return work()
    except (C7Error, ModuleNotFoundError) as error:
        print(f'{name}: {in_one_line(error)}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
