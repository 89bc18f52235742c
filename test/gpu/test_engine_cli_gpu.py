"""
G-3 on a GPU: an engine from an .onnx by command line, and builds killed at random moments.

C7_GPU_KILL_S says for how many seconds builds are killed at most.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.errors import EngineSchemaMismatchError, RuntimeUnavailableError
from gps_denied_c7.model.files import PART_SUFFIX
from gps_denied_c7.runtimes.gpu.tensorrt_library import import_tensorrt, vendor_logger
from gps_denied_c7.runtimes.host_profile import local_host_profile
from support.gpu.results import record
from support.gpu.superpoint import write_superpoint
from support.source_tree import REPOSITORY

KILLS = 50
PARALLEL = 6
LIMIT_S = float(os.environ.get('C7_GPU_KILL_S', '75'))


@pytest.fixture(scope='module')
def gate() -> EngineGate:
    try:
        import_tensorrt('tensorrt')
        return EngineGate(local_host_profile())
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))


def environment() -> dict[str, str]:
    return {**os.environ, 'PYTHONPATH': os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')])}


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-m', 'gps_denied_c7.ground.cli', *map(str, arguments)],
        env=environment(), text=True, capture_output=True, check=False, timeout=300,
    )  # fmt: skip


def test_g3_from_an_onnx_to_a_verified_engine(tmp_path: Path, gate: EngineGate) -> None:
    """Bundle, build, inspect, verify and sweep, each as a process of its own."""
    model = write_superpoint(tmp_path / 'superpoint.onnx')
    made = command('bundle', model, '--output', tmp_path / 'bundle', '--json')
    assert made.returncode == 0, made.stderr
    cache = tmp_path / 'cache'
    built = command('build', tmp_path / 'bundle', '--cache', cache, '--json')
    assert built.returncode == 0, built.stderr
    told = json.loads(built.stdout)
    # The progress went to standard error, and only there.
    assert built.stderr
    engine = Path(told['path'])
    assert gate.admit(engine).manifest.engine_sha256 == told['manifest']['engine_sha256']
    inspected = command('inspect', engine, '--json')
    assert inspected.returncode == 0, inspected.stderr
    assert (json.loads(inspected.stdout)['refused'], json.loads(inspected.stdout)['unknown']) == ([], [])
    verified = command('verify', cache, tmp_path / 'bundle')
    assert verified.returncode == 0, verified.stdout + verified.stderr
    (tmp_path / 'ort').mkdir()
    swept = command('sweep', '--cache', cache, '--ort-cache', tmp_path / 'ort', '--not-for-this-host', '--json')
    assert swept.returncode == 0, swept.stderr
    assert json.loads(swept.stdout)['removed'] == []
    damaged = bytearray(engine.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    engine.write_bytes(damaged)
    assert command('verify', cache).returncode == 1
    record('c7_engine build', seconds=told['seconds'], engine_bytes=told['manifest']['engine_bytes'])


# Forks a process when it is told to, from one that has imported what a build needs and has not touched CUDA yet. It
# kills itself what it is to kill: it alone knows that the process is not yet reaped and its number not given away.
BUILDERS = """
import os, sys
import onnx, tensorrt
from gps_denied_c7.ground import cli as engine_cli

while sys.stdin.readline() == 'build\\n':
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        os._exit(engine_cli.main(['build', sys.argv[1], '--cache', sys.argv[2], '--precision', 'fp32']))
    print('begins', flush=True)
    if sys.stdin.readline() == 'kill\\n':
        os.kill(child, 9)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Tally:
    """What came of the kills in one cache."""

    kills: int = 0
    ended_before: int = 0
    torn: int = 0
    refused: int = 0
    admitted: int = 0


def tiny_model(path: Path) -> Path:
    """Write a network that TensorRT builds in a second."""
    kernel = numpy_helper.from_array(np.random.RandomState(0).normal(size=(8, 1, 3, 3)).astype(np.float32), 'kernel')
    graph = helper.make_graph(
        [helper.make_node('Conv', ['image', 'kernel'], ['features'], kernel_shape=[3, 3])],
        'tiny',
        [helper.make_tensor_value_info('image', TensorProto.FLOAT, [1, 1, 64, 64])],
        [helper.make_tensor_value_info('features', TensorProto.FLOAT, [1, 8, 62, 62])],
        [kernel],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    onnx.save(model, path)
    return path


def kill_builds(model: Path, cache: Path, gate: EngineGate, kills: int, seed: int, deadline_s: float) -> Tally:
    """Start builds and kill them: every other at any moment, every other once it begins to publish."""
    tally = Tally()
    moments = random.Random(seed)
    log = cache.with_suffix('.log')
    with (
        open(log, 'w', encoding='utf-8') as errors,
        subprocess.Popen(
            [sys.executable, '-c', BUILDERS, str(model), str(cache)],
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        ) as builders,
    ):  # fmt: skip
        assert builders.stdin is not None and builders.stdout is not None

        def tell(line: str) -> str:
            assert builders.stdin is not None and builders.stdout is not None
            builders.stdin.write(f'{line}\n')
            builders.stdin.flush()
            return builders.stdout.readline().strip()

        # The first runs to its end, to know how long one takes.
        assert tell('build') == 'begins', log.read_text()
        started_s = time.monotonic()
        assert tell('wait') == '0', log.read_text()
        build_s = time.monotonic() - started_s
        check(cache, gate, tally)
        assert (tally.admitted, tally.refused) == (1, 0)
        while tally.kills < kills and time.monotonic() < deadline_s:
            assert tell('build') == 'begins', log.read_text()
            if tally.kills % 2:
                time.sleep(moments.uniform(0.0, build_s))
            else:
                give_up_s = time.monotonic() + 2 * build_s
                while not any(cache.glob(f'.*{PART_SUFFIX}')) and time.monotonic() < give_up_s:
                    time.sleep(0.0002)
                time.sleep(moments.uniform(0.0, 0.01))
            status = int(tell('kill'))
            assert status in (0, -signal.SIGKILL), log.read_text()
            tally.kills += status == -signal.SIGKILL
            tally.ended_before += status == 0
            tally.torn += any(cache.glob(f'.*{PART_SUFFIX}'))
            check(cache, gate, tally)
        builders.stdin.close()
    return tally


def check(cache: Path, gate: EngineGate, tally: Tally) -> None:
    """Look that what the gate admits runs, and clear up for the next kill."""
    trt = import_tensorrt('tensorrt')
    for engine in cache.glob('*.engine'):
        try:
            admitted = gate.admit(engine)
        except EngineSchemaMismatchError:
            tally.refused += 1
            continue
        tally.admitted += 1
        runtime = trt.Runtime(vendor_logger(trt))
        loaded = runtime.deserialize_cuda_engine(admitted.plan)
        assert loaded is not None
        assert loaded.num_io_tensors == len(admitted.manifest.inputs) + len(admitted.manifest.outputs)
    for path in cache.glob(f'.*{PART_SUFFIX}'):
        path.unlink()


def test_g3_builds_killed_50_times_leave_nothing_half_admitted(tmp_path: Path, gate: EngineGate) -> None:
    model = tiny_model(tmp_path / 'tiny.onnx')
    deadline_s = time.monotonic() + LIMIT_S
    each = -(-KILLS // PARALLEL)
    with ThreadPoolExecutor(PARALLEL) as pool:
        tallies = [
            pool.submit(kill_builds, model, tmp_path / f'cache{seed}', gate, each, seed, deadline_s)
            for seed in range(PARALLEL)
        ]
        total = Tally()
        for future in tallies:
            for name, value in vars(future.result()).items():
                setattr(total, name, getattr(total, name) + value)
    record('c7_engine build, killed', **vars(total))
    # Time may end before the fiftieth; test_engine_kill.py does not stop before it.
    assert total.kills > 0
    assert total.torn > 0
