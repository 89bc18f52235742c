"""Each test has one tier, its folder tells which, and tests share code through test/support alone."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from support.source_tree import REPOSITORY, TESTS, imports_of, python_files

TIERS = {'unit', 'process', 'ros', 'launch', 'fuzz', 'packaging', 'gpu'}
# Helper modules, scripts that measure, files that tests read.
NO_TESTS = {'support', 'measure', 'data'}
FILES = python_files('test')


def is_test(path: Path) -> bool:
    return path.name.startswith('test_')


def test_each_file_of_tests_has_one_tier() -> None:
    assert {path.parts[1] for path in FILES if is_test(path)} == TIERS
    assert {folder.name for folder in TESTS.iterdir() if folder.is_dir()} - {'__pycache__'} == TIERS | NO_TESTS


def test_each_tier_is_a_marker(request: pytest.FixtureRequest) -> None:
    """The folder's, and no other tier's."""
    registered = {line.partition(':')[0] for line in request.config.getini('markers')}
    assert registered >= TIERS
    for item in request.session.items:
        assert {mark.name for mark in item.iter_markers()} & TIERS == {item.path.relative_to(TESTS).parts[0]}


def test_beside_the_tests_lie_no_helpers() -> None:
    beside = [path for path in FILES if path.parts[1] in TIERS and not is_test(path) and path.name != 'conftest.py']
    assert beside == []
    assert [path for path in FILES if path.parts[1] in NO_TESTS and is_test(path)] == []


def test_nothing_imports_from_a_file_of_tests() -> None:
    stems = {path.stem for path in FILES if is_test(path)} | {'conftest'}
    assert [
        f'{path} imports {module}' for path in FILES for module, _ in imports_of(path)
        if stems & set(module.split('.'))
    ] == []
    # Programs for other processes are text in the test.
    for path in FILES:
        lines = (REPOSITORY / path).read_text().splitlines()
        assert not [line for line in lines if line.startswith(('from test_', 'import test_'))], path


def test_files_of_tests_have_names_of_their_own() -> None:
    """launch_testing's plugin imports each by its name alone; of two of one name it would stop the run."""
    names = Counter(path.name for path in FILES if is_test(path))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_unit_test_starts_no_process() -> None:
    with pytest.raises(AssertionError, match='test/process'):
        subprocess.run([sys.executable, '-c', ''], check=True)
