"""Flight data recorder: what may be recorded, in which form, and how often."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, unique
from typing import Any, TypeVar

from gps_denied_c7._json import decode_json
from gps_denied_c7.errors import FdrSchemaError
from gps_denied_c7.text import bounded

__all__ = [
    'KINDS',
    'SCHEMA_VERSION',
    'FdrKind',
    'FdrRecord',
    'FdrRecorder',
    'Severity',
    'cause_of',
    'in_order',
    'read_payload',
]

SCHEMA_VERSION = 1

# Payload fields that hold sentences; in the others, as topics and rungs, a number distinguishes one thing from another.
_SENTENCES = frozenset({'reason', 'error', 'message'})
# An address, a moment, a number of any form; not the 16 of fp16 or the 0 of input_0, which belong to a name.
_NUMBER = re.compile(
    r'0x[0-9a-f]+|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d|(?<![\w.])(?=[0-9a-f]*\d)[0-9a-f]{8,16}(?!\w)'
    r'|(?<!\w)\d+(?:[.,:]\d+)*(?:e[+-]?\d+)?',
    re.IGNORECASE,
)
# Of one kind within its window; whatever else comes is counted as one more cause.
_MOST_CAUSES = 32
_OTHERS = '…'

_log = logging.getLogger(__name__)

_T = TypeVar('_T')


@unique
class Severity(IntEnum):
    """Severity of a record; values are those of FdrRecord.msg and of Python's logging."""

    DEBUG = 10
    INFO = 20
    WARN = 30
    ERROR = 40
    FATAL = 50


@dataclass(frozen=True, slots=True)
class FdrKind:
    """
    Declare one kind of record.

    :param name: as ``c7.cpu_fallback``.
    :param severity: severity of every record of this kind.
    :param required: payload fields that must be present.
    :param merge_s: seconds during which further records with the same ``key`` are merged into one,
        0 for a kind that happens once per cause and is always written at once.
    :param key: payload fields that distinguish causes when merging.
    """

    name: str
    severity: Severity
    required: tuple[str, ...]
    merge_s: float = 0.0
    key: tuple[str, ...] = ()

    @property
    def repeating(self) -> bool:
        """Whether a lasting cause can produce this kind again and again."""
        return self.merge_s > 0


KINDS: Mapping[str, FdrKind] = {
    kind.name: kind
    for kind in (
        FdrKind('c7.session_started', Severity.INFO, ('versions', 'host', 'gpu', 'config_digest')),
        FdrKind('c7.session_ended', Severity.INFO, ('reason', 'clean')),
        FdrKind('c7.start_failed', Severity.ERROR, ('transition', 'reason')),
        FdrKind('c7.fallback_to_onnx_trt_ep', Severity.WARN, ('model_name', 'reason', 'active_provider')),
        FdrKind('c7.cpu_fallback', Severity.WARN, ('model_name', 'requested_providers', 'active_provider')),
        FdrKind('c7.model_swapped', Severity.INFO, ('model_name', 'weights_digest', 'outcome')),
        FdrKind('c7.worker_unkillable', Severity.ERROR, ('rung', 'pid')),
        FdrKind('c7.runtime_switched', Severity.WARN, ('from', 'to', 'reason', 'gap_ms', 'frames_affected')),
        FdrKind('c7.promotion_delayed', Severity.WARN, ('rung', 'reason'), 60.0, ('rung', 'reason')),
        FdrKind('c7.engine_rejected', Severity.WARN, ('model_name', 'rung', 'reason'), 60.0, ('rung', 'reason')),
        FdrKind('c7.memory_refused', Severity.WARN, ('rung', 'needed_bytes', 'left_bytes', 'reason'), 60.0, ('rung',)),
        FdrKind('c7.chain_exhausted', Severity.ERROR, ('model_name', 'reason'), 60.0, ('model_name', 'reason')),
        FdrKind('c7.thermal_state', Severity.INFO, ('level', 'source'), 10.0, ('level',)),
        FdrKind('c7.image_refused', Severity.WARN, ('topic', 'reason', 'message'), 60.0, ('topic', 'reason')),
        FdrKind('c7.frame_unanswered', Severity.ERROR, ('topic', 'reason'), 60.0, ('topic',)),
        FdrKind('c7.time_reset', Severity.WARN, ('topic', 'backwards_s'), 60.0, ('topic',)),
        FdrKind('c7.stream_overrun', Severity.WARN, ('topic', 'queue_depth', 'keeps_newest'), 60.0, ('topic',)),
        FdrKind('c7.stream_retyped', Severity.INFO, ('topic', 'type', 'previous_type'), 60.0, ('topic', 'type')),
        FdrKind('c7.camera_slowed', Severity.WARN, ('topic', 'image_ms', 'share_cores'), 60.0, ('topic',)),
        FdrKind('c7.camera_no_longer_slowed', Severity.INFO, ('topic', 'image_ms', 'share_cores'), 60.0, ('topic',)),
        FdrKind('c7.callback_failed', Severity.ERROR, ('callback', 'error'), 60.0, ('callback', 'error')),
    )
}


@dataclass(frozen=True, slots=True)
class FdrRecord:
    """
    Hold one record.

    :param stamp_ns: ROS time in nanoseconds.
    :param monotonic_ns: steady clock in nanoseconds.
    :param seq: counts the records of the session from 0.
    """

    schema_version: int
    kind: str
    severity: int
    stamp_ns: int
    monotonic_ns: int
    session_id: str
    seq: int
    node: str
    payload: Mapping[str, Any] = field(default_factory=dict)

    @property
    def repeating(self) -> bool:
        """Whether the kind is a repeating one; an unknown kind counts as such."""
        kind = KINDS.get(self.kind)
        return kind is None or kind.repeating

    def payload_json(self) -> str:
        """Return the payload as a JSON object on one line; what JSON has no number for becomes text."""
        return json.dumps(_finite(self.payload), sort_keys=True, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def cause_of(text: str) -> str:
    """
    Return what two sentences about one cause have in common.

    Process ids and workers' numbers, addresses, times and durations are left out; they differ with each occurrence.
    """
    return _NUMBER.sub('#', text)


def read_payload(text: str) -> dict[str, Any]:
    """
    Return the payload of a record written by any version of this package.

    A reader tolerates what a writer refuses: unknown kinds and missing fields pass.

    :raises FdrSchemaError: ``text`` is not a JSON object.
    """
    try:
        payload = decode_json(text)
    except ValueError as error:
        raise FdrSchemaError(f'payload_json is not JSON: {error}.') from error
    if not isinstance(payload, dict):
        raise FdrSchemaError(f'payload_json holds a {type(payload).__name__}, not an object.')
    return payload


@dataclass(slots=True)
class _Merged:
    until: float
    count: int = 0
    payload: Mapping[str, Any] = field(default_factory=dict)


def in_order(records: Iterable[_T], mark: Callable[[_T], tuple[str, int]]) -> list[_T]:
    """
    Return received records in the order in which they were written, sessions in the order of arrival.

    Several writers share the topic, and a late subscriber gets the history of one among new records of
    another: order of arrival says nothing.

    :param mark: returns a record's ``(session_id, seq)``.
    """
    received = list(records)
    sessions = list(dict.fromkeys(mark(record)[0] for record in received))
    return sorted(received, key=lambda record: (sessions.index(mark(record)[0]), mark(record)[1]))


class FdrRecorder:
    """
    Number, check and pace the records of one process.

    A repeating kind is written at once the first time; the same cause again within the kind's window
    is counted, and written as one record with ``merged`` = the count by :meth:`flush`. Sentences that differ
    in numbers alone are one cause, see :func:`cause_of`. Safe to call from any thread.

    :param sink: takes each finished record; called from the emitting thread, in order of ``seq``.
    :param node: fully qualified node name.
    :param ros_time_ns: ROS time in nanoseconds.
    :param monotonic_ns: steady clock in nanoseconds.
    """

    def __init__(
        self,
        sink: Callable[[FdrRecord], None],
        *,
        node: str,
        session_id: str | None = None,
        ros_time_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._sink = sink
        self._node = node
        self.session_id = session_id or uuid.uuid4().hex
        self._ros_time_ns = ros_time_ns
        self._monotonic_ns = monotonic_ns
        self._lock = threading.RLock()
        self._seq = 0
        self._merging: dict[tuple, _Merged] = {}

    def emit(self, kind: str, **payload: Any) -> None:
        """
        Write one record, or count it where its cause was written moments ago.

        The payload is written as :func:`bounded` makes it: 32,000 characters or so at most.

        :raises FdrSchemaError: an unknown kind or a missing field; a mistake of the caller.
        """
        declared = KINDS.get(kind)
        if declared is None:
            raise FdrSchemaError(
                f'unknown record kind {kind!r}.', remedy='Declare it in gps_denied_c7.monitoring.flight_record.KINDS.'
            )
        if missing := [name for name in declared.required if name not in payload]:
            raise FdrSchemaError(f'record {kind!r} lacks {missing}.')
        # Before anything of it is kept or compared: text from outside may be of any length.
        payload = bounded(payload)
        with self._lock:
            if declared.repeating and self._merge(declared, payload):
                return
            self._write(declared, payload)

    def flush(self, *, force: bool = False) -> None:
        """Write what was merged in windows that have ended, or in all windows with ``force``."""
        with self._lock:
            now = self._monotonic_ns() / 1e9
            for key in [key for key, merged in self._merging.items() if force or now >= merged.until]:
                merged = self._merging.pop(key)
                if merged.count:
                    self._write(KINDS[key[0]], {**merged.payload, 'merged': merged.count})
                    self._merging[key] = _Merged(until=now + KINDS[key[0]].merge_s)

    def _merge(self, kind: FdrKind, payload: Mapping[str, Any]) -> bool:
        texts = ((name, str(payload[name])) for name in kind.key)
        key = (kind.name, *(cause_of(text) if name in _SENTENCES else text for name, text in texts))
        now = self._monotonic_ns() / 1e9
        merged = self._merging.get(key)
        if merged is None and sum(known[0] == kind.name for known in self._merging) >= _MOST_CAUSES:
            # Texts from outside may differ each time; they must not fill the record, or the memory.
            key = (kind.name, _OTHERS)
            merged = self._merging.get(key)
        if merged is None:
            self._merging[key] = _Merged(until=now + kind.merge_s)
            return False
        merged.count += 1
        merged.payload = payload
        return True

    def _write(self, kind: FdrKind, payload: Mapping[str, Any]) -> None:
        record = FdrRecord(
            schema_version=SCHEMA_VERSION,
            kind=kind.name,
            severity=kind.severity,
            stamp_ns=self._ros_time_ns(),
            monotonic_ns=self._monotonic_ns(),
            session_id=self.session_id,
            seq=self._seq,
            node=self._node,
            payload=payload,
        )
        self._seq += 1
        try:
            self._sink(record)
        except Exception:
            # Recording must never cost a frame; what could not be recorded still reaches the log.
            _log.exception('flight record %s could not be written: %s', record.kind, record.payload_json())
