"""Flight records: any text is a payload or a typed error, and what was read can be written again."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.errors import FdrSchemaError
from gps_denied_c7.monitoring.flight_record import KINDS, FdrRecord, in_order, read_payload
from support.fuzz_mutations import damaged, fuzz, hostile_json

PAYLOAD = {
    'from': 'tensorrt/gpu', 'to': 'onnx_trt_ep/cpu', 'reason': 'worker 3 was ended by SIGSEGV.', 'gap_ms': 12.5,
    'frames_affected': 1, 'versions': {'numpy': '1.26.4'}, 'requested_providers': ['CUDAExecutionProvider'],
}  # fmt: skip
TEXT = json.dumps(PAYLOAD).encode()


def reads(text: str) -> bool:
    """Return whether a text is a payload; then it survives being written and read."""
    try:
        payload = read_payload(text)
    except FdrSchemaError:
        return False
    written = FdrRecord(1, 'c7.from_elsewhere', 20, 0, 0, 's', 0, 'node', payload).payload_json()
    assert read_payload(read_payload_again(written)).keys() == payload.keys()
    return True


def read_payload_again(text: str) -> str:
    """Return ``text``, which must pass a strict reader: no NaN, no infinity."""
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(text, parse_constant=refuse)
    return text


@fuzz(160)
@given(content=hostile_json(PAYLOAD) | damaged(TEXT))
def test_any_payload_is_read_or_refused(content: bytes) -> None:
    for errors in ('replace', 'surrogateescape'):
        reads(content.decode('utf-8', errors))


@fuzz(100)
@given(st.lists(st.tuples(st.sampled_from(['a', 'b', '', '\ud800']), st.integers()), max_size=20))
def test_records_of_any_number_are_put_in_order(marks: list[tuple[str, int]]) -> None:
    assert sorted(in_order(marks, lambda mark: mark)) == sorted(marks)
    assert KINDS
