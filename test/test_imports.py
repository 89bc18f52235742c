"""B-4: the library is plain Python, heavy modules load when used, and imports go one way."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import PACKAGE, REPOSITORY, imports_of, modules, package_imports

VENDOR = ('cuda', 'cv2', 'onnx', 'onnxruntime', 'pynvml', 'simplejpeg', 'tensorrt', 'torch')
ROS = (
    'ament_index_python', 'builtin_interfaces', 'cv_bridge', 'diagnostic_msgs', 'geometry_msgs', 'gps_denied_c7_msgs',
    'launch', 'launch_ros', 'lifecycle_msgs', 'rcl_interfaces', 'rclpy', 'rosgraph_msgs', 'sensor_msgs', 'std_msgs',
)
# Each may import what stands before it.
LAYERS = ('errors', 'tensors', 'bundle', 'runtime', 'runtimes', 'rungs', 'chain', 'pipeline', 'ros')

# The node, and the processes that measure it over ROS.
ABOUT_ROS = (f'{PACKAGE}.ros', f'{PACKAGE}.bench')
PLAIN = sorted(name for name in modules() if not name.startswith(ABOUT_ROS))

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
def only_numpy(tmp_path: Path) -> str:
    """A folder that holds NumPy and nothing else."""
    spec = importlib.util.find_spec('numpy')
    assert spec is not None and spec.origin is not None
    installed = Path(spec.origin).parent
    for part in (installed, installed.with_name('numpy.libs')):
        if part.is_dir():
            (tmp_path / part.name).symlink_to(part)
    return str(tmp_path)


def test_b4_the_library_imports_in_a_bare_interpreter(only_numpy: str) -> None:
    """B-4: without site-packages, with NumPy alone, every module that is not about ROS imports."""
    brought = imported_by(PLAIN, [str(REPOSITORY), only_numpy], '-I', '-S')
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


def test_b4_only_the_ros_side_imports_ros() -> None:
    """B-4: not inside a function either."""
    offenders = [
        f'{modules()[name]} imports {module}'
        for name in PLAIN for module, _ in imports_of(modules()[name]) if module.partition('.')[0] in ROS
    ]
    assert not offenders


def test_imports_go_one_way() -> None:
    """No module reaches, however indirectly, a layer above its own."""
    graph = package_imports()
    rank = {f'{PACKAGE}.{layer}': place for place, layer in enumerate(LAYERS)}

    def layer_of(name: str) -> int | None:
        return rank.get('.'.join(name.split('.')[:2]))

    offenders = []
    for name in graph:
        own = layer_of(name)
        if own is None:
            continue
        for reached in reachable(graph, name):
            other = layer_of(reached)
            if other is not None and other > own:
                offenders.append(f'{name} reaches {reached}')
    assert not offenders


def test_imports_have_no_cycle() -> None:
    """No module needs itself, however indirectly; an import inside a function counts."""
    graph = package_imports()
    assert not [name for name in graph if name in reachable(graph, name)]


def test_runtimes_do_not_know_each_other() -> None:
    """A runtime imports none of the others; only the factory names them, as text."""
    graph = package_imports()
    labels = ('onnx_trt_ep', 'pytorch_fp16', 'tensorrt')
    concrete = {f'{PACKAGE}.runtimes.{label}' for label in labels} & graph.keys()
    assert concrete
    assert not [f'{name} imports {other}' for name in graph for other in graph[name] & concrete if name != other]


def test_nothing_below_it_imports_the_ros_side() -> None:
    """The ROS side, the demo and the benchmark stand on the library, not the library on them."""
    graph = package_imports()
    sides = (*ABOUT_ROS, f'{PACKAGE}.demo')
    assert not [
        f'{name} imports {other}'
        for name in graph if not name.startswith(sides) for other in graph[name] if other.startswith(sides)
    ]


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Return every module that ``start`` imports, directly or not."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting.extend(graph[name])
    return seen
