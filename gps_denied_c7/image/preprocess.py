"""Turn decoded pixels into the network's input tensor, and network coordinates back into image ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.errors import ConfigError, ImageRejectedError
from gps_denied_c7.image.buffers import Scratch
from gps_denied_c7.image.decode import MAX_SIDE, Pixels

__all__ = [
    'COLOURS',
    'LETTERBOX_ANCHORS',
    'LETTERBOX_SCALINGS',
    'Interpolation',
    'Preprocessor',
    'PreprocessingSpec',
    'ResizeMode',
    'planes_shape',
]

_PillowResize = Callable[[str, NDArray, tuple[int, int]], NDArray]

COLOURS = {'gray': 1, 'rgb': 3, 'bgr': 3}
"""Channels of a network's input by what they hold."""
_LAYOUTS = ('nchw', 'nhwc')
_DTYPES = ('float32', 'float16', 'uint8')

LETTERBOX_ANCHORS = ('centre', 'top_left')
"""Where the image lies in a letterbox; of an odd border, the centre leaves the larger part right and below."""
LETTERBOX_SCALINGS = ('fit', 'shrink')
"""Whether an image smaller than the letterbox is enlarged (``fit``) or not (``shrink``, YOLO's ``scaleup=False``)."""


class ResizeMode(str, Enum):
    """How an image of another shape is brought to the network's size."""

    STRETCH = 'stretch'
    """Scale each axis by itself; the whole image is seen, its aspect ratio is not kept."""
    LETTERBOX = 'letterbox'
    """Scale both axes alike until the whole image fits, fill the rest with ``pad_value``."""
    CENTRE_CROP = 'centre_crop'
    """Scale both axes alike until the network's input is filled, cut what stands out on both sides alike."""


class Interpolation(str, Enum):
    """
    How the pixels of another size are made; what a library does, it does here, on the whole source rectangle.

    All but the first are the training libraries' own. With ``linear`` and without antialiasing, PyTorch and OpenCV are
    alike; torchvision with antialiasing is ``pil_bilinear``.
    """

    HALVING_LINEAR = 'halving_linear'
    """Halve an axis, by means of pairs, as often as it shrinks by two or more; then bilinear between pixel centres."""
    LINEAR = 'linear'
    """``cv2.INTER_LINEAR``: bilinear without antialiasing; where the image shrinks, it skips pixels."""
    AREA = 'area'
    """``cv2.INTER_AREA``: the mean of the area that a network pixel covers."""
    CUBIC = 'cubic'
    """``cv2.INTER_CUBIC``: bicubic without antialiasing."""
    NEAREST = 'nearest'
    """``cv2.INTER_NEAREST``: the source pixel at or before the place, counted from the edge."""
    LANCZOS4 = 'lanczos4'
    """``cv2.INTER_LANCZOS4``: over 8x8 pixels, without antialiasing."""
    PIL_BILINEAR = 'pil_bilinear'
    """Pillow's ``BILINEAR`` and torchvision's with antialiasing: a triangle as wide as the shrinking asks for."""
    PIL_BICUBIC = 'pil_bicubic'
    """Pillow's ``BICUBIC``, also torchvision's for PIL images; of tensors, torchvision cuts overshoot off otherwise."""


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
    :param interpolation: how pixels of another size are made: as in training. The default is no library's. It averages
        like ``area`` where an image shrinks, in a fifth of the time or less, and blends like ``linear`` where it grows:
        a network whose training is unknown sees no aliased texture.
    :param letterbox_anchor: one of LETTERBOX_ANCHORS.
    :param letterbox_scaling: one of LETTERBOX_SCALINGS.
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
    interpolation: Interpolation = Interpolation.HALVING_LINEAR
    letterbox_anchor: str = 'centre'
    letterbox_scaling: str = 'fit'

    def __post_init__(self) -> None:
        for name in ('width', 'height'):
            _check_side(name, getattr(self, name))
        _check_choice('resize', self.resize, [mode.value for mode in ResizeMode])
        object.__setattr__(self, 'resize', ResizeMode(self.resize))
        _check_choice('interpolation', self.interpolation, [mode.value for mode in Interpolation])
        object.__setattr__(self, 'interpolation', Interpolation(self.interpolation))
        _check_choice('letterbox_anchor', self.letterbox_anchor, list(LETTERBOX_ANCHORS))
        _check_choice('letterbox_scaling', self.letterbox_scaling, list(LETTERBOX_SCALINGS))
        _check_choice('colour', self.colour, list(COLOURS))
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
        return COLOURS[self.colour]

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
        Read what :meth:`to_json` wrote; all but ``dtype``, ``pad_value``, ``interpolation`` and the letterbox's are
        required.

        :raises ConfigError: naming the JSON key that is missing, unknown or wrong.
        """
        if not isinstance(values, Mapping):
            raise ConfigError('preprocessing', f'expected an object, found {type(values).__name__}.')
        _refuse_unknown(values)
        optional = ('dtype', 'pad_value', 'interpolation', 'letterbox_anchor', 'letterbox_scaling')
        for field in dataclasses.fields(cls):
            if field.name not in values and field.name not in optional:
                raise ConfigError(field.name, 'is missing.', remedy='Write the value the network was trained with.')
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this spec, plain lists and numbers."""
        values = dataclasses.asdict(self)
        modes = {'resize': self.resize.value, 'interpolation': self.interpolation.value}
        return {**values, **modes, 'mean': list(self.mean), 'std': list(self.std)}

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
        return self._planes(self._resize(pixels.array, _geometry(self.spec, width, height)), pixels.order)

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
        if out.shape != spec.tensor_shape or out.dtype != spec.dtype:
            raise ConfigError(
                'preprocessing',
                f'makes {spec.dtype} {spec.tensor_shape}, the network takes {out.dtype} {out.shape}.',
                remedy='Make width, height, colour, layout and dtype those of the network.',
            )
        geometry = _geometry(spec, source_width, source_height)
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
        return _network_to_image(self.spec, source_width, source_height)

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


@lru_cache(maxsize=64)
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


@lru_cache(maxsize=64)
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
