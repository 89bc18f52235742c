"""Read any rosbag2 as raw CDR: what is whole in it, what is missing, and what cannot be played."""

from __future__ import annotations

from gps_denied_c7.ros.bag.bag import Bag, BagTopic
from gps_denied_c7.ros.bag.storage import BagError, OfferedQos

__all__ = ['Bag', 'BagError', 'BagTopic', 'OfferedQos']
