"""c7_replay over real DDS: what is in the bag arrives, byte for byte, and what cannot be played is named."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.source_tree import TESTS

pytest.importorskip('rclpy')
zstandard = pytest.importorskip('zstandard')
rosbag2 = pytest.importorskip('rosbags.rosbag2')
typesys = pytest.importorskip('rosbags.typesys')

from geometry_msgs.msg import PoseStamped  # noqa: E402
from lifecycle_msgs.srv import GetState  # noqa: E402
from mcap.writer import Writer as McapWriter  # noqa: E402
from rclpy.duration import Duration  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.qos import DurabilityPolicy, LivelinessPolicy, QoSProfile, ReliabilityPolicy  # noqa: E402
from rclpy.serialization import serialize_message  # noqa: E402
from rosbags.interfaces import QosTime  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Int32, String  # noqa: E402

from gps_denied_c7.demo.flight import Camera, Flight, write_flight  # noqa: E402
from gps_denied_c7.demo.terrain import paint_terrain  # noqa: E402
from gps_denied_c7.ros.bag import Bag, BagError  # noqa: E402
from support.bags import (  # noqa: E402
    DEADLINE_S,
    Written,
    cdr,
    contents,
    listen,
    listening,
    offered,
    read_mcap,
    replay,
    start,
    strings,
    wait_for,
    write_bag,
    write_mcap,
)

CAMERAS = (Camera('/camera', 320, 240, 'mono8', 20.0),)
IMAGES, POSES = '/camera/image_raw', '/ground_truth/pose'


@pytest.fixture(scope='module')
def terrain():
    return paint_terrain(7, size_m=400.0, metres_per_pixel=0.4)


@pytest.fixture(scope='module', params=['mcap', 'sqlite3'])
def any_bag(request, tmp_path_factory, terrain) -> Path:
    path = tmp_path_factory.mktemp('bags') / request.param
    write_flight(path, Flight(1.0, CAMERAS, storage=request.param), terrain=terrain)
    return path


@pytest.fixture(scope='module')
def bag(tmp_path_factory, terrain) -> Path:
    path = tmp_path_factory.mktemp('bag') / 'flight'
    write_flight(path, Flight(1.0, CAMERAS), terrain=terrain)
    return path


@pytest.fixture(autouse=True)
def own_domain(monkeypatch, domain_id) -> None:
    monkeypatch.setenv('ROS_DOMAIN_ID', str(domain_id))


@pytest.fixture
def node(domain_id) -> Iterator[Node]:
    with listening(domain_id) as node:
        yield node


def recorded(path: Path, topic: str) -> list[bytes]:
    with rosbag2.Reader(path) as reader:
        return [data for connection, _, data in reader.messages() if connection.topic == topic]


def write_strings(path: Path, topics: dict[str, list], *, count: int = 3, msgtype: str = 'std_msgs/msg/String'):
    store = typesys.get_typestore(typesys.Stores.ROS2_JAZZY)
    if msgtype != 'std_msgs/msg/String':
        store.register(typesys.get_types_from_msg('string data', msgtype))
    with rosbag2.Writer(path, version=8, storage_plugin=rosbag2.StoragePlugin.MCAP) as writer:
        connections = [
            writer.add_connection(name, msgtype, typestore=store, offered_qos_profiles=list(profiles))
            for name, profiles in topics.items()
        ]
        for index in range(count):
            for connection in connections:
                data = store.serialize_cdr(store.types[msgtype](data=f'{connection.topic} {index}'), msgtype)
                writer.write(connection, 10**9 + index * 10**7, bytes(data))


def test_every_message_arrives_as_recorded(any_bag, node, tmp_path):
    """Deliverable 6: sqlite3 and mcap, raw CDR, complete, in order; the report agrees."""
    images, poses = listen(node, Image, IMAGES), listen(node, PoseStamped, POSES)
    listen(node, Image, '/unrelated')
    code, output = replay(any_bag, '--topics', IMAGES, POSES, '--wait-matched', 20, '--json', tmp_path / 'report.json')
    assert code == 0, output
    assert images == recorded(any_bag, IMAGES) and len(images) == 20
    assert poses == recorded(any_bag, POSES)
    report = json.loads((tmp_path / 'report.json').read_text())
    by_topic = {topic['topic']: topic for topic in report['topics']}
    assert set(by_topic) == {IMAGES, POSES}
    assert by_topic[IMAGES]['sent'] == by_topic[IMAGES]['recorded'] == 20
    assert by_topic[IMAGES]['bytes'] == sum(map(len, images))
    assert by_topic[IMAGES]['matched'] == 1 and by_topic[IMAGES]['acknowledged']
    assert report['loops'] == 1 and report['interrupted'] == '' and report['skipped'] == {}
    assert f'{IMAGES}: sent 20 of 20' in output


def test_a_single_storage_file_plays_too(any_bag, node):
    images = listen(node, Image, IMAGES)
    [file] = [file for file in any_bag.iterdir() if file.suffix in ('.mcap', '.db3')]
    code, output = replay(file, '--topics', IMAGES, '--wait-matched', 20, '--rate', 5)
    assert code == 0, output
    assert images == recorded(any_bag, IMAGES)


def test_a_directory_without_metadata_plays_its_only_file(bag, node, tmp_path):
    images = listen(node, Image, IMAGES)
    (tmp_path / 'flight.mcap').write_bytes((bag / 'flight.mcap').read_bytes())
    code, output = replay(tmp_path, '--topics', IMAGES, '--wait-matched', 20, '--rate', 5)
    assert code == 0 and 'no metadata.yaml' in output
    assert len(images) == 20


def test_topics_and_remap(bag, node):
    """Only what was named is played, under the names that were asked for."""
    here, there = listen(node, Image, IMAGES), listen(node, Image, '/other/image')
    poses = listen(node, PoseStamped, POSES)
    code, output = replay(bag, '--topics', IMAGES, '--remap', f'{IMAGES}:=/other/image', '--wait-matched', 20)
    assert code == 0, output
    assert (len(here), len(there), len(poses)) == (0, 20, 0)


def test_a_subscriber_that_comes_late_misses_nothing(bag, node):
    """Deliverable 6: it waits until both ends have matched."""
    process = start(bag, '--topics', IMAGES, '--wait-matched', 30)
    wait_for(lambda: node.count_publishers(IMAGES) > 0, 'the replay offers its topic')
    time.sleep(1.0)
    images = listen(node, Image, IMAGES, qos=QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT))
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    assert len(images) == 20


def test_gives_up_when_nobody_comes(bag, domain_id):
    code, output = replay(bag, '--topics', IMAGES, '--wait-matched', 1)
    assert code == 1
    assert f'there is no subscriber to {IMAGES}' in output and f'ROS_DOMAIN_ID {domain_id}' in output
    assert 'sent 20' not in output


def test_plays_to_nobody_when_not_asked_to_wait(bag, tmp_path):
    code, output = replay(bag, '--wait-matched', 0, '--rate', 10, '--json', tmp_path / 'report.json')
    assert code == 0 and 'no subscriber' in output
    assert {t['matched'] for t in json.loads((tmp_path / 'report.json').read_text())['topics']} == {0}


@pytest.mark.parametrize('rate', [0.5, 4.0])
def test_rate_never_runs_ahead(bag, node, tmp_path, rate):
    """Steady clock: no message leaves before its time, at any rate."""
    listen(node, Image, IMAGES)
    report = tmp_path / 'report.json'
    code, output = replay(bag, '--topics', IMAGES, '--wait-matched', 20, '--rate', rate, '--json', report)
    assert code == 0, output
    [topic] = json.loads(report.read_text())['topics']
    assert topic['span_s'] >= 0.95 / rate - json.loads(report.read_text())['latest_s'] - 0.01
    assert topic['sent'] == 20


def test_clock_follows_the_bag(bag, node):
    """--clock publishes the bag's time from its first message on, never backwards within a pass."""
    clocks = listen(node, Clock, '/clock', raw=False)
    listen(node, Image, IMAGES)
    code, output = replay(bag, '--topics', IMAGES, '--wait-matched', 20, '--clock', 100)
    assert code == 0, output
    times = [clock.clock.sec * 10**9 + clock.clock.nanosec for clock in clocks]
    with rosbag2.Reader(bag) as reader:
        first, last = reader.start_time, reader.end_time
    assert len(times) > 20
    assert times == sorted(times)
    assert first <= times[0] and times[-1] <= last + 10**9
    assert times[-1] - times[0] > 0.8 * (last - first)


def test_no_clock_unless_asked(bag, node):
    clocks = listen(node, Clock, '/clock', raw=False)
    code, _ = replay(bag, '--wait-matched', 0, '--rate', 5)
    assert code == 0 and clocks == []


def test_loop_starts_over_until_interrupted(bag, node, tmp_path):
    """--loop plays whole passes, in order, and SIGINT is its ordinary end."""
    images = listen(node, Image, IMAGES)
    report = tmp_path / 'report.json'
    process = start(bag, '--topics', IMAGES, '--wait-matched', 20, '--rate', 4, '--loop', '--json', report)
    wait_for(lambda: len(images) > 50, 'two and a half passes')
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    once = recorded(bag, IMAGES)
    assert images == (once * (len(images) // 20 + 1))[: len(images)]
    values = json.loads(report.read_text())
    assert values['loops'] >= 2 and values['interrupted'] == 'SIGINT'
    assert values['topics'][0]['sent'] == len(images)


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_replay_stops_and_reports(bag, node, tmp_path, number, code):
    images = listen(node, Image, IMAGES)
    report = tmp_path / 'report.json'
    process = start(bag, '--topics', IMAGES, '--wait-matched', 20, '--rate', 0.2, '--json', report)
    wait_for(lambda: len(images) > 2, 'a few images')
    process.send_signal(number)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, output
    values = json.loads(report.read_text())
    assert values['interrupted'] == number.name and 2 < values['topics'][0]['sent'] < 20
    assert 'Traceback' not in output


def write_zeros(path: Path, megabytes: int) -> None:
    """A file that begins as an SQLite database, is none, and takes a while to decompress."""
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    with path.open('wb') as file:
        file.write(packer.compress(b'SQLite format 3\0'))
        for _ in range(megabytes):
            file.write(packer.compress(bytes(2**20)))
        file.write(packer.flush())


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_the_bag_is_decompressed(tmp_path, monkeypatch, number, code):
    (tmp_path / 'scratch').mkdir()
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'scratch'))
    write_zeros(tmp_path / 'bag.db3.zstd', 512)
    process = start(tmp_path / 'bag.db3.zstd', '--json', tmp_path / 'report.json')
    wait_for(lambda: any((tmp_path / 'scratch').glob('c7_replay_*/*')), 'no copy')
    process.send_signal(number)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code and 'interrupted' in output and 'Traceback' not in output, output
    assert report_of(tmp_path)['interrupted'] == number.name
    assert not list((tmp_path / 'scratch').glob('c7_replay_*'))


def test_a_compressed_file_that_is_no_bag_is_named_as_the_user_named_it(tmp_path):
    write_zeros(tmp_path / 'bag.db3.zstd', 1)
    code, output = replay(tmp_path / 'bag.db3.zstd')
    assert code == 1 and f'{tmp_path / "bag.db3.zstd"} is damaged' in output


def test_interrupted_while_waiting_for_a_subscriber(bag, node):
    process = start(bag, '--topics', IMAGES, '--wait-matched', 60)
    wait_for(lambda: node.count_publishers(IMAGES) > 0, 'the replay offers its topic')
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 143, output
    assert 'Traceback' not in output


def test_offers_what_was_recorded(node, tmp_path):
    """The QoS in the bag decides: latched topics reach those who come later, best effort stays best effort."""
    write_strings(
        tmp_path / 'bag',
        {
            '/latched': [offered(durability='TRANSIENT_LOCAL')],
            '/lossy': [offered('BEST_EFFORT')],
            '/mixed': [offered('BEST_EFFORT'), offered('RELIABLE')],
            '/silent': [],
        },
        count=200,
    )
    process = start(tmp_path / 'bag', '--wait-matched', 0, '--rate', 0.2)
    names = ('/latched', '/lossy', '/mixed', '/silent')
    wait_for(lambda: all(node.get_publishers_info_by_topic(name) for name in names), 'four topics')
    qos = {name: node.get_publishers_info_by_topic(name)[0].qos_profile for name in names}
    assert {name: (q.reliability, q.durability) for name, q in qos.items()} == {
        '/latched': (ReliabilityPolicy.RELIABLE, DurabilityPolicy.TRANSIENT_LOCAL),
        '/lossy': (ReliabilityPolicy.BEST_EFFORT, DurabilityPolicy.VOLATILE),
        '/mixed': (ReliabilityPolicy.RELIABLE, DurabilityPolicy.VOLATILE),
        '/silent': (ReliabilityPolicy.RELIABLE, DurabilityPolicy.VOLATILE),
    }
    time.sleep(0.5)
    late = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    received = listen(node, String, '/latched', raw=False, qos=late)
    wait_for(lambda: bool(received), 'what was published before')
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE_S)


@pytest.mark.parametrize('version', [8, 9])
@pytest.mark.parametrize(
    ('requested', 'recorded'),
    [
        ({'deadline': Duration(seconds=0.5)}, [{'deadline': QosTime(0, 200_000_000)}]),
        ({'deadline': Duration(seconds=0.5)}, [{'deadline': QosTime(1, 0)}, {'deadline': QosTime(0, 200_000_000)}, {}]),
        ({'liveliness': LivelinessPolicy.MANUAL_BY_TOPIC}, [{'liveliness': 'MANUAL_BY_TOPIC'}, {}]),
        ({'liveliness_lease_duration': Duration(seconds=2)}, [{'lease': QosTime(1, 0)}, {}]),
    ],
)
def test_a_subscriber_that_matched_while_recording_matches_the_replay(node, tmp_path, requested, recorded, version):
    """Several publishers of one topic: one in their place offers the strictest of what they offered."""
    with rosbag2.Writer(tmp_path / 'bag', version=version, storage_plugin=rosbag2.StoragePlugin.MCAP) as writer:
        store = typesys.get_typestore(typesys.Stores.ROS2_JAZZY)
        profiles = [offered(**values) for values in recorded]
        topic = writer.add_connection('/text', 'std_msgs/msg/String', typestore=store, offered_qos_profiles=profiles)
        for message in strings(20):
            writer.write(topic, message.time_ns, message.data)
    received = listen(node, String, '/text', qos=QoSProfile(depth=100, **requested))
    options = ['--topics', '/text', '--wait-matched', 20, '--json', tmp_path / 'report.json']
    code, output = replay(tmp_path / 'bag', *options)
    assert code == 0 and len(received) == 20, output
    assert report_of(tmp_path)['topics'][0]['mismatched'] == [] and 'not received' not in output


def test_the_recorded_lifespan_is_offered_where_each_publisher_had_one(node, tmp_path):
    """A shorter one than a publisher's own would drop messages that it delivered."""
    second, two, ever = (offered(lifespan=QosTime(*time)) for time in ((1, 0), (2, 5), (9223372036, 854775807)))
    write_strings(tmp_path / 'bag', {'/one': [second], '/both': [second, two], '/all': [second, two, ever]}, count=300)
    process = start(tmp_path / 'bag', '--wait-matched', 0, '--rate', 0.1)
    names = ('/one', '/both', '/all')
    wait_for(lambda: all(node.get_publishers_info_by_topic(name) for name in names), 'three topics')
    spans = [node.get_publishers_info_by_topic(name)[0].qos_profile.lifespan.nanoseconds for name in names]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE_S)
    assert spans == [10**9, 2 * 10**9 + 5, 2**63 - 1]


@pytest.mark.parametrize(
    ('msgtype', 'requested', 'words'),
    [
        (String, {}, 'best effort publisher and reliable subscription'),
        (String, {'deadline': Duration(seconds=0.1), 'reliability': ReliabilityPolicy.BEST_EFFORT}, 'deadline'),
        (Int32, {}, 'subscribes as std_msgs/msg/Int32, the bag has std_msgs/msg/String'),
    ],
)
def test_a_subscriber_that_does_not_match_is_named_with_the_policy_or_type(node, tmp_path, msgtype, requested, words):
    """Asked for or not, beside a topic that is matched or alone."""
    write_strings(tmp_path / 'bag', {'/text': [offered('BEST_EFFORT')], '/more': [offered()]})
    node.create_subscription(msgtype, '/text', print, QoSProfile(depth=10, **requested))
    listen(node, String, '/more')
    code, output = replay(tmp_path / 'bag', '--json', tmp_path / 'report.json')
    named = f'/listener ({words}' if msgtype is Int32 else '/listener ('
    assert code == 0 and output.count(named) == 2 and words in output and 'no subscriber' not in output
    topics = {topic['topic']: topic for topic in report_of(tmp_path)['topics']}
    assert words in topics['/text']['mismatched'][0] and topics['/more']['mismatched'] == []
    code, output = replay(tmp_path / 'bag', '--topics', '/text', '--wait-matched', 10)
    assert code == 1 and 'no subscriber to /text matches: /listener (' in output and words in output
    assert 'Check the names' not in output


def test_a_type_that_is_not_installed_is_skipped_and_named(node, tmp_path):
    path = tmp_path / 'bag'
    store = typesys.get_typestore(typesys.Stores.ROS2_JAZZY)
    store.register(typesys.get_types_from_msg('string data', 'moon_msgs/msg/Crater'))
    with rosbag2.Writer(path, version=8, storage_plugin=rosbag2.StoragePlugin.MCAP) as writer:
        types = {'/crater': 'moon_msgs/msg/Crater', '/text': 'std_msgs/msg/String'}
        for index, (topic, msgtype) in enumerate(types.items()):
            connection = writer.add_connection(topic, msgtype, typestore=store)
            data = store.serialize_cdr(store.types[msgtype](data='x'), msgtype)
            writer.write(connection, 10**9 + index, bytes(data))
    received = listen(node, String, '/text', raw=False)
    code, output = replay(path, '--json', tmp_path / 'report.json')
    assert code == 0, output
    assert [message.data for message in received] == ['x']
    assert '/crater is skipped: moon_msgs/msg/Crater is not installed' in output
    assert 'moon-msgs' in json.loads((tmp_path / 'report.json').read_text())['skipped']['/crater']


def test_nothing_left_to_play_is_an_error(tmp_path):
    write_strings(tmp_path / 'bag', {'/crater': []}, msgtype='moon_msgs/msg/Crater')
    code, output = replay(tmp_path / 'bag')
    assert code == 1
    assert 'nothing can be played' in output and 'apt-get install' in output


def test_warns_of_a_type_recorded_with_another_definition(tmp_path):
    path = tmp_path / 'bag'
    write_strings(path, {'/text': []})
    metadata = (path / 'metadata.yaml').read_text()
    position = metadata.index('RIHS01_') + len('RIHS01_')
    (path / 'metadata.yaml').write_text(metadata[:position] + '0' * 64 + metadata[position + 64 :])
    code, output = replay(path, '--wait-matched', 0)
    assert code == 0
    assert 'recorded with another definition' in output


def test_a_hash_that_agrees_is_not_remarked_on(bag):
    _, output = replay(bag, '--wait-matched', 0, '--rate', 10)
    assert 'definition' not in output


def damage_missing(path: Path) -> Path:
    return path / 'nowhere'


def damage_text(path: Path) -> Path:
    (path / 'notes.txt').write_text('no bag')
    return path / 'notes.txt'


def damage_empty_directory(path: Path) -> Path:
    return path


def damage_no_messages(path: Path) -> Path:
    write_strings(path / 'bag', {'/text': []}, count=0)
    return path / 'bag'


def damage_truncated(path: Path) -> Path:
    """Cut off as a crash of the recorder leaves it, without the footer."""
    write_strings(path / 'bag', {'/text': []}, count=1000)
    content = (path / 'bag' / 'bag.mcap').read_bytes()
    (path / 'bag' / 'bag.mcap').write_bytes(content[: len(content) // 2])
    return path / 'bag'


def damage_empty_file(path: Path) -> Path:
    (path / 'empty.mcap').touch()
    return path / 'empty.mcap'


def damage_sqlite(path: Path) -> Path:
    (path / 'bag.db3').write_bytes(b'SQLite format 3\0' + bytes(4096))
    return path / 'bag.db3'


def damage_file_gone(path: Path) -> Path:
    write_strings(path / 'bag', {'/text': []})
    (path / 'bag' / 'bag.mcap').unlink()
    return path / 'bag'


@pytest.mark.parametrize(
    ('damage', 'words'),
    [
        (damage_missing, 'does not exist'),
        (damage_text, 'is not a bag'),
        (damage_empty_directory, 'no metadata.yaml and no storage file'),
        (damage_no_messages, 'holds no messages'),
        (damage_truncated, 'everything is missing'),
        (damage_empty_file, 'damaged'),
        (damage_sqlite, 'damaged'),
        (damage_file_gone, 'missing'),
    ],
)
def test_a_bag_that_cannot_be_read_is_named_with_a_remedy(tmp_path, damage, words):
    path = damage(tmp_path)
    with pytest.raises(BagError, match=words) as caught:
        Bag(path)
    assert str(tmp_path) in str(caught.value) and caught.value.remedy
    code, output = replay(path)
    assert code == 1
    assert words in output and 'Traceback' not in output


def test_damage_in_the_middle_ends_the_replay_with_what_was_sent(tmp_path):
    """A chunk whose bytes were overwritten: what came before is played and reported, then the error."""
    path = tmp_path / 'bag'
    write_strings(path, {'/text': []}, count=20)
    content = bytearray((path / 'bag.mcap').read_bytes())
    position = content.index(b'/text 9')
    content[position + 8 : position + 80] = b'\xff' * 72
    (path / 'bag.mcap').write_bytes(content)
    code, output = replay(path, '--wait-matched', 0, '--json', tmp_path / 'report.json')
    assert code == 1
    assert 'damaged' in output and 'Traceback' not in output
    assert (tmp_path / 'report.json').exists()


def received_by(node: Node, *topics: str) -> dict[str, list]:
    return {topic: listen(node, String, topic) for topic in topics}


def report_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / 'report.json').read_text())


def test_messages_that_a_power_cut_left_in_the_journal_arrive(node, tmp_path):
    """A recorder in WAL mode, killed; SQLite's own answer is the truth, and the bag stays as it is."""
    file = write_bag(tmp_path / 'bag', strings(20, padding=3000)[:8], storage='SQLITE3')
    script = """
import os, sqlite3, sys
sys.path.insert(0, sys.argv[2])
from support import bags
db = sqlite3.connect(sys.argv[1])
db.execute('PRAGMA journal_mode=WAL')
insert = 'INSERT INTO messages (topic_id, timestamp, data) VALUES (1, ?, ?)'
db.executemany(insert, [message[1:] for message in bags.strings(20, padding=3000)[8:]])
db.commit()
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, '-c', script, file, TESTS], check=False)
    before = contents(tmp_path / 'bag')
    received = received_by(node, '/text')['/text']
    code, output = replay(tmp_path / 'bag', '--topics', '/text', '--wait-matched', 20)
    assert code == 0 and '/text: sent 20 of 20' in output and 'temporary copy' in output
    assert contents(tmp_path / 'bag') == before
    with sqlite3.connect(file) as database:
        assert received == [data for (data,) in database.execute('SELECT data FROM messages ORDER BY timestamp')]
    database.close()


def test_compressed_messages_without_metadata_arrive_decompressed(node, tmp_path):
    write_bag(tmp_path / 'bag', strings(20), version=8, mode=rosbag2.CompressionMode.MESSAGE)
    stock = recorded(tmp_path / 'bag', '/text')
    (tmp_path / 'bag' / 'metadata.yaml').unlink()
    received = received_by(node, '/text')['/text']
    code, output = replay(tmp_path / 'bag', '--topics', '/text', '--wait-matched', 20)
    assert code == 0 and '/text: sent 20 of 20' in output
    assert received == stock and len(stock) == 20


def test_a_clock_that_was_set_while_recording_means_no_silence_of_53_years(node, tmp_path):
    """1970 to 2023 inside a bag: the gap is named and cut down, and /clock has the bag's time on both sides of it."""
    early, late = 5 * 10**9, 1_700_000_000 * 10**9
    times = [early, early + 10**8, late, late + 10**8]
    truth = [Written('/text', time_ns, cdr(str(time_ns))) for time_ns in times]
    write_mcap(tmp_path / 'stepped.mcap', truth)
    heard: list[tuple[str, int]] = []
    node.create_subscription(
        Clock, '/clock', lambda clock: heard.append(('clock', clock.clock.sec * 10**9 + clock.clock.nanosec)), 1000
    )
    received = received_by(node, '/text')['/text']
    code, output = replay(
        tmp_path / 'stepped.mcap', '--topics', '/text', '--wait-matched', 20, '--clock', 100, '--max-gap', 1,
        '--json', tmp_path / 'report.json',
    )  # fmt: skip
    assert code == 0 and '53.9 years' in output and '1970-01-01' in output and '2023-11-14' in output
    assert received == [message.data for message in truth]
    report = report_of(tmp_path)
    assert report['gap_count'] == 1 and report['gaps'][0]['after_ns'] == times[1] and report['complete']
    clocks = [time_ns for _, time_ns in heard]
    assert clocks == sorted(clocks) and clocks[0] >= early and clocks[-1] <= times[-1] + 10**9
    assert not [time_ns for time_ns in clocks if times[1] + 2 * 10**9 < time_ns < late]
    assert any(time_ns >= late for time_ns in clocks) and any(time_ns < early + 10**9 for time_ns in clocks)


def test_a_gap_that_is_allowed_is_played_in_full(tmp_path):
    write_mcap(tmp_path / 'bag.mcap', strings(2, step_ns=2 * 10**9))
    code, output = replay(
        tmp_path / 'bag.mcap', '--wait-matched', 0, '--max-gap', 'inf', '--json', tmp_path / 'report.json'
    )
    assert code == 0 and 'gap' not in output.replace('--max-gap', '')
    assert report_of(tmp_path)['topics'][0]['span_s'] >= 1.9


def test_what_other_programs_write_into_an_mcap_costs_no_other_topic(node, tmp_path):
    """No profile, json, no schema, two types on one topic: the rest plays, each is named, and nothing is damaged."""
    path = tmp_path / 'mixed.mcap'
    with path.open('wb') as stream:
        writer = McapWriter(stream)
        writer.start(profile='')
        text = writer.register_schema('std_msgs/msg/String', 'ros2msg', b'string data')
        flag = writer.register_schema('std_msgs/msg/Bool', 'ros2msg', b'bool data')
        channels = [
            writer.register_channel('/text', 'cdr', text), writer.register_channel('/json', 'json', 0),
            writer.register_channel('/both', 'cdr', text), writer.register_channel('/both', 'cdr', flag),
        ]  # fmt: skip
        for index in range(40):
            time_ns = 10**18 + index * 10**6
            writer.add_message(channels[index % 4], time_ns, cdr(str(index)), time_ns)
        writer.finish()
    received = received_by(node, '/text', '/both')
    code, output = replay(path, '--wait-matched', 20, '--json', tmp_path / 'report.json')
    assert code == 0 and 'damaged' not in output
    assert received == {'/text': [message.data for message in read_mcap(path) if message.topic == '/text'], '/both': []}
    skipped = report_of(tmp_path)['skipped']
    assert skipped.keys() == {'/json', '/both'}
    assert 'json' in skipped['/json'] and 'std_msgs/msg/Bool and std_msgs/msg/String' in skipped['/both']
    code, output = replay(path, '--topics', '/text', '--wait-matched', 20)
    assert code == 0 and '/json' not in output and '/both' not in output
    code, output = replay(path, '--topics', '/text', '/json', '--wait-matched', 0)
    assert code == 1 and 'missing: /json, which was requested' in output


def test_a_truncated_mcap_plays_what_is_whole_and_says_what_is_missing(node, tmp_path):
    truth = write_mcap(tmp_path / 'bag.mcap', strings(100), chunk_size=500)
    content = (tmp_path / 'bag.mcap').read_bytes()
    (tmp_path / 'bag.mcap').write_bytes(content[: len(content) // 2])
    received = received_by(node, '/text')['/text']
    code, output = replay(
        tmp_path / 'bag.mcap', '--topics', '/text', '--wait-matched', 20, '--json', tmp_path / 'report.json'
    )
    stock = [message.data for message in read_mcap(tmp_path / 'bag.mcap')]
    assert received == stock == [message.data for message in truth][: len(stock)] and stock
    report = report_of(tmp_path)
    assert code == 1 and report['complete'] is False and report['topics'][0]['sent'] == len(stock)
    assert f'sent {len(stock)} of at least {len(stock)}' in output and report['bag_incomplete']
    assert f'of {len(content) // 2}' in report['missing'][0] and report['missing'][0] in output


def test_what_a_damaged_bag_held_is_counted_where_the_metadata_tells(tmp_path):
    file = write_bag(tmp_path / 'bag', [*strings(3000, padding=1000)])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, output = replay(tmp_path / 'bag', '--wait-matched', 0, '--rate', 10)
    assert code == 1 and 'of 3000,' in output and 'of 3000 messages' in output


def test_metadata_that_differs_from_the_storage_costs_no_message(node, tmp_path):
    """The QoS in metadata.yaml is another one than in the storage: all is played, the difference named."""
    path = tmp_path / 'bag'
    write_strings(path, {'/text': [offered()], '/more': [offered()]})
    metadata = (path / 'metadata.yaml').read_text()
    (path / 'metadata.yaml').write_text(metadata.replace('depth: 10', 'depth: 11', 1))
    received = received_by(node, '/text', '/more')
    code, output = replay(path, '--topics', '/text', '/more', '--wait-matched', 20)
    assert code == 0 and 'sent 3 of 3' in output and 'metadata.yaml differs' in output and 'depth 11' in output
    assert received == {topic: recorded_mcap(path / 'bag.mcap', topic) for topic in received}


def recorded_mcap(path: Path, topic: str) -> list[bytes]:
    return [message.data for message in read_mcap(path) if message.topic == topic]


def test_a_subscriber_that_comes_after_the_first_message_is_told_of_as_that(node, tmp_path):
    """Matched at the start, later, or never: each is said, with what went out unheard."""
    truth = strings(900, '/early', '/late', '/never', step_ns=5 * 10**6)
    write_mcap(tmp_path / 'bag.mcap', truth)
    early = listen(node, String, '/early')
    process = start(tmp_path / 'bag.mcap', '--wait-matched', 20, '--json', tmp_path / 'report.json')
    wait_for(lambda: len(early) > 50, 'the first messages')
    late = listen(node, String, '/late')
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    topics = {topic['topic']: topic for topic in report_of(tmp_path)['topics']}
    assert topics['/early']['matched'] == 1 and topics['/early']['sent_unmatched'] == 0
    assert topics['/late']['matched'] == 0 and 50 <= topics['/late']['sent_unmatched'] < 300
    assert topics['/late']['first_matched_s'] > 0
    assert 0 < len(late) <= 300 - topics['/late']['sent_unmatched'] + 1
    assert topics['/never']['sent_unmatched'] == 300 and topics['/never']['first_matched_s'] is None
    assert output.count('no subscriber') == 1 and '/never: sent 300 of 300' in output
    assert f'{topics["/late"]["sent_unmatched"]} of them without a subscriber' in output


def test_two_latched_publishers_reach_a_subscriber_that_comes_later(node, tmp_path):
    """As of /tf_static: each recorded publisher kept one message, so one in their place keeps as many."""
    one, all_ = (
        offered(durability='TRANSIENT_LOCAL', depth=depth, history=history)
        for depth, history in ((1, 'KEEP_LAST'), (0, 'KEEP_ALL'))
    )
    store = typesys.get_typestore(typesys.Stores.ROS2_JAZZY)
    with rosbag2.Writer(tmp_path / 'bag', version=9, storage_plugin=rosbag2.StoragePlugin.MCAP) as writer:
        add = {'msgtype': 'std_msgs/msg/String', 'typestore': store}
        publishers = [writer.add_connection('/latched', offered_qos_profiles=[one, one], **add)] * 2
        publishers += [writer.add_connection('/all', offered_qos_profiles=[all_], **add)] * 400
        for index, publisher in enumerate(publishers):
            writer.write(publisher, 10**18 + index, cdr(str(index)))
        writer.write(writer.add_connection('/long', offered_qos_profiles=[], **add), 10**18 + 60 * 10**9, cdr('end'))
    process = start(tmp_path / 'bag', '--wait-matched', 0, '--max-gap', 'inf', '--json', tmp_path / 'report.json')
    wait_for(lambda: node.count_publishers('/long') > 0, 'the replay')
    time.sleep(1.0)
    late = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    received = {topic: listen(node, String, topic, qos=late) for topic in ('/latched', '/all')}
    wait_for(lambda: (len(received['/latched']), len(received['/all'])) == (2, 400), 'what was latched')
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert received['/latched'] == [cdr('0'), cdr('1')]
    assert '2 of them without a subscriber' in output and '400 of them without' in output


@pytest.mark.parametrize('values', [('1e-9', '1e-9', '1e-9'), ('1e9', '1e9', '1e9'), ('1e9', '1e-9', 'inf')])
def test_options_at_their_limits_end_in_no_traceback(tmp_path, values):
    messages = [Written('/text', time_ns, cdr('x')) for time_ns in (0, 1, 2**62)]
    write_mcap(tmp_path / 'bag.mcap', messages)
    options = zip(('--rate', '--clock', '--max-gap'), values, strict=True)
    process = start(tmp_path / 'bag.mcap', '--wait-matched', 0, *(word for option in options for word in option))
    output = ''
    for line in process.stdout:
        output += line
        if 'no message for' in line:
            process.send_signal(signal.SIGINT)
    process.wait(DEADLINE_S)
    assert 'Traceback' not in output and '/text: sent' in output


def test_options_that_are_given_twice_are_both_taken(tmp_path):
    write_mcap(tmp_path / 'bag.mcap', strings(9, '/a', '/b', '/c'))
    options = ['--topics', '/a', '--topics', '/b', '--remap', '/a:=/x', '--remap', '/b:=/y']
    code, output = replay(tmp_path / 'bag.mcap', '--wait-matched', 0, *options)
    assert code == 0 and '/x (/a in the bag): sent 3' in output and '/y (/b in the bag): sent 3' in output
    assert '/c: sent' not in output


def test_two_topics_that_ros_takes_for_one_are_told_apart(tmp_path):
    write_mcap(tmp_path / 'bag.mcap', strings(9, 'text', '/text', '/text'))
    code, output = replay(tmp_path / 'bag.mcap', '--wait-matched', 0)
    assert code == 0 and '/text (text in the bag): sent 3 of 3' in output and '/text: sent 6 of 6' in output


def test_hidden_topics_of_services_arrive(node, tmp_path):
    truth = [serialize_message(GetState.Event()) for _ in range(3)]
    path = tmp_path / 'bag.mcap'
    with path.open('wb') as stream:
        writer = McapWriter(stream)
        writer.start('ros2')
        schema = writer.register_schema('lifecycle_msgs/srv/GetState_Event', 'ros2idl', b'')
        channel = writer.register_channel('/node/get_state/_service_event', 'cdr', schema)
        for index, data in enumerate(truth):
            writer.add_message(channel, 10**18 + index, data, 10**18)
        writer.finish()
    received = listen(node, GetState.Event, '/node/get_state/_service_event')
    code, output = replay(path, '--wait-matched', 20)
    assert code == 0, output
    assert received == truth


def test_a_name_that_ros_does_not_allow_is_named_and_can_be_changed(node, tmp_path):
    long = '/' + 'a' * 300
    write_mcap(tmp_path / 'bag.mcap', strings(15, '/my topic', '/your topic', long))
    received = received_by(node, '/mine')
    code, output = replay(tmp_path / 'bag.mcap', '--wait-matched', 20, '--remap', '/my topic:=/mine')
    assert code == 0 and '/your topic is skipped' in output and '--remap /your topic:=/other' in output
    assert f'--remap {long}:=/other' in output and 'Build its package' not in output
    assert len(received['/mine']) == 5


def test_two_topics_of_different_types_are_not_published_under_one_name(tmp_path):
    store = typesys.get_typestore(typesys.Stores.ROS2_JAZZY)
    with (tmp_path / 'bag.mcap').open('wb') as stream:
        writer = McapWriter(stream)
        writer.start('ros2')
        number = bytes(store.serialize_cdr(store.types['std_msgs/msg/Int32'](data=1), 'std_msgs/msg/Int32'))
        for topic, kind, data in (('/a', 'String', cdr('x')), ('/b', 'Int32', number), ('a', 'Int32', number)):
            schema = writer.register_schema(f'std_msgs/msg/{kind}', '', b'')
            writer.add_message(writer.register_channel(topic, 'cdr', schema), 1, data, 1)
        writer.finish()
    for arguments, other in (
        (['--topics', '/a', '/b', '--remap', '/a:=/x', '/b:=/x'], '/a is published on /x already'),
        (['--topics', '/a', '/b', '--remap', '/a:=/b'], '/a is published on /b already'),
        (['--topics', '/a', 'a'], '/a is published on /a already'),
        (['--remap', '/b:=/clock', '--clock'], '--clock is published on /clock already'),
        (['--topics', '/a', '/b', '--ros-args', '--remap', '/b:=/a'], '/a is published on /a already'),
    ):
        code, output = replay(tmp_path / 'bag.mcap', '--wait-matched', 0, *arguments)
        assert code == 1 and other in output and ':=/other' in output and 'Build' not in output, output
    code, output = replay(tmp_path / 'bag.mcap', '--wait-matched', 0, '--remap', 'a:=/c', '/b:=/c')
    assert code == 0 and 'skipped' not in output


@pytest.mark.parametrize('arguments', [('--bogus',), ('-r', 'x'), ('--params-file', '/nowhere')])
def test_ros_arguments_that_are_wrong_are_a_sentence(tmp_path, arguments):
    write_mcap(tmp_path / 'bag.mcap', strings(2))
    code, output = replay(tmp_path / 'bag.mcap', '--json', tmp_path / 'report.json', '--ros-args', *arguments)
    assert code == 1 and 'ROS cannot start' in output and '--ros-args' in output
    assert 'ROS cannot start' in report_of(tmp_path)['error']


@pytest.mark.parametrize('where', ['2>/dev/full', '2>&-'])
def test_a_replay_needs_no_standard_error(tmp_path, where):
    write_mcap(tmp_path / 'bag.mcap', strings(20))
    shell = f'exec "$@" {where}'
    command = [sys.executable, '-m', 'gps_denied_c7.ros.replay_main', tmp_path / 'bag.mcap', '--wait-matched', '0']
    command += ['--progress', '--json', tmp_path / 'report.json']
    done = subprocess.run(['/bin/sh', '-c', shell, 'sh', *command], check=False, timeout=DEADLINE_S)
    report = report_of(tmp_path)
    assert done.returncode == 0 and report['complete'] and report['topics'][0]['sent'] == 20


def test_any_time_stamp_is_played(node, tmp_path):
    times = [-(2**62), -(10**9), 0, 0, 1, 2**62, 2**62]
    messages = [cdr(str(index)) for index in range(len(times))]
    write_bag(tmp_path / 'bag', [Written('/text', 1, data) for data in messages], storage='SQLITE3')
    with sqlite3.connect(tmp_path / 'bag' / 'bag.db3') as database:
        for index, time_ns in enumerate(times):
            database.execute('UPDATE messages SET timestamp = ? WHERE id = ?', (time_ns, index + 1))
    database.close()
    received = received_by(node, '/text')['/text']
    code, output = replay(tmp_path / 'bag', '--wait-matched', 20, '--clock', 100, '--max-gap', 0.1)
    assert code == 0, output
    assert received == messages and '/clock cannot hold' in output and 'gaps shortened: 3' in output


def test_a_definition_that_differs_is_seen_by_its_text_too(tmp_path):
    """Bags from before type hashes have only the text."""
    with (tmp_path / 'bag.mcap').open('wb') as stream:
        writer = McapWriter(stream)
        writer.start('ros2')
        for topic, text in (('/same', b'string data'), ('/other', b'string data\nint32 more'), ('/none', b'???')):
            schema = writer.register_schema('std_msgs/msg/String', 'ros2msg', text)
            writer.add_message(writer.register_channel(topic, 'cdr', schema), 1, cdr('x'), 1)
        writer.finish()
    code, output = replay(tmp_path / 'bag.mcap', '--wait-matched', 0)
    assert code == 0 and output.count('recorded with another definition') == 1
    assert '/other: std_msgs/msg/String was recorded with another' in output


def test_a_report_that_cannot_be_written_is_an_error_with_the_bag_played(tmp_path):
    write_mcap(tmp_path / 'bag.mcap', strings(3))
    code, output = replay(tmp_path / 'bag.mcap', '--wait-matched', 0, '--json', '/dev/full')
    assert code == 1 and 'sent 3 of 3' in output and 'No space left' in output and '--json' in output
    code, output = replay(tmp_path / 'bag.mcap', '--wait-matched', 0, '--json', tmp_path / 'nowhere' / 'report.json')
    assert code == 1 and 'sent' not in output and '--json' in output


def test_the_report_is_not_written_over_the_bag(tmp_path):
    file = write_bag(tmp_path / 'bag', strings(3))
    before = contents(tmp_path / 'bag')
    for bag in (tmp_path / 'bag', file):
        code, output = replay(bag, '--json', file)
        assert code == 1 and 'belongs to the bag' in output
    assert contents(tmp_path / 'bag') == before


def test_the_report_is_not_written_over_a_file_in_a_folder_of_the_bag(tmp_path):
    file = write_bag(tmp_path / 'bag', strings(3))
    (tmp_path / 'bag' / 'data').mkdir()
    file = file.rename(tmp_path / 'bag' / 'data' / file.name)
    before = file.read_bytes()
    code, output = replay(tmp_path / 'bag', '--json', file)
    assert code == 1 and 'belongs to the bag' in output and file.read_bytes() == before


def test_names_from_the_bag_forge_no_line_of_the_log(tmp_path):
    write_mcap(tmp_path / 'bag.mcap', strings(2, '/text', '/a\nc7_replay: /b: sent 1 of 1\x1b[31m'))
    code, output = replay(tmp_path / 'bag.mcap', '--wait-matched', 0)
    assert code == 0 and '\nc7_replay: /b' not in output and '\x1b' not in output


def test_a_path_may_begin_with_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_mcap(tmp_path / 'bag.mcap', strings(2))
    code, output = replay('~/bag.mcap', '--wait-matched', 0, '--json', '~/report.json')
    assert code == 0 and report_of(tmp_path)['complete'], output


def test_the_name_of_a_bag_sends_nothing_to_the_terminal(tmp_path):
    write_mcap(tmp_path / 'bag\n\x1b[31m.mcap', strings(2))
    code, output = replay(tmp_path / 'bag\n\x1b[31m.mcap', '--wait-matched', 0, '--progress')
    assert code == 0 and '\x1b[31m' not in output and r'bag\n\x1b[31m.mcap: ' in output


def test_a_refused_bag_leaves_no_older_report(tmp_path):
    (tmp_path / 'report.json').write_text('{"complete": true}')
    code, _ = replay(tmp_path / 'nowhere', '--json', tmp_path / 'report.json')
    report = report_of(tmp_path)
    assert code == 1 and not report['complete'] and 'does not exist' in report['error']


@pytest.mark.parametrize('arguments', [('--topics', '/nothing'), ('--remap', '/nothing:=/x')])
def test_unknown_topics_are_refused(bag, arguments):
    code, output = replay(bag, *arguments)
    assert code == 1
    assert 'has no /nothing' in output and IMAGES in output


@pytest.mark.parametrize('arguments', [
    ('--rate', '0'), ('--rate', 'inf'), ('--remap', 'x'), ('--wait-matched', '-1'), ('--max-gap', '0'),
    ('--rate', '1e-320'), ('--clock', '1e-320'), ('--clock', '1e300'), ('--max-gap', '1e-320'), ('--rate', 'nan'),
    ('--remap', '/a:=/b', '/a:=/c'), ('--remap', '/a:=/b', '--remap', '/a:=/c'),
])  # fmt: skip
def test_bad_arguments_are_refused(bag, arguments):
    code, output = replay(bag, *arguments)
    assert code == 2 and 'usage:' in output


@pytest.mark.parametrize('option', ['--rate', '--clock', '--max-gap', '--wait-matched'])
def test_an_option_that_is_no_number_is_refused_with_the_numbers_that_it_takes(bag, option):
    code, output = replay(bag, option, 'fast')
    assert code == 2 and f"{option}: 'fast' is not a number from" in output


def test_progress_bar_counts_messages(bag):
    _, output = replay(bag, '--wait-matched', 0, '--rate', 10, '--progress')
    assert '60/60' in output
    _, output = replay(bag, '--wait-matched', 0, '--rate', 10, '--no-progress')
    assert '60/60' not in output


def test_ros_remapping_arguments_work(bag, node):
    """It is a ROS executable like any other."""
    there = listen(node, Image, '/elsewhere')
    code, output = replay(
        bag, '--rate', 4, '--topics', IMAGES, '--wait-matched', 20, '--ros-args', '-r', f'{IMAGES}:=/elsewhere'
    )
    assert code == 0, output
    assert len(there) == 20


HD_LISTENER = """
import os, sys
from gps_denied_c7.ros.fastdds import apply_profile, tune_allocator
apply_profile(os.environ)
tune_allocator()
import rclpy
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
rclpy.init()
node = rclpy.create_node('hd_listener')
seen = []
qos = QoSProfile(depth=30, reliability=ReliabilityPolicy.BEST_EFFORT)
node.create_subscription(Image, '/camera_hd/image_raw', lambda m: seen.append(m.header.stamp), qos)
while len(seen) < 30 and not (seen and node.count_publishers('/camera_hd/image_raw') == 0):
    rclpy.spin_once(node, timeout_sec=0.1)
print(len(seen), len({(s.sec, s.nanosec) for s in seen}))
"""


def test_full_hd_arrives_whole_with_the_profile(tmp_path, terrain):
    """§8: 1920x1080 rgb8 at 15 Hz between two processes, best effort; the defaults lose most of it."""
    path = tmp_path / 'hd'
    write_flight(path, Flight(2.0, (Camera('/camera_hd', 1920, 1080, 'rgb8', 15.0),)), terrain=terrain)
    command = [sys.executable, '-c', HD_LISTENER]
    listener = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        code, output = replay(path, '--topics', '/camera_hd/image_raw', '--wait-matched', 20)
        assert code == 0, output
        counted, _ = listener.communicate(timeout=DEADLINE_S)
    finally:
        listener.kill()
    assert counted.split() == ['30', '30']
