"""Errors that are kept: what leads from one to the next is followed to its end."""

from __future__ import annotations

from gps_denied_c7.errors import C7Error, error_and_causes


def test_every_cause_and_context_is_found_once_also_in_a_circle():
    first, second, third = C7Error('first.'), OSError('second'), ValueError('third')
    first.__cause__, first.__context__ = second, third
    second.__context__ = first
    assert list(error_and_causes(first))[0] is first
    assert {id(error) for error in error_and_causes(first)} == {id(first), id(second), id(third)}
    assert len(list(error_and_causes(first))) == 3
    assert list(error_and_causes(third)) == [third]
