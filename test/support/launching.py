"""
What launch tests share.

launch_testing's pytest plugin imports every test module while it collects, and a module that skips itself as a whole
takes the rest of its folder along. So these modules import everywhere, and their tests skip one by one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gps_denied_c7.demo.network import write_demo_bundle
from support.harness import Peer, free_domain_id
from support.scenario import record_flight

if importlib.util.find_spec('launch_testing') is None:
    WHY_SKIPPED = 'launch_testing is not installed; it comes with ROS 2 from Debian'

    def _unchanged(*_: Any) -> Callable[[Any], Any]:
        return lambda decorated: decorated

    parametrize = post_shutdown_test = _unchanged
    assertExitCodes = None
else:
    from ament_index_python.packages import get_package_share_directory
    from launch import LaunchDescription
    from launch.actions import IncludeLaunchDescription, SetEnvironmentVariable
    from launch.launch_description_sources import PythonLaunchDescriptionSource
    from launch_testing import parametrize, post_shutdown_test
    from launch_testing.actions import ReadyToTest
    from launch_testing.asserts import assertExitCodes

    WHY_SKIPPED = 'run by launch_testing, whose pytest plugin is switched off'

__all__ = ['NODE_PROCESS', 'LaunchCase', 'Rig', 'assertExitCodes', 'parametrize', 'post_shutdown_test']

NODE_PROCESS = 'c7_inference_node'
_held = contextlib.ExitStack()
atexit.register(_held.close)


class LaunchCase(unittest.TestCase):
    """A test that launch_testing runs, with ``proc_info`` of the processes and the ``rig``."""

    def setUp(self) -> None:
        """Skip where nothing was launched."""
        if not hasattr(type(self), 'proc_info'):
            self.skipTest(WHY_SKIPPED)


class Rig:
    """
    Hold what one launch needs, and its peer.

    :param node: fully qualified name of the node that is launched.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._closing = contextlib.ExitStack()
        # The process holds the domain, so that no launch meets what is left of the one before.
        self.domain_id = _held.enter_context(free_domain_id())
        self.peer = self.listen()

    def listen(self) -> Peer:
        """Return a further peer, which has seen nothing yet."""
        peer = Peer(self.domain_id, self._node)
        self._closing.callback(peer.close)
        return peer

    def close(self) -> None:
        """End all peers."""
        self._closing.close()

    def description(self, **arguments: str) -> tuple[LaunchDescription, dict[str, Any]]:
        """Return the launch of the package's launch file with ``arguments``, and what is handed to its tests."""
        launch_file = Path(get_package_share_directory('gps_denied_c7'), 'launch', 'c7_inference.launch.py')
        environment = {'ROS_DOMAIN_ID': str(self.domain_id), 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
        description = LaunchDescription(
            [
                *(SetEnvironmentVariable(name, value) for name, value in environment.items()),
                IncludeLaunchDescription(
                    PythonLaunchDescriptionSource(str(launch_file)), launch_arguments=arguments.items()
                ),
                ReadyToTest(),
            ]
        )
        return description, {'rig': self}

    @staticmethod
    @functools.cache
    def _folder() -> Path:
        return Path(_held.enter_context(tempfile.TemporaryDirectory(prefix='c7-launch-test-')))

    @staticmethod
    @functools.cache
    def bundle() -> str:
        """Return the demo network's bundle."""
        return str(write_demo_bundle(Rig._folder() / 'bundle'))

    @staticmethod
    @functools.cache
    def bag() -> Path:
        """Return a short flight."""
        return record_flight(Rig._folder())
