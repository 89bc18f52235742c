"""F-1, F-4: real worker processes that answer, die, hang, lie, and leave nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

import onnx
from onnx import TensorProto, helper

from gps_denied_c7.child_environment import worker_environment
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.demo.network import write_demo_bundle
from gps_denied_c7.errors import (
    C7Error,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    GpuMemoryError,
    GpuUnavailableError,
    InferenceError,
    ModelBundleError,
    RuntimeUnavailableError,
)
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.in_process import in_process_hosts
from gps_denied_c7.failover.memory_budget import GpuMemoryBudget
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import UnknownThermalState
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineFacts, ProviderSet
from gps_denied_c7.worker import build_timeout
from gps_denied_c7.worker import process as worker_process
from gps_denied_c7.worker import server as worker_server
from gps_denied_c7.worker.channel import PROTOCOL_VERSION, Channel, ChannelClosedError, MessageError, Ready
from gps_denied_c7.worker.client import WorkerHost, worker_hosts
from gps_denied_c7.worker.log import WorkerLog
from gps_denied_c7.worker.process import WorkerProcess
from gps_denied_c7.worker.protocol import (
    WORKER_PROTOCOL,
    Answer,
    AnswerNext,
    ErrorReport,
    Failed,
    Infer,
    InferNext,
    Loaded,
    Loading,
    MapAnswers,
    MapRequests,
    NeedRoom,
    Ping,
    Pong,
    Progress,
)
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout
from gps_denied_c7.worker.spare import SpareWorker

CPU = Rung('onnx_trt_ep', ProviderSet.CPU)
GPU = Rung('onnx_trt_ep', ProviderSet.GPU)
CONFIG = C7InferenceConfig(cpu_threads=1)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory) -> ModelBundle:
    return ModelBundle.load(write_demo_bundle(tmp_path_factory.mktemp('model') / 'bundle'))


@pytest.fixture
def worker(bundle):
    host = worker_hosts(bundle, CONFIG)(CPU)
    host.load()
    yield host
    host.release()


def stop(pid):
    """Stop a child and wait until it stands: until then its other threads may go on, and answer or end."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


def wait_until(condition, what, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return value


def descriptors() -> int:
    return len(os.listdir('/proc/self/fd'))


def is_gone(pid: int) -> bool:
    return not Path(f'/proc/{pid}').exists()


def test_f1_a_worker_answers_as_the_same_runtime_in_this_process_does(bundle, worker):
    here = in_process_hosts(bundle, CONFIG, UnknownThermalState())(CPU)
    here.load()
    assert (worker.inputs, worker.outputs) == (here.inputs, here.outputs)
    request = bundle.golden_inputs()
    for _ in range(3):
        asked_ns = time.monotonic_ns()
        ours, theirs = here.infer(request), worker.infer(request)
        assert asked_ns < here.ran_ns[0] < here.ran_ns[1] < worker.ran_ns[0] < worker.ran_ns[1] < time.monotonic_ns()
        assert list(ours) == list(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert not theirs[name].flags.writeable
    here.release()


def test_f1_the_engine_writes_its_answers_into_the_segment(bundle):
    """F-1: from the second answer on nothing is copied, whatever segment is current."""
    host = in_process_hosts(bundle, CONFIG, UnknownThermalState())(CPU)
    host.load()
    request = bundle.golden_inputs()
    first = host.infer(request)
    for _ in range(2):
        segment = SharedTensors.create(TensorLayout.of(first).size, writable=True)
        views = segment.arrays(TensorLayout.of(first))
        host.place(outputs=views)
        answer = host.infer(request)
        for name, view in views.items():
            assert np.shares_memory(answer[name], view)
            assert not answer[name].flags.writeable
        assert not bundle.compare(views, bundle.golden_outputs())
    host.release()


def test_f1_the_engine_is_told_once_where_requests_come_and_answers_are_wanted():
    """F-1: so that a GPU reads and writes the memory that both processes see, and nobody copies in between."""
    placed = []

    class FakeHost:
        outputs = ()

        def place(self, **arrays):
            placed.append(arrays)

        def infer(self, inputs):
            number = int(inputs['x'][0])
            self.ran_ns = (10 * number, 11 * number)
            return {'twice': inputs['x'] * 2}

    ours, theirs = Channel.pair(WORKER_PROTOCOL)
    service = worker_server.EngineService(theirs)
    service._host = FakeHost()

    def serve():
        with contextlib.suppress(ChannelClosedError):
            service.run()

    thread = threading.Thread(target=serve)
    thread.start()
    layout = TensorLayout.of({'x': np.zeros(5, np.float32)})
    requests, answers = (SharedTensors.create(layout.size, writable=True) for _ in range(2))
    request = requests.arrays(layout)['x']
    ours.send(MapRequests(), [requests.descriptor])
    for number in (1, 2, 3):
        request[...] = number
        if number == 1:
            ours.send(Infer(number, layout))
            assert isinstance(ours.receive()[0], NeedRoom)
            ours.send(MapAnswers(), [answers.descriptor])
            answer = ours.receive()[0]
            assert isinstance(answer, Answer) and answer.ran_ns == (10, 11)
            twice = answers.arrays(answer.layout)['twice']
        else:
            ours.send(InferNext(number))
            assert ours.receive()[0] == AnswerNext(number, 10 * number, 11 * number)
        assert list(twice) == [2 * number] * 5
    assert [list(arrays) for arrays in placed] == [['inputs'], ['outputs']]
    request[...], twice[...] = 7, 8
    assert list(placed[0]['inputs']['x']) == [7] * 5 and not placed[0]['inputs']['x'].flags.writeable
    assert list(placed[1]['outputs']['twice']) == [8] * 5
    ours.close()
    thread.join()
    theirs.close()


def test_f1_a_request_may_be_written_in_place(bundle, worker):
    request = bundle.golden_inputs()
    expected = {name: array.copy() for name, array in worker.infer(request).items()}
    in_place = worker.request_arrays
    for name, array in in_place.items():
        array[...] = 0
        array[...] = request[name]
    for name, array in worker.infer(in_place).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM])
def test_f1_a_death_while_idle_is_an_error_that_names_the_signal(bundle, worker, number):
    os.kill(worker.pid, number)
    wait_until(lambda: not worker.alive, 'the death to be seen')
    with pytest.raises(InferenceError, match=number.name):
        worker.infer(bundle.golden_inputs())


def test_f1_a_death_at_work_is_an_error_and_the_request_stays_readable(bundle, worker):
    request = bundle.golden_inputs()
    worker.infer(request)
    in_place = dict(worker.request_arrays)
    stop(worker.pid)
    worker.begin(in_place)
    assert worker.poll(0.05) is None
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(InferenceError, match='SIGKILL'):
        worker.poll(None)
    worker.release()
    for name, array in in_place.items():
        np.testing.assert_array_equal(array, request[name])


def test_f4_a_hung_worker_is_killed_and_a_late_one_answers(bundle, worker):
    stop(worker.pid)
    worker.begin(bundle.golden_inputs())
    assert worker.poll(0.05) is None
    os.kill(worker.pid, signal.SIGCONT)
    assert worker.poll(30.0) is not None
    stop(worker.pid)
    worker.begin(bundle.golden_inputs())
    worker.kill()
    with pytest.raises(InferenceError, match='SIGKILL'):
        worker.poll(None)


def test_f3_a_worker_that_is_stopped_gives_no_sign_of_life_and_answers_once_it_goes_on(bundle, worker):
    request = bundle.golden_inputs()
    expected = {name: array.copy() for name, array in worker.infer(request).items()}
    deadline = time.monotonic() + 0.8
    while time.monotonic() < deadline:
        assert worker.responds(30.0)
        time.sleep(0.01)
    stop(worker.pid)
    wait_until(lambda: not worker.responds(0.3), 'its silence to be noticed')
    assert worker.alive
    os.kill(worker.pid, signal.SIGCONT)
    # The sign that was asked for comes before the answer.
    for name, array in worker.infer(request).items():
        np.testing.assert_array_equal(array, expected[name])
    wait_until(lambda: worker.responds(30.0) and worker._asked_at is None, 'the next sign of life')


def test_f3_a_dead_worker_gives_no_sign_of_life(worker):
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not worker.responds(30.0), 'its death to be noticed')


def test_f1_nothing_stays_behind(bundle):
    """No process, no zombie, no descriptor, no segment; released twice, at work, or dead."""
    before = None
    for turn in range(6):
        host = worker_hosts(bundle, CONFIG)(CPU)
        host.load()
        pid = host.pid
        host.infer(bundle.golden_inputs())
        if turn % 3 == 1:
            host.begin(bundle.golden_inputs())
        elif turn % 3 == 2:
            os.kill(pid, signal.SIGKILL)
        host.release()
        host.release()
        assert host.join(30) and is_gone(pid)
        if turn == 2:
            before = wait_until_flat()
    assert wait_until_flat() <= before


def wait_until_flat() -> int:
    """Return the number of descriptors once the threads that forward logs have ended."""
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == 'c7-worker-log'], 'the log threads')
    return descriptors()


def test_f1_a_worker_dies_with_its_node(bundle, tmp_path):
    """Also where the node is killed and can free nothing, and the worker is stopped."""
    code = f"""
import sys, time
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.runtimes.protocol import ProviderSet
from gps_denied_c7.worker.client import worker_hosts
host = worker_hosts(ModelBundle.load(__import__('pathlib').Path({str(bundle.root)!r})), C7InferenceConfig())(
    Rung('onnx_trt_ep', ProviderSet.CPU))
host.load()
print(host.pid, flush=True)
time.sleep(600)
"""
    for stop_first in (False, True):
        node = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
        pid = int(node.stdout.readline())
        if stop_first:
            os.kill(pid, signal.SIGSTOP)
        node.kill()
        node.wait()
        node.stdout.close()
        wait_until(lambda pid=pid: is_gone(pid) or 'Z' in Path(f'/proc/{pid}/stat').read_text().split()[2], 'its end')


def test_f1_what_a_worker_is(worker):
    """Its own session, no signal of the terminal, no core dump, first in line when memory runs out."""
    status = Path(f'/proc/{worker.pid}/status').read_text()
    ignored = int(next(line for line in status.splitlines() if line.startswith('SigIgn')).split()[1], 16)
    assert ignored & 1 << (signal.SIGINT - 1)
    assert os.getsid(worker.pid) == worker.pid
    assert 'Max core file size        0                    0' in Path(f'/proc/{worker.pid}/limits').read_text()
    assert int(Path(f'/proc/{worker.pid}/oom_score_adj').read_text()) > int(
        Path('/proc/self/oom_score_adj').read_text()
    )


def test_f1_a_worker_comes_first_where_memory_runs_out_before_it_runs_any_python(bundle, tmp_path, monkeypatch):
    """F-1: while another one's memory is still being freed, it is the only one to take besides the node."""
    found = tmp_path / 'score'
    interpreter = tmp_path / 'python'
    interpreter.write_text(f'#!/bin/sh\ncat /proc/self/oom_score_adj >{found}\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(interpreter))
    host = worker_hosts(bundle, CONFIG)(CPU)
    host.load()
    host.release()
    assert int(found.read_text()) == min(1000, int(Path('/proc/self/oom_score_adj').read_text()) + 800)


def test_f1_a_worker_inherits_nothing_of_ros():
    vendors = {'CUDA_VISIBLE_DEVICES': '0', 'PATH': '/bin', 'LD_PRELOAD': 'libgomp.so.1'}
    kept = worker_environment({**vendors, 'ROS_DOMAIN_ID': '7', 'FASTRTPS_DEFAULT_PROFILES_FILE': 'x'})
    assert vendors.items() <= kept.items()
    assert not {'ROS_DOMAIN_ID', 'FASTRTPS_DEFAULT_PROFILES_FILE'} & set(kept)


@pytest.mark.parametrize('rung', [CPU, GPU])
def test_f2_the_cpu_rung_sees_no_gpu(bundle, monkeypatch, rung):
    """Told by the environment of the worker as its vendor's library finds it."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    seen = []

    class FakeHost:
        inputs = outputs = ()

        def load(self):
            seen.append(os.environ['CUDA_VISIBLE_DEVICES'])
            return EngineFacts('cpu provider', (), True, 0, (), 0.0)

    monkeypatch.setattr(worker_server, 'in_process_hosts', lambda *args, **kwargs: lambda rung: FakeHost())
    ours, theirs = Channel.pair(WORKER_PROTOCOL)
    with tempfile.TemporaryFile() as file:
        file.write(pickle.dumps(worker_server.WorkerTask(bundle, CONFIG, rung)))
        file.flush()
        worker_server.EngineService(theirs)._load(os.dup(file.fileno()))
    assert [type(ours.receive()[0]) for _ in range(2)] == [Loading, Loaded]
    assert seen == ['' if rung is CPU else '0']
    ours.close()
    theirs.close()


def test_f3_a_worker_for_the_gpu_that_does_not_fit_is_not_started(bundle):
    memory = GpuMemoryBudget(1000)
    memory.claim('tensorrt/gpu', key='its model').settle(800)
    host = worker_hosts(bundle, CONFIG, memory=memory)(GPU)
    with pytest.raises(GpuMemoryError, match='beside tensorrt/gpu'):
        host.load()
    assert host.pid is None
    host.release()
    assert memory.held() == [('tensorrt/gpu', 800)]


def test_f3_a_worker_holds_its_part_until_it_is_gone(bundle, monkeypatch):
    """ONNX Runtime has no provider for a GPU here, and refuses: the part is held until its worker has ended."""
    memory = GpuMemoryBudget(1 << 30)
    host = worker_hosts(bundle, CONFIG, memory=memory)(GPU)
    with pytest.raises(C7Error):
        host.load()
    assert memory.held() == [('onnx_trt_ep/gpu', 1 << 28)]
    # Stopped in a driver, as it were: not even SIGKILL is seen at once.
    pid = host.pid
    monkeypatch.setattr(worker_process.signal, 'pidfd_send_signal', lambda *arguments: None)
    stop(pid)
    host.release()
    assert not host.join(0.0) and memory.held() == [('onnx_trt_ep/gpu', 1 << 28)]
    os.kill(pid, signal.SIGKILL)
    assert host.join(30) and memory.held() == []


def test_f3_a_worker_that_cannot_be_started_holds_nothing(bundle, monkeypatch):
    def refuse(start):
        raise OSError('no process left')

    monkeypatch.setattr(worker_process._spawner, 'run', refuse)
    memory = GpuMemoryBudget(1 << 30)
    host = worker_hosts(bundle, CONFIG, memory=memory)(GPU)
    with pytest.raises(EngineDeserializeError, match='no process left'):
        host.load()
    host.release()
    assert memory.held() == []


def test_f3_a_worker_for_the_cpu_holds_nothing(bundle):
    memory = GpuMemoryBudget(1)
    host = worker_hosts(bundle, CONFIG, memory=memory)(CPU)
    assert host.load().gpu_memory_bytes is None
    assert memory.held() == []
    host.release()


def test_f5_a_load_that_takes_too_long_ends_the_worker(bundle):
    host = WorkerHost(CPU, bundle, C7InferenceConfig(load_timeout_s=0.01))
    with pytest.raises(EngineDeserializeError, match='load_timeout_s'):
        host.load()
    pid = host.pid
    host.release()
    assert host.join(30) and is_gone(pid)


def test_f1_an_error_of_the_runtime_arrives_as_what_it_is(bundle, tmp_path):
    broken = ModelBundle.load(write_demo_bundle(tmp_path / 'bundle'))
    for file in Path(broken.root).glob('*.onnx'):
        file.write_bytes(file.read_bytes()[:1000])
    host = worker_hosts(broken, CONFIG)(CPU)
    with pytest.raises(EngineSchemaMismatchError, match='model_sha256'):
        host.load()
    host.release()


def test_f1_no_process_is_started_for_a_strategy_that_is_absent(bundle):
    config = C7InferenceConfig(disabled_runtimes=('tensorrt',))
    with pytest.raises(RuntimeUnavailableError, match='switched off'):
        worker_hosts(bundle, config)(Rung('tensorrt', ProviderSet.GPU))


def test_inputs_that_do_not_fit_do_not_reach_the_worker(bundle, worker):
    with pytest.raises(InferenceError):
        worker.infer({'nothing': np.zeros(3)})
    assert worker.infer(bundle.golden_inputs())


def test_n8_what_a_worker_says_is_logged_with_its_level(worker, bundle, caplog):
    read, write = os.pipe()
    os.write(write, b'\x1e40 from logging\nfrom a vendor\n\n')
    os.close(write)
    with caplog.at_level(logging.DEBUG, 'gps_denied_c7'):
        WorkerLog(lambda: 'worker 1').run(read)
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.ERROR, 'worker 1: from logging'), (logging.WARNING, 'worker 1: from a vendor'),
    ]  # fmt: skip


def test_f1_a_line_without_an_end_takes_no_memory_and_an_odd_level_is_none(caplog):
    read, write = os.pipe()
    reader = threading.Thread(target=WorkerLog(lambda: 'worker 1').run, args=(read,))
    with caplog.at_level(logging.DEBUG, 'gps_denied_c7'):
        reader.start()
        for _ in range(50):
            os.write(write, b'x' * 100_000)
        os.write(write, '\nafter it\n\x1e\u00b2 squared\n'.encode())
        os.close(write)
        reader.join(30)
    long, *others = [record.message for record in caplog.records]
    assert len(long) < 5000 and long.endswith('x …')
    assert others == ['worker 1: after it', 'worker 1: squared']


@pytest.mark.parametrize(
    'error',
    [
        InferenceError('a.', remedy='b.'), EngineDeserializeError('c.'), ModelBundleError('d.'),
        RuntimeUnavailableError('tensorrt', 'is missing.', remedy='Install it.'), ValueError('no family'),
        GpuUnavailableError('tensorrt', 'no GPU.', remedy='Plug one in.'),
    ],
)  # fmt: skip
def test_errors_keep_their_kind_and_words(error):
    received = ErrorReport.of(error).error()
    assert str(error) in str(received)
    if not isinstance(error, ValueError):
        assert type(received) is type(error) and str(received) == str(error)
        assert (received.message, received.remedy) == (error.message, error.remedy)


@pytest.mark.parametrize('data', [b'{', b'[]', b'\xff', b'1', b'{"a":' * 200, b'["Never"]', b'[' * 60_000])
def test_a_packet_that_cannot_be_read_is_an_error(data):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours, WORKER_PROTOCOL, in_child=True)
    assert channel.receive(block=False) is None
    read, write = os.pipe()
    gc.collect()
    before = descriptors()
    socket.send_fds(theirs, [data], [read])
    with pytest.raises(InferenceError, match='cannot be read'):
        channel.receive()
    assert descriptors() == before
    for descriptor in (read, write):
        os.close(descriptor)
    theirs.close()
    with pytest.raises(ChannelClosedError):
        channel.receive()
    channel.close()


def test_f2_f3_a_chain_of_real_workers_answers_every_frame(bundle):
    """Deaths and a hang of whoever serves, of whoever stands by, and of both."""
    records = []
    config = C7InferenceConfig(cpu_threads=1, inference_deadline_ms=100.0, hang_timeout_ms=300.0)
    chain = RuntimeChain(
        bundle, config, worker_hosts(bundle, config),
        emit=lambda kind, **payload: records.append(kind), rungs=(CPU,),
    )  # fmt: skip
    chain.load()
    try:
        request = bundle.golden_inputs()
        expected = {name: array.copy() for name, array in chain.infer(request).outputs.items()}

        def stand_by():
            chain.maintain()
            return chain.snapshot().standby

        for turn in range(8):
            wait_until(stand_by, 'a standby')
            number = [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP, signal.SIGKILL][turn % 4]
            os.kill(chain.status().worker_pid, number)
            if turn % 4 == 3:
                os.kill(chain.status().standby_pid, signal.SIGKILL)
            for _ in range(3):
                answer = chain.infer(request)
                for name, array in answer.outputs.items():
                    np.testing.assert_array_equal(array, expected[name])
        assert records.count('c7.runtime_switched') == 8
    finally:
        chain.release()
    wait_until(lambda: not subprocess.run(['pgrep', '-P', str(os.getpid()), '-f', 'gps_denied_c7.worker'],
                                          capture_output=True).stdout, 'every worker to be gone')  # fmt: skip


@contextlib.contextmanager
def running_chain(bundle, spare=None, **config):
    """Yield a chain of real workers, with all that stand by where any does, and what it answers to one request."""
    settings = C7InferenceConfig(cpu_threads=1, inference_deadline_ms=100.0, hang_timeout_ms=300.0, **config)
    hosts = worker_hosts(bundle, settings, spare=spare)
    chain = RuntimeChain(bundle, settings, hosts, emit=lambda kind, **payload: None, rungs=(CPU,))
    chain.load()
    try:

        def stands_by():
            chain.maintain()
            return chain.snapshot().standby is not None

        if settings.hot_standby:
            wait_until(stands_by, 'a standby')
        request = bundle.golden_inputs()
        yield chain, request, {name: array.copy() for name, array in chain.infer(request).outputs.items()}
    finally:
        chain.release()


def assert_answers(chain, request, expected):
    for name, array in chain.infer(request).outputs.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize('hot_standby', [True, False], ids=['with a standby', 'without'])
def test_f4_a_frame_is_answered_although_every_worker_was_stopped(bundle, spare, hot_standby):
    """The spare one, too: SIGSTOP tells nothing about the frame, which waits for an engine that is loaded for it."""
    with running_chain(bundle, spare, hot_standby=hot_standby) as (chain, request, expected):
        for _ in range(2):
            for pid in filter(None, (chain.status().worker_pid, chain.status().standby_pid, wait_for_spare(spare))):
                stop(pid)
            for _ in range(3):
                assert_answers(chain, request, expected)
            if hot_standby:
                wait_until(lambda: (chain.maintain(), chain.status().standby_pid)[1], 'a standby')


def test_f4_a_frame_is_answered_although_the_engine_that_is_loaded_for_it_is_stopped_too(bundle):
    """While it is loaded; it is killed for that, and loaded again."""
    with running_chain(bundle) as (chain, request, expected):
        before = (chain.status().worker_pid, chain.status().standby_pid)
        stopped = []

        def stop_the_next():
            def loading():
                return [load.host.pid for load in chain.snapshot().loading if load.host is not None and load.host.pid]

            stopped.extend(wait_until(loading, 'a load'))
            stop(stopped[0])

        for pid in before:
            stop(pid)
        stopping = threading.Thread(target=stop_the_next)
        stopping.start()
        assert_answers(chain, request, expected)
        stopping.join()
        assert stopped[0] not in before and chain.status().worker_pid not in (*before, *stopped)


def test_f4_a_frame_that_is_given_up_names_the_workers_that_were_stopped(bundle, monkeypatch):
    """And says which of them was loaded for it; the next frame is answered."""
    with running_chain(bundle) as (chain, request, expected):
        asked, begin = [], WorkerHost.begin

        def stop_and_begin(host, inputs):
            if inputs is request:
                asked.append(host.pid)
                stop(host.pid)
            begin(host, inputs)

        with monkeypatch.context() as patch:
            patch.setattr(WorkerHost, 'begin', stop_and_begin)
            with pytest.raises(InferenceError, match='no runtime can answer this request') as caught:
                chain.infer(request)
        assert all(f'(pid {pid}, stopped)' in str(caught.value) for pid in asked) and len(asked) == 3
        assert f'(pid {asked[-1]}, stopped), loaded for this request: no answer for' in str(caught.value)
        assert 'resume it with kill -CONT PID' in caught.value.remedy
        assert_answers(chain, request, expected)


@pytest.fixture
def spare():
    spare = SpareWorker('onnx_trt_ep')
    yield spare
    spare.close()


def name_of(pid: int) -> str:
    return Path(f'/proc/{pid}/comm').read_text().strip()


def wait_for_spare(spare: SpareWorker) -> int:
    """Return the process id of the spare once it is ready to be taken."""
    wait_until(lambda: spare._process is not None and select.select([spare._process._channel], [], [], 0)[0], 'a spare')
    return spare._process.pid


def test_f1_the_spare_worker_becomes_the_next_engine_and_another_one_gets_ready(bundle, spare):
    make = worker_hosts(bundle, CONFIG, spare=spare)
    first = make(CPU)
    first.load()
    pid = wait_for_spare(spare)
    assert name_of(pid) == 'c7-spare' and pid != first.pid
    second = make(CPU)
    second.load()
    assert second.pid == pid and name_of(pid) == 'c7-worker'
    expected = first.infer(bundle.golden_inputs())
    for name, array in second.infer(bundle.golden_inputs()).items():
        np.testing.assert_array_equal(array, expected[name])
    assert wait_for_spare(spare) not in (first.pid, second.pid)
    for host in (first, second):
        host.release()


@pytest.fixture
def no_threads_called(monkeypatch):
    """Refuse to start threads of the names that a test adds, as a system does that has none left."""
    names, start = set(), threading.Thread.start

    def refuse(thread):
        if thread.name in names:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, 'start', refuse)
    return names


def test_f1_where_no_thread_is_left_for_a_spare_worker_the_engine_serves_all_the_same(
    bundle, spare, no_threads_called, caplog
):
    host = worker_hosts(bundle, CONFIG, spare=spare)(CPU)
    start = WorkerProcess.start

    def start_and_run_out(name, *arguments):
        process = start(name, *arguments)
        no_threads_called.add('c7-worker-log')
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkerProcess, 'start', start_and_run_out)
        host.load()
    assert 'no spare worker' in caplog.text and 'pids.max' in caplog.text
    assert host.infer(bundle.golden_inputs())
    gc.collect()
    before = descriptors()
    with pytest.raises(EngineDeserializeError, match='no worker process could be started'):
        worker_hosts(bundle, CONFIG)(CPU).load()
    assert descriptors() == before
    host.release()


def test_f1_a_worker_is_reaped_where_no_thread_is_left_to_wait_for_it(bundle, no_threads_called):
    before, ended = wait_until_flat(), []
    process = WorkerProcess.start('worker', WORKER_PROTOCOL)
    pid = process.pid
    no_threads_called.add('c7-reaper')
    process.release(then=lambda: ended.append(pid))
    wait_until(lambda: process.join(0.0), 'its end')
    assert ended == [pid] and not Path(f'/proc/{pid}').exists()
    assert process.join(0.0) and ended == [pid]
    assert wait_until_flat() == before


def test_f1_a_spare_worker_takes_the_processor_from_nobody_until_it_has_a_task(bundle, spare):
    """Its imports run at the lowest priority, and what it is to load at the usual one: without privileges, too."""
    spare.prepare()
    pid = wait_for_spare(spare)
    host = worker_hosts(bundle, CONFIG, spare=spare)(CPU)
    host.load()
    assert host.pid == pid
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    for thread in Path(f'/proc/{pid}/task').iterdir():
        if thread.name == str(pid):
            assert os.getpriority(os.PRIO_PROCESS, int(thread.name)) == ours
    host.release()


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSTOP])
def test_f1_a_spare_worker_that_has_died_or_hangs_costs_no_load(bundle, spare, number):
    spare.prepare()
    pid = wait_for_spare(spare)
    os.kill(pid, number)
    if number == signal.SIGKILL:
        wait_until(lambda: not spare._process.alive, 'its death')
    host = worker_hosts(bundle, CONFIG, spare=spare)(CPU)
    host.load()
    assert host.pid != pid and host.infer(bundle.golden_inputs())
    wait_until(lambda: is_gone(pid), 'its end')
    host.release()


def test_f1_a_spare_worker_that_says_what_cannot_be_read_costs_no_load(bundle, spare):
    spare.prepare()
    pid, receive, heard = wait_for_spare(spare), spare._process.receive, []

    def garbled(deadline):
        heard.append(deadline)
        if len(heard) > 1:
            raise InferenceError('a packet cannot be read')
        return receive(deadline)

    spare._process.receive = garbled
    host = worker_hosts(bundle, CONFIG, spare=spare)(CPU)
    host.load()
    assert len(heard) == 2 and host.pid != pid and host.infer(bundle.golden_inputs())
    wait_until(lambda: is_gone(pid), 'its end')
    host.release()


def test_f1_a_spare_worker_that_is_not_ready_is_not_waited_for(bundle, spare):
    spare.prepare()
    stop(spare._process.pid)
    host = worker_hosts(bundle, CONFIG, spare=spare)(CPU)
    host.load()
    assert host.pid != spare._process.pid
    host.release()


def test_f1_a_closed_spare_worker_is_gone_and_stays_away(bundle, spare):
    spare.prepare()
    pid = spare._process.pid
    spare.close()
    assert is_gone(pid)
    host = worker_hosts(bundle, CONFIG, spare=spare)(CPU)
    host.load()
    assert spare._process is None
    host.release()


def test_f1_what_a_dead_worker_held_does_not_wait_for_the_collector(bundle):
    """Its tensors are megabytes, and the interpreter may look for circles of a few objects once in many minutes."""
    chain = RuntimeChain(
        bundle, CONFIG, worker_hosts(bundle, CONFIG), emit=lambda kind, **payload: None, rungs=(CPU,)
    )  # fmt: skip
    chain.load()
    request = bundle.golden_inputs()
    gc.collect()
    gc.disable()
    try:
        held = []
        for _ in range(4):
            chain.infer(request)
            in_place = dict(chain.request_arrays())
            os.kill(chain.status().worker_pid, signal.SIGKILL)
            assert chain.infer(in_place).outputs
            del in_place
            wait_until(lambda: chain.maintain() or chain.status().standby is not None, 'another standby')
            wait_until(lambda: not chain.snapshot().retiring, 'the dead to be reaped')
            held.append(descriptors())
        assert held[-1] <= held[0]
    finally:
        gc.enable()
        chain.release()


@pytest.mark.parametrize('depth', [40, 300, 900, 990, 30_000])
def test_a_packet_nested_to_any_depth_is_an_error(depth):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours, WORKER_PROTOCOL, in_child=True)
    theirs.send(b'["RefuseRoom", ' + b'[' * depth + b']' * depth + b']')
    with pytest.raises(MessageError, match='RefuseRoom.reason expected a string|recursion'):
        channel.receive()
    channel.close()
    theirs.close()


def test_f1_a_channel_waits_whatever_its_descriptor_is():
    """select knows those below 1024 alone, and a large node may have opened as many."""
    code = (
        'import fcntl, resource, socket\n'
        'from gps_denied_c7.worker.channel import Channel\n'
        'from gps_denied_c7.worker.protocol import WORKER_PROTOCOL, Ping\n'
        'resource.setrlimit(resource.RLIMIT_NOFILE, (2048, 2048))\n'
        'ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n'
        'end = socket.socket(fileno=fcntl.fcntl(ours, fcntl.F_DUPFD, 1100))\n'
        'channel = Channel(end, WORKER_PROTOCOL, in_child=True)\n'
        'Channel(theirs, WORKER_PROTOCOL, in_child=False).send(Ping())\n'
        'channel.wait()\n'
        'assert channel.fileno() >= 1100 and channel.receive(block=False)[0] == Ping()\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_f1_a_packet_that_is_too_long_says_so():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours, WORKER_PROTOCOL, in_child=True)
    theirs.send(b'["RefuseRoom","' + b'x' * 70_000 + b'"]')
    with pytest.raises(InferenceError, match='longer than 65536 bytes'):
        channel.receive()
    channel.close()
    theirs.close()


@pytest.mark.parametrize('count', [400, 4000])
def test_f1_a_network_of_very_many_outputs_answers_or_says_why_not(tmp_path, count):
    names = [f'/model/head/NonZero_output_{number}' for number in range(count)]
    graph = helper.make_graph(
        [helper.make_node('NonZero', ['image'], [name]) for name in names],
        'many',
        [helper.make_tensor_value_info('image', TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info(name, TensorProto.INT64, [2, 6]) for name in names],
    )
    path = tmp_path / 'many.onnx'
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8), path)
    host = worker_hosts(ModelBundle.load(path), CONFIG)(CPU)
    try:
        if count == 4000:
            with pytest.raises(C7Error, match='longer than 65536'):
                host.load()
            return
        host.load()
        for image in (np.ones((2, 3), np.float32), np.eye(2, 3, dtype=np.float32)):
            found = host.infer({'image': image})
            assert len(found) == count and all(np.array_equal(each, np.nonzero(image)) for each in found.values())
    finally:
        host.release()


def test_f1_remarks_about_a_load_fit_into_a_packet():
    kept = worker_server._brief(['x' * 100_000, *(f'remark {number}' for number in range(1000))])
    assert sum(map(len, kept)) < 17_000 and kept[0].endswith(' ...') and kept[-1] == '986 more remarks are left out.'
    assert worker_server._brief(['one', 'two']) == ('one', 'two')


def test_f1_descriptors_beside_an_empty_packet_are_closed():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(ours, WORKER_PROTOCOL, in_child=True)
    gc.collect()
    before = descriptors()
    socket.send_fds(theirs, [b''], [ours.fileno()])
    with pytest.raises(ChannelClosedError):
        channel.receive()
    assert descriptors() == before
    channel.close()
    theirs.close()


def test_f1_a_worker_that_reads_nothing_does_not_hold_up_who_sends():
    ours, theirs = Channel.pair(WORKER_PROTOCOL)
    with pytest.raises(InferenceError, match='reads none'):
        for _ in range(100_000):
            ours.send(Ping(), block=False)
    ours.close()
    theirs.close()


def test_f1_a_worker_that_talks_without_end_is_not_listened_to_without_end(bundle, worker, monkeypatch):
    """Each packet would be looked at, whatever the deadline says."""
    stop(worker.pid)
    worker.begin(bundle.golden_inputs())
    heard = itertools.count()
    stale = AnswerNext(worker._exchange._number - 1, 1, 2)
    monkeypatch.setattr(worker._process, 'receive', lambda deadline: stale if next(heard) < 1000 else None)
    with pytest.raises(InferenceError, match='more than a request needs'):
        worker.poll(0.01)
    monkeypatch.undo()


def test_f1_an_answer_of_a_segment_that_was_replaced_is_none(bundle, worker, monkeypatch):
    """What lies in the one before is the answer to another request."""
    worker.infer(bundle.golden_inputs())
    stop(worker.pid)
    worker.begin(bundle.golden_inputs())
    said = [NeedRoom(64), AnswerNext(worker._exchange._number, 1, 2)]
    monkeypatch.setattr(worker._process, 'receive', lambda deadline: said.pop(0))
    with pytest.raises(InferenceError, match='without a layout'):
        worker.poll(0.01)
    monkeypatch.undo()


@pytest.mark.parametrize('message', [Progress(BuildProgress('a', 0.0)), Pong(), AnswerNext(1, 2, 3)], ids=repr)
def test_f1_a_worker_that_is_not_ready_is_refused(bundle, monkeypatch, message):
    host = WorkerHost(CPU, bundle, CONFIG, on_build=lambda progress: None)
    monkeypatch.setattr(WorkerProcess, 'receive', lambda self, deadline: message)
    with pytest.raises(MessageError, match=f'sent {type(message).__name__} before Ready'):
        host.load()
    host.release()


def test_f1_a_worker_of_another_version_is_refused_with_what_to_do(bundle, monkeypatch):
    host = WorkerHost(CPU, bundle, CONFIG)
    monkeypatch.setattr(WorkerProcess, 'receive', lambda self, deadline: Ready(PROTOCOL_VERSION + 1))
    with pytest.raises(MessageError, match=f'version {PROTOCOL_VERSION + 1} of the protocol') as refusal:
        host.load()
    assert 'Start the node again' in refusal.value.remedy
    host.release()


@pytest.mark.parametrize('message', [AnswerNext(1, 2, 3), Pong(), NeedRoom(64)], ids=repr)
def test_f1_a_worker_that_answers_before_it_has_an_engine_is_refused(bundle, monkeypatch, message):
    host, said = WorkerHost(CPU, bundle, CONFIG), [Ready(), Loading(), message]
    monkeypatch.setattr(WorkerProcess, 'receive', lambda self, deadline: said.pop(0))
    with pytest.raises(MessageError, match=f'sent {type(message).__name__} before it has loaded an engine'):
        host.load()
    host.release()


def test_f5_a_build_that_gets_on_is_waited_for_and_one_that_hangs_is_not(bundle, monkeypatch):
    """F-4, F-5: a worker tells once a second that it builds, also where its builder hangs."""
    monkeypatch.setattr(build_timeout, '_LONGEST_STEP_S', 0.3)
    config = dataclasses.replace(CONFIG, load_timeout_s=0.2, build_on_configure=True)
    began, told = [], []

    def receive(self, deadline):
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.02)
        began.append(time.monotonic())
        if len(began) == 1:
            return Ready()
        elapsed_s = began[-1] - began[0]
        assert elapsed_s < 20, 'it is waited for without end'
        return Progress(BuildProgress(f'step {min(int(elapsed_s / 0.1), 9)}', elapsed_s))

    monkeypatch.setattr(WorkerProcess, 'receive', receive)
    host = WorkerHost(CPU, bundle, config, on_build=told.append)
    with pytest.raises(EngineDeserializeError, match='step 9'):
        host.load()
    assert len({progress.phase for progress in told}) > 1
    host.release()


def test_f5_a_worker_that_must_not_build_is_not_waited_for_because_it_tells_of_building(bundle, monkeypatch):
    """F-5: in flight, one that tells of ever new steps would be waited for without end."""
    steps = itertools.count()

    def receive(self, deadline):
        number = next(steps)
        assert number < 1_000_000, 'it is waited for without end'
        if number == 0:
            return Ready()
        return Progress(BuildProgress(f'step {number}', 0.0)) if time.monotonic() < deadline else None

    monkeypatch.setattr(WorkerProcess, 'receive', receive)
    host = WorkerHost(CPU, bundle, dataclasses.replace(CONFIG, load_timeout_s=0.01), on_build=lambda progress: None)
    with pytest.raises(EngineDeserializeError, match='did not load'):
        host.load()
    assert next(steps) > 1
    host.release()


def test_f1_a_death_by_a_signal_without_a_name_is_an_error(bundle, worker):
    os.kill(worker.pid, signal.SIGRTMIN + 3)
    wait_until(lambda: not worker.alive, 'the death to be seen')
    with pytest.raises(InferenceError, match='signal 37'):
        worker.infer(bundle.golden_inputs())


def test_what_a_worker_tells_can_be_written_anywhere():
    text = ErrorReport('InferenceError', 'caf\udce9 \ud800', '\udfff')
    sent = WORKER_PROTOCOL.from_child.encode(Failed(1, text))
    error = WORKER_PROTOCOL.from_child.decode(sent).error.error()
    assert str(error).encode() and error.remedy.encode()
