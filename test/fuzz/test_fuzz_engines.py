"""G-1: whatever becomes of an engine, its manifest or its name, the gate refuses it with one kind of error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.engines.admission import EngineGate, plan_version
from gps_denied_c7.engines.manifest import EngineManifest, EngineName, manifest_path, read_manifest
from gps_denied_c7.errors import EngineSchemaMismatchError
from support.fuzz_mutations import damaged, fuzz, hostile_json, json_text, substituted
from support.gate_files import HOST, PLAN, manifest_of, write_engine

MANIFEST = manifest_of().to_json()
GATE = EngineGate(HOST)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Path]:
    yield write_engine(tmp_path, manifest_of())


def refused(path: Path) -> None:
    with pytest.raises(EngineSchemaMismatchError) as caught:
        GATE.admit(path)
    assert str(caught.value) and caught.value.remedy


@fuzz(120)
@given(plan=damaged(PLAN, (MANIFEST,)))
def test_g1_no_damaged_plan_is_admitted(engine: Path, plan: bytes) -> None:
    engine.write_bytes(plan)
    refused(engine)
    engine.write_bytes(PLAN)


@fuzz(120)
@given(content=damaged(MANIFEST, (PLAN,)) | hostile_json(json.loads(MANIFEST)))
def test_g1_no_damaged_manifest_is_admitted(engine: Path, content: bytes) -> None:
    manifest_path(engine).write_bytes(content)
    refused(engine)
    manifest_path(engine).write_bytes(MANIFEST)


def signed(values: object) -> bytes:
    """Return a manifest's bytes with the digest that its own content has, as a forger would write it."""
    if not isinstance(values, dict):
        return json_text(values).encode()
    try:
        content = json.dumps(values, sort_keys=True, indent=1).encode() + b'\n'
        digest = hashlib.sha256(content).hexdigest()
        return json.dumps({**values, 'manifest_sha256': digest}, sort_keys=True, indent=1).encode() + b'\n'
    except RecursionError:
        return json_text({**values, 'manifest_sha256': '0' * 64}).encode()


@fuzz(140)
@given(values=substituted({key: value for key, value in json.loads(MANIFEST).items() if key != 'manifest_sha256'}))
def test_g1_a_manifest_with_a_right_digest_says_what_it_says_or_is_refused(engine: Path, values: object) -> None:
    content = signed(values)
    manifest_path(engine).write_bytes(content)
    try:
        admitted = GATE.admit(engine)
    except EngineSchemaMismatchError:
        return
    finally:
        manifest_path(engine).write_bytes(MANIFEST)
    assert admitted.plan == PLAN
    assert admitted.manifest.to_json() == content
    assert admitted.manifest.engine_name == EngineName.parse(engine.name)


@fuzz(120)
@given(plan=damaged(PLAN[:64], most=2))
def test_g1_a_damaged_header_is_refused_though_every_digest_is_right(tmp_path: Path, plan: bytes) -> None:
    path = write_engine(tmp_path, manifest_of(plan), plan)
    same = plan_version(plan) == manifest_of().tensorrt
    if same:
        assert GATE.admit(path).plan == plan
    else:
        refused(path)


@fuzz(140)
@given(
    name=damaged(str(manifest_of().engine_name).encode(), most=2).map(lambda name: name.decode('latin-1'))
    | st.text(st.characters(), max_size=300)
    | st.sampled_from(('\ud800', 'a' * 5000, '\0', f'{"9" * 5000}-fp16-sm87-trt8.6.2-0123456789ab.engine'))
)
def test_g1_another_name_is_refused(engine: Path, name: str) -> None:
    name = name.replace('/', '_')
    if name in (engine.name, ''):
        return
    refused(engine.parent / name)
    with pytest.raises(EngineSchemaMismatchError):
        read_manifest(engine.parent / name)


@fuzz(100)
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            field.name: st.text(max_size=8) | st.integers() for field in dataclasses.fields(EngineManifest)
            if field.type == 'str'
        } | {'sm': st.integers(), 'engine_bytes': st.integers()},
    )
)  # fmt: skip
def test_g1_a_manifest_with_other_fields_admits_only_what_it_describes(engine: Path, changes: dict) -> None:
    manifest = manifest_of(**changes)
    manifest_path(engine).write_bytes(manifest.to_json())
    try:
        assert GATE.admit(engine).manifest == manifest
    except EngineSchemaMismatchError:
        pass
    finally:
        manifest_path(engine).write_bytes(MANIFEST)
