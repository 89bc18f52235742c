"""§7 on the node: the thermal state on diagnostics and in the flight record, and thermal_policy at once."""

from __future__ import annotations

import pytest

from gps_denied_c7.monitoring.thermal import ThermalLevel, ThermalState
from support.harness import LocalNode, image, wait_until
from support.networks import copying

CAMERA = '/camera/image_raw'


class ScriptedThermal:
    """A thermal source that says what it is told to."""

    level = ThermalLevel.UNKNOWN

    def thermal_state(self):
        if self.level is ThermalLevel.UNKNOWN:
            return ThermalState(self.level, 'scripted', float('inf'))
        reasons = ('tj-thermal at its passive trip point',)
        return ThermalState(self.level, 'scripted', 0.2, {'tj-thermal': 97.5}, reasons)


@pytest.fixture
def thermal():
    return ScriptedThermal()


@pytest.fixture
def peer(near_peer):
    return near_peer


@pytest.fixture
def local(ros_context, tmp_path, thermal):
    overrides = {f'qos_overrides.{CAMERA}.subscription.reliability': 'reliable', 'isolation': 'none'}
    node = LocalNode(ros_context, thermal=thermal, model_path=copying(tmp_path), cpu_threads=1, **overrides)
    assert node.node.transition('configure') and node.node.transition('activate')
    yield node
    node.close()


def test_thermal_level_is_on_diagnostics_and_recorded_when_it_changes(local, peer, thermal):
    peer.wait_level('Thermal', 'OK')
    assert peer.message('Thermal') == 'unknown'
    assert peer.values('Thermal')['age_s'] == 'unknown'
    assert not peer.payloads('c7.thermal_state')
    thermal.level = ThermalLevel.THROTTLED
    peer.wait_level('Thermal', 'WARN')
    assert 'passive trip point' in peer.message('Thermal')
    assert peer.values('Thermal')['tj-thermal (°C)'] == '97.5'
    assert peer.wait_record('c7.thermal_state') == {
        'level': 'throttled', 'source': 'scripted', 'reasons': ['tj-thermal at its passive trip point'],
        'temperatures_c': {'tj-thermal': 97.5},
    }
    thermal.level = ThermalLevel.CRITICAL
    peer.wait_level('Thermal', 'ERROR')
    wait_until(lambda: len(peer.payloads('c7.thermal_state')) == 2, 'the second record')
    assert [record['level'] for record in peer.payloads('c7.thermal_state')] == ['throttled', 'critical']


def test_thermal_policy_off_says_nothing(local, peer, thermal):
    assert peer.set_parameter('thermal_policy', 'off').successful
    thermal.level = ThermalLevel.CRITICAL
    wait_until(lambda: 'off' in peer.message('Thermal'), 'the policy on diagnostics')
    assert peer.level('Thermal') == 'OK'
    assert not peer.payloads('c7.thermal_state')
    assert peer.set_parameter('thermal_policy', 'report').successful
    assert peer.wait_record('c7.thermal_state')['level'] == 'critical'


def test_thermal_policy_shed_leaves_frames_out_counts_them_and_keeps_the_strategy(local, peer, thermal):
    camera = peer.wait_matched(CAMERA)
    serving = local.chain().active
    thermal.level = ThermalLevel.CRITICAL
    assert peer.ask(CAMERA, image(1)), 'report changes nothing'
    assert peer.set_parameter('thermal_policy', 'shed').successful
    assert peer.set_parameter('min_rate_hz', 0.1).successful

    def counted(name):
        return int(peer.values(f'Stream {CAMERA}').get(name, 0))

    # One by one, so that none is replaced in its slot: every one but the first of sixteen is left out.
    def accounted():
        counters = local.node._statistics.snapshot().streams[CAMERA]
        return counters.answered + counters.shed

    for number in range(2, 35):
        camera.publish(image(number))
        wait_until(lambda number=number: accounted() >= number, f'frame {number} to be accounted for')
    counters = local.node._statistics.snapshot().streams[CAMERA]
    assert (counters.shed, counters.dropped_by_policy, counters.unanswered) == (30, 30, 0)
    wait_until(lambda: counted('dropped_shed') == 30, 'the class of its own on diagnostics')
    wait_until(lambda: 'one frame of 16' in peer.message('Thermal'), 'the shedding on diagnostics')
    assert local.chain().active == serving
    assert peer.set_parameter('thermal_policy', 'report').successful
    assert peer.ask(CAMERA, image(99)).header.stamp.sec == 99


@pytest.mark.parametrize(
    ('name', 'value'), [('thermal_policy', 'sleep'), ('thermal_policy', ''), ('min_rate_hz', 0.0),
                        ('min_rate_hz', float('nan'))],
)
def test_thermal_parameters_are_validated(local, peer, name, value):
    result = peer.set_parameter(name, value)
    assert not result.successful
    assert result.reason
