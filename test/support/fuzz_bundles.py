"""A bundle of every kind of file and rule, and what the node does with a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec, ResizeMode
from gps_denied_c7.model.artefact import ONLY_GOLDEN, Artefact
from gps_denied_c7.model.bundle import ModelBundle, write_bundle
from gps_denied_c7.model.compare import AllClose, MatchedDistance, SetOverlap
from gps_denied_c7.model.image_input import default_preprocessing
from gps_denied_c7.tensors import TensorSpec

WEIGHTS = f'sha256:{"a" * 64}'
INPUTS = {'image': np.linspace(0, 1, 48, dtype=np.float32).reshape(1, 1, 6, 8)}
OUTPUTS = {
    'heat': np.linspace(-1, 1, 48, dtype=np.float32).reshape(1, 1, 6, 8),
    'points': np.arange(40, dtype=np.float32).reshape(20, 2),
    'places': np.array([[4, 9, 1, 7]]),
}


def make_bundle(root: Path) -> Path:
    root.mkdir(exist_ok=True)
    (root / 'net.onnx').write_bytes(b'a graph')
    write_bundle(
        root,
        name='net',
        weights_digest=WEIGHTS,
        inputs=[TensorSpec('image', 'float32', (1, 1, 6, 8))],
        outputs=[
            TensorSpec('heat', 'float32', (1, 1, 6, 8)),
            TensorSpec('points', 'float32', (None, 2)),
            TensorSpec('places', 'int64', (1, 4)),
        ],
        preprocessing=PreprocessingSpec(width=8, height=6, colour='gray', resize=ResizeMode.LETTERBOX),
        artefacts=[
            Artefact.of_file(
                root / 'net.onnx', strategy='onnx_trt_ep', weights_digest=WEIGHTS, precision='fp32',
                io_names={'input.1': 'image', '/head/Sigmoid': 'heat'},
            )
        ],
        rules=(AllClose('heat', 1e-3, 1e-4), MatchedDistance('points', 1.5, 0.9), SetOverlap('places', 0.5, 'values')),
        golden={ONLY_GOLDEN: (INPUTS, OUTPUTS)},
    )  # fmt: skip
    return root


def use(root: Path) -> bool:
    """Do with a bundle all that a node does before an engine is asked; return whether nothing was refused."""
    try:
        bundle = ModelBundle.load(root)
        for artefact in bundle.artefacts:
            artefact.verify()
        bundle.artefacts_for('onnx_trt_ep')
        bundle.golden_inputs()
        bundle.compare(bundle.golden_outputs(), OUTPUTS)
        bundle.image_input()
        default_preprocessing(bundle.inputs)
        assert ModelBundle.load(root).to_json() == bundle.to_json()
    except ModelBundleError as error:
        assert str(error)
        return False
    return True
