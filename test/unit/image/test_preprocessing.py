"""M-1, section 6: pixels to input tensor, and network coordinates back into the image."""

import json
import math
import sys
import tracemalloc
from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from gps_denied_c7.errors import ConfigError, ImageRejectedError
from gps_denied_c7.image.decode import Pixels, RawImage, decode_image
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import (
    LETTERBOX_ANCHORS,
    LETTERBOX_SCALINGS,
    Interpolation,
    PreprocessingSpec,
    ResizeMode,
)

_MODES = list(ResizeMode)
_HALF = Fraction(1, 2)
_OPENCV = ('linear', 'area', 'cubic', 'nearest', 'lanczos4')
_PILLOW = ('pil_bilinear', 'pil_bicubic')
_INTERPOLATIONS = [mode.value for mode in Interpolation]
_CHANNELS = {'gray': 1, 'rgb': 3, 'bgr': 3, 'rgba': 4, 'bgra': 4}


def _spec(width, height, **changes):
    """Make a spec that leaves grey values as they are, unless told otherwise."""
    return PreprocessingSpec(**{'width': width, 'height': height, 'colour': 'gray', 'scale': 1.0, **changes})


def _noise(width, height, order='gray', dtype=np.uint8, seed=0):
    shape = (height, width) if order == 'gray' else (height, width, _CHANNELS[order])
    return Pixels(np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype), order)


def _run(spec, pixels):
    """Run into a tensor full of rubbish, so that an element left unwritten shows."""
    out = np.full(spec.tensor_shape, 77 if spec.dtype == 'uint8' else np.nan, spec.dtype)
    assert Preprocessor(spec).run(pixels, out) is None
    return out


def _placement(mode, width, height, spec):
    """Return (first source pixel, source pixels, network pixels, border) per axis, from the modes' definitions."""
    across, down = Fraction(spec.width, width), Fraction(spec.height, height)
    used, filled = [width, height], [spec.width, spec.height]
    scale = max(across, down) if mode is ResizeMode.CENTRE_CROP else min(across, down)
    if spec.letterbox_scaling == 'shrink' and mode is ResizeMode.LETTERBOX:
        scale = min(scale, Fraction(1))
    if mode is ResizeMode.CENTRE_CROP:
        used = [max(1, math.floor(side / scale + _HALF)) for side in (spec.width, spec.height)]
    if mode is ResizeMode.LETTERBOX:
        filled = [max(1, math.floor(side * scale + _HALF)) for side in (width, height)]
    room = (spec.width, spec.height)
    share = 0 if mode is ResizeMode.LETTERBOX and spec.letterbox_anchor == 'top_left' else _HALF
    return [
        ((whole - part) // 2, part, size, math.floor((space - size) * share))
        for whole, part, size, space in zip((width, height), used, filled, room, strict=True)
    ]


def _sample(values, size):
    """Bring the last axis to ``size``: means of pairs while it halves, then linear between pixel centres."""
    while values.shape[-1] >= 2 * size:
        pairs = values.shape[-1] // 2
        values = values[..., : 2 * pairs].reshape(*values.shape[:-1], pairs, 2).mean(-1)
    length = values.shape[-1]
    place = ((np.arange(size) + 0.5) * length / size - 0.5).clip(0, length - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, length - 1)
    return values[..., low] * (1 - (place - low)) + values[..., high] * (place - low)


def _expected(image, mode, spec):
    (left, across, columns, before), (top, down, rows, above) = _placement(mode, image.shape[1], image.shape[0], spec)
    part = image[top : top + down, left : left + across].astype(float)
    part = _sample(_sample(part, columns).T, rows).T
    result = np.full((spec.height, spec.width), spec.pad_value, float)
    result[above : above + rows, before : before + columns] = part
    return result


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(_MODES),
    source=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    network=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_m1_values_agree_with_a_plain_computation_in_floating_point(mode, source, network):
    """Whatever the sizes; up to the 8-bit rounding of each stage."""
    spec = _spec(*network, resize=mode, pad_value=114)
    pixels = _noise(*source)
    difference = np.abs(_run(spec, pixels)[0, 0] - _expected(pixels.array, mode, spec))
    stages = 1 + max(0, math.floor(math.log2(max(source))))
    assert difference.max() <= 0.5 * stages + 0.5
    # Half of all pairs have a half for their mean, and each halving rounds it the same way.
    halvings = math.floor(math.log2(max(1, *(whole / size for whole, size in zip(source, network, strict=True)))))
    assert min(*source, *network) < 10 or difference.mean() <= max(0.75, 0.25 * (2 + halvings))


@pytest.mark.parametrize(
    ('mode', 'source', 'network', 'matrix'),
    [
        (ResizeMode.STRETCH, (640, 480), (640, 480), [[1, 0, 0], [0, 1, 0]]),
        (ResizeMode.STRETCH, (1920, 1080), (640, 480), [[3, 0, 1], [0, 2.25, 0.625]]),
        (ResizeMode.STRETCH, (320, 240), (640, 480), [[0.5, 0, -0.25], [0, 0.5, -0.25]]),
        (ResizeMode.LETTERBOX, (1920, 1080), (640, 480), [[3, 0, 1], [0, 3, 1 - 3 * 60]]),
        (ResizeMode.LETTERBOX, (100, 200), (100, 100), [[2, 0, 0.5 - 2 * 25], [0, 2, 0.5]]),
        (ResizeMode.CENTRE_CROP, (1920, 1080), (480, 480), [[2.25, 0, 420.625], [0, 2.25, 0.625]]),
        (ResizeMode.CENTRE_CROP, (100, 200), (50, 50), [[2, 0, 0.5], [0, 2, 50.5]]),
    ],
)
def test_section6_network_to_image_has_pixel_centres_at_integers(mode, source, network, matrix):
    found = Preprocessor(_spec(*network, resize=mode)).network_to_image(*source)
    assert found.dtype == np.float64
    assert np.allclose(found, matrix, rtol=0, atol=1e-12)


@settings(max_examples=400, deadline=None)
@given(
    mode=st.sampled_from(_MODES),
    interpolation=st.sampled_from(_INTERPOLATIONS),
    anchor=st.sampled_from(LETTERBOX_ANCHORS),
    scaling=st.sampled_from(LETTERBOX_SCALINGS),
    network=st.tuples(st.integers(48, 160), st.integers(48, 160)),
    ratio=st.tuples(st.floats(0.3, 5.0), st.floats(0.3, 5.0)),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.booleans(),
)
def test_section6_a_dot_found_by_the_network_maps_back_to_where_it_was_drawn(
    mode, interpolation, anchor, scaling, network, ratio, place, seed
):
    """A soft dot anywhere in view; its centroid in the tensor maps back within 0.2 px, or half a pixel where whole
    pixels are taken."""
    source = tuple(max(20, round(side * factor)) for side, factor in zip(network, ratio, strict=True))
    letterbox = {'letterbox_anchor': anchor, 'letterbox_scaling': scaling}
    preprocessor = Preprocessor(_spec(*network, resize=mode, interpolation=interpolation, **letterbox))
    placement = _placement(mode, *source, preprocessor.spec)
    axes = []
    for (first, used, size, _), share in zip(placement, place, strict=True):
        sigma = 1.5 * max(1.0, used / size)
        margin = 4.5 * sigma + 1
        if used <= 2 * margin:
            return
        axes.append((first + margin + share * (used - 1 - 2 * margin), sigma))
    (x, across), (y, down) = axes
    column = np.exp(-0.5 * ((np.arange(source[1]) - y) / down) ** 2)
    row = np.exp(-0.5 * ((np.arange(source[0]) - x) / across) ** 2)
    dtype, peak = (np.uint16, 65535) if seed else (np.uint8, 255)
    image = np.round(peak * column[:, None] * row[None, :]).astype(dtype)

    tensor = _run(preprocessor.spec, Pixels(image, 'gray'))[0, 0].astype(float)
    rows, columns = np.indices(tensor.shape)
    centroid = [(columns * tensor).sum() / tensor.sum(), (rows * tensor).sum() / tensor.sum(), 1.0]
    found = preprocessor.network_to_image(*source) @ centroid
    assert np.abs(found - [x, y]).max() < (0.52 if interpolation in ('nearest', 'area') else 0.2)


@settings(max_examples=300, deadline=None)
@given(
    interpolation=st.sampled_from(_INTERPOLATIONS),
    source=st.tuples(st.integers(40, 500), st.integers(40, 500)),
    network=st.tuples(st.integers(20, 200), st.integers(20, 200)),
)
@example(interpolation='nearest', source=(238, 40), network=(42, 20))
def test_section6_each_network_pixel_shows_what_lies_where_it_maps_to(interpolation, source, network):
    """A ramp whose value is its column: what a pixel holds is where it came from, away from the edges."""
    spec = _spec(*network, interpolation=interpolation)
    matrix = Preprocessor(spec).network_to_image(*source)
    for axis in range(2):
        places = np.arange(source[axis]) * 128
        ramp = np.broadcast_to(places if axis == 0 else places[:, None], source[::-1]).astype(np.uint16)
        shown = _run(spec, Pixels(np.ascontiguousarray(ramp), 'gray'))[0, 0].mean(axis) * 257 / 128
        mapped = matrix[axis, axis] * np.arange(network[axis]) + matrix[axis, 2]
        reach = 5 * max(1.0, source[axis] / network[axis])
        inside = (mapped > reach) & (mapped < source[axis] - 1 - reach)
        if inside.sum() < 20:
            continue
        difference = shown - mapped
        if interpolation == 'nearest':
            # Where the place counted from the edge is a whole number, OpenCV's rounding may take the pixel before it.
            whole = np.arange(network[axis]) * source[axis] % network[axis] == 0
            difference += whole & (difference < -0.5)
        difference = difference[inside]
        assert np.quantile(np.abs(difference), 0.9) < 0.55
        assert np.abs(difference).max() < (1.55 if interpolation == 'area' else 0.55)
        assert abs(difference.mean()) < 0.2


@settings(max_examples=300, deadline=None)
@given(
    mode=st.sampled_from(_MODES),
    source=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    network=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
)
def test_section6_the_network_sees_the_part_of_the_image_that_its_mode_promises(mode, source, network):
    spec = _spec(*network, resize=mode)
    matrix = Preprocessor(spec).network_to_image(*source)
    assert matrix[0, 1] == matrix[1, 0] == 0 and not matrix.flags.writeable, 'the next frame gets the same one'
    edges = matrix @ np.array([[-0.5, -0.5, 1], [network[0] - 0.5, network[1] - 0.5, 1]]).T
    for axis in range(2):
        near, far = edges[axis] + 0.5
        pixel = matrix[axis, axis]
        if mode is ResizeMode.STRETCH:
            assert near == pytest.approx(0, abs=1e-6)
            assert source[axis] - pixel < far < source[axis] + 1e-6
        elif mode is ResizeMode.LETTERBOX:
            assert near < 1e-6
            assert far > source[axis] - pixel - 1e-6
        else:
            assert near > -1e-6
            assert far < source[axis] + 1e-6
            assert near - (source[axis] - far) == pytest.approx(0, abs=max(1.0, pixel) + 1e-6)
    # Of a shape so long that a side becomes one pixel, that pixel stands for whatever is left.
    longest = max(max(sides) / min(sides) for sides in (source, network))
    if mode is not ResizeMode.STRETCH and min(min(source), min(network)) > 50 and longest < 8:
        stretch = matrix[0, 0] / matrix[1, 1]
        assert 0.5 <= stretch <= 2


_DEGENERATE = [(1, 1), (1, 9), (9, 1), (1, 4000), (4000, 1), (16384, 1), (1, 16384), (3, 2000), (2, 2)]


@pytest.mark.parametrize('mode', _MODES)
@pytest.mark.parametrize('source', _DEGENERATE)
@pytest.mark.parametrize('network', [(1, 1), (64, 48), (7, 300), (300, 1)])
def test_n7_shapes_no_camera_has_still_fill_the_tensor(mode, source, network):
    spec = _spec(*network, resize=mode, pad_value=3)
    image = Pixels(np.full((source[1], source[0]), 200, np.uint8), 'gray')
    tensor = _run(spec, image)
    assert set(np.unique(tensor)) <= {3.0, 200.0}
    assert 200.0 in tensor
    inside = np.argwhere(tensor[0, 0] == 200.0)[:, ::-1]
    places = np.column_stack([inside, np.ones(len(inside))]) @ Preprocessor(spec).network_to_image(*source).T
    assert (places >= -0.5).all()
    assert (places <= np.array(source) - 0.5).all()


def _in_order(pixels, wanted):
    """Return the channels that a network of a colour sees, before resizing; alpha left out."""
    if pixels.order == 'gray':
        return pixels.array
    return np.ascontiguousarray(pixels.array[:, :, [pixels.order.index(letter) for letter in wanted]])


def _by_opencv(array, size, name):
    return cv2.resize(array, size, interpolation=getattr(cv2, f'INTER_{name.upper()}'))


def _by_pillow(array, size, name):
    """Resize as Pillow does; 16 bits as floating-point numbers, channel by channel."""
    resampling = getattr(Image, name.removeprefix('pil_').upper())
    if array.dtype == np.uint8:
        return np.asarray(Image.fromarray(array).resize(size, resampling))
    planes = array[:, :, None] if array.ndim == 2 else array
    resized = [
        np.asarray(Image.fromarray(planes[:, :, channel].astype(np.float32)).resize(size, resampling))
        for channel in range(planes.shape[2])
    ]
    return np.stack(resized, -1).clip(0, 65535).reshape(*size[::-1], *array.shape[2:])


def _by_torch(array, size, name):
    torch = pytest.importorskip('torch', reason='torch comes with requirements/gpu.txt')
    # torch takes one column for channels that lie last, and does not interpolate between its rows.
    assume(array.shape[1] > 1 and size[0] > 1)
    planes = torch.from_numpy(np.atleast_3d(array).astype(np.float32)).permute(2, 0, 1)[None].contiguous()
    resized = torch.nn.functional.interpolate(planes, size[::-1], mode='bilinear', antialias=name in _PILLOW)
    return np.rint(resized[0].permute(1, 2, 0).numpy()).reshape(*size[::-1], *array.shape[2:])


_LIBRARIES = (
    [(name, _by_opencv) for name in _OPENCV]
    + [(name, _by_pillow) for name in _PILLOW]
    # Pillow's bicubic is its own: it cuts overshoot off after each of its two passes, torch after both.
    + [(name, _by_torch) for name in ('linear', 'pil_bilinear')]
)


@pytest.mark.parametrize(('name', 'library'), _LIBRARIES)
@settings(max_examples=80, deadline=None)
@given(
    order=st.sampled_from(list(_CHANNELS)),
    depth=st.sampled_from([np.uint8, np.uint16]),
    source=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    network=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    seed=st.integers(0, 99),
)
def test_m1_pixels_are_those_of_the_library_that_the_network_was_trained_with(
    name, library, order, depth, source, network, seed
):
    """Within one grey level, of 8 or of 16 bits."""
    pixels = _noise(*source, order, depth, seed)
    colour = 'gray' if order == 'gray' else 'rgb'
    found = _run(_spec(*network, colour=colour, interpolation=name), pixels)[0]
    found = np.moveaxis(found, 0, -1).squeeze(-1) if colour == 'gray' else np.moveaxis(found, 0, -1)
    level = 257 if depth is np.uint16 else 1
    expected = library(_in_order(pixels, 'rgb'), network, name)
    assert np.abs(found.astype(float) * level - expected).max() <= 1.01


@pytest.mark.parametrize('name', [*_OPENCV, *_PILLOW])
@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(_MODES),
    anchor=st.sampled_from(LETTERBOX_ANCHORS),
    scaling=st.sampled_from(LETTERBOX_SCALINGS),
    source=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    network=st.tuples(st.integers(1, 60), st.integers(1, 60)),
)
def test_m1_the_whole_rectangle_that_a_mode_uses_is_resized(name, mode, anchor, scaling, source, network):
    """No column is left out so that an axis can be halved."""
    spec = _spec(
        *network, resize=mode, pad_value=114, interpolation=name, letterbox_anchor=anchor, letterbox_scaling=scaling
    )
    pixels = _noise(*source)
    (left, across, columns, before), (top, down, rows, above) = _placement(mode, *source, spec)
    part = np.ascontiguousarray(pixels.array[top : top + down, left : left + across])
    expected = np.full((spec.height, spec.width), 114, float)
    library = _by_pillow if name in _PILLOW else _by_opencv
    expected[above : above + rows, before : before + columns] = library(part, (columns, rows), name)
    assert np.abs(_run(spec, pixels)[0, 0] - expected).max() <= 1


@pytest.mark.parametrize('scaleup', [True, False])
@pytest.mark.parametrize('source', [(1920, 1080), (640, 480), (481, 639), (100, 37), (33, 700), (640, 640), (641, 640)])
def test_m1_a_yolo_letterbox_is_made_as_in_training(source, scaleup):
    """Scale, rounding and border as Ultralytics' LetterBox computes them: halves of the border less and more 0.1."""
    width, height = source
    scale = min(640 / height, 640 / width)
    scale = scale if scaleup else min(scale, 1.0)
    columns, rows = round(width * scale), round(height * scale)
    left, top = round((640 - columns) / 2 - 0.1), round((640 - rows) / 2 - 0.1)
    pixels = _noise(width, height, 'rgb')
    expected = np.full((640, 640, 3), 114, np.uint8)
    resized = cv2.resize(pixels.array, (columns, rows), interpolation=cv2.INTER_LINEAR)
    expected[top : top + rows, left : left + columns] = resized
    spec = _spec(
        640, 640, resize='letterbox', colour='rgb', layout='nhwc', dtype='uint8', pad_value=114, interpolation='linear',
        letterbox_scaling='fit' if scaleup else 'shrink',
    )  # fmt: skip
    assert np.array_equal(_run(spec, pixels)[0], expected)


def test_m1_a_network_trained_on_opencv_pictures_gets_its_pixels():
    """The default halves 1080p first, which leaves noise more than half of the range apart from INTER_LINEAR."""
    pixels = _noise(1920, 1080)
    expected = cv2.resize(pixels.array, (640, 480), interpolation=cv2.INTER_LINEAR)
    assert np.array_equal(_run(_spec(640, 480, interpolation='linear'), pixels)[0, 0], expected)


@pytest.mark.parametrize('name', _PILLOW)
def test_m1_a_mode_of_pillow_without_pillow_is_refused_when_the_node_is_configured(monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'PIL', None)
    with pytest.raises(ConfigError, match='python3-pil') as refused:
        Preprocessor(_spec(5, 5, interpolation=name))
    assert refused.value.name == 'interpolation'
    Preprocessor(_spec(5, 5))


def test_m1_fine_texture_is_averaged_rather_than_aliased():
    """White noise shrunk eightfold keeps 1/8 of its spread; sampled bilinearly it would keep 1/2."""
    pixels = _noise(1024, 512)
    assert _run(_spec(128, 64), pixels).std() < pixels.array.std() / 7


_numbers = st.floats(-3, 3, allow_nan=False)


@settings(max_examples=150, deadline=None)
@given(
    colour=st.sampled_from(['gray', 'rgb', 'bgr']),
    order=st.sampled_from(list(_CHANNELS)),
    depth=st.sampled_from([np.uint8, np.uint16]),
    layout=st.sampled_from(['nchw', 'nhwc']),
    dtype=st.sampled_from(['float32', 'float16']),
    mean=st.tuples(_numbers, _numbers, _numbers),
    std=st.tuples(*[st.one_of(st.floats(0.1, 4), st.floats(-4, -0.1))] * 3),
    scale=st.sampled_from([1 / 255, 1.0, 1 / 127.5]),
    one=st.booleans(),
)
def test_m1_value_is_pixel_times_scale_minus_mean_over_std(colour, order, depth, layout, dtype, mean, std, scale, one):
    channels = 1 if colour == 'gray' else 3
    count = 1 if one else channels
    spec = _spec(*(13, 7), colour=colour, layout=layout, dtype=dtype, mean=mean[:count], std=std[:count], scale=scale)
    pixels = _noise(13, 7, order, depth)
    units = pixels.array.astype(float) / (257 if depth is np.uint16 else 1)
    named = dict(zip(order, np.moveaxis(units, -1, 0), strict=True)) if order != 'gray' else dict.fromkeys('rgb', units)
    if colour == 'gray':
        grey = units if order == 'gray' else 0.299 * named['r'] + 0.587 * named['g'] + 0.114 * named['b']
        planes = [grey]
    else:
        planes = [named[letter] for letter in colour]
    expected = np.stack(planes) * scale
    expected = (expected - np.resize(mean[:count], (channels, 1, 1))) / np.resize(std[:count], (channels, 1, 1))
    if layout == 'nhwc':
        expected = np.moveaxis(expected, 0, -1)

    found = _run(spec, pixels)
    assert found.shape == spec.tensor_shape == (1, *expected.shape)
    # Half a unit: OpenCV rounds a grey value made from colours to a whole one.
    rounding = 0.51 * scale / min(map(abs, std)) if colour == 'gray' and order != 'gray' else 0
    relative = 1e-3 if dtype == 'float16' else 1e-5
    reach = (255 * scale + max(map(abs, mean))) / min(map(abs, std))
    assert np.abs(found[0].astype(float) - expected).max() <= rounding + relative * reach


@pytest.mark.parametrize('layout', ['nchw', 'nhwc'])
def test_m1_a_uint8_input_gets_the_pixels_themselves(layout):
    spec = _spec(13, 7, colour='rgb', layout=layout, dtype='uint8')
    for pixels in (_noise(13, 7, 'bgra'), _noise(13, 7, 'bgra', np.uint16)):
        units = np.round(pixels.array / 257.0) if pixels.array.dtype == np.uint16 else pixels.array
        rgb = units[:, :, 2::-1]
        assert np.array_equal(_run(spec, pixels)[0], rgb if layout == 'nhwc' else np.moveaxis(rgb, -1, 0))


def test_m1_16_bit_black_and_white_are_those_of_8_bits():
    for value, expected in ((0, 0.0), (65535, 1.0)):
        pixels = Pixels(np.full((9, 9), value, np.uint16), 'gray')
        assert np.allclose(_run(_spec(5, 5, scale=1 / 255), pixels), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('order', ['rgba', 'bgra'])
@pytest.mark.parametrize('colour', ['gray', 'rgb'])
def test_m1_alpha_is_left_out(order, colour):
    pixels = _noise(40, 30, order)
    changed = pixels.array.copy()
    changed[:, :, 3] = 255 - changed[:, :, 3]
    spec = _spec(20, 20, colour=colour)
    assert np.array_equal(_run(spec, pixels), _run(spec, Pixels(changed, order)))


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'uint8'])
@pytest.mark.parametrize('layout', ['nchw', 'nhwc'])
@pytest.mark.parametrize(('source', 'border'), [((40, 10), np.s_[[0, 1, 2, -3, -2, -1], :]), ((10, 40), np.s_[:, :7])])
def test_m1_a_letterbox_border_is_a_pixel_like_any_other(dtype, layout, source, border):
    """Its value goes through scale, mean and std too."""
    plain = dtype == 'uint8'
    changes = {} if plain else {'mean': (10.0, 20.0, 30.0), 'std': (2.0, 4.0, 8.0), 'scale': 0.5}
    spec = _spec(20, 20, resize='letterbox', colour='rgb', layout=layout, dtype=dtype, pad_value=114, **changes)
    tensor = _run(spec, _noise(*source, 'rgb'))[0]
    planes = tensor if layout == 'nchw' else np.moveaxis(tensor, -1, 0)
    for channel in range(3):
        expected = 114 if plain else (114 * 0.5 - spec.mean[channel]) / spec.std[channel]
        assert np.allclose(planes[channel][border].astype(float), expected, rtol=1e-3)
        middle = planes[channel][10, 10].astype(float)
        assert not np.allclose(middle, expected, rtol=1e-3)


def test_n9_padded_rows_and_read_only_pixels_go_in_as_they_are():
    rows = np.random.default_rng(4).integers(0, 256, (30, 40 * 3 + 9), np.uint8)
    padded = decode_image(RawImage(40, 30, 'bgr8', rows.shape[1], False, rows.tobytes()))
    tight = Pixels(np.ascontiguousarray(rows[:, :120]).reshape(30, 40, 3), 'bgr')
    for mode in _MODES:
        for interpolation in _INTERPOLATIONS:
            spec = _spec(20, 20, colour='rgb', resize=mode, interpolation=interpolation)
            assert np.array_equal(_run(spec, padded), _run(spec, tight))


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'uint8'])
@pytest.mark.parametrize('layout', ['nchw', 'nhwc'])
@pytest.mark.parametrize('mode', _MODES)
@pytest.mark.parametrize('order', ['gray', 'rgb', 'bgra'])
@pytest.mark.parametrize('interpolation', ['halving_linear', *_OPENCV])
def test_m1_a_frame_allocates_next_to_nothing(dtype, layout, mode, order, interpolation):
    """Also when cameras of different sizes and depths take turns."""
    spec = _spec(320, 240, colour='rgb', resize=mode, layout=layout, dtype=dtype, interpolation=interpolation)
    preprocessor = Preprocessor(spec)
    out = np.empty(spec.tensor_shape, spec.dtype)
    frames = [_noise(640, 480, order), _noise(960, 540, order, np.uint16), _noise(200, 100, order)]
    for pixels in frames:
        preprocessor.run(pixels, out)
    tracemalloc.start()
    try:
        for pixels in frames:
            preprocessor.run(pixels, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16_384


def test_m1_frames_do_not_leave_traces_in_each_other():
    frames = _noise(640, 480, 'rgb'), _noise(50, 20, 'bgra', np.uint16), _noise(20, 50), _noise(64, 48, 'rgb')
    for interpolation in _INTERPOLATIONS:
        spec = _spec(33, 21, colour='rgb', resize=ResizeMode.LETTERBOX, interpolation=interpolation)
        shared = Preprocessor(spec)
        out = np.empty(spec.tensor_shape, spec.dtype)
        for pixels in frames:
            shared.run(pixels, out)
            assert np.array_equal(out, _run(spec, pixels))


@pytest.mark.parametrize(
    'out', [np.empty((1, 1, 4, 5), np.float32), np.empty((1, 1, 5, 4), np.float64), np.empty((5, 4), np.float32)]
)
def test_m1_a_tensor_the_spec_does_not_make_is_refused(out):
    with pytest.raises(ConfigError, match='preprocessing: the result is float32'):
        Preprocessor(_spec(4, 5)).run(_noise(4, 5), out)


@pytest.mark.parametrize('size', [(0, 5), (5, 0), (0, 0)])
def test_n7_an_image_without_pixels_is_refused(size):
    spec = _spec(4, 5)
    with pytest.raises(ImageRejectedError) as refused:
        _run(spec, Pixels(np.empty((size[1], size[0]), np.uint8), 'gray'))
    assert refused.value.reason == 'size'
    with pytest.raises(ImageRejectedError):
        Preprocessor(spec).network_to_image(*size)


_GOOD = {
    'width': 640,
    'height': 480,
    'resize': 'letterbox',
    'colour': 'rgb',
    'mean': [0.485, 0.456, 0.406],
    'std': [0.229, 0.224, 0.225],
    'scale': 1 / 255,
    'layout': 'nchw',
    'dtype': 'float16',
    'pad_value': 114.0,
    'interpolation': 'pil_bilinear',
    'letterbox_anchor': 'top_left',
    'letterbox_scaling': 'shrink',
}
_OPTIONAL = ('dtype', 'pad_value', 'interpolation', 'letterbox_anchor', 'letterbox_scaling')


def test_m1_a_spec_survives_json():
    spec = PreprocessingSpec.from_json(_GOOD)
    assert spec.to_json() == _GOOD
    assert PreprocessingSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.replace(width=320, resize='stretch') == PreprocessingSpec.from_json(
        {**_GOOD, 'width': 320, 'resize': 'stretch'}
    )


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('width', 0),
        ('width', -640),
        ('height', 480.0),
        ('height', '480'),
        ('height', True),
        ('height', 16385),
        ('resize', 'squash'),
        ('resize', None),
        ('resize', ['stretch']),
        ('colour', 'RGB'),
        ('mean', [0.5, 0.5]),
        ('mean', 0.5),
        ('mean', []),
        ('mean', [float('nan')]),
        ('mean', ['0', '0', '0']),
        ('mean', [10**400]),
        ('std', [1.0, 0.0, 1.0]),
        ('std', [0]),
        ('std', [float('inf')]),
        ('std', [True]),
        ('scale', 0.0),
        ('scale', -1.0),
        ('scale', None),
        ('scale', 1e9),
        ('layout', 'chw'),
        ('dtype', 'float64'),
        ('dtype', 'uint8'),
        ('pad_value', -1),
        ('pad_value', 256),
        ('pad_value', 'black'),
        ('interpolation', 'bilinear'),
        ('interpolation', None),
        ('letterbox_anchor', 'center'),
        ('letterbox_anchor', 0),
        ('letterbox_scaling', False),
        ('padding', 1),
    ],
)
def test_m1_a_setting_that_cannot_be_used_is_refused_by_name(name, value):
    spec = PreprocessingSpec.from_json(_GOOD)
    for attempt in (lambda: PreprocessingSpec.from_json({**_GOOD, name: value}), lambda: spec.replace(**{name: value})):
        with pytest.raises(ConfigError) as refused:
            attempt()
        assert refused.value.name == name


@pytest.mark.parametrize('name', [name for name in _GOOD if name not in _OPTIONAL])
def test_m1_a_setting_that_training_fixed_must_be_written(name):
    with pytest.raises(ConfigError, match='missing') as refused:
        PreprocessingSpec.from_json({key: value for key, value in _GOOD.items() if key != name})
    assert refused.value.name == name


def test_m1_a_bundle_of_before_keeps_its_pixels():
    """The settings that it does not name stay what they were."""
    old = {name: value for name, value in _GOOD.items() if name not in _OPTIONAL}
    spec = PreprocessingSpec.from_json(old)
    assert (spec.interpolation, spec.letterbox_anchor, spec.letterbox_scaling) == ('halving_linear', 'centre', 'fit')


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(_GOOD)), _json, max_size=3), whole=st.one_of(st.none(), _json))
def test_m1_no_json_raises_anything_but_a_named_refusal(changes, whole):
    try:
        spec = PreprocessingSpec.from_json({**_GOOD, **changes} if whole is None else whole)
    except ConfigError as error:
        assert str(error)
        return
    assert PreprocessingSpec.from_json(spec.to_json()) == spec
