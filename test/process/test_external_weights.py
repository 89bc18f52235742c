"""M-1: weights in files of their own, exchanged under worker processes that serve them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from gps_denied_c7.errors import (
    ChainExhaustedError,
    EngineSchemaMismatchError,
    WorkerDiedError,
)
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.onnx_file import read_onnx
from gps_denied_c7.runtimes.protocol import ProviderSet
from gps_denied_c7.worker.client import worker_hosts
from support.external_weights import CONFIG, SHAPE, external, rename_over, scaled, write

pytestmark = pytest.mark.once

CPU = Rung('onnx_trt_ep', ProviderSet.CPU)


def write_in_place(path: Path, content: bytes) -> None:
    with path.open('r+b') as file:
        file.write(content)


EXCHANGES = {'renamed over': rename_over, 'written in place': write_in_place}


@pytest.mark.parametrize('how', EXCHANGES)
@pytest.mark.parametrize('size', [16, 256], ids=['taken in', 'handed over'])
def test_weights_exchanged_under_an_active_worker_are_never_answered_with(
    tmp_path: Path, how: str, size: int
) -> None:
    path = scaled(tmp_path / 'net.onnx', 0.5, size)
    bundle = ModelBundle.load(path)
    hosts = worker_hosts(bundle, CONFIG)
    host = hosts(CPU)
    host.load()
    x = np.ones(SHAPE, np.float32)

    def ask() -> float:
        host.begin({'x': x})
        answered = host.poll(30.0)
        assert answered is not None
        return float(answered['y'])

    try:
        assert ask() == 128.0
        EXCHANGES[how](tmp_path / 'net.weights', np.full((256, size), 4.0, np.float32).tobytes())
        assert ask() == 128.0
        host.kill()
        with pytest.raises(WorkerDiedError):
            ask()
    finally:
        host.release()
    again = hosts(CPU)
    try:
        with pytest.raises(EngineSchemaMismatchError, match=r'net\.weights') as caught:
            again.load()
        assert caught.value.remedy
    finally:
        again.release()
    assert ModelBundle.load(path).weights_digest != bundle.weights_digest


def test_a_chain_whose_weights_were_exchanged_answers_with_the_old_ones_or_not_at_all(tmp_path: Path) -> None:
    bundle = ModelBundle.load(scaled(tmp_path / 'net.onnx', 0.5))
    chain = RuntimeChain(bundle, CONFIG, worker_hosts(bundle, CONFIG), emit=lambda kind, **payload: None, rungs=(CPU,))
    chain.load()
    try:
        answers, failure = [], None
        for _ in range(6):
            try:
                answers.append(float(chain.infer({'x': np.ones(SHAPE, np.float32)}).outputs['y']))
            except ChainExhaustedError as error:
                failure = error
                break
            rename_over(tmp_path / 'net.weights', np.full((256, 256), 4.0, np.float32).tobytes())
            pid = chain.status().worker_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            chain.maintain()
        assert answers and set(answers) == {128.0}
        assert 'net.weights' in str(failure)
    finally:
        chain.release()


@pytest.mark.skipif(ort.__version__ < '1.2', reason='ONNX Runtime 1.17 holds what it is handed once more')
def test_a_worker_holds_large_weights_twice_while_it_loads_and_once_afterwards(tmp_path: Path) -> None:
    """And the largest tensor of them once more."""
    def memory(count: int) -> tuple[int, int]:
        weights = np.ones((256, 1 << 14), np.float32)
        (tmp_path / 'net.weights').write_bytes(weights.tobytes() * count)
        tensors = [external(f'w{index}', weights, offset=index * weights.nbytes) for index in range(count)]
        nodes = [helper.make_node('MatMul', ['x', f'w{index}'], [f'h{index}']) for index in range(count)]
        nodes.append(helper.make_node('Sum', [f'h{index}' for index in range(count)], ['y']))
        host = worker_hosts(ModelBundle.load(write(tmp_path / 'net.onnx', nodes, tensors)), CONFIG)(CPU)
        try:
            host.load()
            status = Path(f'/proc/{host.pid}/status').read_text()
        finally:
            host.release()
        found = [re.search(rf'^{key}:\s*(\d+) kB$', status, re.MULTILINE) for key in ('VmHWM', 'VmRSS')]
        peak, now = (int(match[1]) << 10 for match in found if match)
        return peak, now

    one, nine = memory(1), memory(9)
    more = 8 * 256 * (1 << 14) * 4
    assert nine[0] - one[0] < 2.2 * more
    assert nine[1] - one[1] < 1.2 * more


@pytest.mark.parametrize('outside', [False, True])
def test_no_model_is_parsed_by_the_node(tmp_path: Path, outside: bool) -> None:
    path = scaled(tmp_path / 'net.onnx', 2.0)
    if not outside:
        path.write_bytes(read_onnx(path, None).self_contained())
        model = onnx.load(path)
        model.graph.node[0].name = 'location_head/location'
        onnx.save(model, path)
    code = f"""
import sys
from gps_denied_c7.model.bundle import ModelBundle
print(len(ModelBundle.load({str(path)!r}).artefacts[0].external_data), 'onnx' in sys.modules)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(int(outside)), 'False']
