#!/usr/bin/env python3
"""
Set up one environment per ROS distribution, and run commands in it.

    tools/environment.py setup            create or refresh the environment, build the package
    tools/environment.py run COMMAND ...  the same, then run COMMAND in it

Where ROS is sourced it is used. Elsewhere ROS comes from PyPI, as do the interface generators, and the compiler from
Debian. Everything lands in .venv/<name> and .build/<name>, one of each per distribution, and is made anew only when
what it was made from has changed. Needs nothing but the standard library of Python 3.8 or newer.

Variables read: ROS_DISTRO (jazzy unless ROS is sourced), C7_PYTHON (the interpreter to use), C7_ROS_OVERLAY (a prefix
whose setup.bash is sourced for commands that are run).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPOSITORY / 'requirements'
PACKAGE = 'gps_denied_c7'

# The interpreters whose wheels are pinned in requirements/, the best tested first.
PYTHONS = {
    'jazzy': ('3.11', '3.12', '3.10', '3.13'),
    'kilted': ('3.12', '3.11', '3.13', '3.10'),
}
# Tells a distribution where its ros_environment package is not installed.
RCLPY_VERSIONS = {'3.3': 'humble', '7.1': 'jazzy', '9.1': 'kilted'}
DEBIAN_PACKAGES = {'cmake': 'cmake', 'g++': 'g++', 'make': 'make'}
# Some tests need them, and are skipped without.
TEST_PACKAGES = {'strace': 'strace'}

# Variables of a sourced ROS, which must not leak into an environment that has its own.
ROS_VARIABLES = (
    'AMENT_PREFIX_PATH', 'AMENT_CURRENT_PREFIX', 'CMAKE_PREFIX_PATH', 'COLCON_PREFIX_PATH', 'COLCON_CURRENT_PREFIX',
    'RMW_IMPLEMENTATION', 'ROS_DISTRO', 'ROS_PYTHON_VERSION', 'ROS_VERSION',
)
# Variables of other tools that would redirect pip, Python, make or colcon.
FOREIGN_VARIABLES = (
    'COLCON_DEFAULTS_FILE', 'COLCON_LOG_PATH', 'DESTDIR', 'MAKEFLAGS', 'MAKELEVEL', 'MFLAGS',
    'PIP_PREFIX', 'PIP_REQUIRE_VIRTUALENV', 'PIP_ROOT', 'PIP_TARGET', 'PIP_USER', 'PYTEST_ADDOPTS', 'PYTHONHOME',
    'PYTHONNOUSERSITE', 'VIRTUAL_ENV', 'VIRTUAL_ENV_PROMPT',
)


class SetupError(Exception):
    """Something this machine lacks, with its remedy."""


def say(text: str) -> None:
    """Print a line of progress."""
    print(f'[setup] {text}', flush=True)


def call(command: list[str], environment: dict[str, str], what: str) -> None:
    """Run ``command`` and show its output; raise :class:`SetupError` naming ``what`` if it fails."""
    done = subprocess.run(command, env=environment, cwd=str(REPOSITORY), check=False)
    if done.returncode:
        raise SetupError(f'{what} failed with exit status {done.returncode}: {" ".join(map(shlex.quote, command))}')


def ask(python: str, code: str, environment: dict[str, str]) -> str | None:
    """Return what ``code`` prints when ``python`` runs it, or None when it does not run."""
    try:
        done = subprocess.run([python, '-c', code], env=environment, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Wait for other runs of this program that hold ``name``, and hold it."""
    folder = REPOSITORY / '.venv'
    folder.mkdir(exist_ok=True)
    with open(folder / f'{name}.lock', 'w', encoding='utf-8') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def without(environment: dict[str, str], variables: Iterable[str]) -> dict[str, str]:
    """Return ``environment`` without ``variables``."""
    hidden = set(variables)
    return {name: value for name, value in environment.items() if name not in hidden}


def cut_paths(environment: dict[str, str], variable: str, roots: Iterable[str]) -> None:
    """Take the folders at or below ``roots`` off a search path, in place."""
    roots = [os.path.realpath(root) for root in roots if root]
    kept = [
        folder for folder in environment.get(variable, '').split(os.pathsep)
        if folder and not any(os.path.realpath(folder) == root or os.path.realpath(folder).startswith(root + os.sep)
                              for root in roots)
    ]
    if kept:
        environment[variable] = os.pathsep.join(kept)
    else:
        environment.pop(variable, None)


# --- What the caller brings -----------------------------------------------------------------------------------------

def caller_environment() -> dict[str, str]:
    """Return the caller's environment without an active virtual environment and without what misleads the tools."""
    environment = without(dict(os.environ), FOREIGN_VARIABLES)
    cut_paths(environment, 'PATH', [os.environ.get('VIRTUAL_ENV', '')])
    return environment


def sourced_distro(environment: dict[str, str]) -> str | None:
    """
    Return the name of the ROS distribution that is sourced: one whose rclpy is on AMENT_PREFIX_PATH.

    ROS_DISTRO does not tell: it may have been set to ask for another distribution than the sourced one.
    """
    prefixes = [Path(prefix) for prefix in environment.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if prefix]
    manifests = [prefix / 'share/rclpy/package.xml' for prefix in prefixes]
    manifest = next((path for path in manifests if path.is_file()), None)
    if manifest is None:
        return None
    for prefix in prefixes:
        hook = prefix / 'share/ros_environment/environment/1.ros_distro.sh'
        found = hook.is_file() and re.search(r'ROS_DISTRO=(\w+)', hook.read_text(encoding='utf-8'))
        if found:
            return found.group(1)
    version = re.search(r'<version>(\d+\.\d+)', manifest.read_text(encoding='utf-8'))
    return RCLPY_VERSIONS.get(version.group(1) if version else '', environment.get('ROS_DISTRO'))


def python_with_rclpy(environment: dict[str, str]) -> str | None:
    """Return the first interpreter that imports the sourced rclpy."""
    names = ['python3', '/usr/bin/python3']
    names += [f'python{version}' for version in re.findall(r'python(3\.\d+)', environment.get('PYTHONPATH', ''))]
    active = os.environ.get('VIRTUAL_ENV')
    if active and REPOSITORY / '.venv' not in Path(active).parents:
        # ROS may be installed in the caller's own virtual environment.
        names.append(f'{active}/bin/python3')
    if os.environ.get('C7_PYTHON'):
        names = [os.environ['C7_PYTHON']]
    for name in names:
        path = shutil.which(name, path=environment.get('PATH'))
        # The path proper, not a shim that chooses by the current folder.
        found = path and ask(path, 'import rclpy, sys; print(sys.executable)', environment)
        if found:
            return found
    return None


# --- Interpreters and Debian packages --------------------------------------------------------------------------------

def install_debian_packages(packages: list[str]) -> None:
    """Install ``packages`` if we may, else raise naming the command that does."""
    apt = shutil.which('apt-get')
    if apt is None or os.geteuid() != 0:
        raise SetupError(
            f'this machine lacks {", ".join(packages)}. '
            f'Run: sudo apt-get update && sudo apt-get install -y {" ".join(packages)}')
    say(f'installing Debian packages: {" ".join(packages)}')
    environment = {**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'}
    install = [apt, 'install', '-y', '--no-install-recommends', *packages]
    # apt-get fails where another one runs, as for the other distribution.
    with locked('debian'):
        if subprocess.run(install, env=environment, check=False).returncode:
            # Fresh images come without package lists.
            call([apt, 'update'], environment, 'apt-get update')
            call(install, environment, 'apt-get install')


def require_build_tools() -> None:
    """Install the compiler and CMake where they are missing."""
    missing = [package for tool, package in DEBIAN_PACKAGES.items() if shutil.which(tool) is None]
    if missing:
        install_debian_packages(missing)


def offer_test_tools() -> None:
    """Install what some tests need where it is missing and we may."""
    missing = [package for tool, package in TEST_PACKAGES.items() if shutil.which(tool) is None]
    if not missing:
        return
    try:
        install_debian_packages(missing)
    except SetupError as error:
        say(f'some tests will be skipped: {error}')


DESCRIBE = """
import importlib.util, json, os, sys, sysconfig
print(json.dumps({
    'path': getattr(sys, '_base_executable', sys.executable) or sys.executable,
    'version': '%d.%d' % sys.version_info[:2],
    'headers': os.path.isfile(os.path.join(sysconfig.get_paths()['platinclude'], 'Python.h')),
    'venv': importlib.util.find_spec('ensurepip') is not None,
}))
"""


def interpreters(version: str, environment: dict[str, str]) -> Iterator[dict]:
    """Yield a description of each CPython ``version`` found on this machine."""
    folders = environment.get('PATH', '').split(os.pathsep) + ['/usr/local/bin', '/usr/bin']
    candidates = [Path(folder) / name for folder in folders for name in (f'python{version}', 'python3')]
    pyenv = Path(environment.get('PYENV_ROOT') or Path.home() / '.pyenv') / 'versions'
    with contextlib.suppress(PermissionError):  # another user's, kept in the environment by su
        candidates += sorted(pyenv.glob(f'{version}.*/bin/python3'), reverse=True)
    if os.environ.get('C7_PYTHON'):
        candidates = [Path(shutil.which(os.environ['C7_PYTHON']) or os.environ['C7_PYTHON'])]
    seen = set()
    for candidate in candidates:
        if not os.access(candidate, os.X_OK) or candidate in seen:
            continue
        seen.add(candidate)
        answer = ask(str(candidate), DESCRIBE, {**environment, 'PYTHONPATH': ''})
        if answer:
            description = json.loads(answer)
            if description['version'] == version:
                yield description


def find_python(distro: str, environment: dict[str, str]) -> str:
    """Return an interpreter with headers and venv for which ``distro`` has wheels; complete Debian's if need be."""
    incomplete = []
    for version in PYTHONS[distro]:
        for found in interpreters(version, environment):
            if found['headers'] and found['venv']:
                return found['path']
            incomplete.append(found)
    if not incomplete:
        raise SetupError(
            f'ROS 2 {distro.capitalize()} needs one of Python {", ".join(PYTHONS[distro])}, and none was found. '
            f'Install one (sudo apt-get install -y python3 python3-dev python3-venv, or pyenv), '
            f'or name its path in C7_PYTHON.')
    for found in incomplete:
        if os.path.dirname(found['path']) == '/usr/bin':
            name = f'python{found["version"]}'
            install_debian_packages([f'{name}-dev', f'{name}-venv'])
            return found['path']
    lacking = incomplete[0]
    raise SetupError(
        f'{lacking["path"]} has no {"venv module" if lacking["headers"] else "C headers (Python.h)"}. '
        f'Reinstall it with them, or name another interpreter in C7_PYTHON.')


# --- The environment -------------------------------------------------------------------------------------------------

class Environment:
    """
    A virtual environment and a colcon build for one ROS distribution.

    :param distro: name of the distribution, as ``jazzy``.
    :param python: interpreter to make the environment with.
    :param base: variables that commands start from.
    :param sourced: whether ROS is in ``base`` already, so that only the rest is installed.
    """

    def __init__(self, distro: str, python: str, base: dict[str, str], *, sourced: bool) -> None:
        self.distro = distro
        self.python = python
        self.sourced = sourced
        name = f'{distro}-sourced' if sourced else distro
        self.venv = REPOSITORY / '.venv' / name
        self.build_base = REPOSITORY / '.build' / name
        self.install_base = self.build_base / 'install'
        # ROS in a virtual environment has its commands beside its interpreter.
        parent = [os.path.dirname(python)] if sourced else []
        self.variables = {
            **base,
            'VIRTUAL_ENV': str(self.venv),
            'PATH': os.pathsep.join([str(self.venv / 'bin'), *parent, base.get('PATH', os.defpath)]),
            'COLCON_HOME': str(self.build_base / 'colcon'),
        }
        if not sourced:
            # The wheels make the virtual environment an ament prefix.
            self.variables.update({
                'ROS_DISTRO': distro, 'AMENT_PREFIX_PATH': str(self.venv), 'CMAKE_PREFIX_PATH': str(self.venv)})

    @property
    def interpreter(self) -> str:
        """The interpreter of the virtual environment."""
        return str(self.venv / 'bin' / 'python3')

    def set_up(self) -> None:
        """Create and build what is missing or out of date."""
        # "make demo" and "make test" may start at once.
        with locked(self.venv.name):
            if not stamp_matches(self.venv, self._venv_digest()):
                self._create()
            if not stamp_matches(self.build_base, self._build_digest()):
                self._build()

    def _requirement_files(self) -> list[Path]:
        ros = [] if self.sourced else [REQUIREMENTS / f'ros-{self.distro}.txt']
        return [*ros, REQUIREMENTS / 'dev.txt']

    def _venv_digest(self) -> str:
        included = [REQUIREMENTS / name for name in ('runtime.txt', 'constraints.txt', 'ros-sourced.txt')]
        files = [*self._requirement_files(), *included, Path(__file__)]
        # Scripts of a virtual environment and its build hold absolute paths, so a moved checkout is made anew.
        return digest([str(self.venv), self.python], files)

    def _build_digest(self) -> str:
        messages = [path for path in (REPOSITORY / 'msg').rglob('*') if path.is_file()]
        sources = [REPOSITORY / name for name in ('setup.py', 'setup.cfg', 'package.xml')]
        # The build links to everything else, so only its file names matter.
        linked = [str(path) for folder in ('launch', 'config') for path in (REPOSITORY / folder).glob('*')]
        underlay = [self._venv_digest(), self.variables.get('AMENT_PREFIX_PATH', '')]
        return digest([*underlay, *sorted(linked)], [*sources, *sorted(messages)])

    def _create(self) -> None:
        require_build_tools()
        offer_test_tools()
        say(f'creating {self.venv.relative_to(REPOSITORY)} with {self.python}'
            + (f' on the sourced ROS 2 {self.distro.capitalize()}' if self.sourced else ''))
        for stale in (self.venv, self.build_base):
            shutil.rmtree(stale, ignore_errors=True)
        options = ['--system-site-packages'] if self.sourced else []
        call([self.python, '-m', 'venv', *options, str(self.venv)], without(self.variables, ['PYTHONPATH']),
             'python -m venv')
        if self.sourced:
            self._see_packages_of_parent()
        arguments = [argument for file in self._requirement_files() for argument in ('-r', str(file))]
        if self.sourced:
            arguments += self._held_to_distro()
        say('installing ' + ', '.join(f'requirements/{file.name}' for file in self._requirement_files()))
        # Twice quiet: errors still show, warnings about the caller's package indexes do not.
        call([self.interpreter, '-m', 'pip', 'install', '-qq', '--disable-pip-version-check', *arguments],
             self.variables, 'pip install')
        if not self.sourced:
            self._repair_exported_targets()
        self._check_imports()
        write_stamp(self.venv, self._venv_digest())

    def _see_packages_of_parent(self) -> None:
        """Let the new environment see the packages of the one that its interpreter belongs to, if it is virtual too."""
        code = 'import sys, sysconfig; print(sysconfig.get_paths()["purelib"] if sys.prefix != sys.base_prefix else "")'
        packages = ask(self.python, code, self.variables)
        own = ask(self.interpreter, 'import sysconfig; print(sysconfig.get_paths()["purelib"])', self.variables)
        if packages and own:
            # addsitedir, because .pth files over there have to run as well.
            (Path(own) / 'c7_parent.pth').write_text(f'import site; site.addsitedir({packages!r})\n', encoding='utf-8')

    def _held_to_distro(self) -> list[str]:
        """Return requirements that keep NumPy at the major version that the distribution's extensions are built for."""
        version = ask(self.python, 'import numpy; print(numpy.__version__)', self.variables)
        if version is None:
            raise SetupError(
                f'ROS 2 {self.distro.capitalize()} is sourced, but {self.python} does not import NumPy. '
                f'Run: sudo apt-get install -y python3-numpy')
        held = [f'numpy=={version.split(".")[0]}.*']
        if ask(self.python, 'import cv2', self.variables) is None:
            held += ['-r', str(REQUIREMENTS / 'ros-sourced.txt')]
        return held

    def _repair_exported_targets(self) -> None:
        """Replace the include folders of the machine that built the ROS wheels, which their CMake targets export."""
        python_include = ask(
            self.interpreter, 'import sysconfig; print(sysconfig.get_paths()["platinclude"])', self.variables)
        numpy_include = ask(self.interpreter, 'import numpy; print(numpy.get_include())', self.variables)
        if not python_include or not numpy_include:
            raise SetupError(f'{self.interpreter} does not import NumPy. Remove {self.venv} and run again.')
        for path in (self.venv / 'share').glob('*/cmake/*.cmake'):
            text = path.read_text(encoding='utf-8')
            repaired = re.sub(r'/opt/python/[^;"\s]*/numpy/(?:_core|core)/include', lambda _: numpy_include, text)
            repaired = re.sub(r'/opt/python/cp\d+-cp\d+/include/python3\.\d+', lambda _: python_include, repaired)
            if repaired != text:
                path.write_text(repaired, encoding='utf-8')

    def _check_imports(self) -> None:
        done = subprocess.run(
            [self.interpreter, '-c', 'import numpy, cv2, onnxruntime, rclpy, sensor_msgs.msg'],
            env=self.variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SetupError(f'{self.venv} was created, but what it holds does not import:\n{done.stderr}')

    def _build(self) -> None:
        require_build_tools()
        say(f'building {PACKAGE} and its messages in {self.build_base.relative_to(REPOSITORY)}')
        call([
            self.interpreter, '-m', 'colcon', '--log-base', str(self.build_base / 'log'), 'build', '--symlink-install',
            '--base-paths', str(REPOSITORY), '--packages-select', PACKAGE,
            '--build-base', str(self.build_base / 'build'), '--install-base', str(self.install_base),
            # The warnings are about wheels being no colcon workspace.
        ], {**self.variables, 'COLCON_LOG_LEVEL': 'error'}, 'colcon build')
        write_stamp(self.build_base, self._build_digest())

    def run(self, command: list[str]) -> None:
        """Replace this process by ``command``, run with the overlay and the build sourced."""
        sources = [self.install_base / 'local_setup.bash']
        if os.environ.get('C7_ROS_OVERLAY'):
            overlay = Path(os.environ['C7_ROS_OVERLAY']) / 'setup.bash'
            if not overlay.is_file():
                raise SetupError(f'C7_ROS_OVERLAY is {overlay.parent}, without a setup.bash. Name an install prefix.')
            sources.insert(0, overlay)
        executables = self.install_base / PACKAGE / 'lib' / PACKAGE
        script = '\n'.join(f'. {shlex.quote(str(source))} || exit' for source in sources)
        script += f'\nexport PATH={shlex.quote(str(executables))}:"$PATH"\nexec "$@"'
        bash = shutil.which('bash') or '/bin/bash'
        sys.stdout.flush()
        os.execve(bash, [bash, '-c', script, 'bash', *command], self.variables)


def digest(texts: Iterable[str], files: Iterable[Path]) -> str:
    """Return the SHA-256 of ``texts`` and of the contents of ``files``."""
    total = hashlib.sha256('\0'.join(texts).encode())
    for file in files:
        total.update(b'\0' + str(file).encode() + b'\0' + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def stamp_matches(folder: Path, expected: str) -> bool:
    """Return whether ``folder`` was finished from ``expected``."""
    stamp = folder / 'c7.stamp'
    return stamp.is_file() and stamp.read_text(encoding='utf-8') == expected


def write_stamp(folder: Path, finished: str) -> None:
    """Mark ``folder`` as finished from ``finished``."""
    (folder / 'c7.stamp').write_text(finished, encoding='utf-8')


def choose_environment() -> Environment:
    """Return the environment that ROS_DISTRO and a sourced ROS ask for."""
    caller = caller_environment()
    wanted = os.environ.get('ROS_DISTRO')
    sourced = sourced_distro(caller)
    if sourced is not None and wanted in (None, '', sourced):
        python = python_with_rclpy(caller)
        if python is not None:
            # As that interpreter sees it: one with ROS from wheels adds their library folders when it starts.
            seen = ask(python, 'import json, os; print(json.dumps(dict(os.environ)))', caller)
            return Environment(sourced, python, json.loads(seen or '{}') or caller, sourced=True)
        say(f'ROS 2 {sourced} is on AMENT_PREFIX_PATH, but no interpreter on PATH imports its rclpy (C7_PYTHON names '
            f'another); using ROS from PyPI instead')
    distro = wanted or 'jazzy'
    if distro not in PYTHONS:
        raise SetupError(
            f'ROS_DISTRO is {distro!r}; without ROS on the machine it can be {" or ".join(PYTHONS)}. '
            f'For another one, source it first: . /opt/ros/{distro}/setup.bash')
    if (platform.system(), platform.machine()) != ('Linux', 'x86_64'):
        raise SetupError(
            f'ROS wheels exist for x86-64 Linux, and this is {platform.system()} on {platform.machine()}. '
            f'Install ROS 2 from its Debian packages and source it: . /opt/ros/{distro}/setup.bash')
    foreign = caller.get('AMENT_PREFIX_PATH', '').split(os.pathsep)
    own = without(caller, [*ROS_VARIABLES, 'PYTHONPATH', '_ROS_WHEELS_BOOTSTRAP_COMPLETE'])
    for variable in ('PATH', 'LD_LIBRARY_PATH'):
        cut_paths(own, variable, [*foreign, os.environ.get('VIRTUAL_ENV', ''), os.environ.get('CONDA_PREFIX', '')])
    return Environment(distro, find_python(distro, own), own, sourced=False)


def main() -> int:
    """Set up, and run the command if there is one."""
    parser = argparse.ArgumentParser(description='Set up an environment for a ROS distribution, run a command in it.')
    commands = parser.add_subparsers(dest='action', required=True)
    commands.add_parser('setup', help='create or refresh the environment and build the package')
    run = commands.add_parser('run', help='set up, then run a command in the environment')
    run.add_argument('command', nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    try:
        environment = choose_environment()
        environment.set_up()
        if arguments.action == 'run':
            environment.run(arguments.command)
    except SetupError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
