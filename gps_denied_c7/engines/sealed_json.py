"""Records of engine files: canonical JSON that carries a digest of itself, so that any changed byte is noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from gps_denied_c7._json import parse_json
from gps_denied_c7._typed_json import FieldError, reader_of
from gps_denied_c7.errors import EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.tensors import TensorSpec

__all__ = ['check_tensors', 'from_sealed_json', 'to_sealed_json']

_T = TypeVar('_T')


def to_sealed_json(record: Any, name: str, schema: int) -> bytes:
    """
    Return the bytes of a record's file.

    :param record: a dataclass.
    :param name: of its kind, as ``manifest``; the digest's key is ``<name>_sha256``.
    :param schema: version of its kind.
    """
    content = {'schema': schema, **dataclasses.asdict(record)}
    return _canonical(content | {f'{name}_sha256': hashlib.sha256(_canonical(content)).hexdigest()})


def from_sealed_json(kind: type[_T], content: bytes, name: str, schema: int, remedy: str) -> _T:
    """
    Read what :func:`to_sealed_json` wrote.

    :raises EngineSchemaMismatchError: for the first thing that is wrong, with ``remedy``.
    """
    key = f'{name}_sha256'
    try:
        values = parse_json(content)
        if not isinstance(values, dict):
            raise FieldError('the file is not an object')
        digest, number = values.pop(key, None), reader_of(int)(values.pop('schema', None))
        if number != schema:
            raise EngineSchemaMismatchError(f'{name}_schema', expected=schema, found=number, remedy=remedy)
        record: _T = reader_of(kind)(values)  # type: ignore[arg-type]
    except (ModelBundleError, FieldError) as error:
        raise EngineSchemaMismatchError(name, expected=f'a whole {name}', found=str(error), remedy=remedy) from error
    # Canonical JSON has one spelling, so any changed byte shows.
    expected = to_sealed_json(record, name, schema)
    if content != expected:
        raise EngineSchemaMismatchError(key, expected=json.loads(expected)[key], found=digest, remedy=remedy)
    return record


def check_tensors(specs: Sequence[TensorSpec]) -> None:
    """Raise ValueError unless there is at least one, each with a shape."""
    if not specs or any(spec.shape is None for spec in specs):
        raise ValueError('an engine has inputs and outputs, each with a shape')


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode() + b'\n'
