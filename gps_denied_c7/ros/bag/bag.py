"""A whole rosbag2: its topics, its messages in the order of time, and what of it is missing."""

from __future__ import annotations

import heapq
import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from gps_denied_c7.ros.bag.files import BagFiles, Metadata, find_files, open_storage
from gps_denied_c7.ros.bag.storage import (
    BagError,
    Channel,
    Entry,
    Faults,
    OfferedQos,
    Run,
    Storage,
    cdr_of,
    count_text,
    offered,
)

__all__ = ['Bag', 'BagTopic']

_TYPE_NAME = re.compile(r'([A-Za-z]\w*)/(?:(msg|srv|action)/)?([A-Za-z]\w*)')


@dataclass(frozen=True, slots=True)
class BagTopic:
    """
    Describe one topic of a bag that can be played.

    :param msgtype: as ``sensor_msgs/msg/Image``.
    :param count: messages recorded, as the storage files tell; those of the metadata where a file is damaged.
    :param type_hashes: ``RIHS01_...`` of the message definitions, none where the bag does not say.
    :param definitions: concatenated ``.msg`` texts, none where the bag has none.
    """

    name: str
    msgtype: str
    count: int
    qos: OfferedQos
    type_hashes: frozenset[str]
    definitions: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Stream:
    """One channel of the file number ``source``, and how many messages it has."""

    source: int
    channel: Channel
    count: int


class Bag(AbstractContextManager['Bag']):
    """
    Open a rosbag2 for reading; a context manager. The bag stays as it is: what needs work is copied to ``$TMPDIR``.

    The storage files say what is in the bag; metadata.yaml fills in what they don't say.

    :param path: a directory, or one storage file (``.mcap`` or ``.db3``, compressed or not).
    :raises BagError: there is no such bag, or nothing of it can be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.topics: dict[str, BagTopic] = {}
        self.left_out: dict[str, str] = {}
        """Topic → why it, or a part of it, cannot be played."""
        self._faults = Faults()
        self._played: list[dict[int, str]] = []
        self._qos: dict[str, tuple[OfferedQos, ...] | None] = {}
        self._stack = ExitStack()
        try:
            self._files = self._find()
            self._storages = self._open()
            self._describe()
        except BaseException:
            self.close()
            raise

    # -- opening

    def _find(self) -> BagFiles:
        try:
            return find_files(self.path)
        except PermissionError as error:
            raise BagError(f'{self.path} may not be read: {error}.', remedy='Change its permissions.') from error
        except OSError as error:
            raise BagError(f'{self.path} cannot be read: {error}.', remedy='Take another copy of it.') from error

    def _open(self) -> list[Storage]:
        """Open every storage file that can be opened; one that cannot is missing, unless it is the only one."""
        storages: list[Storage] = []
        for file in self._files.files:
            try:
                storage, lost = open_storage(file, self._scratch)
            except BagError as error:
                if len(self._files.files) == 1:
                    raise
                self._files.missing.append(str(error))
                continue
            self._stack.callback(storage.close)
            storages.append(storage)
            self._files.missing += lost
        if not storages:
            raise BagError(f'{self.path} cannot be read: {" ".join(self._files.missing)}')
        return storages

    def _scratch(self) -> Path:
        try:
            return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix='c7_replay_')))
        except OSError as error:
            raise BagError(
                f'{self.path} has to be copied to be read, and there is no room for the copy: {error}.',
                remedy='Set TMPDIR to a directory that can be written.',
            ) from error

    def _describe(self) -> None:
        streams: dict[str, dict[str, list[_Stream]]] = defaultdict(lambda: defaultdict(list))
        reasons: dict[str, list[str]] = defaultdict(list)
        for source, storage in enumerate(self._storages):
            playable: dict[int, str] = {}
            for number, channel in storage.channels.items():
                count = storage.counts.get(number, 0)
                msgtype, why = _playable_type(channel)
                if why and count:
                    reasons[channel.topic].append(f'{count_text({channel.topic: count})}: {why}')
                elif not why:
                    streams[channel.topic][msgtype].append(_Stream(source, channel, count))
                    playable[number] = channel.topic
            self._played.append(playable)
        for name, by_type in streams.items():
            self._describe_topic(name, by_type, reasons[name])
        self.left_out = {name: '; '.join(texts) for name, texts in reasons.items() if texts}
        self._compare_metadata()
        if not any(topic.count for topic in self.topics.values()) and not self.left_out:
            why = f' {" ".join(self.missing)}' if self.missing else ''
            raise BagError(
                f'{self.path} holds no messages{" that can be played" if why else ""}.{why}', remedy='Record it again.'
            )

    def _describe_topic(self, name: str, by_type: Mapping[str, list[_Stream]], reasons: list[str]) -> None:
        # A type without messages was only announced.
        types = [msgtype for msgtype, streams in by_type.items() if any(stream.count for stream in streams)]
        if len(types) > 1:
            reasons.append(f'it has several types, {" and ".join(sorted(types))}')
            return
        msgtype = types[0] if types else next(iter(by_type))
        streams, metadata = by_type[msgtype], self._files.metadata or Metadata()
        self._qos[name] = _stored_qos(streams)
        qos = metadata.qos.get(name, ()) if self._qos[name] is None else self._qos[name]
        hashes = {stream.channel.type_hash for stream in streams if stream.channel.type_hash}
        count = sum(stream.count for stream in streams)
        self.topics[name] = BagTopic(
            name,
            msgtype,
            max(count, metadata.counts.get(name, 0)) if self.missing else count,
            offered(qos or ()),
            frozenset(hashes or filter(None, [metadata.hashes.get(name)])),
            frozenset(stream.channel.definition for stream in streams if stream.channel.definition),
        )

    def _compare_metadata(self) -> None:
        """Note where metadata.yaml says other things than the storage, which is played."""
        metadata = self._files.metadata
        if metadata is None:
            return
        counts: dict[str, int] = defaultdict(int)
        for storage in self._storages:
            for number, channel in storage.channels.items():
                counts[channel.topic] += storage.counts.get(number, 0)
        differences = []
        for name in sorted(counts.keys() | metadata.counts.keys()):
            stored, said = counts.get(name, 0), metadata.counts.get(name, 0)
            if stored != said:
                differences.append(f'{name} has {stored} messages, metadata.yaml says {said}')
            topic, said_qos = self.topics.get(name), metadata.qos.get(name, ())
            if topic and topic.msgtype not in metadata.types.get(name, {topic.msgtype}):
                types = ' or '.join(sorted(metadata.types[name]))
                differences.append(f'{name} is {topic.msgtype}, metadata.yaml gives {types}')
            if self._qos.get(name) and said_qos and set(self._qos[name] or ()) != set(said_qos):
                played = offered(self._qos[name] or ())
                differences.append(f'{name} was offered as {played}, metadata.yaml says {offered(said_qos)}')
        if differences:
            self._files.notes.append(
                f'metadata.yaml differs from the storage files, which are played: {"; ".join(differences)}.'
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files and remove temporary copies; safe to repeat."""
        self._stack.close()

    # -- what it holds

    @property
    def missing(self) -> list[str]:
        """Sentences, one for each part of the bag that is lost; grows while messages are read."""
        found = [*self._files.missing, *(text for storage in self._storages for text in storage.missing)]
        return list(dict.fromkeys([*found, *self._faults.sentences()]))

    @property
    def notes(self) -> list[str]:
        """Sentences about what is odd in the bag and loses no message."""
        return [*self._files.notes, *(text for storage in self._storages for text in storage.notes)]

    def messages(self, topics: Collection[str]) -> Iterator[tuple[str, int, bytes]]:
        """Yield (topic, bag time in nanoseconds, CDR bytes) by bag time; what is unreadable ends up in ``missing``."""
        self._faults = Faults()
        for source, entry in self._merged(topics):
            topic = self._played[source].get(entry.channel)
            if entry.channel not in self._storages[source].channels:
                self._faults[f'channel {entry.channel}', 'the file does not describe it'] += 1
            if topic is None or topic not in topics:
                continue
            try:
                data = cdr_of(entry.data)
            except ValueError as error:
                self._faults[topic, str(error)] += 1
                continue
            yield topic, entry.time_ns, data

    def _merged(self, topics: Collection[str]) -> Iterator[tuple[int, Entry]]:
        """Merge the runs of all files by time; each is read when its time has come, to hold few in memory."""
        heap: list[tuple[int, int, int, Run | Iterator[Entry], Entry | None]] = []
        for source, storage in enumerate(self._storages):
            channels = {number for number, topic in self._played[source].items() if topic in topics}
            for run in storage.runs(channels):
                heap.append((run.start_ns, len(heap), source, run, None))
        heapq.heapify(heap)
        while heap:
            _, order, source, reader, entry = heapq.heappop(heap)
            if entry is not None:
                yield source, entry
            entries = reader.read() if isinstance(reader, Run) else reader
            if (following := next(entries, None)) is not None:
                heapq.heappush(heap, (following.time_ns, order, source, entries, following))


def _stored_qos(streams: list[_Stream]) -> tuple[OfferedQos, ...] | None:
    """Return one profile per recorded publisher, None where no file says; each part of a split bag names them all."""
    by_source: dict[int, tuple[OfferedQos, ...]] = defaultdict(tuple)
    for stream in streams:
        if stream.channel.qos is not None:
            by_source[stream.source] += stream.channel.qos
    return max(by_source.values(), key=len, default=None)


def _playable_type(channel: Channel) -> tuple[str, str]:
    """Return the message type as ROS 2 spells it, or '' and why the channel cannot be published."""
    if channel.encoding != 'cdr':
        return '', f'encoded as {channel.encoding or "nothing that the file names"}, not as CDR'
    if not channel.msgtype:
        return '', 'the file has no message type (schema) for it'
    if not (parts := _TYPE_NAME.fullmatch(channel.msgtype.replace('::', '/'))):
        return '', f'{channel.msgtype} is not a ROS 2 message type'
    package, kind, name = parts.groups()
    return f'{package}/{kind or "msg"}/{name}', ''
