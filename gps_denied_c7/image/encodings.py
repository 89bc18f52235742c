"""The encodings of uncompressed image messages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ['BAYER', 'BT601', 'COLOUR', 'MONO', 'NV24', 'TABLE', 'YUV', 'Encoding']


@dataclass(frozen=True, slots=True)
class Encoding:
    """
    Describe one raw encoding.

    :param order: of the decoded channels.
    :param depth: bytes of one value.
    :param channels: values per pixel in the message.
    :param conversion: name of the OpenCV colour conversion, where the message does not hold ``order``; of nv24, for
        which OpenCV has none, of the standard.
    :param subsampled: pixels share chroma in pairs, so the width is even.
    :param rows: (buffer, picture), as (3, 2) where a chroma plane with half as many rows follows the luma plane.
    :param smallest: side in pixels below which the conversion has no neighbours to work with.
    """

    order: str
    depth: int = 1
    channels: int = 1
    conversion: str | None = None
    subsampled: bool = False
    rows: tuple[int, int] = (1, 1)
    smallest: int = 1

    @property
    def planar(self) -> bool:
        """Whether a chroma plane follows the luma plane."""
        return self.rows != (1, 1)


MONO = {'mono8': Encoding('gray'), 'mono16': Encoding('gray', depth=2)}
COLOUR = {
    f'{order}{8 * depth}': Encoding(order, depth, channels=len(order))
    for order in ('rgb', 'bgr', 'rgba', 'bgra')
    for depth in (1, 2)
}
# ROS names the first two rows from the top left; OpenCV the 2x2 block that starts at the second pixel of the second
# row, so the names seem crossed.
_BAYER_OF_OPENCV = {'rggb': 'BG', 'bggr': 'RG', 'gbrg': 'GR', 'grbg': 'GB'}
BAYER = {
    f'bayer_{pattern}{8 * depth}': Encoding('bgr', depth, conversion=f'COLOR_Bayer{name}2BGR', smallest=3)
    for pattern, name in _BAYER_OF_OPENCV.items()
    for depth in (1, 2)
}
_UYVY = Encoding('bgr', channels=2, conversion='COLOR_YUV2BGR_UYVY', subsampled=True)
_YUYV = Encoding('bgr', channels=2, conversion='COLOR_YUV2BGR_YUY2', subsampled=True)
NV24 = Encoding('bgr', conversion='BT.601', rows=(3, 1))
# Y, Cb, Cr and 1 to B, G, R: OpenCV converts every YUV encoding but nv24, the others with these factors.
BT601 = np.array([[1.164, 2.018, 0.0, 0.0], [1.164, -0.391, -0.813, 0.0], [1.164, 0.0, 1.596, 0.0]])
BT601[:, 3] = -BT601[:, :3] @ (16.0, 128.0, 128.0)
YUV = {
    'uyvy': _UYVY,
    'yuv422': _UYVY,
    'yuyv': _YUYV,
    'yuv422_yuy2': _YUYV,
    'nv12': Encoding('bgr', conversion='COLOR_YUV2BGR_NV12', subsampled=True, rows=(3, 2)),
    'nv21': Encoding('bgr', conversion='COLOR_YUV2BGR_NV21', subsampled=True, rows=(3, 2)),
    'nv24': NV24,
}
# What cv_bridge calls a picture whose publisher named no encoding; its channels are in OpenCV's order.
_UNNAMED = {
    f'{8 * depth}UC{channels}': Encoding(order, depth, channels)
    for channels, order in ((1, 'gray'), (3, 'bgr'), (4, 'bgra'))
    for depth in (1, 2)
}
TABLE = {**MONO, **COLOUR, **BAYER, **YUV, **_UNNAMED}
