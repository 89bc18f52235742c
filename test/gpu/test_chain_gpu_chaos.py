"""§5 on a real GPU without ROS: a kernel that never ends, in the worker that serves."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.worker.client import worker_hosts
from support.gpu.gpu_memory import returned_mib, settled_bytes
from support.gpu.results import record
from support.onnx_models import arithmetic, bundle_around, write_model
from support.torch_models import REQUEST, write_program

SPINS = 3

# Python imports this in each worker before anything else.
_HOOK = """
import os
import sys

if 'gps_denied_c7.worker' in sys.orig_argv:
    from gps_denied_c7.runtimes.pt.runtime import PytorchFp16Runtime

    infer = PytorchFp16Runtime.infer

    def spin_once(self, handle, inputs):
        try:
            os.unlink({flag!r})
        except FileNotFoundError:
            return infer(self, handle, inputs)
        import torch

        torch.cuda._sleep(1 << 50)
        torch.cuda.synchronize()

    PytorchFp16Runtime.infer = spin_once
"""


@pytest.fixture(scope='module')
def torch() -> Any:
    torch = pytest.importorskip('torch', reason='torch is not installed in this Python')
    pytest.importorskip('pynvml', reason='nvidia-ml-py is not installed in this Python')
    if not torch.cuda.is_available():
        pytest.skip(f'torch {torch.__version__} finds no CUDA device')
    return torch


def test_f4_a_kernel_that_never_ends_costs_its_worker_and_no_frame(
    torch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F-4: the standby answers at the deadline, the worker is killed at the hang limit, another one takes its place."""
    flag = tmp_path / 'spin'
    (tmp_path / 'hook').mkdir()
    (tmp_path / 'hook' / 'sitecustomize.py').write_text(_HOOK.format(flag=str(flag)))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path / 'hook'), os.environ.get('PYTHONPATH', '')]))
    onnx = bundle_around(write_model(tmp_path / 'arithmetic.onnx', arithmetic()), 'onnx_trt_ep')
    program = bundle_around(write_program(tmp_path / 'arithmetic.pt2', precision='fp32', device='cuda'),
                            'pytorch_fp16', device='cuda')  # fmt: skip
    bundle = replace(onnx, artefacts=(*program.artefacts, *onnx.artefacts))
    config = C7InferenceConfig(
        runtime_chain=('pytorch_fp16', 'onnx_trt_ep'),
        engine_cache_dir=tmp_path / 'engines',
        ort_trt_cache_dir=tmp_path / 'ort',
        promotion_backoff_s=(0.5, 2.0),
        gpu_fault_window_s=0.01,
    )
    before = settled_bytes()
    records: list[str] = []
    chain = RuntimeChain(
        bundle, config, worker_hosts(bundle, config), emit=lambda kind, **payload: records.append(kind)
    )
    answered_by, gap_s, killed_s = [], [], []

    def until(condition: Any, what: str) -> None:
        """Have frames answered, as a node does, until something has come."""
        deadline = time.monotonic() + 60.0
        while not condition():
            assert time.monotonic() < deadline, what
            check(chain.infer(REQUEST).outputs)
            chain.maintain()
            time.sleep(0.02)

    def check(outputs: Any) -> None:
        np.testing.assert_allclose(outputs['total'], REQUEST['left'] + REQUEST['right'])

    try:
        chain.load()
        for _ in range(SPINS):
            until(
                lambda: chain.status().active.strategy == 'pytorch_fp16' and chain.status().standby is not None,
                'torch to serve again, with a standby',
            )
            spinning = chain.status().worker_pid
            flag.touch()
            started = time.monotonic()
            answer = chain.infer(REQUEST)
            gap_s.append(time.monotonic() - started)
            check(answer.outputs)
            chain.maintain()
            assert not flag.exists(), 'the kernel was not started'
            answered_by.append(f'{answer.runtime_label}/{answer.active_provider}')
            until(lambda pid=spinning: not Path(f'/proc/{pid}').exists(), 'the worker to be killed')
            killed_s.append(time.monotonic() - started)
    finally:
        chain.release()
    more = returned_mib(before)
    record(
        'chaos: a kernel that never ends', spins=SPINS, answered_by=answered_by,
        answer_ms=[round(value * 1e3) for value in gap_s], worker_gone_after_s=[round(value, 2) for value in killed_s],
        records=records, gpu_memory_left_mib=more,
    )  # fmt: skip
    assert more <= 64
