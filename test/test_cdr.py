"""Serialised messages: every field where its alignment puts it, nothing read beyond the bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from gps_denied_c7.cdr import CdrReader, CdrWriter, is_plain_cdr
from gps_denied_c7.errors import CdrError

HEADER = b'\x00\x01\x00\x00'
NAME = 'test_msgs/msg/Fields'

TEXT = st.text(st.characters(exclude_characters='\0', exclude_categories=['Cs']), max_size=9)
KINDS = {
    'uint8': (st.integers(0, 2**8 - 1), CdrReader.uint8),
    'int32': (st.integers(-(2**31), 2**31 - 1), CdrReader.int32),
    'uint32': (st.integers(0, 2**32 - 1), CdrReader.uint32),
    'string': (TEXT, CdrReader.string),
    'uint8[]': (st.binary(max_size=9), lambda reader: bytes(reader.octets())),
}


def written_by_rosbags(kinds, values):
    """Another implementation's bytes for fields of these kinds."""
    names = [f'f{number}' for number in range(len(kinds))]
    store = get_typestore(Stores.EMPTY)
    definition = ''.join(f'{kind} {name}\n' for kind, name in zip(kinds, names, strict=True))
    store.register(get_types_from_msg(definition, NAME))
    arrays = {'uint8[]': np.uint8, 'int64[]': np.int64}
    fields = {
        name: np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value, arrays.get(kind))
        if kind in arrays
        else value
        for kind, name, value in zip(kinds, names, values, strict=True)
    }
    return bytes(store.serialize_cdr(store.types[NAME](**fields), NAME))


FIELDS = st.lists(
    st.sampled_from(list(KINDS)).flatmap(lambda kind: st.tuples(st.just(kind), KINDS[kind][0])), min_size=1, max_size=8
)


@given(FIELDS)
def test_any_fields_are_read_where_another_implementation_wrote_them(fields):
    kinds, values = zip(*fields, strict=True)
    reader = CdrReader(written_by_rosbags(kinds, values))
    assert [KINDS[kind][1](reader) for kind in kinds] == list(values)


@given(FIELDS, st.data())
def test_no_field_is_read_beyond_the_bytes(fields, data):
    kinds, values = zip(*fields, strict=True)
    message = written_by_rosbags(kinds, values)
    reader = CdrReader(message[: data.draw(st.integers(len(HEADER), len(message) - 1))])
    with pytest.raises(CdrError, match='beyond'):
        for kind in kinds:
            KINDS[kind][1](reader)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just('uint32'), st.integers(0, 2**32 - 1)),
            st.tuples(st.just('string'), TEXT),
            st.tuples(st.just('int64[]'), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3)),
            st.tuples(st.just('uint8[]'), st.binary(max_size=9)),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_fields_are_written_as_another_implementation_writes_them(fields):
    kinds, values = zip(*fields, strict=True)
    writer = CdrWriter(HEADER)
    for kind, value in fields:
        if kind == 'uint8[]':
            writer.octets(np.frombuffer(value, np.uint8))
        else:
            {'uint32': writer.uint32, 'string': writer.string, 'int64[]': writer.int64s}[kind](value)
    assert writer.message() == written_by_rosbags(kinds, values)
    buffer = bytearray(writer.nbytes)
    writer.write_into(memoryview(buffer))
    assert buffer == writer.message()


def test_large_fields_are_views_of_the_message():
    message = HEADER + struct.pack('<I', 5) + b'hello'
    view = CdrReader(message).octets()
    assert view.readonly and np.shares_memory(np.frombuffer(view, np.uint8), np.frombuffer(message, np.uint8))


def test_what_is_written_owns_its_bytes():
    values = np.ones(3, np.uint8)
    writer = CdrWriter(HEADER)
    writer.octets(values)
    message = writer.message()
    values[:] = 9
    assert message == HEADER + struct.pack('<I', 3) + b'\1\1\1'


@pytest.mark.parametrize('order', ['C', 'F'])
@pytest.mark.parametrize('dtype', ['<f4', '>f4', '?', 'f2', '>i8'])
def test_arrays_are_written_in_c_order_and_little_endian(dtype, order):
    values = np.arange(6).reshape(2, 3).astype(dtype, order=order)
    writer = CdrWriter(HEADER)
    writer.octets(values)
    read = np.frombuffer(CdrReader(writer.message()).octets(), values.dtype.newbyteorder('<'))
    np.testing.assert_array_equal(read.reshape(2, 3), values)


def test_a_string_that_is_no_text_is_read_as_rclpy_reads_it():
    assert CdrReader(HEADER + struct.pack('<I', 4) + b'a\xffb\0').string() == 'a\N{REPLACEMENT CHARACTER}b'


def test_an_empty_string_needs_no_end_mark():
    """Some middlewares write one so."""
    assert CdrReader(HEADER + struct.pack('<I', 0)).string() == ''


@pytest.mark.parametrize('start', [b'', b'\0', b'\0\0\0\0', b'\0\3\0\0', b'\0\7\0\0', b'\1\0\0\0'])
def test_other_forms_are_not_taken_for_plain_ones(start):
    assert not is_plain_cdr(start)
    for taker in (CdrReader, CdrWriter):
        with pytest.raises(CdrError, match='encapsulation'):
            taker(start)
