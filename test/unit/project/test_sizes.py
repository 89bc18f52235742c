"""Sizes that can be read: modules, classes and functions, but for what docs/architecture.md names with its reason."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from support.source_tree import PACKAGE, REPOSITORY, modules

LIMITS = {'module': 450, 'class': 350, 'function': 60}
"""Lines, docstrings and comments included."""
PAGE = REPOSITORY / 'docs' / 'architecture.md'
MARKED = re.compile(r'<!-- sizes: begin -->\n(.*)<!-- sizes: end -->', re.DOTALL)
ROW = re.compile(r'^\| `([\w.]+)` \| .{10,} \|$', re.MULTILINE)
EXCEPTIONS: frozenset[str] = frozenset()
"""Names below the package, at most five; the page gives the reasons."""


def too_large(name: str, source: str) -> Iterator[str]:
    """Yield what of a module is over its limit: the module itself, its classes and functions."""
    tree = ast.parse(source)
    if len(source.splitlines()) > LIMITS['module']:
        yield name
    for node, path in nodes(tree, name):
        kind = 'class' if isinstance(node, ast.ClassDef) else 'function'
        assert node.end_lineno is not None
        if node.end_lineno - node.lineno + 1 > LIMITS[kind]:
            yield path


def nodes(tree: ast.AST, name: str) -> Iterator[tuple[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Yield the classes and functions of a tree, nested ones too, with their names behind that of the module."""
    for node in ast.iter_child_nodes(tree):
        inner = name
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f'{name}.{node.name}'
            yield node, inner
        yield from nodes(node, inner)


def short(name: str) -> str:
    return name.removeprefix(f'{PACKAGE}.')


def test_nothing_is_too_large_to_be_read() -> None:
    """What is over a limit is excepted, and what is excepted is over one."""
    found = {
        short(large) for name, path in modules().items() for large in too_large(name, path.read_text(encoding='utf-8'))
    }
    assert found == EXCEPTIONS


def test_each_exception_has_its_reason() -> None:
    marked = MARKED.search(PAGE.read_text(encoding='utf-8'))
    assert marked is not None
    assert sorted(ROW.findall(marked[1])) == sorted(EXCEPTIONS)
    assert len(EXCEPTIONS) <= 5


SAMPLES = {
    'module': 'x = 1\n',
    'class': 'class Large:\n    """A class."""\n',
    'function': 'def large():\n    """A function."""\n',
    'method': 'class Small:\n    def large(self):\n        """A method."""\n',
    'nested': 'def small():\n    def large():\n        """A function."""\n    return large\n',
}
FOUND = {
    'module': 'a', 'class': 'a.Large', 'function': 'a.large', 'method': 'a.Small.large', 'nested': 'a.small.large',
}  # fmt: skip


@pytest.mark.parametrize('kind', SAMPLES)
@pytest.mark.parametrize('lines', [0, 1])
def test_one_line_over_the_limit_is_found(kind: str, lines: int) -> None:
    """Each sample is filled with comments up to its limit, then by one line more."""
    limit = LIMITS.get(kind, LIMITS['function'])
    head, _, tail = SAMPLES[kind].partition('"""')
    if kind == 'module':
        filled = SAMPLES[kind] * (limit + lines)
    else:
        size = limit - 2 + lines
        filled = f'{head}"""{chr(10) * size}"""\n' + (tail.partition('\n')[2] if kind == 'nested' else '')
    found = [name for name in too_large('a', filled) if name != 'a.small']
    assert found == ([FOUND[kind]] if lines else [])
