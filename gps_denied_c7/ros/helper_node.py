"""The node of a helper process beside the inference node: a listener, a camera, an observer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from gps_denied_c7.ros.fastdds import apply_profile, tune_allocator

__all__ = ['helper_node']


@contextlib.contextmanager
def helper_node(name: str) -> Iterator[tuple[Node, SingleThreadedExecutor]]:
    """
    Start ROS on the shipped DDS profile, and end it with the context.

    :return: a node without services of its own, and the executor that it is to be spun with; signals stay as they are.
    """
    apply_profile(os.environ)
    tune_allocator()
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node(name, start_parameter_services=False, enable_rosout=False)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        yield node, executor
    finally:
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
