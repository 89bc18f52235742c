"""Read JSON strictly: every error names its key; unknown and repeated keys are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from gps_denied_c7.errors import ModelBundleError

__all__ = [
    'Fields', 'decode_json', 'json_type', 'parse_json', 'plain_text', 'refuse_duplicates', 'require', 'require_digest',
    'require_known',
]  # fmt: skip

_DIGEST = re.compile(r'sha256:[0-9a-f]{64}')
_MAX_NAME_BYTES = 255
_MAX_DEPTH = 32
_T = TypeVar('_T')


class Fields:
    """
    Read one JSON object key by key.

    :param value: what the parser returned.
    :param where: the key that leads to it, as ``artefacts[1]``; empty for the whole.
    :raises ModelBundleError: by every method, naming the key.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ModelBundleError(f'{where or "the file"}: expected an object, found {json_type(value)}.')
        self._values = value
        self._where = where
        self._taken: set[str] = set()
        for name in value:
            require(_is_plain(name), where or 'the file', f'has a key {name!a}, which is not valid text.')

    def names(self) -> list[str]:
        """Return the keys found."""
        return list(self._values)

    def children(self) -> list[tuple[str, Fields]]:
        """Return each key with the object it holds."""
        return [(key, self.object(key)) for key in self._values]

    def key(self, name: str) -> str:
        """Return the full key, as errors spell it."""
        return f'{self._where}.{name}' if self._where else name

    def check(self, holds: bool, name: str, message: str, remedy: str = '') -> None:
        """Refuse the value of ``name`` unless ``holds``."""
        require(holds, self.key(name), message, remedy)

    def take(self, name: str) -> Any:
        """Return a required value of any type."""
        self._taken.add(name)
        if name not in self._values:
            raise ModelBundleError(f'{self.key(name)}: is missing.', remedy='Add it.')
        return self._values[name]

    def text(self, name: str) -> str:
        """Return a required string."""
        value = self.take(name)
        self.check(isinstance(value, str), name, f'expected a string, found {json_type(value)}.')
        self.check(_is_plain(value), name, f'{value!a} is not valid text: it holds half of a surrogate pair.')
        return str(value)

    def integer(self, name: str) -> int:
        """Return a required whole number."""
        value = self.take(name)
        proper = isinstance(value, int) and not isinstance(value, bool)
        self.check(proper, name, f'expected a whole number, found {json_type(value)}.')
        return int(value)

    def number(self, name: str) -> float:
        """Return a required number, infinite where it is too large for a float."""
        value = self.take(name)
        proper = isinstance(value, (int, float)) and not isinstance(value, bool)
        self.check(proper, name, f'expected a number, found {json_type(value)}.')
        try:
            return float(value)
        except OverflowError:
            return math.inf

    def object(self, name: str, default: dict[str, Any] | None = None) -> Fields:
        """Return a nested object, ``default`` where it is absent."""
        self._taken.add(name)
        absent = default is not None and name not in self._values
        return Fields(default if absent else self.take(name), self.key(name))

    def objects(self, name: str) -> list[Fields]:
        """Return a required list of at least one object."""
        value = self.take(name)
        self.check(isinstance(value, list), name, f'expected a list, found {json_type(value)}.')
        self.check(len(value) > 0, name, 'is empty.', 'Name at least one.')
        return [Fields(item, f'{self.key(name)}[{index}]') for index, item in enumerate(value)]

    def texts(self, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """Return a list of strings, ``default`` where it is absent."""
        self._taken.add(name)
        if name not in self._values:
            return default
        value = self.take(name)
        self.check(
            isinstance(value, list) and all(isinstance(item, str) for item in value), name, 'is not a list of strings.'
        )
        return tuple(value)

    def file(self, name: str, root: Path) -> Path:
        """Return the absolute path of a file that lies, symlinks followed, inside ``root``."""
        text = self.text(name)
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


def json_type(value: object) -> str:
    """Return what JSON calls a value, with its article."""
    if value is None:
        return 'null'
    names = {dict: 'an object', list: 'a list', str: 'a string', bool: 'a boolean', int: 'a number', float: 'a number'}
    return names.get(type(value), type(value).__name__)


def plain_text(value: object) -> str:
    """Return text that can be written anywhere, halves of surrogate pairs spelled out."""
    return str(value).encode('utf-8', 'backslashreplace').decode()


def _is_plain(text: str) -> bool:
    return text.isascii() or not any('\ud800' <= character <= '\udfff' for character in text)


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
