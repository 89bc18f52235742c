"""G-3, M-1: c7_engine as a process, and what it asks a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import helper

from gps_denied_c7.engines.manifest import HostProfile
from gps_denied_c7.ground.golden import noise_picture
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle, write_bundle
from gps_denied_c7.model.files import file_sha256
from gps_denied_c7.runtimes.gpu import cuda
from support.engine_cache_files import fake_plan, publish_engine
from support.engine_command import Run, flip, verdicts
from support.small_networks import KERNEL, SHAPE, network, saved
from support.source_tree import REPOSITORY

pytestmark = pytest.mark.once


def executed(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process of its own."""
    environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'PYTHONDONTWRITEBYTECODE': '1'}
    return subprocess.run(
        [sys.executable, '-m', 'gps_denied_c7.ground.cli', *map(str, arguments)],
        env=environment, text=True, capture_output=True, check=False, **options,
    )  # fmt: skip


def test_g3_whole_way_as_processes_without_ros_or_gpu(tmp_path: Path) -> None:
    """From an .onnx to a bundle that verifies, and to the word that nothing can be built here or that it was."""
    model = saved(tmp_path, network(['batch', 3, 'height', 'width']))
    made = executed('bundle', model, '--output', tmp_path / 'bundle', '--input-size', '32x24')
    assert (made.returncode, made.stderr) == (0, '')
    assert 'features: allclose, rtol 0.0, atol' in made.stdout
    checked = executed('verify', tmp_path / 'bundle')
    assert (checked.returncode, checked.stderr) == (0, '')
    assert checked.stdout.endswith(f'{4 + 2 * 6} checked, 0 refused\n')
    if not cuda.gpu_devices():
        built = executed('build', tmp_path / 'bundle', '--cache', tmp_path / 'cache')
        assert (built.returncode, built.stdout) == (1, '')
        assert 'no NVIDIA GPU' in built.stderr and 'Traceback' not in built.stderr
        assert not (tmp_path / 'cache').exists()


def test_g3_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    for number in range(50):
        publish_engine(tmp_path, model=f'net{number}')
    reading, writing = os.pipe()
    os.close(reading)
    try:
        environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY)}
        done = subprocess.run(
            [sys.executable, '-m', 'gps_denied_c7.ground.cli', 'verify', '--any-host', str(tmp_path)],
            stdout=writing, stderr=subprocess.PIPE, text=True, env=environment, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, '')


@pytest.mark.parametrize('arguments', [(), ('--json',)])
def test_g3_a_full_disk_behind_standard_output_is_a_sentence(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    publish_engine(tmp_path)
    command = [sys.executable, '-m', 'gps_denied_c7.ground.cli', 'verify', '--any-host', str(tmp_path), *arguments]
    environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY)}
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False, timeout=120
        )
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert done.stderr.count('\n') == 1 and 'standard output cannot be written: No space left' in done.stderr


def test_g3_a_closed_standard_output_changes_no_exit_status(tmp_path: Path) -> None:
    publish_engine(tmp_path)
    command = [sys.executable, '-m', 'gps_denied_c7.ground.cli', 'verify', '--any-host', str(tmp_path)]
    done = subprocess.run(
        ['/bin/sh', '-c', 'exec "$@" >&-', 'sh', *command], stderr=subprocess.PIPE, text=True, check=False,
        env={**os.environ, 'PYTHONPATH': str(REPOSITORY)}, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, '')


@pytest.fixture
def bundle(tmp_path: Path, run: Run) -> Path:
    assert run('bundle', saved(tmp_path), '--output', tmp_path / 'bundle')[0] == 0
    return tmp_path / 'bundle'


@pytest.mark.parametrize('damaged', ['net.onnx', 'golden/noise_inputs.npz', 'golden/black_outputs.npz', 'model.json'])
def test_m1_verify_checks_every_file_of_a_bundle(bundle: Path, run: Run, damaged: str) -> None:
    status, out, _ = run('verify', bundle, '--json')
    assert (status, len(verdicts(out))) == (0, 2 + 2 * 6)
    assert run('verify', bundle.parent)[0] == run('verify', bundle / 'model.json')[0] == 0
    # Among the weights, where a model still parses and runs.
    content = (bundle / damaged).read_bytes()
    flip(bundle / damaged, content.index(KERNEL.tobytes()) + 2 if damaged == 'net.onnx' else 3)
    status, out, _ = run('verify', bundle, '--json')
    assert status == 1
    refused = [name for name, admitted in verdicts(out).items() if not admitted]
    # The node would not serve it either.
    assert refused == (['bundle'] if damaged == 'model.json' else ['bundle', Path(damaged).name])


def test_m1_verify_takes_a_bundle_s_engine_through_the_gate(bundle: Path, run: Run, here: HostProfile) -> None:
    engine = publish_engine(bundle)
    described = json.loads((bundle / 'model.json').read_text())
    artefact = Artefact.of_file(
        engine, strategy='tensorrt', precision='fp16', weights_digest=described['weights_digest']
    )
    described['artefacts'].append(
        {
            'strategy': 'tensorrt', 'path': engine.name, 'sha256': artefact.sha256, 'precision': 'fp16',
            'device': 'sm87', 'weights_digest': described['weights_digest'],
        }  # fmt: skip
    )
    (bundle / 'model.json').write_text(json.dumps(described))
    assert run('verify', bundle)[0] == 0
    # Whole, and the gate would take it, but not the one that the bundle names.
    publish_engine(bundle, fake_plan(seed=1))
    status, out, _ = run('verify', bundle, '--json')
    assert status == 1
    assert [name for name, admitted in verdicts(out).items() if not admitted] == [engine.name]


@pytest.mark.parametrize(('strategy', 'name'), [('pytorch_fp16', 'spare.pt2'), ('tensorrt', 'spare.engine')])
def test_m1_verify_tells_that_the_node_would_serve_a_bundle_without_a_spare_file_that_is_gone(
    bundle: Path, run: Run, strategy: str, name: str
) -> None:
    described = json.loads((bundle / 'model.json').read_text())
    described['artefacts'].append({**described['artefacts'][0], 'strategy': strategy, 'path': name})
    (bundle / 'model.json').write_text(json.dumps(described))
    status, out, _ = run('verify', bundle)
    assert status == 1 and f'REFUSED  artefact  {bundle / name}' in out
    assert f'ok       served    {bundle}\n' in out
    assert out.count('REFUSED') == 1


def test_m1_verify_tells_of_artefacts_of_other_weights(bundle: Path, run: Run) -> None:
    described = json.loads((bundle / 'model.json').read_text())
    described['artefacts'].append({**described['artefacts'][0], 'weights_digest': f'sha256:{"0" * 64}'})
    (bundle / 'model.json').write_text(json.dumps(described))
    status, out, _ = run('verify', bundle)
    assert status == 1
    assert 'the node will not use it' in out


def test_m1_verify_names_the_answer_that_a_wrong_serving_path_once_gave(bundle: Path, run: Run) -> None:
    """All digests hold and the file loads; only plain session.run knows that one answer to one picture is wrong."""
    made = ModelBundle.load(bundle)
    golden = {
        case.name: (made.golden_inputs(index), made.golden_outputs(index)) for index, case in enumerate(made.golden)
    }
    golden['checkerboard'] = (golden['checkerboard'][0], golden['stripes'][1])
    write_bundle(
        bundle, name=made.name, weights_digest=made.weights_digest, inputs=made.inputs, outputs=made.outputs,
        preprocessing=made.preprocessing, artefacts=made.artefacts, rules=made.rules, golden=golden,
    )  # fmt: skip
    status, out, _ = run('verify', bundle)
    assert status == 1 and out.endswith('16 checked, 2 refused\n')
    assert "'checkerboard': output 'features'" in out and "'stripes'" not in out
    assert run('verify', '--digests-only', bundle)[0] == 0


def test_m1_verify_names_the_dice_in_a_bundle(bundle: Path, run: Run) -> None:
    model = onnx.load(bundle / 'net.onnx')
    model.graph.node[0].output[0] = 'exact'
    model.graph.node.append(helper.make_node('RandomNormalLike', ['exact'], ['noise'], name='dice', scale=1e-6))
    model.graph.node.append(helper.make_node('Add', ['exact', 'noise'], ['features']))
    (bundle / 'net.onnx').write_bytes(model.SerializeToString())
    described = json.loads((bundle / 'model.json').read_text())
    described['artefacts'][0]['sha256'] = file_sha256(bundle / 'net.onnx')
    (bundle / 'model.json').write_text(json.dumps(described))
    for options in ((), ('--digests-only',)):
        status, out, _ = run('verify', *options, bundle)
        assert status == 1 and "RandomNormalLike 'dice'" in out


def test_m1_bundle_takes_pictures_of_the_user(tmp_path: Path, run: Run) -> None:
    picture = noise_picture(100, 80, 4)
    assert cv2.imwrite(str(tmp_path / 'over the field.png'), picture[:, :, ::-1])
    status, out, _ = run('bundle', saved(tmp_path), '--output', tmp_path / 'bundle',
                         '--golden-image', tmp_path / 'over the field.png', '--json')  # fmt: skip
    assert status == 0
    assert json.loads(out)['model']['golden'][0]['name'] == 'image1-over_the_field'
    expected = np.zeros(SHAPE, np.float32)
    Preprocessor(PreprocessingSpec(width=32, height=24)).run(Pixels(picture, 'rgb'), expected)
    assert np.array_equal(ModelBundle.load(tmp_path / 'bundle').golden_inputs()['image'], expected)


def test_r4_verify_looks_through_torch_archives(bundle: Path, run: Run) -> None:
    """R-4: an archive that torch must not open is refused here too, under a digest that holds."""
    (bundle / 'net.pt2').write_bytes(b'\x80\x04N.')
    described = json.loads((bundle / 'model.json').read_text())
    digest = hashlib.sha256(b'\x80\x04N.').hexdigest()
    artefact = {**described['artefacts'][0], 'strategy': 'pytorch_fp16', 'path': 'net.pt2', 'sha256': digest}
    described['artefacts'].append(artefact)
    (bundle / 'model.json').write_text(json.dumps(described))
    status, out, _ = run('verify', bundle, '--json')
    assert (status, verdicts(out)['net.pt2']) == (1, False)


def test_m1_bundle_by_command_line(tmp_path: Path, run: Run) -> None:
    model = saved(tmp_path, network(['batch', 3, 'height', 'width']))
    status, out, _ = run(
        'bundle', model, '--output', tmp_path / 'bundle', '--name', 'corners', '--input-size', '40x16',
        '--precision', 'fp32', '--resize', 'letterbox', '--colour', 'bgr', '--mean=-0.5,0,0.5', '--std', '0.5',
        '--scale', '1/127.5', '--pad-value', '114', '--seed', '4', '--interpolation', 'pil_bilinear',
        '--letterbox-anchor', 'top_left', '--letterbox-scaling', 'shrink',
        '--rule', 'features=matched_distance,max_distance=2,min_fraction=0.9', '--json',
    )  # fmt: skip
    assert status == 0
    told = json.loads(out)
    assert told['model'] == json.loads((tmp_path / 'bundle' / 'model.json').read_text())
    assert told['model']['name'] == 'corners'
    assert told['model']['inputs'][0]['shape'] == [1, 3, 16, 40]
    assert told['model']['preprocessing'] == {
        'width': 40, 'height': 16, 'resize': 'letterbox', 'colour': 'bgr', 'mean': [-0.5, 0.0, 0.5],
        'std': [0.5], 'scale': 1 / 127.5, 'layout': 'nchw', 'dtype': 'float32', 'pad_value': 114.0,
        'interpolation': 'pil_bilinear', 'letterbox_anchor': 'top_left', 'letterbox_scaling': 'shrink',
    }  # fmt: skip
    assert told['model']['rules'] == {
        'features': {'kind': 'matched_distance', 'max_distance': 2.0, 'min_fraction': 0.9}
    }
    assert len(told['notes']) == 1


def test_m1_bundle_with_every_axis_given(tmp_path: Path, run: Run) -> None:
    model = saved(tmp_path, network(['batch', 3, 'height', 'width']))
    assert run('bundle', model, '--output', tmp_path / 'b', '--input-size', 'image=1x3x16x40')[0] == 0
    assert ModelBundle.load(tmp_path / 'b').inputs[0].shape == (1, 3, 16, 40)
