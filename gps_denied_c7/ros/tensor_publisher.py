"""Publish answers with as few copies of their tensors as the middleware lets us (§6)."""

from __future__ import annotations

import threading
from collections.abc import Container

import numpy as np
from rclpy.lifecycle import LifecyclePublisher

from gps_denied_c7.cdr import CdrWriter
from gps_denied_c7.pipeline import FrameResult
from gps_denied_c7.ros.messages import TensorListWriter
from gps_denied_c7.ros.rcl import Rcl

__all__ = ['TensorPublisher']


class TensorPublisher:
    """
    Publish answers on a lifecycle publisher of TensorList, from any thread.

    :param rcl: publishes them, out of a buffer that is used again; rclpy does where None.
    """

    def __init__(self, publisher: LifecyclePublisher, rcl: Rcl | None) -> None:
        self._publisher = publisher
        self._rcl = rcl
        self._writer = TensorListWriter()
        self._buffer = np.empty(0, np.uint8)
        # A thread whose engine hung until after the node was activated again publishes beside the new one.
        self._sending = threading.Lock()

    def publish(self, result: FrameResult, published: Container[str] | None = None) -> None:
        """
        Publish one answer, or nothing where the publisher is not active.

        :param published: names of the outputs that go into it, None for all.
        :raises RclError: rcl failed.
        """
        message = self._writer.write(result, published)
        if not isinstance(message, CdrWriter):
            self._publisher.publish(message)
        elif self._rcl is None:
            self._publisher.publish(message.message())
        elif self._publisher.is_activated:
            with self._sending:
                if self._buffer.nbytes < message.nbytes:
                    self._buffer = np.empty(message.nbytes, np.uint8)
                view = self._buffer.data[: message.nbytes]
                message.write_into(view)
                self._rcl.publish(self._publisher, view)
