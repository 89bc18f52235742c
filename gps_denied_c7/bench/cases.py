"""What is measured: the contestants, images, networks, rates and numbers of cameras."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    'BARE',
    'CAMERAS',
    'CONTESTANTS',
    'DEFAULT_TRANSPORT',
    'FORTY_LINES',
    'IMAGE_SIZE',
    'IN_PROCESS',
    'JPEG',
    'OUTPUT_SIZE',
    'RATE',
    'SHIPPED',
    'SHIPPED_TRANSPORT',
    'Case',
    'Contestant',
    'full_cases',
    'quick_cases',
    'scaling_cases',
]

BARE = 'bare_engine'
FORTY_LINES = 'forty_lines'
BY_THE_BOOK = 'forty_lines_by_the_book'
ORT_DEFAULTS = 'forty_lines_ort_defaults'
IN_PROCESS = 'node_in_process'
SHIPPED = 'node'

SHIPPED_TRANSPORT = 'shipped'
DEFAULT_TRANSPORT = 'default'

JPEG = 'jpeg'
_NODE = 'gps_denied_c7.ros.node_main'

IMAGE_SIZE, CAMERAS, OUTPUT_SIZE, RATE = 'image size', 'cameras', 'output size', 'rate'

NETWORK_WIDTH, NETWORK_HEIGHT = 640, 480
MODEL_MS = (5, 30, 100)
_MAP_MB = NETWORK_WIDTH * NETWORK_HEIGHT * 4e-6
_LARGE = 5
_LARGE_BYTES = 1_000_000
_SATURATION = 1.6


@dataclass(frozen=True, slots=True)
class Contestant:
    """
    Describe one process that answers images, or the loop that needs none.

    :param name: of its ROS node, and of its row.
    :param title: for the reader.
    :param module: that is started.
    :param arguments: of the module, beside those that every one of its kind gets.
    :param parameters: of the node, beside model and topics.
    """

    name: str
    title: str
    module: str
    arguments: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_node(self) -> bool:
        """Whether it is this package's node."""
        return self.module == _NODE


CONTESTANTS = (
    Contestant(BARE, 'bare engine loop, no ROS', 'gps_denied_c7.bench.engine_loop'),
    Contestant(FORTY_LINES, 'forty-line node', 'gps_denied_c7.bench.forty_lines'),
    Contestant(
        BY_THE_BOOK,
        'forty-line node, colours converted as tutorials do',
        'gps_denied_c7.bench.forty_lines',
        arguments=('--by-the-book',),
    ),
    Contestant(
        ORT_DEFAULTS,
        'forty-line node, ONNX Runtime with its default threads',
        'gps_denied_c7.bench.forty_lines',
        arguments=('--ort-defaults',),
    ),
    Contestant(IN_PROCESS, 'this node, isolation none', _NODE, parameters={'isolation': 'none'}),
    Contestant(SHIPPED, 'this node as shipped', _NODE),
)

_USUAL = (BARE, FORTY_LINES, IN_PROCESS, SHIPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """
    Describe what is sent, and to which contestants.

    :param encoding: of the images, ``mono8`` or ``rgb8``; the network takes as many channels. ``jpeg`` for rgb8
        pictures that are compressed beforehand.
    :param model_ms: what one inference takes, about; the networks are sized on this machine.
    :param dense_maps: 640x480 float32 maps that the network returns beside 1 KB, 1.23 MB each.
    :param rate_hz: images per second and camera; 0 for more than the engine can answer.
    :param contestants: names of the contestants.
    :param transport: ``shipped``, or ``default`` for what Fast DDS does without a profile.
    :param seconds: of one measurement, its own length where None.
    :param repetitions: likewise.
    :param series: names of the axes that it is a point of.
    """

    width: int
    height: int
    encoding: str
    model_ms: int
    dense_maps: int = 0
    rate_hz: float = 30.0
    cameras: int = 1
    contestants: tuple[str, ...] = _USUAL
    transport: str = SHIPPED_TRANSPORT
    seconds: float | None = None
    repetitions: int | None = None
    series: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A short name, a single word that also serves as a file name."""
        parts = [f'{self.height}p_{self.encoding}', f'{self.model_ms}ms']
        parts.append(f'{self.outputs_mb}MB' if self.large_outputs else 'small')
        parts.append(f'{self.rate_hz:g}hz' if self.rate_hz else 'saturated')
        if self.cameras > 1:
            parts.append(f'{self.cameras}cameras')
        if self.transport != SHIPPED_TRANSPORT:
            parts.append(f'{self.transport}_transport')
        if self.seconds is not None:
            parts.append(f'{self.seconds:g}s')
        return '_'.join(parts)

    @property
    def title(self) -> str:
        """The case in words."""
        return ', '.join(self.words.values())

    @property
    def large_outputs(self) -> bool:
        """Whether the network returns maps, and not 1 KB alone."""
        return self.dense_maps > 0

    @property
    def separate_processes(self) -> bool:
        """
        Whether each repetition has processes of its own.

        How a process has come to place its blocks in memory can decide about the time of every large one from then on;
        so one process is not representative.
        """
        return self.large_outputs or self.width * self.height * self.channels >= _LARGE_BYTES

    @property
    def outputs_mb(self) -> int:
        """Megabytes of tensors for each image, rounded."""
        return round(_MAP_MB * self.dense_maps)

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return 1 if self.encoding == 'mono8' else 3

    @property
    def is_saturated(self) -> bool:
        """Whether more is sent than any contestant can answer."""
        return self.rate_hz == 0

    @property
    def is_overloaded(self) -> bool:
        """Whether the engine alone takes longer than the images leave it, so that some must be dropped."""
        return self.is_saturated or self.rate_hz * self.cameras * self.model_ms > 1000

    def point(self, series: str) -> str:
        """Return in words where on the axis of a series the case lies."""
        outputs = f'{self.outputs_mb} MB' if self.large_outputs else '1 KB'
        return {IMAGE_SIZE: self._size, OUTPUT_SIZE: outputs, CAMERAS: self.words[CAMERAS]}[series]

    def constants(self, series: str) -> str:
        """Return in words what the points of a series have in common."""
        words = self.words
        del words[series]
        return ', '.join([self.encoding, *words.values()] if series == IMAGE_SIZE else words.values())

    @property
    def words(self) -> dict[str, str]:
        """The case in words, each by the name of its axis."""
        words = {
            IMAGE_SIZE: f'{self._size} {self.encoding}',
            'model': f'{self.model_ms} ms model',
            OUTPUT_SIZE: f'{self.outputs_mb} MB of outputs' if self.large_outputs else 'small outputs',
            RATE: f'{self.rate_hz:g} Hz' if self.rate_hz else 'saturation',
            CAMERAS: f'{self.cameras} cameras' if self.cameras > 1 else '1 camera',
        }
        if self.transport != SHIPPED_TRANSPORT:
            words['transport'] = 'Fast DDS without the profile'
        return words

    @property
    def _size(self) -> str:
        return f'{self.width}x{self.height}'

    def sent_hz(self, engine_ms: float) -> float:
        """
        Return the rate to send at, images per second and camera.

        :param engine_ms: what one inference of this case's network takes here.
        """
        if not self.is_saturated:
            return self.rate_hz
        return float(math.ceil(_SATURATION * 1000.0 / max(engine_ms, 1.0) / self.cameras))


_SMALL: dict[str, Any] = {'width': 640, 'height': 480, 'encoding': 'mono8'}
_HD: dict[str, Any] = {'width': 1920, 'height': 1080, 'encoding': 'rgb8'}
_COMPRESSED: dict[str, Any] = {**_HD, 'encoding': JPEG, 'model_ms': 5}
_TRANSPORT_ONLY = (SHIPPED,)


def quick_cases() -> tuple[Case, ...]:
    """Return the cases of the form that takes about four minutes."""
    return (
        Case(**_SMALL, model_ms=5),
        Case(**_HD, model_ms=5, contestants=(BARE, FORTY_LINES, BY_THE_BOOK, IN_PROCESS, SHIPPED)),
        Case(**_HD, model_ms=5, dense_maps=_LARGE),
        Case(**_COMPRESSED, contestants=(FORTY_LINES, SHIPPED), repetitions=1),
        Case(**_SMALL, model_ms=30, rate_hz=0),
        Case(**_SMALL, model_ms=100, rate_hz=0),
        Case(
            **_HD, model_ms=5, contestants=_TRANSPORT_ONLY, transport=DEFAULT_TRANSPORT, seconds=6.0, repetitions=1,
        ),
    )  # fmt: skip


def full_cases() -> tuple[Case, ...]:
    """Return the whole matrix, and a minute of 1080p at 30 Hz with each transport."""
    contestants = (BARE, FORTY_LINES, BY_THE_BOOK, ORT_DEFAULTS, IN_PROCESS, SHIPPED)
    matrix = [
        Case(
            **image, model_ms=model_ms, dense_maps=maps, rate_hz=rate_hz, cameras=cameras, contestants=contestants
        )
        for image, model_ms, maps, rate_hz, cameras in itertools.product(
            (_SMALL, _HD), MODEL_MS, (0, _LARGE), (10.0, 30.0, 60.0, 0.0), (1, 2, 4)
        )
    ]  # fmt: skip
    minutes = [
        Case(**_HD, model_ms=5, contestants=_TRANSPORT_ONLY, transport=transport, seconds=60.0, repetitions=1)
        for transport in (SHIPPED_TRANSPORT, DEFAULT_TRANSPORT)
    ]
    return (*minutes, *matrix, Case(**_COMPRESSED))


def scaling_cases() -> tuple[Case, ...]:
    """Return a series for each axis, small images or outputs first; a point of two series is measured once."""
    common: dict[str, Any] = {'model_ms': 5, 'contestants': (BARE, FORTY_LINES, SHIPPED)}
    sizes = ((320, 240), (640, 480), (1280, 720), (1920, 1080), (2560, 1440))
    return (
        *(Case(width=width, height=height, encoding='rgb8', **common, series=(IMAGE_SIZE,)) for width, height in sizes),
        Case(**_SMALL, **common, series=(CAMERAS, OUTPUT_SIZE)),
        *(Case(**_SMALL, **common, cameras=cameras, series=(CAMERAS,)) for cameras in (2, 3, 4, 6)),
        *(Case(**_SMALL, **common, dense_maps=maps, series=(OUTPUT_SIZE,)) for maps in (1, 2, _LARGE, 10)),
    )
