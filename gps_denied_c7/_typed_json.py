"""Make dataclasses of parsed JSON, strictly, with a reader that is derived once from their fields."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from gps_denied_c7._json import json_type, plain_text
from gps_denied_c7.errors import C7Error

__all__ = ['FieldError', 'as_array', 'reader_of']

_INT_RANGE = range(-(1 << 63), 1 << 64)

Reader = Callable[[object], Any]


class FieldError(ValueError):
    """
    A value that does not fit its type.

    :param message: what is wrong with it.
    :param path: where it lies, as ``.inputs[0].dtype``.
    """

    def __init__(self, message: str, path: str = '') -> None:
        super().__init__(f'{path.lstrip(".")}: {message}' if path else message)
        self.message, self.path = message, path

    def below(self, step: str) -> FieldError:
        """Return the same error as seen from one level up."""
        return FieldError(self.message, step + self.path)


@cache
def reader_of(hint: Any, *, arrays: bool = False) -> Reader:
    """
    Return a function that makes a value of type ``hint`` from what the JSON parser returned.

    Supported are ``bool``, ``int`` (64 bits), ``float`` (finite), ``str`` (halves of surrogate pairs spelled out),
    text enumerations, ``None``, unions, tuples, mappings with text keys, and dataclasses of these. Nothing is
    converted but whole numbers to ``float``. A dataclass may have a method ``check``, which is called and raises
    ValueError or C7Error for values that contradict each other.

    :param arrays: a dataclass is the array of its fields, as :func:`as_array` writes it, not an object by name.
    :return: raises :class:`FieldError`.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return _union(tuple(reader_of(arg, arrays=arrays) for arg in args))
    if origin is tuple:
        items = tuple(reader_of(arg, arrays=arrays) for arg in args if arg is not ...)
        return _sequence(items[0]) if args[-1] is ... else _fixed(items)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(reader_of(args[1], arrays=arrays))
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, arrays)
    if issubclass(hint, Enum):
        return _enumeration(hint)
    return _PLAIN[hint]


def as_array(value: Any) -> Sequence[Any]:
    """Return the fields of a dataclass in their order, for ``json.dumps(default=...)``."""
    return _fields_of(type(value))(value)  # type: ignore[arg-type]


@cache
def _fields_of(kind: Any) -> Callable[[Any], Sequence[Any]]:
    names = [field.name for field in dataclasses.fields(kind)]
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: [getattr(value, name) for name in names]


def _expected(what: str, value: object) -> FieldError:
    return FieldError(f'expected {what}, found {json_type(value)}')


def _boolean(value: object) -> bool:
    if type(value) is not bool:
        raise _expected('a boolean', value)
    return value


def _integer(value: object) -> int:
    if type(value) is not int:
        raise _expected('a whole number', value)
    if value not in _INT_RANGE:
        raise FieldError('is too large a number')
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise _expected('a number', value)
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise FieldError('is not a finite number')
    return number


def _text(value: object) -> str:
    if type(value) is not str:
        raise _expected('a string', value)
    return value if value.isascii() else plain_text(value)


def _null(value: object) -> None:
    if value is not None:
        raise _expected('null', value)


_PLAIN: dict[Any, Reader] = {bool: _boolean, int: _integer, float: _number, str: _text, type(None): _null}


def _union(choices: tuple[Reader, ...]) -> Reader:
    def read(value: object) -> Any:
        errors = []
        for choice in choices:
            try:
                return choice(value)
            except FieldError as error:
                errors.append(error)
        # The choice that accepted the most of it says what is wrong.
        raise max(errors, key=lambda error: len(error.path))

    return read


def _each(readers: Iterable[Reader], values: Sequence[object], step: Callable[[int], str]) -> list[Any]:
    """Return each value as its reader makes it; ``step`` says where the value of an index lies, for errors."""
    items: list[Any] = []
    add = items.append
    try:
        for read, value in zip(readers, values, strict=False):
            add(read(value))
    except FieldError as error:
        raise error.below(step(len(items))) from None
    return items


_index = '[{}]'.format


def _sequence(read_item: Reader) -> Reader:
    def read(value: object) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _expected('a list', value)
        return tuple(_each(itertools.repeat(read_item), value, _index))

    return read


def _fixed(readers: tuple[Reader, ...]) -> Reader:
    def read(value: object) -> tuple[Any, ...]:
        if type(value) is not list:
            raise _expected('a list', value)
        if len(value) != len(readers):
            raise FieldError(f'expected {len(readers)} items, found {len(value)}')
        return tuple(_each(readers, value, _index))

    return read


def _mapping(read_item: Reader) -> Reader:
    def read(value: object) -> dict[str, Any]:
        if type(value) is not dict:
            raise _expected('an object', value)
        names = list(map(_text, value))
        items = _each(itertools.repeat(read_item), list(value.values()), lambda index: f'.{names[index]}')
        return dict(zip(names, items, strict=True))

    return read


def _enumeration(kind: type[Enum]) -> Reader:
    def read(value: object) -> Enum:
        try:
            return kind(_text(value))
        except ValueError:
            raise FieldError(f'expected one of {[member.value for member in kind]}, found {value!a:.100}') from None

    return read


def _dataclass(kind: Any, arrays: bool) -> Reader:
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    readers = [reader_of(hints[name], arrays=arrays) for name in names]
    values_of = _by_order if arrays else _by_name
    check = getattr(kind, 'check', None)

    def read(value: object) -> Any:
        values = _each(readers, values_of(value, names), lambda index: f'.{names[index]}')
        try:
            made = kind(**dict(zip(names, values, strict=True)))
            if check is not None:
                check(made)
        except (ValueError, C7Error) as error:
            raise FieldError(str(error)) from error
        return made

    return read


def _by_order(value: object, names: Sequence[str]) -> list[object]:
    if type(value) is not list:
        raise _expected('a list', value)
    if len(value) != len(names):
        raise FieldError(f'expected {len(names)} fields {names}, found {len(value)}')
    return value


def _by_name(value: object, names: Sequence[str]) -> list[object]:
    if type(value) is not dict:
        raise _expected('an object', value)
    for name in names:
        if name not in value:
            raise FieldError('is missing', f'.{name}')
    for name in value:
        if name not in names:
            raise FieldError(f'is unknown, known are {names}', f'.{name}')
    return [value[name] for name in names]
