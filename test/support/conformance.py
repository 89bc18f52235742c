"""
R-1: what every strategy must do, as tests over a fixture ``subject``.

A new strategy joins with one line in ARTEFACTS: how its file for ``total = left + right``,
``ratio = left / right`` is made. A test module gives the fixtures ``subject``, ``config`` and ``request_arrays`` and
takes the tests with ``globals().update(suite())``.
"""

from __future__ import annotations

import atexit
import functools
import gc
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gps_denied_c7.config import RUNTIME_LABELS, C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.manifest import manifest_path
from gps_denied_c7.errors import (
    C7Error,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    InferenceError,
    RuntimeUnavailableError,
)
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import ThermalLevel, ThermalState
from gps_denied_c7.runtimes.base import BaseRuntime
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineCacheEntry, EngineHandle, InferenceRuntime
from gps_denied_c7.runtimes.registry import create_runtime
from gps_denied_c7.runtimes.trt.build import build_engine
from gps_denied_c7.tensors import TensorSpec
from support.onnx_models import INPUTS, OUTPUTS, SHAPE, arithmetic, bare_bundle, write_model
from support.shared_arrays import shared
from support.torch_models import write_program

ARTEFACTS: dict[str, Callable[[Path], Path]] = {
    'onnx_trt_ep': lambda directory: write_model(directory / 'arithmetic.onnx', arithmetic()),
    'pytorch_fp16': lambda directory: write_program(directory / 'arithmetic.pt2'),
    'tensorrt': lambda directory: write_engine(directory),
}

# Those that write an answer where it was placed on any machine.
PLACING = ('CPUExecutionProvider',)

THERMAL = ThermalState(ThermalLevel.NOMINAL, source='test', age_s=0.5, temperatures_c={'tj': 61.0})


class FixedThermal:
    def thermal_state(self) -> ThermalState:
        return THERMAL


@dataclass(frozen=True)
class Subject:
    """The strategy under test."""

    runtime: InferenceRuntime
    model: ModelBundle

    def load(self) -> EngineHandle:
        return self.runtime.deserialize_engine(self.runtime.compile_engine(self.model, BuildConfig()))


def absence(label: str) -> str | None:
    try:
        create_runtime(label, C7InferenceConfig())
        if label == 'tensorrt':
            local_host_profile()
    except RuntimeUnavailableError as error:
        return str(error)
    return None


def runtime_of(label: str, config: C7InferenceConfig) -> InferenceRuntime:
    gate = EngineGate(local_host_profile()) if label == 'tensorrt' else None
    return create_runtime(label, config, thermal=FixedThermal(), gate=gate)


@functools.cache
def built_engine() -> Path:
    """Build the engine once for all tests; the directory lasts as long as the interpreter."""
    directory = Path(tempfile.mkdtemp(prefix='c7-conformance-'))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    config = C7InferenceConfig(engine_cache_dir=directory / 'engines', ort_trt_cache_dir=directory / 'ort')
    return build_engine(bare_bundle(directory), config, BuildConfig(allow_build=True, precision='fp32')).path


def write_engine(directory: Path) -> Path:
    for file in (built_engine(), manifest_path(built_engine())):
        shutil.copy(file, directory)
    return directory / built_engine().name


def suite(without: Container[str] = ()) -> dict[str, Callable[..., None]]:
    """Return the tests of this module by name, except those named in ``without``."""
    return {
        name: test for name, test in globals().items()
        if name.startswith('test_') and name not in without
    }


def test_ac1_conforms_to_the_protocol_under_its_label(subject: Subject) -> None:
    assert isinstance(subject.runtime, InferenceRuntime)
    assert subject.runtime.current_runtime_label() in RUNTIME_LABELS


def test_r1_thermal_state_is_the_injected_publishers(subject: Subject) -> None:
    assert subject.runtime.thermal_state() is THERMAL


def test_r1_compile_returns_the_bundles_artefact(subject: Subject) -> None:
    artefact = subject.model.artefacts[0]
    entry = subject.runtime.compile_engine(subject.model, BuildConfig(precision='fp32'))
    assert (entry.path, entry.sha256, entry.build.precision) == (artefact.path, artefact.sha256, 'fp32')


def test_r1_bundle_without_an_artefact_is_refused(subject: Subject) -> None:
    with pytest.raises(RuntimeUnavailableError) as caught:
        subject.runtime.compile_engine(replace(subject.model, artefacts=()), BuildConfig())
    assert caught.value.remedy


def test_r1_handle_describes_the_engine(subject: Subject) -> None:
    handle = subject.load()
    assert handle.inputs == INPUTS
    assert handle.outputs == OUTPUTS
    assert handle.facts.active_provider
    assert handle.facts.load_s > 0


def test_r1_infer_answers_by_canonical_name(subject: Subject, request_arrays: dict[str, NDArray]) -> None:
    outputs = subject.runtime.infer(subject.load(), request_arrays)
    assert list(outputs) == ['total', 'ratio']
    np.testing.assert_allclose(outputs['total'], request_arrays['left'] + request_arrays['right'])
    np.testing.assert_allclose(outputs['ratio'], request_arrays['left'] / request_arrays['right'])


def test_r1_a_handle_tells_when_its_engine_ran(subject: Subject, request_arrays: dict[str, NDArray]) -> None:
    handle, asked_ns = subject.load(), time.monotonic_ns()
    for _ in range(2):
        subject.runtime.infer(handle, request_arrays)
        began_ns, ended_ns = handle.ran_ns
        assert asked_ns < began_ns < ended_ns < time.monotonic_ns()
        asked_ns = ended_ns


def test_r1_outputs_are_read_only(subject: Subject, request_arrays: dict[str, NDArray]) -> None:
    for array in subject.runtime.infer(subject.load(), request_arrays).values():
        with pytest.raises(ValueError, match='read-only'):
            array[...] = 0


def test_r1_inputs_are_only_read(subject: Subject, request_arrays: dict[str, NDArray]) -> None:
    before = {name: array.copy() for name, array in request_arrays.items()}
    for array in request_arrays.values():
        array.flags.writeable = False
    subject.runtime.infer(subject.load(), request_arrays)
    for name, array in request_arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_r1_strided_inputs_are_read_right(subject: Subject, request_arrays: dict[str, NDArray]) -> None:
    handle = subject.load()
    plain = {name: array.copy() for name, array in subject.runtime.infer(handle, request_arrays).items()}
    strided = {name: np.asfortranarray(array) for name, array in request_arrays.items()}
    assert not strided['left'].flags.c_contiguous
    for name, array in subject.runtime.infer(handle, strided).items():
        np.testing.assert_array_equal(array, plain[name])


def test_f1_arrays_that_were_placed_are_answered_as_others(
    subject: Subject, request_arrays: dict[str, NDArray]
) -> None:
    """F-1: the memory of two processes, read-only on the way in; requests in other arrays go on being answered."""
    runtime, handle = subject.runtime, subject.load()
    assert isinstance(runtime, BaseRuntime)
    own, request = shared(request_arrays, writable=False)
    seen, answer = shared({spec.name: np.zeros(spec.shape, spec.dtype) for spec in OUTPUTS}, writable=True)
    runtime.infer(handle, request)
    runtime.place(handle, inputs=request)
    runtime.place(handle, outputs=answer)
    for number in (3.0, 5.0):
        own['left'][...] = number
        outputs = runtime.infer(handle, request)
        np.testing.assert_allclose(outputs['total'], number + own['right'])
        # Whether an answer comes to be where it was placed is the driver's to say, where it has to lock the pages.
        if np.shares_memory(outputs['total'], answer['total']) or handle.facts.active_provider in PLACING:
            np.testing.assert_allclose(seen['total'], number + own['right'])
        elsewhere = runtime.infer(handle, request_arrays)
        np.testing.assert_allclose(elsewhere['ratio'], request_arrays['left'] / request_arrays['right'])
    runtime.release_engine(handle)


def test_r1_engines_do_not_disturb_each_other(subject: Subject, request_arrays: dict[str, NDArray]) -> None:
    first, second = subject.load(), subject.load()
    kept = subject.runtime.infer(first, request_arrays)
    subject.runtime.infer(second, {name: array + 1 for name, array in request_arrays.items()})
    np.testing.assert_allclose(kept['total'], request_arrays['left'] + request_arrays['right'])
    subject.runtime.release_engine(second)
    np.testing.assert_allclose(
        subject.runtime.infer(first, request_arrays)['total'], request_arrays['left'] + request_arrays['right']
    )


def test_r1_one_thread_per_handle(subject: Subject) -> None:
    wrong: list[object] = []

    def serve(handle: EngineHandle, value: float) -> None:
        arrays = {spec.name: np.full(SHAPE, value, np.float32) for spec in INPUTS}
        for _ in range(200):
            total = subject.runtime.infer(handle, arrays)['total']
            if not (total == 2 * value).all():
                wrong.append(total)

    threads = [threading.Thread(target=serve, args=(subject.load(), float(value))) for value in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ac7_release_twice_is_safe(subject: Subject, request_arrays: dict[str, NDArray]) -> None:
    handle, other = subject.load(), subject.load()
    subject.runtime.release_engine(handle)
    subject.runtime.release_engine(handle)
    with pytest.raises(InferenceError) as caught:
        subject.runtime.infer(handle, request_arrays)
    assert caught.value.remedy
    assert subject.runtime.infer(other, request_arrays)


def test_r1_foreign_handle_is_refused_and_its_release_ignored(
    subject: Subject, config: C7InferenceConfig, request_arrays: dict[str, NDArray]
) -> None:
    handle = subject.load()
    other = runtime_of(subject.runtime.current_runtime_label(), config)
    Subject(other, subject.model).load()
    for foreign in (handle, object(), None, [], {}):
        other.release_engine(foreign)
        with pytest.raises(InferenceError):
            other.infer(foreign, request_arrays)
    assert subject.runtime.infer(handle, request_arrays)


@pytest.mark.parametrize(
    ('change', 'names'),
    [
        ({'left': None}, 'left'),
        ({'middle': np.zeros(SHAPE, np.float32)}, 'middle'),
        ({'left': np.zeros(SHAPE, np.float64)}, 'float64'),
        ({'left': np.zeros(SHAPE, '>f4')}, 'f4'),
        ({'left': np.zeros((2, 3, 4), np.float32)}, '(2, 3, 4)'),
        ({'left': np.zeros((3, 4), np.float32)}, '(3, 4)'),
        ({'left': [[[0.0] * 4] * 3]}, 'list'),
    ],
)
def test_r1_unfit_input_is_an_inference_error(
    subject: Subject, request_arrays: dict[str, NDArray], change: dict[str, object], names: str
) -> None:
    handle = subject.load()
    arrays = {name: value for name, value in {**request_arrays, **change}.items() if value is not None}
    with pytest.raises(InferenceError) as caught:
        subject.runtime.infer(handle, arrays)
    assert names in str(caught.value)
    assert subject.runtime.infer(handle, request_arrays)


@pytest.mark.parametrize('value', [0.0, np.nan])
def test_r1_non_finite_output_is_an_inference_error(
    subject: Subject, request_arrays: dict[str, NDArray], value: float
) -> None:
    handle = subject.load()
    with pytest.raises(InferenceError, match='non-finite'):
        subject.runtime.infer(handle, {**request_arrays, 'right': np.full(SHAPE, value, np.float32)})
    assert subject.runtime.infer(handle, request_arrays)


@pytest.mark.parametrize(
    'wrong',
    [
        {'outputs': (OUTPUTS[0], TensorSpec('ratio', 'float32', (1, 4, 3)))},
        {'outputs': (OUTPUTS[0], TensorSpec('ratio', 'float16', SHAPE))},
        {'outputs': (*OUTPUTS, TensorSpec('scores', 'float32', SHAPE))},
        {'inputs': INPUTS[:1]},
        {'inputs': (INPUTS[0], TensorSpec('right', 'float32', (1, 3, 4, 1)))},
        {'inputs': (INPUTS[0], TensorSpec('right', 'uint8', SHAPE))},
    ],
)
def test_m1_engine_that_contradicts_the_bundle_is_refused(subject: Subject, wrong: dict[str, object]) -> None:
    with pytest.raises(EngineSchemaMismatchError) as caught:
        Subject(subject.runtime, replace(subject.model, **wrong)).load()
    assert caught.value.remedy


def damage(kind: str, path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    if kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'truncated':
        path.write_bytes(content[: len(content) // 2])
    elif kind == 'junk':
        path.write_bytes(bytes(range(256)) * 8)
    elif kind == 'directory':
        path.mkdir()
    elif kind == 'dangling link':
        path.symlink_to(path.parent / 'nowhere')


@pytest.mark.parametrize('kind', ['missing', 'empty', 'truncated', 'junk', 'directory', 'dangling link'])
@pytest.mark.parametrize('promised', [True, False])
def test_r1_hostile_file_is_a_typed_error_with_a_remedy(subject: Subject, kind: str, promised: bool) -> None:
    entry = subject.runtime.compile_engine(subject.model, BuildConfig())
    damage(kind, entry.path)
    if not promised:
        entry = replace(entry, sha256=None)
    with pytest.raises((EngineDeserializeError, EngineSchemaMismatchError)) as caught:
        subject.runtime.deserialize_engine(entry)
    assert caught.value.remedy
    assert str(entry.path) in str(caught.value) or isinstance(caught.value, EngineSchemaMismatchError)


def test_r1_other_digest_is_refused(subject: Subject) -> None:
    entry = subject.runtime.compile_engine(subject.model, BuildConfig())
    with pytest.raises(EngineSchemaMismatchError) as caught:
        subject.runtime.deserialize_engine(replace(entry, sha256='0' * 64))
    assert caught.value.expected == '0' * 64
    assert caught.value.found == entry.sha256


def test_r1_file_of_no_known_kind_is_refused(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / 'model.txt'
    path.write_text('a model')
    with pytest.raises(EngineDeserializeError) as caught:
        subject.runtime.deserialize_engine(EngineCacheEntry(path, None, subject.model))
    assert caught.value.remedy


def vendor_engine(runtime: InferenceRuntime, handle: EngineHandle) -> object:
    engine = runtime._engines[handle].engine
    return getattr(engine, 'session', None) or getattr(engine, 'module', engine)


def test_r1_release_frees_the_engine_also_while_its_error_is_kept(
    subject: Subject, request_arrays: dict[str, NDArray]
) -> None:
    handle = subject.load()
    engine = weakref.ref(vendor_engine(subject.runtime, handle))
    with pytest.raises(InferenceError) as kept:
        subject.runtime.infer(handle, {**request_arrays, 'right': np.zeros(SHAPE, np.float32)})
    assert engine() is not None
    subject.runtime.release_engine(handle)
    gc.collect()
    assert isinstance(kept.value, C7Error)
    assert engine() is None
