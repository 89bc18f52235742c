"""F-1: a Python child has a search path and an environment in which the working directory plays no part."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gps_denied_c7.child_environment import SAFE_DIRECTORY, clean_environment, python_child, worker_environment
from support.source_tree import REPOSITORY

SHOW = """
import json, os, sys
print(json.dumps({'path': sys.path, 'argv': sys.argv[1:], 'name': __name__, 'environ': dict(os.environ)}))
"""


@pytest.mark.parametrize(
    ('name', 'value', 'cleaned'),
    [
        ('PYTHONPATH', '/a::/b:', '/a:/b'),
        ('PYTHONPATH', ':', None),
        ('PYTHONPATH', '', None),
        ('PYTHONPATH', 'src:./x:../y:.', None),
        ('LD_LIBRARY_PATH', ';/a;;/b', '/a:/b'),
        ('LD_LIBRARY_PATH', '/a:$ORIGIN/../lib:${ORIGIN}:lib', '/a:$ORIGIN/../lib:${ORIGIN}'),
        ('LD_PRELOAD', 'libgomp.so.1 ./evil.so:/opt/good.so  ', 'libgomp.so.1:/opt/good.so'),
        ('PATH', ':/usr/bin::bin', '/usr/bin'),
        ('PATH', '.', os.defpath),
        ('PYTHONHOME', 'python', None),
        ('PYTHONUSERBASE', '.', None),
        ('TMPDIR', '/with:colon', '/with:colon'),
        ('TMPDIR', 'tmp', None),
        ('PYTHONSTARTUP', '/start.py', None),
        ('PYTHONINSPECT', '1', None),
        ('PYTHONNOUSERSITE', '1', '1'),
    ],
)
def test_paths_that_depend_on_the_working_directory_are_left_out(name, value, cleaned):
    assert clean_environment({name: value, 'OTHER': ':'}).get(name) == cleaned
    assert clean_environment({name: value, 'OTHER': ':'})['OTHER'] == ':'


def test_a_relative_path_is_named_once_and_an_empty_entry_is_no_news(caplog):
    """A developer's relative PYTHONPATH must not be left out in silence; colcon leaves empty ones."""
    with caplog.at_level(logging.WARNING):
        clean_environment({'PYTHONPATH': '/a::'})
        assert caplog.text == ''
        for _ in range(2):
            clean_environment({'PYTHONPATH': '/a:a/folder/of/mine'})
    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert 'PYTHONPATH' in caplog.text and 'a/folder/of/mine' in caplog.text and 'absolute' in caplog.text


def show(directory: Path, environ: dict[str, str]) -> dict:
    """Run a module that lies in ``directory`` as a child, from a working directory with another of its name."""
    modules, elsewhere = directory / 'modules', directory / 'elsewhere'
    for folder, program in ((modules, SHOW), (elsewhere, 'raise SystemExit("the wrong one")')):
        folder.mkdir(exist_ok=True)
        (folder / 'child_that_shows.py').write_text(program)
    search = os.pathsep.join(['', '.', str(modules), environ.get('PYTHONPATH', ''), ''])
    command, cleaned = python_child('child_that_shows', 'one', '--two', environ={**environ, 'PYTHONPATH': search})
    done = subprocess.run(
        ['env', '-C', SAFE_DIRECTORY, *command], cwd=elsewhere, env=cleaned, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_child_has_the_package_the_user_packages_and_no_working_directory(tmp_path, monkeypatch):
    """As pip install --user leaves onnxruntime on a Jetson; with every Python that is supported."""
    base = tmp_path / 'user'
    code = 'import site; print(site.getusersitepackages(), bool(site.ENABLE_USER_SITE))'
    environ = {**os.environ, 'PYTHONUSERBASE': str(base)}
    site, _, enabled = (
        subprocess.run([sys.executable, '-c', code], env=environ, capture_output=True, text=True, check=True)
        .stdout.strip().rpartition(' ')
    )  # fmt: skip
    Path(site).mkdir(parents=True)
    shown = show(tmp_path, worker_environment(environ))
    assert (shown['argv'], shown['name']) == (['one', '--two'], '__main__')
    assert shown['path'][0] == str(REPOSITORY)
    assert (site in shown['path']) == (enabled == 'True')
    assert all(entry.startswith('/') and entry != '/' for entry in shown['path'])
    assert str(tmp_path / 'elsewhere') not in shown['path']
    assert shown['environ']['ORT_DISABLE_TELEMETRY'] == '1'


def test_a_relative_interpreter_still_starts(tmp_path, monkeypatch):
    """As one that was embedded, or started by a relative path, may call itself."""
    monkeypatch.chdir('/')
    monkeypatch.setattr(sys, 'executable', os.path.relpath(sys.executable, '/'))
    command, _ = python_child('gps_denied_c7.worker', environ={})
    assert os.path.isabs(command[0]) and os.access(command[0], os.X_OK)
