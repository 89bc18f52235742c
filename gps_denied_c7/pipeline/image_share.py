"""How much CPU time the images of each camera may take, and which of them are left out beyond that."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ['CameraCost', 'ImageShare']

_BURST_S = 1.0
_MEMORY_S = 3.0
_CALM_S = 5.0
_NEWEST = 0.2


@dataclass(frozen=True, slots=True)
class CameraCost:
    """
    Say what the images of one camera cost at one moment.

    :param share_cores: CPU time per second that they may take, None for no limit.
    :param image_ms: CPU time of one image in milliseconds, a mean of the latest; None before the first.
    :param used_cores: CPU time per second that they took over the last seconds.
    :param wanted_cores: CPU time per second that all that come would take.
    :param slowed: whether in the last seconds images were left out, or more came than the share pays for: where the
        machine is so busy that a decoder gets less than that, newer ones take their place.
    """

    topic: str
    share_cores: float | None
    image_ms: float | None
    used_cores: float
    wanted_cores: float
    slowed: bool

    def __str__(self) -> str:
        """Return it as the end of a sentence, without a remedy."""
        camera = 'this camera has no limit'
        if self.share_cores is not None:
            camera = f'the share of this camera is {self.share_cores:.2f}'
        return (
            f'one image takes {self.image_ms or 0.0:.0f} ms of CPU time, all its images would take '
            f'{self.wanted_cores:.2f} cores, {camera}'
        )


class _Rate:
    """Measure an amount per second over the last seconds, of which older ones count less."""

    def __init__(self, now: float) -> None:
        self._sum = 0.0
        self._at = self._since = now

    def add(self, amount: float, now: float) -> None:
        self._sum = self._left(now) + amount
        self._at = now

    def read(self, now: float) -> float:
        # Soon after the start, divide by the time measured so far.
        passed_s = max(now - self._since, _BURST_S)
        return self._left(now) / (_MEMORY_S * (1 - math.exp(-passed_s / _MEMORY_S)))

    def _left(self, now: float) -> float:
        return self._sum * math.exp((self._at - now) / _MEMORY_S)


class _Camera:
    """What is known of one camera: CPU seconds that it has left, and what it cost."""

    def __init__(self, now: float) -> None:
        # Full; the first fill limits it to the share.
        self.left_s = math.inf
        self.filled_at = now
        self.image_s: float | None = None
        self.arrivals, self.used = _Rate(now), _Rate(now)
        self.arrived_at = self.beyond_at = -math.inf
        self.reported_slowed = False


class ImageShare:
    """
    Give the images of each camera an equal share of CPU time, and leave out what comes beyond it.

    A token bucket per camera: it fills with its share of CPU time, to what a second brings, and each image takes out
    what it has cost. That is known only afterwards, so that an image is let in as long as there is anything left, and
    the debt that it leaves has to be filled up first. A camera that has sent nothing for some seconds has no share, and
    one that sends alone has no limit: there is no other to protect. What a sending camera does not use is no other's.
    A share of one core or more limits nothing: no camera uses more than one thread. For any thread.

    :param topics: of the cameras.
    :param fraction: returns which part of ``cores`` all images together may take, 0 for no limit.
    :param cores: that this process may use, as :func:`gps_denied_c7.monitoring.host_info.usable_cores` says.
    :param monotonic: steady clock in seconds.
    """

    def __init__(
        self,
        topics: Iterable[str],
        *,
        fraction: Callable[[], float],
        cores: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fraction = fraction
        self._cores = cores
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._cameras = {topic: _Camera(monotonic()) for topic in topics}

    @property
    def cores(self) -> float | None:
        """CPU time per second of each camera that sends, None for no limit."""
        since = self._monotonic() - _CALM_S
        sending = sum(camera.arrived_at > since for camera in self._cameras.values())
        share = self._fraction() * self._cores / max(1, sending)
        return share if sending > 1 and 0 < share < 1 else None

    def admits(self, topic: str) -> bool:
        """Return whether the image that has come now may cost anything; False where it is to be left out."""
        with self._lock:
            now, camera = self._monotonic(), self._cameras[topic]
            camera.arrivals.add(1.0, now)
            camera.arrived_at = now
            if len(self._cameras) == 1:
                # On the way of each image: nothing is worked out that cannot matter.
                return True
            self._fill(camera, now)
            admitted = camera.left_s > 0
            if not admitted or self._wanted(camera, now) > (self.cores or math.inf):
                camera.beyond_at = now
            return admitted

    def charge(self, topic: str, cost_ns: int) -> None:
        """Take what one image has cost, nanoseconds of CPU time, also of one that was refused."""
        with self._lock:
            now, camera, cost_s = self._monotonic(), self._cameras[topic], cost_ns / 1e9
            self._fill(camera, now)
            camera.left_s -= cost_s
            camera.used.add(cost_s, now)
            before = cost_s if camera.image_s is None else camera.image_s
            camera.image_s = before + _NEWEST * (cost_s - before)

    def cost(self, topic: str) -> CameraCost:
        """Return what the images of one camera cost now."""
        with self._lock:
            return self._cost(topic, self._monotonic())

    def changes(self) -> list[CameraCost]:
        """Return the cameras that began to be slowed, or are no longer, since the last call; for one thread."""
        with self._lock:
            now = self._monotonic()
            costs = [self._cost(topic, now) for topic in self._cameras]
            changed = [cost for cost in costs if cost.slowed != self._cameras[cost.topic].reported_slowed]
            for cost in changed:
                self._cameras[cost.topic].reported_slowed = cost.slowed
        return changed

    def _fill(self, camera: _Camera, now: float) -> None:
        share = self.cores
        passed_s, camera.filled_at = now - camera.filled_at, now
        if share is None:
            camera.left_s = math.inf
        else:
            camera.left_s = min(share * _BURST_S, camera.left_s + share * passed_s)

    def _cost(self, topic: str, now: float) -> CameraCost:
        camera = self._cameras[topic]
        return CameraCost(
            topic=topic,
            share_cores=self.cores,
            image_ms=None if camera.image_s is None else 1e3 * camera.image_s,
            used_cores=camera.used.read(now),
            wanted_cores=self._wanted(camera, now),
            slowed=now - camera.beyond_at < _CALM_S,
        )

    def _wanted(self, camera: _Camera, now: float) -> float:
        return camera.arrivals.read(now) * (camera.image_s or 0.0)
