"""Requests to a worker and its answers, through shared memory (F-1)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import InferenceError, WorkerDiedError
from gps_denied_c7.tensors import TensorSpec, check_arrays
from gps_denied_c7.worker.process import WorkerProcess
from gps_denied_c7.worker.protocol import (
    Answer,
    AnswerNext,
    Failed,
    Infer,
    InferNext,
    MapAnswers,
    MapRequests,
    NeedRoom,
    RefuseRoom,
)
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout

__all__ = ['Exchange']

_LARGEST_ANSWER_BYTES = 1 << 30
# A request has one answer, and another message where the answer needs a larger segment.
_MOST_MESSAGES = 8


class Exchange:
    """
    Send requests to a worker that has loaded its engine, one at a time, and check what it answers.

    :param process: the worker; borrowed.
    :param inputs: of the engine.
    :param outputs: of the engine; one whose shape turns out to differ has no shape from then on.
    """

    def __init__(
        self, process: WorkerProcess, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.running = False
        """Whether a request was begun whose answer has not been taken."""
        self.ran_ns = (0, 0)
        """When the engine began and ended the run of the last answer, as its worker reports."""
        self.request_arrays: dict[str, NDArray] = {}
        """The arrays that the worker reads its inputs from, by name."""
        self._process = process
        self._requests: SharedTensors | None = None
        self._answers: SharedTensors | None = None
        self._layout_sent = False
        self._found: dict[str, NDArray] = {}
        self._number = 0
        self._messages = 0

    def begin(self, inputs: Mapping[str, NDArray]) -> None:
        """
        Send one request; :meth:`poll` returns its answer.

        :param inputs: arrays by canonical name; copied unless they are :attr:`request_arrays` themselves.
        :raises InferenceError: inputs that do not fit, a request still running, or a dead worker.
        """
        if self.running:
            raise InferenceError(f'{self._process.name} still runs the previous request.')
        own = self.request_arrays
        # Its own arrays, filled in place, are what they were when they were laid out.
        in_place = len(own) == len(inputs)
        for name, array in own.items():
            in_place = in_place and inputs.get(name) is array
        if not in_place:
            self._copy(inputs)
        self._number += 1
        if self._layout_sent:
            self._process.send(InferNext(self._number), block=False)
        else:
            self._process.send(Infer(self._number, TensorLayout.of(self.request_arrays)), block=False)
            self._layout_sent = True
        self.running, self._messages = True, 0

    def poll(self, timeout_s: float | None) -> dict[str, NDArray] | None:
        """
        Return the answer to the request that was begun, None where there is none within ``timeout_s``.

        :return: read-only views of the worker's segment, valid until the next :meth:`begin`.
        :raises InferenceError: the engine failed, the worker died, or what it answered does not fit.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                message = self._process.receive(deadline)
            except WorkerDiedError:
                self.running = False
                raise
            if message is None:
                return None
            self._messages += 1
            if self._messages > _MOST_MESSAGES:
                # Each is read whatever the deadline says.
                raise InferenceError(f'{self._process.name} sends more than a request needs.')
            if isinstance(message, NeedRoom):
                self._grow(message.bytes)
                continue
            # Anything else is left over from earlier: the answer to another request, or a sign of life.
            if not isinstance(message, (AnswerNext, Answer, Failed)) or message.number != self._number:
                continue
            self.running = False
            if isinstance(message, AnswerNext):
                self.ran_ns = message.began_ns, message.ended_ns
            else:
                self._take_layout(message)
            if not self._found:
                raise InferenceError(f'{self._process.name} answers without a layout of its outputs.')
            return dict(self._found)

    def close(self) -> None:
        """Release the shared memory; safe to repeat."""
        self.request_arrays, self._found, self._layout_sent, self.running = {}, {}, False, False
        for segment in (self._requests, self._answers):
            if segment is not None:
                segment.close()
        self._requests = self._answers = None

    def _take_layout(self, message: Answer | Failed) -> None:
        """Find the outputs of this answer and of the next ones."""
        # If this layout is refused, later answers do not have the one before either.
        self._found, self._layout_sent = {}, False
        if isinstance(message, Failed):
            raise message.error.error()
        if self._answers is None:
            raise InferenceError(f'{self._process.name} answers without a segment.')
        found = self._answers.arrays(message.layout)
        self.outputs = tuple(
            dataclasses.replace(spec, shape=None) if spec.name in message.unsized else spec for spec in self.outputs
        )
        # The worker has checked each value; what decides about memory and shapes is checked here again.
        check_arrays('output', self.outputs, found)
        self._found, self._layout_sent, self.ran_ns = found, True, message.ran_ns

    def _copy(self, inputs: Mapping[str, NDArray]) -> None:
        """Copy ``inputs`` to where the worker reads them."""
        check_arrays('input', self.inputs, inputs)
        own = self.request_arrays
        if not own or any(own[name].shape != array.shape for name, array in inputs.items()):
            layout = TensorLayout.of({spec.name: inputs[spec.name] for spec in self.inputs})
            if self._requests is None or self._requests.size < layout.size:
                self._requests = self._replace(self._requests, MapRequests(), layout.size)
            self.request_arrays = own = self._requests.arrays(layout)
            self._layout_sent = False
        for name, array in own.items():
            if inputs[name] is not array:
                np.copyto(array, inputs[name])

    def _grow(self, size: int) -> None:
        # Later answers do not lie in the previous segment.
        self._found = {}
        try:
            if size > _LARGEST_ANSWER_BYTES:
                raise InferenceError(f'an answer of {size} bytes is larger than {_LARGEST_ANSWER_BYTES}.')
            self._answers = self._replace(self._answers, MapAnswers(), size)
        except WorkerDiedError:
            raise
        except InferenceError as error:
            # The worker waits for the segment; without one, it fails this request alone.
            self._process.send(RefuseRoom(error.message), block=False)

    def _replace(self, before: SharedTensors | None, message: MapRequests | MapAnswers, size: int) -> SharedTensors:
        try:
            segment = SharedTensors.create(size, writable=isinstance(message, MapRequests))
        except OSError as error:
            raise InferenceError(f'no memory for a segment of {size} bytes: {error}.') from error
        if before is not None:
            before.close()
        self._process.send_segment(message, segment)
        return segment
