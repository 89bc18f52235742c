"""M-1: the node serves what c7_engine says that it would, and refuses the rest in the same words."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from gps_denied_c7_msgs.msg import Tensor

from gps_denied_c7.ground.cli import main
from support.harness import image, running_node, tensor, wait_until
from support.small_networks import free, handmade

CAMERA = '/camera/image_raw'
PIXELS = np.random.default_rng(7).integers(0, 256, (24, 32, 3), np.uint8)


def picture():
    return image(width=32, height=24, encoding='rgb8', step=96, data=PIXELS.tobytes())


def expected(model) -> np.ndarray:
    """What plain session.run answers; the picture has the network's size, so that NumPy alone makes its tensor."""
    request = {'image': (PIXELS.astype(np.float32) / 255).transpose(2, 0, 1)[None]}
    return ort.InferenceSession(model.read_bytes(), providers=['CPUExecutionProvider']).run(['features'], request)[0]


def assert_answered(answer, model) -> None:
    np.testing.assert_allclose(tensor(answer, 'features'), expected(model), atol=1e-4)
    assert isinstance(answer.tensors[0], Tensor)


def test_m1_a_bundle_whose_image_has_any_size_is_answered(tmp_path):
    root = handmade(tmp_path / 'net', (1, 3, None, None))
    with running_node({'model_path': str(root), 'cpu_threads': 1}) as (_, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        assert_answered(peer.ask(CAMERA, picture()), root / 'net.onnx')


def test_m1_a_bare_onnx_of_any_size_is_answered_at_the_size_of_the_parameters(tmp_path):
    model = free(tmp_path, [None, None, 'h', None])
    sizes = {'preprocess.width': 32, 'preprocess.height': 24, 'preprocess.colour': 'rgb'}
    with running_node({'model_path': str(model), 'cpu_threads': 1, 'preprocess.width': 32}) as (_, peer):
        assert not peer.change_state('configure')
        wait_until(lambda: 'preprocess.height' in peer.message('Runtime'), 'the parameter on diagnostics')
        assert peer.set_together(**sizes).successful
        peer.start()
        peer.wait_matched(CAMERA)
        assert_answered(peer.ask(CAMERA, picture()), model)


def test_m1_the_node_refuses_a_second_input_in_the_words_of_verify(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    root = handmade(tmp_path / 'net', (1, 3, 24, 32), 'size')
    assert main(['verify', str(root)]) == 1
    told = capsys.readouterr().out
    with running_node({'model_path': '~/net'}, HOME=str(tmp_path)) as (_, peer):
        assert not peer.change_state('configure')
        reason = peer.message('Runtime').removeprefix('configure failed: ')
        assert 'an image fills' in reason and reason.split('. ')[0] in told
