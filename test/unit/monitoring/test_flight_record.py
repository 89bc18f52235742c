"""§6: flight records declare their fields, round-trip, and a flood never hides a one-shot."""

import contextlib
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.errors import FdrSchemaError
from gps_denied_c7.monitoring.flight_record import KINDS, FdrRecorder, Severity, in_order, read_payload


@pytest.fixture
def records():
    return []


@pytest.fixture
def recorder(records, clock):
    return FdrRecorder(records.append, node='/c7_inference', monotonic_ns=clock, ros_time_ns=lambda: 5)


def payload_of(kind):
    return {name: f'value of {name}' for name in KINDS[kind].required}


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_round_trips(recorder, records, kind):
    recorder.emit(kind, **payload_of(kind))
    (record,) = records
    assert record.kind == kind
    assert record.severity == KINDS[kind].severity
    assert read_payload(record.payload_json()) == payload_of(kind)


@pytest.mark.parametrize('kind', KINDS)
def test_a_record_without_a_required_field_is_refused(recorder, records, kind):
    incomplete = payload_of(kind)
    name, _ = incomplete.popitem()
    with pytest.raises(FdrSchemaError, match=name):
        recorder.emit(kind, **incomplete)
    assert records == []


def test_an_unknown_kind_is_refused_when_written(recorder):
    with pytest.raises(FdrSchemaError, match=r'c7\.unheard_of'):
        recorder.emit('c7.unheard_of')


def test_the_kinds_of_the_contract_have_their_fields():
    assert KINDS['c7.fallback_to_onnx_trt_ep'].required == ('model_name', 'reason', 'active_provider')
    assert KINDS['c7.cpu_fallback'].required == ('model_name', 'requested_providers', 'active_provider')
    assert set(KINDS['c7.runtime_switched'].required) == {'from', 'to', 'reason', 'gap_ms', 'frames_affected'}
    assert set(KINDS['c7.session_started'].required) == {'versions', 'host', 'gpu', 'config_digest'}
    assert KINDS.keys() >= {
        f'c7.{name}'
        for name in ('engine_rejected', 'model_swapped', 'worker_unkillable', 'session_ended', 'thermal_state')
    }


def test_unknown_fields_are_tolerated_when_read():
    assert read_payload('{"model_name": "m", "of a later version": [1]}')['of a later version'] == [1]


@pytest.mark.parametrize('text', ['', '[1]', '"x"', '{', '[' * 100_000])
def test_a_damaged_payload_is_a_typed_error(text):
    with pytest.raises(FdrSchemaError):
        read_payload(text)


@given(st.text())
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(FdrSchemaError):
        assert isinstance(read_payload(text), dict)


def test_a_repeating_kind_is_written_once_and_then_merged(recorder, records, clock):
    for number in range(1000):
        recorder.emit('c7.image_refused', topic='/a', reason='encoding', message=f'number {number}')
    assert len(records) == 1
    recorder.flush()
    assert len(records) == 1, 'the window has not ended'
    clock.ns += int(KINDS['c7.image_refused'].merge_s * 1e9)
    recorder.flush()
    assert [record.payload.get('merged') for record in records] == [None, 999]
    assert records[-1].payload['message'] == 'number 999'


def test_another_cause_of_the_same_kind_is_written_at_once(recorder, records):
    recorder.emit('c7.image_refused', topic='/a', reason='encoding', message='')
    recorder.emit('c7.image_refused', topic='/a', reason='size', message='')
    recorder.emit('c7.image_refused', topic='/b', reason='size', message='')
    assert len(records) == 3


def test_a_lasting_cause_is_written_once_a_window(recorder, records, clock):
    for _ in range(10):
        recorder.emit('c7.callback_failed', callback='timer', error='x')
        clock.ns += int(61e9)
        recorder.flush()
    assert len(records) <= 11


def test_one_shots_are_never_merged(recorder, records):
    for _ in range(20):
        recorder.emit('c7.cpu_fallback', model_name='m', requested_providers=[], active_provider='CPU')
    assert len(records) == 20


def test_numbers_have_no_gap_from_any_thread(recorder, records):
    def emit():
        for _ in range(200):
            recorder.emit('c7.cpu_fallback', model_name='m', requested_providers=[], active_provider='CPU')

    threads = [threading.Thread(target=emit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.seq for record in records] == list(range(1600))
    assert len({record.session_id for record in records}) == 1


def test_a_sink_that_fails_does_not_stop_the_caller(caplog):
    def sink(record):
        raise OSError('disk full')

    FdrRecorder(sink, node='/n').emit('c7.session_ended', reason='SIGINT', clean=True)
    assert 'c7.session_ended' in caplog.text and 'SIGINT' in caplog.text


def test_severities_are_those_of_python_logging():
    import logging

    assert Severity.WARN == logging.WARNING and Severity.FATAL == logging.CRITICAL
    assert json.dumps(Severity.INFO) == '20'


def test_records_that_arrive_in_any_order_are_put_into_the_order_of_writing():
    arrived = [('late', 3), ('late', 0), ('late', 1), ('next', 1), ('late', 2), ('next', 0)]
    assert in_order(arrived, lambda mark: mark) == [
        ('late', 0), ('late', 1), ('late', 2), ('late', 3), ('next', 0), ('next', 1),
    ]  # fmt: skip


@pytest.mark.parametrize('depth', [10, 31, 33, 300, 900, 990, 100_000])
def test_a_payload_nested_to_any_depth_is_refused_or_can_be_written_again(recorder, records, depth):
    text = f'{{"a": {"[" * depth}{"]" * depth}}}'
    try:
        payload = read_payload(text)
    except FdrSchemaError:
        assert depth > 31
        return
    recorder.emit('c7.session_ended', reason='', clean=True, **payload)
    assert read_payload(records[0].payload_json())['a'] == payload['a']
