"""What a user of the library imports: from the package root, listed in the docs, loaded when first asked for."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

import gps_denied_c7
from support.source_tree import PACKAGE, REPOSITORY

PAGE = REPOSITORY / 'docs' / 'reference' / 'library.md'
ROW = re.compile(r'^\| `(\w+)` \| .+ \| `([\w.]+)` \|$', re.MULTILINE)
DEFINED_IN = {name: module for module, names in gps_denied_c7._HOMES.items() for name in names}


def test_the_docs_list_what_the_package_root_has() -> None:
    """Each name once, with the module that it comes from."""
    rows = ROW.findall(PAGE.read_text(encoding='utf-8'))
    assert sorted(name for name, _ in rows) == sorted(gps_denied_c7.__all__)
    assert dict(rows) == DEFINED_IN


def test_type_checkers_and_editors_know_each_name() -> None:
    tree = ast.parse((REPOSITORY / PACKAGE / '__init__.py').read_text(encoding='utf-8'))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == 'TYPE_CHECKING'
    typed = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert typed == {name: f'{PACKAGE}.{module}' for name, module in DEFINED_IN.items()}
    assert set(gps_denied_c7.__all__) <= set(dir(gps_denied_c7))


@pytest.mark.parametrize('name', sorted(DEFINED_IN))
def test_each_name_is_what_its_module_exports(name: str) -> None:
    module = importlib.import_module(f'{PACKAGE}.{DEFINED_IN[name]}')
    assert getattr(gps_denied_c7, name) is getattr(module, name)
    assert name in module.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(gps_denied_c7, 'no_such_name')
