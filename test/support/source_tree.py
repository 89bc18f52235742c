"""The project's Python files and what they import, read without running them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    'ABOUT_ROS', 'DATA', 'PACKAGE', 'REPOSITORY', 'TESTS',
    'imports_of', 'modules', 'package_imports', 'plain_modules', 'python_files',
]

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = REPOSITORY / 'test'
DATA = TESTS / 'data'
PACKAGE = 'gps_denied_c7'
ABOUT_ROS = (f'{PACKAGE}.ros', f'{PACKAGE}.bench')


def python_files(folder: str) -> list[Path]:
    """Return the Python files below ``folder``, relative to the repository."""
    return sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / folder).rglob('*.py'))


def modules() -> dict[str, Path]:
    """Return dotted name to file, relative to the repository, of each module of the package."""
    found = {}
    for path in python_files(PACKAGE):
        parts = path.with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def plain_modules() -> list[str]:
    """Return the modules that are about no ROS: not the node, and not the benchmark, which measures over it."""
    return sorted(name for name in modules() if not name.startswith(ABOUT_ROS))


def imports_of(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """
    Yield ``(module, names)`` of each absolute import in a file, wherever in the file it stands.

    ``names`` is empty for a plain ``import module``. Imports for type checkers only are left out: they never run.
    """
    tree = ast.parse((REPOSITORY / path).read_text(encoding='utf-8'), str(path))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ('TYPE_CHECKING', 'typing.TYPE_CHECKING'):
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f'{path}:{node.lineno}: relative import'
            yield node.module, tuple(alias.name for alias in node.names)


@functools.cache
def package_imports() -> dict[str, set[str]]:
    """Return, for each module of the package, the modules of the package that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        graph[name] = set()
        for module, names in imports_of(path):
            targets = {f'{module}.{imported}' for imported in names} & known.keys()
            if len(targets) < max(len(names), 1) and module in known:
                targets.add(module)
            # The package itself holds its version and nothing to depend on.
            graph[name] |= targets - {PACKAGE, name}
    return graph
