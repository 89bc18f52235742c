"""From a waiting frame to its answer: decode, pre-process, infer, hand on (N-3)."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.failover.chain import Answer, RuntimeChain
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.pipeline.mailbox import IDLE_S, Frame, FrameSlots, FrameThread, PreparedImage
from gps_denied_c7.tensors import TensorSpec

__all__ = ['FramePipeline', 'FrameResult', 'FrameTap', 'InferenceThread', 'ServedModel']

_LOOK_S = 0.02


class FrameResult(NamedTuple):
    """
    Hold the answer to one frame.

    :param frame_seq: counts the accepted frames of the topic from 0.
    :param source_size: width and height of the image in pixels.
    :param network_to_image: (2, 3) float64, network pixel to image pixel, pixel centres at integers.
    :param durations_ns: by stage: queue, decode, preprocess, hand_off, engine, hand_back.
    :param published: names of the outputs that are published, all of them where empty.
    """

    frame: Frame
    frame_seq: int
    source_size: tuple[int, int]
    network_to_image: NDArray[np.float64]
    answer: Answer
    durations_ns: Mapping[str, int]
    published: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False, slots=True)
class ServedModel:
    """
    Hold what answers frames, so that all of it changes at once.

    :param image_input: the network's input that ``preprocessor`` fills.
    :param published: names of the outputs that are published, all of them where empty.
    """

    bundle: ModelBundle
    chain: RuntimeChain
    preprocessor: Preprocessor
    image_input: TensorSpec
    published: frozenset[str] = frozenset()
    _own: NDArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Where the network leaves sizes free, the pre-processing has them; a free batch runs at one.
        shape = self.preprocessor.spec.tensor_shape
        object.__setattr__(self, '_own', np.zeros(shape, self.image_input.dtype))

    def request(self, pixels: Pixels) -> dict[str, NDArray]:
        """
        Return the request for one image, valid until the next call.

        :raises ImageRejectedError: the image does not fit.
        """
        tensor = self._input()
        self.preprocessor.run(pixels, tensor)
        return {self.image_input.name: tensor}

    def request_of(self, prepared: PreparedImage) -> dict[str, NDArray]:
        """
        Return the request for one image that is decoded and resized already, valid until the next call.

        :param prepared: made with the spec of :attr:`preprocessor`; only read.
        """
        tensor = self._input()
        self.preprocessor.fill(prepared.planes, *prepared.size, tensor)
        return {self.image_input.name: tensor}

    def _input(self) -> NDArray:
        """Return where an engine reads its input from, or, before that is known, an array of our own."""
        tensor = self.chain.request_arrays().get(self.image_input.name)
        return self._own if tensor is None or tensor.shape != self._own.shape else tensor


class FrameTap:
    """Give copies of decoded frames to another thread, one for each time that it asks."""

    def __init__(self) -> None:
        self._wanted = False
        self._pixels: Pixels | None = None
        self._arrived = threading.Event()

    @property
    def wanted(self) -> bool:
        """Whether a frame is waited for."""
        return self._wanted

    def take(self, timeout_s: float) -> Pixels | None:
        """Return the pixels of the next answered frame, owned by the caller; None where none came in time."""
        self._arrived.clear()
        self._wanted = True
        arrived = self._arrived.wait(timeout_s)
        self._wanted = False
        return self._pixels if arrived else None

    def offer(self, pixels: Pixels | None) -> None:
        """Copy ``pixels`` if they are waited for; nothing is done otherwise, or where there are none."""
        if self._wanted and pixels is not None:
            self._wanted = False
            self._pixels = Pixels(pixels.array.copy(), pixels.order)
            self._arrived.set()


class _Ready(NamedTuple):
    """
    Hold what the network gets of one image, and its times so far.

    :param size: width and height of the image, pixels.
    :param pixels: of the image, where available; valid until the next one is decoded.
    :param cost_ns: CPU time that this thread took for it, None where it took none.
    """

    request: dict[str, NDArray]
    size: tuple[int, int]
    pixels: Pixels | None
    queue_ns: int
    decode_ns: int
    cost_ns: int | None = None


class FramePipeline:
    """
    Answer frames one at a time, from one thread.

    A frame that comes with what was made of its image is answered from that, if it was made for the model that answers
    now; otherwise, after a swap, the image is decoded again.

    :param model: answers until :meth:`replace`.
    :param decode: takes an image message, returns its pixels; raises ImageRejectedError.
    :param publish: takes each result and hands it on before the next frame is touched.
    :param on_refused: called with every image that cannot be decoded or does not fit.
    :param on_unanswered: called with every accepted frame that no rung answered, and why.
    :param charge: called with the topic, and how many nanoseconds of CPU time this thread took to make an image ready.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        decode: Callable[[Any], Pixels],
        publish: Callable[[FrameResult], None],
        on_refused: Callable[[Frame, ImageRejectedError], None],
        on_unanswered: Callable[[Frame, Exception], None],
        statistics: Statistics,
        charge: Callable[[str, int], None] = lambda topic, cost_ns: None,
    ) -> None:
        self._model = model
        self._decode = decode
        self._publish = publish
        self._on_refused = on_refused
        self._on_unanswered = on_unanswered
        self._statistics = statistics
        self._charge = charge
        self._next_seq: Counter[str] = Counter()
        self.answered = FrameTap()

    @property
    def preprocessing(self) -> PreprocessingSpec:
        """What the model that answers now was trained with; from any thread."""
        return self._model.preprocessor.spec

    def replace(self, model: ServedModel) -> None:
        """Have ``model`` answer from the next frame on; the frame numbers go on. From the thread of :meth:`process`."""
        self._model = model

    def maintain(self) -> None:
        """Look after the engines: between two frames, and while none comes."""
        self._model.chain.maintain()

    def process(self, frame: Frame) -> None:
        """Answer ``frame`` exactly once, or refuse it, or report it unanswered."""
        taken_ns = time.monotonic_ns()
        model = self._model
        try:
            make = self._make_ready if frame.prepared is None else self._take_prepared
            ready = make(frame, model, taken_ns)
        except ImageRejectedError as error:
            self._on_refused(frame, error)
            return
        except Exception as error:  # a fault of the decoder, not of the image
            self._accept(frame)
            self._give_up(frame, error)
            return
        try:
            self._answer(frame, model, ready)
        finally:
            # Only now: the answer does not wait for the accounts.
            if ready.cost_ns is not None:
                self._charge(frame.topic, ready.cost_ns)

    def _answer(self, frame: Frame, model: ServedModel, ready: _Ready) -> None:
        preprocessed_ns = time.monotonic_ns()
        seq = self._accept(frame)
        try:
            answer = model.chain.infer(ready.request)
            inferred_ns = time.monotonic_ns()
            durations_ns = {
                'queue': ready.queue_ns,
                'decode': ready.decode_ns,
                'preprocess': preprocessed_ns - frame.received_ns - ready.queue_ns - ready.decode_ns,
                **_split_inference(preprocessed_ns, answer.ran_ns, inferred_ns),
            }
            matrix = model.preprocessor.network_to_image(*ready.size)
            self._publish(FrameResult(frame, seq, ready.size, matrix, answer, durations_ns, model.published))
        except Exception as error:  # an accepted frame is either answered or counted, whatever went wrong
            self._give_up(frame, error)
            return
        published_ns = time.monotonic_ns()
        self._statistics.count(frame.topic, 'answered')
        self._statistics.observe(
            {**durations_ns, 'publish': published_ns - inferred_ns, 'total': published_ns - frame.received_ns}
        )
        self.answered.offer(ready.pixels)

    def _make_ready(self, frame: Frame, model: ServedModel, taken_ns: int) -> _Ready:
        """Decode and pre-process an image in this thread."""
        began_ns = time.thread_time_ns()
        try:
            pixels = self._decode(frame.message)
            decoded_ns = time.monotonic_ns()
            request = model.request(pixels)
        except BaseException:
            self._charge(frame.topic, time.thread_time_ns() - began_ns)
            raise
        height, width = pixels.array.shape[:2]
        queue_ns, cost_ns = taken_ns - frame.received_ns, time.thread_time_ns() - began_ns
        return _Ready(request, (width, height), pixels, queue_ns, decoded_ns - taken_ns, cost_ns)

    def _take_prepared(self, frame: Frame, model: ServedModel, taken_ns: int) -> _Ready:
        """Scale what was made of an image, and give its memory back; or have it made for this model first."""
        prepared = frame.prepared
        assert prepared is not None
        began_ns, ended_ns = prepared.decoding_ns
        queue_ns, decode_ns = began_ns - frame.received_ns + taken_ns - ended_ns, ended_ns - began_ns
        if prepared.spec != model.preprocessor.spec:
            prepared.release()
            prepared = prepared.again(model.preprocessor.spec)
            decode_ns += time.monotonic_ns() - taken_ns
        try:
            request = model.request_of(prepared)
        finally:
            prepared.release()
        return _Ready(request, prepared.size, prepared.pixels, queue_ns, decode_ns)

    def _accept(self, frame: Frame) -> int:
        self._statistics.count(frame.topic, 'accepted')
        seq = self._next_seq[frame.topic]
        self._next_seq[frame.topic] += 1
        return seq

    def _give_up(self, frame: Frame, error: Exception) -> None:
        self._statistics.count(frame.topic, 'unanswered')
        self._on_unanswered(frame, error)


def _split_inference(asked_ns: int, ran_ns: tuple[int, int], answered_ns: int) -> dict[str, int]:
    """Return the stages of an inference; whatever a worker reports of its engine, they add up to all of it."""
    began_ns = min(max(ran_ns[0], asked_ns), answered_ns)
    ended_ns = min(max(ran_ns[1], began_ns), answered_ns)
    return {'hand_off': began_ns - asked_ns, 'engine': ended_ns - began_ns, 'hand_back': answered_ns - ended_ns}


class InferenceThread(FrameThread):
    """
    Serve the slots from one thread, the only one that runs the engine while the node is active.

    :param too_old: whether a frame just taken is to be dropped instead of answered.
    :param shed: whether one that is not too old is to be left out because of heat; not asked for frames that come with
        what was made of their image, of which a DecodeThread has asked.
    """

    def __init__(
        self,
        slots: FrameSlots,
        pipeline: FramePipeline,
        *,
        too_old: Callable[[Frame], bool],
        shed: Callable[[Frame], bool],
        statistics: Statistics,
    ) -> None:
        super().__init__('c7-inference', slots, statistics)
        self._pipeline = pipeline
        self._too_old = too_old
        self._shed = shed
        self._replacing = threading.Lock()
        self._replacement: ServedModel | None = None

    def answered_frame(self, timeout_s: float) -> Pixels | None:
        """Return a copy of the next answered frame's pixels, None where none came in time; for one thread."""
        return self._pipeline.answered.take(timeout_s)

    def replace(self, model: ServedModel, cancelled: threading.Event) -> bool:
        """
        Have ``model`` answer from the next frame on, and wait until it does; for one thread.

        :return: whether it does; False where ``cancelled`` was set before.
        """
        with self._replacing:
            self._replacement = model
        while self._replacement is model:
            if cancelled.wait(_LOOK_S):
                with self._replacing:
                    withdrawn = self._replacement is model
                    self._replacement = None
                return not withdrawn
        return True

    def stop(self, timeout_s: float) -> bool:
        """
        Close the slots, finish the current frame and end the thread.

        :return: False when the current frame still runs after ``timeout_s``; the thread then ends
            as soon as its engine returns.
        """
        self.close()
        return self.join(timeout_s)

    def _step(self) -> None:
        self._take_replacement()
        # Not kept in a variable: once it is answered its memory takes the next image, still in the caches.
        self._serve(self.slots.take(IDLE_S))
        self._pipeline.maintain()

    def _serve(self, frame: Frame | None) -> None:
        if frame is None:
            return
        try:
            if self._too_old(frame):
                self._statistics.count(frame.topic, 'too_old')
            elif frame.prepared is None and self._shed(frame):
                self._statistics.count(frame.topic, 'shed')
            else:
                self._pipeline.process(frame)
        finally:
            frame.release()

    def _take_replacement(self) -> None:
        if self._replacement is None:
            return
        with self._replacing:
            if self._replacement is not None:
                self._pipeline.replace(self._replacement)
                self._replacement = None
