"""From a waiting frame to its answer: decode, pre-process, infer, hand on (N-3)."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.chain import Answer, RuntimeChain
from gps_denied_c7.decoding import Pixels
from gps_denied_c7.errors import C7Error, ImageRejectedError
from gps_denied_c7.preprocessing import Preprocessor
from gps_denied_c7.slots import Frame, FrameSlots
from gps_denied_c7.statistics import Statistics
from gps_denied_c7.tensors import TensorSpec

__all__ = ['FramePipeline', 'FrameResult', 'InferenceThread']

_IDLE_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrameResult:
    """
    Hold the answer to one frame.

    :param frame_seq: counts the accepted frames of the topic from 0.
    :param source_size: width and height of the image in pixels.
    :param network_to_image: (2, 3) float64, network pixel to image pixel, pixel centres at integers.
    :param durations_ns: by stage: queue, decode, preprocess, inference.
    """

    frame: Frame
    frame_seq: int
    source_size: tuple[int, int]
    network_to_image: NDArray[np.float64]
    answer: Answer
    durations_ns: Mapping[str, int]


class FramePipeline:
    """
    Answer frames one at a time, from one thread.

    :param spec: the network's image input.
    :param decode: takes an image message, returns its pixels; raises ImageRejectedError.
    :param publish: takes each result and hands it on before the next frame is touched.
    :param on_refused: told every image that cannot be decoded or does not fit.
    :param on_unanswered: told every accepted frame that no rung answered, and why.
    """

    def __init__(
        self,
        chain: RuntimeChain,
        preprocessor: Preprocessor,
        spec: TensorSpec,
        *,
        decode: Callable[[Any], Pixels],
        publish: Callable[[FrameResult], None],
        on_refused: Callable[[Frame, ImageRejectedError], None],
        on_unanswered: Callable[[Frame, Exception], None],
        statistics: Statistics,
    ) -> None:
        self._chain = chain
        self._preprocessor = preprocessor
        self._decode = decode
        self._publish = publish
        self._on_refused = on_refused
        self._on_unanswered = on_unanswered
        self._statistics = statistics
        self._next_seq: Counter[str] = Counter()
        self._name = spec.name
        # A dynamic batch axis runs at one: one frame, one request.
        self._input = np.zeros([axis or 1 for axis in spec.shape], spec.dtype)

    def process(self, frame: Frame) -> None:
        """Answer ``frame`` exactly once, or refuse it, or report it unanswered."""
        taken_ns = time.monotonic_ns()
        try:
            pixels = self._decode(frame.message)
            decoded_ns = time.monotonic_ns()
            # Where an engine reads its input from, or, before it has told, an array of our own.
            tensor = self._chain.request_arrays().get(self._name)
            if tensor is None or tensor.shape != self._input.shape:
                tensor = self._input
            self._preprocessor.run(pixels, tensor)
        except ImageRejectedError as error:
            self._on_refused(frame, error)
            return
        except Exception as error:  # a fault of the decoder, not of the image
            self._accept(frame)
            self._give_up(frame, error)
            return
        preprocessed_ns = time.monotonic_ns()
        seq = self._accept(frame)
        try:
            answer = self._chain.infer({self._name: tensor})
            inferred_ns = time.monotonic_ns()
            durations_ns = {
                'queue': taken_ns - frame.received_ns,
                'decode': decoded_ns - taken_ns,
                'preprocess': preprocessed_ns - decoded_ns,
                'inference': inferred_ns - preprocessed_ns,
            }
            height, width = pixels.array.shape[:2]
            matrix = self._preprocessor.network_to_image(width, height)
            self._publish(FrameResult(frame, seq, (width, height), matrix, answer, durations_ns))
        except Exception as error:  # an accepted frame is either answered or counted, whatever went wrong
            self._give_up(frame, error)
            return
        published_ns = time.monotonic_ns()
        self._statistics.count(frame.topic, 'answered')
        self._statistics.observe(
            {**durations_ns, 'publish': published_ns - inferred_ns, 'total': published_ns - frame.received_ns}
        )

    def _accept(self, frame: Frame) -> int:
        self._statistics.count(frame.topic, 'accepted')
        seq = self._next_seq[frame.topic]
        self._next_seq[frame.topic] += 1
        return seq

    def _give_up(self, frame: Frame, error: Exception) -> None:
        self._statistics.count(frame.topic, 'unanswered')
        self._on_unanswered(frame, error)


class InferenceThread:
    """
    Serve the slots from one thread, the only one that runs the engine while the node is active.

    :param too_old: whether a frame just taken is to be dropped instead of answered.
    :param shed: whether one that is not too old is to be left out because of heat.
    """

    def __init__(
        self,
        slots: FrameSlots,
        pipeline: FramePipeline,
        chain: RuntimeChain,
        *,
        too_old: Callable[[Frame], bool],
        shed: Callable[[Frame], bool],
        statistics: Statistics,
    ) -> None:
        self._slots = slots
        self._pipeline = pipeline
        self._chain = chain
        self._too_old = too_old
        self._shed = shed
        self._statistics = statistics
        self._stopping = False
        # A daemon: an engine that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name='c7-inference', daemon=True)

    def start(self) -> None:
        """Begin serving."""
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """
        Close the slots, finish the frame in hand and end the thread.

        :return: False when the frame in hand still runs after ``timeout_s``; the thread then ends
            as soon as its engine returns.
        """
        self._stopping = True
        for frame in self._slots.close():
            self._statistics.count(frame.topic, 'closed')
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping:
            try:
                frame = self._slots.take(_IDLE_S)
                if frame is None:
                    self._chain.maintain()
                elif self._too_old(frame):
                    self._statistics.count(frame.topic, 'too_old')
                elif self._shed(frame):
                    self._statistics.count(frame.topic, 'shed')
                else:
                    self._pipeline.process(frame)
            except C7Error as error:
                _log.error('%s', error)
            except Exception:
                # The thread is the node's only way to answer: it outlives whatever one frame brings.
                _log.exception('the inference thread met an unexpected error and goes on')
