"""N-9: one decoder for every encoding; N-7: what cannot be decoded is refused with a reason."""

import array
import struct
import tracemalloc
import zlib
from fractions import Fraction

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from rosbags.image import message_to_cvimage
from rosbags.typesys import Stores, get_typestore

from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.image.buffers import Scratch
from gps_denied_c7.image.decode import (
    ENCODINGS,
    MAX_PIXELS,
    MAX_SIDE,
    RawImage,
    check_compressed,
    check_image,
    decode_compressed,
    decode_image,
    decode_picture,
)
from gps_denied_c7.image.encodings import TABLE

_TYPES = get_typestore(Stores.ROS2_JAZZY).types
_PLANAR = {'nv12': Fraction(3, 2), 'nv21': Fraction(3, 2), 'nv24': Fraction(3)}
_SUBSAMPLED = ('uyvy', 'yuv422', 'yuyv', 'yuv422_yuy2', 'nv12', 'nv21')
_YUV = (*_SUBSAMPLED, 'nv24')
_GENERIC = ('8UC1', '8UC3', '8UC4', '16UC1', '16UC3', '16UC4')
_WIDE = tuple(name for name in ENCODINGS if name.endswith('16') or name.startswith('16'))
_PACKED = tuple(name for name in ENCODINGS if not name.startswith('bayer') and name not in _YUV)
_CONVERTED = tuple(name for name in ENCODINGS if name not in _PACKED)
# rosbags-image knows no nv24.
_KNOWN_TO_ROSBAGS = tuple(name for name in ENCODINGS if name != 'nv24')


def _values(encoding):
    if encoding in _YUV:
        return 1 if encoding in _PLANAR else 2
    if encoding in _GENERIC:
        return int(encoding[-1])
    return {'rgb': 3, 'bgr': 3, 'rgba': 4, 'bgra': 4}.get(encoding.rstrip('0123456789'), 1)


def _pixel_bytes(encoding):
    return _values(encoding) * (2 if encoding in _WIDE else 1)


def _row_bytes(encoding, width):
    return width * _pixel_bytes(encoding)


def _rows(encoding, height):
    return int(height * _PLANAR.get(encoding, 1))


def _image(encoding, width=36, height=20, *, padding=0, big=False, seed=1):
    """Make a random image of the given picture size as ROS delivers it: an array('B') with padded rows."""
    row = _row_bytes(encoding, width)
    noise = np.random.default_rng(seed).integers(0, 256, (_rows(encoding, height), row + padding), np.uint8)
    return RawImage(width, height, encoding, row + padding, big, array.array('B', noise.tobytes()))


def _reference(image, colour_space=None):
    """Decode with rosbags-image, which knows no padding and counts the chroma rows of nv12 as height."""
    row = _row_bytes(image.encoding, image.width)
    rows = len(image.data) // image.step
    data = np.frombuffer(image.data, np.uint8).reshape(rows, image.step)[:, :row]
    header = _TYPES['std_msgs/msg/Header'](_TYPES['builtin_interfaces/msg/Time'](0, 0), '')
    message = _TYPES['sensor_msgs/msg/Image'](
        header, rows, image.width, image.encoding, int(image.is_bigendian), row, np.ascontiguousarray(data).ravel()
    )
    return message_to_cvimage(message, colour_space)


@pytest.mark.parametrize('padding', [0, 12, 13])
@pytest.mark.parametrize('encoding', _KNOWN_TO_ROSBAGS)
def test_n9_every_encoding_agrees_with_rosbags_image_bit_for_bit(encoding, padding):
    for big in (False, True):
        image = _image(encoding, padding=padding, big=big)
        pixels = decode_image(image)
        if encoding in _CONVERTED:
            expected = _reference(image, 'bgr16' if encoding in _WIDE else 'bgr8')
        else:
            expected = _reference(image)
        assert pixels.array.dtype == expected.dtype
        assert np.array_equal(pixels.array, expected)
        assert pixels.order == TABLE[encoding].order


@settings(max_examples=200, deadline=None)
@given(
    encoding=st.sampled_from(_KNOWN_TO_ROSBAGS),
    width=st.integers(3, 40),
    height=st.integers(3, 40),
    seed=st.integers(0, 9),
)
def test_n9_every_size_agrees_with_rosbags_image_bit_for_bit(encoding, width, height, seed):
    if encoding in _SUBSAMPLED:
        width, height = width // 2 * 2, height // 2 * 2
    image = _image(encoding, width, height, padding=seed, seed=seed)
    wanted = 'bgr16' if encoding in _WIDE else 'bgr8'
    assert np.array_equal(decode_image(image).array, _reference(image, wanted if encoding in _CONVERTED else None))


@pytest.mark.parametrize('encoding', [name for name in _PACKED if name not in _GENERIC and _values(name) > 1])
def test_n9_the_channel_order_says_which_channel_is_which(encoding):
    image = _image(encoding)
    pixels = decode_image(image)
    bgr = pixels.array[:, :, [pixels.order.index(letter) for letter in 'bgr']]
    assert np.array_equal(bgr, _reference(image, 'bgr16' if encoding in _WIDE else 'bgr8'))


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_n9_every_encoding_agrees_with_cv_bridge_where_it_is_installed(encoding):
    cv_bridge = pytest.importorskip('cv_bridge', reason='cv_bridge comes with ROS from apt, not from PyPI')
    messages = pytest.importorskip('sensor_msgs.msg')
    # cv_bridge takes the pixels of a row to be its step divided by the bytes of a pixel.
    image = _image(encoding, padding=0 if encoding in _PLANAR else 3 * _pixel_bytes(encoding))
    message = messages.Image(
        width=image.width, height=image.height, encoding=encoding, step=image.step, data=image.data
    )
    wanted = 'bgr16' if encoding in _WIDE else 'bgr8'
    try:
        expected = cv_bridge.CvBridge().imgmsg_to_cv2(message, 'passthrough' if encoding in _PACKED else wanted)
    except cv_bridge.CvBridgeError as error:
        pytest.skip(f'this cv_bridge does not decode {encoding}: {error}')
    assert np.array_equal(decode_image(image).array, expected)


@pytest.mark.parametrize('depth', [8, 16])
@pytest.mark.parametrize('pattern', ['rggb', 'bggr', 'gbrg', 'grbg'])
def test_n9_a_bayer_pattern_is_named_by_its_top_left_corner(pattern, depth):
    """A red scene lights the sites named r and no others, whatever OpenCV calls the pattern."""
    dtype = f'<u{depth // 8}'
    for index, letter in enumerate('bgr'):
        lit = [[200 * (pattern[0] == letter), 200 * (pattern[1] == letter)]]
        lit += [[200 * (pattern[2] == letter), 200 * (pattern[3] == letter)]]
        mosaic = np.tile(np.array(lit, dtype), (6, 6))
        image = RawImage(12, 12, f'bayer_{pattern}{depth}', 12 * depth // 8, False, mosaic.tobytes())
        middle = decode_image(image).array[2:-2, 2:-2]
        assert (middle[:, :, index] == 200).all()
        assert (middle[:, :, [other for other in range(3) if other != index]] == 0).all()


@pytest.mark.parametrize('encoding', _YUV)
def test_n9_yuv_agrees_with_the_bt601_formula(encoding):
    """Studio-swing BT.601, computed in floating point, within the rounding of OpenCV's integers."""
    width, height = 8, 6
    rng = np.random.default_rng(5)
    luma = rng.integers(16, 236, (height, width)).astype(np.uint8)
    rows = height // 2 if encoding in ('nv12', 'nv21') else height
    columns = width // 2 if encoding in _SUBSAMPLED else width
    blue, red = rng.integers(90, 166, (2, rows, columns)).astype(np.uint8)
    if encoding in _PLANAR:
        pair = (red, blue) if encoding == 'nv21' else (blue, red)
        data = np.concatenate([luma.ravel(), np.stack(pair, -1).ravel()])
    else:
        first, second = luma[:, 0::2], luma[:, 1::2]
        quad = (blue, first, red, second) if encoding in ('uyvy', 'yuv422') else (first, blue, second, red)
        data = np.stack(quad, -1).ravel()
    image = RawImage(width, height, encoding, width * (1 if encoding in _PLANAR else 2), False, data.tobytes())

    y = 1.164 * (luma.astype(float) - 16)
    repeats = width // columns
    cb, cr = (plane.repeat(repeats, 1).repeat(height // rows, 0).astype(float) - 128 for plane in (blue, red))
    formula = np.stack([y + 2.018 * cb, y - 0.391 * cb - 0.813 * cr, y + 1.596 * cr], -1).clip(0, 255)
    pixels = decode_image(image)
    assert pixels.array.shape == (height, width, 3)
    assert np.abs(pixels.array - formula).max() <= 1.5


@pytest.mark.parametrize('encoding', _PLANAR)
@pytest.mark.parametrize('padding', [0, 4])
def test_n9_the_height_of_nv12_may_count_the_picture_or_the_buffer(encoding, padding):
    of_picture = _image(encoding, 12, 8, padding=padding)
    of_buffer = RawImage(12, _rows(encoding, 8), encoding, of_picture.step, False, of_picture.data)
    assert decode_image(of_picture).array.shape == (8, 12, 3)
    assert np.array_equal(decode_image(of_picture).array, decode_image(of_buffer).array)


@pytest.mark.parametrize('encoding', _PLANAR)
def test_n7_a_step_that_counts_the_chroma_too_is_refused(encoding):
    """Its buffer could also be a picture with fewer rows and more padding."""
    image = _image(encoding, 12, 6)
    step = _rows(encoding, 12)
    with pytest.raises(ImageRejectedError, match='step') as refused:
        check_image(_changed(image, step=step))
    assert refused.value.reason == 'data'


def test_n9_nv24_is_nv12_with_its_chroma_repeated():
    """V4L2 gives the chroma plane rows of twice the step, its padding at their ends."""
    rng = np.random.default_rng(7)
    for padding in (0, 3, 8):
        luma = rng.integers(0, 256, (10, 14)).astype(np.uint8)
        chroma = rng.integers(0, 256, (5, 7, 2)).astype(np.uint8)
        small = np.concatenate([luma, chroma.reshape(5, 14)])
        rubbish = rng.integers(0, 256, (10, 3, 14 + padding)).astype(np.uint8)
        rubbish[:, 0, :14] = luma
        wide = rubbish[:, 1:].reshape(10, -1)
        wide[:, :28] = chroma.repeat(2, 0).repeat(2, 1).reshape(10, 28)
        data = np.concatenate([rubbish[:, 0].ravel(), wide.ravel()]).tobytes()
        pixels = decode_image(RawImage(14, 10, 'nv24', 14 + padding, False, data)).array.astype(int)
        expected = decode_image(RawImage(14, 10, 'nv12', 14, False, small.tobytes())).array
        assert np.abs(pixels - expected).max() <= 1


def _by_cv_bridge(image):
    """Return what imgmsg_to_cv2 gives for a generic encoding: the numbers, read as its name says."""
    depth, channels = image.encoding.split('UC')
    dtype = np.dtype(f'u{int(depth) // 8}').newbyteorder('>' if image.is_bigendian else '<')
    rows = np.frombuffer(image.data, np.uint8).reshape(image.height, image.step)
    values = np.ascontiguousarray(rows[:, : image.width * int(channels) * dtype.itemsize]).view(dtype)
    shape = (image.height, image.width, int(channels))
    return values.reshape(shape if channels != '1' else shape[:2])


@pytest.mark.parametrize('big', [False, True])
@pytest.mark.parametrize('encoding', _GENERIC)
def test_n9_an_image_that_cv_bridge_made_without_an_encoding_is_read(encoding, big):
    """``cv2_to_imgmsg(picture)`` calls it by its type; the channels are in OpenCV's order."""
    for padding in (0, 5):
        image = _image(encoding, padding=padding, big=big)
        pixels = decode_image(image)
        assert np.array_equal(pixels.array, _by_cv_bridge(image))
        assert pixels.order == TABLE[encoding].order == {1: 'gray', 3: 'bgr', 4: 'bgra'}[_values(encoding)]


@pytest.mark.parametrize('depth', ['8S', '16S', '32S', '32F', '64F', '8U', '16U'])
@pytest.mark.parametrize('channels', ['', 'C1', 'C2', 'C3'])
def test_n7_numbers_that_are_no_picture_are_refused(depth, channels):
    if f'{depth}{channels}' in ENCODINGS:
        return
    with pytest.raises(ImageRejectedError, match='none is defined as black or white') as refused:
        check_image(_changed(_image('mono8'), encoding=f'{depth}{channels}'))
    assert refused.value.reason == 'encoding'


@pytest.mark.parametrize('big', [False, True])
@pytest.mark.parametrize('padding', [0, 13])
@pytest.mark.parametrize('encoding', ENCODINGS)
def test_n7_an_image_that_takes_more_memory_than_it_may_is_refused_before_it_is_copied(encoding, padding, big):
    image, scratch = _image(encoding, padding=padding, big=big), Scratch()
    decode_image(image, scratch)
    taken = len(image.data) + sum(memory.nbytes for memory in scratch._memory.values())
    check_image(image, taken)
    with pytest.raises(ImageRejectedError, match='decoder_memory_mb') as refused:
        check_image(image, taken - 1)
    assert refused.value.reason == 'decode_memory'


@pytest.mark.parametrize('padding', [0, 12])
@pytest.mark.parametrize('encoding', _PACKED)
def test_n9_packed_pixels_are_views_of_the_message(encoding, padding):
    image = _image(encoding, padding=padding)
    pixels = decode_image(image)
    assert np.shares_memory(pixels.array, np.frombuffer(image.data, np.uint8))
    with pytest.raises(ValueError, match='read-only'):
        pixels.array[0, 0] = 0


@pytest.mark.parametrize('encoding', _WIDE)
def test_n9_values_that_begin_anywhere_in_memory_come_out_aligned(encoding):
    image = _image(encoding)
    shifted = RawImage(image.width, image.height, encoding, image.step, False, memoryview(b'x' + bytes(image.data))[1:])
    for pixels in (decode_image(shifted), decode_image(_image(encoding, padding=13))):
        assert pixels.array.flags.aligned
    assert np.array_equal(decode_image(shifted).array, decode_image(image).array)


@pytest.mark.parametrize('make', [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_n9_any_buffer_of_bytes_will_do(make):
    image = _image('rgb8')
    other = RawImage(image.width, image.height, 'rgb8', image.step, False, make(bytes(image.data)))
    assert np.array_equal(decode_image(other).array, decode_image(image).array)


@pytest.mark.parametrize('encoding', ['bayer_rggb8', 'nv12', 'uyvy', 'mono16'])
def test_n9_converted_pixels_reuse_the_scratch(encoding):
    scratch = Scratch()
    image = _image(encoding, 640, 480, big=encoding in _WIDE)
    first = decode_image(image, scratch).array
    tracemalloc.start()
    try:
        again = decode_image(image, scratch).array
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.shares_memory(first, again)
    assert peak < again.nbytes / 20


@pytest.mark.parametrize('encoding', ['bayer_rggb8', 'nv24', 'mono16'])
def test_n7_the_work_memory_of_a_very_large_image_is_freed_with_its_pixels(encoding):
    scratch = Scratch()
    image = _image(encoding, 8192, 4096, big=encoding in _WIDE)
    tracemalloc.start()
    try:
        pixels = decode_image(image, scratch)
        assert tracemalloc.get_traced_memory()[0] >= pixels.array.nbytes
        del pixels
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


def test_n9_without_a_scratch_every_image_is_its_own():
    first = decode_image(_image('nv12', seed=1)).array
    kept = first.copy()
    decode_image(_image('nv12', seed=2))
    assert np.array_equal(first, kept)


def _changed(image, **changes):
    fields = {name: getattr(image, name) for name in ('width', 'height', 'encoding', 'step', 'is_bigendian', 'data')}
    return RawImage(**{**fields, **changes})


@pytest.mark.parametrize('check', [check_image, decode_image])
@pytest.mark.parametrize(
    ('encoding', 'changes', 'reason'),
    [
        ('rgb8', {'encoding': 'rgb9'}, 'encoding'),
        ('rgb8', {'encoding': ''}, 'encoding'),
        ('rgb8', {'encoding': 'RGB8'}, 'encoding'),
        ('rgb8', {'width': 0}, 'size'),
        ('rgb8', {'height': 0}, 'size'),
        ('rgb8', {'width': 0, 'height': 0, 'step': 0, 'data': b''}, 'size'),
        ('rgb8', {'width': -36}, 'size'),
        ('rgb8', {'width': MAX_SIDE + 1}, 'size'),
        ('rgb8', {'height': 2**32 - 1}, 'size'),
        ('mono8', {'width': MAX_SIDE, 'height': MAX_PIXELS // MAX_SIDE + 1, 'step': MAX_SIDE}, 'size'),
        ('uyvy', {'width': 35}, 'size'),
        ('nv12', {'width': 35}, 'size'),
        ('nv12', {'height': 19, 'data': bytes(36 * 28)}, 'size'),
        ('nv21', {'height': 21, 'data': bytes(36 * 31)}, 'size'),
        ('nv21', {'data': bytes(36 * 20)}, 'data'),
        ('nv24', {'data': bytes(36 * 30)}, 'data'),
        ('16UC1', {'step': 36, 'data': bytes(36 * 20)}, 'data'),
        ('bayer_rggb8', {'width': 2, 'step': 2, 'data': bytes(2 * 20)}, 'size'),
        ('bayer_gbrg16', {'height': 2, 'data': bytes(72 * 2)}, 'size'),
        ('rgb8', {'width': 37}, 'data'),
        ('rgb8', {'height': 21}, 'data'),
        ('rgb8', {'height': 19}, 'data'),
        ('rgb8', {'step': 107, 'data': bytes(107 * 20)}, 'data'),
        ('mono16', {'step': 36, 'data': bytes(36 * 20)}, 'data'),
        ('bgra8', {'step': 0, 'data': b''}, 'data'),
        ('nv12', {'data': bytes(36 * 29)}, 'data'),
        ('mono8', {'data': b''}, 'data'),
        ('mono8', {'data': None}, 'data'),
        ('mono8', {'data': 'a' * 720}, 'data'),
        ('mono8', {'data': np.zeros((20, 72), np.uint8)[:, ::2]}, 'data'),
    ],
)
def test_n7_what_cannot_be_decoded_is_refused(check, encoding, changes, reason):
    image = _image(encoding)
    check(image)
    with pytest.raises(ImageRejectedError) as refused:
        check(_changed(image, **changes))
    assert refused.value.reason == reason


_anything = st.one_of(st.integers(-3, 70), st.sampled_from([2**31, 2**32 - 1]))


@settings(max_examples=400, deadline=None)
@given(
    encoding=st.one_of(st.sampled_from(ENCODINGS), st.text(max_size=9)),
    width=_anything,
    height=_anything,
    slack=st.integers(-3, 9),
    size=st.one_of(st.none(), st.integers(0, 3000)),
    big=st.booleans(),
)
def test_n7_no_raw_image_raises_anything_but_a_refusal(encoding, width, height, slack, size, big):
    """Sizes are mostly consistent, so that many images get as far as OpenCV; None makes the honest buffer."""
    step = max(0, _row_bytes(encoding, max(0, min(width, 70))) + slack)
    honest = step * _rows(encoding, max(0, min(height, 70)))
    image = RawImage(width, height, encoding, step, big, bytes(honest if size is None else size))
    try:
        pixels = decode_image(image)
    except ImageRejectedError as error:
        assert error.reason in ('encoding', 'size', 'data')
        return
    check_image(image)
    assert pixels.array.shape[1] == width
    assert pixels.array.shape[0] in (height, height / _PLANAR.get(encoding, 1))


def _scene(width=96, height=64, channels=3, dtype=np.uint8):
    noise = np.random.default_rng(3).integers(0, np.iinfo(dtype).max, (height, width, channels)).astype(dtype)
    return cv2.GaussianBlur(noise, (0, 0), 1.5).reshape(height, width, -1).squeeze()


def _encode(extension, image, *options):
    done, data = cv2.imencode(extension, image, list(options))
    assert done
    return data.tobytes()


def _with_thumbnail(jpeg):
    """Put a whole small JPEG, end mark included, into an APP1 segment, as cameras do."""
    thumbnail = b'Exif\0\0' + _encode('.jpg', _scene(16, 16))
    return jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(thumbnail) + 2) + thumbnail + jpeg[2:]


_JPEGS = {
    'baseline': _encode('.jpg', _scene()),
    'grey': _encode('.jpg', _scene(channels=1)),
    'progressive': _encode('.jpg', _scene(), cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    'restart': _encode('.jpg', _scene(), cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
    'thumbnail': _with_thumbnail(_encode('.jpg', _scene())),
}
_PNGS = {
    'colour': _encode('.png', _scene()),
    'grey': _encode('.png', _scene(channels=1)),
    'alpha': _encode('.png', _scene(channels=4)),
}
_FILES = {**{f'jpeg {name}': file for name, file in _JPEGS.items()}, **{f'png {n}': file for n, file in _PNGS.items()}}


def _by_rosbags(data):
    """Decode with rosbags-image, which leaves alpha out."""
    header = _TYPES['std_msgs/msg/Header'](_TYPES['builtin_interfaces/msg/Time'](0, 0), '')
    return message_to_cvimage(_TYPES['sensor_msgs/msg/CompressedImage'](header, 'x', np.frombuffer(data, np.uint8)))


@pytest.mark.parametrize('name', _FILES)
def test_n9_compressed_images_agree_with_rosbags_image_bit_for_bit(name):
    pixels = decode_compressed(name.split()[0], array.array('B', _FILES[name]))
    assert pixels.order == ('gray' if 'grey' in name else 'bgra' if 'alpha' in name else 'bgr')
    colours = pixels.array[:, :, :3] if pixels.order == 'bgra' else pixels.array
    assert np.array_equal(colours, _by_rosbags(_FILES[name]))
    assert not pixels.array.flags.writeable


def test_n9_a_lossless_image_comes_back_exactly():
    scene = _scene()
    assert np.array_equal(decode_compressed('bgr8; png compressed bgr8', _encode('.png', scene)).array, scene)


def test_n9_a_16_bit_png_keeps_its_depth():
    scene = _scene(channels=1, dtype=np.uint16)
    pixels = decode_compressed('mono16; png compressed ', _encode('.png', scene))
    assert pixels.array.dtype == np.uint16
    assert np.array_equal(pixels.array, scene)


# What compressed_image_transport does on Humble, Jazzy and Rolling, and cv_bridge with what it gives.
_RGB_LIKE = tuple(f'{order}{bits}' for order in ('rgb', 'bgr', 'rgba', 'bgra') for bits in (8, 16))
_OPENCV_BAYER = {'rggb': 'BG', 'bggr': 'RG', 'gbrg': 'GR', 'grbg': 'GB'}


def _bits(encoding):
    return 16 if encoding in _WIDE else 8


def _as_cv(encoding, picture, wanted):
    """Convert a picture as cv_bridge does for the publisher; None where it throws."""
    if encoding in _GENERIC or encoding in _PLANAR:
        return None
    if encoding in _YUV:
        kind = 'UYVY' if encoding in ('uyvy', 'yuv422') else 'YUY2'
        return cv2.cvtColor(picture, getattr(cv2, f'COLOR_YUV2{"BGR" if wanted == "bgr8" else "GRAY"}_{kind}'))
    if encoding.startswith('bayer'):
        picture = cv2.cvtColor(picture, getattr(cv2, f'COLOR_Bayer{_OPENCV_BAYER[encoding[6:10]]}2GRAY'))
    elif encoding in _RGB_LIKE and encoding.rstrip('0123456789') != 'bgr':
        picture = cv2.cvtColor(picture, getattr(cv2, f'COLOR_{encoding.rstrip("0123456789").upper()}2BGR'))
    if _bits(encoding) == 16 and wanted.endswith('8'):
        picture = cv2.convertScaleAbs(picture, alpha=255 / 65535)
    return picture


def _published(encoding, container, picture, *, humble):
    """Return (format, file) of the stock publisher, the file empty where it fails."""
    colour = encoding in _RGB_LIKE or (not humble and encoding in _YUV and encoding != 'nv12')
    targets = {'jpeg': ('mono8', 'bgr8'), 'png': ('', f'bgr{_bits(encoding)}')}
    wanted = targets[container][colour]
    picture = _as_cv(encoding, picture, wanted) if wanted else picture
    if picture is None or (picture.ndim == 3 and picture.shape[2] == 2):
        return f'{encoding}; {container} compressed {wanted}', b''
    return f'{encoding}; {container} compressed {wanted}', _encode(f'.{container}', picture)


def _received(format, file):
    """Return (encoding, pixels) of the stock subscriber's image; OpenCV may throw inside, which it survives."""
    picture = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    cut = format.find(';')
    if cut < 0:
        return {1: 'mono8', 3: 'bgr8'}.get(picture.shape[2] if picture.ndim == 3 else 1, ''), picture
    encoding = format[:cut]
    letters = encoding.rstrip('0123456789')
    try:
        if encoding in _RGB_LIKE:
            if 'compressed bgr' in format[cut:]:
                code = {'rgb': 'BGR2RGB', 'rgba': 'BGR2RGBA', 'bgra': 'BGR2BGRA'}.get(letters)
            else:
                code = {'bgr': 'RGB2BGR', 'bgra': 'RGB2BGRA', 'rgba': 'RGB2RGBA'}.get(letters)
            if code:
                picture = cv2.cvtColor(picture, getattr(cv2, f'COLOR_{code}'))
        if 'jpeg' in format and _bits(encoding) == 16:
            picture = np.clip(picture.astype(np.int64) * 256, 0, 65535).astype(np.uint16)
    except cv2.error:
        pass
    return encoding, picture


def _seen(encoding, picture):
    """Return grey or BGR of what a subscriber of the image sees; None where its bytes are not its encoding."""
    channels = picture.shape[2] if picture.ndim == 3 else 1
    if encoding not in ENCODINGS or encoding in _YUV:
        return None
    if channels * picture.itemsize != _pixel_bytes(encoding) or channels != _values(encoding):
        return None
    if encoding.startswith('bayer'):
        return cv2.cvtColor(picture, getattr(cv2, f'COLOR_Bayer{_OPENCV_BAYER[encoding[6:10]]}2BGR'))
    if encoding in _RGB_LIKE:
        return picture[:, :, [encoding.rstrip('0123456789').index(letter) for letter in 'bgr']]
    return picture[:, :, :3] if channels == 4 else picture


def _bgr(pixels):
    return pixels.array if pixels.order == 'gray' else pixels.array[:, :, [pixels.order.index(x) for x in 'bgr']]


def _picture(encoding, seed):
    """Make a random picture of an encoding, smooth enough for JPEG."""
    rng = np.random.default_rng(seed)
    width, height = 2 * int(rng.integers(2, 25)), 2 * int(rng.integers(2, 25))
    dtype = np.uint16 if encoding in _WIDE else np.uint8
    shape = (_rows(encoding, height), width, _values(encoding))
    noise = rng.integers(0, np.iinfo(dtype).max, shape).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 0.8).astype(dtype).reshape(shape).squeeze()


@pytest.mark.parametrize('humble', [False, True])
@pytest.mark.parametrize('container', ['jpeg', 'png'])
@pytest.mark.parametrize('encoding', ENCODINGS)
def test_n9_what_the_stock_publisher_compresses_is_what_the_stock_subscriber_gives_or_refused(
    encoding, container, humble
):
    lossy_mosaic = container == 'jpeg' and encoding.startswith('bayer')
    for seed in range(5):
        format, file = _published(encoding, container, _picture(encoding, seed), humble=humble)
        grey_yuv = encoding in _YUV and not format.endswith('bgr8')
        if not file or lossy_mosaic or grey_yuv:
            for check in (check_compressed, decode_compressed):
                with pytest.raises(ImageRejectedError) as refused:
                    check(format, file)
                assert refused.value.reason == ('encoding' if file else 'data')
                assert refused.value.remedy
            continue
        check_compressed(format, file)
        found = _bgr(decode_compressed(format, file))
        # The subscriber calls a picture that was YUV still YUV, which it is no more; cv_bridge reads the file.
        expected = cv2.imdecode(np.frombuffer(file, np.uint8), -1) if encoding in _YUV else None
        expected = _seen(*_received(format, file)) if expected is None else expected
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


_CONTENTS = {
    f'{container} {channels} {np.dtype(dtype)}': _encode(f'.{container}', _scene(24, 16, channels, dtype))
    for container, channels, dtype in (
        ('jpeg', 1, np.uint8), ('jpeg', 3, np.uint8), ('png', 1, np.uint8), ('png', 3, np.uint8), ('png', 4, np.uint8),
        ('png', 1, np.uint16), ('png', 3, np.uint16), ('png', 4, np.uint16),
    )
}  # fmt: skip
_TAILS = (
    '; jpeg compressed ', '; png compressed ', ' compressed bgr8', ';jpeg', ';', '; jpeg compressed bgr8',
    '; png compressed bgr16', '; jpeg compressed rgb8', '; png compressed rgb8', '; jpeg compressed mono8',
)  # fmt: skip


@pytest.mark.parametrize('content', _CONTENTS)
@pytest.mark.parametrize('encoding', [*ENCODINGS, '32FC1', '16SC1', '8UC2', '', 'RGB8', 'rgb8 '])
def test_n9_whatever_a_format_says_the_pixels_are_those_of_the_stock_subscriber_or_refused(encoding, content):
    """Formats of other publishers too, and files that hold something else than their format says."""
    file = _CONTENTS[content]
    for tail in _TAILS:
        format = f'{encoding}{tail}'
        try:
            found = _bgr(decode_compressed(format, file))
        except ImageRejectedError as error:
            assert error.reason in ('encoding', 'data') and error.remedy
            continue
        picture = cv2.imdecode(np.frombuffer(file, np.uint8), -1)
        if picture.ndim == 2 and ';' in format and (encoding in _RGB_LIKE + _YUV or encoding.endswith('UC3')):
            # The subscriber's image is broken, but grey is grey; cv_bridge reads it as such.
            expected = picture * np.uint16(256) if found.dtype != picture.dtype else picture
        elif ';' not in format or (encoding in _YUV and 'compressed bgr' in format):
            expected = picture[:, :, :3] if picture.ndim == 3 else picture
        else:
            expected = _seen(*_received(format, file))
        assert expected is not None, format
        assert np.array_equal(found, expected), format


def test_n9_red_and_blue_of_a_png_are_those_of_the_stock_subscriber():
    """Without ``compressed bgr`` the subscriber takes the file for one whose red and blue are exchanged."""
    scene = _scene()
    file = _encode('.png', scene)
    for name in _RGB_LIKE[::2]:
        assert np.array_equal(_bgr(decode_compressed(f'{name}; png compressed ', file)), scene[:, :, ::-1])
        assert np.array_equal(_bgr(decode_compressed(f'{name}; png compressed bgr8', file)), scene)


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('pattern', _OPENCV_BAYER)
def test_n9_a_mosaic_in_a_png_is_demosaiced_like_a_raw_one(pattern, bits):
    scratch = Scratch()
    name = f'bayer_{pattern}{bits}'
    mosaic = _scene(channels=1, dtype=np.uint8 if bits == 8 else np.uint16)
    raw = decode_image(RawImage(96, 64, name, 96 * bits // 8, False, mosaic.tobytes()))
    first, again = (decode_compressed(f'{name}; png compressed ', _encode('.png', mosaic), scratch) for _ in range(2))
    assert first.order == raw.order == 'bgr'
    assert np.array_equal(first.array, raw.array)
    assert np.shares_memory(first.array, again.array)


@pytest.mark.parametrize('compression', ['', 'mono8'])
@pytest.mark.parametrize('check', [check_compressed, decode_compressed])
def test_n7_a_mosaic_in_a_jpeg_is_refused_not_taken_for_grey(check, compression):
    with pytest.raises(ImageRejectedError, match='mosaic') as refused:
        check(f'bayer_rggb8; jpeg compressed {compression}', _JPEGS['grey'])
    assert refused.value.reason == 'encoding'
    assert 'png' in refused.value.remedy


def test_n7_a_mosaic_too_small_to_demosaic_is_refused():
    with pytest.raises(ImageRejectedError) as refused:
        decode_compressed('bayer_rggb8; png compressed ', _encode('.png', np.full((2, 9), 9, np.uint8)))
    assert refused.value.reason == 'size'


@pytest.mark.parametrize('format', ['32FC1; png compressed ', '16SC1; png compressed ', '32FC1; jpeg compressed mono8'])
def test_n7_a_depth_plane_is_refused_not_taken_for_grey(format):
    with pytest.raises(ImageRejectedError) as refused:
        check_compressed(format, _FILES['jpeg grey' if 'jpeg' in format else 'png grey'])
    assert refused.value.reason == 'encoding'


def test_n7_a_depth_plane_squeezed_into_8_bits_is_refused():
    """As raw, 16UC1 is grey of 16 bits; a file of 8 bits is not that image."""
    plane = _scene(channels=1, dtype=np.uint16)
    assert np.array_equal(decode_compressed('16UC1; png compressed ', _encode('.png', plane)).array, plane)
    with pytest.raises(ImageRejectedError, match='1 channels of 8 bits') as refused:
        decode_compressed('16UC1; png compressed ', _PNGS['grey'])
    assert refused.value.reason == 'data'


def _with_orientation(jpeg, orientation):
    """Put an EXIF orientation into a JPEG: TIFF header, one entry of tag 0x0112."""
    tiff = b'MM\0*' + struct.pack('>IHHHIHHI', 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b'Exif\0\0' + tiff
    return jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(exif) + 2) + exif + jpeg[2:]


@pytest.mark.parametrize('format', ['jpeg', 'rgb8; jpeg compressed bgr8'])
def test_n9_a_picture_is_not_turned_where_cv_bridge_does_not(format):
    """Else its features lie elsewhere than in every other node that sees the topic."""
    turned = _with_orientation(_JPEGS['baseline'], 6)
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (96, 64, 3)
    assert np.array_equal(decode_compressed(format, turned).array, decode_compressed(format, _JPEGS['baseline']).array)


@pytest.mark.parametrize('name', _FILES)
def test_n7_a_file_cut_anywhere_is_refused(name):
    """Whatever lacks as much as a byte of its scans or chunks; OpenCV may return such an image, half of it grey."""
    file = _FILES[name]
    whole = decode_compressed(name, file).array
    # Without its end mark, all blocks of a JPEG are there.
    end = len(file) - 2 if name.startswith('jpeg') else len(file)
    for cut in (*range(0, end - 40, 17), *range(end - 40, end)):
        with pytest.raises(ImageRejectedError) as refused:
            decode_compressed(name, file[:cut])
        assert refused.value.reason == 'data', cut
    for cut in range(end, len(file)):
        pixels, oddities = decode_picture(name, file[:cut])
        assert np.array_equal(pixels.array, whole) and oddities == ('no_end_mark',)


@pytest.mark.parametrize('tail', [b'\0' * 700, b'\xff' * 5, b'garbage', _JPEGS['grey'], b'\xff\xd9'])
@pytest.mark.parametrize('name', _FILES)
def test_n7_what_follows_the_end_is_ignored(name, tail):
    """Cameras that fill a fixed buffer pad their JPEGs."""
    padded = decode_compressed(name, _FILES[name] + tail)
    assert np.array_equal(padded.array, decode_compressed(name, _FILES[name]).array)


def _jpeg_of_size(width, height):
    jpeg = bytearray(_JPEGS['baseline'])
    frame = jpeg.index(b'\xff\xc0')
    jpeg[frame + 5 : frame + 9] = struct.pack('>HH', height, width)
    return bytes(jpeg)


def _png_of_size(width, height):
    png = bytearray(_PNGS['colour'])
    png[16:24] = struct.pack('>II', width, height)
    png[29:33] = struct.pack('>I', zlib.crc32(png[12:29]))
    return bytes(png)


@pytest.mark.parametrize('make', [_jpeg_of_size, _png_of_size])
@pytest.mark.parametrize('size', [(65500, 65500), (16385, 2), (2, 16385), (9000, 9000), (0, 64), (96, 0)])
def test_n7_a_size_that_is_no_image_is_refused_before_anything_is_decoded(monkeypatch, make, size):
    monkeypatch.setattr(cv2, 'imdecode', lambda *_: pytest.fail('decoded'))
    monkeypatch.setattr(simplejpeg, 'decode_jpeg', lambda *_, **__: pytest.fail('decoded'))
    with pytest.raises(ImageRejectedError) as refused:
        decode_compressed('', make(*size))
    assert refused.value.reason == 'size'
    assert f'{size[0]}x{size[1]}' in str(refused.value)


@pytest.mark.parametrize('name', _JPEGS)
def test_n7_fill_bytes_before_a_marker_are_part_of_a_whole_jpeg(name):
    """ISO/IEC 10918-1, B.1.1.2: any marker may be preceded by any number of FF."""
    jpeg = _JPEGS[name]
    filled = jpeg[:2] + b'\xff\xff' + jpeg[2:-2] + b'\xff\xff\xff\xd9'
    assert np.array_equal(decode_compressed('jpeg', filled).array, decode_compressed('jpeg', jpeg).array)
    assert np.array_equal(decode_compressed('jpeg', filled[:-1]).array, decode_compressed('jpeg', jpeg).array)


@pytest.mark.parametrize(
    ('format', 'data', 'reason'),
    [
        ('jpeg', b'', 'data'),
        ('png', b'', 'data'),
        ('jpeg', b'no image at all', 'data'),
        ('', b'', 'encoding'),
        ('webp', b'RIFF\0\0\0\0WEBPVP8 ', 'encoding'),
        ('h264', b'\0\0\0\1\x67', 'encoding'),
        ('16UC1; compressedDepth png', _PNGS['grey'], 'encoding'),
        ('jpeg', b'\xff\xd8\xff\xd9', 'data'),
        ('jpeg', _JPEGS['grey'][: _JPEGS['grey'].index(b'\xff\xda')] + b'\xff\xd9', 'data'),
        ('jpeg', b'\xff\xd8' + b'\xff\x01' * 100_000, 'data'),
        ('png', _PNGS['grey'][:8] + _PNGS['grey'][33:], 'data'),
        ('png', _PNGS['grey'][:33] + b'\0\0\0\0tEXt\0\0\0\0' * 100_000, 'data'),
        ('jpeg', None, 'data'),
        ('jpeg', 'text', 'data'),
    ],
)
def test_n7_what_is_neither_jpeg_nor_png_is_refused(format, data, reason):
    with pytest.raises(ImageRejectedError) as refused:
        decode_compressed(format, data)
    assert refused.value.reason == reason


def test_n7_a_png_of_another_size_than_its_pixels_is_refused():
    with pytest.raises(ImageRejectedError) as refused:
        decode_compressed('png', _png_of_size(96, 128))
    assert refused.value.reason == 'data'


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(_FILES)),
    format=st.text(max_size=20),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_n7_no_damaged_file_raises_anything_but_a_refusal(name, format, flips, cut):
    file = bytearray(_FILES[name])
    for place, value in flips:
        file[place % len(file)] = value
    data = bytes(file if cut is None else file[: cut % len(file)])
    try:
        pixels = decode_compressed(format, data)
    except ImageRejectedError as error:
        assert error.reason in ('encoding', 'size', 'data')
        return
    check_compressed(format, data)
    assert pixels.array.size > 0


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from([b'', b'\xff\xd8', b'\xff\xd8\xff', _PNGS['grey'][:8], _PNGS['grey'][:33]]),
    rest=st.binary(max_size=200),
)
def test_n7_no_garbage_raises_anything_but_a_refusal(start, rest):
    with pytest.raises(ImageRejectedError):
        decode_compressed('jpeg', start + rest)


def _segment(marker, content):
    return bytes((0xFF, marker)) + struct.pack('>H', len(content) + 2) + content


def _frame(width, height):
    return _segment(0xC0, struct.pack('>BHHB', 8, height, width, 1) + b'\x01\x11\x00')


def _jpeg(width=32, height=24):
    return cv2.imencode('.jpg', np.zeros((height, width), np.uint8))[1].tobytes()


def test_n7_a_second_frame_header_does_not_hide_the_size_of_the_first():
    """The decoder takes the first, and allocates for it."""
    jpeg = _jpeg()
    huge = jpeg.replace(struct.pack('>HH', 24, 32), struct.pack('>HH', 16000, 16385))
    for data in (huge[:-2] + _frame(32, 24) + b'\xff\xd9', jpeg[:2] + _frame(16000, 16000) + jpeg[2:]):
        with pytest.raises(ImageRejectedError) as refused:
            decode_compressed('jpeg', data)
        assert refused.value.reason in ('data', 'size')


def test_n7_a_marker_without_a_length_hides_no_segment():
    """FF 01 has none; what looks like its length would skip the header that the decoder takes."""
    jpeg = _jpeg()
    hidden = jpeg[2:-2].replace(struct.pack('>HH', 24, 32), struct.pack('>HH', 16000, 16385))
    data = jpeg[:2] + b'\xff\x01' + struct.pack('>H', len(hidden) + 2) + hidden + jpeg[2:]
    with pytest.raises(ImageRejectedError):
        decode_compressed('jpeg', data)


def test_n7_scans_without_end_are_refused():
    jpeg = cv2.imencode('.jpg', np.zeros((24, 32, 3), np.uint8), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    decode_compressed('jpeg', jpeg)
    scan = jpeg[jpeg.rindex(b'\xff\xda') : -2]
    with pytest.raises(ImageRejectedError, match='scans'):
        decode_compressed('jpeg', jpeg[:-2] + scan * 40 + b'\xff\xd9')
