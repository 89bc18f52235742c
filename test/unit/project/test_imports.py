"""B-4: the library is plain Python, and imports go one way, from folder to folder."""

from __future__ import annotations

from support.source_tree import ABOUT_ROS, PACKAGE, imports_of, modules, package_imports, plain_modules

ROS = (
    'ament_index_python', 'builtin_interfaces', 'cv_bridge', 'diagnostic_msgs', 'geometry_msgs', 'gps_denied_c7_msgs',
    'launch', 'launch_ros', 'lifecycle_msgs', 'rcl_interfaces', 'rclpy', 'rosgraph_msgs', 'sensor_msgs', 'std_msgs',
)
# A folder's modules may import each other and what stands above their folder; '' holds the package's own modules.
ORDER = (
    '',
    'image',
    'monitoring',
    'model',
    'engines',
    'runtimes.gpu',
    'runtimes',
    'runtimes.trt',
    'runtimes.ort',
    'runtimes.pt.archive_scan',
    'runtimes.pt',
    'failover',
    'worker',
    'decoder',
    'pipeline',
    'ground',
    'ros.bag',
    'ros',
    'demo',
    'bench',
)  # fmt: skip
STRATEGIES = ('ort', 'pt', 'trt')


def folder_of(name: str) -> str:
    """Return the folder of a module, as ORDER names it; a folder's ``__init__`` lies in it."""
    parts = name.split('.')[1:]
    return '.'.join(parts if modules()[name].name == '__init__.py' else parts[:-1])


def test_b4_only_the_ros_side_imports_ros() -> None:
    """B-4: not inside a function either."""
    offenders = [
        f'{modules()[name]} imports {module}'
        for name in plain_modules() for module, _ in imports_of(modules()[name]) if module.partition('.')[0] in ROS
    ]
    assert not offenders


def test_imports_go_one_way() -> None:
    """No module imports one of a folder that stands below its own, not inside a function either."""
    place = {folder: number for number, folder in enumerate(ORDER)}
    assert {folder_of(name) for name in modules()} == set(ORDER)
    assert not [
        f'{name} imports {other}'
        for name, others in package_imports().items() for other in others
        if place[folder_of(other)] > place[folder_of(name)]
    ]


def test_imports_have_no_cycle() -> None:
    """No module needs itself, however indirectly; an import inside a function counts."""
    graph = package_imports()
    assert not [name for name in graph if name in reachable(graph, name)]


def test_runtimes_do_not_know_each_other() -> None:
    """Nothing imports the module of a runtime: the registry alone names them, as text."""
    graph = package_imports()
    concrete = {f'{PACKAGE}.runtimes.{label}.runtime' for label in STRATEGIES}
    assert concrete <= graph.keys()
    assert not [f'{name} imports {other}' for name in graph for other in graph[name] & concrete]


def test_failover_does_not_know_the_runtimes() -> None:
    """It knows their protocol, registry and host profile, and nothing of a vendor."""
    inside = tuple(f'{PACKAGE}.runtimes.{folder}' for folder in (*STRATEGIES, 'gpu'))
    assert not [
        f'{name} imports {other}'
        for name, others in package_imports().items() if folder_of(name) == 'failover'
        for other in others if other.startswith(inside)
    ]


def test_nothing_below_it_imports_the_ros_side() -> None:
    """The ROS side, the demo and the benchmark stand on the library, not the library on them."""
    graph = package_imports()
    sides = (*ABOUT_ROS, f'{PACKAGE}.demo')
    assert not [
        f'{name} imports {other}'
        for name in graph if not name.startswith(sides) for other in graph[name] if other.startswith(sides)
    ]


def test_modules_import_names_from_where_they_are_defined() -> None:
    """The list of the package root is for users: a module that took a name from it would hide what it depends on."""
    known = modules()
    assert not [
        f'{path} imports {name} from {PACKAGE}'
        for path in known.values() for module, names in imports_of(path) if module == PACKAGE
        for name in names if f'{PACKAGE}.{name}' not in known
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
