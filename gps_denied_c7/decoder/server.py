"""What a decoder process does for its node: compressed bytes in, planes of the network's size out."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any, NoReturn

from gps_denied_c7.decoder.protocol import (
    TEXT_CHARACTERS,
    Copied,
    CopyPixels,
    Decode,
    Decoded,
    MapBuffer,
    MapInput,
    Prepare,
    Refused,
)
from gps_denied_c7.errors import C7Error
from gps_denied_c7.image.buffers import Scratch
from gps_denied_c7.image.decode import Pixels, decode_picture, import_decoders, is_out_of_memory
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.worker.channel import Channel, ChannelClosedError, Ready
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout

__all__ = ['DecoderService']

# Work buffers of a picture beyond this size are given back: the next one is seldom as large.
_KEPT_BYTES = 1 << 26

_log = logging.getLogger(__name__)


class DecoderService:
    """
    Answer the messages of one channel, one at a time, until it is closed.

    :param channel: to the node; borrowed.
    :param memory_bytes: what one picture may need.
    """

    def __init__(self, channel: Channel, memory_bytes: int) -> None:
        import_decoders()
        self._channel = channel
        self._memory_bytes = memory_bytes
        self._data: memoryview = memoryview(b'')
        self._outputs: dict[int, SharedTensors] = {}
        self._scratch = Scratch(_KEPT_BYTES)
        self._preprocessor: Preprocessor | None = None
        self._spec: PreprocessingSpec | None = None
        self._pixels: Pixels | None = None

    def run(self) -> NoReturn:
        """
        Say that it is ready, and serve.

        :raises ChannelClosedError: the node has closed its end, or is gone.
        """
        handlers: dict[type, Callable[[Any, list[int]], None]] = {
            MapInput: lambda _, descriptors: self._map_input(descriptors[0]),
            MapBuffer: lambda message, descriptors: self._map_buffer(message.number, descriptors[0]),
            Prepare: lambda message, _: self._prepare(message.spec),
            Decode: lambda message, _: self._decode(message),
            CopyPixels: lambda message, descriptors: self._copy(message.number, descriptors[0]),
        }
        self._channel.send(Ready())
        self._channel.serve(handlers)

    def _map_input(self, descriptor: int) -> None:
        segment = SharedTensors(descriptor, writable=False)
        layout = TensorLayout.single('data', 'uint8', (segment.size,))
        self._data = segment.arrays(layout)['data'].data
        segment.close()

    def _map_buffer(self, number: int, descriptor: int) -> None:
        segment = SharedTensors(descriptor, writable=True)
        before = self._outputs.pop(number, None)
        if before is not None:
            before.close()
        self._outputs[number] = segment

    def _prepare(self, spec: PreprocessingSpec) -> None:
        # Made with the first picture, which is refused where a library is missing.
        self._spec, self._preprocessor = spec, None

    def _decode(self, request: Decode) -> None:
        self._pixels = None
        large = True
        answer: Decoded | Refused
        try:
            answer = self._answer(request)
            large = self._pixels is not None and self._pixels.array.nbytes > _KEPT_BYTES
        except Exception as error:
            answer = _refusal(request.number, error)
        if not request.pixels:
            self._pixels = None
        self._channel.send(answer)
        if large:
            # Also what was refused may have left much.
            self._scratch, self._preprocessor = Scratch(_KEPT_BYTES), None
            ctypes.CDLL(None).malloc_trim(0)

    def _answer(self, request: Decode) -> Decoded:
        data = self._data[: request.size]
        self._pixels, oddities = decode_picture(request.format, data, self._scratch, self._memory_bytes)
        array = self._pixels.array
        if self._preprocessor is None:
            assert self._spec is not None
            self._preprocessor = Preprocessor(self._spec)
        planes = self._preprocessor.resize(self._pixels)
        layout = TensorLayout.single('planes', array.dtype.name, (len(planes), *planes[0].shape))
        for target, plane in zip(self._outputs[request.buffer].arrays(layout)['planes'], planes, strict=True):
            target[...] = plane
        return Decoded(request.number, array.shape, array.dtype.name, self._pixels.order, oddities)

    def _copy(self, number: int, descriptor: int) -> None:
        """Copy the pixels of the last picture into a segment, which is kept no longer."""
        segment = SharedTensors(descriptor, writable=True)
        assert self._pixels is not None
        array = self._pixels.array
        layout = TensorLayout.single('pixels', array.dtype.name, array.shape)
        segment.arrays(layout)['pixels'][...] = array
        segment.close()
        self._pixels = None
        self._channel.send(Copied(number))


def _refusal(number: int, error: Exception) -> Refused:
    if isinstance(error, ChannelClosedError):
        raise error
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        message = f'decoding needs more memory than is left for it: {" ".join(str(error).split())}'
        reason, remedy = 'decode_memory', 'Send smaller images, or raise decoder_memory_mb.'
    elif isinstance(error, C7Error):
        reason, message, remedy = getattr(error, 'reason', 'decoder'), error.message, error.remedy
    else:
        _log.warning('decoding an image failed unexpectedly', exc_info=True)
        reason, message, remedy = 'decoder', f'{type(error).__name__}: {error}', ''
    return Refused(number, reason, message[:TEXT_CHARACTERS], remedy[:TEXT_CHARACTERS])
