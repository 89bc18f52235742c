"""
R-3 on a real GPU: providers asked and active, the gate, the caches, agreement and speed.

Every load runs in a process of its own (onnx_child.py): so a broken CUDA context costs one test, and cold is cold.
C7_GPU_COLD_N and C7_GPU_WARM_N say how often a load is measured; a cold one takes about 25 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.runtimes.ort.providers import CPU, CUDA, TENSORRT
from gps_denied_c7.runtimes.ort.runtime import OnnxTrtEpRuntime
from gps_denied_c7.runtimes.protocol import BuildConfig, ProviderSet
from support import conformance
from support.gpu.results import percentiles, record
from support.gpu.superpoint import write_superpoint
from support.onnx_models import SHAPE, arithmetic, bundle_around, write_model
from support.source_tree import TESTS

pytest.importorskip('onnxruntime')

CHILD = TESTS / 'support' / 'gpu' / 'onnx_child.py'
COLD_N = int(os.environ.get('C7_GPU_COLD_N', '3'))
# AC-2: one warm-up, then three requests of different kinds, whose bound runs are compared with plain ones.
LOAD_RUNS = 4
WARM_N = int(os.environ.get('C7_GPU_WARM_N', '10'))
PLAIN_N = min(3, WARM_N)
RUNS = 300
LIMIT_S = 300

OPTIONS = {'trt_engine_cache_enable', 'trt_engine_cache_path', 'trt_max_workspace_size', 'trt_fp16_enable'}


def child(folder: Path, *, env: Mapping[str, str] | None = None, **task: Any) -> dict[str, Any]:
    """Run one task in a process of its own and return its answer."""
    out = folder / 'answer.json'
    out.unlink(missing_ok=True)
    process = subprocess.run(
        [sys.executable, str(CHILD), str(out), json.dumps(task)],
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT_S,
        check=False,
    )
    text = process.stdout.decode(errors='replace')
    assert process.returncode == 0, f'{task} ended with {process.returncode}:\n{text[-6000:]}'
    answer: dict[str, Any] = json.loads(out.read_text())
    return answer


def environment(**changes: str) -> dict[str, str]:
    """Return this process's environment for a child that finds the same modules."""
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in sys.path if path), **changes}


def expect(seconds: float, what: str) -> None:
    print(f'\n{what}: about {seconds:.0f} s', file=sys.stderr, flush=True)


@pytest.fixture(scope='module')
def stack(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What this Python's ONNX Runtime offers."""
    found = child(tmp_path_factory.mktemp('probe'), do='probe')
    record('r3_stack', **{name: value for name, value in found.items() if name != 'log'})
    if CUDA not in found['providers']:
        pytest.skip(f'onnxruntime {found["onnxruntime"]} here has only {found["providers"]}')
    return found


@pytest.fixture(scope='module')
def tensorrt(stack: dict[str, Any]) -> str:
    """The TensorRT that ONNX Runtime loads."""
    if 'tensorrt' not in stack:
        pytest.skip(f'no TensorRT provider: {stack.get("tensorrt_error")}')
    return str(stack['tensorrt'])


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('superpoint')
    write_superpoint(root / 'superpoint.onnx')
    return root


@pytest.fixture(scope='module')
def cold(tensorrt: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Loads that had to build; the last one fills the caches of ``root``."""
    expect(25 * COLD_N, f'{COLD_N} cold loads')
    answers = []
    for index in range(COLD_N):
        folder = root if index == COLD_N - 1 else tmp_path_factory.mktemp('cold')
        answers.append(
            child(
                folder,
                do='load',
                root=str(folder),
                path=str(root / 'superpoint.onnx'),
                build=True,
                save=str(folder / 'tensorrt_ep.npz'),
            )
        )
    return answers


@pytest.fixture(scope='module')
def by_provider(tensorrt: str, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A load that had to build where Python has no TensorRT, and the folder of its caches."""
    expect(40, "a cold load that ONNX Runtime's provider builds for")
    folder = tmp_path_factory.mktemp('by_provider')
    path = str(root / 'superpoint.onnx')
    answer = child(
        folder, do='load', root=str(folder), path=path, build=True, own_builder=False, save=str(folder / 'answers.npz')
    )
    assert any('builds the engine itself' in note for note in answer['notes'])
    return folder, answer


@pytest.fixture(scope='module')
def direct(tensorrt: str, root: Path) -> dict[str, Any]:
    """An engine that TensorRT itself built, and its answers."""
    pytest.importorskip('gps_denied_c7.runtimes.trt.runtime')
    pytest.importorskip('tensorrt', reason='TensorRT for Python is not installed')
    expect(20, 'a build with TensorRT itself')
    return child(
        root, do='direct', root=str(root), path=str(root / 'superpoint.onnx'), runs=RUNS, save=str(root / 'direct.npz')
    )


@pytest.fixture(scope='module')
def reference(stack: dict[str, Any], root: Path) -> dict[str, NDArray]:
    """The answers of the CPU in FP32."""
    answer = child(
        root,
        do='load',
        root=str(root),
        path=str(root / 'superpoint.onnx'),
        providers='cpu',
        runs=20,
        save=str(root / 'cpu.npz'),
    )
    assert answer['active'] == CPU
    record('r3_cpu_infer', **percentiles(answer['infer_s']), session_run=percentiles(answer['session_run_s']))
    return arrays(root / 'cpu.npz')


def arrays(path: Path) -> dict[str, NDArray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def worst(found: Mapping[str, NDArray], wanted: Mapping[str, NDArray]) -> dict[str, float]:
    """Return the largest difference of each output, in parts of the wanted one's range."""
    assert list(found) == list(wanted)
    return {
        name: float(np.abs(found[name].astype(np.float64) - wanted[name]).max() / np.ptp(wanted[name]))
        for name in wanted
    }


# --- AC-2, AC-8, G-2, G-4: models ---------------------------------------------------------------------


def test_ac2_cold_model_asks_for_all_three_and_is_built_once(cold: list[dict[str, Any]]) -> None:
    for answer in cold:
        assert answer['seen']['providers'] == [[TENSORRT, CUDA, CPU]]
        assert answer['requested'] == [TENSORRT, CUDA, CPU]
        assert answer['warm_ups'] == LOAD_RUNS
        assert answer['active'] == TENSORRT, answer['notes']
        assert answer['cpu_nodes'] == 0
        assert set(answer['seen']['options'][0][TENSORRT]) == OPTIONS
        # TensorRT's own builder made what is served.
        assert answer['seen']['engine'] == [True], answer['notes']
    record(
        'r3_session_cold',
        load=percentiles([answer['load_s'] for answer in cold], 's'),
        made=percentiles([answer['seen']['made_s'][0] for answer in cold], 's'),
        import_s=round(cold[0]['import_s'], 3),
        memory=cold[-1]['memory'],
        io=cold[-1]['io'],
        notes=cold[-1]['notes'],
    )


def test_g2_what_was_built_is_listed(cold: list[dict[str, Any]], root: Path, tensorrt: str) -> None:
    from gps_denied_c7.engines.ort_store import LISTING_NAME, CacheListing

    (directory,) = (root / 'ort_trt_cache').iterdir()
    listing = CacheListing.from_json((directory / LISTING_NAME).read_bytes())
    assert listing.built_for.tensorrt == tensorrt
    assert listing.whole_graph is not None
    record(
        'r3_cache',
        files={file.name: file.size for file in listing.files},
        gpu=listing.built_for.gpu,
        sm=listing.built_for.sm,
        driver=listing.built_for.driver,
    )


def test_ac2_warm_model_is_served_as_epcontext_without_a_build(cold: list[dict[str, Any]], root: Path) -> None:
    expect(4 * WARM_N, f'{WARM_N} warm loads')
    answers = [
        child(root, do='load', root=str(root), path=str(root / 'superpoint.onnx'), save=str(root / 'epcontext.npz'))
        for _ in range(WARM_N)
    ]
    for answer in answers:
        assert answer['seen']['providers'] == [[TENSORRT, CUDA, CPU]]
        assert answer['seen']['engine'] == [True]
        assert answer['warm_ups'] == LOAD_RUNS
        assert answer['active'] == TENSORRT, answer['notes']
    record(
        'r3_session_warm_onnx',
        load=percentiles([answer['load_s'] for answer in answers], 's'),
        made=percentiles([answer['seen']['made_s'][0] for answer in answers], 's'),
        import_s=round(answers[0]['import_s'], 3),
        io=answers[0]['io'],
        notes=answers[0]['notes'],
    )
    difference = worst(arrays(root / 'epcontext.npz'), arrays(root / 'tensorrt_ep.npz'))
    record('r3_kept_engine_against_the_one_just_built', **difference)
    assert all(value < 0.01 for value in difference.values())


def test_g2_without_tensorrt_for_python_the_provider_builds(by_provider: tuple[Path, dict[str, Any]]) -> None:
    folder, answer = by_provider
    assert answer['active'] == TENSORRT, answer['notes']
    assert answer['seen']['engine'] == [False]
    assert list(folder.glob('ort_trt_cache/*/TensorrtExecutionProvider_*.engine'))
    record('r3_session_cold_by_provider', load=percentiles([answer['load_s']], 's'), notes=answer['notes'])


def test_ac4_tensorrts_engine_answers_as_the_providers_does(
    cold: list[dict[str, Any]], by_provider: tuple[Path, dict[str, Any]], root: Path
) -> None:
    difference = worst(arrays(root / 'tensorrt_ep.npz'), arrays(by_provider[0] / 'answers.npz'))
    record('r3_engine_of_tensorrt_against_the_providers', **difference)
    assert all(value < 0.01 for value in difference.values())


def test_g2_plain_warm_cache_takes_longer_and_builds_nothing(
    by_provider: tuple[Path, dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    """The same cache, its listing made to say that the engine is not the whole model."""
    import shutil
    from dataclasses import replace

    from gps_denied_c7.engines.ort_store import LISTING_NAME, CacheListing

    expect(12 * PLAIN_N, f'{PLAIN_N} loads from the plain cache')
    shutil.copytree(by_provider[0] / 'ort_trt_cache', tmp_path / 'ort_trt_cache')
    (directory,) = (tmp_path / 'ort_trt_cache').iterdir()
    listing = CacheListing.from_json((directory / LISTING_NAME).read_bytes())
    (directory / LISTING_NAME).write_bytes(replace(listing, whole_graph=None).to_json())
    answers = [
        child(tmp_path, do='load', root=str(tmp_path), path=str(root / 'superpoint.onnx')) for _ in range(PLAIN_N)
    ]
    for answer in answers:
        assert answer['seen']['engine'] == [False]
        assert answer['active'] == TENSORRT, answer['notes']
    assert sorted(path.name for path in directory.iterdir()) == sorted(
        [LISTING_NAME, *(file.name for file in listing.files)]
    )
    record(
        'r3_session_warm_plain_cache',
        load=percentiles([answer['load_s'] for answer in answers], 's'),
        made=percentiles([answer['seen']['made_s'][0] for answer in answers], 's'),
    )


def test_g2_damaged_cache_is_deleted_and_never_loaded(cold: list[dict[str, Any]], root: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(root / 'ort_trt_cache', tmp_path / 'ort_trt_cache')
    (engine,) = (tmp_path / 'ort_trt_cache').glob('*/*.engine')
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)
    expect(30, 'a load on the CUDA provider, which compiles kernels the first time')
    answer = child(tmp_path, do='load', root=str(tmp_path), path=str(root / 'superpoint.onnx'))
    assert answer['seen']['providers'] == [[CUDA, CPU]]
    assert answer['active'] == CUDA
    assert not engine.parent.exists()
    assert any('sha256' in note and 'deleted' in note for note in answer['notes'])


@pytest.mark.parametrize('providers', [(TENSORRT,), (TENSORRT, CUDA, CPU)], ids=['alone', 'with CUDA and CPU'])
@pytest.mark.parametrize('unoptimised', [True, False], ids=['unoptimised', 'optimised'])
def test_g4_engine_inside_the_model_against_a_private_copy(
    cold: list[dict[str, Any]], root: Path, providers: tuple[str, ...], unoptimised: bool
) -> None:
    expect(16, 'four sessions for each mode')
    figures: dict[str, Any] = {}
    for mode in (1, 0):
        answers = [
            child(root, do='embed', root=str(root), mode=mode, providers=providers, unoptimised=unoptimised)
            for _ in range(3)
        ]
        figures[f'embed_mode_{mode}'] = percentiles([answer['made_s'] for answer in answers], 's')
        figures['plan_bytes'] = answers[0]['plan_bytes']
    record(f'r3_embed_modes_{len(providers)}_providers_{"un" if unoptimised else ""}optimised', **figures)


# --- AC-3: engines -----------------------------------------------------------------------------------


def test_ac3_engine_that_tensorrt_built_passes_the_gate_and_runs_as_epcontext(
    direct: dict[str, Any], root: Path
) -> None:
    expect(4 * WARM_N, f'{WARM_N} loads of an .engine')
    answers = [
        child(
            root,
            do='load',
            root=str(root),
            path=direct['engine'],
            sha256=direct['sha256'],
            save=str(root / 'engine.npz'),
            runs=RUNS if index == 0 else 0,
        )
        for index in range(WARM_N)
    ]
    for answer in answers:
        assert answer['seen']['providers'] == [[TENSORRT]]
        assert answer['seen']['engine'] == [True]
        assert answer['active'] == TENSORRT
        assert answer['warm_ups'] == LOAD_RUNS
    record(
        'r3_session_engine',
        load=percentiles([answer['load_s'] for answer in answers], 's'),
        made=percentiles([answer['seen']['made_s'][0] for answer in answers], 's'),
        infer=percentiles(answers[0]['infer_s']),
        memory=answers[-1]['memory'],
    )
    difference = worst(arrays(root / 'engine.npz'), arrays(root / 'direct.npz'))
    record('r3_engine_against_direct', **difference)
    assert all(value < 0.01 for value in difference.values())


def test_ac3_refused_engine_leaves_onnxruntime_untouched(direct: dict[str, Any], root: Path, tmp_path: Path) -> None:
    engine = Path(direct['engine'])
    for path in (engine, engine.with_name(f'{engine.name}.json')):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / path.name).chmod(0o644)
    content = bytearray(engine.read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / engine.name).write_bytes(content)
    answer = child(tmp_path, do='load', root=str(tmp_path), path=str(tmp_path / engine.name), touch=False)
    assert answer['error'] == 'EngineSchemaMismatchError'
    assert 'engine_sha256' in answer['message']
    assert answer['touched'] is False


# --- AC-4: agreement ---------------------------------------------------------------------------------


def test_ac4_tensorrt_provider_in_fp16_agrees_with_the_cpu_in_fp32(
    cold: list[dict[str, Any]], reference: dict[str, NDArray], root: Path
) -> None:
    difference = worst(arrays(root / 'tensorrt_ep.npz'), reference)
    record('r3_fp16_tensorrt_ep_against_cpu_fp32', **difference)
    assert all(value < 0.01 for value in difference.values())


def test_ac4_tensorrt_provider_agrees_with_tensorrt_direct(
    cold: list[dict[str, Any]], direct: dict[str, Any], reference: dict[str, NDArray], root: Path
) -> None:
    found = arrays(root / 'direct.npz')
    figures = {'against_direct': worst(arrays(root / 'tensorrt_ep.npz'), found), 'direct_cpu': worst(found, reference)}
    record('r3_fp16_tensorrt_ep_against_direct', **figures)
    assert all(value < 0.01 for part in figures.values() for value in part.values())


def test_ac4_cuda_provider_agrees_with_the_cpu(
    stack: dict[str, Any], reference: dict[str, NDArray], root: Path, tmp_path: Path
) -> None:
    expect(40, 'the CUDA provider, which may compile kernels first')
    answer = child(
        tmp_path,
        do='load',
        root=str(tmp_path),
        path=str(root / 'superpoint.onnx'),
        runs=RUNS,
        save=str(tmp_path / 'cuda.npz'),
    )
    assert answer['seen']['providers'] == [[CUDA, CPU]]
    assert answer['active'] == CUDA, answer['notes']
    assert answer['cpu_nodes'] == 0
    record(
        'r3_cuda_infer',
        infer=percentiles(answer['infer_s']),
        session_run=percentiles(answer['session_run_s']),
        load_s=round(answer['load_s'], 2),
        first_run_s=round(answer['first_run_s'], 2),
        memory=answer['memory'],
        io=answer['io'],
        notes=answer['notes'],
    )
    difference = worst(arrays(tmp_path / 'cuda.npz'), reference)
    record('r3_cuda_against_cpu_fp32', **difference)
    # TF32 convolutions round to ten bits, as float16 does.
    assert all(value < 0.01 for value in difference.values())


# --- speed -------------------------------------------------------------------------------------------


def test_nfr_bound_requests_against_session_run_and_tensorrt_direct(
    cold: list[dict[str, Any]], direct: dict[str, Any], root: Path
) -> None:
    answer = child(root, do='load', root=str(root), path=str(root / 'superpoint.onnx'), runs=RUNS)
    assert answer['active'] == TENSORRT, answer['notes']
    figures = {
        'infer': percentiles(answer['infer_s']),
        'session_run': percentiles(answer['session_run_s']),
        'direct': percentiles(direct['infer_s']),
    }
    ratio = figures['infer']['p50_ms'] / figures['direct']['p50_ms']
    record('r3_tensorrt_ep_infer', **figures, ratio_to_direct=round(ratio, 3), io=answer['io'], notes=answer['notes'])


# --- AC-6, Risk-2: libraries that are missing or of another version ----------------------------------


def without_tensorrt(folder: Path) -> dict[str, str]:
    """Return an environment in which the loader finds no TensorRT."""
    paths = [path for path in os.environ.get('LD_LIBRARY_PATH', '').split(os.pathsep) if path]
    kept = [path for path in paths if not list(Path(path).glob('libnvinfer.so*'))]
    env = {'LD_LIBRARY_PATH': os.pathsep.join(kept)}
    if 'tensorrt' in child(folder, env=env, do='probe'):
        pytest.skip('TensorRT is found even without LD_LIBRARY_PATH')
    return env


@pytest.mark.parametrize('build', [True, False])
def test_ac6_missing_tensorrt_gives_cuda_and_an_info_line(
    stack: dict[str, Any], root: Path, tmp_path: Path, build: bool
) -> None:
    env = without_tensorrt(tmp_path)
    expect(30, 'a load on the CUDA provider')
    answer = child(tmp_path, env=env, do='load', root=str(tmp_path), path=str(root / 'superpoint.onnx'), build=build)
    asked = [[TENSORRT, CUDA, CPU], [CUDA, CPU]] if build else [[CUDA, CPU]]
    assert answer['seen']['providers'] == asked
    assert answer['active'] == CUDA, answer['notes']
    assert any(TENSORRT in note for note in answer['notes'])
    assert not list((tmp_path / 'ort_trt_cache').glob('*'))
    if build:
        lines = [line for line in answer['log'] if line.startswith('INFO') and CUDA in line and TENSORRT in line]
        assert len(lines) == 1
    record(f'r3_missing_tensorrt_build_{build}', notes=answer['notes'])


def test_ac6_warm_cache_without_tensorrt_gives_cuda(cold: list[dict[str, Any]], root: Path, tmp_path: Path) -> None:
    env = without_tensorrt(tmp_path)
    answer = child(root, env=env, do='load', root=str(root), path=str(root / 'superpoint.onnx'))
    assert answer['active'] == CUDA, answer['notes']
    # A TensorRT that is gone for a moment must not cost the engines.
    assert list((root / 'ort_trt_cache').glob('*/*.engine'))


def test_risk2_another_tensorrt_under_the_wanted_name_gives_cuda(
    stack: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    """The library that the provider names is there, and is another version's, or TensorRT's in name alone."""
    import re

    import onnxruntime

    provider = Path(onnxruntime.__file__).parent / 'capi' / 'libonnxruntime_providers_tensorrt.so'
    needed = re.search(rb'libnvinfer\.so\.\d+', provider.read_bytes())
    if needed is None:
        pytest.skip('this onnxruntime has no TensorRT provider')
    paths = [Path(path) for path in os.environ.get('LD_LIBRARY_PATH', '').split(os.pathsep) if path]
    others = [path for folder in paths for path in sorted(folder.glob('libnvinfer.so.*'))]
    others = [path for path in others if path.name != needed[0].decode()]
    others += [path for folder in paths for path in sorted(folder.glob('libnvinfer_plugin.so.*'))]
    others += [path for folder in paths for path in sorted(folder.glob('libcudart.so.*'))]
    others += sorted(Path('/usr/lib/x86_64-linux-gnu').glob('libm.so.6'))
    if not others:
        pytest.skip('no other library to put in its place')
    wrong = tmp_path / 'wrong'
    wrong.mkdir()
    (wrong / needed[0].decode()).symlink_to(others[0].resolve())
    env = {'LD_LIBRARY_PATH': os.pathsep.join([str(wrong), os.environ.get('LD_LIBRARY_PATH', '')])}
    answer = child(tmp_path, env=env, do='load', root=str(tmp_path), path=str(root / 'superpoint.onnx'), build=True)
    record('r3_mismatched_tensorrt', library=others[0].name, wanted=needed[0].decode(), notes=answer['notes'])
    assert answer['active'] == CUDA, answer['notes']
    assert any(TENSORRT in note for note in answer['notes'])


@pytest.mark.parametrize('build', [True, False])
def test_risk2_hidden_gpu_is_reported_and_flown_without(
    stack: dict[str, Any], root: Path, tmp_path: Path, build: bool
) -> None:
    task = {'do': 'load', 'root': str(tmp_path), 'path': str(root / 'superpoint.onnx'), 'build': build}
    env = {'CUDA_VISIBLE_DEVICES': ''}
    answer = child(tmp_path, env=env, **task, providers='any')
    assert answer['active'] == CPU
    assert answer['cpu_only']
    assert answer['warm_ups'] == LOAD_RUNS
    record(f'r3_hidden_gpu_build_{build}', notes=answer['notes'])
    for setting in ({'providers': 'gpu'}, {'providers': 'any', 'disallow_cpu': True}):
        refused = child(tmp_path, env=env, **task, **setting)
        assert refused['error'] == 'EngineDeserializeError'
        assert refused['seen']['run_s'] == []


def test_ac3_engine_without_a_visible_gpu_is_refused_without_a_crash(
    direct: dict[str, Any], root: Path, tmp_path: Path
) -> None:
    """TensorRT's deserialiser crashes on a host without a GPU; the gate needs one to know the host at all."""
    process = subprocess.run(
        [
            sys.executable,
            str(CHILD),
            str(tmp_path / 'answer.json'),
            json.dumps({'do': 'load', 'root': str(root), 'path': direct['engine']}),
        ],
        env={
            **os.environ,
            'PYTHONPATH': os.pathsep.join(path for path in sys.path if path),
            'CUDA_VISIBLE_DEVICES': '',
        },
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert process.returncode == 1
    assert b'GpuUnavailableError' in process.stderr


# --- conformance, in this process --------------------------------------------------------------------


@pytest.fixture(scope='module')
def in_process(stack: dict[str, Any]) -> None:
    """Load the CUDA libraries that pip installed, as each child does."""
    import onnxruntime

    if hasattr(onnxruntime, 'preload_dlls'):
        onnxruntime.preload_dlls()


@pytest.fixture(scope='module')
def arithmetic_cache(stack: dict[str, Any], in_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the engine of the conformance suite's model, where TensorRT is there to build it."""
    root = tmp_path_factory.mktemp('arithmetic')
    if 'tensorrt' in stack:
        model = bundle_around(write_model(root / 'arithmetic.onnx', arithmetic()), 'onnx_trt_ep')
        config = C7InferenceConfig(ort_trt_cache_dir=root / 'ort_trt_cache')
        runtime = OnnxTrtEpRuntime(config, providers=ProviderSet.GPU)
        runtime.release_engine(runtime.deserialize_engine(runtime.compile_engine(model, BuildConfig(allow_build=True))))
    return root


@pytest.fixture(params=[TENSORRT, CUDA])
def provider(request: pytest.FixtureRequest, stack: dict[str, Any]) -> str:
    if request.param == TENSORRT and 'tensorrt' not in stack:
        pytest.skip(f'no TensorRT provider: {stack.get("tensorrt_error")}')
    return str(request.param)


@pytest.fixture
def config(provider: str, arithmetic_cache: Path, tmp_path: Path) -> C7InferenceConfig:
    root = arithmetic_cache if provider == TENSORRT else tmp_path
    return C7InferenceConfig(engine_cache_dir=tmp_path / 'engine_cache', ort_trt_cache_dir=root / 'ort_trt_cache')


@pytest.fixture
def request_arrays() -> dict[str, NDArray]:
    return {'left': np.arange(12, dtype=np.float32).reshape(SHAPE), 'right': np.full(SHAPE, 2.0, np.float32)}


@pytest.fixture
def subject(provider: str, config: C7InferenceConfig, tmp_path: Path) -> conformance.Subject:
    """What the conformance suite runs on: the GPU rung, on each provider."""
    runtime = OnnxTrtEpRuntime(config, thermal=conformance.FixedThermal(), providers=ProviderSet.GPU)
    path = write_model(tmp_path / 'arithmetic.onnx', arithmetic())
    return conformance.Subject(runtime, bundle_around(path, 'onnx_trt_ep'))


def test_r1_conformance_runs_on_the_provider_that_it_names(subject: conformance.Subject, provider: str) -> None:
    facts = subject.load().facts
    assert facts.active_provider == provider, facts.notes


globals().update(conformance.suite())
