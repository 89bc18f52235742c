"""G-3: a sweep takes what it was told to, from both caches, and nothing else."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.manifest import manifest_path
from gps_denied_c7.engines.ort_store import WHOLE_ENGINE, BuiltFor, OrtEngineCache
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.errors import EngineSchemaMismatchError
from gps_denied_c7.ground import compatibility
from gps_denied_c7.ground.sweep import Caches, Criteria, SweepReport, sweep
from support.engine_cache_files import HOST, age, fake_plan, publish_engine, publish_ort_cache

NOW_S = 1_800_000_000.0
DAY_S = 86400.0


@pytest.fixture
def caches(tmp_path: Path) -> Caches:
    return Caches((tmp_path / 'engine_cache',), (tmp_path / 'ort_trt_cache',))


def swept(caches: Caches, *, dry_run: bool = False, **criteria: object) -> SweepReport:
    return sweep(caches, Criteria(**criteria), now_s=NOW_S, dry_run=dry_run)  # type: ignore[arg-type]


def removed(report: SweepReport) -> list[Path]:
    return [removal.item.path for removal in report.removed]


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below ``root``, with its content where it is a file."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(root.rglob('*'))
    }


def test_g3_nothing_goes_without_a_reason(caches: Caches, tmp_path: Path) -> None:
    publish_engine(caches.engines[0])
    publish_ort_cache(caches.ort[0])
    before = tree(tmp_path)
    report = swept(caches)
    assert (report.removed, report.failed, report.foreign, report.refused) == ([], [], [], [])
    assert sorted(item.kind for item in report.kept) == ['engine', 'ort_cache']
    assert tree(tmp_path) == before


def test_g3_age_is_that_of_the_newest_file(caches: Caches) -> None:
    old = publish_engine(caches.engines[0], model='old')
    touched = publish_engine(caches.engines[0], model='touched')
    new = publish_engine(caches.engines[0], model='new')
    old_ort = publish_ort_cache(caches.ort[0], b'old')
    new_ort = publish_ort_cache(caches.ort[0], b'new')
    for path in (old, touched, old_ort):
        age(path, 31, now_s=NOW_S)
    os.utime(manifest_path(touched), (NOW_S, NOW_S))
    for path in (new, new_ort):
        age(path, 29, now_s=NOW_S)
    report = swept(caches, older_than_s=30 * DAY_S)
    assert sorted(removed(report)) == sorted([old, old_ort])
    assert '31.0 days' in report.removed[0].reason
    assert not old.exists() and not manifest_path(old).exists() and not old_ort.exists()
    for path in (touched, new):
        assert path.exists() and manifest_path(path).exists()
    assert new_ort.is_dir()


def test_g3_size_is_of_both_caches_and_the_oldest_go_first(caches: Caches) -> None:
    paths = []
    for number in range(3):
        paths.append(publish_engine(caches.engines[0], fake_plan(10_000), model=f'net{number}'))
        paths.append(publish_ort_cache(caches.ort[0], str(number).encode(), size=10_000))
    for place, path in enumerate(paths):
        age(path, 10 - place, now_s=NOW_S)
    total = swept(caches, dry_run=True).kept_bytes
    assert 60_000 < total < 75_000
    assert removed(swept(caches, max_bytes=total)) == []
    report = swept(caches, max_bytes=40_000)
    assert removed(report) == paths[:3]
    assert report.kept_bytes <= 40_000
    assert report.freed_bytes + report.kept_bytes == total
    assert removed(swept(caches, max_bytes=0)) == paths[3:]
    assert [path for path in caches.engines[0].iterdir() if path.name != '.lock'] == []
    assert list(caches.ort[0].iterdir()) == []


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'sm': 90}, 'sm 90, here 87'),
        ({'gpu': 'NVIDIA H200'}, 'gpu NVIDIA H200, here Orin'),
        ({'platform': 'linux-x86_64'}, 'platform linux-x86_64, here linux-aarch64'),
        ({'tensorrt': '10.3.0.30'}, 'tensorrt 10.3.0.30, here 8.6.2'),
    ],
)
def test_g3_engines_of_other_hosts_go(caches: Caches, changes: dict[str, object], told: str) -> None:
    ours = publish_engine(caches.engines[0], model='ours')
    theirs = publish_engine(caches.engines[0], model='theirs', **changes)
    report = swept(caches, not_for=HOST)
    assert removed(report) == [theirs]
    assert told in report.removed[0].reason
    assert EngineGate(HOST).admit(ours)


@pytest.mark.parametrize('field', ['gpu', 'sm', 'platform', 'driver', 'onnxruntime'])
def test_g3_onnx_runtime_caches_of_other_hosts_go(
    caches: Caches, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, 'driver_version', lambda: '540.4.0')
    monkeypatch.setattr(compatibility, 'package_versions', lambda: {'onnxruntime-gpu': '1.17.1'})
    other = {'sm': 90}.get(field, 'another')
    ours = publish_ort_cache(caches.ort[0], b'ours', driver='540.4.0')
    theirs = publish_ort_cache(caches.ort[0], b'theirs', **{'driver': '540.4.0', field: other})
    report = swept(caches, not_for=HOST)
    assert removed(report) == [theirs]
    assert f'{field} {other}' in report.removed[0].reason
    assert ours.is_dir()


def test_g3_what_cannot_be_told_is_no_reason(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, 'package_versions', dict)
    publish_ort_cache(caches.ort[0], driver='unknown', onnxruntime='1.17.1')
    assert removed(swept(caches, not_for=HOST)) == []


def test_g3_timing_caches_are_swept_too(caches: Caches) -> None:
    cache = EngineCache(caches.engines)
    cache.write_timing_cache(HOST, 2, b'ours')
    other = dataclasses.replace(HOST, gpu='NVIDIA GeForce RTX 4090', sm=89, platform='linux-x86_64')
    cache.write_timing_cache(other, 2, b'theirs')
    report = swept(caches, not_for=HOST)
    assert [removal.item.kind for removal in report.removed] == ['timing']
    assert (cache.read_timing_cache(HOST, 2), cache.read_timing_cache(other, 2)) == (b'ours', b'')


@pytest.mark.parametrize('days', [0.0, 0.02, 0.05, 3.0])
@pytest.mark.parametrize('suffix', ['', '.part'])
def test_g3_leftovers_go_once_nobody_can_be_at_work_on_them(caches: Caches, days: float, suffix: str) -> None:
    """Up to 0.1.0 an unfinished listing had no suffix."""
    engine = publish_engine(caches.engines[0], model='lost-its-manifest')
    manifest_path(engine).unlink()
    note = publish_engine(caches.engines[0], model='lost-its-engine')
    note.unlink()
    part = caches.engines[0] / f'.{engine.name}.k3_9xq0a.part'
    part.write_bytes(b'half')
    unlisted = publish_ort_cache(caches.ort[0], b'unlisted')
    (unlisted / 'listing.json').rename(unlisted / f'.listing.json.k3_9xq0a{suffix}')
    empty = caches.ort[0] / ('e' * 64)
    empty.mkdir()
    half = caches.ort[0] / ('f' * 64)
    half.mkdir()
    (half / WHOLE_ENGINE).write_bytes(b'ftrt')
    whole = publish_engine(caches.engines[0], model='whole')
    leftovers = [engine, manifest_path(note), part, unlisted, empty, half]
    for path in [*leftovers, whole]:
        age(path, days, now_s=NOW_S)
    expected = sorted(leftovers) if days * 24 > 1 else []
    report = swept(caches)
    assert sorted(removed(report)) == expected
    assert [path for path in leftovers if not path.exists()] == [path for path in leftovers if path in expected]
    assert whole.exists() and manifest_path(whole).exists()


def test_g3_a_dry_run_tells_the_same_and_removes_nothing(caches: Caches, tmp_path: Path) -> None:
    for number in range(3):
        age(publish_engine(caches.engines[0], model=f'net{number}'), number, now_s=NOW_S)
        age(publish_ort_cache(caches.ort[0], str(number).encode()), number, now_s=NOW_S)
    before = tree(tmp_path)
    foretold = swept(caches, dry_run=True, older_than_s=1.5 * DAY_S).to_json()
    assert tree(tmp_path) == before
    done = swept(caches, older_than_s=1.5 * DAY_S).to_json()
    assert foretold == {**done, 'dry_run': True}
    assert len(done['removed']) == 2
    assert json.loads(json.dumps(done)) == done


def foreign_file(path: Path) -> None:
    path.write_text('mine')


def foreign_link(path: Path) -> None:
    path.symlink_to(path.parent.parent)


@pytest.mark.parametrize('kind', ['file', 'link', 'directory', 'fifo'])
@pytest.mark.parametrize(
    'name',
    [
        'notes.txt', 'superpoint.engine', 'superpoint.engine.json', '.hidden', '.bashrc.part', 'x.timing', 'model.onnx',
        'superpoint-fp16-sm87-trt8.6.2.3-0123456789ab.engine.bak', 'A' * 64, 'a' * 63,
    ],
)  # fmt: skip
def test_g3_what_is_not_the_caches_own_stays(caches: Caches, tmp_path: Path, name: str, kind: str) -> None:
    make: dict[str, Callable[[Path], None]] = {
        'file': foreign_file, 'link': foreign_link, 'directory': Path.mkdir, 'fifo': lambda path: os.mkfifo(path),
    }  # fmt: skip
    for directory in (*caches.engines, *caches.ort):
        directory.mkdir()
        make[kind](directory / name)
        os.utime(directory / name, (0, 0), follow_symlinks=False)
    before = tree(tmp_path)
    report = swept(caches, older_than_s=0.0, max_bytes=0, not_for=HOST)
    assert tree(tmp_path) == before
    assert sorted(report.foreign) == [directory / name for directory in (*caches.engines, *caches.ort)]


@pytest.mark.parametrize('kind', ['link', 'directory', 'fifo'])
def test_g3_a_cache_s_own_name_on_something_else_stays(caches: Caches, kind: str) -> None:
    engine = publish_engine(caches.engines[0])
    listed = publish_ort_cache(caches.ort[0])
    elsewhere = caches.ort[0].parent / 'elsewhere'
    shutil.move(listed, elsewhere)
    engine.unlink()
    manifest_path(engine).unlink()
    for path in (engine, manifest_path(engine), listed):
        if kind == 'link':
            path.symlink_to(elsewhere)
        elif kind == 'fifo':
            os.mkfifo(path)
        elif path != listed:
            path.mkdir()
    before = tree(caches.ort[0].parent)
    report = swept(caches, older_than_s=0.0, max_bytes=0)
    assert tree(caches.ort[0].parent) == before
    assert report.removed == []


def test_g3_a_directory_with_a_foreign_file_stays_whole(caches: Caches) -> None:
    directory = publish_ort_cache(caches.ort[0])
    (directory / 'notes.txt').write_text('mine')
    before = tree(directory)
    report = swept(caches, max_bytes=0)
    assert tree(directory) == before
    assert report.foreign == [directory / 'notes.txt']


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(min_size=1, max_size=40).filter(lambda name: name.isprintable() and '/' not in name))
def test_g3_any_other_name_stays(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    if name in ('.', '..', '.lock'):
        return
    root = tmp_path_factory.mktemp('any')
    caches = Caches((root / 'e',), (root / 'o',))
    for directory in (root / 'e', root / 'o'):
        directory.mkdir()
        (directory / name).write_text('mine')
        os.utime(directory / name, (0, 0))
    swept(caches, older_than_s=0.0, max_bytes=0, not_for=HOST)
    assert (root / 'e' / name).read_text() == (root / 'o' / name).read_text() == 'mine'


@pytest.mark.parametrize('deaths', [1, 2, 3, 4, 5])
def test_g3_a_sweep_that_dies_leaves_nothing_half(
    caches: Caches, deaths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever unlink it dies before, what admits an engine has gone before the engine."""
    engine = publish_engine(caches.engines[0])
    directory = publish_ort_cache(caches.ort[0])
    real_unlink = os.unlink
    calls = []

    def dying(path: str, **options: object) -> None:
        calls.append(path)
        if len(calls) == deaths:
            raise KeyboardInterrupt
        real_unlink(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, 'unlink', dying)
    with pytest.raises(KeyboardInterrupt):
        swept(caches, max_bytes=0)
    monkeypatch.undo()
    if not (engine.exists() and manifest_path(engine).exists()):
        assert not manifest_path(engine).exists()
        with pytest.raises(EngineSchemaMismatchError):
            EngineGate(HOST).admit(engine)
    if len(list(directory.iterdir()) if directory.exists() else []) < 3:
        assert not (directory / 'listing.json').exists()
    for path in (engine, directory):
        if path.exists():
            age(path, 1, now_s=NOW_S)
    swept(caches, max_bytes=0)
    assert not engine.exists() and not directory.exists()


def test_g3_an_engine_published_again_meanwhile_stays(caches: Caches) -> None:
    engine = publish_engine(caches.engines[0])
    age(engine, 100, now_s=NOW_S)
    reports: list[SweepReport] = []
    with open(caches.engines[0] / '.lock') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: reports.append(swept(caches, older_than_s=DAY_S)))
        thread.start()
        while not waits_for_a_lock(thread):
            time.sleep(0.01)
        # What a publisher does while it holds the lock.
        again = caches.engines[0] / 'again'
        again.write_bytes(engine.read_bytes())
        os.replace(again, engine)
    thread.join()
    assert engine.exists() and manifest_path(engine).exists()
    assert [item.path for item in reports[0].kept] == [engine]
    assert reports[0].failed == []


def waits_for_a_lock(thread: threading.Thread) -> bool:
    """Whether the kernel lists this process among those that wait for a lock (as ``1: -> FLOCK``)."""
    waiting = [line.split() for line in Path('/proc/locks').read_text().splitlines() if '->' in line]
    return not thread.is_alive() or any(fields[5] == str(os.getpid()) for fields in waiting)


def test_g3_a_build_under_way_is_left_alone(caches: Caches) -> None:
    built_for = BuiltFor(
        model_sha256='a' * 64, precision='fp16', axes={}, onnxruntime='1', tensorrt='8.6.2', gpu='Orin', sm=87,
        driver='1', platform='linux-aarch64',
    )  # fmt: skip
    build, _ = OrtEngineCache(caches.ort).begin(built_for)
    assert build is not None
    age(build.directory, 1, now_s=NOW_S)
    report = swept(caches)
    assert (report.removed, report.failed) == ([], [])
    assert build.directory.is_dir()
    build.close()


@pytest.mark.parametrize('mode', [0o775, 0o777, 0o1777])
def test_g3_a_directory_that_others_can_write_is_not_swept(caches: Caches, mode: int) -> None:
    engine = publish_engine(caches.engines[0])
    caches.engines[0].chmod(mode)
    report = swept(caches, max_bytes=0)
    assert engine.exists()
    assert [path for path, _ in report.refused] == [caches.engines[0]]
    assert 'chmod go-w' in report.refused[0][1]


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can give a directory away')
def test_g3_a_directory_of_another_user_is_not_swept(caches: Caches) -> None:
    engine = publish_engine(caches.engines[0])
    os.chown(caches.engines[0], 4242, 4242)
    assert [path for path, _ in swept(caches, max_bytes=0).refused] == [caches.engines[0]]
    assert engine.exists()


def test_g3_directories_that_are_not_there_hold_nothing(caches: Caches) -> None:
    report = swept(caches, max_bytes=0)
    assert report == SweepReport(dry_run=False)


def test_g3_a_cache_named_twice_is_swept_once(caches: Caches, tmp_path: Path) -> None:
    publish_engine(caches.engines[0])
    (tmp_path / 'link').symlink_to(caches.engines[0])
    twice = Caches((caches.engines[0], tmp_path / 'link'), caches.ort)
    assert len(swept(twice).kept) == 1


def test_g3_a_file_that_is_being_written_is_no_ballast(caches: Caches) -> None:
    """However little may be left, what a builder writes at this moment stays."""
    engine = publish_engine(caches.engines[0])
    part = caches.engines[0] / f'.{engine.name}.k3_9xq0a.part'
    part.write_bytes(b'half')
    age(part, 0, now_s=NOW_S)
    assert removed(swept(caches, max_bytes=0)) == [engine]
    assert part.exists()
