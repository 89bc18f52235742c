"""Which input of a network takes the image, and in which layout and size."""

from __future__ import annotations

from collections.abc import Sequence

from gps_denied_c7.errors import ConfigError, ModelBundleError
from gps_denied_c7.image.preprocess_spec import COLOURS, DTYPES, PreprocessingSpec
from gps_denied_c7.model.bundle_json import MODEL_JSON
from gps_denied_c7.tensors import TensorSpec

__all__ = ['SIZE_REMEDY', 'default_preprocessing', 'image_axes', 'image_input', 'image_layout']

SIZE_REMEDY = (
    'Set the image size (node: preprocess.width and preprocess.height; c7_engine: --input-size WIDTHxHEIGHT). If the '
    'number of channels is not fixed either, set the colour too (node: preprocess.colour; c7_engine: --colour).'
)
"""What to do about a bare ``.onnx`` that takes images of any size."""
_SETTINGS = f'(node: preprocess.*; bundle: preprocessing in {MODEL_JSON})'
_ONE_INPUT = 'Export the model with a single image input, the other inputs as constants inside.'


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
    if len(fits) == 1:
        return fits[0]
    if len(inputs) == 1:
        _require_image(inputs[0])
        wanted = _other_settings(inputs[0], preprocessing)
        given = ', '.join(f'{name} {getattr(preprocessing, name)}' for name in wanted)
        raise ModelBundleError(
            f'preprocessing: input {_described(inputs[0])} does not take {given}.',
            remedy=f'Set {", ".join(f"{name} {value}" for name, value in wanted.items())} {_SETTINGS}.',
        )
    takers = f'{len(fits)} inputs take it' if fits else 'no input takes it'
    raise ModelBundleError(
        f'preprocessing: the result is {preprocessing.dtype} {preprocessing.tensor_shape}, and {takers}: '
        f'{", ".join(map(_described, inputs))}.',
        remedy=_ONE_INPUT,
    )


def _described(tensor: TensorSpec) -> str:
    return f'{tensor.name!r} ({tensor.dtype}, {tensor.shape})'


def _require_image(tensor: TensorSpec) -> None:
    """Refuse an input that no pre-processing can fill; only another export helps."""
    axes = tensor.axes
    needs = {
        'four axes, (1, C, H, W) or (1, H, W, C)': len(axes) == 4,
        'a batch of 1': axes[:1] in ((1,), (None,)),
        '1 or 3 channels': not {1, 3, None}.isdisjoint(axes[1::2]),
        f'the type {", ".join(DTYPES[:-1])} or {DTYPES[-1]}': tensor.dtype in DTYPES,
    }
    if lacks := [need for need, met in needs.items() if not met]:
        raise ModelBundleError(
            f'input {_described(tensor)} is not one image.',
            remedy=f'Export the model with an input that has {" and ".join(lacks)}.',
        )


def _other_settings(tensor: TensorSpec, spec: PreprocessingSpec) -> dict[str, object]:
    """Return the settings that an image input needs otherwise, each with the value that it takes."""
    layout, other = ('nchw', 'nhwc') if spec.layout == 'nchw' else ('nhwc', 'nchw')
    sizes = dict(zip(layout, tensor.axes, strict=True))
    if sizes['c'] not in (1, 3, None):
        layout, sizes = other, dict(zip(other, tensor.axes, strict=True))
    colours = ' or '.join(colour for colour, channels in COLOURS.items() if channels == sizes['c'])
    wanted = {
        'colour': spec.colour if sizes['c'] in (spec.channels, None) else f'{colours} (channels: {sizes["c"]})',
        'width': sizes['w'] or spec.width,
        'height': sizes['h'] or spec.height,
        'layout': layout,
        'dtype': tensor.dtype,
    }
    return {name: value for name, value in wanted.items() if value != getattr(spec, name)}


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
    if len(inputs) != 1:
        raise ModelBundleError(
            f'{len(inputs)} inputs, where one image is needed: {", ".join(map(_described, inputs))}.', remedy=_ONE_INPUT
        )
    tensor = inputs[0]
    _require_image(tensor)
    _, second, third, fourth = tensor.axes
    candidates = (('nchw', second, third, fourth), ('nhwc', fourth, second, third))
    fits = [
        (layout, channels, height, width)
        for layout, channels, height, width in candidates
        if channels in (1, 3) and height is not None and width is not None
    ]
    if len(fits) != 1:
        free = None in tensor.axes[1:]
        problem = 'does not fix the size or the number of channels of its image' if free else 'may be NCHW or NHWC'
        raise ModelBundleError(
            f'input {_described(tensor)} {problem}.',
            remedy=SIZE_REMEDY if free else f'Write a {MODEL_JSON} with its pre-processing by hand.',
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
        raise ModelBundleError(
            f'input {_described(tensor)}: {error.message}',
            remedy=f'{error.remedy} Export the model for a smaller image.'.lstrip(),
        ) from error
