"""A decoder process, seen from the node: give it pictures, get them resized, and notice its death."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.decoder.protocol import (
    DECODER_PROTOCOL,
    TEXT_CHARACTERS,
    Copied,
    CopyPixels,
    Decode,
    Decoded,
    MapBuffer,
    MapInput,
    Prepare,
    Refused,
)
from gps_denied_c7.errors import C7Error, ImageRejectedError, InferenceError
from gps_denied_c7.failover.backoff import Backoff
from gps_denied_c7.image.decode import DecodedImage, Pixels, check_compressed
from gps_denied_c7.image.preprocess import planes_shape
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.monitoring.rate_limiter import RateLimiter
from gps_denied_c7.worker.process import WorkerProcess
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout

__all__ = ['ImageDecoder']

# To import NumPy, OpenCV and simplejpeg on a busy machine.
_START_S = 10.0
# First and longest pause. A decoder that has decoded nothing and fails within the longest after an earlier failure is
# restarted after a pause; otherwise it is restarted at once.
_PAUSE_S = (0.25, 10.0)
_LEAST_INPUT_BYTES = 1 << 20
# One buffer that the network reads, one that waits for it, one that is written, and one that a slow reader still has.
_MOST_BUFFERS = 4
# A picture has one reply; a process that sends many others is replaced.
_MOST_MESSAGES = 4
_END_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Buffer:
    """
    Hold a segment for the planes of one image.

    :param number: of the buffer, in messages to the process.
    :param home: the queue of free buffers.
    """

    number: int
    segment: SharedTensors
    home: deque[_Buffer]


def _give_back(loan: deque[_Buffer]) -> None:
    """Return the buffer of one image to the free ones; later calls do nothing."""
    # Two threads may give it back; the second finds the loan empty.
    with contextlib.suppress(IndexError):
        buffer = loan.pop()
        buffer.home.append(buffer)


class ImageDecoder:
    """
    Decode the pictures of one camera in a process of its own, and resize them there.

    A picture that harms that process raises an :class:`ImageRejectedError` here. If the process dies, hangs or sends an
    invalid reply, its picture is refused and another process is started: at once, or after a pause where it had decoded
    no picture and the last failure was recent. :meth:`decode` is for one thread at a time, :meth:`close` and the
    properties for any.

    :param name: of the camera, in logs and errors.
    :param memory_bytes: what one picture may need beside the libraries: decoded image, work memory, and as much again
        for the compressed file. Larger ones are refused.
    :param timeout_s: how long one picture may take, from :meth:`decode` on; then the process is killed. Where it is
        still starting, the time begins when it is ready.
    """

    def __init__(self, name: str, *, memory_bytes: int, timeout_s: float) -> None:
        self._name = f'the decoder of {name}'
        self._memory_bytes = memory_bytes
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._process: WorkerProcess | None = None
        self._useful = False
        self._backoff = Backoff()
        self._limiter = RateLimiter()
        self._failed_at = -math.inf
        self._cause = ''
        self._number = 0
        self._ended_cpu_ns = self._cpu_ns = 0
        self._input: SharedTensors | None = None
        self._data: NDArray | None = None
        self._free: deque[_Buffer] = deque()
        self._buffers: list[_Buffer] = []
        self._spec: PreprocessingSpec | None = None
        with self._lock:
            self._start()

    @property
    def pid(self) -> int | None:
        """Process id of the decoder, None where none runs."""
        process = self._process
        return process.pid if process is not None and not self._closed else None

    @property
    def cpu_ns(self) -> int:
        """
        CPU time that the processes of this camera have used so far, nanoseconds.

        Starts, refused pictures and killed processes count too. Where the process died, the time that the caller waited
        counts as CPU time. Each :meth:`decode` updates it.
        """
        return self._cpu_ns

    def decode(self, format: str, data: memoryview, spec: PreprocessingSpec, *, pixels: bool = False) -> DecodedImage:
        """
        Return one JPEG or PNG at its size in the network's input; wait for it for ``timeout_s``.

        The planes are what :meth:`Preprocessor.resize` makes of the pixels that :func:`decode_compressed` returns.

        :param format: of the message.
        :param data: of the message; copied once, and not kept.
        :param pixels: return a copy of the decoded pixels too.
        :return: holds one of the decoder's few buffers until its ``release()``.
        :raises ImageRejectedError: ``encoding``, ``size`` or ``data`` as :func:`decode_compressed`; ``decode_time``
            (not ready in time, the process was killed), ``decode_memory`` (needs more than ``memory_bytes``),
            ``decoder`` (the process died, cannot be started, waits after having died, or is closed).
        """
        check_compressed(format, data)
        with self._lock:
            process = self._running()
            begun_ns, before_ns = time.monotonic_ns(), self._count_cpu()
            try:
                if not process.await_ready(time.monotonic() + _START_S):
                    raise TimeoutError(f'{self._name} did not start within {_START_S:g} s.')
                return self._decode(process, format, data, spec, pixels)
            except TimeoutError as error:
                self._replace(f'{error} It was killed.')
                raise ImageRejectedError(
                    'decode_time', str(error), remedy='Send smaller or simpler images, or raise decode_timeout_ms.'
                ) from None
            except (OSError, MemoryError) as error:
                raise ImageRejectedError('decode_memory', f'the node has no memory for an image: {error}.') from error
            except InferenceError as error:
                # The CPU time of a process that is gone is unknown: count the time that was waited.
                self._cpu_ns = max(self._cpu_ns, before_ns + time.monotonic_ns() - begun_ns)
                self._replace(error.message)
                if self._closed:
                    raise self._unavailable('is closed.') from error
                raise ImageRejectedError(
                    'decoder', error.message, remedy=error.remedy or 'Read its last output in the log.'
                ) from error
            finally:
                self._count_cpu()

    def close(self) -> None:
        """End the process; the current picture is refused, and not waited for. Safe to repeat, from any thread."""
        self._closed = True
        while not self._lock.acquire(timeout=0.05):
            # Again and again: another may have been started meanwhile.
            process = self._process
            if process is not None:
                process.kill()
        try:
            process = self._process
            self._end()
        finally:
            self._lock.release()
        if process is not None:
            process.join(_END_S)

    def _decode(
        self, process: WorkerProcess, format: str, data: memoryview, spec: PreprocessingSpec, pixels: bool
    ) -> DecodedImage:
        deadline = time.monotonic() + self._timeout_s
        file = np.frombuffer(data, np.uint8)
        self._put(process, file)
        buffer = self._take_buffer(process, spec)
        loan = deque((buffer,))
        try:
            if spec is not self._spec:
                process.send(Prepare(spec), block=False)
                self._spec = spec
            self._number += 1
            process.send(Decode(self._number, format, file.nbytes, buffer.number, pixels), block=False)
            answer = self._receive(process, deadline)
            if isinstance(answer, Refused):
                message, remedy = answer.message[:TEXT_CHARACTERS], answer.remedy[:TEXT_CHARACTERS]
                raise ImageRejectedError(answer.reason, message, remedy=remedy)
            if not isinstance(answer, Decoded):
                raise InferenceError(f'{self._name} sent an invalid reply: {answer}')
            height, width, *_ = answer.shape
            copied = self._copy_pixels(process, answer, deadline) if pixels else None
            layout = TensorLayout.single('planes', answer.dtype, planes_shape(spec, width, height))
            planes = buffer.segment.arrays(layout)['planes']
        except BaseException:
            _give_back(loan)
            raise
        self._useful = True
        self._backoff.reset(self._name)
        return DecodedImage(
            size=(width, height),
            planes=planes,
            pixels=None if copied is None else Pixels(copied, answer.order),
            oddities=answer.oddities,
            release=functools.partial(_give_back, loan),
        )

    def _put(self, process: WorkerProcess, data: NDArray) -> None:
        """Copy a file to where the process reads it; the segment grows and shrinks with what comes."""
        if data.nbytes > self._memory_bytes:
            raise ImageRejectedError(
                'decode_memory',
                f'the compressed image has {data.nbytes} bytes, and {self._memory_bytes} are allowed.',
                remedy='Send smaller images, or raise decoder_memory_mb.',
            )
        room = 0 if self._data is None else self._data.nbytes
        if data.nbytes > room or room > max(_LEAST_INPUT_BYTES, 8 * data.nbytes):
            size = max(_LEAST_INPUT_BYTES, min(2 * data.nbytes, self._memory_bytes))
            self._drop_input()
            segment = SharedTensors.create(size, writable=True)
            process.send_segment(MapInput(), segment)
            # Not before: a process that reads from another segment would decode an earlier file.
            self._input, self._data = segment, segment.arrays(TensorLayout.single('data', 'uint8', (size,)))['data']
        assert self._data is not None
        self._data[: data.nbytes] = data

    def _take_buffer(self, process: WorkerProcess, spec: PreprocessingSpec) -> _Buffer:
        """Return a buffer with room for the planes of any image, which is no longer among the free ones."""
        size = math.prod(spec.tensor_shape) * np.dtype(np.uint16).itemsize
        while self._free:
            buffer = self._free.popleft()
            if size <= buffer.segment.size <= max(_LEAST_INPUT_BYTES, 2 * size):
                return buffer
            # For another network.
            self._buffers.remove(buffer)
            buffer.segment.close()
        numbers = {buffer.number for buffer in self._buffers}
        number = next((number for number in range(_MOST_BUFFERS) if number not in numbers), None)
        if number is None:
            raise self._unavailable(f'has no buffer left: {_MOST_BUFFERS} images were not released.')
        buffer = _Buffer(number, SharedTensors.create(size, writable=False), self._free)
        process.send_segment(MapBuffer(number), buffer.segment)
        self._buffers.append(buffer)
        return buffer

    def _receive(self, process: WorkerProcess, deadline: float) -> Decoded | Copied | Refused:
        """Return the reply of the process to the current request."""
        for _ in range(_MOST_MESSAGES):
            message = process.receive(deadline)
            if message is None:
                raise TimeoutError(f'{self._name} took more than {self._timeout_s:g} s for an image.')
            if isinstance(message, (Decoded, Copied, Refused)) and message.number == self._number:
                return message
        raise InferenceError(f'{self._name} sent replies that belong to no image.')

    def _copy_pixels(self, process: WorkerProcess, answer: Decoded, deadline: float) -> NDArray:
        layout = TensorLayout.single('pixels', answer.dtype, answer.shape)
        segment = SharedTensors.create(layout.size, writable=False)
        try:
            process.send(CopyPixels(self._number), [segment.descriptor], block=False)
            if not isinstance(self._receive(process, deadline), Copied):
                raise InferenceError(f'{self._name} did not hand over its pixels.')
            array = segment.arrays(layout)['pixels'].copy()
        finally:
            segment.close()
        array.setflags(write=False)
        return array

    def _running(self) -> WorkerProcess:
        """Return the process; start another where the last one is gone and the pause is over."""
        if self._closed:
            raise self._unavailable('is closed.')
        if self._process is not None and not self._process.alive:
            self._replace(f'{self._name} ended while it was idle.')
        if self._process is None:
            left_s = self._backoff.left_s(self._name)
            if left_s:
                raise self._unavailable(f'starts again in {left_s:.1f} s. {self._cause}')
            self._start()
        if self._process is None:
            raise ImageRejectedError('decoder', self._cause)
        return self._process

    def _start(self) -> None:
        """Start a process in the background, unless the decoder is closed."""
        if self._closed:
            return
        self._backoff.may_begin(self._name)
        try:
            self._process = WorkerProcess.start(self._name, DECODER_PROTOCOL, ('--memory', str(self._memory_bytes)))
        except C7Error as error:
            _log.warning('%s cannot start: %s', self._name, error)
            self._pause(f'{self._name} cannot start: {error}')

    def _replace(self, cause: str) -> None:
        """End the process, and start another: at once, or later where it decoded nothing and one failed recently."""
        useful = self._useful
        self._end()
        if self._closed:
            return
        first = useful or time.monotonic() - self._failed_at > _PAUSE_S[1]
        self._failed_at = time.monotonic()
        if (more := self._limiter.pass_now('replaced')) is not None:
            _log.warning('%s It is started again%s.%s', cause, '' if first else ' after a pause', more)
        if first:
            self._cause = cause
            self._start()
        else:
            self._pause(cause)

    def _pause(self, cause: str) -> None:
        self._cause = cause
        self._backoff.begin(self._name, _PAUSE_S)

    def _end(self) -> None:
        """End the process, and forget every segment: until it is gone it may still write to them."""
        self._count_cpu()
        process, self._process, self._spec, self._useful = self._process, None, None, False
        self._ended_cpu_ns = self._cpu_ns
        if process is not None:
            process.release()
        self._drop_input()
        for buffer in self._buffers:
            buffer.segment.close()
        self._buffers, self._free = [], deque()

    def _drop_input(self) -> None:
        self._data = None
        if self._input is not None:
            self._input.close()
        self._input = None

    def _count_cpu(self) -> int:
        """Bring the CPU time up to date, and return it."""
        process = self._process
        if process is not None and process.alive:
            try:
                # The CPU clock of another process: clock_getcpuclockid(3), MAKE_PROCESS_CPUCLOCK of Linux.
                used_ns = time.clock_gettime_ns((~process.pid << 3) | 2)
            except OSError:
                # It has ended meanwhile.
                used_ns = 0
            self._cpu_ns = max(self._cpu_ns, self._ended_cpu_ns + used_ns)
        return self._cpu_ns

    def _unavailable(self, what: str) -> ImageRejectedError:
        return ImageRejectedError('decoder', f'{self._name} {what}')
