"""M-1: the model bundle, its files, its golden answer and the rules by which answers agree."""

import copy
import dataclasses
import hashlib
import io
import json
import os
import re
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec, ResizeMode
from gps_denied_c7.model import bundle_json
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle, write_bundle
from gps_denied_c7.model.compare import AllClose, MatchedDistance, SetOverlap
from gps_denied_c7.model.files import BundleFile, file_sha256, npz_bytes, read_npz
from gps_denied_c7.model.image_input import default_preprocessing, image_input
from gps_denied_c7.tensors import TensorSpec

_WEIGHTS = f'sha256:{"a" * 64}'
_OTHER = f'sha256:{"b" * 64}'
_IMAGE = TensorSpec('image', 'float32', (1, 1, 6, 8))
_OUTPUTS = (
    TensorSpec('heat', 'float32', (1, 1, 6, 8)),
    TensorSpec('points', 'float32', (None, 2)),
    TensorSpec('places', 'int64', (1, 4)),
)
_RULES = (AllClose('heat', 1e-3, 1e-4), MatchedDistance('points', 1.5, 0.9), SetOverlap('places', 0.5, 'values'))
_PREPROCESSING = PreprocessingSpec(width=8, height=6, colour='gray', resize=ResizeMode.LETTERBOX)


def _golden():
    rng = np.random.default_rng(8)
    return (
        {'image': rng.random(_IMAGE.shape, np.float32)},
        {
            'heat': rng.random((1, 1, 6, 8), np.float32),
            'points': 100 * rng.random((20, 2), np.float32),
            'places': np.array([[4, 9, 1, 7]]),
        },
    )


def _write(root, **changes):
    root.mkdir(exist_ok=True)
    (root / 'net.onnx').write_bytes(b'a graph')
    (root / 'net.engine').write_bytes(b'a plan')
    inputs, outputs = _golden()
    parts = {
        'name': 'net',
        'weights_digest': _WEIGHTS,
        'inputs': [_IMAGE],
        'outputs': _OUTPUTS,
        'preprocessing': _PREPROCESSING,
        'artefacts': [
            Artefact.of_file(
                root / 'net.engine', strategy='tensorrt', weights_digest=_WEIGHTS, precision='fp16', device='sm87'
            ),
            Artefact.of_file(
                *(root / 'net.onnx',),
                strategy='onnx_trt_ep',
                weights_digest=_WEIGHTS,
                precision='fp32',
                io_names={'input.1': 'image', '/head/Sigmoid': 'heat'},
            ),
        ],
        'rules': _RULES,
        'golden': {'golden': (inputs, outputs)},
    }
    return write_bundle(root, **{**parts, **changes})


@pytest.fixture
def root(tmp_path):
    _write(tmp_path / 'net')
    return tmp_path / 'net'


def _json(root):
    return json.loads((root / 'model.json').read_text())


def _rewrite(root, values):
    (root / 'model.json').write_text(values if isinstance(values, str) else json.dumps(values))


@pytest.fixture
def written(root):
    return _json(root)


def _put(values, key, value):
    """Set ``golden.inputs.sha256`` or ``artefacts.0.path``; the value ``...`` removes the key."""
    values = copy.deepcopy(values)
    *path, last = [int(part) if part.isdigit() else part for part in key.split('.')]
    place = values
    for part in path:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return values


def test_m1_a_bundle_survives_the_disk(root):
    bundle = ModelBundle.load(root)
    assert bundle == ModelBundle.load(root / 'model.json') == ModelBundle.load(str(root))
    assert (bundle.name, bundle.root, bundle.weights_digest) == ('net', root, _WEIGHTS)
    assert (bundle.inputs, bundle.outputs, bundle.rules) == ((_IMAGE,), _OUTPUTS, _RULES)
    assert bundle.preprocessing == _PREPROCESSING
    engine, onnx = bundle.artefacts
    assert (engine.strategy, engine.precision, engine.device) == ('tensorrt', 'fp16', 'sm87')
    assert (engine.path, engine.sha256) == (root / 'net.engine', hashlib.sha256(b'a plan').hexdigest())
    assert (onnx.strategy, onnx.device, onnx.io_names) == (
        'onnx_trt_ep',
        'any',
        {'input.1': 'image', '/head/Sigmoid': 'heat'},
    )
    inputs, outputs = _golden()
    for found, expected in ((bundle.golden_inputs(), inputs), (bundle.golden_outputs(), outputs)):
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert bundle.to_json() == _json(root)


def test_m1_the_documented_model_json_is_one(tmp_path):
    """The example in the module's docstring, with digests put in."""
    text = bundle_json.__doc__.split('::')[1].split('The other rules')[0]
    text = text.replace('<of the file>', 'a' * 64).replace('<of the source weights>', 'b' * 64)
    (tmp_path / 'model.json').write_text(text.replace('<as above>', 'b' * 64))
    bundle = ModelBundle.load(tmp_path)
    assert bundle.to_json() == json.loads((tmp_path / 'model.json').read_text())
    assert bundle.artefacts_for('onnx_trt_ep')[0].canonical_name('input.1') == 'image'


def test_m1_a_bundle_with_one_golden_request_as_it_used_to_be_still_loads(root):
    values = _json(root)
    (case,) = values['golden']
    del case['name']
    _rewrite(root, {**values, 'golden': case})
    bundle = ModelBundle.load(root)
    assert bundle == dataclasses.replace(bundle, golden=ModelBundle.load(root).golden)
    assert [golden.name for golden in bundle.golden] == ['golden']
    assert bundle.compare(bundle.golden_outputs()) == []
    assert bundle.to_json()['golden'] == [{'name': 'golden', **case}]


def test_m1_a_bundle_may_have_several_golden_requests(tmp_path):
    rng = np.random.default_rng(1)
    golden = {'one': _golden(), 'two': ({'image': rng.random(_IMAGE.shape, np.float32)}, _golden()[1])}
    bundle = _write(tmp_path / 'net', golden=golden)
    assert [case.name for case in bundle.golden] == ['one', 'two']
    for index, (inputs, _) in enumerate(golden.values()):
        assert np.array_equal(bundle.golden_inputs(index)['image'], inputs['image'])
    assert (tmp_path / 'net/golden/two_inputs.npz').exists()
    values = _json(tmp_path / 'net')
    _rewrite(tmp_path / 'net', {**values, 'golden': [values['golden'][0]] * 2})
    with pytest.raises(ModelBundleError, match='twice'):
        ModelBundle.load(tmp_path / 'net')


def test_m1_rules_may_be_left_out(root, written):
    del written['rules']['points']
    _rewrite(root, written)
    answer = _answer()
    answer['points'] = answer['points'][::-1]
    assert ModelBundle.load(root).compare(answer) == []
    answer['points'] = answer['points'] * 0
    assert len(ModelBundle.load(root).compare(answer)) == 1
    del written['rules']
    _rewrite(root, written)
    assert len(ModelBundle.load(root).compare(answer)) == 1


def test_m1_an_output_of_unknown_rank_survives_the_disk(root, written):
    written['outputs'][1]['shape'] = None
    _rewrite(root, written)
    bundle = ModelBundle.load(root)
    assert bundle.outputs[1].shape is None and bundle.to_json() == written


def test_m1_nan_is_an_answer_in_an_output_for_which_it_is_allowed(root, written):
    answer = _answer()
    answer['heat'][0, 0, 0] = [np.nan, np.inf, -np.inf] * 2 + [np.nan] * 2
    assert len(ModelBundle.load(root).compare(answer, answer)) == 1
    _rewrite(root, {**written, 'allow_non_finite': ['heat']})
    bundle = ModelBundle.load(root)
    assert bundle.allow_non_finite == ('heat',) and bundle.to_json() == {**written, 'allow_non_finite': ['heat']}
    assert bundle.compare(answer, answer) == []
    assert len(bundle.compare(_answer(), answer)) == 1


@pytest.mark.parametrize(('key', 'most'), [('golden', 32), ('artefacts', 256), ('inputs', 1024), ('outputs', 1024)])
def test_m1_a_model_json_of_more_entries_than_a_load_has_time_for_is_refused(root, key, most):
    values = json.loads((root / 'model.json').read_text())
    names = [{} if key == 'artefacts' else {'name': f'n{number}'} for number in range(most + 1)]
    entries = [values[key][0] | name for name in names]
    _rewrite(root, {**values, key: entries})
    with pytest.raises(ModelBundleError, match=f'{key}: has {most + 1} entries, more than {most}'):
        ModelBundle.load(root)
    if key == 'golden':
        _rewrite(root, {**values, key: entries[:most]})
        assert len(ModelBundle.load(root).golden) == most


def test_m1_flat_golden_tensors_take_little_room(tmp_path):
    bundle = _write(tmp_path / 'net')
    before = bundle.golden[0].inputs.path.stat().st_size
    path = tmp_path / 'flat.npz'
    path.write_bytes(npz_bytes({'image': np.zeros((1, 3, 1080, 1920), np.float32)}))
    assert path.stat().st_size < 200_000 and before < 2000
    assert read_npz(BundleFile(path, file_sha256(path)))['image'].shape == (1, 3, 1080, 1920)


def test_m1_the_same_bundle_is_the_same_bytes(tmp_path, monkeypatch):
    for name, now in (('one', 1_700_000_000.0), ('two', 1_800_000_000.0)):
        monkeypatch.setattr(time, 'time', lambda now=now: now)
        _write(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / 'one').iterdir())
    assert files == ['golden_inputs.npz', 'golden_outputs.npz', 'model.json', 'net.engine', 'net.onnx']
    for file in files:
        assert (tmp_path / 'one' / file).read_bytes() == (tmp_path / 'two' / file).read_bytes()


@pytest.mark.parametrize('name', ['file', 'allow_pickle', '/head/Conv_1', 'a b', 'ü'])
def test_m1_a_tensor_may_have_any_name(tmp_path, name):
    spec = TensorSpec(name, 'float32', (2,))
    value = np.array([1.0, 2.0], np.float32)
    bundle = _write(
        tmp_path / 'net',
        outputs=[spec],
        rules=[AllClose(name, 0, 0)],
        golden={'golden': (_golden()[0], {name: value})},
        artefacts=[Artefact(path=tmp_path / 'net/net.onnx', sha256='0' * 64, strategy='onnx_trt_ep', precision='fp32',
                            device='any', weights_digest=_WEIGHTS)],
    )  # fmt: skip
    assert bundle.compare({name: value}) == []


_WRONG = [
    ('schema_version', 2, 'schema_version'),
    ('schema_version', '1', 'schema_version'),
    ('schema_version', True, 'schema_version'),
    ('schema_version', ..., 'schema_version'),
    ('name', '', 'name'),
    ('name', '../net', 'name'),
    ('name', 'a/b', 'name'),
    ('name', 7, 'name'),
    ('weights_digest', 'a' * 64, 'weights_digest'),
    ('weights_digest', f'sha256:{"A" * 64}', 'weights_digest'),
    ('weights_digest', ..., 'weights_digest'),
    ('inputs', [], 'inputs'),
    ('inputs', {}, 'inputs'),
    ('inputs', ['image'], 'inputs[0]'),
    ('inputs.0.name', '', 'inputs[0].name'),
    ('inputs.0.dtype', 'float', 'inputs[0].dtype'),
    ('inputs.0.dtype', 'object', 'inputs[0].dtype'),
    ('inputs.0.shape', 4, 'inputs[0].shape'),
    ('inputs.0.shape', [1, 1, 6, 0], 'inputs[0].shape'),
    ('inputs.0.shape', [1, 1, 6, -1], 'inputs[0].shape'),
    ('inputs.0.shape', [1, 1, 6, 8.0], 'inputs[0].shape'),
    ('inputs.0.shape', [True, 1, 6, 8], 'inputs[0].shape'),
    ('inputs.0.shape', [1] * 9, 'inputs[0].shape'),
    ('inputs.0.shape', [1, 1, 6, 'w'], 'inputs[0].shape'),
    ('inputs.0.shape', ..., 'inputs[0].shape'),
    ('inputs.0.units', 'px', 'inputs[0].units'),
    ('outputs.1.name', 'heat', 'outputs'),
    ('outputs.0.name', 'warmth', 'artefacts[1].io_names./head/Sigmoid'),
    ('preprocessing', None, 'preprocessing'),
    ('preprocessing.width', 9, 'preprocessing'),
    ('preprocessing.dtype', 'float16', 'preprocessing'),
    ('preprocessing.std', [0], 'preprocessing.std'),
    ('preprocessing.mean', ..., 'preprocessing.mean'),
    ('preprocessing.gamma', 2.2, 'preprocessing.gamma'),
    ('artefacts', [], 'artefacts'),
    ('artefacts.0.strategy', 'openvino', 'artefacts[0].strategy'),
    ('artefacts.0.precision', 'fp12', 'artefacts[0].precision'),
    ('artefacts.1.device', 'gpu0', 'artefacts[1].device'),
    ('artefacts.1.sha256', 'a' * 63, 'artefacts[1].sha256'),
    ('artefacts.1.sha256', f'sha256:{"a" * 64}', 'artefacts[1].sha256'),
    ('artefacts.1.weights_digest', '', 'artefacts[1].weights_digest'),
    ('artefacts.1.weights_digest', ..., 'artefacts[1].weights_digest'),
    ('artefacts.1.path', ..., 'artefacts[1].path'),
    ('artefacts.1.opset', 17, 'artefacts[1].opset'),
    ('artefacts.1.io_names', [], 'artefacts[1].io_names'),
    ('artefacts.1.io_names', {'x': 'imago'}, 'artefacts[1].io_names.x'),
    ('artefacts.1.io_names', {'x': 1}, 'artefacts[1].io_names.x'),
    ('artefacts.1.io_names', {'x': 'image', 'y': 'image'}, 'artefacts[1].io_names'),
    ('artefacts.1.io_names', {'points': 'heat'}, 'artefacts[1].io_names'),
    ('rules', [], 'rules'),
    ('rules.cold', {'kind': 'allclose', 'rtol': 0, 'atol': 0}, 'rules'),
    ('rules.heat', {'kind': 'similar'}, 'rules.heat.kind'),
    ('rules.heat', {'kind': ['allclose']}, 'rules.heat.kind'),
    ('rules.heat.rtol', -1, 'rules.heat.rtol'),
    ('rules.heat.rtol', '0', 'rules.heat.rtol'),
    ('rules.heat.atol', True, 'rules.heat.atol'),
    ('rules.heat.atol', ..., 'rules.heat.atol'),
    ('rules.heat.atol', 10**400, 'rules.heat.atol'),
    ('rules.heat.atol', float('nan'), 'rules.heat.atol'),
    ('rules.heat.rtol', float('inf'), 'rules.heat.rtol'),
    ('rules.points.max_distance', float('inf'), 'rules.points.max_distance'),
    ('rules.points.min_fraction', float('nan'), 'rules.points.min_fraction'),
    ('rules.places.min_iou', float('nan'), 'rules.places.min_iou'),
    ('preprocessing.pad_value', float('nan'), 'preprocessing.pad_value'),
    ('schema_version', float('nan'), 'schema_version'),
    ('rules.heat.max_distance', 1, 'rules.heat.max_distance'),
    ('rules.points.max_distance', -0.1, 'rules.points.max_distance'),
    ('rules.points.min_fraction', 0, 'rules.points.min_fraction'),
    ('rules.points.min_fraction', 1.1, 'rules.points.min_fraction'),
    ('rules.places.min_iou', 0, 'rules.places.min_iou'),
    ('rules.places.members', 'all', 'rules.places.members'),
    ('rules.places.members', 'top_k', 'rules.places.k'),
    ('rules.places.k', 3, 'rules.places.k'),
    ('rules.places.k', 0.5, 'rules.places.k'),
    ('golden', ..., 'golden'),
    ('golden', None, 'golden'),
    ('golden.0.inputs', ..., 'golden[0].inputs'),
    ('golden.0.inputs', 'golden_inputs.npz', 'golden[0].inputs'),
    ('golden.0.outputs.sha256', None, 'golden[0].outputs.sha256'),
    ('golden.0.outputs.size', 3, 'golden[0].outputs.size'),
    ('golden.0.tolerance', 0.1, 'golden[0].tolerance'),
    ('golden', [], 'golden'),
    ('golden.0.name', '../x', 'golden[0].name'),
    ('golden.0.name', 7, 'golden[0].name'),
    ('golden', {'inputs': {}, 'outputs': {}, 'more': {}}, 'golden.inputs.path'),
    ('allow_non_finite', 'heat', 'allow_non_finite'),
    ('allow_non_finite', [7], 'allow_non_finite[0]'),
    ('allow_non_finite', ['cold'], 'allow_non_finite'),
    ('allow_non_finite', ['heat', 'heat'], 'allow_non_finite'),
    ('inputs.0.shape', None, 'inputs[0].shape'),
    ('comment', 'hello', 'comment'),
]


@pytest.mark.parametrize(('key', 'value', 'named'), _WRONG)
def test_m1_a_wrong_value_is_refused_by_its_key(root, key, value, named):
    _rewrite(root, _put(_json(root), key, value))
    with pytest.raises(ModelBundleError) as refused:
        ModelBundle.load(root)
    assert f'{root / "model.json"}: {named}: ' in str(refused.value)


@pytest.mark.parametrize(
    'text',
    [
        '',
        'null',
        '[]',
        '7',
        '{',
        '[' * 100_000,
        '{"schema_version": ' + '9' * 5000 + '}',
        '\ufeff{}',
    ],
)
def test_m1_what_is_no_json_object_is_refused(root, text):
    _rewrite(root, text)
    with pytest.raises(ModelBundleError, match='model.json'):
        ModelBundle.load(root)


@pytest.mark.parametrize('key', ['"name": "net"', '"dtype": "int64"', '"rtol": 0.001'])
def test_m1_a_key_that_appears_twice_is_refused(root, key):
    text = json.dumps(_json(root))
    assert text.count(key) == 1
    _rewrite(root, text.replace(key, f'{key}, {key}'))
    with pytest.raises(ModelBundleError, match='twice'):
        ModelBundle.load(root)


def test_m1_text_in_another_code_is_refused(root):
    (root / 'model.json').write_bytes(json.dumps(_json(root)).encode('utf-16'))
    with pytest.raises(ModelBundleError, match='not JSON'):
        ModelBundle.load(root)


@pytest.mark.parametrize('key', ['artefacts.1.path', 'golden.0.outputs.path'])
@pytest.mark.parametrize(
    'path',
    [
        '',
        '.',
        '..',
        '/etc/passwd',
        '../secret',
        'sub/../../secret',
        'deep/../golden_outputs.npz',
        'sub\\..\\secret',
        'a\0b',
        'new\nline',
        'x' * 5000,
        '\ud800',
        7,
        None,
        'out',
        'deep/out',
        'outside/secret',
    ],
)
def test_m1_a_file_outside_the_bundle_is_refused(root, key, path):
    (root.parent / 'secret').write_bytes(b'secret')
    (root / 'deep').mkdir()
    (root / 'out').symlink_to('../secret')
    (root / 'deep/out').symlink_to(root.parent / 'secret')
    (root / 'outside').symlink_to('..')
    values = _put(_json(root), key, path)
    (root / 'model.json').write_text(json.dumps(values))
    with pytest.raises(ModelBundleError) as refused:
        ModelBundle.load(root).golden_outputs()
    assert key.replace('.1.', '[1].').replace('.0.', '[0].') in str(refused.value)


def test_m1_an_absolute_name_is_refused_wherever_it_leads(root):
    _rewrite(root, _put(_json(root), 'artefacts.1.path', str(root / 'net.onnx')))
    with pytest.raises(ModelBundleError, match=r'artefacts\[1\]\.path'):
        ModelBundle.load(root)


def test_m1_links_and_folders_within_the_bundle_are_fine(root):
    (root / 'deep').mkdir()
    (root / 'net.onnx').rename(root / 'deep/net.onnx')
    (root / 'link.onnx').symlink_to('deep/net.onnx')
    (root.parent / 'alias').symlink_to(root)
    for path in ('link.onnx', 'deep/net.onnx', './deep/net.onnx'):
        _rewrite(root, _put(_json(root), 'artefacts.1.path', path))
        for place in (root, root.parent / 'alias'):
            artefact = ModelBundle.load(place).artefacts[1]
            artefact.verify()
            assert artefact.path == place / path


def test_m1_digests_are_checked_when_a_file_is_opened_and_not_before(root):
    (root / 'net.engine').write_bytes(b'a plot')
    engine, onnx = ModelBundle.load(root).artefacts
    onnx.verify()
    with pytest.raises(ModelBundleError, match=r'net\.engine: SHA-256 .* Copy the bundle again'):
        engine.verify()
    (root / 'net.engine').unlink()
    with pytest.raises(ModelBundleError, match=r'net\.engine: No such file'):
        ModelBundle.load(root).artefacts[0].verify()


def test_m1_what_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'loop').symlink_to('loop')
    for path in (tmp_path / 'fifo', tmp_path / 'loop', tmp_path, tmp_path / 'none', Path('/dev/null')):
        with pytest.raises(ModelBundleError, match=str(path)) as refused:
            BundleFile(path, '0' * 64).verify()
        assert 'SHA-256' not in str(refused.value)


def test_m1_a_large_file_is_not_held_in_memory(tmp_path):
    content = bytes(24 << 20)
    (tmp_path / 'large').write_bytes(content)
    file = BundleFile(tmp_path / 'large', hashlib.sha256(content).hexdigest())
    tracemalloc.start()
    try:
        file.verify()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_m1_a_chain_gets_only_artefacts_of_the_same_weights(root, caplog):
    values = _json(root)
    onnx = values['artefacts'][1]
    values['artefacts'] = [{**onnx, 'weights_digest': _OTHER, 'precision': 'fp16'}, onnx, {**onnx, 'device': 'cuda'}]
    _rewrite(root, values)
    bundle = ModelBundle.load(root)
    assert [artefact.device for artefact in bundle.artefacts_for('onnx_trt_ep')] == ['any', 'cuda']
    assert {artefact.weights_digest for artefact in bundle.artefacts_for('onnx_trt_ep')} == {_WEIGHTS}
    assert bundle.artefacts_for('tensorrt') == ()
    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert _OTHER in caplog.text


def test_m1_a_strategy_whose_artefacts_are_all_of_other_weights_says_so(root):
    _rewrite(root, _put(_json(root), 'artefacts.0.weights_digest', _OTHER))
    bundle = ModelBundle.load(root)
    with pytest.raises(ModelBundleError, match='tensorrt') as refused:
        bundle.artefacts_for('tensorrt')
    assert _OTHER in str(refused.value)
    assert _WEIGHTS in str(refused.value)
    assert len(bundle.artefacts_for('onnx_trt_ep')) == 1


def test_m1_every_artefact_maps_to_the_canonical_names(root):
    engine, onnx = ModelBundle.load(root).artefacts
    for own, canonical in (('input.1', 'image'), ('/head/Sigmoid', 'heat'), ('points', 'points')):
        assert onnx.canonical_name(own) == canonical
        assert onnx.own_name(canonical) == own
    assert engine.canonical_name('image') == engine.own_name('image') == 'image'


def _replace_golden(root, which, content):
    path = root / f'golden_{which}.npz'
    path.write_bytes(content)
    _rewrite(root, _put(_json(root), f'golden.0.{which}.sha256', file_sha256(path)))
    return ModelBundle.load(root)


def _npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def test_m1_damaged_golden_files_are_refused(root):
    for which in ('inputs', 'outputs'):
        path = root / f'golden_{which}.npz'
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    bundle = ModelBundle.load(root)
    for load in (bundle.golden_inputs, bundle.golden_outputs, lambda: bundle.compare({})):
        with pytest.raises(ModelBundleError, match='SHA-256'):
            load()


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ('a pickle was run',))


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'no archive',
        _npz(image=np.zeros((1, 1, 6, 8), np.float32))[:-30],
        _npz(image=np.array([_Bomb()], object)),
        _npz(image=np.zeros((1, 1, 6, 9), np.float32)),
        _npz(image=np.zeros((1, 1, 6, 8), np.float64)),
        _npz(picture=np.zeros((1, 1, 6, 8), np.float32)),
        _npz(image=np.zeros((1, 1, 6, 8), np.float32), extra=np.zeros(1)),
        _npz(),
    ],
)
def test_m1_golden_files_that_do_not_fit_are_refused(root, content):
    bundle = _replace_golden(root, 'inputs', content)
    with pytest.raises(ModelBundleError, match='golden_inputs'):
        bundle.golden_inputs()


def test_m1_a_single_array_is_no_golden_file(root):
    content = io.BytesIO()
    np.save(content, np.zeros((1, 1, 6, 8), np.float32))
    with pytest.raises(ModelBundleError, match='golden_inputs'):
        _replace_golden(root, 'inputs', content.getvalue()).golden_inputs()


def test_m1_golden_arrays_are_c_contiguous_and_the_callers_own(root):
    ordered = np.asfortranarray(np.random.default_rng(1).random((1, 1, 6, 8), np.float32))
    bundle = _replace_golden(root, 'inputs', _npz(image=ordered))
    first = bundle.golden_inputs()['image']
    assert first.flags.c_contiguous
    assert np.array_equal(first, ordered)
    first[:] = 0
    assert np.array_equal(bundle.golden_inputs()['image'], ordered)


def _answer():
    return {name: value.copy() for name, value in _golden()[1].items()}


def test_m1_the_golden_answer_agrees_with_itself(root):
    assert ModelBundle.load(root).compare(_answer()) == []


def test_m1_each_output_that_disagrees_is_named(root):
    bundle = ModelBundle.load(root)
    answer = _answer()
    answer['heat'][0, 0, 2, 3] += 0.5
    answer['points'] += 40
    answer['places'] += 100
    found = bundle.compare(answer)
    assert [sentence.split("'")[1] for sentence in found] == ['heat', 'points', 'places']
    assert 'worst at [0, 0, 2, 3]' in found[0]
    assert bundle.compare({}) == [f'output {spec.name!r}: is missing.' for spec in _OUTPUTS]


def test_m1_two_answers_to_a_live_frame_are_compared_by_the_same_rules(root):
    bundle = ModelBundle.load(root)
    left = _answer()
    left['heat'] += 7
    assert bundle.compare(left) != []
    assert bundle.compare(left, left) == []
    del left['heat']
    assert 'missing' in bundle.compare(_answer(), left)[0]


def _disagrees(rule, found, expected):
    outputs = {'out': np.asarray(expected)}
    specs = (TensorSpec('out', str(outputs['out'].dtype), (None,) * outputs['out'].ndim),)
    bundle = ModelBundle(name='net', root='/', weights_digest=_WEIGHTS, outputs=specs, rules=(rule,))
    return bool(bundle.compare({'out': np.asarray(found)}, outputs))


@pytest.mark.parametrize(
    ('found', 'expected', 'disagrees'),
    [
        ([1.0, 2.0], [1.0, 2.0], False),
        ([1.009, 2.0], [1.0, 2.0], False),
        ([1.0, 100.9], [1.0, 100.0], False),
        ([1.0, 102.0], [1.0, 100.0], True),
        ([0.0005], [0.0], False),
        ([0.002], [0.0], True),
        ([-1.0], [1.0], True),
        ([np.nan], [1.0], True),
        ([1.0], [np.nan], True),
        ([np.nan], [np.nan], True),
        ([np.inf], [1.0], True),
        ([[1.0, 2.0]], [1.0, 2.0], True),
        ([1.0], [1.0, 1.0], True),
        (np.array([1, 5], np.uint8), np.array([1, 6], np.uint8), True),
        (np.array([1.0], np.float16), np.array([1.0], np.float32), False),
        (np.zeros((0, 3)), np.zeros((0, 3)), False),
        (True, False, True),
        (1.0, 1.0, False),
    ],
)
def test_m1_allclose_is_for_dense_outputs(found, expected, disagrees):
    assert _disagrees(AllClose('out', rtol=0.01, atol=0.001), found, expected) is disagrees


_LINE = np.arange(10.0)[:, None] * [10, 0]


@pytest.mark.parametrize(
    ('found', 'expected', 'disagrees'),
    [
        (_LINE, _LINE, False),
        (_LINE[::-1], _LINE, False),
        (_LINE + [0.6, 0.8], _LINE, False),
        (_LINE + [0.6, 0.9], _LINE, True),
        (_LINE[:8], _LINE, False),
        (_LINE[:7], _LINE, True),
        (_LINE, _LINE[:8], False),
        (_LINE, _LINE[:7], True),
        (np.repeat(_LINE[:1], 10, 0), _LINE, True),
        (_LINE[None], _LINE, False),
        (_LINE[:, :1], _LINE, True),
        (np.zeros((0, 2)), _LINE, True),
        (_LINE, np.zeros((0, 2)), True),
        (np.zeros((0, 2)), np.zeros((0, 2)), False),
        (np.where(_LINE > 25, np.nan, _LINE), _LINE, True),
        (np.full((10, 2), np.inf), np.full((10, 2), np.inf), True),
        (np.zeros(()), np.zeros(()), True),
        (_LINE.astype(np.int32), _LINE, False),
    ],
)
def test_m1_matched_distance_is_for_points_in_any_order(found, expected, disagrees):
    assert _disagrees(MatchedDistance('out', max_distance=1.0 + 1e-9, min_fraction=0.8), found, expected) is disagrees


def test_m1_the_distance_of_points_is_euclidean():
    rule = MatchedDistance('out', max_distance=5.0, min_fraction=1.0)
    assert not _disagrees(rule, [[103.0, 4.0]], [[100.0, 0.0]])
    assert _disagrees(rule, [[103.0, 4.1]], [[100.0, 0.0]])


def test_m1_many_points_are_matched_a_few_at_a_time():
    points = np.random.default_rng(0).random((1000, 2)) * 1000
    assert not _disagrees(MatchedDistance('out', 0.0, 1.0), points[::-1], points)
    moved = points.copy()
    moved[777] += 5000
    assert _disagrees(MatchedDistance('out', 0.0, 1.0), moved, points)


@pytest.mark.parametrize(
    ('members', 'k', 'found', 'expected', 'disagrees'),
    [
        ('nonzero', None, [1, 0, 2, 0], [3, 0, 1, 0], False),
        ('nonzero', None, [1, 0, 2, 1], [3, 0, 1, 0], False),
        ('nonzero', None, [1, 1, 2, 1], [3, 0, 1, 0], True),
        ('nonzero', None, [0, 1, 0, 1], [3, 0, 1, 0], True),
        ('nonzero', None, [0, 0], [0, 0], False),
        ('nonzero', None, [0, 0], [0, 1], True),
        ('nonzero', None, [True, False], [True, False], False),
        ('nonzero', None, [[1, 0]], [1, 0], True),
        ('nonzero', None, [np.nan, 0.0], [1.0, 0.0], True),
        ('top_k', 2, [9.0, 8.0, 1.0], [8.0, 9.0, 1.0], False),
        ('top_k', 2, [9.0, 1.0, 8.0], [9.0, 8.0, 1.0], True),
        ('top_k', 2, [5.0, 5.0, 5.0], [9.0, 8.0, 1.0], False),
        ('top_k', 2, [1.0, 5.0, 5.0], [9.0, 8.0, 1.0], True),
        ('top_k', 9, [1.0, 5.0], [9.0, 8.0], False),
        ('top_k', 1, np.array([0, 255], np.uint8), np.array([3, 200], np.uint8), False),
        ('top_k', 1, np.array([-128, 1], np.int8), np.array([-128, 1], np.int8), False),
        ('values', None, [7, 3, 5], [5, 7, 3], False),
        ('values', None, [7, 3, 9], [5, 7, 3], True),
        ('values', None, [7, 3, 5, 5, 5], [5, 7, 3], False),
        ('values', None, np.zeros(0, int), [5, 7, 3], True),
        ('values', None, np.zeros(0, int), np.zeros(0, int), False),
    ],
)
def test_m1_set_overlap_is_for_masks_rankings_and_identifiers(members, k, found, expected, disagrees):
    assert _disagrees(SetOverlap('out', 0.6, members, k), found, expected) is disagrees


_arrays = st.tuples(st.integers(0, 6), st.integers(0, 3)).flatmap(
    lambda shape: st.lists(st.floats(-9, 9), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
        lambda values: np.array(values, float).reshape(shape)
    )
)
_rules = st.sampled_from(
    [
        AllClose('out', 0.0, 0.0),
        AllClose('out', 0.1, 0.1),
        MatchedDistance('out', 0.0, 1.0),
        MatchedDistance('out', 2.0, 0.5),
        SetOverlap('out', 1.0),
        SetOverlap('out', 0.5, 'top_k', 3),
        SetOverlap('out', 1.0, 'values'),
    ]
)


@settings(max_examples=300, deadline=None)
@given(rule=_rules, left=_arrays, right=_arrays)
def test_m1_every_rule_holds_for_equals_and_never_raises(rule, left, right):
    assert not _disagrees(rule, left, left.copy())
    _disagrees(rule, left, right)


def test_m1_a_bare_onnx_gives_an_onnx_runtime_chain(tmp_path):
    path = tmp_path / 'My net.onnx'
    path.write_bytes(b'a graph')
    bundle = ModelBundle.load(path)
    digest = hashlib.sha256(b'a graph').hexdigest()
    assert (bundle.name, bundle.root, bundle.weights_digest) == ('My net', tmp_path, f'sha256:{digest}')
    assert (bundle.inputs, bundle.outputs, bundle.preprocessing, bundle.golden) == ((), (), None, ())
    (artefact,) = bundle.artefacts_for('onnx_trt_ep')
    assert (artefact.path, artefact.sha256) == (path, digest)
    artefact.verify()
    assert bundle.artefacts_for('tensorrt') == bundle.artefacts_for('pytorch_fp16') == ()
    for refused in (
        bundle.golden_inputs,
        bundle.golden_outputs,
        bundle.image_input,
        bundle.to_json,
        lambda: bundle.compare({}),
    ):
        with pytest.raises(ModelBundleError):
            refused()


@pytest.mark.parametrize('name', ['none.onnx', 'none', 'folder', 'net.engine', 'x' * 300, 'a\0b', 'a\0b.onnx', ''])
def test_m1_what_is_no_model_is_refused(tmp_path, name):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'net.engine').write_bytes(b'a plan')
    with pytest.raises(ModelBundleError):
        ModelBundle.load(tmp_path / name)


@pytest.mark.parametrize(
    ('dtype', 'shape', 'expected'),
    [
        ('float32', (1, 3, 480, 640), {'colour': 'rgb', 'layout': 'nchw', 'scale': 1 / 255}),
        ('float16', (None, 1, 480, 640), {'colour': 'gray', 'layout': 'nchw', 'scale': 1 / 255}),
        ('float32', (1, 480, 640, 3), {'colour': 'rgb', 'layout': 'nhwc', 'scale': 1 / 255}),
        ('uint8', (1, 480, 640, 1), {'colour': 'gray', 'layout': 'nhwc', 'scale': 1.0}),
    ],
)
def test_m1_a_bare_model_gets_the_usual_preprocessing(dtype, shape, expected):
    tensor = TensorSpec('x', dtype, shape)
    spec = default_preprocessing([tensor])
    assert spec == PreprocessingSpec(width=640, height=480, resize=ResizeMode.STRETCH, dtype=dtype, **expected)
    assert image_input([tensor], spec) is tensor


_FOUR_AXES = r'Export .* four axes, \(1, C, H, W\) or \(1, H, W, C\)'
_SINGLE = 'Export the model with a single image input'


@pytest.mark.parametrize(
    ('inputs', 'remedy'),
    [
        ([], _SINGLE),
        ([_IMAGE, _IMAGE], _SINGLE),
        ([TensorSpec('x', 'float32', (1, 3, None, 640))], r'Set the image size .*preprocess\.width'),
        ([TensorSpec('x', 'float32', (1, None, 480, 640))], r'preprocess\.colour'),
        ([TensorSpec('x', 'float32', (1, 4, 480, 640))], r'Export .* that has 1 or 3 channels\.'),
        ([TensorSpec('x', 'float32', (1, 480, 640, 5))], r'Export .* that has 1 or 3 channels\.'),
        ([TensorSpec('x', 'float32', (2, 3, 480, 640))], r'Export .* that has a batch of 1\.'),
        ([TensorSpec('x', 'float32', (1, 3, 480, 3))], r'Write a model\.json with its pre-processing by hand'),
        ([TensorSpec('x', 'float32', (3, 480, 640))], _FOUR_AXES),
        ([TensorSpec('x', 'float32', (1, 256))], _FOUR_AXES),
        ([TensorSpec('x', 'float64', (1, 3, 480, 640))], r'that has the type float32, float16 or uint8\.'),
        ([TensorSpec('x', 'float32', (1, 3, 480, 99999))], 'Export the model for a smaller image'),
        ([TensorSpec('x', 'int8', (4, 2, 480, 640))], 'a batch of 1 and 1 or 3 channels and the type float32'),
    ],
)
def test_m1_a_bare_model_that_takes_no_plain_image_is_refused_with_what_helps(inputs, remedy):
    with pytest.raises(ModelBundleError) as caught:
        default_preprocessing(inputs)
    assert re.search(remedy, caught.value.remedy)


def test_m1_the_image_goes_to_the_one_input_that_takes_it():
    others = [TensorSpec('size', 'int64', (2,)), TensorSpec('x', 'float16', (1, 1, 6, 8))]
    assert image_input([*others, _IMAGE], _PREPROCESSING) is _IMAGE
    for inputs in (others, [_IMAGE, TensorSpec('mask', 'float32', (None, 1, 6, None))]):
        with pytest.raises(ModelBundleError, match=f'preprocessing: .* {_SINGLE}'):
            image_input(inputs, _PREPROCESSING)


@pytest.mark.parametrize(
    ('dtype', 'shape', 'given', 'remedy'),
    [
        ('float32', (1, 3, 480, 640), {'colour': 'gray'}, 'colour rgb or bgr (channels: 3)'),
        ('float32', (1, 1, 480, 640), {}, 'colour gray (channels: 1)'),
        ('float32', (None, 3, 480, 640), {'width': 320}, 'width 640'),
        ('float32', (1, 3, None, 640), {'width': 320, 'height': 240}, 'width 640'),
        ('float16', (1, 480, 640, 3), {}, 'layout nhwc, dtype float16'),
        ('uint8', (1, 3, 480, 640), {'layout': 'nhwc'}, 'layout nchw, dtype uint8'),
        ('float32', (1, 480, 640, None), {'height': 48}, 'height 480, layout nhwc'),
    ],
)
def test_m1_settings_that_the_network_does_not_take_are_named_with_those_it_takes(dtype, shape, given, remedy):
    spec = PreprocessingSpec(**{'width': 640, 'height': 480, 'colour': 'rgb', **given})
    with pytest.raises(ModelBundleError, match='preprocessing: ') as caught:
        image_input([TensorSpec('image', dtype, shape)], spec)
    assert caught.value.remedy == f'Set {remedy} (node: preprocess.*; bundle: preprocessing in model.json).'
    for setting in remedy.split(', '):
        name = setting.split()[0]
        assert f'{name} {getattr(spec, name)}' in caught.value.message


@pytest.mark.parametrize('shape', [(4, 3, 480, 640), (1, 5, 480, 640)])
def test_m1_a_network_that_no_model_json_helps_is_not_told_to_set_anything(shape):
    with pytest.raises(ModelBundleError, match='Export the model with an input that has') as caught:
        image_input([TensorSpec('image', 'float32', shape)], PreprocessingSpec(width=640, height=480, colour='rgb'))
    assert 'Set ' not in str(caught.value)


@pytest.mark.parametrize(
    'changes',
    [
        {'name': 'a/b'},
        {'weights_digest': 'none'},
        {'rules': [*_RULES, _RULES[0]]},
        {'golden': {'golden': ({'image': np.zeros((1, 1, 6, 9), np.float32)}, _golden()[1])}},
        {'golden': {'golden': (_golden()[0], {})}},
        {'preprocessing': PreprocessingSpec(width=9, height=6, colour='gray')},
        {'artefacts': []},
        {
            'artefacts': [
                Artefact(
                    path=Path('/elsewhere/net.onnx'),
                    sha256='0' * 64,
                    strategy='onnx_trt_ep',
                    precision='fp32',
                    device='any',
                    weights_digest=_WEIGHTS,
                )
            ]
        },
    ],
)
def test_m1_a_bundle_that_contradicts_itself_is_not_written(root, changes):
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    with pytest.raises(ModelBundleError):
        _write(root, **changes)
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before


def test_m1_files_are_replaced_as_a_whole(root, monkeypatch):
    """A disk that fills up in the middle leaves the old files, and nothing beside them."""
    before = {path.name: path.read_bytes() for path in root.iterdir()}

    def full(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(ModelBundleError, match='No space left'):
        _write(root, golden={'golden': ({'image': np.ones((1, 1, 6, 8), np.float32)}, _golden()[1])})
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.sampled_from([key for key, _, _ in _WRONG]), st.one_of(_anything, st.just(...))), max_size=3
    ),
    whole=st.one_of(st.none(), _anything),
)
def test_m1_no_json_raises_anything_but_a_refusal(root, written, changes, whole):
    values = written
    for key, value in changes:
        try:
            values = _put(values, key, value)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an earlier change took away what this one would have changed
    _rewrite(root, values if whole is None else json.dumps(whole))
    try:
        bundle = ModelBundle.load(root)
    except ModelBundleError as error:
        assert 'model.json' in str(error)
        return
    _rewrite(root, bundle.to_json())
    assert ModelBundle.load(root) == bundle


@pytest.mark.parametrize('depth', [40, 200, 500, 800, 900, 950, 980, 990, 100_000])
@pytest.mark.parametrize('key', ['"shape": [1, 4]', '"mean": [0.0]', '"rtol": 0.001'])
def test_m1_values_nested_to_any_depth_are_refused(root, key, depth):
    text = json.dumps(_json(root))
    assert text.count(key) == 1
    _rewrite(root, text.replace(key, f'{key.partition(":")[0]}: {"[" * depth}{"]" * depth}'))
    with pytest.raises(ModelBundleError, match='nested'):
        ModelBundle.load(root)


def test_m1_a_name_that_cannot_be_published_is_refused(root):
    text = json.dumps(_json(root))
    for surrogate in (r'\ud800', r'\udfff'):
        _rewrite(root, text.replace('"heat"', f'"{surrogate}"'))
        with pytest.raises(ModelBundleError, match='not valid text'):
            ModelBundle.load(root)


def test_m1_a_model_json_of_a_tebibyte_is_not_read(root):
    os.truncate(root / 'model.json', 1 << 40)
    with pytest.raises(ModelBundleError, match='more than'):
        ModelBundle.load(root)


def test_m1_a_golden_file_of_a_tebibyte_is_not_read(root):
    os.truncate(root / 'golden_outputs.npz', 1 << 40)
    with pytest.raises(ModelBundleError, match='more than'):
        ModelBundle.load(root).golden_outputs()


def _with_golden_outputs(root, content):
    (root / 'golden_outputs.npz').write_bytes(content)
    _rewrite(root, _put(_json(root), 'golden.0.outputs.sha256', hashlib.sha256(content).hexdigest()))
    return ModelBundle.load(root)


def test_m1_an_entry_that_is_no_array_is_refused(root):
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w') as archive:
        for spec in _OUTPUTS:
            archive.writestr(f'{spec.name}.npy', b'no array')
    with pytest.raises(ModelBundleError, match='is not an array'):
        _with_golden_outputs(root, content.getvalue()).golden_outputs()


def test_m1_an_archive_that_unpacks_to_more_than_its_limit_is_refused(root):
    content = io.BytesIO()
    np.savez_compressed(content, places=np.zeros(1 << 21))
    (root / 'bomb.npz').write_bytes(content.getvalue())
    assert len(content.getvalue()) < 1 << 16
    file = BundleFile(root / 'bomb.npz', file_sha256(root / 'bomb.npz'))
    assert read_npz(file)['places'].nbytes == 1 << 24
    with pytest.raises(ModelBundleError, match='unpacks to'):
        read_npz(file, limit=1 << 24)


@pytest.mark.parametrize('max_distance', [1e154, 1e155, 1e200, 1e308])
def test_m1_a_distance_whose_square_is_no_number_is_compared_all_the_same(max_distance):
    points = np.zeros((3, 2), np.float32)
    assert MatchedDistance('points', max_distance, 1.0).disagreement(points, points + 5) is None
