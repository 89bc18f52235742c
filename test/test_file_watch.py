"""A change of a file is seen, nothing else is taken for one, and nobody waits for a disk that hangs."""

from __future__ import annotations

import os
import shutil
import threading
import time

import pytest

from gps_denied_c7.file_watch import FileWatch, fingerprint, model_files

CHANGES = {
    'written': lambda model: (model / 'net.onnx').write_bytes(b'other'),
    'written in place, same size': lambda model: (model / 'net.onnx').write_bytes(b'tens'),
    'removed': lambda model: (model / 'model.json').unlink(),
    'added': lambda model: (model / 'deep' / 'new.npz').write_bytes(b''),
    'replaced': lambda model: os.replace(model / 'model.json', model / 'net.onnx'),
    'readable': lambda model: (model / 'net.onnx').chmod(0o600),
    'linked': lambda model: (model / 'more').symlink_to(model / 'net.onnx'),
    'directory closed': lambda model: model.chmod(0o700),
    'gone altogether': lambda model: shutil.rmtree(model),
}


def look(path):
    files, directories = model_files(str(path))
    return fingerprint(files, directories)


@pytest.fixture
def model(tmp_path):
    model = tmp_path / 'bundle'
    (model / 'deep').mkdir(parents=True)
    (model / 'model.json').write_text('{}')
    (model / 'net.onnx').write_bytes(b'nets')
    (model / 'deep' / 'golden.npz').write_bytes(b'golden')
    model.chmod(0o755)
    return model


@pytest.mark.parametrize('change', CHANGES)
def test_each_change_of_a_bundle_is_seen(model, change):
    before = look(model)
    assert look(model) == before
    CHANGES[change](model)
    assert look(model) != before


def test_what_others_do_beside_is_no_change(model):
    before = look(model)
    (model.parent / 'other').write_bytes(b'x')
    (model / 'net.onnx').read_bytes()
    assert look(model) == before


def test_a_bare_model_that_comes_and_its_weights(tmp_path):
    path = tmp_path / 'late' / 'net.onnx'
    seen = [look(path)]
    path.parent.mkdir()
    seen.append(look(path))
    path.write_bytes(b'x')
    seen.append(look(path))
    (path.parent / 'net.onnx.data').write_bytes(b'x')
    seen.append(look(path))
    assert len(set(seen[1:])) == 3 and seen[0] != seen[2]


@pytest.mark.parametrize('path', ['', '/', '/nowhere/at/all', 'a\0b', 'x' * 10_000, '/proc/self', '/dev/null'])
def test_any_path_can_be_looked_at(path):
    assert look(path) == look(path) or path == '/proc/self'


def test_a_directory_of_many_files_costs_little(tmp_path):
    for number in range(3000):
        (tmp_path / f'{number}').write_bytes(b'')
    assert len(look(tmp_path)) <= 4096


def test_a_look_that_hangs_holds_nobody_up():
    """As a mount whose server is gone: the latest that is known stays the latest."""
    may_end = threading.Event()
    watch = FileWatch(lambda: may_end.wait(60) and 'seen')
    assert watch.latest() is None
    threads = threading.active_count()
    for _ in range(100):
        assert watch.latest() is None
    assert threading.active_count() <= threads
    may_end.set()
    deadline = time.monotonic() + 30
    while watch.latest() != 'seen' and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.latest() == 'seen'
