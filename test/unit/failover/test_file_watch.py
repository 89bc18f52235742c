"""A change of a file is seen, nothing else is taken for one, and nobody waits for a disk that hangs."""

from __future__ import annotations

import os
import shutil
import site
import sys
import threading
import time

import pytest

from gps_denied_c7.failover.file_watch import FileWatch, fingerprint, model_files

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


@pytest.mark.parametrize('name', ['weights.bin', 'onnx__MatMul_12', 'weights/layer.0'])
def test_weights_of_any_name_that_are_copied_beside_a_bare_model_are_seen(tmp_path, name):
    (tmp_path / 'net.onnx').write_bytes(b'x')
    before = look(tmp_path / 'net.onnx')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'w')
    whole = look(tmp_path / 'net.onnx')
    (tmp_path / name).write_bytes(b'weights')
    assert len({before, whole, look(tmp_path / 'net.onnx')}) == 3


def test_a_model_below_the_home_directory_is_seen_when_it_comes(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    before = look('~/models/net'), fingerprint([], ['~/engines'])
    for directory in ('models/net', 'engines'):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / 'file').write_bytes(b'x')
    after = look('~/models/net'), fingerprint([], ['~/engines'])
    assert before[0] != after[0] and before[1] != after[1]


def test_a_bundle_named_by_its_json_is_seen_when_its_model_is_copied(model):
    before = look(model / 'model.json')
    (model / 'net.onnx').write_bytes(b'other')
    assert look(model / 'model.json') != before


def test_an_engine_deep_in_a_bundle_is_seen_when_it_is_written(model):
    engine = model / 'engines' / 'sm87' / 'fp16' / 'net.engine'
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b'half')
    before = look(model)
    engine.write_bytes(b'whole')
    assert look(model) != before


def test_a_package_in_the_first_directory_of_a_users_own_is_seen(model, tmp_path, monkeypatch):
    own = tmp_path / 'lib' / 'python' / 'site-packages'
    monkeypatch.setattr(site, 'getusersitepackages', lambda: str(own))
    assert str(own) not in sys.path
    before = look(model)
    (own / 'onnxruntime').mkdir(parents=True)
    assert look(model) != before


def test_logs_in_a_home_directory_are_no_change_of_the_model_in_it(tmp_path):
    log = tmp_path / '.ros' / 'log' / 'c7_inference.log'
    log.parent.mkdir(parents=True)
    (tmp_path / 'net.onnx').write_bytes(b'x')
    before = look(tmp_path / 'net.onnx')
    log.write_text('not active')
    assert look(tmp_path / 'net.onnx') == before


@pytest.mark.parametrize('path', ['', '/', '/nowhere/at/all', 'a\0b', 'x' * 10_000, '/proc/self', '/dev/null'])
def test_any_path_can_be_looked_at(path):
    assert look(path) == look(path) or path in ('/', '/proc/self')


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
