"""Names, element types and shapes of the tensors that cross the runtime boundary."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import InferenceError

__all__ = ['TensorSpec', 'check_arrays', 'check_finite', 'is_finite', 'nearly_equal', 'noise_inputs', 'probe_inputs']

Arrays = Mapping[str, NDArray]

_FEW = 512


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """
    Describe one named tensor.

    :param name: the canonical name, as the model bundle spells it.
    :param dtype: a NumPy type name, as ``float32``.
    :param shape: one entry per axis, ``None`` where the size is free (a dynamic axis); None where even the number of
        axes is unknown, which only an output's may be.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None

    @property
    def axes(self) -> tuple[int | None, ...]:
        """The shape of a tensor whose number of axes is known, as an input's always is."""
        assert self.shape is not None
        return self.shape

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The shape where every size is known and none is zero, else None."""
        return None if self.shape is None or not all(self.shape) else tuple(size for size in self.shape if size)

    def takes(self, shape: Sequence[int | None]) -> bool:
        """Say whether an array may have ``shape``; an axis that is free on either side agrees with any size."""
        return self.shape is None or (
            len(self.shape) == len(shape)
            and all(None in axis or axis[0] == axis[1] for axis in zip(self.shape, shape, strict=True))
        )

    def mismatch(self, array: NDArray) -> str | None:
        """Say how ``array`` breaks this spec, or None where it fits."""
        if array.dtype != np.dtype(self.dtype):
            return f'tensor {self.name!r}: expected dtype {self.dtype}, found {array.dtype}'
        if not self.takes(array.shape):
            return f'tensor {self.name!r}: expected shape {self.shape}, found {array.shape}'
        return None


def _brightest(dtype: np.dtype[Any]) -> int:
    # Wider integers are zero, since they may be indices.
    return 255 if dtype == np.uint8 else int(dtype.kind == 'f')


def check_arrays(role: str, specs: Sequence[TensorSpec], arrays: Arrays) -> None:
    """
    Raise InferenceError unless ``arrays`` holds exactly the tensors that ``specs`` name.

    :param role: what they are, for the error: ``input`` or ``output``.
    """
    expected = [spec.name for spec in specs]
    if set(expected) != set(arrays):
        raise InferenceError(f'{role}s: expected {sorted(expected)}, found {sorted(arrays)}.')
    for spec in specs:
        if problem := spec.mismatch(arrays[spec.name]):
            raise InferenceError(f'{role} {problem}.')


def check_finite(arrays: Arrays) -> None:
    """
    Raise InferenceError for a non-finite output.

    A silently wrong answer is worse than a late one, so every floating-point value is checked.
    """
    for name, array in arrays.items():
        if array.dtype.kind == 'f' and not is_finite(array):
            raise InferenceError(
                f'output {name!r} has {int((~np.isfinite(array)).sum())} non-finite values of {array.size}.'
            )


def nearly_equal(one: NDArray, other: NDArray, share: float) -> bool:
    """
    Tell whether two arrays are alike except for rounding.

    :param share: of the range of ``other`` by which floating-point values may differ; anything else must be equal.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind != 'f' or not one.size:
        return bool(np.array_equal(one, other))
    finite = np.isfinite(other)
    if not finite.all():
        if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
            return False
        one, other = one[finite], other[finite]
    values = other.astype(np.float64)
    span = float(np.ptp(values)) if values.size else 0.0
    # Values that are all alike round by a share of themselves.
    scale = max(span, 0.01 * float(np.abs(values).max(initial=0.0)), 1e-6)
    return bool((np.abs(one - values) <= share * scale).all())


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


def probe_inputs(specs: Sequence[TensorSpec]) -> Iterator[dict[str, NDArray]]:
    """
    Yield requests that differ in kind, the same ones each time: where sizes depend on the data, they change.

    :return: new arrays by name: noise, all zeros, a few bright values in the dark.
    """
    noise = noise_inputs(specs, seed=1)
    yield noise
    for share in (0.0, 0.01):
        chance = np.random.default_rng(2)
        yield {
            name: (array.dtype.type(_brightest(array.dtype)) * (chance.random(array.shape) < share)).astype(array.dtype)
            for name, array in noise.items()
        }


def noise_inputs(specs: Sequence[TensorSpec], seed: int = 0) -> dict[str, NDArray]:
    """
    Return inputs that any image network can be run on, the same ones each time.

    Noise in 0..1 or 0..255, not zeros: a network that normalises its descriptors divides zero by zero on a black
    image. Wider integers are zero, since they may be indices.

    :return: new arrays by name; a free axis has length one.
    """
    noise = np.random.default_rng(seed)
    arrays: dict[str, NDArray] = {}
    for spec in specs:
        sizes = tuple(1 if size is None else size for size in spec.axes)
        if np.dtype(spec.dtype).kind == 'f':
            arrays[spec.name] = noise.random(sizes, np.float32).astype(spec.dtype)
        elif spec.dtype == 'uint8':
            arrays[spec.name] = noise.integers(0, 256, sizes, np.uint8)
        else:
            arrays[spec.name] = np.zeros(sizes, spec.dtype)
    return arrays
