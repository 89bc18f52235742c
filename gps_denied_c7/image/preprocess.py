"""Turn decoded pixels into the network's input tensor, and network coordinates back into image ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import ConfigError, ImageRejectedError
from gps_denied_c7.image.buffers import Scratch
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess_spec import Interpolation, PreprocessingSpec, ResizeMode

__all__ = ['Preprocessor', 'planes_shape']

# Of images of one topic, of which the geometry is remembered.
_MOST_SIZES = 64

_PillowResize = Callable[[str, NDArray, tuple[int, int]], NDArray]


class Preprocessor:
    """
    Fill the network's input tensor from decoded images; for one thread.

    Resize first, on few-byte pixels, then colour, then scale straight into the tensor: a third of
    the memory traffic of converting the full image to float. By default, an axis that shrinks by two
    or more is halved first as often as it can be, each new pixel the mean of the old ones: plain
    bilinear reads two source pixels whatever the ratio, so that fine ground texture would alias and
    move with the camera.

    :param spec: what the network was trained with.
    :raises ConfigError: ``interpolation`` where it needs Pillow, which is not installed.
    """

    def __init__(self, spec: PreprocessingSpec) -> None:
        # Now, so that the first image need not wait for it.
        import cv2

        self.spec = spec
        self._shape = spec.tensor_shape
        # By size alone: the hash of a spec is one of all its fields.
        self._geometry = lru_cache(maxsize=_MOST_SIZES)(partial(_geometry, spec))
        self._network_to_image = lru_cache(maxsize=_MOST_SIZES)(partial(_network_to_image, spec))
        self._scratch = Scratch()
        library, _, mode = spec.interpolation.value.rpartition('_')
        self._by_pillow = _pillow_resize(mode) if library == 'pil' else None
        self._opencv_mode: int = getattr(cv2, f'INTER_{mode.upper()}', cv2.INTER_LINEAR)
        std, mean = (np.broadcast_to(values, spec.channels) for values in (spec.std, spec.mean))
        self._gain = [float(value) for value in spec.scale / std]
        self._bias = [float(value) for value in -mean / std]

    def run(self, pixels: Pixels, out: NDArray) -> None:
        """
        Write the input tensor of one image.

        :param pixels: any size, channel order and depth; only read.
        :param out: caller's C-contiguous array of the spec's tensor shape and dtype; all of it is written.
        :raises ImageRejectedError: ``size`` where the image has no pixels.
        :raises ConfigError: ``out`` is not what the spec makes.
        """
        height, width = pixels.array.shape[:2]
        self.fill(self.resize(pixels), width, height, out)

    def resize(self, pixels: Pixels) -> list[NDArray]:
        """
        Do the first half of :meth:`run`: bring an image to its size in the network's input.

        :return: a plane for each channel of the network, of :func:`planes_shape`, in the pixels' depth; valid until the
            next call.
        :raises ImageRejectedError: ``size`` where the image has no pixels.
        """
        height, width = pixels.array.shape[:2]
        return self._planes(self._resize(pixels.array, self._geometry(width, height)), pixels.order)

    def fill(self, planes: Sequence[NDArray] | NDArray, source_width: int, source_height: int, out: NDArray) -> None:
        """
        Do the second half of :meth:`run`: scale the planes into the input tensor.

        :param planes: of :meth:`resize`, of a preprocessor with the same spec; only read.
        :param source_width: pixels of the image that they were made of.
        :param source_height: likewise.
        :param out: as for :meth:`run`.
        :raises ConfigError: ``out`` is not what the spec makes.
        """
        spec = self.spec
        if out.shape != self._shape or out.dtype != spec.dtype:
            raise ConfigError(
                'preprocessing',
                f'the result is {spec.dtype} {self._shape}, but the network takes {out.dtype} {out.shape}.',
                remedy='Set width, height, colour, layout and dtype of the network.',
            )
        geometry = self._geometry(source_width, source_height)
        # 65535 / 257 = 255: one range of values whatever the camera.
        unit = 1.0 / 257.0 if planes[0].dtype == np.uint16 else 1.0
        for channel, plane in enumerate(planes):
            target = out[0, channel] if spec.layout == 'nchw' else out[0, :, :, channel]
            self._pad(target, geometry, channel)
            self._write(plane, unit, channel, target[geometry.rows, geometry.columns])

    def network_to_image(self, source_width: int, source_height: int) -> NDArray[np.float64]:
        """
        Return the affine map from network to image coordinates for images of one size.

        ``[x_image, y_image] = M @ [x_network, y_network, 1]``, both with pixel centres at integers.

        :param source_width: pixels of the decoded image.
        :param source_height: likewise.
        :return: 2x3, read-only, the same for every call.
        :raises ImageRejectedError: ``size`` where the image has no pixels.
        """
        return self._network_to_image(source_width, source_height)

    def _resize(self, array: NDArray, geometry: _Geometry) -> NDArray:
        import cv2

        x, y = geometry.x, geometry.y
        array = array[y.start : y.start + y.length, x.start : x.start + x.length]
        height, width = y.length, x.length
        if self._by_pillow and (height, width) != (y.size, x.size):
            return self._resize_by_pillow(self._by_pillow, array, (x.size, y.size))
        halving = self.spec.interpolation is Interpolation.HALVING_LINEAR
        step = 0
        while (height, width) != (y.size, x.size):
            # Bilinear at exactly one half is the mean of the two (or 2x2) pixels that are merged.
            height = height // 2 if halving and height >= 2 * y.size else y.size
            width = width // 2 if halving and width >= 2 * x.size else x.size
            dst = self._scratch.array(f'resized {step}', (height, width, *array.shape[2:]), array.dtype)
            array = cv2.resize(array, (width, height), dst=dst, interpolation=self._opencv_mode)
            step += 1
        return array

    def _resize_by_pillow(self, resize: _PillowResize, array: NDArray, size: tuple[int, int]) -> NDArray:
        if not array.flags.c_contiguous:
            tight = self._scratch.array('tight', array.shape, array.dtype)
            np.copyto(tight, array)
            array = tight
        if array.dtype == np.uint8:
            # As RGBX: alpha, which is left out later, must not weight the colours.
            return resize({1: 'L', 3: 'RGB', 4: 'RGBX'}[array[0, 0].size], array, size)
        # Pillow has no colours of 16 bits.
        resized = self._scratch.array('resized 0', (size[1], size[0], *array.shape[2:]), array.dtype)
        plane = self._scratch.array('plane', array.shape[:2], np.float32)
        for channel in np.ndindex(array.shape[2:]):
            np.copyto(plane, array[(..., *channel)])
            values = np.rint(resize('F', plane, size)).clip(0, 65535)
            np.copyto(resized[(..., *channel)], values, casting='unsafe')
        return resized

    def _planes(self, array: NDArray, order: str) -> list[NDArray]:
        """Return one H×W array per channel of the network, in its order; alpha is left out."""
        import cv2

        colour = self.spec.colour
        if order == 'gray':
            return [array] * self.spec.channels
        height, width, channels = array.shape
        if colour == 'gray':
            plane = self._scratch.array('gray', (height, width), array.dtype)
            return [cv2.cvtColor(array, getattr(cv2, f'COLOR_{order.upper()}2GRAY'), dst=plane)]
        planes = cv2.split(array, list(self._scratch.array('planes', (channels, height, width), array.dtype)))
        return [planes[order.index(letter)] for letter in colour]

    def _pad(self, target: NDArray, geometry: _Geometry, channel: int) -> None:
        if (geometry.y.size, geometry.x.size) == target.shape:
            return
        value = self.spec.pad_value
        filling = round(value) if self.spec.dtype == 'uint8' else value * self._gain[channel] + self._bias[channel]
        rows, columns = geometry.rows, geometry.columns
        for border in (
            target[: rows.start],
            target[rows.stop :],
            target[rows, : columns.start],
            target[rows, columns.stop :],
        ):
            border[...] = filling

    def _write(self, plane: NDArray, unit: float, channel: int, target: NDArray) -> None:
        """Write ``(plane * unit * scale - mean) / std`` in one pass."""
        import cv2

        if target.dtype == np.uint8:
            if unit != 1.0:
                plane = cv2.convertScaleAbs(plane, dst=self._scratch.array('values', plane.shape, np.uint8), alpha=unit)
            np.copyto(target, plane)
            return
        # OpenCV writes only into float32 with adjacent columns; anything else takes one more pass.
        direct = target.dtype == np.float32 and target.strides[1] == target.itemsize
        dst = target if direct else self._scratch.array('values', plane.shape, np.float32)
        gain, bias = self._gain[channel] * unit, self._bias[channel]
        values = cv2.addWeighted(plane, gain, plane, 0.0, bias, dst=dst, dtype=cv2.CV_32F)
        if values is not target:
            np.copyto(target, values, casting='same_kind')


def planes_shape(spec: PreprocessingSpec, source_width: int, source_height: int) -> tuple[int, int, int]:
    """
    Return channels, rows and columns of what :meth:`Preprocessor.resize` makes of images of one size.

    :raises ImageRejectedError: ``size`` where the image has no pixels.
    """
    geometry = _geometry(spec, source_width, source_height)
    return spec.channels, geometry.y.size, geometry.x.size


@dataclass(frozen=True, slots=True)
class _Axis:
    """
    Say how one axis is brought from the image to the network.

    :param start: first source pixel used.
    :param length: source pixels used.
    :param size: network pixels they become.
    :param pad: network pixels before them.
    """

    start: int
    length: int
    size: int
    pad: int

    @property
    def ratio(self) -> float:
        """Source pixels per network pixel."""
        return self.length / self.size


@dataclass(frozen=True, slots=True)
class _Geometry:
    """Hold both axes of a resize."""

    x: _Axis
    y: _Axis

    @property
    def rows(self) -> slice:
        """Rows of the network's input that the image fills."""
        return slice(self.y.pad, self.y.pad + self.y.size)

    @property
    def columns(self) -> slice:
        """Columns of the network's input that the image fills."""
        return slice(self.x.pad, self.x.pad + self.x.size)


def _geometry(spec: PreprocessingSpec, width: int, height: int) -> _Geometry:
    if width <= 0 or height <= 0:
        raise ImageRejectedError('size', f'{width}x{height} has no pixels.')
    used_width, used_height = width, height
    filled_width, filled_height = spec.width, spec.height
    wider = width * spec.height > height * spec.width
    fits = width <= spec.width and height <= spec.height
    # However extreme the shape, one pixel is left: the map stays exact, only the aspect ratio suffers.
    if spec.resize is ResizeMode.CENTRE_CROP:
        if wider:
            used_width = max(1, _rounded(height * spec.width, spec.height))
        else:
            used_height = max(1, _rounded(width * spec.height, spec.width))
    elif spec.resize is ResizeMode.LETTERBOX:
        if fits and spec.letterbox_scaling == 'shrink':
            filled_width, filled_height = width, height
        elif wider:
            filled_height = max(1, _rounded(height * spec.width, width))
        else:
            filled_width = max(1, _rounded(width * spec.height, height))
    return _Geometry(
        _axis(spec, width, used_width, filled_width, spec.width),
        _axis(spec, height, used_height, filled_height, spec.height),
    )


def _network_to_image(spec: PreprocessingSpec, width: int, height: int) -> NDArray[np.float64]:
    geometry = _geometry(spec, width, height)
    matrix = np.zeros((2, 3))
    enlarged = min(geometry.x.ratio, geometry.y.ratio) < 1
    for row, axis in enumerate((geometry.x, geometry.y)):
        matrix[row, row] = axis.ratio
        matrix[row, 2] = axis.start + _first_pixel(spec.interpolation, axis, enlarged) - axis.pad * axis.ratio
    matrix.flags.writeable = False
    return matrix


def _first_pixel(interpolation: Interpolation, axis: _Axis, enlarged: bool) -> float:
    """
    Return which place of the source the first pixel shows, as the line through all pixels says.

    :param enlarged: whether either axis has more pixels than the source.
    """
    ratio = axis.ratio
    # How far a pixel's edge lies behind that of the source pixel it falls into, the mean over all pixels.
    period = axis.size // math.gcd(axis.length, axis.size)
    behind = (period - 1) / (2 * period)
    if interpolation is Interpolation.NEAREST:
        # Shows the source pixel into which the edge falls, so that only what is enlarged keeps its centre.
        return -behind
    if interpolation is Interpolation.AREA and enlarged and ratio > 1:
        # OpenCV has areas only where both axes shrink. Else it blends the source pixel into which the edge falls with
        # the next one, by how much of the network pixel lies in that.
        return (1 - behind) * (1 - 1 / ratio)
    # Pixel i covers [i - 1/2, i + 1/2]: half a pixel is added before scaling and taken off after.
    return 0.5 * ratio - 0.5


def _axis(spec: PreprocessingSpec, available: int, used: int, size: int, room: int) -> _Axis:
    length = used
    if spec.interpolation is Interpolation.HALVING_LINEAR:
        # Halving needs whole pairs: up to one network pixel at the far edge is left out.
        factor = 1
        while used >= 2 * factor * size:
            factor *= 2
        length = used // factor * factor
    top_left = spec.resize is ResizeMode.LETTERBOX and spec.letterbox_anchor == 'top_left'
    pad = 0 if top_left else (room - size) // 2
    return _Axis(start=(available - used) // 2, length=length, size=size, pad=pad)


def _pillow_resize(mode: str) -> _PillowResize:
    """
    Return a function that resizes an array of one of Pillow's modes to (width, height), in Pillow's memory.

    :raises ConfigError: ``interpolation`` where Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError(
            'interpolation',
            f'pil_{mode} needs Pillow, which cannot be imported ({error}).',
            remedy='Install python3-pil with apt, or pillow with pip; area comes closest without it.',
        ) from error
    resampling = getattr(Image, mode.upper())

    def resize(name: str, array: NDArray, size: tuple[int, int]) -> NDArray:
        height, width = array.shape[:2]
        image = Image.frombuffer(name, (width, height), array, 'raw', name, 0, 1)
        return np.asarray(image.resize(size, resampling))

    return resize


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


