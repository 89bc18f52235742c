"""AC-2, F-1: the answer is what ``session.run`` gives, whatever the file declares of its outputs, wherever it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import EngineDeserializeError, InferenceError
from gps_denied_c7.failover.in_process import in_process_hosts
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.onnx_file import read_onnx
from gps_denied_c7.model.shape_inference import infer_output_shapes
from gps_denied_c7.monitoring.thermal import UnknownThermalState
from gps_denied_c7.runtimes.protocol import ProviderSet
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.worker import exchange as worker_exchange
from gps_denied_c7.worker import server as worker_server
from gps_denied_c7.worker.channel import Channel, ChannelClosedError
from gps_denied_c7.worker.client import worker_hosts
from gps_denied_c7.worker.protocol import (
    WORKER_PROTOCOL,
    Answer,
    AnswerNext,
    Infer,
    InferNext,
    MapAnswers,
    MapRequests,
    NeedRoom,
)
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout
from support.onnx_models import bundle_around, model_of, write_model

pytestmark = pytest.mark.once

CPU = Rung('onnx_trt_ep', ProviderSet.CPU)
CONFIG = C7InferenceConfig(cpu_threads=1, spare_worker=False)
SHAPE = (1, 1, 24, 32)
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def image(shape: Sequence[int] = SHAPE) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info('image', FLOAT, shape)


def value(name: str, dtype: int, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def scores_and_keypoints(*outputs: onnx.ValueInfoProto) -> onnx.ModelProto:
    """Return ``keypoints``, the places brighter than a half, as many as there are; and ``scores``, a dense map."""
    return model_of(
        [
            helper.make_node('Greater', ['image', 'half'], ['bright']),
            helper.make_node('NonZero', ['bright'], ['places']),
            helper.make_node('Transpose', ['places'], ['keypoints'], perm=[1, 0]),
            helper.make_node('Mul', ['image', 'image'], ['scores']),
        ],
        [image()],
        outputs,
        [numpy_helper.from_array(np.float32(0.5), 'half')],
    )


def free_before_fixed() -> onnx.ModelProto:
    return scores_and_keypoints(value('keypoints', INT64, ['n', 4]), value('scores', FLOAT, SHAPE))


def input_among_outputs() -> onnx.ModelProto:
    return model_of(
        [helper.make_node('GlobalAveragePool', ['image'], ['mean'])],
        [image()],
        [value('mean', FLOAT, (1, 1, 1, 1)), value('image', FLOAT, SHAPE)],
    )


def sized_as_the_example() -> onnx.ModelProto:
    return scores_and_keypoints(value('keypoints', INT64, [150, 4]), value('scores', FLOAT, SHAPE))


def sized_nothing() -> onnx.ModelProto:
    return scores_and_keypoints(value('keypoints', INT64, [0, 4]), value('scores', FLOAT, SHAPE))


def dense_of_another_size() -> onnx.ModelProto:
    """Return a map that is half as large as the file says."""
    return model_of(
        [helper.make_node('MaxPool', ['image'], ['map'], kernel_shape=[2, 2], strides=[2, 2])],
        [image()],
        [value('map', FLOAT, (1, 1, 24, 32))],
    )


def unknown_rank() -> onnx.ModelProto:
    """Return what an exporter makes of ``squeeze``: a branch with an axis less, and one with as many as before."""
    squeezed = helper.make_graph(
        [helper.make_node('Squeeze', ['mean', 'axis'], ['less'])], 'less', [], [value('less', FLOAT, None)]
    )
    kept = helper.make_graph(
        [helper.make_node('Identity', ['mean'], ['as_before'])], 'kept', [], [value('as_before', FLOAT, None)]
    )
    return model_of(
        [
            helper.make_node('ReduceMean', ['image'], ['mean'], axes=[3], keepdims=1),
            helper.make_node('ReduceMax', ['image'], ['brightest'], keepdims=0),
            helper.make_node('Greater', ['brightest', 'half'], ['is_bright']),
            helper.make_node('If', ['is_bright'], ['descriptor'], then_branch=squeezed, else_branch=kept),
        ],
        [image()],
        [value('descriptor', FLOAT, None)],
        [numpy_helper.from_array(np.float32(0.5), 'half'), numpy_helper.from_array(np.array([3]), 'axis')],
    )


def constant_and_twice_the_same() -> onnx.ModelProto:
    return model_of(
        [
            helper.make_node('Mul', ['image', 'weights'], ['one']),
            helper.make_node('Identity', ['one'], ['other']),
            helper.make_node('Identity', ['weights'], ['fixed']),
        ],
        [image()],
        [value('one', FLOAT, SHAPE), value('fixed', FLOAT, SHAPE), value('other', FLOAT, SHAPE)],
        [numpy_helper.from_array(np.linspace(0, 1, 768, dtype=np.float32).reshape(SHAPE), 'weights')],
    )


KINDS: dict[str, Callable[[], onnx.ModelProto]] = {
    kind.__name__: kind
    for kind in (
        free_before_fixed, input_among_outputs, sized_as_the_example, sized_nothing, dense_of_another_size,
        unknown_rank, constant_and_twice_the_same,
    )
}  # fmt: skip


def frames(count: int = 40) -> Iterator[NDArray[np.float32]]:
    """Yield pictures with many, few and no bright places."""
    random = np.random.default_rng(5)
    for number in range(count):
        share = (1.0, 0.1, 0.0, 0.5)[number % 4]
        yield (random.random(SHAPE) * (random.random(SHAPE) < share)).astype(np.float32)


def plain_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


@contextlib.contextmanager
def served(model: ModelBundle, isolation: str, config: C7InferenceConfig = CONFIG) -> Iterator[Any]:
    in_process = isolation == 'none'
    make = in_process_hosts(model, config, UnknownThermalState()) if in_process else worker_hosts(model, config)
    host = make(CPU)
    try:
        host.load()
        yield host
    finally:
        host.release()


def require_same(found: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize('isolation', ['process', 'none'])
@pytest.mark.parametrize('kind', KINDS)
def test_every_frame_gets_the_answer_of_session_run(tmp_path: Path, kind: str, isolation: str) -> None:
    path = write_model(tmp_path / 'model.onnx', KINDS[kind]())
    session = plain_session(path)
    names = [output.name for output in session.get_outputs()]
    with served(ModelBundle.load(path), isolation) as host:
        assert [spec.name for spec in host.outputs] == names
        for frame in frames():
            expected = dict(zip(names, session.run(names, {'image': frame}), strict=True))
            require_same(host.infer({'image': frame}), expected)


@pytest.mark.parametrize('isolation', ['process', 'none'])
@pytest.mark.parametrize('rows', [None, 150])
def test_sparse_frames_are_answered_also_where_the_bundle_has_the_exporters_size(
    tmp_path: Path, isolation: str, rows: int | None
) -> None:
    path = write_model(tmp_path / 'model.onnx', sized_as_the_example())
    bundle = bundle_around(
        path, 'onnx_trt_ep', inputs=(TensorSpec('image', 'float32', SHAPE),),
        outputs=(TensorSpec('keypoints', 'int64', (rows, 4)), TensorSpec('scores', 'float32', SHAPE)),
    )  # fmt: skip
    session = plain_session(path)
    with served(bundle, isolation) as host:
        for frame in frames(8):
            expected = dict(zip(('keypoints', 'scores'), session.run(None, {'image': frame}), strict=True))
            require_same(host.infer({'image': frame}), expected)


@pytest.mark.parametrize('isolation', ['process', 'none'])
@pytest.mark.parametrize('size', [None, 24])
def test_axes_without_a_size_or_name_have_that_of_the_bundle(tmp_path: Path, isolation: str, size: int | None) -> None:
    model = model_of(
        [helper.make_node('Mul', ['image', 'image'], ['scores'])],
        [image([1, 1, None, None])],  # type: ignore[list-item]
        [value('scores', FLOAT, [1, 1, None, None])],
    )
    path = write_model(tmp_path / 'model.onnx', model)
    bundle = bundle_around(
        path, 'onnx_trt_ep', inputs=(TensorSpec('image', 'float32', SHAPE),),
        outputs=(TensorSpec('scores', 'float32', (1, 1, size, 32)),),
    )  # fmt: skip
    with served(bundle, isolation) as host:
        assert host.outputs[0].shape == SHAPE
        for frame in frames(4):
            require_same(host.infer({'image': frame}), {'scores': frame * frame})


def test_an_answer_too_large_for_the_node_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no memory for it: the worker, which waits for room, goes on with the next frame."""
    path = write_model(tmp_path / 'model.onnx', free_before_fixed())
    session = plain_session(path)
    with served(ModelBundle.load(path), 'process') as host:
        sparse, full = np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)
        for limit in (8192, None, 8192):
            monkeypatch.setattr(worker_exchange, '_LARGEST_ANSWER_BYTES', 1 << 30)
            require_same(host.infer({'image': sparse}), answered(session, sparse))
            if limit is None:
                monkeypatch.setattr(SharedTensors, 'create', no_memory)
            else:
                monkeypatch.setattr(worker_exchange, '_LARGEST_ANSWER_BYTES', limit)
            with pytest.raises(InferenceError, match='no room for the answer'):
                host.infer({'image': full})
            monkeypatch.undo()
            require_same(host.infer({'image': sparse}), answered(session, sparse))
        require_same(host.infer({'image': full}), answered(session, full))


def no_memory(size: int, *, writable: bool) -> SharedTensors:
    raise OSError(28, 'No space left on device')


def answered(session: onnxruntime.InferenceSession, frame: NDArray) -> dict[str, NDArray]:
    return dict(zip(('keypoints', 'scores'), session.run(None, {'image': frame}), strict=True))


def test_a_size_in_the_bundle_that_depends_on_the_data_is_said(tmp_path: Path) -> None:
    path = write_model(tmp_path / 'model.onnx', sized_as_the_example())
    bundle = bundle_around(
        path, 'onnx_trt_ep', inputs=(TensorSpec('image', 'float32', SHAPE),),
        outputs=(TensorSpec('keypoints', 'int64', (150, 4)), TensorSpec('scores', 'float32', SHAPE)),
    )  # fmt: skip
    host = in_process_hosts(bundle, CONFIG, UnknownThermalState())(CPU)
    notes = ' '.join(host.load().notes)
    host.release()
    assert "'keypoints'" in notes and 'Write null' in notes and "'scores'" not in notes


def test_an_output_that_nobody_writes_is_noticed_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AC-2: bound runs are compared with plain ones, here with an ONNX Runtime that leaves a bound output alone."""
    path = write_model(tmp_path / 'model.onnx', free_before_fixed())
    bind = onnxruntime.IOBinding.bind_ortvalue_output
    elsewhere = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(SHAPE, np.float32))
    monkeypatch.setattr(
        onnxruntime.IOBinding, 'bind_ortvalue_output', lambda self, name, _: bind(self, name, elsewhere)
    )
    host = in_process_hosts(ModelBundle.load(path), CONFIG, UnknownThermalState())(CPU)
    notes = ' '.join(host.load().notes)
    assert "['scores'] are not written where they are bound" in notes
    session = plain_session(path)
    for frame in frames(4):
        expected = dict(zip(('keypoints', 'scores'), session.run(None, {'image': frame}), strict=True))
        require_same(host.infer({'image': frame}), expected)
    host.release()


def test_an_engine_whose_runs_are_not_those_of_session_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / 'model.onnx', free_before_fixed())
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession, 'run', lambda self, *given: [array + 1 for array in run(self, *given)]
    )
    host = in_process_hosts(ModelBundle.load(path), CONFIG, UnknownThermalState())(CPU)
    with pytest.raises(EngineDeserializeError, match='are wrong when ONNX Runtime runs with IO binding'):
        host.load()


def test_weights_in_constant_nodes_are_not_carried_along_to_infer_shapes(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.ones((32, 1 << 14), np.float32), 'weights')
    model = model_of(
        [
            helper.make_node('Constant', [], ['axis'], value=numpy_helper.from_array(np.array([-1, 32]))),
            helper.make_node('Reshape', ['image', 'axis'], ['rows']),
            helper.make_node('Constant', [], ['weights'], value=weights),
            helper.make_node('MatMul', ['rows', 'weights'], ['y']),
        ],
        [image()],
        [value('y', FLOAT, None), value('weights', FLOAT, None)],
    )
    path = write_model(tmp_path / 'model.onnx', model)
    read = read_onnx(path, None)
    assert len(read.skeleton) < 1000
    inferred = infer_output_shapes(read.skeleton, [TensorSpec('image', 'float32', SHAPE)])
    assert inferred == {'y': (24, 1 << 14), 'weights': None}
    with served(ModelBundle.load(path), 'none') as host:
        for frame in frames(2):
            expected = dict(zip(('y', 'weights'), plain_session(path).run(None, {'image': frame}), strict=True))
            require_same(host.infer({'image': frame}), expected)


def test_a_network_that_throws_dice_is_served_and_said(tmp_path: Path) -> None:
    model = model_of(
        [
            helper.make_node('RandomNormalLike', ['image'], ['noise']),
            helper.make_node('Add', ['image', 'noise'], ['y']),
        ],
        [image()],
        [value('y', FLOAT, SHAPE)],
    )
    bundle = ModelBundle.load(write_model(tmp_path / 'model.onnx', model))
    host = in_process_hosts(bundle, CONFIG, UnknownThermalState())(CPU)
    assert "['y'] differ from run to run" in ' '.join(host.load().notes)
    host.release()


def test_a_network_whose_dice_show_the_same_twice_by_chance_is_served(tmp_path: Path) -> None:
    """One coin: every other run is equal to the one before."""
    coins = [helper.make_node('Bernoulli', ['halves'], [f'coin {number}'], seed=float(number)) for number in range(16)]
    model = model_of(
        [helper.make_node('Mul', ['image', 'zero'], ['nothing']), helper.make_node('Add', ['nothing', 'half'], ['all']),
         helper.make_node('ReduceMean', ['all'], ['halves'], keepdims=0), *coins],
        [image()],
        [value(f'coin {number}', FLOAT, []) for number in range(16)],
        [numpy_helper.from_array(np.float32(0), 'zero'), numpy_helper.from_array(np.float32(0.5), 'half')],
    )  # fmt: skip
    bundle = ModelBundle.load(write_model(tmp_path / 'model.onnx', model))
    host = in_process_hosts(bundle, CONFIG, UnknownThermalState())(CPU)
    assert 'differ from run to run' in ' '.join(host.load().notes)
    host.release()


def text_beside_scores() -> onnx.ModelProto:
    return model_of(
        [
            helper.make_node('GlobalAveragePool', ['image'], ['scores']),
            helper.make_node('Identity', ['label'], ['text']),
        ],
        [image()],
        [value('scores', FLOAT, (1, 1, 1, 1)), value('text', TensorProto.STRING, [1])],
        [helper.make_tensor('label', TensorProto.STRING, [1], [b'ground'])],
    )


def mask_beside_scores() -> onnx.ModelProto:
    """Return ``mask``, -infinity where the picture is dark and NaN where it is white, beside ``scores``."""
    return model_of(
        [
            helper.make_node('Log', ['image'], ['logarithm']),
            helper.make_node('Mul', ['image', 'image'], ['scores']),
            helper.make_node('Neg', ['logarithm'], ['negative']),
            helper.make_node('Sqrt', ['negative'], ['mask']),
        ],
        [image()],
        [value('mask', FLOAT, SHAPE), value('scores', FLOAT, SHAPE)],
    )


@pytest.mark.parametrize('isolation', ['process', 'none'])
def test_a_text_output_that_nobody_asks_for_condemns_nothing(tmp_path: Path, isolation: str) -> None:
    bundle = ModelBundle.load(write_model(tmp_path / 'model.onnx', text_beside_scores()))
    for asked in ((), ('scores',)):
        with served(bundle, isolation, dataclasses.replace(CONFIG, output_tensors=asked)) as host:
            frame = next(frames())
            require_same(host.infer({'image': frame}), {'scores': frame.mean(axis=(2, 3), keepdims=True)})
    config = dataclasses.replace(CONFIG, output_tensors=('text',))
    with pytest.raises(EngineDeserializeError, match="'text' is a tensor"), served(bundle, isolation, config):
        pass


@pytest.mark.parametrize('isolation', ['process', 'none'])
@pytest.mark.parametrize('settings_', [{'output_tensors': ('scores',)}, {'allow_non_finite': ('mask',)}])
def test_infinity_in_a_mask_is_no_fault_where_it_is_meant_or_not_taken(
    tmp_path: Path, isolation: str, settings_: dict[str, tuple[str, ...]]
) -> None:
    path = write_model(tmp_path / 'model.onnx', mask_beside_scores())
    session, bundle = plain_session(path), ModelBundle.load(path)
    with served(bundle, isolation, dataclasses.replace(CONFIG, **settings_)) as host:
        names = [spec.name for spec in host.outputs]
        for frame in frames(8):
            found = {name: array.copy() for name, array in host.infer({'image': frame}).items()}
            require_same(found, dict(zip(names, session.run(names, {'image': frame}), strict=True)))
    with served(bundle, isolation) as host, pytest.raises(InferenceError, match="'mask' has .* non-finite"):
        host.infer({'image': np.zeros(SHAPE, np.float32)})


def test_a_finite_output_is_still_looked_at_beside_one_that_need_not_be(tmp_path: Path) -> None:
    bundle = ModelBundle.load(write_model(tmp_path / 'model.onnx', mask_beside_scores()))
    config = dataclasses.replace(CONFIG, allow_non_finite=('mask',))
    with served(bundle, 'none', config) as host, pytest.raises(InferenceError, match="'scores' has"):
        host.infer({'image': np.full(SHAPE, np.inf, np.float32)})


# --- whatever a runtime answers -----------------------------------------------------------------------------------

DTYPES = ('bool', 'uint8', 'int64', 'float16', 'float32', 'float64')


@st.composite
def answers(draw: st.DrawFn) -> list[dict[str, NDArray]]:
    """Return the answers of one engine: outputs in one order, each in a shape of its own that may change."""
    outputs = [
        (f'output {number}', draw(st.sampled_from(DTYPES)), draw(st.booleans()), draw(st.integers(0, 3)))
        for number in range(draw(st.integers(1, 5)))
    ]
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = [0, 1, 3, 40, 700, 9000]
    steady = [tuple(draw(st.sampled_from(sizes[:4])) for _ in range(rank)) for *_, rank in outputs]
    made = []
    for _ in range(draw(st.integers(1, 12))):
        answer = {}
        for (name, dtype, changes, _), shape in zip(outputs, steady, strict=True):
            sized = (draw(st.sampled_from(sizes)), *shape[1:]) if changes and shape else shape
            answer[name] = np.asarray(random.random(sized) * 200).astype(dtype, subok=False)[...]
        made.append(answer)
    return made


class ScriptedEngine:
    """Answer as scripted; an output that keeps its shape is written where the worker has placed it, as engines do."""

    outputs = ()
    ran_ns = (1, 2)

    def __init__(self, script: Sequence[dict[str, NDArray]]) -> None:
        self._script = iter(script)
        self._steady = {
            name: array for name, array in script[0].items()
            if all(answer[name].shape == array.shape for answer in script) and array.size
        }  # fmt: skip
        self._places: dict[str, NDArray] = {}

    def place(self, *, inputs: object = None, outputs: Mapping[str, NDArray] | None = None) -> None:
        self._places |= {name: place for name, place in (outputs or {}).items() if name in self._steady}

    def infer(self, inputs: object) -> dict[str, NDArray]:
        answer = next(self._script)
        found = {}
        for name, array in answer.items():
            found[name] = self._places.get(name, array)
            found[name][...] = array
        return found


@settings(max_examples=150, deadline=None)
@given(answers())
def test_f1_no_output_is_written_over_another(script: list[dict[str, NDArray]]) -> None:
    """F-1: whatever grows, shrinks or is moved, the node reads what the engine has answered."""
    expected = [{name: array.copy() for name, array in answer.items()} for answer in script]
    ours, theirs = Channel.pair(WORKER_PROTOCOL)
    service = worker_server.EngineService(theirs)
    service._host = ScriptedEngine(script)

    def serve() -> None:
        with contextlib.suppress(ChannelClosedError):
            service.run()

    thread = threading.Thread(target=serve)
    thread.start()
    layout = TensorLayout.of({'x': np.zeros(1, np.float32)})
    requests = SharedTensors.create(layout.size, writable=True)
    segment: SharedTensors | None = None
    try:
        ours.send(MapRequests(), [requests.descriptor])
        places: TensorLayout | None = None
        for number, wanted in enumerate(expected, 1):
            if number == 1:
                ours.send(Infer(number, layout))
            else:
                ours.send(InferNext(number))
            while isinstance(message := ours.receive()[0], NeedRoom):
                segment = SharedTensors.create(message.bytes, writable=False)
                places = None
                ours.send(MapAnswers(), [segment.descriptor])
            assert isinstance(message, (Answer, AnswerNext)), message
            if isinstance(message, Answer):
                places = message.layout
            assert segment is not None and places is not None
            require_same(segment.arrays(places), wanted)
    finally:
        ours.close()
        thread.join()
        theirs.close()


def test_f1_tensors_on_top_of_one_another_are_refused() -> None:
    """F-1: a worker that lays its tensors so would have one read for another."""
    for first, second in itertools.permutations((0, 4)):
        with pytest.raises(InferenceError, match='overlap'):
            TensorLayout((('a', 'float32', (2,), first), ('b', 'float32', (2,), second))).check()
    TensorLayout((('a', 'float32', (2,), 0), ('b', 'float32', (0,), 4), ('c', 'float32', (2,), 8))).check()
