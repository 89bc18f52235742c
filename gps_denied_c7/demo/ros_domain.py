"""A ROS domain of its own on this host for a program's children, and their environment."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from gps_denied_c7.demo.child_process import DemoError
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

__all__ = ['FOREIGN_NETWORK', 'child_environment', 'free_domain_id', 'free_ports']

_LEAST_SEGMENT_BYTES = 8 << 20
FOREIGN_NETWORK = ('ROS_DISCOVERY_SERVER', 'ROS_STATIC_PEERS', 'ROS_SUPER_CLIENT')
"""Variables that lead to participants elsewhere, whatever the domain."""

_next_domain = itertools.count(os.getpid())


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
