"""G-3, M-1: the c7_engine command line, as its user meets it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.manifest import HostProfile, manifest_path
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError, RuntimeUnavailableError
from gps_denied_c7.ground import build, compatibility
from gps_denied_c7.ground.cli import main
from gps_denied_c7.ground.inspect import inspect_engine
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.gpu import cuda
from gps_denied_c7.runtimes.protocol import BuildConfig, BuildProgress, EngineCacheEntry
from support.engine_cache_files import HOST, age, fake_plan, manifest_of, publish_engine, publish_ort_cache
from support.engine_command import Run, flip, verdicts
from support.small_networks import saved

COMMANDS = ('build', 'inspect', 'verify', 'sweep', 'bundle')

as_root = pytest.mark.skipif(os.geteuid() != 0, reason='only root can become another user')


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, 'gpu_devices', list)


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize('command', [(), *((name,) for name in COMMANDS)])
def test_g3_help_tells_the_exit_codes(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, '--help'])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert 'exit status:\n  0 ' in told
    assert max(len(line) for line in told.splitlines()) <= 115
    assert all(name in told for name in COMMANDS) or command


@pytest.mark.parametrize(
    'arguments',
    [
        (), ('fly',), ('build',), ('build', 'x.onnx', '--precision', 'fp8'), ('build', 'x.onnx', '--workspace', '0'),
        ('inspect',), ('verify',), ('sweep', '--older-than', '-1'), ('sweep', '--older-than', 'nan'),
        ('sweep', '--max-size', 'much'), ('sweep', '--max-size', '-1'), ('sweep', 'now'), ('bundle', 'x.onnx'),
        ('bundle', 'x.onnx', '--output', 'b', '--input-size', '640'),
        ('bundle', 'x.onnx', '--output', 'b', '--input-size', '1x3x4x5'),
        ('bundle', 'x.onnx', '--output', 'b', '--input-size', '0x480'),
        ('bundle', 'x.onnx', '--output', 'b', '--rule', 'scores'),
        ('bundle', 'x.onnx', '--output', 'b', '--rule', 'scores=allclose,rtol=0'),
        ('bundle', 'x.onnx', '--output', 'b', '--rule', 'scores=allclose,rtol=0,atol=x'),
        ('bundle', 'x.onnx', '--output', 'b', '--rule', 'scores=nearly,rtol=0,atol=1'),
        ('bundle', 'x.onnx', '--output', 'b', '--mean', '1,x'), ('bundle', 'x.onnx', '--output', 'b', '--scale', '1/0'),
    ],
)  # fmt: skip
def test_g3_wrong_command_lines_exit_with_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    assert 'usage: c7_engine' in capsys.readouterr().err


NO_NUMBERS = ('nan', 'inf', '1e400', '9' * 400 + 'e', '', ' 5', '5 ', '0x10', '1_000', '1/1e-320', '\u0663')


@pytest.mark.parametrize('text', NO_NUMBERS)
@pytest.mark.parametrize(
    'arguments',
    [
        ('build', 'x.onnx', '--workspace'), ('build', 'x.onnx', '--optimization-level'), ('sweep', '--older-than'),
        ('sweep', '--max-size'), ('verify', 'x.onnx', '--answer-timeout'), ('verify', 'x.onnx', '--input-size'),
        *(('bundle', 'x.onnx', '--output', 'b', f'--{name}') for name in (
            'seed', 'answer-timeout', 'scale', 'pad-value', 'mean', 'std', 'input-size',
            'rule=a=allclose,rtol=0,atol')),
    ],
    ids=lambda arguments: f'{arguments[0]} {arguments[-1]}',
)  # fmt: skip
def test_g3_text_that_is_not_a_number_exits_with_2(arguments: tuple[str, ...], text: str, run: Run) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments[:-1], f'{arguments[-1]}={text}')
    assert ended.value.code == 2


@pytest.mark.parametrize(
    'arguments',
    [
        ('build', 'x.onnx', '--workspace', '9' * 400), ('build', 'x.onnx', '--workspace', '1048576T'),
        ('sweep', '--max-size', '9' * 400), ('sweep', '--max-size', f'{"9" * 400}.5T'),
        ('build', 'x.onnx', '--optimization-level', '6'), ('bundle', 'x.onnx', '--output', 'b', '--seed', '-1'),
        ('bundle', 'x.onnx', '--output', 'b', '--seed', '4294967296'),
        ('bundle', 'x.onnx', '--output', 'b', '--seed', '9' * 400),
        ('verify', 'x.onnx', '--answer-timeout', '0'), ('verify', 'x.onnx', '--answer-timeout', '9' * 400),
    ],
    ids=lambda arguments: ' '.join(arguments)[:60],
)  # fmt: skip
def test_g3_a_number_out_of_range_exits_with_2(arguments: tuple[str, ...], run: Run) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    'arguments',
    [
        ('build', 'nowhere'), ('inspect', 'nowhere.engine'), ('verify', 'nowhere'),
        ('bundle', 'nowhere.onnx', '--output', 'b'), ('sweep', '--cache', 'nowhere'),
        ('sweep', '--ort-cache', 'nowhere'),
    ],
)  # fmt: skip
def test_g3_what_fails_exits_with_1_and_says_what_to_do(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, error = run(*arguments)
    assert (status, out) == (1, '')
    assert error.startswith(f'c7_engine {arguments[0]}: ')
    assert 'nowhere' in error
    status, out, error_again = run(*arguments, '--json')
    told = json.loads(out)['error']
    assert (status, error_again) == (1, error)
    assert told['remedy'] and f'{told["message"]} {told["remedy"]}' in error
    assert os.listdir(tmp_path) == []


# --- build ----------------------------------------------------------------------------------------


class FakeBuilderThisMachineHasNoGpu:
    """Publish made-up plan bytes by the real code, and tell of progress as the builder does."""

    def __init__(self) -> None:
        self.config: C7InferenceConfig | None = None
        self.build: BuildConfig | None = None

    def __call__(self, model: ModelBundle, config: C7InferenceConfig, build: BuildConfig) -> EngineCacheEntry:
        self.config, self.build = config, build
        assert build.progress is not None
        steps = ('starting', 'timing tactics, 7 so far', 'timing tactics, 19 so far', 'writing the engine')
        for second, phase in enumerate(steps):
            build.progress(BuildProgress(phase, float(second)))
        plan = fake_plan()
        manifest = manifest_of(plan, model=model.name, precision=build.precision)
        cached = EngineCache.at(config.engine_cache_dir).publish(plan, manifest)
        return EngineCacheEntry(cached.path, manifest.engine_sha256, model, build)


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> FakeBuilderThisMachineHasNoGpu:
    fake = FakeBuilderThisMachineHasNoGpu()
    monkeypatch.setattr(build, 'build_engine', fake)
    return fake


def test_g3_build_hands_on_what_was_asked_for(
    tmp_path: Path, run: Run, builder: FakeBuilderThisMachineHasNoGpu
) -> None:
    cache = tmp_path / 'cache'
    line = (
        'build', saved(tmp_path), '--cache', cache, '--precision', 'fp32', '--workspace', '512M',
        '--optimization-level', '1',
    )  # fmt: skip
    status, out, error = run(*line)
    assert builder.config is not None and builder.build is not None
    assert builder.config.engine_cache_dir == cache
    assert builder.config.builder_optimization_level == 1
    # The builder's workspace is a quarter of the budget.
    assert builder.config.gpu_memory_budget_bytes == 4 * (512 << 20)
    assert (builder.build.allow_build, builder.build.precision) == (True, 'fp32')
    assert status == 0
    assert out.startswith(f'{cache}/net-fp32-sm87-trt8.6.2.3-')
    assert 'Orin (SM 87), TensorRT 8.6.2.3' in out and 'scores float32 1x65x60x80' in out
    # One line for each phase, however far its count got.
    assert error.splitlines() == ['starting (0 s)', 'timing tactics, 7 so far (1 s)', 'writing the engine (3 s)']


def test_g3_build_answers_in_json(tmp_path: Path, run: Run, builder: FakeBuilderThisMachineHasNoGpu) -> None:
    status, out, _ = run('build', saved(tmp_path), '--cache', tmp_path / 'cache', '--json')
    told = json.loads(out)
    assert status == 0
    assert Path(told['path']).read_bytes() == fake_plan()
    assert told['manifest']['engine_sha256'] == hashlib.sha256(fake_plan()).hexdigest()
    assert told['manifest']['inputs'] == [{'name': 'image', 'dtype': 'float32', 'shape': [1, 1, 480, 640]}]


def test_g3_build_by_default_goes_where_the_node_looks(
    tmp_path: Path, run: Run, builder: FakeBuilderThisMachineHasNoGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EngineDeserializeError('not built.')

    monkeypatch.setattr(builder.__class__, '__call__', lambda self, model, config, build: refuse(setattr(
        self, 'config', config)))  # fmt: skip
    assert run('build', saved(tmp_path))[0] == 1
    # On the ground, the builder has more time.
    assert builder.config == C7InferenceConfig(builder_optimization_level=3)


def test_g3_build_without_a_gpu_says_so(tmp_path: Path, run: Run, no_gpu: None) -> None:
    status, out, error = run('build', saved(tmp_path), '--cache', tmp_path / 'cache')
    assert (status, out) == (1, '')
    assert 'no NVIDIA GPU' in error and 'Run on a host with one' in error
    assert not (tmp_path / 'cache').exists()


# --- inspect --------------------------------------------------------------------------------------


def test_g3_inspect_tells_all_of_an_engine(tmp_path: Path, run: Run, here: HostProfile) -> None:
    engine = publish_engine(tmp_path)
    status, out, _ = run('inspect', engine)
    assert status == 0
    for told in (
        'superpoint, fp16', hashlib.sha256(b'the model').hexdigest(), hashlib.sha256(fake_plan()).hexdigest(),
        'Orin (SM 87), TensorRT 8.6.2.3, linux-aarch64', 'plan of TensorRT 8.6.2.3', 'image float32 1x1x480x640',
        'workspace=1073741824', 'cuda_runtime 12.2', 'finds nothing wrong',
    ):  # fmt: skip
        assert told in out
    status, out, _ = run('inspect', engine, '--json')
    told = json.loads(out)
    assert (status, told['refused'], told['unknown']) == (0, [], [])
    assert told['name'] == {
        'model': 'superpoint', 'precision': 'fp16', 'sm': 87, 'tensorrt': '8.6.2.3',
        'digest': hashlib.sha256(b'the model').hexdigest()[:12],
    }  # fmt: skip
    assert told['plan'] == {
        'bytes': 1000, 'sha256': hashlib.sha256(fake_plan()).hexdigest(), 'tensorrt': '8.6.2.3',
    }  # fmt: skip
    assert told['host'] == dataclasses.asdict(HOST)


def test_g3_inspect_needs_no_gpu_and_no_tensorrt(
    tmp_path: Path, run: Run, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> str:
        raise RuntimeUnavailableError('tensorrt', 'TensorRT for Python is not installed.')

    monkeypatch.setattr(compatibility, 'tensorrt_version', absent)
    monkeypatch.setattr(compatibility, 'platform_name', lambda: 'linux-aarch64')
    status, out, _ = run('inspect', publish_engine(tmp_path), '--json')
    told = json.loads(out)
    assert (status, told['refused']) == (0, [])
    assert told['host'] == {'gpu': '', 'sm': 0, 'tensorrt': '', 'platform': 'linux-aarch64'}
    assert len(told['unknown']) == 2
    assert 'no NVIDIA GPU' in told['unknown'][0] and 'TensorRT for Python' in told['unknown'][1]


def test_g3_inspect_lists_everything_that_would_be_refused(tmp_path: Path, run: Run, here: HostProfile) -> None:
    engine = publish_engine(tmp_path, sm=90, gpu='NVIDIA H200', platform='linux-x86_64')
    flip(engine)
    manifest_path(engine).chmod(0o664)
    status, out, _ = run('inspect', engine, '--json')
    refused = {refusal['field']: refusal for refusal in json.loads(out)['refused']}
    assert status == 0
    assert set(refused) == {'mode', 'sm', 'gpu', 'platform', 'engine_sha256'}
    assert (refused['sm']['expected'], refused['sm']['found']) == (87, 90)
    # Still shown, though the gate would not have read it.
    assert json.loads(out)['manifest']['gpu'] == 'NVIDIA H200'


def test_g3_inspect_tells_what_it_can_of_anything(tmp_path: Path, run: Run, here: HostProfile) -> None:
    path = tmp_path / 'superpoint.engine'
    path.write_bytes(b'no plan')
    status, out, errors = run('inspect', path)
    assert status == 1 and 'is not a TensorRT engine' in errors
    for field in ('file_name', 'plan_header', 'not a TensorRT plan', '7 bytes'):
        assert field in out
    lone = publish_engine(tmp_path)
    manifest_path(lone).unlink()
    assert 'by the file name' in run('inspect', lone)[1]


changes = st.fixed_dictionaries(
    {},
    optional={
        'sm': st.sampled_from([87, 90]),
        'gpu': st.sampled_from(['Orin', 'NVIDIA H200']),
        'platform': st.sampled_from(['linux-aarch64', 'linux-x86_64']),
        'engine_bytes': st.sampled_from([999, 1000, 1001]),
        'precision': st.sampled_from(['fp16', 'fp32']),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=changes, version=st.sampled_from(['8.6.2.3', '8.6.2.4', '10.3.0.30']),
    place=st.none() | st.integers(0, 999), lost=st.sampled_from([None, 'manifest', 'name']),
    mode=st.sampled_from([0o644, 0o644, 0o666]), directory_mode=st.sampled_from([0o755, 0o755, 0o775]),
)  # fmt: skip
def test_g3_inspect_refuses_exactly_what_the_gate_refuses(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object], version: str, place: int | None,
    lost: str | None, mode: int, directory_mode: int,
) -> None:  # fmt: skip
    plan = fake_plan(version=version)
    engine = publish_engine(tmp_path_factory.mktemp('engines'), plan, **changes)
    engine.chmod(mode)
    engine.parent.chmod(directory_mode)
    if place is not None:
        flip(engine, place)
    if lost == 'manifest':
        manifest_path(engine).unlink()
    elif lost == 'name':
        other = engine.with_name('other.engine')
        manifest_path(engine).rename(manifest_path(other))
        engine = engine.rename(other)
    report = inspect_engine(engine, HOST)
    try:
        EngineGate(HOST).admit(engine)
    except EngineSchemaMismatchError as error:
        # A size that is too large is refused by the gate before the file is read.
        expected = 'engine_bytes' if error.field == 'file' and 'at most' in str(error.expected) else error.field
        expected = 'plan_header' if expected == 'plan_magic' else expected
        assert expected in {refusal.field for refusal in report.refusals}
    else:
        assert report.refusals == ()


# --- verify ---------------------------------------------------------------------------------------


def test_g3_verify_gives_a_verdict_for_each(tmp_path: Path, run: Run, here: HostProfile) -> None:
    good, bad, other = (publish_engine(tmp_path, model=name) for name in ('good', 'bad', 'other'))
    flip(bad)
    other.unlink()
    (tmp_path / 'odd.engine').write_bytes(b'odd')
    (tmp_path / 'notes.txt').write_text('mine')
    status, out, _ = run('verify', tmp_path)
    assert status == 1
    assert f'ok       engine    {good}\n' in out
    for path in (bad, other, tmp_path / 'odd.engine'):
        assert f'REFUSED  engine    {path}\n' in out
    assert "file_name: expected '<model>-<precision>-" in out
    assert out.endswith('4 checked, 3 refused\n')
    status, out, _ = run('verify', tmp_path, '--json')
    assert (status, json.loads(out)['refused']) == (1, 3)
    assert verdicts(out) == {good.name: True, bad.name: False, other.name: False, 'odd.engine': False}
    assert run('verify', good)[0] == 0
    assert run('verify', good, bad)[0] == 1


@pytest.mark.parametrize('change', [{'sm': 90}, {'gpu': 'NVIDIA H200'}, {'tensorrt': '10.3.0.30'}])
def test_g3_verify_refuses_engines_of_other_hosts_unless_told(
    tmp_path: Path, run: Run, here: HostProfile, change: dict[str, object]
) -> None:
    engine = publish_engine(tmp_path / 'e', **change)
    ort = publish_ort_cache(tmp_path / 'o', **{name: value for name, value in change.items() if name != 'tensorrt'})
    status, out, _ = run('verify', engine)
    assert status == 1
    assert f'{next(iter(change))}: expected' in out
    if 'tensorrt' not in change:
        assert run('verify', ort)[0] == 1
    assert run('verify', '--any-host', engine, ort)[0] == 0


def test_g3_verify_without_a_gpu_admits_nothing_but_looks_for_damage(
    tmp_path: Path, run: Run, no_gpu: None
) -> None:
    engine, bad = publish_engine(tmp_path, model='good'), publish_engine(tmp_path, model='bad')
    flip(bad)
    status, out, _ = run('verify', engine)
    assert status == 1
    assert 'it is undamaged, but no engine runs on this host' in out and '--any-host' in out
    assert 'engine_sha256' in run('verify', bad)[1]
    assert run('verify', '--any-host', engine)[0] == 0
    assert run('verify', '--any-host', bad)[0] == 1


@pytest.mark.parametrize('damage', ['engine', 'profile', 'listing', 'extra', 'missing', 'moved'])
def test_g3_verify_takes_onnx_runtime_caches_by_their_listing(
    tmp_path: Path, run: Run, here: HostProfile, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, 'package_versions', dict)
    directory = publish_ort_cache(tmp_path)
    assert run('verify', tmp_path) [0] == run('verify', directory)[0] == 0
    files = sorted(directory.iterdir())
    if damage == 'extra':
        (directory / 'TensorrtExecutionProvider_more.engine').write_bytes(b'more')
    elif damage == 'missing':
        (directory / 'listing.json').unlink()
    elif damage == 'moved':
        directory = directory.rename(tmp_path / ('a' * 64))
    else:
        flip(next(path for path in files if damage in path.name))
    status, out, _ = run('verify', tmp_path, '--json')
    assert (status, verdicts(out)) == (1, {directory.name: False})


@pytest.mark.parametrize('content', [b'', b'GIF89a' + b'\0' * 50, b'\xff\xd8\xff\xd9', None])
def test_m1_a_golden_picture_that_cannot_be_read_is_refused_by_name(
    tmp_path: Path, run: Run, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / 'field.jpg').write_bytes(content)
    status, _, error = run('bundle', saved(tmp_path), '--output', tmp_path / 'bundle',
                           '--golden-image', tmp_path / 'field.jpg')  # fmt: skip
    assert status == 1 and 'field.jpg' in error and 'Traceback' not in error
    assert not (tmp_path / 'bundle').exists()


def test_g3_verify_finds_nothing_in_an_empty_directory(tmp_path: Path, run: Run) -> None:
    status, _, error = run('verify', tmp_path)
    assert status == 1
    assert 'holds no engine, cache or bundle' in error


def test_g3_verify_of_a_name_that_is_too_long_says_so_in_one_line(tmp_path: Path, run: Run) -> None:
    status, _, error = run('verify', tmp_path / ('long' * 100))
    assert (status, error.count('\n')) == (1, 1)
    assert 'does not exist' in error


# --- who may write, who may read ------------------------------------------------------------------


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that every user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix='c7-test-', dir='/tmp'))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def user(uid: int) -> Iterator[None]:
    """Be another user, as far as files go."""
    groups = os.getgroups()
    os.setgroups([])
    os.setresgid(uid, uid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(groups)


def owned(directory: Path, uid: int) -> Path:
    for path in (directory, *directory.iterdir()):
        os.chown(path, uid, uid)
    return directory


@as_root
def test_g1_read_only_cache_of_root_serves_every_user(open_path: Path, run: Run, here: HostProfile) -> None:
    engine = publish_engine(open_path / 'cache')
    for path in (engine, manifest_path(engine)):
        path.chmod(0o444)
    engine.parent.chmod(0o555)
    with user(4242):
        assert run('verify', engine.parent)[0] == 0
        assert EngineGate(HOST).admit(engine).plan == fake_plan()
        report = json.loads(run('sweep', '--cache', engine.parent, '--max-size', '0', '--json')[1])
    # It cannot be swept by who may not write, and says so.
    assert [failure['problem'] for failure in report['failed']] == ['Permission denied']
    assert engine.exists() and manifest_path(engine).exists()


@as_root
def test_g1_cache_of_another_user_is_refused(open_path: Path, run: Run, here: HostProfile) -> None:
    engine = publish_engine(open_path / 'cache')
    owned(engine.parent, 4242)
    with user(4242):
        assert run('verify', engine)[0] == 0
    with user(4343):
        status, out, _ = run('verify', engine)
        assert status == 1
        assert 'owner: expected' in out and '4242' in out
    # Root too: what another user wrote would run with root's rights.
    assert run('verify', engine)[0] == 1
    assert run('sweep', '--cache', engine.parent)[0] == 1


@as_root
def test_g3_verify_of_a_directory_that_may_not_be_read_says_so_in_one_line(open_path: Path, run: Run) -> None:
    closed = open_path / 'closed'
    closed.mkdir(mode=0o700)
    with user(4242):
        status, _, error = run('verify', closed)
    assert (status, error) == (1, f'c7_engine verify: {closed}: Permission denied. Run as a user that may read it.\n')


@pytest.mark.parametrize('mode', [0o775, 0o757, 0o1777])
def test_g1_cache_that_others_can_write_is_refused(tmp_path: Path, run: Run, here: HostProfile, mode: int) -> None:
    engine = publish_engine(tmp_path / 'cache')
    engine.parent.chmod(mode)
    status, out, _ = run('verify', engine)
    assert status == 1
    assert f'chmod go-w {engine.parent}' in out
    assert run('sweep', '--cache', engine.parent, '--max-size', '0')[0] == 1
    assert engine.exists()


@as_root
@pytest.mark.parametrize('mode', [0o555, 0o775])
def test_g1_built_engines_go_to_the_user_s_own_cache_where_the_configured_one_is_closed(
    open_path: Path, run: Run, here: HostProfile, builder: FakeBuilderThisMachineHasNoGpu,
    monkeypatch: pytest.MonkeyPatch, mode: int,
) -> None:  # fmt: skip
    cache, home = open_path / 'engine_cache', open_path / 'home'
    for directory in (cache, home):
        directory.mkdir()
    cache.chmod(mode)
    os.chown(home, 4242, 4242)
    monkeypatch.setenv('XDG_CACHE_HOME', str(home))
    model = saved(open_path)
    with user(4242):
        status, out, _ = run('build', model, '--cache', cache)
        assert status == 0
        built = Path(out.splitlines()[0])
        assert built.parent == home / 'gps-denied' / 'engine_cache'
        assert run('verify', built)[0] == 0
    assert list(cache.iterdir()) == []


# --- sweep and bundle -----------------------------------------------------------------------------


def test_g3_sweep_by_command_line(tmp_path: Path, run: Run, here: HostProfile) -> None:
    now_s = 1_700_000_000.0
    old, other = publish_engine(tmp_path / 'e', model='old'), publish_engine(tmp_path / 'e', model='other', sm=90)
    kept, ort = publish_engine(tmp_path / 'e', model='kept'), publish_ort_cache(tmp_path / 'o', gpu='NVIDIA H200')
    age(old, 0, now_s=now_s)
    (tmp_path / 'e' / 'notes.txt').write_text('mine')
    line = ('sweep', '--cache', tmp_path / 'e', '--ort-cache', tmp_path / 'o', '--older-than', '30')
    status, out, _ = run(*line, '--dry-run')
    assert status == 0
    assert f'would remove {old}\n' in out and out.endswith('3 kept (5.2 KiB)\n') and old.exists()
    report = json.loads(run(*line, '--not-for-this-host', '--json')[1])
    assert {Path(item['path']) for item in report['removed']} == {old, other, ort}
    assert [Path(item['path']) for item in report['kept']] == [kept]
    assert report['foreign'] == [str(tmp_path / 'e' / 'notes.txt')]
    assert sorted(path.name for path in (tmp_path / 'e').iterdir()) == sorted(
        ['.lock', 'notes.txt', kept.name, manifest_path(kept).name]
    )
    assert list((tmp_path / 'o').iterdir()) == []


def test_g3_a_file_name_forges_no_line_of_a_sweep(tmp_path: Path, run: Run) -> None:
    (tmp_path / 'x\n5 removed (9 GiB)\x1b[31m').touch()
    (tmp_path / 'ort').mkdir()
    status, out, _ = run('sweep', '--dry-run', '--cache', str(tmp_path), '--ort-cache', str(tmp_path / 'ort'))
    assert status == 0 and r'x\n5 removed (9 GiB)\x1b[31m' in out and '\n5 removed' not in out and '\x1b' not in out


def test_g3_sweep_reaches_the_user_s_own_caches(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    engine = publish_engine(tmp_path / 'gps-denied' / 'engine_cache')
    ort = publish_ort_cache(tmp_path / 'gps-denied' / 'ort_trt_cache')
    told = json.loads(run('sweep', '--max-size', '0', '--dry-run', '--json')[1])
    assert {str(engine), str(ort)} <= {item['path'] for item in told['removed']}


def test_g3_sweep_for_this_host_needs_to_know_it(tmp_path: Path, run: Run, no_gpu: None) -> None:
    """A GPU that is gone for the moment must not cost all of its engines."""
    engine = publish_engine(tmp_path)
    status, _, error = run('sweep', '--cache', tmp_path, '--not-for-this-host')
    assert status == 1
    assert 'no NVIDIA GPU' in error
    assert engine.exists()


