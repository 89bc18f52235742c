"""Records of engine files: canonical JSON that carries a digest of itself, so that any changed byte is noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from gps_denied_c7._json import FieldError, parse_json, reader_of
from gps_denied_c7.errors import EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.tensors import TensorSpec

__all__ = ['SealedRecord', 'check_tensors']

_T = TypeVar('_T', bound='SealedRecord')


class SealedRecord:
    """
    Be the dataclass of a file of canonical JSON that carries a digest of itself.

    A subclass names the ``record`` (as ``manifest``; the digest's key is ``<record>_sha256``), the version of its
    ``schema``, and the ``remedy`` for a file that is not as it was written.
    """

    __slots__ = ()

    record: ClassVar[str]
    schema: ClassVar[int] = 1
    remedy: ClassVar[str]

    def to_json(self) -> bytes:
        """Return the bytes of the record's file."""
        content = {'schema': self.schema, **dataclasses.asdict(self)}  # type: ignore[call-overload]
        return _canonical(content | {f'{self.record}_sha256': hashlib.sha256(_canonical(content)).hexdigest()})

    @classmethod
    def from_json(cls: type[_T], content: bytes) -> _T:
        """
        Read what :meth:`to_json` wrote.

        :raises EngineSchemaMismatchError: for the first thing that is wrong.
        """
        name, remedy = cls.record, cls.remedy
        key = f'{name}_sha256'
        try:
            values = parse_json(content)
            if not isinstance(values, dict):
                raise FieldError('the file is not an object')
            digest, number = values.pop(key, None), reader_of(int)(values.pop('schema', None))
            if number != cls.schema:
                raise EngineSchemaMismatchError(f'{name}_schema', expected=cls.schema, found=number, remedy=remedy)
            record: _T = reader_of(cls)(values)  # type: ignore[arg-type]
        except (ModelBundleError, FieldError) as error:
            raise EngineSchemaMismatchError(
                name, expected=f'a whole {name}', found=str(error), remedy=remedy
            ) from error
        # Canonical JSON has one spelling, so any changed byte shows.
        expected = record.to_json()
        if content != expected:
            raise EngineSchemaMismatchError(key, expected=json.loads(expected)[key], found=digest, remedy=remedy)
        return record


def check_tensors(*roles: Sequence[TensorSpec]) -> None:
    """Raise ValueError unless there is at least one of each role, each with a shape."""
    for specs in roles:
        if not specs or any(spec.shape is None for spec in specs):
            raise ValueError('an engine has inputs and outputs, each with a shape')


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1).encode() + b'\n'
