"""F-2: what loses the GPU, and what gives it back."""

from __future__ import annotations

import pytest

from gps_denied_c7.failover.gpu_health import GpuHealth


@pytest.fixture
def gpu(clock):
    return GpuHealth(10.0, clock)


def test_f2_two_rungs_in_the_window_lose_it(gpu, clock):
    assert not gpu.note_fault('tensorrt')
    clock.ns = 10_000_000_000
    assert gpu.note_fault('onnx')
    assert gpu.lost


@pytest.mark.parametrize(('second', 'at_s'), [('tensorrt', 1.0), ('onnx', 10.1)])
def test_f2_one_rung_twice_or_two_far_apart_do_not(gpu, clock, second, at_s):
    gpu.note_fault('tensorrt')
    clock.ns = int(at_s * 1e9)
    assert not gpu.note_fault(second)
    assert not gpu.lost


def test_f2_found_again_its_faults_are_forgotten(gpu):
    gpu.note_fault('tensorrt')
    gpu.mark_lost('a worker cannot be ended')
    gpu.restore()
    assert not gpu.lost and not gpu.note_fault('onnx')


def test_what_a_request_cost_can_be_taken_back(gpu):
    gpu.note_fault('tensorrt')
    take_back = gpu.snapshot()
    assert gpu.note_fault('onnx')
    take_back()
    assert not gpu.lost
    assert gpu.note_fault('pytorch'), 'what was noted before still counts'
