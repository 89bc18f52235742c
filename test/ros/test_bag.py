"""What of a bag is read: the same as the formats' own readers find, or less and named."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from support.source_tree import TESTS

pytest.importorskip('rclpy')
pytest.importorskip('rosbags.rosbag2')

import lz4.frame
import yaml
import zstandard
from mcap.writer import CompressionType, IndexType
from mcap.writer import Writer as McapWriter
from rosbags import rosbag2

from gps_denied_c7.ros.bag import Bag, BagError, OfferedQos, storage
from support.bags import (
    START_NS,
    STRING,
    Written,
    cdr,
    contents,
    read_mcap,
    strings,
    write_bag,
    write_mcap,
)

COMPRESSIONS = list(CompressionType)


def read(path: Path) -> tuple[list[Written], list[str]]:
    """Everything that can be played, and what is missing or left out after that."""
    with Bag(path) as bag:
        found = [Written(*entry) for entry in bag.messages(bag.topics)]
        missing = [*bag.missing, *bag.left_out.values()]
        short = sum(topic.count for topic in bag.topics.values()) - len(found)
        return found, [*missing, *([f'{short} messages'] if short > 0 else [])]


# -- mcap: cut, damaged, unclosed


@pytest.mark.parametrize('compression', COMPRESSIONS, ids=lambda value: value.name)
def test_a_cut_mcap_gives_its_whole_chunks_and_says_what_is_missing(tmp_path, compression):
    whole, cut = tmp_path / 'whole.mcap', tmp_path / 'cut.mcap'
    truth = write_mcap(whole, strings(200, '/a', '/b', padding=20), chunk_size=700, compression=compression)
    content = whole.read_bytes()
    end_of_data = len(content) - _tail_bytes(whole)
    for length in sorted(random.Random(3).sample(range(1, len(content)), 40)):
        cut.write_bytes(content[:length])
        stock = read_mcap(cut)
        if not stock:
            with pytest.raises(BagError, match='missing|begin|empty'):
                Bag(cut)
            continue
        found, missing = read(cut)
        assert found == stock == truth[: len(stock)]
        assert bool(missing) == (length < end_of_data), (length, missing)


def _tail_bytes(path: Path) -> int:
    """Return the bytes after the data section: summary, footer and magic."""
    footer = path.read_bytes()[-28:-8]
    return path.stat().st_size - int.from_bytes(footer[:8], 'little')


def test_a_cut_mcap_says_from_when_on_and_how_far(tmp_path):
    path = tmp_path / 'cut.mcap'
    write_mcap(path, strings(200), chunk_size=500)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    _, missing = read(path)
    assert len(missing) == 1
    assert f'of {path.stat().st_size}' in missing[0] and '2001-09-09' in missing[0]


def test_a_recorder_that_was_killed_leaves_what_it_wrote(tmp_path):
    """A real process, killed: no end of data, no summary."""
    path = tmp_path / 'killed.mcap'
    script = """
import os, sys
sys.path[:0] = sys.argv[2:]
from support import bags
from mcap.writer import Writer
stream = open(sys.argv[1], 'wb')
writer = Writer(stream, chunk_size=500)
writer.start('ros2')
channel = writer.register_channel('/text', 'cdr', writer.register_schema(bags.STRING, 'ros2msg', b'string data'))
for message in bags.strings(100):
    writer.add_message(channel, message.time_ns, message.data, message.time_ns)
stream.flush()
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, '-c', script, path, TESTS], check=False)
    assert done.returncode == -signal.SIGKILL
    found, missing = read(path)
    assert found == read_mcap(path) == strings(100)[: len(found)] and 50 < len(found) < 100
    assert 'was not closed' in missing[0]


@pytest.mark.parametrize('tail', [bytes(3000), b'\x06' + b'\xff' * 8 + bytes(50), b'\x05'])
def test_a_tail_of_anything_else_is_named(tmp_path, tail):
    """Zeros are what a journalling file system leaves of blocks that were never written."""
    path = tmp_path / 'tail.mcap'
    write_mcap(path, strings(100), chunk_size=500)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - _tail_bytes(path) - 13] + tail)
    found, missing = read(path)
    assert found == strings(100) and len(missing) == 1


def test_a_damaged_chunk_costs_itself_and_is_named(tmp_path):
    path = tmp_path / 'flipped.mcap'
    truth = write_mcap(path, strings(100, '/a', '/b'), chunk_size=500, compression=CompressionType.NONE)
    content = bytearray(path.read_bytes())
    content[content.index(truth[50].data) + 8] ^= 1
    path.write_bytes(content)
    found, missing = read(path)
    assert 80 < len(found) < 100
    assert found == [message for message in truth if message in found]
    assert 'crc' in missing[0] and 'messages of /a' in missing[0] and 'messages of /b' in missing[0]
    with Bag(path) as bag:
        assert sum(topic.count for topic in bag.topics.values()) == 100


def test_a_record_whose_length_is_damaged_costs_one_chunk(tmp_path):
    """The summary knows where the next chunk is."""
    path = tmp_path / 'length.mcap'
    truth = write_mcap(path, strings(100), chunk_size=500, compression=CompressionType.NONE)
    content = bytearray(path.read_bytes())
    head = content.rindex(b'\x06', 0, content.index(truth[50].data) - 40)
    content[head + 8] ^= 0x40
    path.write_bytes(content)
    found, missing = read(path)
    assert 80 < len(found) < 100 and missing
    assert found == [message for message in truth if message in found]


def test_a_damaged_index_costs_nothing(tmp_path):
    """The statistics say that every message was found."""
    path = tmp_path / 'index.mcap'
    truth = write_mcap(path, strings(100), chunk_size=500)
    content = bytearray(path.read_bytes())
    position = next(at for at in range(500, len(content)) if content[at] == 7 and content[at + 3 : at + 9] == bytes(6))
    content[position + 1] ^= 1
    path.write_bytes(content)
    assert read(path) == (truth, [])
    with Bag(path) as bag:
        assert any('no message is lost' in note for note in bag.notes)


def test_a_damaged_summary_costs_nothing(tmp_path):
    path = tmp_path / 'summary.mcap'
    truth = write_mcap(path, strings(100), chunk_size=500)
    content = bytearray(path.read_bytes())
    content[-_tail_bytes(path) + 30] ^= 0xFF
    path.write_bytes(content)
    assert read(path) == (truth, [])
    with Bag(path) as bag:
        assert any('summary is damaged' in note for note in bag.notes)


@pytest.mark.parametrize(
    'options',
    [
        {'use_chunking': False},
        {'use_statistics': False, 'index_types': IndexType.NONE},
        {'index_types': IndexType.NONE, 'repeat_channels': False, 'repeat_schemas': False},
        {'enable_crcs': False, 'compression': CompressionType.LZ4},
        {'enable_data_crcs': True},
    ],
)
@pytest.mark.parametrize('order', ['sorted', 'shuffled'])
def test_an_intact_mcap_of_any_writer_is_read_whole(tmp_path, options, order):
    path, messages = tmp_path / 'odd.mcap', strings(100, '/a', '/b')
    if order == 'shuffled':
        random.Random(1).shuffle(messages)
    write_mcap(path, messages, chunk_size=500, **options)
    found, missing = read(path)
    assert (found, missing) == (sorted(messages, key=lambda message: message.time_ns), [])
    assert found == read_mcap(path)


@pytest.mark.once
@pytest.mark.parametrize('compression', COMPRESSIONS, ids=lambda value: value.name)
def test_no_damaged_byte_of_an_mcap_goes_unseen(tmp_path, compression):
    """With checksums, whatever byte is damaged: only true messages come, and where one is missing it is said."""
    whole, path = tmp_path / 'whole.mcap', tmp_path / 'flipped.mcap'
    truth = write_mcap(whole, strings(60, '/a', '/b', padding=20), chunk_size=700, compression=compression)
    content, generator = whole.read_bytes(), random.Random(11)
    for _ in range(int(os.environ.get('C7_SOAK_BAGS', '150'))):
        damaged = bytearray(content)
        position = generator.randrange(len(damaged))
        damaged[position] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            found, missing = read(path)
        except BagError as error:
            assert error.remedy
            continue
        # A time outside the checksums moves a chunk; each of its messages stays itself.
        lost = Counter(truth) - Counter(found)
        assert not Counter(found) - Counter(truth), position
        assert missing or not lost, position


@pytest.mark.parametrize('second', ['another', 'the same again'])
@pytest.mark.parametrize('enable_crcs', [True, False])
def test_a_recording_that_is_appended_to_another_is_named(tmp_path, second, enable_crcs):
    """``cat a.mcap b.mcap``; without checksums, the summary of a copy fits the first as well."""
    truth = write_mcap(tmp_path / 'a.mcap', strings(20), enable_crcs=enable_crcs)
    if second == 'another':
        write_mcap(tmp_path / 'b.mcap', strings(30, '/other'), enable_crcs=enable_crcs)
    else:
        shutil.copy(tmp_path / 'a.mcap', tmp_path / 'b.mcap')
    appended = (tmp_path / 'b.mcap').read_bytes()
    (tmp_path / 'cat.mcap').write_bytes((tmp_path / 'a.mcap').read_bytes() + appended)
    found, missing = read(tmp_path / 'cat.mcap')
    assert found == truth and f'{len(appended)} bytes after the end' in missing[0]


NO_INDEX = {'use_statistics': False, 'index_types': IndexType.NONE, 'use_summary_offsets': False}


def records(content: bytes, opcode: int) -> list[int]:
    """Return where the records of this kind begin."""
    found, position = [], 8
    while position < len(content) - 8:
        if content[position] == opcode:
            found.append(position)
        position += 9 + int.from_bytes(content[position + 1 : position + 9], 'little')
    return found


@pytest.mark.parametrize('kind', [*range(5), 7, 8, 10, 11, *range(13, 18), 0x46, 0x86, 0x90, 255])
def test_a_chunk_that_is_marked_as_another_record_is_named_without_any_index(tmp_path, kind):
    """Also as the end of data, the footer or a part of the summary; from 0x80 on it may be an application's own."""
    path = tmp_path / 'odd.mcap'
    truth = write_mcap(path, strings(60), chunk_size=500, **NO_INDEX)
    content = bytearray(path.read_bytes())
    chunks = records(content, 6)
    content[chunks[len(chunks) // 2]] = kind
    path.write_bytes(content)
    found, missing = read(path)
    with Bag(path) as bag:
        said = missing or bag.notes
    assert len(found) < 60 and found == [message for message in truth if message in found]
    assert any(f'byte {chunks[len(chunks) // 2]}' in sentence for sentence in said), said
    if kind >= 0x0D:
        assert len(found) > 40


def test_records_of_an_application_cost_nothing(tmp_path):
    path = tmp_path / 'private.mcap'
    truth = write_mcap(path, strings(60), chunk_size=500, **NO_INDEX)
    content = path.read_bytes()
    middle = records(content, 6)[2]
    record = b'\x90' + (4).to_bytes(8, 'little') + b'mine'
    path.write_bytes(content[:middle] + record * 3 + content[middle:])
    assert read(path) == (truth, [])
    with Bag(path) as bag:
        assert '3 records of kind 0x90' in ' '.join(bag.notes)


# -- mcap: what is not ROS 2


def test_what_is_no_ros_2_message_is_left_out_by_name(tmp_path):
    path = tmp_path / 'mixed.mcap'
    with path.open('wb') as stream:
        writer = McapWriter(stream)
        writer.start(profile='')
        text = writer.register_schema(STRING, 'ros2msg', b'string data')
        bool_ = writer.register_schema('std_msgs/Bool', 'ros2msg', b'bool data')
        kinds = {
            '/json': ('json', writer.register_schema('Anything', 'jsonschema', b'{}')),
            '/no_schema': ('cdr', 0),
            '/ros1': ('ros1', writer.register_schema('std_msgs/String', 'ros1msg', b'string data')),
            '/proto': ('protobuf', writer.register_schema('foxglove.Log', 'protobuf', b'')),
            '/odd_type': ('cdr', writer.register_schema('a.b.C', 'omgidl', b'')),
            '/unencoded': ('', text),
        }
        channels = [writer.register_channel(name, *kind) for name, kind in kinds.items()]
        channels += [writer.register_channel('/both', 'cdr', schema) for schema in (text, bool_)]
        channels += [writer.register_channel('/text', 'cdr', text)]
        # Announced and never used.
        writer.register_channel('/text', 'cdr', bool_)
        short = writer.register_channel('/short_name', 'cdr', bool_)
        for channel in [*channels, short]:
            writer.add_message(channel, START_NS, cdr('x'), START_NS)
        writer.finish()
    with Bag(path) as bag:
        assert {name: topic.msgtype for name, topic in bag.topics.items()} == {
            '/text': STRING, '/short_name': 'std_msgs/msg/Bool'}  # fmt: skip
        words = {
            '/json': 'json', '/no_schema': 'no message type', '/ros1': 'ros1', '/proto': 'protobuf',
            '/odd_type': 'a.b.C is not a ROS 2', '/unencoded': 'not as CDR',
            '/both': 'several types, std_msgs/msg/Bool and std_msgs/msg/String',
        }  # fmt: skip
        assert bag.left_out.keys() == words.keys()
        assert all(word in bag.left_out[name] for name, word in words.items())
        assert len(list(bag.messages(bag.topics))) == 2
        assert bag.missing == []


@pytest.mark.parametrize('packed', [zstandard.compress, lz4.frame.compress])
@pytest.mark.parametrize('storage', ['MCAP', 'SQLITE3'])
def test_compressed_messages_without_metadata_are_decompressed(tmp_path, storage, packed):
    truth = strings(20)
    write_bag(tmp_path / 'bag', [message._replace(data=packed(message.data)) for message in truth], storage=storage)
    (tmp_path / 'bag' / 'metadata.yaml').unlink()
    assert read(tmp_path / 'bag') == (truth, [])


@pytest.mark.parametrize('metadata', ['with metadata', 'without'])
@pytest.mark.parametrize('mode', ['FILE', 'MESSAGE', 'STORAGE'])
@pytest.mark.parametrize('storage', ['MCAP', 'SQLITE3'])
def test_every_compression_of_rosbags_is_read(tmp_path, storage, mode, metadata):
    if (storage, mode) == ('SQLITE3', 'STORAGE'):
        pytest.skip('sqlite3 has none of its own')
    truth = strings(20)
    file = write_bag(tmp_path / 'bag', truth, storage=storage, version=8, mode=rosbag2.CompressionMode[mode])
    if metadata == 'without':
        (tmp_path / 'bag' / 'metadata.yaml').unlink()
    before = contents(tmp_path / 'bag')
    assert read(tmp_path / 'bag') == (truth, [])
    assert read(file)[0] == truth
    assert contents(tmp_path / 'bag') == before


def test_messages_that_are_no_cdr_are_counted_and_named(tmp_path):
    path, good = tmp_path / 'odd.mcap', strings(8)
    bad = [b'', b'\0\1', b'{"a": 1}', zstandard.compress(b'x' * 99)[:-5], zstandard.compress(b'no cdr'), b'\0\x0c\0\0']
    write_mcap(path, [*good, *(Written('/text', START_NS, data) for data in bad)])
    found, missing = read(path)
    assert found == good
    assert all('of /text left out' in sentence for sentence in missing[:-1]) and missing[-1] == '6 messages'


@pytest.mark.parametrize('packed', [zstandard.compress, lz4.frame.compress])
def test_a_compressed_message_that_was_cut_is_never_sent_as_if_whole(tmp_path, packed):
    """zstd's blocks have 128 KiB: what comes before the cut decompresses without an error."""
    whole = cdr(''.join(map(chr, np.random.default_rng(1).integers(32, 127, 600_000))))
    data = packed(whole)
    messages = [whole, data, *(data[:-cut] for cut in (1, 8, 1000, len(data) // 2, len(data) - 40))]
    messages += [data + packed(b'')]
    write_mcap(tmp_path / 'cut.mcap', [Written('/text', START_NS, message) for message in messages])
    found, missing = read(tmp_path / 'cut.mcap')
    assert [message.data for message in found] == [whole] * 3
    assert missing[-1] == '5 messages'


@pytest.mark.parametrize('name', ['zstd', 'lz4'])
@pytest.mark.parametrize('where', ['message', 'chunk'])
def test_a_few_bytes_that_would_fill_the_memory_are_left_out(tmp_path, monkeypatch, name, where):
    """Zeros of eight times what is allowed, in a message or in a chunk; the others are played."""
    monkeypatch.setattr(storage, 'MOST_BYTES', 1 << 20)
    bomb = cdr('\0' * (8 << 20))
    packed = {'zstd': zstandard.compress, 'lz4': lz4.frame.compress}[name](bomb)
    small = strings(3)
    if where == 'message':
        write_mcap(tmp_path / 'bomb.mcap', [small[0], Written('/text', START_NS, packed), *small[1:]])
    else:
        compression = {'zstd': CompressionType.ZSTD, 'lz4': CompressionType.LZ4}[name]
        written = [small[0], Written('/text', START_NS, bomb), *small[1:]]
        write_mcap(tmp_path / 'bomb.mcap', written, compression=compression, chunk_size=1)
    found, missing = read(tmp_path / 'bomb.mcap')
    assert [message.data for message in found] == [message.data for message in small]
    assert 'more than 1048576 bytes once decompressed' in missing[0] and missing[-1] == '1 messages'


# -- sqlite3: power cuts, locks, damage


RECORDER = """
import os, sqlite3, sys, time
sys.path[:0] = sys.argv[3:]
from support import bags
db = sqlite3.connect(sys.argv[1], isolation_level=None)
for pragma in ('journal_mode=' + sys.argv[2].split()[0], 'wal_autocheckpoint=0', 'cache_size=5', 'synchronous=FULL'):
    db.execute('PRAGMA ' + pragma)
def insert(messages):
    for message in messages:
        db.execute('INSERT INTO messages (topic_id, timestamp, data) VALUES (1, ?, ?)', message[1:])
db.execute('BEGIN')
insert(bags.strings(20, padding=3000)[8:])
if 'commit' in sys.argv[2]:
    db.execute('COMMIT')
else:
    db.execute('PRAGMA shrink_memory')
if 'wait' in sys.argv[2]:
    print('ready', flush=True)
    sys.stdin.read()
os.kill(os.getpid(), 9)
"""


def record(path: Path, how: str, **options) -> subprocess.Popen:
    command = [sys.executable, '-c', RECORDER, str(path), how, str(TESTS)]
    return subprocess.Popen(command, **options)


def by_sqlite(path: Path, scratch: Path) -> list[bytes]:
    """Return what SQLite itself finds in a copy."""
    for file in path.parent.glob(path.name + '*'):
        shutil.copy(file, scratch / file.name)
    with sqlite3.connect(scratch / path.name) as database:
        rows = database.execute('SELECT data FROM messages ORDER BY timestamp, id').fetchall()
    database.close()
    return [data for (data,) in rows]


@pytest.mark.parametrize('how', ['WAL commit', 'WAL', 'DELETE', 'PERSIST', 'TRUNCATE commit', 'PERSIST commit'])
def test_a_power_cut_loses_no_committed_message_and_the_bag_stays_as_it_is(tmp_path, how):
    """A real recorder, killed before or after its commit, with rows in -wal or half a transaction in -journal."""
    truth = strings(20, padding=3000)
    file = write_bag(tmp_path / 'bag', truth[:8], storage='SQLITE3')
    assert record(file, how).wait() == -signal.SIGKILL
    before = contents(tmp_path / 'bag')
    assert len(before) > 2 or 'TRUNCATE' in how
    (tmp_path / 'copy').mkdir()
    stock = by_sqlite(file, tmp_path / 'copy')
    assert len(stock) == (20 if 'commit' in how else 8)
    for path in (tmp_path / 'bag', file):
        found, missing = read(path)
        assert [message.data for message in found] == stock and missing == []
        with Bag(path) as bag:
            hot = how in ('WAL commit', 'DELETE', 'PERSIST')
            assert any('temporary copy' in note for note in bag.notes) >= hot
    assert contents(tmp_path / 'bag') == before


def test_a_wal_without_its_shm_is_read_too(tmp_path):
    file = write_bag(tmp_path / 'bag', strings(20, padding=3000)[:8], storage='SQLITE3')
    record(file, 'WAL commit').wait()
    Path(f'{file}-shm').unlink()
    assert read(tmp_path / 'bag') == (strings(20, padding=3000), [])


@pytest.mark.parametrize('how', ['WAL commit', 'DELETE'])
@pytest.mark.parametrize('linked', ['file', 'file and journal'])
def test_a_power_cut_behind_a_link_loses_no_committed_message(tmp_path, how, linked):
    """SQLite looks for the journal where the link leads; a store of files by content has journals elsewhere."""
    real = write_bag(tmp_path / 'bag', strings(20, padding=3000)[:8], storage='SQLITE3')
    assert record(real, how).wait() == -signal.SIGKILL
    (tmp_path / 'copy').mkdir()
    stock = by_sqlite(real, tmp_path / 'copy')
    (tmp_path / 'link').mkdir()
    shutil.copy(tmp_path / 'bag' / 'metadata.yaml', tmp_path / 'link')
    if linked == 'file':
        (tmp_path / 'link' / 'bag.db3').symlink_to(f'../bag/{real.name}')
    else:
        for number, file in enumerate(tmp_path.glob('bag/bag.db3*')):
            (tmp_path / str(number)).mkdir()
            (tmp_path / 'link' / file.name).symlink_to(file.rename(tmp_path / str(number) / 'content'))
    before = contents(tmp_path / 'link')
    for path in (tmp_path / 'link', tmp_path / 'link' / 'bag.db3'):
        assert [message.data for message in read(path)[0]] == stock
        with Bag(path) as bag:
            assert any('temporary copy' in note for note in bag.notes)
    assert contents(tmp_path / 'link') == before and len(stock) == (20 if how == 'WAL commit' else 8)


def test_a_journal_that_leads_nowhere_is_named(tmp_path):
    """A store of files of which only the bag was fetched."""
    file = write_bag(tmp_path / 'bag', strings(8), storage='SQLITE3')
    Path(f'{file}-wal').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(BagError, match='bag.db3-wal'):
        Bag(tmp_path / 'bag')


def test_a_closed_bag_in_wal_mode_is_read_without_a_file_beside_it(tmp_path):
    file = write_bag(tmp_path / 'bag', strings(20), storage='SQLITE3')
    database = sqlite3.connect(file)
    database.execute('PRAGMA journal_mode=WAL')
    database.close()
    before = contents(tmp_path / 'bag')
    assert read(tmp_path / 'bag') == (strings(20), [])
    assert contents(tmp_path / 'bag') == before


def test_no_room_for_the_copy_is_said_with_what_to_do(tmp_path, monkeypatch):
    file = write_bag(tmp_path / 'bag', strings(20, padding=3000)[:8], storage='SQLITE3')
    record(file, 'WAL commit').wait()
    monkeypatch.setattr(shutil, 'copyfile', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(BagError, match='No space left on device.*TMPDIR'):
        Bag(tmp_path / 'bag')


@pytest.mark.parametrize('how', ['WAL wait', 'WAL commit wait', 'DELETE wait', 'DELETE commit wait'])
def test_a_bag_that_is_being_recorded_is_named_as_that(tmp_path, how):
    file = write_bag(tmp_path / 'bag', strings(20, padding=3000)[:8], storage='SQLITE3')
    (tmp_path / 'bag' / 'metadata.yaml').unlink()
    recorder = record(file, how, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        recorder.stdout.readline()
        if how == 'DELETE commit wait':
            found, missing = read(tmp_path / 'bag')
            assert len(found) == 20 and 'still being recorded' in missing[0]
        else:
            with pytest.raises(BagError, match='being recorded.*End the recorder'):
                Bag(tmp_path / 'bag')
    finally:
        recorder.kill()
        recorder.communicate()


def test_an_mcap_that_is_being_recorded_is_named_as_that(tmp_path):
    path = tmp_path / 'live.mcap'
    write_mcap(path, strings(100), chunk_size=500)
    with path.open('r+b') as stream:
        stream.truncate(path.stat().st_size - _tail_bytes(path) - 13)
        found, missing = read(path)
    assert found == strings(100) and 'still has the file open' in missing[0]


def test_a_cut_or_damaged_sqlite_bag_gives_true_messages_and_says_so(tmp_path):
    whole = write_bag(tmp_path / 'bag', strings(400, '/a', '/b', padding=300), storage='SQLITE3')
    truth, content, generator = strings(400, '/a', '/b', padding=300), whole.read_bytes(), random.Random(5)
    path = tmp_path / 'cut.db3'
    partial = 0
    for length in generator.sample(range(1, len(content)), 40):
        path.write_bytes(content[:length])
        try:
            found, missing = read(path)
        except BagError as error:
            assert error.remedy
            continue
        assert not Counter(found) - Counter(truth) and missing
        partial += 0 < len(found) < len(truth)
    assert partial > 10


def test_damaged_pages_of_a_sqlite_bag_cost_their_messages(tmp_path):
    file = write_bag(tmp_path / 'bag', strings(400, padding=300), storage='SQLITE3')
    content = bytearray(file.read_bytes())
    position = content.index(b'200 xxx') // 4096 * 4096
    content[position : position + 4096] = b'\xff' * 4096
    file.write_bytes(content)
    found, missing = read(file)
    assert 380 < len(found) < 400 and not Counter(found) - Counter(strings(400, padding=300))
    assert found[0] == strings(1, padding=300)[0] and found[-1].time_ns == START_NS + 399 * 10**6
    assert 'damaged' in missing[0] and 'message' in missing[0]


@pytest.mark.once
def test_flipped_bytes_of_a_sqlite_bag_end_in_no_traceback(tmp_path):
    """SQLite has no checksums: a message's own bytes cannot be checked, all else either works or is named."""
    whole = write_bag(tmp_path / 'bag', strings(60, padding=100), storage='SQLITE3')
    content, generator, path = whole.read_bytes(), random.Random(17), tmp_path / 'flipped.db3'
    for _ in range(int(os.environ.get('C7_SOAK_BAGS', '150'))):
        damaged = bytearray(content)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            found, missing = read(path)
        except BagError as error:
            assert error.remedy
            continue
        assert len(found) >= 60 or missing


def test_odd_rows_are_counted_and_named(tmp_path):
    file = write_bag(tmp_path / 'bag', strings(5), storage='SQLITE3')
    database = sqlite3.connect(file)
    insert = 'INSERT INTO messages (topic_id, timestamp, data) VALUES (?, ?, ?)'
    database.executemany(insert, [(1, 'noon', b''), (7, 5, cdr('x')), (1, 5, 'text'), (1, -5, cdr('early'))])
    database.commit()
    database.close()
    found, missing = read(tmp_path / 'bag')
    assert found == [Written('/text', -5, cdr('early')), *strings(5)]
    assert len(missing) == 4 and any('belong to no topic' in sentence for sentence in missing)


# -- metadata.yaml and its files


def change_metadata(path: Path, change) -> None:
    file = path / 'metadata.yaml'
    metadata = yaml.safe_load(file.read_text())
    change(metadata['rosbag2_bagfile_information'])
    file.write_text(yaml.safe_dump(metadata))


def topic_of(information: dict) -> dict:
    return information['topics_with_message_count'][0]['topic_metadata']


@pytest.mark.parametrize(
    ('change', 'word'),
    [
        (lambda info: topic_of(info).update(offered_qos_profiles=[{'reliability': 'best_effort'}]), ''),
        (lambda info: topic_of(info).update(name='/other'), '/text has 20 messages, metadata.yaml says 0'),
        (lambda info: topic_of(info).update(type='std_msgs/msg/Bool'), 'metadata.yaml gives std_msgs/msg/Bool'),
        (lambda info: info['topics_with_message_count'][0].update(message_count=7), ' messages, metadata.yaml says 7'),
        (lambda info: info.update(compression_mode='MESSAGE', compression_format='zstd'), ''),
        (lambda info: info.update(compression_mode='FILE', compression_format='fake'), ''),
        (lambda info: info.update(version=99, storage_identifier='odd'), ''),
        (lambda info: info.update(relative_file_paths=['bag/bag.mcap']), ''),
        (lambda info: info.update(relative_file_paths=['/elsewhere/bag/bag.mcap']), ''),
        (lambda info: info.update(relative_file_paths=['renamed_0.mcap']), 'renamed_0.mcap; played instead: bag.mcap.'),
        (lambda info: info.update(topics_with_message_count=None), 'has 20 messages, metadata.yaml says 0'),
        (lambda info: info.pop('relative_file_paths'), 'cannot be read'),
        (lambda info: info.clear(), 'cannot be read'),
    ],
)
def test_the_storage_is_played_whatever_the_metadata_says(tmp_path, change, word):
    write_bag(tmp_path / 'bag', strings(20))
    change_metadata(tmp_path / 'bag', change)
    assert read(tmp_path / 'bag') == (strings(20), [])
    with Bag(f'{tmp_path}/bag/') as bag:
        assert word in ' '.join(bag.notes)


@pytest.mark.parametrize('text', ['rosbag2_bagfile_information: [', '', '[' * 5000, '\0\xff', '- 1'])
def test_a_broken_metadata_yaml_costs_nothing(tmp_path, text):
    write_bag(tmp_path / 'bag', strings(20))
    (tmp_path / 'bag' / 'metadata.yaml').write_text(text, encoding='latin-1')
    assert read(tmp_path / 'bag') == (strings(20), [])


@pytest.mark.parametrize('version', range(1, 10))
@pytest.mark.parametrize('storage', ['MCAP', 'SQLITE3'])
def test_every_version_of_the_metadata_is_read_with_its_qos(tmp_path, storage, version):
    """Numbers in YAML text up to version 8, names in a list from 9 on; each kind with the storage's own QoS removed."""
    path, wanted = tmp_path / 'bag', OfferedQos(reliable=False, transient_local=True, depth=3)
    write_bag(path, strings(3), storage=storage)
    values = {'history': 1, 'depth': 3, 'reliability': 2, 'durability': 1, 'liveliness': 1}
    names = {'history': 'keep_last', 'depth': 3, 'reliability': 'best_effort', 'durability': 'transient_local'}

    def change(information: dict) -> None:
        information['version'] = version
        qos = [names] if version == 9 else yaml.safe_dump([values])
        topic_of(information)['offered_qos_profiles'] = qos
        if version < 4:
            del topic_of(information)['offered_qos_profiles']
            information['relative_file_paths'] = [f'bag/{name}' for name in information['relative_file_paths']]

    change_metadata(path, change)
    if storage == 'SQLITE3':
        with sqlite3.connect(path / 'bag.db3') as database:
            database.execute('ALTER TABLE topics DROP COLUMN offered_qos_profiles')
        database.close()
    else:
        write_mcap(path / 'bag.mcap', strings(3))
    with Bag(path) as bag:
        assert bag.topics['/text'].qos == (wanted if version >= 4 else OfferedQos())
    assert read(path) == (strings(3), [])


@pytest.mark.parametrize('value', ['.inf', '.nan', '-3', 'true', '1e400', '9' * 400, '[1]', 'many', '0x' + 'f' * 5000])
def test_any_number_in_the_metadata_is_read(tmp_path, value):
    write_bag(tmp_path / 'bag', strings(20))
    file = tmp_path / 'bag' / 'metadata.yaml'
    profile = (
        f'[{{depth: {value}, history: {value}, liveliness: {value}, deadline: {{sec: {value}, nsec: {value}}}, '
        f'lifespan: {value}}}]'
    )
    text = file.read_text().replace('message_count: 20', f'message_count: {value}')
    file.write_text(text.replace('offered_qos_profiles: []', f'offered_qos_profiles: {profile}'))
    assert profile in file.read_text()
    assert read(tmp_path / 'bag') == (strings(20), [])


@pytest.mark.parametrize(
    'text', ['- a: !!timestamp abc', '- a: !!int ""', '- a: !!bool x', '- {<<: 5}', '-' * 9, '[' * 9999]
)
@pytest.mark.parametrize('storage', ['MCAP', 'SQLITE3'])
def test_qos_that_cannot_be_read_costs_no_message(tmp_path, storage, text):
    file = write_bag(tmp_path / 'bag', strings(20), storage=storage)
    if storage == 'SQLITE3':
        with sqlite3.connect(file) as database:
            database.execute('UPDATE topics SET offered_qos_profiles = ?', (text,))
        database.close()
    else:
        change_metadata(tmp_path / 'bag', lambda info: topic_of(info).update(offered_qos_profiles=text))
    assert read(tmp_path / 'bag') == (strings(20), [])
    with Bag(tmp_path / 'bag') as bag:
        assert 'offered_qos_profiles' in ' '.join(bag.notes)


@pytest.mark.parametrize('where', ['type: *l20', 'type_description_hash: *l20', 'type: {<<: *l20}'])
def test_aliases_in_each_other_cost_no_time_and_no_message(tmp_path, where):
    """Twenty levels of ten stand for 10^20 values."""
    write_bag(tmp_path / 'bag', strings(20))
    file = tmp_path / 'bag' / 'metadata.yaml'
    merged = '<<' in where
    head = ['l0: &l0 {a: 1}\n']
    for level in range(20):
        inner = '[' + ', '.join([f'*l{level}'] * 10) + ']'
        head.append(f'l{level + 1}: &l{level + 1} ' + (f'{{<<: {inner}}}\n' if merged else f'{inner}\n'))
    text = ''.join(head) + file.read_text().replace('type: std_msgs/msg/String', where, 1)
    assert where in text
    file.write_text(text)
    assert read(tmp_path / 'bag') == (strings(20), [])


def test_a_decompressed_copy_beside_a_compressed_file_is_not_played_twice(tmp_path):
    """As older rosbag2 leaves it after playing."""
    file = write_bag(tmp_path / 'bag', strings(20), storage='SQLITE3', version=8, mode=rosbag2.CompressionMode.FILE)
    file.with_name('bag.db3').write_bytes(zstandard.decompress(file.read_bytes(), 10**6))
    assert read(tmp_path / 'bag') == (strings(20), [])
    (tmp_path / 'bag' / 'metadata.yaml').unlink()
    assert read(tmp_path / 'bag') == (strings(20), [])


@pytest.fixture
def split(tmp_path) -> Path:
    """A recording in three files, out of step by half, as rosbag2 splits it."""
    truth = strings(30, '/a', '/b')
    parts = [write_bag(tmp_path / str(part), truth[part * 10 : part * 10 + 10]) for part in range(3)]
    (tmp_path / 'bag').mkdir()
    names = [f'bag_{part}.mcap' for part in (0, 1, 10)]
    for part, name in zip(parts, names, strict=True):
        part.rename(tmp_path / 'bag' / name)
    shutil.copy(tmp_path / '0' / 'metadata.yaml', tmp_path / 'bag')

    def change(information: dict) -> None:
        information['relative_file_paths'] = names
        for entry in information['topics_with_message_count']:
            entry['message_count'] = 15

    change_metadata(tmp_path / 'bag', change)
    return tmp_path / 'bag'


def test_a_split_bag_is_read_in_the_order_of_time(split):
    assert read(split) == (strings(30, '/a', '/b'), [])
    (split / 'metadata.yaml').unlink()
    assert read(split) == (strings(30, '/a', '/b'), [])


def test_a_part_that_is_not_there_is_named_and_the_rest_read(split):
    (split / 'bag_1.mcap').unlink()
    found, missing = read(split)
    truth = strings(30, '/a', '/b')
    assert found == truth[:10] + truth[20:]
    assert 'bag_1.mcap is missing' in missing[0] and missing[-1] == '10 messages'


@pytest.mark.parametrize('content', [b'', b'not an mcap file at all'])
def test_a_part_that_cannot_be_read_is_named_and_the_rest_read(split, content):
    (split / 'bag_10.mcap').write_bytes(content)
    found, missing = read(split)
    assert found == strings(30, '/a', '/b')[:20]
    assert 'bag_10.mcap is damaged' in missing[0] and missing[-1] == '10 messages'


def test_a_file_that_the_metadata_does_not_name_is_named(split):
    shutil.copy(split / 'bag_0.mcap', split / 'bag_2.mcap')
    found, missing = read(split)
    assert found == strings(30, '/a', '/b') and 'bag_2.mcap is not played' in missing[0]


def name_files(path: Path, names: list[str]) -> None:
    """Write a metadata.yaml that says which files the bag has, and no more."""
    (path / 'metadata.yaml').write_text(yaml.safe_dump({'rosbag2_bagfile_information': {'relative_file_paths': names}}))


def test_a_name_means_the_file_that_it_leads_to(tmp_path):
    """Two parts of the same name in folders, and a third file of that name beside the metadata."""
    for folder in ('', 'a', 'b'):
        (tmp_path / 'bag' / folder).mkdir(exist_ok=True, parents=True)
        write_mcap(tmp_path / 'bag' / folder / 'x.mcap', strings(5, f'/{folder or "beside"}'))
    name_files(tmp_path / 'bag', ['a/x.mcap', f'{tmp_path}/bag/b/x.mcap'])
    found, missing = read(tmp_path / 'bag')
    assert {message.topic for message in found} == {'/a', '/b'} and len(found) == 10
    assert missing == [f'x.mcap is not played: it is in {tmp_path / "bag"} and metadata.yaml does not name it.']


def test_a_name_that_leads_nowhere_means_the_file_beside_the_metadata_once(tmp_path):
    (tmp_path / 'bag').mkdir()
    write_mcap(tmp_path / 'bag' / 'x.mcap', strings(5))
    name_files(tmp_path / 'bag', ['a/x.mcap', 'b/x.mcap'])
    found, missing = read(tmp_path / 'bag')
    assert found == strings(5) and 'b/x.mcap is missing' in missing[0] and 'a/x' not in missing[0]


@pytest.mark.parametrize('name', ['{}/store/x.mcap', '../store/x.mcap'])
def test_a_file_outside_the_bag_is_played_only_where_the_bag_has_none_of_that_name(tmp_path, name):
    """A copied bag still names the files of the one it was copied from."""
    (tmp_path / 'bag').mkdir()
    (tmp_path / 'store').mkdir()
    write_mcap(tmp_path / 'store' / 'x.mcap', strings(5, '/store'))
    name_files(tmp_path / 'bag', [name.format(tmp_path)])
    assert read(tmp_path / 'bag') == (strings(5, '/store'), [])
    with Bag(tmp_path / 'bag') as bag:
        assert 'outside' in bag.notes[0] and 'store/x.mcap' in bag.notes[0]
    write_mcap(tmp_path / 'bag' / 'x.mcap', strings(5, '/own'))
    assert read(tmp_path / 'bag') == (strings(5, '/own'), [])


@pytest.mark.parametrize('again', ['./bag.mcap', 'bag.mcap', 'link.mcap', '{}/bag/bag.mcap', '../bag/bag.mcap'])
def test_a_file_that_is_named_twice_is_played_once(tmp_path, again):
    write_bag(tmp_path / 'bag', strings(20))
    (tmp_path / 'bag' / 'link.mcap').symlink_to('bag.mcap')
    names = ['bag.mcap', again.format(tmp_path)]
    change_metadata(tmp_path / 'bag', lambda info: info.update(relative_file_paths=names))
    assert read(tmp_path / 'bag') == (strings(20), [])


@pytest.mark.parametrize('names', [[], [''], [5], ['a' * 300 + '.mcap'], ['a\0b.mcap'], ['.'], ['bag.mcap/x.mcap']])
def test_names_that_lead_to_no_file_cost_no_message(tmp_path, names):
    """A recorder that died leaves an empty list."""
    write_bag(tmp_path / 'bag', strings(20))
    change_metadata(tmp_path / 'bag', lambda info: info.update(relative_file_paths=names))
    assert read(tmp_path / 'bag') == (strings(20), [])
    with Bag(tmp_path / 'bag') as bag:
        assert 'metadata.yaml names' in bag.notes[0]


@pytest.mark.parametrize('name', ['metadata.yaml', 'other.db3'])
def test_a_pipe_in_the_bag_is_not_waited_for(tmp_path, name):
    write_bag(tmp_path / 'bag', strings(20), storage='SQLITE3')
    (tmp_path / 'bag' / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / 'bag' / name)
    assert read(tmp_path / 'bag') == (strings(20), [])


@pytest.mark.parametrize('suffix', ['-wal', '-journal'])
def test_a_pipe_in_place_of_a_journal_is_named(tmp_path, suffix):
    file = write_bag(tmp_path / 'bag', strings(20), storage='SQLITE3')
    os.mkfifo(f'{file}{suffix}')
    with pytest.raises(BagError, match=f'bag.db3{suffix}. is a named pipe'):
        Bag(tmp_path / 'bag')


@pytest.mark.parametrize('storage', ['MCAP', 'SQLITE3'])
@pytest.mark.parametrize('metadata', ['with metadata', 'without'])
def test_a_file_that_was_packed_as_lz4_is_read(tmp_path, storage, metadata):
    file = write_bag(tmp_path / 'bag', strings(200), storage=storage)
    packed = file.with_name(file.name + '.lz4')
    packed.write_bytes(lz4.frame.compress(file.read_bytes()))
    file.unlink()
    change_metadata(tmp_path / 'bag', lambda info: info.update(relative_file_paths=[packed.name]))
    if metadata == 'without':
        (tmp_path / 'bag' / 'metadata.yaml').unlink()
    assert read(tmp_path / 'bag') == (strings(200), [])
    packed.write_bytes(packed.read_bytes()[:-50])
    with contextlib.suppress(BagError):
        assert read(tmp_path / 'bag')[1]


def test_a_bag_of_ros_1_is_named_as_that(tmp_path):
    (tmp_path / 'old.bag').write_bytes(b'#ROSBAG V2.0\n' + bytes(4000))
    with pytest.raises(BagError, match='is a bag of ROS 1.*rosbags-convert --src'):
        Bag(tmp_path / 'old.bag')


def test_files_that_do_not_belong_together_are_not_mixed(tmp_path):
    for name in ('monday.mcap', 'tuesday.mcap'):
        write_mcap(tmp_path / name, strings(3))
    with pytest.raises(BagError, match=r'do not belong together.*monday.mcap, tuesday.mcap'):
        Bag(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can become another user')
@pytest.mark.parametrize('suffix', ['mcap', 'db3', 'db3-wal'])
def test_a_file_that_may_not_be_read_is_named_as_that(suffix):
    folder = Path(tempfile.mkdtemp(dir='/var/tmp'))
    try:
        file = write_bag(folder / 'bag', strings(8), storage='MCAP' if suffix == 'mcap' else 'SQLITE3')
        if suffix == 'db3-wal':
            record(file, 'WAL commit').wait()
        folder.chmod(0o755)
        Path(f'{file.with_suffix("")}.{suffix}').chmod(0)
        os.seteuid(65534)
        with pytest.raises(BagError, match='ermission'):
            Bag(folder / 'bag')
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_links_and_names_with_odd_characters_are_read(tmp_path):
    write_bag(tmp_path / 'bag', strings(3), storage='SQLITE3')
    odd = tmp_path / 'a?b=c#d%20 é.db3'
    (tmp_path / 'bag' / 'bag.db3').rename(odd)
    (tmp_path / 'link.db3').symlink_to(odd)
    assert read(odd) == read(tmp_path / 'link.db3') == (strings(3), [])


@pytest.mark.parametrize('depth', [0, 1, 2**31 - 1, 2**63, -1, 'many'])
@pytest.mark.parametrize('history', [1, 2, 'keep_all', 'unknown'])
def test_any_depth_and_history_is_read(tmp_path, depth, history):
    path = tmp_path / 'bag'
    write_bag(path, strings(3))
    write_mcap(path / 'bag.mcap', strings(3))
    profile = {'depth': depth, 'history': history, 'durability': 1}
    change_metadata(path, lambda info: topic_of(info).update(offered_qos_profiles=[profile, profile]))
    with Bag(path) as bag:
        qos = bag.topics['/text'].qos
    wanted = 2**31 - 1 if history in (2, 'keep_all') or depth in (2**31 - 1, 2**63) else 2 if depth == 1 else 0
    assert qos == OfferedQos(reliable=True, transient_local=True, depth=wanted)


@pytest.mark.parametrize('storage', ['MCAP', 'SQLITE3'])
@pytest.mark.parametrize('package', ['mcap', 'lz4', 'zstandard'])
def test_a_package_that_is_not_installed_is_named_and_the_bag_is_not_called_damaged(package, storage, tmp_path):
    write_bag(tmp_path / 'bag', strings(3), storage=storage)
    lines = f"""
import sys
sys.modules[{package!r}] = None
from gps_denied_c7.ros.replay_main import main
sys.exit(main(sys.argv[1:]))
"""
    ended = subprocess.run(
        [sys.executable, '-c', lines, str(tmp_path / 'bag'), '--wait-matched', '0'],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 1 and 'Traceback' not in ended.stderr
    assert package in ended.stderr and 'requirements/runtime.txt' in ended.stderr and 'damaged' not in ended.stderr
