"""What the tests of a whole node on a GPU need besides the GPU: ROS, TensorRT and NVML for Python."""

from __future__ import annotations

import importlib
import os

from gps_denied_c7.ros.fastdds import apply_profile

__all__ = ['MISSING']

MISSING = ''
"""Why a node with TensorRT cannot be run in this Python, empty where it can."""

try:
    for _name in ('rclpy', 'tensorrt', 'pynvml'):
        importlib.import_module(_name)
except ImportError as error:
    MISSING = f'the node, TensorRT and NVML: {error}'
else:
    # This process is camera and listener. Fast DDS reads the profile when a process makes its first participant.
    apply_profile(os.environ)
