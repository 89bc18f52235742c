"""
Between ROS messages and the library's data.

Images and tensors pass as serialised messages, since rclpy's objects cost a copy or more of all they hold; everything
else, and whatever a middleware writes in a form of its own, passes as those objects.
"""

from __future__ import annotations

import array
import logging
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from builtin_interfaces.msg import Time
from gps_denied_c7_msgs.msg import FdrRecord as FdrRecordMsg
from gps_denied_c7_msgs.msg import Tensor, TensorList
from numpy.typing import NDArray
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from gps_denied_c7.cdr import CdrReader, CdrWriter, is_plain_cdr
from gps_denied_c7.decoding import Pixels, RawImage, check_compressed, check_image, decode_compressed, decode_image
from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.fdr import FdrRecord
from gps_denied_c7.pipeline import FrameResult
from gps_denied_c7.scratch import Scratch

__all__ = [
    'CompressedData',
    'ReceivedImage',
    'TensorListWriter',
    'check_message',
    'check_stamp',
    'decode_message',
    'image_type',
    'read_image',
    'stamp_ns',
    'to_fdr_message',
    'to_tensor_list',
    'to_time',
]

_NS = 1_000_000_000

_log = logging.getLogger(__name__)

_Outputs = Sequence[tuple[str, NDArray]]


def image_type(topic: str) -> type[Image] | type[CompressedImage]:
    """Return the message type that ``topic`` carries, by the naming rule of image_transport."""
    return CompressedImage if topic.endswith('/compressed') else Image


def to_time(nanoseconds: int) -> Time:
    """Return ``nanoseconds`` since the epoch as a Time message."""
    return Time(sec=nanoseconds // _NS, nanosec=nanoseconds % _NS)


def stamp_ns(stamp: Time) -> int:
    """Return a Time message as nanoseconds since the epoch."""
    return int(stamp.sec) * _NS + int(stamp.nanosec)


def check_stamp(stamp: Time, now_ns: int, max_ahead_s: float) -> None:
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
            f'header stamp lies {ahead_s:.1f} s ahead of ROS time.',
            remedy='Synchronise the clocks, set use_sim_time for a bag, or raise max_stamp_ahead_s (0: no limit).',
        )


class CompressedData(NamedTuple):
    """Hold the fields of a compressed image message: its format and its file's bytes, which are only read."""

    format: str
    data: memoryview


@dataclass(frozen=True, slots=True)
class ReceivedImage:
    """
    Hold one image as it came.

    :param header: the camera's own, which goes into the answer untouched.
    :param picture: views of the message's bytes, which they keep alive.
    """

    header: Header
    picture: RawImage | CompressedData

    @property
    def encoding(self) -> str:
        """As ``sensor_msgs/Image.encoding``, or ``CompressedImage.format``."""
        return self.picture.encoding if isinstance(self.picture, RawImage) else self.picture.format


def read_image(serialised: bytes | memoryview, message_type: type[Image] | type[CompressedImage]) -> ReceivedImage:
    """
    Return the image in a serialised message; its pixels are not copied.

    :raises ImageRejectedError: reason ``message`` where the bytes are no such message.
    """
    try:
        if is_plain_cdr(serialised):
            return _read(CdrReader(serialised), message_type)
        # Big-endian or XCDR2, from another vendor's publisher: rclpy knows these, at the price of copies.
        return _from_message(deserialize_message(bytes(serialised), message_type))
    except Exception as error:  # rclpy raises RuntimeError, or what a field's setter does
        raise ImageRejectedError(
            'message',
            f'{len(serialised)} bytes are no {message_type.__name__}: {error}',
            remedy='Build the publisher with the same sensor_msgs as this node.',
        ) from error


def _read(fields: CdrReader, message_type: type[Image] | type[CompressedImage]) -> ReceivedImage:
    header = Header(stamp=Time(sec=fields.int32(), nanosec=fields.uint32()), frame_id=fields.string())
    if message_type is CompressedImage:
        return ReceivedImage(header, CompressedData(fields.string(), fields.octets()))
    height, width, encoding = fields.uint32(), fields.uint32(), fields.string()
    is_bigendian, step = bool(fields.uint8()), fields.uint32()
    return ReceivedImage(header, RawImage(width, height, encoding, step, is_bigendian, fields.octets()))


def _from_message(message: Image | CompressedImage) -> ReceivedImage:
    if isinstance(message, CompressedImage):
        return ReceivedImage(message.header, CompressedData(message.format, memoryview(message.data)))
    picture = RawImage(
        message.width, message.height, message.encoding, message.step, bool(message.is_bigendian), message.data
    )
    return ReceivedImage(message.header, picture)


def check_message(image: ReceivedImage) -> None:
    """
    Look for what makes an image unusable without touching its pixels.

    :raises ImageRejectedError: with the reason under which it is counted.
    """
    if isinstance(image.picture, CompressedData):
        check_compressed(*image.picture)
    else:
        check_image(image.picture)


def decode_message(image: ReceivedImage, scratch: Scratch | None = None) -> Pixels:
    """
    Return the pixels of an image, as a view of its message where the encoding allows.

    :param scratch: work buffers for encodings that need one; the pixels are then valid until it is used again.
    :raises ImageRejectedError: with the reason under which it is counted.
    """
    if isinstance(image.picture, CompressedData):
        return decode_compressed(*image.picture)
    return decode_image(image.picture, scratch)


def to_tensor_list(result: FrameResult, published: Container[str] | None = None) -> TensorList:
    """
    Return the message for one answered frame; the outputs are copied, the header is the image's own.

    :param published: names of the outputs that go into it, None for all.
    """
    message = _without_tensors(result)
    message.tensors = _tensors(_chosen(result, published))
    return message


class TensorListWriter:
    """
    Serialise answers with one copy of their outputs.

    rclpy serialises all but the tensors, which come last in a TensorList; those are appended. Whether rclpy reads from
    that what was written is tried once, with a small answer: where a middleware serialises in a way of its own, message
    objects are what is published.
    """

    def __init__(self) -> None:
        outputs: _Outputs = (
            ('scores', np.arange(3, dtype=np.float32)),
            ('count', np.array(7, np.int64)),
            ('none', np.zeros((2, 0), np.uint8)),
        )
        message = TensorList(source_topic='/camera', model_name='net')
        try:
            read = deserialize_message(_serialise(message, outputs).message(), TensorList)
            message.tensors = _tensors(outputs)
            self._appends = read == message
            found = '' if self._appends else f': {read}'
        except Exception as error:  # rclpy raises RuntimeError, other middlewares whatever they do
            self._appends, found = False, f': {error}'
        if not self._appends:
            _log.info('tensors are published as message objects: this middleware serialises otherwise%s', found)

    def write(self, result: FrameResult, published: Container[str] | None = None) -> CdrWriter | TensorList:
        """
        Return the message for one answered frame; a writer copies the outputs when it is asked for its message.

        :param published: names of the outputs that go into it, None for all.
        """
        if self._appends:
            return _serialise(_without_tensors(result), _chosen(result, published))
        return to_tensor_list(result, published)


def _without_tensors(result: FrameResult) -> TensorList:
    frame, answer, durations = result.frame, result.answer, result.durations_ns
    return TensorList(
        header=frame.message.header,
        source_topic=frame.topic,
        frame_seq=result.frame_seq,
        source_width=result.source_size[0],
        source_height=result.source_size[1],
        source_encoding=frame.message.encoding,
        network_to_image=result.network_to_image.ravel(),
        receive_stamp=to_time(frame.receive_stamp_ns),
        model_name=answer.model_name,
        weights_digest=answer.weights_digest,
        runtime_label=answer.runtime_label,
        active_provider=answer.active_provider,
        is_fallback=answer.is_fallback,
        queue_ns=durations['queue'],
        decode_ns=durations['decode'],
        preprocess_ns=durations['preprocess'],
        inference_ns=durations['inference'],
        total_ns=time.monotonic_ns() - frame.received_ns,
    )


def _chosen(result: FrameResult, published: Container[str] | None) -> _Outputs:
    return [each for each in result.answer.outputs.items() if published is None or each[0] in published]


def _tensors(outputs: _Outputs) -> list[Tensor]:
    return [
        Tensor(name=name, dtype=values.dtype.name, shape=values.shape, data=_bytes_of(values))
        for name, values in outputs
    ]


def _bytes_of(values: NDArray) -> array.array:
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder('<'))
    # rclpy takes an array('B') as it is; a NumPy array would be checked element by element (0.4 s for 6 MB).
    data = array.array('B')
    data.frombytes(little.data.cast('B') if little.size else b'')
    return data


def _serialise(message: TensorList, outputs: _Outputs) -> CdrWriter:
    """Serialise ``message``, which has no tensors yet, with ``outputs``."""
    # A TensorList without tensors ends with their number.
    writer = CdrWriter(serialize_message(message)[:-4])
    writer.uint32(len(outputs))
    for name, values in outputs:
        writer.string(name)
        writer.string(values.dtype.name)
        writer.int64s(values.shape)
        writer.octets(values)
    return writer


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
