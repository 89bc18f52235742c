"""The demo network: its answers are those of OpenCV, not merely its own of yesterday."""

from __future__ import annotations

import numpy as np
import pytest

from gps_denied_c7.demo.flight import Camera, Flight, write_flight
from gps_denied_c7.demo.network import (
    BORDER,
    HEIGHT,
    KEYPOINTS,
    NAME,
    NMS_RADIUS,
    THRESHOLD,
    WIDTH,
    WINDOW,
    build_model,
    write_demo_bundle,
)
from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.model.bundle import ModelBundle

cv2 = pytest.importorskip('cv2')
onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

INNER = (slice(BORDER, HEIGHT - BORDER), slice(BORDER, WIDTH - BORDER))


def load(model: bytes):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(None, {'image': image[None, None]}), strict=True))


@pytest.fixture(scope='module')
def network():
    return load(build_model())


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    return ModelBundle.load(write_demo_bundle(tmp_path_factory.mktemp('bundle') / 'demo'))


@pytest.fixture(scope='module')
def flight_images(tmp_path_factory):
    rosbag2 = pytest.importorskip('rosbags.rosbag2')
    typesys = pytest.importorskip('rosbags.typesys')
    path = tmp_path_factory.mktemp('bag') / 'flight'
    write_flight(path, Flight(3.0, (Camera('/camera', WIDTH, HEIGHT, 'mono8', 2.0),)))
    store = typesys.get_typestore(typesys.Stores.ROS2_JAZZY)
    images = []
    with rosbag2.Reader(path) as reader:
        for connection, _, data in reader.messages():
            if connection.topic == '/camera/image_raw':
                pixels = store.deserialize_cdr(data, connection.msgtype).data.reshape(HEIGHT, WIDTH)
                images.append(pixels.astype(np.float32) / np.float32(255))
    return images


def checkerboard(square: int, angle_deg: float) -> tuple[np.ndarray, np.ndarray]:
    """Return an anti-aliased 6x8 checkerboard on grey, and the 35 places where four squares meet."""
    scale = 4
    board = (np.indices((6 * square * scale, 8 * square * scale)) // (square * scale)).sum(axis=0) % 2
    board = (board * 160 + 48).astype(np.uint8)
    turn = cv2.getRotationMatrix2D((0, 0), angle_deg, 1.0 / scale)
    middle = turn[:, :2] @ np.array([board.shape[1] - 1, board.shape[0] - 1]) / 2
    turn[:, 2] = np.array([WIDTH / 2 + 0.3, HEIGHT / 2 - 0.2]) - middle
    board = cv2.blur(board, (scale, scale))
    image = cv2.warpAffine(
        board, turn, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=128
    )
    lattice = np.array([(x, y) for y in range(1, 6) for x in range(1, 8)]) * square * scale - 0.5
    return image.astype(np.float32) / np.float32(255), lattice @ turn[:, :2].T + turn[:, 2]


def found_points(outputs) -> np.ndarray:
    return outputs['keypoints'][0][outputs['scores'][0] > 0]


def test_keypoints_are_the_maxima_of_opencvs_corner_response(network, flight_images):
    """Deliverable 6: places and scores against cornerMinEigenVal and dilate, on images of the flight."""
    for image in flight_images:
        outputs = network(image)
        response = cv2.cornerMinEigenVal(image, blockSize=5, ksize=3)
        side = 2 * NMS_RADIUS + 1
        peaks = (response == cv2.dilate(response, np.ones((side, side)))) & (response > THRESHOLD)
        inside = np.zeros_like(peaks)
        inside[INNER] = peaks[INNER]
        ranked = sorted(((response[y, x], x, y) for y, x in np.argwhere(inside)), reverse=True)[:KEYPOINTS]
        expected = {(x, y) for _, x, y in ranked}
        found = {(int(x), int(y)) for x, y in found_points(outputs)}
        assert len(expected) > 100
        # Both sides round differently in the last place, which may break a tie or the cut the other way.
        assert len(expected ^ found) <= 2
        scores = outputs['scores'][0]
        assert (np.diff(scores) <= 0).all()
        np.testing.assert_allclose(scores[: len(ranked)], [value for value, _, _ in ranked], rtol=1e-3, atol=1e-6)


def test_descriptors_are_the_normalised_patches(network, flight_images):
    """Deliverable 6: every descriptor against a patch cut out with NumPy."""
    for image in flight_images:
        outputs = network(image)
        smooth = cv2.blur(image, (3, 3))
        for (x, y), descriptor in zip(
            found_points(outputs).astype(int), outputs['descriptors'][0], strict=False
        ):
            patch = smooth[y - 7 : y + 8 : 2, x - 7 : x + 8 : 2]
            assert patch.shape == (8, 8)
            centred = (patch - patch.mean()).reshape(-1)
            assert float(descriptor @ centred) / np.linalg.norm(centred) > 0.999
            assert abs(np.linalg.norm(descriptor) - 1.0) < 1e-2


def test_heatmap_is_the_greatest_response_of_each_cell(network, flight_images):
    for image in flight_images:
        response = cv2.cornerMinEigenVal(image, blockSize=5, ksize=3)
        response[:BORDER], response[-BORDER:], response[:, :BORDER], response[:, -BORDER:] = 0, 0, 0, 0
        rows = np.arange(0, HEIGHT, 8)
        expected = np.maximum.reduceat(np.maximum.reduceat(response, rows, 0), np.arange(0, WIDTH, 8), 1)
        np.testing.assert_allclose(network(image)['heatmap'][0, 0], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(('square', 'angle'), [(20, 0.0), (24, 11.0), (31, 30.0), (40, 45.0)])
def test_checkerboard_corners_are_found_where_they_are(network, square, angle):
    """Deliverable 6: corners whose places are known beforehand, and none where the squares are flat."""
    image, corners = checkerboard(square, angle)
    found = found_points(network(image))
    distances = np.linalg.norm(corners[:, None] - found[None], axis=2)
    # The response is nearly level while the whole corner lies in the window over which it is summed.
    assert distances.min(axis=1).max() <= WINDOW / 2
    # Whatever else was found lies on the outline of the board, where squares meet the grey.
    strangers = found[distances.min(axis=0) > NMS_RADIUS]
    hull = cv2.convexHull(corners.astype(np.float32))
    assert all(cv2.pointPolygonTest(hull, (float(x), float(y)), True) < -square / 2 for x, y in strangers)


def test_an_image_without_corners_gives_none(network):
    """Nothing to see: all places -1, all descriptors 0, nothing non-finite."""
    ramp = np.linspace(0, 1, WIDTH, dtype=np.float32)[None].repeat(HEIGHT, axis=0)
    for image in (np.zeros((HEIGHT, WIDTH), np.float32), np.ones((HEIGHT, WIDTH), np.float32), ramp):
        outputs = network(image)
        assert all(np.isfinite(array).all() for array in outputs.values())
        assert (outputs['keypoints'] == -1).all()
        assert not outputs['scores'].any() and not outputs['descriptors'].any()


def test_corners_at_the_edge_are_left_out(network):
    """A corner closer than BORDER to the edge has no whole patch; one just inside is kept."""
    image = np.full((HEIGHT, WIDTH), 0.2, np.float32)
    image[4:12, 100:140] = 0.8
    image[BORDER + 3 : BORDER + 40, 300:340] = 0.8
    found = found_points(network(image))
    assert len(found) >= 4
    assert (found[:, 0] > 280).all()
    assert (found >= BORDER).all() and (found < np.array([WIDTH - BORDER, HEIGHT - BORDER])).all()


def test_golden_answer_is_opencvs_and_the_network_gives_it(bundle, network):
    """M-1: the golden proof of the bundle holds on ONNX Runtime."""
    image = bundle.golden_inputs()['image'][0, 0]
    assert bundle.compare(network(image)) == []
    response = cv2.cornerMinEigenVal(image, blockSize=5, ksize=3)
    columns, rows = bundle.golden_outputs()['keypoints'][0].astype(int).T
    np.testing.assert_allclose(bundle.golden_outputs()['scores'][0], response[rows, columns], rtol=1e-6)


@pytest.mark.parametrize(('constant', 'value'), [('sobel', 0.9), ('blur', 0.0), ('row', 1.2), ('threshold', 40.0)])
def test_wrong_weights_fail_the_golden_proof(bundle, constant, value):
    """M-1: the comparison rules tell a network whose constants were changed from the right one."""
    model = onnx.load_from_string(build_model())
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == constant]
    weights = onnx.numpy_helper.to_array(tensor).copy()
    weights.flat[:1] = weights.flat[:1] * value if value else -0.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(weights, constant))
    assert bundle.compare(load(model.SerializeToString())(bundle.golden_inputs()['image'][0, 0]))


def test_bundle_describes_the_network(bundle):
    """M-1: what model.json says is what the file takes and gives."""
    [artefact] = bundle.artefacts_for('onnx_trt_ep')
    artefact.verify()
    assert bundle.name == NAME
    assert bundle.weights_digest == f'sha256:{artefact.sha256}'
    session = onnxruntime.InferenceSession(artefact.path, providers=['CPUExecutionProvider'])
    for specs, tensors in ((bundle.inputs, session.get_inputs()), (bundle.outputs, session.get_outputs())):
        assert [(spec.name, list(spec.shape), 'tensor(float)') for spec in specs] == [
            (tensor.name, tensor.shape, tensor.type) for tensor in tensors
        ]
    assert bundle.image_input().name == 'image'


def test_old_runtimes_can_load_it():
    """ONNX Runtime 1.17 reads IR 9 and opset 20; its TensorRT 8.6 parser has each of these operators."""
    model = onnx.load_from_string(build_model())
    assert model.ir_version <= 9
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [('', 17)]
    assert {node.op_type for node in model.graph.node} <= {
        *('Add', 'And', 'Cast', 'Concat', 'Conv', 'Div', 'Equal', 'Gather', 'Greater', 'MaxPool', 'Mul', 'Pad'),
        *('ReduceMean', 'Reshape', 'Slice', 'Split', 'Sqrt', 'Sub', 'TopK', 'Unsqueeze', 'Where'),
    }


def test_the_bundle_is_the_same_bytes_every_time(tmp_path):
    first, second = (write_demo_bundle(tmp_path / name) for name in ('a', 'b'))
    files = [{file.name: file.read_bytes() for file in path.iterdir()} for path in (first, second)]
    assert files[0] == files[1]
    assert sorted(files[0]) == [f'{NAME}.onnx', 'golden_inputs.npz', 'golden_outputs.npz', 'model.json']


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(ModelBundleError, match='file'):
        write_demo_bundle(tmp_path / 'file')
