"""The request for a model bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gps_denied_c7.ground.reference import ANSWER_TIMEOUT_S
from gps_denied_c7.model.compare import OutputRule

__all__ = ['BundleRequest']


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRequest:
    """
    Describe the bundle to make.

    :param model: the ``.onnx`` file.
    :param output: directory to be made; it must not exist, or be empty.
    :param name: of the network, the file's where None.
    :param image_size: width and height in pixels, for a model that leaves them free.
    :param shapes: full shape by input name, for a model that leaves axes free.
    :param precision: the coarsest that engines of this bundle may compute in, of ``TOLERANCES``.
    :param rules: for outputs that the default rule does not suit.
    :param golden_input: ``.npz`` with one request, one array for each input, to be answered before all others.
    :param golden_images: JPEG or PNG files to be answered too, pre-processed as the node would.
    :param allow_non_finite: outputs in which NaN and infinities are meant.
    :param force: make the bundle even if its golden answers are a weak test.
    :param preprocessing: settings of PreprocessingSpec that differ from ``default_preprocessing``.
    :param seed: of the random test pictures, 0 to 2**32 - 1.
    :param answer_timeout_s: seconds that plain ONNX Runtime may take for one answer.
    """

    model: Path
    output: Path
    name: str | None = None
    image_size: tuple[int, int] | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    precision: str = 'fp16'
    rules: Sequence[OutputRule] = ()
    golden_input: Path | None = None
    golden_images: Sequence[Path] = ()
    allow_non_finite: Sequence[str] = ()
    force: bool = False
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    answer_timeout_s: int = ANSWER_TIMEOUT_S
