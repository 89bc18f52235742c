"""F-2, F-7, F-8, AC-5, Risk-2: which rung serves, and what is told when that changes."""

import logging
import shutil
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import (
    ChainExhaustedError,
    EngineDeserializeError,
    InferenceError,
    RuntimeUnavailableError,
    join_reasons,
)
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.in_process import SynchronousHost
from gps_denied_c7.failover.rungs import Rung, build_rungs
from gps_denied_c7.failover.status import ChainState
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import UnknownThermalState
from gps_denied_c7.runtimes.protocol import EngineFacts, ProviderSet
from gps_denied_c7.tensors import TensorSpec, noise_inputs

SPEC = TensorSpec('x', 'float32', (1, 2))
PROOF = noise_inputs([SPEC])['x']
TRT = Rung('tensorrt', ProviderSet.GPU)
ORT = Rung('onnx_trt_ep', ProviderSet.GPU)
PT = Rung('pytorch_fp16', ProviderSet.GPU)
CPU = Rung('onnx_trt_ep', ProviderSet.CPU)
FRAME = {'x': np.ones((1, 2), np.float32)}


def bundle():
    return ModelBundle(name='net', root='/', weights_digest='sha256:' + '0' * 64, inputs=(SPEC,), outputs=(SPEC,))


class FakeHost(SynchronousHost):
    """Stand in for an engine on hardware this machine lacks; ``script`` decides what each call does."""

    inputs = outputs = (SPEC,)

    def __init__(self, rung, bench):
        self.rung, self.bench = rung, bench

    def load(self):
        self.bench.act(self.rung, 'load')
        self.bench.loaded.append(self.rung)
        provider = 'CPUExecutionProvider' if self.rung is CPU else f'{self.rung.strategy}-gpu'
        return EngineFacts(provider, ('asked-first', provider), self.rung is CPU, 0, (), 0.0)

    def infer(self, inputs):
        self.bench.act(self.rung, 'proof' if np.array_equal(inputs['x'], PROOF) else 'infer')
        return {'x': inputs['x']}

    def release(self):
        if self.rung in self.bench.loaded:
            self.bench.loaded.remove(self.rung)


class Bench:
    """A chain over fake hosts, with its clock and everything it told."""

    def __init__(self, *rungs, **config):
        self.records, self.statuses, self.calls, self.loaded = [], [], [], []
        self.faults = {}
        self.now_ns = 0
        self.config = C7InferenceConfig(**{'isolation': 'none', **config})
        self.chain = RuntimeChain(
            bundle(),
            self.config,
            self.make,
            emit=lambda kind, **payload: self.records.append((kind, payload)),
            on_change=self.statuses.append,
            monotonic_ns=lambda: self.now_ns,
            rungs=rungs or None,
        )

    def make(self, rung):
        self.act(rung, 'make')
        return FakeHost(rung, self)

    def act(self, rung, what):
        self.calls.append((rung, what))
        fault = self.faults.get((rung, what))
        if callable(fault):
            fault = fault()
        if fault is not None:
            raise fault

    def kinds(self):
        return [kind for kind, _ in self.records]


def unavailable(rung):
    return {(rung, 'make'): RuntimeUnavailableError(rung.strategy, 'its package is missing.')}


def test_every_gpu_rung_comes_before_the_cpu():
    """F-2."""
    assert build_rungs(C7InferenceConfig(), bundle()) == (TRT, ORT, PT, CPU)
    assert build_rungs(C7InferenceConfig(runtime_chain=('pytorch_fp16',)), bundle()) == (PT, CPU)


def test_no_cpu_rung_where_the_cpu_is_disallowed():
    """F-2, Risk-2."""
    assert build_rungs(C7InferenceConfig(ort_disallow_cpu_fallback=True), bundle()) == (TRT, ORT, PT)


def test_a_bare_onnx_has_an_onnx_runtime_chain():
    """M-1."""
    bare = ModelBundle(name='net', root='/nowhere', weights_digest='sha256:' + '0' * 64)
    assert build_rungs(C7InferenceConfig(), bare) == (ORT, CPU)


def test_configure_loads_and_proves_the_first_usable_rung():
    """N-1."""
    bench = Bench(TRT, ORT, CPU)
    bench.faults = unavailable(TRT)
    bench.chain.load()
    assert bench.chain.status().active == ORT
    assert bench.calls == [(TRT, 'make'), (ORT, 'make'), (ORT, 'load'), (ORT, 'proof')]
    assert bench.loaded == [ORT]


def test_a_rung_that_fails_its_proof_is_released_and_passed_over():
    bench = Bench(TRT, CPU)
    bench.faults = {(TRT, 'proof'): InferenceError('NaN')}
    bench.chain.load()
    assert bench.chain.status().active == CPU
    assert bench.loaded == [CPU]
    assert ('c7.engine_rejected', {'model_name': 'net', 'rung': 'tensorrt/gpu', 'reason': 'NaN'}) in bench.records


@pytest.mark.parametrize('when', ['make', 'load', 'proof', 'infer'])
def test_an_error_of_no_family_costs_the_rung_and_not_the_node(when, caplog):
    """A broken installation raises anything, an ImportError for one."""
    bench = Bench(TRT, CPU)
    if when == 'infer':
        bench.chain.load()
    bench.faults = {(TRT, when): ImportError('libnvinfer.so.10: cannot open shared object file')}
    if when != 'infer':
        bench.chain.load()
    assert bench.chain.infer(FRAME).active_provider == 'CPUExecutionProvider'
    assert 'unexpected' in caplog.text


def test_an_exhausted_chain_names_every_rung_and_keeps_nothing_loaded():
    bench = Bench(TRT, CPU)
    bench.faults = {**unavailable(TRT), (CPU, 'load'): EngineDeserializeError('damaged')}
    with pytest.raises(ChainExhaustedError, match=r'tensorrt/gpu.*missing.*onnx_trt_ep/cpu.*damaged'):
        bench.chain.load()
    assert bench.loaded == []
    assert bench.chain.status().state is ChainState.EXHAUSTED


def test_ac5_fallback_alert_once_with_the_first_served_frame(caplog):
    """AC-5: WARN log, FDR and alert callback at the first infer; later ones are silent."""
    bench = Bench(TRT, ORT, CPU)
    bench.faults = unavailable(TRT)
    with caplog.at_level(logging.WARNING):
        bench.chain.load()
        bench.chain.prove()
        assert 'c7.fallback_to_onnx_trt_ep' not in bench.kinds(), 'a proof serves nobody'
        assert 'c7.fallback_to_onnx_trt_ep' not in caplog.text
        for _ in range(5):
            bench.chain.infer(FRAME)
    assert bench.kinds().count('c7.fallback_to_onnx_trt_ep') == 1
    assert sum('c7.fallback_to_onnx_trt_ep' in line.getMessage() for line in caplog.records) == 1
    payload = dict(bench.records)['c7.fallback_to_onnx_trt_ep']
    assert payload['active_provider'] == 'onnx_trt_ep-gpu'
    assert 'tensorrt' in payload['reason']
    assert bench.statuses[-1].alerts == ('c7.fallback_to_onnx_trt_ep',)


def test_reasons_read_as_one_line():
    reasons = [('a/gpu', 'Absent. Install it.'), ('b/gpu', 'lost')]
    assert join_reasons(reasons) == 'a/gpu: Absent. Install it; b/gpu: lost'


def test_ac5_no_fallback_alert_as_primary():
    bench = Bench(ORT, CPU)
    bench.chain.load()
    bench.chain.infer(FRAME)
    assert bench.records == []
    assert bench.chain.status().alerts == ()
    assert not bench.chain.infer(FRAME).is_fallback


def test_risk2_cpu_alert_once_per_serving_episode():
    """Risk-2: once while it serves, again only after another rung has served."""
    bench = Bench(ORT, CPU)
    bench.faults = unavailable(ORT)
    bench.chain.load()
    for _ in range(3):
        bench.chain.infer(FRAME)
    assert bench.kinds() == ['c7.cpu_fallback']
    payload = bench.records[0][1]
    assert payload['active_provider'] == 'CPUExecutionProvider'
    assert payload['requested_providers'][0] == 'asked-first'
    bench.chain.release()
    bench.chain.load()
    bench.chain.infer(FRAME)
    assert bench.kinds() == ['c7.cpu_fallback'] * 2


def test_ac5_one_episode_of_the_fallback_has_one_alert_whatever_provider_it_moves_to():
    """AC-5, Risk-2: from the GPU to the CPU only what is new is told; a better rung in between ends the episode."""
    bench = Bench(TRT, ORT, CPU)
    bench.faults = unavailable(TRT)
    bench.chain.load()
    bench.chain.infer(FRAME)
    bench.faults[(ORT, 'infer')] = InferenceError('CUDA error 700')
    bench.chain.infer(FRAME)
    assert bench.statuses[-1].alerts == ('c7.fallback_to_onnx_trt_ep', 'c7.cpu_fallback')
    alerts = [kind for kind in bench.kinds() if 'fallback' in kind]
    assert alerts == ['c7.fallback_to_onnx_trt_ep', 'c7.cpu_fallback']


def test_deactivation_does_not_end_a_serving_episode():
    bench = Bench(CPU)
    bench.chain.load()
    bench.chain.infer(FRAME)
    bench.chain.prove()
    bench.chain.infer(FRAME)
    assert bench.kinds() == ['c7.cpu_fallback']


def test_activation_moves_on_where_the_proof_fails():
    """N-1: still active, on the next rung, with one switch recorded."""
    bench = Bench(TRT, ORT)
    bench.chain.load()
    bench.faults = {(TRT, 'proof'): InferenceError('CUDA error 700')}
    bench.chain.prove()
    assert bench.chain.status().active == ORT
    (switch,) = [payload for kind, payload in bench.records if kind == 'c7.runtime_switched']
    assert (switch['from'], switch['to'], switch['frames_affected']) == ('tensorrt/gpu', 'onnx_trt_ep/gpu', 0)
    assert switch['reason'] == 'CUDA error 700'


def test_a_failed_request_is_served_by_the_next_rung_with_the_same_frame():
    """F-2, F-8."""
    bench = Bench(TRT, ORT, CPU)
    bench.chain.load()
    bench.faults = {(TRT, 'infer'): InferenceError('illegal memory access')}
    answer = bench.chain.infer(FRAME)
    assert answer.outputs['x'] is FRAME['x']
    assert (answer.runtime_label, answer.is_fallback) == ('onnx_trt_ep', True)
    assert bench.loaded == [ORT]
    assert bench.kinds().count('c7.runtime_switched') == 1
    assert bench.chain.status().switches == 1


def test_two_gpu_rungs_failing_in_the_window_lose_the_gpu():
    """F-2: straight to the CPU rung."""
    bench = Bench(TRT, ORT, PT, CPU)
    bench.chain.load()
    bench.faults = {(TRT, 'infer'): InferenceError('a'), (ORT, 'infer'): InferenceError('b')}
    assert bench.chain.infer(FRAME).active_provider == 'CPUExecutionProvider'
    assert bench.chain.status().gpu_lost
    assert (PT, 'load') not in bench.calls
    assert bench.kinds().count('c7.runtime_switched') == 1


def test_gpu_rungs_failing_far_apart_do_not_lose_the_gpu():
    bench = Bench(TRT, ORT, PT, CPU, gpu_fault_window_s=10.0)
    bench.chain.load()
    bench.faults = {(TRT, 'infer'): InferenceError('a')}
    bench.chain.infer(FRAME)
    bench.now_ns += int(11e9)
    bench.faults[(ORT, 'infer')] = InferenceError('b')
    assert bench.chain.infer(FRAME).runtime_label == 'pytorch_fp16'
    assert not bench.chain.status().gpu_lost


def test_an_exhausted_chain_is_tried_again_with_growing_pauses():
    """F-7: counted, never given up, never hammered."""
    bench = Bench(CPU, restart_backoff_s=(1.0, 4.0))
    bench.chain.load()
    broken = InferenceError('broken')
    bench.faults = {(CPU, 'infer'): broken, (CPU, 'proof'): broken, (CPU, 'load'): EngineDeserializeError('broken')}
    with pytest.raises(ChainExhaustedError):
        bench.chain.infer(FRAME)
    attempts = []
    for second in range(20):
        before = len(bench.calls)
        with pytest.raises(ChainExhaustedError):
            bench.chain.infer(FRAME)
        if len(bench.calls) > before:
            attempts.append(second)
        bench.now_ns += int(1e9)
    assert attempts == [1, 3, 7, 11, 15, 19]
    bench.faults = {}
    bench.now_ns += int(60e9)
    assert bench.chain.infer(FRAME).runtime_label == 'onnx_trt_ep'
    switch = [payload for kind, payload in bench.records if kind == 'c7.runtime_switched'][-1]
    assert switch['from'] == 'none'


def test_f4_the_last_usable_rung_outlives_a_request_that_it_cannot_answer():
    """F-2, F-7: one image for which the network divides by zero must not silence those that follow."""
    bench = Bench(CPU)
    bench.chain.load()
    bench.calls.clear()
    bench.faults = {(CPU, 'infer'): InferenceError('NaN')}
    for _ in range(3):
        with pytest.raises(InferenceError, match=r'no runtime can answer this request.*onnx_trt_ep/cpu.*NaN'):
            bench.chain.infer(FRAME)
        assert bench.chain.status().state is ChainState.READY
    bench.faults = {}
    assert bench.chain.infer(FRAME).runtime_label == 'onnx_trt_ep'
    assert (CPU, 'load') not in bench.calls, 'nothing was loaded again'
    assert bench.kinds() == ['c7.cpu_fallback']
    assert bench.chain.status().switches == 0


def test_f2_a_request_that_fails_everywhere_is_no_lost_gpu():
    """F-2: it has cost the better rungs, and that is recorded once; it says nothing about the hardware."""
    bench = Bench(TRT, ORT, CPU)
    bench.chain.load()
    bench.faults = {(rung, 'infer'): InferenceError('NaN') for rung in (TRT, ORT, CPU)}
    for _ in range(2):
        with pytest.raises(InferenceError, match='no runtime can answer this request'):
            bench.chain.infer(FRAME)
        status = bench.chain.status()
        assert (status.active, status.switches, status.gpu_lost) == (CPU, 1, False)
    (switch,) = [payload for kind, payload in bench.records if kind == 'c7.runtime_switched']
    assert (switch['from'], switch['to'], switch['reason']) == ('tensorrt/gpu', 'onnx_trt_ep/cpu', 'NaN')


@pytest.mark.parametrize('better', [(), (TRT,)])
def test_f2_the_last_usable_rung_is_loaded_afresh_before_it_is_given_up(better):
    """F-2, F-7: a broken engine is replaced at once, and the same frame is answered by the new one."""
    bench = Bench(*better, CPU)
    bench.chain.load()
    serving = bench.chain.status().active
    faults = iter([InferenceError('context lost')] * (2 if serving is CPU else 1))
    bench.faults = {(CPU, 'load'): EngineDeserializeError('damaged')} if serving is not CPU else {}
    bench.faults |= {(serving, what): lambda: next(faults, None) for what in ('infer', 'proof')}
    assert bench.chain.infer(FRAME).outputs['x'] is FRAME['x']
    assert bench.chain.status().active == serving
    assert bench.calls.count((serving, 'load')) == 2
    assert 'c7.chain_exhausted' not in bench.kinds()


def test_f2_a_last_rung_that_fails_again_when_loaded_afresh_is_given_up():
    """F-7: once for each frame, then the pauses begin."""
    bench = Bench(CPU)
    bench.chain.load()
    state = {'proofs': 0}

    def prove():
        # The proof of a fresh engine passes, that after a frame does not.
        state['proofs'] += 1
        return InferenceError('broken') if state['proofs'] % 2 else None

    bench.faults = {(CPU, 'infer'): InferenceError('broken'), (CPU, 'proof'): prove}
    with pytest.raises(ChainExhaustedError):
        bench.chain.infer(FRAME)
    assert bench.calls.count((CPU, 'load')) == 2
    assert bench.loaded == []


def test_f7_a_gpu_that_was_given_up_is_tried_again_when_nothing_else_serves():
    bench = Bench(TRT, ORT, CPU)
    bench.chain.load()
    lost = InferenceError('lost')
    bench.faults = {(rung, what): lost for rung in (TRT, ORT, CPU) for what in ('infer', 'proof', 'load')}
    del bench.faults[ORT, 'load'], bench.faults[ORT, 'proof']
    with pytest.raises(ChainExhaustedError):
        bench.chain.infer(FRAME)
    assert bench.chain.status().gpu_lost
    bench.faults = {(CPU, 'load'): lost}
    bench.now_ns += int(2e9)
    assert bench.chain.infer(FRAME).runtime_label == 'tensorrt'
    assert not bench.chain.status().gpu_lost


def test_f2_where_the_cpu_is_disallowed_there_is_no_way_but_the_gpu():
    bench = Bench(TRT, ORT, PT)
    bench.chain.load()
    bench.faults = unavailable(PT) | {(rung, 'infer'): InferenceError('NaN') for rung in (TRT, ORT)}
    with pytest.raises(InferenceError, match='no runtime can answer this request'):
        bench.chain.infer(FRAME)
    bench.faults = unavailable(PT)
    assert bench.chain.infer(FRAME).runtime_label == 'onnx_trt_ep'


def test_a_loaded_engine_outlives_its_bundle_on_the_disk(tmp_path):
    """N-1: files that were replaced or deleted meanwhile cost no rung that is loaded, on activation or later."""
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    from gps_denied_c7.demo.network import write_demo_bundle
    from gps_denied_c7.failover.in_process import in_process_hosts

    on_disk = ModelBundle.load(write_demo_bundle(tmp_path / 'bundle'))
    config = C7InferenceConfig(isolation='none', cpu_threads=1)
    hosts = in_process_hosts(on_disk, config, UnknownThermalState())
    chain = RuntimeChain(on_disk, config, hosts, emit=lambda kind, **payload: None, rungs=(CPU,))
    chain.load()
    shutil.rmtree(on_disk.root)
    chain.prove()
    assert chain.status().active == CPU
    assert chain.infer(dict.fromkeys(['image'], np.zeros(on_disk.inputs[0].shape, np.float32))).outputs
    chain.release()


def test_an_idle_chain_recovers_without_a_frame():
    """F-7."""
    bench = Bench(CPU)
    bench.faults = {(CPU, 'load'): EngineDeserializeError('not yet')}
    with pytest.raises(ChainExhaustedError):
        bench.chain.load()
    bench.faults = {}
    bench.chain.maintain()
    assert bench.chain.status().state is ChainState.EXHAUSTED, 'the pause is not over'
    bench.now_ns += int(2e9)
    bench.chain.maintain()
    assert bench.chain.status().state is ChainState.READY


def test_release_is_safe_to_repeat_and_forgets_failures():
    bench = Bench(TRT, CPU)
    bench.faults = unavailable(TRT)
    bench.chain.load()
    bench.chain.release()
    bench.chain.release()
    assert bench.loaded == []
    assert bench.chain.status().failures == ()
    assert bench.chain.status().state is ChainState.UNLOADED


def test_a_hung_request_does_not_hang_release_or_status():
    """N-8: what hangs is named and left behind."""
    bench = Bench(CPU)
    bench.chain.load()
    entered, leave = threading.Event(), threading.Event()

    def hang():
        entered.set()
        leave.wait(30)

    bench.faults = {(CPU, 'infer'): hang}
    worker = threading.Thread(target=bench.chain.infer, args=(FRAME,))
    worker.start()
    entered.wait(10)
    assert bench.chain.status().active == CPU
    with pytest.raises(InferenceError, match='still runs a request'):
        bench.chain.release(timeout_s=0.05)
    leave.set()
    worker.join(10)
    bench.chain.release()
    assert bench.loaded == []


FAULTS = st.dictionaries(
    st.tuples(st.sampled_from([TRT, ORT, PT, CPU]), st.sampled_from(['make', 'load', 'proof', 'infer'])),
    st.sampled_from([InferenceError('i'), EngineDeserializeError('d'), RuntimeUnavailableError('x', 'u')]),
)
STEPS = st.lists(
    st.tuples(st.sampled_from(['load', 'prove', 'infer', 'maintain', 'release', 'wait']), FAULTS), max_size=30
)


@given(STEPS)
def test_any_history_keeps_the_invariants(steps):
    """At most one engine is loaded, it is the one that serves, and an answer comes from it."""
    bench = Bench(TRT, ORT, PT, CPU)
    for step, faults in steps:
        bench.faults = faults
        try:
            if step == 'wait':
                bench.now_ns += int(31e9)
            elif step == 'infer':
                answer = bench.chain.infer(FRAME)
                assert bench.chain.status().active.strategy == answer.runtime_label
                assert (bench.chain.status().active, 'infer') not in faults
            else:
                getattr(bench.chain, step)()
        except ChainExhaustedError:
            assert bench.chain.status().state is ChainState.EXHAUSTED
        except InferenceError:
            active = bench.chain.status().active
            assert step == 'infer' and (active, 'infer') in faults and (active, 'proof') not in faults
        status = bench.chain.status()
        assert bench.loaded == ([status.active] if status.active else [])
        assert (status.state is ChainState.READY) == (status.active is not None)
        assert status.is_fallback == (status.active not in (None, TRT))
        if status.gpu_lost and status.active:
            assert status.active == CPU
