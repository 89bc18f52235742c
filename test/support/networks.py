"""Small networks whose behaviour is known by construction: exact, slow, slow to load, hanging, failing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, load_from_string, numpy_helper

from gps_denied_c7.demo.network import build_model
from gps_denied_c7.model.artefact import ONLY_GOLDEN, Artefact
from gps_denied_c7.model.bundle import ModelBundle, write_bundle
from gps_denied_c7.model.files import file_sha256

__all__ = [
    'HEIGHT',
    'WHITE',
    'WIDTH',
    'copying',
    'failing_on_white',
    'greedy_on_white',
    'hanging_on_white',
    'scoring_twofold',
    'slow',
    'slow_to_load',
]

WIDTH, HEIGHT = 64, 48
WHITE = b'\xff' * (WIDTH * HEIGHT)
"""The mono8 image for which the networks that fail or hang do so; one bright pixel is not enough."""

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def copying(directory: Path, *, width: int = WIDTH, height: int = HEIGHT, extra: Sequence[str] = ()) -> str:
    """
    Write a network that answers ``copy``, the image in 0..255, and ``mean``, which has no axis.

    :param extra: names of further inputs, which a node that feeds one image cannot fill.
    """
    inputs = [_image(width, height), *(helper.make_tensor_value_info(name, FLOAT, [1]) for name in extra)]
    return _write(directory / f'copying{"".join(extra)}.onnx', [], width, height, inputs=inputs)


def slow(directory: Path, *, multiplications: int = 8, size: int = 512) -> str:
    """Write a copying network that takes 2 × size³ × multiplications operations for every image."""
    factor = np.full((size, size), 1.0 / size, np.float32)
    nodes = [helper.make_node('Mul', ['mean', 'factor'], ['product 0'])]
    nodes += [
        helper.make_node('MatMul', [f'product {number}', 'factor'], [f'product {number + 1}'])
        for number in range(multiplications)
    ]
    nodes.append(helper.make_node('ReduceMax', [f'product {multiplications}'], ['work'], keepdims=0))
    return _write(
        directory / 'slow.onnx', nodes, initialisers=[numpy_helper.from_array(factor, 'factor')], outputs=('work',)
    )


def slow_to_load(directory: Path, *, multiplications: int, size: int = 1024) -> str:
    """Write a copying network for which ONNX Runtime multiplies size × size constants while it loads."""
    shape = numpy_helper.from_array(np.array([size, size], np.int64), 'shape')
    value = helper.make_tensor('value', FLOAT, [1], [1.0 / size])
    nodes = [helper.make_node('ConstantOfShape', ['shape'], ['product 0'], value=value)]
    nodes += [
        helper.make_node('MatMul', [f'product {number}', 'product 0'], [f'product {number + 1}'])
        for number in range(multiplications)
    ]
    nodes.append(helper.make_node('ReduceMax', [f'product {multiplications}'], ['work'], keepdims=0))
    return _write(directory / 'slow_to_load.onnx', nodes, initialisers=[shape], outputs=('work',))


def hanging_on_white(directory: Path) -> str:
    """Write a copying network that does not return in this life from an all-white image."""
    nodes = [
        *_is_white(INT64),
        helper.make_node('Mul', ['is white', 'for ever'], ['rounds']),
        _loop('rounds'),
    ]
    for_ever = numpy_helper.from_array(np.array(1 << 60, np.int64), 'for ever')
    return _write(
        directory / 'hanging_on_white.onnx', nodes, initialisers=[for_ever, *_LOOP_CONSTANTS], outputs=('work',)
    )


def failing_on_white(directory: Path) -> str:
    """Write a copying network whose output is not finite for an all-white image."""
    one = numpy_helper.from_array(np.array(1.0, np.float32), 'one')
    nodes = [
        *_is_white(FLOAT),
        helper.make_node('Sub', ['one', 'is white'], ['is not white']),
        helper.make_node('Div', ['one', 'is not white'], ['work']),
    ]
    return _write(directory / 'failing_on_white.onnx', nodes, initialisers=[one], outputs=('work',))


def greedy_on_white(directory: Path, *, gigabytes: int) -> str:
    """Write a copying network that fills so much memory for an all-white image, and next to none for others."""
    size = numpy_helper.from_array(np.array([gigabytes << 28], np.int64), 'size')
    one = helper.make_tensor('value', FLOAT, [1], [1.0])
    nodes = [
        *_is_white(INT64),
        helper.make_node('Mul', ['is white', 'size'], ['wanted']),
        helper.make_node('ConstantOfShape', ['wanted'], ['filled'], value=one),
        helper.make_node('ReduceSum', ['filled'], ['work'], keepdims=0),
    ]
    return _write(directory / 'greedy_on_white.onnx', nodes, initialisers=[size], outputs=('work',))


def scoring_twofold(demo_bundle: str, directory: Path, *, golden_factor: float = 2.0) -> str:
    """
    Write a bundle of the demo network with other weights: its ``scores`` are twice as great.

    :param golden_factor: of the scores in the golden answer; another than 2 makes a bundle that fails its proof.
    """
    model = load_from_string(build_model())
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ['single scores' if name == 'scores' else name for name in names]
    model.graph.initializer.append(numpy_helper.from_array(np.array(2.0, np.float32), 'two'))
    model.graph.node.append(helper.make_node('Mul', ['single scores', 'two'], ['scores']))
    directory.mkdir()
    path = directory / 'twofold.onnx'
    path.write_bytes(model.SerializeToString())
    digest = f'sha256:{file_sha256(path)}'
    demo = ModelBundle.load(demo_bundle)
    golden = demo.golden_outputs()
    write_bundle(
        directory,
        name='twofold',
        weights_digest=digest,
        inputs=demo.inputs,
        outputs=demo.outputs,
        preprocessing=demo.preprocessing,
        artefacts=[
            Artefact.of_file(path, strategy='onnx_trt_ep', weights_digest=digest, precision='fp32', device='any')
        ],
        rules=demo.rules,
        golden={
            ONLY_GOLDEN: (
                demo.golden_inputs(),
                {**golden, 'scores': golden['scores'] * np.float32(golden_factor)},
            )
        },
    )
    return str(directory)


def _is_white(dtype: int) -> list[NodeProto]:
    limit = helper.make_tensor('value', FLOAT, [], [254.5])
    return [
        helper.make_node('Constant', [], ['nearly white'], value=limit),
        helper.make_node('Greater', ['mean', 'nearly white'], ['above']),
        helper.make_node('Cast', ['above'], ['is white'], to=dtype),
    ]


_LOOP_CONSTANTS = [
    numpy_helper.from_array(np.array(True), 'go on'),
    numpy_helper.from_array(np.array(0.0, np.float32), 'nothing'),
]


def _loop(count: str) -> NodeProto:
    body = helper.make_graph(
        [helper.make_node('Cos', ['before'], ['after']), helper.make_node('Identity', ['condition'], ['still'])],
        'body',
        [
            helper.make_tensor_value_info('round', INT64, []),
            helper.make_tensor_value_info('condition', BOOL, []),
            helper.make_tensor_value_info('before', FLOAT, []),
        ],
        [helper.make_tensor_value_info('still', BOOL, []), helper.make_tensor_value_info('after', FLOAT, [])],
    )
    return helper.make_node('Loop', [count, 'go on', 'nothing'], ['work'], body=body)


def _image(width: int, height: int) -> ValueInfoProto:
    return helper.make_tensor_value_info('image', FLOAT, [1, 1, height, width])


def _write(
    path: Path,
    nodes: Sequence[NodeProto],
    width: int = WIDTH,
    height: int = HEIGHT,
    *,
    inputs: Sequence[ValueInfoProto] | None = None,
    outputs: Sequence[str] = (),
    initialisers: Sequence[TensorProto] = (),
) -> str:
    copying_nodes = [
        helper.make_node('Mul', ['image', 'full scale'], ['copy']),
        helper.make_node('ReduceMean', ['copy'], ['mean'], keepdims=0),
    ]
    graph = helper.make_graph(
        [*copying_nodes, *nodes],
        'graph',
        inputs or [_image(width, height)],
        [
            helper.make_tensor_value_info('copy', FLOAT, [1, 1, height, width]),
            helper.make_tensor_value_info('mean', FLOAT, []),
            *(helper.make_tensor_value_info(name, FLOAT, []) for name in outputs),
        ],
        [numpy_helper.from_array(np.array(255.0, np.float32), 'full scale'), *initialisers],
    )
    # The oldest ONNX Runtime in use reads this.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return str(path)
