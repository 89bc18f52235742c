"""Turn decoded pixels into the network's input tensor, and network coordinates back into image ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.decoding import MAX_SIDE, Pixels
from gps_denied_c7.errors import ConfigError, ImageRejectedError
from gps_denied_c7.scratch import Scratch

__all__ = ['Preprocessor', 'PreprocessingSpec', 'ResizeMode']

_COLOURS = {'gray': 1, 'rgb': 3, 'bgr': 3}
_LAYOUTS = ('nchw', 'nhwc')
_DTYPES = ('float32', 'float16', 'uint8')


class ResizeMode(str, Enum):
    """How an image of another shape is brought to the network's size."""

    STRETCH = 'stretch'
    """Scale each axis by itself; the whole image is seen, its aspect ratio is not kept."""
    LETTERBOX = 'letterbox'
    """Scale both axes alike until the whole image fits, centre it, fill the rest with ``pad_value``."""
    CENTRE_CROP = 'centre_crop'
    """Scale both axes alike until the network's input is filled, cut what stands out on both sides alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessingSpec:
    """
    Say how pixels become the network's input: ``value = (pixel * scale - mean) / std``.

    Pixels are in 0..255; 16-bit sources are brought to that range first (divided by 257), so that a
    network sees one range whatever the camera.

    :param width: of the network's input, pixels.
    :param height: of the network's input, pixels.
    :param resize: how another image size is brought to this one.
    :param colour: what the network was trained on: ``gray``, ``rgb`` or ``bgr``.
    :param mean: one value, or one per channel in the order of ``colour``; after ``scale``.
    :param std: as ``mean``; never zero.
    :param scale: factor on the pixel, as 1/255.
    :param layout: ``nchw`` or ``nhwc``.
    :param dtype: ``float32``, ``float16`` or ``uint8`` (pixels unchanged: scale 1, mean 0, std 1).
    :param pad_value: pixel value (0..255) of the border that LETTERBOX adds.
    :raises ConfigError: naming the field.
    """

    width: int
    height: int
    resize: ResizeMode = ResizeMode.STRETCH
    colour: str = 'rgb'
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0 / 255.0
    layout: str = 'nchw'
    dtype: str = 'float32'
    pad_value: float = 0.0

    def __post_init__(self) -> None:
        for name in ('width', 'height'):
            _check_side(name, getattr(self, name))
        _check_choice('resize', self.resize, [mode.value for mode in ResizeMode])
        object.__setattr__(self, 'resize', ResizeMode(self.resize))
        _check_choice('colour', self.colour, list(_COLOURS))
        _check_choice('layout', self.layout, list(_LAYOUTS))
        _check_choice('dtype', self.dtype, list(_DTYPES))
        for name in ('mean', 'std'):
            object.__setattr__(self, name, _per_channel(name, getattr(self, name), self.channels))
        for name in ('scale', 'pad_value'):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        if self.scale <= 0:
            raise ConfigError('scale', f'{self.scale} is not positive.', remedy='1/255 is usual, 1 for raw pixels.')
        if not 0 <= self.pad_value <= 255:
            raise ConfigError('pad_value', f'{self.pad_value} is not a pixel value.', remedy='Give one in 0..255.')
        if 0.0 in self.std:
            raise ConfigError('std', f'{list(self.std)} has a zero, by which nothing can be divided.')
        self._check_range()

    @property
    def channels(self) -> int:
        """Channels of the network's input, 1 or 3."""
        return _COLOURS[self.colour]

    @property
    def tensor_shape(self) -> tuple[int, int, int, int]:
        """Shape of the input tensor, batch 1, in ``layout``."""
        if self.layout == 'nchw':
            return (1, self.channels, self.height, self.width)
        return (1, self.height, self.width, self.channels)

    def replace(self, **changes: Any) -> PreprocessingSpec:
        """
        Return a copy with ``changes``, checked as a new one is.

        :raises ConfigError: naming the field, also for a field that does not exist.
        """
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_json(cls, values: object) -> PreprocessingSpec:
        """
        Read what :meth:`to_json` wrote; ``width``, ``height`` and everything that training fixed are required.

        :raises ConfigError: naming the JSON key that is missing, unknown or wrong.
        """
        if not isinstance(values, Mapping):
            raise ConfigError('preprocessing', f'expected an object, found {type(values).__name__}.')
        _refuse_unknown(values)
        optional = ('dtype', 'pad_value')
        for field in dataclasses.fields(cls):
            if field.name not in values and field.name not in optional:
                raise ConfigError(field.name, 'is missing.', remedy='Write the value the network was trained with.')
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this spec, plain lists and numbers."""
        values = dataclasses.asdict(self)
        return {**values, 'resize': self.resize.value, 'mean': list(self.mean), 'std': list(self.std)}

    def _check_range(self) -> None:
        ends = [(pixel * self.scale - mean) / std for pixel in (0, 255) for mean in self.mean for std in self.std]
        if self.dtype == 'uint8':
            if self.scale != 1 or any(self.mean) or set(self.std) != {1.0}:
                raise ConfigError(
                    'dtype', 'uint8 carries pixels unchanged.', remedy='Set scale 1, mean 0, std 1, or a float dtype.'
                )
        elif max(map(abs, ends)) > float(np.finfo(self.dtype).max):
            raise ConfigError('scale', f'pixels become {max(ends, key=abs):.3g}, too large for {self.dtype}.')


class Preprocessor:
    """
    Fill the network's input tensor from decoded images; for one thread.

    Resize first, on few-byte pixels, then colour, then scale straight into the tensor: a third of
    the memory traffic of converting the full image to float. Interpolation is bilinear with pixel
    centres at integers. Where an axis shrinks by two or more, it is halved first as often as it can
    be, each new pixel the mean of the old ones: plain bilinear reads two source pixels whatever the
    ratio, so that fine ground texture would alias and move with the camera.

    :param spec: what the network was trained with.
    """

    def __init__(self, spec: PreprocessingSpec) -> None:
        # Now, so that the first image need not wait for it.
        import cv2  # noqa: F401

        self.spec = spec
        self._scratch = Scratch()
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
        spec = self.spec
        if out.shape != spec.tensor_shape or out.dtype != spec.dtype:
            raise ConfigError(
                'preprocessing',
                f'makes {spec.dtype} {spec.tensor_shape}, the network takes {out.dtype} {out.shape}.',
                remedy='Make width, height, colour, layout and dtype those of the network.',
            )
        height, width = pixels.array.shape[:2]
        geometry = _geometry(spec, width, height)
        resized = self._resize(pixels.array, geometry)
        # 65535 / 257 = 255: one range of values whatever the camera.
        unit = 1.0 / 257.0 if resized.dtype == np.uint16 else 1.0
        for channel, plane in enumerate(self._planes(resized, pixels.order)):
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
        return _network_to_image(self.spec, source_width, source_height)

    def _resize(self, array: NDArray, geometry: _Geometry) -> NDArray:
        import cv2

        x, y = geometry.x, geometry.y
        array = array[y.start : y.start + y.length, x.start : x.start + x.length]
        height, width = y.length, x.length
        step = 0
        while (height, width) != (y.size, x.size):
            # Bilinear at exactly one half is the mean of the two (or 2x2) pixels that are merged.
            height = height // 2 if height >= 2 * y.size else y.size
            width = width // 2 if width >= 2 * x.size else x.size
            dst = self._scratch.array(f'resized {step}', (height, width, *array.shape[2:]), array.dtype)
            array = cv2.resize(array, (width, height), dst=dst, interpolation=cv2.INTER_LINEAR)
            step += 1
        return array

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


@lru_cache(maxsize=64)
def _geometry(spec: PreprocessingSpec, width: int, height: int) -> _Geometry:
    if width <= 0 or height <= 0:
        raise ImageRejectedError('size', f'{width}x{height} has no pixels.')
    used_width, used_height = width, height
    filled_width, filled_height = spec.width, spec.height
    wider = width * spec.height > height * spec.width
    # However extreme the shape, one pixel is left: the map stays exact, only the aspect ratio suffers.
    if spec.resize is ResizeMode.CENTRE_CROP:
        if wider:
            used_width = max(1, _rounded(height * spec.width, spec.height))
        else:
            used_height = max(1, _rounded(width * spec.height, spec.width))
    elif spec.resize is ResizeMode.LETTERBOX:
        if wider:
            filled_height = max(1, _rounded(height * spec.width, width))
        else:
            filled_width = max(1, _rounded(width * spec.height, height))
    return _Geometry(
        _axis(width, used_width, filled_width, spec.width), _axis(height, used_height, filled_height, spec.height)
    )


@lru_cache(maxsize=64)
def _network_to_image(spec: PreprocessingSpec, width: int, height: int) -> NDArray[np.float64]:
    geometry = _geometry(spec, width, height)
    matrix = np.zeros((2, 3))
    for row, axis in enumerate((geometry.x, geometry.y)):
        # Pixel i covers [i - 1/2, i + 1/2]: half a pixel is added before scaling and taken off after.
        matrix[row, row] = axis.ratio
        matrix[row, 2] = (0.5 - axis.pad) * axis.ratio - 0.5 + axis.start
    matrix.flags.writeable = False
    return matrix


def _axis(available: int, used: int, size: int, room: int) -> _Axis:
    # Halving needs whole pairs: up to one network pixel at the far edge is left out.
    factor = 1
    while used >= 2 * factor * size:
        factor *= 2
    return _Axis(start=(available - used) // 2, length=used // factor * factor, size=size, pad=(room - size) // 2)


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(PreprocessingSpec)]
    for name in values:
        if name not in known:
            raise ConfigError(str(name), 'is no pre-processing setting.', remedy=f'Known are {known}.')


def _check_side(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIDE:
        raise ConfigError(name, f'{value!r} is no size in pixels.', remedy=f'Give a whole number in 1..{MAX_SIDE}.')


def _check_choice(name: str, value: object, known: list[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(name, f'{value!r} unknown.', remedy=f'Known are {known}.')


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(name, f'{value!r} is no number.')
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(name, f'{value!r} is not finite.')
    return number


def _per_channel(name: str, values: object, channels: int) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) not in (1, channels):
        raise ConfigError(name, f'{values!r} is neither one value nor one for each of {channels} channels.')
    return tuple(_finite(name, value) for value in values)
