"""
Run one engine in a process of its own: ``python -m gps_denied_c7.worker --channel FD`` (F-1).

Started by :mod:`gps_denied_c7.worker_host` alone. Vendor libraries live and die here; whoever started this
process has its frames answered by another one then.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import logging
import os
import pickle
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from numpy.typing import NDArray

from gps_denied_c7.bundle import ModelBundle
from gps_denied_c7.chain import Rung
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.hosts import in_process_hosts
from gps_denied_c7.runtime import BuildProgress, EngineFacts, ProviderSet
from gps_denied_c7.runtimes.gpu_usage import GpuMemoryWatch
from gps_denied_c7.shared_tensors import SharedTensors, TensorLayout
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.thermal import UnknownThermalState
from gps_denied_c7.worker_channel import Channel, ChannelClosedError, error_to_json

__all__ = ['LOG_MARK', 'WorkerTask', 'die_with_parent', 'main']

LOG_MARK = '\x1e'
"""Begins each line on standard error that comes from :mod:`logging`: mark, level number, blank, text."""

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """What a worker is to load; pickled by the node, which alone writes it."""

    bundle: ModelBundle
    config: C7InferenceConfig
    rung: Rung


class _Worker:
    """Answer the packets of one channel, one at a time, until it is closed."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._requests: SharedTensors | None = None
        self._answers: SharedTensors | None = None
        self._inputs: dict[str, NDArray] = {}
        self._outputs: dict[str, NDArray] | None = None
        self._host: Any = None

    def run(self) -> None:
        handlers: dict[str, Callable[[dict[str, Any], list[int]], None]] = {
            'load': self._load,
            'map': self._map,
            'infer': self._infer,
        }
        while True:
            received = self._channel.receive()
            assert received is not None
            packet, descriptors = received
            handlers[packet['do']](packet, descriptors)

    def _load(self, packet: dict[str, Any], descriptors: list[int]) -> None:
        with os.fdopen(descriptors[0], 'rb') as file:
            file.seek(0)
            task: WorkerTask = pickle.load(file)
        try:
            make = in_process_hosts(task.bundle, task.config, UnknownThermalState(), on_build=self._tell_progress)
            self._host = make(task.rung)
            facts = self._load_engine(task)
        except Exception as error:
            _log.debug('loading failed', exc_info=True)
            self._channel.send({'say': 'failed', 'error': error_to_json(error)})
            return
        self._channel.send(
            {
                'say': 'loaded',
                'facts': dataclasses.asdict(facts),
                'inputs': [_spec(spec) for spec in self._host.inputs],
                'outputs': [_spec(spec) for spec in self._host.outputs],
            }
        )

    def _load_engine(self, task: WorkerTask) -> EngineFacts:
        if task.rung.providers is ProviderSet.CPU:
            return cast('EngineFacts', self._host.load())
        with GpuMemoryWatch() as watch:
            facts: EngineFacts = self._host.load()
        # What a builder takes meanwhile, no flight needs; ONNX Runtime's does not tell when it builds.
        taken = watch.final_bytes if task.config.build_on_configure else watch.peak_bytes
        return dataclasses.replace(facts, gpu_memory_bytes=taken)

    def _tell_progress(self, progress: BuildProgress) -> None:
        self._channel.send({'say': 'progress', **dataclasses.asdict(progress)})

    def _map(self, packet: dict[str, Any], descriptors: list[int]) -> None:
        """Take a segment: of requests, mapped for reading, or of answers."""
        if packet['segment'] == 'requests':
            self._inputs = {}
            self._requests = SharedTensors(descriptors[0], writable=False)
        else:
            self._outputs = None
            self._answers = SharedTensors(descriptors[0], writable=True)

    def _infer(self, packet: dict[str, Any], descriptors: list[int]) -> None:
        number = packet['id']
        try:
            if 'layout' in packet:
                assert self._requests is not None
                self._inputs = self._requests.arrays(TensorLayout.from_json(packet['layout']))
            outputs = self._host.infer(self._inputs)
            told = self._write(outputs)
        except Exception as error:
            self._channel.send({'say': 'failed', 'id': number, 'error': error_to_json(error)})
            return
        self._channel.send({'say': 'answered', 'id': number, **told})

    def _write(self, outputs: dict[str, NDArray]) -> dict[str, Any]:
        """Have ``outputs`` in the segment, copied unless they are there, and return what has to be told of it."""
        told: dict[str, Any] = {}
        if self._outputs is None or not _alike(self._outputs, outputs):
            layout = TensorLayout.of(outputs)
            if self._answers is None or layout.size > self._answers.size:
                # Only the node makes segments: what it hands over cannot shrink under its feet.
                self._channel.send({'say': 'needs', 'bytes': layout.size})
                received = self._channel.receive()
                assert received is not None
                self._map(*received)
            assert self._answers is not None
            self._outputs = self._answers.arrays(layout)
            told['layout'] = layout.to_json()
            self._host.place_outputs(self._outputs)
        for name, array in self._outputs.items():
            if not _is_at(array, outputs[name]):
                array[...] = outputs[name]
        return told


def _is_at(array: NDArray, other: NDArray) -> bool:
    return bool(array.ctypes.data == other.ctypes.data)


def _alike(arrays: Mapping[str, NDArray], others: Mapping[str, NDArray]) -> bool:
    return arrays.keys() == others.keys() and all(
        array.shape == others[name].shape and array.dtype == others[name].dtype for name, array in arrays.items()
    )


def die_with_parent() -> None:
    """Have the kernel end this process with the thread that started it, also while it hangs in a driver."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main(arguments: list[str] | None = None) -> int:
    """Serve until the channel is closed from the other end."""
    parser = argparse.ArgumentParser(prog='gps_denied_c7.worker', description='Run one engine for a node.')
    parser.add_argument('--channel', type=int, required=True, help='descriptor of the socket to the node')
    parser.add_argument('--lifetime', type=int, required=True, help='descriptor that is closed when the node ends')
    options = parser.parse_args(arguments)
    die_with_parent()
    _set_up_process()
    threading.Thread(target=_end_with, args=(options.lifetime,), name='c7-lifetime', daemon=True).start()
    channel = Channel(socket.socket(fileno=options.channel))
    with contextlib.suppress(ChannelClosedError):
        _Worker(channel).run()
    # The order in which vendor libraries run their static destructors must not matter.
    os._exit(0)


def _set_up_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b'c7-worker')
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Marked())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _Marked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines() or ['']
        return '\n'.join(f'{LOG_MARK}{record.levelno} {line}' for line in lines)


def _end_with(descriptor: int) -> None:
    os.read(descriptor, 1)
    os._exit(1)


def _spec(spec: TensorSpec) -> list[Any]:
    return [spec.name, spec.dtype, list(spec.shape)]


if __name__ == '__main__':
    sys.exit(main())
