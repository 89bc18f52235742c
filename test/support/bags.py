"""Bags for the tests, written by the formats' own writers, and c7_replay as a process beside a listening node."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import rclpy
from mcap.records import Channel, Message
from mcap.stream_reader import StreamReader
from mcap.writer import Writer as McapWriter
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosbags import rosbag2, typesys
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime

DEADLINE_S = 60.0
STRING = 'std_msgs/msg/String'
STORE = typesys.get_typestore(typesys.Stores.ROS2_JAZZY)
START_NS = 10**18


class Written(NamedTuple):
    """A message as it was recorded."""

    topic: str
    time_ns: int
    data: bytes


def cdr(text: str) -> bytes:
    """A std_msgs/String as DDS hands it to a recorder: padded to four bytes."""
    data = bytes(STORE.serialize_cdr(STORE.types[STRING](data=text), STRING))
    return data + bytes(-len(data) % 4)


def strings(count: int, *topics: str, step_ns: int = 10**6, padding: int = 0) -> list[Written]:
    """``count`` messages, on each topic in turn."""
    names = topics or ('/text',)
    return [
        Written(names[index % len(names)], START_NS + index * step_ns, cdr(f'{index} {"x" * padding}'))
        for index in range(count)
    ]


def write_mcap(path: Path, messages: Iterable[Written], *, profile: str = 'ros2', **options) -> list[Written]:
    """Write std_msgs/String with mcap's own writer."""
    messages = list(messages)
    with path.open('wb') as stream:
        writer = McapWriter(stream, **options)
        writer.start(profile=profile)
        schema = writer.register_schema(STRING, 'ros2msg', b'string data')
        channels: dict[str, int] = {}
        for message in messages:
            if message.topic not in channels:
                channels[message.topic] = writer.register_channel(message.topic, 'cdr', schema)
            writer.add_message(channels[message.topic], message.time_ns, message.data, message.time_ns)
        writer.finish()
    return messages


def read_mcap(path: Path) -> list[Written]:
    """Return what mcap's StreamReader gives before it gives up, by time."""
    found, topics = [], {}
    # A cut file ends in an error of any kind.
    with path.open('rb') as stream, suppress(Exception):
        for record in StreamReader(stream, validate_crcs=True).records:
            if isinstance(record, Channel):
                topics[record.id] = record.topic
            elif isinstance(record, Message):
                found.append(Written(topics[record.channel_id], record.log_time, record.data))
    return sorted(found, key=lambda message: message.time_ns)


def write_bag(path: Path, messages: Iterable[Written], *, storage: str = 'MCAP', version: int = 9, **mode) -> Path:
    """Write a bag directory of std_msgs/String with rosbags, and return its storage file."""
    writer = rosbag2.Writer(path, version=version, storage_plugin=rosbag2.StoragePlugin[storage])
    if mode:
        writer.set_compression(mode['mode'], rosbag2.CompressionFormat.ZSTD)
    with writer:
        connections = {}
        for message in messages:
            if message.topic not in connections:
                connections[message.topic] = writer.add_connection(message.topic, STRING, typestore=STORE)
            writer.write(connections[message.topic], message.time_ns, message.data)
    return next(file for file in path.iterdir() if file.name != 'metadata.yaml')


EVER = QosTime(9223372036, 854775807)


def offered(
    reliability: str = 'RELIABLE',
    durability: str = 'VOLATILE',
    depth: int = 10,
    history: str = 'KEEP_LAST',
    *,
    deadline: QosTime = EVER,
    lifespan: QosTime = EVER,
    lease: QosTime = EVER,
    liveliness: str = 'AUTOMATIC',
) -> Qos:
    """What one recorded publisher offered."""
    return Qos(
        QosHistory[history], depth, QosReliability[reliability], QosDurability[durability], deadline, lifespan,
        QosLiveliness[liveliness], lease, False,
    )  # fmt: skip


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    """Everything in a directory, to see that it stays as it is."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-m', 'gps_denied_c7.ros.replay_main', *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def replay(*arguments: object) -> tuple[int, str]:
    process = start(*arguments)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert 'Traceback' not in output, output
    return process.returncode, output


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@contextmanager
def listening(domain_id: int) -> Iterator[Node]:
    """A node of this process that is spun in a thread."""
    context = Context()
    context.init(domain_id=domain_id)
    node = rclpy.create_node('listener', context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    thread = threading.Thread(target=executor.spin, daemon=True)
    thread.start()
    yield node
    executor.shutdown()
    thread.join()
    node.destroy_node()
    context.try_shutdown()


def listen(node: Node, message_type, topic: str, *, raw: bool = True, qos: QoSProfile | None = None) -> list:
    """Return a list that grows by what arrives."""
    received: list = []
    profile = qos or QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
    node.create_subscription(message_type, topic, received.append, profile, raw=raw)
    return received
