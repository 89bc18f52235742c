"""Publish answers with as few copies of their tensors as the middleware allows."""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from typing import Any, NamedTuple

import numpy as np
from gps_denied_c7_msgs.msg import Tensor, TensorList
from numpy.typing import NDArray
from rclpy.lifecycle import LifecyclePublisher

from gps_denied_c7.pipeline.pipeline import FrameResult
from gps_denied_c7.ros.c_message import BorrowedMessage, CSequence, CString
from gps_denied_c7.ros.messages import Outputs, chosen_outputs, frame_values, origin_values, to_tensor_list
from gps_denied_c7.ros.rcl import Rcl

__all__ = ['TensorPublisher']

_NS = 1_000_000_000


class TensorPublisher:
    """
    Publish answers on a lifecycle publisher of TensorList, from any thread.

    :param rcl: publishes them, with tensors that the middleware reads where the engine left them; knows TensorList and
        Tensor. rclpy publishes where None, and copies them.
    """

    def __init__(self, publisher: LifecyclePublisher, rcl: Rcl | None) -> None:
        self._publisher = publisher
        self._rcl = rcl
        self._forms = _Forms()

    def publish(self, result: FrameResult) -> None:
        """
        Publish one answer, or nothing where the publisher is not active.

        :raises RclError: rcl failed.
        """
        outputs = chosen_outputs(result)
        if self._rcl is None:
            self._publisher.publish(to_tensor_list(result, outputs))
        elif self._publisher.is_activated:
            self._publish_in_place(self._rcl, result, outputs)

    def _publish_in_place(self, rcl: Rcl, result: FrameResult, outputs: Outputs) -> None:
        forms = self._forms.by_topic
        if (form := forms.get(result.frame.topic)) is None:
            form = forms[result.frame.topic] = _AnswerForm(rcl)
        # Copies are kept until the message has been published.
        message, copies = form.fill(result, outputs)
        rcl.publish(self._publisher, message)
        del copies


class _Forms(threading.local):
    """Hold the messages that a thread fills, one for each topic of images."""

    def __init__(self) -> None:
        self.by_topic: dict[str, _AnswerForm] = {}


class _Known(NamedTuple):
    """Remember an output that the message points to."""

    name: str
    values: weakref.ref[NDArray]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class _AnswerForm:
    """
    Fill one structure of TensorList again and again; for one thread and one topic of images.

    A frame costs what differs from the one before: by then an engine has emptied the caches of everything else, and
    each line of Python takes ten times as long as it seems to.
    """

    def __init__(self, rcl: Rcl) -> None:
        self._rcl = rcl
        self._message = rcl.borrowed(TensorList)
        fields = self._message.fields
        self._header, self._stamp, self._received = fields.header, fields.header.stamp, fields.receive_stamp
        self._origin: tuple[Any, ...] = ()
        self._matrix: NDArray | None = None
        self._texts: dict[str, tuple[str, ctypes.Array[ctypes.c_char]]] = {}
        self._known: list[_Known] | None = None
        self._tensors: tuple[object, ...] = ()

    def fill(self, result: FrameResult, outputs: Outputs) -> tuple[BorrowedMessage, list[NDArray]]:
        """
        Return the message of one answer, valid until the next call and as long as ``outputs`` are.

        :return: also the copies of outputs whose memory layout is not a message's, to be kept until it was published.
        """
        frame, fields = result.frame, self._message.fields
        header = frame.message.header
        self._stamp.sec, self._stamp.nanosec = header.sec, header.nanosec
        self._header.frame_id = self._text('frame_id', header.frame_id)
        self._received.sec, self._received.nanosec = divmod(frame.receive_stamp_ns, _NS)
        self._say_origin(result)
        for name, value in frame_values(result).items():
            setattr(fields, name, value)
        copies: list[NDArray] = []
        if not self._are_known(outputs):
            copies = self._place(outputs)
        fields.total_ns = time.monotonic_ns() - frame.received_ns
        return self._message, copies

    def _say_origin(self, result: FrameResult) -> None:
        """Fill in what the answer came from, where that is not what the one before came from."""
        # The matrix is the same object for the same geometry.
        origin = result.frame.message.encoding, result.source_size, result.answer.maker
        if self._matrix is result.network_to_image and self._origin == origin:
            return
        for name, value in origin_values(result).items():
            setattr(self._message.fields, name, self._text(name, value) if isinstance(value, str) else value)
        # Not before: where a field could not be filled in, the next answer must fill it in.
        self._matrix, self._origin = result.network_to_image, origin

    def _text(self, field: str, text: str) -> CString:
        known = self._texts.get(field)
        if known is None or known[0] != text:
            known = self._texts[field] = text, ctypes.create_string_buffer(text.encode())
        return CString.of(known[1])

    def _are_known(self, outputs: Outputs) -> bool:
        """Tell whether the message has these very arrays already: most engines write into the same ones again."""
        known = self._known
        return known is not None and len(outputs) == len(known) and all(
            name == own.name and own.values() is values and (values.shape, values.dtype) == (own.shape, own.dtype)
            for own, (name, values) in zip(known, outputs.items(), strict=True)
        )

    def _place(self, outputs: Outputs) -> list[NDArray]:
        """Point the message to the outputs, or to copies of those with another memory layout; return the copies."""
        structures, kept, copies = self._rcl.structures(Tensor, len(outputs)), [], []
        for tensor, (name, values) in zip(structures, outputs.items(), strict=True):
            texts = [ctypes.create_string_buffer(text.encode()) for text in (name, values.dtype.name)]
            shape = np.array(values.shape, np.int64)
            data = np.ascontiguousarray(values, values.dtype.newbyteorder('<')).reshape(-1).view(np.uint8)
            tensor.name, tensor.dtype = (CString.of(text) for text in texts)
            tensor.shape, tensor.data = CSequence.of(shape), CSequence.of(data)
            kept.append((texts, shape))
            if data.ctypes.data != values.ctypes.data:
                copies.append(data)
        # Not the arrays themselves: an engine that is released must not be kept by its last answer.
        self._known = None if copies else [
            _Known(name, weakref.ref(values), values.shape, values.dtype) for name, values in outputs.items()
        ]
        self._tensors = (structures, kept)
        self._message.fields.tensors = CSequence(ctypes.addressof(structures), len(outputs), len(outputs))
        return copies
