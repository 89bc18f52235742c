"""N-3 for images that are decoded beside the inference thread: each answered, refused or counted, none kept."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.pipeline.decode_thread import DecodeThread, LocalDecoder
from gps_denied_c7.pipeline.mailbox import Frame, FrameSlots

TOPIC = '/camera/compressed'
SPEC = PreprocessingSpec(width=6, height=4, colour='gray', scale=1.0)
OTHER = PreprocessingSpec(width=6, height=4, colour='gray', scale=1.0, mean=(100.0,))


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def filled(image, spec=None):
    """The network's input that is made of what a decoder gave."""
    spec = spec or image.spec
    tensor = np.empty(spec.tensor_shape, spec.dtype)
    Preprocessor(spec).fill(image.planes, *image.size, tensor)
    return tensor


class Decoder:
    """A decoder with the three buffers of the real one; a message is a grey value, or an error to be raised."""

    def __init__(self):
        self.cpu_ns, self.closed = 0, threading.Event()
        self.lent, self.decoded, self.gate = [], [], threading.Event()
        self.gate.set()
        self.takes_s = 0.0
        self.at_once = threading.Semaphore(1)

    def decode(self, message, spec, *, pixels):
        assert self.at_once.acquire(blocking=False), 'from one thread at a time'
        try:
            self.decoded.append(message)
            while not self.gate.wait(0.001):
                if self.closed.is_set():
                    raise ImageRejectedError('decoder', 'closed.')
            if self.closed.is_set():
                raise ImageRejectedError('decoder', 'closed.')
            time.sleep(self.takes_s)
            self.cpu_ns += 1000
            if isinstance(message, Exception):
                raise message
            assert len(self.lent) < 3, 'all buffers are lent'
            picture = Pixels(np.full((4, 6), message, np.uint8), 'gray')
            planes = np.stack(Preprocessor(spec).resize(picture))
            token = object()
            self.lent.append(token)

            def release():
                if token in self.lent:
                    self.lent.remove(token)
                    planes[...] = 255

            return SimpleNamespace(
                size=(6, 4), planes=planes, pixels=picture if pixels else None, release=release,
                oddities=('no_end_mark',) if message == 13 else (),
            )  # fmt: skip
        finally:
            self.at_once.release()

    def close(self):
        self.closed.set()


class Bench:
    def __init__(self):
        self.decoder, self.statistics = Decoder(), Statistics()
        self.statistics.open_streams((TOPIC,))
        self.refused, self.charged, self.spec, self.wanted, self.hot = [], [], SPEC, False, False
        self.slots = FrameSlots([TOPIC], on_replaced=lambda frame: self.statistics.count(TOPIC, 'replaced'))
        self.thread = DecodeThread(
            TOPIC,
            self.decoder,
            slots=self.slots,
            spec=lambda: self.spec,
            pixels_wanted=lambda: self.wanted,
            charge=lambda topic, cost_ns: self.charged.append(cost_ns),
            shed=lambda frame: self.hot,
            on_refused=self.refuse,
            statistics=self.statistics,
        )
        self.thread.start()

    def refuse(self, topic, error):
        self.statistics.refuse(topic, error.reason)
        self.refused.append(error)

    def send(self, message):
        self.statistics.count(TOPIC, 'received')
        if not self.thread.slots.put(Frame(TOPIC, message, time.monotonic_ns(), 0)):
            self.statistics.count(TOPIC, 'closed')

    def take(self):
        frame = self.slots.take(30.0)
        assert frame is not None
        return frame

    def counted(self):
        return self.statistics.snapshot().streams[TOPIC]


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.thread.close()
    assert made.thread.join(30.0)


def test_an_image_comes_to_the_inference_thread_ready_for_the_network(bench):
    bench.wanted = True
    bench.send(7)
    frame = bench.take()
    np.testing.assert_array_equal(filled(frame.prepared), np.full((1, 1, 4, 6), 7, np.float32))
    assert (frame.message, frame.prepared.spec, frame.prepared.size) == (7, SPEC, (6, 4))
    np.testing.assert_array_equal(frame.prepared.pixels.array, np.full((4, 6), 7, np.uint8))
    began, ended = frame.prepared.decoding_ns
    assert frame.received_ns <= began <= ended <= time.monotonic_ns()
    frame.release()
    frame.release()
    assert bench.decoder.lent == []


def test_the_newest_wins_before_and_after_decoding_and_what_is_replaced_is_given_back(bench):
    bench.send(1)
    wait_until(lambda: bench.slots.has(TOPIC))
    bench.decoder.gate.clear()
    for number in range(2, 10):
        bench.send(number)
        wait_until(lambda: len(bench.decoder.decoded) == 2)
    bench.decoder.gate.set()
    wait_until(lambda: bench.counted().replaced == 8)
    frame = bench.take()
    assert (frame.message, bench.decoder.decoded) == (9, [1, 2, 9])
    assert len(bench.decoder.lent) == 1
    frame.release()
    assert bench.decoder.lent == []


def test_images_faster_than_the_network_never_run_out_of_buffers(bench):
    for number in range(200):
        bench.send(number)
        if number % 7 == 0:
            bench.take().release()
    wait_until(lambda: bench.decoder.decoded[-1] == 199 and bench.slots.has(TOPIC))
    assert bench.refused == []
    bench.take().release()


@pytest.mark.parametrize('error', [ImageRejectedError('decode_time', 'late.'), RuntimeError('a fault of the client')])
def test_an_image_that_cannot_be_decoded_is_refused_and_costs_no_other(bench, error):
    for number in range(3):
        bench.send(error)
        wait_until(lambda number=number: len(bench.refused) == number + 1)
        bench.send(number)
        bench.take().release()
    assert {refusal.reason for refusal in bench.refused} == {getattr(error, 'reason', 'decoder')}
    assert sum(bench.counted().refused.values()) == 3
    # The first may have come with the decoder's start.
    assert bench.charged == [1000] * 5, 'what is refused is charged too'


def test_faults_that_a_decoder_tolerates_are_counted_and_answered(bench):
    for message in (13, 14, 13):
        bench.send(message)
        assert bench.take().message == message
    assert bench.counted().odd == {'no_end_mark': 2}


def test_heat_leaves_images_out_before_they_cost_anything(bench):
    bench.hot = True
    bench.send(1)
    wait_until(lambda: bench.counted().shed == 1)
    assert bench.decoder.decoded == []


def test_an_image_made_for_another_model_is_made_anew_though_others_never_pause(bench):
    """By the inference thread, and before the next: a lock would leave it waiting."""
    bench.send(40)
    frame = bench.take()
    stop = threading.Event()

    def never_pause():
        number = 0
        while not stop.is_set():
            number += 1
            bench.send(number % 200)

    camera = threading.Thread(target=never_pause)
    camera.start()
    try:
        overtook = []
        bench.decoder.takes_s = 0.002
        wait_until(lambda: len(bench.decoder.decoded) > 3)
        for _ in range(30):
            frame.release()
            decoded = len(bench.decoder.decoded)
            again = frame.prepared.again(OTHER)
            overtook.append(len(bench.decoder.decoded) - decoded - 1)
            np.testing.assert_array_equal(filled(again), np.full((1, 1, 4, 6), -60, np.float32))
            assert again.spec == OTHER
            again.release()
        # One may have begun just before; now and then the test itself is held up there.
        assert sorted(overtook)[24] <= 1, overtook
    finally:
        stop.set()
        camera.join()


def test_every_image_is_accounted_for_when_a_hung_decoder_is_closed(bench):
    bench.send(1)
    wait_until(lambda: bench.slots.has(TOPIC))
    bench.decoder.gate.clear()
    bench.send(2)
    wait_until(lambda: bench.decoder.decoded == [1, 2])
    bench.send(3)
    bench.thread.close()
    assert bench.thread.join(30.0)
    bench.send(4)
    counted = bench.counted()
    assert (counted.received, counted.closed, bench.refused) == (4, 3, [])
    assert [frame.message for frame in bench.slots.close()] == [1]
    assert bench.decoder.lent == []


def test_what_is_decoded_after_the_slots_were_closed_is_given_back(bench):
    bench.decoder.gate.clear()
    bench.send(1)
    wait_until(lambda: bench.decoder.decoded == [1])
    bench.slots.close()
    bench.decoder.gate.set()
    wait_until(lambda: bench.counted().closed == 1)
    assert bench.decoder.lent == []


def test_a_local_decoder_gives_what_decoding_and_preprocessing_give():
    picture = np.arange(12 * 8, dtype=np.uint8).reshape(8, 12)
    decoder = LocalDecoder(lambda message: Pixels(picture, 'gray'))
    for spec in (SPEC, OTHER, dataclasses.replace(SPEC, layout='nhwc')):
        expected = np.empty(spec.tensor_shape, spec.dtype)
        Preprocessor(spec).run(Pixels(picture, 'gray'), expected)
        before = decoder.cpu_ns
        decoded = decoder.decode('message', spec, pixels=True)
        np.testing.assert_array_equal(filled(decoded, spec), expected)
        assert decoded.size == (12, 8) and decoder.cpu_ns > before
        assert not np.shares_memory(decoded.pixels.array, picture)
