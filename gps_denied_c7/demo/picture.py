"""Draw what the network found onto the frames it was found in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ['Detections', 'compose', 'draw_detections', 'read_frame']

_PAPER = (246, 248, 250)
_INK = (44, 40, 38)
_FAINT = (126, 122, 120)
_MARGIN = 24
_GAP = 16
_BIG = (1440, 810)
_LEGEND = '; larger and redder: higher score; grey: outside of what the network saw'
_SMALL_WIDTH = 520


@dataclass(frozen=True, slots=True)
class Detections:
    """
    Hold one frame and its answer.

    :param image: HxWx3 uint8, BGR.
    :param keypoints: Nx2, x and y in network pixels.
    :param scores: N; those of 0 are not keypoints.
    :param heatmap: 2-D, any scale, over the whole network input.
    :param network_to_image: 2x3, pixel centres at integers.
    :param network_size: width and height of the network input.
    """

    topic: str
    image: NDArray
    keypoints: NDArray
    scores: NDArray
    heatmap: NDArray
    network_to_image: NDArray
    network_size: tuple[int, int]

    @property
    def count(self) -> int:
        """Number of keypoints."""
        return int((self.scores > 0).sum())


def read_frame(bag: Path, topic: str, stamp_ns: int) -> NDArray:
    """
    Return the image of ``topic`` with that header stamp, HxWx3 uint8 BGR.

    :raises LookupError: the bag has none.
    """
    import cv2
    from rosbags.rosbag2 import Reader
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    conversions = {'mono8': cv2.COLOR_GRAY2BGR, 'rgb8': cv2.COLOR_RGB2BGR}
    with Reader(bag) as reader:
        connections = [connection for connection in reader.connections if connection.topic == topic]
        for connection, _, data in reader.messages(connections, stamp_ns, stamp_ns + 1):
            message: Any = store.deserialize_cdr(data, connection.msgtype)
            pixels = np.asarray(message.data).reshape(message.height, message.width, -1)
            return pixels if message.encoding == 'bgr8' else cv2.cvtColor(pixels, conversions[message.encoding])
    raise LookupError(f'{bag} has no image of {topic} stamped {stamp_ns}')


def draw_detections(found: Detections, width: int, height: int) -> NDArray:
    """
    Return the frame at ``width`` x ``height`` with its keypoints, the strongest the warmest and largest.

    What the network did not see, since a crop cut it off, is greyed.
    """
    import cv2

    source_height, source_width = found.image.shape[:2]
    to_panel = np.diag([width / source_width, height / source_height]) @ found.network_to_image
    canvas = cv2.resize(found.image, (width, height), interpolation=cv2.INTER_AREA)
    canvas = _grey_out_unseen(canvas, to_panel, found.network_size)
    valid = found.scores > 0
    points = found.keypoints[valid] @ to_panel[:, :2].T + to_panel[:, 2]
    scores = np.log(found.scores[valid])
    spread = np.ptp(scores) if len(scores) else 0.0
    strength = (scores - scores.min()) / spread if spread else np.zeros(len(scores))
    colours = cv2.applyColorMap(np.round(70 + 160 * strength).astype(np.uint8).reshape(-1, 1), cv2.COLORMAP_TURBO)
    scale = width / 1000
    shift = 4
    for index in np.argsort(strength):
        centre = tuple(int(value) for value in np.round(points[index] * (1 << shift)))
        radius = round((2.4 + 3.6 * strength[index]) * (0.5 + 0.6 * scale) * (1 << shift))
        colour = tuple(int(value) for value in colours[index, 0])
        # A dark ring beneath keeps a bright one legible on bright ground.
        cv2.circle(canvas, centre, radius, (30, 30, 30), 2 if scale < 0.8 else 4, cv2.LINE_AA, shift)
        cv2.circle(canvas, centre, radius, colour, 1 if scale < 0.8 else 2, cv2.LINE_AA, shift)
    return canvas


def _grey_out_unseen(canvas: NDArray, to_panel: NDArray, network_size: tuple[int, int]) -> NDArray:
    import cv2

    width, height = network_size
    # The outer edges of the outermost pixels, whose centres are at integers.
    corners = np.array([(-0.5, -0.5), (width - 0.5, -0.5), (width - 0.5, height - 0.5), (-0.5, height - 0.5)])
    outline = np.round(corners @ to_panel[:, :2].T + to_panel[:, 2] + 0.5).astype(np.int32)
    seen = np.zeros(canvas.shape[:2], np.uint8)
    cv2.fillPoly(seen, [outline], 255)
    if seen.mean() > 254:
        return canvas
    grey = cv2.cvtColor(cv2.cvtColor(canvas, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    faded = cv2.addWeighted(grey, 0.45, np.full_like(grey, 60), 0.55, 0.0)
    result = np.where(seen[..., None] > 0, canvas, faded)
    cv2.polylines(result, [outline], True, (235, 235, 235), 1, cv2.LINE_AA)
    return result


def _draw_heatmap(found: Detections, width: int, height: int) -> NDArray:
    import cv2

    values = np.sqrt(np.maximum(found.heatmap, 0))
    top = float(np.percentile(values, 99.5)) or 1.0
    scaled = np.clip(values / top * 255, 0, 255).astype(np.uint8)
    return cv2.applyColorMap(
        cv2.resize(scaled, (width, height), interpolation=cv2.INTER_CUBIC), cv2.COLORMAP_MAGMA
    )


def compose(frames: Sequence[Detections], title: str, facts: str) -> NDArray:
    """
    Return a picture, BGR: the largest frame, beside it the next one and the largest one's corner response.

    :param frames: at least one.
    :param title: one line, large.
    :param facts: one line, small.
    """
    import cv2

    ordered = sorted(frames, key=lambda found: found.image.shape[0] * found.image.shape[1], reverse=True)
    main = ordered[0]
    big = _fit(main.image.shape, *_BIG)
    panels: list[tuple[NDArray, str]] = [(draw_detections(main, *big), f'{_caption(main)}{_LEGEND}')]
    for found in ordered[1:2]:
        panels.append((draw_detections(found, *_fit(found.image.shape, _SMALL_WIDTH, _BIG[1] // 2)), _caption(found)))
    network_width, network_height = main.network_size
    heat = _fit((network_height, network_width), _SMALL_WIDTH, _BIG[1] // 2)
    panels.append((_draw_heatmap(main, *heat), f'corner response, {main.topic}'))

    head, line = 92, 34
    right = _MARGIN + big[0] + _GAP
    column = sum(panel.shape[0] + line for panel, _ in panels[1:])
    height = head + max(big[1] + line, column) + _MARGIN // 2
    width = right + max(panel.shape[1] for panel, _ in panels[1:]) + _MARGIN
    picture = np.full((height, width, 3), _PAPER, np.uint8)
    _write(picture, title, (_MARGIN, 44), 1.0, _INK, 2)
    _write(picture, facts, (_MARGIN, 74), 0.6, _FAINT, 1)
    top = head
    for index, (panel, caption) in enumerate(panels):
        left = _MARGIN if index == 0 else right
        rows, columns = panel.shape[:2]
        picture[top : top + rows, left : left + columns] = panel
        cv2.rectangle(picture, (left - 1, top - 1), (left + columns, top + rows), _FAINT, 1)
        _write(picture, caption, (left, top + rows + 23), 0.58, _INK, 1)
        top = head if index == 0 else top + rows + line
    return picture


def _caption(found: Detections) -> str:
    height, width = found.image.shape[:2]
    return f'{found.topic}  {width} x {height}, {found.count} keypoints'


def _fit(shape: Sequence[int], width: int, height: int) -> tuple[int, int]:
    """Return the largest size of ``shape``'s aspect ratio within ``width`` x ``height``."""
    factor = min(width / shape[1], height / shape[0])
    return round(shape[1] * factor), round(shape[0] * factor)


def _write(
    picture: NDArray, text: str, place: tuple[int, int], size: float, colour: tuple[int, int, int], weight: int
) -> None:
    import cv2

    # The built-in font has no more than ASCII.
    plain = text.replace('…', '...').encode('ascii', 'replace').decode()
    cv2.putText(picture, plain, place, cv2.FONT_HERSHEY_SIMPLEX, size, colour, weight, cv2.LINE_AA)
