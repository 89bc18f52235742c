"""The golden requests of a bundle, test pictures among them, and the answers of plain ONNX Runtime to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.engines.store import engine_model_name
from gps_denied_c7.errors import InferenceError, ModelBundleError
from gps_denied_c7.ground.bundle_request import BundleRequest
from gps_denied_c7.ground.reference import reference_answers
from gps_denied_c7.ground.trial import read_picture
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.files import GOLDEN_LIMIT_BYTES
from gps_denied_c7.model.image_input import image_input
from gps_denied_c7.model.onnx_types import no_output_left
from gps_denied_c7.tensors import TensorSpec, check_finite

__all__ = ['FLAT', 'GoldenCase', 'answer_cases', 'golden_cases', 'golden_pictures', 'noise_picture']

FLAT = ('black', 'white')
_OCTAVES = (64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """
    One golden request and its answer.

    :param given: the user gave it: it is refused, and not left out, if it cannot be used.
    :param answer_to_rounded: to the same request in half precision, which is how the engines of a GPU see it.
    """

    name: str
    inputs: dict[str, NDArray]
    given: bool = False
    answer: dict[str, NDArray] = field(default_factory=dict)
    answer_to_rounded: dict[str, NDArray] = field(default_factory=dict)


def golden_cases(
    request: BundleRequest, inputs: Sequence[TensorSpec], preprocessing: PreprocessingSpec, given: dict[str, NDArray]
) -> Iterator[GoldenCase]:
    """Yield the golden requests without answers: the user's own arrays and pictures, then the test pictures."""
    if given:
        for spec in inputs:
            if problem := spec.mismatch(given[spec.name]):
                raise ModelBundleError(f'{request.golden_input}: {problem}.', remedy='Save it as the model takes it.')
        yield GoldenCase('request', given, given=True)
    image, preprocessor = image_input(inputs, preprocessing).name, Preprocessor(preprocessing)
    for number, path in enumerate(request.golden_images, 1):
        tensor = _tensor(preprocessor, read_picture(path))
        yield GoldenCase(f'image{number}-{engine_model_name(path.stem)[:80]}', {image: tensor}, given=True)
    if len(inputs) > 1:
        return
    pictures = golden_pictures(preprocessing.width, preprocessing.height, request.seed)
    for name, picture in pictures.items():
        yield GoldenCase(name, {image: _tensor(preprocessor, Pixels(picture, 'rgb'))})


def answer_cases(
    model: bytes | str, cases: Sequence[GoldenCase], request: BundleRequest, notes: list[str]
) -> tuple[tuple[TensorSpec, ...], list[GoldenCase]]:
    """Return the outputs, and the cases with their answers that can be used; the others are noted."""
    size = sum(array.nbytes for case in cases for array in case.inputs.values())
    requests = [each for case in cases for each in (case.inputs, _rounded(case.inputs))]
    limit = max(0, 2 * (GOLDEN_LIMIT_BYTES - size))
    reference = reference_answers(model, requests, limit_bytes=limit, timeout_s=request.answer_timeout_s)
    names = [spec.name for spec in reference.outputs]
    if names and (unknown := sorted(set(request.allow_non_finite) - set(names))):
        raise ModelBundleError(
            f'non-finite values were allowed for {unknown}, the outputs are {names}.', remedy='Correct the name.'
        )
    usable, faults = [], []
    for case, *answers in zip(cases, reference.answers[::2], reference.answers[1::2], strict=True):
        both = []
        try:
            for answer in answers:
                if isinstance(answer, InferenceError):
                    raise answer
                if answer is None:
                    raise ModelBundleError(f'golden tensors exceed {GOLDEN_LIMIT_BYTES >> 20} MB.')
                check_finite({name: value for name, value in answer.items() if name not in request.allow_non_finite})
                both.append(answer)
        except (InferenceError, ModelBundleError) as error:
            if case.given:
                raise ModelBundleError(
                    f'the golden request {case.name!r} cannot be used: {error.message}',
                    remedy='Give others or fewer; if non-finite values are intended, give --allow-non-finite OUTPUT.',
                ) from error
            faults.append(f'The picture {case.name!r} was left out of the golden requests: {error.message}')
        else:
            usable.append(replace(case, answer=both[0], answer_to_rounded=both[1]))
    if not usable:
        raise ModelBundleError(
            f'the model answers no golden request. {faults[0]}',
            remedy='Give --golden-image with pictures that it was made for; if non-finite values are intended, '
            'give --allow-non-finite OUTPUT.',
        )
    notes += faults
    if not reference.outputs:
        problem, remedy = no_output_left(reference.left_out)
        raise ModelBundleError(problem, remedy=remedy)
    if reference.left_out:
        notes.append(f'The outputs {list(reference.left_out)} are not numeric tensors, and not part of the bundle.')
    return reference.outputs, usable


def _tensor(preprocessor: Preprocessor, pixels: Pixels) -> NDArray:
    """Return a picture as the node would feed it."""
    tensor = np.zeros(preprocessor.spec.tensor_shape, preprocessor.spec.dtype)
    preprocessor.run(pixels, tensor)
    return tensor


def _rounded(inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
    return {
        name: array.astype(np.float16).astype(array.dtype) if array.dtype.kind == 'f' else array
        for name, array in inputs.items()
    }


def golden_pictures(width: int, height: int, seed: int) -> dict[str, NDArray[np.uint8]]:
    """
    Return RGB pictures (height, width, 3) of different kinds by name, the same for one seed.

    ``noise``: structure at every scale. ``black``, ``white``: nothing at all. ``blobs``: a few squares and discs on
    grey, for few detections. ``checkerboard``: corners everywhere. ``stripes``: edges without corners.
    """
    rows, columns = np.mgrid[:height, :width]
    chance = np.random.RandomState(seed)
    blobs = np.full((height, width, 3), 96, np.uint8)
    for index in range(6):
        y, x, size = chance.randint(height), chance.randint(width), chance.randint(2, max(3, min(height, width) // 10))
        away = np.abs(np.stack((rows - y, columns - x)))
        inside = away.max(axis=0) <= size if index % 2 else np.square(away).sum(axis=0) <= size * size
        blobs[inside] = chance.randint(0, 256, 3)
    cell = max(2, min(height, width) // 24)
    boards = {
        'checkerboard': (rows // cell + columns // cell) % 2,
        # Ever wider: 1, 2, 3 … cells.
        'stripes': np.floor(np.sqrt(2.0 * (rows + 2 * columns) / cell)) % 2,
    }
    return {
        'noise': noise_picture(width, height, seed),
        'black': np.zeros((height, width, 3), np.uint8),
        'white': np.full((height, width, 3), 255, np.uint8),
        'blobs': blobs,
        **{name: np.repeat((board * 255).astype(np.uint8)[..., None], 3, axis=2) for name, board in boards.items()},
    }


def noise_picture(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """
    Return an RGB picture (height, width, 3) with structure at every scale, full contrast, the same for one seed.

    White noise alone is gone after a network's first pooling.
    """
    # RandomState's stream is frozen, that of the newer generators may change between versions (NEP 19).
    noise = np.random.RandomState(seed)
    total = np.zeros((height, width, 3), np.int64)
    for cell in _OCTAVES:
        blocks = noise.randint(0, 256, (-(-height // cell), -(-width // cell), 3)).astype(np.int64)
        total += blocks.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    low, high = int(total.min()), int(total.max())
    return ((total - low) * 255 // max(1, high - low)).astype(np.uint8)
