"""A feature extractor whose weights are known by construction, as a model bundle."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.demo.terrain import paint_terrain
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec, ResizeMode
from gps_denied_c7.model.artefact import ONLY_GOLDEN, Artefact
from gps_denied_c7.model.bundle import write_bundle
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
_REACH = WINDOW // 2
_NMS_SIDE = 2 * NMS_RADIUS + 1

_INPUTS = (TensorSpec('image', 'float32', (1, 1, HEIGHT, WIDTH)),)
_OUTPUTS = (
    TensorSpec('keypoints', 'float32', (1, KEYPOINTS, 2)),
    TensorSpec('scores', 'float32', (1, KEYPOINTS)),
    TensorSpec('descriptors', 'float32', (1, KEYPOINTS, len(PATCH_OFFSETS) ** 2)),
    TensorSpec('heatmap', 'float32', (1, 1, HEIGHT // CELL, WIDTH // CELL)),
)

_NETWORK = f"""
<ir_version: 8, opset_import: ["" : 17], producer_name: "gps_denied_c7">
{NAME} (float[1,1,{HEIGHT},{WIDTH}] image) => (
    float[1,{KEYPOINTS},2] keypoints, float[1,{KEYPOINTS}] scores,
    float[1,{KEYPOINTS},{len(PATCH_OFFSETS) ** 2}] descriptors, float[1,1,{HEIGHT // CELL},{WIDTH // CELL}] heatmap)
{{
    # The corner response. Split into equal parts: opset 13 to 17 infer the sizes from the number of outputs.
    gradient = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, sobel)
    gx, gy = Split <axis = 1> (gradient)
    gxx = Mul (gx, gx)
    gxy = Mul (gx, gy)
    gyy = Mul (gy, gy)
    products = Concat <axis = 1> (gxx, gxy, gyy)
    column_sums = Conv <kernel_shape = [{WINDOW}, 1], pads = [{_REACH}, 0, {_REACH}, 0], group = 3> (products, column)
    sums = Conv <kernel_shape = [1, {WINDOW}], pads = [0, {_REACH}, 0, {_REACH}], group = 3> (column_sums, row)
    sxx, sxy, syy = Split <axis = 1> (sums)
    trace = Add (sxx, syy)
    half_trace = Mul (trace, half)
    difference = Sub (sxx, syy)
    half_difference = Mul (difference, half)
    difference2 = Mul (half_difference, half_difference)
    sxy2 = Mul (sxy, sxy)
    discriminant = Add (difference2, sxy2)
    spread = Sqrt (discriminant)
    response = Sub (half_trace, spread)

    # Non-maximum suppression.
    neighbourhood = MaxPool <kernel_shape = {[_NMS_SIDE] * 2}, pads = {[NMS_RADIUS] * 4}, strides = [1, 1]> (response)
    is_peak = Equal (response, neighbourhood)
    is_strong = Greater (response, threshold)
    chosen = And (is_peak, is_strong)
    peaks = Where (chosen, response, zero)
    inner_peaks = Slice (peaks, crop_start, crop_end, crop_axes)

    # The strongest keypoints. Integer arithmetic: in half precision a flat index would not survive.
    flat_peaks = Reshape (inner_peaks, flat)
    scores, place = TopK <axis = 1, largest = 1, sorted = 1> (flat_peaks, count)
    inner_row = Div (place, inner_width)
    row_start = Mul (inner_row, inner_width)
    inner_column = Sub (place, row_start)
    y = Add (inner_row, border)
    x = Add (inner_column, border)
    x_column = Unsqueeze (x, last_axis)
    y_column = Unsqueeze (y, last_axis)
    xy = Concat <axis = 2> (x_column, y_column)
    xy_float = Cast <to = 1> (xy)
    found = Greater (scores, zero)
    found_column = Unsqueeze (found, last_axis)
    keypoints = Where (found_column, xy_float, nowhere)

    # Their descriptors. Sum of squares = mean of squares x samples; the mean keeps half precision in range.
    smooth = Conv <kernel_shape = [{_BLUR}, {_BLUR}], pads = {[_BLUR // 2] * 4}> (image, blur)
    pixels = Reshape (smooth, all)
    image_row_start = Mul (y, width)
    centre = Add (image_row_start, x)
    centre_column = Unsqueeze (centre, last_axis)
    sample_places = Add (centre_column, grid)
    samples = Gather <axis = 0> (pixels, sample_places)
    mean = ReduceMean <axes = [2], keepdims = 1> (samples)
    centred = Sub (samples, mean)
    squared = Mul (centred, centred)
    power = ReduceMean <axes = [2], keepdims = 1> (squared)
    energy = Mul (power, samples_per_patch)
    safe_energy = Add (energy, epsilon)
    length = Sqrt (safe_energy)
    unit = Div (centred, length)
    descriptors = Where (found_column, unit, zero)

    # The heatmap.
    inner_response = Slice (response, crop_start, crop_end, crop_axes)
    cells = MaxPool <kernel_shape = [{CELL}, {CELL}], strides = [{CELL}, {CELL}]> (inner_response)
    heatmap = Pad <mode = "constant"> (cells, cell_border, zero)
}}
"""
"""
The network as text for ONNX's parser.

It has the oldest pair of IR version and opset that has every operator used, so that ONNX Runtime 1.17 with TensorRT 8.6
loads it as well.
"""


def _constants() -> dict[str, NDArray]:
    """Return the network's constants by name."""
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32) * np.float32(1.0 / (4 * WINDOW))
    grid = np.array([[[dy * WIDTH + dx for dy in PATCH_OFFSETS for dx in PATCH_OFFSETS]]], np.int64)
    edge = BORDER // CELL
    return {
        'sobel': np.stack([sobel, sobel.T])[:, None],
        'column': np.ones((3, 1, WINDOW, 1), np.float32),
        'row': np.ones((3, 1, 1, WINDOW), np.float32),
        'half': np.array(0.5, np.float32),
        'threshold': np.array(THRESHOLD, np.float32),
        'zero': np.array(0, np.float32),
        'crop_start': np.array([BORDER, BORDER], np.int64),
        'crop_end': np.array([HEIGHT - BORDER, WIDTH - BORDER], np.int64),
        'crop_axes': np.array([2, 3], np.int64),
        'flat': np.array([1, -1], np.int64),
        'count': np.array([KEYPOINTS], np.int64),
        'inner_width': np.array(WIDTH - 2 * BORDER, np.int64),
        'border': np.array(BORDER, np.int64),
        'last_axis': np.array([2], np.int64),
        'nowhere': np.array(-1, np.float32),
        'blur': np.full((1, 1, _BLUR, _BLUR), 1 / _BLUR**2, np.float32),
        'all': np.array([-1], np.int64),
        'width': np.array(WIDTH, np.int64),
        'grid': grid,
        'samples_per_patch': np.array(grid.size, np.float32),
        'epsilon': np.array(_EPSILON, np.float32),
        'cell_border': np.array([0, 0, edge, edge, 0, 0, edge, edge], np.int64),
    }


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
    from onnx import checker, numpy_helper, parser

    model = parser.parse_model(_NETWORK)
    for node in model.graph.node:
        node.name = node.output[0]
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in _constants().items())
    checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def expected_outputs(image: NDArray) -> dict[str, NDArray]:
    """
    Return what the network must answer, computed by OpenCV and NumPy and not by running it.

    :param image: 480x640 float32, grey in 0..1.
    :return: arrays by output name, shaped as the network's.
    """
    import cv2

    response = cv2.cornerMinEigenVal(image, blockSize=WINDOW, ksize=3)
    greatest = cv2.dilate(response, np.ones((_NMS_SIDE, _NMS_SIDE), np.uint8))
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
