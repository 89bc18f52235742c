"""F-1: messages of node and children go through whole, and whatever is no message is one error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.decoder.protocol import DECODER_PROTOCOL, Decoded, Refused
from gps_denied_c7.errors import InferenceError
from gps_denied_c7.image.decode import REASONS
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.worker.channel import PACKET_BYTES, PROTOCOL_VERSION, MessageError, MessageSet, Ready
from gps_denied_c7.worker.protocol import (
    WORKER_PROTOCOL,
    AnswerNext,
    ErrorReport,
    Failed,
    Infer,
    InferNext,
    NeedRoom,
)
from gps_denied_c7.worker.shared_memory import TensorLayout

SETS = {
    f'{protocol.module} {direction}': getattr(protocol, direction)
    for protocol in (WORKER_PROTOCOL, DECODER_PROTOCOL) for direction in ('to_child', 'from_child')
}
TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=8)
WORDS = st.integers(0, (1 << 64) - 1)
# Values that the classes themselves check.
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
LAYOUTS = st.lists(st.tuples(TEXT, st.sampled_from(['float32', 'uint8']), SHAPES), max_size=4).map(
    lambda tensors: TensorLayout(tuple((*tensor, 4096 * place) for place, tensor in enumerate(tensors)))
)
SPECS = st.builds(
    PreprocessingSpec, width=st.integers(1, 99), height=st.integers(1, 99), scale=st.floats(1e-3, 1.0),
    mean=st.tuples(*[st.floats(-2, 2)] * 3), layout=st.sampled_from(['nchw', 'nhwc']),
)  # fmt: skip
OVERRIDES = {
    TensorLayout: LAYOUTS,
    PreprocessingSpec: SPECS,
    (Decoded, 'shape'): st.tuples(st.integers(1, 99), st.integers(1, 99), st.just(3)),
    (Decoded, 'dtype'): st.sampled_from(['uint8', 'uint16']),
    (Decoded, 'order'): st.just('rgb'),
    (Decoded, 'oddities'): st.just(()),
    (Refused, 'reason'): st.sampled_from(sorted(REASONS)),
    (NeedRoom, 'bytes'): st.integers(0, 1 << 40),
    (InferNext, 'number'): WORDS,
    **{(AnswerNext, name): WORDS for name in ('number', 'began_ns', 'ended_ns')},
}


def values(hint: object) -> st.SearchStrategy:
    """Return random values of a type that a message may hold."""
    if hint in OVERRIDES:
        return OVERRIDES[hint]
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return st.one_of(*map(values, args))
    if typing.get_origin(hint) is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple) if args[-1] is ... else st.tuples(*map(values, args))
    if dataclasses.is_dataclass(hint):
        return messages_of(hint)
    plain = {
        bool: st.booleans(), int: st.integers(-(1 << 63), (1 << 64) - 1), str: TEXT, type(None): st.none(),
        float: st.floats(allow_nan=False, allow_infinity=False),
    }  # fmt: skip
    return plain[hint]


def messages_of(kind: type) -> st.SearchStrategy:
    hints = typing.get_type_hints(kind)
    fields = {name: OVERRIDES[kind, name] if (kind, name) in OVERRIDES else values(hints[name]) for name in hints}
    made = st.builds(kind, **fields)
    if kind.__name__ == 'TensorSpec':
        return made.map(lambda spec: dataclasses.replace(spec, dtype='float32'))
    if kind.__name__ == 'EngineFacts':
        return made.map(lambda facts: dataclasses.replace(facts, gpu_memory_bytes=None))
    return made


@pytest.mark.parametrize('name', SETS)
@given(data=st.data())
def test_f1_every_message_goes_through_whole(name: str, data: st.DataObject) -> None:
    messages = SETS[name]
    for kind in messages.kinds:
        message = data.draw(messages_of(kind))
        packet = messages.encode(message)
        found = messages.decode(packet)
        assert found == message and type(found) is kind
        assert messages.encode(found) == packet


@pytest.mark.parametrize('name', SETS)
@given(data=st.data())
def test_f1_a_field_that_is_missing_extra_or_of_another_type_is_refused(name: str, data: st.DataObject) -> None:
    messages = SETS[name]
    kind = data.draw(st.sampled_from([kind for kind in messages.kinds if kind is not messages.packed]))
    value = json.loads(messages.encode(data.draw(messages_of(kind))))
    how = data.draw(st.sampled_from(['missing', 'extra', 'type', 'kind']))
    if how == 'missing' and len(value) > 1:
        value.pop()
    elif how == 'type' and len(value) > 1:
        # No field is an object.
        value[data.draw(st.integers(1, len(value) - 1))] = {}
    elif how == 'kind':
        value[0] = data.draw(TEXT.filter(lambda text: text not in [kind.__name__ for kind in messages.kinds]))
    else:
        value.append(1)
    with pytest.raises(MessageError):
        messages.decode(json.dumps(value).encode())


@pytest.mark.parametrize(
    ('packet', 'says'),
    [
        (b'', 'cannot be read'), (b'{}', 'not a list'), (b'[]', 'not a list'), (b'[["Ready"]]', 'not a list'),
        (b'["Ready",1', 'cannot be read'), (b'\xff', 'cannot be read'), (b'["Infer",1,[[]]]', 'kind is unknown'),
        (b'["AnswerNext",1,2,3]', 'kind is unknown'),
        (b'["Ready",true]', 'Ready.version expected a whole number, found a boolean'),
        (b'["Ready",1.0]', 'Ready.version expected a whole number'), (b'["Ready",1,2]', 'expected 1 fields'),
        (b'["NeedRoom",-1]', 'NeedRoom a segment of -1 bytes is impossible'),
        (b'["NeedRoom",99999999999999999999]', 'NeedRoom.bytes is too large'),
        (b'["Progress",["a",NaN,null]]', r'Progress.progress.elapsed_s is not a finite number'),
        (b'["Progress",["a",1e999,null]]', r'Progress.progress.elapsed_s is not a finite number'),
        (b'["Answer",1,[1,2],[[["x","float32",[2,"3"],0]]],[]]', r'Answer.layout.tensors\[0\]\[2\]\[1\] expected a'),
        (b'["Answer",1,[1,2],[[["x","float32",[2],0],["y","float32",[2],4]]],[]]', 'overlap'),
        (b'["Answer",1,[1,2],[[["x","object",[2],0]]],[]]', 'impossible layout'),
        (b'["Answer",1,[1],[[]],[]]', 'Answer.ran_ns expected 2 items, found 1'),
        (b'["Answer",1,null,[[]],[]]', 'Answer.ran_ns expected a list, found null'),
        (b'["Loaded",["",[],true,null,[],1,-1],[],[]]', 'GPU memory'),
        (b'["Loaded",["",[],true,null,[],1,null],[["x","nonsense",null]],[]]', 'unknown type'),
        (b'\0' + bytes(8), 'cannot be read'), (bytes(40), 'cannot be read'), (b'\1' + bytes(24), 'cannot be read'),
    ],
)  # fmt: skip
def test_f1_what_is_wrong_with_a_message_is_said(packet: bytes, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        WORKER_PROTOCOL.from_child.decode(packet)


def test_f1_halves_of_surrogate_pairs_are_spelled_out() -> None:
    found = WORKER_PROTOCOL.to_child.decode(b'["RefuseRoom","\\ud800 caf\\u00e9"]')
    assert found.reason == '\\ud800 café'


def test_f1_a_message_that_is_too_long_is_not_sent() -> None:
    layout = TensorLayout((('x' * PACKET_BYTES, 'uint8', (1,), 0),))
    with pytest.raises(InferenceError, match=f'longer than {PACKET_BYTES}'):
        WORKER_PROTOCOL.to_child.encode(Infer(1, layout))


def described(hint: object) -> str:
    """Return a type as text, a message with all its fields."""
    if dataclasses.is_dataclass(hint) or hasattr(hint, '_fields'):
        fields = [f'{name}: {described(kind)}' for name, kind in typing.get_type_hints(hint).items()]
        return f'{hint.__name__}({", ".join(fields)})'
    if args := typing.get_args(hint):
        return f'{"tuple" if typing.get_origin(hint) is tuple else "one"} of {", ".join(map(described, args))}'
    return getattr(hint, '__name__', '...')


def test_f1_the_version_changes_with_the_messages() -> None:
    """If this fails, a message has changed: raise PROTOCOL_VERSION, and set both values here."""
    text = '\n'.join(
        f'{name} {described(kind)} {kind is messages.packed}'
        for name, messages in SETS.items() for kind in messages.kinds
    )
    assert (PROTOCOL_VERSION, hashlib.sha256(text.encode()).hexdigest()[:16]) == (1, '6e70669352664a02')


def test_f1_ready_is_read_by_every_version() -> None:
    for messages in (WORKER_PROTOCOL.from_child, DECODER_PROTOCOL.from_child, MessageSet((Ready,))):
        assert messages.decode(b'["Ready",7]') == Ready(7)


@pytest.mark.parametrize('letter', ['a', '"', '\x01', 'ж', '語', '😀'])
def test_an_error_of_any_length_in_any_script_fits_into_a_message(letter):
    """A longer one ended the worker that wanted to report it."""
    error = InferenceError(letter * 9000, remedy=letter * 9000)
    sent = Failed(1, ErrorReport.of(error))
    received = WORKER_PROTOCOL.from_child.decode(WORKER_PROTOCOL.from_child.encode(sent))
    assert received == sent and received.error.message == letter * len(received.error.message)
    assert len(received.error.message) == (8000 if letter == 'a' else 666)
