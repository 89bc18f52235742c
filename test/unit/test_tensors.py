"""R-1: what crosses the runtime boundary is looked at value by value."""

from __future__ import annotations

import numpy as np
import pytest

from gps_denied_c7.errors import InferenceError
from gps_denied_c7.tensors import TensorSpec, check_arrays, check_finite, is_finite


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('size', [40, 1000])
@pytest.mark.parametrize('place', [0, 17, -1])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, -np.nan])
def test_r1_each_non_finite_value_is_found(dtype: str, size: int, place: int, value: float) -> None:
    array = np.zeros(size, dtype)
    array[place] = value
    assert not is_finite(array)
    with pytest.raises(InferenceError, match=f'1 non-finite values of {size}'):
        check_finite({'scores': array})


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_r1_large_values_are_finite(dtype: str) -> None:
    limits = np.finfo(dtype)
    values = [limits.max, limits.min, limits.tiny, -limits.tiny, limits.smallest_subnormal, 0.0, -0.0]
    array = np.array(values * 200, dtype)
    for part in (array, array[::2], array[:7], array[:7][::-1], array[:0], np.full(1000, limits.max)):
        assert is_finite(part)


@pytest.mark.parametrize('size', [9, 1000])
def test_r1_values_beyond_a_double_are_finite(size: int) -> None:
    assert is_finite(np.full(size, np.finfo(np.longdouble).max))
    assert not is_finite(np.full(size, np.longdouble(np.inf)))


@pytest.mark.parametrize('value', [[np.inf, -np.inf], [np.nan, 1.0], [-np.inf, np.nan]])
def test_r1_values_that_are_not_finite_do_not_cancel_each_other(value: list[float]) -> None:
    assert not is_finite(np.array(value * 1000, np.float32))


def test_r1_every_float16_bit_pattern_is_judged_as_numpy_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    judged = list(np.isfinite(every))
    assert [is_finite(every[index : index + 1]) for index in range(every.size)] == judged
    many = np.zeros(1000, np.float16)
    for index, finite in enumerate(judged):
        many[17] = every[index]
        assert is_finite(many) is bool(finite)


def test_r1_a_tensor_that_is_missing_or_of_another_shape_or_type_is_found() -> None:
    array = np.zeros((2, 2), np.float32)
    check_arrays('output', [TensorSpec('scores', 'float32', (2, None))], {'scores': array})
    for spec in (TensorSpec('scores', 'float32', (4,)), TensorSpec('scores', 'float64', (2, 2))):
        with pytest.raises(InferenceError, match='expected'):
            check_arrays('output', [spec], {'scores': array})
    with pytest.raises(InferenceError, match='points'):
        check_arrays('output', [TensorSpec('points', 'float32', (2, 2))], {'scores': array})
