"""
Build gps_denied_c7, and with it the interface package under msg/.

An ament_python package cannot generate interfaces, and colcon does not look for packages inside a package. So the
``build``, ``install`` and ``develop`` commands also configure, build and install ``msg/`` with CMake, into the prefix
that the Python package goes to.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.develop import develop
from setuptools.command.install import install

try:
    from setuptools.command.build import build
except ImportError:  # setuptools < 62.4, as on Ubuntu 22.04
    from distutils.command.build import build
from distutils.errors import DistutilsSetupError

PACKAGE = 'gps_denied_c7'
MESSAGES = 'gps_denied_c7_msgs'
# What msg/CMakeLists.txt finds first; each is an entry of the ament index once it is installed.
GENERATORS = ('ament_cmake', 'rosidl_default_generators', 'builtin_interfaces', 'std_msgs')
# colcon runs setup.py through a link from the build folder when it installs with symlinks.
SOURCE = Path(__file__).resolve().parent


def environment_interpreter() -> str:
    """
    Return the interpreter that the executables and the generated messages are made for.

    colcon from Debian runs this file with /usr/bin/python3, also when a virtual environment is active; scripts for
    that interpreter would not find what the environment holds, onnxruntime first of all.
    """
    environment = os.environ.get('VIRTUAL_ENV')
    if not environment or Path(environment) == Path(getattr(sys, 'real_prefix', sys.prefix)):
        return sys.executable
    candidate = str(Path(environment) / 'bin' / 'python3')
    try:
        version = subprocess.run(
            [candidate, '-I', '-c', 'import sys; print(*sys.version_info[:2])'],
            capture_output=True, text=True, check=True,
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f'warning: VIRTUAL_ENV is {environment}, whose python3 does not run ({error}); '
              f'the executables will use {sys.executable}', file=sys.stderr)
        return sys.executable
    if version != [str(part) for part in sys.version_info[:2]]:
        print(f'warning: VIRTUAL_ENV is {environment} with Python {".".join(version)}, but this build runs '
              f'{sys.executable} with {sys.version_info[0]}.{sys.version_info[1]}, and so will the executables. '
              f'Build with "{candidate} -m colcon build" to use the environment', file=sys.stderr)
        return sys.executable
    return candidate


def ament_prefixes() -> list[Path]:
    """Return the prefixes of AMENT_PREFIX_PATH, the nearest overlay first."""
    return [Path(prefix) for prefix in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if prefix]


def ament_prefix_of(package: str) -> Path | None:
    """Return the nearest prefix that holds ``package``."""
    for prefix in ament_prefixes():
        if (prefix / 'share/ament_index/resource_index/packages' / package).is_file():
            return prefix
    return None


class Messages:
    """
    The interface package ``msg/``, built for one interpreter.

    :param interpreter: that runs the generators and whose headers the extension modules are compiled against.
    :param prefix: where they will be installed.
    :param build_base: folder of the caller's build; the CMake tree goes below it.
    """

    def __init__(self, interpreter: str, prefix: Path, build_base: str) -> None:
        self.interpreter = interpreter
        self.prefix = prefix
        # CMake caches what it found, and a cache made for another interpreter or another ROS breaks the build.
        underlays = [path for path in ament_prefixes() if path.resolve() != prefix.resolve()]
        key = '\0'.join([interpreter, sys.version, str(SOURCE), *map(str, underlays)])
        self.tree = Path(build_base).resolve() / f'{MESSAGES}-{hashlib.sha256(key.encode()).hexdigest()[:12]}'

    def build(self, python_lib: str) -> None:
        """
        Configure and compile the interfaces.

        :param python_lib: folder of the Python modules, relative to the prefix.
        :raises DistutilsSetupError: naming what is missing and how to get it, or when CMake fails.
        """
        self._check_tools()
        # ament_cmake_python would choose the Python folder itself; on Debian's Python some versions of it choose
        # local/lib/python3.X/dist-packages, which colcon does not put on PYTHONPATH for an ament_python package.
        self._run([
            'cmake', '-S', str(SOURCE / 'msg'), '-B', str(self.tree),
            f'-DCMAKE_INSTALL_PREFIX={self.prefix}', f'-DPYTHON_INSTALL_DIR={python_lib}',
            f'-DPython3_EXECUTABLE={self.interpreter}', '-DCMAKE_BUILD_TYPE=Release', '-DBUILD_TESTING=OFF',
            '--no-warn-unused-cli',
        ])
        jobs = [] if 'CMAKE_BUILD_PARALLEL_LEVEL' in os.environ else [str(len(os.sched_getaffinity(0)))]
        self._run(['cmake', '--build', str(self.tree), '--parallel', *jobs])

    def install(self, root: str | None) -> None:
        """Install what was built, below ``root`` (as Debian packaging wants) if it is given."""
        self._run(['cmake', '--install', str(self.tree)], DESTDIR=str(Path(root).resolve()) if root else '')

    @staticmethod
    def _check_tools() -> None:
        tools = ['cmake'] if 'CMAKE_GENERATOR' in os.environ else ['cmake', 'make']
        missing = [tool for tool in tools if shutil.which(tool) is None]
        if not any(shutil.which(compiler) for compiler in (os.environ.get('CXX', 'c++'), 'c++', 'g++', 'clang++')):
            missing.append('g++')
        if missing:
            raise DistutilsSetupError(
                f'{MESSAGES} cannot be built: {", ".join(missing)} not found. '
                f'Install with: sudo apt-get install {" ".join(missing)}')
        absent = [package for package in GENERATORS if ament_prefix_of(package) is None]
        if absent:
            names = ' '.join('ros-$ROS_DISTRO-' + package.replace('_', '-') for package in absent)
            raise DistutilsSetupError(
                f'{MESSAGES} cannot be built: no prefix on AMENT_PREFIX_PATH '
                f'({os.environ.get("AMENT_PREFIX_PATH") or "which is empty"}) holds {", ".join(absent)}. '
                f'Source ROS first (. /opt/ros/$ROS_DISTRO/setup.bash). Done already: sudo apt-get install {names}. '
                f'With no ROS on this machine, "make setup" builds everything in an environment of its own.')

    @staticmethod
    def _run(command: list[str], **extra: str) -> None:
        print('+', ' '.join(command), flush=True)
        done = subprocess.run(command, env={**os.environ, **extra}, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise DistutilsSetupError(
                f'{MESSAGES} cannot be built: "{" ".join(command[:3])} ..." ended with {done.returncode}; '
                f'its output above says why. Where Python modules of the generators are missing: '
                f'sudo apt-get install python3-empy python3-lark python3-catkin-pkg-modules python3-dev')


def messages_found(prefix: Path) -> bool:
    """Return whether another prefix than ``prefix`` provides the interfaces; warn where they differ from ours."""
    found = ament_prefix_of(MESSAGES)
    # Found in the prefix being installed to, they are an earlier build of these sources, to be brought up to date.
    if found is None or found.resolve() == prefix.resolve():
        return False
    print(f'{MESSAGES} is in {found}: not built again', flush=True)
    for source in sorted((SOURCE / 'msg' / 'msg').glob('*.msg')):
        installed = found / 'share' / MESSAGES / 'msg' / source.name
        if not installed.is_file() or installed.read_bytes() != source.read_bytes():
            print(f'warning: {MESSAGES} in {found} has another {source.name} than these sources; rebuild that prefix, '
                  f'or take it off AMENT_PREFIX_PATH to build the interfaces here', file=sys.stderr)
    return True


def installs_files_only(distribution) -> bool:
    """Return whether a wheel is being made: it has no prefix, so the interfaces cannot be part of it."""
    return any(command in distribution.command_obj for command in ('bdist_wheel', 'dist_info', 'editable_wheel'))


class BuildWithMessages(build):
    """``build``, and the interfaces."""

    def run(self) -> None:
        """Build the Python package, then ``msg/``."""
        super().run()
        if installs_files_only(self.distribution):
            print(f'warning: a wheel does not hold {MESSAGES}; the ROS side needs "colcon build"', file=sys.stderr)
            return
        target = self.get_finalized_command('install')
        prefix = installation_prefix(target)
        if not messages_found(prefix):
            python_lib = os.path.relpath(target.install_lib, target.install_data)
            Messages(sys.executable, prefix, self.build_base).build(python_lib)


class InstallWithMessages(install):
    """``install``, and the interfaces."""

    def run(self) -> None:
        """Install the Python package, then ``msg/`` into the same prefix."""
        super().run()
        prefix = installation_prefix(self)
        if not installs_files_only(self.distribution) and not messages_found(prefix):
            self.run_command('build')
            Messages(sys.executable, prefix, self.get_finalized_command('build').build_base).install(self.root)


class DevelopWithMessages(develop):
    """``develop``, which ``colcon build --symlink-install`` runs, and the interfaces."""

    def run(self) -> None:
        """Link the Python package, then install ``msg/`` into the same prefix."""
        super().run()
        # self.prefix is None under colcon: it gives the prefix by changing sys.prefix.
        prefix = Path(self.prefix or sys.prefix)
        if self.uninstall or messages_found(prefix):
            return
        messages = Messages(sys.executable, prefix, self.get_finalized_command('build').build_base)
        messages.build(os.path.relpath(self.install_dir, prefix))
        messages.install(None)


def installation_prefix(command: install) -> Path:
    """Return the prefix of an ``install`` command: where its data files go, the ament index among them."""
    if command.root:
        return Path('/') / os.path.relpath(command.install_data, command.root)
    return Path(command.install_data).resolve()


# setuptools writes sys.executable into the first line of each executable.
sys.executable = environment_interpreter()

setup(
    name=PACKAGE,
    version='0.2.0',
    packages=find_packages(exclude=['test', 'test.*']),
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + PACKAGE]),
        ('share/' + PACKAGE, ['package.xml']),
        ('share/' + PACKAGE + '/launch', sorted(glob('launch/*.launch.py'))),
        ('share/' + PACKAGE + '/config', sorted(glob('config/*.*'))),
    ],
    python_requires='>=3.10',
    install_requires=['setuptools'],
    extras_require={'test': ['pytest']},
    zip_safe=False,
    maintainer='gps_denied_c7 maintainers',
    maintainer_email='maintainers@gps-denied-c7.example',
    description='Keep neural-network inference running on a drone when the GPU stack misbehaves.',
    license='Apache-2.0',
    cmdclass={'build': BuildWithMessages, 'install': InstallWithMessages, 'develop': DevelopWithMessages},
    entry_points={
        'console_scripts': [
            'c7_inference_node = gps_denied_c7.ros.node_main:main',
            'c7_replay = gps_denied_c7.ros.replay_main:main',
            'c7_demo = gps_denied_c7.demo.run:main',
            'c7_bench = gps_denied_c7.bench.run:main',
            'c7_engine = gps_denied_c7.ground.cli:main',
        ],
    },
)
