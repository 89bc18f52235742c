"""F-1: whatever a worker sends, its host has an answer that fits or a typed error, and nothing of it stays."""

from __future__ import annotations

import array
import gc
import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzz_mutations import damaged, fuzz, hostile_json
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.bundle import ModelBundle
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error, EngineSchemaMismatchError, InferenceError
from gps_denied_c7.rungs import Rung
from gps_denied_c7.runtime import ProviderSet
from gps_denied_c7.shared_tensors import SharedTensors, TensorLayout
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.worker_channel import Channel, ChannelClosedError, error_from_json, error_to_json
from gps_denied_c7.worker_host import WorkerHost
from gps_denied_c7.worker_process import WorkerProcess

SPEC = TensorSpec('x', 'float32', (1, 2))
BUNDLE = ModelBundle(name='net', root=Path('/'), weights_digest='sha256:' + '0' * 64, inputs=(SPEC,), outputs=(SPEC,))
LAYOUT = [['x', 'float32', [1, 2], 0]]
ERROR = error_to_json(EngineSchemaMismatchError('sm', expected=87, found=90, remedy='Build it again.'))
LOADED = {
    'say': 'loaded',
    'facts': {
        'active_provider': 'CPUExecutionProvider', 'requested_providers': ['CPUExecutionProvider'], 'cpu_only': True,
        'cpu_nodes': 3, 'notes': ['a note'], 'load_s': 0.5, 'gpu_memory_bytes': 1 << 20,
    },
    'inputs': [['x', 'float32', [1, 2]]],
    'outputs': [['x', 'float32', [1, None]]],
}  # fmt: skip
PACKETS = (
    {'say': 'answered', 'id': 1, 'ran_ns': [3, 4], 'layout': LAYOUT},
    {'say': 'failed', 'id': 1, 'error': ERROR},
    {'say': 'needs', 'bytes': 64},
    {'say': 'progress', 'phase': 'building', 'elapsed_s': 1.5, 'fraction': 0.25},
    LOADED,
)
HOSTILE_PACKETS = st.sampled_from(PACKETS).flatmap(hostile_json) | st.sampled_from(PACKETS).flatmap(
    lambda packet: damaged(json.dumps(packet).encode())
)
NUMBERS = st.lists(st.integers(0, 3) | st.integers(0, (1 << 64) - 1), min_size=1, max_size=4).map(
    lambda numbers: struct.pack(f'<B{len(numbers)}Q', 0, *numbers)
)
PLAIN_PACKETS = st.sampled_from(PACKETS).map(lambda packet: json.dumps(packet).encode()) | NUMBERS


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
    channel = Channel(ours, takes_descriptors=request.param)
    yield channel, theirs
    channel.close()
    theirs.close()


def send(end: socket.socket, data: bytes, handed: int = 0) -> None:
    """Send raw bytes with so many copies of a descriptor, as a worker that follows no protocol."""
    with open(os.devnull, 'rb') as file:
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [file.fileno()] * handed))] if handed else []
        end.sendmsg([data], beside)


@fuzz(300)
@given(data=HOSTILE_PACKETS | NUMBERS | st.binary(max_size=80) | st.just(b''), handed=st.integers(0, 12))
def test_f1_any_packet_is_an_object_or_a_typed_error(ends: tuple, data: bytes, handed: int) -> None:
    channel, theirs = ends
    before = descriptors()
    send(theirs, data[:100_000], handed)
    try:
        packet, owned = channel.receive(block=False)
    except (InferenceError, ChannelClosedError) as error:
        assert str(error)
    else:
        assert len(owned) <= handed
        if isinstance(packet, tuple):
            assert struct.pack(f'<B{len(packet)}Q', 0, *packet) == data and not owned
            check_nothing_stays(before)
            return
        assert isinstance(packet, dict)
        # What a host does with a packet that it does not understand.
        assert repr(packet) and isinstance(error_from_json(packet), C7Error)
        for descriptor in owned:
            os.close(descriptor)
    check_nothing_stays(before)


@fuzz(160)
@given(content=hostile_json(LAYOUT))
def test_f1_any_layout_lies_inside_its_segment_or_is_refused(content: bytes) -> None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return
    lay_out(value)


def lay_out(value: object) -> bool:
    segment = SharedTensors.create(256, writable=False)
    try:
        views = segment.arrays(TensorLayout.from_json(value))
        for view in views.values():
            assert view.nbytes <= 256 and view.tobytes() is not None
    except InferenceError as error:
        assert str(error)
        return False
    finally:
        segment.close()
    return True


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
    lay_out(value)


@fuzz(140)
@given(content=hostile_json(ERROR))
def test_f1_any_error_told_is_an_error_of_the_family(content: bytes) -> None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return
    error = error_from_json(value)
    assert isinstance(error, C7Error)
    # It is logged, and published in a ROS string.
    str(error).encode()
    error.message.encode()


@pytest.fixture(autouse=True)
def no_wait_for_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that stands for the worker does not end, though its channel may seem closed."""
    monkeypatch.setattr('gps_denied_c7.worker_process._EXIT_CODE_S', 0.0)
    monkeypatch.setattr('gps_denied_c7.worker_host._LONGEST_STEP_S', 0.01)


class FakeWorkerProcess(WorkerProcess):
    """Take an idle process for a worker's, and spare it for the next example."""

    def _kill(self) -> None:
        pass

    def _reap(self) -> None:
        self._then()


class HostOfFakeWorker(WorkerHost):
    """Have an idle process for the worker, so that a test can say what no real worker would."""

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(
            Rung('onnx_trt_ep', ProviderSet.CPU), BUNDLE, C7InferenceConfig(load_timeout_s=0.01),
            on_build=lambda told: None,
        )  # fmt: skip
        ours, self.far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = FakeWorkerProcess('worker 0', process, Channel(ours, takes_descriptors=False))

    def _start(self, task: object) -> WorkerProcess:
        return self._process

    def release(self) -> None:
        super().release()
        self.far_end.close()

    def say(self, packets: list[bytes]) -> None:
        self.far_end.setblocking(False)
        for packet in packets:
            try:
                send(self.far_end, packet[:60_000])
            except BlockingIOError:
                return


@pytest.fixture(scope='module')
def idle_process() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, '-Sc', 'import time; time.sleep(3600)'])
    yield process
    process.kill()
    process.wait()


def load_from(process: subprocess.Popen, packets: list[bytes]) -> bool:
    """Return whether a host takes the engine that its worker tells of."""
    host = HostOfFakeWorker(process)
    try:
        host.say(packets)
        facts = host.load()
        repr((facts, host.inputs, host.outputs)).encode()
        # These go into ROS strings.
        '\n'.join((facts.active_provider, *facts.requested_providers, *facts.notes)).encode()
        for spec in (*host.inputs, *host.outputs):
            spec.mismatch(np.zeros(1, np.float32))
    except C7Error as error:
        str(error).encode()
        return False
    finally:
        host.release()
    return True


def answer_from(process: subprocess.Popen, turns: list[list[bytes]], reads: bool) -> int:
    """Return how many requests a host has answers to, where its worker says ``turns`` to them."""
    host, answered = HostOfFakeWorker(process), 0
    host._input_specs = host._output_specs = (SPEC,)
    try:
        for packets in turns:
            host.begin({'x': np.ones((1, 2), np.float32)})
            host.say(packets)
            for _ in range(len(packets) + 2):
                outputs = host.poll(0.0)
                if outputs is not None:
                    assert list(outputs) == ['x'] and SPEC.mismatch(outputs['x']) is None
                    outputs['x'].tobytes()
                    answered += 1
                    break
            while reads and select.select([host.far_end], [], [], 0)[0]:
                _, handed, _, _ = socket.recv_fds(host.far_end, 1 << 16, 8)
                for descriptor in handed:
                    os.close(descriptor)
    except C7Error as error:
        str(error).encode()
    finally:
        host.release()
    return answered


@fuzz(140)
@given(packets=st.lists(HOSTILE_PACKETS | PLAIN_PACKETS | st.just(LOADED).flatmap(hostile_json), max_size=3))
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
    told = [json.dumps({'say': 'needs', 'bytes': 64}), json.dumps({'say': 'answered', 'id': 1, 'layout': LAYOUT})]
    again = [struct.pack('<BQ', 0, 2)]
    assert answer_from(idle_process, [[text.encode() for text in told], again], True) == 2
    assert load_from(idle_process, [json.dumps(LOADED).encode()])
