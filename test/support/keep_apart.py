"""Keep what the tests start out of every domain in which somebody else's participants live."""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from pathlib import Path

from gps_denied_c7.demo.ros_domain import FOREIGN_NETWORK, free_domain_id
from gps_denied_c7.ros.fastdds import (
    OWN_PORTS,
    named_profile,
    ports_in_force,
    profile_path,
    profile_variable,
    uses_fast_dds,
    write_profile,
)

__all__ = ['keep_apart']

_held = contextlib.ExitStack()
atexit.register(_held.close)


def keep_apart() -> None:
    """
    Have this process and all that it starts use ports of our own, where Fast DDS is used, and a domain of its own.

    The domain is for what names none; tests hold others. Whatever the user set for his own nodes does not hold here.
    """
    for name in ('ROS_DOMAIN_ID', 'FASTDDS_BUILTIN_TRANSPORTS', 'ROS_LOCALHOST_ONLY', *FOREIGN_NETWORK):
        os.environ.pop(name, None)
    while name := named_profile(os.environ):
        del os.environ[name]
    os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
    if uses_fast_dds(os.environ) and profile_path() is not None:
        folder = Path(_held.enter_context(tempfile.TemporaryDirectory(prefix='c7-test-dds-')))
        os.environ[profile_variable(os.environ)] = str(write_profile(folder / 'fastdds.xml', ports=OWN_PORTS))
    os.environ['ROS_DOMAIN_ID'] = str(_held.enter_context(free_domain_id(ports_in_force(os.environ))))
