"""Compare what a host answers with what plain ``session.run`` answers, bit for bit."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error
from gps_denied_c7.failover.in_process import in_process_hosts
from gps_denied_c7.failover.rungs import Rung, RungHost
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import UnknownThermalState
from gps_denied_c7.runtimes.protocol import ProviderSet
from gps_denied_c7.worker.client import worker_hosts

__all__ = ['CPU', 'NUMPY_TYPES', 'Tally', 'compare_host', 'loaded_host', 'plain_session', 'rounded', 'wrong_outputs']

CPU = Rung('onnx_trt_ep', ProviderSet.CPU)
NUMPY_TYPES = {
    'tensor(float)': np.float32, 'tensor(float16)': np.float16, 'tensor(double)': np.float64, 'tensor(bool)': np.bool_,
    'tensor(int8)': np.int8, 'tensor(uint8)': np.uint8, 'tensor(int32)': np.int32, 'tensor(int64)': np.int64,
}  # fmt: skip
CONFIG = C7InferenceConfig(cpu_threads=1)


@dataclass
class Tally:
    """
    What came of the comparisons.

    :param wrong: answers of which an output differs, by network.
    :param refused: frames that were refused, by network; all of those of one that was not loaded.
    :param examples: the first few, in words.
    """

    outputs: int = 0
    answers: int = 0
    networks: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def blame(self, counter: Counter[str], network: str, count: int, problem: str) -> None:
        """Count answers of a network as ``wrong`` or ``refused``, and keep the first problem of each."""
        counter[network] += count
        if counter[network] == count:
            self.examples.append(f'{network}: {problem:.300}')

    def __str__(self) -> str:
        return (
            f'{self.networks} networks, {self.answers} answers, {self.outputs} outputs compared: '
            f'{sum(self.wrong.values())} wrong answers of {len(self.wrong)} networks, '
            f'{sum(self.refused.values())} refused frames of {len(self.refused)}'
        )


def plain_session(path: Path, *, optimised: bool = True, threads: int = 1, providers: Iterable[str] = ()):
    """Return a session with the options that the runtime documents, or one that is not optimised."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_reuse = False
    return onnxruntime.InferenceSession(
        str(path), options, providers=list(providers) or ['CPUExecutionProvider'], enable_fallback=0
    )


@contextlib.contextmanager
def loaded_host(path: Path, isolation: str, rung: Rung = CPU, config: C7InferenceConfig = CONFIG) -> Iterator[RungHost]:
    """A host of ``isolation`` that has loaded the model or bundle at ``path``."""
    bundle = ModelBundle.load(path)
    if isolation == 'process':
        host: RungHost = worker_hosts(bundle, config)(rung)
    else:
        host = in_process_hosts(bundle, config, UnknownThermalState())(rung)
    try:
        host.load()
        yield host
    finally:
        host.release()


def wrong_outputs(
    got: Mapping[str, NDArray], expected: Mapping[str, NDArray], *, close: bool = False
) -> list[str]:
    """
    Say of each output how it differs: in name, type, shape or any bit of any value; NaN is equal to NaN.

    :param close: values may differ as those of an optimised graph do.
    """
    if got.keys() != expected.keys():
        return [f'outputs {sorted(got)} instead of {sorted(expected)}']
    problems = []
    for name, want in expected.items():
        have = got[name]
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            problems.append(f'{name!r} is {have.dtype} {have.shape} instead of {want.dtype} {want.shape}')
        elif close and want.dtype.kind == 'f':
            tolerance = 2e-3 if want.dtype == np.float16 else 1e-5
            if not np.allclose(have, want, rtol=tolerance, atol=tolerance, equal_nan=True):
                problems.append(f'{name!r} differs by up to {np.nanmax(np.abs(have - want))}')
        elif not np.array_equal(have, want, equal_nan=want.dtype.kind == 'f'):
            problems.append(f'{int((have != want).sum())} of {want.size} values of {name!r} differ')
    return problems


def compare_host(
    host: RungHost, expected: Iterable[tuple[Mapping[str, NDArray], Mapping[str, NDArray]]], tally: Tally, label: str,
    *, whole: bool = False,
) -> None:  # fmt: skip
    """
    Ask ``host`` for every frame, every other one written in place where it reads its requests.

    :param expected: frame and right answer.
    :param whole: floating-point answers may be up to 1/8 from the integers that they have to be.
    """
    for turn, (frame, right) in enumerate(expected):
        places = host.request_arrays
        request = dict(frame)
        if turn % 2 and places.keys() == frame.keys():
            for name, array in frame.items():
                np.copyto(places[name], array)
            request = dict(places)
        tally.answers += 1
        tally.outputs += len(right)
        try:
            host.begin(request)
            outputs = host.poll(30.0)
            assert outputs is not None, f'{label} hangs'
            got = {name: rounded(array) if whole else array.copy() for name, array in outputs.items()}
        except C7Error as error:
            tally.blame(tally.refused, label, 1, f'frame {turn} is refused: {error}')
            continue
        if problems := wrong_outputs(got, right):
            tally.blame(tally.wrong, label, 1, f'frame {turn}: {"; ".join(problems)}')


def rounded(array: NDArray) -> NDArray:
    """Return the integers next to the values; those that are 1/8 or more away stay as they are."""
    if array.dtype.kind != 'f':
        return array.copy()
    nearest = np.round(array)
    return np.where(np.abs(array - nearest) < 1 / 8, nearest, array)
