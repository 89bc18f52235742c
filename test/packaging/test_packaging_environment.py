"""§8: the set-up finds interpreters and a sourced ROS, makes environments anew when it must, and names remedies."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from support.source_tree import REPOSITORY

TOOL = REPOSITORY / 'tools' / 'environment.py'


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/environment.py as a module, with none of the variables that it reads set."""
    for name in ('AMENT_PREFIX_PATH', 'C7_PYTHON', 'C7_ROS_OVERLAY', 'PYTHONPATH', 'ROS_DISTRO', 'VIRTUAL_ENV'):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location('environment_tool', TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout that the tool works on, with requirement files and messages."""
    for name in ('ros-jazzy.txt', 'dev.txt', 'runtime.txt', 'constraints.txt', 'ros-sourced.txt'):
        (tmp_path / 'requirements').mkdir(exist_ok=True)
        (tmp_path / 'requirements' / name).write_text('# empty\n')
    for name in ('setup.py', 'setup.cfg', 'package.xml', 'msg/msg/Tensor.msg'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{name}\n')
    monkeypatch.setattr(tool, 'REPOSITORY', tmp_path)
    monkeypatch.setattr(tool, 'REQUIREMENTS', tmp_path / 'requirements')
    return tmp_path


def prefix_with_rclpy(folder: Path, version: str) -> Path:
    """Make a prefix look like a ROS distribution with this version of rclpy."""
    manifest = folder / 'share/rclpy/package.xml'
    manifest.parent.mkdir(parents=True)
    manifest.write_text(f'<package format="3"><name>rclpy</name><version>{version}</version></package>')
    return folder


def run_tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the tool with only ``environment``."""
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], env={'PATH': os.defpath, 'HOME': '/nonexistent', **environment},
        capture_output=True, text=True, check=False)


def test_ros_distro_alone_is_not_a_sourced_ros(tool: ModuleType) -> None:
    """§8: ROS_DISTRO=kilted asks for Kilted; it does not say that Kilted is there."""
    assert tool.sourced_distro({'ROS_DISTRO': 'kilted'}) is None
    assert tool.sourced_distro({'ROS_DISTRO': 'kilted', 'AMENT_PREFIX_PATH': '/opt/nothing/here'}) is None


def test_a_sourced_ros_is_recognised_whatever_ros_distro_says(tool: ModuleType, tmp_path: Path) -> None:
    """§8: with Jazzy sourced, ROS_DISTRO=kilted must not pass Jazzy off as Kilted."""
    prefix = prefix_with_rclpy(tmp_path, '7.1.5')
    caller = {'ROS_DISTRO': 'kilted', 'AMENT_PREFIX_PATH': f'/some/overlay:{prefix}'}
    assert tool.sourced_distro(caller) == 'jazzy'
    hook = tmp_path / 'share/ros_environment/environment/1.ros_distro.sh'
    hook.parent.mkdir(parents=True)
    hook.write_text('# generated\nexport ROS_DISTRO=rolling\n')
    assert tool.sourced_distro(caller) == 'rolling'


def test_the_other_distribution_than_the_sourced_one_gets_its_own_environment(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """§8: the distributions never mix: nothing of the sourced one stays in the other's variables."""
    prefix = prefix_with_rclpy(tmp_path, '7.1.5')
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(prefix))
    monkeypatch.setenv('PYTHONPATH', f'{prefix}/lib/python3.12/site-packages')
    monkeypatch.setenv('LD_LIBRARY_PATH', f'{prefix}/lib:/usr/local/cuda/lib64')
    monkeypatch.setenv('RMW_IMPLEMENTATION', 'rmw_cyclonedds_cpp')
    monkeypatch.setenv('ROS_DISTRO', 'kilted')
    monkeypatch.setattr(tool, 'find_python', lambda distro, environment: sys.executable)
    environment = tool.choose_environment()
    assert (environment.distro, environment.sourced) == ('kilted', False)
    assert environment.variables['AMENT_PREFIX_PATH'] == str(environment.venv)
    assert environment.variables['LD_LIBRARY_PATH'] == '/usr/local/cuda/lib64'
    assert 'PYTHONPATH' not in environment.variables
    assert 'RMW_IMPLEMENTATION' not in environment.variables


def test_a_sourced_ros_is_used(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """§8: where rclpy imports, the environment stands on it and installs no ROS package."""
    prefix = prefix_with_rclpy(tmp_path, '7.1.5')
    (tmp_path / 'python' / 'rclpy').mkdir(parents=True)
    (tmp_path / 'python' / 'rclpy' / '__init__.py').touch()
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(prefix))
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'python'))
    monkeypatch.setenv('C7_PYTHON', sys.executable)
    environment = tool.choose_environment()
    assert (environment.distro, environment.sourced) == ('jazzy', True)
    assert environment.variables['AMENT_PREFIX_PATH'] == str(prefix)
    assert [file.name for file in environment._requirement_files()] == ['dev.txt']
    assert environment._held_to_distro()[0].startswith('numpy==')
    other = tool.Environment('jazzy', sys.executable, {}, sourced=False)
    assert environment.venv != other.venv
    assert environment.build_base != other.build_base


@pytest.mark.parametrize('changed', ['requirements/ros-jazzy.txt', 'requirements/constraints.txt'])
def test_changed_requirements_make_the_environment_anew(tool: ModuleType, checkout: Path, changed: str) -> None:
    """§8: and only then, so that a second run starts in seconds."""
    environment = tool.Environment('jazzy', sys.executable, {}, sourced=False)
    environment.venv.mkdir(parents=True)
    tool.write_stamp(environment.venv, environment._venv_digest())
    assert tool.stamp_matches(environment.venv, environment._venv_digest())
    (checkout / changed).write_text('numpy==2.0.0\n')
    assert not tool.stamp_matches(environment.venv, environment._venv_digest())


def test_changed_messages_build_anew_and_changed_modules_do_not(tool: ModuleType, checkout: Path) -> None:
    """§8: the build links to the Python sources, and generates code from the messages."""
    environment = tool.Environment('jazzy', sys.executable, {}, sourced=False)
    before = environment._build_digest()
    (checkout / 'gps_denied_c7').mkdir()
    (checkout / 'gps_denied_c7' / 'new.py').touch()
    assert environment._build_digest() == before
    (checkout / 'msg/msg/Tensor.msg').write_text('uint8 other\n')
    assert environment._build_digest() != before


def test_what_only_tests_need_stops_no_set_up(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    """Without root it says that they will be skipped, and what to run."""
    monkeypatch.setattr(tool.shutil, 'which', lambda name, path=None: '/usr/bin/apt-get' if name == 'apt-get' else None)
    monkeypatch.setattr(tool.os, 'geteuid', lambda: 1000)
    tool.offer_test_tools()
    said = capsys.readouterr().out
    assert 'skipped' in said and 'sudo apt-get update && sudo apt-get install -y strace' in said


def test_set_up_does_nothing_twice(
    tool: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """§8: an interrupted set-up starts over, a finished one is kept."""
    environment = tool.Environment('jazzy', sys.executable, {}, sourced=False)
    done: list[str] = []

    def create() -> None:
        done.append('create')
        environment.venv.mkdir(parents=True, exist_ok=True)
        if done.count('create') == 1:
            raise KeyboardInterrupt
        tool.write_stamp(environment.venv, environment._venv_digest())

    def build() -> None:
        done.append('build')
        environment.build_base.mkdir(parents=True, exist_ok=True)
        tool.write_stamp(environment.build_base, environment._build_digest())

    monkeypatch.setattr(environment, '_create', create)
    monkeypatch.setattr(environment, '_build', build)
    with pytest.raises(KeyboardInterrupt):
        environment.set_up()
    environment.set_up()
    environment.set_up()
    assert done == ['create', 'create', 'build']


def test_exported_targets_are_repaired(tool: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CMake files of the wheels name folders of the machine that built them; every such folder is replaced."""
    environment = tool.Environment('jazzy', sys.executable, dict(os.environ), sourced=False)
    monkeypatch.setattr(type(environment), 'interpreter', sys.executable)
    exported = environment.venv / 'share' / 'std_msgs' / 'cmake' / 'export.cmake'
    exported.parent.mkdir(parents=True)
    exported.write_text(
        'INTERFACE_INCLUDE_DIRECTORIES "${_IMPORT_PREFIX}/include;/opt/python/cp311-cp311/include/python3.11;'
        '/opt/python/cp311-cp311/lib/python3.11/site-packages/numpy/_core/include"\n')
    environment._repair_exported_targets()
    text = exported.read_text()
    assert '/opt/python' not in text
    folders = text.partition('"')[2].rstrip('"\n').split(';')
    assert folders[0] == '${_IMPORT_PREFIX}/include'
    assert len(folders) == 3
    assert (Path(folders[2]) / 'numpy' / 'arrayobject.h').is_file()


def test_an_active_virtual_environment_does_not_leak(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """§8: what the caller has activated neither provides the interpreter nor redirects pip, make or colcon."""
    active = tmp_path / 'active'
    (active / 'bin').mkdir(parents=True)
    monkeypatch.setenv('VIRTUAL_ENV', str(active))
    monkeypatch.setenv('PATH', f'{active}/bin:/usr/bin:/bin')
    for name in ('PIP_TARGET', 'MAKEFLAGS', 'DESTDIR', 'PYTHONHOME'):
        monkeypatch.setenv(name, 'redirected')
    caller = tool.caller_environment()
    assert caller['PATH'] == '/usr/bin:/bin'
    assert not {'VIRTUAL_ENV', 'PIP_TARGET', 'MAKEFLAGS', 'DESTDIR', 'PYTHONHOME'} & caller.keys()


def test_debian_packages_are_named_where_they_cannot_be_installed(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """§8: not root: the error holds the command to run."""
    monkeypatch.setattr(tool.os, 'geteuid', lambda: 1000)
    monkeypatch.setattr(tool.shutil, 'which', lambda name, **_: None if name == 'cmake' else f'/usr/bin/{name}')
    with pytest.raises(tool.SetupError, match='sudo apt-get update && sudo apt-get install -y cmake'):
        tool.require_build_tools()


def test_debian_packages_are_installed_as_root(
    tool: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """§8: root: they are installed, after an update where the lists are missing."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command[1:])
        return subprocess.CompletedProcess(command, 100 if len(calls) == 1 else 0)

    monkeypatch.setattr(tool.os, 'geteuid', lambda: 0)
    monkeypatch.setattr(tool.shutil, 'which', lambda name, **_: None if name in ('g++', 'make') else f'/usr/bin/{name}')
    monkeypatch.setattr(tool.subprocess, 'run', run)
    tool.require_build_tools()
    install = ['install', '-y', '--no-install-recommends', 'g++', 'make']
    assert calls == [install, ['update'], install]


def test_two_set_ups_install_debian_packages_one_after_the_other(
    tool: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the two distributions may run side by side, and apt-get fails where another one runs."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tool.os, 'geteuid', lambda: 0)
    monkeypatch.setattr(tool.shutil, 'which', lambda name, **_: f'/usr/bin/{name}')
    monkeypatch.setattr(tool.subprocess, 'run', run)
    other = threading.Thread(target=tool.install_debian_packages, args=(['cmake'],))
    with tool.locked('debian'):
        other.start()
        other.join(0.3)
        assert calls == []
    other.join()
    assert len(calls) == 1


def test_an_unknown_distribution_is_refused() -> None:
    """§8: without ROS on the machine, the wheels of two distributions are pinned."""
    done = run_tool('setup', ROS_DISTRO='foxy')
    assert done.returncode == 1
    assert 'jazzy or kilted' in done.stderr
    assert 'setup.bash' in done.stderr


def test_an_interpreter_without_wheels_is_refused(tmp_path: Path) -> None:
    """§8: C7_PYTHON names the one to use; one of another version is not used silently."""
    fake = tmp_path / 'python3'
    fake.write_text('#!/bin/sh\necho \'{"path": "/x", "version": "3.8", "headers": true, "venv": true}\'\n')
    fake.chmod(0o755)
    done = run_tool('setup', ROS_DISTRO='jazzy', C7_PYTHON=str(fake))
    assert done.returncode == 1
    assert '3.11, 3.12, 3.10, 3.13' in done.stderr
    assert 'C7_PYTHON' in done.stderr


def test_interpreters_of_another_user_are_passed_over(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """``su`` keeps PYENV_ROOT, which then names a folder that the new user may not open."""
    def closed(*_: object) -> None:
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(tool.Path, 'glob', closed)
    version = f'{sys.version_info[0]}.{sys.version_info[1]}'
    folder = os.path.dirname(sys.executable)
    found = list(tool.interpreters(version, {'PATH': folder, 'PYENV_ROOT': '/closed'}))
    assert found and all(one['version'] == version for one in found)


def test_the_preferred_interpreter_that_is_complete_is_taken(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """§8: headers and venv are needed; a less preferred version that has both wins over one that lacks them."""
    found = {
        '3.11': [{'path': '/usr/bin/python3.11', 'version': '3.11', 'headers': False, 'venv': True}],
        '3.10': [{'path': '/usr/local/bin/python3.10', 'version': '3.10', 'headers': True, 'venv': True}],
    }
    monkeypatch.setattr(tool, 'interpreters', lambda version, environment: iter(found.get(version, [])))
    assert tool.find_python('jazzy', {}) == '/usr/local/bin/python3.10'
    del found['3.10']
    asked: list[list[str]] = []
    monkeypatch.setattr(tool, 'install_debian_packages', asked.append)
    assert tool.find_python('jazzy', {}) == '/usr/bin/python3.11'
    assert asked == [['python3.11-dev', 'python3.11-venv']]


def test_commands_run_with_overlay_and_build_sourced(tool: ModuleType, checkout: Path, tmp_path: Path) -> None:
    """§8: C7_ROS_OVERLAY is sourced first, then our build; arguments arrive unchanged."""
    overlay = tmp_path / 'over lay'
    overlay.mkdir()
    (overlay / 'setup.bash').write_text('export ORDER="$ORDER overlay"\n')
    environment = tool.Environment('jazzy', sys.executable, {'PATH': os.environ['PATH']}, sourced=False)
    environment.install_base.mkdir(parents=True)
    (environment.install_base / 'local_setup.bash').write_text('export ORDER="$ORDER build"\n')
    pid = os.fork()
    if pid == 0:
        os.environ['C7_ROS_OVERLAY'] = str(overlay)
        environment.run(['bash', '-c', 'printf "%s|%s" "$ORDER" "$1" > "$2"', 'bash', "it's *", str(tmp_path / 'out')])
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / 'out').read_text() == " overlay build|it's *"


def test_an_overlay_without_setup_is_refused(
    tool: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """§8: a misspelt C7_ROS_OVERLAY must not silently leave the launch tests out."""
    monkeypatch.setenv('C7_ROS_OVERLAY', '/nowhere')
    environment = tool.Environment('jazzy', sys.executable, {}, sourced=False)
    with pytest.raises(tool.SetupError, match='/nowhere'):
        environment.run(['true'])
