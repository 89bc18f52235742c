"""Rules by which two answers of the same network agree, one rule per output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.json_fields import Fields, require, require_known

__all__ = [
    'AllClose',
    'MatchedDistance',
    'OutputRule',
    'SetOverlap',
    'compare_output',
    'rule_from_json',
    'rule_to_json',
]

# Differences of so many coordinates at a time, 4 MB: what fits into a processor's cache is compared fastest.
_BLOCK = 1 << 19


@dataclass(frozen=True, slots=True)
class AllClose:
    """
    Demand ``|found - expected| <= atol + rtol * |expected|`` of every element, for dense outputs.

    NaN agrees with nothing.
    """

    kind: ClassVar[str] = 'allclose'
    any_shape: ClassVar[bool] = False

    output: str
    rtol: float
    atol: float

    def __post_init__(self) -> None:
        for name in ('rtol', 'atol'):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, f'{value} is negative or not finite.')

    def disagreement(self, found: NDArray, expected: NDArray) -> str | None:
        """Say how ``found`` breaks this rule, or None where it holds; shapes are alike."""
        want = expected.astype(np.float64)
        with np.errstate(invalid='ignore', over='ignore'):
            error = np.abs(found.astype(np.float64) - want)
            bad = ~(error <= self.atol + self.rtol * np.abs(want))
        if not bad.any():
            return None
        worst = np.unravel_index(int(np.argmax(np.where(np.isnan(error), np.inf, error))), error.shape)
        place = [int(index) for index in worst]
        return (
            f'{int(bad.sum())} of {bad.size} values differ by more than atol {self.atol:g} + rtol {self.rtol:g}; '
            f'worst at {place}: {found[worst]!s} for {expected[worst]!s}'
        )


@dataclass(frozen=True, slots=True)
class MatchedDistance:
    """
    Demand that points lie where they should, in any order and number, for keypoints and the like.

    The last axis holds a point's coordinates, all other axes number the points. A point is matched
    when the nearest point of the other side is within ``max_distance`` (Euclidean). The share of
    matched points, taken on each side by itself, must reach ``min_fraction`` on both: extra and
    missing points count alike. Two empty sides agree; a non-finite point matches nothing.
    """

    kind: ClassVar[str] = 'matched_distance'
    any_shape: ClassVar[bool] = True

    output: str
    max_distance: float
    min_fraction: float

    def __post_init__(self) -> None:
        value = self.max_distance
        require(math.isfinite(value) and value >= 0, 'max_distance', f'{value} is negative or not finite.')
        require(0 < self.min_fraction <= 1, 'min_fraction', f'{self.min_fraction} is not in (0, 1].')

    def disagreement(self, found: NDArray, expected: NDArray) -> str | None:
        """Say how ``found`` breaks this rule, or None where it holds; only the last axis must be alike."""
        if found.ndim == 0 or found.shape[-1:] != expected.shape[-1:]:
            return f'points of shape {found.shape} for points of shape {expected.shape}'
        width = found.shape[-1]
        left = found.reshape(found.size // width if width else 0, width).astype(np.float64)
        right = expected.reshape(expected.size // width if width else 0, width).astype(np.float64)
        if not len(left) and not len(right):
            return None
        shares = (self._matched(left, right), self._matched(right, left))
        if min(shares) >= self.min_fraction:
            return None
        return (
            f'{shares[0]:.1%} of {len(left)} points found and {shares[1]:.1%} of {len(right)} points expected have a '
            f'partner within {self.max_distance:g}, {self.min_fraction:.1%} are needed'
        )

    def _matched(self, points: NDArray, others: NDArray) -> float:
        if not len(points) or not len(others):
            return 0.0
        matched, rows = 0, max(1, _BLOCK // max(1, others.size))
        for start in range(0, len(points), rows):
            with np.errstate(invalid='ignore', over='ignore'):
                apart = points[start : start + rows, None, :] - others[None, :, :]
                distance = np.sqrt(np.einsum('ijk,ijk->ij', apart, apart))
            matched += int((distance <= self.max_distance).any(axis=1).sum())
        return matched / len(points)


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

    def disagreement(self, found: NDArray, expected: NDArray) -> str | None:
        """Say how ``found`` breaks this rule, or None where it holds; shapes are alike save for ``values``."""
        for side, array in (('found', found), ('expected', expected)):
            if array.dtype.kind == 'f' and np.isnan(array).any():
                return f'NaN among the values {side}, which has no place in a set'
        left, right = self._set(found), self._set(expected)
        together = np.union1d(left, right).size
        iou = np.intersect1d(left, right).size / together if together else 1.0
        if iou >= self.min_iou:
            return None
        return f'{self.members} sets of {left.size} and {right.size} overlap by {iou:.3f}, {self.min_iou:g} is needed'

    def _set(self, array: NDArray) -> NDArray:
        if self.members == 'nonzero':
            return np.flatnonzero(array)
        if self.members == 'values':
            return np.unique(array)
        # Sorted in reverse so that of equal values the first is kept; negating would overflow integers.
        # The indices count from the end, on both sides alike.
        order = np.argsort(array.ravel()[::-1], kind='stable')[::-1]
        return order[: self.k]


OutputRule = AllClose | MatchedDistance | SetOverlap
_RULES: dict[str, type[AllClose] | type[MatchedDistance] | type[SetOverlap]] = {
    rule.kind: rule for rule in (AllClose, MatchedDistance, SetOverlap)
}


def rule_from_json(output: str, fields: Fields) -> OutputRule:
    """
    Read what :func:`rule_to_json` wrote.

    :raises ModelBundleError: naming the key.
    """
    kind = fields.text('kind')
    fields.check(kind in _RULES, 'kind', f'{kind!r} unknown.', f'Known are {list(_RULES)}.')
    rule: OutputRule
    if kind == AllClose.kind:
        rule = fields.build(AllClose, output=output, rtol=fields.number('rtol'), atol=fields.number('atol'))
    elif kind == MatchedDistance.kind:
        rule = fields.build(
            MatchedDistance,
            output=output,
            max_distance=fields.number('max_distance'),
            min_fraction=fields.number('min_fraction'),
        )
    else:
        rule = fields.build(
            SetOverlap,
            output=output,
            min_iou=fields.number('min_iou'),
            members=fields.text('members'),
            k=fields.integer('k') if 'k' in fields.names() else None,
        )
    fields.close()
    return rule


def rule_to_json(rule: OutputRule) -> dict[str, Any]:
    """Return the JSON object of a rule, which stands under its output's name."""
    if isinstance(rule, AllClose):
        return {'kind': rule.kind, 'rtol': rule.rtol, 'atol': rule.atol}
    if isinstance(rule, MatchedDistance):
        return {'kind': rule.kind, 'max_distance': rule.max_distance, 'min_fraction': rule.min_fraction}
    values = {'kind': rule.kind, 'min_iou': rule.min_iou, 'members': rule.members}
    return values if rule.k is None else {**values, 'k': rule.k}


def compare_output(rule: OutputRule, found: NDArray | None, expected: NDArray | None) -> str | None:
    """Say how ``found`` disagrees with ``expected``, or None where ``rule`` holds; a None array is a missing one."""
    if found is None or expected is None:
        return 'is missing' if found is None else 'is missing from what it is compared with'
    if not rule.any_shape and found.shape != expected.shape:
        return f'has shape {found.shape}, expected {expected.shape}'
    return rule.disagreement(found, expected)
