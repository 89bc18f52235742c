"""F-2 to F-4, F-6, F-8: what the chain makes of workers that die, are late, hang, and come back."""

from __future__ import annotations

import contextlib
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gps_denied_c7.errors import (
    ChainExhaustedError,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    GpuUnavailableError,
    InferenceError,
    RuntimeUnavailableError,
    WorkerDiedError,
)
from gps_denied_c7.failover import file_watch
from gps_denied_c7.failover.status import ChainState
from support.scripted_workers import CPU, GPU, LAST_GPU, OTHER_GPU, Bench, ScriptedWorker


def test_f3_the_next_usable_rung_stands_by():
    bench = Bench(GPU, OTHER_GPU, CPU).ready()
    assert (bench.chain.status().active, bench.chain.status().standby) == (GPU, OTHER_GPU)


def test_f3_a_second_worker_of_the_last_rung_stands_by():
    bench = Bench(CPU).ready()
    assert (bench.chain.status().active, bench.chain.status().standby) == (CPU, CPU)
    assert len(bench.workers) == 2


def test_f3_no_standby_where_none_is_wanted():
    bench = Bench(CPU, hot_standby=False).ready()
    assert bench.chain.status().standby is None and len(bench.workers) == 1


def test_the_longest_load_of_a_rung_is_told():
    bench = Bench(CPU)
    seconds = iter((0.3, 0.5, 0.2))

    def load_for_a_while(rung):
        bench.now_ns += int(next(seconds) * 1e9)

    bench.before_load = load_for_a_while
    bench.ready()
    bench.standby().kill()
    bench.settle()
    assert next(seconds, None) is None, 'three have been loaded'
    assert bench.chain.status().longest_load_s == ((CPU.name, 0.5),)


@pytest.mark.parametrize('act', ['die', 'fail'])
def test_f2_the_standby_answers_the_same_frame(act):
    bench = Bench(GPU, CPU).ready()
    bench.serving().act = act
    standby = bench.standby()
    bench.loads_may_end.clear()
    assert bench.ask(7.0).runtime_label == 'onnx_trt_ep'
    assert bench.serving() is standby
    (switch,) = bench.switches()
    assert (switch['from'], switch['to'], switch['frames_affected']) == (GPU.name, CPU.name, 1)
    bench.loads_may_end.set()
    bench.settle()
    assert bench.chain.status().standby == CPU


def test_f3_a_standby_that_dies_is_replaced():
    bench = Bench(CPU).ready()
    dead = bench.standby()
    dead.alive = False
    bench.settle()
    assert bench.standby() is not dead and bench.standby().alive
    assert bench.switches() == []


def test_f3_a_standby_that_no_thread_was_left_for_is_loaded_after_a_pause(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    bench = Bench(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, 'start', refuse)
        bench.chain.load()
        assert bench.ask().runtime_label == 'onnx_trt_ep'
    bench.settle()
    assert bench.chain.status().standby is None
    bench.now_ns += int(60e9)
    bench.settle()
    assert bench.chain.status().standby == CPU


def test_f3_an_engine_that_is_preferred_takes_the_place_of_the_one_that_stands_by():
    bench = Bench(GPU, OTHER_GPU, CPU)
    bench.load_faults[OTHER_GPU] = EngineDeserializeError('not now.')
    bench.ready()
    assert (bench.chain.status().active, bench.chain.status().standby) == (GPU, CPU)
    bench.load_faults.clear()
    bench.settle()
    assert bench.chain.status().standby == CPU, 'not at once'
    bench.now_ns += int(10e9)
    bench.settle()
    assert (bench.chain.status().active, bench.chain.status().standby) == (GPU, OTHER_GPU)
    assert [worker.rung for worker in bench.workers] == [GPU, OTHER_GPU] and bench.switches() == []


def test_f3_an_engine_that_hangs_standing_by_is_replaced_before_it_is_needed():
    bench = Bench(CPU).ready()
    hung = bench.standby()
    hung.stopped = True
    for _ in range(12):
        bench.settle()
        bench.now_ns += int(0.1e9)
    assert not hung.alive and bench.standby() is not hung and bench.standby().alive
    assert bench.switches() == []


def test_f6_a_better_rung_comes_back_also_where_none_can_stand_by():
    bench = Bench(GPU, CPU)
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.ready()
    bench.standby().alive = False
    bench.load_faults = {CPU: EngineDeserializeError('no memory.')}
    for _ in range(20):
        bench.now_ns += int(1e9)
        bench.settle()
        bench.ask()
    assert bench.chain.status().active == GPU


def test_n1_a_serving_worker_that_dies_between_two_frames_is_replaced_before_the_next():
    bench = Bench(CPU).ready()
    bench.serving().alive = False
    bench.chain.maintain()
    assert bench.serving().alive
    (switch,) = bench.switches()
    assert switch['frames_affected'] == 0


def test_f4_a_late_worker_stands_by_again_when_its_answer_comes():
    bench = Bench(CPU).ready()
    late, standby = bench.serving(), bench.standby()
    late.act = 'late'
    bench.ask(1.0)
    assert bench.serving() is standby and late.alive
    late.act = 'answer'
    bench.ask(2.0)
    assert bench.standby() is late
    assert len(bench.switches()) == 1


def test_f4_a_worker_that_hangs_is_killed():
    bench = Bench(CPU).ready()
    hung = bench.serving()
    hung.act = 'late'
    bench.ask(1.0)
    assert hung.alive
    bench.now_ns += int(10e9)
    bench.ask(2.0)
    assert not hung.alive and hung not in bench.workers
    bench.settle()
    assert bench.chain.status().standby == CPU


def leave_one_unkillable(bench):
    """Have the serving worker hang past its limit, and the kernel not end it."""
    hung = bench.serving()
    hung.act, hung.killable = 'late', False
    bench.ask(1.0)
    bench.now_ns += int(10e9)
    bench.ask(2.0)
    bench.now_ns += int(3e9)
    bench.ask(3.0)
    return hung


def test_f4_a_worker_that_cannot_be_killed_loses_the_gpu():
    bench = Bench(GPU, OTHER_GPU, CPU).ready()
    leave_one_unkillable(bench)
    assert 'c7.worker_unkillable' in [kind for kind, _ in bench.records]
    assert bench.chain.status().gpu_lost


class DiesOfThirteen(ScriptedWorker):
    """Stand in for an engine that one request kills."""

    def poll(self, timeout_s):
        if self.alive and self.request is not None and (self.request['x'] == 13).all():
            self.alive, self.request = False, None
            self.bench.deaths += 1
            raise WorkerDiedError('the worker was ended by SIGKILL.')
        return super().poll(timeout_s)


class PoisonedBench(Bench):
    """A chain of engines that one request kills."""

    worker_type, deaths = DiesOfThirteen, 0


@pytest.mark.parametrize('hot_standby', [True, False])
@pytest.mark.parametrize('rungs', [(CPU,), (GPU, CPU), (GPU, OTHER_GPU)])
def test_f2_a_request_that_kills_every_engine_costs_itself_and_no_other(rungs, hot_standby):
    """The engine is loaded once more for those that follow, which come at once."""
    bench = PoisonedBench(*rungs, hot_standby=hot_standby).ready()
    with pytest.raises(InferenceError, match='no runtime can answer this request'):
        bench.ask(13.0)
    assert bench.deaths <= 8
    assert bench.chain.status().state is ChainState.READY
    assert not bench.chain.status().gpu_lost
    assert bench.ask(1.0)


def test_f6_requests_that_no_engine_survives_do_not_put_off_a_better_one():
    bench = PoisonedBench(GPU, CPU, promotion_backoff_s=(5.0, 300.0)).ready()
    for _ in range(3):
        with pytest.raises(InferenceError, match='no runtime can answer this request'):
            bench.ask(13.0)
        bench.settle()
        bench.now_ns += int(5.1e9)
        bench.settle()
        for _ in range(4):
            bench.ask()
        assert bench.serving().rung == GPU


@pytest.mark.parametrize('hot_standby', [True, False])
def test_f2_a_lost_gpu_is_left_also_by_an_engine_that_still_answers(hot_standby):
    """It goes on answering until the CPU is loaded; nothing of the GPU serves or stands by from then on."""
    bench = Bench(GPU, OTHER_GPU, CPU, hot_standby=hot_standby).ready()
    hung = bench.serving()
    hung.act, hung.killable = 'late', False
    bench.ask(1.0)
    bench.loads_may_end.clear()
    bench.now_ns += int(10e9)
    bench.ask(2.0)
    bench.now_ns += int(3e9)
    bench.ask(3.0)
    assert (bench.chain.status().gpu_lost, bench.serving().rung) == (True, OTHER_GPU)
    bench.loads_may_end.set()
    bench.settle()
    bench.ask(4.0)
    bench.settle()
    assert bench.serving().rung is CPU
    assert {worker.rung for worker in bench.workers if worker is not hung} == {CPU}
    assert (bench.switches()[-1]['from'], bench.switches()[-1]['reason']) == (OTHER_GPU.name, 'the GPU is lost')


def test_f6_a_lost_gpu_is_tried_again_beside_the_cpu_and_serves_once_it_answers():
    bench = Bench(GPU, OTHER_GPU, CPU, promotion_backoff_s=(5.0, 300.0)).ready()
    for _ in range(2):
        bench.serving().act = 'die'
        bench.standby().act = 'die'
        bench.ask()
        bench.settle()
    assert (bench.chain.status().active, bench.chain.status().gpu_lost) == (CPU, True)
    assert {worker.rung for worker in bench.workers} == {CPU}
    bench.now_ns += int(4e9)
    bench.settle()
    assert bench.chain.snapshot().shadow is None, 'not at once'
    bench.now_ns += int(30e9)
    bench.settle()
    assert bench.chain.status().gpu_lost, 'an engine that is loaded has not yet answered'
    for _ in range(4):
        assert bench.ask()
    bench.settle()
    assert (bench.chain.status().active, bench.chain.status().gpu_lost) == (GPU, False)


def test_f2_a_gpu_on_which_a_worker_hangs_is_not_tried_again():
    """Each attempt could leave another worker that nobody can end."""
    bench = Bench(GPU, OTHER_GPU, CPU).ready()
    hung = leave_one_unkillable(bench)
    for _ in range(10):
        bench.now_ns += int(600e9)
        bench.settle()
        bench.ask()
    assert (bench.chain.status().active, bench.chain.status().gpu_lost) == (CPU, True)
    assert {worker.rung for worker in bench.workers if worker is not hung} == {CPU}
    assert [kind for kind, _ in bench.records].count('c7.worker_unkillable') == 1
    hung.killable = True
    for _ in range(10):
        bench.now_ns += int(600e9)
        bench.settle()
        bench.ask()
    assert (bench.chain.status().active, bench.chain.status().gpu_lost) == (GPU, False), 'its driver has let go'


def test_f4_the_last_worker_is_killed_for_no_lateness_before_another_one_is_there():
    bench = Bench(CPU, hang_timeout_ms=30_000.0).ready()
    bench.loads_may_end.clear()
    bench.standby().alive = False
    hung = bench.serving()
    hung.act = 'late'
    answers = []
    asking = threading.Thread(target=lambda: answers.append(bench.ask(3.0)))
    asking.start()
    deadline = time.monotonic() + 30
    while bench.now_ns < 60e9:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert hung.alive and not answers
    bench.loads_may_end.set()
    asking.join(30)
    assert len(answers) == 1 and bench.serving() is not hung


def answered_while_nothing_stands_by(bench, value=3.0):
    """Return whether a request that the serving engine hangs on is answered; its hang limit must be out of reach."""
    bench.serving().act = 'late'
    answers = []
    asking = threading.Thread(target=lambda: answers.append(bench.ask(value)), daemon=True)
    asking.start()
    asking.join(10)
    if not answers:
        bench.chain.release()
    return bool(answers)


def test_f4_a_late_answer_has_an_engine_loaded_whose_pause_is_not_over():
    """Each time anew, where the one before that was loaded so came to stand by."""
    bench = Bench(CPU, hang_timeout_ms=1e9, restart_backoff_s=(1e6, 1e6)).ready()
    for value in (3.0, 4.0):
        bench.load_faults[CPU] = WorkerDiedError('the worker was ended by SIGKILL.')
        bench.standby().alive = False
        bench.settle()
        assert bench.chain.status().standby is None
        bench.load_faults.clear()
        late = bench.serving()
        assert answered_while_nothing_stands_by(bench, value)
        late.act = 'answer'
        bench.settle()
        assert bench.standby() is late


def test_f4_a_late_answer_has_the_engine_loaded_that_does_not_pause():
    bench = Bench(GPU, OTHER_GPU, CPU, hang_timeout_ms=1e9, restart_backoff_s=(1e6, 1e6))
    bench.load_faults[OTHER_GPU] = EngineDeserializeError('not now.')
    bench.ready()
    bench.load_faults.clear()
    assert bench.chain.status().standby == CPU
    bench.standby().alive = False
    assert answered_while_nothing_stands_by(bench)
    assert bench.chain.status().active == CPU


def test_f4_a_late_answer_has_an_engine_loaded_where_the_one_that_was_being_loaded_fails():
    bench = Bench(CPU, hang_timeout_ms=1e9, restart_backoff_s=(1e6, 1e6)).ready()
    late_at_ns = bench.now_ns + int(10e9)

    def fail_once_the_answer_is_late(rung):
        while bench.now_ns < late_at_ns:
            time.sleep(0.001)
        raise EngineDeserializeError('not now.')

    def load(rung):
        steps.pop(0)(rung)

    steps = [fail_once_the_answer_is_late, lambda rung: None]
    bench.before_load = load
    bench.standby().alive = False
    bench.chain.maintain()
    assert answered_while_nothing_stands_by(bench)
    assert not steps


@pytest.mark.parametrize('rungs', [(CPU,), (GPU, OTHER_GPU, CPU)], ids=['one rung', 'three rungs'])
def test_f4_late_answers_have_no_engine_loaded_again_and_again(rungs):
    """Loads would be what keeps the engine that serves late."""
    bench = Bench(*rungs).ready()
    begun = []

    def refuse(rung):
        begun.append(rung)
        raise EngineDeserializeError('no memory.')

    bench.before_load = refuse
    bench.standby().alive = False
    bench.settle()
    begun.clear()
    slow, before_ns = bench.serving(), bench.now_ns
    for number in range(60):
        slow.act, slow.patience = 'slow', 3
        bench.ask(float(number))
        for load in bench.chain.snapshot().loading:
            assert load.done.wait(30)
    assert bench.serving() is slow and bench.now_ns - before_ns > 12e9
    # Pauses of 1, 2, 4, 8 s and those that are hurried past, for each rung.
    assert 2 <= len(begun) <= 8 * len(rungs)


def test_f4_while_a_late_engine_is_expected_back_none_is_loaded_for_the_next_late_answer():
    bench = Bench(CPU).ready()
    begun = []
    bench.before_load = begun.append
    for worker in bench.workers:
        worker.act, worker.patience = 'slow', 3
    bench.ask()
    bench.settle()
    assert begun == []


def test_f4_where_no_standby_is_wanted_none_is_loaded_before_the_hang_limit():
    bench = Bench(CPU, hot_standby=False, hang_timeout_ms=2000.0).ready()
    begun = []
    bench.before_load = lambda rung: begun.append(bench.now_ns)
    bench.serving().act, before_ns = 'late', bench.now_ns
    bench.ask()
    assert begun and begun[0] - before_ns >= 2e9


def test_f4_no_two_engines_are_loaded_on_the_gpu_at_once_for_a_late_answer():
    bench = Bench(GPU, OTHER_GPU, LAST_GPU, hang_timeout_ms=1e9)
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.ready()
    bench.load_faults.clear()
    assert (bench.chain.status().active, bench.chain.status().standby) == (OTHER_GPU, LAST_GPU)
    loading, most, better_may_load = [], [], threading.Event()

    def load(rung):
        loading.append(rung)
        most.append(len(loading))
        assert rung != GPU or better_may_load.wait(30)
        loading.remove(rung)

    bench.before_load = load
    bench.now_ns += int(60e9)
    bench.chain.maintain()
    assert [each.rung for each in bench.chain.snapshot().loading] == [GPU]
    bench.standby().alive = False
    bench.serving().act, end_ns = 'late', bench.now_ns + int(5e9)
    waiting = threading.Thread(target=lambda: bench.ask(3.0), daemon=True)
    waiting.start()
    while bench.now_ns < end_ns and waiting.is_alive():
        time.sleep(0.001)
    better_may_load.set()
    waiting.join(30)
    assert not waiting.is_alive() and max(most) == 1


def test_f3_a_standby_is_replaced_while_a_better_engine_is_being_loaded():
    bench = Bench(GPU, CPU)
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.ready()
    better_may_load = threading.Event()

    def load(rung):
        if rung == GPU:
            assert better_may_load.wait(30)

    bench.before_load = load
    bench.now_ns += int(60e9)
    bench.chain.maintain()
    assert [each.rung for each in bench.chain.snapshot().loading] == [GPU]
    dead = bench.standby()
    dead.alive = False
    deadline = time.monotonic() + 30
    while bench.chain.status().standby is None or bench.standby() is dead:
        assert time.monotonic() < deadline
        bench.chain.maintain()
    assert [each.rung for each in bench.chain.snapshot().loading] == [GPU]
    better_may_load.set()
    bench.settle()
    assert bench.chain.status().standby == CPU


class HangsOnThirteen(ScriptedWorker):
    """Stand in for an engine that does not return from one request."""

    def begin(self, inputs):
        super().begin(inputs)
        if (self.request['x'] == 13).all():
            self.act, self.asked_ns = 'late', self.bench.now_ns
            self.bench.hung.append(self)


class HangingBench(Bench):
    """A chain of engines that one request hangs."""

    worker_type = HangsOnThirteen

    def __init__(self, *rungs, **config):
        self.hung = []
        super().__init__(*rungs, **config)


CHAINS_OF_WORKERS = pytest.mark.parametrize('rungs', [(CPU,), (GPU, CPU), (GPU, OTHER_GPU), (GPU, OTHER_GPU, CPU)])
HOT_STANDBY = pytest.mark.parametrize('hot_standby', [True, False])


@CHAINS_OF_WORKERS
@HOT_STANDBY
def test_f4_a_frame_is_answered_although_all_engines_that_were_there_were_stopped(rungs, hot_standby):
    """By one that is loaded for it; the frame is as good as any other."""
    bench = Bench(*rungs, hot_standby=hot_standby).ready()
    stopped = list(bench.workers)
    for worker in stopped:
        worker.stopped = True
    assert bench.ask(3.0)
    assert bench.serving() not in stopped
    (switch,) = bench.switches()
    assert (switch['from'], switch['frames_affected']) == (rungs[0].name, 1)
    bench.now_ns += int(1.5e9)
    bench.settle()
    assert bench.ask(4.0) and not any(worker.alive for worker in stopped)


@pytest.mark.parametrize('load_s', [5.0, 55.0])
def test_f4_a_frame_waits_for_a_load_as_long_as_a_load_may_take(load_s):
    bench = Bench(CPU).ready()

    def load(rung):
        end_ns = bench.now_ns + int(load_s * 1e9)
        if threading.current_thread() is threading.main_thread():
            bench.now_ns = end_ns
        while bench.now_ns < end_ns:
            time.sleep(0.0001)
            # The frame that waits moves the time until its second engine is given up.
            bench.now_ns += int(0.01e9)

    for worker in bench.workers:
        worker.stopped = True
    bench.before_load = load
    before_ns = bench.now_ns
    assert bench.ask(3.0)
    assert bench.now_ns - before_ns > load_s * 1e9


@CHAINS_OF_WORKERS
@HOT_STANDBY
def test_f4_a_request_that_hangs_every_engine_costs_itself_and_no_other(rungs, hot_standby):
    """It ends with the hang limit of one that was loaded for it, which is why it is the request that is to blame."""
    bench = HangingBench(*rungs, hot_standby=hot_standby).ready()
    for value in (1.0, 2.0):
        bench.hung.clear()
        with pytest.raises(InferenceError, match='no runtime can answer this request') as caught:
            bench.ask(13.0)
        assert len(bench.hung) == 2 + hot_standby
        fresh = bench.hung[-1]
        assert f'{fresh.rung.name}, loaded for this request: no answer for 1.0 s' in str(caught.value)
        assert str(caught.value).count(': no answer for') == len(bench.hung)
        assert 'Run the model on this input' in caught.value.remedy
        assert bench.now_ns - fresh.asked_ns < 1.1e9
        assert not fresh.alive
        assert bench.chain.status().state is ChainState.READY and not bench.chain.status().gpu_lost
        assert bench.ask(value) and bench.serving() not in bench.hung
        bench.settle()


def test_f4_a_request_that_hangs_a_driver_for_good_gives_the_gpu_up_all_the_same():
    """No engine is blamed for the request, but the driver holds what a worker has that cannot be ended."""
    bench = HangingBench(GPU, OTHER_GPU, CPU).ready()
    bench.serving().killable = False
    bench.loads_may_end.clear()
    threading.Timer(0.2, bench.loads_may_end.set).start()
    with pytest.raises(InferenceError, match='no runtime can answer this request'):
        bench.ask(13.0)
    bench.now_ns += int(3e9)
    bench.settle()
    assert 'c7.worker_unkillable' in [kind for kind, _ in bench.records]
    assert bench.chain.status().gpu_lost
    assert bench.ask(1.0)


def test_f4_an_engine_that_answers_while_the_one_loaded_for_the_frame_is_late_is_heard():
    bench = HangingBench(CPU).ready()
    second = bench.standby()
    poll = second.poll

    def poll_until_the_third_is_asked(timeout_s):
        if len(bench.hung) == 3:
            second.act = 'answer'
        return poll(timeout_s)

    second.poll = poll_until_the_third_is_asked
    assert bench.ask(13.0)
    assert bench.serving() is second and len(bench.hung) == 3


@pytest.mark.parametrize(
    'act, outcome', [('die', 'the worker has died'), ('fail', 'the engine failed'), ('late', 'no answer for 1.0 s')]
)
def test_f4_what_became_of_the_engine_that_was_loaded_for_a_frame_is_in_the_reason(act, outcome):
    bench = Bench(CPU).ready()
    for worker in bench.workers:
        worker.stopped = True
    make = bench.worker_type

    def make_faulty(rung, made_for):
        worker = make(rung, made_for)
        begin, poll = worker.begin, worker.poll

        def begin_faulty(inputs):
            begin(inputs)
            worker.act = act if (inputs['x'] == 13).all() else 'answer'

        def poll_faulty(timeout_s):
            try:
                return poll(timeout_s)
            except InferenceError as error:
                raise error if worker.alive else WorkerDiedError(error.message) from error

        worker.begin, worker.poll = begin_faulty, poll_faulty
        return worker

    bench.worker_type = make_faulty
    with pytest.raises(InferenceError, match='no answer for .* s, killed; .* no answer for') as caught:
        bench.ask(13.0)
    assert f'loaded for this request: {outcome}' in str(caught.value)
    assert bench.ask(1.0)


def test_f4_a_frame_that_no_engine_could_be_loaded_for_says_why():
    bench = Bench(CPU).ready()
    for worker in bench.workers:
        worker.stopped = True
    bench.load_faults[CPU] = EngineDeserializeError('no memory.')
    with pytest.raises(ChainExhaustedError, match='no memory'):
        bench.ask()


def test_f4_a_worker_that_hangs_for_good_is_given_up_where_no_other_can_be_loaded():
    bench = Bench(CPU).ready()
    bench.standby().alive = False
    bench.load_faults[CPU] = EngineDeserializeError('no memory.')
    hung = bench.serving()
    hung.act = 'late'
    with pytest.raises(ChainExhaustedError):
        bench.ask()
    assert not hung.alive
    bench.load_faults.clear()
    bench.now_ns += int(60e9)
    bench.ask()


def test_f4_a_worker_that_is_given_up_and_cannot_be_killed_is_told_of():
    bench = Bench(GPU, CPU, hot_standby=False).ready()
    bench.load_faults[GPU] = bench.load_faults[CPU] = EngineDeserializeError('no memory.')
    hung = bench.serving()
    hung.act, hung.killable = 'late', False
    with pytest.raises(ChainExhaustedError):
        bench.ask()
    bench.now_ns += int(3e9)
    bench.chain.maintain()
    assert 'c7.worker_unkillable' in [kind for kind, _ in bench.records]
    assert bench.chain.status().gpu_lost


def test_f4_where_two_engines_are_late_the_first_that_answers_at_last_is_heard():
    bench = Bench(GPU, OTHER_GPU, CPU).ready()
    first, second = bench.serving(), bench.standby()
    first.act, first.patience = 'slow', 2
    second.act = 'late'
    bench.loads_may_end.clear()
    answer = bench.ask(7.0)
    assert answer.runtime_label == GPU.strategy
    assert bench.serving() is first and bench.switches() == []
    first.act = second.act = 'answer'
    bench.loads_may_end.set()
    assert bench.ask(8.0).runtime_label == GPU.strategy
    bench.settle()
    assert len(bench.workers) == 2


def test_f4_an_answer_that_comes_late_is_no_answer_to_a_later_frame():
    bench = Bench(GPU, OTHER_GPU, CPU).ready()
    first, second = bench.serving(), bench.standby()
    first.act = 'late'
    assert bench.ask(7.0).runtime_label == OTHER_GPU.strategy
    first.act, second.act = 'answer', 'late'
    assert bench.ask(8.0).runtime_label == GPU.strategy


def with_a_shadow(**config):
    """Have the CPU serve, no rung be loadable, and an engine of another rung be there to take over."""
    bench = Bench(GPU, OTHER_GPU, CPU, hot_standby=False, **config)
    refused = EngineDeserializeError('not now.')
    bench.load_faults = {GPU: refused, OTHER_GPU: refused}
    bench.ready()
    bench.load_faults = {GPU: refused}
    bench.now_ns += int(10e9)
    bench.settle()
    assert (bench.chain.status().active, bench.chain.snapshot().shadow.rung) == (CPU, OTHER_GPU)
    bench.load_faults = {GPU: refused, CPU: refused, OTHER_GPU: refused}
    return bench


def test_f6_an_engine_that_was_to_take_over_serves_at_once_where_nothing_else_does():
    bench = with_a_shadow()
    bench.serving().act = 'die'
    assert bench.ask(7.0).runtime_label == OTHER_GPU.strategy
    (switch,) = bench.switches()
    assert (switch['from'], switch['to'], switch['frames_affected']) == (CPU.name, OTHER_GPU.name, 1)
    assert [worker.rung for worker in bench.workers] == [OTHER_GPU]


def test_f6_an_engine_that_still_runs_a_live_frame_serves_nobody():
    bench = with_a_shadow()
    shadow = bench.chain.snapshot().shadow.host
    shadow.act = 'late'
    bench.ask(6.0)
    shadow.begin = lambda inputs: pytest.fail('it still runs the frame before')
    bench.serving().act = 'die'
    with pytest.raises(ChainExhaustedError):
        bench.ask(7.0)
    assert bench.chain.snapshot().shadow is None and bench.workers == []
    bench.load_faults = {}
    bench.now_ns += int(60e9)
    bench.settle()
    assert bench.chain.status().active == GPU


def test_f6_an_engine_takes_over_between_two_frames_only():
    """One that answers its third live frame while another one is waited for must not push that one aside."""
    bench = Bench(GPU, CPU, hot_standby=False)
    bench.load_faults = {GPU: EngineDeserializeError('not now.')}
    bench.ready()
    bench.load_faults = {}
    bench.now_ns += int(6e9)
    bench.settle()
    for _ in range(2):
        bench.ask()
    shadow, serving = bench.chain.snapshot().shadow.host, bench.serving()
    shadow.act, shadow.patience = 'slow', 2
    bench.ask()
    serving.act, serving.patience = 'slow', 3
    assert bench.chain.infer({'x': np.full((1, 2), 7, np.float32)}).runtime_label == CPU.strategy
    assert bench.serving() is serving and bench.chain.snapshot().shadow.agreements == 3
    bench.chain.maintain()
    assert bench.ask(8.0).runtime_label == GPU.strategy
    assert [switch['to'] for switch in bench.switches()] == [GPU.name]
    assert bench.workers == [shadow]


def test_ac5_an_engine_that_is_heard_at_last_tells_its_alert_once():
    bench = Bench(GPU, CPU).ready()
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.serving().act = 'die'
    bench.ask()
    bench.settle()
    bench.load_faults.clear()
    assert (bench.chain.status().active, bench.chain.status().standby) == (CPU, CPU)
    for worker in bench.workers:
        worker.act, worker.patience = 'slow', 3
    bench.ask()
    alerts = [kind for kind, _ in bench.records if 'fallback' in kind]
    assert sorted(alerts) == ['c7.cpu_fallback', 'c7.fallback_to_onnx_trt_ep']


def test_f8_engines_that_are_late_in_turn_are_one_switch_from_the_first():
    bench = HangingBench(GPU, OTHER_GPU, CPU).ready()
    with pytest.raises(InferenceError, match='loaded for this request'):
        bench.ask(13.0)
    (switch,) = bench.switches()
    assert (switch['from'], switch['to']) == (GPU.name, bench.chain.status().active.name)


def test_n1_a_last_rung_that_died_is_loaded_afresh_when_it_is_proven():
    bench = Bench(CPU, hot_standby=False).ready()
    bench.serving().alive = False
    bench.chain.prove()
    assert bench.serving().alive and len(bench.switches()) == 1


def test_n1_an_exhausted_chain_that_is_proven_tries_a_lost_gpu_again_and_tells_of_the_switch():
    bench = Bench(GPU, OTHER_GPU, CPU)
    for rung in (GPU, OTHER_GPU, CPU):
        bench.load_faults[rung] = EngineDeserializeError('no memory.')
    with pytest.raises(ChainExhaustedError):
        bench.chain.load()
    bench.load_faults.clear()
    bench.chain.prove()
    assert bench.chain.status().active == GPU
    (switch,) = bench.switches()
    assert (switch['from'], switch['to']) == ('none', GPU.name)


def test_f6_a_better_rung_comes_back_after_three_live_frames():
    bench = Bench(GPU, CPU)
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.ready()
    assert bench.chain.status().active == CPU
    bench.load_faults.clear()
    bench.ask()
    bench.now_ns += int(6e9)
    bench.settle()
    for _ in range(3):
        assert bench.ask().runtime_label == 'onnx_trt_ep'
    assert bench.ask().runtime_label == 'tensorrt'
    assert bench.chain.status().standby == CPU
    (switch,) = bench.switches()
    assert (switch['from'], switch['to'], switch['frames_affected']) == (CPU.name, GPU.name, 0)


@pytest.mark.parametrize(
    ('error', 'comes'),
    [
        (GpuUnavailableError('tensorrt', 'this host has no GPU.'), True),
        (RuntimeUnavailableError('tensorrt', 'its package is missing.'), False),
        (EngineSchemaMismatchError('sm', expected=87, found=90), False),
    ],
)
def test_f6_a_gpu_that_is_there_later_is_taken_and_what_cannot_change_is_not_tried_again(error, comes):
    bench = Bench(GPU, CPU)
    bench.load_faults[GPU] = error
    bench.ready()
    bench.load_faults.clear()
    for _ in range(8):
        bench.ask()
        bench.now_ns += int(6e9)
        bench.settle()
    assert (bench.chain.status().active == GPU) is comes


def counted_loads(bench):
    """Return a list that grows with the rung of each attempt to load an engine."""
    attempts, before = [], bench.before_load

    def note(rung):
        attempts.append(rung)
        before(rung)

    bench.before_load = note
    return attempts


def go_on(bench, rounds, ask=True):
    """Let time pass, and the look at the files that each round orders end."""
    for _ in range(rounds):
        with contextlib.suppress(ChainExhaustedError):
            if ask:
                bench.ask()
        bench.now_ns += int(60e9)
        bench.settle()
        time.sleep(0.02)


@pytest.mark.parametrize('change', ['another engine', 'permissions'])
def test_f6_a_refused_engine_is_loaded_again_once_its_file_has_changed_and_not_before(change, tmp_path, monkeypatch):
    monkeypatch.setattr(file_watch, '_LOOK_EVERY_S', 0.0)
    file = tmp_path / 'net.engine'
    file.write_bytes(b'of another host')
    bench = Bench(GPU, CPU, engine_cache_dir=tmp_path)
    bench.load_faults[GPU] = EngineSchemaMismatchError('sm', expected=87, found=90)
    attempts = counted_loads(bench)
    bench.ready()
    go_on(bench, 20)
    assert attempts.count(GPU) == 1, 'nothing has changed'
    bench.load_faults.clear()
    file.chmod(0o600) if change == 'permissions' else file.write_bytes(b'of this host')
    go_on(bench, 20)
    assert bench.chain.status().active == GPU


def test_f7_a_chain_of_refused_engines_alone_is_not_restarted_for_ever(tmp_path, monkeypatch, caplog):
    """One attempt for each change of a file, one line and one record for it; the next change brings it back."""
    monkeypatch.setattr(file_watch, '_LOOK_EVERY_S', 0.0)
    bench = Bench(GPU, CPU, engine_cache_dir=tmp_path)
    attempts = counted_loads(bench)
    bench.ready()
    bench.load_faults |= {rung: EngineSchemaMismatchError('sha256', expected='a', found='b') for rung in (GPU, CPU)}
    for worker in list(bench.workers):
        worker.alive = False
    before = len(attempts)
    go_on(bench, 30)
    assert bench.chain.status().state is ChainState.EXHAUSTED
    # Each rung that died is loaded afresh where it serves, and once more where it would stand by.
    assert len(attempts) - before <= 4
    assert sum('cannot be used' in record.getMessage() for record in caplog.records) <= 2
    assert [kind for kind, _ in bench.records].count('c7.chain_exhausted') == 1
    bench.load_faults.clear()
    (tmp_path / 'net.engine').write_bytes(b'of this host')
    go_on(bench, 10)
    assert bench.chain.status().state is ChainState.READY


def about_to_promote():
    """Return a bench where the CPU serves and the GPU, which was out, is the shadow."""
    bench = Bench(GPU, CPU)
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.ready()
    bench.load_faults.clear()
    bench.ask()
    bench.now_ns += int(6e9)
    bench.settle()
    return bench


def test_f6_a_better_rung_takes_over_once_it_has_answered_every_frame_that_it_was_given():
    """One that still runs a request could not be asked: its first own frame would cost it the GPU."""
    bench = about_to_promote()
    shadow = bench.chain.snapshot().shadow.host
    shadow.act, begin = 'slow', shadow.begin

    def begin_slowly(inputs):
        begin(inputs)
        # It is asked once before it answers.
        shadow.patience = 1 if bench.chain.snapshot().shadow else 0

    shadow.begin = begin_slowly
    for _ in range(8):
        bench.ask()
    assert bench.serving() is shadow
    assert len(bench.switches()) == 1


def test_f6_a_better_rung_that_dies_again_and_again_is_tried_ever_more_seldom():
    """And as soon as at first once it has served for long."""
    bench = Bench(GPU, CPU, promotion_backoff_s=(5.0, 40.0)).ready()
    waited = []
    for serves_s in (1, 1, 1, 1, 1, 50):
        bench.now_ns += int(serves_s * 1e9)
        bench.serving().act = 'die'
        died_ns = bench.now_ns
        while bench.ask().runtime_label != 'tensorrt':
            if bench.chain.snapshot().shadow is None:
                bench.now_ns += int(0.25e9)
            bench.settle()
        waited.append((bench.now_ns - died_ns) / 1e9)
    assert waited == pytest.approx([5, 10, 20, 40, 40, 5], abs=0.5)


class BareBench(Bench):
    """A bare ``.onnx``: no rule says what its outputs hold."""

    rules = ()


@pytest.mark.parametrize('act', ['zeros', 'disagree', 'stale'])
def test_f6_a_gpu_engine_that_answers_zeros_is_not_promoted_over_a_correct_cpu(act):
    bench = BareBench(GPU, CPU)
    bench.load_faults[GPU] = EngineDeserializeError('not now.')
    bench.ready()
    bench.load_faults.clear()
    value = 0
    for _ in range(40):
        bench.now_ns += int(1e9)
        bench.settle()
        for worker in bench.workers:
            if worker.rung is GPU:
                worker.act = act
        bench.ask(value := value + 1)
    assert bench.chain.status().active == CPU and bench.switches() == []
    reason = next(payload['reason'] for kind, payload in bench.records if kind == 'c7.promotion_delayed')
    assert 'disagrees on a live frame' in reason and 'model bundle' in reason


@pytest.mark.parametrize('act', ['die', 'fail', 'disagree'])
def test_f6_a_better_rung_that_dies_fails_or_disagrees_in_the_shadow_costs_no_frame(act):
    bench = about_to_promote()
    bench.chain.snapshot().shadow.host.act = act
    for _ in range(5):
        assert bench.ask().runtime_label == 'onnx_trt_ep'
    assert 'c7.promotion_delayed' in [kind for kind, _ in bench.records]
    assert bench.switches() == []


def test_release_frees_every_worker_also_those_being_loaded():
    bench = Bench(CPU)
    bench.loads_may_end.clear()
    bench.chain.load()
    threading.Timer(0.05, bench.loads_may_end.set).start()
    bench.chain.release()
    deadline = time.monotonic() + 30
    while bench.workers:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert bench.chain.status().standby is None


def test_n10_a_chain_that_is_loaded_beside_another_loads_its_standby_with_its_first_frame():
    bench = Bench(GPU, CPU)
    bench.chain.load(beside=Bench(GPU, CPU).chain)
    bench.chain.shadow({'x': np.ones((1, 2), np.float32)})
    assert len(bench.workers) == 1 and not bench.chain.snapshot().loading
    bench.ask()
    bench.settle()
    assert bench.chain.status().standby == CPU


def test_n10_a_frame_in_the_shadow_alerts_nobody_and_tries_no_other_engine():
    bench = Bench(GPU, CPU)
    with pytest.raises(InferenceError, match='no engine'):
        bench.chain.shadow({'x': np.ones((1, 2), np.float32)})
    bench.chain.load(beside=Bench(GPU, CPU).chain)
    before = list(bench.records)
    answer = bench.chain.shadow({'x': np.full((1, 2), 3, np.float32)})
    assert (answer['x'] == 3).all()
    for act, reason in (('fail', 'failed'), ('late', 'live frame')):
        bench.serving().act = act
        with pytest.raises(InferenceError, match=reason):
            bench.chain.shadow({'x': np.ones((1, 2), np.float32)})
    assert not bench.serving().alive, 'the one that hangs is ended'
    assert bench.records == before and len(bench.workers) == 1


ACTS = st.sampled_from(['answer', 'die', 'late', 'fail', 'disagree'])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just('act'), st.integers(0, 3), ACTS),
        st.tuples(st.just('kill'), st.integers(0, 3)),
        st.tuples(st.just('load'), st.sampled_from([GPU, OTHER_GPU, CPU]), st.booleans()),
        st.tuples(st.just('wait'), st.sampled_from([0.1, 3.0, 40.0])),
        st.tuples(st.sampled_from(['ask', 'settle', 'maintain', 'release', 'prove'])),
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_any_history_of_workers_keeps_the_invariants(steps):
    """Every answer is that of its own frame; nobody is lost or kept twice; one record for each switch."""
    bench = Bench(GPU, OTHER_GPU, CPU, restart_backoff_s=(1.0, 2.0)).ready()
    number = 0.0
    try:
        for step, *values in steps:
            if step == 'act' and bench.workers:
                bench.workers[values[0] % len(bench.workers)].act = values[1]
            elif step == 'kill' and bench.workers:
                bench.workers[values[0] % len(bench.workers)].alive = False
            elif step == 'load':
                bench.load_faults[values[0]] = EngineDeserializeError('no.') if values[1] else None
            elif step == 'wait':
                bench.now_ns += int(values[0] * 1e9)
            elif step == 'ask':
                number += 1.0
                # Wrong and undetected is out of scope for an engine that may serve: late ones and those just
                # loaded may come to it within this call. A shadow's answers are compared.
                shadow = bench.chain.snapshot().shadow
                for worker in list(bench.workers):
                    if worker.act == 'disagree' and (shadow is None or worker is not shadow.host):
                        worker.act = 'answer'
                try:
                    bench.ask(number)
                except ChainExhaustedError:
                    assert bench.chain.status().state is ChainState.EXHAUSTED
                except InferenceError:
                    assert bench.chain.status().state is ChainState.READY
            elif step in ('settle', 'maintain'):
                getattr(bench if step == 'settle' else bench.chain, step)()
            elif step == 'prove':
                with contextlib.suppress(ChainExhaustedError):
                    bench.chain.prove()
            elif step == 'release':
                bench.chain.release()
            status, fleet = bench.chain.status(), bench.chain.snapshot()
            assert len(bench.held()) == len(set(bench.held())), 'an engine has one role'
            assert (status.state is ChainState.READY) == (fleet.serving is not None)
            assert status.active == (fleet.serving.rung if fleet.serving else None)
            assert status.standby == (fleet.standby.rung if fleet.standby else None)
            assert len(bench.workers) <= 8
    finally:
        bench.chain.release()
    deadline = time.monotonic() + 30
    while bench.workers:
        assert time.monotonic() < deadline, 'every engine is freed in the end'
        time.sleep(0.001)


# --- F-3: memory ----------------------------------------------------------------------------------------------------


def refusals(bench):
    payloads = [payload for kind, payload in bench.records if kind == 'c7.memory_refused']
    return [(payload['rung'], payload['needed_bytes']) for payload in payloads]


def held(bench):
    return dict(bench.memory.held())


def test_f3_a_standby_that_does_not_fit_is_refused_and_the_next_rung_stands_by():
    bench = Bench(GPU, OTHER_GPU, CPU, sizes={GPU: 700, OTHER_GPU: 400}).ready()
    bench.settle()
    assert (bench.chain.status().active, bench.chain.status().standby) == (GPU, CPU)
    assert refusals(bench) == [(OTHER_GPU.name, 400)]
    assert held(bench) == {GPU.name: 700}


def test_f3_known_to_be_too_large_it_is_not_loaded_again():
    bench = Bench(GPU, OTHER_GPU, sizes={GPU: 700, OTHER_GPU: 400}).ready()
    loads = []
    bench.before_load = loads.append
    bench.now_ns += int(600e9)
    bench.settle()
    assert loads == []
    assert refusals(bench)[0] == (OTHER_GPU.name, 400) and refusals(bench)[1:].count((OTHER_GPU.name, 400)) >= 1


def better_rung_back(size):
    """Have a rung that was out, and whose size is known, be loaded again beside one that serves with a standby."""
    bench = Bench(GPU, OTHER_GPU, LAST_GPU, CPU, sizes={GPU: size, OTHER_GPU: 400, LAST_GPU: 400})
    measured = bench.memory.claim(GPU.name, key=(id(bench), GPU))
    measured.settle(size)
    measured.release()
    bench.load_faults[GPU] = EngineDeserializeError('not yet.')
    bench.ready()
    assert (bench.chain.status().active, bench.chain.status().standby) == (OTHER_GPU, LAST_GPU)
    bench.load_faults.clear()
    bench.now_ns += int(10e9)
    bench.settle()
    return bench


def test_f3_a_standby_gives_way_to_a_better_engine():
    bench = better_rung_back(500)
    assert bench.chain.status().standby == CPU, 'what needs no GPU memory stands by meanwhile'
    for _ in range(4):
        assert bench.ask().runtime_label
    bench.settle()
    assert (bench.chain.status().active, bench.chain.status().standby) == (GPU, OTHER_GPU)
    assert held(bench) == {OTHER_GPU.name: 400, GPU.name: 500}


def test_f3_a_standby_stays_where_it_would_give_way_for_nothing():
    bench = better_rung_back(700)
    for _ in range(4):
        bench.ask()
    bench.settle()
    assert (bench.chain.status().active, bench.chain.status().standby) == (OTHER_GPU, LAST_GPU)
    assert refusals(bench)[-1] == (GPU.name, 700)
    assert bench.switches() == []


def test_f3_another_models_engine_has_the_standby_of_the_one_that_serves_give_way():
    bench = Bench(GPU, OTHER_GPU, CPU, sizes={GPU: 400, OTHER_GPU: 400}).ready()
    assert bench.chain.status().standby == OTHER_GPU
    new = Bench(GPU, CPU, memory=bench.memory, sizes={GPU: 500})
    new.chain.load(beside=bench.chain)
    assert new.chain.status().active == GPU
    assert (bench.chain.status().active, bench.chain.status().standby) == (GPU, None)
    bench.ask()
    bench.chain.release()
    new.ask()
    new.settle()
    assert held(bench) == {GPU.name: 500}


def test_f3_a_load_gives_way_to_what_is_to_serve():
    """A standby that is being loaded is ended for another model's engine, and its part is free at once."""
    bench = Bench(GPU, OTHER_GPU, sizes={GPU: 700, OTHER_GPU: 200})
    may_end = threading.Event()
    bench.before_load = lambda rung: rung == GPU or may_end.wait(30)
    bench.chain.load()
    deadline = time.monotonic() + 30
    while OTHER_GPU.name not in held(bench):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    threading.Timer(0.1, may_end.set).start()
    new = Bench(GPU, memory=bench.memory, sizes={GPU: 300})
    new.chain.load(beside=bench.chain)
    assert new.chain.status().active == GPU
    assert bench.ask()
    assert held(bench) == {GPU.name: 300}
