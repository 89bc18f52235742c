"""G-3: c7_engine and the node say the same of a model, and every file that is none gets a sentence."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import ConfigError
from gps_denied_c7.ground import make_bundle
from gps_denied_c7.ground.staged_directory import staged_directory
from gps_denied_c7.model.bundle import ModelBundle
from support.engine_command import Run
from support.small_networks import KERNEL, endless, free, handmade, network, saved
from support.source_tree import REPOSITORY
from support.waiting import wait_until

pytestmark = pytest.mark.once

ENGINE = [sys.executable, '-m', 'gps_denied_c7.ground.cli']
SIZE = ['--input-size', '32x24']


# --- one word -------------------------------------------------------------------------------------


def test_m1_a_bundle_with_a_second_input_is_refused_by_verify_as_by_the_node(tmp_path: Path, run: Run) -> None:
    root = handmade(tmp_path / 'net', (1, 3, 24, 32), 'size')
    for options in ([], ['--digests-only'], ['--any-host']):
        status, out, _ = run('verify', root, *options)
        assert status == 1 and 'REFUSED  served' in out
        assert "the model also takes ['size'], and an image fills 'image' alone" in out
    assert 'input' in run('build', root)[2]


@pytest.mark.parametrize('options', [['--digests-only'], ['--any-host']])
def test_m1_nothing_is_called_served_that_was_not_loaded(tmp_path: Path, run: Run, options: list[str]) -> None:
    """Of a bare .onnx nothing is known before that: this one has a free input that is no image."""
    info = helper.make_tensor_value_info('points', TensorProto.FLOAT, [1, None, 2])
    graph = helper.make_graph([helper.make_node('Identity', ['points'], ['out'])], 'graph', [info],
                              [helper.make_tensor_value_info('out', TensorProto.FLOAT, None)])  # fmt: skip
    path = saved(tmp_path, helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8))
    assert run('verify', path)[0] == 1
    for whole in (path, handmade(tmp_path / 'net')):
        status, out, _ = run('verify', whole, *options)
        assert status == 0 and 'served' not in out


def test_m1_a_bundle_that_no_runtime_of_this_host_can_load_is_refused(tmp_path: Path, run: Run) -> None:
    """Its one artefact is for another strategy, and whole."""
    root = handmade(tmp_path / 'net')
    described = json.loads((root / 'model.json').read_text())
    described['artefacts'][0]['strategy'] = 'tensorrt'
    (root / 'model.json').write_text(json.dumps(described))
    status, out, _ = run('verify', root)
    assert status == 1 and 'no usable runtime' in out
    assert out.count('REFUSED') == 1, 'the files themselves are whole'


def test_m1_a_bundle_whose_image_has_any_size_is_served_at_that_of_its_preprocessing(tmp_path: Path, run: Run) -> None:
    root = handmade(tmp_path / 'net', (1, 3, None, None))
    status, out, _ = run('verify', root, '--run', '--json')
    told = json.loads(out)
    assert status == 0 and told['refused'] == 0
    assert told['verdicts'][-1]['kind'] == 'served'
    assert told['verdicts'][-1]['run']['outputs'][0]['shape'] == [1, 4, 22, 30]


def test_m1_a_bundle_is_loaded_as_the_node_would_before_it_is_there(tmp_path: Path, run: Run, monkeypatch) -> None:
    """What the workers refuse, no bundle is made of."""
    monkeypatch.setenv('PATH', os.environ['PATH'])
    monkeypatch.setattr('gps_denied_c7.worker.exchange._LARGEST_ANSWER_BYTES', 64)
    status, _, errors = run('bundle', saved(tmp_path), '--output', tmp_path / 'b')
    assert status == 1 and errors.startswith('c7_engine bundle: ')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['net.onnx']


@pytest.mark.parametrize('kind', ['STRING', 'BFLOAT16', 'sequence'])
def test_m1_bundle_verify_and_the_node_leave_out_the_same_outputs(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Those that are not numeric tensors, beside one that is; without that one all of them name the reason."""
    for beside, status in (({'features': (TensorProto.FLOAT, [1, 4, 24, 32])}, 0), ({}, 1)):
        if kind == 'sequence':
            model = network(nodes=[helper.make_node('SequenceConstruct', ['features'], ['odd'])], outputs=beside)
            del model.graph.output[len(beside) :]
            model.graph.output.append(helper.make_tensor_sequence_value_info('odd', TensorProto.FLOAT, None))
        else:
            to = getattr(TensorProto, kind)
            nodes = [helper.make_node('Cast', ['features'], ['odd'], to=to)]
            model = network(nodes=nodes, outputs={'odd': (to, None), **beside})
        path = saved(tmp_path, model)
        verified, out, _ = run('verify', path, '--run')
        made, told, errors = run('bundle', path, '--output', tmp_path / 'b')
        assert verified == made == status
        if status == 0:
            assert 'features float32' in out and 'odd' not in out and "['odd'] are not numeric tensors" in told
            assert "net.onnx: the outputs ['odd'] are not numeric tensors" in caplog.text
            caplog.clear()
            assert run('verify', tmp_path / 'b')[0] == 0
            assert caplog.text == '', 'a bundle names its outputs'
        else:
            assert all("no output of the model is a numeric tensor: 'odd' is a" in text for text in (out, errors))
        shutil.rmtree(tmp_path / 'b', ignore_errors=True)


# --- verify --run ---------------------------------------------------------------------------------


def test_g3_verify_run_prints_what_session_run_answers(tmp_path: Path, run: Run) -> None:
    """The picture is decoded, and the tensor made, by OpenCV and NumPy alone on the other side."""
    picture = tmp_path / 'picture.png'
    cv2.imwrite(str(picture), np.random.default_rng(5).integers(0, 256, (24, 32, 3), np.uint8))
    model = saved(tmp_path)
    pixels = cv2.cvtColor(cv2.imread(str(picture)), cv2.COLOR_BGR2RGB)
    request = {'image': (pixels.astype(np.float32) / 255).transpose(2, 0, 1)[None]}
    expected = ort.InferenceSession(model.read_bytes(), providers=['CPUExecutionProvider']).run(None, request)[0]
    assert run('bundle', model, '--output', tmp_path / 'b')[0] == 0
    status, out, _ = run('verify', tmp_path / 'b', '--json', '--run', picture)
    assert status == 0
    told = json.loads(out)['verdicts'][-1]['run']
    assert (told['picture_width'], told['picture_height']) == (32, 24)
    (output,) = told['outputs']
    assert (output['name'], output['dtype'], output['shape']) == ('features', 'float32', [1, 4, 24, 32])
    for name in ('min', 'mean', 'max'):
        assert output[name] == pytest.approx(float(getattr(expected, name)()), abs=1e-4)
    np.testing.assert_allclose(output['first'], expected.ravel()[:8], atol=1e-4)
    assert output['not_finite'] == 0
    out = run('verify', '--run', model)[1]
    assert 'features float32 1x4x24x32: min ' in out, 'noise, where no picture is given'


@pytest.mark.parametrize(
    ('picture', 'problem'),
    [('none.png', 'No such file'), ('.', 'directory'), ('fifo', 'not a regular file'),
     ('text.jpg', 'cannot be used as a picture'), ('huge.png', 'more than')],
)  # fmt: skip
def test_g3_verify_run_of_what_is_no_picture_says_so(tmp_path: Path, run: Run, picture: str, problem: str) -> None:
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'text.jpg').write_text('cannot be used as a picture')
    (tmp_path / 'huge.png').touch()
    os.truncate(tmp_path / 'huge.png', 1 << 40)
    status, _, errors = run('verify', saved(tmp_path), '--run', tmp_path / picture)
    assert status == 1 and problem in errors and errors.count('\n') == 1


# --- sizes ----------------------------------------------------------------------------------------


def test_m1_the_axis_that_is_still_free_is_named_with_how_to_give_it(tmp_path: Path, run: Run) -> None:
    model = free(tmp_path, [1, None, None, None])
    status, _, errors = run('bundle', model, '--output', tmp_path / 'b', '--input-size', '640x480')
    assert status == 1 and "'image' (1x?x?x?) leaves its channels free" in errors
    for way in ('--colour rgb', '--colour gray', '--input-size image=1x3x480x640'):
        assert way in errors
    _, _, errors = run('bundle', model, '--output', tmp_path / 'b', '--colour', 'gray')
    assert 'leaves its height and its width free' in errors and '--input-size WIDTHxHEIGHT' in errors
    rule = ['--rule', 'features=default']
    assert run('bundle', model, '--output', tmp_path / 'b', *SIZE, '--colour', 'gray', *rule)[0] == 0
    assert ModelBundle.load(tmp_path / 'b').inputs[0].shape == (1, 1, 24, 32)


@pytest.mark.parametrize('axes', [['n', 3, 'h', 32], [None, None, None, None]])
def test_m1_a_bare_onnx_of_any_size_takes_the_size_given(tmp_path: Path, run: Run, axes: list) -> None:
    model = free(tmp_path, axes)
    status, out, _ = run('verify', model)
    assert status == 1 and 'preprocess.width' in out and '--input-size' in out
    status, out, _ = run('verify', model, *SIZE, '--colour', 'rgb', '--run', '--json')
    assert status == 0
    assert json.loads(out)['verdicts'][-1]['run']['outputs'][0]['shape'] == [1, 4, 22, 30]


# --- files that are something else ----------------------------------------------------------------


def jpeg() -> bytes:
    return cv2.imencode('.jpg', np.zeros((8, 8, 3), np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ('name', 'content', 'kind'),
    [('a.jpg', jpeg(), 'a JPEG picture'), ('a.txt', b'hello\n', 'text'), ('a', b'', 'empty'), ('a.bin', bytes(99), ''),
     ('a.onnx', network().SerializeToString(), 'ONNX model'), ('a.zip', b'PK\3\4' + bytes(99), 'a zip archive'),
     ('a\nb.jpg', jpeg(), 'JPEG')],
)  # fmt: skip
def test_g3_inspect_of_a_foreign_file_exits_with_1_and_a_sentence(
    tmp_path: Path, run: Run, name: str, content: bytes, kind: str
) -> None:
    (tmp_path / name).write_bytes(content)
    status, out, errors = run('inspect', tmp_path / name)
    assert (status, out) == (1, '')
    assert 'is not a TensorRT engine' in errors and kind in errors and errors.count('\n') == 1
    status, out, _ = run('inspect', '--json', tmp_path / name)
    assert status == 1 and 'is not a TensorRT engine' in json.loads(out)['error']['message']


def test_g3_inspect_of_what_cannot_be_read_at_once_says_so(tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'loop').symlink_to('loop')
    for name, size in (('sparse', 8 << 40), ('sparse.engine', 8 << 40)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    for name, problem in (
        ('.', 'is a directory'), ('fifo', 'not a regular file'), ('loop', 'symbolic links'), ('none', 'No such file'),
        ('sparse', 'not a TensorRT engine'), ('sparse.engine', f'not enough memory: {8 << 40} bytes are needed'),
        ('/dev/zero', 'not a regular file'),
    ):  # fmt: skip
        status, _, errors = run('inspect', tmp_path / name)
        assert status == 1 and problem in errors and errors.count('\n') == 1, name


@pytest.mark.parametrize('command', ['verify', 'bundle', 'build'])
@pytest.mark.parametrize(
    'damage', ['cut', 'gone', 'directory', 'fifo', 'loop', 'offset', 'length', 'location', 'model']
)
def test_m1_external_data_that_is_damaged_is_told_by_every_command(
    tmp_path: Path, run: Run, command: str, damage: str
) -> None:
    model = network()
    (tensor,) = model.graph.initializer
    weights = tmp_path / 'net.weights'
    weights.write_bytes(KERNEL.tobytes())
    tensor.ClearField('raw_data')
    tensor.data_location = TensorProto.EXTERNAL
    entries = {'location': 'net.weights', 'offset': '0', 'length': str(KERNEL.nbytes)}
    entries |= {damage: {'offset': '1e9', 'length': '-1', 'location': '../../x'}[damage]} if damage in entries else {}
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)
    content = model.SerializeToString()
    path = tmp_path / 'net.onnx'
    path.write_bytes(content[: len(content) // 2] if damage == 'model' else content)
    if damage == 'cut':
        os.truncate(weights, KERNEL.nbytes // 2)
    elif damage in ('gone', 'directory', 'fifo', 'loop'):
        weights.unlink()
        {'gone': lambda: None, 'directory': weights.mkdir, 'fifo': lambda: os.mkfifo(weights),
         'loop': lambda: weights.symlink_to(weights)}[damage]()  # fmt: skip
    output = ['--output', tmp_path / 'b'] if command == 'bundle' else []
    status, out, errors = run(command, path, *output)
    assert status == 1 and 'Traceback' not in out + errors
    if command != 'build':
        assert 'net' in out + errors
    assert not (tmp_path / 'b').exists()


# --- paths ----------------------------------------------------------------------------------------


def test_a_path_may_begin_with_the_home_directory(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    model = saved(tmp_path)
    assert run('bundle', '~/net.onnx', '--output', '~/b')[0] == 0 and (tmp_path / 'b' / 'model.json').exists()
    assert run('verify', '~/b', '~/net.onnx', '--digests-only')[0] == 0
    assert ModelBundle.load('~/net.onnx').artefacts[0].path == model
    config = C7InferenceConfig(engine_cache_dir='~/engines', ort_trt_cache_dir='~')
    assert (config.engine_cache_dir, config.ort_trt_cache_dir) == (tmp_path / 'engines', tmp_path)
    with pytest.raises(ConfigError, match='engine_cache_dir'):
        C7InferenceConfig(engine_cache_dir='~nobody-of-that-name/engines')
    with pytest.raises(SystemExit) as ended:
        run('verify', '~nobody-of-that-name/b')
    assert ended.value.code == 2


@pytest.mark.parametrize('name', ['- two wörds 機', '..a\nb\udcff'])
def test_a_directory_may_have_any_name(tmp_path: Path, name: str) -> None:
    """As a process: what is printed has to be bytes at last."""
    place = tmp_path / name
    place.mkdir()
    saved(place)
    (tmp_path / 'link').symlink_to(place)
    for where in (place, tmp_path / 'link'):
        done = subprocess.run(
            [*ENGINE, 'verify', '--digests-only', os.path.relpath(where / 'net.onnx')],
            capture_output=True, check=False, timeout=120,
            env={**os.environ, 'PYTHONPATH': str(REPOSITORY), 'PYTHONUTF8': '1'},
        )  # fmt: skip
        lines = done.stdout.decode().splitlines()
        assert done.returncode == 0, done.stderr
        assert [line.split()[:2] for line in lines[:2]] == [['ok', 'bundle'], ['ok', 'artefact']]
        assert len(lines) == 3


def test_a_working_directory_that_was_removed_is_named(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'gone').mkdir()
    monkeypatch.chdir(tmp_path / 'gone')
    (tmp_path / 'gone').rmdir()
    for arguments in (('verify', 'net.onnx'), ('bundle', saved(tmp_path), '--output', 'b')):
        status, _, errors = run(*arguments)
        assert status == 1 and 'the working directory was removed' in errors


def test_a_python_package_that_is_missing_is_named_with_how_to_get_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['onnx'] = None; from gps_denied_c7.ground.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, '-c', code, 'bundle', '--json', str(saved(tmp_path)), '--output', str(tmp_path / 'b')],
        capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(REPOSITORY)}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'package onnx is not installed. pip install' in done.stderr
    assert 'onnx is not installed' in json.loads(done.stdout)['error']['message']


def test_m1_a_size_that_no_image_has_is_refused_with_those_that_it_may_have(tmp_path: Path, run: Run) -> None:
    status, _, errors = run(
        'bundle', free(tmp_path, [1, 3, None, None]), '--output', tmp_path / 'b', '--input-size', '999999999x24'
    )
    assert status == 1 and '999999999 is not a size in pixels. Give a whole number in 1..' in errors


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_m1_a_bundle_that_is_interrupted_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*ENGINE, 'bundle', str(saved(tmp_path)), '--output', str(tmp_path / 'b')],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': str(REPOSITORY)},
        # A shell's background job, or nohup, has them ignored.
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('.b.*/net.onnx')):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.decode() == 'c7_engine bundle: interrupted\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['net.onnx']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_m1_a_model_that_does_not_end_is_told_and_ends_with_c7_engine(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    """Its computation is a process of its own; the next run removes what a kill has left."""
    with subprocess.Popen(
        [*ENGINE, 'bundle', str(saved(tmp_path, endless())), '--output', str(tmp_path / 'b')],
        stderr=subprocess.PIPE, text=True, env={**os.environ, 'PYTHONPATH': str(REPOSITORY)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        told = process.stderr.readline()
        assert 'now: answer 1 of 12' in told and '--answer-timeout' in told
        (child,) = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        process.send_signal(number)
    wait_until(lambda: not Path(f'/proc/{child}/exe').exists(), 'the computation to end')
    left = [path for path in tmp_path.iterdir() if path.name != 'net.onnx']
    assert len(left) == (number == signal.SIGKILL)
    (tmp_path / '.b.of_mine1').mkdir()
    assert run('bundle', saved(tmp_path), '--output', tmp_path / 'b')[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.b.of_mine1', 'b', 'net.onnx']
    assert all(f'removed {path}, which an interrupted run had left' in caplog.text for path in left)


def test_m1_a_model_that_does_not_end_is_refused(tmp_path: Path, run: Run) -> None:
    limit = ['--answer-timeout', '1']
    status, _, errors = run('bundle', saved(tmp_path, endless()), '--output', tmp_path / 'b', *limit)
    assert status == 1 and 'took longer than 1 s for answer 1 of 12' in errors and '--answer-timeout' in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ['net.onnx']
    root = handmade(tmp_path / 'net')
    before = hashlib.sha256((root / 'net.onnx').read_bytes()).hexdigest()
    after = hashlib.sha256(saved(root, endless()).read_bytes()).hexdigest()
    (root / 'model.json').write_text((root / 'model.json').read_text().replace(before, after))
    status, out, _ = run('verify', root, '--any-host', *limit)
    assert status == 1 and 'REFUSED  answers' in out and 'took longer than 1 s for answer 1 of 1' in out


def test_m1_a_directory_that_another_run_is_making_stays(tmp_path: Path) -> None:
    with staged_directory(tmp_path / 'b') as first, staged_directory(tmp_path / 'b') as second:
        assert first != second and first.is_dir() and second.is_dir()
        (first / 'file').touch()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_m1_an_interruption_that_python_drops_leaves_nothing(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python drops what a handler raises in a callback of its own, here of a weak reference."""
    prove = make_bundle._prove

    def drop(bundle: ModelBundle) -> None:
        class Gone:
            pass

        gone = Gone()
        reference = weakref.ref(gone, lambda _: signal.raise_signal(signal.SIGTERM))
        del gone
        assert reference() is None
        prove(bundle)

    monkeypatch.setattr(make_bundle, '_prove', drop)
    status, _, errors = run('bundle', saved(tmp_path), '--output', tmp_path / 'b')
    assert status == 130 and errors.endswith('interrupted\n')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['net.onnx']


def test_m1_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, run: Run) -> None:
    disk = tmp_path / 'disk'
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b'tmpfs', os.fsencode(disk), b'tmpfs', 0, b'size=32k'):
        pytest.skip(f'no file system can be mounted here: {os.strerror(ctypes.get_errno())}')
    try:
        status, _, errors = run('bundle', saved(tmp_path), '--output', disk / 'b')
        assert status == 1 and 'No space left on device' in errors and errors.count('\n') == 1
        assert list(disk.iterdir()) == []
        assert libc.mount(None, os.fsencode(disk), None, 1 | 32, None) == 0, 'read-only'
        status, _, errors = run('bundle', saved(tmp_path), '--output', disk / 'b')
        assert status == 1 and 'Read-only file system' in errors
    finally:
        libc.umount2(os.fsencode(disk), 2)


def test_m1_a_directory_that_is_there_already_is_left_as_it_is(tmp_path: Path, run: Run) -> None:
    model = saved(tmp_path)
    for name in ('file', 'full/file'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('mine')
    (tmp_path / 'dangling').symlink_to('nowhere')
    for name in ('file', 'full', 'dangling', 'file/b', '.'):
        status, _, errors = run('bundle', model, '--output', tmp_path / name)
        assert status == 1 and errors.count('\n') == 1, name
    assert (tmp_path / 'file').read_text() == (tmp_path / 'full/file').read_text() == 'mine'
    shutil.rmtree(tmp_path / 'full')


def test_every_program_has_a_help(tmp_path: Path) -> None:
    """The node's starts no ROS, which would refuse this domain."""
    programs = {
        'c7_inference_node': 'ros.node_main', 'c7_replay': 'ros.replay_main', 'c7_engine': 'ground.cli',
        'c7_demo': 'demo.run', 'c7_bench': 'bench.run',
    }  # fmt: skip
    pytest.importorskip('rclpy')
    calls = [*((program, '--help') for program in programs), ('c7_inference_node', '-h')]
    for program, option in calls:
        done = subprocess.run(
            [sys.executable, '-m', f'gps_denied_c7.{programs[program]}', option], capture_output=True, text=True,
            check=False, timeout=60, cwd=tmp_path, env={**os.environ, 'ROS_DOMAIN_ID': 'no number'},
        )  # fmt: skip
        assert done.returncode == 0, (program, done.stderr)
        assert done.stdout.startswith(f'usage: {program}') and max(map(len, done.stdout.splitlines())) <= 120
    assert list(tmp_path.iterdir()) == []
