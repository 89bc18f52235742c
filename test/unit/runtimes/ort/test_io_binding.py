"""
R-1, R-3: what is bound is what runs.

GpuIo runs here on the real ONNX Runtime with memory of the host in the place of the GPU's, since only the
addresses and the order of copies are its own; HostIo is proven through the runtime's tests.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from gps_denied_c7.runtimes.gpu import nonfinite
from gps_denied_c7.runtimes.gpu.cuda import CudaError
from gps_denied_c7.runtimes.gpu.nonfinite import FiniteCheck
from gps_denied_c7.runtimes.ort import io_binding
from gps_denied_c7.runtimes.ort.io_binding import GpuIo, HostIo
from gps_denied_c7.tensors import TensorSpec
from support.onnx_models import OUTPUTS, SHAPE, arithmetic, model_of


class HostMemoryInsteadOfCuda:
    """Do what Cuda does, in the memory of the host; copies wait for a synchronisation, as they may on a GPU."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.freed: list[int] = []
        self.locked: list[int] = []
        self.calls: list[str] = []
        self.queue: list[Callable[[], None]] = []
        self.fails: str | None = None

    def new_stream(self) -> str:
        self.calls.append('stream')
        return 'stream'

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray:
        return np.zeros(shape, dtype)

    def device_memory(self, size: int) -> int:
        if self.fails == 'memory':
            raise CudaError('cudaMalloc', 'cudaErrorMemoryAllocation', 'out of memory')
        block = (ctypes.c_uint8 * max(16, size))()
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def lock_pages(self, array: NDArray) -> None:
        if self.fails == 'locking':
            raise CudaError('cudaHostRegister', 'cudaErrorNotSupported', 'read-only memory')
        self.locked.append(array.ctypes.data)

    def copy_to_device(self, address: int, array: NDArray, stream: Any) -> Callable[[], None]:
        return lambda: self.queue.append(lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))

    def copy_to_host(self, array: NDArray, address: int, stream: Any) -> Callable[[], None]:
        return lambda: self.queue.append(lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))

    def call(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        if name == 'cudaStreamSynchronize':
            pending, self.queue = self.queue, []
            for work in pending:
                work()

    def try_call(self, name: str, *arguments: Any) -> None:
        self.call(name, *arguments)
        if name == 'cudaFree':
            self.freed.append(arguments[0])
        elif name == 'cudaHostUnregister':
            self.locked.remove(arguments[0])


class CheckOnTheHost(FiniteCheck):
    """Do what FiniteCheck does, with NumPy."""

    found = False
    released = 0
    blind = False

    def __init__(self, cuda: HostMemoryInsteadOfCuda, checks: list[tuple[int, int, str]], stream: Any) -> None:
        self._cuda, self._checks = cuda, checks
        self.found = False

    def reset(self) -> None:
        self.found = False

    def enqueue(self) -> None:
        self._cuda.queue.append(self._look)

    def _look(self) -> None:
        for address, size, dtype in self._checks:
            values = np.frombuffer(ctypes.string_at(address, size), dtype)
            self.found |= not self.blind and not bool(np.isfinite(values).all())

    def release(self) -> None:
        type(self).released += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> HostMemoryInsteadOfCuda:
    monkeypatch.setattr(io_binding, '_GPU', ('cpu', 0))
    monkeypatch.setattr(nonfinite, 'FiniteCheck', CheckOnTheHost)
    monkeypatch.setattr(CheckOnTheHost, 'released', 0)
    return HostMemoryInsteadOfCuda()


def session_on(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])


def requests() -> list[dict[str, NDArray]]:
    return [
        {'left': np.full(SHAPE, value, np.float32), 'right': np.full(SHAPE, 2.0, np.float32)} for value in (1, 5, -3)
    ]


def test_r3_gpu_memory_carries_each_request_in_and_out(cuda: HostMemoryInsteadOfCuda) -> None:
    io = GpuIo(cuda, session_on(arithmetic()), OUTPUTS, [spec.name for spec in OUTPUTS])
    assert io.notes == []
    for request in requests():
        outputs = io.run(request)
        np.testing.assert_array_equal(outputs['total'], request['left'] + request['right'])
        np.testing.assert_array_equal(outputs['ratio'], request['left'] / request['right'])
        assert io.seen_finite


def test_r3_gpu_addresses_and_arrays_stay(cuda: HostMemoryInsteadOfCuda) -> None:
    io = GpuIo(cuda, session_on(arithmetic()), OUTPUTS, [spec.name for spec in OUTPUTS])
    first = io.run(requests()[0])
    made = set(cuda.blocks)
    second = io.run(requests()[1])
    assert set(cuda.blocks) == made
    assert len(made) == 4
    assert all(first[name] is second[name] for name in first)


def test_r3_gpu_sees_what_is_not_finite_and_forgets_it(cuda: HostMemoryInsteadOfCuda) -> None:
    io = GpuIo(cuda, session_on(arithmetic()), OUTPUTS, [spec.name for spec in OUTPUTS])
    good = requests()[0]
    io.run({**good, 'right': np.zeros(SHAPE, np.float32)})
    assert not io.seen_finite
    io.run(good)
    assert io.seen_finite


def test_r3_gpu_check_that_misses_a_nan_is_not_used(
    cuda: HostMemoryInsteadOfCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckOnTheHost, 'blind', True)
    io = GpuIo(cuda, session_on(arithmetic()), OUTPUTS, [spec.name for spec in OUTPUTS])
    assert 'since the GPU cannot' in io.notes[0]
    assert CheckOnTheHost.released == 1
    io.run(requests()[0])
    assert not io.seen_finite


def test_r3_gpu_does_not_vouch_for_a_run_that_failed(cuda: HostMemoryInsteadOfCuda) -> None:
    session = session_on(arithmetic())

    class Failing:
        def io_binding(self) -> Any:
            return session.io_binding()

        def run_with_iobinding(self, binding: Any) -> None:
            if self.fail:
                raise RuntimeError('CUDA error 700')
            session.run_with_iobinding(binding)

        fail = False

    failing = Failing()
    io = GpuIo(cuda, failing, OUTPUTS, [spec.name for spec in OUTPUTS])
    io.run(requests()[0])
    failing.fail = True
    with pytest.raises(RuntimeError, match='700'):
        io.run(requests()[1])
    assert not io.seen_finite


def test_r3_gpu_memory_is_given_back_once(cuda: HostMemoryInsteadOfCuda) -> None:
    io = GpuIo(cuda, session_on(arithmetic()), OUTPUTS, [spec.name for spec in OUTPUTS])
    io.run(requests()[0])
    io.release()
    io.release()
    assert sorted(cuda.freed) == sorted(cuda.blocks)
    assert cuda.calls.count('cudaStreamDestroy') == 1
    assert CheckOnTheHost.released == 1


def test_r3_gpu_without_memory_leaves_nothing_behind(cuda: HostMemoryInsteadOfCuda) -> None:
    cuda.fails = 'memory'
    with pytest.raises(CudaError):
        GpuIo(cuda, session_on(arithmetic()), OUTPUTS, [spec.name for spec in OUTPUTS])
    assert cuda.calls.count('cudaStreamDestroy') == 1
    assert sorted(cuda.freed) == sorted(cuda.blocks)


def points_and_negative() -> tuple[onnx.ModelProto, tuple[TensorSpec, ...]]:
    value = helper.make_tensor_value_info
    model = model_of(
        [helper.make_node('NonZero', ['x'], ['points']), helper.make_node('Neg', ['x'], ['negative'])],
        [value('x', TensorProto.FLOAT, [3, 4])],
        [value('points', TensorProto.INT64, [2, 'count']), value('negative', TensorProto.FLOAT, [3, 4])],
    )
    return model, (TensorSpec('points', 'int64', (2, None)), TensorSpec('negative', 'float32', (3, 4)))


@pytest.mark.parametrize('kind', ['gpu', 'host'])
def test_r3_sizes_that_depend_on_the_data_follow_it(cuda: HostMemoryInsteadOfCuda, kind: str) -> None:
    model, outputs = points_and_negative()
    session = session_on(model)
    names = [spec.name for spec in outputs]
    io = GpuIo(cuda, session, outputs, names) if kind == 'gpu' else HostIo(onnxruntime, session, outputs)
    for count in (3, 0, 12, 1):
        x = np.zeros((3, 4), np.float32)
        x.reshape(-1)[:count] = 1
        found = io.run({'x': x})
        assert found['points'].shape == (2, count)
        np.testing.assert_array_equal(found['negative'], -x)
        # The GPU cannot look at what has no place of its own: the processor does.
        assert not io.seen_finite


def test_f1_an_array_that_is_filled_again_is_run_as_it_is_now() -> None:
    """F-1: bound once, as long as it is the same one in the same shape."""
    value = helper.make_tensor_value_info
    model = model_of(
        [helper.make_node('Neg', ['x'], ['y'])],
        [value('x', TensorProto.FLOAT, ['rows', 'columns'])],
        [value('y', TensorProto.FLOAT, ['rows', 'columns'])],
    )
    io = HostIo(onnxruntime, session_on(model), (TensorSpec('y', 'float32', (None, None)),))
    x = np.zeros((3, 4), np.float32)
    for number in (1, 2):
        x[...] = number
        np.testing.assert_array_equal(io.run({'x': x})['y'], -x)
    x.shape = (4, 3)
    assert io.run({'x': x})['y'].shape == (4, 3)
    other = np.ones((2, 2), np.float32)
    np.testing.assert_array_equal(io.run({'x': other})['y'], -other)
    np.testing.assert_array_equal(io.run({'x': x})['y'], -x)
    io.release()


def test_f1_answers_are_written_where_the_caller_wants_them() -> None:
    """F-1: into memory of the caller's where it fits; what does not fit, or has no fixed size, stays where it was."""
    model, outputs = points_and_negative()
    io = HostIo(onnxruntime, session_on(model), outputs)
    place = np.full((3, 4), 7, np.float32)
    io.place({'negative': place, 'points': np.zeros((2, 3), np.int64), 'nothing': place})
    for number in (1, 2):
        x = np.full((3, 4), number, np.float32)
        found = io.run({'x': x})
        assert found['negative'] is place
        np.testing.assert_array_equal(place, -x)
        assert found['points'].shape == (2, 12)
    for misfit in (np.zeros((4, 3), np.float32), np.zeros((3, 4), np.float64)):
        io.place({'negative': misfit})
        assert io.run({'x': x})['negative'] is place
    io.release()


def test_f1_what_is_placed_is_copied_from_and_to(cuda: HostMemoryInsteadOfCuda) -> None:
    """R-3: with its pages locked; a request in other arrays is copied there first, and a misfit changes nothing."""
    io = GpuIo(cuda, session_on(arithmetic()), OUTPUTS, [spec.name for spec in OUTPUTS])
    request = requests()[0]
    own = io.run(request)['ratio']
    for _ in range(2):
        total, left = np.full(SHAPE, 7, np.float32), np.full(SHAPE, 4, np.float32)
        left.flags.writeable = False
        io.place({'total': total, 'left': left, 'ratio': np.zeros((4, 3), np.float32), 'nothing': total})
        assert sorted(cuda.locked) == sorted([total.ctypes.data, left.ctypes.data])
        answer = io.run({'left': left, 'right': request['right']})
        assert answer['total'] is total and answer['ratio'] is own
        np.testing.assert_array_equal(total, np.full(SHAPE, 6))
    assert io.run(request)['total'] is total
    np.testing.assert_array_equal(total, request['left'] + request['right'])
    assert (left == 4).all() and cuda.locked == [total.ctypes.data], 'requests come elsewhere now'
    cuda.fails = 'locking'
    io.place({'total': np.zeros(SHAPE, np.float32)})
    assert io.run({'left': left, 'right': left})['total'] is total
    np.testing.assert_array_equal(total, np.full(SHAPE, 8))
    io.release()
    assert not cuda.locked


@pytest.mark.parametrize('shape', [(), (1,), (0, 3), (2, 3)])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64', 'bool', 'uint8', 'int64'])
def test_r3_gpu_tensors_of_any_shape_and_type_round_trip(
    cuda: HostMemoryInsteadOfCuda, dtype: str, shape: tuple[int, ...]
) -> None:
    value = helper.make_tensor_value_info
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = model_of([helper.make_node('Identity', ['x'], ['y'])], [value('x', kind, shape)], [value('y', kind, shape)])
    io = GpuIo(cuda, session_on(model), (TensorSpec('y', dtype, shape),), ['y'])
    for number in (1, 0, 1):
        x = np.full(shape, number, dtype)
        np.testing.assert_array_equal(io.run({'x': x})['y'], x)


def test_r3_copies_that_onnx_runtime_has_queued_end_before_each_run_and_after_it(
    cuda: HostMemoryInsteadOfCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Binding an input that the CPU reads, and a run whose outputs the CPU makes, queue copies and return."""
    bind, run = onnxruntime.IOBinding.bind_input, onnxruntime.InferenceSession.run_with_iobinding
    monkeypatch.setattr(onnxruntime.IOBinding, 'bind_input', lambda *given: (cuda.calls.append('bind'), bind(*given)))
    monkeypatch.setattr(
        onnxruntime.InferenceSession, 'run_with_iobinding', lambda *given: (cuda.calls.append('run'), run(*given))
    )
    io = GpuIo(cuda, session_on(arithmetic()), OUTPUTS, [spec.name for spec in OUTPUTS])
    for request in requests():
        cuda.calls.clear()
        io.run(request)
        order = [call for call in cuda.calls if call in ('bind', 'run', 'cudaDeviceSynchronize')]
        assert order == ['bind', 'bind', 'cudaDeviceSynchronize', 'run', 'cudaDeviceSynchronize']
    io.release()
