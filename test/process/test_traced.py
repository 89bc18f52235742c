"""Workers, helpers and tools talk to no other host, and write where the documentation says so alone."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from gps_denied_c7.demo.network import write_demo_bundle
from support.tracing import Trace, elsewhere, why_not

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)

WORKERS = """
import sys, time
from pathlib import Path
import numpy as np
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.runtimes.protocol import ProviderSet
from gps_denied_c7.monitoring.thermal_sources import NvmlThermal
from gps_denied_c7.worker.client import worker_hosts
from gps_denied_c7.worker.spare import SpareWorker
from gps_denied_c7.worker.process import WorkerProcess
from gps_denied_c7.worker.protocol import WORKER_PROTOCOL
config = C7InferenceConfig(engine_cache_dir=sys.argv[2], ort_trt_cache_dir=sys.argv[2])
host = worker_hosts(ModelBundle.load(Path(sys.argv[1])), config)(Rung('onnx_trt_ep', ProviderSet.CPU))
host.load()
spare = WorkerProcess.start('a spare', WORKER_PROTOCOL, ('--spare', sys.argv[3]))
thermal = NvmlThermal()
thermal.start()
assert spare.await_ready(time.monotonic() + 60.0)
inputs = {spec.name: np.zeros([size or 1 for size in spec.shape], spec.dtype) for spec in host.inputs}
for _ in range(20):
    assert host.infer(inputs)
    # Telemetry would have had the time to look its host up.
    time.sleep(0.05)
thermal.stop()
spare.release()
spare.join(10.0)
host.release()
"""


def traced(directory: Path, code: str, *arguments: object) -> Trace:
    """Run a Python program to its end and return what it and its children did."""
    trace = Trace(directory / 'trace')
    words = [*trace.command, sys.executable, '-c', code, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, cwd='/', check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return trace


@pytest.mark.parametrize(('strategy', 'library'), [('onnx_trt_ep', 'onnxruntime'), ('pytorch_fp16', 'torch')])
def test_workers_and_helpers_make_no_internet_socket_and_write_no_file(home, tmp_path, strategy, library):
    """A worker with an engine, a spare one, and the NVML helper."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f'{library} is not installed')
    bundle = write_demo_bundle(tmp_path / 'bundle')
    trace = traced(tmp_path, WORKERS, bundle, tmp_path / 'cache', strategy)
    assert trace.internet_sockets() == []
    assert elsewhere(trace, tmp_path / 'cache') == set()
    assert list(home.iterdir()) == []


def test_c7_engine_makes_no_internet_socket_and_writes_its_output_alone(home, tmp_path):
    """``bundle`` and ``verify``; the output is made beside its place, and moved there."""
    [model] = write_demo_bundle(tmp_path / 'bundle').glob('*.onnx')
    output = tmp_path / 'output'
    output.mkdir()
    code = """
import sys
from gps_denied_c7.ground.cli import main
sys.exit(main(['bundle', sys.argv[1], '--output', sys.argv[2]]) or main(['verify', sys.argv[2]]))
"""
    trace = traced(tmp_path, code, model, output / 'made')
    assert trace.internet_sockets() == []
    assert elsewhere(trace, output) == set()
    assert list(home.iterdir()) == []


@pytest.mark.parametrize('said', ['', '0'])
def test_a_program_that_runs_engines_in_its_own_process_sends_nothing_either(home, tmp_path, monkeypatch, said):
    """``isolation: none``, and whatever the environment says."""
    monkeypatch.setenv('ORT_DISABLE_TELEMETRY', said)
    code = 'import gps_denied_c7, onnxruntime, time; onnxruntime.SessionOptions(); time.sleep(1.0)'
    trace = traced(tmp_path, code)
    assert trace.internet_sockets() == []
    assert elsewhere(trace) == set()
    assert list(home.iterdir()) == []
