"""What happens to frames and streams: counted, put on the flight record, and logged at a limited rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from gps_denied_c7.errors import C7Error, ImageRejectedError
from gps_denied_c7.monitoring.metrics import Statistics
from gps_denied_c7.monitoring.rate_limiter import RateLimiter
from gps_denied_c7.monitoring.thermal import ThermalLevel, ThermalState
from gps_denied_c7.pipeline.image_share import CameraCost
from gps_denied_c7.pipeline.mailbox import Frame
from gps_denied_c7.text import with_traceback

__all__ = ['SHARE_REMEDY', 'SILENT_S', 'EventReporter']

SHARE_REMEDY = (
    'Lower the rate or size of its images, publish baseline JPEG in place of progressive JPEG or PNG, or raise '
    'image_cpu_share.'
)
"""What to do about a camera that is slowed."""
SILENT_S = 2.0
"""After so many seconds without an image a topic is reported."""


class EventReporter:
    """
    Count, record and log events; safe to call from any thread.

    :param statistics: where they are counted.
    :param record: writes a flight record.
    :param logger: returns the node's logger.
    """

    def __init__(self, statistics: Statistics, record: Callable[..., None], logger: Callable[[], Any]) -> None:
        self._statistics = statistics
        self._record = record
        self._logger = logger
        self._limiter = RateLimiter()
        self._refused_ns: dict[str, int] = {}
        self._unanswered_ns: dict[str, int] = {}
        self._thermal_level = ThermalLevel.UNKNOWN

    def reset(self) -> None:
        """Forget when images were last refused or not answered."""
        self._refused_ns.clear()
        self._unanswered_ns.clear()

    def refused_s(self, topic: str) -> float | None:
        """Return the seconds since an image of ``topic`` was last refused, None when none was."""
        return _since_s(self._refused_ns.get(topic))

    def unanswered_s(self, topic: str) -> float | None:
        """Return the seconds since an image of ``topic`` was last not answered, None when none was."""
        return _since_s(self._unanswered_ns.get(topic))

    def replaced(self, frame: Frame) -> None:
        """Count a frame that a newer one replaced."""
        self._statistics.count(frame.topic, 'replaced')

    def refused(self, topic: str, error: ImageRejectedError) -> None:
        """Report an image that cannot be answered as it is."""
        self._statistics.refuse(topic, error.reason)
        self._refused_ns[topic] = time.monotonic_ns()
        self._record('c7.image_refused', topic=topic, reason=error.reason, message=str(error))
        if (more := self._limiter.pass_now((topic, error.reason))) is not None:
            self._logger().warning(f'{topic}: image refused: {error}{more}')

    def unanswered(self, frame: Frame, error: Exception) -> None:
        """Report a frame that no engine answered; the pipeline has counted it."""
        self._unanswered_ns[frame.topic] = time.monotonic_ns()
        self._record('c7.frame_unanswered', topic=frame.topic, reason=str(error))
        if (more := self._limiter.pass_now(('unanswered', type(error)))) is not None:
            text = f'{frame.topic}: a frame was not answered: {error}{more}'
            self._logger().error(with_traceback(text, None if isinstance(error, C7Error) else error))

    def too_old(self, topic: str, age_ms: float, in_a_row: int) -> None:
        """Warn of images whose header stamps are too old; the inference thread counts them."""
        if self._limiter.pass_now(('age', topic)) is not None:
            self._logger().warning(
                f'{topic}: the last {in_a_row} images were dropped: their header stamps are {age_ms:.0f} ms old, more '
                'than max_frame_age_ms. For a bag, set use_sim_time and play it with --clock; otherwise '
                'synchronise the clocks or raise max_frame_age_ms.'
            )

    def time_reset(self, topic: str, backwards_s: float) -> None:
        """Report header stamps that jumped back."""
        self._record('c7.time_reset', topic=topic, backwards_s=backwards_s)
        # With two publishers whose clocks differ, this happens with every other image.
        if (more := self._limiter.pass_now((topic, 'time reset'))) is not None:
            self._logger().warning(
                f'{topic}: header stamps jumped back by {backwards_s:.1f} s; the node continues from there{more}'
            )

    def overrun(self, topic: str, queue_depth: str, *, keeps_newest: bool) -> None:
        """Report a queue of the middleware that is full again and again."""
        self._record('c7.stream_overrun', topic=topic, queue_depth=queue_depth, keeps_newest=keeps_newest)
        if self._limiter.pass_now((topic, 'overrun')) is None:
            return
        override = f'qos_overrides.{topic}.subscription'
        remedy = (
            'Until the next activation, only the newest image is kept.'
            if keeps_newest
            else f'To keep only the newest image, set {override}.history keep_last and {override}.depth 1.'
        )
        self._logger().warning(
            f'{topic}: images arrive faster than this machine can receive them, so answers are late. '
            f'{remedy} Lower the rate or size of the images.'
        )

    def retyped(self, topic: str, message_type: str, before: str) -> None:
        """Report a topic that is subscribed again, because its publisher has another message type."""
        self._statistics.count(topic, 'retyped')
        self._record('c7.stream_retyped', topic=topic, type=message_type, previous_type=before)
        if (more := self._limiter.pass_now((topic, 'retyped'))) is not None:
            self._logger().info(
                f'{topic} is published as {message_type}, so it is no longer subscribed as {before}. Set '
                f'image_topic_types to lose no images at the start.{more}'
            )

    def share_changed(self, cost: CameraCost) -> None:
        """Report a camera that begins to be slowed, or is no longer."""
        self._record(
            'c7.camera_slowed' if cost.slowed else 'c7.camera_no_longer_slowed',
            topic=cost.topic,
            image_ms=round(cost.image_ms or 0.0, 1),
            used_cores=round(cost.used_cores, 3),
            share_cores=cost.share_cores,
        )
        if self._limiter.pass_now((cost.topic, 'share', cost.slowed)) is None:
            return
        if cost.slowed:
            self._logger().warning(f'{cost.topic} is slowed: {cost}. {SHARE_REMEDY}')
        else:
            self._logger().info(f'{cost.topic} is no longer slowed: {cost}.')

    def thermal(self, state: ThermalState) -> None:
        """Record a thermal state whose level is not that of the one before."""
        if state.level is self._thermal_level:
            return
        self._thermal_level = state.level
        self._record(
            'c7.thermal_state',
            level=state.level.value,
            source=state.source,
            reasons=list(state.reasons),
            temperatures_c=state.temperatures_c,
        )

    def mismatch(self, topic: str, problem: str) -> None:
        """Warn of a publisher that cannot reach the subscription."""
        if self._limiter.pass_now((topic, problem)) is not None:
            self._logger().warning(f'{topic}: {problem}')

    def silent(self, topic: str) -> None:
        """Warn of a topic on which no images come, or no longer."""
        if self._limiter.pass_now((topic, 'silent')) is not None:
            self._logger().warning(
                f'{topic}: no image for {SILENT_S:.0f} s. Start the camera or the replay. If it runs, check that it '
                f'publishes this topic (ros2 topic info {topic}) and has the same ROS_DOMAIN_ID as this node.'
            )


def _since_s(then_ns: int | None) -> float | None:
    return None if then_ns is None else (time.monotonic_ns() - then_ns) / 1e9
