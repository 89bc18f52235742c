"""Who competes in what."""

from __future__ import annotations

import itertools

import pytest

from gps_denied_c7.bench.cases import CONTESTANTS, IN_PROCESS, Case, full_cases, present_contestants, quick_cases


def test_a_contestant_whose_parameter_is_not_declared_is_left_out():
    assert IN_PROCESS not in [one.name for one in present_contestants({'model_path'})]
    assert present_contestants({'model_path', 'isolation'}) == CONTESTANTS


@pytest.mark.parametrize('cases', [quick_cases(), full_cases()], ids=['quick', 'full'])
def test_every_case_has_a_name_of_its_own_and_known_contestants(cases):
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    assert {name for case in cases for name in case.contestants} <= {one.name for one in CONTESTANTS}


def test_the_full_matrix_has_every_combination():
    found = {
        (case.height, case.model_ms, case.large_outputs, case.rate_hz, case.cameras)
        for case in full_cases() if case.seconds is None
    }  # fmt: skip
    assert found == set(itertools.product((480, 1080), (5, 30, 100), (False, True), (10, 30, 60, 0), (1, 2, 4)))


def test_saturation_sends_more_than_the_engine_can_answer():
    case = Case(width=640, height=480, encoding='mono8', model_ms=30, rate_hz=0, cameras=2)
    assert case.sent_hz(25.0) * 2 >= 1.5 * 1000 / 25.0
    assert case.is_overloaded
    assert Case(width=640, height=480, encoding='mono8', model_ms=30, rate_hz=10).sent_hz(25.0) == 10
