"""
Read ``model.json`` strictly, and write it.

A whole ``model.json``; ``io_names``, ``external_data``, ``allow_non_finite``, rules, and of the pre-processing what
follows ``layout`` may be left out::

    {
      "schema_version": 1,
      "name": "corners",
      "weights_digest": "sha256:<of the source weights>",
      "inputs": [{"name": "image", "dtype": "float32", "shape": [1, 1, 480, 640]}],
      "outputs": [{"name": "keypoints", "dtype": "float32", "shape": [null, 2]}],
      "preprocessing": {
        "width": 640, "height": 480, "resize": "letterbox", "colour": "gray", "mean": [0.0], "std": [1.0],
        "scale": 0.00392156862745098, "layout": "nchw", "dtype": "float32", "pad_value": 0.0,
        "interpolation": "halving_linear", "letterbox_anchor": "centre", "letterbox_scaling": "fit"
      },
      "artefacts": [{
        "strategy": "onnx_trt_ep", "path": "corners.onnx", "sha256": "<of the file>", "precision": "fp32",
        "device": "any", "weights_digest": "sha256:<as above>", "io_names": {"input.1": "image"},
        "external_data": {"corners.onnx_data": "<of the file>"}
      }],
      "rules": {"keypoints": {"kind": "matched_distance", "max_distance": 1.0, "min_fraction": 0.95}},
      "allow_non_finite": ["keypoints"],
      "golden": [{
        "name": "noise",
        "inputs": {"path": "golden/noise_inputs.npz", "sha256": "<of the file>"},
        "outputs": {"path": "golden/noise_outputs.npz", "sha256": "<of the file>"}
      }]
    }

The other rules are ``{"kind": "allclose", "rtol": …, "atol": …}``,
``{"kind": "set_overlap", "min_iou": …, "members": "nonzero" | "top_k" | "values", "k": …}`` and
``{"kind": "default"}``, which holds for an output without a rule too. An output of unknown rank has the shape ``null``.
Where ``golden`` is one object, as it used to be, it is one request without a name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gps_denied_c7._json import Fields, require
from gps_denied_c7.errors import ConfigError, ModelBundleError
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.artefact import ONLY_GOLDEN, Artefact, Golden
from gps_denied_c7.model.compare import rule_from_json, rule_to_json
from gps_denied_c7.model.files import BundleFile
from gps_denied_c7.model.onnx_types import ONNX_DTYPES
from gps_denied_c7.tensors import TensorSpec

if TYPE_CHECKING:
    from gps_denied_c7.model.bundle import ModelBundle

__all__ = ['MODEL_JSON', 'SCHEMA_VERSION', 'bundle_from_json', 'bundle_to_json']

MODEL_JSON = 'model.json'
SCHEMA_VERSION = 1

_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,127}')
_MAX_RANK = 8

Bundle = TypeVar('Bundle')


def bundle_from_json(value: object, root: Path, make: Callable[..., Bundle]) -> Bundle:
    """
    Return what ``make`` makes of a model.json object.

    :param value: as :func:`parse_json` returns it.
    :param root: the directory that its paths are relative to.
    :param make: :class:`ModelBundle`, called with its fields by name.
    :raises ModelBundleError: naming the key.
    """
    fields = Fields(value, '')
    version = fields.take('schema_version', int)
    if version != SCHEMA_VERSION:
        raise ModelBundleError(
            f'schema_version: {version} unknown, this package reads {SCHEMA_VERSION}.',
            remedy='Update the package, or write the bundle again with this one.',
        )
    name = fields.take('name', str)
    require(bool(_NAME.fullmatch(name)), 'name', f'{name!r} has characters other than A-Z a-z 0-9 . _ - .')
    bundle = fields.build(
        make,
        name=name,
        root=root,
        weights_digest=fields.take('weights_digest', str),
        inputs=tuple(_tensor(item) for item in fields.children('inputs')),
        outputs=tuple(_tensor(item, may_lack_rank=True) for item in fields.children('outputs')),
        preprocessing=_preprocessing(fields),
        artefacts=tuple(_artefact(item, root) for item in fields.children('artefacts')),
        rules=tuple(rule_from_json(output, item) for output, item in fields.child('rules', default={}).items()),
        golden=_golden(fields, root),
        allow_non_finite=fields.take('allow_non_finite', tuple[str, ...], ()),
    )
    fields.close()
    return bundle


def _tensor(fields: Fields, *, may_lack_rank: bool = False) -> TensorSpec:
    name, dtype = fields.take('name', str), fields.take('dtype', str)
    fields.check(bool(name), 'name', 'is empty.')
    known = sorted(ONNX_DTYPES.values())
    fields.check(dtype in known, 'dtype', f'{dtype!r} unknown.', f'Known are {known}.')
    shape: Any = fields.take('shape')
    if may_lack_rank and shape is None:
        fields.close()
        return TensorSpec(name, dtype, fields.take('shape'))
    proper = isinstance(shape, list) and len(shape) <= _MAX_RANK and all(_is_size(size) for size in shape)
    fields.check(
        proper, 'shape', f'{shape!r} is not a list of up to {_MAX_RANK} positive sizes.', 'Write null for a free axis.'
    )
    fields.close()
    return TensorSpec(name, dtype, tuple(shape))


def _is_size(size: object) -> bool:
    return size is None or (isinstance(size, int) and not isinstance(size, bool) and 1 <= size < 2**31)


def _preprocessing(fields: Fields) -> PreprocessingSpec:
    value = fields.take('preprocessing')
    fields.check(isinstance(value, dict), 'preprocessing', 'is not an object.', 'Write size, colour, mean, std etc.')
    try:
        return PreprocessingSpec.from_json(value)
    except ConfigError as error:
        raise ModelBundleError(f'preprocessing.{error.message}', remedy=error.remedy) from error


def _artefact(fields: Fields, root: Path) -> Artefact:
    artefact = fields.build(
        Artefact,
        path=fields.file('path', root),
        sha256=fields.take('sha256', str),
        strategy=fields.take('strategy', str),
        precision=fields.take('precision', str),
        device=fields.take('device', str),
        weights_digest=fields.take('weights_digest', str),
        io_names=fields.take('io_names', Mapping[str, str], {}),
        external_data=fields.take('external_data', Mapping[str, str], {}),
    )
    fields.close()
    return artefact


def bundle_to_json(bundle: ModelBundle) -> dict[str, Any]:
    """
    Return the model.json object of a bundle; the reader is :func:`bundle_from_json`.

    :raises ModelBundleError: it has no pre-processing or no golden answer, or a file that is not below its root.
    """
    if bundle.preprocessing is None or not bundle.golden:
        raise ModelBundleError(f'{bundle.name!r} has no pre-processing or no golden answer, as model.json needs.')
    return {
        'schema_version': SCHEMA_VERSION,
        'name': bundle.name,
        'weights_digest': bundle.weights_digest,
        'inputs': [_tensor_to_json(spec) for spec in bundle.inputs],
        'outputs': [_tensor_to_json(spec) for spec in bundle.outputs],
        'preprocessing': bundle.preprocessing.to_json(),
        'artefacts': [_artefact_to_json(artefact, bundle.root) for artefact in bundle.artefacts],
        'rules': {rule.output: rule_to_json(rule) for rule in bundle.rules},
        **({'allow_non_finite': list(bundle.allow_non_finite)} if bundle.allow_non_finite else {}),
        'golden': [
            {
                'name': case.name,
                'inputs': _file_to_json(case.inputs, bundle.root),
                'outputs': _file_to_json(case.outputs, bundle.root),
            }
            for case in bundle.golden
        ],
    }


def _artefact_to_json(artefact: Artefact, root: Path) -> dict[str, Any]:
    values = {
        'strategy': artefact.strategy,
        **_file_to_json(artefact, root),
        'precision': artefact.precision,
        'device': artefact.device,
        'weights_digest': artefact.weights_digest,
    }
    named = {'io_names': artefact.io_names, 'external_data': artefact.external_data}
    return values | {key: dict(value) for key, value in named.items() if value}


def _file_to_json(file: BundleFile, root: Path) -> dict[str, str]:
    try:
        relative = file.path.absolute().relative_to(root.absolute())
    except ValueError as error:
        raise ModelBundleError(f'{file.path} is not below {root}.', remedy='Copy it there first.') from error
    return {'path': relative.as_posix(), 'sha256': file.sha256}


def _tensor_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {'name': spec.name, 'dtype': spec.dtype, 'shape': None if spec.shape is None else list(spec.shape)}


def _golden(fields: Fields, root: Path) -> tuple[Golden, ...]:
    if isinstance(fields.take('golden'), dict):
        return (_golden_case(fields.child('golden'), ONLY_GOLDEN, root),)
    return tuple(_golden_case(item, item.take('name', str), root) for item in fields.children('golden'))


def _golden_case(fields: Fields, name: str, root: Path) -> Golden:
    fields.check(bool(_NAME.fullmatch(name)), 'name', f'{name!r} has characters other than A-Z a-z 0-9 . _ - .')
    files = []
    for which in ('inputs', 'outputs'):
        file = fields.child(which)
        files.append(file.build(BundleFile, path=file.file('path', root), sha256=file.take('sha256', str)))
        file.close()
    fields.close()
    return Golden(name, *files)
