"""F-6, F-7: each pause is twice as long as the one before, up to a limit."""

from __future__ import annotations

import pytest

from gps_denied_c7.failover.backoff import Backoff

BOUNDS_S = (1.0, 5.0)


@pytest.fixture
def backoff(clock):
    return Backoff(clock)


def length_s(backoff, clock, what='x'):
    """Return how long the pause of ``what`` lasts from now."""
    for tenths in range(1000):
        if backoff.may_begin(what):
            return tenths / 10
        clock.ns += 100_000_000
    pytest.fail('it does not end')


def test_pauses_grow_to_a_limit(backoff, clock):
    lengths = []
    for _ in range(5):
        backoff.begin('x', BOUNDS_S)
        lengths.append(length_s(backoff, clock))
    assert lengths == pytest.approx([1.0, 2.0, 4.0, 5.0, 5.0], abs=0.11)


def test_a_pause_that_has_been_over_for_as_long_as_the_longest_is_forgotten(backoff, clock):
    for quiet_s, expected in ((0, 1.0), (4.5, 2.0), (4.5, 4.0), (5.5, 1.0)):
        clock.ns += int(quiet_s * 1e9)
        backoff.begin('x', BOUNDS_S)
        assert length_s(backoff, clock) == pytest.approx(expected, abs=0.11)
        backoff.succeed('x')


def test_an_attempt_that_takes_longer_than_any_pause_is_no_sign_that_all_was_well(backoff, clock):
    lengths = []
    for _ in range(4):
        backoff.begin('x', BOUNDS_S)
        lengths.append(length_s(backoff, clock))
        clock.ns += int(60e9)
    assert lengths == pytest.approx([1.0, 2.0, 4.0, 5.0], abs=0.11)
    backoff.begin('x', BOUNDS_S)
    assert length_s(backoff, clock) == pytest.approx(5.0, abs=0.11)
    backoff.succeed('x')
    clock.ns += int(60e9)
    backoff.begin('x', BOUNDS_S)
    assert length_s(backoff, clock) == pytest.approx(1.0, abs=0.11), 'it had succeeded, and failed much later'


def test_what_has_not_failed_need_not_wait(backoff):
    backoff.begin('x', BOUNDS_S)
    assert 'x' in backoff.ends() and not backoff.may_begin('x')
    assert 'y' not in backoff.ends() and backoff.may_begin('y')


def test_what_was_noted_in_error_is_taken_back(backoff, clock):
    backoff.begin('x', BOUNDS_S)
    take_back = backoff.snapshot()
    backoff.begin('x', BOUNDS_S)
    backoff.begin('y', BOUNDS_S)
    take_back()
    assert 'y' not in backoff.ends()
    assert length_s(backoff, clock) == pytest.approx(1.0, abs=0.11)


def test_what_is_reset_begins_anew(backoff, clock):
    backoff.begin('x', BOUNDS_S)
    backoff.begin('x', BOUNDS_S)
    backoff.reset('x')
    assert backoff.may_begin('x')
    backoff.begin('x', BOUNDS_S)
    assert length_s(backoff, clock) == pytest.approx(1.0, abs=0.11)
    backoff.begin('y', BOUNDS_S)
    backoff.clear()
    assert 'x' not in backoff.ends() and backoff.may_begin('y')
