"""
Answer requests by plain ``onnxruntime.InferenceSession.run``, in a process of its own (M-1).

What proves the serving path shares no code with it: the process imports ONNX Runtime and NumPy, no runtime of this
package. One CPU thread, no graph optimisation: the answer is that of the operators as the model file lists them.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.child_environment import SAFE_DIRECTORY, python_child, worker_environment
from gps_denied_c7.errors import InferenceError, ModelBundleError, RuntimeUnavailableError
from gps_denied_c7.model.files import npz_bytes
from gps_denied_c7.model.onnx_types import ONNX_DTYPES
from gps_denied_c7.parent_death import die_with_parent
from gps_denied_c7.tensors import TensorSpec

__all__ = ['ANSWER_TIMEOUT_S', 'Reference', 'reference_answers']

ANSWER_TIMEOUT_S = 1800
"""Seconds that one answer may take: without optimisation, on one slow thread, a large network needs minutes."""

Arrays = Mapping[str, NDArray]

_PACKAGES = 'Install the packages of requirements/runtime.txt.'
_FIRST_SIGN_S = 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reference:
    """
    Hold what a model answers.

    :param outputs: as the file declares them; a size that the file leaves free, gives as 0, or gives other than an
        answer has it is None, and so is the shape where the file does not say how many axes there are.
    :param left_out: ONNX Runtime's types of the outputs that are not numeric tensors, by name.
    :param answers: for each request: arrays by output name, an error where the model fails on it, None where it was
        left out because those before it are large enough.
    """

    outputs: tuple[TensorSpec, ...]
    left_out: Mapping[str, str]
    answers: tuple[dict[str, NDArray] | InferenceError | None, ...]


def reference_answers(
    model: bytes | str,
    requests: Sequence[Arrays],
    *,
    limit_bytes: int | None = None,
    timeout_s: int = ANSWER_TIMEOUT_S,
) -> Reference:
    """
    Return the answers of a model to ``requests``; what takes long is logged.

    :param model: content of an ``.onnx``, or its path where weights lie in files of their own.
    :param limit_bytes: of all answers together; the first one counts, but is never left out.
    :param timeout_s: seconds that loading the model, and each answer, may take.
    :raises ModelBundleError: ONNX Runtime does not accept the model, takes longer, or its process died.
    :raises RuntimeUnavailableError: there is no ONNX Runtime.
    """
    blobs = [model if isinstance(model, bytes) else b'', *(npz_bytes(request) for request in requests)]
    path = model if isinstance(model, str) else None
    head = {'path': path, 'sizes': [len(blob) for blob in blobs], 'limit': limit_bytes, 'timeout': timeout_s}
    code, output, errors = _run_child(b''.join((json.dumps(head).encode(), b'\n', *blobs)), timeout_s)
    if code == -signal.SIGALRM:
        raise ModelBundleError(
            f'plain ONNX Runtime took longer than {timeout_s} s for {_last_line(errors)}.',
            remedy='If the model is slow, raise --answer-timeout. If it contains an endless loop, correct and export '
            'it again.',
        )
    if code != 0 or not output:
        killed = f'was killed by signal {-code} ({signal.strsignal(-code)}) at' if code < 0 else f'ended with {code}:'
        raise ModelBundleError(
            f'the process that computes the reference answers {killed} {_last_line(errors)}.',
            remedy='Free memory, or run the model outside of this package and correct it.',
        )
    stream = io.BytesIO(output)
    reply: dict[str, Any] = json.loads(stream.readline())
    if reply['missing']:
        raise RuntimeUnavailableError('plain session.run', reply['missing'], remedy=_PACKAGES)
    if reply['refused']:
        raise ModelBundleError(
            f'ONNX Runtime does not accept the model: {reply["refused"]}', remedy='Export the model again.'
        )
    answers: list[dict[str, NDArray] | InferenceError | None] = []
    for fault, size in reply['answers']:
        if size is not None:
            with np.load(io.BytesIO(stream.read(size)), allow_pickle=False) as arrays:
                # Without names, which may be too long for an archive.
                answers.append({name: arrays[str(place)] for place, (name, *_) in enumerate(reply['outputs'])})
        else:
            answers.append(InferenceError(f'plain session.run fails: {fault}') if fault else None)
    return Reference(
        tuple(
            TensorSpec(name, dtype, None if shape is None else tuple(shape)) for name, dtype, shape in reply['outputs']
        ),
        reply['left_out'],
        tuple(answers),
    )


def _run_child(request: bytes, timeout_s: int) -> tuple[int, bytes, bytes]:
    command, environment = python_child(
        'gps_denied_c7.ground.reference', str(os.getpid()), environ=worker_environment(os.environ)
    )
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=SAFE_DIRECTORY,
        env={**environment, 'OMP_NUM_THREADS': '1'},
    )
    waited_s = 0
    with process:
        try:
            while True:
                try:
                    output, errors = process.communicate(
                        None if waited_s else request, timeout=waited_s or _FIRST_SIGN_S
                    )
                    return process.returncode, output, errors
                except subprocess.TimeoutExpired as expired:
                    # After 10 s, 20 s, 40 s and so on.
                    waited_s = 2 * waited_s or _FIRST_SIGN_S
                    _log.warning(
                        'plain ONNX Runtime has been computing reference answers for %d s; now: %s (limit for each: '
                        '%d s, --answer-timeout)', waited_s, _last_line(expired.stderr), timeout_s,
                    )  # fmt: skip
        finally:
            process.kill()


def _last_line(errors: bytes | None) -> str:
    lines = (errors or b'').decode(errors='replace').strip().splitlines()
    return lines[-1][:500] if lines else 'the import of ONNX Runtime'


# --- in the process of its own --------------------------------------------------------------------


def main() -> None:
    """Read a request from standard input, write its answers to standard output."""
    die_with_parent(int(sys.argv[1]))
    # Its default action ends the process, also while a library runs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    requests, out = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
    # What a library prints must not get between the answers.
    os.dup2(2, 1)
    try:
        _serve(requests, out)
    except ImportError as error:
        _reply(out, missing=str(error))


def _serve(requests: BinaryIO, out: BinaryIO) -> None:
    import onnxruntime as ort

    head = json.loads(requests.readline())
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Up to 1.18 memory reused at this level spoils answers of graphs that have nodes whose results nothing reads.
    options.enable_mem_reuse = options.enable_mem_pattern = False
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    _begin('the load of the model', head['timeout'])
    content = requests.read(head['sizes'][0])
    try:
        session = ort.InferenceSession(head['path'] or content, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # ONNX Runtime has no base class for its errors
        _reply(out, refused=str(error))
        return
    del content
    declared = session.get_outputs()
    # Of other types ONNX Runtime gives bytes, or refuses the whole request.
    numbers = [output for output in declared if output.type in ONNX_DTYPES]
    left_out = {output.name: output.type for output in declared if output not in numbers}
    left: int | None = head['limit']
    results: list[tuple[str | None, int | None]] = []
    blobs: list[bytes] = []
    outputs: dict[str, list[Any]] = {}
    for number, size in enumerate(sizes := head['sizes'][1:], 1):
        _begin(f'answer {number} of {len(sizes)}', head['timeout'])
        with np.load(io.BytesIO(requests.read(size)), allow_pickle=False) as arrays:
            request = dict(arrays)
        if left is not None and left < 0:
            results.append((None, None))
            continue
        try:
            # Without names, it would give all.
            values = session.run([output.name for output in numbers], request) if numbers else []
        except Exception as error:  # as above
            results.append((str(error), None))
            continue
        for output, value in zip(numbers, values, strict=True):
            seen = outputs.setdefault(output.name, [output.name, value.dtype.name, _declared(output.shape, value)])
            seen[2] = _reconciled(seen[2], value.shape)
        if left is not None:
            left -= sum(value.nbytes for value in values)
            if left < 0 and blobs:
                results.append((None, None))
                continue
        blobs.append(npz_bytes({str(place): value for place, value in enumerate(values)}))
        results.append((None, len(blobs[-1])))
    signal.alarm(0)
    _reply(out, outputs=list(outputs.values()), left_out=left_out, answers=results)
    for blob in blobs:
        out.write(blob)
    out.flush()


def _begin(step: str, timeout_s: int) -> None:
    """Write to standard error what begins, and have the kernel end this process if it takes longer."""
    print(step, file=sys.stderr, flush=True)
    signal.alarm(timeout_s)


def _declared(shape: Sequence[int | str | None], value: NDArray) -> list[int | None] | None:
    # ONNX Runtime gives a scalar and an output of unknown rank the same shape, an empty one.
    if len(shape) != value.ndim:
        return None
    return [axis if isinstance(axis, int) and axis > 0 else None for axis in shape]


def _reconciled(shape: list[int | None] | None, found: Sequence[int]) -> list[int | None] | None:
    if shape is None or len(shape) != len(found):
        return None
    return [axis if axis == size else None for axis, size in zip(shape, found, strict=True)]


def _reply(out: BinaryIO, **values: Any) -> None:
    reply = {'missing': '', 'refused': '', 'outputs': [], 'left_out': {}, 'answers': [], **values}
    out.write(json.dumps(reply).encode() + b'\n')
    out.flush()


if __name__ == '__main__':
    main()
