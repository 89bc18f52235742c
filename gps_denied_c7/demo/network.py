"""A feature extractor whose weights are known by construction, as a model bundle."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.demo.terrain import paint_terrain
from gps_denied_c7.errors import C7Error
from gps_denied_c7.ground.command_line import path_argument
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec, ResizeMode
from gps_denied_c7.model.artefact import ONLY_GOLDEN, Artefact
from gps_denied_c7.model.bundle_write import write_bundle
from gps_denied_c7.model.compare import AllClose, MatchedDistance
from gps_denied_c7.model.files import write_atomically
from gps_denied_c7.tensors import TensorSpec

__all__ = [
    'BORDER',
    'HEIGHT',
    'KEYPOINTS',
    'NAME',
    'NMS_RADIUS',
    'THRESHOLD',
    'WIDTH',
    'WINDOW',
    'build_model',
    'expected_outputs',
    'main',
    'write_demo_bundle',
]

NAME = 'c7_demo_corners'
WIDTH, HEIGHT = 640, 480
KEYPOINTS = 512
"""Keypoints answered per image; where there are fewer, the rest have score 0, place -1 and descriptor 0."""
WINDOW = 5
"""Side of the box over which gradient products are summed, pixels."""
NMS_RADIUS = 4
"""A keypoint is the greatest response within this many pixels in x and in y."""
BORDER = 16
"""No keypoints this close to the edge, pixels: their patches would reach outside."""
THRESHOLD = 4e-4
"""Least response of a keypoint, for pixels in 0..1."""
CELL = 8
"""Side of a heatmap cell, pixels."""
PATCH_OFFSETS = tuple(range(-7, 8, 2))
"""Where a patch is sampled around its keypoint, in x and in y, pixels."""
_BLUR = 3
_EPSILON = 1e-6

# The oldest pair that has every operator used, so that ONNX Runtime 1.17 with TensorRT 8.6 loads it as well.
_OPSET = 17
_IR_VERSION = 8

_INPUTS = (TensorSpec('image', 'float32', (1, 1, HEIGHT, WIDTH)),)
_OUTPUTS = (
    TensorSpec('keypoints', 'float32', (1, KEYPOINTS, 2)),
    TensorSpec('scores', 'float32', (1, KEYPOINTS)),
    TensorSpec('descriptors', 'float32', (1, KEYPOINTS, len(PATCH_OFFSETS) ** 2)),
    TensorSpec('heatmap', 'float32', (1, 1, HEIGHT // CELL, WIDTH // CELL)),
)


class _Graph:
    """Collect nodes and constants; every method returns the name of what it made."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: NDArray) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        return output


def build_model() -> bytes:
    """
    Return the network as the bytes of an ONNX model, the same at every call.

    ``image`` 1x1x480x640 float32, grey in 0..1, gives

    - ``keypoints`` 1x512x2 float32, x and y in pixels, the strongest first;
    - ``scores`` 1x512 float32, their responses: the smaller eigenvalue of the gradient's second-moment matrix
      (Shi and Tomasi 1994), scaled as OpenCV's ``cornerMinEigenVal`` with ``blockSize=5, ksize=3``;
    - ``descriptors`` 1x512x64 float32, 8x8 samples of the smoothed patch, less their mean, of unit length;
    - ``heatmap`` 1x1x60x80 float32, the greatest response in each 8x8 cell, 0 along the border.
    """
    from onnx import TensorProto, checker, helper

    graph = _Graph()
    response = _corner_response(graph)
    strongest = _non_maximum_suppression(graph, response)
    _keypoints(graph, strongest)
    _descriptors(graph)
    _heatmap(graph, response)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            NAME,
            [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in _INPUTS],
            [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in _OUTPUTS],
            graph.constants,
        ),
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid('', _OPSET)],
        producer_name='gps_denied_c7',
    )
    checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _corner_response(graph: _Graph) -> str:
    scale = 1.0 / (4 * WINDOW)
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32) * np.float32(scale)
    kernels = np.stack([sobel, sobel.T])[:, None]
    gradient = graph.add(
        'Conv', ['image', graph.constant('sobel', kernels)], 'gradient', kernel_shape=[3, 3], pads=[1, 1, 1, 1]
    )
    graph.nodes.append(_split(gradient, ('gx', 'gy')))
    products = [
        graph.add('Mul', [left, right], name)
        for left, right, name in (('gx', 'gx', 'gxx'), ('gx', 'gy', 'gxy'), ('gy', 'gy', 'gyy'))
    ]
    stacked = graph.add('Concat', products, 'products', axis=1)
    reach = WINDOW // 2
    ones = graph.constant('box', np.ones((3, 1, WINDOW, 1), np.float32))
    columns = graph.add(
        'Conv', [stacked, ones], 'column_sums', kernel_shape=[WINDOW, 1], pads=[reach, 0, reach, 0], group=3
    )
    ones = graph.constant('box_row', np.ones((3, 1, 1, WINDOW), np.float32))
    sums = graph.add('Conv', [columns, ones], 'sums', kernel_shape=[1, WINDOW], pads=[0, reach, 0, reach], group=3)
    graph.nodes.append(_split(sums, ('sxx', 'sxy', 'syy')))
    half = graph.constant('half', np.array(0.5, np.float32))
    trace = graph.add('Mul', [graph.add('Add', ['sxx', 'syy'], 'trace'), half], 'half_trace')
    difference = graph.add('Mul', [graph.add('Sub', ['sxx', 'syy'], 'difference'), half], 'half_difference')
    squares = graph.add(
        'Add',
        [graph.add('Mul', [difference, difference], 'difference2'), graph.add('Mul', ['sxy', 'sxy'], 'sxy2')],
        'discriminant',
    )
    return graph.add('Sub', [trace, graph.add('Sqrt', [squares], 'spread')], 'response')


def _split(source: str, names: Sequence[str]) -> Any:
    from onnx import helper

    # Equal parts along the channels; opset 13 to 17 infer the sizes from the number of outputs.
    return helper.make_node('Split', [source], list(names), name=f'split_{source}', axis=1)


def _crop(graph: _Graph, source: str, output: str) -> str:
    bounds = {
        'crop_start': np.array([BORDER, BORDER], np.int64),
        'crop_end': np.array([HEIGHT - BORDER, WIDTH - BORDER], np.int64),
        'crop_axes': np.array([2, 3], np.int64),
    }
    known = {tensor.name for tensor in graph.constants}
    names = [name if name in known else graph.constant(name, value) for name, value in bounds.items()]
    return graph.add('Slice', [source, *names], output)


def _non_maximum_suppression(graph: _Graph, response: str) -> str:
    side = 2 * NMS_RADIUS + 1
    greatest = graph.add(
        'MaxPool', [response], 'neighbourhood', kernel_shape=[side, side], pads=[NMS_RADIUS] * 4, strides=[1, 1]
    )
    is_peak = graph.add('Equal', [response, greatest], 'is_peak')
    is_strong = graph.add('Greater', [response, graph.constant('threshold', np.array(THRESHOLD, np.float32))], 'strong')
    chosen = graph.add('And', [is_peak, is_strong], 'chosen')
    peaks = graph.add('Where', [chosen, response, graph.constant('zero', np.array(0, np.float32))], 'peaks')
    return _crop(graph, peaks, 'inner_peaks')


def _keypoints(graph: _Graph, peaks: str) -> None:
    from onnx import helper

    flat = graph.add('Reshape', [peaks, graph.constant('row', np.array([1, -1], np.int64))], 'flat_peaks')
    count = graph.constant('count', np.array([KEYPOINTS], np.int64))
    graph.nodes.append(
        helper.make_node('TopK', [flat, count], ['scores', 'place'], name='strongest', axis=1, largest=1, sorted=1)
    )
    # Integer arithmetic: in half precision a flat index would not survive.
    width = graph.constant('inner_width', np.array(WIDTH - 2 * BORDER, np.int64))
    border = graph.constant('border', np.array(BORDER, np.int64))
    row = graph.add('Div', ['place', width], 'inner_row')
    column = graph.add('Sub', ['place', graph.add('Mul', [row, width], 'row_start')], 'inner_column')
    y = graph.add('Add', [row, border], 'y')
    x = graph.add('Add', [column, border], 'x')
    last = graph.constant('last_axis', np.array([2], np.int64))
    points = [graph.add('Unsqueeze', [value, last], f'{value}_column') for value in (x, y)]
    places = graph.add('Cast', [graph.add('Concat', points, 'xy', axis=2)], 'xy_float', to=1)
    found = graph.add('Greater', ['scores', 'zero'], 'found')
    graph.add('Unsqueeze', [found, last], 'found_column')
    nowhere = graph.constant('nowhere', np.array(-1, np.float32))
    graph.add('Where', ['found_column', places, nowhere], 'keypoints')


def _descriptors(graph: _Graph) -> None:
    reach = _BLUR // 2
    box = graph.constant('blur', np.full((1, 1, _BLUR, _BLUR), 1 / _BLUR**2, np.float32))
    smooth = graph.add('Conv', ['image', box], 'smooth', kernel_shape=[_BLUR, _BLUR], pads=[reach] * 4)
    pixels = graph.add('Reshape', [smooth, graph.constant('all', np.array([-1], np.int64))], 'pixels')
    row_start = graph.add('Mul', ['y', graph.constant('width', np.array(WIDTH, np.int64))], 'image_row_start')
    centre = graph.add('Unsqueeze', [graph.add('Add', [row_start, 'x'], 'centre'), 'last_axis'], 'centre_column')
    grid = np.array([[[dy * WIDTH + dx for dy in PATCH_OFFSETS for dx in PATCH_OFFSETS]]], np.int64)
    samples = graph.add(
        'Gather', [pixels, graph.add('Add', [centre, graph.constant('grid', grid)], 'sample_places')], 'samples', axis=0
    )
    mean = graph.add('ReduceMean', [samples], 'mean', axes=[2], keepdims=1)
    centred = graph.add('Sub', [samples, mean], 'centred')
    power = graph.add('ReduceMean', [graph.add('Mul', [centred, centred], 'squared')], 'power', axes=[2], keepdims=1)
    # Sum of squares = mean of squares x samples; the mean keeps half precision in range.
    total = graph.add('Mul', [power, graph.constant('samples_per_patch', np.array(grid.size, np.float32))], 'energy')
    safe = graph.add('Add', [total, graph.constant('epsilon', np.array(_EPSILON, np.float32))], 'safe_energy')
    unit = graph.add('Div', [centred, graph.add('Sqrt', [safe], 'length')], 'unit')
    graph.add('Where', ['found_column', unit, 'zero'], 'descriptors')


def _heatmap(graph: _Graph, response: str) -> None:
    inner = _crop(graph, response, 'inner_response')
    cells = graph.add('MaxPool', [inner], 'cells', kernel_shape=[CELL, CELL], strides=[CELL, CELL])
    edge = BORDER // CELL
    pads = graph.constant('cell_border', np.array([0, 0, edge, edge, 0, 0, edge, edge], np.int64))
    graph.add('Pad', [cells, pads, 'zero'], 'heatmap', mode='constant')


def expected_outputs(image: NDArray) -> dict[str, NDArray]:
    """
    Return what the network must answer, computed by OpenCV and NumPy and not by running it.

    :param image: 480x640 float32, grey in 0..1.
    :return: arrays by output name, shaped as the network's.
    """
    import cv2

    response = cv2.cornerMinEigenVal(image, blockSize=WINDOW, ksize=3)
    side = 2 * NMS_RADIUS + 1
    greatest = cv2.dilate(response, np.ones((side, side), np.uint8))
    peaks = np.where((response == greatest) & (response > THRESHOLD), response, 0)
    inner = (slice(BORDER, HEIGHT - BORDER), slice(BORDER, WIDTH - BORDER))
    rows, columns = np.nonzero(peaks[inner])
    values = peaks[inner][rows, columns]
    order = np.argsort(-values, kind='stable')[:KEYPOINTS]
    found = len(order)
    keypoints = np.full((1, KEYPOINTS, 2), -1, np.float32)
    keypoints[0, :found] = np.column_stack([columns[order], rows[order]]) + BORDER
    scores = np.zeros((1, KEYPOINTS), np.float32)
    scores[0, :found] = values[order]

    smooth = cv2.blur(image, (_BLUR, _BLUR))
    descriptors = np.zeros((1, KEYPOINTS, len(PATCH_OFFSETS) ** 2), np.float32)
    for index, (x, y) in enumerate(keypoints[0, :found].astype(int)):
        patch = smooth[y - 7 : y + 8 : 2, x - 7 : x + 8 : 2].astype(np.float64)
        patch = patch - patch.mean()
        descriptors[0, index] = (patch / np.sqrt((patch**2).sum() + _EPSILON)).reshape(-1)

    heatmap = np.zeros((1, 1, HEIGHT // CELL, WIDTH // CELL), np.float32)
    edge = BORDER // CELL
    cells = response[inner].reshape(HEIGHT // CELL - 2 * edge, CELL, WIDTH // CELL - 2 * edge, CELL)
    heatmap[0, 0, edge:-edge, edge:-edge] = cells.max(axis=(1, 3))
    return {'keypoints': keypoints, 'scores': scores, 'descriptors': descriptors, 'heatmap': heatmap}


def write_demo_bundle(directory: Path | str) -> Path:
    """
    Write the network as a bundle into ``directory``, made where needed, and return the directory.

    The golden answer is OpenCV's, so a runtime that agrees with it computes the right thing, not merely the same
    thing as yesterday.

    :raises ModelBundleError: it cannot be written.
    """
    import cv2

    directory = Path(directory)
    model = build_model()
    path = directory / f'{NAME}.onnx'
    write_atomically(path, model)
    digest = f'sha256:{hashlib.sha256(model).hexdigest()}'
    land = paint_terrain(11, size_m=160.0, metres_per_pixel=0.2).pixels[100 : 100 + HEIGHT, 100 : 100 + WIDTH]
    image = cv2.cvtColor(land, cv2.COLOR_RGB2GRAY).astype(np.float32) / np.float32(255)
    write_bundle(
        directory,
        name=NAME,
        weights_digest=digest,
        inputs=_INPUTS,
        outputs=_OUTPUTS,
        preprocessing=PreprocessingSpec(
            # A letterbox's bars would make corners where they meet the image.
            width=WIDTH, height=HEIGHT, resize=ResizeMode.CENTRE_CROP, colour='gray', scale=1 / 255,
        ),
        artefacts=[
            Artefact.of_file(path, strategy='onnx_trt_ep', weights_digest=digest, precision='fp32', device='any')
        ],
        rules=[
            MatchedDistance('keypoints', max_distance=1.5, min_fraction=0.97),
            AllClose('scores', rtol=0.03, atol=2e-4),
            MatchedDistance('descriptors', max_distance=0.1, min_fraction=0.95),
            AllClose('heatmap', rtol=0.03, atol=2e-4),
        ],
        golden={ONLY_GOLDEN: ({'image': image[None, None]}, expected_outputs(image))},
    )  # fmt: skip
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog='c7_demo_network', description='Write the demo network as a model bundle.')
    parser.add_argument('directory', type=path_argument)
    options = parser.parse_args(arguments)
    try:
        print(write_demo_bundle(options.directory))
    except C7Error as error:
        print(f'c7_demo_network: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
