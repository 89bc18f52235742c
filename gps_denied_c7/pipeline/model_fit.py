"""
Whether a model can answer images, and what it needs for that.

The node, ``c7_engine bundle`` and ``c7_engine verify`` all ask here: before a load what model.json alone says, after
it what the engine says of itself.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gps_denied_c7.errors import ConfigError
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.image.preprocess import Preprocessor
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.image_input import default_preprocessing, image_input
from gps_denied_c7.pipeline.pipeline import ServedModel
from gps_denied_c7.stalled_reads import read_or_give_up
from gps_denied_c7.tensors import TensorSpec

__all__ = ['ImageSettings', 'fit_bundle', 'fit_model', 'fit_tensors', 'read_bundle']


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """
    Say what is asked of a model that is to answer frames; by default nothing.

    :param preprocessing: what is set differently from the model, by PreprocessingSpec field.
    :param output_tensors: names of the outputs that are published, all of them where empty.
    :param allow_non_finite: names of the outputs in which NaN and infinity are valid.
    """

    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    output_tensors: tuple[str, ...] = ()
    allow_non_finite: tuple[str, ...] = ()

    def preprocessing_for(self, spec: PreprocessingSpec) -> PreprocessingSpec:
        """Return ``spec`` with what is set; raise ConfigError where that cannot be."""
        return spec.replace(**self.preprocessing)


def read_bundle(path: str, *, limit_s: float, cancelled: threading.Event | None = None) -> ModelBundle:
    """
    Return :meth:`ModelBundle.load` of ``path``, or give up where its disk or mount does not answer.

    :param limit_s: seconds that reading may take.
    :param cancelled: gives the read up when it is set.
    :raises ModelBundleError: it cannot be used.
    :raises StalledReadError: nothing comes; the thread that reads is left behind.
    """
    return read_or_give_up(path, lambda: ModelBundle.load(Path(path)), limit_s=limit_s, cancelled=cancelled)


def fit_bundle(bundle: ModelBundle, settings: ImageSettings) -> ModelBundle:
    """
    Return the bundle as it is to be loaded: sizes that its image input leaves free are those of the pre-processing.

    :raises C7Error: as :func:`fit_model`, as far as model.json says.
    """
    if not bundle.inputs:
        return dataclasses.replace(bundle, image=dict(settings.preprocessing))
    spec, tensor = fit_tensors(bundle, bundle.inputs, bundle.outputs, settings)
    # A free batch stays so: engines are asked for one image.
    shape = (tensor.axes[0], *spec.tensor_shape[1:])
    fixed = dataclasses.replace(tensor, shape=shape)
    return dataclasses.replace(bundle, inputs=tuple(fixed if each == tensor else each for each in bundle.inputs))


def fit_model(bundle: ModelBundle, chain: RuntimeChain, settings: ImageSettings) -> ServedModel:
    """
    Return what a loaded chain needs to answer frames; refused here, what does not fit is not refused at every frame.

    :raises C7Error: the pre-processing fills no input of the model, or not the only one; an output is missing.
    """
    spec, tensor = fit_tensors(bundle, chain.inputs, chain.outputs, settings)
    return ServedModel(bundle, chain, Preprocessor(spec), tensor, frozenset(settings.output_tensors))


def fit_tensors(
    bundle: ModelBundle, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], settings: ImageSettings
) -> tuple[PreprocessingSpec, TensorSpec]:
    """
    Return the pre-processing of a model and the input that it fills.

    :param inputs: of the model; of a loaded engine where there is one.
    :param outputs: likewise.
    :raises C7Error: as :func:`fit_model`.
    """
    spec = settings.preprocessing_for(bundle.preprocessing or default_preprocessing(inputs))
    tensor = image_input(inputs, spec)
    if others := [other.name for other in inputs if other != tensor]:
        raise ConfigError(
            'model_path',
            f'the model also takes {others}, and an image fills {tensor.name!r} alone.',
            remedy='Export the model with a single image input, the other inputs as constants inside.',
        )
    names = {output.name for output in outputs}
    if unknown := sorted(set(settings.output_tensors).difference(names)):
        raise ConfigError('output_tensors', f'the model has no {unknown}.', remedy=f'It has {sorted(names)}.')
    return spec, tensor
