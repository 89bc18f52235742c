"""The synthetic flight: reproducible, and its ground truth true."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from gps_denied_c7.demo import flight as flight_module
from gps_denied_c7.demo.flight import Camera, Flight, main, write_flight
from gps_denied_c7.demo.terrain import paint_terrain
from gps_denied_c7.errors import ConfigError

cv2 = pytest.importorskip('cv2')
rosbag2 = pytest.importorskip('rosbags.rosbag2')
typesys = pytest.importorskip('rosbags.typesys')

CAMERAS = (
    Camera('/camera', 640, 480, 'mono8', 5.0, compressed=True),
    Camera('/camera_hd', 1920, 1080, 'rgb8', 2.0, field_of_view_deg=66.0),
)


@pytest.fixture(scope='module')
def terrain():
    return paint_terrain(7)


@pytest.fixture(scope='module')
def bag(tmp_path_factory, terrain):
    path = tmp_path_factory.mktemp('bag') / 'flight'
    write_flight(path, Flight(3.0, CAMERAS), terrain=terrain)
    return path


def read(path: Path) -> dict[str, list]:
    """Return (bag time, message) by topic, read back with the types that the bag itself carries."""
    store = typesys.get_typestore(typesys.Stores.ROS2_JAZZY)
    messages = defaultdict(list)
    with rosbag2.Reader(path) as reader:
        for connection, time_ns, data in reader.messages():
            messages[connection.topic].append((time_ns, store.deserialize_cdr(data, connection.msgtype)))
    return messages


def stamp_ns(header) -> int:
    return header.stamp.sec * 1_000_000_000 + header.stamp.nanosec


def to_grey(image) -> np.ndarray:
    if image.encoding == 'mono8':
        return image.data.reshape(image.height, image.step)[:, : image.width]
    pixels = image.data.reshape(image.height, image.step)[:, : image.width * 3].reshape(image.height, image.width, 3)
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def project(marks, pose, info) -> np.ndarray:
    """Project ground points with OpenCV from the recorded pose and CameraInfo alone."""
    q, p = pose.pose.orientation, pose.pose.position
    x, y, z, w = q.x, q.y, q.z, q.w
    map_from_camera = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    turn, _ = cv2.Rodrigues(map_from_camera.T)
    shift = -map_from_camera.T @ np.array([p.x, p.y, p.z])
    ground = np.column_stack([marks, np.zeros(len(marks))])
    pixels, _ = cv2.projectPoints(ground, turn, shift, info.k.reshape(3, 3), info.d)
    return pixels.reshape(-1, 2)


@pytest.mark.parametrize('name', ['/camera', '/camera_hd'])
def test_ground_truth_projects_the_surveyed_marks_onto_their_pixels(bag, terrain, name):
    """Deliverable 6: pose and CameraInfo agree with the image to half a pixel, over the whole flight."""
    messages = read(bag)
    poses = dict(messages['/ground_truth/pose'])
    infos = dict(messages[f'{name}/camera_info'])
    errors = []
    for time_ns, image in messages[f'{name}/image_raw']:
        grey = to_grey(image)
        expected = project(terrain.marks, poses[time_ns], infos[time_ns])
        margin = 20
        inside = ((expected > margin) & (expected < np.array([image.width, image.height]) - margin)).all(axis=1)
        for point in expected[inside].astype(np.float32):
            window = (3, 3) if name == '/camera' else (7, 7)
            stop = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 40, 0.001)
            found = cv2.cornerSubPix(grey, point.reshape(1, 1, 2).copy(), window, (-1, -1), stop).reshape(2)
            column, row = np.rint(point).astype(int)
            reach = 5 if name == '/camera' else 14
            around = grey[row - reach : row + reach + 1, column - reach : column + reach + 1]
            assert around.min() < 70 and around.max() > 190, 'no checkered mark here'
            errors.append(np.abs(found - point).max())
    assert len(errors) > 10
    assert max(errors) < 0.5


def test_a_wrong_pose_would_be_noticed(bag, terrain):
    """The test above measures something: half a metre of error in the pose is several pixels."""
    messages = read(bag)
    time_ns, pose = messages['/ground_truth/pose'][0]
    info = dict(messages['/camera_hd/camera_info'])[time_ns]
    right = project(terrain.marks, pose, info)
    moved = project(terrain.marks + np.array([0.5, 0.0]), pose, info)
    assert np.abs(right - moved).max() > 3.0


def test_topics_stamps_and_sizes(bag):
    """Deliverable 6: 640x480 mono8 and 1920x1080 rgb8, with CameraInfo, stamps and the true pose."""
    messages = read(bag)
    firsts = {name: entries[0][1] for name, entries in messages.items()}
    shapes = {name: (i.width, i.height, i.encoding) for name, i in firsts.items() if hasattr(i, 'encoding')}
    assert shapes == {
        '/camera/image_raw': (640, 480, 'mono8'),
        '/camera_hd/image_raw': (1920, 1080, 'rgb8'),
    }
    assert {name: len(entries) for name, entries in messages.items()} == {
        '/camera/image_raw': 15,
        '/camera/camera_info': 15,
        '/camera/image_raw/compressed': 15,
        '/camera_hd/image_raw': 6,
        '/camera_hd/camera_info': 6,
        '/ground_truth/pose': 18,
    }
    for name, entries in messages.items():
        times = [time_ns for time_ns, _ in entries]
        assert times == sorted(set(times))
        assert all(stamp_ns(message.header) == time_ns for time_ns, message in entries), name
    frames = {message.header.frame_id for _, message in messages['/camera/image_raw'] + messages['/camera/camera_info']}
    assert frames == {'camera_optical_frame'}
    assert messages['/ground_truth/pose'][0][1].header.frame_id == 'map'
    for _, image in messages['/camera_hd/image_raw']:
        assert len(image.data) == image.step * image.height == 1920 * 1080 * 3


def test_compressed_frames_are_the_raw_ones(bag):
    """A JPEG of a frame decodes to nearly that frame."""
    messages = read(bag)
    for (_, raw), (_, jpeg) in zip(
        messages['/camera/image_raw'], messages['/camera/image_raw/compressed'], strict=True
    ):
        assert jpeg.format == 'jpeg'
        decoded = cv2.imdecode(jpeg.data, cv2.IMREAD_GRAYSCALE)
        assert cv2.PSNR(decoded, np.ascontiguousarray(to_grey(raw))) > 30.0


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_the_same_seed_gives_the_same_bytes(tmp_path, storage):
    """Deliverable 6: deterministic; terrain painted anew each time."""
    cameras = (Camera('/camera', 320, 240, 'rgb8', 4.0, compressed=True),)
    files = []
    for run, seed in (('a', 3), ('b', 3), ('c', 4)):
        path = tmp_path / run / 'flight'
        write_flight(path, Flight(0.5, cameras, seed, storage))
        files.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert sorted(files[0]) == ['flight.db3' if storage == 'sqlite3' else 'flight.mcap', 'metadata.yaml']
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_land_has_corners_and_contrast(bag):
    """The terrain is worth looking at for a feature extractor: corners everywhere, no flat tiles."""
    for _, image in read(bag)['/camera/image_raw']:
        corners = cv2.goodFeaturesToTrack(np.ascontiguousarray(to_grey(image)), 500, 0.02, 8)
        assert len(corners) > 200
        rows, columns = (np.floor(corners.reshape(-1, 2)[:, ::-1] / (120, 160)).astype(int)).T
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) >= 14


@pytest.mark.parametrize(
    'text', ['camera:640x480:mono8:15', '/camera:640:mono8:15', '/camera:640x480:yuv:15', '/c:640x480:mono8:0', '/c']
)
def test_a_camera_that_cannot_be_is_refused(text):
    with pytest.raises(ConfigError):
        Camera.parse(text)


def test_an_existing_directory_is_left_alone(tmp_path):
    (tmp_path / 'precious').write_text('kept')
    with pytest.raises(ConfigError, match='exists'):
        write_flight(tmp_path, Flight(0.1))
    assert (tmp_path / 'precious').read_text() == 'kept'


def test_command_line(tmp_path, capsys):
    bag = tmp_path / 'bag'
    arguments = ['--duration', '0.3', '--no-progress', '--storage', 'sqlite3', '--camera', '/down:160x120:bgr8:10']
    assert main([str(bag), *arguments]) == 0
    assert '3 on /down/image_raw' in capsys.readouterr().out
    [(_, image), *_] = read(bag)['/down/image_raw']
    assert image.encoding == 'bgr8'
    assert main([str(bag), *arguments]) == 1
    assert 'Name a new directory' in capsys.readouterr().err


def test_the_command_line_names_every_topic_of_images_that_it_recorded(tmp_path, capsys):
    camera = '/down:160x120:bgr8:10:compressed'
    assert main([str(tmp_path / 'bag'), '--duration', '0.3', '--no-progress', '--camera', camera]) == 0
    assert '3 on /down/image_raw, 3 on /down/image_raw/compressed;' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(['--help'])
    assert 'NAME/image_raw/compressed' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('package', 'remedy'),
    [('cv2', 'apt-get install python3-opencv'), ('rosbags', 'pip install -r requirements/runtime.txt')],
)
def test_a_package_that_is_missing_is_one_line_with_the_remedy(tmp_path, capsys, monkeypatch, package, remedy):
    for name in [name for name in sys.modules if name.partition('.')[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main([str(tmp_path / 'bag'), '--duration', '0.1', '--no-progress']) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f'the Python package {package} is not installed.' in line and remedy in line


def test_quaternion_is_the_rotation_in_every_direction():
    """All four branches of the conversion give a unit quaternion that turns vectors like the matrix."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        matrix, _ = cv2.Rodrigues(rng.normal(0.0, 2.0, 3))
        x, y, z, w = flight_module.Pose(np.zeros(3), matrix).quaternion()
        vector = rng.normal(size=3)
        imaginary = np.array([x, y, z])
        turned = vector + 2 * np.cross(imaginary, np.cross(imaginary, vector) + w * vector)
        np.testing.assert_allclose(turned, matrix @ vector, atol=1e-12)
