"""F-1, F-5: loading and proving engines, again where a worker dies meanwhile."""

from __future__ import annotations

import logging
import shutil
import threading
import time

import numpy as np
import pytest

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.demo.network import expected_outputs, write_demo_bundle
from gps_denied_c7.errors import EngineDeserializeError, InferenceError, WorkerDiedError
from gps_denied_c7.failover import loader as engine_loader
from gps_denied_c7.failover import self_test
from gps_denied_c7.failover.file_watch import FileWatch
from gps_denied_c7.failover.loader import EngineLoad, EngineLoader
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.failover.self_test import Proof
from gps_denied_c7.model.bundle import ModelBundle, write_bundle
from gps_denied_c7.runtimes.protocol import EngineFacts, ProviderSet

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

CPU = Rung('onnx_trt_ep', ProviderSet.CPU)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    return ModelBundle.load(write_demo_bundle(tmp_path_factory.mktemp('model') / 'bundle'))


class Host:
    """An engine that gives the golden outputs, unless it is told otherwise."""

    ran_ns = (0, 0)

    def __init__(self, bench):
        self.bench, self.killed, self.released = bench, False, False
        self.inputs = bench.bundle.inputs

    def load(self):
        if self.bench.faults:
            fault = self.bench.faults.pop(0)
            if fault is not None:
                raise fault
        return EngineFacts('provider', ('provider',), True, 0, (), 0.0)

    def begin(self, inputs):
        self.bench.requests.append(inputs)

    def poll(self, timeout_s):
        return self.bench.answer

    def kill(self):
        self.killed = True


class Bench:
    def __init__(self, bundle, attempts=2):
        self.bundle, self.attempts = bundle, attempts
        self.faults, self.requests, self.hosts, self.freed = [], [], [], []
        self.answer = bundle.golden_outputs()
        self.may_load = threading.Event()
        self.may_load.set()
        self.given_up = False
        self.proof = Proof(bundle)
        self.loader = EngineLoader(
            C7InferenceConfig(), self.make, self.proof,
            attempts=lambda rung: self.attempts, given_up=lambda: self.given_up,
            retire=lambda rung, host: self.freed.append(host),
            files=FileWatch(lambda: 'unchanged'),
        )  # fmt: skip

    def make(self, rung):
        assert self.may_load.wait(30)
        self.hosts.append(Host(self))
        return self.hosts[-1]

    def load(self):
        with self.loader.listed(CPU) as load:
            return self.loader.load(load)


@pytest.fixture
def bench(bundle):
    return Bench(bundle)


def test_f5_an_engine_is_loaded_and_proven(bench):
    engine = bench.load()
    assert (engine.rung, engine.host) == (CPU, bench.hosts[0])
    assert all(request is bench.requests[0] for request in bench.requests) and len(bench.requests) > 1
    assert engine.hang_s > engine.deadline_s > 0
    assert bench.loader.loads == [] and bench.freed == []
    assert [name for name, _ in bench.loader.longest_s()] == [CPU.name]


def test_f4_what_counts_as_late_follows_from_usual_requests_and_not_from_the_first(bench, monkeypatch):
    monkeypatch.setattr(bench.proof, 'run', lambda host, limit_s: 60.0)
    usual_s = iter((0.1, 0.4, 0.1, 0.1))
    monkeypatch.setattr(bench.proof, 'time', lambda host, limit_s: next(usual_s))
    engine = bench.load()
    assert (engine.deadline_s, engine.hang_s) == pytest.approx((1.2, 3.6))


def test_f1_a_worker_that_dies_meanwhile_is_tried_again_and_only_so_often(bench):
    bench.faults = [WorkerDiedError('died'), None]
    assert bench.load().host is bench.hosts[1]
    assert bench.freed == [bench.hosts[0]]
    bench.faults = [WorkerDiedError('died')] * 5
    with pytest.raises(WorkerDiedError):
        bench.load()
    assert len(bench.faults) == 3 and bench.loader.loads == []


def test_f1_nothing_is_tried_again_that_nobody_waits_for(bench):
    bench.attempts, bench.given_up, bench.faults = 9, True, [WorkerDiedError('died')] * 5
    with pytest.raises(WorkerDiedError):
        bench.load()
    assert len(bench.hosts) == 1


def test_f5_an_engine_that_cannot_be_loaded_or_fails_its_proof_is_freed(bench):
    bench.faults = [EngineDeserializeError('damaged')]
    with pytest.raises(EngineDeserializeError):
        bench.load()
    bench.answer = {name: array + np.ones((), array.dtype) for name, array in bench.answer.items()}
    with pytest.raises(InferenceError, match='golden'):
        bench.load()
    bench.answer = None
    with pytest.raises(InferenceError, match='longer'):
        bench.load()
    assert bench.freed == bench.hosts and bench.hosts[-1].killed


def test_f5_in_a_thread_of_its_own_it_is_there_to_be_taken(bench):
    load = bench.loader.start(CPU)
    assert bench.loader.find(CPU) is load
    assert load.done.wait(30) and load.engine.host is bench.hosts[0]
    bench.loader.take(load)
    assert bench.loader.loads == [] and bench.loader.find(CPU) is None
    bench.faults = [EngineDeserializeError('damaged')]
    failed = bench.loader.start(CPU)
    assert failed.done.wait(30) and isinstance(failed.error, EngineDeserializeError) and failed.engine is None


def test_f7_where_no_thread_is_left_the_load_has_failed(bench, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', refuse)
        load = bench.loader.start(CPU)
    assert load.done.is_set() and "can't start new thread" in str(load.error) and load.engine is None
    bench.loader.take(load)
    assert bench.loader.start(CPU).done.wait(30)


@pytest.mark.parametrize('patience_s', [30.0, 0.0])
def test_f1_what_comes_of_a_cancelled_load_is_freed(bench, monkeypatch, patience_s):
    """By who cancels it, or later by its own thread."""
    monkeypatch.setattr(engine_loader, '_CANCEL_S', patience_s)
    ended = bench.loader.start(CPU)
    assert ended.done.wait(30)
    bench.may_load.clear()
    under_way = bench.loader.start(CPU)
    threading.Timer(0.1, bench.may_load.set).start()
    bench.loader.cancel(list(bench.loader.loads))
    assert under_way.done.wait(30)
    assert bench.loader.loads == [] and ended.host.killed
    deadline = time.monotonic() + 30
    while {*bench.freed} != {*bench.hosts}:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope='module')
def several(tmp_path_factory, bundle):
    """The demo bundle with a second golden request, black, and its answer."""
    root = tmp_path_factory.mktemp('several') / 'bundle'
    shutil.copytree(bundle.root, root)
    demo = ModelBundle.load(root)
    black = np.zeros_like(demo.golden_inputs()['image'])
    return write_bundle(
        root, name=demo.name, weights_digest=demo.weights_digest, inputs=demo.inputs, outputs=demo.outputs,
        preprocessing=demo.preprocessing, artefacts=demo.artefacts, rules=demo.rules,
        golden={
            'land': (demo.golden_inputs(), demo.golden_outputs()),
            'black': ({'image': black}, expected_outputs(black[0, 0])),
        },
    )  # fmt: skip


def test_m1_an_engine_that_is_right_on_the_first_golden_request_alone_is_refused(several):
    bench = Bench(several)
    with pytest.raises(InferenceError, match="not reproduced for 'black'"):
        bench.load()
    assert bench.freed == bench.hosts and len(bench.requests) == 2


def test_m1_a_loaded_engine_answers_every_golden_request_and_a_serving_one_the_first(several, monkeypatch):
    bench = Bench(several)
    answers = {float(several.golden_inputs(index)['image'].max()): several.golden_outputs(index) for index in (0, 1)}
    monkeypatch.setattr(Host, 'poll', lambda host, limit_s: answers[float(bench.requests[-1]['image'].max())])
    engine = bench.load()
    assert {float(request['image'].max()) for request in bench.requests} == set(answers)
    bench.requests.clear()
    bench.proof.check(engine.host, 1.0)
    bench.proof.time(engine.host, 1.0)
    assert [bool(request['image'].any()) for request in bench.requests] == [True, True]


def test_m1_a_slow_engine_does_not_fail_because_there_are_many_golden_requests(several, monkeypatch):
    bench, limits = Bench(several), []
    monkeypatch.setattr(self_test.time, 'monotonic', lambda: 50.0 * len(limits))
    monkeypatch.setattr(
        Host, 'poll', lambda host, limit_s: limits.append(limit_s) or several.golden_outputs(len(limits) - 1)
    )
    assert bench.proof.run(Host(bench), 60.0) == 50.0
    assert limits == [60.0, 60.0]


def test_m1_golden_requests_that_take_too_long_together_end_a_load(several, monkeypatch):
    bench, asked = Bench(several), []
    monkeypatch.setattr(self_test.time, 'monotonic', lambda: 301.0 * len(asked))
    monkeypatch.setattr(Host, 'poll', lambda host, limit_s: asked.append(limit_s) or several.golden_outputs(0))
    host = Host(bench)
    with pytest.raises(InferenceError, match=r'only 1 of 2 golden requests were answered within 300\.0 s') as error:
        bench.proof.run(host, 60.0)
    assert error.value.remedy and host.killed and len(asked) == 1


def test_m1_the_golden_tensors_are_read_once(bench, monkeypatch):
    bench.load()
    monkeypatch.setattr(type(bench.bundle), 'golden_inputs', lambda self, index=0: pytest.fail('read again'))
    bench.load()
    bench.proof.forget()
    with pytest.raises(pytest.fail.Exception):
        bench.load()


def test_a_load_that_has_come_to_no_host_cannot_be_killed_and_is_not_harmed():
    EngineLoad(CPU).kill()


def test_f5_loads_that_hang_are_cancelled_in_the_time_of_one(bench, monkeypatch):
    waited = []

    class Hanging(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            return False

    monkeypatch.setattr(engine_loader.time, 'monotonic', lambda: sum(waited))
    loads = [EngineLoad(CPU, done=Hanging()) for _ in range(3)]
    bench.loader.cancel(loads)
    assert len(waited) == 3 and sum(waited) == pytest.approx(engine_loader._CANCEL_S)


@pytest.mark.parametrize('how', ['cancelled', 'given up'])
def test_f1_a_load_that_was_ended_on_purpose_is_no_error(bench, caplog, how):
    caplog.set_level(logging.DEBUG)
    bench.may_load.clear()
    bench.faults = [WorkerDiedError('worker 1 was ended by SIGKILL.')] * 3
    load = bench.loader.start(CPU)
    if how == 'cancelled':
        load.cancelled = True
    else:
        bench.given_up = True
    bench.may_load.set()
    assert load.done.wait(30)
    assert isinstance(load.error, WorkerDiedError) and len(bench.hosts) == 1
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
