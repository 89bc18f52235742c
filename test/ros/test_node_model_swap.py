"""N-10: ``model_path`` set while active, over DDS, with engines in workers and frames at 30 Hz."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gps_denied_c7_msgs.msg import TensorList
from rclpy.qos import QoSProfile, ReliabilityPolicy

from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.worker.child import SPARE_NAME
from measure import chaos
from support.harness import Peer, image, running_node, tensor, wait_until
from support.networks import copying, scoring_twofold, slow_to_load

CAMERA = '/camera/image_raw'


def picture(number):
    """Return an image in which the demo network finds corners."""
    squares = np.kron(np.indices((12, 16)).sum(axis=0) % 2, np.ones((40, 40))).astype(np.uint8) * 200
    return image(number, width=640, height=480, data=squares.tobytes())


class Camera:
    """Publish numbered frames at 30 Hz from a thread of its own, and keep every answer."""

    def __init__(self, peer: Peer) -> None:
        self.answers: list[TensorList] = []
        self.peer = peer
        self.sent = 0
        peer.node.create_subscription(
            TensorList, f'{peer.node_name}/tensors', self.answers.append,
            QoSProfile(depth=500, reliability=ReliabilityPolicy.RELIABLE),
        )  # fmt: skip
        peer.wait_matched(CAMERA)
        while not self.answers:
            # Whoever listens has matched once it hears an answer.
            self._publish()
            time.sleep(0.2)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _publish(self) -> None:
        self.sent += 1
        self.peer.publisher(CAMERA).publish(picture(self.sent))

    def _run(self) -> None:
        while not self._over.wait(1 / 30):
            self._publish()

    def digests(self) -> list[str]:
        """Return the weights digests that answered, one after the other, each as often as it took over."""
        found: list[str] = []
        for answer in list(self.answers):
            if not found or found[-1] != answer.weights_digest:
                found.append(answer.weights_digest)
        return found

    def wait_answers(self, count: int = 10) -> None:
        """Wait for so many further answers."""
        start = len(self.answers)
        wait_until(lambda: len(self.answers) >= start + count, f'{count} further answers')

    def stop(self) -> None:
        """Send no more."""
        self._over.set()
        self._thread.join()

    def assert_nothing_lost(self) -> None:
        """Every frame that was accepted was answered once, in order, and numbered without gap."""
        counted: dict[str, str] = {}

        def settled() -> bool:
            counted.update(self.peer.values(f'Stream {CAMERA}'))
            return counted['accepted'] == counted['answered'] == str(self.answers[-1].frame_seq + 1)

        wait_until(settled, 'as many answers as accepted frames', 10.0)
        assert counted['unanswered'] == '0'
        first = self.answers[0].frame_seq
        assert [answer.frame_seq for answer in self.answers] == list(range(first, first + len(self.answers)))
        stamps = [answer.header.stamp.sec for answer in self.answers]
        assert stamps == sorted(set(stamps))


@contextlib.contextmanager
def flying(model, **parameters):
    """Run an active node with ``model`` and a camera."""
    with running_node({'model_path': model, 'cpu_threads': 1, **parameters}) as (process, peer):
        peer.start()
        camera = Camera(peer)
        try:
            yield process, peer, camera
        finally:
            camera.stop()


def digest(path):
    return ModelBundle.load(path).weights_digest


def test_n10_a_swap_under_load_answers_every_frame_once(demo_bundle, tmp_path):
    """There and back: each answer is that of the weights it names, and the next configure takes the last one."""
    twofold = scoring_twofold(demo_bundle, tmp_path / 'twofold')
    with flying(demo_bundle) as (process, peer, camera):
        camera.wait_answers()
        assert peer.set_parameter('model_path', twofold).successful
        record = peer.wait_record('c7.model_swapped')
        assert (record['outcome'], record['model_name']) == ('swapped', 'twofold')
        assert record['weights_digest'] == digest(twofold)
        assert record['previous_weights_digest'] == digest(demo_bundle)
        wait_until(lambda: camera.digests() == [digest(demo_bundle), digest(twofold)], 'answers of the new weights')
        wait_until(lambda: peer.values('Runtime').get('model_swap') == 'swapped', 'the swap on diagnostics')
        assert peer.values('Runtime')['weights_digest'] == digest(twofold)
        wait_until(lambda: peer.values('Runtime')['standby'] != 'none', 'a standby of the new weights')
        assert len(chaos.workers(process)) == 2, 'the old ones are gone'

        assert peer.set_parameter('model_path', demo_bundle).successful
        wait_until(lambda: len(peer.payloads('c7.model_swapped')) == 2, 'the second record')
        expected = [digest(demo_bundle), digest(twofold), digest(demo_bundle)]
        wait_until(lambda: camera.digests() == expected, 'answers of the first weights')
        camera.stop()
        camera.assert_nothing_lost()
        single = tensor(camera.answers[0], 'scores')
        assert single.max() > 0
        for answer in camera.answers:
            factor = 2 if answer.weights_digest == digest(twofold) else 1
            np.testing.assert_allclose(tensor(answer, 'scores'), factor * single, rtol=1e-4)
            assert answer.model_name == ('twofold' if factor == 2 else 'c7_demo_corners')

        assert peer.set_parameter('model_path', twofold).successful
        wait_until(lambda: len(peer.payloads('c7.model_swapped')) == 3, 'the third record')
        assert peer.change_state('deactivate') and peer.change_state('cleanup')
        assert chaos.workers(process) == chaos.workers(process, SPARE_NAME) == []
        peer.start()
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, picture(1)).weights_digest == digest(twofold)
        assert 'model_swap' not in peer.values('Runtime')


@pytest.mark.parametrize('broken', ['damaged', 'wrong'])
def test_n10_a_model_that_fails_leaves_the_old_one_and_the_parameter_goes_back(demo_bundle, tmp_path, broken):
    """A file that ONNX Runtime cannot read, and a bundle whose golden outputs are not its own."""
    if broken == 'damaged':
        path = tmp_path / 'damaged.onnx'
        path.write_bytes(b'no network')
    else:
        path = scoring_twofold(demo_bundle, tmp_path / 'wrong', golden_factor=3.0)
    with flying(demo_bundle) as (process, peer, camera):
        camera.wait_answers()
        assert peer.set_parameter('model_path', str(path)).successful
        record = peer.wait_record('c7.model_swapped')
        assert record['outcome'] == 'failed' and record['weights_digest'] == digest(path)
        assert broken != 'wrong' or 'golden outputs are not reproduced' in record['reason']
        assert peer.get_parameter('model_path').string_value == demo_bundle
        wait_until(lambda: 'the swap to' in peer.message('Runtime'), 'the failure on diagnostics')
        assert peer.level('Runtime') == 'WARN' and str(path) in peer.message('Runtime')
        camera.wait_answers()
        assert camera.digests() == [digest(demo_bundle)]
        wait_until(lambda: len(chaos.workers(process)) == 2, 'the workers of the old model alone')
        camera.stop()
        camera.assert_nothing_lost()
        assert peer.payloads('c7.model_swapped') == [record], 'taking the parameter back is no swap'

        twofold = scoring_twofold(demo_bundle, tmp_path / 'twofold')
        assert peer.set_parameter('model_path', twofold).successful
        wait_until(lambda: len(peer.payloads('c7.model_swapped')) == 2, 'a swap that works')
        wait_until(lambda: peer.values('Runtime').get('model_swap') == 'swapped', 'the warning to go')
        assert 'the swap to' not in peer.message('Runtime')


def test_n10_what_cannot_be_used_is_refused_at_once_or_in_the_background(demo_bundle, tmp_path):
    with running_node({'model_path': demo_bundle, 'cpu_threads': 1}) as (_, peer):
        peer.start('inactive')
        refused = peer.set_parameter('model_path', copying(tmp_path))
        assert not refused.successful and 'inactive' in refused.reason and 'cleanup' in refused.reason
        assert peer.change_state('activate')
        again = tmp_path / 'again'
        again.symlink_to(demo_bundle)
        refused = peer.set_parameter('model_path', '')
        assert not refused.successful and 'is empty' in refused.reason
        # What the disk has to tell comes in the background.
        for number, (path, reason) in enumerate(
            (('/no/such/model', 'does not exist'), (str(tmp_path), 'model.json'), (str(again), 'serves already')), 1
        ):
            assert peer.set_parameter('model_path', path).successful
            wait_until(lambda count=number: len(peer.payloads('c7.model_swapped')) == count, 'the outcome')
            record = peer.payloads('c7.model_swapped')[-1]
            assert record['outcome'] == 'failed' and reason in record['reason']
            assert peer.get_parameter('model_path').string_value == demo_bundle
        assert not any('failures in' in name for name in peer.values('Runtime'))


def test_n10_the_published_outputs_change_together_with_the_model(demo_bundle, tmp_path):
    """Also where the model stays the same, and back where the new one lacks an output."""
    names = [spec.name for spec in ModelBundle.load(demo_bundle).outputs]
    with flying(demo_bundle, output_tensors=names[:1]) as (_, peer, camera):
        camera.wait_answers()
        published = lambda answer: [each.name for each in answer.tensors]  # noqa: E731
        assert published(camera.answers[-1]) == names[:1]
        assert 'together with model_path' in peer.set_parameter('output_tensors', names).reason
        assert peer.set_together(model_path=demo_bundle, output_tensors=names).successful
        assert peer.wait_record('c7.model_swapped')['outcome'] == 'swapped'
        wait_until(lambda: published(camera.answers[-1]) == names, 'all outputs')

        assert peer.set_together(model_path=copying(tmp_path), output_tensors=['mean', 'missing']).successful
        wait_until(lambda: len(peer.payloads('c7.model_swapped')) == 2, 'the second record')
        failed = peer.payloads('c7.model_swapped')[-1]
        assert failed['outcome'] == 'failed' and "no ['missing']" in failed['reason']
        wait_until(lambda: peer.get_parameter('model_path').string_value == demo_bundle, 'the path taken back')
        assert list(peer.get_parameter('output_tensors').string_array_value) == names

        assert peer.set_together(model_path=copying(tmp_path), output_tensors=['mean']).successful
        wait_until(lambda: published(camera.answers[-1]) == ['mean'], 'the output of the other model')
        camera.stop()
        camera.assert_nothing_lost()


@contextlib.contextmanager
def loading(demo_bundle, tmp_path):
    """Run a flying node that is in the middle of loading a model that takes for ever."""
    slow = slow_to_load(tmp_path, multiplications=5000)
    with flying(demo_bundle) as (process, peer, camera):
        wait_until(lambda: peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby')
        assert peer.set_parameter('model_path', slow).successful
        wait_until(lambda: len(chaos.workers(process)) == 3, 'a worker that loads the new model')
        wait_until(lambda: peer.values('Runtime').get('model_swap') == 'loading', 'the swap on diagnostics')
        assert slow in peer.message('Runtime')
        yield process, peer, camera


def test_n10_deactivate_cancels_a_swap(demo_bundle, tmp_path):
    """The worker that loads is gone, the parameter is back, and the next activate serves the old model."""
    with loading(demo_bundle, tmp_path) as (process, peer, camera):
        refused = peer.set_parameter('model_path', copying(tmp_path))
        assert not refused.successful and 'under way' in refused.reason
        camera.wait_answers()
        assert peer.change_state('deactivate')
        assert peer.wait_record('c7.model_swapped')['outcome'] == 'cancelled'
        assert peer.get_parameter('model_path').string_value == demo_bundle
        assert len(chaos.workers(process)) == 2
        camera.stop()
        camera.assert_nothing_lost()
        assert peer.change_state('activate')
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, picture(1)).weights_digest == digest(demo_bundle)
        assert peer.payloads('c7.chain_exhausted') == []


def test_n8_a_signal_ends_the_node_during_a_swap(demo_bundle, tmp_path):
    with loading(demo_bundle, tmp_path) as (process, peer, camera):
        workers = chaos.workers(process)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert peer.wait_record('c7.session_ended')['clean']
        assert peer.wait_record('c7.model_swapped')['outcome'] == 'cancelled'
        wait_until(lambda: not any(Path(f'/proc/{pid}').exists() for pid in workers), 'the end of every worker')
