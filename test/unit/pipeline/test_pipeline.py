"""N-3: a frame that leaves its slot is answered once, refused, or counted as unanswered; F-2, F-7 below it."""

import dataclasses
import threading
import time
import weakref

import numpy as np
import pytest

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import ImageRejectedError, InferenceError
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.in_process import SynchronousHost
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.failover.status import ChainState
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.pipeline.mailbox import Frame, FrameSlots, PreparedImage
from gps_denied_c7.pipeline.pipeline import FramePipeline, InferenceThread, ServedModel
from gps_denied_c7.runtimes.protocol import EngineFacts, ProviderSet
from gps_denied_c7.tensors import TensorSpec

SPEC = TensorSpec('image', 'float32', (None, 1, 4, 6))
GPU, CPU = Rung('onnx_trt_ep', ProviderSet.GPU), Rung('onnx_trt_ep', ProviderSet.CPU)


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class CopyingHost(SynchronousHost):
    """Stand in for an engine: answers its input, or does what the test says for a rung."""

    inputs = outputs = (TensorSpec('image', 'float32', (1, 1, 4, 6)),)

    def __init__(self, rung, acts):
        self.rung, self.acts = rung, acts

    def load(self):
        return EngineFacts(f'{self.rung.name} provider', ('x',), self.rung is CPU, 0, (), 0.0)

    def infer(self, inputs):
        self.acts.get(self.rung, lambda: None)()
        return {'image': inputs['image'].copy()}

    def release(self):
        pass


class Bench:
    """The real slots, thread, pipeline, pre-processing and chain around fake hosts."""

    def __init__(self, topics=('/a', '/b'), too_old=lambda frame: False, shed=lambda frame: False):
        self.acts, self.records, self.results, self.refused, self.unanswered = {}, [], [], [], []
        self.decode = lambda message: Pixels(np.full((4, 6), message, np.uint8), 'gray')
        self.statistics = Statistics()
        self.statistics.open_streams(topics)
        bundle = ModelBundle(name='net', root='/', weights_digest='sha256:' + '0' * 64, inputs=(), outputs=())
        self.chain = RuntimeChain(
            bundle,
            C7InferenceConfig(isolation='none'),
            lambda rung: CopyingHost(rung, self.acts),
            emit=lambda kind, **payload: self.records.append((kind, payload)),
            rungs=(GPU, CPU),
        )
        self.chain.load()
        self.slots = FrameSlots(topics, on_replaced=lambda frame: self.statistics.count(frame.topic, 'replaced'))
        preprocessor = Preprocessor(PreprocessingSpec(width=6, height=4, colour='gray', scale=1.0))
        self.pipeline = FramePipeline(
            ServedModel(bundle, self.chain, preprocessor, SPEC),
            decode=lambda message: self.decode(message),
            publish=self.publish,
            on_refused=lambda frame, error: self.refused.append((frame, error)),
            on_unanswered=lambda frame, error: self.unanswered.append((frame, error)),
            statistics=self.statistics,
        )
        self.thread = InferenceThread(
            self.slots, self.pipeline, too_old=too_old, shed=shed, statistics=self.statistics
        )

    def publish(self, result):
        # Outputs are valid until the chain's next call only.
        self.results.append((result, result.answer.outputs['image'].copy()))

    def frame(self, message=1, topic='/a'):
        return Frame(topic, message, received_ns=time.monotonic_ns(), receive_stamp_ns=5)

    def counters(self, topic='/a'):
        return self.statistics.snapshot().streams[topic]


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.thread.stop(10.0)


def test_a_frame_becomes_a_result_that_says_how_it_was_made(bench):
    frame = bench.frame(7)
    bench.pipeline.process(frame)
    ((result, output),) = bench.results
    assert result.frame is frame and result.frame_seq == 0 and result.source_size == (6, 4)
    np.testing.assert_array_equal(output, np.full((1, 1, 4, 6), 7, np.float32))
    np.testing.assert_array_equal(result.network_to_image, [[1, 0, 0], [0, 1, 0]])
    assert (result.answer.runtime_label, result.answer.active_provider) == ('onnx_trt_ep', 'onnx_trt_ep/gpu provider')
    assert set(result.durations_ns) == {'queue', 'decode', 'preprocess', 'hand_off', 'engine', 'hand_back'}
    assert all(duration >= 0 for duration in result.durations_ns.values())
    assert set(bench.statistics.snapshot().stages) == {
        'queue', 'decode', 'preprocess', 'hand_off', 'engine', 'hand_back', 'publish', 'total',
    }  # fmt: skip


@pytest.mark.parametrize(
    ('tell', 'told'),
    [
        (lambda began, ended: (began, ended), {'hand_off', 'engine', 'hand_back'}),
        (lambda began, ended: (0, 0), {'hand_back'}),
        (lambda began, ended: (0, 2**64 - 1), {'engine'}),
        (lambda began, ended: (ended, began), {'hand_off', 'hand_back'}),
        (lambda began, ended: (2**64 - 1, 0), {'hand_off'}),
        (lambda began, ended: (-1, 10**400), {'engine'}),
    ],
    ids=['truth', 'nothing', 'everything', 'backwards', 'never', 'no clock'],
)
def test_stages_of_an_inference_add_up_whatever_a_worker_tells(bench, monkeypatch, tell, told):
    def infer(host, inputs):
        time.sleep(0.002)
        began = time.monotonic_ns()
        time.sleep(0.002)
        host.ran_ns = tell(began, time.monotonic_ns())
        time.sleep(0.002)
        return {'image': inputs['image'].copy()}

    monkeypatch.setattr(CopyingHost, 'infer', infer)
    started = time.monotonic_ns()
    bench.pipeline.process(bench.frame())
    elapsed = time.monotonic_ns() - started
    ((result, _),) = bench.results
    stages = {stage: result.durations_ns[stage] for stage in ('hand_off', 'engine', 'hand_back')}
    assert 6_000_000 <= sum(stages.values()) <= elapsed
    assert {stage for stage, duration in stages.items() if duration >= 2_000_000} == told
    assert all(duration >= 0 for duration in stages.values())


def test_the_matrix_is_that_of_the_image_that_was_answered(bench):
    bench.decode = lambda message: Pixels(np.zeros((8, 24), np.uint8), 'gray')
    bench.pipeline.process(bench.frame())
    assert bench.results[0][0].source_size == (24, 8)
    np.testing.assert_allclose(bench.results[0][0].network_to_image, [[4, 0, 1.5], [0, 2, 0.5]])


def test_topics_are_numbered_apart_and_without_gap(bench):
    for topic in ('/a', '/b', '/a', '/a', '/b'):
        bench.pipeline.process(bench.frame(topic=topic))
    assert [(result.frame.topic, result.frame_seq) for result, _ in bench.results] == [
        ('/a', 0), ('/b', 0), ('/a', 1), ('/a', 2), ('/b', 1),
    ]  # fmt: skip


def test_an_image_that_cannot_be_decoded_is_refused_and_takes_no_number(bench):
    good, bench.decode = bench.decode, None

    def decode(message):
        if message == 2:
            raise ImageRejectedError('data', 'damaged.')
        return good(message)

    bench.decode = decode
    for message in (1, 2, 3):
        bench.pipeline.process(bench.frame(message))
    assert [result.frame_seq for result, _ in bench.results] == [0, 1]
    ((frame, error),) = bench.refused
    assert (frame.message, error.reason) == (2, 'data')
    assert (bench.counters().accepted, bench.counters().answered, bench.counters().unanswered) == (2, 2, 0)


def test_an_image_that_the_pre_processing_refuses_is_refused(bench, monkeypatch):
    def refuse(pixels, out):
        raise ImageRejectedError('size', 'too small.')

    monkeypatch.setattr(bench.pipeline._model.preprocessor, 'run', refuse)
    bench.pipeline.process(bench.frame())
    assert [error.reason for _, error in bench.refused] == ['size']
    assert (bench.results, bench.counters().accepted) == ([], 0)


@pytest.mark.parametrize('where', ['decode', 'publish'])
def test_a_fault_of_our_own_leaves_a_counted_gap_in_the_numbering(bench, where):
    good = getattr(bench, where)

    def broken(*args):
        raise MemoryError('of our own')

    bench.pipeline.process(bench.frame(1))
    setattr(bench, where, broken)
    bench.pipeline._publish = bench.publish
    bench.pipeline.process(bench.frame(2))
    setattr(bench, where, good)
    bench.pipeline._publish = bench.publish
    bench.pipeline.process(bench.frame(3))
    assert [result.frame_seq for result, _ in bench.results] == [0, 2]
    ((frame, error),) = bench.unanswered
    assert frame.message == 2 and isinstance(error, MemoryError)
    assert (bench.counters().accepted, bench.counters().answered, bench.counters().unanswered) == (3, 2, 1)


def test_f2_a_frame_that_a_rung_fails_is_answered_by_the_next(bench):
    def fail():
        raise InferenceError('lost')

    bench.pipeline.process(bench.frame(1))
    bench.acts[GPU] = fail
    bench.pipeline.process(bench.frame(2))
    bench.pipeline.process(bench.frame(3))
    providers = [result.answer.active_provider for result, _ in bench.results]
    assert providers == ['onnx_trt_ep/gpu provider', 'onnx_trt_ep/cpu provider', 'onnx_trt_ep/cpu provider']
    assert [result.frame_seq for result, _ in bench.results] == [0, 1, 2]
    assert [output.flat[0] for _, output in bench.results] == [1, 2, 3]
    assert bench.unanswered == []


def test_f7_frames_that_no_rung_answers_are_counted_each(bench):
    def fail():
        raise InferenceError('lost')

    bench.acts |= {GPU: fail, CPU: fail}
    for message in range(5):
        bench.pipeline.process(bench.frame(message))
    assert bench.results == []
    assert [frame.message for frame, _ in bench.unanswered] == list(range(5))
    assert (bench.counters().accepted, bench.counters().unanswered) == (5, 5)


def test_the_thread_answers_what_is_put_and_finishes_the_frame_in_hand(bench):
    entered, leave = threading.Event(), threading.Event()

    def wait():
        entered.set()
        assert leave.wait(30)

    bench.thread.start()
    bench.acts[GPU] = wait
    bench.slots.put(bench.frame(1))
    assert entered.wait(30)
    bench.slots.put(bench.frame(2))
    bench.slots.put(bench.frame(3, topic='/b'))
    stopped = []
    stopping = threading.Thread(target=lambda: stopped.append(bench.thread.stop(30.0)))
    stopping.start()
    wait_until(lambda: bench.counters('/a').closed + bench.counters('/b').closed == 2)
    leave.set()
    stopping.join()
    assert stopped == [True]
    assert [result.frame.message for result, _ in bench.results] == [1]
    assert bench.slots.put(bench.frame(4)) is False


def test_an_image_is_let_go_of_once_it_is_answered(bench):
    """Its megabytes are the next one's then, instead of twice as many for each camera."""

    class Message:
        pass

    bench.decode = lambda message: Pixels(np.zeros((4, 6), np.uint8), 'gray')
    bench.pipeline._publish = lambda result: None
    message = Message()
    kept, take, looks = weakref.ref(message), bench.slots.take, []

    def look_and_take(timeout_s):
        looks.append((bench.counters().answered, kept() is None))
        return take(timeout_s)

    bench.slots.take = look_and_take
    bench.slots.put(bench.frame(message))
    del message
    bench.thread.start()
    wait_until(lambda: (1, True) in looks or (1, False) in looks)
    assert (1, False) not in looks


def test_a_frame_in_hand_that_never_returns_is_left_behind(bench):
    entered, leave = threading.Event(), threading.Event()

    def hang():
        entered.set()
        leave.wait(60)

    bench.acts[GPU] = hang
    bench.thread.start()
    bench.slots.put(bench.frame(1))
    assert entered.wait(30)
    assert bench.thread.stop(0.05) is False
    leave.set()
    assert bench.thread.stop(30.0) is True


def test_a_thread_that_was_never_started_stops_too(bench):
    bench.slots.put(bench.frame(1))
    assert bench.thread.stop(1.0) is True
    assert bench.counters().closed == 1


def test_frames_too_old_are_dropped_before_they_are_accepted():
    bench = Bench(too_old=lambda frame: frame.message == 2)
    bench.thread.start()
    for message in (1, 2, 3):
        bench.slots.put(bench.frame(message))
        wait_until(lambda message=message: bench.counters().answered + bench.counters().too_old == message)
    assert bench.thread.stop(10.0)
    assert [result.frame.message for result, _ in bench.results] == [1, 3]
    assert [result.frame_seq for result, _ in bench.results] == [0, 1]
    assert (bench.counters().too_old, bench.counters().accepted) == (1, 2)


def test_frames_shed_because_of_heat_are_a_class_of_their_own():
    """§7."""
    bench = Bench(shed=lambda frame: frame.message == 2, too_old=lambda frame: frame.message == 3)
    bench.thread.start()
    for message in (1, 2, 3, 4):
        bench.slots.put(bench.frame(message))
        wait_until(lambda message=message: bench.counters().answered + bench.counters().dropped_by_policy == message)
    assert [result.frame.message for result, _ in bench.results] == [1, 4]
    assert (bench.counters().shed, bench.counters().too_old, bench.counters().answered) == (1, 1, 2)
    assert bench.thread.stop(10.0)


def test_the_thread_outlives_whatever_it_meets(bench, caplog):
    bench.thread.start()
    original = bench.pipeline.process

    def broken(frame):
        raise RuntimeError('not even the pipeline expected this')

    bench.pipeline.process = broken
    bench.slots.put(bench.frame(1))
    wait_until(lambda: 'goes on' in caplog.text)
    bench.pipeline.process = original
    bench.slots.put(bench.frame(2))
    wait_until(lambda: bench.results)
    assert bench.results[0][0].frame.message == 2


def test_f7_an_exhausted_chain_is_tried_again_while_no_frame_comes(bench):
    def fail():
        raise InferenceError('lost')

    bench.acts |= {GPU: fail, CPU: fail}
    bench.thread.start()
    bench.slots.put(bench.frame(1))
    wait_until(lambda: bench.chain.status().state is ChainState.EXHAUSTED)
    bench.acts.clear()
    wait_until(lambda: bench.chain.status().state is ChainState.READY)
    bench.slots.put(bench.frame(2))
    wait_until(lambda: bench.results)
    assert [result.frame_seq for result, _ in bench.results] == [1]


def test_everything_that_was_put_is_accounted_for():
    """Four cameras as fast as they can: answered, replaced, dropped as too old, or waiting at the end."""
    topics = ('/a', '/b', '/c', '/d')
    bench = Bench(topics, too_old=lambda frame: frame.message % 7 == 0)
    bench.thread.start()

    def camera(topic):
        for message in range(1, 200):
            bench.slots.put(bench.frame(message, topic))

    cameras = [threading.Thread(target=camera, args=(topic,)) for topic in topics]
    for each in cameras:
        each.start()
    for each in cameras:
        each.join()
    assert bench.thread.stop(30.0)
    for topic in topics:
        counted = bench.counters(topic)
        assert counted.answered + counted.dropped_by_policy == 199
        assert counted.accepted == counted.answered
        results = [result for result, _ in bench.results if result.frame.topic == topic]
        assert [result.frame_seq for result in results] == list(range(counted.answered))
        messages = [result.frame.message for result in results]
        assert messages == sorted(messages) and not any(message % 7 == 0 for message in messages)
    for result, output in bench.results:
        assert output.flat[0] == result.frame.message


def prepared(bench, value, spec, *, again=None, decoding_ns=None):
    """Return what a decoder beside the thread makes of a grey image, and how often it was given back."""
    released = []
    picture = Pixels(np.full((4, 6), value, np.uint8), 'gray')
    planes = np.stack(Preprocessor(spec).resize(picture))

    def release():
        released.append(1)
        planes[...] = 255

    now = time.monotonic_ns()
    ready = PreparedImage(spec, (60, 40), planes, picture, decoding_ns or (now, now), release, again)
    return ready, released


def test_a_frame_that_comes_decoded_is_answered_from_what_was_made_of_it(bench):
    bench.decode = lambda message: pytest.fail('decoded once more')
    received = time.monotonic_ns() - 100_000_000
    ready, released = prepared(
        bench, 9, bench.pipeline.preprocessing, decoding_ns=(received + 20_000_000, received + 70_000_000)
    )
    bench.pipeline.process(Frame('/a', 'message', received, 5, ready))
    ((result, output),) = bench.results
    np.testing.assert_array_equal(output, np.full((1, 1, 4, 6), 9, np.float32))
    assert result.source_size == (60, 40) and released
    np.testing.assert_array_equal(result.network_to_image, Preprocessor(ready.spec).network_to_image(60, 40))
    durations = result.durations_ns
    assert durations['decode'] == 50_000_000
    assert durations['queue'] >= 20_000_000 + 30_000_000
    stages = bench.statistics.snapshot().stages
    assert sum(stages[stage].p50 for stage in stages if stage != 'total') == pytest.approx(stages['total'].p50)


def test_a_frame_that_was_made_for_the_model_before_is_made_anew(bench):
    """A swap between decoding and inference: no answer with the wrong pre-processing, and no frame lost."""
    spec = bench.pipeline.preprocessing
    before, released_before = prepared(bench, 200, spec.replace(mean=(50.0,)), again=lambda asked: made(asked))
    after = []

    def made(asked):
        assert released_before, 'its buffer may be the one that is needed'
        after.append(prepared(bench, 200, asked))
        time.sleep(0.003)
        return after[-1][0]

    frame = Frame('/a', 'message', time.monotonic_ns(), 5, before)
    bench.pipeline.process(frame)
    ((result, output),) = bench.results
    np.testing.assert_array_equal(output, np.full((1, 1, 4, 6), 200, np.float32))
    assert after[0][1], 'given back'
    assert result.durations_ns['decode'] >= 3_000_000
    stages = bench.statistics.snapshot().stages
    assert sum(stages[stage].p50 for stage in stages if stage != 'total') == pytest.approx(stages['total'].p50)


def test_a_frame_that_cannot_be_made_anew_is_refused(bench):
    def refuse(asked):
        raise ImageRejectedError('decode_time', 'late.')

    ready, released = prepared(bench, 1, bench.pipeline.preprocessing.replace(mean=(50.0,)), again=refuse)
    frame = Frame('/a', 'message', time.monotonic_ns(), 5, ready)
    bench.pipeline.process(frame)
    assert [error.reason for _, error in bench.refused] == ['decode_time']
    assert bench.results == [] and released


@pytest.mark.parametrize('drop', ['too_old', 'replaced', 'closed', 'unanswered', 'shed'])
def test_what_was_made_of_a_frame_is_given_back_whatever_becomes_of_it(drop):
    bench = Bench(too_old=lambda frame: drop == 'too_old', shed=lambda frame: drop == 'shed')
    if drop == 'unanswered':
        bench.acts[GPU] = bench.acts[CPU] = lambda: (_ for _ in ()).throw(InferenceError('no'))
    released = []
    for number in range(2):
        ready, given_back = prepared(bench, number, bench.pipeline.preprocessing)
        released.append(given_back)
        bench.slots.put(Frame('/a', 'message', time.monotonic_ns(), 5, ready))
    if drop != 'closed':
        bench.thread.start()
        wait_until(lambda: len(released[1]) > 0)
    bench.thread.stop(10.0)
    assert all(released)
    counted = bench.counters()
    assert counted.replaced == 1
    # What heat leaves out of it has been left out before it was decoded.
    assert counted.shed == 0
    if drop in ('too_old', 'closed', 'unanswered'):
        assert getattr(counted, drop) == 1


def test_time_for_an_image_in_this_thread_is_charged_to_its_topic():
    charged = []
    bench = Bench()
    bench.pipeline._charge = lambda topic, cost_ns: charged.append((topic, cost_ns))
    bench.pipeline.process(bench.frame(7, '/b'))

    def refuse(message):
        raise ImageRejectedError('data', 'no')

    bench.decode = refuse
    bench.pipeline.process(bench.frame(7, '/a'))
    ready, _ = prepared(bench, 9, bench.pipeline.preprocessing)
    bench.pipeline.process(Frame('/a', 'message', time.monotonic_ns(), 5, ready))
    assert [topic for topic, _ in charged] == ['/b', '/a'], 'a refused one too; not what another thread has made'
    assert all(cost_ns > 0 for _, cost_ns in charged)


def test_pixels_of_frames_that_come_decoded_go_to_who_waits_for_them(bench):
    taken = []
    taker = threading.Thread(target=lambda: taken.append(bench.pipeline.answered.take(30.0)))
    taker.start()
    wait_until(lambda: bench.pipeline.answered.wanted)
    ready, _ = prepared(bench, 9, bench.pipeline.preprocessing)
    without = dataclasses.replace(ready, pixels=None)
    for image in (without, ready):
        assert bench.pipeline.answered.wanted
        bench.pipeline.process(Frame('/a', 'message', time.monotonic_ns(), 5, image))
    taker.join(30.0)
    np.testing.assert_array_equal(taken[0].array, ready.pixels.array)
    assert not bench.pipeline.answered.wanted
