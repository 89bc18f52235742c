"""B-4: every module imports in a new interpreter, without the vendors it does not need yet."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.source_tree import PACKAGE, REPOSITORY, modules, plain_modules
from support.torch_attacks import ENTRIES, ZIPS
from support.torch_files import (
    torch_zip,
)

VENDOR = ('cuda', 'cv2', 'onnx', 'onnxruntime', 'pynvml', 'simplejpeg', 'tensorrt', 'torch')
IMPORT_ALL = """
import importlib, json, sys
sys.path[:0] = json.loads(sys.argv[1])
before = set(sys.modules)
for name in json.loads(sys.argv[2]):
    importlib.import_module(name)
print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))
"""


def imported_by(names: list[str], paths: list[str], *options: str) -> set[str]:
    """Return the top-level modules that importing ``names`` brings into a new interpreter."""
    done = subprocess.run(
        [sys.executable, *options, '-c', IMPORT_ALL, json.dumps(paths), json.dumps(names)],
        capture_output=True, text=True, check=False, cwd='/',
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / 'it-ran'


@pytest.fixture
def only_numpy(tmp_path: Path) -> str:
    """A folder that holds NumPy and nothing else."""
    spec = importlib.util.find_spec('numpy')
    assert spec is not None and spec.origin is not None
    installed = Path(spec.origin).parent
    for part in (installed, installed.with_name('numpy.libs')):
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    return str(tmp_path)


def test_the_package_itself_imports_nothing_but_the_standard_library() -> None:
    """B-4: ``import gps_denied_c7`` alone loads no NumPy, no vendor library and no module of the package."""
    program = (
        f'import sys; sys.path.insert(0, {str(REPOSITORY)!r}); before = set(sys.modules); import {PACKAGE}; '
        'print(*(set(sys.modules) - before))'
    )
    done = subprocess.run([sys.executable, '-I', '-S', '-c', program], capture_output=True, text=True, check=True)
    brought = {name for name in done.stdout.split() if name.partition('.')[0] not in sys.stdlib_module_names}
    assert brought == {PACKAGE}


def test_b4_the_library_imports_in_a_bare_interpreter(only_numpy: str) -> None:
    """B-4: without site-packages, with NumPy alone, every module that is not about ROS imports."""
    brought = imported_by(plain_modules(), [str(REPOSITORY), only_numpy], '-I', '-S')
    foreign = brought - set(sys.stdlib_module_names) - {PACKAGE, 'numpy'}
    assert not foreign


def test_b4_the_bare_interpreter_is_bare(only_numpy: str) -> None:
    """B-4: the test above would see an import of ROS or of a vendor library fail."""
    for name in ('rclpy', 'onnxruntime', 'cv2'):
        code = f'import sys; sys.path.insert(0, {only_numpy!r}); import numpy; import {name}'
        done = subprocess.run([sys.executable, '-I', '-S', '-c', code], capture_output=True, text=True, check=False)
        assert f"No module named '{name}'" in done.stderr


def test_b4_no_module_loads_a_vendor_library_when_imported() -> None:
    """B-4: where everything is installed, importing every module, those about ROS too, loads no vendor library."""
    if importlib.util.find_spec('rclpy') is None:
        pytest.skip('rclpy is not installed: the modules about ROS do not import')
    brought = imported_by(sorted(modules()), [*sys.path, str(REPOSITORY)])
    assert not brought & set(VENDOR)
    assert 'rclpy' in brought


def test_r5_every_label_is_looked_up_without_importing_its_vendor() -> None:
    program = """
import sys
from gps_denied_c7.config import RUNTIME_LABELS, C7InferenceConfig
from gps_denied_c7.errors import RuntimeUnavailableError
from gps_denied_c7.runtimes.registry import create_runtime
vendors = tuple(f'gps_denied_c7.runtimes.{part}' for part in ('gpu', 'ort', 'pt', 'trt'))
assert not [name for name in sys.modules if name.startswith(vendors)]
for label in RUNTIME_LABELS:
    try:
        create_runtime(label, C7InferenceConfig())
    except RuntimeUnavailableError as error:
        print(error)
vendors = {'onnxruntime', 'onnx', 'tensorrt', 'torch', 'cuda', 'cv2', 'rclpy'} & set(sys.modules)
assert not vendors, vendors
"""
    # -I -S: ROS wheels import rclpy's bootstrap from a .pth; the project and its packages come by path alone.
    paths = [str(REPOSITORY), *(path for path in sys.path if path.endswith('site-packages'))]
    subprocess.run(
        [sys.executable, '-I', '-S', '-c', f'import sys; sys.path[:0] = {paths!r}\n{program}'], check=True, timeout=60
    )


def test_r4_refusals_come_before_torch_is_imported(marker: Path, tmp_path: Path) -> None:
    """Through the runtime itself, with a torch in the path that would say when it is imported."""
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' / '__init__.py').write_text('raise AssertionError("torch was imported")\n')
    files = []
    for number, make in enumerate(ENTRIES.values()):
        entries, suffix = make(marker)
        files.append(tmp_path / f'{number}{suffix}')
        files[-1].write_bytes(torch_zip(entries))
    for number, (content, _) in enumerate(ZIPS.values()):
        files.append(tmp_path / f'zip{number}.pt2')
        files[-1].write_bytes(content)
    program = """
import json, sys
from pathlib import Path
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import EngineDeserializeError
from gps_denied_c7.runtimes.protocol import EngineCacheEntry, ProviderSet
from gps_denied_c7.runtimes.registry import create_runtime
model = ModelBundle(name='model', root=Path('/'), weights_digest='sha256:' + '0' * 64)
for providers in ProviderSet:
    runtime = create_runtime('pytorch_fp16', C7InferenceConfig(), providers=providers)
    for path in json.loads(sys.argv[1]):
        try:
            runtime.deserialize_engine(EngineCacheEntry(Path(path), None, model))
        except EngineDeserializeError as error:
            assert 'refused before torch' in str(error), error
        else:
            raise AssertionError(path)
assert 'torch' not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, '-c', f'import sys; sys.path[:0] = {[str(tmp_path), str(REPOSITORY)]!r}\n{program}',
         json.dumps([str(file) for file in files])],
        capture_output=True, text=True, check=False, timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not marker.exists()
