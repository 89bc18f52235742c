"""§5 on a real GPU: engines of a whole node are killed, poisoned and starved of memory, and every frame is answered."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.manifest import EngineManifest, manifest_path
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.worker.client import worker_hosts
from support.gpu.gpu_memory import free_bytes, process_mib, returned_mib, settled_bytes
from support.gpu.node_stack import MISSING
from support.gpu.results import percentiles, record

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

if not MISSING:
    from measure import chaos
    from support.harness import image, running_node, wait_until

CAMERA = '/camera/image_raw'
KILLS = 50
POISONS = 12
LEFT_FREE_BYTES = 96 << 20

_HOARDER = """
import sys, time
try:
    from cuda.bindings import runtime as cudart
except ImportError:
    from cuda import cudart
left, told = int(sys.argv[1]), False
while True:
    size = cudart.cudaMemGetInfo()[1] - left
    while size >= 1 << 20:
        if int(cudart.cudaMalloc(size)[0]):
            cudart.cudaGetLastError()
            size //= 2
        else:
            size = cudart.cudaMemGetInfo()[1] - left
    if not told:
        print('taken', flush=True)
        told = True
    # What others give back meanwhile is taken too.
    time.sleep(0.01)
"""


@contextmanager
def hoarder(left_bytes: int) -> Iterator[None]:
    """Have another process take the GPU's memory but for ``left_bytes``, also what is given back meanwhile."""
    process = subprocess.Popen([sys.executable, '-c', _HOARDER, str(left_bytes)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b'taken\n'
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope='module')
def built(superpoint_bundle: Path, flight_caches: dict[str, str]) -> dict[str, Any]:
    """
    Parameters of a node whose TensorRT engine lies in its cache.

    ONNX Runtime's TensorRT provider has none, and so the standby is on CUDA. That compiles its kernels once.
    """
    parameters = {'model_path': str(superpoint_bundle), **flight_caches}
    with running_node({**parameters, 'build_on_configure': True, 'hot_standby': False}) as (_, peer):
        flying(peer, runtime='tensorrt')
    with running_node(parameters) as (_, peer):
        flying(peer, runtime='tensorrt')
        until(peer, 'onnx_trt_ep/gpu')
    return parameters


def flying(peer: Any, **values: str) -> None:
    """Have the node reach ``active``, with this runtime."""
    peer.start()
    peer.wait_matched(CAMERA)
    wait_until(lambda: values.items() <= peer.values('Runtime').items(), f'{values}', 30.0)


def until(peer: Any, *standbys: str) -> None:
    """Wait until one of these stands by, of which ``none`` is one; any engine where none is named."""

    def found() -> bool:
        standby = peer.values('Runtime').get('standby', 'none')
        return standby in standbys if standbys else standby != 'none'

    wait_until(found, f'a standby {standbys}', 60.0)


def frame(number: int) -> Any:
    return image(number, width=640, height=480)


def end(process: Any, before: int) -> float:
    """End the node in order; return the MiB of GPU memory that stayed taken."""
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    return returned_mib(before)


def test_f2_fifty_kills_in_mid_execution_cost_no_frame(built: dict[str, Any]) -> None:
    """F-1, F-2, F-6: one worker or all of them, somewhere in a request; it is answered, and TensorRT serves again."""
    chance = random.Random(5)
    took_s, back_s, who = [], [], Counter[str]()
    number = 0
    before = settled_bytes()
    # The kills come from outside, closer together than a GPU that is lost would have it.
    with running_node({**built, 'gpu_fault_window_s': 0.1, 'promotion_backoff_s': [0.5, 1.0]}) as (process, peer):
        flying(peer, runtime='tensorrt')
        for _ in range(KILLS):
            started, seen = time.monotonic(), len(peer.diagnostics)
            # Frames are what a better engine is compared on before it serves again.
            while not on_tensorrt(peer, seen):
                assert time.monotonic() - started < 60.0, '\n'.join(map(str, peer.values('Runtime').items()))
                number += 1
                assert peer.ask(CAMERA, frame(number)).header.stamp.sec == number
                time.sleep(0.05)
            back_s.append(time.monotonic() - started)
            targets = chaos.workers(process)
            number += 1
            answers, published = len(peer.tensors), time.monotonic()
            peer.publisher(CAMERA).publish(frame(number))
            time.sleep(chance.uniform(0.0, 0.006))
            for target in chance.sample(targets, chance.randint(1, len(targets))):
                os.kill(target, signal.SIGKILL)
            wait_until(lambda answers=answers: len(peer.tensors) > answers, f'the answer to frame {number}')
            took_s.append(time.monotonic() - published)
            assert peer.tensors[-1].header.stamp.sec == number
            who[f'{peer.tensors[-1].runtime_label}/{peer.tensors[-1].active_provider}'] += 1
        assert peer.state() == 'active'
        stamps = [answer.header.stamp.sec for answer in peer.tensors]
        assert stamps == list(range(1, number + 1))
        switches = len(peer.payloads('c7.runtime_switched'))
        more = end(process, before)
    record(
        'chaos: SIGKILL in mid-execution', kills=KILLS, frames=f'{len(stamps)} of {number}', answered_by=dict(who),
        publish_to_answer=percentiles(took_s), tensorrt_serves_again=percentiles(back_s[1:], 's'), switches=switches,
        gpu_memory_left_mib=more,
    )  # fmt: skip
    assert more <= 64


def on_tensorrt(peer: Any, seen: int) -> bool:
    """
    Return whether TensorRT serves and another engine stands by.

    :param seen: so many diagnostics are from before what this is asked about, and one more may be.
    """
    if len(peer.diagnostics) < seen + 2 or (peer.tensors and peer.tensors[-1].runtime_label != 'tensorrt'):
        return False
    values = peer.values('Runtime')
    return bool(values['runtime'] == 'tensorrt' and values['standby'] != 'none')


def test_f2_an_engine_file_fails_over_to_cuda_and_to_the_cpu(built: dict[str, Any], tmp_path: Path) -> None:
    """F-2, F-8: TensorRT's engine dies, ONNX Runtime's CUDA provider answers; that dies, the CPU does."""
    before = settled_bytes()
    seen = []
    parameters = {**built, 'ort_trt_cache_dir': str(tmp_path / 'empty'), 'promotion_backoff_s': [300.0, 300.0]}
    with running_node(parameters) as (process, peer):
        flying(peer, runtime='tensorrt')
        until(peer, 'onnx_trt_ep/gpu')
        for number in range(1, 4):
            if number > 1:
                os.kill(int(peer.values('Runtime')['worker_pid']), signal.SIGKILL)
            answer = peer.ask(CAMERA, frame(number))
            assert answer.header.stamp.sec == number
            seen.append(f'{answer.runtime_label}/{answer.active_provider}')
            if number == 2:
                until(peer, 'onnx_trt_ep/cpu')
        assert peer.state() == 'active'
        wait_until(lambda: 'c7.cpu_fallback' in peer.kinds(), 'the alert')
        alerts = [kind for kind in peer.kinds() if 'fallback' in kind]
        gaps = [payload['gap_ms'] for payload in peer.payloads('c7.runtime_switched')]
        more = end(process, before)
    record('chaos: an engine fails over', answered_by=seen, alerts=alerts, gap_ms=gaps, gpu_memory_left_mib=more)
    assert seen == [
        'tensorrt/TensorRT', 'onnx_trt_ep/CUDAExecutionProvider', 'onnx_trt_ep/CPUExecutionProvider',
    ]  # fmt: skip
    assert alerts == ['c7.fallback_to_onnx_trt_ep', 'c7.cpu_fallback']
    assert more <= 64


def test_f3_a_standby_that_finds_no_gpu_memory_costs_no_frame(built: dict[str, Any]) -> None:
    """F-3: what serves goes on, and the CPU, which needs none, stands by."""
    before = settled_bytes()
    with running_node(built) as (process, peer):
        flying(peer, runtime='tensorrt')
        until(peer, 'onnx_trt_ep/gpu')
        assert peer.ask(CAMERA, frame(1)).runtime_label == 'tensorrt'
        with hoarder(LEFT_FREE_BYTES):
            free_mib = round(free_bytes() / 2**20)
            os.kill(int(peer.values('Runtime')['standby_pid']), signal.SIGKILL)
            until(peer, 'onnx_trt_ep/cpu')
            labels = Counter(peer.ask(CAMERA, frame(number)).runtime_label for number in range(2, 62))
            waited = time.monotonic() + 12.0
            while time.monotonic() < waited:
                labels[peer.ask(CAMERA, frame(62)).runtime_label] += 1
                time.sleep(0.1)
            meanwhile = peer.values('Runtime').get('standby')
        assert peer.state() == 'active'
        more = end(process, before)
    record(
        'chaos: no GPU memory for the standby', free_mib=free_mib, frames=dict(labels), standby_meanwhile=meanwhile,
        gpu_memory_left_mib=more,
    )  # fmt: skip
    assert set(labels) == {'tensorrt'}
    assert meanwhile == 'onnx_trt_ep/cpu'
    assert more <= 64


def held_mib(peer: Any) -> dict[str, int]:
    """Return what each engine holds of the budget, as diagnostics show it."""
    held = (entry.split() for entry in peer.values('Runtime')['gpu_memory_held_mib'].split(', '))
    return {rung: int(taken) for rung, taken in held}


def test_f3_engines_hold_what_they_take_and_a_budget_for_one_has_the_cpu_stand_by(built: dict[str, Any]) -> None:
    before = settled_bytes()
    with running_node(built) as (process, peer):
        flying(peer, runtime='tensorrt')
        until(peer, 'onnx_trt_ep/gpu')
        held = held_mib(peer)
        taken = process_mib(chaos.workers(process))
        assert end(process, before) <= 64
    one = held['tensorrt/gpu'] + 100
    with running_node({**built, 'gpu_memory_budget_bytes': one << 20}) as (process, peer):
        flying(peer, runtime='tensorrt')
        until(peer, 'onnx_trt_ep/cpu')
        assert list(held_mib(peer)) == ['tensorrt/gpu']
        assert peer.wait_record('c7.memory_refused')['rung'] == 'onnx_trt_ep/gpu'
        answer = peer.ask(CAMERA, frame(1))
        os.kill(int(peer.values('Runtime')['worker_pid']), signal.SIGKILL)
        instead = peer.ask(CAMERA, frame(2))
        more = end(process, before)
    record(
        'one budget for GPU memory', held_mib=held, nvml_mib=taken, budget_for_one_mib=one,
        answered_by=[answer.active_provider, instead.active_provider], gpu_memory_left_mib=more,
    )  # fmt: skip
    assert (answer.active_provider, instead.active_provider) == ('TensorRT', 'CPUExecutionProvider')
    assert abs(sum(held.values()) - sum(taken)) <= 64
    assert more <= 64


def damaged(plan: bytes, chance: random.Random) -> bytes:
    """Return a copy with up to 63 bits flipped, which ruins a CUDA context as often as not."""
    content = bytearray(plan)
    for position in chance.sample(range(len(content)), chance.randint(1, 63)):
        content[position] ^= 1 << chance.randrange(8)
    return bytes(content)


def let_past_the_gate(engine: Path, plan: bytes) -> None:
    """Write a plan with a manifest that calls it the one that was built: what no gate can see."""
    manifest = EngineManifest.from_json(manifest_path(engine).read_bytes())
    engine.write_bytes(plan)
    manifest_path(engine).write_bytes(
        replace(manifest, engine_sha256=hashlib.sha256(plan).hexdigest(), engine_bytes=len(plan)).to_json()
    )


def test_f1_a_poisoned_worker_takes_nothing_with_it(built: dict[str, Any], tmp_path: Path) -> None:
    """F-1, M-1: damaged engines with forged manifests die or are found out alone; the first that dies, in a node."""
    before = settled_bytes()
    shutil.copytree(built['engine_cache_dir'], tmp_path / 'engines')
    (engine,) = (tmp_path / 'engines').glob('*.engine')
    plan = engine.read_bytes()
    bundle = ModelBundle.load(built['model_path'])
    config = C7InferenceConfig(
        engine_cache_dir=tmp_path / 'engines', ort_trt_cache_dir=Path(built['ort_trt_cache_dir']), hot_standby=False
    )
    chance = random.Random(7)
    ends: Counter[str] = Counter()
    poison = None
    for _ in range(POISONS):
        content = damaged(plan, chance)
        let_past_the_gate(engine, content)
        chain = RuntimeChain(bundle, config, worker_hosts(bundle, config), emit=lambda kind, **payload: None)
        try:
            chain.load()
            outputs = chain.infer(bundle.golden_inputs()).outputs
            assert not bundle.compare(outputs, bundle.golden_outputs())
            why = dict(chain.status().failures).get('tensorrt/gpu')
        finally:
            chain.release()
        if why is None:
            ends['answers as the whole one does'] += 1
        elif 'golden' in why:
            ends['wrong answers, refused by its proof'] += 1
        elif 'TensorRT refused' in why:
            ends['refused by TensorRT'] += 1
        else:
            ends['CUDA error or death of its worker'] += 1
            poison = poison or (content, why)
    assert poison is not None, ends
    let_past_the_gate(engine, poison[0])
    with running_node({**built, 'engine_cache_dir': str(tmp_path / 'engines')}) as (process, peer):
        flying(peer, runtime='onnx_trt_ep')
        answers = [peer.ask(CAMERA, frame(number)) for number in range(1, 31)]
        assert [answer.header.stamp.sec for answer in answers] == list(range(1, 31))
        providers = sorted({answer.active_provider for answer in answers})
        assert peer.state() == 'active'
        more = end(process, before)
    record(
        'chaos: damaged engines past the gate', engines=POISONS, ends=dict(ends), one=poison[1][:300],
        node_answers=len(answers), node_provider=providers, gpu_memory_left_mib=more,
    )  # fmt: skip
    assert not np.intersect1d(providers, ['CPUExecutionProvider']).size
    assert more <= 64
