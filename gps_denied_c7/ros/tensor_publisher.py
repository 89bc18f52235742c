"""Publish answers with as few copies of their tensors as the middleware lets us (§6)."""

from __future__ import annotations

import ctypes
from collections.abc import Container

import numpy as np
from gps_denied_c7_msgs.msg import Tensor, TensorList
from rclpy.lifecycle import LifecyclePublisher

from gps_denied_c7.pipeline import FrameResult
from gps_denied_c7.ros.c_message import CSequence, CString
from gps_denied_c7.ros.messages import Outputs, chosen_outputs, to_tensor_list
from gps_denied_c7.ros.rcl import Rcl

__all__ = ['TensorPublisher']


class TensorPublisher:
    """
    Publish answers on a lifecycle publisher of TensorList, from any thread.

    :param rcl: publishes them, with tensors that the middleware reads where the engine left them; knows TensorList and
        Tensor. rclpy publishes where None, and copies them.
    """

    def __init__(self, publisher: LifecyclePublisher, rcl: Rcl | None) -> None:
        self._publisher = publisher
        self._rcl = rcl

    def publish(self, result: FrameResult, published: Container[str] | None = None) -> None:
        """
        Publish one answer, or nothing where the publisher is not active.

        :param published: names of the outputs that go into it, None for all.
        :raises RclError: rcl failed.
        """
        outputs = chosen_outputs(result, published)
        if self._rcl is None:
            self._publisher.publish(to_tensor_list(result, outputs))
        elif self._publisher.is_activated:
            self._publish_in_place(self._rcl, to_tensor_list(result, {}), outputs)

    def _publish_in_place(self, rcl: Rcl, head: TensorList, outputs: Outputs) -> None:
        message, tensors = rcl.message(TensorList), rcl.structures(Tensor, len(outputs))
        message.assign(head)
        borrowed = []
        for tensor, (name, values) in zip(tensors, outputs.items(), strict=True):
            texts = [ctypes.create_string_buffer(text.encode()) for text in (name, values.dtype.name)]
            shape = np.array(values.shape, np.int64)
            data = np.ascontiguousarray(values, values.dtype.newbyteorder('<')).reshape(-1).view(np.uint8)
            tensor.name, tensor.dtype = (CString.of(text) for text in texts)
            tensor.shape, tensor.data = CSequence.of(shape), CSequence.of(data)
            borrowed.append((texts, shape, data))
        try:
            message.fields.tensors = CSequence(ctypes.addressof(tensors), len(outputs), len(outputs))
            rcl.publish(self._publisher, message)
        finally:
            # What was borrowed is not the message's to free.
            message.fields.tensors = CSequence()
