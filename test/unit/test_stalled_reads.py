"""A disk or mount that does not answer costs a thread, and nobody waits for it."""

import threading
import time
import weakref

import pytest

from gps_denied_c7.errors import C7Error, ModelBundleError
from gps_denied_c7.failover.self_test import Proof
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.pipeline.model_fit import read_bundle
from gps_denied_c7.stalled_reads import StalledReadError, note_progress, read_or_give_up
from support.stalled_mount import stalled_mount


def readers():
    return [thread for thread in threading.enumerate() if thread.name == 'c7-read']


@pytest.mark.parametrize('name', ['.', 'net', 'net.onnx', 'net/model.json'])
def test_a_model_on_a_mount_that_does_not_answer_is_given_up(tmp_path, caplog, name):
    before = len(readers())
    with stalled_mount(tmp_path / 'nfs') as mount:
        path = str(mount / name)
        with pytest.raises(StalledReadError, match=r'not read within 0\.3 s') as error:
            read_bundle(path, limit_s=0.3)
        assert str(mount) in str(error.value) and error.value.remedy
        assert 'its thread keeps waiting' in caplog.text
        # Retries, as autostart's, leave one thread behind, not one each; what they say is the same each time.
        texts = set()
        for _ in range(3):
            with pytest.raises(StalledReadError, match='still hangs') as error:
                read_bundle(path, limit_s=30.0)
            texts.add(str(error.value))
        assert len(texts) == 1 and len(readers()) == before + 1
    deadline = time.monotonic() + 30
    while len(readers()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ModelBundleError):
        read_bundle(path, limit_s=30.0)


def test_a_read_that_fails_keeps_nothing_of_the_file_that_it_read():
    class Content:
        """Of a file."""

    kept = []

    def parse(content):
        raise ValueError('damaged')

    def read():
        content = Content()
        kept.append(weakref.ref(content))
        try:
            parse(content)
        except ValueError as error:
            raise ModelBundleError('damaged.') from error

    with pytest.raises(ModelBundleError) as error:
        read_or_give_up('a file', read, limit_s=30.0)
    assert error.value.__traceback__ is not None and kept[0]() is None


def test_a_read_ends_as_soon_as_it_is_cancelled(tmp_path):
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    with stalled_mount(tmp_path / 'nfs') as mount, pytest.raises(StalledReadError, match='cancelled'):
        read_bundle(str(mount), limit_s=300.0, cancelled=cancelled)


def test_a_read_that_goes_on_is_waited_for_and_one_that_does_not_is_not(monkeypatch):
    over = threading.Event()

    def slow(pieces):
        for _ in range(pieces):
            over.wait(0.1)
            note_progress()
        return pieces

    monkeypatch.setattr('gps_denied_c7.stalled_reads.STALLED_S', 0.6)
    assert read_or_give_up('slow', lambda: slow(8), limit_s=60.0) == 8
    monkeypatch.setattr('gps_denied_c7.stalled_reads.STALLED_S', 0.2)
    with pytest.raises(StalledReadError, match=r'no data came for 0\.2 s'):
        read_or_give_up('none', lambda: over.wait(60.0), limit_s=60.0)
    monkeypatch.undo()
    ended = threading.Event()

    def endless():
        try:
            slow(1 << 30)
        finally:
            ended.set()

    with pytest.raises(StalledReadError, match='raise load_timeout_s'):
        read_or_give_up('endless', endless, limit_s=0.5)
    assert ended.wait(30.0), 'what was given up stops at its next piece'
    over.set()


def test_what_a_read_raises_comes_out_of_it():
    with pytest.raises(ZeroDivisionError):
        read_or_give_up('x', lambda: 1 // 0, limit_s=30.0)


def test_golden_files_on_a_mount_that_does_not_answer_are_given_up(tmp_path, monkeypatch):
    from gps_denied_c7.demo.network import write_demo_bundle

    monkeypatch.setattr('gps_denied_c7.stalled_reads.STALLED_S', 0.3)
    root = tmp_path / 'net'
    write_demo_bundle(root)
    bundle = ModelBundle.load(root)
    with stalled_mount(root), pytest.raises(C7Error, match='golden files of .*no data came'):
        Proof(bundle).run(None, 30.0)
