"""The cameras: one process that publishes the same images at the same rate to the contestant that is being measured."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.bench.cases import JPEG
from gps_denied_c7.bench.commands import CommandLine
from gps_denied_c7.ros.helper_node import helper_node
from gps_denied_c7.ros.rcl import Rcl

__all__ = ['Cameras', 'main']

QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
_DISTINCT = 4
_POLL_S = 0.005


class Cameras:
    """
    Publish images that are kept as C structures, of which only the stamp changes.

    They leave through rcl, which costs the same as in a driver written in C++ and favours no contestant:
    rclpy would copy each of them once more.

    :param topics: of each contestant by its name, one for each camera.
    """

    def __init__(self, node: Node, topics: dict[str, list[str]], width: int, height: int, encoding: str) -> None:
        kind = CompressedImage if encoding == JPEG else Image
        self._rcl = Rcl(kind)
        random = np.random.default_rng(3)
        self._images = [self._rcl.message(kind) for _ in range(_DISTINCT)]
        for held in self._images:
            picture = _compressed if encoding == JPEG else _raw
            image = picture(random, width, height, encoding)
            image.header.frame_id = 'camera'
            held.assign(image)
        self._publishers: dict[str, list[Publisher]] = {
            name: [node.create_publisher(kind, topic, QOS) for topic in own] for name, own in topics.items()
        }

    def wait_matched(self, name: str, timeout_s: float) -> float | None:
        """Return when (wall clock, s) every camera of a contestant had a subscriber, None where that never came."""
        deadline = time.monotonic() + timeout_s
        while not all(publisher.get_subscription_count() for publisher in self._publishers[name]):
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)
        return time.time()

    def send(self, name: str, rate_hz: float, seconds: float) -> list[int]:
        """
        Publish to one contestant, return the stamps sent once the last frame's time is over.

        The cameras take turns within a period, as cameras without a common trigger do. A frame that is late is
        sent late and none is left out, unless it is more than a second behind.
        """
        publishers = self._publishers[name]
        period = 1.0 / (rate_hz * len(publishers))
        stamps = []
        began = time.monotonic()
        for number in range(max(1, round(seconds / period))):
            behind = _wait_until(began + number * period)
            if behind > 1.0:
                break
            image = self._images[number % _DISTINCT]
            stamp_ns = time.time_ns()
            stamp = image.fields.header.stamp
            stamp.sec, stamp.nanosec = divmod(stamp_ns, 10**9)
            self._rcl.publish(publishers[number % len(publishers)], image)
            stamps.append(stamp_ns)
        # The next frame, to any contestant, keeps the rate.
        _wait_until(began + len(stamps) * period)
        return stamps


def _raw(random: np.random.Generator, width: int, height: int, encoding: str) -> Image:
    channels = 1 if encoding == 'mono8' else 3
    image = Image(width=width, height=height, encoding=encoding, step=width * channels)
    image.data.frombytes(random.integers(0, 256, width * height * channels, np.uint8).tobytes())
    return image


def _compressed(random: np.random.Generator, width: int, height: int, encoding: str) -> CompressedImage:
    """Return a JPEG about as large as a camera's of ground: noise alone would be four times that."""
    import cv2

    coarse = random.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(smooth + random.normal(0.0, 6.0, smooth.shape), 0, 255).astype(np.uint8)
    image = CompressedImage(format=encoding)
    image.data.frombytes(cv2.imencode('.jpg', noisy, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes())
    return image


def _wait_until(due: float) -> float:
    """Return the seconds by which that time of the steady clock is past."""
    if (ahead := due - time.monotonic()) > 0:
        time.sleep(ahead)
    return max(0.0, -ahead)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve commands until standard input ends."""
    parser = argparse.ArgumentParser(prog='c7_bench_camera')
    parser.add_argument('--topics', nargs='+', required=True, metavar='CONTESTANT=TOPIC,TOPIC')
    parser.add_argument('--size', nargs=2, type=int, required=True)
    parser.add_argument('--encoding', required=True)
    options = parser.parse_args(arguments)
    commands = CommandLine()
    topics = {name: own.split(',') for name, _, own in (text.partition('=') for text in options.topics)}
    with helper_node('c7_bench_camera') as (node, _):
        width, height = options.size
        cameras = Cameras(node, topics, width, height, options.encoding)

        def answer(do: str, contestant: str, **settings: float) -> dict[str, Any]:
            if do == 'match':
                return {'matched_s': cameras.wait_matched(contestant, **settings)}
            return {'stamps': cameras.send(contestant, **settings)}

        commands.serve(answer)
    return 0


if __name__ == '__main__':
    sys.exit(main())
