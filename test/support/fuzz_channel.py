"""A host whose worker says what no real worker would."""

from __future__ import annotations

import array
import json
import os
import select
import socket
import subprocess
from pathlib import Path

import numpy as np

from gps_denied_c7._json import FieldError, reader_of
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error, EngineSchemaMismatchError, InferenceError
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineFacts, ProviderSet
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.worker.channel import Channel, Ready
from gps_denied_c7.worker.client import WorkerHost
from gps_denied_c7.worker.exchange import Exchange
from gps_denied_c7.worker.process import WorkerProcess
from gps_denied_c7.worker.protocol import (
    WORKER_PROTOCOL,
    Answer,
    ErrorReport,
    Failed,
    Loaded,
    LoadFailed,
    NeedRoom,
    Progress,
)
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout

SPEC = TensorSpec('x', 'float32', (1, 2))
BUNDLE = ModelBundle(name='net', root=Path('/'), weights_digest='sha256:' + '0' * 64, inputs=(SPEC,), outputs=(SPEC,))
LAYOUT = TensorLayout((('x', 'float32', (1, 2), 0),))
ERROR = ErrorReport.of(EngineSchemaMismatchError('sm', expected=87, found=90, remedy='Build it again.'))
LOADED = Loaded(
    EngineFacts('CPUExecutionProvider', ('CPUExecutionProvider',), True, 3, ('a note',), 0.5, 1 << 20),
    inputs=(SPEC,),
    outputs=(TensorSpec('x', 'float32', (1, None)),),
)
MESSAGES = (
    Answer(1, (3, 4), LAYOUT), Failed(1, ERROR), LoadFailed(ERROR), NeedRoom(64),
    Progress(BuildProgress('building', 1.5, 0.25)), Ready(), LOADED,
)  # fmt: skip


def packet_of(message: object) -> bytes:
    """Return what a worker sends."""
    return WORKER_PROTOCOL.from_child.encode(message)


def json_of(message: object) -> list:
    """Return the JSON value that a worker sends."""
    return json.loads(packet_of(message))


def send(end: socket.socket, data: bytes, handed: int = 0) -> None:
    """Send raw bytes with so many copies of a descriptor, as a worker that follows no protocol."""
    with open(os.devnull, 'rb') as file:
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [file.fileno()] * handed))] if handed else []
        end.sendmsg([data], beside)


def lay_out(value: object) -> bool:
    segment = SharedTensors.create(256, writable=False)
    try:
        views = segment.arrays(reader_of(TensorLayout, arrays=True)(value))
        for view in views.values():
            assert view.nbytes <= 256 and view.tobytes() is not None
    except (FieldError, InferenceError) as error:
        assert str(error)
        return False
    finally:
        segment.close()
    return True


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
        self._process = FakeWorkerProcess('worker 0', process, Channel(ours, WORKER_PROTOCOL, in_child=False))

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


def load_from(process: subprocess.Popen, packets: list[bytes]) -> bool:
    """Return whether a host takes the engine that its worker tells of."""
    host = HostOfFakeWorker(process)
    try:
        host.say([packet_of(Ready()), *packets])
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
    host._exchange = Exchange(host._process, (SPEC,), (SPEC,))
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
