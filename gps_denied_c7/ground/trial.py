"""Serve a model on this host as the node would, in worker processes, while a tool tries it (G-3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import ImageRejectedError, ModelBundleError
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.image.decode import Pixels, decode_compressed
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.files import read_file
from gps_denied_c7.pipeline.model_fit import ImageSettings, fit_bundle, fit_model
from gps_denied_c7.pipeline.pipeline import ServedModel
from gps_denied_c7.worker.client import worker_hosts

__all__ = ['TrialRun', 'read_picture', 'run_picture', 'served_model']

_PICTURE_LIMIT_BYTES = 256 << 20
_FEW = 8

_chain_log = logging.getLogger('gps_denied_c7.failover')


@dataclass(frozen=True, slots=True)
class TrialRun:
    """
    Hold what a model answered to one picture.

    :param source_size: width and height of the picture.
    :param seconds: from its pixels to the answer, pre-processing included.
    :param outputs: owned arrays by canonical name.
    """

    runtime: str
    provider: str
    source_size: tuple[int, int]
    seconds: float
    outputs: Mapping[str, NDArray]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it: of each output its type, shape and :func:`figures`."""
        return {
            'runtime': self.runtime,
            'provider': self.provider,
            'picture_width': self.source_size[0],
            'picture_height': self.source_size[1],
            'seconds': round(self.seconds, 6),
            'outputs': [
                {'name': name, 'dtype': array.dtype.name, 'shape': list(array.shape), **figures(array)}
                for name, array in self.outputs.items()
            ],
        }


def figures(array: NDArray) -> dict[str, Any]:
    """Return the least, mean and greatest of the finite values, how many are not finite, and the first few values."""
    values = array.astype(np.float64).reshape(-1)
    finite = values[np.isfinite(values)]
    few = [float(value) if np.isfinite(value) else str(value) for value in values[:_FEW]]
    found: dict[str, Any] = {'first': few, 'not_finite': int(values.size - finite.size)}
    if finite.size:
        found |= {'min': float(finite.min()), 'mean': float(finite.mean()), 'max': float(finite.max())}
    return found


@contextmanager
def served_model(bundle: ModelBundle, settings: ImageSettings) -> Iterator[ServedModel]:
    """
    Load and self-test a model as a configure of the node does with default parameters; its workers end with this.

    :raises C7Error: the node would refuse it on this host, for the same reason.
    """
    bundle = fit_bundle(bundle, settings)
    config = C7InferenceConfig(hot_standby=False, spare_worker=False)
    chain = RuntimeChain(bundle, config, worker_hosts(bundle, config), emit=lambda kind, **payload: None)
    # No warning about a missing GPU here; if no engine can serve, the error names every reason.
    level = _chain_log.level
    if not _chain_log.isEnabledFor(logging.INFO):
        _chain_log.setLevel(logging.ERROR)
    try:
        chain.load()
        yield fit_model(bundle, chain, settings)
    finally:
        _chain_log.setLevel(level)
        chain.release()


def run_picture(model: ServedModel, pixels: Pixels) -> TrialRun:
    """
    Answer a picture as the node answers a frame.

    :raises C7Error: no engine answers it.
    """
    began = time.monotonic()
    answer = model.chain.infer(model.request(pixels))
    seconds = time.monotonic() - began
    height, width = pixels.array.shape[:2]
    outputs = {name: array.copy() for name, array in answer.outputs.items()}
    return TrialRun(answer.runtime_label, answer.active_provider, (width, height), seconds, outputs)


def read_picture(path: Path) -> Pixels:
    """
    Return the pixels of a JPEG or PNG file, decoded as the node does.

    :raises ModelBundleError: it is not such a file, or cannot be read.
    """
    content = read_file(path, limit=_PICTURE_LIMIT_BYTES)
    try:
        return decode_compressed('png' if content[:4] == b'\x89PNG' else 'jpeg', content)
    except ImageRejectedError as error:
        raise ModelBundleError(
            f'{path} cannot be used as a picture: {error.message}', remedy='Save it as JPEG or PNG.'
        ) from error
