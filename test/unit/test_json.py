"""Readers that are derived from the fields of a dataclass: what fits is made, and anything else says where it lies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from gps_denied_c7._json import FieldError, as_array, reader_of
from gps_denied_c7.errors import InferenceError


class Colour(str, Enum):
    RED = 'red'


@dataclass(frozen=True)
class Part:
    name: str
    sizes: tuple[int | None, ...] | None = None


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    pair: tuple[int, str]
    share: float
    known: bool
    colour: Colour
    versions: Mapping[str, str]

    def check(self) -> None:
        if self.share > 1:
            raise InferenceError('a share is at most one.')


WHOLE = Whole((Part('a', (1, None)), Part('b')), (1, 'x'), 1.0, True, Colour.RED, {'cuda': '12'})
VALUE = {
    'parts': [{'name': 'a', 'sizes': [1, None]}, {'name': 'b', 'sizes': None}], 'pair': [1, 'x'], 'share': 1,
    'known': True, 'colour': 'red', 'versions': {'cuda': '12'},
}  # fmt: skip


def test_an_object_by_name_becomes_its_dataclass() -> None:
    found = reader_of(Whole)(VALUE)
    assert found == WHOLE
    assert type(found.share) is float and found.colour is Colour.RED


def test_an_array_of_fields_becomes_its_dataclass() -> None:
    @dataclass(frozen=True)
    class Both:
        part: Part
        number: int

    both = Both(Part('a', (1,)), 2)
    text = json.dumps(both, default=as_array)
    assert text == '[["a", [1]], 2]'
    assert reader_of(Part, arrays=True)(json.loads(text)[0]) == both.part


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        ({'parts': [{'name': 'a'}]}, 'parts[0].sizes: is missing'),
        ({'parts': [{'name': 'a', 'sizes': [1, '2']}]}, 'parts[0].sizes[1]: expected'),
        ({'parts': [{'name': 'a', 'sizes': None, 'more': 1}]}, 'parts[0].more: is unknown'),
        ({'parts': {}}, 'parts: expected a list, found an object'), ({'parts': [[]]}, 'parts[0]: expected an object'),
        ({'pair': [1]}, 'pair: expected 2 items, found 1'), ({'pair': [True, 'x']}, 'pair[0]: expected a whole number'),
        ({'pair': [1 << 64, 'x']}, 'pair[0]: is too large'), ({'pair': [1.0, 'x']}, 'pair[0]: expected a whole number'),
        ({'share': math.nan}, 'share: is not a finite number'), ({'share': 10**400}, 'share: is not a finite number'),
        ({'share': '1'}, 'share: expected a number, found a string'), ({'share': 2}, 'a share is at most one'),
        ({'known': 1}, 'known: expected a boolean'), ({'colour': 'blue'}, "colour: expected one of ['red']"),
        ({'versions': {'cuda': 12}}, 'versions.cuda: expected a string'), ({'versions': []}, 'versions: expected an'),
        ({'extra': 1}, 'extra: is unknown'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_place(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(FieldError) as refusal:
        reader_of(Whole)({**VALUE, **changes})
    assert says in str(refusal.value)
