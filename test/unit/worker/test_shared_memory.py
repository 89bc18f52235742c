"""F-1: sealed segments whose tensors two processes see; what a worker says of them is checked."""

import mmap
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7._json import FieldError, reader_of
from gps_denied_c7.errors import InferenceError
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout

ARRAYS = {
    'scores': np.arange(6, dtype=np.float32).reshape(1, 6),
    'none': np.zeros((0, 4), np.float16),
    'valid': np.array(True),
    'index': np.arange(7, dtype=np.int64),
}


def test_what_one_mapping_writes_the_other_reads():
    layout = TensorLayout.of(ARRAYS)
    written = SharedTensors.create(layout.size, writable=True)
    read = SharedTensors(os.dup(written.descriptor), writable=False)
    for name, array in written.arrays(layout).items():
        array[...] = ARRAYS[name]
    for name, array in read.arrays(layout).items():
        assert array.dtype == ARRAYS[name].dtype and (array == ARRAYS[name]).all()
        assert not array.flags.writeable and array.ctypes.data % mmap.PAGESIZE == 0


def test_a_view_outlives_its_segment():
    layout = TensorLayout.of(ARRAYS)
    segment = SharedTensors.create(layout.size, writable=True)
    view = segment.arrays(layout)['index']
    view[...] = 3
    segment.close()
    segment.close()
    assert (view == 3).all()


def test_nobody_can_shrink_a_segment():
    """An access to memory that has gone would end the process with SIGBUS."""
    segment = SharedTensors.create(4096, writable=True)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.descriptor, size)


def test_a_segment_that_is_not_sealed_is_refused():
    descriptor = os.memfd_create('loose', os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    with pytest.raises(InferenceError, match='not sealed'):
        SharedTensors(descriptor, writable=False)
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_a_tensor_outside_of_its_segment_is_refused():
    segment = SharedTensors.create(64, writable=False)
    for tensor in (('x', 'float32', (17,), 0), ('x', 'uint8', (1,), 64), ('x', 'float64', (1 << 59,), 0)):
        layout = TensorLayout((tensor,))
        layout.check()
        with pytest.raises(InferenceError, match='reaches past'):
            segment.arrays(layout)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=12,
    )
    | st.lists(
        st.tuples(st.text(max_size=3), st.sampled_from(['float32', 'object', 'V8', 'U4', '?', 'x']),
                  st.lists(st.integers(-2, 9), max_size=3), st.integers(-9, 99)).map(list),
        max_size=3,
    )
)  # fmt: skip
def test_whatever_a_worker_says_of_its_tensors_is_a_layout_or_an_error(told):
    segment = SharedTensors.create(64, writable=False)
    try:
        views = segment.arrays(reader_of(TensorLayout, arrays=True)([told]))
    except (FieldError, InferenceError):
        return
    finally:
        segment.close()
    assert all(view.nbytes <= 64 for view in views.values())


@pytest.mark.parametrize('shape', [[1] * 65, [1] * 1000, [0, 1 << 63], [0, 1 << 62, 1 << 62], [0, 10**40]])
def test_a_shape_that_numpy_cannot_have_is_an_error(shape):
    segment = SharedTensors.create(64, writable=False)
    with pytest.raises(InferenceError):
        TensorLayout((('x', 'float32', tuple(shape), 0),)).check()
    segment.close()
