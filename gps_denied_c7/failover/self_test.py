"""Self-test a loaded engine with an inference whose answer is not published (N-1, M-1)."""

from __future__ import annotations

import time

from numpy.typing import NDArray

from gps_denied_c7.errors import InferenceError
from gps_denied_c7.failover.rungs import RungHost
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.stalled_reads import read_or_give_up
from gps_denied_c7.tensors import noise_inputs

__all__ = ['Proof']

_READ_S = 60.0
_LIMITS_FOR_ALL = 5

_Case = tuple[dict[str, NDArray], dict[str, NDArray]]


class Proof:
    """
    Ask engines for the golden outputs of a bundle; for any answer where it has none.

    The first golden request is read once and kept: an engine that serves must not fail because files change on the
    disk. The others are read one at a time while an engine is loaded, so that they take no memory in flight.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self._bundle = bundle
        self._first: _Case | None = None

    def run(self, host: RungHost, limit_s: float) -> float:
        """
        Have a loaded engine answer every golden request, and compare the answers.

        :param limit_s: for each of them: a slow engine must not fail because there are many; five times as much for
            all, with the reading of their files.
        :return: seconds that the longest took.
        :raises InferenceError: one fails or is not right, or the time is over; the host is killed then.
        :raises ModelBundleError: a golden file cannot be read, or they take too much memory.
        :raises StalledReadError: their disk or mount does not answer.
        """
        ends_s = time.monotonic() + _LIMITS_FOR_ALL * limit_s
        took_s = self.check(host, limit_s)
        for index in range(1, count := len(self._bundle.golden)):
            if time.monotonic() > ends_s:
                host.kill()
                raise InferenceError(
                    f'only {index} of {count} golden requests were answered within {_LIMITS_FOR_ALL * limit_s:.1f} s.',
                    remedy='Raise load_timeout_s, or make the bundle again with fewer or smaller golden requests.',
                )
            took_s = max(took_s, self._prove(host, limit_s, index, self._read(index)))
        return took_s

    def check(self, host: RungHost, limit_s: float) -> float:
        """Do as :meth:`run`, with the first golden request alone: for an engine that has passed them all."""
        return self._prove(host, limit_s, 0, self._read_first())

    def time(self, host: RungHost, limit_s: float) -> float:
        """Return the seconds that the first golden request takes; its answer is not compared. Raises as :meth:`run`."""
        return self._ask(host, limit_s, self._read_first())[1]

    def forget(self) -> None:
        """Read the golden tensors again the next time."""
        self._first = None

    def _read_first(self) -> _Case | None:
        if self._bundle.golden and self._first is None:
            self._first = self._read(0)
        return self._first

    def _read(self, index: int) -> _Case:
        def read() -> _Case:
            self._bundle.check_golden_sizes()
            return self._bundle.golden_case(index)

        return read_or_give_up(f'the golden files of {self._bundle.root}', read, limit_s=_READ_S)

    def _prove(
        self, host: RungHost, limit_s: float, index: int, case: _Case | None
    ) -> float:
        outputs, took_s = self._ask(host, limit_s, case)
        if case is not None and (disagreements := self._bundle.compare(outputs, case[1])):
            raise InferenceError(
                f'the golden outputs are not reproduced for {self._bundle.golden[index].name!r}: '
                f'{" ".join(disagreements)}',
                remedy="Build the artefact again from the bundle's source weights.",
            )
        return took_s

    def _ask(
        self, host: RungHost, limit_s: float, case: _Case | None
    ) -> tuple[dict[str, NDArray], float]:
        request = case[0] if case is not None else noise_inputs(host.inputs)
        started = time.monotonic()
        host.begin(request)
        outputs = host.poll(limit_s)
        took_s = time.monotonic() - started
        if outputs is None:
            host.kill()
            raise InferenceError(f'its self-test took longer than {limit_s:.1f} s.')
        return outputs, took_s
