"""R-1: what crosses the runtime boundary is looked at value by value."""

from __future__ import annotations

import numpy as np
import pytest

from gps_denied_c7.errors import InferenceError
from gps_denied_c7.tensors import TensorSpec, check_finite, check_outputs, is_finite


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
@pytest.mark.parametrize('place', [0, 17, -1])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, -np.nan])
def test_r1_each_non_finite_value_is_found(dtype: str, place: int, value: float) -> None:
    array = np.zeros(1000, dtype)
    array[place] = value
    assert not is_finite(array)
    with pytest.raises(InferenceError, match='1 non-finite values of 1000'):
        check_finite({'scores': array})


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_r1_large_values_are_finite(dtype: str) -> None:
    limits = np.finfo(dtype)
    values = [limits.max, limits.min, limits.tiny, -limits.tiny, limits.smallest_subnormal, 0.0, -0.0]
    array = np.array(values * 9, dtype)
    assert is_finite(array)
    assert is_finite(array[::2])
    assert is_finite(array[:0])


def test_r1_every_float16_bit_pattern_is_judged_as_numpy_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert [is_finite(every[index : index + 1]) for index in range(every.size)] == list(np.isfinite(every))


def test_r1_a_tensor_that_is_missing_or_of_another_shape_or_type_is_found() -> None:
    array = np.zeros((2, 2), np.float32)
    check_outputs([TensorSpec('scores', 'float32', (2, None))], {'scores': array})
    for spec in (TensorSpec('scores', 'float32', (4,)), TensorSpec('scores', 'float64', (2, 2))):
        with pytest.raises(InferenceError, match='expected'):
            check_outputs([spec], {'scores': array})
    with pytest.raises(InferenceError, match='points'):
        check_outputs([TensorSpec('points', 'float32', (2, 2))], {'scores': array})
