"""B-2: everything imported is declared, every pip requirement is pinned, and the manifests agree."""

from __future__ import annotations

import ast
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import gps_denied_c7
from support.source_tree import PACKAGE, REPOSITORY, imports_of, python_files

MESSAGES = 'gps_denied_c7_msgs'

# Where the name that is imported is not the name that is declared.
ROSDEP_KEYS = {
    'cv2': 'python3-opencv', 'numpy': 'python3-numpy', 'PIL': 'python3-pil', 'pytest': 'python3-pytest',
    'yaml': 'python3-yaml',
}
PIP_NAMES = {
    'cuda': 'cuda-python', 'distutils': 'setuptools', 'google': 'protobuf', 'pynvml': 'nvidia-ml-py', 'yaml': 'pyyaml',
}
# tensorrt's wheels carry the CUDA version in their name.
PIP_PREFIXES = {'tensorrt': 'tensorrt-cu'}

FOR_DEVELOPERS = ('demo', 'bench')
RUN_TAGS = ('depend', 'exec_depend')
TEST_TAGS = (*RUN_TAGS, 'build_depend', 'test_depend')
REQUIREMENTS = sorted((REPOSITORY / 'requirements').glob('*.txt'))


def manifest(path: str = 'package.xml') -> ElementTree.Element:
    """Return a parsed package.xml."""
    return ElementTree.parse(REPOSITORY / path).getroot()


def keys(*tags: str) -> set[str]:
    """Return the rosdep keys of the root package.xml under ``tags``."""
    return {(node.text or '').strip() for tag in tags for node in manifest().findall(tag)}


def requirement_lines(path: Path) -> list[str]:
    """Return the requirement lines of a file, without comments and options."""
    lines = (line.partition('#')[0].strip() for line in path.read_text(encoding='utf-8').splitlines())
    return [line for line in lines if line and not line.startswith('-')]


def pip_names(*files: str) -> set[str]:
    """Return the normalised project names that requirement files hold."""
    lines = (line for name in files for line in requirement_lines(REPOSITORY / 'requirements' / name))
    return {re.split(r'[\[=;<> ]', line)[0].lower().replace('_', '-') for line in lines}


def undeclared(files: list[Path], rosdep: set[str], pip: set[str]) -> list[str]:
    """Return what ``files`` import that is neither the project's own, standard, nor declared."""
    own = {PACKAGE, MESSAGES, 'measure', 'support'}
    missing = []
    for path in files:
        for module, _ in imports_of(path):
            top = module.partition('.')[0]
            declared = (
                top in own or top in sys.stdlib_module_names
                or ROSDEP_KEYS.get(top, top) in rosdep
                or PIP_NAMES.get(top, top).replace('_', '-') in pip
                or any(name.startswith(PIP_PREFIXES[top]) for name in pip if top in PIP_PREFIXES)
            )
            if not declared:
                missing.append(f'{path} imports {module}')
    return missing


def test_b2_what_the_package_imports_is_declared() -> None:
    """B-2: a package.xml key, or a line of the runtime or GPU requirements."""
    files = [path for path in python_files(PACKAGE) if path.parts[1] not in FOR_DEVELOPERS] + python_files('launch')
    assert undeclared(files, keys(*RUN_TAGS), pip_names('runtime.txt', 'gpu.txt')) == []


def test_b2_what_the_demo_and_the_tests_import_is_declared() -> None:
    """B-2: the demo, the benchmark and the tests may use the development requirements as well."""
    pip = pip_names('runtime.txt', 'gpu.txt', 'dev.txt')
    folders = [*(f'{PACKAGE}/{folder}' for folder in FOR_DEVELOPERS), 'test', 'tools']
    files = [*(path for folder in folders for path in python_files(folder)), Path('setup.py')]
    assert undeclared(files, keys(*TEST_TAGS), pip) == []


def test_b2_an_undeclared_import_is_seen(tmp_path: Path) -> None:
    """B-2: the comparison names the file and the module, inside a function too."""
    source = tmp_path / 'module.py'
    source.write_text('import json\n\n\ndef work():\n    import surely_not_declared.inner\n')
    assert undeclared([source], keys(*RUN_TAGS), pip_names('runtime.txt')) == [
        f'{source} imports surely_not_declared.inner']


def test_b2_pip_packages_are_no_package_xml_keys() -> None:
    """B-2: rosdep has no key for what only pip offers."""
    only_pip = {'lz4', 'mcap', 'onnx', 'onnxruntime', 'rosbags', 'simplejpeg', 'tensorrt', 'torch', 'tqdm', 'zstandard'}
    named = {key.removeprefix('python3-').removesuffix('-pip') for key in keys(*TEST_TAGS)}
    assert not only_pip & named


def test_b1_package_xml_names_what_building_the_messages_takes() -> None:
    """B-1: rosdep does not look into msg/, so the root names its dependencies, and not it."""
    tags = ('buildtool_depend', 'build_depend', 'depend', 'exec_depend')
    wanted = {
        (node.text or '').strip()
        for tag in tags for node in manifest('msg/package.xml').findall(tag)
    }
    assert wanted <= keys(*tags)
    assert not {PACKAGE, MESSAGES} & keys(*tags, 'test_depend')


@pytest.mark.parametrize('path', REQUIREMENTS, ids=lambda path: path.name)
def test_b2_requirements_are_pinned(path: Path) -> None:
    """B-2: one version each, with an environment marker where Python versions differ."""
    assert requirement_lines(path)
    loose = [line for line in requirement_lines(path) if not re.fullmatch(r'[\w.\[\]-]+==[\w.+]+(; .+)?', line)]
    assert not loose


def test_b1_setuptools_still_has_develop() -> None:
    """B-1: colcon build --symlink-install needs setuptools below 80."""
    pinned = [line for path in REQUIREMENTS for line in requirement_lines(path) if line.startswith('setuptools==')]
    assert pinned
    assert all(int(line.split('==')[1].split('.')[0]) < 80 for line in pinned)


def test_versions_agree() -> None:
    """One version in both manifests, in setup.py and in the package."""
    setup = ast.parse((REPOSITORY / 'setup.py').read_text(encoding='utf-8'))
    call = next(node for node in ast.walk(setup) if isinstance(node, ast.Call) and ast.unparse(node.func) == 'setup')
    in_setup = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == 'version')
    versions = {manifest().findtext('version'), manifest('msg/package.xml').findtext('version'), in_setup}
    assert versions == {gps_denied_c7.__version__}
