"""
Read JSON strictly: every error names its place; unknown and repeated keys are refused.

:func:`reader_of` makes dataclasses of what the parser returned. :class:`Fields` takes an object key by key, for a file
whose reader has more to say: where other files lie, what may be left out, and what to do about an error.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from gps_denied_c7.errors import C7Error, ModelBundleError

__all__ = [
    'FieldError', 'Fields', 'Reader', 'as_array', 'decode_json', 'parse_json', 'reader_of', 'refuse_duplicates',
    'require', 'require_digest', 'require_known',
]  # fmt: skip

_DIGEST = re.compile(r'sha256:[0-9a-f]{64}')
_INT_RANGE = range(-(1 << 63), 1 << 64)
_MAX_NAME_BYTES = 255
_MAX_DEPTH = 32
_REQUIRED = object()
_T = TypeVar('_T')

Reader = Callable[[object], Any]


def decode_json(text: str, unique: Callable[[list[tuple[str, Any]]], Any] | None = None) -> object:
    """
    Parse JSON that is nested 32 levels deep at most, so that code that walks, prints or writes it ends.

    :param unique: makes an object from its pairs of key and value, where it is to refuse some.
    :raises ValueError: the text is not JSON, or is nested deeper.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError('it is nested too deep') from error
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            inner
            for holder in level
            if isinstance(holder, (dict, list))
            for inner in (holder.values() if isinstance(holder, dict) else holder)
        ]
        if not level:
            return value
    raise ValueError(f'it is nested deeper than {_MAX_DEPTH} levels')


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs, or raise ValueError for a key that appears twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f'a key appears twice among {[name for name, _ in pairs]!s:.200}')
    return values


def parse_json(content: bytes) -> object:
    """
    Parse UTF-8 JSON without doubled keys; NaN and infinity are left to the reader of the number.

    :raises ModelBundleError: the content is not JSON.
    """
    try:
        return decode_json(content.decode('utf-8'), refuse_duplicates)
    except ValueError as error:
        raise ModelBundleError(f'not JSON: {error}.', remedy='Write the bundle again.') from error


def _json_type(value: object) -> str:
    """Return what JSON calls a value, with its article."""
    if value is None:
        return 'null'
    names = {dict: 'an object', list: 'a list', str: 'a string', bool: 'a boolean', int: 'a number', float: 'a number'}
    return names.get(type(value), type(value).__name__)


def _plain_text(value: object) -> str:
    """Return text that can be written anywhere, halves of surrogate pairs spelled out."""
    return str(value).encode('utf-8', 'backslashreplace').decode()


def _is_plain(value: object) -> bool:
    """Tell whether no text in a value holds half of a surrogate pair, which cannot be written anywhere."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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
    ``object`` (anything, as it is), text enumerations, ``None``, unions, tuples, mappings with text keys, and
    dataclasses of these. Nothing is converted but whole numbers to ``float``. A dataclass may have a method ``check``,
    which is called and raises ValueError or C7Error for values that contradict each other.

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
    return FieldError(f'expected {what}, found {_json_type(value)}')


def _as_it_is(value: object) -> object:
    return value


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
    return value if value.isascii() else _plain_text(value)


def _null(value: object) -> None:
    if value is not None:
        raise _expected('null', value)


_PLAIN: dict[Any, Reader] = {
    object: _as_it_is, bool: _boolean, int: _integer, float: _number, str: _text, type(None): _null,
}  # fmt: skip


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


class Fields:
    """
    Read one JSON object key by key.

    :param value: what the parser returned.
    :param where: the key that leads to it, as ``artefacts[1]``; empty for the whole.
    :raises ModelBundleError: by every method, naming the key.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ModelBundleError(f'{where or "the file"}: expected an object, found {_json_type(value)}.')
        self._values = value
        self._where = where
        self._taken: set[str] = set()
        for name in value:
            require(_is_plain(name), where or 'the file', f'has a key {name!a}, which is not valid text.')

    def items(self) -> list[tuple[str, Fields]]:
        """Return each key with the object it holds."""
        return [(key, self.child(key)) for key in self._values]

    def key(self, name: str) -> str:
        """Return the full key, as errors spell it."""
        return f'{self._where}.{name}' if self._where else name

    def check(self, holds: bool, name: str, message: str, remedy: str = '') -> None:
        """Refuse the value of ``name`` unless ``holds``."""
        require(holds, self.key(name), message, remedy)

    def take(self, name: str, hint: Any = object, default: Any = _REQUIRED) -> Any:
        """
        Return a value.

        :param hint: its type, as for :func:`reader_of`; as the parser returned it where it is ``object``.
        :param default: returned where the key is absent; without one, the key is required.
        """
        self._taken.add(name)
        if name not in self._values:
            if default is _REQUIRED:
                raise ModelBundleError(f'{self.key(name)}: is missing.', remedy='Add it.')
            return default
        value = self._values[name]
        if hint is not object and not _is_plain(value):
            raise ModelBundleError(
                f'{self.key(name)}: {value!a:.200} is not valid text: it holds half of a surrogate pair.'
            )
        try:
            return reader_of(hint)(value)
        except FieldError as error:
            raise ModelBundleError(f'{self.key(name)}{error.path}: {error.message}.') from error

    def child(self, name: str, default: Any = _REQUIRED) -> Fields:
        """Return a nested object, that of ``default`` where it is absent."""
        return Fields(self.take(name, default=default), self.key(name))

    def children(self, name: str) -> list[Fields]:
        """Return a required list of at least one object."""
        value = self.take(name)
        self.check(isinstance(value, list), name, f'expected a list, found {_json_type(value)}.')
        self.check(len(value) > 0, name, 'is empty.', 'Name at least one.')
        return [Fields(item, f'{self.key(name)}[{index}]') for index, item in enumerate(value)]

    def file(self, name: str, root: Path) -> Path:
        """Return the absolute path of a file that lies, symlinks followed, inside ``root``."""
        text = self.take(name, str)
        parts = PurePosixPath(text).parts
        plain = bool(parts) and text.isprintable() and '\\' not in text and not text.startswith('/')
        plain = plain and all(len(part.encode()) <= _MAX_NAME_BYTES for part in parts)
        self.check(
            plain and '..' not in parts,
            name,
            f'{text!r} is not a plain relative file name.',
            'Name a file inside the bundle, without "..".',
        )
        path = root.joinpath(*parts)
        try:
            inside = path.resolve().is_relative_to(root.resolve())
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelBundleError(f'{self.key(name)}: {text!r} cannot be resolved: {error}.') from error
        self.check(inside, name, f'{text!r} is a link that leaves the bundle.', 'Copy the file into the bundle.')
        return path

    def build(self, make: Callable[..., _T], **values: Any) -> _T:
        """Call ``make``, putting this place before the key that its ModelBundleError names."""
        try:
            return make(**values)
        except ModelBundleError as error:
            prefix = f'{self._where}.' if self._where else ''
            raise ModelBundleError(f'{prefix}{error.message}', remedy=error.remedy) from error

    def close(self) -> None:
        """Refuse every key that was not asked for."""
        for name in self._values:
            if name not in self._taken:
                raise ModelBundleError(
                    f'{self.key(name)}: unknown key.', remedy=f'Known are {sorted(self._taken)}; correct or remove it.'
                )


def require(holds: bool, key: str, message: str, remedy: str = '') -> None:
    """Raise ModelBundleError naming ``key`` unless ``holds``."""
    if not holds:
        raise ModelBundleError(f'{key}: {message}', remedy=remedy)


def require_known(key: str, value: str, known: Sequence[str]) -> None:
    """Raise ModelBundleError naming ``key`` unless ``value`` is one of ``known``."""
    require(value in known, key, f'{value!r} unknown.', f'Known are {list(known)}.')


def require_digest(key: str, value: str) -> None:
    """Raise ModelBundleError naming ``key`` unless ``value`` is spelled ``sha256:<hex>``."""
    require(bool(_DIGEST.fullmatch(value)), key, f'{value!r} is not sha256:<64 lower-case hex digits>.')
