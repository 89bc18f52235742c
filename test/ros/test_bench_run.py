"""c7_bench end to end: real engine, real processes, real DDS; every frame accounted for, nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gps_denied_c7.bench.cases import BARE, FORTY_LINES, IN_PROCESS, SHIPPED
from gps_denied_c7.bench.resources import cpu_seconds, descendants, memory_mb
from support.left_behind import processes_naming

pytestmark = pytest.mark.once

pytest.importorskip('onnxruntime')

needs_ros = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('rclpy', 'gps_denied_c7_msgs')),
    reason='needs rclpy and gps_denied_c7_msgs',
)
BENCH = [sys.executable, '-m', 'gps_denied_c7.bench.run']


@needs_ros
@pytest.mark.parametrize(
    ('case', 'repetitions', 'processes', 'limit'),
    [('480p_mono8_5ms', 1, 1, 'in the node outside the engine, p50'), ('5ms_6MB', 2, 2, 'lost by transport')],
)
def test_a_short_run_measures_everyone(tmp_path, case, repetitions, processes, limit):
    """One case: all answer over DDS, and report, tables and plot are written."""
    output = tmp_path / 'out'
    command = [*BENCH, '--output', str(output), '--only', case, '--seconds', '0.5', '--repetitions', str(repetitions)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((output / 'report.json').read_text())
    [case] = report['cases']
    results = case['results']
    assert set(results) == {BARE, FORTY_LINES, IN_PROCESS, SHIPPED}
    assert results[BARE]['latency']['count'] > 5
    for name, result in results.items():
        if name != BARE:
            assert result['sent'] == result['answered'] + (result['dropped'] or 0) + result['lost']
            assert result['answered'] > 5 and result['latency']['p50'] > result['stages']['engine']['p50'] > 0
            assert result['memory_mb'] > 20 and result['cpu_ms_per_answer']['contestant'] > 0
            assert (result['start_s'] or 0) > 0 if name == SHIPPED else result['start_s'] is None
            assert len(result['p50_by_repetition']) == repetitions
            assert len(list(output.glob(f'*/**/{name}.log'))) == processes
    assert results[SHIPPED]['dropped'] is not None and results[FORTY_LINES]['dropped'] is None
    assert {'latency p50 / forty lines', limit} <= {one['what'] for one in report['limits']}
    assert 'this node as shipped' in (output / 'report.md').read_text()
    assert (output / 'latency.png').stat().st_size > 1000
    assert processes_naming(output) == []


@needs_ros
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_that_is_stopped_ends_what_it_started(tmp_path, number):
    """While its camera waits for a node that has just been started, and is ended first."""
    output = tmp_path / 'out'
    command = [*BENCH, '--output', str(output), '--only', 'default_transport']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        deadline = time.monotonic() + 60.0
        while not any(log.stat().st_size for log in output.glob('*/**/node.log')):
            assert run.poll() is None and time.monotonic() < deadline, 'no node was started'
            time.sleep(0.02)
        run.send_signal(number)
        said, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + number and 'Traceback' not in said, said
    assert processes_naming(output) == []


def test_what_is_not_the_benchmarks_is_left_alone(tmp_path):
    if importlib.util.find_spec('rclpy') is None:
        pytest.skip('needs rclpy')
    (tmp_path / 'precious').write_text('kept')
    run = subprocess.run([*BENCH, '--output', str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert 'not made by c7_bench' in run.stderr
    assert (tmp_path / 'precious').read_text() == 'kept'


def test_an_unknown_case_is_refused(tmp_path):
    command = [*BENCH, '--only', 'no such case', '--output', str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr == "c7_bench: no case name contains 'no such case'; --list shows the names.\n"


@pytest.mark.parametrize('option', [('--repetitions', '0'), ('--seconds', '-1'), ('--seconds', 'nan')])
def test_nothing_is_measured_for_no_time(capsys, option):
    from gps_denied_c7.bench import run

    with pytest.raises(SystemExit):
        run.main([*option])
    assert 'is not above 0' in capsys.readouterr().err


@pytest.mark.parametrize('latency', ['-1', '1000001', 'fast'])
def test_no_latency_of_cores_that_the_kernel_does_not_take(capsys, latency):
    from gps_denied_c7.bench import run

    with pytest.raises(SystemExit):
        run.main(['--cpu-wakeup-latency-us', latency])
    error = capsys.readouterr().err
    assert '--cpu-wakeup-latency-us' in error and 'is not a whole number from 0 to 1000000' in error


def test_cores_are_held_awake_for_everybody_while_they_are_measured(monkeypatch, tmp_path, capsys):
    from gps_denied_c7.bench import run
    from gps_denied_c7.demo import child_process
    from gps_denied_c7.monitoring.cpu_latency import CpuLatencyError, CpuLatencyRequest

    asked = []
    monkeypatch.setattr(CpuLatencyRequest, 'hold', lambda self, latency_us: asked.append(latency_us))
    monkeypatch.setattr(CpuLatencyRequest, 'drop', lambda self: asked.append('dropped'))
    options = run.BenchOptions(output=tmp_path / 'out', cases=(), domain_id=1, cpu_wakeup_latency_us=0)
    assert '0 µs' in run.run_bench(options, print).facts['idle cores']
    assert asked == [0, 'dropped']

    def refuse(self, latency_us):
        raise CpuLatencyError('not here.')

    monkeypatch.setattr(CpuLatencyRequest, 'hold', refuse)
    monkeypatch.setattr(child_process.signal, 'signal', lambda number, handler: None)
    before = (tmp_path / 'out' / 'report.json').read_bytes()
    assert run.main(['--cpu-wakeup-latency-us', '20', '--output', str(tmp_path / 'out')]) == 2
    assert 'not here' in capsys.readouterr().err
    assert (tmp_path / 'out' / 'report.json').read_bytes() == before, 'an earlier run is replaced by one that begins'


@pytest.fixture
def ran(monkeypatch):
    """The options of each run that the command line asks for; nothing is measured."""
    from gps_denied_c7.bench import run
    from gps_denied_c7.demo import child_process

    ran = []
    monkeypatch.setattr(child_process.signal, 'signal', lambda number, handler: None)
    monkeypatch.setattr(
        run, 'run_bench', lambda options, say: ran.append(options) or run.BenchReport((), {}, 0.0, {})
    )  # fmt: skip
    return ran


def test_every_form_has_cases_and_settings_of_its_own(ran, capsys, tmp_path):
    from gps_denied_c7.bench import run
    from gps_denied_c7.bench.cases import full_cases, quick_cases, scaling_cases

    for form, cases in (('quick', quick_cases()), ('scaling', scaling_cases()), ('full', full_cases())):
        assert run.main([f'--{form}', '--list']) == 0
        assert capsys.readouterr().out.splitlines() == [case.name for case in cases]
        assert run.main([f'--{form}', '--output', str(tmp_path)]) == 0
        capsys.readouterr()
        assert ran[-1].cases == cases and ran[-1].form == form
    assert (ran[1].seconds, ran[1].repetitions) == (ran[0].seconds, ran[0].repetitions)
    with pytest.raises(SystemExit):
        run.main(['--scaling', '--full', '--list'])


def test_contestants_can_be_chosen(ran, capsys, tmp_path):
    from gps_denied_c7.bench import run

    assert run.main(['--output', str(tmp_path), '--contestants', SHIPPED, BARE]) == 0
    capsys.readouterr()
    # In the case's own order; the one with the default transport has the node alone.
    assert {case.contestants for case in ran[0].cases} == {(BARE, SHIPPED), (SHIPPED,)}
    assert run.main(['--output', str(tmp_path), '--contestants', FORTY_LINES, '--only', 'default_transport']) == 2
    assert run.main(['--output', str(tmp_path), '--contestants', BARE]) == 2, 'nobody would be sent anything'
    assert 'none of these --contestants takes images' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(['--contestants', 'nobody'])


def test_cases_are_chosen_by_name_or_by_part_of_it(capsys):
    """A whole name means that case alone, though the names of others begin with it."""
    from gps_denied_c7.bench import run

    def listed(*texts):
        assert run.main(['--full', '--list', '--only', *texts]) == 0
        return capsys.readouterr().out.split()

    one, others = '1080p_rgb8_5ms_small_30hz', listed('5ms_small_saturated')
    assert listed(one) == [one] and len(listed('1080p_rgb8_5ms_small_30h')) > 1
    assert len(others) > 1 and set(listed(one, '5ms_small_saturated')) == {one, *others}
    assert listed('rgb8', 'mono8', 'jpeg') == listed(''), 'each once, in the order of the matrix'


@pytest.mark.parametrize('maps', [0, 1, 5])
def test_networks_are_reproducible_finite_and_as_large_as_said(maps):
    from gps_denied_c7.bench.models import build_model, engine_session

    model = build_model(3, 30, dense_maps=maps)
    assert model == build_model(3, 30, dense_maps=maps)
    session = engine_session(model)
    outputs = session.run(None, {'image': np.random.default_rng(0).random((1, 3, 480, 640), np.float32)})
    assert all(np.isfinite(output).all() and output.std() > 0 for output in outputs)
    assert sum(output.nbytes for output in outputs) == 1024 + maps * 640 * 480 * 4


def test_a_network_is_stored_by_the_outputs_it_has(tmp_path):
    from gps_denied_c7.bench.models import calibrated_model

    made = [calibrated_model(tmp_path, 1, 1, dense_maps=maps, seconds=0.01) for maps in (0, 1, 2)]
    assert [model.path.name.split('_')[2] for model in made] == ['small', '1maps', '2maps']
    assert all(model.path.exists() for model in made)


def test_a_run_takes_the_networks_of_an_earlier_one(tmp_path):
    from gps_denied_c7.bench.models import calibrated_model
    from gps_denied_c7.demo.child_process import DemoError

    first, second = tmp_path / 'first', tmp_path / 'second'
    first.mkdir(), second.mkdir()
    made = calibrated_model(first, 1, 1, dense_maps=1, seconds=0.01)
    again = calibrated_model(second, 1, 1, dense_maps=1, earlier=first)
    assert again.path.parent == second and again.path.read_bytes() == made.path.read_bytes()
    assert again.engine_ms == pytest.approx(made.engine_ms, abs=1e-3)
    with pytest.raises(DemoError, match='bench_3x1ms_1maps'):
        calibrated_model(second, 3, 1, dense_maps=1, earlier=first)


@needs_ros
def test_a_run_does_not_replace_the_networks_that_it_is_to_take(tmp_path):
    run = subprocess.run(
        [*BENCH, '--output', str(tmp_path), '--networks', str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2 and 'change --output' in run.stderr


def test_layers_follow_from_two_timings():
    from gps_denied_c7.bench.models import layers_for

    assert layers_for(30.0, ((4, 2.0), (24, 12.0))) == 60
    assert layers_for(1.0, ((4, 6.0), (24, 12.0))) == 1


def test_engine_options_are_the_nodes(monkeypatch, tmp_path):
    """The bare loop and the forty lines run the engine with the options that the node gives it by default."""
    import onnxruntime

    from gps_denied_c7.bench.models import build_model, engine_session
    from gps_denied_c7.config import C7InferenceConfig
    from gps_denied_c7.model.bundle import ModelBundle
    from gps_denied_c7.runtimes.protocol import BuildConfig, ProviderSet
    from gps_denied_c7.runtimes.registry import create_runtime

    made = []

    class Options(onnxruntime.SessionOptions):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(onnxruntime, 'SessionOptions', Options)
    model = build_model(1, 1, dense_maps=0)
    engine_session(model)
    (tmp_path / 'model.onnx').write_bytes(model)
    runtime = create_runtime('onnx_trt_ep', C7InferenceConfig(), providers=ProviderSet.CPU)
    entry = runtime.compile_engine(ModelBundle.load(tmp_path / 'model.onnx'), BuildConfig())
    runtime.release_engine(runtime.deserialize_engine(entry))
    ours, nodes = made[0], made[-1]
    assert len(made) == 2
    for name in ('intra_op_num_threads', 'inter_op_num_threads', 'execution_mode', 'graph_optimization_level'):
        assert getattr(ours, name) == getattr(nodes, name)
    spinning = 'session.intra_op.allow_spinning'
    assert ours.get_session_config_entry(spinning) == nodes.get_session_config_entry(spinning)


def test_time_and_memory_of_a_process_include_its_children():
    burn = 'import time; end = time.process_time() + 0.2\nwhile time.process_time() < end: pass\ninput()'
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {burn!r}]); sys.stdin.read()'
    process = subprocess.Popen([sys.executable, '-c', parent], stdin=subprocess.PIPE, bufsize=0)
    try:
        while cpu_seconds(process.pid) < 0.2:
            assert process.poll() is None
        assert len(descendants(process.pid)) == 2
        assert memory_mb(process.pid) > 1
        process.stdin.write(b'\n')
        while len(descendants(process.pid)) == 2:
            time.sleep(0.01)
        # A worker that ends takes none of its time with it: a node with one less would seem to have given some back.
        assert cpu_seconds(process.pid) >= 0.2
    finally:
        process.communicate()
    assert cpu_seconds(process.pid) == 0
