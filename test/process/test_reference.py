"""M-1: golden answers come from plain session.run, in a process that shares no code with the serving path."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gps_denied_c7.errors import InferenceError, ModelBundleError, RuntimeUnavailableError
from gps_denied_c7.ground import reference
from gps_denied_c7.ground.reference import reference_answers
from support.small_networks import network, plain_answers, saved

pytestmark = pytest.mark.once

IMAGES = [np.random.RandomState(seed).rand(1, 3, 24, 32).astype(np.float32) for seed in range(3)]


def test_answers_are_those_of_plain_session_run_to_the_bit(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for model in (path.read_bytes(), str(path)):
        found = reference_answers(model, [{'image': image} for image in IMAGES])
        assert [(spec.name, spec.dtype, spec.shape) for spec in found.outputs] == [
            ('features', 'float32', (1, 4, 24, 32))
        ]
        for image, answer in zip(IMAGES, found.answers, strict=True):
            assert isinstance(answer, dict)
            assert np.array_equal(answer['features'], plain_answers(path, {'image': image})['features'])


def test_a_graph_with_nodes_that_nothing_reads_is_answered_by_the_arithmetic() -> None:
    """ONNX Runtime up to 1.18 reuses memory wrongly there, without optimisation and with its defaults."""
    nodes = [
        helper.make_node('Cast', ['image'], ['values'], to=TensorProto.FLOAT),
        helper.make_node('Reshape', ['values', 'flat'], ['row']),
        helper.make_node('Conv', ['values', 'kernel'], ['unread'], pads=[1, 1, 1, 1]),
        helper.make_node('Slice', ['row', 'first', 'last'], ['unread too']),
        helper.make_node('Mul', ['values', 'one'], ['scaled']),
        helper.make_node('Round', ['scaled'], ['rounded']),
        helper.make_node('Cast', ['rounded'], ['whole'], to=TensorProto.INT64),
        helper.make_node('Identity', ['whole'], ['output']),
    ]
    constants = {
        'flat': np.array([-1]), 'first': np.array([0]), 'last': np.array([64]), 'one': np.float32(1),
        'kernel': np.ones((1, 1, 3, 3), np.float32),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, 'unread', [helper.make_tensor_value_info('image', TensorProto.INT32, [1, 1, 32, 11])],
        [helper.make_tensor_value_info('output', TensorProto.INT64, [1, 1, 32, 11])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    images = [np.random.RandomState(seed).randint(0, 16, (1, 1, 32, 11)).astype(np.int32) for seed in range(6)]
    found = reference_answers(model.SerializeToString(), [{'image': image} for image in images])
    for image, answer in zip(images, found.answers, strict=True):
        assert isinstance(answer, dict)
        assert np.array_equal(answer['output'], image)


def test_weights_in_files_of_their_own_are_found(tmp_path: Path) -> None:
    onnx.save_model(network(), tmp_path / 'net.onnx', save_as_external_data=True, location='w', size_threshold=0)
    (answer,) = reference_answers(str(tmp_path / 'net.onnx'), [{'image': IMAGES[0]}]).answers
    assert isinstance(answer, dict)
    assert np.array_equal(answer['features'], plain_answers(tmp_path / 'net.onnx', {'image': IMAGES[0]})['features'])


def test_a_size_that_the_file_has_wrong_is_unknown(tmp_path: Path) -> None:
    """As exporters leave them: the size of the example image's answer, 0, or nothing at all."""
    nodes = [
        helper.make_node('Greater', ['features', 'features'], ['never']),
        helper.make_node('NonZero', ['never'], ['none']),
        helper.make_node('ReduceMax', ['features'], ['scalar'], keepdims=0),
    ]
    outputs = {
        'none': (TensorProto.INT64, [4, 137]), 'scalar': (TensorProto.FLOAT, []),
        'features': (TensorProto.FLOAT, [1, 4, None, None]),
    }  # fmt: skip
    model = network(nodes=nodes, outputs=outputs)
    found = reference_answers(model.SerializeToString(), [{'image': IMAGES[0]}])
    assert [spec.shape for spec in found.outputs] == [(4, None), (), (1, 4, 24, 32)]


def test_outputs_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    nodes = [helper.make_node('Cast', ['features'], ['text'], to=TensorProto.STRING)]
    outputs = {'text': (TensorProto.STRING, None), 'features': (TensorProto.FLOAT, None)}
    found = reference_answers(network(nodes=nodes, outputs=outputs).SerializeToString(), [{'image': IMAGES[0]}])
    assert [spec.name for spec in found.outputs] == ['features'] and found.left_out == {'text': 'tensor(string)'}


@pytest.mark.parametrize('kind', ['BFLOAT16', 'FLOAT8E4M3FN'])
def test_an_output_of_a_type_that_numpy_lacks_costs_itself_alone(kind: str) -> None:
    nodes = [helper.make_node('Cast', ['features'], ['odd'], to=getattr(TensorProto, kind))]
    outputs = {'odd': (getattr(TensorProto, kind), None), 'features': (TensorProto.FLOAT, None)}
    model = network(nodes=nodes, outputs=outputs)
    model.ir_version, model.opset_import[0].version = 9, 19
    found = reference_answers(model.SerializeToString(), [{'image': IMAGES[0]}])
    assert [spec.name for spec in found.outputs] == ['features'] and [*found.left_out] == ['odd']


def test_a_request_that_the_model_fails_on_costs_itself_alone(tmp_path: Path) -> None:
    requests = [{'image': IMAGES[0]}, {'image': IMAGES[1][:, :2]}, {'image': IMAGES[2]}]
    answers = reference_answers(saved(tmp_path).read_bytes(), requests).answers
    assert isinstance(answers[1], InferenceError) and 'image' in answers[1].message
    assert isinstance(answers[0], dict) and isinstance(answers[2], dict)


def test_answers_end_at_a_limit_of_memory_but_for_the_first(tmp_path: Path) -> None:
    model, size = saved(tmp_path).read_bytes(), 4 * 24 * 32 * 4
    for limit, kept in ((0, 1), (size, 1), (2 * size, 2), (3 * size, 3), (None, 3)):
        answers = reference_answers(model, [{'image': image} for image in IMAGES], limit_bytes=limit).answers
        assert sum(answer is not None for answer in answers) == kept


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelBundleError, match='does not accept the model'):
        reference_answers(b'no model', [])


@pytest.mark.parametrize(
    ('program', 'words'),
    [
        ('raise SystemExit("no memory")', 'ended with 1: no memory'),
        ('import os; os.write(2, b"answer 3"); os.kill(os.getpid(), 9)', r'by signal 9 \(Killed\) at answer 3\.'),
        ('import os; os.kill(os.getpid(), 9)', r'by signal 9 \(Killed\) at the import of ONNX Runtime\.'),
    ],
)
def test_a_process_that_dies_is_said(monkeypatch: pytest.MonkeyPatch, program: str, words: str) -> None:
    dying = [sys.executable, '-c', program]
    monkeypatch.setattr(reference, 'python_child', lambda module, *arguments, environ: (dying, environ))
    with pytest.raises(ModelBundleError, match=words):
        reference_answers(b'', [])


@pytest.mark.parametrize(('variable', 'value'), [('PYTHONPATH', ':.'), ('PYTHONSTARTUP', 'numpy.py')])
def test_nothing_from_the_working_directory_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """The names that the process imports lie there, as in a world-writable directory; some are the package's own."""
    model = saved(tmp_path).read_bytes()
    for name in ('numpy', 'onnxruntime', 'json', 'io', 'sitecustomize', 'secrets', 'statistics', 'gps_denied_c7'):
        (tmp_path / f'{name}.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value + (f':{os.environ.get("PYTHONPATH", "")}' if variable == 'PYTHONPATH' else ''))
    (answer,) = reference_answers(model, [{'image': IMAGES[0]}]).answers
    assert isinstance(answer, dict) and not (tmp_path / 'ran').exists()


def test_the_process_has_telemetry_off_and_imports_no_runtime_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / 'lib' / 'onnxruntime'
    package.mkdir(parents=True)
    (package / '__init__.py').write_text(
        'import os, sys\n'
        'raise ImportError(repr((os.environ.get("ORT_DISABLE_TELEMETRY"), os.getcwd(), '
        'sorted(name for name in sys.modules if "gps_denied_c7" in name))))\n'
    )
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path / "lib"}:{os.environ.get("PYTHONPATH", "")}')
    monkeypatch.delenv('ORT_DISABLE_TELEMETRY', raising=False)
    with pytest.raises(RuntimeUnavailableError) as caught:
        reference_answers(saved(tmp_path).read_bytes(), [])
    assert "('1', '/'," in str(caught.value) and 'gps_denied_c7.tensors' in str(caught.value)
    for name in ('runtimes', 'worker', 'failover'):
        assert f'gps_denied_c7.{name}' not in str(caught.value)
    assert os.getcwd() != '/'
