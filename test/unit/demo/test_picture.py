"""The picture of the detections: keypoints where they are, and nothing claimed of what was not seen."""

from __future__ import annotations

import numpy as np
import pytest

from gps_denied_c7.demo.flight import Camera, Flight, write_flight
from gps_denied_c7.demo.picture import Detections, compose, draw_detections, read_frame
from gps_denied_c7.demo.terrain import paint_terrain

cv2 = pytest.importorskip('cv2')

CROP = np.array([[2.25, 0.0, 240.625], [0.0, 2.25, 0.625]])
"""640x480 out of the middle of 1920x1080."""


def found(image: np.ndarray, points, scores=None, mapping=CROP, topic='/camera_hd/image_raw') -> Detections:
    points = np.asarray(points, np.float32).reshape(-1, 2)
    scores = np.full(len(points), 0.01, np.float32) if scores is None else np.asarray(scores, np.float32)
    heatmap = np.abs(np.sin(np.arange(60 * 80))).reshape(60, 80).astype(np.float32)
    return Detections(topic, image, points, scores, heatmap, mapping, (640, 480))


@pytest.mark.parametrize('point', [(100.0, 50.0), (600.0, 400.0), (320.0, 240.0)])
@pytest.mark.parametrize('size', [(1440, 810), (960, 540)])
def test_a_keypoint_is_drawn_where_network_to_image_puts_it(point, size):
    """§6: network pixel → image pixel → place in the picture, within a pixel."""
    image = np.full((1080, 1920, 3), 90, np.uint8)
    empty = draw_detections(found(image, []), *size)
    drawn = draw_detections(found(image, [point]), *size)
    rows, columns = np.nonzero((drawn != empty).any(axis=2))
    expected = (CROP[:, :2] @ point + CROP[:, 2]) * size[0] / 1920
    assert abs((columns.min() + columns.max()) / 2 - expected[0]) < 1.0
    assert abs((rows.min() + rows.max()) / 2 - expected[1]) < 1.0


def test_padding_is_not_drawn():
    image = np.full((1080, 1920, 3), 90, np.uint8)
    empty = draw_detections(found(image, []), 960, 540)
    assert (draw_detections(found(image, [(-1, -1), (300, 200)], [0, 0]), 960, 540) == empty).all()
    assert found(image, [(-1, -1), (300, 200)], [0, 0.5]).count == 1


def test_stronger_keypoints_are_larger():
    image = np.full((1080, 1920, 3), 90, np.uint8)
    empty = draw_detections(found(image, []), 1440, 810)
    drawn = draw_detections(found(image, [(100, 100), (500, 100)], [0.001, 0.1]), 1440, 810)
    changed = (drawn != empty).any(axis=2)
    assert 0 < changed[:, :720].sum() < changed[:, 720:].sum()


def test_what_the_crop_left_out_is_greyed():
    image = np.zeros((1080, 1920, 3), np.uint8)
    image[..., 1] = 200
    drawn = draw_detections(found(image, []), 960, 540)
    assert np.ptp(drawn[270, 40]) == 0 and np.ptp(drawn[270, 920]) == 0
    assert tuple(drawn[270, 480]) == (0, 200, 0)
    whole = draw_detections(found(image[:, :1440], [], mapping=CROP * [[1, 1, 0], [1, 1, 1]]), 720, 540)
    assert (whole == (0, 200, 0)).all()


@pytest.mark.parametrize('count', [1, 2, 3])
def test_compose_takes_any_number_of_frames(count):
    frames = [
        found(np.full((1080, 1920, 3), 80, np.uint8), [(10, 10)]),
        found(np.full((480, 640, 3), 80, np.uint8), [(10, 10)], mapping=np.eye(3)[:2], topic='/camera/image_raw'),
        found(np.full((240, 320, 3), 80, np.uint8), [], mapping=np.eye(3)[:2] / 2, topic='/small'),
    ][:count]
    picture = compose(frames, 'Title', 'facts … more')
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert 1400 < picture.shape[1] < 2200 and 700 < picture.shape[0] < 1100


@pytest.mark.parametrize('encoding', ['mono8', 'rgb8', 'bgr8'])
def test_the_frame_is_read_back_by_its_stamp(tmp_path, encoding):
    pytest.importorskip('rosbags')
    terrain = paint_terrain(7, size_m=400.0, metres_per_pixel=0.5)
    write_flight(tmp_path / 'bag', Flight(0.5, (Camera('/c', 160, 120, encoding, 10.0),)), terrain=terrain)
    frames = [read_frame(tmp_path / 'bag', '/c/image_raw', 1_700_000_000_000_000_000 + k * 10**8) for k in range(5)]
    assert all(frame.shape == (120, 160, 3) for frame in frames)
    assert all((one != other).any() for one, other in zip(frames, frames[1:], strict=False))
    if encoding != 'mono8':
        # Fields are greener than blue, in whichever order the message had them.
        assert frames[0][..., 1].mean() > frames[0][..., 0].mean() + 10
    with pytest.raises(LookupError):
        read_frame(tmp_path / 'bag', '/c/image_raw', 5)
