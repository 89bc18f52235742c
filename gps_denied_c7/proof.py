"""Prove a loaded engine with an inference whose answer reaches no consumer (N-1, M-1)."""

from __future__ import annotations

import time

from numpy.typing import NDArray

from gps_denied_c7.bundle import ModelBundle
from gps_denied_c7.errors import InferenceError
from gps_denied_c7.rungs import RungHost
from gps_denied_c7.tensors import noise_inputs

__all__ = ['Proof']


class Proof:
    """
    Ask engines for the golden outputs of a bundle; for any answer where it has none.

    The golden tensors are read once: an engine that is loaded must not fall with files that change on the disk.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self._bundle = bundle
        self._golden: tuple[dict[str, NDArray], dict[str, NDArray]] | None = None

    def run(self, host: RungHost, limit_s: float) -> float:
        """
        Run one inference and look at what comes of it.

        :return: seconds that it took.
        :raises InferenceError: it fails, is not right, or takes longer than ``limit_s``; the host is killed then.
        """
        outputs, took_s = self._ask(host, limit_s)
        if self._golden is not None and (disagreements := self._bundle.compare(outputs, self._golden[1])):
            raise InferenceError(
                f'the golden outputs are not reproduced: {" ".join(disagreements)}',
                remedy="Build the artefact again from the bundle's source weights.",
            )
        return took_s

    def time(self, host: RungHost, limit_s: float) -> float:
        """Return the seconds that one inference takes whose answer nobody looks at; raises as :meth:`run`."""
        return self._ask(host, limit_s)[1]

    def forget(self) -> None:
        """Read the golden tensors afresh the next time."""
        self._golden = None

    def _ask(self, host: RungHost, limit_s: float) -> tuple[dict[str, NDArray], float]:
        if self._bundle.golden is not None and self._golden is None:
            self._golden = (self._bundle.golden_inputs(), self._bundle.golden_outputs())
        request = self._golden[0] if self._golden is not None else noise_inputs(host.inputs)
        started = time.monotonic()
        host.begin(request)
        outputs = host.poll(limit_s)
        took_s = time.monotonic() - started
        if outputs is None:
            host.kill()
            raise InferenceError(f'its proof took longer than {limit_s:.1f} s.')
        return outputs, took_s
