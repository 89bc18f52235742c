"""B-4: the library is plain Python, heavy modules load when used, and imports go one way."""

from __future__ import annotations

from support.source_tree import ABOUT_ROS, PACKAGE, imports_of, modules, package_imports, plain_modules

ROS = (
    'ament_index_python', 'builtin_interfaces', 'cv_bridge', 'diagnostic_msgs', 'geometry_msgs', 'gps_denied_c7_msgs',
    'launch', 'launch_ros', 'lifecycle_msgs', 'rcl_interfaces', 'rclpy', 'rosgraph_msgs', 'sensor_msgs', 'std_msgs',
)
# Each may import what stands before it.
LAYERS = ('errors', 'tensors', 'bundle', 'runtime', 'runtimes', 'rungs', 'chain', 'pipeline', 'ros')


def test_b4_only_the_ros_side_imports_ros() -> None:
    """B-4: not inside a function either."""
    offenders = [
        f'{modules()[name]} imports {module}'
        for name in plain_modules() for module, _ in imports_of(modules()[name]) if module.partition('.')[0] in ROS
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
