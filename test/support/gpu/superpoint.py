"""Networks that the GPU suite builds and runs: deterministic, and as large as what flies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from gps_denied_c7.tensors import TensorSpec

__all__ = ['HEIGHT', 'WIDTH', 'image', 'superpoint_inputs', 'superpoint_outputs', 'write_superpoint']

HEIGHT, WIDTH = 480, 640
_CELL = 8
_SCORES, _DESCRIPTORS = 65, 256
# Channels of the encoder's convolutions; two to a stage, a stage halves the image (but the last).
_ENCODER = ((1, 64), (64, 64), (64, 64), (64, 64), (64, 128), (128, 128), (128, 128), (128, 128))


def superpoint_inputs(height: int = HEIGHT, width: int = WIDTH) -> tuple[TensorSpec, ...]:
    return (TensorSpec('image', 'float32', (1, 1, height, width)),)


def superpoint_outputs(height: int = HEIGHT, width: int = WIDTH) -> tuple[TensorSpec, ...]:
    cells = (height // _CELL, width // _CELL)
    return (
        TensorSpec('scores', 'float32', (1, _SCORES, *cells)),
        TensorSpec('descriptors', 'float32', (1, _DESCRIPTORS, *cells)),
    )


def image(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.float32]:
    """Return grey noise with structure on several scales, in 0..1."""
    noise = np.random.default_rng(seed)
    total = np.zeros((height, width), np.float32)
    for block in (1, 8, 32):
        coarse = noise.random((-(-height // block), -(-width // block)), np.float32)
        total += np.kron(coarse, np.ones((block, block), np.float32))[:height, :width]
    return (total / total.max())[None, None]


def write_superpoint(path: Path, *, seed: int = 0, dynamic: bool = False, opset: int = 17) -> Path:
    """
    Write a network of SuperPoint's shape with random weights: a VGG encoder, a score and a descriptor head.

    :param dynamic: leave batch, height and width free.
    """
    weights = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []

    def convolve(source: str, name: str, channels: tuple[int, int], size: int, *, relu: bool) -> str:
        incoming, outgoing = channels
        scale = np.sqrt(2.0 / (incoming * size * size))
        kernel = (weights.standard_normal((outgoing, incoming, size, size)) * scale).astype(np.float32)
        bias = (weights.standard_normal(outgoing) * 0.01).astype(np.float32)
        tensors.extend(
            [numpy_helper.from_array(kernel, f'{name}.weight'), numpy_helper.from_array(bias, f'{name}.bias')]
        )
        answer = f'{name}.out' if relu else name
        nodes.append(
            helper.make_node(
                'Conv', [source, f'{name}.weight', f'{name}.bias'], [answer], name=name,
                kernel_shape=[size, size], pads=[size // 2] * 4,
            )
        )
        if relu:
            nodes.append(helper.make_node('Relu', [answer], [name], name=f'{name}.relu'))
        return name

    at = 'image'
    for index, channels in enumerate(_ENCODER):
        at = convolve(at, f'encoder{index}', channels, 3, relu=True)
        if index % 2 and index < len(_ENCODER) - 1:
            nodes.append(
                helper.make_node(
                    'MaxPool', [at], [f'pool{index}'], name=f'pool{index}', kernel_shape=[2, 2], strides=[2, 2]
                )
            )
            at = f'pool{index}'
    head = convolve(at, 'score_head', (128, 256), 3, relu=True)
    logits = convolve(head, 'score_logits', (256, _SCORES), 1, relu=False)
    nodes.append(helper.make_node('Softmax', [logits], ['scores'], name='softmax', axis=1))
    head = convolve(at, 'descriptor_head', (128, 256), 3, relu=True)
    raw = convolve(head, 'descriptor_raw', (256, _DESCRIPTORS), 1, relu=False)
    # An axis as attribute up to opset 17, as input from 18 on; 8.6's parser knows the former.
    nodes.append(helper.make_node('ReduceL2', [raw], ['length'], name='length', axes=[1], keepdims=1))
    nodes.append(helper.make_node('Div', [raw, 'length'], ['descriptors'], name='normalise'))

    free = ('batch', 'height', 'width')
    rows, columns = ('rows', 'columns') if dynamic else (HEIGHT // _CELL, WIDTH // _CELL)
    batch, height, width = free if dynamic else (1, HEIGHT, WIDTH)
    graph = helper.make_graph(
        nodes,
        'superpoint',
        [helper.make_tensor_value_info('image', TensorProto.FLOAT, [batch, 1, height, width])],
        [
            helper.make_tensor_value_info('scores', TensorProto.FLOAT, [batch, _SCORES, rows, columns]),
            helper.make_tensor_value_info('descriptors', TensorProto.FLOAT, [batch, _DESCRIPTORS, rows, columns]),
        ],
        tensors,
    )
    # Old enough for every ONNX Runtime and TensorRT that the suite meets.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', opset)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path
