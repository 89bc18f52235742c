"""Messages as C structures: what rclpy copies to and from its objects, field by field."""

from __future__ import annotations

import ctypes
import gc
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from gps_denied_c7_msgs.msg import FdrRecord, Tensor, TensorList
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu
from std_msgs.msg import Header

from gps_denied_c7.ros import c_message
from gps_denied_c7.ros.c_message import BorrowedMessage, CMessage, CMessageType, CSequence, CString, LayoutError

TYPES = (Image, CompressedImage, TensorList, Tensor, FdrRecord, Header, CameraInfo, Imu, DiagnosticStatus)


def probe(message_type):
    return c_message._probe(message_type, itertools.count(2))


def differing(*messages):
    """The names of the fields that are not the same in each."""
    names = messages[0].get_fields_and_field_types()
    return [name for name in names if len({str(getattr(message, name)) for message in messages}) > 1]


@pytest.mark.parametrize('message_type', TYPES, ids=lambda each: each.__name__)
def test_a_message_object_comes_back_from_its_structure(message_type):
    message = CMessage(CMessageType(message_type))
    assert message.message() == message_type(), 'as it is made'
    filled = probe(message_type)
    assert set(differing(filled, message_type())) >= set(message.fields._fields_[0][:1])
    message.assign(filled)
    assert message.message() == filled


def test_members_are_read_and_set_in_place():
    message = CMessage(CMessageType(Image))
    message.assign(Image(width=3, height=2, encoding='mono8', step=3, data=b'abcdef'))
    fields = message.fields
    assert (fields.width, fields.height, fields.step, fields.data.size) == (3, 2, 3, 6)
    assert ctypes.string_at(fields.data.data, 6) == b'abcdef'
    assert ctypes.string_at(fields.encoding.data, fields.encoding.size + 1) == b'mono8\0'
    fields.header.stamp.sec, fields.header.stamp.nanosec = 17, 5
    fields.width, fields.is_bigendian = 6, 1
    read = message.message()
    assert (read.header.stamp.sec, read.header.stamp.nanosec, read.width, read.is_bigendian) == (17, 5, 6, 1)
    assert (read.height, read.step, read.encoding, bytes(read.data)) == (2, 3, 'mono8', b'abcdef')


def test_what_a_message_borrows_is_read_like_its_own():
    message = CMessage(CMessageType(Tensor))
    name, shape = ctypes.create_string_buffer('größe'.encode()), np.array([2, 3], np.int64)
    data, empty = np.arange(6, dtype=np.uint8), np.zeros(0, np.uint8)
    message.fields.shape, message.fields.data = CSequence.of(shape), CSequence.of(data)
    own, message.fields.name = CString.from_buffer_copy(message.fields.name), CString.of(name)
    try:
        assert message.message() == Tensor(name='größe', shape=[2, 3], data=data.tobytes())
        message.fields.data = CSequence.of(empty)
        assert message.fields.data.data is None and message.message().data.tobytes() == b''
    finally:
        message.fields.name, message.fields.shape, message.fields.data = own, CSequence(), CSequence()


@pytest.mark.parametrize('message_type', TYPES, ids=lambda each: each.__name__)
def test_every_field_counts_for_the_check_of_the_layout(message_type):
    """Each field that is otherwise, and what lies in fields of fields, is found by its name."""
    message, filled = CMessage(CMessageType(message_type)), probe(message_type)
    message.assign(filled)
    assert c_message._first_difference(message.fields, filled) is None
    for name in message_type.get_fields_and_field_types():
        other = probe(message_type)
        setattr(other, name, getattr(message_type(), name))
        found = c_message._first_difference(message.fields, other)
        if str(getattr(other, name)) != str(getattr(filled, name)):
            assert found is not None and found.split('.')[0] == name


@pytest.fixture
def forgotten():
    """Layouts are kept from one use to the next."""
    c_message._structure.cache_clear()
    yield
    c_message._structure.cache_clear()


@pytest.mark.usefixtures('forgotten')
@pytest.mark.parametrize(
    ('name', 'kind', 'field'),
    [
        ('uint32', ctypes.c_uint64, 'header.stamp.nanosec'),
        ('int32', ctypes.c_int64, 'header.stamp.sec'),
        ('uint8', ctypes.c_uint64, 'is_bigendian'),
    ],
)
def test_another_layout_is_refused_by_the_name_of_the_field(name, kind, field, monkeypatch):
    monkeypatch.setitem(c_message._BASIC, name, kind)
    with pytest.raises(LayoutError, match=rf'Image\.{field} is not where it is'):
        CMessageType(Image)


@pytest.mark.usefixtures('forgotten')
def test_sequences_of_another_size_are_refused(monkeypatch):
    """As they are after Kilted, with two flags behind."""
    longer = type('CSequence', (CSequence,), {'_fields_': [('flags', ctypes.c_bool * 2)]})
    monkeypatch.setattr(c_message, 'CSequence', longer)
    with pytest.raises(LayoutError, match=r'Tensor\.data is not where it is'):
        CMessageType(Tensor)


@pytest.mark.usefixtures('forgotten')
def test_a_member_that_is_not_there_is_refused(monkeypatch):
    longer = type('CString', (CString,), {'_fields_': [('hash', ctypes.c_size_t)]})
    monkeypatch.setattr(c_message, 'CString', longer)
    with pytest.raises(LayoutError, match=r'Image\.height is not where it is'):
        CMessageType(Image)


def test_a_package_without_pythons_functions_is_refused():
    class Meta(type(Image)):
        _CONVERT_TO_PY = None

    with pytest.raises(LayoutError, match='no C structure in Python'):
        CMessageType(Meta('Image', (Image,), {}))


def test_a_structure_is_freed_with_its_message(monkeypatch):
    kind = CMessageType(Image)
    destroy, freed = kind.destroy, []
    monkeypatch.setattr(kind, 'destroy', lambda address: (freed.append(address), destroy(address)))
    message = CMessage(kind)
    address = message.address
    assert not freed
    del message
    gc.collect()
    assert freed == [address]


def test_no_memory_for_a_message_is_an_error_of_its_own(monkeypatch):
    kind = CMessageType(Image)
    monkeypatch.setattr(kind, 'create', lambda: None)
    monkeypatch.setattr(kind, 'destroy', lambda address: pytest.fail('there is nothing to free'))
    with pytest.raises(MemoryError, match='no memory for a message'):
        CMessage(kind)


def test_messages_in_sequences_are_structures_too():
    array = DiagnosticArray(status=[DiagnosticStatus(name='a'), DiagnosticStatus(name='bc')])
    message = CMessage(CMessageType(DiagnosticArray))
    message.assign(array)
    status = message.fields.status
    each = (CMessageType(DiagnosticStatus).structure * status.size).from_address(status.data)
    assert [ctypes.string_at(one.name.data) for one in each] == [b'a', b'bc']


def test_arrays_of_strings_cannot_be_borrowed():
    """Nobody has needed one; left as they are made, their strings would point to nothing."""

    class Texts(ctypes.Structure):
        _fields_ = [('texts', c_message.CString * 2)]

    with pytest.raises(LayoutError, match='texts is an array'):
        BorrowedMessage(SimpleNamespace(structure=Texts))


def test_a_text_ends_with_its_first_zero():
    """As rclpy reads one."""
    message = CMessage(CMessageType(DiagnosticStatus))
    message.assign(DiagnosticStatus(name='abcd'))
    ctypes.memset(message.fields.name.data + 2, 0, 1)
    assert message.fields.name.text() == message.message().name == 'ab'
