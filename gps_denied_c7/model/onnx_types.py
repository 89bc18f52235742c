"""The tensors of ONNX that NumPy has a type for: only such outputs are served, and part of a bundle."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ['ONNX_DTYPES', 'no_output_left']

ONNX_DTYPES = {
    'tensor(bool)': 'bool',
    'tensor(double)': 'float64',
    'tensor(float)': 'float32',
    'tensor(float16)': 'float16',
    **{f'tensor({sign}int{bits})': f'{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64)},
}
"""NumPy's names of ONNX Runtime's element types."""


def no_output_left(left_out: Mapping[str, str]) -> tuple[str, str]:
    """
    Return what is wrong with a model that has no output of these types, and the remedy.

    :param left_out: ONNX Runtime's types of its outputs, by name.
    """
    described = ', '.join(f'{name!r} is a {kind}' for name, kind in left_out.items())
    return (
        f'no output of the model is a numeric tensor: {described}.' if described else 'the model has no output.',
        f'Export it with an output of one of {sorted(ONNX_DTYPES.values())}.',
    )
