"""
Judge whether two answers are alike where no rule says what they hold; no scale has to be known.

Engines that compute in FP16, TF32 or INT8 are to pass beside FP32. Zeros, the answer to another frame, and channels
in another order are not. Every measure is taken from the expected answer itself: a share of its range, the spacing of
its points.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ['agree_non_finite', 'nearest', 'unlike']

# Differences of so many coordinates at a time, 4 MB: what fits into a processor's cache is compared fastest.
_BLOCK = 1 << 19

_SHARE = 0.02
"""Error of one element, as a share of the range: three times what FP16 costs a feature network, 5 steps of INT8."""
_OUTLIERS = 0.1
"""Share of the elements that stand out which may be wrong: a peak may come out one pixel away."""
_OWN_SHARE = 0.25
"""As ``_SHARE``, of the range of one channel: channels of small values may drown in their neighbours' rounding."""
_ULP = 2.0**-10
"""One unit in the last place of FP16 and TF32, relative; half precision numbers end at 2**-24."""
_SMALLEST = 2.0**-24
_MATCHED = 0.8
"""Share of the points of each side that have a partner on the other."""
_FEW_COLUMNS, _MOST_COLUMNS = 16, 256
_LIKE_NEIGHBOURS = 0.5
"""Difference of neighbouring rows as a share of that of rows far apart, below which their order means something."""
# What is compared one by one, so that a comparison takes tens of milliseconds: points, elements, coordinates of pairs.
_SAMPLE, _ELEMENTS, _SLICED, _PAIRS = 32, 1 << 14, 1 << 16, 1 << 23


def unlike(
    found: NDArray, expected: NDArray, *, free_axis: int | None = None, allow_non_finite: bool = False
) -> str | None:
    """
    Say how ``found`` differs from ``expected``, or None where they are alike.

    Arrays of one shape are compared element by element. Where that fails, or the number of rows differs, rows of a
    list are compared as points, in any order.

    :param free_axis: the axis that numbers the rows of a list, where that is known.
    :param allow_non_finite: take NaN at the same place for equal; equal infinities always are.
    """
    problem = f'has shape {found.shape}, expected {expected.shape}'
    if found.shape == expected.shape:
        numbers = found.dtype.kind == 'f' and expected.dtype.kind == 'f'
        different = _numbers(found, expected, allow_non_finite) if numbers else _labels(found, expected)
        if different is None:
            return None
        problem = different
    axis = _row_axis(found, expected, free_axis)
    if axis is None:
        return problem
    unmatched = _points(_rows(found, axis), _rows(expected, axis), allow_non_finite)
    return None if unmatched is None else f'{problem}; {unmatched}' if found.shape == expected.shape else unmatched


def nearest(points: NDArray, others: NDArray, *, allow_non_finite: bool = False) -> NDArray:
    """
    Return the distance of each point to the nearest of ``others``, infinite where there are none.

    :param points: (N, D) float64.
    :param others: (M, D) float64.
    :param allow_non_finite: take coordinates that are the same infinity, or both NaN, for equal.
    """
    distances = np.full(len(points), np.inf)
    rows = max(1, _BLOCK // max(1, others.size))
    for start in range(0, len(points) if len(others) else 0, rows):
        block = points[start : start + rows, None, :]
        with np.errstate(invalid='ignore', over='ignore'):
            apart = block - others[None, :, :]
            if allow_non_finite and not np.isfinite(apart).all():
                apart = np.where(agree_non_finite(block, others[None, :, :], True), 0.0, apart)
            distance = np.sqrt(np.einsum('ijk,ijk->ij', apart, apart))
        distances[start : start + rows] = np.where(np.isnan(distance), np.inf, distance).min(axis=1)
    return distances


def agree_non_finite(found: NDArray, expected: NDArray, allow_nan: bool) -> NDArray[np.bool_]:
    """Return where both are the same infinity, or NaN where that is allowed; floating-point arrays."""
    same = np.isinf(expected) & (found == expected)
    return same | (np.isnan(found) & np.isnan(expected)) if allow_nan else same


# --- element by element ---------------------------------------------------------------------------


def _numbers(found: NDArray, expected: NDArray, allow_non_finite: bool) -> str | None:
    kind = np.dtype(np.float64 if max(found.itemsize, expected.itemsize) > 4 else np.float32)
    have: NDArray[np.floating] = found.astype(kind)
    want: NDArray[np.floating] = expected.astype(kind)
    with np.errstate(invalid='ignore', over='ignore'):
        different = (have != want) & ~agree_non_finite(have, want, allow_non_finite)
        if not different.any():
            return None
        # A background of zeros or a mask of -1e4 that is equal to the bit says nothing of the rest and its range.
        background = _background(want)
        judged = different | np.isfinite(want)
        for value in background:
            judged &= different | (want != value)
        values = want[different & np.isfinite(want)]
        centre = _middle(want[judged])
        low, high = (float(f(values, initial=centre)) for f in (np.min, np.max))
        spread = high - low if want.size > 1 else abs(float(want.reshape(-1)[0]))
        tolerance = _tolerance(_SHARE * spread, max(abs(low), abs(high)))
        error = np.abs(have - want)
        bad = different & ~(error <= tolerance)
        counts = judged
        if not background.size:
            counts = judged & (bad | (np.abs(want - centre) > tolerance) | (np.abs(have - centre) > tolerance))
    if (wrong := int(bad.sum())) > _OUTLIERS * (total := int(counts.sum())):
        return (
            f'{wrong} of the {total} values that differ from the background are wrong by more than {tolerance:.3g}, '
            f'{_SHARE:.0%} of the range'
        )
    return _wrong_slices(have, want, bad, counts)


def _wrong_slices(have: NDArray, want: NDArray, bad: NDArray, counts: NDArray) -> str | None:
    """Say which channels, rows or columns are wrong for the most part, though few of all values are."""
    for axis in (axis for axis in range(want.ndim) if want.shape[axis] > 1):
        others = tuple(each for each in range(want.ndim) if each != axis)
        total = counts.sum(axis=others)
        wrong = np.flatnonzero((total >= _FEW_COLUMNS) & (bad.sum(axis=others) * 2 > total))
        if wrong.size:
            return f'most values at index {wrong[:8].tolist()} of axis {axis} are wrong'
    longest = max(range(want.ndim), key=lambda axis: want.shape[axis], default=0)
    if want.size > _SLICED:
        sample = (slice(None),) * longest + (slice(None, None, -(-want.size // _SLICED)),)
        have, want = have[sample], want[sample]
    for axis in (axis for axis in range(want.ndim) if want.shape[axis] > 1):
        wrong, most = _wrong_by_own_scale(have, want, axis), want.shape[axis] // 2
        # The columns of a list differ in meaning: pixels, scores, classes. Of many channels some hold noise alone.
        if len(wrong) > (0 if axis == want.ndim - 1 and want.shape[axis] <= _FEW_COLUMNS else most):
            slices = f'{len(wrong)} of {want.shape[axis]} slices along axis {axis}'
            return f'{slices} are wrong, each measured by its own range'
    return None


def _wrong_by_own_scale(have: NDArray, want: NDArray, axis: int) -> NDArray:
    left, right = _rows(have, axis), _rows(want, axis)
    known = np.isfinite(right)
    with np.errstate(invalid='ignore', over='ignore'):
        low = np.where(known, right, np.inf).min(axis=1)
        high = np.where(known, right, -np.inf).max(axis=1)
        spread = np.where(low <= high, high - low, 0.0)
        greatest = np.where(low <= high, np.maximum(np.abs(low), np.abs(high)), 0.0)
        bound = np.maximum(np.maximum(_OWN_SHARE * spread, 4 * _ULP * greatest), _SMALLEST)[:, None]
        centre = np.where(low <= high, (low + high) / 2 if right.shape[1] < 3 else np.median(right, axis=1), 0.0)
        centre = np.where(np.isfinite(centre), centre, 0.0)[:, None]
        bad = known & ~(np.abs(left - right) <= bound)
        counts = bad | (known & ((np.abs(right - centre) > bound) | (np.abs(left - centre) > bound)))
    total = counts.sum(axis=1)
    return np.flatnonzero((total >= min(8, right.shape[1])) & (bad.sum(axis=1) * 2 > total))


def _labels(found: NDArray, expected: NDArray) -> str | None:
    """Compare whole numbers and truth values: equal, but counts about so, and numbers of 8 bits within some steps."""
    if found.dtype.kind == 'f' or expected.dtype.kind == 'f':
        return f'holds {found.dtype}, expected {expected.dtype}'
    bad = found != expected
    if not bad.any():
        return None
    integers = found.dtype.kind != 'b' and expected.dtype.kind != 'b'
    if integers and (expected.size == 1 or expected.itemsize == 1):
        have, want = found.astype(np.float64), expected.astype(np.float64)
        bound = _OUTLIERS * np.abs(want).max() if expected.size == 1 else _SHARE * np.ptp(want)
        bad = np.abs(have - want) > bound
    kinds, numbers = np.unique(_sampled(expected), return_counts=True)
    usual = kinds[np.argmax(numbers)]
    counts = bad | (found != usual) | (expected != usual)
    if (wrong := int(bad.sum())) <= _OUTLIERS * (total := int(counts.sum())):
        return None
    return f'{wrong} of the {total} values that differ from the background are wrong'


def _tolerance(share: float, greatest: float) -> float:
    return max(share, 4 * _ULP * greatest, _SMALLEST)


def _background(values: NDArray) -> NDArray:
    """Return the one or two values that many elements have exactly; none where they all differ."""
    kinds, numbers = np.unique(_sampled(values), return_counts=True)
    return kinds[(numbers > max(1, 0.05 * numbers.sum())) & np.isfinite(kinds)][:2]


def _middle(values: NDArray) -> float:
    sample = _sampled(values)
    sample = sample[np.isfinite(sample)]
    return float(np.median(sample)) if sample.size else 0.0


def _sampled(values: NDArray) -> NDArray:
    return values.reshape(-1)[:: -(-values.size // _ELEMENTS) or 1]


# --- rows in any order ----------------------------------------------------------------------------


def _rows(array: NDArray, axis: int) -> NDArray:
    rows = np.moveaxis(array, axis, 0)
    return rows.reshape(len(rows), int(np.prod(rows.shape[1:])))


def _row_axis(found: NDArray, expected: NDArray, free_axis: int | None) -> int | None:
    """Return the axis along which the rows of a list lie, None where there is no list."""
    if found.ndim != expected.ndim or not found.ndim:
        return None
    if found.shape != expected.shape:
        axes = [axis for axis in range(found.ndim) if found.shape[axis] != expected.shape[axis]]
        return axes[0] if len(axes) == 1 else None
    if free_axis is not None:
        return free_axis
    if all(size == 1 for size in expected.shape[:-1]):
        # A vector's elements have their places; identifiers are a set.
        return expected.ndim - 1 if expected.dtype.kind in 'iu' else None
    if any(size != 1 for size in expected.shape[:-2]) or expected.ndim > 3:
        return None
    rows, columns = expected.shape[-2:]
    is_list = rows > columns and columns <= _MOST_COLUMNS and not _is_picture(expected.reshape(rows, columns))
    return expected.ndim - 2 if is_list else None


def _is_picture(rows: NDArray) -> bool:
    """Tell whether neighbouring rows are alike, as those of a mask or a map are and those of a list are not."""
    if rows.shape[1] <= _FEW_COLUMNS:
        return False
    values = rows[:, :: -(-rows.size // _SLICED)].astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    # Lists of a fixed length end in rows of padding.
    filled = np.flatnonzero((values != values[-1]).any(axis=1))
    values = values[: filled[-1] + 1 if filled.size else 0]
    if len(values) < _FEW_COLUMNS:
        return False
    half = len(values) // 2
    apart, neighbours = (float(np.abs(values[step:] - values[:-step]).mean()) for step in (half, 1))
    return neighbours < _LIKE_NEIGHBOURS * apart


def _points(found: NDArray, expected: NDArray, allow_non_finite: bool) -> str | None:
    """Compare rows (N, D) with rows (M, D): most of each side have one near them on the other."""
    if not len(found) or not len(expected):
        return None if len(found) == len(expected) else f'found {len(found)} rows, expected {len(expected)}'
    width = expected.shape[1]
    if width == 1 and expected.dtype.kind != 'f':
        return _overlap(found, expected)
    want, have = expected.astype(np.float64), found.astype(np.float64)
    known = np.where(np.isfinite(want), want, np.nan)
    with np.errstate(invalid='ignore'):
        low = np.nan_to_num(np.fmin.reduce(known, axis=0))
        high = np.nan_to_num(np.fmax.reduce(known, axis=0))
    greatest = np.maximum(np.abs(low), np.abs(high))
    scale = np.where(high > low, high - low, np.where(greatest > 0, greatest, 1.0))
    have, want = have / scale, want / scale
    near = _SHARE * np.sqrt(width)
    if width > 1:
        near = min(near, _spacing(want) / 4)
    near = max(near, _ULP * float((greatest / scale).max(initial=0.0)))
    shares = []
    for points, others in ((have, want), (want, have)):
        step = max(1, -(-points.size * len(others) // _PAIRS))
        shares.append(float((nearest(points[::step], others, allow_non_finite=allow_non_finite) <= near).mean()))
    if min(shares) >= _MATCHED:
        return None
    return (
        f'{shares[0]:.0%} of {len(found)} rows found and {shares[1]:.0%} of {len(expected)} rows expected have a '
        f'partner, {_MATCHED:.0%} are needed'
    )


def _spacing(points: NDArray) -> float:
    """Return the usual distance from one point to the nearest other one, infinite where there is none."""
    different = np.unique(points[np.isfinite(points).all(axis=1)], axis=0)
    if len(different) < 2:
        return float('inf')
    distances = []
    for index in range(0, len(different), -(-len(different) // _SAMPLE)):
        distance = np.linalg.norm(different - different[index], axis=1)
        distance[index] = np.inf
        distances.append(distance.min())
    return float(np.median(distances))


def _overlap(found: NDArray, expected: NDArray) -> str | None:
    kinds = np.union1d(found, expected)
    left, right = (np.bincount(np.searchsorted(kinds, side.reshape(-1)), minlength=kinds.size)
                   for side in (found, expected))  # fmt: skip
    share = float(np.minimum(left, right).sum() / np.maximum(left, right).sum())
    return None if share >= _MATCHED else f'the values overlap by {share:.0%}, {_MATCHED:.0%} are needed'
