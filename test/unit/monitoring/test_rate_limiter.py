"""What happens is logged at a limited rate."""

from __future__ import annotations

from gps_denied_c7.monitoring.rate_limiter import RateLimiter


def test_a_rate_limiter_counts_what_it_holds_back() -> None:
    limiter = RateLimiter(3600.0)
    assert limiter.pass_now('a') == ''
    assert limiter.pass_now('a') is None
    assert limiter.pass_now('b') == ''
    limiter = RateLimiter(0.0)
    limiter.pass_now('a')
    assert limiter.pass_now('a') == ''


def test_a_line_says_how_many_were_held_back_before_it() -> None:
    limiter = RateLimiter(3600.0)
    limiter.pass_now('a')
    assert [limiter.pass_now('a') for _ in range(3)] == [None] * 3
    limiter._window_s = 0.0
    assert limiter.pass_now('a') == ' (3 more since the last message)'
