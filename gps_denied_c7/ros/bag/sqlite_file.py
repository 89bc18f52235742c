"""One sqlite3 file of a rosbag2, also one that a power cut left with messages in its journal."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from gps_denied_c7.ros.bag.storage import (
    BagError,
    Channel,
    Entry,
    Faults,
    Run,
    Storage,
    open_for_writing,
    reason,
)

__all__ = ['MAGIC', 'SqliteFile']

_logger = logging.getLogger(__name__)

MAGIC = b'SQLite format 3\0'
_WAL_HEADER_BYTES = 32
_BUSY_S = 5.0
_STOP_RECORDER = 'End the recorder, or the program that has it open, then try again.'


class SqliteFile(Storage):
    """
    Open one sqlite3 storage file.

    The file is opened read-only. Where a journal beside it holds messages (``-wal``) or half a transaction
    (``-journal``), file and journal are copied into ``scratch`` and SQLite recovers the copy. Of a link, the journal is
    beside the file that it leads to, or beside the link where journals are links too. A lock is held for each query
    only, since a recorder that meets one loses messages.

    :param scratch: makes an empty directory for that copy.
    :raises BagError: it is not a rosbag2, or it is being written.
    """

    def __init__(self, path: Path, scratch: Callable[[], Path]) -> None:
        super().__init__(path)
        self._odd_rows, self._unread = Faults(), Faults()
        self._ids, self._times, self._topics = array('q'), array('q'), array('q')
        self._db = self._connect(scratch)
        try:
            self._open()
        except sqlite3.OperationalError as error:
            self.close()
            if 'locked' in str(error):
                raise BagError(f'{self.path} is being written: {reason(error)}.', remedy=_STOP_RECORDER) from error
            raise
        except BaseException:
            self.close()
            raise

    @property
    def missing(self) -> list[str]:
        """Sentences, one for each part that is lost."""
        sentences = [*self._odd_rows.sentences(), *self._unread.sentences()]
        return [*self._lost, *(f'{self.path.name}: {sentence}' for sentence in sentences)]

    # -- opening

    def _connect(self, scratch: Callable[[], Path]) -> sqlite3.Connection:
        journals = {}
        for suffix in ('-wal', '-journal'):
            # SQLite looks beside the file that a link leads to.
            for path in (self.path, self.path.resolve()):
                if _is_hot(journal := path.with_name(path.name + suffix)):
                    journals[self.path.name + suffix] = journal
        written = open_for_writing(self.path)
        if journals and written:
            raise BagError(f'{self.path} is still being recorded.', remedy=_STOP_RECORDER)
        if journals:
            return _database(self._copy(journals, scratch()), 'mode=rw')
        if written and not self.path.with_name('metadata.yaml').exists():
            self._lost.append(f'{self.path.name} is still being recorded; what is recorded from now on is missing.')
        elif written:
            self.notes.append(f'{self.path.name}: a process has it open for writing; what it adds now is not played.')
        with self.path.open('rb') as file:
            header, size = file.read(100).ljust(100), file.seek(0, 2)
        if pages := self._pages_left(header, size):
            return self._cut(pages, size, scratch)
        # A database in WAL mode cannot be opened without writing beside it, unless nothing is going to change it.
        return _database(self.path, 'mode=ro&immutable=1' if 2 in header[18:20] else 'mode=ro')

    def _pages_left(self, header: bytes, size: int) -> int:
        """Return the bytes of whole pages where the file was cut, 0 where it was not (sqlite.org/fileformat2.html)."""
        page = int.from_bytes(header[16:18], 'big')
        page = 65536 if page == 1 else max(page, 512)
        stated = int.from_bytes(header[28:32], 'big') * page
        if header[24:28] != header[92:96]:
            # An old SQLite wrote it: the length in the header is not kept.
            stated = -(-size // page) * page
        if size >= stated:
            return 0
        self._lost.append(f'{self.path.name} is cut off at byte {size} of {stated}; the rest is missing.')
        return size // page * page

    def _cut(self, whole: int, size: int, scratch: Callable[[], Path]) -> sqlite3.Connection:
        """Open what is left of a file that was cut: SQLite would take the missing half of a page for zeros."""
        path = self.path
        if whole < size:
            path = self._copied({self.path.name: self.path}, scratch(), 'It was cut within a page')
            os.truncate(path, whole)
        database = _database(path, 'mode=ro&immutable=1')
        # Has SQLite read the pages that are there, though the header states more.
        database.execute('PRAGMA writable_schema=1')
        return database

    def _copy(self, journals: dict[str, Path], scratch: Path) -> Path:
        """Copy the file and its journals, so that recovering leaves the bag as it is."""
        names = ' and '.join(journal.name for journal in journals.values())
        files = {self.path.name: self.path, **journals}
        copy = self._copied(files, scratch, f'It was not closed: {names} belongs to it')
        self.notes.append(
            f'{self.path.name} was not closed: {names} belongs to it. A temporary copy, recovered by SQLite, is '
            'played; the bag is not changed.'
        )
        return copy

    def _copied(self, files: dict[str, Path], scratch: Path, why: str) -> Path:
        """Copy files into ``scratch`` under these names, and return where the storage file is there."""
        _logger.info('%s. Copying %s to %s', why, ' and '.join(file.name for file in files.values()), scratch)
        try:
            for name, file in files.items():
                shutil.copyfile(file, scratch / name)
        except OSError as error:
            size = sum(file.stat().st_size for file in files.values())
            raise BagError(
                f'{self.path} has to be copied to {scratch.parent} to be read, which fails: {reason(error)}. {why}.',
                remedy=f'Set TMPDIR to a directory with {size / 1e6:.0f} MB free, and make these files readable.',
            ) from error
        return scratch / self.path.name

    def _rows(self, query: str, *values: Any) -> list[tuple]:
        # To the last row, which ends the query and its lock.
        return self._db.execute(query, values).fetchall()

    def _open(self) -> None:
        tables = {name for (name,) in self._rows("SELECT name FROM sqlite_master WHERE type IN ('table', 'index')")}
        if not {'topics', 'messages'} <= tables:
            raise BagError(f'{self.path} is not a rosbag2: it has no topics and messages.', remedy='Name another file.')
        columns = [row[1] for row in self._rows('PRAGMA table_info(topics)')]
        definitions = {}
        if 'message_definitions' in tables:
            query = "SELECT topic_type, encoded_message_definition FROM message_definitions WHERE encoding = 'ros2msg'"
            definitions = dict(self._rows(query))
        for values in self._rows('SELECT * FROM topics'):
            row = dict(zip(columns, values, strict=True))
            self.channels[row['id']] = self._channel(row, definitions.get(row['type'], ''))
        self._scan()
        if 'timestamp_idx' in tables:
            self._check_index()

    def _channel(self, row: dict[str, Any], definition: str) -> Channel:
        qos = self._profiles(row['name'], row['offered_qos_profiles']) if 'offered_qos_profiles' in row else None
        encoding, type_hash = row.get('serialization_format', 'cdr'), row.get('type_description_hash') or ''
        return Channel(str(row['name']), str(row['type'] or ''), str(encoding), qos, str(type_hash), definition)

    # -- what is in it

    def _scan(self) -> None:
        """Note id, time and topic of every message; past a damaged page, go on from the other end."""
        try:
            self._scan_rows('ASC')
        except sqlite3.DatabaseError as error:
            if 'locked' in str(error):
                raise
            last = self._ids[-1] if self._ids else None
            first = self._scan_backwards(last)
            where = f'after message {last}' if last is not None else 'from the first message on'
            where += f' up to message {first}' if first is not None else ''
            self._lost.append(f'{self.path.name} is damaged ({reason(error)}); what was stored {where} is missing.')
        counts = Counter(self._topics)
        self.counts = {number: counts[number] for number in self.channels}
        if lost := sum(counts[number] for number in counts.keys() - self.channels.keys()):
            self._lost.append(f'{self.path.name}: {lost} messages belong to no topic and are missing.')

    def _scan_rows(self, direction: str, last: int | None = None) -> None:
        # Not by an index, which may be damaged apart from the messages.
        query = f'SELECT rowid, timestamp, topic_id FROM messages NOT INDEXED ORDER BY rowid {direction}'
        with closing(self._db.execute(query)) as rows:
            for number, time_ns, topic in rows:
                if last is not None and number <= last:
                    return
                if not isinstance(time_ns, int) or not isinstance(topic, int):
                    name = self.channels[topic].topic if topic in self.channels else f'topic {topic}'
                    self._odd_rows[name, f'its time is {time_ns!r:.50}, no number'] += 1
                    continue
                self._ids.append(number)
                self._times.append(time_ns)
                self._topics.append(topic)

    def _scan_backwards(self, last: int | None) -> int | None:
        """Return the first message after the damage, None where there is none."""
        before = len(self._ids)
        # The damage again, from its other side: the first error is the one that is reported.
        with contextlib.suppress(sqlite3.DatabaseError):
            self._scan_rows('DESC', last)
        return self._ids[-1] if len(self._ids) > before else None

    def _check_index(self) -> None:
        """The index of times counts the messages once more."""
        try:
            ((indexed,),) = self._rows('SELECT count(*) FROM messages INDEXED BY timestamp_idx')
        except sqlite3.DatabaseError as error:
            self.notes.append(f'{self.path.name}: the index of times is damaged ({reason(error)}) and not used.')
            return
        if indexed > len(self._ids) and not self._lost:
            lost = indexed - len(self._ids)
            self._lost.append(f'{self.path.name} is damaged: {lost} of {indexed} messages cannot be found.')

    # -- its messages

    def runs(self, channels: set[int]) -> list[Run]:
        """Return one run with the messages of these channels, if there are any."""
        topics = np.frombuffer(self._topics, np.int64)
        wanted = np.flatnonzero(np.isin(topics, list(channels)))
        if not wanted.size:
            return []
        times, ids = np.frombuffer(self._times, np.int64)[wanted], np.frombuffer(self._ids, np.int64)[wanted]
        order = wanted[np.lexsort((ids, times))]
        return [Run(int(times.min()), lambda: self._read(order))]

    def _read(self, order: np.ndarray) -> Iterator[Entry]:
        self._unread = Faults()
        for index in map(int, order):
            topic = self._topics[index]
            try:
                ((data,),) = self._rows('SELECT data FROM messages WHERE rowid = ?', self._ids[index])
            except (sqlite3.Error, MemoryError, ValueError) as error:
                self._unread[self.channels[topic].topic, f'{reason(error)}'] += 1
                continue
            yield Entry(self._times[index], topic, data)

    def close(self) -> None:
        """Close the file; safe to repeat."""
        self._db.close()


def _is_hot(journal: Path) -> bool:
    """Tell whether SQLite has to do something about this journal before the database can be read."""
    if not journal.is_file():
        # As a link to nothing: SQLite would miss what it held, or wait for what a pipe never sends.
        return os.path.lexists(journal)
    if journal.name.endswith('-wal'):
        return journal.stat().st_size > _WAL_HEADER_BYTES
    with journal.open('rb') as file:
        # One that was left in place after its transaction ended begins with zeros.
        return file.read(1) not in (b'', b'\0')


def _database(path: Path, mode: str) -> sqlite3.Connection:
    uri = f'file:{quote(str(path.absolute()).encode(errors="surrogateescape"))}?{mode}'
    database = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_BUSY_S)
    database.text_factory = lambda text: text.decode(errors='replace')
    return database
