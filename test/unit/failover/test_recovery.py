"""F-2, F-3, F-6 to F-8: what a failure costs, to the frame, to the records and to the engines that come next."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from gps_denied_c7.errors import ChainExhaustedError, EngineDeserializeError, InferenceError, WorkerDiedError
from gps_denied_c7.failover.status import ChainState
from support.scripted_workers import CPU, GPU, LAST_GPU, OTHER_GPU, Bench, ScriptedWorker
from support.waiting import wait_until


class ReadsInPlace(ScriptedWorker):
    """Stand in for a worker that shares the memory in which requests are written."""

    def __init__(self, rung, bench):
        super().__init__(rung, bench)
        self.request_arrays = {'x': np.zeros((1, 2), np.float32)}

    def begin(self, inputs):
        self.request_arrays['x'][...] = inputs['x']
        super().begin(inputs)


class InPlaceBench(Bench):
    """A chain of such workers."""

    worker_type = ReadsInPlace


@pytest.mark.parametrize('rungs', [(CPU,), (GPU, CPU)])
def test_f2_the_next_engine_gets_the_frame_although_a_self_test_was_written_over_it(rungs):
    bench = InPlaceBench(*rungs).ready()
    for act in (['fail'] if rungs == (CPU,) else ['fail', 'fail']):
        bench.serving().act = act
        if len(rungs) == 2:
            bench.standby().act = act
        request = dict(bench.chain.request_arrays())
        request['x'][...] = 7.0
        answer = bench.chain.infer(request)
        assert (answer.outputs['x'] == 7.0).all()
        bench.settle()


def test_f2_a_frame_that_came_in_an_array_of_its_own_is_not_copied():
    """It costs milliseconds with a large image."""
    bench, seen = Bench(CPU).ready(), []
    bench.serving().act = 'fail'
    standby, begin = bench.standby(), bench.standby().begin
    standby.begin = lambda inputs: (seen.append(inputs['x']), begin(inputs))
    frame = np.ones((1, 2), np.float32)
    bench.chain.infer({'x': frame})
    assert seen[-1] is frame


def test_f8_the_gap_is_the_time_that_the_frame_waited_for_another_engine():
    bench = Bench(GPU, CPU, inference_deadline_ms=250.0).ready()
    bench.serving().act = 'late'
    bench.ask()
    (switch,) = bench.switches()
    assert (switch['gap_ms'], switch['frames_affected']) == (250.0, 1)
    assert switch['reason'] == f'{GPU.name} did not answer within 250 ms.'


def test_f8_a_gap_holds_all_engines_that_were_tried():
    bench = Bench(GPU, OTHER_GPU, CPU, inference_deadline_ms=250.0, hang_timeout_ms=30_000.0).ready()
    for worker in list(bench.workers):
        worker.act = 'late'
    bench.ask()
    (switch,) = bench.switches()
    assert (switch['from'], switch['gap_ms'] >= 500.0) == (GPU.name, True)


def test_risk2_each_episode_on_the_cpu_is_told_once():
    bench = Bench(GPU, CPU, promotion_backoff_s=(1.0, 2.0)).ready()
    for episode in (1, 2):
        bench.serving().act = 'die'
        for _ in range(3):
            bench.ask()
        kinds = [kind for kind, _ in bench.records]
        assert (kinds.count('c7.cpu_fallback'), kinds.count('c7.fallback_to_onnx_trt_ep')) == (episode, episode)
        for _ in range(8):
            bench.now_ns += int(1.5e9)
            bench.settle()
            bench.ask()
        assert bench.chain.status().active == GPU


def exhausted(bench):
    """Have every engine fail, and none be loaded."""
    bench.load_faults = dict.fromkeys(bench.chain.rungs, EngineDeserializeError('not now.'))
    for worker in bench.workers:
        worker.alive = False
    bench.chain.maintain()
    assert bench.chain.status().state is ChainState.EXHAUSTED
    return bench


def test_f7_a_chain_that_comes_back_records_how_long_it_was_exhausted():
    bench = exhausted(Bench(CPU, restart_backoff_s=(3.0, 30.0)).ready())
    bench.load_faults.clear()
    bench.now_ns += int(4e9)
    bench.chain.maintain()
    switch = bench.switches()[-1]
    assert (switch['from'], switch['to'], switch['gap_ms'], switch['frames_affected']) == ('none', CPU.name, 4000.0, 0)
    assert switch['reason'] == 'the chain was exhausted'


def test_f7_an_exhausted_chain_is_tried_again_after_its_pause_and_not_before():
    bench = exhausted(Bench(CPU, restart_backoff_s=(3.0, 30.0)).ready())
    bench.load_faults.clear()
    bench.now_ns += int(2.9e9)
    bench.chain.maintain()
    with pytest.raises(ChainExhaustedError, match='not now'):
        bench.chain.infer({'x': np.ones((1, 2), np.float32)})
    bench.now_ns += int(0.2e9)
    assert bench.ask()


def test_f7_an_answered_frame_makes_the_next_pause_the_shortest_again():
    bench = Bench(CPU, restart_backoff_s=(3.0, 300.0)).ready()
    for _ in range(2):
        exhausted(bench)
        bench.load_faults.clear()
        bench.now_ns += int(3.1e9)
        bench.chain.maintain()
        assert bench.ask(), 'after the first pause, each time'


def test_f6_every_rung_of_a_lost_gpu_pauses_also_one_that_did_not_fail():
    """Two of three have failed; the pause of the third has been over for long, and begins anew."""
    bench = Bench(OTHER_GPU, GPU, LAST_GPU, CPU, promotion_backoff_s=(5.0, 300.0))
    bench.load_faults = {OTHER_GPU: EngineDeserializeError('not now.')}
    bench.ready()
    bench.now_ns += int(100e9)
    bench.load_faults = {}
    bench.serving().act = bench.standby().act = 'die'
    bench.chain.infer({'x': np.ones((1, 2), np.float32)})
    assert bench.chain.status().gpu_lost and bench.chain.status().active == CPU
    bench.settle()
    assert bench.chain.snapshot().shadow is None, 'its pause was over before'
    bench.now_ns += int(30e9)
    bench.settle()
    assert bench.chain.snapshot().shadow.rung.on_gpu


def test_f6_a_shadow_on_a_gpu_that_is_lost_meanwhile_is_dropped():
    bench = Bench(GPU, OTHER_GPU, LAST_GPU, CPU, promotion_backoff_s=(1.0, 300.0))
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.ready()
    bench.load_faults.clear()
    bench.now_ns += int(2e9)
    bench.settle()
    shadow = bench.chain.snapshot().shadow
    assert (shadow.rung, bench.chain.status().active) == (GPU, OTHER_GPU)
    bench.serving().act = bench.standby().act = 'die'
    bench.ask()
    assert bench.chain.status().gpu_lost
    assert bench.chain.snapshot().shadow is None and shadow.host.released


def test_f4_a_shadow_on_a_gpu_on_which_a_worker_hangs_is_dropped():
    bench = Bench(GPU, OTHER_GPU, CPU, promotion_backoff_s=(1.0, 300.0))
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.ready()
    bench.load_faults.clear()
    bench.now_ns += int(2e9)
    bench.settle()
    assert bench.chain.snapshot().shadow.rung == GPU
    hung = bench.serving()
    hung.act, hung.killable = 'late', False
    bench.ask()
    for wait_s in (10.0, 3.0):
        assert bench.chain.snapshot().shadow is not None
        bench.now_ns += int(wait_s * 1e9)
        bench.chain.maintain()
    assert bench.chain.status().gpu_lost and bench.chain.snapshot().shadow is None


def with_a_shadow():
    bench = Bench(GPU, CPU)
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.ready()
    bench.load_faults.clear()
    bench.now_ns += int(6e9)
    bench.settle()
    assert bench.chain.snapshot().shadow.rung == GPU
    return bench


def test_f6_a_shadow_whose_worker_died_is_dropped_at_once():
    """D1 of docs/explanation/chain.md: also where no frame comes that would show it."""
    bench = with_a_shadow()
    bench.chain.snapshot().shadow.host.alive = False
    bench.chain.maintain()
    assert bench.chain.snapshot().shadow is None
    delayed = [payload for kind, payload in bench.records if kind == 'c7.promotion_delayed']
    assert delayed == [{'rung': GPU.name, 'reason': 'its worker died.'}]


def test_f6_a_shadow_that_died_after_its_last_frame_does_not_serve():
    bench = with_a_shadow()
    for _ in range(4):
        bench.chain.infer({'x': np.ones((1, 2), np.float32)})
    assert bench.chain.snapshot().shadow.agreements == 3
    bench.chain.snapshot().shadow.host.alive = False
    bench.chain.maintain()
    assert bench.chain.status().active == CPU and bench.switches() == []


def test_f2_a_request_at_fault_takes_back_what_engines_were_blamed_for():
    """The GPU is not lost by one request that two of its rungs fail, nor does a rung pause for it."""
    bench = Bench(GPU, OTHER_GPU, hot_standby=False).ready()
    fails = ScriptedWorker.poll

    def fail_thirteen(worker, timeout_s):
        if worker.request is not None and (worker.request['x'] == 13).all():
            worker.request = None
            raise InferenceError('the engine failed.')
        return fails(worker, timeout_s)

    bench.worker_type = type('FailsThirteen', (ScriptedWorker,), {'poll': fail_thirteen})
    bench.serving().__class__ = bench.worker_type
    with pytest.raises(InferenceError, match='no runtime can answer this request'):
        bench.ask(13.0)
    status = bench.chain.status()
    assert (status.state, status.gpu_lost) == (ChainState.READY, False)
    assert bench.ask(1.0)


def test_f3_two_engines_on_the_gpu_are_never_loaded_at_once():
    bench = Bench(GPU, OTHER_GPU, LAST_GPU, CPU, promotion_backoff_s=(1.0, 300.0))
    bench.load_faults[GPU] = bench.load_faults[OTHER_GPU] = EngineDeserializeError('not now.')
    bench.ready()
    bench.load_faults.clear()
    bench.loads_may_end.clear()
    bench.now_ns += int(5e9)
    bench.chain.maintain()
    assert [load.rung for load in bench.chain.snapshot().loading] == [GPU]
    bench.standby().alive = False
    bench.chain.maintain()
    assert [load.rung for load in bench.chain.snapshot().loading] == [GPU, CPU]
    bench.loads_may_end.set()
    bench.settle()


def test_n1_a_request_that_a_release_ends_fails_and_blames_no_engine():
    bench = Bench(CPU, hot_standby=False, hang_timeout_ms=1e9).ready()
    worker, errors = bench.serving(), []
    worker.act = 'late'

    def ask():
        try:
            bench.chain.infer({'x': np.ones((1, 2), np.float32)})
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: worker.request is not None, 'the request')
    bench.chain.release(1.0)
    asking.join(30)
    assert [type(error) for error in errors] == [InferenceError], 'not that the chain is exhausted'
    assert bench.records == []
    assert bench.chain.status().state is ChainState.UNLOADED and bench.workers == []


def test_f7_the_last_rung_is_loaded_six_times_while_its_workers_die_others_twice():
    """Something else may have killed them, and there is nothing after the last one."""
    bench, tried = Bench(GPU, OTHER_GPU, CPU), []

    def die(rung):
        tried.append(rung)
        raise WorkerDiedError('the worker was ended by SIGKILL.')

    bench.before_load = die
    with pytest.raises(ChainExhaustedError):
        bench.chain.load()
    assert [tried.count(rung) for rung in (GPU, OTHER_GPU, CPU)] == [2, 2, 6]


def test_n1_a_chain_that_was_released_starts_anew():
    """With its GPU trusted, without pauses, and with no failure told."""
    bench = Bench(GPU, OTHER_GPU, CPU, restart_backoff_s=(1000.0, 1000.0)).ready()
    bench.load_faults[CPU] = EngineDeserializeError('not now.')
    bench.chain.maintain()
    bench.standby().act = bench.serving().act = 'die'
    with pytest.raises(ChainExhaustedError):
        bench.chain.infer({'x': np.ones((1, 2), np.float32)})
    assert bench.chain.status().gpu_lost
    bench.load_faults.clear()
    bench.chain.release()
    status = bench.chain.status()
    assert (status.state, status.gpu_lost, status.failures) == (ChainState.UNLOADED, False, ())
    bench.load_faults[OTHER_GPU] = bench.load_faults[CPU] = EngineDeserializeError('not now.')
    bench.ready()
    assert (bench.chain.status().active, bench.chain.status().standby) == (GPU, GPU)
    bench.standby().alive = False
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.settle()
    assert bench.chain.status().standby is None, 'all pause now'
    bench.load_faults.clear()
    bench.chain.release()
    bench.ready()
    assert bench.chain.status().standby == OTHER_GPU
