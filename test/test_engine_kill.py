"""
A writer killed at any moment leaves nothing that the gate takes for whole (G-1, G-3).

Here the plan bytes are made up, since this machine need not have a GPU; the command line, the publishing and the gate
are the real ones, in real processes. test/gpu repeats it with engines that TensorRT builds.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from engine_cache_files import HOST, manifest_of
from source_tree import REPOSITORY

from gps_denied_c7.engine_cache import PART_SUFFIX, EngineCache
from gps_denied_c7.engine_sweep import LEFTOVER_AGE_S, Caches, Criteria, sweep
from gps_denied_c7.errors import EngineSchemaMismatchError
from gps_denied_c7.gate import EngineGate, EngineManifest, manifest_path

KILLS = 50
# Of them in the middle of a write; those before or between writes say nothing.
TORN = 5
# Large enough that writing it takes longer than starting to.
PLAN_BYTES = 4 << 20

# Builds over and over, as `c7_engine build` does, with a number in place of TensorRT's work; one process for each
# line read, forked from one that has imported everything, so that fifty take seconds.
BUILDERS_OF_FAKE_PLANS = """
import itertools, os, sys
from gps_denied_c7 import engine_cli
from gps_denied_c7.engine_cache import EngineCache
from gps_denied_c7.runtime import EngineCacheEntry
from test_engine_kill import fake_plan_of, manifest_for

def build_fake_plan(model, config, build):
    cached = EngineCache.at(config.engine_cache_dir).publish(*prepared)
    return EngineCacheEntry(cached.path, prepared[1].engine_sha256, model, build)

engine_cli.build_engine = build_fake_plan
for line in sys.stdin:
    child = os.fork()
    if child:
        print('ended', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number in itertools.count(int(line)):
        prepared = (fake_plan_of(number), manifest_for(number, fake_plan_of(number)))
        print('begins', os.getpid(), flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if engine_cli.main(['build', sys.argv[1], '--cache', sys.argv[2]]) != 0:
            os._exit(1)
"""


def fake_plan_of(number: int) -> bytes:
    """Return the made-up plan of that number: the header, then noise that only this number gives."""
    return b'ftrt' + bytes(20) + bytes([8, 6, 2, 3]) + random.Random(number).randbytes(PLAN_BYTES - 28)


def manifest_for(number: int, plan: bytes) -> EngineManifest:
    """Return its manifest; the name is the same for every number, so that each build replaces the last."""
    return dataclasses.replace(manifest_of(plan), versions={'number': str(number)})


def environment() -> dict[str, str]:
    """Return an environment in which this file and the package import."""
    ours = [str(REPOSITORY), str(REPOSITORY / 'test'), os.environ.get('PYTHONPATH', '')]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, ours))}


def admitted_number(engine: Path) -> int | None:
    """Return the number of the engine that the gate admits, after looking that it is whole; None where it refuses."""
    try:
        admitted = EngineGate(HOST).admit(engine)
    except EngineSchemaMismatchError:
        return None
    number = int(admitted.manifest.versions['number'])
    assert admitted.plan == fake_plan_of(number)
    return number


def test_g3_publishing_fake_plan_bytes_killed_50_times_leaves_nothing_half_admitted(tmp_path: Path) -> None:
    cache = tmp_path / 'cache'
    engine = cache / str(manifest_for(0, b'').engine_name)
    model = tmp_path / 'net.onnx'
    model.write_bytes(b'not read: nothing is built')
    moments = random.Random(0)
    torn = 0
    admitted = []
    builders = subprocess.Popen(
        [sys.executable, '-c', BUILDERS_OF_FAKE_PLANS, str(model), str(cache)],
        env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with builders:
        assert builders.stdin is not None and builders.stdout is not None
        for kill in itertools.count():
            if kill >= KILLS and torn >= TORN:
                break
            assert kill < 20 * KILLS, f'only {torn} of {kill} kills came in the middle of a write'
            builders.stdin.write(f'{1000 * kill}\n')
            builders.stdin.flush()
            begins, _, builder = builders.stdout.readline().partition(' ')
            assert begins == 'begins'
            time.sleep(moments.uniform(0.0, 0.1))
            os.kill(int(builder), signal.SIGKILL)
            assert builders.stdout.readline() == f'ended {-signal.SIGKILL}\n'
            torn += any(cache.glob(f'.*{PART_SUFFIX}'))
            admitted.append(admitted_number(engine))
            for part in cache.glob(f'.*{PART_SUFFIX}'):
                part.unlink()
        builders.stdin.close()
    assert any(number is not None for number in admitted)


# Dies between the two renames: the new engine then lies beside the old manifest, the worst moment there is.
PUBLISHER_THAT_DIES = """
import os, sys
from pathlib import Path
from gps_denied_c7.engine_cache import EngineCache
from test_engine_kill import fake_plan_of, manifest_for

rename = os.replace

def rename_and_die(source, target):
    rename(source, target)
    os.kill(os.getpid(), 9)

os.replace = rename_and_die
EngineCache((Path(sys.argv[1]),)).publish(fake_plan_of(2), manifest_for(2, fake_plan_of(2)))
"""


def test_g3_what_a_kill_leaves_is_swept_and_does_not_hinder_the_next_build(tmp_path: Path) -> None:
    cache = EngineCache((tmp_path,))
    engine = cache.publish(fake_plan_of(1), manifest_for(1, fake_plan_of(1))).path
    assert admitted_number(engine) == 1
    died = subprocess.run(
        [sys.executable, '-c', PUBLISHER_THAT_DIES, str(tmp_path)],
        env=environment(), text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert engine.read_bytes() == fake_plan_of(2)
    assert admitted_number(engine) is None
    assert list(tmp_path.glob(f'.*{PART_SUFFIX}'))
    cache.publish(fake_plan_of(3), manifest_for(3, fake_plan_of(3)))
    assert admitted_number(engine) == 3
    report = sweep(Caches((tmp_path,), ()), Criteria(), now_s=time.time() + 2 * LEFTOVER_AGE_S)
    assert [removal.item.kind for removal in report.removed] == ['leftover']
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ['.lock', engine.name, manifest_path(engine).name]
    )
