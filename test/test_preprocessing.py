"""M-1, section 6: pixels to input tensor, and network coordinates back into the image."""

import json
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gps_denied_c7.decoding import Pixels, RawImage, decode_image
from gps_denied_c7.errors import ConfigError, ImageRejectedError
from gps_denied_c7.preprocessing import PreprocessingSpec, Preprocessor, ResizeMode

_MODES = list(ResizeMode)
_HALF = Fraction(1, 2)
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
    if mode is ResizeMode.CENTRE_CROP:
        used = [max(1, math.floor(side / scale + _HALF)) for side in (spec.width, spec.height)]
    if mode is ResizeMode.LETTERBOX:
        filled = [max(1, math.floor(side * scale + _HALF)) for side in (width, height)]
    room = (spec.width, spec.height)
    return [
        ((whole - part) // 2, part, size, (space - size) // 2)
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


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(_MODES),
    network=st.tuples(st.integers(48, 160), st.integers(48, 160)),
    ratio=st.tuples(st.floats(0.3, 5.0), st.floats(0.3, 5.0)),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.booleans(),
)
def test_section6_a_dot_found_by_the_network_maps_back_to_where_it_was_drawn(mode, network, ratio, place, seed):
    """A soft dot anywhere in view; its centroid in the tensor maps back within 0.2 px (0.5 px are allowed)."""
    source = tuple(max(20, round(side * factor)) for side, factor in zip(network, ratio, strict=True))
    preprocessor = Preprocessor(_spec(*network, resize=mode))
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
    assert np.abs(found - [x, y]).max() < 0.2


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
    if mode is not ResizeMode.STRETCH and min(min(source), min(network)) > 50:
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
        spec = _spec(20, 20, colour='rgb', resize=mode)
        assert np.array_equal(_run(spec, padded), _run(spec, tight))


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'uint8'])
@pytest.mark.parametrize('layout', ['nchw', 'nhwc'])
@pytest.mark.parametrize('mode', _MODES)
@pytest.mark.parametrize('order', ['gray', 'rgb', 'bgra'])
def test_m1_a_frame_allocates_next_to_nothing(dtype, layout, mode, order):
    """Also when cameras of different sizes and depths take turns."""
    spec = _spec(320, 240, colour='rgb', resize=mode, layout=layout, dtype=dtype)
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
    spec = _spec(33, 21, colour='rgb', resize=ResizeMode.LETTERBOX)
    shared = Preprocessor(spec)
    out = np.empty(spec.tensor_shape, spec.dtype)
    for pixels in (_noise(640, 480, 'rgb'), _noise(50, 20, 'bgra', np.uint16), _noise(20, 50), _noise(64, 48, 'rgb')):
        shared.run(pixels, out)
        assert np.array_equal(out, _run(spec, pixels))


@pytest.mark.parametrize(
    'out', [np.empty((1, 1, 4, 5), np.float32), np.empty((1, 1, 5, 4), np.float64), np.empty((5, 4), np.float32)]
)
def test_m1_a_tensor_the_spec_does_not_make_is_refused(out):
    with pytest.raises(ConfigError, match='preprocessing: makes float32'):
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
}


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
        ('padding', 1),
    ],
)
def test_m1_a_setting_that_cannot_be_used_is_refused_by_name(name, value):
    spec = PreprocessingSpec.from_json(_GOOD)
    for attempt in (lambda: PreprocessingSpec.from_json({**_GOOD, name: value}), lambda: spec.replace(**{name: value})):
        with pytest.raises(ConfigError) as refused:
            attempt()
        assert refused.value.name == name


@pytest.mark.parametrize('name', [name for name in _GOOD if name not in ('dtype', 'pad_value')])
def test_m1_a_setting_that_training_fixed_must_be_written(name):
    with pytest.raises(ConfigError, match='missing') as refused:
        PreprocessingSpec.from_json({key: value for key, value in _GOOD.items() if key != name})
    assert refused.value.name == name


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
