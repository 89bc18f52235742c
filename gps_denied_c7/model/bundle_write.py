"""Write a model bundle: golden files and model.json, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gps_denied_c7._json import parse_json
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.artefact import ONLY_GOLDEN, Arrays, Artefact, Golden, check_golden
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.bundle_json import MODEL_JSON, bundle_from_json
from gps_denied_c7.model.compare import OutputRule
from gps_denied_c7.model.files import BundleFile, npz_bytes, write_atomically
from gps_denied_c7.tensors import TensorSpec

__all__ = ['write_bundle']


def write_bundle(
    root: Path | str,
    *,
    name: str,
    weights_digest: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    preprocessing: PreprocessingSpec,
    artefacts: Sequence[Artefact],
    rules: Sequence[OutputRule],
    golden: Mapping[str, tuple[Arrays, Arrays]],
    allow_non_finite: Sequence[str] = (),
) -> ModelBundle:
    """
    Write the golden files and model.json beside artefacts that lie below ``root`` already.

    Nothing is written before all of it has been checked. Each file is replaced as a whole, model.json
    last: a reader of the older bundle at that moment finds digests that fail, never mixed data.

    :param golden: requests and their answers by a plain name, arrays by canonical name.
    :return: the bundle as read back from disk.
    :raises ModelBundleError: the parts contradict each other, or cannot be written.
    """
    root = Path(root).absolute()
    contents: dict[Path, bytes] = {}
    cases = []
    for case, sides in golden.items():
        files = []
        for which, specs, arrays in zip(('inputs', 'outputs'), (inputs, outputs), sides, strict=True):
            path = root / (f'golden_{which}.npz' if case == ONLY_GOLDEN else f'golden/{case}_{which}.npz')
            check_golden(path.name, specs, arrays)
            contents[path] = npz_bytes(arrays)
            files.append(BundleFile(path, hashlib.sha256(contents[path]).hexdigest()))
        cases.append(Golden(case, *files))
    bundle = ModelBundle(
        name=name,
        root=root,
        weights_digest=weights_digest,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        preprocessing=preprocessing,
        artefacts=tuple(artefacts),
        rules=tuple(rules),
        golden=tuple(cases),
        allow_non_finite=tuple(allow_non_finite),
    )
    contents[root / MODEL_JSON] = json.dumps(bundle.to_json(), indent=2).encode() + b'\n'
    bundle_from_json(parse_json(contents[root / MODEL_JSON]), root, ModelBundle)
    for path, content in contents.items():
        write_atomically(path, content)
    return ModelBundle.load(root)
