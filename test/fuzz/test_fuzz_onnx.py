"""R-3, F-1: hostile ONNX models end as typed errors, in a worker process that may die of them; this one lives."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

import numpy as np
import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error, EngineDeserializeError
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.onnx_file import read_onnx
from gps_denied_c7.runtimes.protocol import ProviderSet
from gps_denied_c7.worker.client import worker_hosts
from support.fuzz_mutations import damaged, fuzz

CPU = Rung('onnx_trt_ep', ProviderSet.CPU)
# Too large to be taken into the model.
LARGE = np.ones(1 << 15, np.float32)
CONFIG = C7InferenceConfig(cpu_threads=1, load_timeout_s=60.0)


def value(name: str, shape: list[int | str | None], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[onnx.NodeProto], *, shape: list[int | str | None] | None = None, initialisers: list[TensorProto] = ()
) -> onnx.ModelProto:
    shape = [1, 4] if shape is None else shape
    graph = helper.make_graph(nodes, 'graph', [value('x', shape)], [value('y', [None] * len(shape))], initialisers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


def weights(location: str, **entries: str) -> TensorProto:
    tensor = TensorProto(name='w', data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, text in {'location': location, **entries}.items():
        tensor.external_data.add(key=key, value=text)
    return tensor


def plain() -> onnx.ModelProto:
    """Return y = If(x > 0) + Σ w, with a constant, a subgraph and an attribute of each kind."""
    branch = [
        helper.make_graph([helper.make_node('Identity', ['x'], [f'b{index}'])], f'branch{index}', [],
                          [value(f'b{index}', [1, 4])]) for index in range(2)
    ]  # fmt: skip
    initialiser = helper.make_tensor('w', TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
    condition = helper.make_tensor('c', TensorProto.BOOL, [], [True])
    return model(
        [
            helper.make_node('If', ['c'], ['z'], then_branch=branch[0], else_branch=branch[1]),
            helper.make_node('Add', ['z', 'w'], ['s']),
            helper.make_node('Transpose', ['s'], ['t'], perm=[1, 0]),
            helper.make_node('Transpose', ['t'], ['y'], perm=[1, 0]),
        ],
        initialisers=[initialiser, condition],
    )


PLAIN = plain().SerializeToString()


def add(tensor: TensorProto) -> onnx.ModelProto:
    return model([helper.make_node('Add', ['x', 'w'], ['y'])], initialisers=[tensor])


def external(location: str, **entries: str) -> Callable[[], onnx.ModelProto]:
    return lambda: add(weights(location, **entries))


def huge_initialiser() -> onnx.ModelProto:
    return add(TensorProto(name='w', data_type=TensorProto.FLOAT, dims=[1 << 31, 1 << 31], raw_data=b'1234'))


def negative_initialiser() -> onnx.ModelProto:
    return add(TensorProto(name='w', data_type=TensorProto.FLOAT, dims=[-4], raw_data=b'1234' * 4))


def constant_of_shape() -> onnx.ModelProto:
    shape = helper.make_tensor('shape', TensorProto.INT64, [2], [1 << 31, 1 << 31])
    return model(
        [helper.make_node('ConstantOfShape', ['shape'], ['c']), helper.make_node('ReduceSum', ['c'], ['s'], keepdims=0),
         helper.make_node('Add', ['x', 's'], ['y'])],
        initialisers=[shape],
    )  # fmt: skip


def loop_without_end() -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node('Identity', ['on'], ['still']), helper.make_node('Identity', ['x0'], ['x1'])], 'body',
        [value('i', [], TensorProto.INT64), value('on', [], TensorProto.BOOL), value('x0', [1, 4])],
        [value('still', [], TensorProto.BOOL), value('x1', [1, 4])],
    )  # fmt: skip
    true = helper.make_tensor('true', TensorProto.BOOL, [], [True])
    return model([helper.make_node('Loop', ['', 'true', 'x'], ['y'], body=body)], initialisers=[true])


def deep_subgraphs() -> onnx.ModelProto:
    graph = helper.make_graph([helper.make_node('Identity', ['x'], ['b'])], 'leaf', [], [value('b', [1, 4])])
    for _ in range(28):
        node = helper.make_node('If', ['c'], ['b'], then_branch=graph, else_branch=graph.__class__())
        graph = helper.make_graph([node], 'inner', [], [value('b', [1, 4])])
    condition = helper.make_tensor('c', TensorProto.BOOL, [], [True])
    return model([helper.make_node('If', ['c'], ['y'], then_branch=graph, else_branch=graph)], initialisers=[condition])


def recursive_function() -> onnx.ModelProto:
    """Return a model whose function calls itself, so that it cannot be inlined."""
    call = helper.make_node('F', ['a'], ['b'], domain='d')
    opsets = [helper.make_opsetid('', 17), helper.make_opsetid('d', 1)]
    function = helper.make_function('d', 'F', ['a'], ['b'], [call], opsets)
    proto = model([helper.make_node('F', ['x'], ['y'], domain='d')])
    proto.opset_import.append(opsets[1])
    proto.functions.append(function)
    return proto


def cycle() -> onnx.ModelProto:
    return model([helper.make_node('Add', ['x', 'b'], ['a']), helper.make_node('Add', ['a', 'x'], ['b']),
                  helper.make_node('Identity', ['b'], ['y'])])  # fmt: skip


def identity(name: str = 'x', shape: list[int | str | None] | None = None) -> onnx.ModelProto:
    return model([helper.make_node('Identity', [name], ['y'])], shape=shape)


def everywhere() -> onnx.ModelProto:
    """Return y = x + m + c + b, with weights in one file each: of the main graph, of an attribute and of a branch."""
    large = weights('large')
    large.dims[:] = [1, LARGE.size]
    constant, branch = (weights('inside', offset=str(offset), length='8') for offset in (0, 8))
    for tensor in (constant, branch):
        tensor.dims[:] = [2]
    branch.name = 'v'
    graph = helper.make_graph([helper.make_node('Identity', ['v'], ['b'])], 'branch', [], [value('b', [2])], [branch])
    nodes = [
        helper.make_node('Constant', [], ['k'], value=constant),
        helper.make_node('If', ['c'], ['b'], then_branch=graph, else_branch=graph),
        helper.make_node('Add', ['x', 'w'], ['h']),
        helper.make_node('Concat', ['k', 'b'], ['t'], axis=0),
        helper.make_node('ReduceSum', ['t'], ['s']),
        helper.make_node('Add', ['h', 's'], ['y']),
    ]
    condition = helper.make_tensor('c', TensorProto.BOOL, [], [True])
    return model(nodes, shape=[1, LARGE.size], initialisers=[large, condition])


HOSTILE: dict[str, Callable[[], onnx.ModelProto | bytes]] = {
    'a huge input': lambda: identity(shape=[1 << 40, 1 << 20]),
    'an input of overflowing size': lambda: identity(shape=[1 << 62, 1 << 62]),
    'a negative input': lambda: identity(shape=[-3, 4]),
    'an input of no axis': lambda: identity(shape=[]),
    'a huge initialiser': huge_initialiser,
    'a negative initialiser': negative_initialiser,
    'a constant of a huge shape': constant_of_shape,
    'a cycle': cycle,
    'a function that calls itself': recursive_function,
    'subgraphs in subgraphs': deep_subgraphs,
    'a node of no name': lambda: model([helper.make_node('', ['x'], ['y'])]),
    'an unknown operator': lambda: model([helper.make_node('Teleport', ['x'], ['y'])]),
    'no node': lambda: model([]),
    'an output twice': lambda: model([helper.make_node('Relu', ['x'], ['y']), helper.make_node('Abs', ['x'], ['y'])]),
    'weights in ..': external('../secret'),
    'weights in a folder and back': external('deep/../../secret'),
    'weights at an absolute path': external('/etc/passwd'),
    'weights behind a link': external('link'),
    'weights behind a linked folder': external('out/secret'),
    'weights behind a link to itself': external('loop'),
    'weights in a folder': external('deep'),
    'weights in nothing': external(''),
    'weights in a name with a zero': external('a\0b'),
    'weights in a name too long': external('x' * 5000),
    'weights in a pipe': external('pipe'),
    'weights in a device': external('/dev/zero'),
    'weights beyond the end': external('inside', offset='4096', length='16'),
    'weights of a negative length': external('inside', offset='-8', length='-16'),
    'weights of a huge length': external('inside', length=str(1 << 62)),
    'weights of no number': external('inside', offset='x'),
    'weights of a signed number': external('inside', offset='+0'),
    'weights of half a length': external('inside', length='8'),
    'weights in two files': lambda: _twice('inside'),
    'weights in no file': lambda: add(weights('')),
    'weights in a folder of theirs': external('large/inside'),
    'weights larger than any memory': external('endless'),
    'an engine inside': lambda: model([helper.make_node('EPContext', ['x'], ['y'], domain='com.microsoft',
                                                        ep_cache_context=b'ftrt' * 9, embed_mode=1)]),
    'an operator that is no text': lambda: PLAIN.replace(b'Transpose', b'Trans\xff\xfese'),
    'an input that is no text': lambda: identity('xxxx').SerializeToString().replace(b'xxxx', b'\xff\xfe\xfd\xfc'),
    'a location that is no text': lambda: add(weights('inside')).SerializeToString().replace(b'inside', b'insid\xff'),
    'nothing': lambda: b'',
    'zeros': lambda: bytes(4096),
    'groups in groups': lambda: b'\x0b' * 5000,
    'messages in messages': lambda: _messages_in_messages(400),
}  # fmt: skip


def _twice(location: str) -> onnx.ModelProto:
    tensor = weights(location)
    tensor.external_data.add(key='location', value='large')
    return add(tensor)


def _messages_in_messages(depth: int) -> bytes:
    """Return graphs in attributes of nodes of graphs, deeper than a parser follows."""
    def field(number: int, content: bytes) -> bytes:
        length, size = b'', len(content)
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    content = b''
    for _ in range(depth):
        content = field(1, field(5, field(6, content)))
    return field(7, content)


def place(directory: Path) -> Path:
    """Make what hostile models name, in and around the directory of the model."""
    inner = directory / 'models'
    (inner / 'deep').mkdir(parents=True)
    (directory / 'secret').write_bytes(np.ones(4, np.float32).tobytes())
    (inner / 'inside').write_bytes(np.ones(4, np.float32).tobytes())
    (inner / 'large').write_bytes(LARGE.tobytes())
    (inner / 'link').symlink_to('../secret')
    (inner / 'out').symlink_to('..')
    (inner / 'loop').symlink_to('loop')
    os.mkfifo(inner / 'pipe')
    with (inner / 'endless').open('wb') as file:
        file.truncate(1 << 43)
    return inner / 'net.onnx'


@pytest.fixture(scope='module')
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp('onnx'))


def load_in_worker(file: Path, content: bytes) -> str:
    """Return what became of a model in a worker process: ``answered``, or the kind of the typed error."""
    file.write_bytes(content)
    host = None
    try:
        bundle = ModelBundle.load(file)
        host = worker_hosts(bundle, CONFIG)(CPU)
        host.load()
        request = {spec.name: np.ones([axis or 1 for axis in spec.shape], spec.dtype) for spec in host.inputs}
        host.begin(request)
        if host.poll(CONFIG.load_timeout_s) is None:
            host.kill()
            return 'late'
        return 'answered'
    except C7Error as error:
        assert str(error)
        return type(error).__name__
    finally:
        if host is not None:
            host.release()


def read(file: Path, content: bytes) -> bool:
    """Return whether a model passes what is looked at before ONNX Runtime sees it."""
    file.write_bytes(content)
    try:
        found = read_onnx(file, None)
        assert len(found.content_sha256) == 64
        found.dimension_overrides({})
    except C7Error as error:
        assert isinstance(error, EngineDeserializeError)
        str(error).encode()
        return False
    return True


def test_f1_the_undamaged_model_answers(file: Path) -> None:
    assert load_in_worker(file, PLAIN) == 'answered'
    assert load_in_worker(file, add(weights('inside')).SerializeToString()) == 'answered'
    assert load_in_worker(file, everywhere().SerializeToString()) == 'answered'


def bytes_of(name: str) -> bytes:
    made = HOSTILE[name]()
    return made if isinstance(made, bytes) else made.SerializeToString()


@pytest.mark.parametrize('name', HOSTILE)
def test_r3_a_hostile_model_is_read_or_refused(file: Path, name: str) -> None:
    passes = read(file, bytes_of(name))
    if name.startswith(('weights', 'a location', 'an engine')):
        assert not passes


@pytest.mark.parametrize('name', [name for name in HOSTILE if not name.startswith(('weights in', 'weights behind'))])
def test_f1_a_hostile_model_in_a_worker_is_a_typed_error(file: Path, name: str) -> None:
    outcome = load_in_worker(file, bytes_of(name))
    assert outcome in ('answered', 'EngineContentError', 'EngineDeserializeError', 'EngineSchemaMismatchError',
                       'InferenceError', 'WorkerDiedError', 'ModelBundleError')  # fmt: skip


def test_f4_a_model_that_never_answers_is_killed(file: Path) -> None:
    file.write_bytes(loop_without_end().SerializeToString())
    host = worker_hosts(ModelBundle.load(file), C7InferenceConfig(cpu_threads=1, load_timeout_s=5.0))(CPU)
    with pytest.raises(EngineDeserializeError, match='load_timeout_s'):
        host.load()
    host.release()


DAMAGED = damaged(
    PLAIN,
    (everywhere().SerializeToString(), *(bytes_of(name) for name in ('a cycle', 'an engine inside', 'weights in ..'))),
)
EVERYWHERE = damaged(everywhere().SerializeToString(), (PLAIN,))


@fuzz(300)
@given(content=DAMAGED)
def test_r3_a_damaged_model_is_read_or_refused(file: Path, content: bytes) -> None:
    read(file, content)


@fuzz(6, share=0.25)
@given(content=DAMAGED)
def test_f1_a_damaged_model_in_a_worker_answers_or_is_a_typed_error(file: Path, content: bytes) -> None:
    assert load_in_worker(file, content) != 'late'


@fuzz(6, share=0.25)
@given(seed=st.integers(0, 1 << 32))
def test_f1_a_model_with_one_wrong_bit_answers_or_is_a_typed_error(file: Path, seed: int) -> None:
    """Most flips pass the parser, so that ONNX Runtime sees them."""
    content = bytearray(PLAIN)
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8
    assert load_in_worker(file, bytes(content)) != 'late'


@fuzz(300)
@given(content=EVERYWHERE)
def test_r3_damaged_weights_in_other_files_are_read_or_refused(file: Path, content: bytes) -> None:
    read(file, content)


@fuzz(12, share=0.25)
@given(content=EVERYWHERE)
def test_f1_damaged_weights_in_other_files_in_a_worker_answer_or_are_a_typed_error(file: Path, content: bytes) -> None:
    assert load_in_worker(file, content) != 'late'
