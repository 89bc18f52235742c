"""N-2: when autostart tries again."""

import logging

import pytest

from gps_denied_c7.ros import autostart
from gps_denied_c7.ros.autostart import Autostart
from support.waiting import wait_until


class FailingNode:
    """Stands for a node that cannot be configured, and counts the attempts."""

    lifecycle_state = 'unconfigured'

    def __init__(self):
        self.attempts = 0

    def transition(self, label):
        self.attempts += 1
        return False

    def get_logger(self):
        return logging.getLogger('test')


@pytest.fixture
def starting(monkeypatch):
    """An autostart whose pauses never end by themselves, and what it looks at: a parameter and a file."""
    monkeypatch.setattr(autostart, '_FIRST_PAUSE_S', 3600.0)
    monkeypatch.setattr(autostart, '_LOOK_S', 0.01)
    node, seen = FailingNode(), {'parameter': 0, 'file': 0, 'lasting': False, 'looks': 0}

    def conditions():
        seen['looks'] += 1
        return seen['parameter'], seen['file']

    one = Autostart(node, lasting=lambda: seen['lasting'], conditions=conditions)
    one.start()
    wait_until(lambda: node.attempts == 1, 'the first attempt')
    yield node, seen, one
    one.stop()
    wait_until(lambda: not one._thread.is_alive(), 'its end')


@pytest.mark.parametrize('lasting', [False, True])
def test_n2_a_corrected_parameter_is_tried_at_once_however_long_the_pause(starting, lasting):
    node, seen, _ = starting
    seen['lasting'] = lasting
    for attempts in (2, 3, 4):
        seen['parameter'] += 1
        wait_until(lambda: node.attempts == attempts, 'another attempt')  # noqa: B023


def test_n2_files_that_change_all_the_time_do_not_shorten_the_pause(starting):
    node, seen, _ = starting
    for _ in range(20):
        looks, seen['file'] = seen['looks'], seen['file'] + 1
        wait_until(lambda: seen['looks'] > looks + 1, 'a look')  # noqa: B023
    assert node.attempts == 1


def test_n2_a_lasting_failure_waits_for_a_change_beyond_its_pause(starting, monkeypatch):
    node, seen, _ = starting
    monkeypatch.setattr(autostart, '_FIRST_PAUSE_S', 0.0)
    monkeypatch.setattr(autostart, '_LONGEST_PAUSE_S', 0.0)
    seen['lasting'] = True
    seen['parameter'] += 1
    wait_until(lambda: node.attempts == 2, 'an attempt after which the pause is over')
    looks = seen['looks']
    wait_until(lambda: seen['looks'] > looks + 20, 'looks')
    assert node.attempts == 2
    seen['file'] += 1
    wait_until(lambda: node.attempts == 3, 'the attempt with the other file')
