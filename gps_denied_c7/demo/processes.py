"""Child processes of the demo: started in one environment, logged, ended one by one and never left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from gps_denied_c7.errors import C7Error
from gps_denied_c7.python_child import SAFE_DIRECTORY, python_child
from gps_denied_c7.ros.dds import SEGMENT_OVERHEAD, HostTransport, apply_profile, segment_size, write_profile

__all__ = ['Child', 'DemoError', 'child_environment', 'free_domain_id', 'wait_for']

_KILL_AFTER_S = 10.0
# Has the kernel end a child when the demo is killed, which could not end it itself then. Not in a preexec_fn: the fork
# that one needs runs Python's hooks, and what a signal's handler raises there is lost. util-linux is essential.
_DIES_WITH_PARENT = ('setpriv', '--pdeathsig', 'KILL', '--')
_LEAST_SEGMENT_BYTES = 8 << 20


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
                [*_DIES_WITH_PARENT, *command], env=environment, cwd=SAFE_DIRECTORY, text=True,
                stdin=subprocess.PIPE if commands else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else errors, stderr=errors,
                # Ctrl-C goes to a whole foreground group; the demo ends its children itself, in order.
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


@contextlib.contextmanager
def free_domain_id() -> Iterator[int]:
    """
    Hold a ROS domain that nobody on this host uses, by a lock that dies with its owner.

    A participant of domain d listens on UDP port 7400 + 250 d + 10 or a little above (DDS-RTPS 2.2, 9.6.1); up to
    d = 101 these lie below the ports that Linux gives out itself.
    """
    for number in range(20, 60):
        lock = open(Path(tempfile.gettempdir()) / f'c7-domain-{number}.lock', 'w')  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        with lock:
            if any(_is_bound(7400 + 250 * number + 10 + 2 * participant) for participant in range(4)):
                continue
            yield number
        return
    raise DemoError('every ROS domain from 20 to 59 is in use.', remedy='Name one with --domain-id.')


def _is_bound(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(('', port))
        except OSError:
            return True
    return False


def child_environment(domain_id: int, directory: Path, processes: int) -> dict[str, str]:
    """
    Return this process's environment for a child: that domain, this host only, and shared memory that fits.

    :param directory: where a DDS profile goes that asks for less than the shipped one, if need be.
    :param processes: how many children share /dev/shm.
    :raises DemoError: there is too little shared memory for a single large image.
    """
    # Humble knows only the older variable, which newer distributions complain of.
    humble = os.environ.get('ROS_DISTRO') == 'humble'
    local = {'ROS_LOCALHOST_ONLY': '1'} if humble else {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
    environ = {**os.environ, **local, 'ROS_DOMAIN_ID': str(domain_id), 'PYTHONUNBUFFERED': '1'}
    decision = apply_profile(environ)
    if not decision.applied or decision.path is None:
        return environ
    free = HostTransport.read().shm_free_bytes or 0
    if free < processes * SEGMENT_OVERHEAD * segment_size(decision.path):
        # Nine tenths: the ports and locks of Fast DDS lie there as well.
        fitting = int(0.9 * free / processes / SEGMENT_OVERHEAD)
        if fitting < _LEAST_SEGMENT_BYTES:
            raise DemoError(
                f'/dev/shm has {free / 1e6:.1f} MB left, too little for large images.',
                remedy='Give the container more (docker run --shm-size=1g), or remove what killed processes left '
                'behind (fastdds shm clean).',
            )
        environ[decision.variable] = str(write_profile(directory / 'fastdds.xml', fitting))
    return environ
