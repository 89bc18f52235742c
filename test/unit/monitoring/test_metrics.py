"""Counters and percentiles as one snapshot."""

import numpy as np

from gps_denied_c7.monitoring.metrics import Statistics, percentiles


def test_loss_is_unknown_until_somebody_knows():
    """N-3: never 0 by ignorance."""
    statistics = Statistics()
    statistics.open_streams(('/a',))
    unknown = statistics.snapshot().streams['/a']
    assert unknown.lost is unknown.pushed_out is None
    statistics.set_missed('/a', 1, 2)
    known = statistics.snapshot().streams['/a']
    assert (known.lost, known.pushed_out) == (1, 2)
    statistics.open_streams(('/a',))
    assert statistics.snapshot().streams['/a'].lost is None, 'counting begins anew'


def test_drops_by_policy_are_what_was_replaced_pushed_out_too_old_shed_or_waiting_at_close():
    statistics = Statistics()
    statistics.open_streams(('/a',))
    for event, by in (('received', 9), ('replaced', 1), ('too_old', 2), ('closed', 3), ('shed', 4), ('answered', 3)):
        statistics.count('/a', event, by)
    assert statistics.snapshot().streams['/a'].dropped_by_policy == 10
    statistics.set_missed('/a', 0, 5)
    assert statistics.snapshot().streams['/a'].dropped_by_policy == 15


def test_percentiles_are_in_milliseconds():
    statistics = Statistics()
    for duration in range(1, 101):
        statistics.observe({'total': duration * 1_000_000})
    total = statistics.snapshot().stages['total']
    assert total.p50 == np.percentile(range(1, 101), 50)
    assert total.p99 == np.percentile(range(1, 101), 99)
    assert total.count == 100


def test_percentiles_of_nothing_are_nothing():
    assert percentiles([]) is None
    figures = percentiles(list(range(101)))
    assert (figures.p50, figures.p95, figures.p99, figures.count) == (50, 95, 99, 101)


def test_a_snapshot_does_not_change_later():
    statistics = Statistics()
    statistics.open_streams(('/a',))
    before = statistics.snapshot()
    statistics.count('/a', 'received')
    statistics.refuse('/a', 'size')
    assert before.streams['/a'].received == 0
    assert statistics.snapshot().streams['/a'].refused == {'size': 1}


def test_opening_streams_begins_from_zero():
    statistics = Statistics()
    statistics.open_streams(('/a',))
    statistics.count('/a', 'received')
    statistics.open_streams(('/b',))
    assert list(statistics.snapshot().streams) == ['/b']
