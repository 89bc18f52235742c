"""Tensors of a session: their types, and the sizes that are certain."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gps_denied_c7.errors import EngineDeserializeError
from gps_denied_c7.model.onnx_file import OnnxModel
from gps_denied_c7.runtimes.ort.session import Session
from gps_denied_c7.tensors import TensorSpec

__all__ = ['certain_outputs', 'specs']

# ONNX Runtime's element types; those that NumPy lacks are refused.
_DTYPES = {
    'tensor(bool)': 'bool',
    'tensor(double)': 'float64',
    'tensor(float)': 'float32',
    'tensor(float16)': 'float16',
    **{f'tensor({sign}int{bits})': f'{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64)},
}


def certain_outputs(
    engine: Session, wanted: Collection[str], model: OnnxModel | None, given: Mapping[str, Sequence[int | None]]
) -> tuple[TensorSpec, ...]:
    """
    Return the wanted outputs, each size as far as operators and ONNX Runtime agree on it.

    :param given: shapes that the bundle gives inputs, by name: the sizes of axes that are free and have no name.
    """
    declared = specs([argument for argument in engine.session.get_outputs() if argument.name in wanted])
    if engine.certain or model is None:
        return declared
    fed = {
        spec.name: [
            own or wanted or 1
            for own, wanted in itertools.zip_longest(spec.axes, given.get(spec.name, ())[: len(spec.axes)])
        ]
        for spec in engine.inputs
    }
    inferred = model.output_shapes(fed)
    return tuple(dataclasses.replace(spec, shape=_certain_shape(spec, inferred.get(spec.name))) for spec in declared)


def _certain_shape(declared: TensorSpec, inferred: tuple[int | None, ...] | None) -> tuple[int | None, ...] | None:
    if inferred is None or len(inferred) != len(declared.axes):
        # ONNX Runtime reports an output of unknown rank as it reports a scalar.
        return None if inferred is None or declared.axes else inferred
    return tuple(
        size if other in (None, size) else None for size, other in zip(inferred, declared.axes, strict=True)
    )


def specs(arguments: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """
    Return what a session says of its inputs or outputs.

    :raises EngineDeserializeError: NumPy lacks the type of one.
    """
    for argument in arguments:
        if argument.type not in _DTYPES:
            raise EngineDeserializeError(
                f'tensor {argument.name!r} is a {argument.type}, which NumPy has no type for.',
                remedy='Where it is an output that is not needed, name those that are in output_tensors; else export '
                f'the model with one of {sorted(set(_DTYPES.values()))}.',
            )
    return tuple(
        TensorSpec(
            argument.name,
            _DTYPES[argument.type],
            tuple(size if isinstance(size, int) else None for size in argument.shape),
        )
        for argument in arguments
    )
