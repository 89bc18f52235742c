"""N-1, N-2: the node's life as an operator, a lifecycle manager and autostart see it, over DDS."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from support.harness import image, running_node, tensor, wait_until
from support.networks import copying

CAMERA = '/camera/image_raw'


def digest_of(path: str) -> str:
    return f'sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}'


def test_n1_a_life_repeated(tmp_path):
    """configure, activate, answer, deactivate, cleanup, and all of it again."""
    model = copying(tmp_path)
    with running_node({'model_path': model, 'cpu_threads': 1}) as (process, peer):
        for round_ in range(2):
            assert peer.state() == 'unconfigured'
            assert peer.change_state('configure') and peer.state() == 'inactive'
            assert peer.node.count_subscribers(CAMERA) == 0, 'streams open before activate'
            assert peer.change_state('activate') and peer.state() == 'active'
            publisher = peer.wait_matched(CAMERA)
            for number in range(3):
                question = image(100 * round_ + number + 1)
                check_answer(peer.ask(CAMERA, question), question, number, model)

            assert peer.change_state('deactivate') and peer.state() == 'inactive'
            wait_until(lambda: peer.node.count_subscribers(CAMERA) == 0, 'the stream to close')
            answered = len(peer.tensors)
            publisher.publish(image(50))
            assert peer.change_state('activate')
            peer.wait_matched(CAMERA)
            answer = peer.ask(CAMERA, image(51))
            assert answer.header.stamp.sec == 51 and len(peer.tensors) == answered + 1, 'a closed stream was answered'

            assert peer.change_state('deactivate')
            assert peer.change_state('cleanup')
        assert process.process.poll() is None


def check_answer(answer, question, number, model):
    assert answer.header == question.header, 'the header must arrive untouched'
    assert (answer.source_topic, answer.frame_seq) == (CAMERA, number)
    assert (answer.source_width, answer.source_height, answer.source_encoding) == (64, 48, 'mono8')
    assert list(answer.network_to_image) == [1, 0, 0, 0, 1, 0]
    assert (answer.model_name, answer.weights_digest) == ('copying', digest_of(model))
    assert (answer.runtime_label, answer.active_provider) == ('onnx_trt_ep', 'CPUExecutionProvider')
    assert answer.is_fallback
    stages = (answer.queue_ns, answer.decode_ns, answer.preprocess_ns, answer.inference_ns)
    assert all(stages) and sum(stages) <= answer.total_ns
    pixels = np.frombuffer(bytes(question.data), np.uint8).reshape(1, 1, 48, 64)
    np.testing.assert_allclose(tensor(answer, 'copy'), pixels, atol=1e-3)
    assert tensor(answer, 'mean').shape == ()
    assert tensor(answer, 'mean') == pytest.approx(pixels.mean(), abs=1e-2)


@pytest.fixture(scope='module')
def idle():
    """A node without a model, left unconfigured by every test that uses it."""
    with running_node({'cpu_threads': 1}) as (_, peer):
        yield peer
        assert peer.state() == 'unconfigured'


def bad_models(directory: Path) -> dict[str, str]:
    """Return models that cannot be used, and a word that the reason must hold."""
    (directory / 'garbage.onnx').write_bytes(bytes(range(256)) * 16)
    (directory / 'empty.onnx').write_bytes(b'')
    truncated = directory / 'truncated.onnx'
    truncated.write_bytes(Path(copying(directory)).read_bytes()[:-100])
    (directory / 'bundle').mkdir()
    (directory / 'bundle' / 'model.json').write_text('{"schema_version": 1')
    return {
        '': 'model_path',
        str(directory / 'missing.onnx'): 'missing.onnx',
        str(directory): 'model.json',
        str(directory / 'garbage.onnx'): 'garbage.onnx',
        str(directory / 'empty.onnx'): 'empty.onnx',
        str(truncated): 'truncated.onnx',
        str(directory / 'bundle'): 'model.json',
        copying(directory, extra=('second',)): 'input',
    }


def test_n1_a_model_that_cannot_be_used_fails_configure_with_its_reason(idle, tmp_path):
    """FAILURE, the reason on log, diagnostics and flight record; the next configure works."""
    for model, word in bad_models(tmp_path).items():
        assert idle.set_parameter('model_path', model).successful
        assert not idle.change_state('configure'), model
        assert idle.state() == 'unconfigured'
        wait_until(
            lambda word=word: any(word in record['reason'] for record in idle.payloads('c7.start_failed')), model
        )
    wait_until(lambda: word in idle.message('Runtime') and idle.level('Runtime') == 'ERROR', 'the last reason')
    assert {record['transition'] for record in idle.payloads('c7.start_failed')} == {'configure'}
    idle.set_parameter('model_path', copying(tmp_path))
    assert idle.change_state('configure') and idle.state() == 'inactive'
    wait_until(lambda: 'failed' not in idle.message('Runtime'), 'the reason to go with its cause')
    assert idle.change_state('cleanup')


def test_n1_pre_processing_that_does_not_fit_the_model_fails_configure(idle, tmp_path):
    idle.set_parameter('model_path', copying(tmp_path))
    idle.set_parameter('preprocess.width', 32)
    assert not idle.change_state('configure')
    wait_until(lambda: 'preprocess' in idle.message('Runtime'), 'the parameter named')
    idle.set_parameter('preprocess.width', 64)
    assert idle.change_state('configure')
    assert idle.change_state('cleanup')


def test_n1_a_transition_that_the_state_does_not_allow_is_refused(idle, tmp_path):
    for label in ('activate', 'deactivate', 'cleanup', 'no such transition'):
        assert not idle.change_state(label)
    assert idle.state() == 'unconfigured'
    idle.set_parameter('model_path', copying(tmp_path))
    idle.start()
    for label in ('configure', 'activate', 'cleanup'):
        assert not idle.change_state(label)
    assert idle.state() == 'active'
    assert idle.change_state('deactivate') and idle.change_state('cleanup')


def test_n1_the_same_topic_under_two_names_fails_configure(idle, tmp_path):
    """Each frame of it would be answered twice."""
    idle.set_parameter('model_path', copying(tmp_path))
    idle.set_parameter('image_topics', ['camera/image_raw', '/camera/image_raw'])
    assert not idle.change_state('configure')
    wait_until(lambda: 'image_topics' in idle.message('Runtime'), 'the parameter named')
    idle.set_parameter('image_topics', ['camera/image_raw'])
    assert idle.change_state('configure') and idle.change_state('cleanup')


def test_outputs_are_published_as_asked_for_and_unknown_ones_fail_configure(idle, tmp_path):
    idle.set_parameter('model_path', copying(tmp_path))
    idle.set_parameter('output_tensors', ['mean', 'scores'])
    assert not idle.change_state('configure')
    wait_until(lambda: "no ['scores']" in idle.message('Runtime'), 'the output that the model lacks')
    idle.set_parameter('output_tensors', ['mean'])
    idle.start()
    idle.wait_matched('/camera/image_raw')
    answer = idle.ask('/camera/image_raw', image())
    assert [each.name for each in answer.tensors] == ['mean']
    assert idle.change_state('deactivate') and idle.change_state('cleanup')
    assert idle.set_parameter('output_tensors', ['']).successful


def test_n2_autostart_waits_for_its_model(tmp_path):
    """ERROR meanwhile, one record for each distinct reason, active by itself once the model is there."""
    ready, path = copying(tmp_path), tmp_path / 'late' / 'net.onnx'
    with running_node({'model_path': str(path), 'autostart': True, 'cpu_threads': 1}) as (process, peer):
        wait_until(lambda: 'next attempt when' in process.output(), 'a failed attempt')
        peer.wait_level('Runtime', 'ERROR')
        assert 'net.onnx' in peer.message('Runtime')
        time.sleep(3.5)  # Two more attempts would have come within their pauses of one and two seconds.
        assert process.output().count('configure failed') == 1, 'it waits for the file and says so once'
        assert process.output().count('not active') == 1

        path.parent.mkdir()
        path.write_bytes(b'not a model')
        wait_until(
            lambda: any('damaged' in failure['reason'] for failure in peer.payloads('c7.start_failed')),
            'the second reason to be recorded',
        )
        wait_until(lambda: process.output().count('next attempt when') == 2, 'it to wait for another file')
        assert 'next attempt in' not in process.output(), 'what a file holds does not pass by itself'
        shutil.copy(ready, path)
        peer.wait_state('active')
        peer.wait_level('Runtime', 'WARN')  # On the CPU, which is a fallback, and no error any more.
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image()).model_name == 'net'
        assert len(peer.payloads('c7.start_failed')) == 2, 'one record for each distinct reason'


def test_n2_an_operator_takes_over_from_autostart(tmp_path):
    with running_node({'model_path': str(tmp_path / 'net.onnx'), 'autostart': True}) as (process, peer):
        wait_until(lambda: 'next attempt' in process.output(), 'a failed attempt')
        assert not peer.change_state('configure')
        assert 'autostart ends' in process.output()
        shutil.copy(copying(tmp_path), tmp_path / 'net.onnx')
        attempts = process.output().count('configure failed')
        time.sleep(2.5)  # Autostart would have seen the file within a second.
        assert peer.state() == 'unconfigured'
        assert process.output().count('configure failed') == attempts
        peer.start()


def test_n1_a_shut_down_node_stays_up_and_is_done():
    with running_node() as (process, peer):
        assert peer.change_state('shutdown')
        assert peer.state() == 'finalized'
        assert not peer.change_state('configure')
        peer.wait_level('Runtime', 'OK')
        assert process.process.poll() is None
