"""What a worker process does for its node: load one engine, and answer with it (F-1)."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import InferenceError
from gps_denied_c7.failover.in_process import in_process_hosts
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import UnknownThermalState
from gps_denied_c7.runtimes.gpu.memory_usage import GpuMemoryWatch
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineFacts
from gps_denied_c7.worker.channel import Channel, ChannelClosedError
from gps_denied_c7.worker.protocol import (
    Answer,
    AnswerNext,
    ErrorReport,
    Failed,
    Infer,
    InferNext,
    Load,
    Loaded,
    LoadFailed,
    Loading,
    MapAnswers,
    MapRequests,
    NeedRoom,
    Ping,
    Pong,
    Progress,
    RefuseRoom,
    beginning,
)
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout, segment_bytes

__all__ = ['EngineService', 'WorkerTask']

# An output that grows up to here gets room for twice as much.
_GENEROUS_BYTES = 1 << 26

# Of remarks about a load, which have to fit into one packet with the names of all tensors.
_NOTE_BYTES, _MOST_NOTES = 1000, 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """What a worker is to load; pickled by the node, which alone writes it."""

    bundle: ModelBundle
    config: C7InferenceConfig
    rung: Rung


class EngineService:
    """
    Answer the messages of one channel, one at a time, until it is closed.

    :param channel: to the node; borrowed.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._requests: SharedTensors | None = None
        self._answers: SharedTensors | None = None
        self._inputs: dict[str, NDArray] = {}
        self._outputs: dict[str, NDArray] | None = None
        self._in_place: dict[str, NDArray] = {}
        self._rooms: dict[str, int] = {}
        self._layout = TensorLayout(())
        self._node_knows_layout = False
        self._host: Any = None

    def run(self) -> NoReturn:
        """
        Serve.

        :raises ChannelClosedError: the node has closed its end, or is gone.
        """
        handlers: dict[type, Callable[[Any, list[int]], None]] = {
            InferNext: lambda message, _: self._answer(message.number),
            Infer: lambda message, _: self._infer(message),
            Ping: lambda *_: self._channel.send(Pong()),
            Load: lambda _, descriptors: self._load(descriptors[0]),
            MapRequests: lambda _, descriptors: self._map_requests(descriptors[0]),
        }
        self._channel.serve(handlers)

    def _load(self, descriptor: int) -> None:
        with os.fdopen(descriptor, 'rb') as file:
            file.seek(0)
            task: WorkerTask = pickle.load(file)
        self._channel.send(Loading())
        if not task.rung.on_gpu:
            # A broken driver must not stop the CPU rung; no vendor library has looked for a GPU yet.
            os.environ['CUDA_VISIBLE_DEVICES'] = ''
        try:
            make = in_process_hosts(task.bundle, task.config, UnknownThermalState(), on_build=self._report_progress)
            self._host = make(task.rung)
            facts = self._load_engine(task)
            facts = dataclasses.replace(facts, notes=_brief(facts.notes))
            self._channel.send(Loaded(facts, self._host.inputs, self._host.outputs))
        except ChannelClosedError:
            raise
        except Exception as error:
            _log.debug('loading failed', exc_info=True)
            self._channel.send(LoadFailed(ErrorReport.of(error)))

    def _load_engine(self, task: WorkerTask) -> EngineFacts:
        if not task.rung.on_gpu:
            return cast('EngineFacts', self._host.load())
        with GpuMemoryWatch() as watch:
            facts: EngineFacts = self._host.load()
        # What a builder takes meanwhile, no flight needs; ONNX Runtime's does not tell when it builds.
        taken = watch.final_bytes if task.config.build_on_configure else watch.peak_bytes
        return dataclasses.replace(facts, gpu_memory_bytes=taken)

    def _report_progress(self, progress: BuildProgress) -> None:
        self._channel.send(Progress(progress))

    def _map_requests(self, descriptor: int) -> None:
        self._inputs = {}
        self._requests = SharedTensors(descriptor, writable=False)

    def _map_answers(self, descriptor: int) -> None:
        self._outputs, self._in_place = None, {}
        before = self._answers
        self._answers = SharedTensors(descriptor, writable=True)
        if before is not None:
            # Outputs that lie there are views, which keep its memory.
            before.close()

    def _infer(self, request: Infer) -> None:
        """Take the layout of this request and the next ones, and answer it with a layout."""
        assert self._requests is not None
        self._node_knows_layout = False
        self._inputs = self._requests.arrays(request.layout)
        self._answer(request.number, place=True)

    def _answer(self, number: int, *, place: bool = False) -> None:
        try:
            if place:
                self._host.place(inputs=self._inputs)
            self._write(self._host.infer(self._inputs))
            if not self._node_knows_layout:
                unsized = tuple(spec.name for spec in self._host.outputs if spec.shape is None)
                self._channel.send(Answer(number, self._host.ran_ns, self._layout, unsized))
                self._node_knows_layout = True
                return
        except ChannelClosedError:
            raise
        except Exception as error:
            self._channel.send(Failed(number, ErrorReport.of(error)))
            return
        self._channel.send(AnswerNext(number, *self._host.ran_ns), block=False)

    def _write(self, outputs: dict[str, NDArray]) -> None:
        """Have ``outputs`` in the segment, copied unless they are there."""
        if self._in_place and all(outputs.get(name) is array for name, array in self._in_place.items()):
            return
        if self._outputs is None or not _alike(self._outputs, outputs):
            self._node_knows_layout = False
            self._layout = self._make_layout(outputs)
            assert self._answers is not None
            moved, self._outputs = self._outputs is None, self._answers.arrays(self._layout)
            if moved:
                # It may run the request once more, whose answer is the same.
                self._host.place(outputs=self._outputs)
        # Each lies in its own room, in an earlier segment or outside of both: no copy overwrites another's source.
        elsewhere = [name for name, array in self._outputs.items() if not _is_at(array, outputs[name])]
        for name in elsewhere:
            self._outputs[name][...] = outputs[name]
        self._in_place = {} if elsewhere else outputs

    def _make_layout(self, outputs: Mapping[str, NDArray]) -> TensorLayout:
        """Return where ``outputs`` lie: each where its room is, in a new segment where one has outgrown its own."""
        rooms = {name: self._rooms.get(name, -1) for name in outputs}
        outgrown = [name for name, array in outputs.items() if array.nbytes > rooms[name]]
        if outgrown or self._rooms.keys() != outputs.keys():
            for name in outgrown:
                # What has grown once will grow again, as long as that is cheap.
                size, grew = outputs[name].nbytes, rooms[name] >= 0
                rooms[name] = 2 * size if grew and size < _GENEROUS_BYTES else size
            self._grow(segment_bytes(rooms.values()))
            self._rooms = rooms
        return TensorLayout.of(outputs, self._rooms)

    def _grow(self, size: int) -> None:
        # Only the node makes segments: what it hands over cannot shrink under its feet.
        self._channel.send(NeedRoom(size))
        received = self._channel.receive()
        assert received is not None
        reply, descriptors = received
        if isinstance(reply, RefuseRoom):
            raise InferenceError(f'the node has no room for the answer: {reply.reason}')
        assert isinstance(reply, MapAnswers)
        self._map_answers(descriptors[0])


def _brief(notes: Sequence[str]) -> tuple[str, ...]:
    """Return remarks that fit into a packet: there may be one for each output, and a vendor's may be pages long."""
    if len(notes) > _MOST_NOTES:
        notes = (*notes[: _MOST_NOTES - 1], f'{len(notes) - _MOST_NOTES + 1} more remarks are left out.')
    cut = ((note, beginning(note, _NOTE_BYTES)) for note in notes)
    return tuple(note if kept == note else f'{kept} ...' for note, kept in cut)


def _is_at(array: NDArray, other: NDArray) -> bool:
    return bool(array.ctypes.data == other.ctypes.data)


def _alike(arrays: Mapping[str, NDArray], others: Mapping[str, NDArray]) -> bool:
    return arrays.keys() == others.keys() and all(
        array.shape == others[name].shape and array.dtype == others[name].dtype for name, array in arrays.items()
    )

