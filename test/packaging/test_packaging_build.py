"""B-1 and B-3: a plain colcon build, and one with symlinks, gives both packages and executables that run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.source_tree import PACKAGE, REPOSITORY

MESSAGES = 'gps_denied_c7_msgs'
EXECUTABLES = ('c7_bench', 'c7_demo', 'c7_engine', 'c7_inference_node', 'c7_replay')
MARKER = f'share/ament_index/resource_index/packages/{MESSAGES}'

needs_ros = pytest.mark.skipif(
    importlib.util.find_spec('rclpy') is None or shutil.which('cmake') is None
    or importlib.util.find_spec('colcon_core') is None,
    reason='building needs ROS, CMake and colcon',
)


def without_our_builds() -> dict[str, str]:
    """Return the environment without the prefixes and folders that hold a build of this project already."""
    hidden = ('COLCON_PREFIX_PATH', 'PYTEST_ADDOPTS')
    environment = {name: value for name, value in os.environ.items() if name not in hidden}

    def is_ours(folder: Path) -> bool:
        prefix = folder.parent if folder.name == 'lib' else folder
        return (prefix / MARKER).is_file() or (folder / PACKAGE).is_dir() or (folder / MESSAGES).is_dir()

    for name in ('AMENT_PREFIX_PATH', 'CMAKE_PREFIX_PATH', 'LD_LIBRARY_PATH', 'PYTHONPATH'):
        folders = environment.get(name, '').split(os.pathsep)
        environment[name] = os.pathsep.join(folder for folder in folders if folder and not is_ours(Path(folder)))
    return environment


@dataclass(frozen=True)
class Workspace:
    """A colcon workspace with a copy of the sources; ``output`` is what the build printed and logged."""

    root: Path
    output: str

    @property
    def prefix(self) -> Path:
        """Where the package was installed."""
        isolated = self.root / 'install' / PACKAGE
        return isolated if isolated.is_dir() else self.root / 'install'

    def run(self, *command: str, **extra: str) -> str:
        """Run a command with install/setup.bash sourced, away from the sources; return its output."""
        script = f'. "{self.root}/install/setup.bash" && exec "$@"'
        done = subprocess.run(
            ['bash', '-c', script, 'bash', *command], cwd='/', env={**without_our_builds(), **extra},
            capture_output=True, text=True, check=False, timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def colcon(root: Path, verb: str, *options: str, environment: dict[str, str]) -> str:
    """Run colcon in a workspace; return what it printed and what it logged."""
    done = subprocess.run(
        [sys.executable, '-m', 'colcon', verb, *options], cwd=root,
        env={**environment, 'COLCON_HOME': str(root / 'colcon')},
        capture_output=True, text=True, check=False, timeout=300,
    )
    logged = ''.join(
        path.read_text(encoding='utf-8', errors='replace')
        for path in (root / 'log' / f'latest_{verb}').glob('*/stdout_stderr.log'))
    assert done.returncode == 0, done.stdout + done.stderr + logged
    return done.stdout + done.stderr + logged


def copy_sources(root: Path) -> Path:
    """Copy the project into a workspace, without what git ignores."""
    ignored = shutil.ignore_patterns(
        '.git', '.venv', '.build', 'build', 'install', 'log', 'demo_output', '__pycache__', '.*_cache', '.hypothesis')
    return Path(shutil.copytree(REPOSITORY, root / 'src' / PACKAGE, ignore=ignored))


def files_below(folder: Path) -> set[Path]:
    """Return every file, except bytecode, which Python writes wherever it imports."""
    return {path for path in folder.rglob('*') if path.is_file() and '__pycache__' not in path.parts}


@pytest.fixture(scope='module', params=[
    pytest.param('', id='plain'), pytest.param('--symlink-install', id='symlink'),
    # Only the prefix is another one than in the plain build.
    pytest.param('--merge-install', id='merged', marks=pytest.mark.once),
])
def workspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace built with one set of options."""
    root = tmp_path_factory.mktemp('workspace')
    source = copy_sources(root)
    before = files_below(source)
    output = colcon(root, 'build', *filter(None, [request.param]), environment=without_our_builds())
    assert files_below(source) == before, 'the build wrote into the sources'
    yield Workspace(root, output)
    shutil.rmtree(root, ignore_errors=True)


@needs_ros
def test_b1_one_build_gives_both_packages(workspace: Workspace) -> None:
    """B-1: after sourcing setup.bash the node's package and the messages import, and their libraries load."""
    code = (
        'from gps_denied_c7_msgs.msg import FdrRecord, Tensor, TensorList; import gps_denied_c7, gps_denied_c7_msgs;'
        'from rclpy.serialization import deserialize_message, serialize_message;'
        'sent = TensorList(model_name="m", tensors=[Tensor(name="t", shape=[1, 2])]);'
        'assert deserialize_message(serialize_message(sent), TensorList) == sent;'
        'print(gps_denied_c7.__file__); print(gps_denied_c7_msgs.__file__)'
    )
    files = workspace.run(sys.executable, '-c', code).splitlines()
    assert len(files) == 2
    assert all(file.startswith(str(workspace.root)) for file in files)


@needs_ros
def test_b1_both_packages_are_in_the_ament_index(workspace: Workspace) -> None:
    """B-1: ros2 pkg, interface and launch find both below AMENT_PREFIX_PATH."""
    prefixes = workspace.run('printenv', 'AMENT_PREFIX_PATH').strip().split(os.pathsep)
    assert str(workspace.prefix) in prefixes
    index = workspace.prefix / 'share/ament_index/resource_index'
    assert (index / 'packages' / PACKAGE).is_file()
    assert (index / 'packages' / MESSAGES).is_file()
    assert 'msg/TensorList.msg' in (index / 'rosidl_interfaces' / MESSAGES).read_text().split()
    share = workspace.prefix / 'share' / PACKAGE
    assert (share / 'package.xml').is_file()
    for folder in ('config', 'launch'):
        assert {path.name for path in (share / folder).iterdir()} >= {
            path.name for path in (REPOSITORY / folder).iterdir() if path.is_file()}


@needs_ros
def test_b1_messages_are_built_in_the_package_with_cmake(workspace: Workspace) -> None:
    """B-1: other packages find the interfaces with find_package, and C++ with the headers."""
    share = workspace.prefix / 'share' / MESSAGES
    assert (share / 'cmake' / f'{MESSAGES}Config.cmake').is_file()
    assert (share / 'msg' / 'TensorList.msg').is_file()
    assert (workspace.prefix / 'include' / MESSAGES).is_dir()
    assert str(workspace.prefix) in workspace.run('printenv', 'CMAKE_PREFIX_PATH')


@needs_ros
def test_b1_messages_found_elsewhere_are_not_built_again(workspace: Workspace, tmp_path: Path) -> None:
    """B-1: with the workspace as underlay, a second one builds the node's package only."""
    copy_sources(tmp_path)
    environment = without_our_builds()
    environment['AMENT_PREFIX_PATH'] = os.pathsep.join([str(workspace.prefix), environment['AMENT_PREFIX_PATH']])
    output = colcon(tmp_path, 'build', environment=environment)
    assert f'{MESSAGES} is in {workspace.prefix}: not built again' in output
    assert not (tmp_path / 'install' / PACKAGE / MARKER).exists()
    assert (tmp_path / 'install' / PACKAGE / 'lib' / PACKAGE / 'c7_replay').is_file()


@needs_ros
def test_b1_a_second_build_brings_the_messages_up_to_date(workspace: Workspace) -> None:
    """B-1: found in the very prefix that is installed to, they are an older build of the same sources."""
    message = workspace.root / 'src' / PACKAGE / 'msg' / 'msg' / 'FdrRecord.msg'
    original = message.read_text(encoding='utf-8')
    environment = without_our_builds()
    environment['AMENT_PREFIX_PATH'] = os.pathsep.join([str(workspace.prefix), environment['AMENT_PREFIX_PATH']])
    options = ['--merge-install'] if workspace.prefix.name == 'install' else []
    options += ['--symlink-install'] if list(workspace.prefix.rglob('*.egg-link')) else []
    try:
        message.write_text(original + '\nuint8 added_by_the_test\n', encoding='utf-8')
        colcon(workspace.root, 'build', *options, environment=environment)
        code = 'from gps_denied_c7_msgs.msg import FdrRecord; print(FdrRecord().added_by_the_test)'
        assert workspace.run(sys.executable, '-c', code).strip() == '0'
    finally:
        message.write_text(original, encoding='utf-8')


@needs_ros
def test_b3_executables_run_with_the_interpreter_that_was_built_with(workspace: Workspace) -> None:
    """B-3: whatever python3 is first on PATH when they are started."""
    folder = workspace.prefix / 'lib' / PACKAGE
    assert sorted(path.name for path in folder.iterdir()) == sorted(EXECUTABLES)
    for name in EXECUTABLES:
        assert (folder / name).read_text(encoding='utf-8').splitlines()[0] == f'#!{sys.executable}'
        assert os.access(folder / name, os.X_OK)
    assert '--rate' in workspace.run(str(folder / 'c7_replay'), '--help', PATH='/usr/bin:/bin')


@needs_ros
def test_b3_an_active_virtual_environment_is_the_one_built_for(tmp_path: Path) -> None:
    """B-3: colcon of another interpreter, as Debian's, writes the active environment's into the executables."""
    active = tmp_path / 'active'
    venv.create(active, with_pip=False)
    copy_sources(tmp_path)
    environment = without_our_builds()
    # Only the executables matter here: any prefix that holds the messages saves building them.
    index = tmp_path / 'found' / MARKER
    index.parent.mkdir(parents=True)
    index.touch()
    environment['AMENT_PREFIX_PATH'] = os.pathsep.join([str(tmp_path / 'found'), environment['AMENT_PREFIX_PATH']])
    colcon(tmp_path, 'build', environment={**environment, 'VIRTUAL_ENV': str(active)})
    script = tmp_path / 'install' / PACKAGE / 'lib' / PACKAGE / 'c7_inference_node'
    assert script.read_text(encoding='utf-8').splitlines()[0] == f'#!{active}/bin/python3'


@needs_ros
def test_b3_colcon_test_runs_pytest(workspace: Workspace) -> None:
    """B-3: colcon test hands the suite to pytest; of a small part of it, every test is counted and none fails."""
    options = ['--merge-install'] if workspace.prefix.name == 'install' else []
    # Of the suite itself this test is a part.
    arguments = ['--pytest-args', 'test/packaging/test_packaging.py', '-k', 'pinned']
    colcon(workspace.root, 'test', '--return-code-on-test-failure', *options, *arguments,
           environment=without_our_builds())
    result = ElementTree.parse(workspace.root / 'build' / PACKAGE / 'pytest.xml').getroot()
    suite = result if result.tag == 'testsuite' else result.find('testsuite')
    assert suite is not None
    assert int(suite.attrib['tests']) == len(list((REPOSITORY / 'requirements').glob('*.txt')))
    assert suite.attrib['errors'] == suite.attrib['failures'] == '0'


@pytest.mark.parametrize(('hidden', 'remedy'), [('cmake', 'apt-get install cmake'), ('ros', 'setup.bash')])
def test_b1_what_is_missing_is_named_with_its_remedy(hidden: str, remedy: str, tmp_path: Path) -> None:
    """B-1: without CMake or without the generators, the build says what to install."""
    environment = without_our_builds()
    if hidden == 'cmake':
        environment['PATH'] = str(tmp_path)
    else:
        environment['AMENT_PREFIX_PATH'] = ''
        if shutil.which('cmake') is None or shutil.which('make') is None:
            pytest.skip('the tools are looked for first, and this machine lacks CMake or make')
    source = copy_sources(tmp_path)
    done = subprocess.run(
        [sys.executable, 'setup.py', 'build', '--build-base', str(tmp_path / 'build')], cwd=source, env=environment,
        capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert remedy in done.stderr
