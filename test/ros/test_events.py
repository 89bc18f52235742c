"""What happens is logged at a limited rate."""

from __future__ import annotations

from gps_denied_c7.ros.events import RateLimiter


def test_a_rate_limiter_counts_what_it_holds_back():
    limiter = RateLimiter(3600.0)
    assert limiter.pass_now('a') == 0
    assert limiter.pass_now('a') is None
    assert limiter.pass_now('b') == 0
    limiter = RateLimiter(0.0)
    limiter.pass_now('a')
    assert limiter.pass_now('a') == 0
