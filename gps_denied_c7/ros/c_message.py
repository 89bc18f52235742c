"""
Messages as the C structures that rcl takes and publishes.

A message object of rclpy is a copy of such a structure, its large fields included; code that reads the structure
itself needs no copy of those. The layout follows from a message's fields by the rules of rosidl_generator_c: a member
for each field, in order, strings and sequences as rosidl_runtime_c/string.h and primitives_sequence.h declare them
from Humble to Kilted. rosidl_generator_py's own functions make a structure, free it, and copy it from and to a message
object.
"""

from __future__ import annotations

import array
import ctypes
import importlib
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.type_support import check_for_type_support
from rosidl_parser.definition import AbstractSequence, AbstractString, Array, BasicType, NamespacedType

from gps_denied_c7.errors import C7Error

__all__ = ['BorrowedMessage', 'CMessage', 'CMessageType', 'CSequence', 'CString', 'LayoutError']

_BASIC: dict[str, Any] = {
    'boolean': ctypes.c_bool,
    'octet': ctypes.c_char,
    'char': ctypes.c_uint8,
    'float': ctypes.c_float,
    'double': ctypes.c_double,
    **{f'{kind}{bits}': getattr(ctypes, f'c_{kind}{bits}') for kind in ('int', 'uint') for bits in (8, 16, 32, 64)},
}

_HIGHEST_NUMBER = 2**16

# These functions make and read Python's objects: they need the interpreter's lock, and what they raise is raised here.
_CREATE = ctypes.PYFUNCTYPE(ctypes.c_void_p)
_DESTROY = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_FROM_PYTHON = ctypes.PYFUNCTYPE(ctypes.c_bool, ctypes.py_object, ctypes.c_void_p)
_TO_PYTHON = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p)

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class LayoutError(C7Error):
    """A message type whose C structure is not laid out as known here."""


class _Block(ctypes.Structure):
    _fields_ = [('data', ctypes.c_void_p), ('size', ctypes.c_size_t), ('capacity', ctypes.c_size_t)]


class CSequence(_Block):
    """A sequence: where its values are, how many, and how many there is room for."""

    @classmethod
    def of(cls, values: NDArray) -> CSequence:
        """Return a sequence of an array's values; it does not keep the array, which is contiguous."""
        return cls(values.ctypes.data if values.size else None, values.size, values.size)


class CString(_Block):
    """A string: where its bytes are, how many without the zero that ends them, and how many there is room for."""

    @classmethod
    def of(cls, text: ctypes.Array[ctypes.c_char]) -> CString:
        """Return a string of a buffer's bytes; it does not keep the buffer, which ends with a zero."""
        return cls(ctypes.addressof(text), len(text) - 1, len(text))

    def text(self, limit: int | None = None) -> str:
        """
        Return its text as rclpy does: up to the first zero, and with bytes that are not UTF-8 replaced.

        :param limit: bytes that are read, None for all: the sender may have made it of any length.
        """
        content = ctypes.string_at(self.data, min(self.size, limit or self.size)) if self.size else b''
        return content.partition(b'\0')[0].decode('utf-8', 'replace')


class CMessageType:
    """
    Know a message type's C structure.

    :param message_type: as rclpy takes it.
    :raises LayoutError: the structure is not what the type's fields say, or its package lacks Python's functions. The
        size of a sequence that comes last cannot be checked.
    """

    def __init__(self, message_type: type) -> None:
        check_for_type_support(message_type)
        self.structure = _structure(message_type)
        python = type(message_type)
        try:
            self.create, self.destroy, self.from_python, self.to_python = (
                prototype(_capsule_pointer(getattr(python, name), None))
                for prototype, name in (
                    (_CREATE, '_CREATE_ROS_MESSAGE'),
                    (_DESTROY, '_DESTROY_ROS_MESSAGE'),
                    (_FROM_PYTHON, '_CONVERT_FROM_PY'),
                    (_TO_PYTHON, '_CONVERT_TO_PY'),
                )
            )
        except (AttributeError, ValueError) as error:
            raise LayoutError(f'{message_type.__name__} has no C structure in Python: {error}.') from error
        probe, message = _probe(message_type, itertools.count(2)), CMessage(self)
        message.assign(probe)
        if (name := _first_difference(message.fields, probe)) is not None:
            raise LayoutError(f'{message_type.__name__}.{name} is not where it is from Humble to Kilted.')


class CMessage:
    """
    Hold one message as a C structure, freed with this object.

    :raises MemoryError: no memory for it.
    """

    def __init__(self, kind: CMessageType) -> None:
        self._kind = kind
        self.address = kind.create()
        if not self.address:
            raise MemoryError('no memory for a message.')
        self.fields: Any = kind.structure.from_address(self.address)
        """Its members, read and set in place; valid as long as this object."""

    def assign(self, message: Any) -> None:
        """
        Copy a message object into the structure, which is as it was made.

        :raises ValueError: it cannot be converted.
        """
        if not self._kind.from_python(message, self.address):
            raise ValueError(f'{type(message).__name__} cannot be converted.')

    def message(self) -> Any:
        """Return a copy as a message object."""
        return self._kind.to_python(self.address)

    def view(self, name: str) -> memoryview:
        """Return a read-only view of a ``uint8[]``; it, and each part of it, keeps this object."""
        field = getattr(self.fields, name)
        return np.asarray(_View(self, field.data, field.size)).data if field.size else memoryview(b'')

    def __del__(self) -> None:
        if address := getattr(self, 'address', None):
            self._kind.destroy(address)


class _View:
    """A look at memory that a message keeps; NumPy's way, since ctypes would make a type for each size."""

    def __init__(self, message: CMessage, address: int, size: int) -> None:
        self._message = message
        self.__array_interface__ = {'data': (address, True), 'shape': (size,), 'typestr': '|u1', 'version': 3}


class BorrowedMessage:
    """
    Hold one message as a C structure that owns nothing, to be filled and published again and again.

    What its strings and sequences point to belongs to the code that sets them, which frees it. All are empty first.

    :raises LayoutError: the type has arrays of strings or messages, which are not implemented.
    """

    def __init__(self, kind: CMessageType) -> None:
        self.fields: Any = kind.structure()
        self.address = ctypes.addressof(self.fields)
        _set_empty(self.fields)


# What every empty string of a borrowed message points to: to serialise one, rcl reads up to its zero.
_NO_TEXT = ctypes.create_string_buffer(b'')


def _set_empty(fields: ctypes.Structure) -> None:
    for name, *_ in fields._fields_:
        member = getattr(fields, name)
        if isinstance(member, CString):
            setattr(fields, name, CString.of(_NO_TEXT))
        elif isinstance(member, ctypes.Array) and issubclass(member._type_, ctypes.Structure):
            raise LayoutError(f'{name} is an array of strings or messages, which cannot be borrowed.')
        elif isinstance(member, ctypes.Structure) and not isinstance(member, _Block):
            _set_empty(member)


@cache
def _structure(message_type: Any) -> type[ctypes.Structure]:
    names = message_type.get_fields_and_field_types()
    fields = [(name, _member(kind)) for name, kind in zip(names, message_type.SLOT_TYPES, strict=True)]
    return type(message_type.__name__, (ctypes.Structure,), {'_fields_': fields})


def _member(kind: Any) -> Any:
    if isinstance(kind, BasicType):
        return _BASIC[kind.typename]
    if isinstance(kind, AbstractString):
        return CString
    if isinstance(kind, AbstractSequence):
        return CSequence
    if isinstance(kind, Array):
        return _member(kind.value_type) * kind.size
    return _structure(_class(kind))


def _class(kind: NamespacedType) -> Any:
    return getattr(importlib.import_module('.'.join(kind.namespaces)), kind.name)


def _probe(message_type: Any, numbers: Iterator[int]) -> Any:
    """Return a message whose fields differ from one another; sequences of other than numbers are left empty."""
    message = message_type()
    for name, kind in zip(message_type.get_fields_and_field_types(), message_type.SLOT_TYPES, strict=True):
        number = next(numbers)
        value: Any = None
        if isinstance(kind, BasicType):
            value = _value(kind, number)
        elif isinstance(kind, AbstractString):
            value = 'x' * number
        elif isinstance(kind, AbstractSequence) and isinstance(kind.value_type, BasicType):
            value = [_value(kind.value_type, number)] * number
        elif isinstance(kind, Array) and isinstance(kind.value_type, BasicType):
            value = [_value(kind.value_type, number + index) for index in range(kind.size)]
        elif isinstance(kind, NamespacedType):
            value = _probe(_class(kind), numbers)
        if value is not None:
            setattr(message, name, value)
    return message


def _value(kind: BasicType, number: int) -> Any:
    makers: dict[str, Any] = {'octet': lambda number: bytes([number]), 'boolean': bool, 'float': float, 'double': float}
    return makers.get(kind.typename, int)(number)


def _first_difference(fields: Any, message: Any) -> str | None:
    for name in message.get_fields_and_field_types():
        found, expected = getattr(fields, name), getattr(message, name)
        if isinstance(found, _Block):
            same = _holds(found, expected)
        elif isinstance(found, ctypes.Structure):
            below = _first_difference(found, expected)
            if below is not None:
                return f'{name}.{below}'
            continue
        elif isinstance(found, ctypes.Array):
            same = list(found) == list(expected)
        else:
            same = found == expected
        if not same:
            return name
    return None


def _holds(block: _Block, expected: Any) -> bool:
    if block.size != len(expected) or block.capacity < block.size:
        return False
    if isinstance(expected, str):
        content = expected.encode()
    elif isinstance(expected, array.array):
        content = expected.tobytes()
    else:
        return True
    # Where the layout is another, this is not an address but a number or a flag.
    is_address = (block.data or 0) > _HIGHEST_NUMBER
    return not content or (is_address and ctypes.string_at(block.data, len(content)) == content)
