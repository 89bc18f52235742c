"""Choose the DDS profile and ports that large images need."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    'BUILTIN_TRANSPORTS',
    'OWN_PORTS',
    'PROFILE_NAME',
    'DdsPorts',
    'ProfileDecision',
    'apply_profile',
    'domain_id',
    'free_taken_messages',
    'named_profile',
    'ports_in_force',
    'profile_path',
    'profile_variable',
    'segment_size',
    'tune_allocator',
    'uses_fast_dds',
    'write_profile',
]

PROFILE_NAME = 'fastdds_shm.xml'

# Kilted's Fast DDS 3 warns about the old name, Jazzy's Fast DDS 2 does not know the new one.
_VARIABLES = ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE')
BUILTIN_TRANSPORTS = 'FASTDDS_BUILTIN_TRANSPORTS'
# Fast DDS would read DEFAULT_FASTRTPS_PROFILES.xml in the working directory, from any author.
_NO_PROFILE_OF_DIRECTORY = 'SKIP_DEFAULT_XML_FILE'
# Only with this does rmw_fastrtps use the profile's memory policies, and then it ignores the other variable.
_QOS_FROM_XML, _PUBLICATION_MODE = 'RMW_FASTRTPS_USE_QOS_FROM_XML', 'RMW_FASTRTPS_PUBLICATION_MODE'
_FAST_DDS = ('rmw_fastrtps_cpp', 'rmw_fastrtps_dynamic_cpp')
_OLD_DISTRIBUTIONS = ('foxy', 'galactic', 'humble', 'iron', 'jazzy')


@dataclass(frozen=True, slots=True)
class DdsPorts:
    """
    Say which UDP ports, and shared-memory ports of the same numbers, the participants of a domain use.

    Domain d has ``base + gain d`` and what follows (DDS-RTPS 2.2, 9.6.1): 0 and 1 for multicast, 10 + 2 p and 11 + 2 p
    for participant p. Fast DDS takes ports for single endpoints from the 400 below ``base``.

    :param domains: domains to choose from.
    """

    base: int
    gain: int
    domains: range

    def of(self, domain: int) -> range:
        """Return the ports of a domain."""
        return range(self.base + self.gain * domain, self.base + self.gain * (domain + 1))


# Up to domain 101 the ports lie below those that Linux gives out itself.
_STANDARD_PORTS = DdsPorts(7400, 250, range(20, 102))
OWN_PORTS = DdsPorts(1430, 80, range(20, 69))
"""Ports 1030 to 6949: all below 7000, where those of plain participants begin, whatever their domain."""


def domain_id(text: str) -> int:
    """
    Return the ROS domain that an argument or ROS_DOMAIN_ID names; for argparse's ``type``.

    :raises argparse.ArgumentTypeError: the ports of the domain would be above 65535; Fast DDS ends such a process.
    """
    with contextlib.suppress(ValueError):
        if (number := int(text, 0)) in range(233):
            return number
    raise argparse.ArgumentTypeError(f'{text!r} is not a ROS domain. Give a whole number from 0 to 232.')


@dataclass(frozen=True, slots=True)
class ProfileDecision:
    """
    Tell what was done about the DDS profile.

    :param applied: the shipped profile was put into the environment.
    :param path: that profile, None where there is none.
    :param reason: one sentence for the log.
    """

    applied: bool
    path: Path | None
    reason: str


def apply_profile(environ: MutableMapping[str, str]) -> ProfileDecision:
    """
    Put the shipped shared-memory profile into ``environ`` unless the user chose otherwise.

    It must be there before the process creates its DDS participant, so call this before ``rclpy.init``. It is left
    alone where another RMW is in use, or where the user named a profile or built-in transports. A profile that lies in
    the working directory is ignored by Fast DDS in any case, unless the user sets SKIP_DEFAULT_XML_FILE to 0.

    :param environ: changed in place, ``os.environ`` or the environment of a child process.
    """
    if not uses_fast_dds(environ):
        rmw = environ['RMW_IMPLEMENTATION']
        return ProfileDecision(False, None, f'DDS profile not set: it is for Fast DDS, the RMW is {rmw}.')
    environ.setdefault(_NO_PROFILE_OF_DIRECTORY, '1')
    if variable := named_profile(environ):
        named = Path(environ[variable])
        # A child of a process that applied the profile finds it set, although the user did not choose it.
        own = ' for large images' if named == profile_path() else ''
        return ProfileDecision(False, named, f'DDS profile{own}, as {variable} names it: {named}.')
    if builtin := environ.get(BUILTIN_TRANSPORTS):
        return ProfileDecision(False, None, f'DDS profile not set: {BUILTIN_TRANSPORTS} is {builtin}.')
    path = profile_path()
    if path is None:
        return ProfileDecision(
            False, None, f'DDS profile not set: {PROFILE_NAME} is not installed with the package; build it again.'
        )
    variable = profile_variable(environ)
    environ[variable] = str(path)
    return ProfileDecision(
        True, path, f'DDS profile for large images set; publishers of images need it too: {variable}={path}'
    )


def free_taken_messages(environ: MutableMapping[str, str], profile: Path | None) -> bool:
    """
    Have Fast DDS free each message's memory as soon as it has been taken, if the profile in force says how.

    Otherwise the memory of a topic's largest messages stays for as long as the process subscribes to the topic, even
    where another subscription takes the place of the first. Call this before ``rclpy.init``.

    :param environ: changed in place.
    :param profile: in force; the shipped one and its copies say how.
    :return: False where it does not, or where the user chose how rmw_fastrtps publishes.
    """
    chosen = environ.get(_QOS_FROM_XML) or environ.get(_PUBLICATION_MODE)
    if profile and not chosen and any(each.get('profile_name') == 'c7_readers' for each in _elements(profile)):
        environ[_QOS_FROM_XML] = '1'
    return environ.get(_QOS_FROM_XML) == '1'


def uses_fast_dds(environ: Mapping[str, str]) -> bool:
    """Return whether the RMW of this environment is Fast DDS."""
    return environ.get('RMW_IMPLEMENTATION', '') in ('', *_FAST_DDS)


def named_profile(environ: Mapping[str, str]) -> str:
    """Return the variable that names a profile, '' where none does."""
    return next((name for name in _VARIABLES if environ.get(name)), '')


def ports_in_force(environ: Mapping[str, str]) -> DdsPorts:
    """Return the ports that a participant uses which is made in this environment."""
    variable = named_profile(environ) if uses_fast_dds(environ) else ''
    numbers = _numbers(Path(environ[variable]), ('portBase', 'domainIDGain')) if variable else {}
    base = numbers.get('portBase', _STANDARD_PORTS.base)
    gain = numbers.get('domainIDGain', _STANDARD_PORTS.gain)
    own = (base, gain) == (OWN_PORTS.base, OWN_PORTS.gain)
    return OWN_PORTS if own else DdsPorts(base, gain, _STANDARD_PORTS.domains)


def profile_path() -> Path | None:
    """Return the shipped profile, in the source tree or the prefix that this module was installed in."""
    for parent in Path(__file__).resolve().parents:
        for candidate in (
            parent / 'config' / PROFILE_NAME,
            parent / 'share' / 'gps_denied_c7' / 'config' / PROFILE_NAME,
        ):
            if candidate.is_file():
                return candidate
    return None


def profile_variable(environ: Mapping[str, str]) -> str:
    """Return the name that the Fast DDS of this environment reads: Fast DDS 3 installs as ``fastdds``."""
    for prefix in filter(None, environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep)):
        share = Path(prefix) / 'share'
        for package, variable in (('fastdds', _VARIABLES[1]), ('fastrtps', _VARIABLES[0])):
            if (share / package).is_dir():
                return variable
    return _VARIABLES[0] if environ.get('ROS_DISTRO') in _OLD_DISTRIBUTIONS else _VARIABLES[1]


def segment_size(profile: Path) -> int:
    """Return the bytes of the shared-memory segment that ``profile`` asks for, 0 where it asks for none."""
    return _numbers(profile, ('segment_size',)).get('segment_size', 0)


def _numbers(profile: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Return the largest number of each of the elements ``names`` that ``profile`` holds."""
    found: dict[str, int] = {}
    for element in _elements(profile):
        name, text = element.tag.rpartition('}')[2], (element.text or '').strip()
        if name in names and text.isdigit():
            found[name] = max(int(text), found.get(name, 0))
    return found


def _elements(profile: Path) -> Iterator[ElementTree.Element]:
    try:
        return ElementTree.parse(profile).getroot().iter()
    except (OSError, ElementTree.ParseError, ValueError, LookupError):
        # Fast DDS goes on without a file it cannot read, and so does the node: also where Python lacks its encoding.
        return iter(())


_BARE_PROFILE = """<?xml version="1.0" encoding="UTF-8"?>
<dds xmlns="http://www.eprosima.com">
  <profiles>
    <participant profile_name="c7_ports" is_default_profile="true">
      <rtps>
      </rtps>
    </participant>
  </profiles>
</dds>
"""


def write_profile(
    path: Path, *, segment_bytes: int | None = None, ports: DdsPorts | None = None, transports: bool = True
) -> Path:
    """
    Write the shipped profile with changes.

    :param segment_bytes: size of the shared-memory segment, for hosts with little shared memory; None: as shipped.
    :param ports: of the participant; None: the standard's.
    :param transports: False leaves out all but the ports.
    :raises FileNotFoundError: the profile is not installed with the package.
    """
    text = _BARE_PROFILE
    if transports:
        shipped = profile_path()
        if shipped is None:
            raise FileNotFoundError(PROFILE_NAME)
        text = shipped.read_text(encoding='utf-8')
    if segment_bytes is not None:
        size = f'<segment_size>{segment_bytes}</segment_size>'
        text = re.sub('<segment_size>[0-9]+</segment_size>', size, text)
    if ports is not None:
        own = f'<port><portBase>{ports.base}</portBase><domainIDGain>{ports.gain}</domainIDGain></port>'
        text = text.replace('</rtps>', f'{own}</rtps>')
    path.write_text(text, encoding='utf-8')
    return path


def tune_allocator() -> bool:
    """
    Tell glibc to keep the memory of large messages instead of returning it to the kernel after each.

    An image is several megabytes, which glibc maps again for every message, and the page faults cost as much as the
    copying: 1500 faults for each 1080p rgb8 frame. Sets M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD (mallopt(3)),
    which also ends glibc's own adapting of the first two. Costs up to the trim threshold of memory that stays, once:
    with M_ARENA_MAX threads share it, where by default each engine that is loaded in a thread of its own could find
    another of eight arenas a core to keep 17 MB in.

    :return: whether it was done; False with another C library, or where the user set these himself.
    """
    if any(name.startswith('MALLOC_') for name in os.environ) or 'glibc.malloc' in os.environ.get('GLIBC_TUNABLES', ''):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, 'gnu_get_libc_version'):
        return False
    m_trim_threshold, m_top_pad, m_mmap_threshold, m_arena_max = -1, -2, -3, -8
    settings = (
        (m_mmap_threshold, 32 << 20), (m_trim_threshold, 128 << 20), (m_top_pad, 16 << 20), (m_arena_max, 1),
    )  # fmt: skip
    return all(library.mallopt(name, value) == 1 for name, value in settings)
