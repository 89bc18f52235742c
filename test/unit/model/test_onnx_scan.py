"""A model is refused for how many parts it has before anything parses it, and names its files to a walk as to onnx."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator

import pytest

pytest.importorskip('onnx')

import onnx
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7 import host_memory
from gps_denied_c7.errors import EngineContentError, ModelBundleError
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.external_data import external_locations, model_contents
from gps_denied_c7.model.onnx_file import read_onnx
from gps_denied_c7.model.onnx_scan import MESSAGES, MOST_MESSAGES, scan_onnx
from gps_denied_c7.worker.protocol import ErrorReport
from support.fuzz_mutations import damaged, fuzz

KEY = b'\x0a\x08location'


def field(number: int, content: bytes) -> bytes:
    size, length = len(content), b''
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    tag = number << 3 | 2
    return (bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])) + length + bytes([size]) + content


def many(nodes: int) -> bytes:
    """Return a model of empty nodes, two bytes each, which says that it keeps weights in other files."""
    return b'\x08\x08' + field(6, KEY) + field(7, field(1, b'') * nodes)


def parts(message: Message) -> Iterator[Message]:
    """Yield each message of a message, as onnx parsed it."""
    for described, value in message.ListFields():
        if described.message_type:
            for inner in [value] if isinstance(value, Message) else value:
                yield inner
                yield from parts(inner)


# --- as onnx itself ----------------------------------------------------------------------------------


def test_the_walk_knows_each_message_of_onnx():
    found, waiting = {}, [onnx.ModelProto.DESCRIPTOR]
    while waiting:
        described: Descriptor = waiting.pop()
        name = described.full_name.removeprefix('onnx.')
        inner = {each.number: each.message_type for each in described.fields if each.message_type}
        if name not in found:
            found[name] = {number: kind.full_name.removeprefix('onnx.') for number, kind in inner.items()}
            waiting += inner.values()
    known = {name: fields for name, fields in found.items() if fields}
    # An older onnx has fewer.
    assert [name for name, fields in known.items() if not MESSAGES[name].items() >= fields.items()] == []


class RandomModel:
    """Messages of every kind below a model, with constants in other files anywhere."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.model = onnx.ModelProto()
        self.fill(self.model, 9)

    def fill(self, message: Message, depth: int) -> None:
        for described in message.DESCRIPTOR.fields:
            if self.random.random() < 0.5:
                continue
            if not described.message_type:
                self.put(message, described)
            elif depth:
                inner = getattr(message, described.name)
                several = not isinstance(inner, Message)
                for each in [inner.add() for _ in range(self.random.randint(1, 2))] if several else [inner]:
                    each.SetInParent()
                    self.fill(each, depth - self.random.randint(1, 4) if depth > 3 else depth - 1)
        if isinstance(message, onnx.TensorProto):
            del message.external_data[:]
            message.ClearField('data_location')
            if self.random.random() < 0.7:
                message.data_location = self.random.choice([onnx.TensorProto.EXTERNAL] * 3 + [onnx.TensorProto.DEFAULT])
                for key in self.random.sample(['offset', 'length', 'checksum'], 2) + ['location']:
                    value = 'é' * 70 if self.random.random() < 0.1 else f'{key}{self.random.randint(0, 99)}'
                    message.external_data.add(key=key, value=value)

    def put(self, message: Message, described: object) -> None:
        text = self.random.choice(['', 'location', 'x' * 200])
        for value in (text, text.encode(), self.random.choice([0, 1, 300])):
            # The first that is of the field's type.
            with contextlib.suppress(TypeError, ValueError):
                holder = getattr(message, described.name)
                holder.append(value) if hasattr(holder, 'append') else setattr(message, described.name, value)
                return


@pytest.mark.parametrize('seed', range(60))
def test_a_walk_finds_the_files_and_counts_the_parts_that_onnx_finds(seed):
    model = RandomModel(seed).model
    content = model.SerializeToString()
    scanned = scan_onnx('net.onnx', content)
    assert scanned.messages == sum(1 for _ in parts(onnx.ModelProto.FromString(content)))
    assert list(scanned.locations) == external_locations('net.onnx', model_contents(model)[1])


def test_the_random_models_have_what_they_are_for():
    scans = [scan_onnx('net.onnx', RandomModel(seed).model.SerializeToString()) for seed in range(60)]
    assert sum(bool(scan.locations) for scan in scans) >= 25 and max(scan.messages for scan in scans) > 200


SAMPLES = [RandomModel(seed).model.SerializeToString() for seed in (1, 2, 3, 5)]


@fuzz(300)
@given(st.sampled_from(SAMPLES).flatmap(lambda content: damaged(content, tuple(SAMPLES))))
def test_no_part_that_onnx_parses_escapes_the_count(content):
    """Damage included: fields of another order, twice, in groups, of unknown numbers, or cut."""
    try:
        scanned = scan_onnx('net.onnx', content)
    except ModelBundleError:
        return
    try:
        parsed = onnx.ModelProto.FromString(content)
    except DecodeError:
        return
    assert scanned.messages >= sum(1 for _ in parts(parsed))


@pytest.mark.parametrize(
    'before',
    ['3b0a003c', 'fb0193030a009403fc01', '3b3a023b3c3c', 'b881800007', '397878787878787878', '3d78787878',
     '38ffffffffffffffffff01', '72020a00', 'f28000020a00', 'ba808000020a00', '3a80808000'],
    ids=['group', 'groups of unknown numbers', 'tags of groups in a text', 'number', 'eight bytes', 'four bytes',
         'longest number', 'other message', 'tag of four bytes', 'graph by such a tag', 'length of four bytes'],
)  # fmt: skip
def test_fields_that_onnx_skips_hide_nothing(before):
    content = bytes.fromhex(before) + many(50)
    counted = sum(1 for _ in parts(onnx.ModelProto.FromString(content)))
    assert counted > 50
    assert scan_onnx('net.onnx', content).messages >= counted


# --- what does not fit -------------------------------------------------------------------------------


def test_n10_a_bare_model_of_a_million_empty_nodes_is_refused_by_the_node_without_parsing_it(tmp_path):
    (tmp_path / 'net.onnx').write_bytes(many(MOST_MESSAGES + 10_000))
    with pytest.raises(ModelBundleError, match=f'more than {MOST_MESSAGES} nodes') as caught:
        ModelBundle.load(tmp_path / 'net.onnx')
    assert caught.value.lasting and caught.value.remedy


def test_f1_a_worker_refuses_such_a_model_for_a_reason_that_lasts(tmp_path):
    (tmp_path / 'net.onnx').write_bytes(many(MOST_MESSAGES + 10_000))
    with pytest.raises(EngineContentError, match=f'more than {MOST_MESSAGES} nodes') as caught:
        read_onnx(tmp_path / 'net.onnx', None)
    assert caught.value.lasting and ErrorReport.of(caught.value).error().lasting


def test_f1_a_model_whose_parts_take_more_memory_than_is_left_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, 'available_memory', lambda: (100 << 20, 'the memory cgroup /x'))
    (tmp_path / 'net.onnx').write_bytes(many(200_000))
    with pytest.raises(EngineContentError, match=r'\(20000. nodes, attributes and other parts\)') as caught:
        read_onnx(tmp_path / 'net.onnx', None)
    assert not caught.value.lasting, 'others may give memory back'


def test_weights_in_too_many_files_are_refused():
    def kept_in(files: int) -> bytes:
        tensors = (field(5, field(13, KEY + field(2, b'%d' % number)) + b'\x70\x01') for number in range(files))
        return field(7, b''.join(tensors))

    with pytest.raises(ModelBundleError, match='more than 10000 files'):
        scan_onnx('net.onnx', kept_in(15_000))
    assert len(scan_onnx('net.onnx', kept_in(9000)).locations) == 9000


def test_other_threads_run_while_a_large_model_is_walked_over(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, 'sleep', pauses.append)
    scan_onnx('net.onnx', many(100_000))
    assert len(pauses) >= 90
