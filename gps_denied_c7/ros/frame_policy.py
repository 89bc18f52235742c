"""Which frames are left out though they could be answered: too old ones, and some while the host is too hot."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from gps_denied_c7.monitoring.thermal import ThermalStatePublisher
from gps_denied_c7.monitoring.thermal_policy import FrameShedding, ThermalPolicy
from gps_denied_c7.pipeline.mailbox import Frame
from gps_denied_c7.ros.events import EventReporter
from gps_denied_c7.ros.messages import stamp_ns
from gps_denied_c7.ros.parameters import LiveSettings

__all__ = ['FrameDropPolicy']


class FrameDropPolicy:
    """
    Decide whether a frame is answered.

    :param live: returns the live settings.
    :param ros_time_ns: returns ROS time in nanoseconds, which header stamps are compared with.
    """

    def __init__(
        self,
        live: Callable[[], LiveSettings],
        thermal: ThermalStatePublisher,
        events: EventReporter,
        ros_time_ns: Callable[[], int],
    ) -> None:
        self._live = live
        self._thermal = thermal
        self._events = events
        self._ros_time_ns = ros_time_ns
        self._shedding = FrameShedding()
        self._too_old: Counter[str] = Counter()

    @property
    def answered_of(self) -> int:
        """One frame of so many is answered, because of heat."""
        return int(2**self._shedding.step)

    def too_old_in_a_row(self, topic: str) -> int:
        """Return how many frames of ``topic`` were dropped for their header stamps' age since one was not."""
        return self._too_old[topic]

    def on_configure(self) -> None:
        """Forget the frames of an earlier life."""
        self._too_old.clear()

    def on_settings(self, live: LiveSettings) -> None:
        """Answer every frame again where heat is no longer a reason not to."""
        if live.thermal_policy != ThermalPolicy.SHED:
            self._shedding.reset()

    def too_old(self, frame: Frame) -> bool:
        """Return whether ``frame`` has waited too long, or shows what was too long ago."""
        live = self._live()
        if live.max_queue_age_ms and time.monotonic_ns() - frame.received_ns > live.max_queue_age_ms * 1e6:
            return True
        age_ms = (self._ros_time_ns() - stamp_ns(frame.message.header)) / 1e6 if live.max_frame_age_ms else 0.0
        if age_ms <= live.max_frame_age_ms:
            self._too_old[frame.topic] = 0
            return False
        self._too_old[frame.topic] += 1
        self._events.too_old(frame.topic, age_ms, self._too_old[frame.topic])
        return True

    def shed(self, frame: Frame) -> bool:
        """Return whether ``frame`` is left out because of heat."""
        live = self._live()
        if live.thermal_policy != ThermalPolicy.SHED:
            return False
        return self._shedding.drops(frame.topic, self._thermal.thermal_state(), live.min_rate_hz)
