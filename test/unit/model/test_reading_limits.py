"""What the node itself reads has a memory budget, whatever a file says of itself, and however it changes meanwhile."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from gps_denied_c7 import host_memory
from gps_denied_c7.demo.network import write_demo_bundle
from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.host_memory import available_memory, require_memory
from gps_denied_c7.model import bundle as bundle_module
from gps_denied_c7.model import compare
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.compare import AllClose, MatchedDistance, SetOverlap, compare_output
from gps_denied_c7.model.files import BundleFile, file_sha256, read_file, read_npz, read_pieces

MIB = 1 << 20


def npy(descr='<f4', shape=(4,), body=bytes(16), version=1):
    content = io.BytesIO()
    header = {'descr': descr, 'fortran_order': False, 'shape': shape}
    getattr(np.lib.format, f'write_array_header_{version}_0')(content, header)
    return content.getvalue() + body


def archive(path, *entries):
    """Write entries, names and bytes, by zipfile."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as out:
        for name, content in entries:
            out.writestr(name, content)
    return BundleFile(path, file_sha256(path))


@pytest.mark.filterwarnings('ignore:Duplicate name')
@pytest.mark.parametrize(
    ('entries', 'problem'),
    [
        ([('x.npy', npy(shape=(1 << 43,)))], 'has 16 bytes'),
        ([('x.npy', npy(shape=(-4, -1)))], 'has 16 bytes'),
        ([('x.npy', npy(shape=(3,)))], 'has 16 bytes'),
        ([('x.npy', npy(descr='|O', shape=(2,)))], 'has 16 bytes'),
        ([('x.npy', npy(version=2))], 'not a plain array'),
        ([('x.npy', npy()), ('x.npy', npy())], 'two entries'),
        ([(f'{number}.npy', npy()) for number in range(1025)], 'more than 1024 entries'),
        ([('x.npy', npy(shape=(80 * MIB,), body=bytes(320 * MIB)))], f'more than {256 * MIB}'),
    ],
    ids=['terabytes', 'negative', 'shorter', 'objects', 'header of gigabytes', 'twice', 'many', 'bomb'],
)  # fmt: skip
def test_m1_an_archive_is_refused_by_what_it_says_before_its_arrays_are_made(tmp_path, entries, problem):
    file = archive(tmp_path / 'golden.npz', *entries)
    with pytest.raises(ModelBundleError, match=problem) as error:
        read_npz(file)
    assert 'golden.npz' in str(error.value)


def test_m1_an_archive_of_megabytes_of_names_is_refused_before_they_are_read(tmp_path, monkeypatch):
    path = tmp_path / 'golden.npz'
    with zipfile.ZipFile(path, 'w') as out:
        for number in range(200):
            out.writestr(f'{number}{"x" * 30_000}.npy', npy())
    monkeypatch.setattr(zipfile, 'ZipFile', lambda *_: pytest.fail('it was opened'))
    with pytest.raises(ModelBundleError, match='golden.npz.* bytes of names'):
        read_npz(BundleFile(path, file_sha256(path)))


def test_m1_golden_files_have_a_limit_together(tmp_path, monkeypatch):
    root = write_demo_bundle(tmp_path / 'net')
    bundle = ModelBundle.load(root)
    sizes = [(root / name).stat().st_size for name in ('golden_inputs.npz', 'golden_outputs.npz')]
    monkeypatch.setattr(bundle_module, 'GOLDEN_LIMIT_BYTES', sum(sizes))
    bundle.check_golden_sizes()
    monkeypatch.setattr(bundle_module, 'GOLDEN_LIMIT_BYTES', sum(sizes) - 1)
    with pytest.raises(ModelBundleError, match=f'have {sum(sizes)} together, more than {sum(sizes) - 1}'):
        bundle.check_golden_sizes()


def test_m1_a_model_json_of_two_megabytes_is_not_parsed(tmp_path):
    (tmp_path / 'model.json').write_text('[' + '{},' * (700 << 10) + '{}]')
    with pytest.raises(ModelBundleError, match=f'more than {MIB}'):
        ModelBundle.load(tmp_path)


@pytest.mark.parametrize('change', [-1, 1, 1 << 40])
def test_m1_a_file_that_changes_its_size_while_it_is_read_is_refused(tmp_path, change):
    path = tmp_path / 'weights'
    path.write_bytes(bytes(3 * MIB))
    with open(path, 'rb') as file:
        pieces = read_pieces(path, file)
        assert len(next(pieces)) == MIB
        os.truncate(path, 3 * MIB + change)
        with pytest.raises(ModelBundleError, match='longer' if change > 0 else 'shorter') as error:
            sum(len(piece) for piece in pieces)
    assert str(3 * MIB) in str(error.value) and error.value.remedy
    path.write_bytes(bytes(range(256)) * 12 * 1024)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_file(path) == path.read_bytes()


# --- what is left of the memory -------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


MACHINE = {'proc/meminfo': 'MemTotal: 9000 kB\nMemAvailable: 8000 kB\n'}
V2 = {
    **MACHINE,
    'proc/self/cgroup': '0::/a/b\n',
    'proc/self/mountinfo': '30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n',
}
V1 = {
    **MACHINE,
    'proc/self/cgroup': '5:cpu:/\n4:memory,hugetlb:/docker/x\n0::/\n',
    'proc/self/mountinfo': '35 31 0:32 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n'
    '36 31 0:33 / /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n',
}


@pytest.mark.parametrize(
    ('files', 'left', 'where'),
    [
        (MACHINE, 8000 << 10, 'this machine'),
        ({}, None, ''),
        (V2, 8000 << 10, 'this machine'),
        (V2 | {'sys/fs/cgroup/a/b/memory.max': 'max', 'sys/fs/cgroup/a/b/memory.current': '5'}, 8000 << 10, 'machine'),
        (
            V2 | {
                'sys/fs/cgroup/a/b/memory.max': '1000', 'sys/fs/cgroup/a/b/memory.current': '600',
                'sys/fs/cgroup/a/b/memory.stat': 'anon 300\ninactive_file 200\nactive_file 50\n',
            },
            650, '/a/b',
        ),
        (
            V2 | {
                'sys/fs/cgroup/a/b/memory.max': '1000', 'sys/fs/cgroup/a/b/memory.current': '600',
                'sys/fs/cgroup/a/memory.max': '100', 'sys/fs/cgroup/a/memory.current': '700',
            },
            0, '/a',
        ),
        (
            V1 | {
                'sys/fs/cgroup/memory/memory.limit_in_bytes': '1000',
                'sys/fs/cgroup/memory/memory.usage_in_bytes': '900',
                'sys/fs/cgroup/memory/memory.stat': 'total_inactive_file 10\ntotal_active_file 20\n',
            },
            130, 'cgroup /',
        ),
    ],
)  # fmt: skip
def test_the_memory_that_is_left_is_that_of_the_machine_and_of_each_group(tmp_path, files, left, where):
    found, source = available_memory(tree(tmp_path, files))
    assert found == left and where in source


def test_a_read_that_does_not_fit_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, 'available_memory', lambda: (100 * MIB, 'the memory cgroup /x'))
    path = tmp_path / 'golden.npz'
    path.touch()
    os.truncate(path, 101 * MIB)
    with pytest.raises(ModelBundleError) as error:
        read_file(path)
    for part in (str(path), str(101 * MIB), str(100 * MIB), 'cgroup /x'):
        assert part in str(error.value)
    require_memory(path, 50 * MIB, copies=2, remedy='Free some.')
    with pytest.raises(ModelBundleError, match='3 times at once') as error:
        require_memory(path, 50 * MIB, copies=3, remedy='Free some.')
    assert not error.value.lasting, 'others may give memory back, and no file changes then'


# --- comparing takes little -----------------------------------------------------------------------


def plain_allclose(rule, found, expected):
    """The same rule, of all values at once."""
    want, have = expected.astype(np.float64), found.astype(np.float64)
    error = np.abs(have - want)
    bad = ~(error <= rule.atol + rule.rtol * np.abs(want))
    return int(bad.sum()), have.flat[np.argmax(error)]


@pytest.mark.parametrize('seed', range(4))
def test_dense_answers_are_compared_in_blocks_as_at_once(seed):
    noise = np.random.default_rng(seed)
    expected = noise.normal(size=(3, 200, 997)).astype(np.float32)
    found = expected + noise.normal(size=expected.shape).astype(np.float32) * 1e-3
    rule = AllClose('y', rtol=1e-3, atol=2e-3)
    wrong, worst = plain_allclose(rule, found, expected)
    told = compare_output(rule, found, expected)
    assert f'{wrong} of {expected.size} values' in told and f': found {np.float32(worst)!s}, expected' in told
    assert compare_output(AllClose('y', rtol=0.0, atol=1.0), found, expected) is None


def test_millions_of_points_are_compared_in_time(monkeypatch):
    """Each with each would take hours; some of them, seconds."""
    monkeypatch.setattr(compare, '_PAIRS', 1 << 24)
    noise = np.random.default_rng(0)
    points = noise.random((1_000_000, 2), np.float32) * 1000
    rule = MatchedDistance('points', max_distance=0.5, min_fraction=0.9)
    assert compare_output(rule, points[noise.permutation(len(points))], points) is None
    assert compare_output(rule, np.roll(points, 1, axis=1) + 2000, points) is not None


@pytest.mark.parametrize('seed', range(4))
def test_masks_overlap_as_python_s_sets_do(seed):
    noise = np.random.default_rng(seed)
    left, right = (noise.random((7, 50)) < 0.5 for _ in range(2))
    one, other = set(np.flatnonzero(left)), set(np.flatnonzero(right))
    iou = len(one & other) / len(one | other)
    assert compare_output(SetOverlap('m', min_iou=iou - 1e-6), left, right) is None
    assert f'of {len(one)} and {len(other)}' in compare_output(SetOverlap('m', min_iou=iou + 1e-6), left, right)
