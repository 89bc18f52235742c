"""M-1: whatever becomes of a bundle's files, what comes out is the bundle or a typed error."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.model.bundle import (
    ModelBundle,
)
from gps_denied_c7.model.files import npz_bytes
from support.fuzz_bundles import OUTPUTS, make_bundle, use
from support.fuzz_mutations import damaged, fuzz, hostile_json

NPZ = npz_bytes(OUTPUTS)


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp('bundle') / 'net')


@pytest.fixture(scope='module')
def values(root: Path) -> dict:
    return json.loads((root / 'model.json').read_text())


@pytest.fixture
def whole_json(root: Path):
    content = (root / 'model.json').read_bytes()
    yield content
    (root / 'model.json').write_bytes(content)


@fuzz(120)
@given(data=st.data())
def test_m1_a_damaged_model_json_is_read_or_refused(root: Path, whole_json: bytes, data: st.DataObject) -> None:
    (root / 'model.json').write_bytes(data.draw(damaged(whole_json, (NPZ,))))
    use(root)


@fuzz(160)
@given(data=st.data())
def test_m1_a_model_json_of_other_values_is_read_or_refused(
    root: Path, values: dict, whole_json: bytes, data: st.DataObject
) -> None:
    (root / 'model.json').write_bytes(data.draw(hostile_json(values)))
    use(root)


@fuzz(60)
@given(data=st.data(), name=st.sampled_from(('net.onnx', 'golden_inputs.npz', 'golden_outputs.npz')))
def test_m1_a_damaged_file_is_never_taken_for_the_one_that_was_named(
    root: Path, data: st.DataObject, name: str
) -> None:
    file = root / name
    content = file.read_bytes()
    file.write_bytes(data.draw(damaged(content, (NPZ,))))
    try:
        assert not use(root)
    finally:
        file.write_bytes(content)


def archive_of(entries: list[tuple[str, bytes]], method: int) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w', method) as archive:
        for name, entry in entries:
            archive.writestr(zipfile.ZipInfo(name), entry, method)
    return content.getvalue()


def array_file(shape: str, dtype: str, content: bytes = b'') -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + '\n'
    return b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header.encode('latin-1', 'replace') + content


ARRAYS = {f'{name}.npy': zipfile.ZipFile(io.BytesIO(NPZ)).read(f'{name}.npy') for name in OUTPUTS}
ARRAY_FILES = st.one_of(
    st.builds(
        array_file,
        st.sampled_from(('(1, 4)', '(1 << 40,)', '(1099511627776,)', '(-1, 4)', '()', '(0,)', "'4'", '[1, 4]',
                         '(1, 4.0)', '(' * 90 + ')' * 90, '(1,' * 40, '(True, 4)', '(99999999999999999999,)',
                         '(0, 99999999999999999999)', '(1,)*99')),
        st.sampled_from(("'<i8'", "'<f4'", "'|O'", "'|V0'", "'<U0'", "'<U9999999'", "[('a', '<i8')]", "'>i8'", 'None',
                         "'<M8[ns]'", "'(3,)<i8'", "{'names': []}")),
        st.binary(max_size=64),
    ),
    st.sampled_from(sorted(ARRAYS)).flatmap(lambda name: damaged(ARRAYS[name])),
    st.binary(max_size=64),
)  # fmt: skip
HOSTILE_NPZ = st.one_of(
    damaged(NPZ),
    st.builds(
        archive_of,
        st.lists(
            st.tuples(st.sampled_from((*ARRAYS, 'places', 'other.npy', '../x.npy', '')), ARRAY_FILES), max_size=2
        ).map(lambda extra: [*((n, c) for n, c in ARRAYS.items() if n not in dict(extra)), *extra]),
        st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
    ),
)


@pytest.mark.filterwarnings('ignore')
@fuzz(160)
@given(content=HOSTILE_NPZ)
def test_m1_golden_arrays_with_a_right_digest_fit_or_are_refused(
    root: Path, values: dict, whole_json: bytes, content: bytes
) -> None:
    file = root / 'golden_outputs.npz'
    before = file.read_bytes()
    file.write_bytes(content)
    (case,) = values['golden']
    outputs = {**case['outputs'], 'sha256': hashlib.sha256(content).hexdigest()}
    golden = [{**case, 'outputs': outputs}]
    (root / 'model.json').write_text(json.dumps({**values, 'golden': golden}))
    try:
        use(root)
    finally:
        file.write_bytes(before)


NUMBERS = st.floats() | st.sampled_from((0, 1, 1e-320, 1e154, 1e200, 1.7e308, 10**400)) | st.integers()


@pytest.mark.filterwarnings('ignore')
@fuzz(120)
@given(
    first=NUMBERS,
    second=NUMBERS,
    members=st.sampled_from(('nonzero', 'values', 'top_k', '')),
    k=NUMBERS,
    found=st.lists(st.floats(width=32), min_size=40, max_size=40),
)
def test_m1_rules_of_any_numbers_compare_any_arrays(
    root: Path, values: dict, whole_json: bytes, first: float, second: float, members: str, k: float, found: list
) -> None:
    rules = {
        'heat': {'kind': 'allclose', 'rtol': first, 'atol': second},
        'points': {'kind': 'matched_distance', 'max_distance': first, 'min_fraction': second},
        'places': {'kind': 'set_overlap', 'min_iou': second, 'members': members},
    }
    if members == 'top_k':
        rules['places']['k'] = k
    # One rule at a time: the others stay as they are, so that one refusal does not hide the rest.
    for output, rule in rules.items():
        (root / 'model.json').write_text(json.dumps({**values, 'rules': {**values['rules'], output: rule}}))
        try:
            bundle = ModelBundle.load(root)
        except ModelBundleError:
            continue
        points = np.array(found, np.float32)
        bundle.compare({**OUTPUTS, 'points': points.reshape(20, 2), 'heat': np.resize(points, (1, 1, 6, 8))})
