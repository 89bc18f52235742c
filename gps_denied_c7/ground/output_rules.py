"""How the answers of engines may differ from the golden ones, and whether the golden ones are a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.ground.bundle_request import BundleRequest
from gps_denied_c7.ground.golden import FLAT, GoldenCase
from gps_denied_c7.ground.input_shapes import Shape, shape_text
from gps_denied_c7.model.compare import Alike, AllClose, OutputRule, compare_output
from gps_denied_c7.model.onnx_file import OnnxModel
from gps_denied_c7.model.shape_inference import infer_output_shapes
from gps_denied_c7.tensors import TensorSpec

__all__ = ['TOLERANCES', 'certain_outputs', 'default_rule', 'output_rules', 'refuse_empty', 'stable_cases']

TOLERANCES = {'fp32': 0.005, 'fp16': 0.01}
"""
Largest error allowed by default, as a share of an output's range, by the precision that engines compute in.

A feature network of SuperPoint's shape differs by 0.6 % in FP16 on a GPU. FP32 there may mean TF32, whose
mantissa is FP16's, so its share is half of FP16's and no less.
"""

# One step of each arithmetic relative to the value: 10 bits of mantissa in FP16 and in TF32, which FP32 may mean on a
# GPU, 7 in BF16; 8 bits with a sign in INT8.
_STEPS = {'fp32': 2.0**-10, 'fp16': 2.0**-10, 'bf16': 2.0**-7, 'int8': 2.0**-7}
_FLOOR_STEPS = 4
_SMALLEST_NORMAL = {'fp16': 2.0**-14}
"""Below it FP16 has fewer bits, and an engine may answer zero."""


def default_rule(output: str, golden: Sequence[NDArray], precision: str, computed_in: str = '') -> AllClose:
    """
    Return the rule for a dense floating-point output: a share of the range of its golden answers.

    The tolerance is ``max(TOLERANCES[precision] * (max - min), floor)``, over the finite values of all answers. The
    floor is what rounding alone costs: four steps of the arithmetic, each ``2**-10`` of the greatest magnitude in FP16
    and TF32 and ``2**-7`` in BF16 and INT8, but in FP16 no less than ``2**-14``, its smallest normal number. An answer
    of 1000 +- 0.01 so gets 3.9 in FP16, an INT8 network with answers in -1 to 1 gets 0.031.

    :param golden: its answers to all requests.
    :param precision: the coarsest that engines may compute in, of ``TOLERANCES``.
    :param computed_in: what the model itself computes in, where that is coarser: ``bf16`` or ``int8``.
    :raises ModelBundleError: the output holds no floating-point numbers, for which a share means nothing.
    """
    if kinds := {array.dtype.name for array in golden if array.dtype.kind != 'f'}:
        raise ModelBundleError(
            f'output {output!r} holds {min(kinds)} values, for which no tolerance follows from the range.',
            remedy=f'Give --rule {output}=set_overlap,min_iou=0.9,members=values, {output}=allclose,rtol=0,atol=0, '
            f'or {output}=default.',
        )
    spread, greatest = _extent(golden)
    # A constant answer has no range; its magnitude is used instead.
    tolerance = max(TOLERANCES[precision] * (spread or greatest or 1.0), _floor(greatest, precision, computed_in))
    return AllClose(output, rtol=0.0, atol=float(f'{tolerance:.3g}'))


def output_rules(
    request: BundleRequest,
    outputs: Sequence[TensorSpec],
    cases: Sequence[GoldenCase],
    computed_in: str,
    notes: list[str],
) -> list[OutputRule]:
    """
    Return the rule for each output: the one that was given, otherwise one that follows from its golden answers.

    :param computed_in: the precision that the model itself computes in.
    :param notes: gets a sentence for each rule that its user should know of.
    :raises ModelBundleError: a rule was given for no output, or no rule follows.
    """
    given = {rule.output: rule for rule in request.rules}
    names = [spec.name for spec in outputs]
    if unknown := sorted(set(given) - set(names)):
        raise ModelBundleError(f'a rule was given for {unknown}, the outputs are {names}.', remedy='Correct the name.')
    return [
        given.get(spec.name)
        or _derived_rule(spec, [case.answer[spec.name] for case in cases], request, computed_in, notes)
        for spec in outputs
    ]


def stable_cases(
    request: BundleRequest, rules: Sequence[OutputRule], cases: Sequence[GoldenCase], notes: list[str]
) -> list[GoldenCase]:
    """Leave out the requests that no engine in half precision could answer, as where all scores tie at a choice."""
    stable: list[GoldenCase] = []
    unstable: list[str] = []
    for case in cases:
        problems = [
            f'output {rule.output!r}: {problem}.'
            for rule in rules
            if (
                problem := compare_output(
                    rule,
                    case.answer_to_rounded[rule.output],
                    case.answer[rule.output],
                    allow_non_finite=rule.output in request.allow_non_finite,
                )
            )
        ]
        why = f'rounding its input to half precision changes the answer beyond the rules: {" ".join(problems)}'
        if not problems:
            stable.append(case)
        elif not case.given:
            unstable.append(f'The picture {case.name!r} was left out of the golden requests: {why}')
        else:
            _refuse(
                request, f'the golden request {case.name!r} is a weak test: {why}', 'give wider rules', notes
            )
            stable.append(case)
    if unstable and all(case.name in FLAT for case in stable):
        _refuse(request, f'too few golden requests are left. {unstable[0]}', 'give wider rules', notes)
    notes += unstable
    return stable or list(cases)


def certain_outputs(
    outputs: Sequence[TensorSpec], model: OnnxModel, inputs: Sequence[TensorSpec]
) -> tuple[TensorSpec, ...]:
    """Return the outputs as they were seen; sizes that depend on the data, by the operators' rules, are free."""
    inferred = infer_output_shapes(model.skeleton, inputs)
    certain = []
    for spec in outputs:
        shape, seen = inferred.get(spec.name), spec.shape
        if shape is not None and seen is not None and len(shape) == len(seen):
            seen = tuple(size if size == other else None for size, other in zip(shape, seen, strict=True))
        certain.append(dataclasses.replace(spec, shape=seen))
    return tuple(certain)


def refuse_empty(
    request: BundleRequest, rules: Sequence[OutputRule], cases: Sequence[GoldenCase], notes: list[str]
) -> None:
    """Refuse golden answers that cannot fail: empty ones, or one answer that passes as every other."""
    stuck = []
    for rule in rules:
        answers = [case.answer[rule.output] for case in cases]
        if not any(array.size for array in answers):
            _refuse(
                request,
                f'output {rule.output!r} is empty for all {len(cases)} golden requests, so it tests nothing.',
                '',
                notes,
            )
        allowed = rule.output in request.allow_non_finite
        if len(cases) > 1 and not any(
            compare_output(rule, array, answers[0], allow_non_finite=allowed) for array in answers[1:]
        ):
            stuck.append(rule.output)
    if len(stuck) == len(rules) and stuck:
        _refuse(
            request,
            f'the answer to one golden request passes as the answer to each of the {len(cases)}: '
            'an engine that always gives the same answer would pass.',
            'give narrower rules',
            notes,
        )
    elif stuck:
        notes.append(f'Outputs {stuck} are the same for all golden requests, within their rules.')


def _derived_rule(
    spec: TensorSpec, golden: Sequence[NDArray], request: BundleRequest, computed_in: str, notes: list[str]
) -> OutputRule:
    shape: Shape | None = spec.shape
    if shape is None or None in shape:
        found = {array.shape for array in golden}
        cause, otherwise = 'a size that depends on the image', ''
        if len(found) == 1:
            cause = f'the size {shape_text(*found)} in each answer, but the file declares no size or another one'
            otherwise = ' Or export the model with the size of its answers.'
        raise ModelBundleError(
            f'output {spec.name!r} has {cause} ({shape_text(shape)}), so it cannot be compared element by element.',
            remedy=f'Give --rule {spec.name}=matched_distance,max_distance=1.5,min_fraction=0.95, or a similar rule; '
            f'--rule {spec.name}=default needs no numbers.{otherwise}',
        )
    rule = default_rule(spec.name, golden, request.precision, computed_in)
    spread, greatest = _extent(golden)
    if spread <= 2 * _floor(greatest, request.precision, computed_in):
        # A constant answer would pass.
        _refuse(
            request,
            f'output {spec.name!r} is nearly constant: it changes by {spread:.3g} about {greatest:.3g} over '
            f'{len(golden)} golden requests, which rounding alone may cause (tolerance {rule.atol:g}).',
            f'give a --rule for {spec.name}',
            notes,
        )
    if computed_in == 'int8':
        notes.append(
            f'Output {spec.name!r} is compared by the default rule: in INT8 single values differ by many steps, '
            'so a limit for each value would be useless.'
        )
        return Alike(spec.name)
    if all(np.array_equal(array, np.rint(array)) for array in golden):
        notes.append(
            f'Output {spec.name!r} holds whole numbers only. If they are positions or indices, whose order may '
            f'change with the precision, give --rule {spec.name}=matched_distance,max_distance=1.5,min_fraction=0.95.'
        )
    return rule


def _floor(greatest: float, precision: str, computed_in: str) -> float:
    step = max(_STEPS[precision], _STEPS.get(computed_in, 0.0))
    return max(_FLOOR_STEPS * step * greatest, _SMALLEST_NORMAL.get(precision, 0.0))


def _extent(arrays: Sequence[NDArray]) -> tuple[float, float]:
    """Return the range of the finite values of all arrays, and the greatest magnitude among them."""
    low, high = np.inf, -np.inf
    for array in arrays:
        finite = array[np.isfinite(array)].astype(np.float64)
        low, high = min(low, finite.min(initial=np.inf)), max(high, finite.max(initial=-np.inf))
    return (float(high - low), float(max(abs(low), abs(high)))) if low <= high else (0.0, 0.0)


def _refuse(request: BundleRequest, problem: str, otherwise: str, notes: list[str]) -> None:
    """Refuse a weak test with its remedy, or note it where the request forces the bundle."""
    if not request.force:
        ways = ['Give --golden-image with pictures that the network was made for', otherwise, 'or --force']
        raise ModelBundleError(problem, remedy=f'{", ".join(filter(None, ways))}.')
    notes.append(f'{problem[0].upper()}{problem[1:]}')
