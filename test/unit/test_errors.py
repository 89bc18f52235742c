"""Errors that are kept: what leads from one to the next is followed to its end."""

from __future__ import annotations

import errno
import os

import pytest

from gps_denied_c7.errors import (
    C7Error,
    ChainExhaustedError,
    ConfigError,
    EngineContentError,
    EngineDeserializeError,
    EngineSchemaMismatchError,
    GpuUnavailableError,
    InferenceError,
    ModelBundleError,
    RuntimeUnavailableError,
    error_and_causes,
    in_one_line,
)
from gps_denied_c7.worker.protocol import ErrorReport


def test_every_cause_and_context_is_found_once_also_in_a_circle():
    first, second, third = C7Error('first.'), OSError('second'), ValueError('third')
    first.__cause__, first.__context__ = second, third
    second.__context__ = first
    assert list(error_and_causes(first))[0] is first
    assert {id(error) for error in error_and_causes(first)} == {id(first), id(second), id(third)}
    assert len(list(error_and_causes(first))) == 3
    assert list(error_and_causes(third)) == [third]


@pytest.mark.parametrize(
    ('error', 'lasting'),
    [
        (ModelBundleError('damaged.'), True), (ConfigError('x', 'is wrong.'), True),
        (EngineSchemaMismatchError('sm', expected=1, found=2), True), (RuntimeUnavailableError('t', 'missing.'), True),
        (GpuUnavailableError('t', 'none.'), False), (InferenceError('x'), False), (EngineDeserializeError('x'), False),
        (EngineContentError('x'), True),
        (ChainExhaustedError([('a', ModelBundleError('x')), ('b', RuntimeUnavailableError('t', 'x'))]), True),
        (ChainExhaustedError([('a', ModelBundleError('x')), ('b', GpuUnavailableError('t', 'x'))]), False),
        (ChainExhaustedError([('a', OSError('x'))]), False), (ChainExhaustedError([]), False),
    ],
)  # fmt: skip
def test_what_stays_until_something_changes(error, lasting):
    assert error.lasting is lasting
    if isinstance(error, ChainExhaustedError):
        return
    assert ErrorReport.of(error).error().lasting is lasting


@pytest.mark.parametrize(
    ('number', 'lasting'),
    [
        (errno.ENOENT, True), (errno.EACCES, True), (errno.ENOTDIR, True), (errno.EMFILE, False), (errno.EIO, False),
        (errno.ENOMEM, False), (errno.ESTALE, False), (errno.ETIMEDOUT, False), (errno.ENOSPC, False),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_for_want_of_something_may_be_read_later(number, lasting):
    try:
        raise ModelBundleError('model.json: no.') from OSError(number, os.strerror(number))
    except ModelBundleError as error:
        assert error.lasting is lasting
        assert ErrorReport.of(error).error().lasting is lasting, 'a worker says so too'


def test_a_want_of_memory_passes():
    try:
        raise ModelBundleError('no memory.') from MemoryError()
    except ModelBundleError as error:
        assert not error.lasting


@pytest.mark.parametrize(
    ('name', 'remedy'),
    [
        ('cv2', 'apt-get install python3-opencv'),
        ('rclpy.node', 'Source ROS'),
        ('gps_denied_c7_msgs', 'colcon build'),
        ('onnx', 'pip install -r requirements/runtime.txt'),
        ('tabulate', 'pip install -r requirements/dev.txt'),
    ],
)
def test_a_program_names_a_missing_package_and_how_it_is_installed(name, remedy):
    line = in_one_line(ModuleNotFoundError(f'No module named {name!r}', name=name))
    assert line.startswith(f'the Python package {name.partition(".")[0]} is not installed. ') and remedy in line


def test_a_program_prints_an_error_of_ours_as_it_is():
    assert in_one_line(ModelBundleError('No.', remedy='Do it.')) == 'No. Do it.'


@pytest.mark.parametrize(
    'error',
    [
        ModuleNotFoundError("No module named 'torch'"),
        ImportError('libnvinfer.so.10: cannot open shared object file: No such file or directory'),
        ImportError('libgomp.so.1: cannot allocate memory in static TLS block'),
        OSError('libcudart.so.12: cannot open shared object file: No such file or directory'),
    ],
)
def test_a_package_or_library_that_is_not_there_is_waited_for(error):
    try:
        raise RuntimeUnavailableError('pytorch_fp16', 'does not import.') from error
    except RuntimeUnavailableError as refused:
        assert refused.lasting
