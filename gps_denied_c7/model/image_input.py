"""Which input of a network takes the image, and in which layout and size."""

from __future__ import annotations

from collections.abc import Sequence

from gps_denied_c7.errors import ConfigError, ModelBundleError
from gps_denied_c7.image.preprocess_spec import COLOURS, PreprocessingSpec
from gps_denied_c7.model.bundle_json import MODEL_JSON
from gps_denied_c7.tensors import TensorSpec

__all__ = ['SIZE_REMEDY', 'default_preprocessing', 'image_axes', 'image_input', 'image_layout']

SIZE_REMEDY = (
    'Where the model leaves the size of its image free, give it (node: preprocess.width and preprocess.height; '
    'c7_engine: --input-size WIDTHxHEIGHT); where it leaves the channels free, too (preprocess.colour; --colour).'
)
"""What to do about a bare ``.onnx`` that takes images of any size."""


def image_input(inputs: Sequence[TensorSpec], preprocessing: PreprocessingSpec) -> TensorSpec:
    """
    Return the one input that a pre-processing fills.

    :raises ModelBundleError: no input, or more than one, takes what it makes.
    """
    fits = [
        tensor
        for tensor in inputs
        if tensor.dtype == preprocessing.dtype and tensor.takes(preprocessing.tensor_shape)
    ]
    if len(fits) != 1:
        raise ModelBundleError(
            f'preprocessing: makes {preprocessing.dtype} {preprocessing.tensor_shape}, which {len(fits)} of the '
            f'inputs {[(tensor.name, tensor.dtype, tensor.shape) for tensor in inputs]} take.',
            remedy='Make width, height, colour, layout and dtype those of the one image input.',
        )
    return fits[0]


def image_layout(axes: Sequence[int | None]) -> str:
    """
    Return the layout of an image input with four axes.

    Channels first is the exporters' habit; only a last axis of 1 or 3 behind a second one that is neither says
    otherwise.
    """
    return 'nhwc' if axes[3] in (1, 3) and axes[1] not in (1, 3) else 'nchw'


def image_axes(
    axes: Sequence[int | None],
    *,
    width: int | None = None,
    height: int | None = None,
    colour: str | None = None,
    layout: str | None = None,
) -> tuple[int | None, ...]:
    """
    Return the four axes of an image input with the sizes that it leaves free filled in, as far as they are given.

    :param layout: :func:`image_layout` where None.
    """
    layout = layout or image_layout(axes)
    channels = COLOURS.get(colour or '')
    given = (None, channels, height, width) if layout == 'nchw' else (None, height, width, channels)
    return tuple(want if have is None else have for have, want in zip(axes, given, strict=True))


def default_preprocessing(inputs: Sequence[TensorSpec]) -> PreprocessingSpec:
    """
    Return the pre-processing for a model that comes without any, from its one image input.

    RGB for three channels, grey for one; 0..255 scaled to 0..1 for floats, unchanged for uint8;
    stretched, since a border that the network was not trained with makes features of its own.

    :raises ModelBundleError: there is not exactly one input, or it is not an image of a fixed size.
    """
    remedy = f'Write a {MODEL_JSON} with its pre-processing, or export the model with one image input of a fixed size.'
    if len(inputs) != 1:
        raise ModelBundleError(f'{len(inputs)} inputs, where one image is needed.', remedy=remedy)
    tensor = inputs[0]
    if len(tensor.axes) == 4 and None in tensor.axes[1:]:
        remedy = f'{SIZE_REMEDY} {remedy}'
    fits = []
    if len(tensor.axes) == 4 and tensor.axes[0] in (1, None) and tensor.dtype in ('float32', 'float16', 'uint8'):
        _, second, third, fourth = tensor.axes
        candidates = (('nchw', second, third, fourth), ('nhwc', fourth, second, third))
        fits = [
            (layout, channels, height, width)
            for layout, channels, height, width in candidates
            if channels in (1, 3) and height is not None and width is not None
        ]
    if len(fits) != 1:
        raise ModelBundleError(
            f'input {tensor.name!r} ({tensor.dtype}, {tensor.shape}) is not plainly one image: '
            '(1, C, H, W) or (1, H, W, C) with 1 or 3 channels, fixed height and width, float32, float16 or uint8.',
            remedy=remedy,
        )
    layout, channels, height, width = fits[0]
    try:
        return PreprocessingSpec(
            width=width,
            height=height,
            colour='gray' if channels == 1 else 'rgb',
            scale=1.0 if tensor.dtype == 'uint8' else 1.0 / 255.0,
            layout=layout,
            dtype=tensor.dtype,
        )
    except ConfigError as error:
        remedy = f'{error.remedy} {remedy}'.lstrip()
        raise ModelBundleError(f'input {tensor.name!r}: {error.message}', remedy=remedy) from error
