"""N-1: transitions one at a time, undone when they fail, and the chain walked on activate; in this process."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from lifecycle_msgs.srv import ChangeState
from rclpy.lifecycle import TransitionCallbackReturn

from gps_denied_c7.errors import C7Error, InferenceError
from gps_denied_c7.failover.in_process import SynchronousHost, in_process_hosts
from gps_denied_c7.ros.lifecycle import ResponsiveLifecycleNode
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineFacts, ProviderSet
from gps_denied_c7.tensors import TensorSpec
from support.harness import LocalNode, image, tensor, wait_until
from support.networks import copying

SUCCESS, FAILURE, ERROR = (
    TransitionCallbackReturn.SUCCESS,
    TransitionCallbackReturn.FAILURE,
    TransitionCallbackReturn.ERROR,
)


class ScriptedNode(ResponsiveLifecycleNode):
    """A node whose transitions do what the test says."""

    def __init__(self, context):
        self.body = lambda: None
        self.undo = None
        self.failed = FAILURE
        self.reported, self.reasons = [], []
        super().__init__('scripted', context=context)

    def report_callback_failure(self, callback, error):
        super().report_callback_failure(callback, error)
        self.reported.append((callback, str(error)))

    def transition_failed(self, label, reason, lasting):
        self.reasons.append((label, reason))

    def on_configure(self, state):
        return self.run_transition('configure', self.body, self.undo, failed=self.failed)

    def on_error(self, state):
        return SUCCESS


@pytest.fixture
def scripted(ros_context):
    node = ScriptedNode(ros_context)
    yield node
    node.destroy_node()


def raising(error):
    def raise_():
        raise error

    return raise_


def test_a_refusal_is_a_failure_with_its_reason_and_no_callback_failure(scripted):
    scripted.body = raising(C7Error('the file is damaged.', remedy='Copy it again.'))
    assert scripted.transition('configure') is False
    assert scripted.lifecycle_state == 'unconfigured'
    assert scripted.reasons == [('configure', 'the file is damaged. Copy it again.')]
    assert scripted.reported == []


def test_n5_an_unexpected_exception_in_a_transition_is_reported(scripted):
    """rclpy would swallow it."""
    scripted.body = raising(KeyError('x'))
    undone = []
    scripted.undo = lambda: undone.append(1)
    assert scripted.transition('configure') is False
    assert scripted.lifecycle_state == 'unconfigured'
    assert undone == [1]
    assert scripted.reported == [('transition configure', "'x'")]
    assert scripted.reasons == [('configure', "KeyError: 'x'")]


def test_n5_an_exception_while_undoing_goes_to_error_processing(scripted):
    scripted.body = raising(C7Error('first.'))
    scripted.undo = raising(RuntimeError('second'))
    assert scripted.transition('configure') is False
    assert scripted.lifecycle_state == 'unconfigured', 'error processing returns there'
    assert scripted.reported == [('transition configure', 'second')]
    scripted.body, scripted.undo = lambda: None, None
    assert scripted.transition('configure') is True


def test_a_transition_that_the_state_does_not_allow_is_false_and_no_exception(scripted):
    assert scripted.transition('activate') is False
    assert scripted.transition('deactivate') is False
    assert scripted.transition('shutdown') is True
    assert scripted.transition('shutdown') is False
    assert scripted.lifecycle_state == 'finalized'


def test_n4_a_second_transition_meanwhile_is_refused(scripted):
    entered, leave = threading.Event(), threading.Event()

    def body():
        entered.set()
        assert leave.wait(30)

    scripted.body = body
    first = threading.Thread(target=scripted.transition, args=('configure',))
    first.start()
    assert entered.wait(30)
    assert scripted.lifecycle_state == 'configuring'
    (change_state,) = [service for service in scripted.services if service.srv_type is ChangeState]
    request = ChangeState.Request()
    request.transition.label = 'configure'
    assert change_state.callback(request, ChangeState.Response()).success is False
    leave.set()
    first.join()
    assert scripted.lifecycle_state == 'inactive'


# --- the inference node, with a rung that this machine lacks ------------------------------------------


class FakeGpuHost(SynchronousHost):
    """Stand in for ONNX Runtime on a GPU, which this machine lacks: answers the image, fails when told to."""

    inputs = (TensorSpec('image', 'float32', (1, 1, 48, 64)),)
    outputs = (TensorSpec('copy', 'float32', (1, 1, 48, 64)),)

    def __init__(self, bench):
        self.bench = bench

    def load(self):
        self.bench.build()
        self.bench.loaded += 1
        return EngineFacts('FakeGpuExecutionProvider', ('FakeGpuExecutionProvider',), False, 0, (), 0.0)

    def infer(self, inputs):
        self.bench.runs += 1
        if self.bench.fails:
            raise InferenceError('the GPU has fallen off the bus.')
        return {'copy': inputs['image'] * np.float32(255)}

    def release(self):
        self.bench.loaded -= 1


class GpuBench:
    """Put FakeGpuHost where the chain's GPU rung is; the CPU rung stays the real one."""

    def __init__(self):
        self.fails = False
        self.loaded = self.runs = 0
        self.on_build = None
        self.build = lambda: None

    def hosts(self, bundle, config, thermal, *, on_build):
        self.on_build = on_build
        real = in_process_hosts(bundle, config, thermal, on_build=on_build)
        return lambda rung: FakeGpuHost(self) if rung.providers is ProviderSet.GPU else real(rung)


@pytest.fixture
def gpu(monkeypatch):
    bench = GpuBench()
    monkeypatch.setattr('gps_denied_c7.pipeline.chain_factory.in_process_hosts', bench.hosts)
    return bench


@pytest.fixture
def peer(near_peer):
    return near_peer


@pytest.fixture
def local(ros_context, tmp_path):
    node = LocalNode(ros_context, model_path=copying(tmp_path), cpu_threads=1, isolation='none')
    yield node
    node.close()


def test_n1_an_activation_that_fails_walks_the_chain_and_becomes_active(gpu, local, peer):
    assert local.node.transition('configure')
    assert local.chain().active.name == 'onnx_trt_ep/gpu'
    gpu.fails = True
    assert local.node.transition('activate')
    assert local.node.lifecycle_state == 'active'
    assert gpu.loaded == 0, 'the failed engine must be freed'
    switch = peer.wait_record('c7.runtime_switched')
    assert (switch['from'], switch['to'], switch['frames_affected']) == ('onnx_trt_ep/gpu', 'onnx_trt_ep/cpu', 0)
    assert 'fallen off the bus' in switch['reason']
    peer.wait_level('Runtime', 'WARN')
    peer.wait_matched('/camera/image_raw')
    answer = peer.ask('/camera/image_raw', image())
    assert (answer.active_provider, answer.is_fallback) == ('CPUExecutionProvider', True)
    peer.wait_record('c7.cpu_fallback')


def test_f5_the_progress_of_a_build_is_on_diagnostics_while_it_lasts(gpu, local, peer):
    built = threading.Event()

    def build():
        seconds = 0
        while not built.wait(0.1):
            seconds += 1
            gpu.on_build(BuildProgress('timing tactics', float(seconds)))

    gpu.build = build
    configure = threading.Thread(target=lambda: local.node.transition('configure'))
    configure.start()
    try:
        peer.wait_level('Runtime', 'WARN')
        wait_until(lambda: peer.values('Runtime').get('building') == 'timing tactics', 'the build on diagnostics')
        assert local.node.lifecycle_state == 'configuring'
        first = int(peer.values('Runtime')['building_s'])
        wait_until(lambda: int(peer.values('Runtime')['building_s']) > first, 'the build to go on')
    finally:
        built.set()
        configure.join()
    assert local.node.lifecycle_state == 'inactive'
    wait_until(lambda: 'building' not in peer.values('Runtime'), 'the end of the build on diagnostics')


def test_n1_activate_fails_when_the_chain_is_exhausted_and_succeeds_when_it_recovers(gpu, local, peer):
    local.set('ort_disallow_cpu_fallback', True)
    assert local.node.transition('configure')
    gpu.fails = True
    assert not local.node.transition('activate')
    assert local.node.lifecycle_state == 'inactive'
    assert peer.node.count_subscribers('/camera/image_raw') == 0
    assert 'fallen off the bus' in peer.wait_record('c7.start_failed')['reason']
    peer.wait_level('Runtime', 'ERROR')
    gpu.fails = False
    assert local.node.transition('activate')
    peer.wait_level('Runtime', 'OK')
    assert gpu.loaded == 1


def test_n1_configure_fails_when_no_rung_loads_and_frees_everything(gpu, local, peer):
    local.set('ort_disallow_cpu_fallback', True)
    gpu.fails = True
    assert not local.node.transition('configure')
    assert local.node.lifecycle_state == 'unconfigured'
    assert gpu.loaded == 0 and gpu.runs == 1
    assert peer.wait_record('c7.start_failed')['transition'] == 'configure'


def test_f2_a_frame_that_a_rung_fails_is_answered_by_the_next(gpu, local, peer):
    """The same frame, no gap in the numbering, one record."""
    assert local.node.transition('configure') and local.node.transition('activate')
    peer.wait_matched('/camera/image_raw')
    assert peer.ask('/camera/image_raw', image(1)).active_provider == 'FakeGpuExecutionProvider'
    gpu.fails = True
    answer = peer.ask('/camera/image_raw', image(2))
    assert (answer.header.stamp.sec, answer.frame_seq) == (2, 1)
    assert answer.active_provider == 'CPUExecutionProvider'
    assert tensor(answer, 'copy').max() == pytest.approx(255, abs=1e-3)
    assert peer.wait_record('c7.runtime_switched')['frames_affected'] == 1
    assert peer.ask('/camera/image_raw', image(3)).frame_seq == 2
    assert gpu.loaded == 0
    wait_until(lambda: peer.values('Runtime').get('switches') == '1', 'the switch on diagnostics')


def test_n1_cleanup_and_shutdown_free_the_engine(gpu, local):
    for _ in range(2):
        assert local.node.transition('configure') and gpu.loaded == 1
        assert local.node.transition('cleanup') and gpu.loaded == 0
    assert local.node.transition('configure') and local.node.transition('activate')
    threads = {thread.name for thread in threading.enumerate()}
    assert 'c7-inference' in threads
    assert local.node.transition('shutdown') and gpu.loaded == 0
    assert 'c7-inference' not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ('label', 'before'),
    [('deactivate', ('configure', 'activate')), ('cleanup', ('configure',)), ('shutdown', ('configure', 'activate'))],
)
def test_n5_an_exception_on_the_way_down_frees_everything_all_the_same(gpu, local, peer, monkeypatch, label, before):
    for transition in before:
        assert local.node.transition(transition)
    method = {'deactivate': '_deactivate', 'cleanup': '_release', 'shutdown': '_release'}[label]
    original, calls = getattr(local.node, method), []

    def broken(*args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError('on the way down')
        return original(*args)

    monkeypatch.setattr(local.node, method, broken)
    assert local.node.transition(label) is False
    assert local.node.lifecycle_state == 'unconfigured'
    assert gpu.loaded == 0
    assert 'on the way down' in peer.wait_record('c7.callback_failed')['error']
    wait_until(lambda: f'failures in transition {label}' in peer.values('Runtime'), 'the failure to be counted')
    wait_until(lambda: 'on the way down' in peer.message('Runtime'), 'the reason')
    assert peer.level('Runtime') == 'ERROR'
    assert peer.payloads('c7.start_failed') == []
    assert local.node.transition('configure') and local.node.transition('activate')
    peer.wait_level('Runtime', 'WARN')


def test_rclpy_takes_the_callback_group_of_the_lifecycle_services(ros_context):
    """N-4: a group of their own, apart from that of the parameter services."""
    node = ScriptedNode(ros_context)
    groups = {}
    for service in node.services:
        groups.setdefault(type(service.callback_group).__name__, set()).add(service.srv_name.rpartition('/')[2])
    node.destroy_node()
    assert {'change_state', 'get_state', 'get_available_states'} <= groups['ReentrantCallbackGroup']
    assert {'get_parameters', 'set_parameters'} <= groups['MutuallyExclusiveCallbackGroup']
    assert not groups['ReentrantCallbackGroup'] & {'get_parameters', 'set_parameters'}
