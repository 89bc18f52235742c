"""What a decoder process does for its node: compressed bytes in, planes of the network's size out."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any, NoReturn

from gps_denied_c7.errors import C7Error
from gps_denied_c7.image.buffers import Scratch
from gps_denied_c7.image.decode import Pixels, decode_picture, import_decoders, is_out_of_memory
from gps_denied_c7.image.preprocess import PreprocessingSpec, Preprocessor
from gps_denied_c7.worker.protocol import Channel, ChannelClosedError
from gps_denied_c7.worker.shared_memory import SharedTensors, TensorLayout

__all__ = ['DecoderService', 'pixels_layout']

# Work buffers of a picture beyond this size are given back: the next one is seldom as large.
_KEPT_BYTES = 1 << 26
_TEXT_CHARACTERS = 1000

_log = logging.getLogger(__name__)


class DecoderService:
    """
    Answer the packets of one channel, one at a time, until it is closed.

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
        self._spec: Any = None
        self._pixels: Pixels | None = None

    def run(self) -> NoReturn:
        """
        Say that it is ready, and serve.

        :raises ChannelClosedError: the node has closed its end, or is gone.
        """
        handlers: dict[str, Callable[[dict[str, Any], list[int]], None]] = {
            'map': self._map,
            'decode': self._decode,
            'copy': self._copy,
        }
        self._channel.send({'say': 'ready'})
        while True:
            received = self._channel.receive()
            assert received is not None
            packet, descriptors = received
            assert isinstance(packet, dict)
            handlers[packet['do']](packet, descriptors)

    def _map(self, packet: dict[str, Any], descriptors: list[int]) -> None:
        """Take a segment: of compressed bytes, mapped for reading, or number ``buffer`` of those for planes."""
        number = packet['buffer']
        segment = SharedTensors(descriptors[0], writable=number is not None)
        if number is None:
            layout = TensorLayout((('data', 'uint8', (segment.size,), 0),))
            self._data = segment.arrays(layout)['data'].data
            segment.close()
            return
        before = self._outputs.pop(number, None)
        if before is not None:
            before.close()
        self._outputs[number] = segment

    def _decode(self, packet: dict[str, Any], descriptors: list[int]) -> None:
        self._pixels = None
        large = True
        try:
            answer = self._answer(packet)
            large = self._pixels is not None and self._pixels.array.nbytes > _KEPT_BYTES
        except Exception as error:
            answer = _refusal(error)
        if not packet['pixels']:
            self._pixels = None
        self._channel.send({**answer, 'id': packet['id']})
        if large:
            # Also what was refused may have left much.
            self._scratch, self._preprocessor, self._spec = Scratch(_KEPT_BYTES), None, None
            ctypes.CDLL(None).malloc_trim(0)

    def _answer(self, packet: dict[str, Any]) -> dict[str, Any]:
        data = self._data[: packet['bytes']]
        self._pixels, oddities = decode_picture(packet['format'], data, self._scratch, self._memory_bytes)
        array = self._pixels.array
        if self._preprocessor is None or self._spec != packet['spec']:
            self._preprocessor, self._spec = Preprocessor(PreprocessingSpec.from_json(packet['spec'])), packet['spec']
        planes = self._preprocessor.resize(self._pixels)
        layout = TensorLayout((('planes', array.dtype.name, (len(planes), *planes[0].shape), 0),))
        for target, plane in zip(self._outputs[packet['buffer']].arrays(layout)['planes'], planes, strict=True):
            target[...] = plane
        return {
            'say': 'decoded',
            'shape': array.shape,
            'dtype': array.dtype.name,
            'order': self._pixels.order,
            'oddities': oddities,
        }

    def _copy(self, packet: dict[str, Any], descriptors: list[int]) -> None:
        """Copy the pixels of the last picture into a segment, which is kept no longer."""
        segment = SharedTensors(descriptors[0], writable=True)
        assert self._pixels is not None
        array = self._pixels.array
        segment.arrays(pixels_layout(array.shape, array.dtype.name))['pixels'][...] = array
        segment.close()
        self._pixels = None
        self._channel.send({'say': 'copied', 'id': packet['id']})


def pixels_layout(shape: tuple[int, ...], dtype: str) -> TensorLayout:
    """Return where a picture's pixels lie in their segment."""
    return TensorLayout((('pixels', dtype, shape, 0),))


def _refusal(error: Exception) -> dict[str, Any]:
    if isinstance(error, ChannelClosedError):
        raise error
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        message = f'decoding needs more memory than is left for it: {" ".join(str(error).split())}'
        reason, remedy = 'decode_memory', 'Send smaller pictures, or raise decoder_memory_mb.'
    elif isinstance(error, C7Error):
        reason, message, remedy = getattr(error, 'reason', 'decoder'), error.message, error.remedy
    else:
        _log.warning('a picture met a fault of the decoder', exc_info=True)
        reason, message, remedy = 'decoder', f'{type(error).__name__}: {error}', ''
    return {
        'say': 'refused',
        'reason': reason,
        'message': message[:_TEXT_CHARACTERS],
        'remedy': remedy[:_TEXT_CHARACTERS],
    }
