"""§8: what the project uses of rclpy, launch and launch_ros exists in Humble, or is asked for first."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from support.ros_api import imported_modules, listing, problems, project_files
from support.source_tree import DATA

NODE_RETRIES = 'launch_ros.actions.Node(respawn_max_retries=)'
HUMBLE = json.loads((DATA / 'humble_api.json').read_text())


def found(tmp_path: Path, text: str) -> list[str]:
    """Return what is wrong with a program."""
    file = tmp_path / 'program.py'
    file.write_text(text)
    return [problem.what for problem in problems([file], HUMBLE)]


@pytest.mark.once
def test_the_project_uses_nothing_that_humble_lacks():
    files = project_files()
    assert len(imported_modules(files)) > 20
    assert problems(files, HUMBLE) == []


@pytest.mark.parametrize(
    ('text', 'lacking'),
    [
        ('import rclpy.event_handler', ['rclpy.event_handler is no module']),
        ('from rclpy.event_handler import PublisherEventCallbacks', ['rclpy.event_handler.PublisherEventCallbacks']),
        ('from rclpy.qos import QoSProfile, NoSuchThing', ['rclpy.qos.NoSuchThing']),
        ('import rclpy\nrclpy.no_such_call()', ['rclpy.no_such_call']),
        ('import rclpy\nrclpy.init(args=None, signal_handler_options=None)', []),
        ('import rclpy\nrclpy.init(no_such_keyword=1)', ['rclpy.init(no_such_keyword=)']),
        ('import rclpy.qos as q\nq.ReliabilityPolicy.BEST_AVAILABLE', ['rclpy.qos.ReliabilityPolicy.BEST_AVAILABLE']),
        ('import rclpy.qos as q\nq.ReliabilityPolicy.BEST_EFFORT', []),
        ('from rclpy.parameter import Parameter\nParameter.Type.DOUBLE_ARRAY', []),
        ('from rclpy.clock import Clock\nClock(clock_type=1)', []),
        ('import rclpy\nsubscription.get_publisher_count()', ['.get_publisher_count']),
        ('import rclpy\nnode.add_pre_set_parameters_callback(f)', ['.add_pre_set_parameters_callback']),
        ('import rclpy\nnode.create_timer(1.0, f, clock=None)', []),
        ('import rclpy\nnode.create_timer(1.0, f, autostart=False)', ['.create_timer(autostart=)']),
        ('from launch_ros.actions import Node\nNode(executable="x", respawn=True, respawn_delay=1.0)', []),
        ('from launch_ros.actions import Node as N\nN(respawn_max_retries=1)', [NODE_RETRIES]),
        ('from launch.substitutions import StringJoinSubstitution', ['launch.substitutions.StringJoinSubstitution']),
        ('from numpy import no_such_thing', []),
    ],
)  # fmt: skip
def test_what_humble_lacks_is_found(tmp_path, text, lacking):
    """Each of these exists in Jazzy or Kilted, or nowhere."""
    assert found(tmp_path, text) == lacking


@pytest.mark.parametrize(
    'text',
    [
        'if hasattr(subscription, "get_publisher_count"):\n    subscription.get_publisher_count()',
        'count = s.get_publisher_count() if hasattr(s, "get_publisher_count") else 1',
        'HAS = hasattr(s, "get_publisher_count")\nif HAS:\n    s.get_publisher_count()',
        'if "autostart" in signature.parameters:\n    node.create_timer(1.0, f, autostart=False)',
        'try:\n    from rclpy.event_handler import PublisherEventCallbacks\nexcept ImportError:\n    pass',
    ],
)
def test_what_is_asked_for_first_is_allowed(tmp_path, text):
    assert found(tmp_path, f'import rclpy\n{text}') == []


def test_another_question_is_no_guard(tmp_path):
    text = 'import rclpy\nif hasattr(s, "get_subscription_count"):\n    s.get_publisher_count()'
    assert found(tmp_path, text) == ['.get_publisher_count']


def test_the_same_reading_of_the_rclpy_that_runs_here_finds_everything():
    """What is used exists where the other tests have just used it: the reading of the sources is right."""
    if importlib.util.find_spec('rclpy') is None:
        pytest.skip('rclpy is not installed')
    root = Path(importlib.util.find_spec('rclpy').origin).parent
    files = [file for file in project_files('gps_denied_c7') if 'ament_index' not in file.read_text()]
    here = {'modules': listing([root], imported_modules(files)), 'later': []}
    assert problems(files, here) == []
