"""Names, element types and shapes of the tensors that cross the runtime boundary."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import InferenceError

__all__ = ['TensorSpec', 'check_inputs', 'check_outputs', 'is_finite', 'noise_inputs']

Arrays = Mapping[str, NDArray]

_FEW = 512


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """
    Describe one named tensor.

    :param name: the canonical name, as the model bundle spells it.
    :param dtype: a NumPy type name, as ``float32``.
    :param shape: one entry per axis; ``None`` where the size is free (a dynamic axis).
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def mismatch(self, array: NDArray) -> str | None:
        """Say how ``array`` breaks this spec, or None where it fits."""
        if array.dtype != np.dtype(self.dtype):
            return f'tensor {self.name!r}: expected dtype {self.dtype}, found {array.dtype}'
        fits = len(array.shape) == len(self.shape) and all(
            want is None or want == have for want, have in zip(self.shape, array.shape, strict=True)
        )
        return None if fits else f'tensor {self.name!r}: expected shape {self.shape}, found {array.shape}'


def check_inputs(specs: Sequence[TensorSpec], arrays: Arrays) -> None:
    """Raise InferenceError unless ``arrays`` holds exactly the tensors that ``specs`` name."""
    _check(specs, arrays, 'input')


def check_outputs(specs: Sequence[TensorSpec], arrays: Arrays) -> None:
    """Raise InferenceError unless ``arrays`` holds exactly the tensors that ``specs`` name."""
    _check(specs, arrays, 'output')


def check_finite(arrays: Arrays) -> None:
    """
    Raise InferenceError for a non-finite output.

    A silently wrong answer is worse than a late one, so every floating-point value is looked at.
    """
    for name, array in arrays.items():
        if array.dtype.kind == 'f' and not is_finite(array):
            raise InferenceError(
                f'output {name!r} has {int((~np.isfinite(array)).sum())} non-finite values of {array.size}.'
            )


def is_finite(array: NDArray) -> bool:
    """Tell whether no value of a floating-point array is NaN or infinite; exact, also next to overflow."""
    if array.size <= _FEW and array.itemsize <= 8:
        # In caches that an engine has filled, NumPy's own way there takes longer than these do.
        return all(map(math.isfinite, array.ravel().tolist()))
    flat = array.reshape(-1)
    if array.dtype == np.float16:
        # NumPy converts each float16 on the way, at eight times the cost. As integers, all that is not finite lies
        # at the upper end: of the signed ones where it is positive, of the unsigned ones where it is negative.
        return bool(flat.view(np.int16).max() < 0x7C00 and flat.view(np.uint16).max() < 0xFC00)
    # A value that is not finite leaves a sum that is not. Of 6 MB it takes two thirds of the time of the exact look,
    # which is left for a sum that overflows. Not the dot product: OpenBLAS would wake threads for it.
    return math.isfinite(np.einsum('i->', flat)) or bool(np.isfinite(flat).all())


def _check(specs: Sequence[TensorSpec], arrays: Arrays, role: str) -> None:
    expected = [spec.name for spec in specs]
    if set(expected) != set(arrays):
        raise InferenceError(f'{role}s: expected {sorted(expected)}, found {sorted(arrays)}.')
    for spec in specs:
        if problem := spec.mismatch(arrays[spec.name]):
            raise InferenceError(f'{role} {problem}.')


def noise_inputs(specs: Sequence[TensorSpec]) -> dict[str, NDArray]:
    """
    Return inputs that any image network can be run on, the same ones each time.

    Noise in 0..1 or 0..255, not zeros: a network that normalises its descriptors divides zero by zero on a black
    image. Wider integers are zero, since they may be indices.

    :return: new arrays by name; a free axis has length one.
    """
    noise = np.random.default_rng(0)
    arrays: dict[str, NDArray] = {}
    for spec in specs:
        sizes = tuple(1 if size is None else size for size in spec.shape)
        if np.dtype(spec.dtype).kind == 'f':
            arrays[spec.name] = noise.random(sizes, np.float32).astype(spec.dtype)
        elif spec.dtype == 'uint8':
            arrays[spec.name] = noise.integers(0, 256, sizes, np.uint8)
        else:
            arrays[spec.name] = np.zeros(sizes, spec.dtype)
    return arrays
