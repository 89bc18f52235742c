"""G-2: a cache that ONNX Runtime wrote is warm only while it is what was listed, for what it was built for."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gps_denied_c7.engines.ort_store import LISTING_NAME, BuiltFor, CachedFile, CacheListing, OrtEngineCache, WholeGraph
from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError
from gps_denied_c7.tensors import TensorSpec

BUILT_FOR = BuiltFor(
    model_sha256='a' * 64,
    precision='fp16',
    axes={'batch': 1},
    onnxruntime='1.17.1',
    tensorrt='8.6.0',
    gpu='NVIDIA H200',
    sm=90,
    driver='580.65.06',
    platform='linux-x86_64',
)
INPUTS = (TensorSpec('image', 'float32', (1, 1, 480, 640)),)
OUTPUTS = (TensorSpec('scores', 'float32', (1, 65, 60, 80)),)
ENGINE = b'ftrt' + bytes(range(256))


@pytest.fixture
def cache(tmp_path: Path) -> OrtEngineCache:
    return OrtEngineCache((tmp_path / 'first', tmp_path / 'second'))


@pytest.fixture
def any_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def built(cache: OrtEngineCache, whole: bool = True, **files: bytes) -> Path:
    build, notes = cache.begin(BUILT_FOR)
    assert build is not None
    assert notes == []
    for name, content in (files or {'one.engine': ENGINE, 'one.profile': b'shapes'}).items():
        (build.directory / name).write_bytes(content)
    build.record((INPUTS, OUTPUTS) if whole else None)
    return build.directory


def test_g2_recorded_build_is_warm_with_the_bytes_that_were_hashed(cache: OrtEngineCache, tmp_path: Path) -> None:
    directory = built(cache)
    assert directory == tmp_path / 'first' / ('a' * 64)
    warm, notes = cache.find(BUILT_FOR)
    assert warm is not None
    assert (warm.directory, warm.plan, notes) == (directory, ENGINE, [])
    assert warm.listing.built_for == BUILT_FOR
    assert warm.listing.whole_graph == WholeGraph('one.engine', INPUTS, OUTPUTS)


def test_g2_absent_cache_is_cold_without_a_word(cache: OrtEngineCache) -> None:
    assert cache.find(BUILT_FOR) == (None, [])


def test_g2_listing_round_trips() -> None:
    for whole in (None, WholeGraph('one.engine', INPUTS, OUTPUTS)):
        listing = CacheListing(built_for=BUILT_FOR, files=(CachedFile('one.engine', 'b' * 64, 260),), whole_graph=whole)
        assert CacheListing.from_json(listing.to_json()) == listing


def test_g2_listing_with_any_byte_changed_is_refused() -> None:
    content = CacheListing(
        built_for=BUILT_FOR,
        files=(CachedFile('one.engine', 'b' * 64, 260),),
        whole_graph=WholeGraph('one.engine', INPUTS, OUTPUTS),
    ).to_json()
    for at in range(len(content)):
        for damaged in (content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], content[:at]):
            with pytest.raises(EngineSchemaMismatchError):
                CacheListing.from_json(damaged)


@pytest.mark.parametrize('field', [field for field in BuiltFor.__dataclass_fields__ if field != 'model_sha256'])
def test_g2_each_thing_that_it_was_built_for_counts(cache: OrtEngineCache, field: str) -> None:
    directory = built(cache)
    other = {'axes': {'batch': 2}, 'sm': 87}.get(field, 'other')
    warm, notes = cache.find(replace(BUILT_FOR, **{field: other}))
    assert warm is None
    assert field in notes[0]
    assert repr(other) in notes[0]
    assert not directory.exists()


def test_g2_several_engines_or_free_axes_are_no_whole_graph(cache: OrtEngineCache, tmp_path: Path) -> None:
    built(cache, **{'one.engine': ENGINE, 'two.engine': ENGINE})
    warm, _ = cache.find(BUILT_FOR)
    assert warm is not None
    assert (warm.listing.whole_graph, warm.plan) == (None, None)
    other = OrtEngineCache((tmp_path / 'other',))
    build, _ = other.begin(BUILT_FOR)
    assert build is not None
    (build.directory / 'one.engine').write_bytes(ENGINE)
    free = (TensorSpec('image', 'float32', (None, 1, 480, 640)),)
    assert build.record((free, OUTPUTS)).whole_graph is None


def test_g2_files_of_an_open_umask_are_closed(cache: OrtEngineCache, any_umask: None) -> None:
    directory = built(cache)
    assert cache.find(BUILT_FOR)[0] is not None
    for path in (directory.parent, directory, *directory.iterdir()):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o022


@pytest.mark.parametrize('kind', ['nothing', 'no engine', 'link', 'directory', 'fifo'])
def test_g2_what_cannot_be_listed_is_not_kept(cache: OrtEngineCache, tmp_path: Path, kind: str) -> None:
    build, _ = cache.begin(BUILT_FOR)
    assert build is not None
    if kind != 'nothing':
        (build.directory / 'one.profile').write_bytes(b'shapes')
    if kind not in ('nothing', 'no engine'):
        (build.directory / 'one.engine').write_bytes(ENGINE)
    if kind == 'link':
        (build.directory / 'two.engine').symlink_to(tmp_path)
    elif kind == 'directory':
        (build.directory / 'two.engine').mkdir()
    elif kind == 'fifo':
        os.mkfifo(build.directory / 'two.engine')
    with pytest.raises(EngineDeserializeError):
        build.record(None)
    assert not build.directory.exists()
    assert cache.find(BUILT_FOR) == (None, [])


def test_g2_closed_build_is_gone_and_may_begin_again(cache: OrtEngineCache) -> None:
    build, _ = cache.begin(BUILT_FOR)
    assert build is not None
    (build.directory / 'one.engine').write_bytes(ENGINE)
    build.close()
    build.close()
    assert not build.directory.exists()
    built(cache)
    build.close()
    assert cache.find(BUILT_FOR)[0] is not None


def test_g2_build_under_way_is_left_alone_and_another_goes_elsewhere(cache: OrtEngineCache, tmp_path: Path) -> None:
    first, _ = cache.begin(BUILT_FOR)
    assert first is not None
    (first.directory / 'half.engine').write_bytes(ENGINE)
    warm, notes = cache.find(BUILT_FOR)
    assert warm is None
    assert 'another process is building' in notes[0]
    second, notes = cache.begin(BUILT_FOR)
    assert second is not None
    assert second.directory.parent == tmp_path / 'second'
    assert str(tmp_path / 'first') in notes[0]
    (second.directory / 'one.engine').write_bytes(ENGINE)
    second.record(None)
    first.record(None)
    warm, _ = cache.find(BUILT_FOR)
    assert warm is not None
    assert warm.directory == first.directory


def test_g2_nothing_writable_is_said(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('in the way')
    build, notes = OrtEngineCache((tmp_path / 'file', tmp_path / 'file' / 'below')).begin(BUILT_FOR)
    assert build is None
    assert len(notes) == 2


def test_g2_root_that_others_can_write_is_not_used(cache: OrtEngineCache, tmp_path: Path) -> None:
    (tmp_path / 'first').mkdir()
    (tmp_path / 'first').chmod(0o777)
    build, notes = cache.begin(BUILT_FOR)
    assert build is not None
    assert build.directory.parent == tmp_path / 'second'
    assert 'mode' in notes[0]
    build.close()


def test_g2_link_in_the_place_of_the_directory_is_not_followed(cache: OrtEngineCache, tmp_path: Path) -> None:
    elsewhere = built(OrtEngineCache((tmp_path / 'elsewhere',)), one=b'', **{'one.engine': ENGINE})
    (elsewhere / 'extra').write_bytes(b'')
    (tmp_path / 'first').mkdir(mode=0o755)
    (tmp_path / 'first' / ('a' * 64)).symlink_to(elsewhere)
    warm, notes = cache.find(BUILT_FOR)
    assert warm is None
    assert 'could not be deleted' in notes[0]
    assert (elsewhere / LISTING_NAME).exists()


def test_g2_lock_ends_with_the_build(cache: OrtEngineCache) -> None:
    directory = built(cache)
    descriptor = os.open(directory, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
