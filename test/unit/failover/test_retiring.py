"""F-4: engines on their way out, which nobody waits for."""

from __future__ import annotations

import pytest

from gps_denied_c7.failover import retiring
from gps_denied_c7.failover.retiring import RetiringEngines
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.runtimes.protocol import ProviderSet

GPU = Rung('tensorrt', ProviderSet.GPU)


class Host:
    """An engine whose process ends when the test says."""

    pid = 71

    def __init__(self, *, gone=False):
        self.gone, self.releases, self.waits = gone, 0, []

    def release(self):
        self.releases += 1

    def join(self, timeout_s):
        self.waits.append(timeout_s)
        return self.gone


@pytest.fixture
def records():
    return []


@pytest.fixture
def engines(records, clock):
    return RetiringEngines(emit=lambda kind, **payload: records.append((kind, payload)), monotonic_ns=clock)


def test_f4_what_ends_at_once_is_forgotten_at_once(engines):
    host = Host(gone=True)
    engines.add(GPU, host)
    assert host.releases == 1 and len(engines) == 0


def test_f4_what_stays_is_told_of_once_and_forgotten_when_it_goes(engines, records, clock):
    host = Host()
    engines.add(GPU, host)
    engines.add(GPU, host)
    assert len(engines) == 1 and engines.look() == []
    clock.ns += 2_100_000_000
    assert engines.look() == engines.stuck() == [GPU]
    assert engines.look() == []
    assert records == [('c7.worker_unkillable', {'rung': GPU.name, 'pid': 71})]
    host.gone = True
    assert engines.look() == [] and len(engines) == 0
    assert not any(host.waits), 'nobody waits for it'


def test_f4_at_the_end_they_are_waited_for_together(engines, records, monkeypatch):
    monkeypatch.setattr(retiring, '_UNKILLABLE_S', 0.05)
    hosts = [Host(), Host(), Host()]
    for host in hosts:
        engines.add(GPU, host)
    hosts[0].gone = True
    engines.wait()
    assert len(engines) == 2 and len(records) == 2
    assert 0 < max(hosts[0].waits) <= 0.05
    engines.wait()
    assert len(records) == 2, 'told once'
