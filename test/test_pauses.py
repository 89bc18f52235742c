"""F-6, F-7: each pause is twice as long as the one before, up to a limit."""

from __future__ import annotations

import pytest

from gps_denied_c7.pauses import Pauses

BOUNDS_S = (1.0, 5.0)


@pytest.fixture
def pauses(clock):
    return Pauses(clock)


def length_s(pauses, clock, what='x'):
    """Return how long the pause of ``what`` lasts from now."""
    for tenths in range(1000):
        if pauses.over(what):
            return tenths / 10
        clock.ns += 100_000_000
    pytest.fail('it does not end')


def test_pauses_grow_to_a_limit(pauses, clock):
    lengths = []
    for _ in range(5):
        pauses.begin('x', BOUNDS_S)
        lengths.append(length_s(pauses, clock))
    assert lengths == pytest.approx([1.0, 2.0, 4.0, 5.0, 5.0], abs=0.11)


def test_what_has_not_failed_need_not_wait(pauses):
    pauses.begin('x', BOUNDS_S)
    assert 'x' in pauses and not pauses.over('x')
    assert 'y' not in pauses and pauses.over('y')


def test_what_is_forgotten_begins_anew(pauses, clock):
    pauses.begin('x', BOUNDS_S)
    pauses.begin('x', BOUNDS_S)
    pauses.forget('x')
    assert pauses.over('x')
    pauses.begin('x', BOUNDS_S)
    assert length_s(pauses, clock) == pytest.approx(1.0, abs=0.11)
    pauses.begin('y', BOUNDS_S)
    pauses.clear()
    assert 'x' not in pauses and pauses.over('y')
