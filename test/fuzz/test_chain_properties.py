"""F-2 to F-4, F-6 to F-8: no history of loads, answers, crashes, hangs and releases breaks what the chain promises."""

from __future__ import annotations

import contextlib
from collections import Counter

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from gps_denied_c7.errors import (
    ChainExhaustedError,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    InferenceError,
    RuntimeUnavailableError,
    WorkerDiedError,
)
from gps_denied_c7.failover.loader import EngineLoader
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.failover.status import ChainState
from gps_denied_c7.model.compare import AllClose
from gps_denied_c7.runtimes.protocol import ProviderSet
from support.scripted_workers import CPU, GPU, OTHER_GPU, Bench, ScriptedWorker

ORT_GPU = Rung('onnx_trt_ep', ProviderSet.GPU)
CHAINS = ((GPU, OTHER_GPU, CPU), (GPU, ORT_GPU, CPU), (ORT_GPU, CPU), (CPU,), (GPU, OTHER_GPU))
LOAD_FAULTS = {
    'refused': EngineDeserializeError('no memory.'),
    'died': WorkerDiedError('the worker was ended by SIGSEGV.'),
    'absent': RuntimeUnavailableError('tensorrt', 'is not installed.'),
    'another digest': EngineSchemaMismatchError('engine_sha256', expected='a', found='b'),
    'unexpected': OSError('a driver call failed'),
}
LASTING = tuple(str(LOAD_FAULTS[fault]) for fault in ('absent', 'another digest'))
ALERTS = ('c7.fallback_to_onnx_trt_ep', 'c7.cpu_fallback')


class FakeWorkerUnderWatch(ScriptedWorker):
    """Note what the chain must not do to it; what is raised inside a host would only cost that host."""

    def __init__(self, rung, bench):
        super().__init__(rung, bench)
        self.output = None
        bench.created.append(self)
        status = bench.chain.status()
        if status.gpu_lost and rung.providers is ProviderSet.GPU and CPU in bench.chain.rungs and status.active != CPU:
            bench.violations.append(f'{rung.name} is loaded on a lost GPU before the CPU serves')

    def _is_asked(self, what):
        if self.released:
            self.bench.violations.append(f'{what} of a released host of {self.rung.name}')

    def load(self):
        self._is_asked('load')
        return super().load()

    def begin(self, inputs):
        self._is_asked('begin')
        if self.request is not None:
            # As WorkerHost refuses it: one that could not be killed may be asked for its proof.
            raise InferenceError('the worker still runs the request before.')
        if not self.alive:
            raise WorkerDiedError('the worker is dead.')
        super().begin(inputs)
        self.patience = 2

    def poll(self, timeout_s):
        self._is_asked('poll')
        if self.alive and self.request is not None and self.act == 'raise':
            self.request = None
            raise OSError('a driver call failed')
        try:
            outputs = super().poll(timeout_s)
        except InferenceError as error:
            raise error if self.alive else WorkerDiedError(error.message) from error
        if outputs is not None:
            self.output = outputs['x']
        return outputs


class WatchedLoader(EngineLoader):
    """Loads that may end have ended before the chain goes on."""

    def __init__(self, bench, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bench = bench

    def start(self, rung):
        load = super().start(rung)
        if self.bench.loads_may_end.is_set():
            assert load.done.wait(30)
        return load

    def find(self, rung):
        if (load := super().find(rung)) is not None:
            load.done = AwaitedByChain(self.bench, load.done)
        return load

    def cancel(self, loads):
        # A process that is killed ends its load, held or not.
        held = not self.bench.loads_may_end.is_set()
        self.bench.loads_may_end.set()
        super().cancel(loads)
        assert all(load.done.wait(30) for load in loads)
        if held:
            self.bench.loads_may_end.clear()


class AwaitedByChain:
    """The end of a load: where the chain has nothing else to do than wait for it, no load is held any more."""

    def __init__(self, bench, done):
        self.bench, self.is_set, self.set, self.wait_for = bench, done.is_set, done.set, done.wait

    def wait(self, timeout=None):
        if timeout is None:
            self.bench.open_gate()
        return self.wait_for(timeout)


class WatchedBench(Bench):
    """A chain over workers under watch; a load that may end has ended before the chain goes on."""

    worker_type, rules = FakeWorkerUnderWatch, (AllClose('x', 0.0, 0.1),)

    def __init__(self, *rungs, sizes, **config):
        self.created, self.violations = [], []
        super().__init__(*rungs, sizes=sizes, **config)

    def make_loader(self, *args, **kwargs):
        return WatchedLoader(self, *args, **kwargs)

    def open_gate(self):
        self.loads_may_end.set()
        for load in self.chain.snapshot().loading:
            assert load.done.wait(30)


class ChainMachine(RuleBasedStateMachine):
    """Drive a chain through any history, and hold it to its promises after each step."""

    @initialize(
        rungs=st.sampled_from(CHAINS), hot_standby=st.booleans(),
        sizes=st.fixed_dictionaries(dict.fromkeys((GPU, OTHER_GPU, ORT_GPU), st.sampled_from([None, 200, 400, 500]))),
    )  # fmt: skip
    def begin(self, rungs, hot_standby, sizes):
        # Any two fit together, and not any three.
        self.bench = WatchedBench(
            *rungs, sizes=sizes, hot_standby=hot_standby, restart_backoff_s=(1.0, 4.0), promotion_backoff_s=(2.0, 8.0),
            inference_deadline_ms=100.0, hang_timeout_ms=300.0, configure_budget_s=0.001,
        )  # fmt: skip
        self.chain, self.number, self.seen = self.bench.chain, 0.0, 0
        self.serving, self.switches, self.episode, self.alerts = None, 0, None, Counter()
        self.state, self.host = ChainState.UNLOADED, None

    # --- what happens to the workers --------------------------------------------------------------

    @rule(index=st.integers(0, 5), act=st.sampled_from(['answer', 'die', 'late', 'slow', 'fail', 'disagree', 'raise']))
    def script(self, index, act):
        if self.bench.workers:
            self.bench.workers[index % len(self.bench.workers)].act = act

    @rule(act=st.sampled_from(['answer', 'die', 'late', 'slow', 'fail', 'raise']))
    def script_all(self, act):
        for worker in self.bench.workers:
            worker.act = act

    @rule(index=st.integers(0, 5))
    def crash(self, index):
        if self.bench.workers:
            self.bench.workers[index % len(self.bench.workers)].alive = False

    @rule(index=st.integers(0, 5))
    def stop(self, index):
        if self.bench.workers:
            self.bench.workers[index % len(self.bench.workers)].stopped = True

    @rule(index=st.integers(0, 5))
    def make_unkillable(self, index):
        if self.bench.workers:
            worker = self.bench.workers[index % len(self.bench.workers)]
            worker.act, worker.killable = 'late', False

    @rule(index=st.integers(0, 2), fault=st.sampled_from([None, None, *LOAD_FAULTS]))
    def refuse_loads(self, index, fault):
        rungs = self.chain.rungs
        self.bench.load_faults[rungs[index % len(rungs)]] = LOAD_FAULTS[fault] if fault else None

    @rule(wait_s=st.sampled_from([0.05, 0.4, 1.5, 5.0, 70.0]))
    def wait(self, wait_s):
        self.bench.now_ns += int(wait_s * 1e9)

    @rule()
    def hold_loads(self):
        self.bench.loads_may_end.clear()

    @rule()
    def let_loads_end(self):
        self.bench.open_gate()

    # --- what the node asks -----------------------------------------------------------------------

    @rule(times=st.integers(1, 4))
    def infer(self, times):
        for _ in range(times):
            self.number += 1.0
            request = {'x': np.full((1, 2), self.number, np.float32)}
            try:
                answer = self.chain.infer(request)
            except ChainExhaustedError:
                self.follow()
                assert self.chain.status().state is ChainState.EXHAUSTED
                continue
            except InferenceError:
                self.follow()
                assert self.chain.status().state is ChainState.READY
                continue
            self.follow()
            (maker,) = [worker for worker in self.bench.created if worker.output is answer.outputs['x']]
            assert (answer.runtime_label, answer.active_provider) == (maker.rung.strategy, maker.rung.name)
            expected = self.number + (maker.act == 'disagree')
            assert (answer.outputs['x'] == expected).all(), 'an answer is of its own frame'
            assert answer.is_fallback == (maker.rung != self.chain.rungs[0])
            assert self.chain.status().active == maker.rung
            standing = self.chain.status().alerts
            assert {kind: self.alerts[kind] for kind in ALERTS} == {kind: int(kind in standing) for kind in ALERTS}

    @rule()
    def maintain(self):
        self.chain.maintain()
        self.follow()

    @rule()
    def prove(self):
        with contextlib.suppress(ChainExhaustedError):
            self.chain.prove()
        self.follow()

    @rule()
    def load_anew(self):
        self.release()
        try:
            self.chain.load()
        except ChainExhaustedError:
            assert self.chain.status().state is ChainState.EXHAUSTED
        self.follow()

    @rule()
    def release(self):
        self.bench.open_gate()
        self.chain.release()
        self.follow()
        assert self.chain.status().state is ChainState.UNLOADED
        assert not self.chain.snapshot().loading and not self.bench.held()
        assert all(worker.released for worker in self.bench.created)

    @rule()
    def recover(self):
        """Heal everything: the best rung that nothing lasting speaks against serves after a while, if there is one."""
        self.bench.open_gate()
        self.bench.load_faults.clear()
        for _ in range(12):
            for worker in self.bench.workers:
                worker.act, worker.killable, worker.stopped = 'answer', True, False
            self.bench.now_ns += int(70e9)
            self.maintain()
            self.infer(4)
        status = self.chain.status()
        failures = dict(status.failures)
        usable = [rung for rung in self.chain.rungs if failures.get(rung.name) not in LASTING]
        if status.state is ChainState.EXHAUSTED:
            # No file has changed, so that no load would end otherwise.
            assert not usable
            return
        assert status.state is ChainState.READY
        if status.gpu_lost and CPU in self.chain.rungs:
            assert status.active == CPU
            assert 'c7.worker_unkillable' in [kind for kind, _ in self.bench.records]
        elif usable and not status.gpu_lost:
            assert status.active == usable[0]

    # --- what holds after each step ---------------------------------------------------------------

    def follow(self):
        """Read the records of one call: they lead from the rung that served before it to the one that serves now."""
        records, self.seen = self.bench.records[self.seen :], len(self.bench.records)
        status, serving = self.chain.status(), self.chain.snapshot().serving
        host = serving.host if serving is not None else None
        switched = 0
        for kind, payload in records:
            if kind == 'c7.runtime_switched':
                switched += 1
                assert payload['from'] == (self.serving or 'none')
                self.serving = self.in_episode_of(payload['to'])
            elif kind in ALERTS:
                self.alerts[kind] += 1
                assert self.alerts[kind] == 1, 'one alert for each serving episode'
        if status.state is not ChainState.READY:
            self.serving = None
            if status.state is ChainState.UNLOADED:
                self.in_episode_of(None)
        elif self.state is not ChainState.READY and not switched:
            assert self.state is ChainState.UNLOADED
            self.serving = status.active.name
            self.episode = self.serving
        assert self.serving == (status.active.name if status.active else None)
        if ChainState.READY is self.state is status.state:
            assert (switched > 0) == (host is not self.host), 'one record for each change of the serving engine'
        self.switches = 0 if status.state is ChainState.UNLOADED else self.switches + switched
        assert status.switches == self.switches
        self.state, self.host = status.state, host

    def in_episode_of(self, name):
        """
        Note whose serving episode it is; one that was exhausted in between and returns goes on with its own.

        An alert that is true of the rung before and of this one was told already.
        """
        if name != self.episode:
            self.episode = name
            standing = [] if name is None else self.standing(name)
            self.alerts = Counter({kind: count for kind, count in self.alerts.items() if kind in standing})
        return name

    def standing(self, name):
        """Return the alerts that are true while a rung serves."""
        falls_back = name.startswith('onnx_trt_ep') and self.chain.rungs[0].strategy != 'onnx_trt_ep'
        return [kind for kind, true in zip(ALERTS, (falls_back, name == CPU.name), strict=True) if true]

    @invariant()
    def promises(self):
        if not hasattr(self, 'bench'):
            return
        status, fleet, rungs = self.chain.status(), self.chain.snapshot(), self.chain.rungs
        assert self.bench.violations == []
        held = [engine.host for engine in self.bench.held()]
        assert len(held) == len(set(held)), 'an engine has one role'
        assert not [worker for worker in held if worker.released]
        loading = {load.host for load in fleet.loading}
        assert all(worker.released or worker in held or worker in loading for worker in self.bench.created)
        assert len(loading) <= max(1, len(rungs))
        claims = self.bench.memory.held()
        assert sum(taken for _, taken in claims) <= self.bench.memory.total_bytes
        assert Counter(name for name, _ in claims) <= Counter(
            worker.rung.name for worker in self.bench.created if not worker.gone
        ), 'whoever is gone holds no memory'
        assert (status.state is ChainState.READY) == (fleet.serving is not None) == (status.active is not None)
        assert status.active == (fleet.serving.rung if fleet.serving else None)
        assert fleet.serving is None or fleet.serving.host.request is None, 'it could not be asked'
        assert status.standby == (fleet.standby.rung if fleet.standby else None)
        if fleet.shadow is not None:
            assert fleet.serving is not None, 'where nothing else serves, it does'
            assert rungs.index(fleet.shadow.rung) < rungs.index(fleet.serving.rung), 'a shadow is a better rung'

    def teardown(self):
        if hasattr(self, 'bench'):
            self.release()
            assert self.bench.violations == []
            for worker in list(self.bench.workers):
                assert worker.released and not worker.killable
                worker.killable = True
                worker.join(0.0)
            assert self.bench.workers == []


def test_f2_no_history_breaks_the_promises_of_the_chain():
    run_state_machine_as_test(
        ChainMachine,
        settings=settings(
            max_examples=150, stateful_step_count=25, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
