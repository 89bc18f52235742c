"""What the images of a camera may cost: token buckets, against arithmetic on paper."""

import random

import pytest

from gps_denied_c7.monitoring.host_info import usable_cores
from gps_denied_c7.pipeline.image_share import ImageShare

MS = 1_000_000


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Bench:
    """Shares on a clock that the test moves."""

    def __init__(self, *topics, fraction=0.5, cores=2.0):
        self.clock, self.fraction = Clock(), fraction
        self.share = ImageShare(topics, fraction=lambda: self.fraction, cores=cores, monotonic=self.clock)

    def fly(self, seconds, **cameras):
        """Have cameras send for so long; each is (images a second, milliseconds of each). Return what was let in."""
        events = sorted(
            (index / rate, topic, cost_ms)
            for topic, (rate, cost_ms) in cameras.items() for index in range(round(seconds * rate))
        )  # fmt: skip
        began, admitted = self.clock.now, dict.fromkeys(cameras, 0)
        for at, topic, cost_ms in events:
            self.clock.now = began + at
            if self.share.admits(topic):
                admitted[topic] += 1
                self.share.charge(topic, int(cost_ms * MS))
        self.clock.now = began + seconds
        return admitted


def test_a_camera_beyond_its_share_is_slowed_to_it_and_the_other_keeps_all_of_its_images():
    """Half of two cores are one, half a core for each: 100 ms images five times a second, of twenty that come."""
    bench = Bench('hog', 'plain', 'silent')
    admitted = bench.fly(60.0, hog=(20, 100.0), plain=(20, 2.0))
    assert bench.share.cores == 0.5
    assert admitted['plain'] == 60 * 20
    # The first image comes before the other camera's, what a second brings is there at the beginning, and the last one
    # may leave a debt of itself.
    assert 60 * 0.5 <= admitted['hog'] * 0.1 <= 61 * 0.5 + 0.2
    cost = bench.share.cost('hog')
    assert cost.slowed and cost.image_ms == pytest.approx(100.0)
    assert cost.used_cores == pytest.approx(0.5, rel=0.2)
    assert cost.wanted_cores == pytest.approx(2.0, rel=0.1)
    assert not bench.share.cost('plain').slowed


@pytest.mark.parametrize('seed', range(20))
def test_whatever_cameras_send_none_takes_more_than_its_share_and_none_below_it_is_slowed(seed):
    dice = random.Random(seed)
    topics = [f'camera_{number}' for number in range(dice.randint(2, 6))]
    bench = Bench(*topics, fraction=dice.uniform(0.1, 1.0), cores=dice.choice([0.5, 1.0, 2.0, 4.0]))
    cameras = {topic: (dice.choice([1, 5, 20, 60]), dice.choice([0.5, 3.0, 20.0, 300.0, 2000.0])) for topic in topics}
    admitted = bench.fly(40.0, **cameras)
    share = bench.share.cores
    for topic, (rate, cost_ms) in cameras.items():
        if share is None or rate * cost_ms / 1e3 < share:
            # One image may cost more than a second brings: then it is not below its share for that second.
            if share is None or cost_ms / 1e3 <= share:
                assert admitted[topic] == 40 * rate
        else:
            assert admitted[topic] * cost_ms / 1e3 <= 41.0 * share + 2 * cost_ms / 1e3


def test_a_camera_whose_decoder_gets_too_little_of_a_busy_machine_is_named_too():
    """Of twenty images a second one is decoded, the others are replaced: no more than its share, and yet slowed."""
    bench = Bench('hog', 'plain')
    for _ in range(10):
        for _ in range(20):
            bench.clock.now += 0.05
            assert bench.share.admits('hog') and bench.share.admits('plain')
        bench.share.charge('hog', 100 * MS)
    cost = bench.share.cost('hog')
    assert cost.slowed and cost.used_cores < 0.5 < cost.wanted_cores


def test_a_share_of_a_core_or_more_limits_nothing():
    """Two cameras on four cores: each decoder has one thread, and the engine the other cores."""
    bench = Bench('one', 'other', cores=4.0)
    assert bench.fly(30.0, one=(20, 5000.0), other=(20, 5000.0)) == {'one': 600, 'other': 600}
    assert bench.share.cores is None
    assert not bench.share.cost('one').slowed


@pytest.mark.parametrize('cores', [0.5, 1.0, 2.0])
def test_a_camera_that_sends_alone_is_not_slowed(cores):
    """There is no other camera to protect; topics of which nothing has come for some seconds do not count."""
    bench = Bench('hog', 'silent', 'ended', cores=cores)
    bench.fly(3.0, hog=(20, 100.0), ended=(20, 1.0))
    assert bench.share.cores == 0.25 * cores
    bench.clock.now += 6.0
    assert bench.fly(30.0, hog=(20, 100.0)) == {'hog': 600}
    assert bench.share.cores is None and not bench.share.cost('hog').slowed
    both = bench.fly(30.0, hog=(20, 100.0), ended=(20, 1.0))
    assert both['hog'] == pytest.approx(30 * 2.5 * cores, abs=2 + 3 * cores)


def test_no_limit_and_other_shares_take_effect_at_once():
    bench = Bench('hog', 'plain')
    bench.fly(10.0, hog=(20, 100.0), plain=(20, 2.0))
    bench.fraction = 0.0
    assert bench.share.cores is None
    assert bench.fly(10.0, hog=(20, 100.0), plain=(20, 2.0))['hog'] == 200
    bench.fraction = 0.2
    assert bench.fly(10.0, hog=(20, 100.0), plain=(20, 2.0))['hog'] == pytest.approx(10 * 2, abs=3)


def test_who_is_slowed_is_told_once_and_once_when_it_is_over():
    bench = Bench('hog', 'plain')
    bench.fly(3.0, hog=(20, 100.0), plain=(20, 2.0))
    (told,) = bench.share.changes()
    assert (told.topic, told.slowed) == ('hog', True)
    assert '100 ms' in str(told) and '0.50' in str(told)
    bench.fly(3.0, hog=(20, 100.0))
    assert bench.share.changes() == []
    bench.fly(4.0, hog=(20, 2.0))
    assert bench.share.changes() == [], 'not as soon as it fits for a moment'
    bench.fly(4.0, hog=(20, 2.0))
    (told,) = bench.share.changes()
    assert (told.topic, told.slowed) == ('hog', False)
    assert bench.share.changes() == []


@pytest.mark.parametrize(
    ('groups', 'files', 'cores'),
    [
        ('0::/\n', {}, 64.0),
        ('0::/a/b\n', {'a/b/cpu.max': '150000 100000'}, 1.5),
        ('0::/a/b\n', {'a/b/cpu.max': 'max 100000', 'a/cpu.max': '50000 100000'}, 0.5),
        ('0::/docker/x\n', {'cpu.max': '200000 100000'}, 2.0),
        ('3:cpu,cpuacct:/a\n0::/\n', {'cpu/a/cpu.cfs_quota_us': '300000', 'cpu/a/cpu.cfs_period_us': '100000'}, 3.0),
        ('3:cpu:/a\n', {'cpu/a/cpu.cfs_quota_us': '-1', 'cpu/a/cpu.cfs_period_us': '100000'}, 64.0),
        ('3:memory:/a\n', {'memory/a/cpu.max': '100000 100000'}, 64.0),
        ('0::/a\n', {'a/cpu.max': 'nonsense'}, 64.0),
    ],
)
def test_cores_are_those_of_the_affinity_that_the_control_groups_allow(tmp_path, monkeypatch, groups, files, cores):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: set(range(64)))
    (tmp_path / 'proc' / 'self').mkdir(parents=True)
    (tmp_path / 'proc' / 'self' / 'cgroup').write_text(groups)
    for name, text in files.items():
        path = tmp_path / 'groups' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + '\n')
    assert usable_cores(tmp_path / 'proc', tmp_path / 'groups') == cores


def test_cores_of_a_system_without_control_groups(tmp_path):
    assert usable_cores(tmp_path, tmp_path) >= 1
