"""§2: one status per concern, its level lasting as long as its cause."""

import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus

from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.failover.status import ChainState, ChainStatus
from gps_denied_c7.monitoring.metrics import Percentiles, StreamCounters
from gps_denied_c7.monitoring.thermal import ThermalLevel, ThermalState, UnknownThermalState
from gps_denied_c7.pipeline.image_share import CameraCost
from gps_denied_c7.pipeline.model_swap import SwapPhase, SwapStatus
from gps_denied_c7.ros.diagnostics import (
    DiagnosticsPublisher,
    Report,
    StreamHealth,
    latency_report,
    runtime_report,
    stream_report,
    thermal_report,
)
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineFacts, ProviderSet

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR

CPU = Rung('onnx_trt_ep', ProviderSet.CPU)
FACTS = EngineFacts('CPUExecutionProvider', ('CPUExecutionProvider',), True, 0, (), 0.1)


def chain(**changes):
    values = {'state': ChainState.READY, 'active': CPU, 'facts': FACTS, **changes}
    return ChainStatus('net', 'sha256:00', **values)


def stream(**changes):
    values = {
        'topic': '/camera',
        'counters': StreamCounters(received=10, accepted=9, answered=9),
        'silent_s': 0.1,
        'refused_s': None,
        'unanswered_s': None,
        'lost_s': None,
        'too_old': 0,
        'mismatches': (),
        'queue_depth': '5',
    }
    return StreamHealth(**{**values, **changes})


def test_a_primary_rung_is_ok():
    report = runtime_report('active', chain(), '', {})
    assert report.level == OK
    assert report.values['provider'] == 'CPUExecutionProvider'


def test_it_shows_how_long_the_engines_of_a_rung_take_to_load():
    report = runtime_report('active', chain(longest_load_s=(('onnx_trt_ep/cpu', 0.31),)), '', {})
    assert report.values['longest_load_s onnx_trt_ep/cpu'] == '0.310'


def test_it_names_the_processes_to_look_at():
    values = runtime_report('active', chain(worker_pid=71, standby=CPU), '', {}).values
    assert (values['worker_pid'], values['standby_pid']) == (71, 'none')


def test_standing_alerts_are_a_warning_that_names_them():
    report = runtime_report('active', chain(alerts=('c7.cpu_fallback',), is_fallback=True), '', {})
    assert report.level == WARN
    assert 'c7.cpu_fallback' in report.message


def test_an_exhausted_chain_is_an_error_that_says_why():
    status = chain(state=ChainState.EXHAUSTED, active=None, facts=None, failures=(('tensorrt/gpu', 'missing'),))
    report = runtime_report('active', status, '', {})
    assert report.level == ERROR
    assert 'missing' in report.message


def test_a_failed_start_is_an_error_with_its_reason():
    """N-2."""
    report = runtime_report('unconfigured', None, 'configure failed: no model', {})
    assert (report.level, report.message) == (ERROR, 'configure failed: no model')


def test_unconfigured_is_no_alert():
    assert runtime_report('unconfigured', None, '', {}).level == OK


def test_failed_callbacks_show():
    """N-5: counted and reported."""
    report = runtime_report('active', chain(), '', {'image callback /camera': 3})
    assert report.level == WARN
    assert report.values['failures in image callback /camera'] == 3


def test_notices_show_with_their_remedy():
    report = runtime_report('active', chain(), '', {}, ('/dev/shm is small; mount a larger one.',))
    assert report.level == WARN
    assert 'mount' in report.message


def test_unknown_loss_is_called_unknown():
    """N-3: never 0 by ignorance."""
    assert stream_report(stream(), active=True).values['lost_before_node'] == 'unknown'
    assert stream_report(stream(), active=True).values['dropped_in_queue'] == 'unknown'
    known = stream_report(stream(counters=StreamCounters(lost=0, pushed_out=0)), active=True).values
    assert known['lost_before_node'] == known['dropped_in_queue'] == 0


def test_what_was_pushed_out_is_dropped_by_policy_and_what_was_lost_is_not():
    counters = StreamCounters(received=10, replaced=3, pushed_out=4, lost=5)
    values = stream_report(stream(counters=counters), active=True).values
    assert (values['dropped_by_policy'], values['dropped_in_queue'], values['lost_before_node']) == (7, 4, 5)


def test_a_camera_whose_images_are_all_lost_is_not_called_silent():
    report = stream_report(stream(silent_s=60.0, lost_s=0.5, counters=StreamCounters(lost=57)), active=True)
    assert report.level == WARN and '57' in report.message and 'profile' in report.message


def test_a_publisher_that_cannot_match_is_named():
    report = stream_report(stream(mismatches=('/camera offers best_effort',)), active=True)
    assert report.level == ERROR
    assert '/camera offers best_effort' in report.message


def test_a_slowed_camera_is_named_with_what_it_costs_and_what_to_do():
    cost = CameraCost('/camera', 0.5, 123.4, 0.49, 2.46, slowed=True)
    counters = StreamCounters(over_share=30, replaced=2, refused={'decode_time': 4}, odd={'no_end_mark': 7})
    report = stream_report(stream(cost=cost, refused_s=0.1, counters=counters), active=True)
    assert report.level == WARN and report.name == 'Stream /camera'
    for said in ('123 ms', '2.46 cores', '0.50', 'image_cpu_share', '4 × decode_time'):
        assert said in report.message
    values = report.values
    assert (values['dropped_over_share'], values['dropped_by_policy'], values['odd no_end_mark']) == (30, 32, 7)
    assert (values['image_cpu_ms'], values['image_cpu_share_cores']) == ('123.4', '0.50')
    assert stream_report(stream(cost=cost), active=False).level == OK
    calm = stream_report(stream(cost=CameraCost('/camera', None, None, 0.0, 0.0, slowed=False)), active=True)
    assert calm.level == OK
    assert (calm.values['image_cpu_ms'], calm.values['image_cpu_share_cores']) == ('unknown', 'no limit')


@pytest.mark.parametrize(
    ('health', 'level'),
    [
        (stream(), OK),
        (stream(silent_s=10.0), WARN),
        (stream(refused_s=0.5, counters=StreamCounters(refused={'encoding': 4})), WARN),
        (stream(refused_s=60.0), OK),
        (stream(unanswered_s=0.5, counters=StreamCounters(unanswered=4)), ERROR),
        (stream(unanswered_s=0.5, refused_s=0.5), ERROR),
        (stream(unanswered_s=60.0), OK),
        (stream(lost_s=0.5, counters=StreamCounters(lost=4)), WARN),
        (stream(lost_s=60.0, counters=StreamCounters(lost=4)), OK),
        (stream(too_old=1), OK),
        (stream(too_old=100), WARN),
    ],
)
def test_levels_last_as_long_as_their_cause(health, level):
    assert stream_report(health, active=True).level == level


def test_a_closed_stream_is_no_alert():
    assert stream_report(stream(silent_s=100.0, mismatches=('x',)), active=False).level == OK


def test_latency_warns_above_its_limit_only():
    stages = {'total': Percentiles(10.0, 20.0, 30.0, 100)}
    assert latency_report(stages, 0.0).level == OK
    assert latency_report(stages, 25.0).level == OK
    assert latency_report(stages, 15.0).level == WARN
    assert latency_report({}, 15.0).level == OK


def test_thermal_says_unknown_honestly():
    """§7."""
    assert thermal_report(UnknownThermalState().thermal_state()).message == 'unknown'
    hot = ThermalState(ThermalLevel.THROTTLED, 'jetson-sysfs', 0.1, {'tj-thermal': 97.0})
    assert thermal_report(hot).level == WARN


class Recording:
    """A node that keeps what is published."""

    def __init__(self):
        self.published = []

    def create_publisher(self, message_type, topic, qos):
        assert (message_type, topic) == (DiagnosticArray, '/diagnostics')
        return self

    def publish(self, message):
        self.published.append(message)

    def get_fully_qualified_name(self):
        return '/ns/c7_inference'

    def get_clock(self):
        return self

    def now(self):
        return self

    def to_msg(self):
        return DiagnosticArray().header.stamp


def test_a_change_of_level_is_published_at_once_and_once():
    node, level = Recording(), [OK]
    publisher = DiagnosticsPublisher(node, lambda: [Report('Runtime', level[0], 'm', {'a': 1})], 'host (no GPU)')
    publisher.publish()
    publisher.publish(only_changes=True)
    assert len(node.published) == 1
    level[0] = ERROR
    publisher.publish(only_changes=True)
    publisher.publish(only_changes=True)
    assert len(node.published) == 2
    (status,) = node.published[-1].status
    assert status.name == '/ns/c7_inference: Runtime'
    assert (status.hardware_id, status.level) == ('host (no GPU)', ERROR)
    assert (status.values[0].key, status.values[0].value) == ('a', '1')


def test_f5_an_engine_being_built_warns_and_says_how_far_it_is():
    """Even after an attempt that failed: what the node does now comes first."""
    building = BuildProgress('timing tactics', 75.4, 0.25)
    report = runtime_report('configuring', None, 'configure failed: no model', {}, building=building)
    assert report.level == WARN
    assert 'timing tactics (25%, 75 s)' in report.message
    assert (report.values['building'], report.values['building_s']) == ('timing tactics', '75')


def test_n10_a_swap_under_way_shows_and_a_failed_one_warns():
    def report(phase, reason='', **changes):
        swap = SwapStatus('/models/new', phase, reason)
        return runtime_report('active', chain(**changes), '', {}, swap=swap)

    loading = report(SwapPhase.LOADING)
    assert loading.level == OK and '/models/new is under way (loading)' in loading.message
    failed = report(SwapPhase.FAILED, 'its golden outputs are not reproduced.')
    assert failed.level == WARN and 'golden' in failed.message and '/models/new' in failed.message
    assert failed.values['model_swap'] == 'failed'
    assert report(SwapPhase.CANCELLED, 'closed.').level == WARN
    exhausted = report(SwapPhase.FAILED, 'why.', state=ChainState.EXHAUSTED, active=None, facts=None)
    assert exhausted.level == ERROR
    swapped = report(SwapPhase.SWAPPED)
    assert swapped.level == OK
    assert 'swap' not in swapped.message
