"""§7: thermal_policy shed leaves frames out step by step, with hysteresis, down to a floor."""

from __future__ import annotations

import pytest

from gps_denied_c7.monitoring.thermal import ThermalLevel, ThermalState
from gps_denied_c7.monitoring.thermal_policy import FrameShedding

HZ = 30.0


class Flight:
    """Frames of one camera at 30 Hz past the policy, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.shedding = FrameShedding(monotonic=lambda: self.now)

    def fly(self, level: ThermalLevel, seconds: float, min_rate_hz: float = 0.1, topic: str = '/camera') -> float:
        """Return the rate of answered frames in Hz."""
        state = ThermalState(level, 'test', 0.1)
        frames = round(seconds * HZ)
        answered = 0
        for _ in range(frames):
            self.now += 1 / HZ
            answered += not self.shedding.drops(topic, state, min_rate_hz)
        return answered / seconds


@pytest.fixture
def flight() -> Flight:
    return Flight()


@pytest.mark.parametrize('level', [ThermalLevel.NOMINAL, ThermalLevel.UNKNOWN])
def test_thermal_policy_sheds_nothing_without_heat(flight: Flight, level: ThermalLevel) -> None:
    assert flight.fly(level, 60.0) == HZ
    assert flight.shedding.step == 0


def test_thermal_policy_takes_a_step_at_once_and_more_while_it_lasts(flight: Flight) -> None:
    assert flight.fly(ThermalLevel.THROTTLED, 4.8) == pytest.approx(HZ / 2, abs=1)
    assert flight.shedding.step == 1
    flight.fly(ThermalLevel.THROTTLED, 5.0)
    assert flight.shedding.step == 2
    flight.fly(ThermalLevel.THROTTLED, 60.0)
    assert flight.shedding.step == 4
    assert flight.fly(ThermalLevel.THROTTLED, 32.0) == pytest.approx(HZ / 16, abs=0.2)


def test_thermal_policy_takes_every_step_where_it_is_critical(flight: Flight) -> None:
    flight.fly(ThermalLevel.CRITICAL, 0.1)
    assert flight.shedding.step == 4


@pytest.mark.parametrize('min_rate_hz', [1.0, 5.0, 12.0, 20.0, 100.0])
def test_thermal_policy_never_goes_below_the_floor(flight: Flight, min_rate_hz: float) -> None:
    rate = flight.fly(ThermalLevel.CRITICAL, 120.0, min_rate_hz)
    expected = min(HZ, max(min_rate_hz, HZ / 16))
    assert rate == pytest.approx(expected, rel=0.05)


def test_thermal_policy_floor_holds_for_each_topic(flight: Flight) -> None:
    state = ThermalState(ThermalLevel.CRITICAL, 'test', 0.1)
    answered = {'/left': 0, '/right': 0}
    for _ in range(600):
        flight.now += 1 / HZ
        for topic in answered:
            answered[topic] += not flight.shedding.drops(topic, state, 5.0)
    assert answered['/left'] == answered['/right'] == pytest.approx(100, abs=3)


def test_thermal_policy_gives_back_slowly_and_not_while_it_flickers(flight: Flight) -> None:
    flight.fly(ThermalLevel.CRITICAL, 1.0)
    for _ in range(10):
        flight.fly(ThermalLevel.NOMINAL, 15.0)
        flight.fly(ThermalLevel.THROTTLED, 0.1)
    assert flight.shedding.step == 4, 'hysteresis'
    flight.fly(ThermalLevel.NOMINAL, 21.0)
    assert flight.shedding.step == 3
    flight.fly(ThermalLevel.NOMINAL, 60.5)
    assert flight.shedding.step == 0
    assert flight.fly(ThermalLevel.NOMINAL, 10.0) == HZ


def test_thermal_policy_a_source_that_fell_silent_does_not_shed_for_ever(flight: Flight) -> None:
    flight.fly(ThermalLevel.CRITICAL, 1.0)
    flight.fly(ThermalLevel.UNKNOWN, 90.0)
    assert flight.shedding.step == 0


def test_thermal_policy_slow_cameras_are_left_alone(flight: Flight) -> None:
    """A topic that brings less than the floor loses nothing."""
    state = ThermalState(ThermalLevel.CRITICAL, 'test', 0.1)
    for _ in range(100):
        flight.now += 1.0
        assert not flight.shedding.drops('/slow', state, 2.0)


def test_thermal_policy_reset_answers_every_frame(flight: Flight) -> None:
    flight.fly(ThermalLevel.CRITICAL, 1.0)
    flight.shedding.reset()
    assert flight.fly(ThermalLevel.NOMINAL, 1.0) == HZ
