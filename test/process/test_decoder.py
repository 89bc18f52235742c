"""Compressed images are decoded in a process of their own: it answers like this one, may die, and costs one picture."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gps_denied_c7.decoder import client as decoder_client
from gps_denied_c7.decoder.client import ImageDecoder
from gps_denied_c7.decoder.protocol import DECODER_PROTOCOL, Copied, Decoded, Refused
from gps_denied_c7.errors import ImageRejectedError
from gps_denied_c7.failover.backoff import Backoff
from gps_denied_c7.image.decode import ODDITIES, Pixels
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import Interpolation, PreprocessingSpec, ResizeMode
from gps_denied_c7.monitoring.rate_limiter import RateLimiter
from gps_denied_c7.worker import process as worker_process
from gps_denied_c7.worker.channel import PROTOCOL_VERSION, MessageSet, Ready
from gps_denied_c7.worker.process import WorkerProcess
from support.left_behind import processes_naming

SPEC = PreprocessingSpec(width=64, height=48)
MIB = 1 << 20


def scene(width=96, height=64, channels=3, dtype=np.uint8, seed=0):
    """A random picture, smooth enough for JPEG."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, channels)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    return cv2.normalize(smooth, None, 0, np.iinfo(dtype).max, cv2.NORM_MINMAX).astype(dtype).reshape(noise.shape)


def encoded(suffix, picture, *options):
    done, file = cv2.imencode(suffix, picture, list(options))
    assert done
    return file.tobytes()


JPEG, PNG = encoded('.jpg', scene()), encoded('.png', scene())


def tensor_of(file, spec=SPEC):
    """The tensor of the pixels that cv2.imdecode, and so cv_bridge, gives: no part of the product decodes it."""
    picture = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    order = {1: 'gray', 3: 'bgr', 4: 'bgra'}[picture.shape[2] if picture.ndim == 3 else 1]
    tensor = np.zeros(spec.tensor_shape, spec.dtype)
    Preprocessor(spec).run(Pixels(picture, order), tensor)
    return tensor


def filled(image, spec=SPEC):
    """The tensor that the node makes of what a decoder gives."""
    assert not image.planes.flags.writeable
    tensor = np.full(spec.tensor_shape, 77, spec.dtype)
    Preprocessor(spec).fill(image.planes, *image.size, tensor)
    return tensor


def make_decoder(memory_bytes=256 * MIB, timeout_s=20.0):
    return ImageDecoder('camera', memory_bytes=memory_bytes, timeout_s=timeout_s)


@pytest.fixture
def decoder():
    decoder = make_decoder()
    yield decoder
    decoder.close()


@pytest.fixture(scope='module')
def shared_decoder():
    decoder = make_decoder()
    yield decoder
    decoder.close()


def answers(decoder, file=JPEG, spec=SPEC):
    """Have one picture decoded, and look at it."""
    image = decoder.decode('', memoryview(file), spec)
    np.testing.assert_array_equal(filled(image, spec), tensor_of(file, spec))
    image.release()
    return image


def refused(decoder, file=JPEG, spec=SPEC):
    with pytest.raises(ImageRejectedError) as refusal:
        decoder.decode('', memoryview(file), spec)
    return refusal.value


def wait_until(condition, what, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def stop(pid):
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


def kill(pid, number=signal.SIGKILL):
    os.kill(pid, number)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


specs = st.builds(
    PreprocessingSpec,
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    resize=st.sampled_from(ResizeMode),
    colour=st.sampled_from(['gray', 'rgb', 'bgr']),
    layout=st.sampled_from(['nchw', 'nhwc']),
    dtype=st.sampled_from(['float32', 'float16']),
    interpolation=st.sampled_from(Interpolation),
    pad_value=st.integers(0, 255),
)
SUBSAMPLINGS = ['444', '422', '420', '440', '411']


@st.composite
def files(draw):
    """A JPEG of one of three writers, or a PNG."""
    channels = draw(st.sampled_from([1, 3]))
    picture = scene(draw(st.integers(1, 120)), draw(st.integers(1, 120)), channels, seed=draw(st.integers(0, 99)))
    quality = draw(st.integers(1, 100))
    writer = draw(st.sampled_from(['cv2', 'pillow', 'simplejpeg', 'png', 'png16']))
    if writer.startswith('png'):
        dtype = np.uint16 if writer == 'png16' else np.uint8
        return encoded('.png', picture.astype(dtype) * (257 if writer == 'png16' else 1))
    if writer == 'simplejpeg' and channels == 3:
        return simplejpeg.encode_jpeg(picture, quality, 'BGR', draw(st.sampled_from(SUBSAMPLINGS)))
    if writer == 'pillow':
        stream = io.BytesIO()
        options = {'quality': quality, 'progressive': draw(st.booleans()), 'optimize': draw(st.booleans())}
        Image.fromarray(picture.squeeze(-1) if channels == 1 else picture).save(stream, 'JPEG', **options)
        return stream.getvalue()
    factor = getattr(cv2, f'IMWRITE_JPEG_SAMPLING_FACTOR_{draw(st.sampled_from(SUBSAMPLINGS))}')
    return encoded(
        '.jpg', picture, cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor,
        cv2.IMWRITE_JPEG_PROGRESSIVE, draw(st.integers(0, 1)), cv2.IMWRITE_JPEG_RST_INTERVAL, draw(st.integers(0, 5)),
    )  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=files(), spec=specs, pixels=st.booleans())
def test_the_tensor_is_that_of_the_pixels_of_opencv_bit_for_bit(shared_decoder, file, spec, pixels):
    image = shared_decoder.decode('', memoryview(file), spec, pixels=pixels)
    expected = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    assert (image.size, image.oddities) == (expected.shape[1::-1], ())
    np.testing.assert_array_equal(filled(image, spec), tensor_of(file, spec))
    if pixels:
        np.testing.assert_array_equal(image.pixels.array, expected)
    else:
        assert image.pixels is None
    image.release()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from([JPEG, PNG]),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 10**6),
)
def test_no_damaged_file_costs_more_than_itself(shared_decoder, file, flips, cut):
    damaged = bytearray(file)
    for place, value in flips:
        damaged[place % len(file)] = value
    data = bytes(damaged if cut is None else damaged[: cut % len(file)])
    pid = shared_decoder.pid
    try:
        image = shared_decoder.decode('jpeg', memoryview(data), SPEC)
        assert set(image.oddities) <= set(ODDITIES)
        image.release()
    except ImageRejectedError as error:
        assert error.reason in ('encoding', 'size', 'data', 'decode_memory')
    assert shared_decoder.pid == pid


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_decoder_that_dies_between_pictures_costs_none(decoder, number):
    answers(decoder)
    before = decoder.pid
    kill(before, number)
    answers(decoder)
    assert decoder.pid != before


def test_a_decoder_that_is_killed_costs_the_picture_in_hand_alone(decoder):
    answers(decoder)
    before = decoder.pid
    stop(before)
    killer = threading.Timer(0.3, os.kill, (before, signal.SIGKILL))
    killer.start()
    error = refused(decoder)
    killer.join()
    assert error.reason == 'decoder' and 'SIGKILL' in str(error)
    answers(decoder)
    answers(decoder, PNG)


def test_a_decoder_that_hangs_is_killed_at_the_deadline(caplog):
    caplog.set_level(logging.WARNING)
    decoder = make_decoder(timeout_s=1.0)
    answers(decoder)
    before = decoder.pid
    stop(before)
    error = refused(decoder)
    assert error.reason == 'decode_time' and error.remedy
    wait_until(lambda: not Path(f'/proc/{before}').exists(), 'the hung decoder is gone')
    answers(decoder)
    decoder.close()
    assert sum('started again' in record.getMessage() for record in caplog.records) == 1


def test_a_decoder_that_is_killed_again_and_again_says_so_once_in_a_while(caplog):
    caplog.set_level(logging.WARNING)
    decoder = make_decoder()
    decoder._limiter = RateLimiter(3600.0)
    for _ in range(3):
        answers(decoder)
        os.kill(decoder.pid, signal.SIGKILL)
        # Its end is noticed with this image, or before.
        with contextlib.suppress(ImageRejectedError):
            decoder.decode('', memoryview(JPEG), SPEC).release()
    decoder.close()
    assert sum('started again' in record.getMessage() for record in caplog.records) == 1


def test_a_decoder_that_dies_before_its_first_picture_waits_and_refuses_at_once(decoder, clock):
    # The first pause is a quarter of a second, in which a busy machine may not come to look.
    decoder._backoff = Backoff(clock)
    for _ in range(2):
        stop(decoder.pid)
        threading.Timer(0.1, os.kill, (decoder.pid, signal.SIGKILL)).start()
        assert refused(decoder).reason == 'decoder'
    assert decoder.pid is None
    error = refused(decoder)
    assert error.reason == 'decoder' and 'starts again in' in str(error) and 'SIGKILL' in str(error)

    def kill_the_next():
        wait_until(lambda: decoder.pid is not None, 'the next one')
        os.kill(decoder.pid, signal.SIGKILL)

    pauses = []
    for _ in range(2):
        pauses.append(decoder._backoff.left_s(decoder._name))
        clock.ns += int(pauses[-1] * 1e9)
        killer = threading.Thread(target=kill_the_next)
        killer.start()
        assert refused(decoder).reason == 'decoder'
        killer.join()
    assert pauses == [decoder_client._PAUSE_S[0], 2 * decoder_client._PAUSE_S[0]]
    clock.ns += int(decoder._backoff.left_s(decoder._name) * 1e9)
    answers(decoder)


def test_each_of_many_pictures_that_kill_the_decoder_costs_itself_alone(decoder):
    """One of sixty at 20 Hz cost the camera three of five pictures, in pauses of up to 10 s."""
    for _ in range(6):
        answers(decoder)
        stop(decoder.pid)
        threading.Timer(0.1, os.kill, (decoder.pid, signal.SIGKILL)).start()
        assert refused(decoder).reason == 'decoder'


def test_close_is_quick_while_another_thread_waits_for_a_hung_decoder(decoder):
    answers(decoder)
    stop(decoder.pid)
    errors = []
    thread = threading.Thread(target=lambda: errors.append(refused(decoder)))
    thread.start()
    wait_until(lambda: decoder._lock.locked(), 'the picture to be in hand')
    begun = time.monotonic()
    decoder.close()
    assert time.monotonic() - begun < 10
    thread.join(10)
    assert [error.reason for error in errors] == ['decoder'] and 'closed' in str(errors[0])
    assert refused(decoder).reason == 'decoder'
    decoder.close()


def test_a_file_of_thousands_of_faults_does_not_fill_the_log(decoder, caplog):
    """libpng and libjpeg write a line for each; 110 MB came of 15 s."""
    caplog.set_level(logging.DEBUG)
    faulty = PNG[:33] + b'\0\0\0\1tEXtx\0\0\0\0' * 5000 + PNG[33:]
    for _ in range(10):
        image = decoder.decode('', memoryview(faulty), SPEC)
        assert image.oddities == ('bad_checksum',)
        image.release()
        refused(decoder, JPEG[:-300])
    decoder.close()
    wait_until(lambda: not threads('c7-reaper'), 'its end')
    assert sum(len(record.getMessage()) for record in caplog.records) < 1000


def test_a_decoder_is_closed_while_it_starts():
    for _ in range(3):
        decoder = make_decoder()
        pid = decoder.pid
        decoder.close()
        wait_until(lambda pid=pid: not Path(f'/proc/{pid}').exists(), 'it is gone')


def test_nothing_is_left_behind():
    """Descriptors, mappings of segments, threads and processes, also after kills and pictures of many sizes."""

    def look():
        gc.collect()
        segments = Path('/proc/self/maps').read_text().count('memfd:c7-tensors')
        children = Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()
        return len(os.listdir('/proc/self/fd')), segments, threading.active_count(), children

    def fly():
        decoder = make_decoder()
        for size in (64, 900, 64):
            answers(decoder, encoded('.png', scene(size, size)), PreprocessingSpec(width=size, height=8))
        stop(decoder.pid)
        threading.Timer(0.1, os.kill, (decoder.pid, signal.SIGKILL)).start()
        refused(decoder)
        refused(decoder, JPEG[:-200])
        answers(decoder)
        decoder.decode('', memoryview(JPEG), SPEC, pixels=True)
        decoder.close()

    logs = threads('c7-worker-log')
    # A first one brings the thread that starts all.
    fly()
    wait_until(lambda: threads('c7-worker-log') <= logs and not threads('c7-reaper'), 'its threads to end')
    before = look()
    for _ in range(2):
        fly()
    wait_until(lambda: look() == before, f'{look()} to become {before}')


def test_a_decoder_that_cannot_be_handed_memory_leaves_none_behind():
    def segments():
        links = (f'/proc/self/fd/{number}' for number in os.listdir('/proc/self/fd'))
        return sum('c7-tensors' in os.readlink(link) for link in links if os.path.islink(link))

    before = segments()
    decoder = make_decoder()
    process = decoder._running()
    process.await_ready(time.monotonic() + 30)
    # As a decoder that ends its side and stays alive.
    os.kill(process.pid, signal.SIGSTOP)
    process._channel._end.shutdown(socket.SHUT_RDWR)
    assert refused(decoder).reason == 'decoder'
    decoder.close()
    assert segments() == before


def threads(name):
    return sum(thread.name == name for thread in threading.enumerate())


def test_a_decoder_does_not_outlive_its_node_even_where_it_hangs(tmp_path):
    script = (
        'import sys, time\n'
        'from gps_denied_c7.decoder.client import ImageDecoder\n'
        'decoder = ImageDecoder("camera", memory_bytes=1 << 26, timeout_s=20)\n'
        'print(decoder.pid, flush=True); time.sleep(60)'
    )
    environ = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path), 'PYTHONPATH': os.pathsep.join(sys.path)}
    node = subprocess.Popen([sys.executable, '-c', script], env=environ, stdout=subprocess.PIPE)
    assert node.stdout is not None
    pid = int(node.stdout.readline())
    wait_until(lambda: Path(f'/proc/{pid}/comm').read_text().strip() == 'c7-decoder', 'it is set up')
    assert pid in processes_naming(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    node.kill()
    node.wait()
    node.stdout.close()
    wait_until(lambda: not processes_naming(tmp_path), 'the decoder to end with its node')


def test_the_kernel_takes_a_decoder_before_any_engine(decoder):
    answers(decoder)
    assert int(Path(f'/proc/{decoder.pid}/oom_score_adj').read_text()) == 1000
    assert Path(f'/proc/{decoder.pid}/comm').read_text().strip() == 'c7-decoder'


@pytest.mark.parametrize(
    ('mode', 'options'), [('16 bits, 8192x8192', {}), ('progressive, 5000x5000', {}), ('8 bits, 8192x8192', {})]
)
def test_a_picture_that_needs_too_much_memory_is_refused_before_it_is_decoded(mode, options):
    """A few hundred kB may stand for a GB."""
    if mode.startswith('16'):
        file = encoded('.png', np.zeros((8192, 8192, 3), np.uint16))
    elif mode.startswith('8'):
        file = encoded('.png', np.zeros((8192, 8192, 3), np.uint8))
    else:
        file = encoded('.jpg', np.zeros((5000, 5000, 3), np.uint8), cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    decoder = make_decoder(memory_bytes=128 * MIB)
    pid = decoder.pid
    error = refused(decoder, file)
    assert error.reason == 'decode_memory' and error.remedy and 'x' in str(error)
    assert decoder.pid == pid
    answers(decoder)
    decoder.close()


def test_memory_that_runs_out_on_the_way_is_a_refusal():
    """What the header says fits; what Pillow makes of 16 bits on the way does not."""
    file = encoded('.png', scene(3600, 3600, 1, np.uint16))
    decoder = make_decoder(memory_bytes=80 * MIB)
    pid = decoder.pid
    spec = PreprocessingSpec(width=3500, height=3500, interpolation='pil_bicubic', dtype='float16')
    assert refused(decoder, file, spec).reason == 'decode_memory'
    answers(decoder)
    assert decoder.pid == pid
    decoder.close()


def test_a_file_larger_than_the_limit_is_refused():
    decoder = make_decoder(memory_bytes=2 * MIB)
    error = refused(decoder, JPEG + bytes(2 * MIB))
    assert error.reason == 'decode_memory' and error.remedy
    answers(decoder)
    decoder.close()


def test_the_memory_for_files_shrinks_after_a_huge_one(decoder):
    sizes = []
    for file in (JPEG, JPEG + bytes(40 * MIB), JPEG):
        decoder.decode('', memoryview(file), SPEC).release()
        sizes.append(decoder._input.size)
    assert sizes[0] == sizes[2] < 2 * MIB < 40 * MIB < sizes[1]


def test_the_next_picture_does_not_overwrite_one_that_is_read(decoder):
    files = [encoded('.jpg', scene(seed=seed)) for seed in range(decoder_client._MOST_BUFFERS)]
    images = [decoder.decode('', memoryview(file), SPEC) for file in files]
    for file, image in zip(files, images, strict=True):
        np.testing.assert_array_equal(filled(image), tensor_of(file))
    error = refused(decoder)
    assert error.reason == 'decoder' and 'not released' in str(error)
    for image in images[:2]:
        image.release()
        image.release()
    for _ in range(5):
        answers(decoder)
    # An image that was released long ago frees nothing of those that came after it.
    images[:2] = [decoder.decode('', memoryview(file), SPEC) for file in files[:2]]
    old = images[0]
    old.release()
    images[0] = decoder.decode('', memoryview(files[0]), SPEC)
    old.release()
    assert refused(decoder).reason == 'decoder'
    for image, file in zip(images, files, strict=True):
        np.testing.assert_array_equal(filled(image), tensor_of(file))
    np.testing.assert_array_equal(filled(images[3]), tensor_of(files[3]))


def test_a_tensor_outlives_the_decoder_that_made_it(decoder):
    image = decoder.decode('', memoryview(JPEG), SPEC)
    kill(decoder.pid)
    answers(decoder, PNG)
    decoder.close()
    np.testing.assert_array_equal(filled(image), tensor_of(JPEG))
    image.release()


def test_the_cpu_time_of_pictures_is_counted_refused_ones_too(decoder):
    answers(decoder)
    before = decoder.cpu_ns
    assert before > 0
    for _ in range(3):
        answers(decoder, encoded('.png', scene(800, 800)))
        assert decoder.cpu_ns > before
        before = decoder.cpu_ns
    damaged = encoded('.jpg', scene(2000, 2000))
    assert refused(decoder, damaged[:-500] + b'\xff\xd9').reason == 'data'
    assert decoder.cpu_ns > before


def test_a_picture_at_which_the_decoder_dies_is_counted_as_well(decoder):
    answers(decoder)
    before = decoder.cpu_ns
    stop(decoder.pid)
    threading.Timer(0.3, os.kill, (decoder.pid, signal.SIGKILL)).start()
    refused(decoder)
    assert decoder.cpu_ns - before >= 0.2e9
    answers(decoder)


INVALID = [
    ['Decoded'],
    ['Decoded', [64, 96, 3, 1], 'uint8', 'bgr', []],
    ['Decoded', [64, -96, 3], 'uint8', 'bgr', []],
    ['Decoded', [16000, 16000, 3], 'uint8', 'bgr', []],
    ['Decoded', [64, 96, 3], ['uint8'], 'bgr', []],
    ['Decoded', [64, 96, 3], 'float32', 'bgr', []],
    ['Decoded', [64, 96, 3], 'uint8', 'gray', []],
    ['Decoded', [64, 96, 3], 'uint8', 'bgr', ['\n[FATAL] all is lost']],
    ['Decoded', [64, 96, 3], 'uint8', 'bgr', [], 1],
    ['Copied'],
    ['Refused', 'because', '', ''],
    ['Refused', ['data'], '', ''],
]


@pytest.mark.parametrize('reply', INVALID, ids=str)
def test_a_decoder_under_anothers_control_is_killed_and_costs_one_picture(decoder, monkeypatch, reply):
    answers(decoder)
    before = decoder.pid
    decode = MessageSet.decode

    def changed(self, packet):
        message = decode(self, packet)
        kind, *fields = reply
        replaced = json.dumps([kind, message.number, *fields]).encode() if isinstance(message, Decoded) else packet
        return decode(self, replaced)

    monkeypatch.setattr(MessageSet, 'decode', changed)
    assert refused(decoder).reason == 'decoder'
    monkeypatch.undo()
    assert decoder.pid != before
    answers(decoder)


def test_a_decoder_of_another_version_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr('gps_denied_c7.worker.process.PROTOCOL_VERSION', PROTOCOL_VERSION + 1)
    decoder = make_decoder()
    error = refused(decoder)
    assert error.reason == 'decoder' and 'version' in str(error) and 'Start the node again' in error.remedy
    monkeypatch.undo()
    wait_until(lambda: not decoder._backoff.left_s(decoder._name), 'the pause to end')
    answers(decoder)
    decoder.close()


def test_a_late_answer_is_not_taken_for_another_pictures(decoder, monkeypatch):
    answers(decoder)
    receive, late = WorkerProcess.receive, []

    def twice(self, deadline):
        return late.pop() if late else receive(self, deadline)

    monkeypatch.setattr(WorkerProcess, 'receive', twice)
    for stale in (Refused(1, 'data', '', ''), Decoded(0, (2, 2), 'uint8', 'gray', ()), Ready()):
        late.append(stale)
        answers(decoder)
    late.extend([Copied(-1)] * 50)
    assert 'belong to no image' in str(refused(decoder))


def test_what_a_refusal_says_is_bounded(decoder, monkeypatch):
    answers(decoder)
    sent = DECODER_PROTOCOL.from_child.encode(Refused(2, 'data', '\ud800' * 5000, 'y' * 30_000))
    message = DECODER_PROTOCOL.from_child.decode(sent)
    monkeypatch.setattr(WorkerProcess, 'receive', lambda self, deadline: message)
    error = refused(decoder)
    assert len(error.message) <= 1000 and len(error.remedy) <= 1000 and str(error).encode()


def test_without_simplejpeg_jpeg_is_refused_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / 'simplejpeg.py').write_text('raise ImportError("no simplejpeg here")')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')]))
    decoder = make_decoder()
    error = refused(decoder)
    assert error.reason == 'decoder' and 'simplejpeg' in str(error) and 'pip install' in error.remedy
    answers(decoder, PNG)
    decoder.close()


def test_where_no_process_can_be_started_pictures_are_refused_until_one_can(monkeypatch):
    def fail(*_, **__):
        raise BlockingIOError(11, 'Resource temporarily unavailable')

    with monkeypatch.context() as patch:
        patch.setattr(worker_process.subprocess, 'Popen', fail)
        decoder = make_decoder()
        error = refused(decoder)
        assert error.reason == 'decoder' and 'unavailable' in str(error)
    wait_until(lambda: not decoder._backoff.left_s(decoder._name), 'the pause to end')
    answers(decoder)
    decoder.close()


@pytest.mark.parametrize('format', ['16UC1; compressedDepth png', 'webp', 'x' * 5000, 'bayer_rggb8; jpeg compressed '])
def test_a_format_that_is_not_decoded_never_reaches_the_process(decoder, format):
    answers(decoder)
    stop(decoder.pid)
    with pytest.raises(ImageRejectedError) as refusal:
        decoder.decode(format, memoryview(b'' if format == 'webp' else JPEG), SPEC)
    assert refusal.value.reason == 'encoding' and len(str(refusal.value)) < 1000
