"""F-3, F-8: an engine has one role, and a change of the serving one is one record."""

from __future__ import annotations

import types

import pytest

from gps_denied_c7.failover.fleet import MOVES, Fleet, Role
from gps_denied_c7.failover.loader import RungEngine
from gps_denied_c7.failover.retiring import RetiringEngines
from gps_denied_c7.failover.status import ChainReports, Transaction
from gps_denied_c7.runtimes.protocol import EngineFacts
from support.scripted_workers import CPU, GPU, OTHER_GPU, Bench


class Host:
    """Stand in for a host: it ends where ``ends`` says so."""

    ends, released = True, False

    def release(self):
        self.released = True

    def join(self, timeout_s):
        return self.ends


class Reported:
    """A fleet with three engines, its clock, and what was recorded."""

    def __init__(self):
        self.now_ns, self.records = 0, []
        reaper = RetiringEngines(emit=self.emit, monotonic_ns=lambda: self.now_ns)
        self.fleet = Fleet(types.SimpleNamespace(loads=[]), reaper)
        self.reports = ChainReports(
            Bench(GPU).bundle, (GPU, OTHER_GPU, CPU), emit=self.emit, on_change=lambda status: None,
            complete=lambda status: status, monotonic_ns=lambda: self.now_ns, cpu_is_a_choice=False,
        )  # fmt: skip
        self.engines = [
            RungEngine(rung, Host(), EngineFacts('provider', (), rung is CPU, 0, (), 0.0, None), 0.1, 1.0)
            for rung in (GPU, OTHER_GPU, CPU)
        ]

    def emit(self, kind, **payload):
        self.records.append((kind, payload))

    def serve(self, engine):
        """Have ``engine`` serve; the one before is late from then on."""
        if (before := self.fleet.serving) is not None:
            self.fleet.move(before, Role.LATE, 'is late')
        if engine in self.fleet.late:
            self.fleet.move(engine, Role.STANDBY, 'answers')
        self.fleet.move(engine, Role.SERVING, 'is asked')
        self.reports.serves(engine, None)

    def transaction(self, *engines):
        """Have engines serve in turn for one frame, a millisecond each; return what was recorded of it."""
        switch = Transaction(self.fleet, self.reports, self.now_ns, frames_affected=1)
        for engine in engines:
            if self.fleet.serving is not None:
                switch.because(self.fleet.serving.rung.name, f'{self.fleet.serving.rung.name} was late')
            self.now_ns += 1_000_000
            self.serve(engine)
        switch.end()
        return self.records


@pytest.fixture
def reported():
    return Reported()


def test_an_engine_has_the_role_that_it_was_given_last(reported):
    fleet, (first, second, third) = reported.fleet, reported.engines
    assert fleet.role(first) is Role.LOADING
    fleet.move(first, Role.SERVING, 'is the first')
    fleet.move(second, Role.STANDBY, 'is the next')
    fleet.move(third, Role.SHADOW, 'is better')
    assert [fleet.role(engine) for engine in reported.engines] == [Role.SERVING, Role.STANDBY, Role.SHADOW]
    fleet.move(first, Role.LATE, 'is late')
    assert (fleet.serving, fleet.late, list(fleet.engines())) == (None, (first,), [first, second, third])
    fleet.move(second, Role.RETIRING, 'died')
    assert second.host.released and list(fleet.engines()) == [first, third]
    assert fleet.snapshot() == (None, None, third, (first,), (), 0)


def test_f4_an_engine_whose_process_does_not_end_is_stuck(reported):
    fleet, first = reported.fleet, reported.engines[0]
    first.host.ends = False
    fleet.move(first, Role.SERVING, 'is the first')
    fleet.move(first, Role.RETIRING, 'hangs')
    assert (fleet.snapshot().retiring, fleet.newly_stuck(), fleet.gpu_hangs()) == (1, [], False)
    reported.now_ns += int(3e9)
    assert (fleet.newly_stuck(), fleet.newly_stuck(), fleet.gpu_hangs()) == ([GPU], [], True)
    first.host.ends = True
    assert (fleet.newly_stuck(), fleet.snapshot().retiring, fleet.gpu_hangs()) == ([], 0, False)


def test_a_change_of_role_that_is_not_listed_is_a_mistake(reported):
    fleet, first = reported.fleet, reported.engines[0]
    fleet.move(first, Role.STANDBY, 'is the first')
    with pytest.raises(AssertionError, match='standby to late'):
        fleet.move(first, Role.LATE, 'was never asked')


@pytest.mark.parametrize('role', [Role.SERVING, Role.STANDBY, Role.SHADOW])
def test_two_engines_do_not_have_the_same_role(reported, role):
    first, second, _ = reported.engines
    reported.fleet.move(first, role, 'is the first')
    with pytest.raises(AssertionError, match=f'two engines are {role.value}'):
        reported.fleet.move(second, role, 'is one too many')


def test_every_role_is_reached_and_all_but_the_last_is_left():
    assert {before for before, _ in MOVES} | {Role.STUCK} == set(Role)
    assert {role for _, role in MOVES} | {Role.LOADING} == set(Role)


def test_f8_the_first_engine_is_no_change(reported):
    assert reported.transaction(reported.engines[0]) == []


def test_f8_from_one_engine_to_another_and_back_is_no_change(reported):
    first, second, _ = reported.engines
    reported.serve(first)
    assert reported.transaction(second, first) == []


def test_f8_from_one_engine_over_another_to_a_third_is_one_change_with_the_first_reason(reported):
    first, second, third = reported.engines
    reported.serve(first)
    payload = {
        'from': GPU.name, 'to': CPU.name, 'reason': f'{GPU.name} was late', 'gap_ms': 2.0, 'frames_affected': 1,
    }  # fmt: skip
    assert reported.transaction(second, third) == [('c7.runtime_switched', payload)]
    assert reported.reports.latest.switches == 1
