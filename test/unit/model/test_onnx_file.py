"""R-3, N-2: what a model file holds is refused for good, through every process; what may pass is not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip('onnx')

import numpy as np
from onnx import TensorProto, helper

from gps_denied_c7.errors import C7Error, EngineContentError
from gps_denied_c7.model import onnx_file
from gps_denied_c7.model.onnx_file import read_onnx
from gps_denied_c7.worker.protocol import ErrorReport
from support.external_weights import external, scaled, write

W = np.zeros((256, 256), np.float32)


def with_weights(path: Path, *tensors: TensorProto) -> None:
    (path.parent / 'net.weights').write_bytes(W.tobytes())
    write(path, [helper.make_node('MatMul', ['x', 'w'], ['y'])], list(tensors))


REFUSED: dict[str, Callable[[Path], object]] = {
    'random bytes': lambda path: path.write_bytes(os.urandom(1000) + b'\x00'),
    'cut': lambda path: path.write_bytes(scaled(path, 1.0).read_bytes()[:-7]),
    'empty': lambda path: path.write_bytes(b''),
    'no graph': lambda path: path.write_bytes(b'\x08\x08'),
    'not there': lambda path: None,
    'a directory': Path.mkdir,
    'an engine inside': lambda path: write(path, [helper.make_node('EPContext', ['x'], ['y'])], []),
    'weights that are not there': lambda path: write(path, [], [external('w', W, 'nowhere')]),
    'weights outside': lambda path: write(path, [], [external('w', W, '/etc/passwd')]),
    'weights in two files': lambda path: with_weights(path, external('w', W, location='a'), two_files()),
    'weights beyond the end': lambda path: with_weights(path, external('w', W, offset=8)),
    'weights of a wrong length': lambda path: with_weights(path, external('w', W, length=8)),
}


def two_files() -> TensorProto:
    tensor = external('w', W)
    tensor.external_data.add(key='location', value='other')
    return tensor


@pytest.mark.parametrize('kind', REFUSED)
def test_n2_a_model_refused_for_what_it_holds_waits_for_its_file_to_change(tmp_path: Path, kind: str) -> None:
    REFUSED[kind](tmp_path / 'net.onnx')
    with pytest.raises(C7Error) as caught:
        read_onnx(tmp_path / 'net.onnx', None)
    assert caught.value.lasting, caught.value
    assert ErrorReport.of(caught.value).error().lasting, 'the node hears so from its worker'


def test_n2_a_model_that_cannot_be_read_for_now_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = scaled(tmp_path / 'net.onnx', 1.0)

    def failing(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    # A disk of this machine does not fail.
    monkeypatch.setattr(os, 'fstat', failing)
    with pytest.raises(EngineContentError) as caught:
        onnx_file._read(path)
    monkeypatch.undo()
    assert not caught.value.lasting and not ErrorReport.of(caught.value).error().lasting
