"""Child processes of the demo: started in one environment, logged, ended one by one and never left behind."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from gps_denied_c7.child_environment import SAFE_DIRECTORY, python_child
from gps_denied_c7.errors import C7Error
from gps_denied_c7.ros.dds_memory import MORE_SHM, SEGMENT_OVERHEAD, HostTransport
from gps_denied_c7.ros.fastdds import (
    BUILTIN_TRANSPORTS,
    OWN_PORTS,
    DdsPorts,
    apply_profile,
    named_profile,
    ports_in_force,
    profile_variable,
    segment_size,
    uses_fast_dds,
    write_profile,
)

__all__ = ['FOREIGN_NETWORK', 'Child', 'DemoError', 'child_environment', 'free_domain_id', 'free_ports', 'wait_for']

_KILL_AFTER_S = 10.0
# Has the kernel end a child when the demo is killed, which could not end it itself then. Not in a preexec_fn: the fork
# that one needs runs Python's hooks, and what a signal's handler raises there is lost. util-linux is essential.
_DIES_WITH_PARENT = ('setpriv', '--pdeathsig', 'KILL', '--')
_LEAST_SEGMENT_BYTES = 8 << 20
FOREIGN_NETWORK = ('ROS_DISCOVERY_SERVER', 'ROS_STATIC_PEERS', 'ROS_SUPER_CLIENT')
"""Variables that lead to participants elsewhere, whatever the domain."""

_next_domain = itertools.count(os.getpid())


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
def free_domain_id(ports: DdsPorts) -> Iterator[int]:
    """
    Hold a ROS domain that nothing on this host uses, by a claim that our programs respect and that dies with its owner.

    Each call begins with the next number: what this process left in a domain before, as entities that wait to be
    collected, is then not there to be found.

    :param ports: what the participants will use. With ports of our own no foreign participant can join later, either.
    """
    for _ in ports.domains:
        number = ports.domains[next(_next_domain) % len(ports.domains)]
        # An abstract name: of all users and containers that share these ports, without a file that others may not open.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
            try:
                claim.bind(f'\0gps_denied_c7 domain {number}')
            except OSError:
                continue
            if _bound_ports().isdisjoint(ports.of(number)):
                yield number
                return
    numbers = f'{ports.domains[0]} to {ports.domains[-1]}'
    raise DemoError(f'every ROS domain from {numbers} is in use.', remedy='Name one with --domain-id.')


def _bound_ports() -> set[int]:
    """Return the UDP ports in use here, and Fast DDS's ports in shared memory, which other containers may share."""
    bound = set()
    for table in (Path('/proc/net/udp'), Path('/proc/net/udp6')):
        with contextlib.suppress(FileNotFoundError):
            sockets = table.read_text().splitlines()[1:]
            bound |= {int(line.split()[1].rpartition(':')[2], 16) for line in sockets}
    for lock in Path('/dev/shm').glob('fast*_port*_el'):
        name = re.fullmatch('fast(?:rtps|dds)_port([0-9]+)_el', lock.name)
        if name and int(name[1]) not in bound and _is_locked(lock):
            bound.add(int(name[1]))
    return bound


def _is_locked(path: Path) -> bool:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), 'rb') as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        # It is locked, or another user's.
        return True
    return False


def free_ports(environ: Mapping[str, str]) -> DdsPorts:
    """Return the ports of a domain of our own: none of plain participants, unless the user chose profile or RMW."""
    return OWN_PORTS if uses_fast_dds(environ) and not named_profile(environ) else ports_in_force(environ)


def child_environment(
    domain_id: int, directory: Path, processes: int, *, ports: DdsPorts | None = None, transports: str = ''
) -> dict[str, str]:
    """
    Return this process's environment for a child: that domain, this host only, and shared memory that fits.

    :param directory: where a DDS profile goes that differs from the shipped one, if need be.
    :param processes: how many children share /dev/shm.
    :param ports: of the domain, from :func:`free_ports`; None: as the environment has them.
    :param transports: built-in transports of Fast DDS to use, whatever the environment names.
    :raises DemoError: there is too little shared memory for a single large image.
    """
    # Humble knows only the older variable, which newer distributions complain of.
    humble = os.environ.get('ROS_DISTRO') == 'humble'
    local = {'ROS_LOCALHOST_ONLY': '1'} if humble else {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
    environ = {**os.environ, **local, 'ROS_DOMAIN_ID': str(domain_id), 'PYTHONUNBUFFERED': '1'}
    if ports is not None:
        for name in FOREIGN_NETWORK:
            environ.pop(name, None)
    if transports:
        # Naming the built-in transports keeps every process from choosing the profile itself.
        environ[BUILTIN_TRANSPORTS] = transports
        ports = ports or ports_in_force(environ)
        while chosen := named_profile(environ):
            del environ[chosen]
    chosen = named_profile(environ)
    decision = apply_profile(environ)
    segment_bytes = _fitting_segment(processes, decision.path) if decision.applied and decision.path else None
    if uses_fast_dds(environ) and not chosen and (ports or segment_bytes):
        profile = write_profile(
            directory / 'fastdds.xml', segment_bytes=segment_bytes, ports=ports, transports=decision.applied
        )
        environ[profile_variable(environ)] = str(profile)
    return environ


def _fitting_segment(processes: int, profile: Path) -> int | None:
    """Return the size of segment that fits into /dev/shm once for each process, None where the profile's does."""
    free = HostTransport.read().shm_free_bytes or 0
    if free >= processes * SEGMENT_OVERHEAD * segment_size(profile):
        return None
    # Nine tenths: the ports and locks of Fast DDS lie there as well.
    fitting = int(0.9 * free / processes / SEGMENT_OVERHEAD)
    if fitting < _LEAST_SEGMENT_BYTES:
        raise DemoError(
            f'/dev/shm has {free / 1e6:.1f} MB left, too little for large images.', remedy=MORE_SHM
        )
    return fitting
