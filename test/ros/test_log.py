"""N-8: what the library and the vendors log reaches the ROS logger, at its level, and harms nobody."""

from __future__ import annotations

import logging

import pytest
from harness import running_node
from networks import copying

from gps_denied_c7.ros.log import RosLogHandler, forward_to


class Recording:
    """A ROS logger that keeps what it is told; rclpy's writes to the process's stderr, which the last test reads."""

    def __init__(self):
        self.said = []

    def __getattr__(self, level):
        return lambda text: self.said.append((level, text))


@pytest.fixture
def forwarded():
    root = logging.getLogger()
    level = root.level
    logger = Recording()
    handler = forward_to(logger)
    yield logger
    root.removeHandler(handler)
    root.setLevel(level)
    logging.getLogger('gps_denied_c7').setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ('number', 'level'),
    [
        (logging.DEBUG, 'debug'), (logging.INFO, 'info'), (logging.WARNING, 'warning'), (logging.ERROR, 'error'),
        (logging.CRITICAL, 'fatal'), (logging.WARNING + 5, 'warning'), (5, 'debug'),
    ],
)  # fmt: skip
def test_each_level_becomes_its_own(number, level):
    logger = Recording()
    RosLogHandler(logger).handle(logging.LogRecord('x', number, __file__, 1, 'said %s', ('so',), None))
    assert logger.said == [(level, 'said so')]


def test_the_library_is_heard_at_every_level_and_others_from_warnings_up(forwarded):
    logging.getLogger('gps_denied_c7.chain').info('ours')
    logging.getLogger('vendor').info('theirs, of no interest')
    logging.getLogger('vendor').warning('theirs')
    assert forwarded.said == [('info', 'ours'), ('warning', 'theirs')]


def test_a_traceback_is_forwarded_with_its_message(forwarded):
    try:
        raise ValueError('inside')
    except ValueError:
        logging.getLogger('gps_denied_c7').exception('it failed')
    ((level, text),) = forwarded.said
    assert level == 'error' and 'it failed' in text and 'ValueError: inside' in text


def test_a_logger_that_fails_does_not_harm_the_code_that_logs(forwarded, monkeypatch, capsys):
    def broken(text):
        raise RuntimeError('context is invalid')

    monkeypatch.setattr(forwarded, 'error', broken, raising=False)
    logging.getLogger('gps_denied_c7').error('said anyway')
    assert 'said anyway' in capsys.readouterr().err


def test_n8_the_node_forwards_the_library_to_its_ros_logger(tmp_path):
    """With the node's name and severity, where ros2 and rqt look for it."""
    with running_node({'model_path': copying(tmp_path)}, arguments=('--log-level', 'debug')) as (process, peer):
        peer.start()
        lines = process.output().splitlines()
    assert any('[INFO]' in line and '[c7_inference]' in line and 'serves copying' in line for line in lines)
    assert any('[WARN]' in line and '[c7_inference]' in line and 'is out' in line for line in lines)
