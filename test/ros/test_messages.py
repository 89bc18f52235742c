"""§6: messages to data and back, no field forgotten, no buffer copied element by element."""

from __future__ import annotations

import array

import cv2
import numpy as np
import pytest
from builtin_interfaces.msg import Time
from gps_denied_c7_msgs.msg import TensorList
from hypothesis import given
from hypothesis import strategies as st
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Header

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.ros.messages import (
    CompressedData,
    check_message,
    check_stamp,
    chosen_outputs,
    decode_message,
    image_type,
    received_image,
    stage_durations,
    stamp_ns,
    taken_image,
    to_tensor_list,
    to_time,
)
from gps_denied_c7.ros.rcl import Rcl
from support.frame_results import SECOND, TEXT, received, result
from support.harness import image, tensor


def listed(answered):
    return to_tensor_list(answered, chosen_outputs(answered))


def over_the_wire(message):
    return deserialize_message(serialize_message(message), type(message))


@pytest.mark.parametrize(
    ('topic', 'message_type'),
    [
        ('/camera/image_raw', Image),
        ('/camera/image_raw/compressed', CompressedImage),
        ('/compressed/image_raw', Image),
        ('/camera/uncompressed', Image),
    ],
)
def test_the_name_of_a_topic_tells_its_type(topic, message_type):
    assert image_type(topic) is message_type


def test_a_result_becomes_a_message_without_loss():
    question = image(5, encoding='rgb8')
    outputs = {
        'points': np.arange(6, dtype=np.float32).reshape(1, 3, 2),
        'ids': np.array([[-1, 2**40]], np.int64),
        'scalar': np.array(0.25, np.float16),
        'mask': np.array([True, False]),
        'empty': np.zeros((1, 0, 2), np.float32),
    }
    message = over_the_wire(listed(result(question, outputs)))
    assert isinstance(message, TensorList)
    assert message.header == question.header
    assert (message.source_topic, message.frame_seq) == ('/camera', 2**40)
    assert (message.source_width, message.source_height, message.source_encoding) == (64, 48, 'rgb8')
    assert list(message.network_to_image) == [2.0, 0.0, 0.5, 0.0, 3.0, 1.0]
    assert (message.receive_stamp.sec, message.receive_stamp.nanosec) == (17, 5)
    assert (message.model_name, message.weights_digest) == ('net', 'sha256:ab')
    assert (message.runtime_label, message.active_provider) == ('onnx_trt_ep', 'CPUExecutionProvider')
    assert message.is_fallback
    assert (message.queue_ns, message.decode_ns, message.preprocess_ns, message.inference_ns) == (1, 2, 3, 15)
    assert stage_durations(message) == {**result(question, outputs).durations_ns, 'total': message.total_ns}
    assert message.total_ns > 0
    assert [each.name for each in message.tensors] == list(outputs), 'in the order of the model'
    for name, values in outputs.items():
        read = tensor(message, name)
        assert read.dtype == values.dtype and read.shape == values.shape
        np.testing.assert_array_equal(read, values)


def test_outputs_that_nobody_asked_for_are_left_out():
    outputs = {name: np.zeros(2, np.float32) for name in ('scores', 'descriptors', 'mask')}
    message = listed(result(image(), outputs, published=frozenset({'mask', 'scores'})))
    assert [each.name for each in message.tensors] == ['scores', 'mask']


@given(
    st.sampled_from(['uint8', 'int16', 'uint32', 'int64', 'float16', 'float32', 'float64', 'bool']),
    st.lists(st.integers(0, 4), max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_any_array_is_written_in_c_order_and_little_endian(dtype, shape, transposed, swapped):
    values = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    if swapped:
        values = values.astype(values.dtype.newbyteorder('>'))
    if transposed:
        values = values.T
    read = tensor(listed(result(image(), {'x': values})), 'x')
    assert read.dtype == np.dtype(dtype) and read.shape == values.shape
    np.testing.assert_array_equal(read, values)


def test_the_message_owns_its_tensors():
    """The engine's buffers are valid until its next run only."""
    values = np.ones(4, np.float32)
    message = listed(result(image(), {'x': values}))
    values[:] = 9
    np.testing.assert_array_equal(tensor(message, 'x'), np.ones(4))


def test_rclpy_takes_the_data_of_a_message_object_whole():
    """Anything but an array('B') is checked byte by byte."""
    (only,) = listed(result(image(), {'x': np.ones(4, np.float32)})).tensors
    assert isinstance(only.data, array.array) and only.data.typecode == 'B'


def test_a_compressed_image_names_its_format():
    message = CompressedImage(format='rgb8; jpeg compressed bgr8')
    assert listed(result(message, {})).source_encoding == 'rgb8; jpeg compressed bgr8'


@given(st.integers(0, 2**31 * SECOND - 1))
def test_a_time_round_trips(nanoseconds):
    assert stamp_ns(to_time(nanoseconds)) == nanoseconds


NOW = 1000 * SECOND


@pytest.mark.parametrize(
    ('stamp', 'ahead_s', 'word'),
    [
        (Time(), 10.0, 'not set'),
        (Time(sec=-1), 10.0, 'not set'),
        (Time(sec=-(2**31)), 0.0, 'not set'),
        (Time(sec=5, nanosec=SECOND), 10.0, 'nanosec'),
        (Time(sec=5, nanosec=2**32 - 1), 0.0, 'nanosec'),
        (Time(sec=1011), 10.0, 'ahead'),
        (Time(sec=2**31 - 1), 10.0, 'ahead'),
    ],
)
def test_n7_a_stamp_that_no_camera_sets_is_refused(stamp, ahead_s, word):
    with pytest.raises(ImageRejectedError, match=word) as caught:
        check_stamp(stamp, NOW, ahead_s)
    assert caught.value.reason == 'stamp'


@pytest.mark.parametrize(
    ('stamp', 'now_ns', 'ahead_s'),
    [
        (Time(sec=1), NOW, 10.0),
        (Time(nanosec=1), NOW, 10.0),
        (Time(sec=1010), NOW, 10.0),
        (Time(sec=5, nanosec=SECOND - 1), NOW, 10.0),
        (Time(sec=2**31 - 1), NOW, 0.0),  # No limit.
        (Time(sec=2**31 - 1), 0, 10.0),  # Simulated time has not begun.
    ],
)
def test_n7_any_other_stamp_passes(stamp, now_ns, ahead_s):
    check_stamp(stamp, now_ns, ahead_s)


def structure(message):
    made = Rcl(type(message)).message(type(message))
    made.assign(message)
    return made


@pytest.mark.parametrize('in_structure', [False, True])
def test_a_raw_message_is_checked_and_decoded_without_a_copy(in_structure):
    whole = structure(image(1)) if in_structure else image(1)
    data = np.frombuffer(whole.view('data') if in_structure else whole.data, np.uint8)
    message = taken_image(whole) if in_structure else received_image(whole)
    check_message(message)
    pixels = decode_message(message)
    assert pixels.order == 'gray' and pixels.array.shape == (48, 64)
    assert np.shares_memory(pixels.array, data)
    with pytest.raises(ImageRejectedError) as caught:
        check_message(received(image(1, data=b'\0')))
    assert caught.value.reason == 'data'


def test_a_compressed_message_is_checked_and_decoded():
    picture = np.full((48, 64, 3), (10, 200, 90), np.uint8)
    message = CompressedImage(format='png', data=cv2.imencode('.png', picture)[1].tobytes())
    check_message(received(message))
    np.testing.assert_array_equal(decode_message(received(message)).array, picture)
    message.data = message.data[:-8]
    check_message(received(message))  # Nothing of a picture is walked here.
    with pytest.raises(ImageRejectedError) as caught:
        decode_message(received(message))
    assert caught.value.reason == 'data'
    message.data = b''
    with pytest.raises(ImageRejectedError) as caught:
        check_message(received(message))
    assert caught.value.reason == 'data'


def same(read, message):
    """Whether everything in a message has been read, byte for byte."""
    stamp = message.header.stamp
    assert read.header == (stamp.sec, stamp.nanosec, message.header.frame_id)
    if isinstance(message, CompressedImage):
        assert isinstance(read.picture, CompressedData)
        assert read.encoding == read.picture.format == message.format
    else:
        assert read.encoding == message.encoding
        names = ('width', 'height', 'encoding', 'step', 'is_bigendian')
        assert [getattr(read.picture, name) for name in names] == [getattr(message, name) for name in names]
    assert bytes(read.picture.data) == message.data.tobytes()


HEADERS = st.builds(
    lambda sec, nanosec, frame: Header(stamp=Time(sec=sec, nanosec=nanosec), frame_id=frame),
    st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**32 - 1), TEXT,
)  # fmt: skip
UINT32 = st.integers(0, 2**32 - 1)
RAW = st.builds(
    Image,
    header=HEADERS, width=UINT32, height=UINT32, step=UINT32, encoding=TEXT,
    is_bigendian=st.integers(0, 1), data=st.binary(max_size=40).map(lambda data: array.array('B', data)),
)  # fmt: skip
COMPRESSED = st.builds(
    CompressedImage,
    header=HEADERS, format=TEXT, data=st.binary(max_size=40).map(lambda data: array.array('B', data)),
)  # fmt: skip


@given(RAW | COMPRESSED)
def test_every_field_of_a_message_is_there(message):
    same(received(message), message)
    same(taken_image(structure(message)), message)


def test_big_endian_and_padded_rows_are_honoured():
    values = np.arange(48 * 64, dtype='>u2').reshape(48, 64)
    padded = np.zeros((48, 70), '>u2')
    padded[:, :64] = values
    message = image(1, encoding='mono16', step=140, is_bigendian=1, data=padded.tobytes())
    check_message(received(message))
    np.testing.assert_array_equal(decode_message(received(message)).array, values)
