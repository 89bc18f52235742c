"""F-1: whatever lies in the working directory, no program of it runs in the node, its workers or its helpers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.demo.child_process import Child
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal_sources import NvmlThermal
from gps_denied_c7.runtimes.protocol import ProviderSet
from gps_denied_c7.worker.client import worker_hosts
from gps_denied_c7.worker.process import WorkerProcess
from gps_denied_c7.worker.protocol import WORKER_PROTOCOL
from support import harness
from support.harness import ROOT, image, running_node, wait_until
from support.networks import copying

CAMERA = '/camera/image_raw'
CPU = Rung('onnx_trt_ep', ProviderSet.CPU)

# Everything that the processes import, and what they would if it were there.
IMPORTED = """
import importlib, json, pkgutil, sys
import cv2, onnxruntime, gps_denied_c7
for module in pkgutil.walk_packages(gps_denied_c7.__path__, 'gps_denied_c7.'):
    if 'bench' not in module.name:
        importlib.import_module(module.name)
absent = {'sitecustomize', 'usercustomize', 'pynvml', 'torch', 'tensorrt', 'cuda', 'readline', 'apport_python_hook'}
names = {name.partition('.')[0] for name in sys.modules} | set(sys.stdlib_module_names) | absent
print(json.dumps(sorted(name for name in names if name.isidentifier() and name != '__main__')))
"""
HOSTILE_LIBRARY = """
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
__attribute__((constructor)) static void run(void) {
    int file = open(MARK, O_WRONLY | O_CREAT | O_APPEND, 0666);
    write(file, "library\\n", 8);
    close(file);
}
"""


@dataclass(frozen=True)
class Hostile:
    """A directory with a program of every name, each of which leaves a mark when it is loaded."""

    directory: Path
    mark: Path

    def marks(self) -> str:
        """Return what was loaded."""
        return self.mark.read_text() if self.mark.exists() else ''


def _libraries() -> set[str]:
    """Return the names of the shared libraries that this process has loaded, with and without their versions."""
    loaded = {Path(line.split()[-1]).name for line in Path('/proc/self/maps').read_text().splitlines() if '.so' in line}
    short = {name.partition('.so')[0] + '.so' for name in loaded}
    return loaded | short | {'libnvidia-ml.so.1', 'libcuda.so.1', 'libcudart.so.12', 'libnvinfer.so.10', 'libgomp.so.1'}


@pytest.fixture(scope='module')
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    root = tmp_path_factory.mktemp('hostile')
    made = Hostile(root / 'directory', root / 'mark')
    made.directory.mkdir()
    done = subprocess.run([sys.executable, '-c', IMPORTED], capture_output=True, text=True, check=True, cwd=ROOT)
    names = json.loads(done.stdout.splitlines()[-1])
    assert {'numpy', 'secrets', 'onnxruntime', 'statistics', 'rclpy', 'runpy'} <= set(names)
    for number, name in enumerate(names):
        program = f'open({str(made.mark)!r}, "a").write({name!r} + "\\n")\n'
        (made.directory / f'{name}.py').write_text(program)
        if number % 2:
            (made.directory / name).mkdir()
            (made.directory / name / '__init__.py').write_text(program)
    for name in ('setpriv', 'sh', 'python3', 'ldconfig', 'uname', 'gcc', 'cc', 'objdump', 'ld'):
        (made.directory / name).write_text(f'#!/bin/sh\necho program {name} >>{made.mark}\n')
        (made.directory / name).chmod(0o755)
    compiler = shutil.which('gcc') or shutil.which('cc')
    if compiler:
        source, library = root / 'hostile.c', root / 'hostile.so'
        source.write_text(HOSTILE_LIBRARY)
        words = [compiler, '-shared', '-fPIC', f'-DMARK="{made.mark}"', '-o', str(library), str(source)]
        subprocess.run(words, check=True)
        # None of Python's own loader: nothing would start that could say so.
        for name in {*_libraries(), *(f'{name}.so' for name in names)}:
            os.link(library, made.directory / name)
    return made


@pytest.fixture
def there(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hostile]:
    """This process in the hostile directory, and every kind of search path with entries that lead there."""
    hostile.mark.unlink(missing_ok=True)
    monkeypatch.chdir(hostile.directory)
    for name, separator in (
        ('PYTHONPATH', ':'), ('LD_LIBRARY_PATH', ':'), ('LD_LIBRARY_PATH', ';'), ('PATH', ':'),
    ):  # fmt: skip
        value = os.environ.get(name, '')
        monkeypatch.setenv(name, separator.join(['', '.', value, '']))
    monkeypatch.setenv('PYTHONSTARTUP', str(hostile.directory / 'numpy.py'))
    yield hostile
    assert hostile.marks() == ''


def test_the_installed_node_loads_nothing_of_its_working_directory(hostile, tmp_path, monkeypatch):
    """Without empty entries in the search paths, as a shell or systemd starts it."""
    executable = shutil.which('c7_inference_node')
    if executable is None:
        pytest.skip('c7_inference_node is not installed: run colcon build and source its setup.bash')
    hostile.mark.unlink(missing_ok=True)
    start = subprocess.Popen

    def start_there(words, *, env, **options):
        for name in ('PYTHONPATH', 'LD_LIBRARY_PATH', 'PATH'):
            env[name] = os.pathsep.join(entry for entry in env.get(name, '').split(os.pathsep) if entry)
        return start([executable, *words[3:]], env=env, **{**options, 'cwd': hostile.directory})

    with monkeypatch.context() as patch:
        patch.setattr(harness.subprocess, 'Popen', start_there)
        with running_node({'model_path': copying(tmp_path), 'cpu_threads': 1}) as (_, peer):
            patch.undo()
            peer.start()
            peer.wait_matched(CAMERA)
            for number in range(1, 4):
                assert peer.ask(CAMERA, image(number)).header.stamp.sec == number
    assert hostile.marks() == ''


def test_a_worker_loads_nothing_of_the_working_directory(there, tmp_path):
    """Also with empty and relative entries in the search paths, as colcon's hooks leave them."""
    bundle = ModelBundle.load(Path(copying(tmp_path)))
    host = worker_hosts(bundle, C7InferenceConfig())(CPU)
    try:
        host.load()
        inputs = {spec.name: np.zeros([size or 1 for size in spec.shape], spec.dtype) for spec in host.inputs}
        assert host.infer(inputs)
    finally:
        host.release()


def test_a_spare_worker_loads_nothing_of_the_working_directory(there):
    worker = WorkerProcess.start('a spare', WORKER_PROTOCOL, ('--spare', 'onnx_trt_ep'))
    try:
        assert worker.await_ready(time.monotonic() + 60.0)
    finally:
        worker.release()
        assert worker.join(10.0)


def test_the_nvml_helper_loads_nothing_of_the_working_directory(there, caplog):
    thermal = NvmlThermal()
    thermal.start()
    try:
        # It says that there is no module or no driver, or gives a reading.
        wait_until(lambda: caplog.text or thermal.thermal_state().temperatures_c, 'its first word')
    finally:
        thermal.stop()
    assert 'has sent no reading' not in caplog.text


def test_processes_of_the_demo_load_nothing_of_the_working_directory(there, tmp_path):
    log = tmp_path / 'log'
    with Child('gps_denied_c7.ros.replay_main', ['--help'], os.environ, log=log) as child:
        assert child.wait(60.0) == 0, log.read_text()
    assert 'usage' in log.read_text()
