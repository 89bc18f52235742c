"""N-10: another model takes over while frames are answered; what fails leaves the old one as it was."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error, ConfigError, EngineDeserializeError, InferenceError
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.in_process import SynchronousHost
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.pipeline.mailbox import Frame, FrameSlots
from gps_denied_c7.pipeline.model_fit import fit_model
from gps_denied_c7.pipeline.model_swap import ModelSwapper, SwapPhase
from gps_denied_c7.pipeline.pipeline import FramePipeline, InferenceThread
from gps_denied_c7.runtimes.protocol import EngineFacts, ProviderSet
from gps_denied_c7.tensors import TensorSpec, noise_inputs

TOPIC = '/a'
CPU = Rung('onnx_trt_ep', ProviderSet.CPU)
FITTING = (TensorSpec('image', 'float32', (1, 1, 4, 6)),)


def wait_until(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class FakeHost(SynchronousHost):
    """Stand in for an engine: answers its input, counts what it does, and fails where the test says."""

    def __init__(self, script):
        self.script = script
        self.inputs = self.outputs = script.inputs
        self.killed = threading.Event()
        self.alive_engine = False
        script.hosts.append(self)

    def load(self):
        self.script.loading.set()
        self.script.on_load(self)
        self.alive_engine = True
        return EngineFacts('cpu provider', ('cpu provider',), True, 0, (), 0.0)

    def infer(self, inputs):
        self.script.requests += 1
        self.script.on_infer(inputs)
        return {'image': inputs['image'].copy()}

    def kill(self):
        self.killed.set()

    def release(self):
        self.alive_engine = False


class Script:
    """What the engines of one model do, and what they did."""

    def __init__(self):
        self.inputs, self.hosts, self.requests, self.loading = FITTING, [], 0, threading.Event()
        self.on_load = lambda host: None
        self.on_infer = lambda inputs: None

    @property
    def loaded(self):
        return sum(host.alive_engine for host in self.hosts)


class Bench:
    """The real slots, thread, pipeline, pre-processing and chains around fake engines; it owns the swaps."""

    def __init__(self, tmp_path):
        self.directory = tmp_path
        self.scripts, self.records, self.results = {}, [], []
        self.statuses, self.kept, self.parameter = [], [], None
        self.on_accept = lambda path: True
        self.before_publish = lambda: None
        self.on_status = lambda status: None
        self.statistics = Statistics()
        self.statistics.open_streams((TOPIC,))
        bundle = ModelBundle.load(self.model('old'))
        chain = self.make_chain(bundle, self)
        chain.load()
        self.served = fit_model(bundle, chain, self)
        self.old = self.served
        self.slots = FrameSlots((TOPIC,), on_replaced=lambda frame: self.statistics.count(TOPIC, 'replaced'))
        self.pipeline = FramePipeline(
            self.served,
            decode=lambda message: Pixels(np.full((4, 6), message % 256, np.uint8), 'gray'),
            publish=self.publish,
            on_refused=lambda frame, error: self.results.append(error),
            on_unanswered=lambda frame, error: self.results.append(error),
            statistics=self.statistics,
        )
        self.thread = InferenceThread(
            self.slots, self.pipeline, too_old=lambda frame: False, shed=lambda frame: False, statistics=self.statistics
        )
        self.swapper = ModelSwapper(self.served, self.thread, self, self, no_frame_s=0.2)
        self.thread.start()
        self.sent = 0
        self.flowing = threading.Event()
        self.ended = threading.Event()
        self.camera = threading.Thread(target=self.fly, daemon=True)
        self.camera.start()

    output_tensors = allow_non_finite = ()
    preprocessing = {}

    def preprocessing_for(self, spec):
        """Change nothing."""
        return spec

    def model(self, name):
        """Write a model file, whose bytes are its weights, and return its path."""
        path = self.directory / f'{name}.onnx'
        path.write_bytes(name.encode())
        self.scripts.setdefault(name, Script())
        return str(path)

    def fly(self):
        while not self.ended.is_set():
            if self.flowing.wait(0.01):
                self.put()
                time.sleep(0.001)

    def put(self):
        self.sent += 1
        self.slots.put(Frame(TOPIC, self.sent, time.monotonic_ns(), 0))

    def publish(self, result):
        self.before_publish()
        self.results.append((result.frame.message, result.frame_seq, result.answer.model_name))

    def swap(self, name):
        self.swapper.begin(self.model(name), self)
        return self.outcome()

    def outcome(self):
        """Wait until no swap is under way, and return the last record of one."""
        wait_until(lambda: self.swapper._swap is None)
        return self.swaps()[-1]

    def swaps(self):
        return [payload for kind, payload in self.records if kind == 'c7.model_swapped']

    def phases(self):
        return [status.phase for status in self.statuses]

    def answered_by(self, name, count=3):
        """Wait until ``name`` has answered ``count`` more frames."""
        start = len(self.results)
        self.flowing.set()
        wait_until(lambda: [result[2] for result in self.results[start:]].count(name) >= count)

    def assert_nothing_lost(self):
        """Every frame that was accepted was answered once, in order, and numbered without gap."""
        self.flowing.clear()
        counted = lambda: self.statistics.snapshot().streams[TOPIC]  # noqa: E731
        wait_until(lambda: counted().answered + counted().replaced == self.sent)
        assert [seq for _, seq, _ in self.results] == list(range(counted().accepted))
        messages = [message for message, _, _ in self.results]
        assert messages == sorted(set(messages))

    def assert_old_serves(self, name):
        """The old model answers, nothing of ``name`` is loaded, and the parameter went back once."""
        self.answered_by('old')
        assert {model for _, _, model in self.results} == {'old'}
        assert self.scripts[name].loaded == 0 and self.scripts['old'].loaded == 1
        assert [path.rpartition('/')[2] for path in self.kept] == [f'{name}.onnx']
        self.assert_nothing_lost()

    # What a ModelSwapper asks of its owner.

    def make_chain(self, bundle, settings):
        script = self.scripts[bundle.name]
        return RuntimeChain(
            bundle, C7InferenceConfig(isolation='none'), lambda rung: FakeHost(script), emit=self.record, rungs=(CPU,)
        )

    def path_accepted(self, path):
        return self.on_accept(path)

    def model_swapped(self, model, settings):
        self.served = model

    def keep_model(self):
        self.kept.append(self.statuses[-1].path)

    def swap_changed(self, status):
        self.statuses.append(status)
        self.on_status(status)

    def record(self, kind, **payload):
        self.records.append((kind, payload))


@pytest.fixture
def bench(tmp_path):
    made = Bench(tmp_path)
    yield made
    made.ended.set()
    made.camera.join()
    assert made.swapper.stop(10.0)
    assert made.thread.stop(10.0)


def test_n10_the_new_model_takes_over_between_two_frames_and_the_old_one_is_freed(bench):
    bench.answered_by('old')
    record = bench.swap('new')
    bench.answered_by('new')
    bench.assert_nothing_lost()
    models = [model for _, _, model in bench.results]
    assert models == sorted(models, reverse=True), 'the model changes once'
    assert (record['outcome'], record['model_name']) == ('swapped', 'new')
    assert record['weights_digest'] == bench.served.bundle.weights_digest
    assert record['previous_weights_digest'] == bench.old.bundle.weights_digest
    assert bench.phases() == [SwapPhase.LOADING, SwapPhase.SHADOWING, SwapPhase.HANDING_OVER, SwapPhase.SWAPPED]
    assert (bench.scripts['old'].loaded, bench.scripts['new'].loaded) == (0, 1)
    assert bench.kept == [] and len(bench.swaps()) == 1


def test_n10_models_of_one_name_are_logged_with_their_digests(bench, caplog):
    caplog.set_level('INFO')
    bench.answered_by('old')
    path = Path(bench.model('old'))
    path.write_bytes(b'trained again')
    bench.swapper.begin(str(path), bench)
    record = bench.outcome()
    names = [f'old ({record[key][:19]}…)' for key in ('weights_digest', 'previous_weights_digest')]
    assert names[0] != names[1] and f'{names[0]} answers in place of {names[1]}.' in caplog.text


def test_f6_three_live_frames_are_answered_in_the_shadow(bench):
    """With the pixels that the old model answered, and without an alert before the first frame that counts."""
    seen, alerts_before = [], []
    script = Script()
    bench.scripts['new'] = script
    bench.on_status = lambda status: status.under_way and alerts_before.append(
        [payload['model_name'] for _, payload in bench.records]
    )
    script.on_infer = lambda inputs: seen.append(inputs['image'].flat[0])
    bench.answered_by('old')
    bench.flowing.set()
    bench.swapper.begin(bench.model('new'), bench)
    wait_until(lambda: bench.statuses and bench.statuses[-1].phase is SwapPhase.HANDING_OVER or bench.swaps())
    assert len(seen) >= 1 + 3, 'one proof and three frames'
    sent = {np.float32(message % 256) / np.float32(255) for message in range(1, bench.sent + 1)}
    assert all(min(abs(value - each) for each in sent) < 1e-6 for value in seen[1:4])
    assert all(value > 0 for value in seen[1:4]), 'frames, not the blank proof'
    bench.outcome()
    bench.answered_by('new')
    assert all('new' not in names for names in alerts_before), 'no alert of the new model before it serves'
    alerts = [payload['model_name'] for kind, payload in bench.records if kind == 'c7.cpu_fallback']
    assert alerts == ['old', 'new']


def test_where_no_frame_comes_the_proof_has_to_do(bench):
    assert bench.swap('new')['outcome'] == 'swapped'
    bench.answered_by('new')


def test_one_swap_after_another(bench):
    bench.flowing.set()
    assert [bench.swap(name)['model_name'] for name in ('new', 'old', 'newer')] == ['new', 'old', 'newer']
    bench.answered_by('newer')
    bench.assert_nothing_lost()
    assert [bench.scripts[name].loaded for name in ('old', 'new', 'newer')] == [0, 0, 1]


@pytest.mark.parametrize('path', ['', 'net\0.onnx', 'n' * 5000])
def test_what_the_text_alone_tells_is_refused_and_begins_nothing(bench, path):
    with pytest.raises(ConfigError, match='model_path: '):
        bench.swapper.begin(path, bench)
    assert bench.statuses == [] and bench.swaps() == []


def test_what_has_to_be_read_fails_in_the_background_and_the_parameter_goes_back(bench):
    """A callback of a parameter reads nothing: whatever the disk says comes as a record."""
    copy = bench.directory / 'copy.onnx'
    copy.write_bytes(b'old')
    paths = [(str(bench.directory / 'none.onnx'), 'none.onnx'), (str(copy), 'serves already')]
    for number, (path, reason) in enumerate(paths, 1):
        bench.swapper.begin(path, bench)
        record = bench.outcome()
        assert (record['outcome'], record['model_path']) == ('failed', path) and reason in record['reason']
        assert len(bench.kept) == len(bench.swaps()) == number
    assert set(bench.phases()) == {SwapPhase.LOADING, SwapPhase.FAILED}


def test_a_second_swap_is_refused_while_one_is_under_way(bench):
    may_load = threading.Event()
    path = bench.model('new')
    bench.scripts['new'].on_load = lambda host: may_load.wait(30)
    bench.swapper.begin(path, bench)
    with pytest.raises(ConfigError, match='under way'):
        bench.swapper.begin(bench.model('newer'), bench)
    may_load.set()
    assert bench.outcome()['model_name'] == 'new'
    assert bench.swap('newer')['outcome'] == 'swapped'


def raising(error):
    def act(*_):
        raise error

    return act


@pytest.mark.parametrize('error', [EngineDeserializeError('damaged.'), MemoryError('no memory')])
def test_a_model_that_cannot_be_loaded_leaves_the_old_one(bench, error):
    path = bench.model('new')
    bench.scripts['new'].on_load = raising(error)
    bench.swapper.begin(path, bench)
    record = bench.outcome()
    assert record['outcome'] == 'failed' and str(error).rstrip('.') in record['reason']
    assert (bench.statuses[-1].phase, bench.statuses[-1].reason) == (SwapPhase.FAILED, record['reason'])
    bench.assert_old_serves('new')


def test_a_model_that_fails_its_proof_leaves_the_old_one(bench):
    path = bench.model('new')
    bench.scripts['new'].on_infer = raising(InferenceError('not finite.'))
    bench.swapper.begin(path, bench)
    assert 'not finite' in bench.outcome()['reason']
    bench.assert_old_serves('new')


def test_a_model_that_fails_a_live_frame_leaves_the_old_one(bench):
    path = bench.model('new')

    def fail_on_an_image(inputs):
        if not np.array_equal(inputs['image'], noise_inputs(FITTING)['image']):
            raise InferenceError('not finite.', remedy='Name it in allow_non_finite.')

    bench.scripts['new'].on_infer = fail_on_an_image
    bench.answered_by('old')
    bench.swapper.begin(path, bench)
    record = bench.outcome()
    assert record['outcome'] == 'failed' and 'live frame' in record['reason']
    assert 'not finite. Name it in allow_non_finite.' in record['reason']
    assert bench.phases() == [SwapPhase.LOADING, SwapPhase.SHADOWING, SwapPhase.FAILED]
    bench.assert_old_serves('new')


@pytest.mark.parametrize('inputs', [
    (TensorSpec('image', 'float32', (1, 7, 4, 6)),), (*FITTING, TensorSpec('scale', 'float32', (1,))),
])  # fmt: skip
def test_a_model_that_no_image_fits_leaves_the_old_one(bench, inputs):
    path = bench.model('new')
    bench.scripts['new'].inputs = inputs
    bench.swapper.begin(path, bench)
    assert bench.outcome()['outcome'] == 'failed'
    bench.assert_old_serves('new')


def test_a_parameter_that_is_not_set_after_all_swaps_nothing(bench, monkeypatch):
    monkeypatch.setattr('gps_denied_c7.pipeline.model_swap._ACCEPTED_S', 0.05)
    bench.on_accept = lambda path: False
    assert 'was refused or replaced by another one' in bench.swap('new')['reason']
    assert bench.scripts['new'].hosts == []
    bench.assert_old_serves('new')


def test_a_parameter_that_cannot_be_taken_back_is_told(bench):
    path = bench.model('new')
    bench.scripts['new'].on_load = raising(EngineDeserializeError('damaged.'))
    bench.keep_model = raising(C7Error('cannot be taken back.'))
    bench.swapper.begin(path, bench)
    record = bench.outcome()
    assert 'damaged' in record['reason'] and 'cannot be taken back' in record['reason']


def test_a_load_is_ended_when_the_streams_are_closed(bench):
    path = bench.model('new')

    def load_until_killed(host):
        assert host.killed.wait(30)
        raise EngineDeserializeError('killed.')

    bench.scripts['new'].on_load = load_until_killed
    bench.swapper.begin(path, bench)
    assert bench.scripts['new'].loading.wait(30)
    assert bench.swapper.stop(20.0)
    assert (bench.swaps()[-1]['outcome'], len(bench.swaps())) == ('cancelled', 1)
    assert 'c7.chain_exhausted' not in [kind for kind, _ in bench.records], 'ended is not exhausted'
    with pytest.raises(ConfigError, match='closed'):
        bench.swapper.begin(bench.model('newer'), bench)
    bench.assert_old_serves('new')


def test_a_load_that_cannot_be_ended_is_left_behind_and_freed_when_it_returns(bench):
    path, may_load = bench.model('new'), threading.Event()
    bench.scripts['new'].on_load = lambda host: may_load.wait(30)
    bench.swapper.begin(path, bench)
    assert bench.scripts['new'].loading.wait(30)
    assert not bench.swapper.stop(0.1)
    assert bench.swaps()[-1]['outcome'] == 'cancelled', 'told by who stopped it'
    may_load.set()
    bench.outcome()
    assert len(bench.swaps()) == 1
    bench.assert_old_serves('new')


def test_shadowing_is_cancelled_when_the_streams_are_closed(bench):
    bench.swapper._no_frame_s = 60.0
    bench.swapper.begin(bench.model('new'), bench)
    wait_until(lambda: SwapPhase.SHADOWING in bench.phases())
    assert bench.swapper.stop(20.0)
    assert bench.swaps()[-1]['outcome'] == 'cancelled'
    bench.assert_old_serves('new')


def test_a_hand_over_that_waits_for_the_frame_in_hand_is_taken_back(bench):
    entered, leave = threading.Event(), threading.Event()

    def hold():
        entered.set()
        assert leave.wait(30)

    bench.before_publish = hold
    bench.put()
    assert entered.wait(30)
    bench.swapper.begin(bench.model('new'), bench)
    wait_until(lambda: SwapPhase.HANDING_OVER in bench.phases() and bench.thread._replacement is not None)
    assert bench.swapper.stop(20.0)
    assert bench.swaps()[-1]['outcome'] == 'cancelled'
    leave.set()
    bench.assert_old_serves('new')


def test_frames_are_copied_only_while_a_swap_asks_for_them(bench):
    copies = []
    tap = bench.pipeline.answered
    offer = tap.offer

    def counting(pixels):
        if tap._wanted:
            copies.append(pixels)
        offer(pixels)

    tap.offer = counting
    bench.answered_by('old', 20)
    assert copies == []
    bench.swap('new')
    assert len(copies) >= 3
    asked = len(copies)
    bench.answered_by('new', 20)
    assert len(copies) == asked
