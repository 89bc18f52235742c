"""
Names and keywords of ROS's Python packages, read from their sources, and which of them a program uses.

Humble has no wheels, so the project cannot run on it everywhere; but what it calls can be compared with what Humble
has. ``humble_api.json`` holds that, made from checkouts of the distributions' branches by

    python3 test/support/ros_api.py humble/rclpy/rclpy humble/launch/launch ... \\
        --later jazzy/rclpy/rclpy rolling/rclpy/rclpy

A function is listed as its keywords, ending in ``**`` where it takes any; a class as its members, its own call under
``()``; anything else as null. ``later`` are names of members that only newer distributions have: where nothing tells
the type of what a method is called on, these give it away.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ['PACKAGES', 'Problem', 'imported_modules', 'listing', 'problems', 'project_files']

PACKAGES = ('rclpy', 'launch', 'launch_ros', 'launch_testing', 'ament_index_python')
ANY = '**'
CALL = '()'


class Sources:
    """
    Python packages as syntax trees.

    :param roots: directories of packages, each named as the package.
    """

    def __init__(self, roots: Iterable[Path]) -> None:
        self._files: dict[str, Path] = {}
        self._trees: dict[str, dict[str, ast.AST]] = {}
        for root in roots:
            for file in root.rglob('*.py'):
                words = [root.name, *file.relative_to(root).with_suffix('').parts]
                self._files['.'.join(words[:-1] if words[-1] == '__init__' else words)] = file

    def modules(self, package: str) -> list[str]:
        """Return the public modules of a package."""
        return sorted(
            name
            for name in self._files
            if name.split('.')[0] == package and not {'action', 'impl'} & set(name.split('.'))
        )

    def listing(self, module: str) -> dict[str, Any]:
        """Return a module's names; what it imported is described only where it is a package, which imports to show."""
        is_package = self._files[module].name == '__init__.py'
        return {
            name: self._describe(module, name) if is_package or not isinstance(node, ast.ImportFrom) else None
            for name, node in sorted(self._definitions(module).items())
            if not name.startswith('_')
        }

    def _definitions(self, module: str) -> dict[str, ast.AST]:
        if module not in self._trees:
            found = self._trees[module] = {}
            for node in _statements(ast.parse(self._files[module].read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    found[node.name] = node
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
                elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] in PACKAGES):
                    found |= {alias.asname or alias.name: node for alias in node.names}
        return self._trees[module]

    def _find(self, module: str, name: str) -> tuple[str, ast.AST | None]:
        """Return where ``name`` of ``module`` is defined; None for what is no part of these sources."""
        node = self._definitions(module).get(name) if module in self._files else None
        if not isinstance(node, ast.ImportFrom):
            return module, node
        source = self._absolute(module, node)
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        if (source, original) == (module, name) or f'{source}.{original}' in self._files:
            return source, None
        return self._find(source, original)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ''
        is_package = self._files[module].name == '__init__.py'
        parents = module.split('.')[: None if is_package and node.level == 1 else -(node.level - is_package)]
        return '.'.join([*parents, *filter(None, [node.module])])

    def _describe(self, module: str, name: str) -> Any:
        module, node = self._find(module, name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return _keywords(node, bound=False)
        return self._members(module, node) if isinstance(node, ast.ClassDef) else None

    def _members(self, module: str, node: ast.ClassDef) -> dict[str, Any]:
        members: dict[str, Any] = {}
        base_call: list[str] = []
        for base in reversed(node.bases):
            found = self._base(module, base)
            base_call = [*base_call, *(word for word in found.pop(CALL) if word not in base_call)]
            members |= found
        own_call = None
        for item in ast.walk(node):
            # What methods set on self counts as well.
            is_own = isinstance(item, ast.Attribute) and getattr(item.value, 'id', '') == 'self'
            if is_own and isinstance(item.ctx, ast.Store):
                members.setdefault(item.attr, None)
        for item in _statements(node):
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = {getattr(word, 'id', getattr(word, 'attr', '')) for word in item.decorator_list}
                is_value = decorators & {'property', 'setter', 'cached_property'}
                keywords = None if is_value else _keywords(item, bound='staticmethod' not in decorators)
                members[item.name] = keywords
                if item.name in ('__init__', '__new__'):
                    own_call = keywords or []
            elif isinstance(item, ast.ClassDef):
                members[item.name] = self._members(module, item)
            elif isinstance(item, ast.Assign | ast.AnnAssign):
                targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                members |= {target.id: None for target in targets if isinstance(target, ast.Name)}
        if own_call is None:
            own_call = base_call
        elif ANY in own_call and base_call:
            # What a constructor does not know it hands on to its bases'.
            own_call = [*(word for word in own_call if word != ANY), *base_call]
        call = sorted(set(own_call) - {ANY}) + [ANY] * (ANY in own_call)
        listed = {name: members[name] for name in sorted(members) if not name.startswith('_')}
        return {CALL: call, **listed}

    def _base(self, module: str, base: ast.expr) -> dict[str, Any]:
        while isinstance(base, ast.Subscript):
            base = base.value
        name = base.id if isinstance(base, ast.Name) else ''
        where, node = self._find(module, name)
        if isinstance(node, ast.ClassDef):
            return self._members(where, node)
        # typing.Generic and the like take nothing; what lies outside, as an extension module, takes we don't know what.
        return {CALL: [] if name in ('object', 'Generic', 'Protocol', 'ABC', 'Enum', 'IntEnum', 'IntFlag') else [ANY]}


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield the statements of a module or class, and those below its conditions."""
    for child in getattr(node, 'body', []) + getattr(node, 'orelse', []) + getattr(node, 'handlers', []):
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(child)
        else:
            yield child


def _keywords(node: ast.FunctionDef | ast.AsyncFunctionDef, *, bound: bool) -> list[str]:
    arguments = node.args
    named = [argument.arg for argument in arguments.args[1 if bound else 0 :] + arguments.kwonlyargs]
    return named + ([ANY] if arguments.kwarg else [])


def listing(roots: Iterable[Path], modules: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what ``modules`` hold, and all of rclpy's, whose objects are met without importing their classes."""
    sources = Sources(roots)
    wanted = {*sources.modules('rclpy'), *modules}
    return {name: sources.listing(name) for name in sorted(wanted) if name in sources._files}


# --- what a program uses ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Tell what is used where, and not there."""

    file: str
    line: int
    what: str


def _imports(tree: ast.AST) -> Iterator[tuple[str, list[str], ast.stmt]]:
    """Yield (bound name, path of what it stands for, statement)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split('.')[0] in PACKAGES:
                    yield alias.asname or alias.name.split('.')[0], alias.name.split('.'), node
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or '').split('.')[0] in PACKAGES:
            for alias in node.names:
                yield alias.asname or alias.name, [*node.module.split('.'), alias.name], node


def imported_modules(files: Iterable[Path]) -> set[str]:
    """Return the modules of PACKAGES that ``files`` import or import from."""
    modules = set()
    for file in files:
        for _, path, node in _imports(ast.parse(file.read_text())):
            modules.add('.'.join(path if isinstance(node, ast.Import) else path[:-1]))
    return modules


class _Checker(ast.NodeVisitor):
    """Compare one file with what there is."""

    def __init__(self, name: str, tree: ast.AST, modules: dict, later: set[str], own: set[str]) -> None:
        self.found: list[Problem] = []
        self._name = name
        self._modules = modules
        self._later = later - own
        self._own = own
        self._bound = {name: path for name, path, _ in _imports(tree)}
        self._methods = _methods(modules)
        self._flags = {
            target.id: _asked(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self._asked: list[set[str]] = []

    def _tell(self, node: ast.AST, name: str, what: str) -> None:
        if not any(name in asked or ANY in asked for asked in self._asked):
            self.found.append(Problem(self._name, node.lineno, what))

    # What follows a question for a name is guarded by it.

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        flags = [self._flags.get(name, set()) for name in _names(node.test)]
        self._guarded(node, _asked(node.test).union(*flags))

    visit_IfExp = visit_If

    def visit_Try(self, node: ast.Try) -> None:
        caught = {name for handler in node.handlers for name in _names(handler.type)}
        self._guarded(node, {ANY} if caught & {'ImportError', 'AttributeError', 'TypeError'} else set())

    def _guarded(self, node: ast.AST, asked: set[str]) -> None:
        self._asked.append(asked)
        self.generic_visit(node)
        self._asked.pop()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            path = self._bound.get(alias.asname or alias.name)
            if path and path[-1] == alias.name:
                self._resolve(path, node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split('.')[0] in PACKAGES and alias.name not in self._modules:
                self._tell(node, alias.name, f'{alias.name} is no module')

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self._path(node)
        if path:
            self._resolve(path, node)
        else:
            if node.attr in self._later:
                self._tell(node, node.attr, f'.{node.attr}')
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        words = [keyword.arg for keyword in node.keywords if keyword.arg]
        path = self._path(node.func)
        if path:
            thing = self._resolve(path, node.func)
            allowed = thing.get(CALL, [ANY]) if isinstance(thing, dict) else thing
            self._check_words(node, '.'.join(path), words, allowed if allowed is not None else [ANY])
        else:
            self.visit(node.func)
            if isinstance(node.func, ast.Attribute) and node.func.attr not in self._own:
                method = node.func.attr
                self._check_words(node, f'.{method}', words, self._methods.get(method, [ANY]))
        for child in [*node.args, *node.keywords]:
            self.visit(child)

    def _check_words(self, node: ast.Call, what: str, words: list[str], allowed: Iterable[str]) -> None:
        for word in words:
            if word not in allowed and ANY not in allowed:
                self._tell(node, word, f'{what}({word}=)')

    def _path(self, node: ast.expr) -> list[str] | None:
        """Return what a name or a chain of attributes stands for, if it begins with an import."""
        if isinstance(node, ast.Name):
            return self._bound.get(node.id)
        if isinstance(node, ast.Attribute) and (path := self._path(node.value)):
            return [*path, node.attr]
        return None

    def _resolve(self, path: list[str], node: ast.AST) -> Any:
        """Return the description of ``path``; None where nothing is known about it."""
        length = next((n for n in range(len(path), 0, -1) if '.'.join(path[:n]) in self._modules), 0)
        thing: Any = self._modules.get('.'.join(path[:length]))
        if thing is None:
            self._tell(node, path[-1], '.'.join(path))
            return None
        for name in path[length:]:
            if not isinstance(thing, dict) or name.startswith('__'):
                return thing
            if name not in thing:
                self._tell(node, name, '.'.join(path))
                return None
            thing = thing[name]
        return thing if length < len(path) else None


def _names(node: ast.AST | None) -> set[str]:
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name)} if node else set()


def _asked(node: ast.AST) -> set[str]:
    """Return the names that ``hasattr`` asks for, or that are looked up in a signature's parameters."""
    asked = set()
    for item in ast.walk(node):
        if isinstance(item, ast.Call) and isinstance(item.func, ast.Name) and item.func.id == 'hasattr':
            asked |= {word.value for word in item.args[1:] if isinstance(word, ast.Constant)}
        elif isinstance(item, ast.Compare) and isinstance(item.left, ast.Constant) and isinstance(item.ops[0], ast.In):
            asked.add(item.left.value)
    return asked


def _methods(modules: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Return each method's keywords, those of all classes together."""
    found: dict[str, set[str]] = {}

    def collect(thing: Any) -> None:
        for name, member in thing.items() if isinstance(thing, dict) else ():
            if isinstance(member, list) and name != CALL:
                found.setdefault(name, set()).update(member)
            collect(member)

    for module in modules.values():
        for thing in module.values():
            collect(thing)
    return {name: sorted(words) for name, words in found.items()}


def _members(modules: dict[str, dict[str, Any]]) -> set[str]:
    """Return the names of all members of all classes."""
    classes = [thing for module in modules.values() for thing in module.values() if isinstance(thing, dict)]
    return {name for thing in classes for name in thing}


def later_members(older: dict[str, dict[str, Any]], newer: dict[str, dict[str, Any]]) -> set[str]:
    """Return the members that classes of ``older`` have got in ``newer`` and that no class had before."""
    found = set()
    for module, things in newer.items():
        for name, thing in things.items():
            if isinstance(thing, dict) and isinstance(older.get(module, {}).get(name), dict):
                found |= set(thing)
    return found - _members(older)


def _own_names(trees: Iterable[ast.AST]) -> set[str]:
    """Return what a program itself defines: functions, methods and attributes."""
    own = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
    return own


def problems(files: Iterable[Path], api: dict[str, Any]) -> list[Problem]:
    """Return what ``files`` use and ``api`` has not, except where they ask for it first."""
    trees = {file: ast.parse(file.read_text()) for file in files}
    own = _own_names(trees.values())
    found = []
    for file, tree in trees.items():
        if any(_imports(tree)):
            checker = _Checker(file.name, tree, api['modules'], set(api['later']), own)
            checker.visit(tree)
            found += checker.found
    return found


def project_files(*folders: str) -> list[Path]:
    """Return the Python files below ``folders``: by default all that may run on a drone."""
    root = Path(__file__).resolve().parents[2]
    wanted = folders or ('gps_denied_c7', 'launch', 'test')
    return sorted(file for folder in wanted for file in root.glob(f'{folder}/**/*.py'))


def _version(root: Path) -> str:
    return re.search(r'<version>(.*?)</version>', (root.parent / 'package.xml').read_text())[1]


def main() -> None:
    """Write the list to standard output."""
    parser = argparse.ArgumentParser(description='List names and keywords of ROS packages from their sources.')
    parser.add_argument('roots', nargs='+', type=Path, help='directories of packages, each named as the package')
    parser.add_argument('--later', nargs='+', type=Path, default=[], help='the same of newer distributions')
    options = parser.parse_args()
    modules = listing(options.roots, imported_modules(project_files()))
    later: set[str] = set()
    for root in options.later:
        later |= later_members(modules, listing([root], modules))
    versions = {root.name: _version(root) for root in options.roots}
    text = json.dumps({'versions': versions, 'later': sorted(later), 'modules': modules}, indent=1)
    # One line for each name.
    print(re.sub(r'\[[^][{}]*\]', lambda found: re.sub(r'\s+', ' ', found[0]), text))


if __name__ == '__main__':
    main()
