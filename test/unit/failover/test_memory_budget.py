"""F-3: one budget for the GPU memory of all engines, and what this process takes of it."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gps_denied_c7.errors import GpuMemoryError
from gps_denied_c7.failover import memory_budget
from gps_denied_c7.failover.memory_budget import GpuMemoryBudget
from gps_denied_c7.runtimes.gpu.memory_usage import GpuMemoryWatch

MIB = 1 << 20


def test_f3_an_engine_that_has_not_been_measured_claims_a_quarter():
    budget = GpuMemoryBudget(1000 * MIB)
    first = budget.claim('tensorrt/gpu', key='a')
    assert (first.held_bytes, first.limit_bytes) == (250 * MIB, 1000 * MIB)
    second = budget.claim('onnx_trt_ep/gpu', key='b')
    assert (second.held_bytes, second.limit_bytes) == (250 * MIB, 750 * MIB)
    assert budget.held() == [('tensorrt/gpu', 250 * MIB), ('onnx_trt_ep/gpu', 250 * MIB)]


def test_f3_a_file_larger_than_that_is_the_least_that_an_engine_needs():
    budget = GpuMemoryBudget(1000 * MIB)
    assert budget.claim('tensorrt/gpu', key='a', file_bytes=600 * MIB).held_bytes == 600 * MIB
    with pytest.raises(GpuMemoryError, match='400 MiB of the 1000 MiB'):
        budget.claim('onnx_trt_ep/gpu', key='b', file_bytes=401 * MIB)


def test_f3_what_was_measured_counts_from_then_on():
    budget = GpuMemoryBudget(1000 * MIB)
    first = budget.claim('tensorrt/gpu', key='a')
    first.settle(700 * MIB)
    assert budget.held() == [('tensorrt/gpu', 700 * MIB)]
    first.release()
    first.release()
    assert budget.held() == []
    other = budget.claim('onnx_trt_ep/gpu', key='b')
    other.settle(301 * MIB)
    with pytest.raises(GpuMemoryError) as refused:
        budget.claim('tensorrt/gpu', key='a')
    assert (refused.value.needed_bytes, refused.value.left_bytes) == (700 * MIB, 699 * MIB)
    assert refused.value.lack_bytes == MIB
    assert 'beside onnx_trt_ep/gpu 301 MiB' in str(refused.value) and 'gpu_memory_budget_bytes' in str(refused.value)


def test_f3_the_most_that_an_engine_was_seen_to_take_counts():
    budget = GpuMemoryBudget(1000 * MIB)
    for measured in (500, 300):
        claim = budget.claim('tensorrt/gpu', key='a')
        claim.settle(measured * MIB)
        claim.release()
    assert budget.claim('tensorrt/gpu', key='a').held_bytes == 500 * MIB


def test_f3_an_engine_that_turns_out_too_large_is_refused_and_known_for_it():
    budget = GpuMemoryBudget(1000 * MIB)
    budget.claim('tensorrt/gpu', key='a').settle(600 * MIB)
    claim = budget.claim('onnx_trt_ep/gpu', key='b')
    with pytest.raises(GpuMemoryError, match='needs 401 MiB'):
        claim.settle(401 * MIB)
    claim.release()
    with pytest.raises(GpuMemoryError, match='needs 401 MiB'):
        budget.claim('onnx_trt_ep/gpu', key='b')


def test_f3_an_engine_whose_memory_is_not_known_holds_what_it_claimed():
    budget = GpuMemoryBudget(1000 * MIB)
    claim = budget.claim('tensorrt/gpu', key='a')
    claim.settle(None)
    assert budget.held() == [('tensorrt/gpu', 250 * MIB)]


def test_f3_a_smaller_budget_holds_for_claims_to_come():
    budget = GpuMemoryBudget(1000 * MIB)
    budget.claim('tensorrt/gpu', key='a').settle(600 * MIB)
    budget.resize(400 * MIB)
    with pytest.raises(GpuMemoryError, match='and 0 MiB of the 400 MiB'):
        budget.claim('onnx_trt_ep/gpu', key='b')


def test_f3_the_memory_of_an_engine_that_is_leaving_is_waited_for_where_that_helps():
    budget = GpuMemoryBudget(1000 * MIB)
    old = budget.claim('onnx_trt_ep/gpu', key='a')
    old.settle(700 * MIB)
    old.leave()
    assert budget.held() == [('onnx_trt_ep/gpu', 700 * MIB)], 'it is still there'
    with pytest.raises(GpuMemoryError):
        budget.claim('tensorrt/gpu', key='b', file_bytes=1001 * MIB)
    fits = budget.claim('tensorrt/gpu', key='c', file_bytes=200 * MIB)
    assert fits.limit_bytes == 300 * MIB, 'what it does not need is not waited for'
    fits.release()
    threading.Timer(0.1, old.release).start()
    waited = budget.claim('tensorrt/gpu', key='b', file_bytes=800 * MIB)
    assert budget.held() == [('tensorrt/gpu', 800 * MIB)] and waited.limit_bytes == 1000 * MIB


def test_f3_an_engine_that_does_not_leave_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(memory_budget, '_LEAVING_S', 0.05)
    budget = GpuMemoryBudget(1000 * MIB)
    stuck = budget.claim('onnx_trt_ep/gpu', key='a')
    stuck.settle(700 * MIB)
    stuck.leave()
    with pytest.raises(GpuMemoryError, match='300 MiB'):
        budget.claim('tensorrt/gpu', key='b', file_bytes=800 * MIB)


@given(st.lists(st.tuples(st.sampled_from('abc'), st.integers(1, 1200), st.booleans()), max_size=30))
def test_f3_what_is_held_never_exceeds_the_budget(steps):
    budget, claims = GpuMemoryBudget(1000), []
    for key, size, ends in steps:
        if ends and claims:
            claims.pop(0).release()
            continue
        try:
            claim = budget.claim(key, key=key, file_bytes=size // 4)
        except GpuMemoryError as refused:
            assert refused.lack_bytes > 0
            continue
        assert claim.held_bytes <= claim.limit_bytes
        try:
            claim.settle(size)
            claims.append(claim)
        except GpuMemoryError:
            claim.release()
        assert sum(held for _, held in budget.held()) <= 1000
    assert len(budget.held()) == len(claims)


# --- what is measured -----------------------------------------------------------------------------------------------


class FakeNvml:
    """Stands in for NVML, which this machine has no driver for: one GPU, and what its processes take in MiB."""

    class NVMLError(Exception):
        pass

    def __init__(self, own: int | None, everybody: int) -> None:
        self.own, self.everybody = own, everybody
        self.fails = False
        self.asked = 0

    def nvmlInit(self) -> None:
        if self.fails:
            raise self.NVMLError('Not Supported')

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        self.asked += 1
        return SimpleNamespace(used=self.everybody * MIB)

    def nvmlDeviceGetComputeRunningProcesses(self, device: int) -> list[SimpleNamespace]:
        others = SimpleNamespace(pid=1, usedGpuMemory=5000 * MIB)
        mine = [] if self.own is None else [SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.own * MIB)]
        return [others, *mine]

    def take(self, own: int | None, everybody: int) -> None:
        """Change what is taken, and wait until it has been seen."""
        self.own, self.everybody = own, everybody
        asked = self.asked
        deadline = time.monotonic() + 10
        while self.asked < asked + 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml(None, 100)
    monkeypatch.setitem(sys.modules, 'pynvml', fake)
    return fake


def test_f3_the_peak_of_this_process_is_told_and_what_it_ends_with(nvml):
    with GpuMemoryWatch() as watch:
        nvml.take(900, 1000)
        nvml.take(300, 2000)
    assert (watch.peak_bytes, watch.final_bytes) == (900 * MIB, 300 * MIB)


def test_f3_where_processes_are_hidden_the_gpu_as_a_whole_tells(nvml):
    with GpuMemoryWatch() as watch:
        nvml.take(None, 700)
        nvml.take(None, 400)
    assert (watch.peak_bytes, watch.final_bytes) == (600 * MIB, 300 * MIB)


def test_f3_without_nvml_and_cuda_nothing_is_made_up(nvml):
    nvml.fails = True
    with GpuMemoryWatch() as watch:
        pass
    assert watch.peak_bytes is None and watch.final_bytes is None


def test_f3_nvml_that_fails_meanwhile_costs_the_figure_and_no_engine(nvml, caplog):
    with GpuMemoryWatch() as watch:
        nvml.nvmlDeviceGetMemoryInfo = lambda device: (_ for _ in ()).throw(nvml.NVMLError('GPU is lost'))
    assert watch.final_bytes is None
    assert 'GPU is lost' in caplog.text
