"""Images made ready for the network beside the inference thread, one topic in each thread."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.image.decode import DecodedImage, Pixels
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.pipeline.mailbox import IDLE_S, Frame, FrameSlots, FrameThread, PreparedImage

__all__ = ['DecodeThread', 'Decoder', 'LocalDecoder']

_log = logging.getLogger(__name__)


class Decoder(Protocol):
    """What decodes the images of one topic."""

    @property
    def cpu_ns(self) -> int:
        """CPU time that it has taken so far, nanoseconds; as of the latest :meth:`decode`."""

    def decode(self, message: Any, spec: PreprocessingSpec, *, pixels: bool) -> DecodedImage:
        """Return one image made ready; raise ImageRejectedError. From one thread at a time."""

    def close(self) -> None:
        """End; a decode in progress returns with an error, and so does every later one. From any thread."""


class DecodeThread(FrameThread):
    """
    Decode and pre-process the images of one topic in a thread of its own, and hand them on to the inference thread.

    The newest image waits for this thread in a slot, and the decoded image waits in the inference thread's slot. In
    both, a newer image replaces an older one, which is counted.

    :param slots: the inference thread's.
    :param spec: returns what the network that answers now was trained with.
    :param pixels_wanted: returns whether a copy of an image's pixels is waited for.
    :param charge: called with the topic and the nanoseconds of CPU time that the decoder took for each image, also a
        refused one. A restart is charged to the image that caused it; the first start is charged to none.
    :param shed: whether an image is to be left out because of heat.
    :param on_refused: called with the topic and the error of every image that cannot be decoded or does not fit.
    """

    def __init__(
        self,
        topic: str,
        decoder: Decoder,
        *,
        slots: FrameSlots,
        spec: Callable[[], PreprocessingSpec],
        pixels_wanted: Callable[[], bool],
        charge: Callable[[str, int], None],
        shed: Callable[[Frame], bool],
        on_refused: Callable[[str, ImageRejectedError], None],
        statistics: Statistics,
    ) -> None:
        waiting = FrameSlots([topic], on_replaced=lambda frame: self._count('replaced'))
        super().__init__(f'c7-decode {topic}', waiting, statistics)
        self._topic = topic
        self._decoder = decoder
        self._decoded = slots
        self._spec = spec
        self._pixels_wanted = pixels_wanted
        self._charge = charge
        self._shed = shed
        self._on_refused = on_refused
        self._turn = threading.Condition()
        self._busy, self._overtaking = False, 0
        self._charged_ns: int | None = None

    def close(self) -> None:
        """Decode no further; an image that waits or is being decoded is counted as closed. Does not wait."""
        super().close()
        self._decoder.close()

    def _step(self) -> None:
        frame = self.slots.take(IDLE_S)
        if frame is not None:
            self._serve(frame)

    def _serve(self, frame: Frame) -> None:
        if self._shed(frame):
            self._count('shed')
            return
        try:
            prepared = self._prepare(frame.message, self._spec(), pixels=self._pixels_wanted())
        except ImageRejectedError as error:
            self._refuse(error)
            return
        except Exception as error:  # a fault of the decoder's client, not of the image
            _log.exception('%s: an image could not be decoded', self._topic)
            self._refuse(ImageRejectedError('decoder', f'the decoder failed: {type(error).__name__}: {error}.'))
            return
        ready = dataclasses.replace(frame, prepared=prepared)
        # Once closed, a stream of another type may have put a newer image there.
        if self._closed or not self._decoded.put(ready):
            ready.release()
            self._count('closed')

    def _refuse(self, error: ImageRejectedError) -> None:
        if self._closed:
            self._count('closed')
        else:
            self._on_refused(self._topic, error)

    def _prepare(
        self, message: Any, spec: PreprocessingSpec, *, pixels: bool = False, overtake: bool = False
    ) -> PreparedImage:
        """
        Decode one image.

        :param overtake: decode it before this thread's next image, since the inference thread waits for it.
        """
        began_ns = time.monotonic_ns()
        with self._own_turn(overtake):
            try:
                decoded = self._decoder.decode(message, spec, pixels=pixels)
            finally:
                self._charge_decoder()
        for fault in decoded.oddities:
            self._statistics.note_odd(self._topic, fault)
        return PreparedImage(
            spec=spec,
            size=decoded.size,
            planes=decoded.planes,
            pixels=decoded.pixels,
            decoding_ns=(began_ns, time.monotonic_ns()),
            release=decoded.release,
            again=lambda other: self._prepare(message, other, overtake=True),
        )

    def _charge_decoder(self) -> None:
        before_ns, self._charged_ns = self._charged_ns, self._decoder.cpu_ns
        if before_ns is not None:
            self._charge(self._topic, self._charged_ns - before_ns)

    @contextmanager
    def _own_turn(self, overtake: bool) -> Iterator[None]:
        """Hold the decoder alone. With a plain lock this thread would take it again before the thread that waits."""
        with self._turn:
            self._overtaking += overtake
            self._turn.wait_for(lambda: not self._busy and (overtake or not self._overtaking))
            self._overtaking -= overtake
            self._busy = True
        try:
            yield
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()

    def _count(self, event: str) -> None:
        self._statistics.count(self._topic, event)


class LocalDecoder:
    """
    Decode images in the thread that asks, for a raw topic whose images would keep the inference thread too long.

    :param decode: takes an image message, returns its pixels; raises ImageRejectedError.
    """

    def __init__(self, decode: Callable[[Any], Pixels]) -> None:
        self._decode = decode
        self._preprocessor: Preprocessor | None = None
        self._cpu_ns = 0

    @property
    def cpu_ns(self) -> int:
        """CPU time that all images together have taken, nanoseconds."""
        return self._cpu_ns

    def decode(self, message: Any, spec: PreprocessingSpec, *, pixels: bool) -> DecodedImage:
        """Return one image made ready; raises ImageRejectedError. From one thread at a time."""
        began_ns = time.thread_time_ns()
        try:
            if self._preprocessor is None or self._preprocessor.spec != spec:
                self._preprocessor = Preprocessor(spec)
            decoded = self._decode(message)
            planes = np.stack(self._preprocessor.resize(decoded))
        finally:
            self._cpu_ns += time.thread_time_ns() - began_ns
        height, width = decoded.array.shape[:2]
        kept = Pixels(decoded.array.copy(), decoded.order) if pixels else None
        return DecodedImage((width, height), planes, kept)

    def close(self) -> None:
        """Do nothing: it holds nothing."""
