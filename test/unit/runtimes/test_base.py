"""R-1: what every backend gets from BaseRuntime, seen through a backend that is NumPy alone."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import EngineDeserializeError, EngineSchemaMismatchError, InferenceError
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import ThermalLevel
from gps_denied_c7.runtimes.base import BaseRuntime, LoadedEngine
from gps_denied_c7.runtimes.protocol import EngineCacheEntry, EngineFacts
from gps_denied_c7.tensors import TensorSpec

INPUTS = (
    TensorSpec('image', 'uint8', (1, 4, 5)),
    TensorSpec('gain', 'float16', (1,)),
    TensorSpec('index', 'int64', (2,)),
    TensorSpec('threshold', 'float32', ()),
)
OUTPUTS = (TensorSpec('scaled', 'float32', (1, 4, 5)),)


class Engine:
    """What a vendor library would hand out; a plain object that can be watched being freed."""


class NumpyRuntime(BaseRuntime[Engine]):
    label = 'onnx_trt_ep'

    def __init__(self, config: C7InferenceConfig) -> None:
        super().__init__(config)
        self.seen: list[dict[str, NDArray]] = []
        self.freed: list[int] = []
        self.engine: weakref.ref[Engine] | None = None
        self.load_error: Exception | None = None
        self.free_error: Exception | None = None
        self.answer: Mapping[str, NDArray] = {'scaled': np.zeros((1, 4, 5), np.float32)}
        self.inputs = INPUTS

    def _choose(self, artefacts: Sequence[Artefact]) -> Artefact | None:
        return next(iter(artefacts), None)

    def _load(self, entry: EngineCacheEntry) -> LoadedEngine[Engine]:
        engine = Engine()
        self.engine = weakref.ref(engine)
        if self.load_error is not None:
            raise self.load_error
        facts = EngineFacts('NumPy', ('NumPy',), True, None, (), 0.0)
        return LoadedEngine(engine, self.inputs, OUTPUTS, facts)

    def _run(self, engine: Engine, inputs: Mapping[str, NDArray]) -> Mapping[str, NDArray]:
        self.seen.append(dict(inputs))
        return self.answer

    def _free(self, engine: Engine) -> None:
        self.freed.append(id(engine))
        if self.free_error is not None:
            raise self.free_error


@pytest.fixture
def runtime(config: C7InferenceConfig) -> NumpyRuntime:
    return NumpyRuntime(config)


@pytest.fixture
def entry(tmp_path: Path) -> EngineCacheEntry:
    model = ModelBundle(name='scale', root=tmp_path, weights_digest=f'sha256:{"0" * 64}')
    return EngineCacheEntry(tmp_path / 'scale.engine', None, model)


REQUEST = {
    'image': np.arange(20, dtype=np.uint8).reshape(1, 4, 5),
    'gain': np.ones(1, np.float16),
    'index': np.zeros(2, np.int64),
    'threshold': np.array(0.5, np.float32),
}


def test_r1_thermal_state_without_a_publisher_is_unknown(runtime: NumpyRuntime) -> None:
    assert runtime.thermal_state().level is ThermalLevel.UNKNOWN


def test_r1_warm_up_is_noise_that_divides_and_indices_that_exist(
    runtime: NumpyRuntime, entry: EngineCacheEntry
) -> None:
    runtime.deserialize_engine(entry)
    (warm_up,) = runtime.seen
    assert {name: (array.dtype, array.shape) for name, array in warm_up.items()} == {
        spec.name: (np.dtype(spec.dtype), spec.shape) for spec in INPUTS
    }
    assert np.ptp(warm_up['image']) > 0
    assert 0 < warm_up['gain'] <= 1
    assert not warm_up['index'].any()


def test_r1_backend_sees_c_contiguous_arrays_of_unchanged_shape(runtime: NumpyRuntime, entry: EngineCacheEntry) -> None:
    handle = runtime.deserialize_engine(entry)
    strided = np.empty((1, 5, 4), np.uint8).transpose(0, 2, 1)
    strided[...] = REQUEST['image']
    runtime.infer(handle, {**REQUEST, 'image': strided})
    assert all(array.flags.c_contiguous for array in runtime.seen[-1].values())
    np.testing.assert_array_equal(runtime.seen[-1]['image'], REQUEST['image'])
    assert runtime.seen[-1]['threshold'].shape == ()


def test_r1_contiguous_inputs_are_not_copied(runtime: NumpyRuntime, entry: EngineCacheEntry) -> None:
    runtime.infer(runtime.deserialize_engine(entry), REQUEST)
    assert all(runtime.seen[-1][name] is array for name, array in REQUEST.items())


def test_r1_what_was_run_before_is_known_only_as_long_as_it_is_the_same(
    runtime: NumpyRuntime, entry: EngineCacheEntry
) -> None:
    handle = runtime.deserialize_engine(entry)
    request = {name: array.copy() for name, array in REQUEST.items()}
    for _ in range(2):
        # After a request that was refused, nothing is known.
        with pytest.raises(InferenceError):
            runtime.infer(handle, {})
    for number in (1, 2):
        request['image'][...] = number
        runtime.infer(handle, request)
        assert runtime.seen[-1]['image'] is request['image']
    wrong = {
        'another shape': {**request, 'image': np.zeros((1, 5, 4), np.uint8)},
        'another type': {**request, 'gain': np.ones(1, np.float32)},
        'no array': {**request, 'gain': [1.0]},
        'one more': {**request, 'bias': np.ones(1)},
        'one less': {name: array for name, array in request.items() if name != 'gain'},
        'another name': {('bias' if name == 'gain' else name): array for name, array in request.items()},
    }
    for what, inputs in wrong.items():
        with pytest.raises(InferenceError):
            runtime.infer(handle, inputs)
        runtime.infer(handle, request)
        assert runtime.seen[-1]['gain'] is request['gain'], what
    request['image'].shape = (1, 5, 4)
    with pytest.raises(InferenceError):
        runtime.infer(handle, request)
    request['image'].shape = (1, 4, 5)
    runtime.infer(handle, request)
    request['image'].dtype = np.int8
    with pytest.raises(InferenceError):
        runtime.infer(handle, request)


def test_r1_release_frees_once(runtime: NumpyRuntime, entry: EngineCacheEntry) -> None:
    handle = runtime.deserialize_engine(entry)
    for _ in range(2):
        runtime.release_engine(handle)
    assert len(runtime.freed) == 1


def test_r1_failing_destructor_is_logged_and_does_not_reach_the_caller(
    runtime: NumpyRuntime, entry: EngineCacheEntry, caplog: pytest.LogCaptureFixture
) -> None:
    handle = runtime.deserialize_engine(entry)
    runtime.free_error = RuntimeError('CUDA error 700')
    runtime.release_engine(handle)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert 'CUDA error 700' in caplog.text
    with pytest.raises(InferenceError):
        runtime.infer(handle, REQUEST)


@pytest.mark.parametrize(
    'answer',
    [
        {},
        {'scaled': np.zeros((1, 4, 4), np.float32)},
        {'scaled': np.zeros((1, 4, 5), np.float64)},
        {'scaled': np.full((1, 4, 5), np.inf, np.float32)},
    ],
)
def test_r1_wrong_answer_is_an_inference_error_and_refuses_a_warm_up(
    runtime: NumpyRuntime, entry: EngineCacheEntry, answer: Mapping[str, NDArray]
) -> None:
    handle = runtime.deserialize_engine(entry)
    runtime.answer = answer
    with pytest.raises(InferenceError):
        runtime.infer(handle, REQUEST)
    with pytest.raises(EngineDeserializeError) as caught:
        runtime.deserialize_engine(entry)
    assert isinstance(caught.value.__cause__, InferenceError)
    assert len(runtime.freed) == 1


def test_r1_engine_that_contradicts_the_bundle_is_freed(
    runtime: NumpyRuntime, entry: EngineCacheEntry, tmp_path: Path
) -> None:
    model = ModelBundle(
        name='scale', root=tmp_path, weights_digest=entry.model.weights_digest, inputs=INPUTS[:1], outputs=OUTPUTS
    )
    with pytest.raises(EngineSchemaMismatchError):
        runtime.deserialize_engine(EngineCacheEntry(entry.path, None, model))
    assert len(runtime.freed) == 1
    assert runtime.seen == []


def test_r1_engine_too_large_to_warm_up_is_refused_and_freed(
    runtime: NumpyRuntime, entry: EngineCacheEntry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, 'inputs', (TensorSpec('volume', 'int64', (1 << 20, 1 << 20, 1 << 10)),))
    with pytest.raises(EngineDeserializeError) as caught:
        runtime.deserialize_engine(entry)
    assert isinstance(caught.value.__cause__, MemoryError)
    assert len(runtime.freed) == 1


@pytest.mark.parametrize('stage', ['load', 'warm-up'])
def test_r1_refused_engine_is_gone_while_its_error_is_kept(
    runtime: NumpyRuntime, entry: EngineCacheEntry, stage: str
) -> None:
    if stage == 'load':
        runtime.load_error = RuntimeError('out of memory')
    else:
        runtime.answer = {}
    with pytest.raises(EngineDeserializeError) as kept:
        runtime.deserialize_engine(entry)
    assert runtime.engine is not None
    assert runtime.engine() is None
    assert kept.value.__cause__ is not None


def test_r1_an_error_that_is_kept_does_not_keep_the_engine(runtime: NumpyRuntime, entry: EngineCacheEntry) -> None:
    handle = runtime.deserialize_engine(entry)
    runtime.answer = {'scaled': np.full((1, 4, 5), np.nan, np.float32)}
    with pytest.raises(InferenceError) as kept:
        runtime.infer(handle, REQUEST)
    runtime.release_engine(handle)
    gc.collect()
    assert runtime.engine is not None and runtime.engine() is None, kept
