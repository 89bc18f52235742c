"""
The graph of an exported program (``models/model.json``), checked before torch turns it into Python.

torch.export reads more into this JSON than data: symbolic sizes go to ``sympify`` and guards to ``exec``, names
of nodes are written into generated source, and a node calls whatever dotted name it gives. So names must be
plain identifiers, every node an ATen operator, every size fixed, and there may be no guards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any

from gps_denied_c7._json import refuse_duplicates

__all__ = ['ProgramRefusedError', 'check_payload_config', 'check_program']

_MAX_DEPTH = 64

_PLAIN = re.compile(r'[A-Za-z0-9_.+-]*', re.ASCII)
_IDENTIFIER = re.compile(r'(?:[A-Za-z_]\w*)?', re.ASCII)
_LOGIC = '|'.join(('and', 'or', 'xor', 'lshift', 'rshift', 'iand', 'ior', 'ixor', 'ilshift', 'irshift'))
_OPERATOR = re.compile(rf'torch\.ops\.aten\.((?:_?[A-Za-z]\w*)|__(?:{_LOGIC})__)\.[A-Za-z]\w*', re.ASCII)

# Operators that open files.
_FILE_OPERATORS = ('from_file', 'save')

# Keys under which only one value is harmless; each stands for something that torch would evaluate or unpickle.
_NEVER = {
    'as_expr': 'a size that is not fixed',
    'expr_str': 'a size that is not fixed',
    'as_graph': 'a graph inside of a graph',
    'as_operator': 'an operator as a value',
    'as_custom_obj': 'a custom object',
    'custom_obj': 'a custom object',
}
_EMPTY = {
    'guards_code': 'guards, which are Python code',
    'range_constraints': 'a size that is not fixed',
    'custom_obj_values': 'custom objects',
    'treespec_namedtuple_fields': 'named tuples',
}
_IDENTIFIERS = ('name', 'as_name', 'forward_arg_names')
_TREES = ('in_spec', 'out_spec')
_TREE_TYPES = ('builtins.tuple', 'builtins.list', 'builtins.dict')
# Printed with repr() where they are code, or not used as code at all.
_FREE_TEXT = ('as_string', 'as_strings', 'metadata')


class ProgramRefusedError(ValueError):
    """An exported program that is more than a graph of ATen operators; the text ends a sentence."""


def check_program(content: bytes) -> None:
    """
    Refuse a graph in which anything but fixed-size ATen operators is asked for.

    :raises ProgramRefusedError: saying what is asked for.
    """
    program = _parse(content)
    if not isinstance(program, dict) or not isinstance(program.get('graph_module'), dict):
        raise ProgramRefusedError('holds no graph')
    _walk(program, '', 0)


def check_payload_config(content: bytes, entries: Container[str]) -> None:
    """
    Refuse a list of weights or constants in which one is pickled or lies elsewhere.

    :param entries: file names that there are in the same directory.
    :raises ProgramRefusedError: naming the tensor.
    """
    config = _parse(content)
    _walk(config, '', 0)
    payloads = config.get('config') if isinstance(config, dict) else None
    if not isinstance(payloads, dict) or not all(isinstance(payload, dict) for payload in payloads.values()):
        raise ProgramRefusedError('holds no list of tensors')
    for name, payload in payloads.items():
        if payload.get('use_pickle') is not False:
            raise ProgramRefusedError(f'has {name!r} as a pickled object')
        if payload.get('path_name') not in entries:
            raise ProgramRefusedError(f'has {name!r} in {payload.get("path_name")!r}, which is not there')


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content.decode('utf-8'), object_pairs_hook=refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise ProgramRefusedError(f'is not JSON: {error}') from error


def _walk(value: Any, key: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ProgramRefusedError('is nested too deeply')
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_text(name, '')
            if name in _NEVER:
                raise ProgramRefusedError(f'has {_NEVER[name]}')
            if name in _EMPTY and inner:
                raise ProgramRefusedError(f'has {_EMPTY[name]}')
            if not (name in _FREE_TEXT and _is_text(inner)):
                _walk(inner, name, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _walk(inner, key, depth + 1)
    elif isinstance(value, str):
        _check_text(value, key)
    elif key == 'target':
        raise ProgramRefusedError(f'has a node that calls {value!r}')


def _is_text(value: Any) -> bool:
    # Looked into, since a tensor may be called so, and what it is called must not hide what it is.
    texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(isinstance(text, str) for text in texts)


def _check_text(text: str, key: str) -> None:
    if key in _TREES:
        _check_tree(text)
    elif key == 'target':
        operator = _OPERATOR.fullmatch(text)
        if operator is None or operator[1] in _FILE_OPERATORS:
            raise ProgramRefusedError(f'has a node that calls {text[:120]!r}')
    elif not (_IDENTIFIER if key in _IDENTIFIERS else _PLAIN).fullmatch(text):
        raise ProgramRefusedError(f'has a name {text[:120]!r}')


def _check_tree(text: str) -> None:
    """Refuse a structure of inputs or outputs other than nested tuples, lists and dicts; others import modules."""
    protocol = _parse(text.encode())
    if not isinstance(protocol, list) or len(protocol) != 2 or protocol[0] != 1:
        raise ProgramRefusedError('describes its inputs or outputs in an unknown way')
    waiting = [protocol[1]]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict) or node.keys() != {'type', 'context', 'children_spec'}:
            raise ProgramRefusedError('describes its inputs or outputs in an unknown way')
        kind, context, children = node['type'], node['context'], node['children_spec']
        if not isinstance(children, list) or (kind is None and (context is not None or children)):
            raise ProgramRefusedError('describes its inputs or outputs in an unknown way')
        if kind is not None and kind not in _TREE_TYPES:
            raise ProgramRefusedError(f'has inputs or outputs of the type {kind!r}')
        if kind is not None:
            _check_tree_context(context)
        waiting += children


def _check_tree_context(context: Any) -> None:
    keys = _parse(context.encode()) if isinstance(context, str) else context
    names = keys if isinstance(keys, list) else [keys] if keys is not None else []
    if not all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in names):
        raise ProgramRefusedError(f'has inputs or outputs named {keys!r}')
