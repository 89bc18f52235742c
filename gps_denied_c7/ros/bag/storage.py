"""What the storage formats of rosbag2 share: channels, runs of messages, offered QoS and the bytes of a message."""

from __future__ import annotations

import abc
import fcntl
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gps_denied_c7.errors import C7Error

__all__ = [
    'LZ4_MAGIC', 'MOST_BYTES', 'ZSTD_MAGIC', 'BagError', 'Channel', 'Entry', 'Faults', 'OfferedQos', 'Run', 'Storage',
    'cdr_of', 'count_text', 'decompressed', 'offered', 'open_for_writing', 'profiles_of', 'read_yaml', 'reason',
    'time_text', 'whole',
]  # fmt: skip

MOST_BYTES = 1 << 30
"""Of a message or a chunk once decompressed: beyond any recorder's, and 32,000 times fewer bytes may ask for it."""

ZSTD_MAGIC = b'\x28\xb5\x2f\xfd'
LZ4_MAGIC = b'\x04\x22\x4d\x18'
_UNLIMITED = 2**31 - 1
# Of compressed input at a time: zstd makes some hundred MB of it at most.
_PIECE_BYTES = 1 << 12


class _Loader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):  # type: ignore[misc]
    """Refuse merges (``<<``): each copies what its aliases stand for, and a few in each other fill the memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave the key as it is, which is then one that YAML does not know."""


class BagError(C7Error):
    """A bag that is missing, empty or damaged, or one that cannot be played as asked."""


@dataclass(frozen=True, slots=True)
class OfferedQos:
    """
    Hold what the recorded publishers of a topic offered, as far as it decides which subscribers match and what is kept.

    :param depth: of the history; 0 where the bag does not say, very large where everything is kept.
    :param deadline_ns: at most so long between two messages; 0 where nothing was offered, as for the next two.
    :param lifespan_ns: older messages are not delivered.
    :param lease_ns: a publisher that is silent for longer is not alive.
    :param manual: only what it publishes shows that a publisher is alive, not that its process runs.
    """

    reliable: bool = True
    transient_local: bool = False
    depth: int = 0
    deadline_ns: int = 0
    lifespan_ns: int = 0
    lease_ns: int = 0
    manual: bool = False

    def __str__(self) -> str:
        depth = 'all' if self.depth == _UNLIMITED else self.depth or 'unknown'
        times = {'deadline': self.deadline_ns, 'lifespan': self.lifespan_ns, 'lease': self.lease_ns}
        return ', '.join([
            'reliable' if self.reliable else 'best effort',
            'transient local' if self.transient_local else 'volatile',
            f'depth {depth}',
            *(f'{name} {time_ns / 1e9:g} s' for name, time_ns in times.items() if time_ns),
            *(['manual liveliness'] if self.manual else []),
        ])  # fmt: skip


@dataclass(frozen=True, slots=True)
class Channel:
    """
    Describe one stream of messages as its storage file does.

    :param msgtype: as the file spells it, '' where it names none.
    :param encoding: of the messages, ``cdr`` for what ROS 2 can publish.
    :param qos: one profile per recorded publisher, None where the file does not say.
    :param type_hash: ``RIHS01_...``, '' where the file does not say.
    :param definition: of the message type, as concatenated ``.msg`` text, '' where the file has none.
    """

    topic: str
    msgtype: str
    encoding: str
    qos: tuple[OfferedQos, ...] | None = None
    type_hash: str = ''
    definition: str = ''


class Entry(NamedTuple):
    """One message: bag time in nanoseconds, its channel's id in the file, and its bytes as stored."""

    time_ns: int
    channel: int
    data: bytes


class Run(NamedTuple):
    """
    Messages in the order of time that are read together.

    :param start_ns: no message of it is earlier.
    :param read: yields them; what cannot be read is noted in the storage's ``missing`` and left out.
    """

    start_ns: int
    read: Callable[[], Iterator[Entry]]


def reason(error: BaseException) -> str:
    """Return what an exception says, without its final full stop, or its name where it says nothing."""
    return (str(error) or type(error).__name__).rstrip('.')


def count_text(counts: Mapping[str, int]) -> str:
    """Return ``3 messages of /a, 1 message of /b``."""
    texts = [f'{count} message{"s" if count != 1 else ""} of {name}' for name, count in sorted(counts.items()) if count]
    return ', '.join(texts) or 'no message'


def time_text(time_ns: int) -> str:
    """Return a bag time as UTC, or in seconds where no calendar has it."""
    try:
        return datetime.fromtimestamp(time_ns / 1e9, timezone.utc).strftime('%Y-%m-%d %H:%M:%S UTC')
    except (OverflowError, OSError, ValueError):
        return f'{time_ns / 1e9:.3f} s'


def cdr_of(data: Any) -> bytes:
    """
    Return the CDR bytes of a stored message, decompressed where it was recorded with message compression.

    A bag's metadata names that compression, but may be lost. The bytes tell by themselves: CDR of ROS 2 begins with a
    zero byte (OMG DDSI-RTPS 10.2, encapsulation schemes up to 0x000b), zstd and lz4 frames do not.

    :raises ValueError: it is not CDR.
    """
    if not isinstance(data, bytes):
        raise ValueError(f'stored as {type(data).__name__}, not as bytes')
    if data[:4] in (ZSTD_MAGIC, LZ4_MAGIC):
        data = decompressed(data, 'zstd' if data[:4] == ZSTD_MAGIC else 'lz4')
    if len(data) < 4 or data[0] != 0 or data[1] > 0x0B:
        raise ValueError(f'not CDR, begins with {data[:4].hex(" ") or "nothing"}')
    return data


def decompressed(data: bytes, name: str) -> bytes:
    """
    Return what zstd or lz4 frames hold, one after another.

    :param name: ``zstd`` or ``lz4``.
    :raises ValueError: they are damaged or cut, or hold more than ``MOST_BYTES``.
    """
    import lz4.frame
    import zstandard

    def begin() -> Any:
        return lz4.frame.LZ4FrameDecompressor() if name == 'lz4' else zstandard.ZstdDecompressor().decompressobj()

    pieces: list[bytes] = []
    position, left = 0, MOST_BYTES
    try:
        while position < len(data):
            # Not stream_reader, for which a frame that is cut just ends there.
            frame = begin()
            while not frame.eof and position < len(data):
                piece = data[position : position + _PIECE_BYTES]
                pieces.append(frame.decompress(piece))
                position += len(piece) - len(frame.unused_data or b'')
                left -= len(pieces[-1])
                if left < 0:
                    raise ValueError(f'{name}: more than {MOST_BYTES} bytes once decompressed')
            if not frame.eof:
                raise EOFError('its frame is cut')
    except (zstandard.ZstdError, RuntimeError, MemoryError, EOFError) as error:
        raise ValueError(f'damaged {name}: {reason(error)}') from error
    return b''.join(pieces)


def read_yaml(text: Any) -> Any:
    """
    Return what YAML text, or an open file of it, holds.

    :raises ValueError: it cannot be read.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:
        # PyYAML has no common class for what its constructors meet, as in ``!!int ""``.
        raise ValueError(' '.join(reason(error).split())) from error


def profiles_of(text: Any) -> tuple[OfferedQos, ...]:
    """
    Return the offered QoS profiles of a topic, one per publisher.

    :param text: YAML text, or the list that it stands for. Enumerations are numbers up to metadata version 8 and
        lower-case names from 9 on (rosbag2_storage, ``qos.cpp``).
    :raises ValueError: it is neither.
    """
    try:
        profiles = read_yaml(text) if isinstance(text, str) else text
    except ValueError as error:
        raise ValueError(f'unreadable offered_qos_profiles: {error}') from error
    if not profiles:
        return ()
    if not isinstance(profiles, list) or not all(isinstance(profile, dict) for profile in profiles):
        raise ValueError('offered_qos_profiles is not a list of profiles')
    return tuple(map(_profile, profiles))


def _profile(values: Mapping[str, Any]) -> OfferedQos:
    def is_any(key: str, *names: str) -> bool:
        value = values.get(key)
        return (value.lower() if isinstance(value, str) else str(whole(value))) in names

    def time_ns(key: str) -> int:
        value = values.get(key)
        seconds, rest = (whole(value.get(unit)) for unit in ('sec', 'nsec')) if isinstance(value, dict) else (0, 0)
        # What says that there is no limit is 2^31 s, 2^63 ns or 2^64 ns, by the middleware and its version.
        return seconds * 10**9 + rest if seconds < _UNLIMITED else 0

    return OfferedQos(
        reliable=not is_any('reliability', '2', 'best_effort'),
        transient_local=is_any('durability', '1', 'transient_local'),
        depth=_UNLIMITED if is_any('history', '2', 'keep_all') else min(whole(values.get('depth')), _UNLIMITED),
        deadline_ns=time_ns('deadline'),
        lifespan_ns=time_ns('lifespan'),
        lease_ns=time_ns('liveliness_lease_duration'),
        manual=is_any('liveliness', '3', 'manual_by_topic'),
    )


def whole(value: Any) -> int:
    """Return a number that counts something, 0 for anything else that a bag has in its place."""
    return value if type(value) is int and 0 < value < 2**64 else 0


def offered(profiles: Sequence[OfferedQos]) -> OfferedQos:
    """
    Merge what several publishers offered into what reaches every subscriber that one of them reached.

    Where they offered the same, rosbag2 offers that too; where they differ, it takes its own default, which reaches
    fewer. Each latched publisher kept its own last messages: one in their place has to keep as many as all of
    them. A subscriber matches what is at least as strict as its request: the shortest deadline and lease, and manual
    liveliness. The longest lifespan drops no message that another publisher would have delivered.
    """
    if not profiles:
        return OfferedQos()
    latched = [profile.depth for profile in profiles if profile.transient_local]
    return OfferedQos(
        reliable=any(profile.reliable for profile in profiles),
        transient_local=bool(latched),
        depth=min(_UNLIMITED, max(sum(latched), *(profile.depth for profile in profiles))),
        deadline_ns=min((profile.deadline_ns for profile in profiles if profile.deadline_ns), default=0),
        lifespan_ns=0 if any(not p.lifespan_ns for p in profiles) else max(p.lifespan_ns for p in profiles),
        lease_ns=min((profile.lease_ns for profile in profiles if profile.lease_ns), default=0),
        manual=any(profile.manual for profile in profiles),
    )


def open_for_writing(path: Path) -> bool:
    """Tell whether a process has this file open for writing; False too where the file system cannot tell."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The kernel grants a read lease only where no writer has the file open: fcntl(2). A writer that comes within
        # these microseconds breaks the lease with a signal, which is SIGIO and deadly unless another one is named.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


class Storage(abc.ABC):
    """
    Read one storage file, which stays as it is.

    :ivar channels: by their id.
    :ivar counts: messages of each channel that the file holds, or held before it was damaged.
    :ivar notes: sentences about what is odd and costs no message.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.channels: dict[int, Channel] = {}
        self.counts: dict[int, int] = {}
        self.notes: list[str] = []
        self._lost: list[str] = []

    @property
    def missing(self) -> list[str]:
        """Sentences, one for each part that is lost; grows while messages are read."""
        return self._lost

    @abc.abstractmethod
    def runs(self, channels: set[int]) -> list[Run]:
        """Return where the messages of these channels are; a run may hold others too."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the file; safe to repeat."""

    def _profiles(self, topic: str, text: Any) -> tuple[OfferedQos, ...] | None:
        """Return the offered QoS profiles of a topic; None, and a note, where they cannot be read."""
        try:
            return profiles_of(text)
        except ValueError as error:
            self.notes.append(f'{self.path.name}: {topic} has {error}.')
            return None


class Faults(Counter[tuple[str, str]]):
    """Count messages that could not be read, by topic and reason, so that a thousand of a kind are one sentence."""

    def sentences(self) -> list[str]:
        """Return one sentence for each topic and reason."""
        return [f'{count_text({topic: count})} left out: {why}.' for (topic, why), count in self.items()]
