"""Between ROS messages and the library's data."""

from __future__ import annotations

import array
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from builtin_interfaces.msg import Time
from gps_denied_c7_msgs.msg import FdrRecord as FdrRecordMsg
from gps_denied_c7_msgs.msg import Tensor, TensorList
from numpy.typing import NDArray
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.image.buffers import Scratch
from gps_denied_c7.image.decode import Pixels, RawImage, check_compressed, check_image, decode_compressed, decode_image
from gps_denied_c7.monitoring.flight_record import FdrRecord
from gps_denied_c7.pipeline.pipeline import FrameResult
from gps_denied_c7.ros.c_message import CMessage, CString

__all__ = [
    'CompressedData',
    'ImageHeader',
    'Outputs',
    'ReceivedImage',
    'check_message',
    'check_stamp',
    'chosen_outputs',
    'decode_message',
    'frame_values',
    'image_type',
    'origin_values',
    'received_image',
    'stage_durations',
    'stamp_ns',
    'taken_image',
    'to_fdr_message',
    'to_tensor_list',
    'to_time',
]

_NS = 1_000_000_000
# Of texts in an image's message, which are read in the thread that spins. No encoding or format is nearly as long.
_ENCODING_BYTES, _FRAME_ID_CHARACTERS = 256, 1 << 14
_MEASURED_STAGES = ('queue', 'decode', 'preprocess', 'hand_off', 'engine', 'total')

Outputs = Mapping[str, NDArray]
"""Tensors by name, in the order in which they are published."""


def image_type(topic: str) -> type[Image] | type[CompressedImage]:
    """Return the message type that ``topic`` carries, by the naming rule of image_transport."""
    return CompressedImage if topic.endswith('/compressed') else Image


def to_time(nanoseconds: int) -> Time:
    """Return ``nanoseconds`` since the epoch as a Time message."""
    return Time(sec=nanoseconds // _NS, nanosec=nanoseconds % _NS)


def stamp_ns(stamp: Time | ImageHeader) -> int:
    """Return a stamp as nanoseconds since the epoch."""
    return int(stamp.sec) * _NS + int(stamp.nanosec)


def check_stamp(stamp: Time | ImageHeader, now_ns: int, max_ahead_s: float) -> None:
    """
    Refuse a header stamp that no camera sets (N-7).

    :param now_ns: ROS time in nanoseconds; 0 means that simulated time has not begun, and nothing is
        ahead of it.
    :param max_ahead_s: seconds a stamp may lie ahead of ROS time, 0 for no limit.
    :raises ImageRejectedError: reason ``stamp``.
    """
    if stamp.nanosec >= _NS:
        raise ImageRejectedError('stamp', f'header stamp has nanosec {stamp.nanosec}, which is a second or more.')
    if stamp.sec < 0 or (stamp.sec == 0 and stamp.nanosec == 0):
        raise ImageRejectedError(
            'stamp', f'header stamp {stamp.sec}.{stamp.nanosec:09d} is not set.', remedy='Stamp images in the driver.'
        )
    ahead_s = (stamp_ns(stamp) - now_ns) / _NS
    if now_ns and max_ahead_s and ahead_s > max_ahead_s:
        raise ImageRejectedError(
            'stamp',
            f'header stamp is {ahead_s:.1f} s ahead of ROS time.',
            remedy='Synchronise the clocks, set use_sim_time for a bag, or raise max_stamp_ahead_s (0: no limit).',
        )


class ImageHeader(NamedTuple):
    """Hold what a message's header says: its stamp, as in a Time message, and the camera's frame."""

    sec: int
    nanosec: int
    frame_id: str


class CompressedData(NamedTuple):
    """Hold the fields of a compressed image message: its format and its file's bytes, which are only read."""

    format: str
    data: memoryview


@dataclass(frozen=True, slots=True)
class ReceivedImage:
    """
    Hold one image as it came.

    :param header: the camera's own, which goes into the answer untouched.
    :param picture: views of the message's bytes, which they keep.
    """

    header: ImageHeader
    picture: RawImage | CompressedData

    @property
    def encoding(self) -> str:
        """As ``sensor_msgs/Image.encoding``, or ``CompressedImage.format``."""
        return self.picture.encoding if isinstance(self.picture, RawImage) else self.picture.format


def received_image(message: Image | CompressedImage) -> ReceivedImage:
    """Return the image in a message; its pixels are not copied, and of its texts the beginning is."""
    return _image_in(message, memoryview(message.data), lambda text, limit: str(text[:limit]))


def taken_image(message: CMessage) -> ReceivedImage:
    """Return the image in a C structure of Image or CompressedImage as :func:`received_image`; its pixels keep it."""
    return _image_in(message.fields, message.view('data'), CString.text)


def _image_in(fields: Any, data: memoryview, text: Callable[[Any, int], str]) -> ReceivedImage:
    stamp = fields.header.stamp
    # Whatever is longer has at least one character more than check_message allows: none has more than four bytes.
    header = ImageHeader(stamp.sec, stamp.nanosec, text(fields.header.frame_id, 4 * (_FRAME_ID_CHARACTERS + 1)))
    if hasattr(fields, 'format'):
        return ReceivedImage(header, CompressedData(text(fields.format, _ENCODING_BYTES), data))
    encoding, is_bigendian = text(fields.encoding, _ENCODING_BYTES), bool(fields.is_bigendian)
    return ReceivedImage(
        header, RawImage(fields.width, fields.height, encoding, fields.step, is_bigendian, data)
    )


def check_message(image: ReceivedImage, memory_bytes: int | None = None) -> None:
    """
    Look for what makes an image unusable without touching its pixels.

    :param memory_bytes: that a raw image may take with the copies that decoding makes; None for no limit.
    :raises ImageRejectedError: with the reason under which it is counted.
    """
    if len(image.header.frame_id) > _FRAME_ID_CHARACTERS:
        # The answer would have to carry it untouched.
        raise ImageRejectedError(
            'message',
            f'frame_id is longer than {_FRAME_ID_CHARACTERS:,} characters.',
            remedy='Correct it in the camera driver.',
        )
    if isinstance(image.picture, CompressedData):
        check_compressed(*image.picture)
    else:
        check_image(image.picture, memory_bytes)


def decode_message(image: ReceivedImage, scratch: Scratch | None = None) -> Pixels:
    """
    Return the pixels of an image, as a view of its message where the encoding allows.

    :param scratch: work buffers for encodings that need one; the pixels are then valid until it is used again.
    :raises ImageRejectedError: with the reason under which it is counted.
    """
    if isinstance(image.picture, CompressedData):
        return decode_compressed(*image.picture, scratch)
    return decode_image(image.picture, scratch)


def chosen_outputs(result: FrameResult) -> Outputs:
    """Return the outputs of an answer that go into its message, in the order of the model."""
    outputs = result.answer.outputs
    return {name: outputs[name] for name in outputs if not result.published or name in result.published}


def origin_values(result: FrameResult) -> dict[str, Any]:
    """Return the fields of a TensorList that say what an answer came from; those of one topic seldom change."""
    frame, answer = result.frame, result.answer
    return {
        'source_topic': frame.topic,
        'source_width': result.source_size[0],
        'source_height': result.source_size[1],
        'source_encoding': frame.message.encoding,
        'network_to_image': tuple(result.network_to_image.ravel().tolist()),
        'model_name': answer.model_name,
        'weights_digest': answer.weights_digest,
        'runtime_label': answer.runtime_label,
        'active_provider': answer.active_provider,
        'is_fallback': answer.is_fallback,
    }


def frame_values(result: FrameResult) -> dict[str, int]:
    """Return the plain numbers of a TensorList that differ from frame to frame."""
    durations = result.durations_ns
    return {
        'frame_seq': result.frame_seq,
        'queue_ns': durations['queue'],
        'decode_ns': durations['decode'],
        'preprocess_ns': durations['preprocess'],
        'inference_ns': durations['hand_off'] + durations['engine'] + durations['hand_back'],
        'hand_off_ns': durations['hand_off'],
        'engine_ns': durations['engine'],
    }


def to_tensor_list(result: FrameResult, outputs: Outputs) -> TensorList:
    """
    Return the message for one answered frame; the header is the image's own.

    :param outputs: go into it, copied.
    """
    frame, header = result.frame, result.frame.message.header
    message = TensorList(
        header=Header(stamp=Time(sec=header.sec, nanosec=header.nanosec), frame_id=header.frame_id),
        receive_stamp=to_time(frame.receive_stamp_ns),
        **origin_values(result),
        **frame_values(result),
    )
    message.tensors = [
        Tensor(name=name, dtype=values.dtype.name, shape=values.shape, data=_bytes_of(values))
        for name, values in outputs.items()
    ]
    message.total_ns = time.monotonic_ns() - frame.received_ns
    return message


def stage_durations(answer: Any) -> dict[str, int]:
    """
    Return nanoseconds by stage: queue, decode, preprocess, hand_off, engine, hand_back, and the total.

    :param answer: a TensorList, or its C structure.
    """
    measured = {stage: int(getattr(answer, f'{stage}_ns')) for stage in _MEASURED_STAGES}
    return {**measured, 'hand_back': int(answer.inference_ns) - measured['hand_off'] - measured['engine']}


def _bytes_of(values: NDArray) -> array.array:
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder('<'))
    # rclpy takes an array('B') as it is; a NumPy array would be checked element by element (0.4 s for 6 MB).
    data = array.array('B')
    data.frombytes(little.data.cast('B') if little.size else b'')
    return data


def to_fdr_message(record: FdrRecord) -> FdrRecordMsg:
    """Return the message for one flight record."""
    return FdrRecordMsg(
        schema_version=record.schema_version,
        kind=record.kind,
        severity=record.severity,
        stamp=to_time(record.stamp_ns),
        monotonic_ns=record.monotonic_ns,
        session_id=record.session_id,
        seq=record.seq,
        node=record.node,
        payload_json=record.payload_json(),
    )
