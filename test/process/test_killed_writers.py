"""
A writer killed at any moment leaves nothing that the gate takes for whole (G-1, G-3).

Here the plan bytes are made up, since this machine need not have a GPU; the command line, the publishing and the gate
are the real ones, in real processes. test/gpu repeats it with engines that TensorRT builds.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.manifest import manifest_path
from gps_denied_c7.engines.ort_store import (
    BuiltFor,
    OrtEngineCache,
)
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.errors import EngineSchemaMismatchError
from gps_denied_c7.ground.sweep import LEFTOVER_AGE_S, Caches, Criteria, sweep
from gps_denied_c7.model.files import PART_SUFFIX
from support.engine_cache_files import HOST, SOURCE, fake_plan, manifest_of
from support.numbered_engines import fake_plan_of, manifest_for
from support.source_tree import REPOSITORY, TESTS

pytestmark = pytest.mark.once

KILLS = 50
# Of them in the middle of a write; those before or between writes say nothing.
TORN = 5

# Builds over and over, as `c7_engine build` does, with a number in place of TensorRT's work; one process for each
# line read, forked from one that has imported everything, so that fifty take seconds.
BUILDERS_OF_FAKE_PLANS = """
import itertools, os, sys
from gps_denied_c7.ground import cli as engine_cli, build
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.runtimes.protocol import EngineCacheEntry
from support.numbered_engines import fake_plan_of, manifest_for

def build_fake_plan(model, config, build):
    cached = EngineCache.at(config.engine_cache_dir).publish(*prepared)
    return EngineCacheEntry(cached.path, prepared[1].engine_sha256, model, build)

build.build_engine = build_fake_plan
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


def environment() -> dict[str, str]:
    """Return an environment in which this file and the package import."""
    ours = [str(REPOSITORY), str(TESTS), os.environ.get('PYTHONPATH', '')]
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
from gps_denied_c7.engines.store import EngineCache
from support.numbered_engines import fake_plan_of, manifest_for

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


BUILT_FOR = BuiltFor(
    model_sha256='a' * 64, precision='fp16', axes={'batch': 1}, onnxruntime='1.17.1', tensorrt='8.6.0',
    gpu='NVIDIA H200', sm=90, driver='580.65.06', platform='linux-x86_64',
)

KILLED = """
import sys
from pathlib import Path
from gps_denied_c7.engines.ort_store import BuiltFor, OrtEngineCache

cache = OrtEngineCache((Path(sys.argv[1]),))
built_for = BuiltFor(**eval(sys.argv[2]))
build, notes = cache.begin(built_for)
assert build is not None, notes
print('begun', flush=True)
for part in range(40):
    with open(build.directory / f'{part}.engine', 'wb') as file:
        for _ in range(20):
            file.write(bytes(4096))
            file.flush()
build.record(None)
print('recorded', flush=True)
"""


def test_g2_build_killed_at_any_moment_is_warm_only_as_a_whole(tmp_path: Path) -> None:
    cache = OrtEngineCache((tmp_path,))
    fields = repr({name: getattr(BUILT_FOR, name) for name in BuiltFor.__dataclass_fields__})
    moments = random.Random(0)
    ends: set[bool] = set()
    for _ in range(12):
        child = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path), fields], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b'begun\n'
        time.sleep(moments.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        child.wait()
        recorded = b'recorded' in child.stdout.read()
        child.stdout.close()
        warm, _ = cache.find(BUILT_FOR)
        if warm is None:
            assert not recorded
            assert not (tmp_path / BUILT_FOR.model_sha256).exists()
        else:
            assert len(warm.listing.files) == 40
            assert all(file.size == 20 * 4096 for file in warm.listing.files)
            for path in warm.directory.iterdir():
                path.unlink()
            warm.directory.rmdir()
        ends.add(warm is None)
    assert True in ends


WRITER = """
import sys
from pathlib import Path
from gps_denied_c7.engines.store import EngineCache
from support.engine_cache_files import fake_plan, manifest_of
cache = EngineCache((Path(sys.argv[1]),))
for seed in range(10**6):
    plan = fake_plan(300_000, seed=seed)
    print('begin', seed, flush=True)
    cache.publish(plan, manifest_of(plan))
    print('done', seed, flush=True)
"""


def test_g3_a_writer_killed_at_any_moment_leaves_nothing_half_finished(tmp_path: Path) -> None:
    """What the gate admits is an engine that its writer had finished, or had put in place whole."""
    moments = random.Random(4)
    cache = EngineCache((tmp_path / 'engines',))
    command = [sys.executable, '-c', WRITER, str(tmp_path / 'engines')]
    outcomes: set[str] = set()
    before: bytes | None = None
    for _ in range(12):
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            line = writer.stdout.readline()
            assert line.startswith('begin')
            time.sleep(moments.random() * 0.05)
            writer.send_signal(signal.SIGKILL)
            lines = [line, *writer.stdout.read().splitlines()]
        begun, done = (
            [int(line.split()[1]) for line in lines if line.startswith(word) and line.split()[1:]]
            for word in ('begin', 'done')
        )
        try:
            found = cache.find(HOST, precision='fp16', source_sha256=SOURCE)
            admitted = EngineGate(HOST).admit(found.path) if found else None
        except EngineSchemaMismatchError as error:
            outcomes.add(f'refused: {error.field}')
            continue
        if admitted is None:
            outcomes.add('absent')
            assert not done
            continue
        outcomes.add('admitted')
        last = [fake_plan(300_000, seed=seed) for seed in begun[-2:]]
        assert admitted.plan in [*last, before]
        assert not done or admitted.plan != before or admitted.plan in last
        before = admitted.plan
    assert 'admitted' in outcomes
    plan = fake_plan(seed=99)
    assert EngineGate(HOST).admit(cache.publish(plan, manifest_of(plan)).path).plan == plan
