"""F-1: whatever a worker sends, its host has an answer that fits or a typed error, and nothing of it stays."""

from __future__ import annotations

import gc
import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7._json import as_array, reader_of
from gps_denied_c7.errors import C7Error
from gps_denied_c7.worker.channel import Channel, ChannelClosedError, MessageError
from gps_denied_c7.worker.protocol import WORKER_PROTOCOL, Answer, AnswerNext, ErrorReport, NeedRoom
from support.fuzz_channel import (
    ERROR,
    LAYOUT,
    LOADED,
    MESSAGES,
    answer_from,
    json_of,
    lay_out,
    load_from,
    packet_of,
    send,
)
from support.fuzz_mutations import damaged, fuzz, hostile_json

HOSTILE_PACKETS = st.sampled_from(MESSAGES).flatmap(lambda message: hostile_json(json_of(message))) | st.sampled_from(
    MESSAGES
).flatmap(lambda message: damaged(packet_of(message)))
NUMBERS = st.lists(st.integers(0, 3) | st.integers(0, (1 << 64) - 1), min_size=1, max_size=4).map(
    lambda numbers: struct.pack(f'<B{len(numbers)}Q', 0, *numbers)
)
PLAIN_PACKETS = st.sampled_from(MESSAGES).map(packet_of) | NUMBERS


def descriptors() -> list[str]:
    return sorted(os.listdir('/proc/self/fd'), key=int)


def check_nothing_stays(before: list[str]) -> None:
    if descriptors() != before:
        # A mapped segment keeps its descriptor as long as a view of it lives.
        gc.collect()
        assert descriptors() == before


@pytest.fixture(params=[False, True], ids=['node', 'worker'])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours, WORKER_PROTOCOL, in_child=request.param)
    yield channel, theirs
    channel.close()
    theirs.close()


@fuzz(300)
@given(data=HOSTILE_PACKETS | NUMBERS | st.binary(max_size=80) | st.just(b''), handed=st.integers(0, 12))
def test_f1_any_packet_is_a_message_or_a_typed_error(ends: tuple, data: bytes, handed: int) -> None:
    channel, theirs = ends
    before = descriptors()
    send(theirs, data[:100_000], handed)
    try:
        message, owned = channel.receive(block=False)
    except (MessageError, ChannelClosedError) as error:
        assert str(error)
    else:
        assert len(owned) <= handed
        assert type(message) in channel._received.kinds
        # The same message once more: nothing was guessed.
        assert channel._received.decode(channel._received.encode(message)) == message
        for descriptor in owned:
            os.close(descriptor)
    check_nothing_stays(before)


@fuzz(160)
@given(content=hostile_json(json.loads(json.dumps([LAYOUT.tensors]))))
def test_f1_any_layout_lies_inside_its_segment_or_is_refused(content: bytes) -> None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return
    lay_out(value)


DTYPES = st.sampled_from(
    ('float32', 'f4', '>f4', '<i8', 'f4,' * 900, '(9,)f4', '9' * 30 + 'f4', 'O', 'V8', 'M8[ns]', 'U99999999999',
     'float128', 'complex64', '', ' ', '\0', None, 5, ['f4'], [['a', 'f4']], {'names': ['a'], 'formats': ['f4']},
     {'names': 3}, {'a': ['f4', 0]}, 'a', '|b1', '=f8', '{f4}')
)  # fmt: skip
SIZES = st.sampled_from((0, 1, 2, 64, -1, 1 << 31, 1 << 62, 1 << 63, 10**40, '2', None, 1.5, True, float('inf')))
AXES = st.lists(SIZES, max_size=4) | st.integers(0, 120).map(lambda rank: [1] * rank) | st.just('12')
OFFSETS = st.sampled_from((0, 1, 3, 63, 64, 252, 256, 257, -1, 1 << 40, 1 << 70, 10**400, None, '4', 1e400, 2.7))


@fuzz(400)
@given(st.lists(st.tuples(st.text(max_size=2), DTYPES, AXES, OFFSETS).map(list), min_size=1, max_size=3))
def test_f1_any_type_shape_and_offset_lies_inside_its_segment_or_is_refused(value: list) -> None:
    lay_out([value])


@fuzz(140)
@given(content=hostile_json(json.loads(json.dumps(as_array(ERROR)))))
def test_f1_any_error_told_is_an_error_of_the_family(content: bytes) -> None:
    try:
        error = reader_of(ErrorReport, arrays=True)(json.loads(content)).error()
    except (ValueError, RecursionError):
        return
    assert isinstance(error, C7Error)
    # It is logged, and published in a ROS string.
    str(error).encode()
    error.message.encode()


@pytest.fixture(autouse=True)
def no_wait_for_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that stands for the worker does not end, though its channel may seem closed."""
    monkeypatch.setattr('gps_denied_c7.worker.process._EXIT_CODE_S', 0.0)
    monkeypatch.setattr('gps_denied_c7.worker.build_timeout._LONGEST_STEP_S', 0.01)


@fuzz(140)
@given(packets=st.lists(HOSTILE_PACKETS | PLAIN_PACKETS | hostile_json(json_of(LOADED)), max_size=3))
def test_f1_any_tale_of_an_engine_is_taken_or_refused(idle_process: subprocess.Popen, packets: list[bytes]) -> None:
    before = descriptors()
    load_from(idle_process, packets)
    check_nothing_stays(before)


@fuzz(140)
@given(
    turns=st.lists(st.lists(HOSTILE_PACKETS | PLAIN_PACKETS, max_size=3), min_size=1, max_size=3), reads=st.booleans()
)
def test_f1_any_answer_fits_or_is_a_typed_error(
    idle_process: subprocess.Popen, turns: list[list[bytes]], reads: bool
) -> None:
    before = descriptors()
    answer_from(idle_process, turns, reads)
    check_nothing_stays(before)


def test_f1_the_fake_worker_is_believed_where_it_keeps_to_the_protocol(idle_process: subprocess.Popen) -> None:
    first = [packet_of(NeedRoom(64)), packet_of(Answer(1, (3, 4), LAYOUT))]
    again = [packet_of(AnswerNext(2, 5, 6))]
    assert answer_from(idle_process, [first, again], True) == 2
    assert load_from(idle_process, [packet_of(LOADED)])
