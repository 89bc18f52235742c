"""
What the node is measured against: forty lines of rclpy, cv_bridge and ``session.run``, as a user would write them.

It is written to be good at what it does: it resizes before it converts to float, subscribes as drivers publish, and
hands bytes to rclpy in the one form that is not checked element by element. It fills the durations of the answer, so
that both can be compared stage by stage. It does nothing for the day on which something fails.
"""

from __future__ import annotations

import argparse
import array
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import rclpy
from gps_denied_c7_msgs.msg import Tensor, TensorList
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.bench.models import engine_session

__all__ = ['FortyLines', 'main']


def _image_converter() -> Any:
    """Return cv_bridge's conversion, or rosbags-image's, which does the same, where there is no cv_bridge."""
    try:
        from cv_bridge import CvBridge
    except ImportError:
        from rosbags.image import message_to_cvimage

        return message_to_cvimage
    return CvBridge().imgmsg_to_cv2


class FortyLines(Node):
    """Subscribe, convert, run, publish."""

    def __init__(self, model: str, topics: list[str], *, ort_defaults: bool = False, by_the_book: bool = False) -> None:
        import cv2

        super().__init__('forty_lines')
        self.resize, self.convert, self.bgr_to_rgb = cv2.resize, cv2.cvtColor, cv2.COLOR_BGR2RGB
        self.decode: Any = partial(cv2.imdecode, flags=cv2.IMREAD_COLOR)
        self.by_the_book = by_the_book
        self.to_cv2 = _image_converter()
        self.session = engine_session(model, ort_defaults=ort_defaults)
        self.input = self.session.get_inputs()[0]
        self.encoding = 'mono8' if self.input.shape[1] == 1 else 'rgb8'
        self.names = [output.name for output in self.session.get_outputs()]
        self.publisher = self.create_publisher(TensorList, '~/tensors', 5)
        for topic in topics:
            kind = CompressedImage if topic.endswith('/compressed') else Image
            self.create_subscription(kind, topic, partial(self.on_image, topic), qos_profile_sensor_data)

    def on_image(self, topic: str, message: Image | CompressedImage) -> None:
        """Answer one image."""
        began = time.monotonic_ns()
        received = self.get_clock().now().to_msg()
        compressed = isinstance(message, CompressedImage)
        in_colour = self.by_the_book and self.encoding == 'rgb8'
        if compressed:
            image = self.decode(np.frombuffer(message.data, np.uint8))
        else:
            image = self.to_cv2(message, 'bgr8' if in_colour else self.encoding)
        decoded = time.monotonic_ns()
        source_height, source_width = image.shape[:2]
        height, width = self.input.shape[2:]
        if in_colour:
            image = self.convert(image, self.bgr_to_rgb)
        if image.shape[:2] != (height, width):
            image = self.resize(image, (width, height))
        if compressed:
            image = self.convert(image, self.bgr_to_rgb)
        image = image.astype(np.float32) / 255.0
        image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        tensor = np.ascontiguousarray(image[None])
        prepared = time.monotonic_ns()
        outputs = self.session.run(self.names, {self.input.name: tensor})
        inferred = time.monotonic_ns()
        answer = TensorList(header=message.header, source_topic=topic, receive_stamp=received)
        answer.source_width, answer.source_height = source_width, source_height
        answer.source_encoding = message.format if compressed else message.encoding
        answer.decode_ns, answer.preprocess_ns = decoded - began, prepared - decoded
        answer.inference_ns = answer.engine_ns = inferred - prepared
        for name, values in zip(self.names, outputs, strict=True):
            data = array.array('B', values.tobytes())
            answer.tensors.append(Tensor(name=name, dtype=values.dtype.name, shape=values.shape, data=data))
        answer.total_ns = time.monotonic_ns() - began
        self.publisher.publish(answer)


def main(arguments: list[str] | None = None) -> int:
    """Run until interrupted."""
    parser = argparse.ArgumentParser(prog='c7_bench_forty_lines')
    parser.add_argument('--model', required=True)
    parser.add_argument('--topics', nargs='+', required=True)
    parser.add_argument('--ort-defaults', action='store_true', help='threads as ONNX Runtime chooses them')
    parser.add_argument('--by-the-book', action='store_true', help='bgr8 from the bridge, RGB from that, then resize')
    options, ros = parser.parse_known_args(arguments)
    rclpy.init(args=ros)
    try:
        node = FortyLines(
            options.model, options.topics, ort_defaults=options.ort_defaults, by_the_book=options.by_the_book
        )
        rclpy.spin(node)
    except (KeyboardInterrupt, rclpy.executors.ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
