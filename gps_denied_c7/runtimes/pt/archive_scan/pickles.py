"""Pickles inside of torch archives, judged opcode by opcode and never run."""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable

__all__ = ['PickleRefusedError', 'check_tensor_pickle', 'check_torchscript_pickle']

_MAX_OPCODES = 1 << 20

_DATA = frozenset((
    'PROTO', 'STOP', 'MARK', 'NONE', 'NEWTRUE', 'NEWFALSE', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT',
    'BINUNICODE', 'SHORT_BINSTRING', 'BINSTRING', 'EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'EMPTY_LIST',
    'APPEND', 'APPENDS', 'LIST', 'EMPTY_DICT', 'SETITEM', 'SETITEMS', 'DICT', 'BINPUT', 'LONG_BINPUT', 'BINGET',
    'LONG_BINGET', 'POP', 'GLOBAL', 'REDUCE', 'BINPERSID',
))
# Objects of TorchScript classes, which torch's own C++ reader makes; Python's would call methods here.
_OBJECTS = frozenset(('NEWOBJ', 'BUILD'))

_TENSOR_GLOBALS = frozenset((
    'collections OrderedDict',
    'torch._utils _rebuild_tensor',
    'torch._utils _rebuild_tensor_v2',
    *(f'torch {kind}Storage' for kind in (
        'Double', 'Float', 'Half', 'BFloat16', 'Long', 'Int', 'Short', 'Char', 'Byte', 'Bool',
    )),
))
_TORCHSCRIPT_GLOBALS = _TENSOR_GLOBALS | {
    'torch device',
    *(f'torch.jit._pickle {name}' for name in (
        'build_boollist', 'build_doublelist', 'build_intlist', 'build_tensorlist', 'restore_type_tag',
    )),
}
# Classes whose code lies in the archive. Those below __torch__.torch.classes are C++ objects with loaders of their own.
_TORCHSCRIPT_CLASS = re.compile(r'__torch__(?!\.torch\.classes\b)(?:\.[A-Za-z_]\w*)* [A-Za-z_]\w*', re.ASCII)


class PickleRefusedError(ValueError):
    """A pickle that could do more than hold tensors; the text says what, for the end of a sentence."""


def check_tensor_pickle(data: bytes) -> None:
    """
    Refuse a pickle that could do more than rebuild plain tensors, in Python's unpickler too.

    :raises PickleRefusedError: naming the first opcode or global that is not on the list.
    """
    _check(data, _DATA, _TENSOR_GLOBALS.__contains__)


def check_torchscript_pickle(data: bytes) -> None:
    """
    Refuse a pickle that could do more than rebuild tensors and objects of the archive's own TorchScript classes.

    Only torch's C++ reader opens these, which knows no Python; the list keeps it to what exporters write.

    :raises PickleRefusedError: naming the first opcode or global that is not on the list.
    """
    _check(
        data,
        _DATA | _OBJECTS,
        lambda name: name in _TORCHSCRIPT_GLOBALS or _TORCHSCRIPT_CLASS.fullmatch(name) is not None,
    )


def _check(data: bytes, opcodes: frozenset[str], allowed: Callable[[str], bool]) -> None:
    end = 0
    try:
        for number, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            if number > _MAX_OPCODES:
                raise PickleRefusedError('is a pickle of too many steps')
            if opcode.name not in opcodes:
                raise PickleRefusedError(f'is a pickle with the opcode {opcode.name} at byte {position}')
            # A module and a name without blanks in them, so that the text has one meaning.
            if opcode.name == 'GLOBAL' and not allowed(str(argument)):
                raise PickleRefusedError(f'is a pickle that asks for {str(argument)[:120]!r}')
            end = (position or 0) + 1
    except PickleRefusedError:
        raise
    except Exception as error:  # what pickletools raises for a damaged pickle is its own to choose
        raise PickleRefusedError(f'is a damaged pickle: {error}') from error
    if end != len(data):
        raise PickleRefusedError('is a pickle with data behind its end')
