"""Rules by which two answers of the same network agree, one rule per output."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7._json import Fields, require, require_known
from gps_denied_c7.model.likeness import agree_non_finite, nearest, unlike

__all__ = [
    'Alike',
    'AllClose',
    'MatchedDistance',
    'OutputRule',
    'SetOverlap',
    'compare_output',
    'rule_from_json',
    'rule_to_json',
]

# Values compared at a time: as float64 with their errors they take some MB, whatever the size of an output.
_BLOCK = 1 << 18
# Coordinates of pairs of points that are compared, some seconds: of more points, every second, third … one.
_PAIRS = 1 << 28


@dataclass(frozen=True, slots=True)
class AllClose:
    """
    Demand ``|found - expected| <= atol + rtol * |expected|`` of every element, for dense outputs.

    An infinity agrees with the same infinity alone, NaN with NaN only where non-finite values are allowed.
    """

    kind: ClassVar[str] = 'allclose'
    any_shape: ClassVar[bool] = False
    copies: ClassVar[int] = 0
    """How often an output lies in memory once more while it is compared."""

    output: str
    rtol: float
    atol: float

    def __post_init__(self) -> None:
        for name in ('rtol', 'atol'):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, f'{value} is negative or not finite.')

    def disagreement(self, found: NDArray, expected: NDArray, *, allow_non_finite: bool = False) -> str | None:
        """Say how ``found`` breaks this rule, or None where it holds; shapes are alike."""
        wrong, worst, worst_error = 0, 0, -1.0
        have, want = found.reshape(-1), expected.reshape(-1)
        for start in range(0, want.size, _BLOCK):
            bad, error = self._errors(have[start : start + _BLOCK], want[start : start + _BLOCK], allow_non_finite)
            if bad.any():
                wrong += int(bad.sum())
                place = int(np.argmax(error))
                if error[place] > worst_error:
                    worst, worst_error = start + place, float(error[place])
        if not wrong:
            return None
        index = [int(axis) for axis in np.unravel_index(worst, expected.shape)]
        return (
            f'{wrong} of {want.size} values differ by more than atol {self.atol:g} + rtol {self.rtol:g}; '
            f'worst at {index}: found {have[worst]!s}, expected {want[worst]!s}'
        )

    def _errors(self, found: NDArray, expected: NDArray, allow_non_finite: bool) -> tuple[NDArray, NDArray]:
        """Return which values differ by more than is allowed, and by how much each differs, infinite for NaN."""
        want, have = expected.astype(np.float64), found.astype(np.float64)
        with np.errstate(invalid='ignore', over='ignore'):
            error = np.abs(have - want)
            bad = ~(error <= self.atol + self.rtol * np.abs(want))
        if not np.isfinite(error).all():
            # An infinite bound allows anything, and the difference of two equal infinities is NaN.
            bad = np.where(np.isfinite(error), bad, ~agree_non_finite(have, want, allow_non_finite))
            error = np.where(bad, error, 0.0)
        return bad, np.where(np.isnan(error), np.inf, error)


@dataclass(frozen=True, slots=True)
class MatchedDistance:
    """
    Demand that points lie where they should, in any order and number, as of keypoints.

    The last axis holds a point's coordinates, all other axes number the points. A point is matched
    when the nearest point of the other side is within ``max_distance`` (Euclidean). The share of
    matched points, taken on each side by itself, must reach ``min_fraction`` on both: extra and
    missing points count alike; of thousands of points with many coordinates, each second, third … one is looked for.
    Two empty sides agree. A non-finite coordinate agrees with the same one where
    non-finite values are allowed, else its point matches nothing.
    """

    kind: ClassVar[str] = 'matched_distance'
    any_shape: ClassVar[bool] = True
    copies: ClassVar[int] = 8

    output: str
    max_distance: float
    min_fraction: float

    def __post_init__(self) -> None:
        value = self.max_distance
        require(math.isfinite(value) and value >= 0, 'max_distance', f'{value} is negative or not finite.')
        require(0 < self.min_fraction <= 1, 'min_fraction', f'{self.min_fraction} is not in (0, 1].')

    def disagreement(self, found: NDArray, expected: NDArray, *, allow_non_finite: bool = False) -> str | None:
        """Say how ``found`` breaks this rule, or None where it holds; only the last axis must be alike."""
        if found.ndim == 0 or found.shape[-1:] != expected.shape[-1:]:
            return f'found points of shape {found.shape}, expected {expected.shape}'
        width = found.shape[-1]
        left = found.reshape(found.size // width if width else 0, width).astype(np.float64)
        right = expected.reshape(expected.size // width if width else 0, width).astype(np.float64)
        if not len(left) and not len(right):
            return None
        shares = []
        for points, others in ((left, right), (right, left)):
            step = max(1, -(-points.size * len(others) // _PAIRS))
            matched = nearest(points[::step], others, allow_non_finite=allow_non_finite) <= self.max_distance
            shares.append(float(matched.mean()) if matched.size else 0.0)
        if min(shares) >= self.min_fraction:
            return None
        return (
            f'{shares[0]:.1%} of {len(left)} points found and {shares[1]:.1%} of {len(right)} points expected have a '
            f'partner within {self.max_distance:g}, {self.min_fraction:.1%} are needed'
        )


@dataclass(frozen=True, slots=True)
class SetOverlap:
    """
    Demand that two sets overlap: intersection over union of at least ``min_iou``; two empty sets agree.

    :param members: what the set holds. ``nonzero``: the flat (C order) indices of non-zero elements,
        for masks. ``top_k``: the flat indices of the ``k`` greatest elements, of equal ones the
        first, for score maps. ``values``: the distinct elements, for lists of identifiers.
    :param k: how many, for ``top_k`` alone; all where there are fewer.
    """

    kind: ClassVar[str] = 'set_overlap'
    copies: ClassVar[int] = 8

    output: str
    min_iou: float
    members: str = 'nonzero'
    k: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.min_iou <= 1, 'min_iou', f'{self.min_iou} is not in (0, 1].')
        require_known('members', self.members, ('nonzero', 'top_k', 'values'))
        if self.members == 'top_k':
            require(self.k is not None and self.k > 0, 'k', f'{self.k} is not a positive number, as top_k needs.')
        else:
            require(self.k is None, 'k', f'{self.k} means nothing for {self.members}.', 'Remove it.')

    @property
    def any_shape(self) -> bool:
        """Whether the two sides may differ in shape."""
        return self.members == 'values'

    def disagreement(self, found: NDArray, expected: NDArray, *, allow_non_finite: bool = False) -> str | None:
        """Say how ``found`` breaks this rule, or None where it holds; shapes are alike except for ``values``."""
        for side, array in (('found', found), ('expected', expected)):
            if array.dtype.kind == 'f' and not allow_non_finite and np.isnan(array).any():
                return f'NaN among the values {side}, which has no place in a set'
        if self.members == 'nonzero':
            left, right = found != 0, expected != 0
            sizes, common = (int(left.sum()), int(right.sum())), int((left & right).sum())
        else:
            left, right = self._set(found), self._set(expected)
            # NumPy's intersection holds no NaN, its union one.
            sizes = (left.size, right.size)
            common = np.intersect1d(left, right).size + bool(_has_nan(left) and _has_nan(right))
        together = sum(sizes) - common
        iou = common / together if together else 1.0
        if iou >= self.min_iou:
            return None
        return f'{self.members} sets of {sizes[0]} and {sizes[1]} overlap by {iou:.3f}, {self.min_iou:g} is needed'

    def _set(self, array: NDArray) -> NDArray:
        if self.members == 'values':
            return np.unique(array)
        # Sorted in reverse so that of equal values the first is kept; negating would overflow integers.
        # The indices count from the end, on both sides alike. NaN is none of the greatest.
        if _has_nan(array):
            array = np.where(np.isnan(array), -np.inf, array)
        order = np.argsort(array.ravel()[::-1], kind='stable')[::-1]
        return order[: self.k]


@dataclass(frozen=True, slots=True)
class Alike:
    """
    Demand that two answers are alike by their own measures, for outputs without a rule (:mod:`likeness`).

    :param free_axis: the axis that numbers the rows of a list, where the output's spec says so.
    """

    kind: ClassVar[str] = 'default'
    any_shape: ClassVar[bool] = True
    copies: ClassVar[int] = 8

    output: str
    free_axis: int | None = field(default=None, compare=False)

    def disagreement(self, found: NDArray, expected: NDArray, *, allow_non_finite: bool = False) -> str | None:
        """Say how ``found`` breaks this rule, or None where it holds."""
        return unlike(found, expected, free_axis=self.free_axis, allow_non_finite=allow_non_finite)


def _has_nan(array: NDArray) -> bool:
    return array.dtype.kind == 'f' and bool(np.isnan(array).any())


OutputRule = AllClose | MatchedDistance | SetOverlap | Alike
_KINDS = tuple(rule.kind for rule in (AllClose, MatchedDistance, SetOverlap, Alike))


def rule_from_json(output: str, fields: Fields) -> OutputRule:
    """
    Read what :func:`rule_to_json` wrote.

    :raises ModelBundleError: naming the key.
    """
    kind = fields.take('kind', str)
    fields.check(kind in _KINDS, 'kind', f'{kind!r} unknown.', f'Known are {list(_KINDS)}.')
    rule: OutputRule
    if kind == AllClose.kind:
        rule = fields.build(AllClose, output=output, rtol=fields.take('rtol', float), atol=fields.take('atol', float))
    elif kind == MatchedDistance.kind:
        rule = fields.build(
            MatchedDistance,
            output=output,
            max_distance=fields.take('max_distance', float),
            min_fraction=fields.take('min_fraction', float),
        )
    elif kind == Alike.kind:
        rule = Alike(output)
    else:
        rule = fields.build(
            SetOverlap,
            output=output,
            min_iou=fields.take('min_iou', float),
            members=fields.take('members', str),
            k=fields.take('k', int, None),
        )
    fields.close()
    return rule


def rule_to_json(rule: OutputRule) -> dict[str, Any]:
    """Return the JSON object of a rule, which stands under its output's name."""
    # What does not compare comes from the output's spec, not from the rule.
    values = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule) if field.compare}
    del values['output']
    return {'kind': rule.kind, **{key: value for key, value in values.items() if value is not None}}


def compare_output(
    rule: OutputRule, found: NDArray | None, expected: NDArray | None, *, allow_non_finite: bool = False
) -> str | None:
    """
    Say how ``found`` disagrees with ``expected``, or None where ``rule`` holds; a None array is a missing one.

    :param allow_non_finite: whether NaN and infinities are meant in this output, so that NaN agrees with NaN.
    """
    if found is None or expected is None:
        return 'is missing' if found is None else 'is missing from what it is compared with'
    if not rule.any_shape and found.shape != expected.shape:
        return f'has shape {found.shape}, expected {expected.shape}'
    return rule.disagreement(found, expected, allow_non_finite=allow_non_finite)
