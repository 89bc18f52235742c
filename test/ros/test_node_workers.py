"""§5: whatever becomes of its workers, the node stays active and answers every frame that it has accepted."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from gps_denied_c7.worker.child import SPARE_NAME
from measure import chaos
from support.harness import image, running_node, wait_until
from support.networks import WHITE, copying, hanging_on_white, slow

CAMERA = '/camera/image_raw'


def test_f2_f3_f4_every_accepted_frame_is_answered_once_while_workers_die_and_hang(tmp_path):
    """The short form of ``make chaos``: SIGKILL, SIGSEGV and SIGSTOP at random moments, 20 images a second."""
    account = chaos.run(tmp_path, deaths=6, hangs=2, rate_hz=20.0, pause_s=(0.5, 2.0), answered_between=True)
    assert account.problems() == []
    assert len(account.answered) > 20


def test_f1_no_worker_outlives_its_node(tmp_path):
    """Neither where the node ends in order nor where it is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with running_node({'model_path': copying(tmp_path), 'cpu_threads': 1}) as (process, peer):
            peer.start()
            wait_until(lambda peer=peer: peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby')
            wait_until(lambda process=process: chaos.workers(process, SPARE_NAME), 'a spare worker')
            workers = chaos.workers(process) + chaos.workers(process, SPARE_NAME)
            assert len(workers) == 3
            process.signal(number)
            process.wait()
            wait_until(lambda workers=workers: not any(Path(f'/proc/{pid}').exists() for pid in workers), 'their end')


def test_f3_a_standby_that_dies_is_replaced_and_costs_no_switch(tmp_path):
    with running_node({'model_path': copying(tmp_path), 'cpu_threads': 1}) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        wait_until(lambda: peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby')
        before = chaos.workers(process)
        os.kill(before[-1], signal.SIGKILL)
        wait_until(lambda: len(now := chaos.workers(process)) == 2 and before[-1] not in now, 'another standby')
        assert peer.ask(CAMERA, image(1))
        assert peer.values('Runtime')['switches'] == '0'


def test_f4_a_frame_that_hangs_every_engine_costs_itself_and_no_other(tmp_path):
    parameters = {
        'model_path': hanging_on_white(tmp_path), 'cpu_threads': 1,
        'inference_deadline_ms': 100.0, 'hang_timeout_ms': 300.0,
    }  # fmt: skip
    with running_node(parameters) as (_, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image(1))
        peer.publisher(CAMERA).publish(image(2, data=WHITE))
        assert 'loaded for this request: no answer for' in peer.wait_record('c7.frame_unanswered')['reason']
        assert peer.ask(CAMERA, image(3)).header.stamp.sec == 3
        assert peer.state() == 'active'


def test_f4_engines_slowed_down_four_times_are_late_and_are_not_killed(tmp_path):
    parameters = {'model_path': slow(tmp_path), 'cpu_threads': 1, 'inference_deadline_ms': 10.0}
    with running_node(parameters) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        wait_until(lambda: peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby')
        before = chaos.workers(process)
        with chaos.slowed_down(before, 4):
            for number in range(1, 21):
                assert peer.ask(CAMERA, image(number)).header.stamp.sec == number
        assert len(before) == 2 and chaos.workers(process) == before
        assert 'c7.worker_unkillable' not in peer.kinds()
        assert peer.state() == 'active'


def test_isolation_none_runs_the_engine_in_the_node(tmp_path):
    parameters = {'model_path': copying(tmp_path), 'cpu_threads': 1, 'isolation': 'none'}
    with running_node(parameters) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        assert peer.ask(CAMERA, image(1))
        assert chaos.workers(process) == []
        assert peer.values('Runtime')['standby'] == 'none'
