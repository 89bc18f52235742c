"""M-1: a bundle made from an ONNX model, on which the node comes up."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error, EngineDeserializeError, ModelBundleError
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.in_process import in_process_hosts
from gps_denied_c7.ground import make_bundle as bundle_maker
from gps_denied_c7.ground.bundle_request import BundleRequest
from gps_denied_c7.ground.golden import golden_pictures, noise_picture
from gps_denied_c7.ground.make_bundle import make_bundle
from gps_denied_c7.ground.output_rules import TOLERANCES, default_rule
from gps_denied_c7.ground.verify import Checks, verify
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.model import external_data
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.compare import AllClose, MatchedDistance, SetOverlap
from gps_denied_c7.model.onnx_file import read_onnx
from gps_denied_c7.monitoring.thermal import UnknownThermalState
from support.small_networks import KERNEL, SHAPE, network, plain_answers, saved

pytestmark = pytest.mark.once


def made(directory: Path, model: onnx.ModelProto | None = None, **changes: object) -> ModelBundle:
    return make_bundle(BundleRequest(model=saved(directory, model), output=directory / 'bundle', **changes)).bundle


def refused(directory: Path, model: onnx.ModelProto | None = None, **changes: object) -> C7Error:
    """Return the error, after looking that nothing was left behind."""
    with pytest.raises(C7Error) as caught:
        made(directory, model, **changes)
    assert not (directory / 'bundle').exists()
    assert not [path for path in directory.iterdir() if path.name.startswith('.')]
    return caught.value


def convolved(image: np.ndarray) -> np.ndarray:
    """The network's answer, by NumPy."""
    padded = np.pad(image[0], ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.einsum('chwij,ocij->ohw', windows, KERNEL)[None]


def test_m1_bundle_says_what_the_model_is(tmp_path: Path) -> None:
    bundle = made(tmp_path)
    content = (tmp_path / 'net.onnx').read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert bundle.name == 'net'
    assert bundle.weights_digest == f'sha256:{digest}'
    (artefact,) = bundle.artefacts
    assert artefact.path == tmp_path / 'bundle' / 'net.onnx'
    assert artefact.path.read_bytes() == content
    assert (artefact.strategy, artefact.precision, artefact.device) == ('onnx_trt_ep', 'fp32', 'any')
    assert artefact.sha256 == digest
    assert [(spec.name, spec.dtype, spec.shape) for spec in bundle.inputs] == [('image', 'float32', SHAPE)]
    assert [(spec.name, spec.dtype, spec.shape) for spec in bundle.outputs] == [('features', 'float32', (1, 4, 24, 32))]
    assert bundle.preprocessing is not None
    assert (bundle.preprocessing.width, bundle.preprocessing.height, bundle.preprocessing.colour) == (32, 24, 'rgb')


def test_m1_golden_answer_is_the_model_s_own_for_the_golden_request(tmp_path: Path) -> None:
    bundle = made(tmp_path)
    image = bundle.golden_inputs()['image']
    np.testing.assert_allclose(bundle.golden_outputs()['features'], convolved(image), atol=1e-5)


def test_m1_golden_request_is_a_picture_as_the_node_would_feed_it(tmp_path: Path) -> None:
    bundle = made(tmp_path, preprocessing={'colour': 'bgr', 'mean': (0.4, 0.5, 0.6), 'std': (0.2, 0.25, 0.3)}, seed=3)
    picture = noise_picture(32, 24, 3)
    expected = (picture[:, :, ::-1].astype(np.float64) / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    np.testing.assert_allclose(bundle.golden_inputs()['image'][0], expected.transpose(2, 0, 1), atol=1e-5)


def test_m1_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
        made(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / 'one/bundle') for path in (tmp_path / 'one/bundle').rglob('*.*'))
    assert len(files) == 2 + 2 * 6
    for name in files:
        assert (tmp_path / 'one/bundle' / name).read_bytes() == (tmp_path / 'two/bundle' / name).read_bytes()


def test_m1_another_seed_gives_another_request(tmp_path: Path) -> None:
    assert not np.array_equal(noise_picture(32, 24, 0), noise_picture(32, 24, 1))
    picture = noise_picture(100, 70, 0)
    assert (picture.shape, picture.min(), picture.max()) == ((70, 100, 3), 0, 255)
    # Structure at every scale: averaging 16 x 16 pixels leaves far more than white noise would (255 / sqrt(12) / 16).
    assert picture[:64, :96].reshape(4, 16, 6, 16, 3).mean(axis=(1, 3)).std() > 3 * 255 / np.sqrt(12) / 16


def test_m1_a_chain_comes_up_on_the_bundle(tmp_path: Path) -> None:
    """The chain proves a rung on the golden request by the bundle's rules, then answers what it is asked."""
    bundle = made(tmp_path)
    config = C7InferenceConfig(
        isolation='none', cpu_threads=1, engine_cache_dir=tmp_path / 'e', ort_trt_cache_dir=tmp_path / 'o'
    )
    chain = RuntimeChain(
        bundle, config, in_process_hosts(bundle, config, UnknownThermalState()), emit=lambda *_, **__: None
    )
    chain.load()
    try:
        tensor = np.zeros(SHAPE, np.float32)
        assert bundle.preprocessing is not None
        Preprocessor(bundle.preprocessing).run(Pixels(noise_picture(640, 480, 7), 'rgb'), tensor)
        answer = chain.infer({'image': tensor})
        np.testing.assert_allclose(answer.outputs['features'], convolved(tensor), atol=1e-5)
        assert (answer.active_provider, answer.weights_digest) == ('CPUExecutionProvider', bundle.weights_digest)
    finally:
        chain.release()


def test_m1_rules_follow_from_the_range_of_the_golden_answer(tmp_path: Path) -> None:
    bundle = made(tmp_path)
    (rule,) = bundle.rules
    answers = [bundle.golden_outputs(index)['features'] for index in range(len(bundle.golden))]
    spread = np.ptp(answers)
    assert len(answers) == 6 and spread > np.ptp(answers[0])
    assert isinstance(rule, AllClose)
    assert rule.rtol == 0
    assert rule.atol == pytest.approx(0.01 * spread, rel=0.01)
    fine = make_bundle(
        BundleRequest(model=tmp_path / 'net.onnx', output=tmp_path / 'fine', precision='fp32')
    ).bundle.rules[0]
    assert isinstance(fine, AllClose)
    assert fine.atol == pytest.approx(0.005 * spread, rel=0.01)


@given(
    low=st.floats(-1e6, 1e6), spread=st.floats(1e-3, 1e6), precision=st.sampled_from(sorted(TOLERANCES)),
    error=st.floats(-2.0, 2.0),
)  # fmt: skip
def test_m1_default_rule_allows_its_share_and_no_more(low: float, spread: float, precision: str, error: float) -> None:
    golden = low + spread * np.linspace(0.0, 1.0, 11)
    # By hand: four steps of 2**-10 of the greatest value, in FP16 no less than its smallest normal number.
    rounding = max(4 * np.abs(golden).max() / 1024, {'fp16': 2**-14, 'fp32': 0.0}[precision])
    rule = default_rule('x', [golden], precision)
    found = golden + error * max(TOLERANCES[precision] * np.ptp(golden), rounding)
    if abs(error) < 0.99:
        assert rule.disagreement(found, golden) is None
    elif abs(error) > 1.01:
        assert rule.disagreement(found, golden) is not None


@pytest.mark.parametrize(
    ('value', 'atol'), [(0.0, 0.01), (-5.0, 0.05)]
)
def test_m1_an_answer_without_a_range_is_judged_by_its_size(value: float, atol: float) -> None:
    assert default_rule('x', [np.full((2, 2), value)], 'fp16').atol == pytest.approx(atol)


@pytest.mark.parametrize('given_as', ['size', 'shape', 'golden request'])
@pytest.mark.parametrize('axes', [('batch', 3, 'height', 'width'), (None, 3, None, None)])
def test_m1_free_sizes_are_taken_from_what_was_given(tmp_path: Path, axes: tuple, given_as: str) -> None:
    changes: dict[str, object] = {'image_size': (40, 16)}
    if given_as == 'shape':
        changes = {'shapes': {'image': (1, 3, 16, 40)}}
    elif given_as == 'golden request':
        np.savez(tmp_path / 'request.npz', image=np.random.RandomState(0).rand(1, 3, 16, 40).astype(np.float32))
        changes = {'golden_input': tmp_path / 'request.npz'}
    bundle = made(tmp_path, network(axes), **changes)
    assert bundle.inputs[0].shape == (1, 3, 16, 40)
    assert bundle.golden_outputs()['features'].shape == (1, 4, 16, 40)
    np.testing.assert_allclose(
        bundle.golden_outputs()['features'], convolved(bundle.golden_inputs()['image']), atol=1e-5
    )
    # The model itself leaves nothing free, and is still known as the one that the user has.
    assert ModelBundle.load(bundle.artefacts[0].path).weights_digest != bundle.weights_digest
    assert bundle.weights_digest == ModelBundle.load(tmp_path / 'net.onnx').weights_digest
    (value,) = onnx.load(bundle.artefacts[0].path).graph.input
    assert [axis.dim_value for axis in value.type.tensor_type.shape.dim] == [1, 3, 16, 40]


def test_m1_channels_last_image_takes_its_size(tmp_path: Path) -> None:
    to_first = helper.make_node('Transpose', ['pixels'], ['image'], perm=[0, 3, 1, 2])
    model = network(['batch', 'height', 'width', 3], inputs=['pixels'])
    model.graph.node.insert(0, to_first)
    bundle = made(tmp_path, model, image_size=(40, 16))
    assert bundle.inputs[0].shape == (1, 16, 40, 3)
    assert bundle.preprocessing is not None and bundle.preprocessing.layout == 'nhwc'


def test_m1_only_a_free_batch_needs_no_size(tmp_path: Path) -> None:
    assert made(tmp_path, network(['batch', 3, 24, 32])).inputs[0].shape == SHAPE


def test_m1_free_sizes_are_refused_unless_given(tmp_path: Path) -> None:
    error = refused(tmp_path, network(['batch', 3, 'height', 'width']))
    assert isinstance(error, ModelBundleError)
    assert '?x3x?x?' in error.message
    assert '--input-size' in error.remedy


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'image_size': (640, 480)}, '1x3x480x640'),
        ({'shapes': {'image': (1, 3, 24, 33)}}, '1x3x24x33'),
        ({'shapes': {'picture': (1, 3, 24, 32)}}, "['picture']"),
        ({'preprocessing': {'colour': 'gray'}}, 'preprocessing'),
        ({'preprocessing': {'std': (0.0,)}}, 'std'),
        ({'name': 'a/b'}, 'name'),
        ({'name': '../b'}, 'name'),
        ({'rules': (AllClose('scores', 0.0, 0.1),)}, "['scores']"),
    ],
)  # fmt: skip
def test_m1_what_contradicts_the_model_is_refused(tmp_path: Path, changes: dict[str, object], told: str) -> None:
    assert told in str(refused(tmp_path, **changes))


def test_m1_two_inputs_are_refused(tmp_path: Path) -> None:
    assert 'one image' in refused(tmp_path, network(inputs=('image', 'mask'))).message


@pytest.mark.parametrize('content', [b'', b'not a model', b'\0' * 100])
def test_m1_damaged_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'net.onnx').write_bytes(content)
    with pytest.raises(EngineDeserializeError):
        make_bundle(BundleRequest(model=tmp_path / 'net.onnx', output=tmp_path / 'bundle'))
    assert os.listdir(tmp_path) == ['net.onnx']


def test_m1_own_golden_request_is_used(tmp_path: Path) -> None:
    image = np.random.RandomState(5).rand(*SHAPE).astype(np.float32)
    np.savez(tmp_path / 'request.npz', image=image)
    assert np.array_equal(made(tmp_path, golden_input=tmp_path / 'request.npz').golden_inputs()['image'], image)


@pytest.mark.parametrize(
    ('arrays', 'told'),
    [
        ({'picture': np.zeros(SHAPE, np.float32)}, 'picture'),
        ({'image': np.zeros((1, 3, 24, 31), np.float32)}, '1x3x24x31'),
        ({'image': np.zeros(SHAPE, np.float64)}, 'float64'),
        ({'image': np.full(SHAPE, np.nan, np.float32)}, 'non-finite'),
        ({}, 'no array'),
    ],
)  # fmt: skip
def test_m1_golden_request_that_does_not_fit_is_refused(tmp_path: Path, arrays: dict, told: str) -> None:
    np.savez(tmp_path / 'request.npz', **arrays)
    with pytest.raises(C7Error, match=told):
        made(tmp_path, golden_input=tmp_path / 'request.npz')
    assert not (tmp_path / 'bundle').exists()


def test_m1_request_full_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / 'request.npz', image=np.array([{}], dtype=object))
    assert 'no .npz of plain arrays' in refused(tmp_path, golden_input=tmp_path / 'request.npz').message


def test_m1_whole_numbers_need_a_rule(tmp_path: Path) -> None:
    best = helper.make_node('ArgMax', ['features'], ['best'], axis=1)
    outputs = {'best': (TensorProto.INT64, [1, 1, 24, 32])}
    assert '--rule best=set_overlap' in refused(tmp_path, network(nodes=[best], outputs=outputs)).remedy
    rule = SetOverlap('best', 0.9, 'values')
    assert made(tmp_path, network(nodes=[best], outputs=outputs), rules=(rule,)).rules == (rule,)


def test_m1_an_output_whose_size_depends_on_the_image_needs_a_rule(tmp_path: Path) -> None:
    nodes = [
        helper.make_node('NonZero', ['features'], ['places']),
        helper.make_node('Cast', ['places'], ['places as numbers'], to=TensorProto.FLOAT),
        helper.make_node('Transpose', ['places as numbers'], ['points'], perm=[1, 0]),
    ]
    model = network(nodes=nodes, outputs={'points': (TensorProto.FLOAT, [None, 4])})
    assert 'depends on the image' in refused(tmp_path, model).message
    rule = MatchedDistance('points', 1.0, 0.95)
    bundle = made(tmp_path, model, rules=(rule,))
    assert bundle.rules == (rule,)
    assert bundle.outputs[0].shape == (None, 4)


def test_m1_an_output_that_the_file_declares_in_another_size_is_not_said_to_depend_on_the_image(tmp_path: Path) -> None:
    error = refused(tmp_path, network(outputs={'features': (TensorProto.FLOAT, [1, 5, 24, 32])}))
    assert 'has the size 1x4x24x32 in each answer, but the file' in error.message
    assert 'depends on the image' not in error.message and 'export the model with the size' in error.remedy


@pytest.mark.parametrize('role', ['input', 'output'])
def test_m1_a_name_that_no_golden_file_can_hold_is_refused_with_its_length(tmp_path: Path, role: str) -> None:
    model = network()
    name = 'x' * 100_000
    getattr(model.graph, role)[0].name = name
    (getattr(model.graph.node[0], role))[0] = name
    error = refused(tmp_path, model)
    assert 'xxx… has 100000 bytes' in error.message and error.remedy == 'Export the model with shorter names.'


def test_m1_notes_tell_what_proves_little(tmp_path: Path) -> None:
    nodes = [
        helper.make_node('Sub', ['features', 'features'], ['nothing']),
        helper.make_node('Round', ['features'], ['rounded']),
    ]
    outputs = {name: (TensorProto.FLOAT, [1, 4, 24, 32]) for name in ('nothing', 'rounded')}
    model = saved(tmp_path, network(nodes=nodes, outputs=outputs))
    notes = make_bundle(BundleRequest(model=model, output=tmp_path / 'bundle', force=True)).notes
    for told in (
        "'nothing' is nearly constant", "'rounded' holds whole numbers only", "['nothing'] are the same for all",
        "'noise' was left out of the golden requests: rounding its input to half precision changes the answer",
    ):  # fmt: skip
        assert any(told in note for note in notes), told


def test_m1_pictures_that_no_half_precision_engine_could_answer_are_left_out_and_said(tmp_path: Path) -> None:
    """A fine wave over the features turns the last bit of the input into the whole answer."""
    nodes = [helper.make_node('Mul', ['features', 'fine'], ['phase']), helper.make_node('Sin', ['phase'], ['wave'])]
    model = network(nodes=nodes, outputs={'wave': (TensorProto.FLOAT, [1, 4, 24, 32])})
    model.graph.initializer.append(numpy_helper.from_array(np.float32(3e3), 'fine'))
    result = make_bundle(BundleRequest(model=saved(tmp_path, model), output=tmp_path / 'bundle'))
    left_out = {note.split("'")[1] for note in result.notes if 'was left out' in note}
    assert 'noise' in left_out and 'checkerboard' not in left_out
    assert not left_out & {case.name for case in result.bundle.golden}
    # A request of the user's is not left out behind his back.
    np.savez(tmp_path / 'request.npz', image=np.random.RandomState(0).rand(*SHAPE).astype(np.float32))
    shutil.rmtree(tmp_path / 'bundle')
    assert "'request' is a weak test" in refused(tmp_path, model, golden_input=tmp_path / 'request.npz').message


def test_m1_a_model_that_throws_dice_is_refused(tmp_path: Path) -> None:
    noise = helper.make_node('RandomNormalLike', ['features'], ['noise'])
    model = network(nodes=[noise], outputs={'noise': (TensorProto.FLOAT, [1, 4, 24, 32])})
    assert "answers to the same image differ from run to run, because of RandomNormalLike 'noise'" in refused(
        tmp_path, model
    ).message


class WrongOn:
    """The serving path, but for a fault in one picture's answer, or in every answer after the first."""

    def __init__(self, real: object, is_wrong: object) -> None:
        self.real, self.is_wrong, self.asked = real, is_wrong, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)

    def infer(self, handle: object, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = {name: array.copy() for name, array in self.real.infer(handle, inputs).items()}
        self.asked += 1
        return {name: array * 0 for name, array in outputs.items()} if self.is_wrong(self, inputs) else outputs


@pytest.mark.parametrize('is_wrong', [
    lambda runtime, inputs: True,
    lambda runtime, inputs: not inputs['image'].any(),
    lambda runtime, inputs: inputs['image'].min() == 1,
    lambda runtime, inputs: np.unique(inputs['image']).size == 2,
    lambda runtime, inputs: runtime.asked == 7,
])  # fmt: skip
def test_m1_a_serving_path_that_answers_wrong_makes_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_wrong: object
) -> None:
    """Golden answers used to come through the serving path, so that its faults were in them as well."""
    bias = helper.make_node('Add', ['features', 'one'], ['shifted'])
    model = network(nodes=[bias], outputs={'shifted': (TensorProto.FLOAT, [1, 4, 24, 32])})
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1.0]), 'one'))
    real = bundle_maker.create_runtime
    monkeypatch.setattr(
        bundle_maker, 'create_runtime', lambda *args, **options: WrongOn(real(*args, **options), is_wrong)
    )
    assert 'differently from plain session.run' in refused(tmp_path, model).message


def test_m1_golden_answers_are_those_of_plain_session_run_to_the_bit(tmp_path: Path) -> None:
    bundle = made(tmp_path)
    assert [case.name for case in bundle.golden] == ['noise', 'black', 'white', 'blobs', 'checkerboard', 'stripes']
    for index in range(len(bundle.golden)):
        inputs = bundle.golden_inputs(index)
        expected = plain_answers(bundle.artefacts[0].path, inputs)
        assert np.array_equal(bundle.golden_outputs(index)['features'], expected['features'])


def test_m1_golden_pictures_are_of_different_kinds() -> None:
    pictures = golden_pictures(320, 240, 0)
    corners = {
        name: len(cv2.goodFeaturesToTrack(picture[:, :, 1], 1000, 0.1, 3)) if picture.std() else 0
        for name, picture in pictures.items()
    }
    assert corners['black'] == corners['white'] == 0
    assert 0 < corners['blobs'] < 100 < corners['checkerboard']
    for name, picture in golden_pictures(5, 3, 1).items():
        assert (picture.shape, picture.dtype) == ((3, 5, 3), np.uint8), name


def detector(threshold: float) -> onnx.ModelProto:
    """Return the places (N, 4) at which the features exceed a threshold."""
    nodes = [
        helper.make_node('Greater', ['features', 'threshold'], ['above']),
        helper.make_node('NonZero', ['above'], ['places']),
        helper.make_node('Cast', ['places'], ['numbers'], to=TensorProto.FLOAT),
        helper.make_node('Transpose', ['numbers'], ['points'], perm=[1, 0]),
    ]
    model = network(nodes=nodes, outputs={'points': (TensorProto.FLOAT, [None, 4])})
    model.graph.initializer.append(numpy_helper.from_array(np.float32(threshold), 'threshold'))
    return model


def test_m1_golden_answers_without_one_detection_prove_nothing(tmp_path: Path) -> None:
    rule = MatchedDistance('points', 1.0, 0.95)
    error = refused(tmp_path, detector(1e9), rules=(rule,))
    assert 'empty for all 6 golden requests' in error.message and '--force' in error.remedy
    result = make_bundle(
        BundleRequest(model=tmp_path / 'net.onnx', output=tmp_path / 'bundle', rules=(rule,), force=True)
    )
    assert 'empty for all' in result.notes[0]


def test_m1_a_bundle_is_refused_whose_every_golden_answer_would_pass_for_each_other(tmp_path: Path) -> None:
    error = refused(tmp_path, rules=(AllClose('features', 0.0, 1e6),))
    assert 'passes as the answer to each of the 6' in error.message and '--force' in error.remedy


@pytest.mark.parametrize(('scale', 'offset'), [(4e-6, 0.0153), (1e-6, 0.0), (0.01, 1000.0), (0.0, 5.0)])
def test_m1_an_answer_that_hardly_changes_is_said_and_refused(tmp_path: Path, scale: float, offset: float) -> None:
    """Its tolerance followed from its range alone: 4e-8, which no GPU engine could pass."""
    nodes = [
        helper.make_node('Tanh', ['features'], ['bounded']),
        helper.make_node('Mul', ['bounded', 'scale'], ['scaled']),
        helper.make_node('Add', ['scaled', 'offset'], ['flat']),
    ]
    model = network(nodes=nodes, outputs={'flat': (TensorProto.FLOAT, [1, 4, 24, 32])})
    model.graph.initializer.extend(
        numpy_helper.from_array(np.float32(value), name) for name, value in (('scale', scale), ('offset', offset))
    )
    error = refused(tmp_path, model)
    assert "'flat' is nearly constant" in error.message and '--force' in error.remedy
    (rule,) = made(tmp_path, model, force=True).rules
    assert isinstance(rule, AllClose)
    assert rule.atol >= max(2**-14, 4 * 2**-10 * offset) * 0.99


def test_m1_an_int8_network_has_the_tolerance_of_int8() -> None:
    golden = np.linspace(-1.0, 1.0, 11)
    assert default_rule('x', [golden], 'fp16', 'int8').atol == pytest.approx(4 / 128, rel=0.01)
    assert default_rule('x', [golden], 'fp16', 'fp32').atol == pytest.approx(0.02, rel=0.01)


def normalised() -> onnx.ModelProto:
    """Return features by their own length: 0/0 on a black picture."""
    nodes = [
        helper.make_node('ReduceL2', ['features'], ['length'], axes=[1, 2, 3]),
        helper.make_node('Div', ['features', 'length'], ['unit']),
    ]
    return network(nodes=nodes, outputs={'unit': (TensorProto.FLOAT, [1, 4, 24, 32])})


def test_m1_a_picture_that_the_model_cannot_answer_is_left_out_and_said(tmp_path: Path) -> None:
    result = make_bundle(BundleRequest(model=saved(tmp_path, normalised()), output=tmp_path / 'bundle'))
    assert [case.name for case in result.bundle.golden] == ['noise', 'white', 'blobs', 'checkerboard', 'stripes']
    assert "'black' was left out" in result.notes[0] and 'non-finite' in result.notes[0]


def test_m1_nan_that_is_meant_is_a_golden_answer(tmp_path: Path) -> None:
    """With the runtime's check for non-finite values out of the way: it is not what is looked at here."""
    path = saved(tmp_path, normalised())
    request = BundleRequest(model=path, output=tmp_path / 'bundle', allow_non_finite=('unit',))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_maker, '_prove', lambda bundle: None)
        bundle = make_bundle(request).bundle
    assert bundle.allow_non_finite == ModelBundle.load(tmp_path / 'bundle').allow_non_finite == ('unit',)
    black = bundle.golden_outputs(1)
    assert np.isnan(black['unit']).all() and bundle.compare(black, bundle.golden_outputs(1)) == []
    assert bundle.compare(bundle.golden_outputs(0), black) != []
    assert 'the outputs are' in refused(tmp_path / 'bundle', allow_non_finite=('nothing',)).message


def subgraph(node: onnx.NodeProto, output: str) -> onnx.GraphProto:
    return helper.make_graph([node], 'inner', [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


def random_networks() -> Mapping[str, onnx.ModelProto]:
    """One network for each way to throw dice, and what is to be named."""
    made: dict[str, onnx.ModelProto] = {}
    shape = [1, 4, 24, 32]
    outputs = {'out': (TensorProto.FLOAT, shape)}
    for operator, inputs, settings in (
        ('RandomNormal', [], {'shape': shape}), ('RandomUniform', [], {'shape': shape}),
        ('RandomNormalLike', ['features'], {}), ('RandomUniformLike', ['features'], {}),
    ):  # fmt: skip
        made[operator] = network(nodes=[helper.make_node(operator, inputs, ['out'], **settings)], outputs=outputs)
    made['Bernoulli'] = network(
        nodes=[helper.make_node('Sigmoid', ['features'], ['share']), helper.make_node('Bernoulli', ['share'], ['out'])],
        outputs=outputs,
    )
    made['Multinomial'] = network(
        nodes=[
            helper.make_node('Flatten', ['features'], ['flat']),
            helper.make_node('Multinomial', ['flat'], ['out'], sample_size=5),
        ],
        outputs={'out': (TensorProto.INT32, [1, 5])},
    )
    for name in ('Dropout', 'Dropout by constant'):
        trained = network(nodes=[helper.make_node('Dropout', ['features', 'ratio', 'yes'], ['out'])], outputs=outputs)
        trained.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), 'ratio'))
        yes = numpy_helper.from_array(np.array(True), 'yes')
        if name == 'Dropout':
            trained.graph.initializer.append(yes)
        else:
            trained.graph.node.insert(0, helper.make_node('Constant', [], ['yes'], value=yes))
        made[name] = trained
    inside = network(
        nodes=[helper.make_node(
            'If', ['always'], ['out'],
            then_branch=subgraph(helper.make_node('RandomNormal', [], ['a'], shape=shape), 'a'),
            else_branch=subgraph(helper.make_node('Identity', ['features'], ['b']), 'b'),
        )],
        outputs=outputs,
    )  # fmt: skip
    inside.graph.initializer.append(numpy_helper.from_array(np.array(True), 'always'))
    made['RandomNormal in a branch'] = inside
    within = network(nodes=[helper.make_node('jitter', ['features'], ['out'], domain='own')], outputs=outputs)
    within.opset_import.append(helper.make_opsetid('own', 1))
    within.functions.append(helper.make_function(
        'own', 'jitter', ['x'], ['y'], [helper.make_node('RandomUniformLike', ['x'], ['y'])],
        [helper.make_opsetid('', 17)],
    ))  # fmt: skip
    made['RandomUniformLike in a function'] = within
    return made


@pytest.mark.parametrize('kind', list(random_networks()))
def test_m1_random_operators_are_named_wherever_they_lie(tmp_path: Path, kind: str) -> None:
    model = random_networks()[kind]
    assert kind.split()[0] in refused(tmp_path, model).message
    assert any(named.startswith(kind.split()[0]) for named in read_onnx(tmp_path / 'net.onnx', None).random)


def test_m1_a_dropout_that_does_not_train_is_none(tmp_path: Path) -> None:
    outputs = {'out': (TensorProto.FLOAT, [1, 4, 24, 32])}
    for inputs in (['features'], ['features', 'ratio'], ['features', 'ratio', ''], ['features', 'ratio', 'no']):
        model = network(nodes=[helper.make_node('Dropout', inputs, ['out'])], outputs=outputs)
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), 'ratio'))
        model.graph.initializer.append(numpy_helper.from_array(np.array(False), 'no'))
        assert read_onnx(saved(tmp_path, model), None).random == ()
    assert made(tmp_path, model).golden


def test_m1_the_node_says_that_a_bare_model_throws_dice(tmp_path: Path) -> None:
    path = saved(tmp_path, random_networks()['RandomNormalLike'])
    config = C7InferenceConfig(
        isolation='none', cpu_threads=1, engine_cache_dir=tmp_path / 'e', ort_trt_cache_dir=tmp_path / 'o'
    )
    bundle = ModelBundle.load(path)
    chain = RuntimeChain(
        bundle, config, in_process_hosts(bundle, config, UnknownThermalState()), emit=lambda *_, **__: None
    )
    chain.load()
    try:
        facts = chain.status().facts
        assert facts is not None and any("RandomNormalLike 'out'" in note for note in facts.notes)
    finally:
        chain.release()


def test_m1_a_model_without_a_finite_answer_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node('Sub', ['features', 'features'], ['zero']),
        helper.make_node('Div', ['zero', 'zero'], ['nan']),
    ]
    model = network(nodes=nodes, outputs={'nan': (TensorProto.FLOAT, [1, 4, 24, 32])})
    assert 'non-finite' in refused(tmp_path, model).message


def test_m1_weights_in_other_files_come_under_the_digest(tmp_path: Path) -> None:
    onnx.save_model(
        network(), tmp_path / 'net.onnx', save_as_external_data=True, location='net.weights', size_threshold=0
    )
    assert (tmp_path / 'net.weights').stat().st_size >= KERNEL.nbytes
    result = make_bundle(BundleRequest(model=tmp_path / 'net.onnx', output=tmp_path / 'bundle'))
    assert sorted(path.name for path in (tmp_path / 'bundle').iterdir()) == [
        'golden', 'model.json', 'net.onnx',
    ]  # fmt: skip
    (tmp_path / 'net.weights').unlink()
    golden = result.bundle.golden_outputs()['features']
    np.testing.assert_allclose(golden, convolved(result.bundle.golden_inputs()['image']), atol=1e-5)
    assert 'net.weights' in result.notes[0]


def test_m1_weights_too_large_for_one_file_stay_in_theirs_under_a_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.full((256, 32 * 24 * 3), 2.0, np.float32)
    nodes = [
        helper.make_node('Flatten', ['image'], ['flat']),
        helper.make_node('Gemm', ['flat', 'w'], ['features'], transB=1),
    ]
    graph = helper.make_graph(
        nodes, 'graph', [helper.make_tensor_value_info('image', TensorProto.FLOAT, [1, 3, 24, 32])],
        [helper.make_tensor_value_info('features', TensorProto.FLOAT, [1, 256])],
        [numpy_helper.from_array(weights, 'w')],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    (tmp_path / 'source').mkdir()
    path = tmp_path / 'source' / 'net.onnx'
    onnx.save_model(model, path, save_as_external_data=True, location='net.weights', size_threshold=0)
    monkeypatch.setattr(external_data, 'PROTOBUF_LIMIT_BYTES', 2 << 20)
    result = make_bundle(BundleRequest(model=path, output=tmp_path / 'bundle'))
    shutil.rmtree(path.parent)
    digest = hashlib.sha256(weights.tobytes()).hexdigest()
    assert result.bundle.artefacts[0].external_data == {'net.weights': digest}
    assert json.loads((tmp_path / 'bundle' / 'model.json').read_text())['artefacts'][0]['external_data'] == {
        'net.weights': digest
    }
    assert 'net.weights' in result.notes[0]
    image = result.bundle.golden_inputs()['image']
    expected = image.reshape(1, -1).astype(np.float64) @ weights.T
    np.testing.assert_allclose(result.bundle.golden_outputs()['features'], expected, rtol=1e-5)
    assert {verdict.refusal for verdict in verify(tmp_path / 'bundle', Checks(None))} == {''}
    with (tmp_path / 'bundle' / 'net.weights').open('r+b') as file:
        file.write(b'x')
    refusals = [verdict.refusal for verdict in verify(tmp_path / 'bundle', Checks(None)) if verdict.refusal]
    assert len(refusals) == 1 and 'net.weights' in refusals[0]


def test_m1_half_precision_models_say_so(tmp_path: Path) -> None:
    bundle = made(tmp_path, network(dtype=TensorProto.FLOAT16, outputs={'features': (TensorProto.FLOAT16, None)}))
    assert bundle.artefacts[0].precision == 'fp16'
    assert bundle.inputs[0].dtype == 'float16'
    assert bundle.golden_inputs()['image'].dtype == np.float16


def test_m1_weights_listed_among_the_inputs_are_none(tmp_path: Path) -> None:
    assert [spec.name for spec in made(tmp_path, network(weights_are_inputs=True)).inputs] == ['image']


def test_m1_name_that_no_bundle_can_carry_is_made_plain(tmp_path: Path) -> None:
    path = saved(tmp_path, name='super point (v1).onnx')
    bundle = make_bundle(BundleRequest(model=path, output=tmp_path / 'bundle')).bundle
    assert bundle.name == 'super_point__v1_'


@pytest.mark.parametrize('kind', ['file', 'full directory', 'link'])
def test_m1_nothing_that_exists_is_overwritten(tmp_path: Path, kind: str) -> None:
    target = tmp_path / 'bundle'
    if kind == 'file':
        target.write_text('mine')
    elif kind == 'link':
        (tmp_path / 'elsewhere').mkdir()
        target.symlink_to(tmp_path / 'elsewhere')
    else:
        target.mkdir()
        (target / 'model.json').write_text('mine')
    with pytest.raises(ModelBundleError, match='exists already'):
        made(tmp_path)
    if kind == 'link':
        assert not list((tmp_path / 'elsewhere').iterdir())
    else:
        assert (target if kind == 'file' else target / 'model.json').read_text() == 'mine'


def test_m1_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / 'bundle').mkdir()
    assert made(tmp_path).name == 'net'


def test_m1_parents_are_made_and_others_may_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    make_bundle(BundleRequest(model=path, output=tmp_path / 'a' / 'b' / 'bundle'))
    bundle = tmp_path / 'a' / 'b' / 'bundle'
    assert bundle.stat().st_mode & 0o777 == 0o755
    assert json.loads((bundle / 'model.json').read_text())['name'] == 'net'
