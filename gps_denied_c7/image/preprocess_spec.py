"""What a network was trained with: how pixels become its input."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from gps_denied_c7.errors import ConfigError
from gps_denied_c7.image.decode import MAX_SIDE

__all__ = [
    'COLOURS', 'DTYPES', 'LETTERBOX_ANCHORS', 'LETTERBOX_SCALINGS', 'Interpolation', 'PreprocessingSpec', 'ResizeMode',
]  # fmt: skip

COLOURS = {'gray': 1, 'rgb': 3, 'bgr': 3}
"""Channels of a network's input by what they hold."""
LETTERBOX_ANCHORS = ('centre', 'top_left')
"""Where the image lies in a letterbox; of an odd border, the centre leaves the larger part right and below."""
LETTERBOX_SCALINGS = ('fit', 'shrink')
"""Whether an image smaller than the letterbox is enlarged (``fit``) or not (``shrink``, YOLO's ``scaleup=False``)."""
DTYPES = ('float32', 'float16', 'uint8')
"""Element types that a network's input may have."""
_CHOICES: Mapping[str, Collection[str]] = {
    'letterbox_anchor': LETTERBOX_ANCHORS,
    'letterbox_scaling': LETTERBOX_SCALINGS,
    'colour': COLOURS,
    'layout': ('nchw', 'nhwc'),
    'dtype': DTYPES,
}


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
    :param interpolation: how pixels of another size are made: as in training. No library has the default. It averages
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
        for name, modes in (('resize', ResizeMode), ('interpolation', Interpolation)):
            _check_choice(name, getattr(self, name), [mode.value for mode in modes])
            object.__setattr__(self, name, modes(getattr(self, name)))
        for name, known in _CHOICES.items():
            _check_choice(name, getattr(self, name), list(known))
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


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(PreprocessingSpec)]
    for name in values:
        if name not in known:
            raise ConfigError(str(name), 'is not a pre-processing setting.', remedy=f'Known are {known}.')


def _check_side(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIDE:
        raise ConfigError(name, f'{value!r} is not a size in pixels.', remedy=f'Give a whole number in 1..{MAX_SIDE}.')


def _check_choice(name: str, value: object, known: list[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ConfigError(name, f'{value!r} unknown.', remedy=f'Known are {known}.')


def _finite(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(name, f'{value!r} is not a number.')
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
