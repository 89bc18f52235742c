"""
One mcap file, whole or cut: its data section is walked record by record, its summary only says what should be there.

The format is at https://mcap.dev/spec. mcap's own readers need the summary, which a cut file has lost, and read past
damage or stop at it; its record classes are used.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode
from mcap.reader import SeekingReader
from mcap.records import Channel as ChannelRecord
from mcap.records import Chunk, Footer, Message, Schema
from mcap.summary import Summary

from gps_denied_c7.ros.bag.storage import (
    BagError,
    Channel,
    Entry,
    Run,
    Storage,
    count_text,
    decompressed,
    open_for_writing,
    reason,
    time_text,
)

__all__ = ['MAGIC', 'McapFile']

MAGIC = b'\x89MCAP0\r\n'
_FRAME = struct.Struct('<BQ')
_MESSAGE = struct.Struct('<HIQQ')
_INDEX = struct.Struct('<HI')
_INDEX_ENTRY_BYTES = 16
_DATA_END_BYTES, _FOOTER_BYTES = 4, 20
_TAIL_BYTES = _FRAME.size + _FOOTER_BYTES + len(MAGIC)
_WITHOUT_MESSAGES = (Opcode.ATTACHMENT, Opcode.METADATA)
_FIRST_PRIVATE = 0x80
_COMPRESSIONS = ('', 'zstd', 'lz4')
_SMALL_BYTES = 64 * 2**20
"""More than this in one schema or channel record is damage."""


class _DamageError(Exception):
    """Bytes that are not what the format says."""


class _Exact(ReadDataStream):
    """mcap's stream; it raises where mcap's own returns fewer bytes than asked for at the end of its data."""

    def __init__(self, content: bytes) -> None:
        super().__init__(BytesIO(content))

    def read(self, length: int) -> bytes:
        data = super().read(length)
        if len(data) != length:
            raise _DamageError(f'a record ends {length - len(data)} bytes early')
        return data


@dataclass(slots=True)
class _Chunk:
    """
    Say where a chunk is.

    :param offset: of the record's content, ``length`` bytes long.
    :param counts: messages per channel as its index says, None where that is unknown.
    """

    offset: int
    length: int
    start_ns: int
    end_ns: int
    counts: Counter[int] | None = None


class McapFile(Storage):
    """
    Open one mcap file.

    :raises BagError: it is not an mcap file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file: BinaryIO = path.open('rb')
        self._size = self._file.seek(0, 2)
        self._records: dict[int, ChannelRecord] = {}
        self._schemas: dict[int, Schema] = {}
        self._chunks: list[_Chunk] = []
        self._loose_offsets, self._loose_times = array('Q'), array('Q')
        self._loose_counts: Counter[int] = Counter()
        self._cuts: list[str] = []
        self._strange: dict[int, list[int]] = {}
        self._ended = False
        self._sure_summary = 0
        self._index_is_whole = False
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._file.seek(0)
        if self._file.read(len(MAGIC)) != MAGIC:
            raise BagError(f'{self.path} is damaged: it does not begin as an mcap file.', remedy='Take another copy.')
        summary = self._read_summary()
        self._walk(sorted(index.chunk_start_offset for index in summary.chunk_indexes) if summary else [])
        self._count_chunks()
        for record in summary.channels.values() if summary else ():
            self._records.setdefault(record.id, record)
        for schema in summary.schemas.values() if summary else ():
            self._schemas.setdefault(schema.id, schema)
        self.channels = {number: self._channel(record) for number, record in self._records.items()}
        self._settle_counts(summary)

    # -- what the file says of itself

    def _read_summary(self) -> Summary | None:
        """Return the summary, None where there is none or it cannot be trusted."""
        try:
            footer = self._footer()
            if footer is None or not footer.summary_start:
                return None
            if footer.summary_crc:
                self._file.seek(footer.summary_start)
                covered = self._file.read(self._size - len(MAGIC) - 4 - footer.summary_start)
                if zlib.crc32(covered) != footer.summary_crc:
                    raise _DamageError('its checksum does not match')
                self._sure_summary = footer.summary_start
            self._file.seek(0)
            return SeekingReader(self._file).get_summary()
        except Exception as error:
            # Damage shows as the first error that the parser meets: struct, UTF-8, index or memory errors.
            self._sure_summary = 0
            self.notes.append(f'{self.path.name}: the summary is damaged ({reason(error)}) and not used.')
            return None

    def _footer(self) -> Footer | None:
        self._file.seek(max(0, self._size - _TAIL_BYTES))
        tail = self._file.read(_TAIL_BYTES)
        head = (Opcode.FOOTER, _FOOTER_BYTES)
        if len(tail) < _TAIL_BYTES or _FRAME.unpack_from(tail) != head or not tail.endswith(MAGIC):
            return None
        return Footer.read(_Exact(tail[_FRAME.size :]))

    # -- what is in it

    def _walk(self, known_chunks: list[int]) -> None:
        """Find every chunk and message up to the end of data; past damage, go on at the next chunk that is known."""
        position = len(MAGIC)
        while True:
            try:
                position = self._walk_record(position)
            except Exception as error:
                if self._ended:
                    # The summary, which is cut or damaged.
                    return
                if self._chunks:
                    # Its index may be cut.
                    self._chunks[-1].counts = None
                onward = next((offset for offset in known_chunks if offset > position), None)
                self._note_cut(position, onward, error)
                if onward is None:
                    return
                position = onward
            if not position:
                return

    def _walk_record(self, position: int) -> int:
        """Take in the record at ``position`` and return where the next one is, 0 where nothing more is to come."""
        self._file.seek(position)
        head = self._file.read(_FRAME.size)
        if not head:
            raise _DamageError('the recording was not closed')
        if len(head) < _FRAME.size:
            raise _DamageError('a record is cut')
        opcode, length = _FRAME.unpack(head)
        content, end = position + _FRAME.size, position + _FRAME.size + length
        if opcode == 0:
            raise _DamageError('there is no record')
        if end > self._size:
            raise _DamageError(f'{end - self._size} bytes of a record are not there')
        if (opcode, length) == (Opcode.DATA_END, _DATA_END_BYTES):
            self._ended = True
            return 0 if end == self._sure_summary else end
        if (opcode, length) == (Opcode.FOOTER, _FOOTER_BYTES):
            if (more := self._size - end - len(MAGIC)) > 0:
                self._lost.append(
                    f'{self.path.name}: {more} bytes after the end of the recording, at byte {end + len(MAGIC)}, are '
                    'not read; another file may have been appended.'
                )
            return 0
        if opcode == Opcode.CHUNK:
            self._chunks.append(self._chunk_at(content, length))
        elif opcode == Opcode.MESSAGE_INDEX:
            self._take_index(length)
        elif opcode == Opcode.MESSAGE:
            self._take_loose(content, length)
        elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
            if length > _SMALL_BYTES:
                raise _DamageError(f'a record of {length} bytes describes a channel')
            self._take_description(opcode, self._file.read(length))
        elif not self._ended and opcode not in _WITHOUT_MESSAGES and position > len(MAGIC):
            self._strange.setdefault(opcode, []).append(position)
        return end

    def _chunk_at(self, offset: int, length: int) -> _Chunk:
        stream = _Exact(self._file.read(min(length, 64)))
        start_ns, end_ns = stream.read8(), stream.read8()
        stream.read(12)
        stream.read_prefixed_string()
        if stream.count + 8 + stream.read8() > length:
            raise _DamageError('a chunk is longer than its record')
        return _Chunk(offset, length, min(start_ns, end_ns), end_ns)

    def _take_index(self, length: int) -> None:
        channel, size = _INDEX.unpack(self._file.read(_INDEX.size))
        if not self._chunks or size != length - _INDEX.size or size % _INDEX_ENTRY_BYTES:
            raise _DamageError('an index fits no chunk')
        chunk = self._chunks[-1]
        chunk.counts = chunk.counts or Counter()
        chunk.counts[channel] += size // _INDEX_ENTRY_BYTES

    def _take_loose(self, offset: int, length: int) -> None:
        if length < _MESSAGE.size:
            raise _DamageError('a message is shorter than its header')
        channel, _, time_ns, _ = _MESSAGE.unpack(self._file.read(_MESSAGE.size))
        if channel not in self._records:
            raise _DamageError(f'a message is on channel {channel}, which is not described')
        self._loose_offsets.append(offset)
        self._loose_times.append(time_ns)
        self._loose_counts[channel] += 1

    def _take_description(self, opcode: int, content: bytes) -> None:
        if opcode == Opcode.SCHEMA:
            schema = Schema.read(_Exact(content))
            if self._schemas.setdefault(schema.id, schema) != schema:
                raise _DamageError(f'schema {schema.id} is described twice, differently')
            return
        record = ChannelRecord.read(_Exact(content))
        if self._records.setdefault(record.id, record) != record:
            raise _DamageError(f'channel {record.id} is described twice, differently')

    def _note_cut(self, position: int, onward: int | None, error: Exception) -> None:
        where = f'{self.path.name}: {reason(error)} at byte {position} of {self._size}'
        if onward is not None:
            self._cuts.append(f'{where}; what is stored up to byte {onward} is missing')
            return
        last_ns = max((chunk.end_ns for chunk in self._chunks), default=None)
        if self._loose_times:
            last_ns = max(last_ns or 0, *self._loose_times)
        since = 'everything' if last_ns is None else f'what was recorded after about {time_text(last_ns)}'
        writer = '; a process still has the file open for writing' if open_for_writing(self.path) else ''
        self._cuts.append(f'{where}; {since} is missing{writer}')

    def _count_chunks(self) -> None:
        """Count what no index counts, and find the channels, which may be described in the chunks alone."""
        for chunk in self._chunks:
            if chunk.counts is None or not chunk.counts.keys() <= self._records.keys():
                entries = self._entries(chunk)
                if entries is not None:
                    chunk.counts = Counter(entry.channel for entry in entries)

    def _settle_counts(self, summary: Summary | None) -> None:
        """Say how many messages each channel has or had, and what the file's own statistics say otherwise."""
        found = Counter(self._loose_counts)
        for chunk in self._chunks:
            found.update(chunk.counts or {})
        promised = summary.statistics.channel_message_counts if summary and summary.statistics else None
        said = Counter(promised or {})
        recorded = said if said and self._sure_summary else found | said
        self.counts = {number: recorded[number] for number in self.channels}
        self._index_is_whole = promised is not None and +found == +said
        if self._index_is_whole:
            # What the damage took held no message.
            self.notes += [f"{cut}; by the file's own count, no message is lost." for cut in self._cuts]
        else:
            self._lost += [f'{cut}.' for cut in self._cuts]
            self._note_strange()
        if unknown := {f'channel {number}': found[number] for number in found.keys() - self.channels.keys()}:
            self._lost.append(f'{self.path.name} holds {count_text(unknown)}, but no description of it.')

    def _note_strange(self) -> None:
        """Name the records that are passed over; kinds from 0x80 on are for applications and hold no message."""
        for kind, places in self._strange.items():
            records = f'{len(places)} record{"s" if len(places) > 1 else ""} of kind {kind:#04x}'
            found = f'{self.path.name}: {records} not read, the first at byte {places[0]}'
            if kind >= _FIRST_PRIVATE:
                self.notes.append(f'{found}: this kind is for applications.')
            else:
                self._lost.append(f'{found}: unknown or misplaced.')

    def _channel(self, record: ChannelRecord) -> Channel:
        schema = self._schemas.get(record.schema_id)
        profiles = record.metadata.get('offered_qos_profiles')
        definition = schema.data.decode(errors='replace') if schema and schema.encoding == 'ros2msg' else ''
        return Channel(
            record.topic,
            schema.name if schema else '',
            record.message_encoding,
            None if profiles is None else self._profiles(record.topic, profiles),
            record.metadata.get('topic_type_hash', ''),
            definition,
        )

    # -- its messages

    def runs(self, channels: set[int]) -> list[Run]:
        """Return one run per chunk that may hold messages of these channels, and one for messages outside chunks."""
        wanted = [
            chunk for chunk in self._chunks
            if not self._index_is_whole or chunk.counts is None or not channels.isdisjoint(chunk.counts)
        ]  # fmt: skip
        runs = [Run(chunk.start_ns, partial(self._read_chunk, chunk)) for chunk in wanted]
        if self._loose_times:
            runs.append(Run(min(self._loose_times), self._read_loose))
        return runs

    def _read_chunk(self, chunk: _Chunk) -> Iterator[Entry]:
        entries = self._entries(chunk) or []
        # Stable: messages of one time stay as they were recorded.
        yield from sorted(entries, key=lambda entry: entry.time_ns)

    def _read_loose(self) -> Iterator[Entry]:
        for index in np.argsort(np.frombuffer(self._loose_times, np.uint64), kind='stable'):
            position = self._loose_offsets[int(index)] - _FRAME.size
            try:
                self._file.seek(position)
                _, length = _FRAME.unpack(self._file.read(_FRAME.size))
                message = Message.read(_Exact(self._file.read(length)), length)
            except Exception as error:
                self._note(f'{self.path.name}: the message at byte {position} cannot be read: {reason(error)}.')
                continue
            yield Entry(message.log_time, message.channel_id, message.data)

    def _entries(self, chunk: _Chunk) -> list[Entry] | None:
        """Return what a chunk holds in recorded order; None, and a sentence in ``missing``, where it is damaged."""
        try:
            return self._parse(chunk)
        except Exception as error:
            counts = {self._topic(number): count for number, count in (chunk.counts or {}).items()}
            what = count_text(counts) if counts else 'an unknown number of messages'
            times = f'{time_text(chunk.start_ns)} to {time_text(chunk.end_ns)}'
            self._note(
                f'{self.path.name}: the chunk at byte {chunk.offset} is damaged ({reason(error)}); '
                f'{what} from {times} are missing.'
            )
            return None

    def _note(self, sentence: str) -> None:
        """Add to what is missing what was not found in an earlier pass already."""
        if sentence not in self._lost:
            self._lost.append(sentence)

    def _topic(self, number: int) -> str:
        return self._records[number].topic if number in self._records else f'channel {number}'

    def _parse(self, chunk: _Chunk) -> list[Entry]:
        self._file.seek(chunk.offset)
        record = Chunk.read(_Exact(self._file.read(chunk.length)))
        if record.compression not in _COMPRESSIONS:
            raise _DamageError(f'compressed as {record.compression!r}, which cannot be read')
        data = decompressed(record.data, record.compression) if record.compression else record.data
        size = len(data)
        if size != record.uncompressed_size:
            raise _DamageError(f'it holds {size} bytes, not {record.uncompressed_size}')
        if record.uncompressed_crc and zlib.crc32(data) != record.uncompressed_crc:
            raise _DamageError('its crc differs')
        stream = ReadDataStream(BytesIO(data))
        entries = []
        while stream.count < size:
            opcode, length = _FRAME.unpack(stream.read(_FRAME.size))
            if opcode == 0 or stream.count + length > size:
                raise _DamageError('a record in it is invalid or longer than the chunk')
            content = stream.read(length)
            if opcode == Opcode.MESSAGE:
                message = Message.read(_Exact(content), length)
                entries.append(Entry(message.log_time, message.channel_id, message.data))
            elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                self._take_description(opcode, content)
        return entries

    def close(self) -> None:
        """Close the file; safe to repeat."""
        self._file.close()
