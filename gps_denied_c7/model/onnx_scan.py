"""
What a model file consists of, without parsing it: a walk over its protobuf encoding that keeps names of files only.

A parser makes half a kilobyte of an empty node of two bytes, so that a file of some megabytes can take all memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.stalled_reads import note_progress

__all__ = ['MESSAGES', 'MOST_MESSAGES', 'NAME_AGAIN', 'ScannedOnnx', 'one_location', 'scan_onnx']

MOST_MESSAGES = 1_000_000
"""Messages (nodes, attributes, shapes, ...) of a model at most; large language models have some 100,000."""

NAME_AGAIN = 'Put the weights beside the model and export it with relative names.'

_MOST_FIELDS = 16_000_000
_MOST_FILES = 10_000
# More than any parser of protobuf allows; what is deeper is damaged for it.
_MOST_DEPTH = 128
_PATH_BYTES = 4096
_FIELDS_AT_ONCE = 1 << 10
_PAUSE_S = 5e-5

# What can follow a message's tag: messages by the number of the field. A test compares this with onnx's own schema.
MESSAGES: dict[str, dict[int, str]] = {
    'ModelProto': {
        7: 'GraphProto', 8: 'OperatorSetIdProto', 14: 'StringStringEntryProto', 20: 'TrainingInfoProto',
        25: 'FunctionProto', 26: 'DeviceConfigurationProto',
    },
    'GraphProto': {
        1: 'NodeProto', 5: 'TensorProto', 11: 'ValueInfoProto', 12: 'ValueInfoProto', 13: 'ValueInfoProto',
        14: 'TensorAnnotation', 15: 'SparseTensorProto', 16: 'StringStringEntryProto',
    },
    'NodeProto': {5: 'AttributeProto', 9: 'StringStringEntryProto', 10: 'NodeDeviceConfigurationProto'},
    'AttributeProto': {
        5: 'TensorProto', 6: 'GraphProto', 10: 'TensorProto', 11: 'GraphProto', 14: 'TypeProto', 15: 'TypeProto',
        22: 'SparseTensorProto', 23: 'SparseTensorProto',
    },
    'TensorProto': {3: 'TensorProto.Segment', 13: 'StringStringEntryProto', 16: 'StringStringEntryProto'},
    'SparseTensorProto': {1: 'TensorProto', 2: 'TensorProto'},
    'FunctionProto': {
        7: 'NodeProto', 9: 'OperatorSetIdProto', 11: 'AttributeProto', 12: 'ValueInfoProto',
        14: 'StringStringEntryProto',
    },
    'TrainingInfoProto': {
        1: 'GraphProto', 2: 'GraphProto', 3: 'StringStringEntryProto', 4: 'StringStringEntryProto',
    },
    'ValueInfoProto': {2: 'TypeProto', 4: 'StringStringEntryProto'},
    'TensorAnnotation': {2: 'StringStringEntryProto'},
    'TypeProto': {
        1: 'TypeProto.Tensor', 4: 'TypeProto.Sequence', 5: 'TypeProto.Map', 7: 'TypeProto.Opaque',
        8: 'TypeProto.SparseTensor', 9: 'TypeProto.Optional',
    },
    'TypeProto.Tensor': {2: 'TensorShapeProto'},
    'TypeProto.SparseTensor': {2: 'TensorShapeProto'},
    'TypeProto.Sequence': {1: 'TypeProto'},
    'TypeProto.Map': {2: 'TypeProto'},
    'TypeProto.Optional': {1: 'TypeProto'},
    'TensorShapeProto': {1: 'TensorShapeProto.Dimension'},
    'NodeDeviceConfigurationProto': {2: 'ShardingSpecProto'},
    'ShardingSpecProto': {3: 'IntIntListEntryProto', 4: 'ShardedDimProto'},
    'ShardedDimProto': {2: 'SimpleShardedDimProto'},
}  # fmt: skip
_GROUP, _TENSOR, _ENTRY = 'group', 'TensorProto', 'external_data'
# By the whole tag of a field that holds bytes, which is its number with 2 for the kind of its encoding.
_BY_TAG = {kind: {number << 3 | 2: inner for number, inner in MESSAGES.get(kind, {}).items()} for kind in (
    *MESSAGES, *(inner for fields in MESSAGES.values() for inner in fields.values()), _GROUP, _ENTRY)}  # fmt: skip
_BY_TAG[_TENSOR][13 << 3 | 2] = _ENTRY
_DATA_LOCATION = 14 << 3
_KEY, _VALUE = 1 << 3 | 2, 2 << 3 | 2
_WIDTHS = {1: 8, 5: 4}


@dataclass(frozen=True, slots=True)
class ScannedOnnx:
    """
    Say what a walk over a model file has found.

    :param messages: how many messages it holds; a parser needs memory for each.
    :param locations: names of the files in which its constants lie, as it gives them.
    """

    messages: int
    locations: tuple[str, ...]


class _DamagedError(Exception):
    """Not the encoding of a protobuf message."""


def scan_onnx(what: object, data: bytes) -> ScannedOnnx:
    """
    Walk over a model file; other threads run meanwhile, and progress is noted (:mod:`stalled_reads`).

    Of a damaged file, what lies before the damage counts; a parser refuses it.

    :param what: the file, for messages.
    :raises ModelBundleError: it has more parts than a model can have, keeps its weights in too many files, or names
        none or several for one constant.
    """
    scan = _Scan(what, data)
    with contextlib.suppress(_DamagedError, IndexError):
        scan.run()
    return ScannedOnnx(scan.messages, tuple(sorted(scan.locations)))


def one_location(what: object, names: Sequence[str | bytes]) -> str:
    """
    Return the name of the file in which a constant lies.

    :param names: that it gives it; bytes where that is not UTF-8.
    :raises ModelBundleError: there are none or several, or it is not text.
    """
    if len(names) == 1 and isinstance(names[0], str):
        return names[0]
    raise ModelBundleError(
        f'{what} keeps weights in {str(names)[:200]}, which is not the name of one file.', remedy=NAME_AGAIN
    )


class _Scan:
    def __init__(self, what: object, data: bytes) -> None:
        self._what = what
        self._data = data
        self._external = False
        self._names: list[str | bytes] = []
        self._entry: dict[int, bytes] = {}
        self.messages = 0
        self.locations: set[str] = set()

    def run(self) -> None:
        data, position, fields = self._data, 0, 0
        outer: list[tuple[str, int]] = []
        kind, end = 'ModelProto', len(data)
        known = _BY_TAG[kind]
        while True:
            while position >= end:
                if position > end or kind == _GROUP:
                    raise _DamagedError
                self._leave(kind, outer)
                if not outer:
                    return
                kind, end = outer.pop()
                known = _BY_TAG[kind]
            fields += 1
            if fields % _FIELDS_AT_ONCE == 0:
                self._pause(fields)
            tag, position = _varint(data, position)
            if (encoding := tag & 7) == 2:
                size, position = _varint(data, position)
                inner = known.get(tag)
                if inner is None:
                    if kind == _ENTRY:
                        self._entry[tag] = data[position : position + min(size, _PATH_BYTES)]
                    position += size
                    continue
                self.messages += 1
                if position + size > end:
                    raise _DamagedError
                outer.append((kind, end))
                kind, end = inner, position + size
            elif encoding == 0:
                number, position = _varint(data, position)
                if tag == _DATA_LOCATION and kind == _TENSOR:
                    self._external = number == 1
                continue
            elif encoding == 3:
                outer.append((kind, end))
                kind = _GROUP
            elif encoding == 4 and kind == _GROUP:
                kind, end = outer.pop()
            else:
                position += _WIDTHS.get(encoding, len(data) + 1)
                continue
            known = _BY_TAG[kind]
            if len(outer) > _MOST_DEPTH:
                raise _DamagedError

    def _leave(self, kind: str, outer: Sequence[tuple[str, int]]) -> None:
        if kind == _ENTRY:
            if self._entry.get(_KEY) == b'location' and len(self._names) < 2:
                name = self._entry.get(_VALUE, b'')
                try:
                    self._names.append(name.decode())
                except UnicodeDecodeError:
                    self._names.append(name)
            self._entry = {}
        elif kind == _TENSOR:
            # What training starts from, no session reads.
            if self._external and outer[1][0] != 'TrainingInfoProto':
                self.locations.add(one_location(self._what, self._names))
            self._names, self._external = [], False

    def _pause(self, fields: int) -> None:
        """Have other threads run, and refuse what goes on for too long."""
        note_progress()
        time.sleep(_PAUSE_S)
        for found, most, of_what in (
            (self.messages, MOST_MESSAGES, 'nodes, attributes and other parts'),
            (fields, _MOST_FIELDS, 'fields'),
            (len(self.locations), _MOST_FILES, 'files with weights'),
        ):
            if found > most:
                raise ModelBundleError(
                    f'{self._what}: has more than {most} {of_what}; no model that can be served has as many.',
                    remedy='Copy or export the model again.',
                )


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a number and where it ends; raises IndexError where the data ends before."""
    byte = data[position]
    if byte < 128:
        return byte, position + 1
    number, shift = byte & 127, 7
    while shift < 70:
        position += 1
        byte = data[position]
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position + 1
        shift += 7
    raise _DamagedError
