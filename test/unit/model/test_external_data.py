"""R-3, M-1: weights in files of their own are what was hashed, as ONNX Runtime itself reads them, or refused."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from gps_denied_c7.errors import (
    C7Error,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    ModelBundleError,
)
from gps_denied_c7.model import external_data, onnx_file
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.external_data import read_sealed
from gps_denied_c7.model.onnx_file import read_onnx
from gps_denied_c7.runtimes.ort import runtime as ort_runtime
from gps_denied_c7.runtimes.ort.runtime import OnnxTrtEpRuntime
from gps_denied_c7.runtimes.protocol import BuildConfig, ProviderSet
from support.external_weights import CONFIG, SHAPE, external, outside, rename_over, scaled, value, write

W = np.zeros((256, 256), np.float32)
X = np.linspace(-1, 1, 256, dtype=np.float32).reshape(SHAPE)


def answer(bundle: ModelBundle, x: NDArray = X) -> dict[str, NDArray]:
    """Return what this package's runtime answers."""
    runtime = OnnxTrtEpRuntime(CONFIG, providers=ProviderSet.CPU)
    handle = runtime.deserialize_engine(runtime.compile_engine(bundle, BuildConfig()))
    try:
        return {name: array.copy() for name, array in runtime.infer(handle, {'x': x}).items()}
    finally:
        runtime.release_engine(handle)


def plain(path: Path, x: NDArray = X) -> NDArray:
    """Return what ONNX Runtime answers that opens the files itself."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    answered: NDArray = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider']).run(
        ['y'], {'x': x}
    )[0]
    return answered


def refusal(path: Path) -> C7Error:
    with pytest.raises((EngineDeserializeError, EngineSchemaMismatchError, ModelBundleError)) as caught:
        answer(ModelBundle.load(path))
    assert caught.value.remedy
    return caught.value


# --- the same as ONNX Runtime ------------------------------------------------------------------------


class RandomNetwork:
    """A network of random layers, whose constants lie inside, in attributes, in branches and in several files."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.random = random.Random(seed)
        self.noise = np.random.RandomState(seed)
        self.directory = directory
        self.files = [f'part{index}' for index in range(self.random.randint(1, 3))] + ['deep/er/part']
        self.contents = {name: bytearray() for name in self.files}
        self.tensors: list[TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.last = 'x'
        for index in range(self.random.randint(1, 6)):
            getattr(self, self.random.choice(['multiply', 'add', 'constant', 'branch', 'half', 'gather']))(index)
        self.nodes.append(helper.make_node('Identity', [self.last], ['y']))
        for name, content in self.contents.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            # ONNX Runtime 1.23.2 aborts on a file of no bytes.
            (directory / name).write_bytes(content + bytes(self.random.randint(1, 9)))
        self.path = write(directory / 'net.onnx', self.nodes, self.tensors)

    def array(self, *shape: int) -> NDArray:
        return (self.noise.randint(-64, 64, shape) / 64).astype(np.float32)

    def tensor(self, name: str, array: NDArray) -> TensorProto:
        """Put an array inside the model, or anywhere in a file."""
        if self.random.random() < 0.2:
            return helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.tobytes(),
                                      raw=True)  # fmt: skip
        content = self.contents[location := self.random.choice(self.files)]
        # Aligned to pages, to anything, or not at all; nothing says an offset of 0.
        content += bytes(self.random.choice([0, 0, 1, 3, 64, -len(content) % 4096]))
        entries = {'offset': len(content)} if content or self.random.random() < 0.5 else {}
        length = array.nbytes if self.random.random() < 0.7 or not array.nbytes else 0
        entries |= {'length': length} if length or self.random.random() < 0.5 else {}
        content += array.tobytes()
        return external(name, array, location, **entries)

    def keep(self, name: str, array: NDArray) -> str:
        self.tensors.append(self.tensor(name, array))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> None:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        self.last = output

    def multiply(self, index: int) -> None:
        self.node('MatMul', [self.last, self.keep(f'w{index}', self.array(256, 256))], f'h{index}')
        self.node('Div', [self.last, self.keep(f'd{index}', np.array(64, np.float32))], f'i{index}')

    def add(self, index: int) -> None:
        rows = self.random.choice([1, 300])
        self.node('Add', [self.last, self.keep(f'w{index}', self.array(rows, 256))], f'h{index}')
        self.node('ReduceMean', [self.last], f'i{index}', axes=[0])

    def constant(self, index: int) -> None:
        self.nodes.append(helper.make_node('Constant', [], [f'c{index}'], value=self.tensor('', self.array(1, 256))))
        self.node('Add', [self.last, f'c{index}'], f'h{index}')

    def branch(self, index: int) -> None:
        before = self.last
        outer = self.keep(f'o{index}', self.array(256, 256))
        graphs = []
        for side in 'ab':
            nodes = [
                helper.make_node('MatMul', [before, outer], [f'm{side}{index}']),
                helper.make_node('Add', [f'm{side}{index}', f'v{side}{index}'], [f'b{side}{index}']),
            ]
            graphs.append(
                helper.make_graph(nodes, side, [], [value(f'b{side}{index}', TensorProto.FLOAT, None)],
                                  [self.tensor(f'v{side}{index}', self.array(1, 256))])
            )  # fmt: skip
        self.node('ReduceMax', [before], f'g{index}', keepdims=0)
        self.node('Greater', [f'g{index}', self.keep(f'z{index}', np.array(0, np.float32))], f'q{index}')
        self.node('If', [f'q{index}'], f'h{index}', then_branch=graphs[0], else_branch=graphs[1])
        self.node('Tanh', [self.last], f'i{index}')

    def half(self, index: int) -> None:
        before = self.last
        kind = self.random.choice([np.float16, np.float64, np.int8, np.uint16, np.int64, np.bool_])
        array = (self.array(300, 256) * 8).astype(kind)
        self.node('Cast', [self.keep(f'w{index}', array)], f'f{index}', to=TensorProto.FLOAT)
        self.node('ReduceMean', [self.last], f'r{index}', axes=[0])
        self.node('Add', [before, f'r{index}'], f'h{index}')

    def gather(self, index: int) -> None:
        order = self.noise.permutation(256).astype(np.int64)
        self.node('Gather', [self.last, self.keep(f'w{index}', order)], f'h{index}', axis=1)
        nothing = self.keep(f'n{index}', np.zeros((0, 256), np.float32))
        self.node('Concat', [self.last, nothing], f'i{index}', axis=0)
        self.keep(f'unused{index}', self.array(random.Random(index).choice([1, 300]), 256))


@pytest.mark.parametrize('seed', range(40))
def test_weights_in_other_files_give_the_answers_of_onnxruntime_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    network = RandomNetwork(seed, tmp_path / 'model')
    # Files of the same names in the working directory are nobody's weights.
    decoy = tmp_path / 'decoy'
    for name, content in network.contents.items():
        (decoy / name).parent.mkdir(parents=True, exist_ok=True)
        (decoy / name).write_bytes(b'\x3f' * (len(content) + 16))
    expected = plain(network.path)
    monkeypatch.chdir(decoy)
    bundle = ModelBundle.load(network.path)
    np.testing.assert_array_equal(answer(bundle)['y'], expected)
    model = read_onnx(network.path, bundle.artefacts[0].sha256, bundle.artefacts[0].external_data)
    whole = tmp_path / 'whole.onnx'
    whole.write_bytes(model.self_contained())
    for name in network.files:
        (network.directory / name).unlink()
    np.testing.assert_array_equal(plain(whole), expected)


def test_shapes_in_other_files_are_read(tmp_path: Path) -> None:
    """ONNX Runtime itself refuses a Reshape whose shape lies in another file, as exporters write it."""
    (tmp_path / 'net.weights').write_bytes(np.array([16, 16]).tobytes())
    path = write(tmp_path / 'net.onnx', [helper.make_node('Reshape', ['x', 's'], ['y'])],
                 [external('s', np.array([16, 16]))])  # fmt: skip
    np.testing.assert_array_equal(answer(ModelBundle.load(path))['y'], X.reshape(16, 16))


def test_a_constant_of_no_elements_in_a_file_of_no_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / 'net.weights').write_bytes(b'')
    path = write(tmp_path / 'net.onnx', [helper.make_node('Concat', ['x', 'w'], ['y'], axis=0)],
                 [external('w', np.zeros((0, 256), np.float32))])  # fmt: skip
    np.testing.assert_array_equal(answer(ModelBundle.load(path))['y'], X)


def test_sparse_weights_in_other_files_are_read(tmp_path: Path) -> None:
    (tmp_path / 'net.weights').write_bytes(np.array([3, 200]).tobytes() + np.array([5, 7], np.float32).tobytes())
    sparse = onnx.SparseTensorProto(
        values=external('w', np.zeros(2, np.float32), offset=16),
        indices=external('', np.zeros(2, np.int64), length=16),
        dims=SHAPE,
    )
    path = write(tmp_path / 'net.onnx', [helper.make_node('Add', ['x', 'w'], ['y'])], [], sparse_initializer=[sparse])
    expected = X.copy()
    expected[0, [3, 200]] += [5, 7]
    np.testing.assert_array_equal(answer(ModelBundle.load(path))['y'], expected)


@pytest.mark.parametrize('kind', ['BFLOAT16', 'FLOAT8E4M3FN', 'FLOAT'])
def test_types_that_numpy_lacks_are_read(tmp_path: Path, kind: str) -> None:
    number = getattr(TensorProto, kind)
    values = np.arange(300 * 256).reshape(300, 256) % 8
    raw = helper.make_tensor('w', number, values.shape, values.astype(np.float32).ravel())
    content = onnx.numpy_helper.to_array(raw).tobytes()
    (tmp_path / 'net.weights').write_bytes(content)
    tensor = TensorProto(name='w', data_type=number, dims=values.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key='location', value='net.weights')
    graph = helper.make_graph(
        [helper.make_node('Cast', ['w'], ['f'], to=TensorProto.FLOAT), helper.make_node('Add', ['x', 'f'], ['y'])],
        'graph', [value('x', TensorProto.FLOAT, SHAPE)], [value('y', TensorProto.FLOAT, None)], [tensor],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 19)], ir_version=9)
    (tmp_path / 'net.onnx').write_bytes(model.SerializeToString())
    found = answer(ModelBundle.load(tmp_path / 'net.onnx'))['y']
    np.testing.assert_array_equal(found, X + values.astype(np.float32))


def test_free_axes_are_fixed_where_weights_lie_in_other_files(tmp_path: Path) -> None:
    path = scaled(tmp_path / 'net.onnx', 2.0)
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = 'batch'
    path.write_bytes(model.SerializeToString())
    found = read_onnx(path, None)
    fixed = onnx.ModelProto.FromString(found.with_axes(found.dimension_overrides({})).self_contained())
    assert fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert not any(tensor.data_location for tensor in fixed.graph.initializer)
    np.testing.assert_array_equal(answer(ModelBundle.load(path))['y'], plain(path))


# --- what was hashed ---------------------------------------------------------------------------------


@pytest.mark.parametrize('what', ['net.onnx', 'net.weights'])
def test_a_file_exchanged_between_its_digest_and_the_session_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    other = scaled(tmp_path / 'other' / 'net.onnx', 9.0)
    nodes = [helper.make_node('ReduceMin', ['x'], ['y'], keepdims=0)]
    write(other, nodes, [])
    path = scaled(tmp_path / 'net.onnx', 2.0)
    bundle, expected = ModelBundle.load(path), plain(path)

    def read_and_exchange(*arguments: object) -> onnx_file.OnnxModel:
        model = read_onnx(*arguments)
        rename_over(tmp_path / what, (tmp_path / 'other' / what).read_bytes())
        return model

    monkeypatch.setattr(ort_runtime, 'read_onnx', read_and_exchange)
    np.testing.assert_array_equal(answer(bundle)['y'], expected)


def test_the_copy_of_a_file_cannot_be_changed_and_goes_with_its_last_view(tmp_path: Path) -> None:
    def mapped() -> bool:
        return 'c7-weights' in Path('/proc/self/maps').read_text()

    (tmp_path / 'file').write_bytes(b'weights' * 1000)
    sealed, digest = read_sealed(tmp_path / 'file')
    (tmp_path / 'file').write_bytes(b'another')
    assert bytes(sealed) == b'weights' * 1000
    assert digest == hashlib.sha256(sealed).hexdigest()
    assert mapped()
    with pytest.raises((TypeError, ValueError)):
        sealed[0:1] = b'x'
    links = [Path('/proc/self/fd') / name for name in os.listdir('/proc/self/fd')]
    held = [int(link.name) for link in links if link.is_symlink() and 'c7-weights' in os.readlink(link)]
    assert held
    for descriptor in held:
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b'x', 0)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
    del sealed
    assert not mapped()
    bundle = ModelBundle.load(scaled(tmp_path / 'net.onnx', 1.0))
    runtime = OnnxTrtEpRuntime(CONFIG, providers=ProviderSet.CPU)
    handle = runtime.deserialize_engine(runtime.compile_engine(bundle, BuildConfig()))
    assert not mapped()
    runtime.release_engine(handle)


def test_weights_in_other_files_are_in_the_digest_of_a_bare_model(tmp_path: Path) -> None:
    digests = {ModelBundle.load(scaled(tmp_path / 'net.onnx', factor)).weights_digest for factor in (1.0, 2.0)}
    assert len(digests) == 2
    inside = tmp_path / 'inside.onnx'
    inside.write_bytes(read_onnx(tmp_path / 'net.onnx', None).self_contained())
    assert ModelBundle.load(inside).weights_digest == f'sha256:{hashlib.sha256(inside.read_bytes()).hexdigest()}'


def test_an_artefact_without_the_digests_of_its_weights_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    path = scaled(tmp_path / 'net.onnx', 2.0)
    bundle = ModelBundle.load(path)
    silent = replace(bundle.artefacts[0], external_data={})
    with pytest.raises(EngineSchemaMismatchError, match=r'net\.weights') as caught:
        answer(replace(bundle, artefacts=(silent,)))
    assert 'external_data' in caught.value.remedy
    digest = hashlib.sha256((tmp_path / 'net.weights').read_bytes()).hexdigest()
    told = replace(silent, external_data={'net.weights': digest})
    np.testing.assert_array_equal(answer(replace(bundle, artefacts=(told,)))['y'], plain(path))
    assert Artefact.of_file(path, strategy='onnx_trt_ep', weights_digest=bundle.weights_digest) == told


@pytest.mark.parametrize(
    'external_data',
    [{'../net.weights': 'a' * 64}, {'/net.weights': 'a' * 64}, {'net.weights': 'A' * 64}, {'': 'a' * 64}],
)
def test_an_artefact_names_files_inside_its_directory_by_their_digest(
    tmp_path: Path, external_data: dict[str, str]
) -> None:
    artefact = ModelBundle.load(scaled(tmp_path / 'net.onnx', 2.0)).artefacts[0]
    with pytest.raises(ModelBundleError, match='external_data'):
        replace(artefact, external_data=external_data)


# --- where files lie ---------------------------------------------------------------------------------


def hub(directory: Path, location: str = 'net.weights') -> Path:
    """Lay a model out as the cache of a model hub does: every file a link into one directory of blobs."""
    scaled(directory / 'blobs' / 'net.onnx', 2.0, location=location)
    snapshot = directory / 'snapshots' / 'abc' / 'onnx'
    (snapshot / location).parent.mkdir(parents=True)
    for name, blob in (('net.onnx', '0a1b'), (location, '2c3d')):
        os.rename(directory / 'blobs' / name, directory / 'blobs' / blob)
        (snapshot / name).symlink_to(os.path.relpath(directory / 'blobs' / blob, (snapshot / name).parent))
    return snapshot / 'net.onnx'


@pytest.mark.parametrize('location', ['net.weights', 'parts/net.weights'])
def test_a_model_in_the_cache_of_a_hub_loads(tmp_path: Path, location: str) -> None:
    bundle = ModelBundle.load(hub(tmp_path, location))
    assert answer(bundle, np.ones(SHAPE, np.float32))['y'] == 512.0


def test_weights_are_looked_for_beside_the_path_as_given_first(tmp_path: Path) -> None:
    scaled(tmp_path / 'real' / 'net.onnx', 3.0)
    (tmp_path / 'given').mkdir()
    (tmp_path / 'given' / 'net.onnx').symlink_to('../real/net.onnx')
    ones = {'x': np.ones(SHAPE, np.float32)}
    bundle = ModelBundle.load(tmp_path / 'given' / 'net.onnx')
    assert answer(bundle, ones['x'])['y'] == 768.0
    scaled(tmp_path / 'given' / 'other.onnx', 5.0)
    assert answer(ModelBundle.load(tmp_path / 'given' / 'net.onnx'), ones['x'])['y'] == 1280.0


def a_loop(directory: Path) -> None:
    (directory / 'net.weights').symlink_to('net.weights')


def a_pipe(directory: Path) -> None:
    os.mkfifo(directory / 'net.weights')


def a_device(directory: Path) -> None:
    (directory / 'net.weights').symlink_to('/dev/zero')


def a_directory(directory: Path) -> None:
    (directory / 'net.weights').mkdir()


def a_dangling_link(directory: Path) -> None:
    (directory / 'net.weights').symlink_to('nothing')


def too_large_for_any_memory(directory: Path) -> None:
    with (directory / 'net.weights').open('wb') as file:
        file.truncate(1 << 43)


@pytest.mark.parametrize(
    'place', [outside, a_loop, a_pipe, a_device, a_directory, a_dangling_link, too_large_for_any_memory]
)
def test_what_is_no_file_with_the_model_is_refused_without_waiting(
    tmp_path: Path, place: Callable[[Path], None]
) -> None:
    path = scaled(tmp_path / 'model' / 'net.onnx', 2.0)
    bundle = ModelBundle.load(path)
    (path.parent / 'net.weights').unlink()
    place(path.parent)
    assert 'net.weights' in str(refusal(path)) or 'secret' in str(refusal(path))
    # Also where it comes after the bundle was read.
    with pytest.raises(EngineDeserializeError):
        answer(bundle)


@pytest.mark.parametrize(
    'location', ['../net.weights', '{parent}/net.weights', 'link', 'missing', '', 'sub/../../net.weights']
)
def test_weights_elsewhere_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / 'net.weights').write_bytes(W.tobytes())
    directory = tmp_path / 'model'
    directory.mkdir()
    (directory / 'link').symlink_to(tmp_path / 'net.weights')
    tensor = external('w', W, location.format(parent=tmp_path))
    path = write(directory / 'net.onnx', [helper.make_node('MatMul', ['x', 'w'], ['y'])], [tensor])
    with pytest.raises(ModelBundleError, match='keeps weights in'):
        ModelBundle.load(path)


def test_weights_elsewhere_are_seen_in_a_subgraph(tmp_path: Path) -> None:
    y = value('y', TensorProto.FLOAT, None)
    constant = helper.make_node('Constant', [], ['y'], value=external('', W, '/etc/hostname'))
    branch = helper.make_graph([constant], 'branch', [], [y])
    nodes = [
        helper.make_node('ReduceMax', ['x'], ['greatest'], keepdims=0),
        helper.make_node('Cast', ['greatest'], ['condition'], to=TensorProto.BOOL),
        helper.make_node('If', ['condition'], ['y'], then_branch=branch, else_branch=branch),
    ]
    with pytest.raises(ModelBundleError, match='/etc/hostname'):
        ModelBundle.load(write(tmp_path / 'net.onnx', nodes, []))


# --- what does not fit -------------------------------------------------------------------------------

MISPLACED: dict[str, tuple[dict[str, object], str]] = {
    'an offset that is no number': ({'offset': 'x'}, 'offset'),
    'an offset with a sign': ({'offset': '+4'}, 'offset'),
    'a negative offset': ({'offset': -4}, 'offset'),
    'an empty offset': ({'offset': ''}, 'offset'),
    'an endless offset': ({'offset': '9' * 400}, 'offset'),
    'an offset beyond the end': ({'offset': 1 << 62}, 'ends at byte'),
    'an offset too near to the end': ({'offset': 4}, 'ends at byte'),
    'a length that is no number': ({'length': '0x10'}, 'length'),
    'a negative length': ({'length': -W.nbytes}, 'length'),
    'a length that its shape does not have': ({'length': W.nbytes - 4}, 'length'),
    'a length beyond its shape': ({'length': W.nbytes + 4}, 'length'),
}


@pytest.mark.parametrize('name', MISPLACED)
@pytest.mark.parametrize('where', ['main graph', 'attribute'])
def test_weights_that_do_not_lie_where_they_should_are_refused(tmp_path: Path, name: str, where: str) -> None:
    entries, found = MISPLACED[name]
    (tmp_path / 'net.weights').write_bytes(W.tobytes())
    tensor = external('w', W, **entries)
    node = helper.make_node('MatMul', ['x', 'w'], ['y'])
    if where == 'attribute':
        path = write(tmp_path / 'net.onnx', [helper.make_node('Constant', [], ['w'], value=tensor), node], [])
    else:
        path = write(tmp_path / 'net.onnx', [node], [tensor])
    error = refusal(path)
    assert found in error.message and "'w'" in error.message
    with pytest.raises(EngineDeserializeError):
        read_onnx(path, None)


@pytest.mark.parametrize(
    ('kind', 'dims'), [(TensorProto.STRING, [4]), (0, [4]), (99, [4]), (-1, [4]), (1, [-4]), (1, [1 << 62, 1 << 62])]
)
def test_weights_of_an_impossible_type_or_shape_are_refused(tmp_path: Path, kind: int, dims: list[int]) -> None:
    (tmp_path / 'net.weights').write_bytes(W.tobytes())
    tensor = external('w', W)
    tensor.data_type = kind
    tensor.dims[:] = dims
    refusal(write(tmp_path / 'net.onnx', [helper.make_node('MatMul', ['x', 'w'], ['y'])], [tensor]))


def test_a_constant_in_two_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'net.weights').write_bytes(W.tobytes())
    tensor = external('w', W)
    tensor.external_data.add(key='location', value='other')
    error = refusal(write(tmp_path / 'net.onnx', [helper.make_node('MatMul', ['x', 'w'], ['y'])], [tensor]))
    assert 'other' in error.message


def test_what_has_to_go_inside_and_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'net.weights').write_bytes(W.tobytes())
    constants = [helper.make_node('Constant', [], [f'w{index}'], value=external('', W)) for index in range(9)]
    path = write(tmp_path / 'net.onnx', [*constants, helper.make_node('MatMul', ['x', 'w1'], ['y'])], [])
    monkeypatch.setattr(external_data, 'PROTOBUF_LIMIT_BYTES', 3 << 20)
    assert '2 GiB' in refusal(path).message
    # Not so what a session is handed.
    np.testing.assert_array_equal(answer(ModelBundle.load(scaled(tmp_path / 'large.onnx', 2.0, 4096)))['y'],
                                  plain(tmp_path / 'large.onnx'))  # fmt: skip
