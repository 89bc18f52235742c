"""G-1, G-3: engines lie where the gate trusts them, are found by what they were built from, and are whole or absent."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.manifest import EngineName, manifest_path
from gps_denied_c7.engines.store import (
    LOCK_NAME,
    EngineCache,
    engine_model_name,
    fallback_directory,
    make_private_directory,
)
from gps_denied_c7.errors import EngineDeserializeError
from gps_denied_c7.model.files import PART_SUFFIX
from support.engine_cache_files import HOST, SOURCE, fake_plan, manifest_of


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / 'engines'


@pytest.fixture
def cache(directory: Path) -> EngineCache:
    return EngineCache((directory,))


def find(cache: EngineCache, **changes: object) -> Path | None:
    found = cache.find(HOST, **{'precision': 'fp16', 'source_sha256': SOURCE, **changes})
    return found.path if found else None


def test_g1_a_published_engine_passes_the_gate(cache: EngineCache, directory: Path) -> None:
    plan = fake_plan()
    published = cache.publish(plan, manifest_of(plan))
    assert EngineGate(HOST).admit(published.path, source_sha256=SOURCE).plan == plan
    assert find(cache) == published.path == directory / str(manifest_of(plan).engine_name)
    assert sorted(path.name for path in directory.iterdir() if not path.name.startswith('.')) == sorted(
        [published.path.name, manifest_path(published.path).name]
    )
    assert not list(directory.glob(f'.*{PART_SUFFIX}'))


@pytest.mark.parametrize('umask', [0o000, 0o002, 0o077])
def test_g1_directories_are_trusted_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    plan = fake_plan()
    before = os.umask(umask)
    try:
        published = EngineCache((tmp_path / 'a' / 'b' / 'c',)).publish(plan, manifest_of(plan))
    finally:
        os.umask(before)
    assert EngineGate(HOST).admit(published.path)
    for path in (published.path, manifest_path(published.path), *published.path.parents[:3]):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_r2_an_engine_is_found_by_what_it_was_built_from_and_for(cache: EngineCache) -> None:
    plan = fake_plan()
    wanted = cache.publish(plan, manifest_of(plan)).path
    others = [
        {'precision': 'fp32'},
        {'sm': 72},
        {'tensorrt': '8.6.1.3'},
        {'source_sha256': hashlib.sha256(b'another').hexdigest()},
    ]
    for changes in others:
        cache.publish(plan, manifest_of(plan, **changes))
    assert find(cache) == wanted
    assert find(cache, precision='fp8') is None
    assert cache.find(replace(HOST, gpu='Xavier'), precision='fp16', source_sha256=SOURCE) is None
    assert cache.find(replace(HOST, platform='linux-x86_64'), precision='fp16', source_sha256=SOURCE) is None
    assert cache.find(replace(HOST, tensorrt='8.6.2.4'), precision='fp16', source_sha256=SOURCE) is None


def test_r2_digests_that_begin_alike_are_told_apart(cache: EngineCache) -> None:
    """The name has 12 digits of the digest, the manifest all."""
    plan = fake_plan()
    cache.publish(plan, manifest_of(plan))
    assert find(cache, source_sha256=SOURCE[:12] + '0' * 52) is None


def test_r2_the_newest_build_of_tensorrt_wins(cache: EngineCache) -> None:
    plan = fake_plan()
    for version in ('8.6.2.9', '8.6.2.10', '8.6.2.3'):
        cache.publish(plan, manifest_of(plan, tensorrt=version))
    found = find(cache)
    assert found is not None and EngineName.parse(found.name).tensorrt == '8.6.2.10'


def test_f5_an_engine_for_other_shapes_is_not_found(cache: EngineCache) -> None:
    plan = fake_plan()
    cache.publish(plan, manifest_of(plan))
    assert find(cache, shapes={'image': (1, 1, 480, 640)})
    assert find(cache, shapes={'image': (None, 1, None, 640)})
    assert find(cache, shapes={'image': (1, 1, 240, 320)}) is None
    assert find(cache, shapes={'image': (1, 480, 640)}) is None


@pytest.mark.parametrize('damage', ['absent', 'truncated', 'writable by others'])
def test_g1_an_engine_without_a_sound_manifest_is_passed_over(
    cache: EngineCache, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    plan = fake_plan()
    manifest = manifest_path(cache.publish(plan, manifest_of(plan)).path)
    if damage == 'absent':
        manifest.unlink()
    elif damage == 'truncated':
        manifest.write_bytes(manifest.read_bytes()[:-5])
    else:
        manifest.chmod(0o666)
    assert find(cache) is None
    assert 'is not used' in caplog.text


def test_r2_a_cache_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert find(EngineCache((tmp_path / 'nowhere',))) is None


def test_g1_a_provisioned_directory_is_used_and_building_goes_to_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody but root writes the first; engines of both are found."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
    provisioned = tmp_path / 'provisioned' / 'engine_cache'
    plan = fake_plan()
    first = EngineCache((provisioned,)).publish(plan, manifest_of(plan)).path
    cache = EngineCache.at(provisioned)
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: path != provisioned and access(path, mode))
    second = cache.publish(plan, manifest_of(plan, precision='fp32')).path
    assert second.parent == tmp_path / 'home' / 'gps-denied' / 'engine_cache'
    assert 'cannot be written' in caplog.text
    assert find(cache) == first
    assert find(cache, precision='fp32') == second


def test_g1_a_default_that_cannot_be_made_gives_way_to_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
    cache = EngineCache.at(tmp_path / 'file' / 'engine_cache')
    assert cache.writable_directory() == tmp_path / 'home' / 'gps-denied' / 'engine_cache'
    assert 'engines are kept in' in caplog.text


def test_g1_directories_that_others_can_write_are_not_written(tmp_path: Path) -> None:
    for name in ('group', 'all'):
        (tmp_path / name).mkdir()
    (tmp_path / 'group').chmod(0o775)
    (tmp_path / 'all').chmod(0o1777)
    cache = EngineCache((tmp_path / 'group', tmp_path / 'all'))
    with pytest.raises(EngineDeserializeError) as caught:
        cache.publish(fake_plan(), manifest_of(fake_plan()))
    assert str(tmp_path / 'group') in str(caught.value) and str(tmp_path / 'all') in str(caught.value)
    assert caught.value.remedy
    assert not list((tmp_path / 'group').iterdir())


@pytest.mark.parametrize('value', ['', 'relative/path'])
def test_g1_without_a_usable_xdg_directory_it_is_the_home(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', value)
    monkeypatch.setenv('HOME', '/home/pilot')
    assert fallback_directory(Path('/var/engine_cache')) == Path('/home/pilot/.cache/gps-denied/engine_cache')


def test_g1_a_full_disk_is_an_error_and_leaves_nothing(
    cache: EngineCache, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(EngineDeserializeError, match='No space left'):
        cache.publish(fake_plan(), manifest_of(fake_plan()))
    assert list(directory.iterdir()) == []


def test_g1_the_engine_is_in_place_before_its_manifest(
    cache: EngineCache, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And both are on the disk before either has its name."""
    steps: list[str] = []
    replace_, fsync = os.replace, os.fsync

    def note_replace(source: str, target: Path) -> None:
        steps.append('manifest' if str(target).endswith('.json') else 'engine')
        replace_(source, target)

    def note_fsync(descriptor: int) -> None:
        steps.append('directory' if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 'file')
        fsync(descriptor)

    monkeypatch.setattr(os, 'replace', note_replace)
    monkeypatch.setattr(os, 'fsync', note_fsync)
    plan = fake_plan()
    cache.publish(plan, manifest_of(plan))
    assert steps == ['file', 'file', 'engine', 'directory', 'manifest', 'directory']


def test_g1_builders_that_end_together_do_not_mix_their_files(cache: EngineCache) -> None:
    plans = [fake_plan(200_000, seed=seed) for seed in range(6)]
    threads = [
        threading.Thread(target=lambda plan=plan: [cache.publish(plan, manifest_of(plan)) for _ in range(5)])
        for plan in plans
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = find(cache)
    assert path is not None
    assert EngineGate(HOST).admit(path).plan in plans


def test_g1_files_are_put_in_place_under_the_lock(cache: EngineCache, directory: Path) -> None:
    plan = fake_plan()
    directory.mkdir()
    with open(directory / LOCK_NAME, 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer = threading.Thread(target=lambda: cache.publish(plan, manifest_of(plan)))
        writer.start()
        while len(list(directory.glob(f'.*{PART_SUFFIX}'))) < 2:
            time.sleep(0.005)
        writer.join(0.1)
        assert writer.is_alive() and find(cache) is None
    writer.join()
    assert find(cache) is not None


def test_r2_timings_come_back_whole_or_not_at_all(cache: EngineCache, directory: Path) -> None:
    assert cache.read_timing_cache(HOST, 2) == b''
    cache.write_timing_cache(HOST, 2, b'measured')
    assert cache.read_timing_cache(HOST, 2) == b'measured'
    assert cache.read_timing_cache(replace(HOST, gpu='NVIDIA H100 80GB HBM3'), 2) == b''
    assert cache.read_timing_cache(HOST, 3) == b'', 'a longer search finds other tactics'
    (file,) = directory.glob('*.timing')
    for content in (file.read_bytes()[:-1], b'', b'x' * 100):
        file.write_bytes(content)
        assert cache.read_timing_cache(HOST, 2) == b''
    cache.write_timing_cache(HOST, 2, b'measured')
    directory.chmod(0o777)
    assert cache.read_timing_cache(HOST, 2) == b'', 'somebody else could have put it there'


def test_r2_timings_that_cannot_be_kept_cost_nothing_but_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / 'file').touch()
    EngineCache((tmp_path / 'file',)).write_timing_cache(HOST, 2, b'measured')
    assert 'timing cache was not kept' in caplog.text


@pytest.mark.parametrize(
    ('name', 'plain'),
    [
        ('superpoint-v1', 'superpoint-v1'),
        ('über net (2)', 'ber_net__2_'),
        ('..', 'model'),
        ('-x', 'x'),
        ('n' * 300, 'n' * 128),
    ],
)
def test_g1_model_names_fit_into_file_names(name: str, plain: str) -> None:
    assert engine_model_name(name) == plain
    EngineName(plain, 'fp16', 87, '8.6.2', '0' * 12)


def test_g1_a_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / 'mine').mkdir(mode=0o700)
    make_private_directory(tmp_path / 'mine' / 'deeper')
    assert stat.S_IMODE((tmp_path / 'mine').stat().st_mode) == 0o700
    with contextlib.suppress(FileExistsError):
        make_private_directory(tmp_path / 'mine')
