"""Read any rosbag2 as raw CDR, and say what is wrong with one that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gps_denied_c7.errors import C7Error

__all__ = ['Bag', 'BagError', 'BagTopic', 'OfferedQos']

_logger = logging.getLogger(__name__)

_STORAGE_SUFFIXES = ('.mcap', '.db3')


class BagError(C7Error):
    """A bag that is missing, empty or damaged, or one that cannot be played as asked."""


@dataclass(frozen=True, slots=True)
class OfferedQos:
    """
    Hold what the recorded publishers of a topic offered, as far as it decides who can subscribe.

    :param depth: of the history; 0 where the bag does not say.
    """

    reliable: bool = True
    transient_local: bool = False
    depth: int = 0


@dataclass(frozen=True, slots=True)
class BagTopic:
    """
    Describe one topic of a bag.

    :param msgtype: as ``sensor_msgs/msg/Image``.
    :param count: messages recorded.
    :param type_hash: ``RIHS01_...`` of the message definition, '' where the bag does not say.
    """

    name: str
    msgtype: str
    count: int
    type_hash: str
    qos: OfferedQos


class Bag:
    """
    Open a rosbag2 for reading; a context manager.

    :param path: a directory with a metadata.yaml, or one storage file (``.mcap`` or ``.db3``).
    :raises BagError: there is no such bag, or it is empty or damaged.
    """

    def __init__(self, path: Path | str) -> None:
        from rosbags.rosbag2 import Reader

        self.path = Path(path)
        try:
            self._reader = Reader(_storage(self.path))
            self._reader.open()
        except Exception as error:
            # Damage shows as whatever the parser trips over first: struct, zstd, SQLite or plain index errors.
            raise self._unreadable(error) from error
        try:
            self.topics = self._topics()
            if not any(topic.count for topic in self.topics.values()):
                raise BagError(f'{self.path} holds no messages.', remedy='Record it again.')
        except BaseException:
            self.close()
            raise

    def _topics(self) -> dict[str, BagTopic]:
        topics = {}
        for name, info in self._reader.topics.items():
            types = {connection.msgtype for connection in info.connections}
            if len(types) != 1:
                raise BagError(f'{self.path}: {name} has several types, {sorted(types)}.', remedy='Leave it out.')
            topics[name] = BagTopic(
                name,
                types.pop(),
                info.msgcount,
                next((connection.digest for connection in info.connections if connection.digest), ''),
                _offered([qos for connection in info.connections for qos in _qos_of(connection)]),
            )
        return topics

    def __enter__(self) -> Bag:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; safe to repeat."""
        if self._reader.is_open:
            self._reader.close()

    def messages(self, topics: Collection[str]) -> Iterator[tuple[str, int, bytes]]:
        """
        Yield (topic, bag time in nanoseconds, CDR bytes) in the order of bag time.

        :raises BagError: at the first message that cannot be read.
        """
        connections = [connection for connection in self._reader.connections if connection.topic in topics]
        source = self._reader.messages(connections) if connections else iter(())
        while True:
            try:
                connection, time_ns, data = next(source)
            except StopIteration:
                return
            except Exception as error:
                raise self._unreadable(error) from error
            yield connection.topic, time_ns, data

    def _unreadable(self, error: Exception) -> BagError:
        if isinstance(error, BagError):
            return error
        if isinstance(error, PermissionError):
            return BagError(f'{self.path} may not be read: {error}.', remedy='Change its permissions.')
        return BagError(
            f'{self.path} is damaged or was not closed: {error or type(error).__name__}.',
            remedy='Repair it: mcap recover in.mcap -o out.mcap for an mcap file, '
            'ros2 bag reindex for a missing or broken metadata.yaml.',
        )


def _storage(path: Path) -> Path:
    """Return what to open: the bag's directory, or its only storage file where the metadata is missing."""
    if not path.exists():
        raise BagError(f'{path} does not exist.', remedy='Name a bag directory, or an .mcap or .db3 file.')
    if path.is_file():
        if path.name == 'metadata.yaml':
            return path.parent
        if path.suffix not in _STORAGE_SUFFIXES:
            raise BagError(f'{path} is no bag.', remedy='Name a bag directory, or an .mcap or .db3 file.')
        return path
    if (path / 'metadata.yaml').exists():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in _STORAGE_SUFFIXES)
    if len(files) != 1:
        found = f'{len(files)} storage files' if files else 'no storage file'
        raise BagError(
            f'{path} is no bag: no metadata.yaml and {found} in it.',
            remedy='Run ros2 bag reindex on it, or name one storage file.' if files else 'Name a bag directory.',
        )
    _logger.warning('%s has no metadata.yaml; reading %s by itself', path, files[0].name)
    return files[0]


def _qos_of(connection: Any) -> list[Any]:
    return list(getattr(connection.ext, 'offered_qos_profiles', ()))


def _offered(profiles: list[Any]) -> OfferedQos:
    """Merge what several publishers offered into what reaches every subscriber that one of them reached."""
    from rosbags.interfaces import QosDurability, QosReliability

    if not profiles:
        return OfferedQos()
    return OfferedQos(
        reliable=any(profile.reliability is not QosReliability.BEST_EFFORT for profile in profiles),
        transient_local=any(profile.durability is QosDurability.TRANSIENT_LOCAL for profile in profiles),
        depth=max(int(profile.depth) for profile in profiles),
    )
