"""N-8: what the library and the vendors log reaches the ROS logger, at its level, and harms nobody."""

from __future__ import annotations

import logging
import os
import time

import pytest
import rclpy
from rcl_interfaces.msg import Log
from rclpy.executors import SingleThreadedExecutor
from rclpy.qos import DurabilityPolicy, QoSProfile

from gps_denied_c7.ros.log_forwarding import RosLogHandler, forward_to
from gps_denied_c7.ros.plain_logger import PlainLogger
from support.harness import running_node
from support.networks import copying


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
    logging.getLogger('gps_denied_c7.failover.chain').info('ours')
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


def test_logging_within_a_message_has_an_end():
    """A vendor's object that logs while it is put into words, as a message of its own would be again."""
    # Not below the root, whose other handlers pytest brings.
    logger, said = logging.Logger('vendor'), Recording()
    logger.addHandler(RosLogHandler(said))

    class Talkative:
        def __str__(self):
            logger.error('about myself: %s', self)
            return 'said'

    logger.error('%s', Talkative())
    assert said.said == [('error', 'said')]


def test_a_message_is_one_line_and_its_traceback_is_indented(forwarded):
    try:
        raise ValueError('inside\n[FATAL] forged')
    except ValueError:
        logging.getLogger('vendor').exception('it\n[FATAL] failed \x1b[2J')
    ((_, text),) = forwarded.said
    first, *others = text.split('\n')
    assert first == r'it\n[FATAL] failed \x1b[2J'
    assert others and all(line.startswith('    ') for line in others)


def test_a_message_in_a_loop_is_logged_some_times_and_counted(ros_context):
    """Each of its kind; another kind is not held up by it."""
    name = f'repeats_{os.getpid()}'
    node = rclpy.create_node(name, context=ros_context)
    seen: list[str] = []
    qos = QoSProfile(depth=1000, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    node.create_subscription(Log, '/rosout', lambda line: seen.append(line.msg) if line.name == name else None, qos)
    logger = PlainLogger(node.get_logger().name)
    for number in range(1000):
        logger.error(f'camera {number} failed with pid {number}')
    logger.error('something else')
    executor = SingleThreadedExecutor(context=ros_context)
    executor.add_node(node)
    deadline = time.monotonic() + 30
    while 'something else' not in seen and time.monotonic() < deadline:
        executor.spin_once(timeout_sec=0.1)
    assert seen == [*(f'camera {number} failed with pid {number}' for number in range(10)), 'something else']
    logger._causes = {key: [began - 60, *rest] for key, (began, *rest) in logger._causes.items()}
    logger.error('camera 5 failed with pid 5')
    while len(seen) < 12 and time.monotonic() < deadline:
        executor.spin_once(timeout_sec=0.1)
    assert seen[-1] == 'camera 5 failed with pid 5 (990 similar messages left out)'
    executor.shutdown()
    node.destroy_node()


def test_n8_the_node_forwards_the_library_to_its_ros_logger(tmp_path):
    """With the node's name and severity, where ros2 and rqt look for it."""
    with running_node({'model_path': copying(tmp_path)}, arguments=('--log-level', 'debug')) as (process, peer):
        peer.start()
        lines = process.output().splitlines()
    assert any('[INFO]' in line and '[c7_inference]' in line and 'serves copying' in line for line in lines)
    assert any('[WARN]' in line and '[c7_inference]' in line and 'cannot be used' in line for line in lines)
