"""What a node and a worker send each other, one class for each message (F-1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gps_denied_c7 import errors
from gps_denied_c7.errors import (
    C7Error,
    EngineContentError,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    GpuUnavailableError,
    InferenceError,
    ModelBundleError,
    RuntimeUnavailableError,
)
from gps_denied_c7.runtimes.protocol import BuildProgress, EngineFacts
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.worker.channel import ChildProtocol
from gps_denied_c7.worker.shared_memory import TensorLayout

__all__ = [
    'WORKER_PROTOCOL', 'Answer', 'AnswerNext', 'ErrorReport', 'Failed', 'Infer', 'InferNext', 'Load', 'LoadFailed',
    'Loaded', 'Loading', 'MapAnswers', 'MapRequests', 'NeedRoom', 'Ping', 'Pong', 'Progress', 'RefuseRoom', 'beginning',
]  # fmt: skip

_TEXT_BYTES = 8000
# Of a character in JSON, at most: two escapes for each that lies beyond the first 65,536.
_CHARACTER_BYTES = 12
_MOST_BYTES = (1 << 63) - 1


def beginning(text: str, size: int) -> str:
    """Return as much of the beginning of a text as takes at most ``size`` bytes in a JSON string."""
    kept = text[:size]
    return kept if len(json.dumps(kept)) <= size + len('""') else text[: size // _CHARACTER_BYTES]


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """
    Describe an error, so that another process can raise it.

    :param kind: name of its class; what the other process does not know becomes an InferenceError.
    :param label: of a runtime, for the errors that name one.
    :param field: what was compared, for EngineSchemaMismatchError, as ``expected`` and ``found``.
    """

    kind: str
    message: str
    remedy: str = ''
    label: str = ''
    field: str = ''
    expected: str = ''
    found: str = ''
    lasting: bool = False

    @classmethod
    def of(cls, error: BaseException) -> ErrorReport:
        """Describe ``error``, each text cut to 8000 bytes of JSON."""
        if not isinstance(error, C7Error):
            return cls('InferenceError', beginning(f'{type(error).__name__}: {error}', _TEXT_BYTES))
        texts = {
            name: beginning(str(getattr(error, name, '')), _TEXT_BYTES)
            for name in ('message', 'remedy', 'label', 'field', 'expected', 'found')
        }
        return cls(type(error).__name__, **texts, lasting=error.lasting)

    def error(self) -> C7Error:
        """Return the error, of the same class where it is one that a worker may raise."""
        kind = getattr(errors, self.kind, None)
        error: C7Error
        if kind is EngineSchemaMismatchError:
            error = EngineSchemaMismatchError(self.field, expected=self.expected, found=self.found)
        elif kind in (RuntimeUnavailableError, GpuUnavailableError):
            error = kind(self.label, '')
        elif kind in (EngineContentError, EngineDeserializeError, ModelBundleError):
            error = kind('')
        else:
            error = InferenceError('')
        # The text was made where the error was raised.
        error.message, error.remedy = self.message, self.remedy
        error.is_lasting = self.lasting
        error.args = (f'{self.message} {self.remedy}' if self.remedy else self.message,)
        return error


# --- from the node ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """Load the engine of the pickled task in the file whose descriptor goes with this; answered by Loading."""


@dataclass(frozen=True, slots=True)
class MapRequests:
    """Take the segment of inputs, whose descriptor goes with this."""


@dataclass(frozen=True, slots=True)
class MapAnswers:
    """Take the segment of outputs, whose descriptor goes with this; the answer to NeedRoom."""


@dataclass(frozen=True, slots=True)
class RefuseRoom:
    """Do without a larger segment, and fail the request; the answer to NeedRoom."""

    reason: str


@dataclass(frozen=True, slots=True)
class Infer:
    """
    Run the engine on the inputs that lie in the segment.

    :param number: of the request.
    :param layout: where they lie, in this request and in those of InferNext.
    """

    number: int
    layout: TensorLayout


class InferNext(NamedTuple):
    """Run the engine on inputs that lie as those of the last Infer did."""

    number: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Give a sign of life: Pong."""


# --- from the worker --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loading:
    """Say that a task was read, and loading begins."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Say how far the building of an engine is, about once a second."""

    progress: BuildProgress


@dataclass(frozen=True, slots=True)
class Loaded:
    """
    Say that requests can be sent.

    :param inputs: of the engine, by the bundle's names.
    :param outputs: likewise.
    """

    facts: EngineFacts
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check(self) -> None:
        """Raise ValueError for a size of memory, or a type of tensor, that cannot be."""
        memory = self.facts.gpu_memory_bytes
        if memory is not None and not 0 <= memory <= _MOST_BYTES:
            raise ValueError(f'{memory} bytes of GPU memory are impossible')
        for spec in (*self.inputs, *self.outputs):
            try:
                known = np.dtype(spec.dtype).name == spec.dtype
            except (TypeError, ValueError, SyntaxError):
                known = False
            if not known:
                raise ValueError(f'tensor {spec.name!r} has the unknown type {spec.dtype!r:.100}')


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Say why no engine was loaded."""

    error: ErrorReport


@dataclass(frozen=True, slots=True)
class NeedRoom:
    """Ask for a segment of outputs of so many bytes, before the answer to the current request."""

    bytes: int

    def check(self) -> None:
        """Raise ValueError for a negative size."""
        if self.bytes < 0:
            raise ValueError(f'a segment of {self.bytes} bytes is impossible')


@dataclass(frozen=True, slots=True)
class Answer:
    """
    Say that the outputs of a request lie in the segment.

    :param number: of the request.
    :param ran_ns: when the engine began and ended its run, by the steady clock in nanoseconds.
    :param layout: where the outputs lie, in this answer and in those of AnswerNext.
    :param unsized: names of the outputs whose shape was found to differ from what the model declares.
    """

    number: int
    ran_ns: tuple[int, int]
    layout: TensorLayout
    unsized: tuple[str, ...] = ()


class AnswerNext(NamedTuple):
    """Say that outputs lie as those of the last Answer did; the fields are Answer's."""

    number: int
    began_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Say why a request has no answer."""

    number: int
    error: ErrorReport


@dataclass(frozen=True, slots=True)
class Pong:
    """Give the sign of life that Ping asks for."""


WORKER_PROTOCOL = ChildProtocol(
    'gps_denied_c7.worker',
    to_child=(Load, MapRequests, MapAnswers, RefuseRoom, Infer, Ping),
    from_child=(Loading, Progress, Loaded, LoadFailed, NeedRoom, Answer, Failed, Pong),
    packed=(InferNext, AnswerNext),
)
