"""What is published is the network's answer to that image, whatever becomes of the workers and the model meanwhile."""

from __future__ import annotations

import pytest

from measure import answers

pytestmark = pytest.mark.once


def test_every_published_tensor_is_that_of_plain_session_run_under_kills_stops_and_swaps(tmp_path):
    """The short form of the second half of ``make soak``."""
    account, verdict = answers.run(tmp_path, answers=400, rate_hz=60.0, pause_s=(0.3, 1.0), answered_between=True)
    print(f'compared: {dict(verdict.compared)}, blows: {dict(verdict.blows)}, swaps: {verdict.swaps}')
    assert verdict.problems() == []
    assert account.problems() == []
    assert set(verdict.compared) == set(answers.MODELS) and verdict.blows
