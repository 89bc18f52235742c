"""N-5: no callback lets an exception out."""

import inspect

import pytest

from gps_denied_c7.ros.guard import CallbackGuard, RateLimiter


@pytest.fixture
def reported():
    return []


@pytest.fixture
def guard(reported):
    return CallbackGuard(lambda name, error: reported.append((name, error)))


def test_an_exception_is_reported_and_kept_in(guard, reported):
    def broken(message):
        raise RuntimeError(message)

    assert guard('subscription', broken)('boom') is None
    ((name, error),) = reported
    assert name == 'subscription' and str(error) == 'boom'


def test_a_failed_service_still_answers(guard):
    def broken(request, response):
        raise RuntimeError

    assert guard('service', broken)('request', 'response') == 'response'


def test_the_signature_stays_since_rclpy_looks_at_it(guard):
    def with_info(message, info):
        """Take both."""

    assert list(inspect.signature(guard('x', with_info)).parameters) == ['message', 'info']


def test_a_result_passes_through(guard, reported):
    assert guard('x', lambda message: message + 1)(1) == 2
    assert reported == []


def test_a_rate_limiter_counts_what_it_holds_back():
    limiter = RateLimiter(3600.0)
    assert limiter.pass_now('a') == 0
    assert limiter.pass_now('a') is None
    assert limiter.pass_now('b') == 0
    limiter = RateLimiter(0.0)
    limiter.pass_now('a')
    assert limiter.pass_now('a') == 0
