"""Text from outside: visible, on one line, and of a bounded length, whatever it is."""

from __future__ import annotations

import json
import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.monitoring.flight_record import KINDS, FdrRecorder, cause_of, read_payload
from gps_denied_c7.text import TEXT_CHARACTERS, PlainText, bounded, plain, plain_lines, with_traceback

# What a terminal, a log file or a JSON reader takes for more than a sign, by Unicode's own categories.
CONTROL = {'Cc', 'Cf', 'Cs', 'Zl', 'Zp'}

ANYTHING = st.text(st.characters(exclude_categories=[]), max_size=50) | st.text(
    st.sampled_from([*'\n\r\x1b\0\x85\u2028\u202e\u2066\ud800\x7f\x9baé日']),
    max_size=50,
)


@given(ANYTHING)
def test_no_control_character_gets_through(text):
    made = plain(text)
    assert not {unicodedata.category(each) for each in made} & CONTROL
    made.encode('utf-8')


@given(st.text(st.characters(categories=['L', 'N', 'P', 'S'], exclude_characters='\\')))
def test_what_prints_stays_as_it_is(text):
    assert plain(text) == text


def test_what_does_not_print_can_be_read():
    assert plain('a\nb\r\x1b[31m\0\u202e\ud800\u2028') == r'a\nb\r\x1b[31m\x00\u202e\ud800\u2028'


@pytest.mark.parametrize('character', ['x', '\n', '\ud800', '\U000e0041'])
@pytest.mark.parametrize('length', [TEXT_CHARACTERS - 1, TEXT_CHARACTERS, TEXT_CHARACTERS + 1, 4 << 20])
def test_a_long_text_is_cut_and_says_so(character, length):
    made = plain(character * length + ' Correct it.')
    assert len(made) <= TEXT_CHARACTERS
    if length > TEXT_CHARACTERS:
        assert f'… ({length + 12:,} characters) …' in made or 'characters' in made
        assert made.endswith('Correct it.'), 'the remedy stands at the end'


def test_a_text_that_cannot_be_made_is_none():
    class Vendor(Exception):
        def __str__(self):
            raise RuntimeError('in there, too')

    assert plain(Vendor()) == 'Vendor without a text (RuntimeError)'
    assert plain(10**100_000).startswith('a number of ')


def test_no_line_of_a_traceback_can_be_taken_for_a_message():
    """An exception's own text has lines, too, and one of them looks like the log's."""
    try:
        raise ValueError('first\n[FATAL] [1.0] [c7_inference]: forged\x1b[2J')
    except ValueError as error:
        lines = with_traceback('it failed\n[FATAL]', error).split('\n')
    assert lines[0] == r'it failed\n[FATAL]'
    assert all(line.startswith('    ') for line in lines[1:])
    assert any(line.strip() == r'[FATAL] [1.0] [c7_inference]: forged\x1b[2J' for line in lines)
    assert any('test_text.py' in line for line in lines), 'it can be read'


def test_a_traceback_without_end_has_one():
    made = plain_lines('\n'.join(f'line {number}' for number in range(1_000_000)))
    assert isinstance(made, PlainText)
    lines = made.split('\n')
    assert len(lines) < 300 and lines[0] == 'line 0' and lines[-1].strip() == 'line 999999'


def any_value(chooser, depth):
    kind, count = chooser.randrange(8 if depth else 5), chooser.choice([0, 3, 300 if depth == 1 else 9])
    if kind == 0:
        return chooser.choice(['x' * (1 << 20), '\ud800\n', '', 'plain'])
    if kind == 1:
        return chooser.choice([float('nan'), float('inf'), 1.5, 10**400, 7, True, None])
    if kind == 2:
        return b'\xff\n' * 5
    if kind < 5:
        return chooser.choice(['a', 5])
    if kind == 5:
        return [any_value(chooser, depth - 1) for _ in range(count)]
    return {f'{number}\n': any_value(chooser, depth - 1) for number in range(count)}


def texts_in(value):
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in texts_in(part)]
    if isinstance(value, list):
        return [text for part in value for text in texts_in(part)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize('seed', range(10))
def test_a_record_of_anything_is_small_and_can_be_read(seed):
    chooser = random.Random(seed)
    records = []
    recorder = FdrRecorder(records.append, node='/n')
    recorder.emit('c7.session_ended', **{name: any_value(chooser, 3) for name in ('reason', 'clean', 'more')})
    text = records[0].payload_json()
    assert len(text) < 100_000
    payload = read_payload(text)
    assert payload.keys() == {'reason', 'clean', 'more'}
    assert all(each.isprintable() for each in texts_in(payload))


def test_nesting_has_an_end():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert len(json.dumps(bounded({'reason': deep}))) < 500


@pytest.mark.parametrize('kind', [kind.name for kind in KINDS.values() if kind.repeating])
def test_a_4_mib_text_makes_a_small_record(kind):
    records = []
    FdrRecorder(records.append, node='/n').emit(kind, **dict.fromkeys(KINDS[kind].required, 'x' * (4 << 20)))
    assert len(records[0].payload_json()) < 20_000


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('worker 3 (tensorrt/gpu, pid 4242) was ended.', 'worker 12 (tensorrt/gpu, pid 77) was ended.'),
        ('did not answer within 120 ms.', 'did not answer within 1,350.5 ms.'),
        ('<object at 0x7f3a2c001000> failed', '<object at 0x7FFF00112233> failed'),
        ('CUDA error at 7f3a2c001000', 'CUDA error at 7f3a2c002abc'),
        ('/proc/4242/fd/7: gone', '/proc/5/fd/12: gone'),
        ('since 2026-11-30T12:00:01 UTC', 'since 2026-12-01T00:59:59 UTC'),
        ('took 1.5e-05 s', 'took 3 s'),
        ('Thread-12 (run) died', 'Thread-3 (run) died'),
    ],
)
def test_records_that_differ_in_numbers_alone_are_merged(one, other):
    records = []
    recorder = FdrRecorder(records.append, node='/n')
    for reason in (one, other, one):
        recorder.emit('c7.engine_rejected', model_name='m', rung='tensorrt/gpu', reason=reason)
    assert [record.payload['reason'] for record in records] == [one], 'the first text is kept as it was'
    recorder.flush(force=True)
    assert records[-1].payload['merged'] == 2


@pytest.mark.parametrize(
    ('field', 'one', 'other'),
    [
        ('rung', 'pytorch_fp16/gpu', 'pytorch_fp32/gpu'), ('reason', 'input_0 is absent', 'input_1 is absent'),
        ('reason', 'needs fp16', 'needs fp32'), ('reason', 'the file is gone', 'the file is damaged'),
    ],
)  # fmt: skip
def test_records_that_differ_in_a_name_are_not(field, one, other):
    records = []
    recorder = FdrRecorder(records.append, node='/n')
    for value in (one, other):
        recorder.emit('c7.engine_rejected', **{'model_name': 'm', 'rung': 'r', 'reason': 'x', field: value})
    assert len(records) == 2


def test_cameras_are_told_apart_by_their_numbers():
    records = []
    recorder = FdrRecorder(records.append, node='/n')
    for topic in ('/camera1/image', '/camera2/image'):
        recorder.emit('c7.frame_unanswered', topic=topic, reason='x')
    assert len(records) == 2


def test_causes_without_end_fill_neither_record_nor_memory():
    records = []
    recorder = FdrRecorder(records.append, node='/n')
    chooser = random.Random(1)
    for _ in range(5000):
        name = ''.join(chooser.choices('abcdefgh', k=12))
        recorder.emit('c7.callback_failed', callback='image', error=name)
    assert len(records) < 100 and len(recorder._merging) < 100
    recorder.flush(force=True)
    assert sum(record.payload.get('merged', 1) for record in records) == 5000


@given(ANYTHING)
def test_any_text_has_a_cause(text):
    assert cause_of(text) == cause_of(cause_of(text))
