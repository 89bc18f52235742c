"""Small networks as .onnx files, and bundles around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import write_bundle
from gps_denied_c7.model.compare import AllClose
from gps_denied_c7.model.files import file_sha256
from gps_denied_c7.tensors import TensorSpec

SHAPE = (1, 3, 24, 32)
KERNEL = np.random.RandomState(1).normal(size=(4, 3, 3, 3)).astype(np.float32)


def network(
    shape: Sequence[int | str | None] = SHAPE,
    *,
    nodes: Sequence[onnx.NodeProto] = (),
    outputs: Mapping[str, tuple[int, Sequence[int | str | None] | None]] | None = None,
    inputs: Sequence[str] = ('image',),
    dtype: int = TensorProto.FLOAT,
    weights_are_inputs: bool = False,
) -> onnx.ModelProto:
    """Return features = convolution of the image; ``nodes`` may go on from there."""
    element = helper.tensor_dtype_to_np_dtype(dtype)
    kernel = numpy_helper.from_array(KERNEL.astype(element), 'kernel')
    described = outputs or {'features': (dtype, [1, 4, None, None])}
    values = [helper.make_tensor_value_info(name, dtype, shape) for name in inputs]
    if weights_are_inputs:
        values.append(helper.make_tensor_value_info('kernel', dtype, KERNEL.shape))
    convolution = helper.make_node('Conv', ['image', 'kernel'], ['features'], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    graph = helper.make_graph(
        [convolution, *nodes],
        'graph',
        values,
        [helper.make_tensor_value_info(name, kind, axes) for name, (kind, axes) in described.items()],
        [kernel],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)


def saved(directory: Path, model: onnx.ModelProto | None = None, name: str = 'net.onnx') -> Path:
    path = directory / name
    path.write_bytes((model or network()).SerializeToString())
    return path


def endless() -> onnx.ModelProto:
    """Return a network that ONNX Runtime accepts and that never answers: a loop of 2**62 rounds."""
    scalar, values = helper.make_tensor_value_info, (1, 4, 24, 32)
    body = helper.make_graph(
        [helper.make_node('Identity', ['on'], ['still on']), helper.make_node('Add', ['sum', 'sum'], ['twice'])],
        'body',
        [scalar('round', TensorProto.INT64, []), scalar('on', TensorProto.BOOL, []),
         scalar('sum', TensorProto.FLOAT, values)],
        [scalar('still on', TensorProto.BOOL, []), scalar('twice', TensorProto.FLOAT, values)],
    )  # fmt: skip
    nodes = [
        helper.make_node('Constant', [], ['rounds'], value=numpy_helper.from_array(np.array(2**62))),
        helper.make_node('Constant', [], ['yes'], value=numpy_helper.from_array(np.array(True))),
        helper.make_node('Loop', ['rounds', 'yes', 'features'], ['out'], body=body),
    ]
    return network(nodes=nodes, outputs={'out': (TensorProto.FLOAT, values)})


def plain_answers(path: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, dict(inputs)), strict=True))


def free(directory: Path, axes: list[int | str | None], name: str = 'free.onnx') -> Path:
    """Write a model of grey means, which takes any size and any number of channels."""
    kernel = KERNEL[:, :1].copy()
    nodes = [
        helper.make_node('ReduceMean', ['image'], ['grey'], axes=[1], keepdims=1),
        helper.make_node('Conv', ['grey', 'kernel'], ['features'], kernel_shape=[3, 3]),
    ]
    graph = helper.make_graph(
        nodes, 'graph', [helper.make_tensor_value_info('image', TensorProto.FLOAT, axes)],
        [helper.make_tensor_value_info('features', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(kernel, 'kernel')],
    )  # fmt: skip
    return saved(directory, helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8), name)


def handmade(root: Path, shape: tuple[int | None, ...] = (1, 3, 24, 32), *others: str) -> Path:
    """Write a bundle by hand, with a second input for each of ``others`` that is a constant in every request."""
    root.mkdir()
    nodes = [helper.make_node('Conv', ['image', 'kernel'], ['conv'], kernel_shape=[3, 3])]
    nodes += [helper.make_node('Add', ['conv' if not index else f's{index}', name], [f's{index + 1}'])
              for index, name in enumerate(others)]  # fmt: skip
    nodes.append(helper.make_node('Identity', [nodes[-1].output[0]], ['features']))
    declared = [1, 3, *('height' if shape[2] is None else 24, 'width' if shape[3] is None else 32)]
    graph = helper.make_graph(
        nodes, 'graph',
        [helper.make_tensor_value_info('image', TensorProto.FLOAT, declared),
         *(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in others)],
        [helper.make_tensor_value_info('features', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(KERNEL, 'kernel')],
    )  # fmt: skip
    path = saved(root, helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8))
    request = {'image': np.random.default_rng(0).random((1, 3, 24, 32), np.float32)}
    request |= {name: np.ones(1, np.float32) for name in others}
    answer = ort.InferenceSession(path.read_bytes(), providers=['CPUExecutionProvider']).run(['features'], request)[0]
    digest = f'sha256:{file_sha256(path)}'
    write_bundle(
        root, name='net', weights_digest=digest,
        inputs=[TensorSpec('image', 'float32', shape), *(TensorSpec(name, 'float32', (1,)) for name in others)],
        outputs=[TensorSpec('features', 'float32', (1, 4, 22, 30) if None not in shape else (1, 4, None, None))],
        preprocessing=PreprocessingSpec(width=32, height=24),
        artefacts=[Artefact.of_file(path, strategy='onnx_trt_ep', weights_digest=digest)],
        rules=[AllClose('features', rtol=0.0, atol=1e-3)], golden={'one': (request, {'features': answer})},
    )  # fmt: skip
    return root
