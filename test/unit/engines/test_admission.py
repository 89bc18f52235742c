"""G-1: an engine file is admitted whole, with its manifest, for this host, from a trusted directory, or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.manifest import EngineManifest, EngineName, manifest_path, read_manifest
from gps_denied_c7.errors import EngineSchemaMismatchError
from support.gate_files import HOST, PLAN, SOURCE_SHA256, manifest_of, write_engine


def refused(path: Path, **promises: str) -> EngineSchemaMismatchError:
    with pytest.raises(EngineSchemaMismatchError) as caught:
        EngineGate(HOST).admit(path, **promises)
    error = caught.value
    assert error.remedy
    assert error.field in str(error)
    assert repr(error.expected) in str(error)
    assert repr(error.found) in str(error)
    return error


def test_g1_well_formed_engine_is_admitted_with_the_bytes_that_were_hashed(tmp_path: Path) -> None:
    path = write_engine(tmp_path, manifest_of())
    admitted = EngineGate(HOST).admit(path, engine_sha256=hashlib.sha256(PLAN).hexdigest(), source_sha256=SOURCE_SHA256)
    assert admitted.plan == PLAN
    assert admitted.manifest == manifest_of()
    assert admitted.path == path


def test_g1_host_version_with_four_numbers_admits_its_own(tmp_path: Path) -> None:
    path = write_engine(tmp_path, manifest_of())
    host = dataclasses.replace(HOST, tensorrt='8.6.2.3')
    assert EngineGate(host).admit(path).plan == PLAN


@pytest.mark.parametrize(
    ('field', 'change', 'expected', 'found'),
    [
        ('sm', {'sm': 90}, 87, 90),
        ('tensorrt', {'tensorrt': '10.3.0.30'}, '8.6.2', '10.3.0.30'),
        ('tensorrt', {'tensorrt': '8.6.1'}, '8.6.2', '8.6.1'),
        ('gpu', {'gpu': 'NVIDIA H200'}, 'Orin', 'NVIDIA H200'),
        ('platform', {'platform': 'linux-x86_64'}, 'linux-aarch64', 'linux-x86_64'),
        ('engine_sha256', {'engine_sha256': '0' * 64}, '0' * 64, hashlib.sha256(PLAN).hexdigest()),
        ('engine_bytes', {'engine_bytes': len(PLAN) + 1}, len(PLAN) + 1, len(PLAN)),
        ('file', {'engine_bytes': len(PLAN) - 1}, f'at most {len(PLAN) - 1} bytes', None),
        ('plan_version', {'tensorrt': '8.6.2.4'}, '8.6.2.4', '8.6.2.3'),
    ],
)
def test_g1_each_mismatch_names_field_expected_and_found(
    tmp_path: Path, field: str, change: dict[str, object], expected: object, found: object
) -> None:
    error = refused(write_engine(tmp_path, manifest_of(**change)))
    assert error.field == field
    assert error.expected == expected
    if found is not None:
        assert error.found == found


@pytest.mark.parametrize(
    ('field', 'change'),
    [
        ('model', {'model': 'superpoint-v2'}),
        ('precision', {'precision': 'fp32'}),
        ('tensorrt', {'tensorrt': '8.6.2'}),
        ('sm', {'sm': 86}),
        ('digest', {'source_sha256': 'f' * 64}),
    ],
)
def test_g1_file_name_and_manifest_must_agree(tmp_path: Path, field: str, change: dict[str, object]) -> None:
    path = write_engine(tmp_path, manifest_of(**change), name=str(manifest_of().engine_name))
    assert refused(path).field == field


def test_g1_promised_digests_are_held(tmp_path: Path) -> None:
    path = write_engine(tmp_path, manifest_of())
    assert refused(path, engine_sha256='1' * 64).field == 'engine_sha256'
    assert refused(path, source_sha256='2' * 64).field == 'source_sha256'


@pytest.mark.parametrize(
    ('field', 'plan'),
    [
        ('plan_header', b''),
        ('plan_header', PLAN[:27]),
        ('plan_magic', b'ptrt' + PLAN[4:]),
        ('plan_version', PLAN[:24] + bytes([8, 5, 2, 3]) + PLAN[28:]),
    ],
)
def test_g1_plan_header(tmp_path: Path, field: str, plan: bytes) -> None:
    assert refused(write_engine(tmp_path, manifest_of(plan), plan)).field == field


@pytest.mark.parametrize(
    'name',
    [
        'superpoint.engine',
        'superpoint-fp16-sm87-trt8.6.2.3-0123456789ab.plan',
        'superpoint-fp16-sm87-trt8.6-0123456789ab.engine',
        'superpoint-fp16-sm087-trt8.6.2-0123456789ab.engine',
        'superpoint-fp16-sm87-trt8.6.2-0123456789AB.engine',
        'superpoint-fp16-sm87-trt8.6.2-0123456789ab.engine\n',
        'superpoint-fp16-sm8٧-trt8.6.2-0123456789ab.engine',
        '-fp16-sm87-trt8.6.2-0123456789ab.engine',
    ],
)
def test_g1_file_name_schema(tmp_path: Path, name: str) -> None:
    assert refused(write_engine(tmp_path, manifest_of(), name=name)).field == 'file_name'


names = st.builds(
    EngineName,
    model=st.from_regex(r'[A-Za-z0-9][A-Za-z0-9._-]{0,40}', fullmatch=True),
    precision=st.sampled_from(['fp32', 'fp16', 'bf16', 'int8']),
    sm=st.integers(10, 999),
    tensorrt=st.lists(st.integers(0, 255), min_size=3, max_size=4).map(lambda parts: '.'.join(map(str, parts))),
    digest=st.from_regex(r'[0-9a-f]{12}', fullmatch=True),
)


@given(names)
def test_g1_file_name_round_trips(name: EngineName) -> None:
    assert EngineName.parse(str(name)) == name


def test_g1_manifest_round_trips() -> None:
    assert EngineManifest.from_json(manifest_of().to_json()) == manifest_of()


@pytest.mark.parametrize(
    'edit',
    [
        lambda content: content.pop('platform'),
        lambda content: content.update(colour='red'),
        lambda content: content.update(sm='87'),
        lambda content: content.update(sm=87.0),
        lambda content: content.update(inputs=[]),
        lambda content: content.update(inputs='image'),
        lambda content: content['inputs'][0].update(shape=3),
        lambda content: content['inputs'][0].update(shape='13'),
        lambda content: content['inputs'][0].pop('dtype'),
        lambda content: content.update(builder_flags=None),
        lambda content: content.update(builder_flags='fp16'),
        lambda content: content.update(versions={'cuda': 12}),
        lambda content: content['versions'].update(driver='580'),
    ],
)
def test_g1_edited_manifest_is_refused(tmp_path: Path, edit: Callable[[dict], object]) -> None:
    path = write_engine(tmp_path, manifest_of())
    content = json.loads(manifest_path(path).read_bytes())
    edit(content)
    manifest_path(path).write_text(json.dumps(content, sort_keys=True, indent=1) + '\n')
    assert refused(path).field.startswith('manifest')


@pytest.mark.parametrize('content', [b'', b'\xff', b'null', b'[' * 100_000, b'{"schema": 1e999}', b'{"sm": NaN}'])
def test_g1_manifest_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = write_engine(tmp_path, manifest_of())
    manifest_path(path).write_bytes(content)
    assert refused(path).field == 'manifest'


def test_g1_manifest_of_another_spelling_is_refused(tmp_path: Path) -> None:
    path = write_engine(tmp_path, manifest_of())
    manifest_path(path).write_bytes(manifest_of().to_json() + b'\n')
    assert refused(path).field == 'manifest_sha256'


def test_g1_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = write_engine(tmp_path, manifest_of())
    manifest_path(path).write_bytes(manifest_of().to_json().replace(b'"schema": 1', b'"schema": 2'))
    error = refused(path)
    assert (error.field, error.expected, error.found) == ('manifest_schema', 1, 2)


def test_g1_oversized_manifest_is_not_read(tmp_path: Path) -> None:
    path = write_engine(tmp_path, manifest_of())
    os.truncate(manifest_path(path), 1 << 40)
    assert refused(path).field == 'file'


@pytest.mark.parametrize('which', ['engine', 'manifest'])
@pytest.mark.parametrize('kind', ['missing', 'directory', 'link', 'fifo'])
def test_g1_only_regular_files_are_opened(tmp_path: Path, which: str, kind: str) -> None:
    engine = write_engine(tmp_path, manifest_of())
    path = engine if which == 'engine' else manifest_path(engine)
    kept = path.rename(tmp_path / 'elsewhere')
    if kind == 'directory':
        path.mkdir(mode=0o755)
    elif kind == 'link':
        path.symlink_to(kept)
    elif kind == 'fifo':
        os.mkfifo(path, 0o644)
    assert refused(engine).field == 'file'


def test_g1_missing_directory(tmp_path: Path) -> None:
    assert refused(tmp_path / 'nowhere' / str(manifest_of().engine_name)).field == 'directory'


def test_g1_directory_behind_a_link_is_judged_by_where_it_leads(tmp_path: Path) -> None:
    real = tmp_path / 'shared' / 'engines'
    real.mkdir(parents=True, mode=0o755)
    real.parent.chmod(0o755)
    path = write_engine(real, manifest_of())
    (tmp_path / 'link').symlink_to(real)
    assert EngineGate(HOST).admit(tmp_path / 'link' / path.name).plan == PLAN
    real.parent.chmod(0o777)
    assert refused(tmp_path / 'link' / path.name).field == 'mode'


@pytest.mark.parametrize('mode', [0o775, 0o757, 0o1777])
def test_g1_engine_directory_writable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / 'engines'
    directory.mkdir()
    path = write_engine(directory, manifest_of())
    directory.chmod(mode)
    assert refused(path).field == 'mode'


@pytest.mark.parametrize(('mode', 'admitted'), [(0o775, False), (0o757, False), (0o1777, True), (0o755, True)])
def test_g1_ancestor_writable_by_others_is_refused_unless_sticky(tmp_path: Path, mode: int, admitted: bool) -> None:
    directory = tmp_path / 'shared' / 'engines'
    directory.mkdir(parents=True, mode=0o755)
    path = write_engine(directory, manifest_of())
    directory.parent.chmod(mode)
    if admitted:
        assert EngineGate(HOST).admit(path).plan == PLAN
    else:
        assert refused(path).field == 'mode'


def test_g1_files_writable_by_others_are_refused(tmp_path: Path) -> None:
    path = write_engine(tmp_path, manifest_of())
    path.chmod(0o664)
    assert refused(path).field == 'mode'
    path.chmod(0o644)
    manifest_path(path).chmod(0o646)
    assert refused(path).field == 'mode'


def test_g1_foreign_owner_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_engine(tmp_path, manifest_of())
    if os.geteuid() == 0:
        os.chown(path, 4242, 4242)
    else:
        monkeypatch.setattr(os, 'geteuid', lambda: 4242)
    assert refused(path).field == 'owner'


def test_g1_read_only_cache_is_used(tmp_path: Path) -> None:
    directory = tmp_path / 'provisioned'
    directory.mkdir()
    path = write_engine(directory, manifest_of())
    path.chmod(0o444)
    directory.chmod(0o555)
    assert EngineGate(HOST).admit(path).plan == PLAN


@pytest.fixture(scope='module')
def well_formed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp('engines'), manifest_of())


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """Truncate, extend, overwrite, cut out or flip bits, never giving ``content`` back."""
    where = st.integers(0, len(content) - 1)
    flipped = st.tuples(where, st.integers(0, 7)).map(
        lambda at: content[: at[0]] + bytes([content[at[0]] ^ 1 << at[1]]) + content[at[0] + 1 :]
    )
    overwritten = st.tuples(where, st.binary(min_size=1, max_size=64)).map(
        lambda at: content[: at[0]] + at[1] + content[at[0] + len(at[1]) :]
    )
    cut = st.tuples(where, where).map(lambda ends: content[: min(ends)] + content[max(ends) :])
    grown = st.tuples(where, st.binary(min_size=1, max_size=64)).map(
        lambda at: content[: at[0]] + at[1] + content[at[0] :]
    )
    return st.one_of(flipped, overwritten, cut, grown, where.map(lambda end: content[:end])).filter(
        lambda mutated: mutated != content
    )


MUTATION_SETTINGS = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@MUTATION_SETTINGS
@given(mutations(PLAN))
def test_g1_mutated_plan_is_never_admitted(well_formed: Path, mutated: bytes) -> None:
    well_formed.write_bytes(mutated)
    refused(well_formed)
    well_formed.write_bytes(PLAN)


@MUTATION_SETTINGS
@given(mutations(manifest_of().to_json()))
def test_g1_mutated_manifest_is_never_admitted(well_formed: Path, mutated: bytes) -> None:
    manifest_path(well_formed).write_bytes(mutated)
    refused(well_formed)
    manifest_path(well_formed).write_bytes(manifest_of().to_json())


@MUTATION_SETTINGS
@given(st.text(max_size=80).filter(lambda text: '/' not in text and '\0' not in text))
def test_g1_any_file_name_is_refused_with_the_typed_error_alone(name: str) -> None:
    refused(Path('/nowhere') / name)


def test_g1_a_manifest_nested_to_any_depth_is_refused_with_the_typed_error_alone(tmp_path: Path) -> None:
    path = write_engine(tmp_path, manifest_of())
    content = json.loads(manifest_path(path).read_bytes())
    for depth in (30, 100, 200, 300, 400, 500, 700, 900, 990, 100_000):
        text = json.dumps({**content, 'builder_flags': ['here']}, sort_keys=True, indent=1)
        manifest_path(path).write_text(text.replace('"here"', '[' * depth + ']' * depth))
        assert refused(path).field.startswith('manifest')


@pytest.mark.parametrize('name', ['\ud800', 'a\0b'])
def test_g1_a_name_that_no_file_has_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(EngineSchemaMismatchError, match='file'):
        read_manifest(tmp_path / name)
