"""N-6: simulated time that starts late, stands still, never comes or jumps back costs no frame and no diagnostics."""

from __future__ import annotations

import time

import pytest
from builtin_interfaces.msg import Time
from rosgraph_msgs.msg import Clock

from support.harness import image, running_node, wait_until
from support.networks import copying

CAMERA = '/camera/image_raw'


@pytest.fixture(scope='module')
def module_peer(tmp_path_factory):
    """An active node on simulated time, before the first message on /clock."""
    model = copying(tmp_path_factory.mktemp('model'))
    parameters = {'model_path': model, 'use_sim_time': True, 'autostart': True, 'cpu_threads': 1}
    with running_node(parameters) as (_, peer):
        peer.wait_state('active')
        peer.wait_matched(CAMERA)
        yield peer


@pytest.fixture
def active(module_peer):
    yield module_peer
    assert module_peer.state() == 'active'
    assert module_peer.set_parameter('max_frame_age_ms', 0.0).successful


def diagnostics_arrive(peer):
    """Wait until two more diagnostics messages have come."""
    before = len(peer.diagnostics)
    wait_until(lambda: len(peer.diagnostics) >= before + 2, 'diagnostics', timeout_s=10.0)


def tick(peer, second):
    """Publish one message on /clock and wait until ROS time has arrived there."""
    peer.wait_matched('/clock', Clock).publish(Clock(clock=Time(sec=second)))
    wait_until(
        lambda: peer.diagnostics and peer.diagnostics[-1].header.stamp.sec == second, f'ROS time {second} s'
    )


def test_n6_without_any_clock(active):
    """ROS time is zero: frames are answered whatever their stamp, and diagnostics keep coming."""
    assert active.node.count_publishers('/clock') == 0
    for number in (1, 1_700_000_000, 5):
        answer = active.ask(CAMERA, image(number))
        assert answer.header.stamp.sec == number
        assert (answer.receive_stamp.sec, answer.receive_stamp.nanosec) == (0, 0)
    diagnostics_arrive(active)
    assert active.set_parameter('max_frame_age_ms', 100.0).successful
    assert active.ask(CAMERA, image(6)).header.stamp.sec == 6
    assert active.diagnostics[-1].header.stamp.sec == 0


def test_n6_a_bag_played_in_a_loop(active):
    """Its stamps and /clock jump back; every frame is answered, in the order in which it came."""
    active.wait_matched('/clock', Clock)
    first = len(active.tensors)
    stamps = []
    for _ in range(3):
        for second in range(100, 130, 3):
            active.publisher('/clock', Clock).publish(Clock(clock=Time(sec=second)))
            for offset in range(3):
                active.ask(CAMERA, image(second + offset))
                stamps.append(second + offset)
    received = [answer.receive_stamp.sec for answer in active.tensors[first:]]
    assert any(later < earlier for earlier, later in zip(received, received[1:], strict=False)), 'ROS time went back'
    assert [answer.header.stamp.sec for answer in active.tensors[first:]] == stamps
    sequence = [answer.frame_seq for answer in active.tensors[first:]]
    assert sequence == list(range(sequence[0], sequence[0] + len(stamps)))
    reset = active.wait_record('c7.time_reset')
    assert reset['topic'] == CAMERA and reset['backwards_s'] > 0
    diagnostics_arrive(active)


def test_n6_time_that_stands_still(active):
    """The steady clock drives the diagnostics; the stamp shows that ROS time does not move."""
    tick(active, 500)
    diagnostics_arrive(active)
    assert active.diagnostics[-1].header.stamp.sec == 500
    assert active.ask(CAMERA, image(500)).receive_stamp.sec == 500


def test_n6_frame_age_is_measured_in_ros_time_and_does_not_survive_a_loop(active):
    tick(active, 1000)
    assert active.set_parameter('max_frame_age_ms', 2500.0).successful
    assert active.ask(CAMERA, image(998)).header.stamp.sec == 998
    dropped = int(active.values(f'Stream {CAMERA}')['dropped_too_old'])
    active.publisher(CAMERA).publish(image(990))
    wait_until(lambda: int(active.values(f'Stream {CAMERA}')['dropped_too_old']) == dropped + 1, 'the old frame to go')
    tick(active, 900)  # The bag starts again.
    assert active.ask(CAMERA, image(899)).header.stamp.sec == 899
    assert active.ask(CAMERA, image(990)).header.stamp.sec == 990


def test_n6_an_age_limit_that_drops_everything_names_use_sim_time(tmp_path):
    """Stamps from a bag of long ago on a node that lives today."""
    with running_node({'model_path': copying(tmp_path), 'autostart': True, 'max_frame_age_ms': 500.0}) as (
        process,
        peer,
    ):
        peer.wait_state('active')
        publisher = peer.wait_matched(CAMERA)
        for number in range(1, 30):
            publisher.publish(image(number))
            time.sleep(0.02)
        wait_until(lambda: 'use_sim_time' in process.output(), 'the warning')
        (warning,) = [line for line in process.output().splitlines() if 'use_sim_time' in line]
        assert 'max_frame_age_ms' in warning and CAMERA in warning

        def standing_alert():
            publisher.publish(image(30))
            return 'use_sim_time' in peer.message(f'Stream {CAMERA}')

        wait_until(standing_alert, 'an alert that stands while its cause lasts')
        assert peer.level(f'Stream {CAMERA}') == 'WARN'
        assert peer.values(f'Stream {CAMERA}')['dropped_too_old'] != '0'
        assert peer.tensors == []
        assert peer.set_parameter('max_frame_age_ms', 0.0).successful, 'it takes effect at once'
        assert peer.ask(CAMERA, image(31)).header.stamp.sec == 31

        def alert_has_ended():
            publisher.publish(image(31))
            return peer.level(f'Stream {CAMERA}') == 'OK'

        wait_until(alert_has_ended, 'the alert to end with its cause')


def test_n6_stamps_that_jump_back_with_every_other_image_do_not_flood_the_log(tmp_path):
    """Two publishers of one topic, whose clocks differ: every image is answered, one warning stands for many."""
    with running_node({'model_path': copying(tmp_path), 'autostart': True, 'cpu_threads': 1}) as (process, peer):
        peer.wait_state('active')
        peer.wait_matched(CAMERA)
        for number in range(1, 41):
            assert peer.ask(CAMERA, image(number)).header.stamp.sec == number
            assert peer.ask(CAMERA, image(number + 500)).header.stamp.sec == number + 500
        peer.wait_record('c7.time_reset')
        assert process.output().count('jumped back') <= 10
