"""What a node and a decoder process send each other, one dataclass for each message."""

from __future__ import annotations

from dataclasses import dataclass

from gps_denied_c7.image.decode import MAX_PIXELS, MAX_SIDE, ODDITIES, ORDERS, REASONS
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.worker.channel import ChildProtocol

__all__ = [
    'DECODER_PROTOCOL', 'TEXT_CHARACTERS', 'Copied', 'CopyPixels', 'Decode', 'Decoded', 'MapBuffer', 'MapInput',
    'Prepare', 'Refused',
]  # fmt: skip

TEXT_CHARACTERS = 1000
"""Longest text of a refusal: both ends cut it."""


@dataclass(frozen=True, slots=True)
class MapInput:
    """Take the segment of compressed images, whose descriptor goes with this."""


@dataclass(frozen=True, slots=True)
class MapBuffer:
    """Take a segment for planes, whose descriptor goes with this, as buffer ``number``."""

    number: int


@dataclass(frozen=True, slots=True)
class Prepare:
    """Resize the images that follow for this network."""

    spec: PreprocessingSpec


@dataclass(frozen=True, slots=True)
class Decode:
    """
    Decode the image that lies in the input segment, and resize it.

    :param number: of the request.
    :param format: of the image message.
    :param size: bytes of the compressed image.
    :param buffer: where its planes are to be written.
    :param pixels: keep the decoded pixels for CopyPixels.
    """

    number: int
    format: str
    size: int
    buffer: int
    pixels: bool


@dataclass(frozen=True, slots=True)
class CopyPixels:
    """Copy the pixels of this request's image into the segment whose descriptor goes with this."""

    number: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """
    Say that the planes of an image lie in its buffer.

    :param number: of the request.
    :param shape: of the decoded pixels: rows, columns, and channels where there are several.
    :param dtype: of the pixels and planes, ``uint8`` or ``uint16``.
    :param order: of the channels, of :data:`gps_denied_c7.image.decode.ORDERS`.
    :param oddities: faults of the file that were tolerated, of :data:`gps_denied_c7.image.decode.ODDITIES`.
    """

    number: int
    shape: tuple[int, ...]
    dtype: str
    order: str
    oddities: tuple[str, ...]

    def check(self) -> None:
        """Raise ValueError for what no image can be."""
        shape = self.shape
        possible = (
            len(shape) in (2, 3)
            and all(1 <= axis <= MAX_SIDE for axis in shape)
            and shape[0] * shape[1] <= MAX_PIXELS
            and self.dtype in ('uint8', 'uint16')
            and ORDERS.get(self.order) == (shape[2] if len(shape) == 3 else 1)
            and len(self.oddities) <= len(ODDITIES)
            and all(oddity in ODDITIES for oddity in self.oddities)
        )
        if not possible:
            raise ValueError('no image is like that')


@dataclass(frozen=True, slots=True)
class Copied:
    """Say that the pixels were copied."""

    number: int


@dataclass(frozen=True, slots=True)
class Refused:
    """Say why an image was not decoded; ``reason`` is of :data:`gps_denied_c7.image.decode.REASONS`."""

    number: int
    reason: str
    message: str
    remedy: str

    def check(self) -> None:
        """Raise ValueError for an unknown reason, under which nothing is counted."""
        if self.reason not in REASONS:
            raise ValueError(f'the reason {self.reason!r:.100} is unknown')


DECODER_PROTOCOL = ChildProtocol(
    'gps_denied_c7.decoder',
    to_child=(MapInput, MapBuffer, Prepare, Decode, CopyPixels),
    from_child=(Decoded, Copied, Refused),
)
