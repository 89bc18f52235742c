"""One waiting frame per topic, newest wins, served round-robin by one thread (N-3)."""

from __future__ import annotations

import abc
import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from gps_denied_c7.errors import C7Error
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.monitoring.metrics import Statistics

__all__ = ['IDLE_S', 'Frame', 'FrameSlots', 'FrameThread', 'PreparedImage']

IDLE_S = 0.5
"""How long a FrameThread waits for a frame at a time."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """
    Hold what was made of an image before its turn: decoded, and as large as the network takes it.

    :param spec: what ``planes`` were made with.
    :param size: width and height of the decoded image, pixels.
    :param planes: of :meth:`Preprocessor.resize`, valid until ``release``.
    :param pixels: a copy of the decoded image, where one was asked for.
    :param decoding_ns: steady clock when this began and ended, nanoseconds.
    :param release: gives the memory of ``planes`` back; safe to repeat.
    :param again: returns the same image made with another spec, in the calling thread; raises ImageRejectedError.
    """

    spec: PreprocessingSpec
    size: tuple[int, int]
    planes: NDArray
    pixels: Pixels | None
    decoding_ns: tuple[int, int]
    release: Callable[[], None]
    again: Callable[[PreprocessingSpec], PreparedImage]


@dataclass(frozen=True, slots=True)
class Frame:
    """
    Hold one received image until it is answered.

    :param topic: fully resolved topic name.
    :param message: the image message; its buffer must stay untouched until the frame is answered.
    :param received_ns: steady clock at callback entry, nanoseconds.
    :param receive_stamp_ns: ROS time at callback entry, nanoseconds.
    :param prepared: what was made of the image already; None where that is left to the inference thread.
    """

    topic: str
    message: Any
    received_ns: int
    receive_stamp_ns: int
    prepared: PreparedImage | None = None

    def release(self) -> None:
        """Give back what was made of the image, once it is answered or dropped; safe to repeat."""
        if self.prepared is not None:
            self.prepared.release()


class FrameSlots:
    """
    Pass frames from image callbacks to one thread, which releases those that it takes.

    :param topics: the topics, in the order in which they take turns.
    :param on_replaced: called with each frame that a newer one of its topic pushed out, once it is released.
    """

    def __init__(self, topics: Iterable[str], *, on_replaced: Callable[[Frame], None]) -> None:
        self._slots: dict[str, Frame | None] = dict.fromkeys(topics)
        self._on_replaced = on_replaced
        self._ready = threading.Condition()
        self._order = list(self._slots)
        self._closed = False

    def put(self, frame: Frame) -> bool:
        """Put ``frame`` into its topic's slot; False once closed."""
        with self._ready:
            if self._closed:
                return False
            replaced, self._slots[frame.topic] = self._slots[frame.topic], frame
            self._ready.notify()
        if replaced is not None:
            replaced.release()
            self._on_replaced(replaced)
        return True

    def has(self, topic: str) -> bool:
        """Return whether a frame of ``topic`` waits."""
        return self._slots[topic] is not None

    def take(self, timeout_s: float) -> Frame | None:
        """Wait up to ``timeout_s`` for a frame and take it; None when none came or closed."""
        with self._ready:
            self._ready.wait_for(lambda: self._closed or any(self._slots.values()), timeout_s)
            if self._closed:
                return None
            for index, topic in enumerate(self._order):
                if (frame := self._slots[topic]) is not None:
                    self._slots[topic] = None
                    # The topic just served goes to the back, so a fast camera cannot starve a slow one.
                    self._order.append(self._order.pop(index))
                    return frame
        return None

    def close(self) -> list[Frame]:
        """Refuse further frames, wake the taker and return the frames still waiting, released."""
        with self._ready:
            self._closed = True
            waiting = [frame for frame in self._slots.values() if frame is not None]
            self._slots = dict.fromkeys(self._slots)
            self._ready.notify_all()
        for frame in waiting:
            frame.release()
        return waiting


class FrameThread(abc.ABC):
    """
    Take frames out of slots in a thread of its own, until it is closed.

    :param name: of the thread, also in logs.
    :param statistics: counts the frames that still wait when it is closed.
    """

    def __init__(self, name: str, slots: FrameSlots, statistics: Statistics) -> None:
        self.slots = slots
        """Where frames wait for this thread."""
        self._statistics = statistics
        self._closed = False
        # A daemon: an engine or a decoder that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to take frames."""
        self._thread.start()

    def close(self) -> None:
        """Take no other frame, and refuse further ones; does not wait for the current one."""
        self._closed = True
        for frame in self.slots.close():
            self._statistics.count(frame.topic, 'closed')

    def join(self, timeout_s: float) -> bool:
        """Return whether the thread has ended within ``timeout_s``, once closed."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @abc.abstractmethod
    def _step(self) -> None:
        """Take the next frame and serve it, or come back where none comes for ``IDLE_S``."""

    def _run(self) -> None:
        while not self._closed:
            try:
                self._step()
            except C7Error as error:
                _log.error('%s', error)
            except Exception:
                # No other thread serves these frames: it outlives whatever one of them brings.
                _log.exception('%s met an unexpected error and goes on', self._thread.name)
