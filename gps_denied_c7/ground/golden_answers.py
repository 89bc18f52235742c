"""The golden requests of a bundle, and the answers of plain ONNX Runtime to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.engines.store import engine_model_name
from gps_denied_c7.errors import InferenceError, ModelBundleError
from gps_denied_c7.ground.bundle_request import BundleRequest, GoldenCase
from gps_denied_c7.ground.golden_pictures import golden_pictures
from gps_denied_c7.ground.reference import reference_answers
from gps_denied_c7.ground.trial import read_picture
from gps_denied_c7.image.decode import Pixels
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.files import GOLDEN_LIMIT_BYTES
from gps_denied_c7.model.image_input import image_input
from gps_denied_c7.tensors import TensorSpec, check_finite

__all__ = ['answer_cases', 'golden_cases']


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
    reference = reference_answers(model, requests, limit_bytes=max(0, 2 * (GOLDEN_LIMIT_BYTES - size)))
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
