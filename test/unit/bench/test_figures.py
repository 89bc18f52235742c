"""The benchmark's arithmetic: stages that add up, frames that are accounted for, ratios, limits."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gps_denied_c7.bench.cases import BARE, FORTY_LINES, IN_PROCESS, SHIPPED, Case
from gps_denied_c7.bench.figures import (
    STAGES,
    Block,
    CaseResult,
    Result,
    ratio_p50,
    ratio_p99,
    series_of,
    stages_of,
    summarise,
    summarise_bare,
    verdicts,
)
from gps_denied_c7.monitoring.metrics import percentiles

MS = 10**6
SMALL = Case(width=640, height=480, encoding='mono8', model_ms=5)
HD = Case(width=1920, height=1080, encoding='rgb8', model_ms=5)


def answer(stamp_ns: int, *, latency_ms: int = 20) -> dict[str, int]:
    """One frame: 4 ms on its way in, six stages in the node, 1 ms into a message, the rest out."""
    inside = {'queue': 1, 'decode': 1, 'preprocess': 2, 'hand_off': 1, 'engine': 3, 'hand_back': 1}
    return {
        **{f'{stage}_ns': duration * MS for stage, duration in inside.items()},
        'total_ns': (sum(inside.values()) + 1) * MS,
        'stamp_ns': stamp_ns,
        'receive_ns': stamp_ns + 4 * MS,
        'arrival_ns': stamp_ns + latency_ms * MS,
        'bytes': 1024,
    }


def block(latencies_ms: list[int], *, warm_up: int = 0, missing: int = 0, **cpu_s: float) -> Block:
    """Frames 100 ms apart; the last ``missing`` are not answered."""
    stamps = [10**18 + number * 100 * MS for number in range(len(latencies_ms) + missing)]
    answers = [answer(stamp, latency_ms=latency) for stamp, latency in zip(stamps, latencies_ms, strict=False)]
    warm = [answer(10**18 - (number + 1) * 100 * MS, latency_ms=50) for number in range(warm_up)]
    return Block(stamps, warm_up, [*warm, *answers], cpu_s, 2.0)


def result(name: str, p50s: list[float], p99: float, **fields: object) -> Result:
    figures = dataclasses.replace(percentiles(p50s), p99=p99)
    return Result(name=name, title=name, latency=figures, p50_by_repetition=tuple(p50s), **fields)


def test_stages_add_up_to_the_latency():
    stages = stages_of(answer(10**18, latency_ms=20))
    assert list(stages) == list(STAGES)
    assert list(stages.values()) == pytest.approx([4, 1, 1, 2, 1, 3, 1, 1, 6])
    assert sum(stages.values()) == pytest.approx(20)


def test_a_summary_counts_warm_up_among_frames_and_nowhere_else():
    blocks = [block([10, 20, 30], warm_up=2, contestant=0.3), block([20, 40, 60], warm_up=2, contestant=0.5)]
    found = summarise('one', 'One', blocks)
    assert (found.sent, found.answered, found.lost, found.dropped) == (10, 10, 0, None)
    assert found.latency.count == 6 and found.latency.p50 == pytest.approx(25)
    assert found.p50_by_repetition == pytest.approx((20, 40))
    # In 200 ms: of the first answer, 50 ms of 60 and of 70 lie before; of the last, 30 of 110 and 60 of 120 after.
    rates = ((3 - 5 / 6 - 3 / 11) / 0.2, (3 - 5 / 7 - 1 / 2) / 0.2)
    assert found.answered_hz_by_repetition == pytest.approx(rates)
    assert found.answered_hz == pytest.approx(sum(rates) / 2)
    assert found.outside.p50 == pytest.approx(7)
    assert found.cpu_ms_per_answer == pytest.approx({'contestant': 80})
    assert found.cpu_percent == pytest.approx({'contestant': 20})


@pytest.mark.parametrize('period_ms', [28, 30, 31, 33])
@pytest.mark.parametrize('phase_ms', [0, 7, 20, 27])
def test_no_whole_answer_more_or_less_is_in_a_rate(period_ms, phase_ms):
    """An engine that is never idle is as fast in a second and a half as in an hour."""
    began = 10**18
    answers = [answer(began + (number * period_ms + phase_ms - 400) * MS) for number in range(80)]
    one = Block([began, began + 1600 * MS], 0, answers, {}, 2.0)
    assert one.answered_hz == pytest.approx(1000 / period_ms, rel=1e-6)


def test_a_rate_of_few_answers_is_how_many_came():
    """Lost ones between them are not made up for, whenever the few came."""
    began = 10**18
    ends = [began, began + 2000 * MS]
    few = [answer(began + 100 * MS), answer(began + 200 * MS)]
    assert Block(ends, 0, few, {}, 2.0).answered_hz == pytest.approx(1)
    assert Block(ends, 0, [], {}, 2.0).answered_hz == Block(ends[:1], 0, few, {}, 2.0).answered_hz == 0


def test_an_answer_that_was_begun_before_counts_for_its_part_also_where_it_is_the_first():
    """A network of half a second has answered nothing in a short warm-up."""
    began = 10**18
    first = answer(began - 400 * MS, latency_ms=500)
    others = [answer(began + number * 500 * MS, latency_ms=600) for number in range(4)]
    one = Block([began, began + 1600 * MS], 1, [first, *others], {}, 2.0)
    assert one.answered_hz == pytest.approx(2)


def test_the_rate_of_who_answers_everything_is_that_of_the_camera():
    """However long after the image, and whatever was sent before."""
    stamps = [10**18 + number * 33 * MS for number in range(48)]
    warm = [answer(stamps[0] - number * 33 * MS) for number in range(1, 12)]
    one = Block(stamps, 11, [*warm, *map(answer, stamps)], {}, 2.0)
    assert one.answered_hz == pytest.approx(1000 / 33, rel=1e-6)


def test_frames_dropped_by_policy_are_not_lost():
    statuses = {
        'Stream /one/camera_0/image_raw': {'dropped_by_policy': '3', 'lost_before_node': '2'},
        'Stream /one/camera_1/image_raw': {'dropped_by_policy': '1', 'lost_before_node': 'unknown'},
        'Latency': {'publish_p50_ms': '0.25'},
    }
    early = Block((), 4, [answer(1)], {}, 0.0)
    found = summarise('one', 'One', [early, block([10, 20], missing=3, contestant=0.1)], statuses=[statuses])
    assert (found.sent, found.answered, found.dropped, found.lost) == (9, 3, 4, 2)
    assert found.lost_before_node == '2, unknown'
    assert found.publish_call_ms == 0.25
    # The block before the first repetition changes no figure but the counts.
    assert found.p50_by_repetition == pytest.approx((15,)) and found.answered_hz == pytest.approx(5)


def test_what_the_processes_of_a_contestant_tell_is_put_together():
    told = [
        {'Stream /one/image_raw': {'dropped_by_policy': '3', 'lost_before_node': '2'}},
        {'Stream /one/image_raw': {'dropped_by_policy': '4', 'lost_before_node': '0'}, 'Latency': {}},
        *({'Latency': {'publish_p50_ms': text}} for text in ('0.25', '0.75', '0.5')),
    ]
    found = summarise('one', 'One', [block([10], missing=9)], statuses=told)
    assert (found.dropped, found.lost, found.lost_before_node) == (7, 2, '2, 0')
    assert found.publish_call_ms == 0.5


def test_a_contestant_that_answers_nothing_has_no_figures():
    found = summarise('one', 'One', [block([], missing=5, contestant=0.1)])
    assert found.latency is None and not found.stages and found.p50_by_repetition == ()
    assert (found.sent, found.answered, found.lost) == (5, 0, 5)


def test_the_bare_engine_is_counted_by_its_own_time():
    found = summarise_bare(BARE, 'bare', [[10 * MS] * 10, [20 * MS] * 5, [40 * MS] * 2])
    assert found.answered_hz == pytest.approx(50)
    assert found.p50_by_repetition == pytest.approx((10, 20, 40))


def test_ratios_pair_the_repetitions():
    """A machine that is twice as slow for one repetition moves neither contestant's ratio."""
    one, other = result('one', [8, 16, 8], 30), result('other', [10, 20, 10], 20)
    assert ratio_p50(one, other) == pytest.approx(0.8)
    assert ratio_p99(one, other) == pytest.approx(1.5)
    assert ratio_p50(summarise('none', '', []), other) is None
    assert ratio_p99(summarise('none', '', []), other) is None


def limits(case: Case, **fields: object) -> dict[str, tuple[str, bool]]:
    stages = {'message': percentiles([0.2])}
    node = result(SHIPPED, [10.0], 20, stages=stages, outside=percentiles([1.2]), publish_call_ms=0.4, **fields)
    results = {
        BARE: result(BARE, [5], 6, answered_hz_by_repetition=(30.0, 20.0, 10.0)),
        FORTY_LINES: result(FORTY_LINES, [12.5], 16),
        IN_PROCESS: result(IN_PROCESS, [9.8], 20),
        SHIPPED: node,
    }
    return {one.what: (one.measured, one.met) for one in verdicts([CaseResult(case, 5.0, 30.0, results)])}


def test_limits_are_met_and_missed_by_their_figures():
    found = limits(SMALL, idle_percent=2.5, start_s=2.0)
    assert found == {
        'latency p50 / forty lines': ('0.80 x', True),
        'latency p99 / forty lines': ('1.25 x', False),
        'in the node outside the engine, p50': ('1.40 ms', True),
        'isolation process - none, p50': ('0.20 ms', True),
        'active and idle, median': ('2.50 %', False),
        'process start to active, median': ('2.00 s', True),
    }


def test_1080p_has_the_stricter_limit_and_must_lose_nothing():
    found = limits(HD, sent=100, lost=1)
    assert found['latency p50 / forty lines'] == ('0.80 x', False)
    assert found['lost by transport'] == ('1 of 100', False)
    assert limits(HD, sent=100)['lost by transport'] == ('0 of 100', True)
    assert limits(dataclasses.replace(HD, dense_maps=5))['latency p50 / forty lines'][1]


@pytest.mark.parametrize(('rates', 'met'), [((27.0, 18.0, 9.0), True), ((26.9, 17.9, 10.0), False)])
def test_saturated_throughput_is_held_against_the_bare_engine(rates, met):
    """Repetition by repetition, so that a machine that is slower in one moves no ratio."""
    case = dataclasses.replace(SMALL, model_ms=30, rate_hz=0)
    found = limits(case, answered_hz_by_repetition=rates)
    assert found['answers per second / bare engine'][1] is met
    assert 'answers per second / bare engine' not in limits(case)
    assert 'isolation process - none, p50' not in found, 'waiting for one another says nothing about hand-over'


def test_a_case_survives_json():
    plan = dataclasses.replace(HD, dense_maps=2, series=('image size', 'output size'))
    case = CaseResult(plan, 5.1, 30.0, {'one': summarise('one', 'One', [block([10, 20], contestant=0.1)])})
    found = CaseResult.from_json(json.loads(json.dumps(case.to_json())))
    assert found == case and hash(found.case) == hash(plan)


def test_a_case_is_a_point_of_each_of_its_series():
    plans = [('a',), ('a', 'b'), (), ('b',)]
    cases = [CaseResult(dataclasses.replace(SMALL, series=series), 5.0, 30.0, {}) for series in plans]
    assert series_of(cases) == {'a': [cases[0], cases[1]], 'b': [cases[1], cases[3]]}
    assert series_of([cases[2]]) == {}


def test_missing_frames_are_those_dropped_and_those_lost():
    assert result('one', [1], 1, sent=40, lost=1, dropped=3).missing_percent == pytest.approx(10)
    assert result('one', [1], 1, sent=40, lost=1, dropped=None).missing_percent == pytest.approx(2.5)
    assert result('one', [1], 1).missing_percent == 0


@pytest.mark.parametrize(('width', 'height', 'limit'), [(640, 480, 1.0), (1280, 720, 1.0), (1920, 1080, 0.7)])
def test_scaling_cases_are_held_against_the_forty_lines(width, height, limit):
    """The time outside the engine has a limit for 480 lines in grey and 1080 in colour only."""
    case = dataclasses.replace(HD, width=width, height=height)
    results = {name: result(name, [10.0], 20, outside=percentiles([9.0])) for name in (FORTY_LINES, SHIPPED)}
    results[SHIPPED] = dataclasses.replace(results[SHIPPED], stages={'message': percentiles([0.2])})
    found = {one.what: one.limit for one in verdicts([CaseResult(case, 5.0, 30.0, results)])}
    assert found['latency p50 / forty lines'] == found['latency p99 / forty lines'] == f'≤ {limit:g} x'
    assert ('in the node outside the engine, p50' in found) is (height == 1080)
    several = limits(dataclasses.replace(case, cameras=2))
    assert 'in the node outside the engine, p50' not in several, 'frames of two cameras wait for each other'
