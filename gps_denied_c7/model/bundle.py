"""
The model bundle: a directory whose ``model.json`` says what a network is and which files hold it.

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

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7._json import Fields, parse_json, require, require_digest, require_known
from gps_denied_c7.config import RUNTIME_LABELS
from gps_denied_c7.errors import C7Error, ConfigError, ModelBundleError
from gps_denied_c7.host_memory import require_memory
from gps_denied_c7.image.preprocess import COLOURS, PreprocessingSpec
from gps_denied_c7.model.compare import (
    Alike,
    AllClose,
    MatchedDistance,
    OutputRule,
    SetOverlap,
    compare_output,
    rule_from_json,
    rule_to_json,
)
from gps_denied_c7.model.external_data import check_location, content_sha256, onnx_digests
from gps_denied_c7.model.files import (
    GOLDEN_LIMIT_BYTES,
    BundleFile,
    expand_home,
    file_sha256,
    file_size,
    npz_bytes,
    read_file,
    read_npz,
    require_hex,
    write_atomically,
)
from gps_denied_c7.tensors import TensorSpec

__all__ = [
    'MODEL_JSON',
    'ONLY_GOLDEN',
    'SCHEMA_VERSION',
    'SIZE_REMEDY',
    'Alike',
    'AllClose',
    'Artefact',
    'BundleFile',
    'Golden',
    'MatchedDistance',
    'ModelBundle',
    'OutputRule',
    'SetOverlap',
    'default_preprocessing',
    'file_sha256',
    'image_axes',
    'image_input',
    'image_layout',
    'write_bundle',
]

MODEL_JSON = 'model.json'
SCHEMA_VERSION = 1
PRECISIONS = ('fp32', 'fp16', 'bf16', 'fp8', 'int8', 'unknown')

ONLY_GOLDEN = 'golden'
"""Name of the golden request of a bundle that names none."""

SIZE_REMEDY = (
    'Where the model leaves the size of its image free, give it (node: preprocess.width and preprocess.height; '
    'c7_engine: --input-size WIDTHxHEIGHT); where it leaves the channels free, too (preprocess.colour; --colour).'
)
"""What to do about a bare ``.onnx`` that takes images of any size."""

_DTYPES = (
    *('bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64'),
    *('float16', 'float32', 'float64'),
)
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,127}')
_DEVICE = re.compile(r'any|cpu|cuda|sm[0-9]{2,3}')
_MAX_RANK = 8
# model.json usually has a few kilobytes; parsed, it takes thirty times its size.
_MODEL_JSON_LIMIT_BYTES = 1 << 20

_logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact(BundleFile):
    """
    Describe one loadable file of the network.

    :param strategy: the runtime that loads it, of ``RUNTIME_LABELS``.
    :param precision: of its arithmetic, of ``PRECISIONS``.
    :param device: where it runs: ``any``, ``cpu``, ``cuda`` or one GPU generation, as ``sm87``.
    :param weights_digest: of the source weights it was made from, ``sha256:<hex>``.
    :param io_names: its own tensor name → canonical name, where they differ.
    :param external_data: hex digest of each file that an ``.onnx`` keeps weights in, by its name in the model.
    """

    strategy: str
    precision: str
    device: str
    weights_digest: str
    io_names: Mapping[str, str] = field(default_factory=dict, hash=False)
    external_data: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # Explicit base: slots=True makes a new class, which breaks the zero-argument super().
        BundleFile.__post_init__(self)
        require_known('strategy', self.strategy, RUNTIME_LABELS)
        require_known('precision', self.precision, PRECISIONS)
        require(
            bool(_DEVICE.fullmatch(self.device)), 'device', f'{self.device!r} unknown.', 'Use any, cpu, cuda or sm<NN>.'
        )
        require_digest('weights_digest', self.weights_digest)
        if len(set(self.io_names.values())) != len(self.io_names):
            raise ModelBundleError(f'io_names: {dict(self.io_names)} gives one canonical name twice.')
        for location, sha256 in self.external_data.items():
            try:
                check_location(location)
            except ModelBundleError as error:
                raise ModelBundleError(f'external_data: {error.message}', remedy=error.remedy) from error
            require_hex(f'external_data.{location}', sha256)

    @classmethod
    def of_file(
        cls,
        path: Path | str,
        *,
        strategy: str,
        weights_digest: str,
        precision: str = 'unknown',
        device: str = 'any',
        io_names: Mapping[str, str] | None = None,
    ) -> Artefact:
        """Describe an existing file, hashing it and the files that it keeps weights in."""
        path = Path(path).absolute()
        sha256, external_data = onnx_digests(path) if path.suffix == '.onnx' else (file_sha256(path), {})
        return cls(
            path=path,
            sha256=sha256,
            strategy=strategy,
            precision=precision,
            device=device,
            weights_digest=weights_digest,
            io_names=dict(io_names or {}),
            external_data=external_data,
        )

    @property
    def content_sha256(self) -> str:
        """The hex digest of the file with the weights that it keeps in others; without those it is ``sha256``."""
        return content_sha256(self.sha256, self.external_data)

    def canonical_name(self, own: str) -> str:
        """Return the bundle's name for the tensor this file calls ``own``."""
        return self.io_names.get(own, own)

    def own_name(self, canonical: str) -> str:
        """Return this file's name for the bundle's tensor ``canonical``."""
        return next((own for own, name in self.io_names.items() if name == canonical), canonical)


@dataclass(frozen=True, slots=True)
class Golden:
    """
    Name the ``.npz`` files that hold one request's inputs and its outputs, keyed by canonical name.

    :param name: of the request, as ``black``; plain, since files are called after it.
    """

    name: str
    inputs: BundleFile
    outputs: BundleFile


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBundle:
    """
    Say what a network is, which files hold it, and what it must answer.

    :param name: of the network, as it is published.
    :param root: the directory all files lie in, absolute.
    :param weights_digest: ``sha256:<hex>`` of the source weights that every artefact shares.
    :param inputs: canonical inputs; empty for a bare ``.onnx``, whose engine handle knows them.
    :param outputs: canonical outputs; likewise.
    :param preprocessing: from pixels to the image input, None for a bare ``.onnx``.
    :param artefacts: in the order of model.json, those of other weights included.
    :param rules: one per output at most; :class:`Alike` holds for the others.
    :param golden: requests and their answers, the first one the most usual; none for a bare ``.onnx``.
    :param allow_non_finite: outputs in which NaN and infinities are meant.
    :param image: of ``width``, ``height``, ``colour`` and ``layout`` what a bare ``.onnx`` that leaves its sizes free
        is to be loaded for.
    :raises ModelBundleError: naming the key, where the parts contradict each other.
    """

    name: str
    root: Path
    weights_digest: str
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    preprocessing: PreprocessingSpec | None = None
    artefacts: tuple[Artefact, ...] = ()
    rules: tuple[OutputRule, ...] = ()
    golden: tuple[Golden, ...] = ()
    allow_non_finite: tuple[str, ...] = ()
    image: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        require_digest('weights_digest', self.weights_digest)
        for key, specs in (('inputs', self.inputs), ('outputs', self.outputs)):
            names = [spec.name for spec in specs]
            require(len(set(names)) == len(names), key, f'{names} names a tensor twice.')
        for index, artefact in enumerate(self.artefacts):
            self._check_io_names(f'artefacts[{index}].io_names', artefact)
        ruled, outputs = [rule.output for rule in self.rules], [spec.name for spec in self.outputs]
        for key, names in (('rules', ruled), ('allow_non_finite', list(self.allow_non_finite))):
            require(
                len(set(names)) == len(names) and set(names) <= set(outputs),
                key,
                f'are for {sorted(names)}, outputs are {sorted(outputs)}.',
                'Name each output once at most.',
            )
        cases = [case.name for case in self.golden]
        require(len(set(cases)) == len(cases), 'golden', f'{cases} names a request twice.')
        if self.preprocessing is not None and self.inputs:
            self.image_input()

    @classmethod
    def load(cls, path: Path | str) -> ModelBundle:
        """
        Read a bundle: a directory with a ``model.json``, that file, or a bare ``.onnx``; ``~`` is the home directory.

        Only the JSON is read (and a bare ``.onnx`` hashed, with its external weights); other files are checked when
        opened.

        :raises ModelBundleError: naming the file, the JSON key and the remedy.
        """
        path = expand_home(path).absolute()
        if path.suffix == '.onnx':
            return cls._bare(path)
        # os.path: Path.is_dir() raises for a name that is too long.
        file = path / MODEL_JSON if os.path.isdir(path) else path
        if file.suffix != '.json':
            if not os.path.lexists(path):
                raise ModelBundleError(f'{path} does not exist.', remedy='Correct the path.')
            raise ModelBundleError(f'{path} is no model.', remedy=f'Name a directory with {MODEL_JSON}, or an .onnx.')
        content = read_file(file, limit=_MODEL_JSON_LIMIT_BYTES)
        try:
            bundle = _bundle_from_json(parse_json(content), file.parent)
        except C7Error as error:
            raise ModelBundleError(f'{file}: {error.message}', remedy=error.remedy) from error
        for artefact in bundle.artefacts:
            if artefact.weights_digest != bundle.weights_digest:
                _logger.warning('%s: left out, %s', artefact.path, bundle._foreign(artefact))
        return bundle

    @classmethod
    def _bare(cls, path: Path) -> ModelBundle:
        sha256, external_data = onnx_digests(path)
        artefact = Artefact(
            path=path,
            sha256=sha256,
            strategy='onnx_trt_ep',
            precision='unknown',
            device='any',
            weights_digest=f'sha256:{content_sha256(sha256, external_data)}',
            external_data=external_data,
        )
        return cls(name=path.stem, root=path.parent, weights_digest=artefact.weights_digest, artefacts=(artefact,))

    def artefacts_for(self, strategy: str) -> tuple[Artefact, ...]:
        """
        Return the strategy's artefacts of this bundle's weights, in the order of model.json; maybe none.

        :raises ModelBundleError: there are some, but all of other weights.
        """
        own = [artefact for artefact in self.artefacts if artefact.strategy == strategy]
        same = tuple(artefact for artefact in own if artefact.weights_digest == self.weights_digest)
        if own and not same:
            raise ModelBundleError(
                f'every {strategy} artefact of {self.name!r} is left out: {self._foreign(own[0])}',
                remedy='Build it again from these weights.',
            )
        return same

    def image_input(self) -> TensorSpec:
        """
        Return the one input that the pre-processing fills.

        :raises ModelBundleError: no input, or more than one, takes what the pre-processing makes.
        """
        if self.preprocessing is None:
            raise ModelBundleError(f'{self.name!r} has no pre-processing.', remedy='Write it into model.json.')
        return image_input(self.inputs, self.preprocessing)

    def golden_inputs(self, index: int = 0) -> dict[str, NDArray]:
        """
        Load a golden request, one C-contiguous array per canonical input, owned by the caller.

        :param index: in :attr:`golden`.
        :raises ModelBundleError: there is none, or it is damaged or does not fit the inputs.
        """
        return self._load_golden('inputs', self.inputs, index)

    def golden_outputs(self, index: int = 0) -> dict[str, NDArray]:
        """
        Load a golden answer, one C-contiguous array per canonical output, owned by the caller.

        :param index: in :attr:`golden`.
        :raises ModelBundleError: there is none, or it is damaged or does not fit the outputs.
        """
        return self._load_golden('outputs', self.outputs, index)

    def golden_case(self, index: int = 0) -> tuple[dict[str, NDArray], dict[str, NDArray]]:
        """
        Load a golden request and its answer, as :meth:`golden_inputs` and :meth:`golden_outputs` do one of them.

        :raises ModelBundleError: also where both together are larger than ``GOLDEN_LIMIT_BYTES``, or where asking an
            engine for the answer and comparing it would take more memory than there is.
        """
        inputs = self.golden_inputs(index)
        left = GOLDEN_LIMIT_BYTES - sum(array.nbytes for array in inputs.values())
        outputs = self._load_golden('outputs', self.outputs, index, left)
        copies = {rule.output: rule.copies for rule in self.rules}
        compared = max(array.nbytes * copies.get(name, Alike.copies) for name, array in outputs.items())
        # Request and answer are in memory shared with a worker too, and the answer in the worker's own memory.
        handed = sum(array.nbytes for array in (*inputs.values(), *outputs.values(), *outputs.values()))
        require_memory(
            f'the comparison with {self.golden[index].outputs.path}',
            compared + handed,
            remedy='Free some, or make the bundle again with smaller golden requests.',
        )
        return inputs, outputs

    def check_golden_sizes(self) -> None:
        """
        Look at the sizes of all golden files, and read none.

        :raises ModelBundleError: one is missing, or together they are larger than ``GOLDEN_LIMIT_BYTES``.
        """
        sizes = {file.path: file_size(file.path) for case in self.golden for file in (case.inputs, case.outputs)}
        if (total := sum(sizes.values())) > GOLDEN_LIMIT_BYTES:
            largest = max(sizes, key=lambda path: sizes[path])
            raise ModelBundleError(
                f'{largest}: has {sizes[largest]} bytes; the golden files have {total} together, more than '
                f'{GOLDEN_LIMIT_BYTES}.',
                remedy='Make the bundle again with fewer or smaller golden requests, or copy it again.',
            )

    def compare(
        self, outputs: Arrays, expected: Arrays | None = None, *, specs: Sequence[TensorSpec] = ()
    ) -> list[str]:
        """
        Compare an answer with the golden one by the bundle's rules.

        An output without a rule is compared by :class:`Alike` where both sides have it.

        :param outputs: arrays by canonical name; only read.
        :param expected: what to compare with instead, as another engine's answer to the same frame.
        :param specs: of the outputs, for a bare ``.onnx``, which names none.
        :return: one sentence for each output that disagrees; empty when all hold.
        :raises ModelBundleError: there is no golden answer, or it is damaged.
        """
        wanted = self.golden_outputs() if expected is None else expected
        ruled = {rule.output for rule in self.rules}
        free = {spec.name: _free_axis(spec, wanted) for spec in self.outputs or specs}
        others = [Alike(name, free.get(name)) for name in wanted if name in outputs and name not in ruled]
        rules = [
            Alike(rule.output, free.get(rule.output)) if isinstance(rule, Alike) else rule
            for rule in (*self.rules, *others)
        ]
        if not rules:
            return ['no output is there on both sides.']
        return [
            f'output {rule.output!r}: {problem}.'
            for rule in rules
            if (
                problem := compare_output(
                    rule,
                    outputs.get(rule.output),
                    wanted.get(rule.output),
                    allow_non_finite=rule.output in self.allow_non_finite,
                )
            )
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the model.json object; the reader is :meth:`load`."""
        if self.preprocessing is None or not self.golden:
            raise ModelBundleError(f'{self.name!r} has no pre-processing or no golden answer, as model.json needs.')
        return {
            'schema_version': SCHEMA_VERSION,
            'name': self.name,
            'weights_digest': self.weights_digest,
            'inputs': [_tensor_to_json(spec) for spec in self.inputs],
            'outputs': [_tensor_to_json(spec) for spec in self.outputs],
            'preprocessing': self.preprocessing.to_json(),
            'artefacts': [self._artefact_to_json(artefact) for artefact in self.artefacts],
            'rules': {rule.output: rule_to_json(rule) for rule in self.rules},
            **({'allow_non_finite': list(self.allow_non_finite)} if self.allow_non_finite else {}),
            'golden': [
                {
                    'name': case.name,
                    'inputs': self._file_to_json(case.inputs),
                    'outputs': self._file_to_json(case.outputs),
                }
                for case in self.golden
            ],
        }

    def _artefact_to_json(self, artefact: Artefact) -> dict[str, Any]:
        values = {
            'strategy': artefact.strategy,
            **self._file_to_json(artefact),
            'precision': artefact.precision,
            'device': artefact.device,
            'weights_digest': artefact.weights_digest,
        }
        named = {'io_names': artefact.io_names, 'external_data': artefact.external_data}
        return values | {key: dict(value) for key, value in named.items() if value}

    def _file_to_json(self, file: BundleFile) -> dict[str, str]:
        try:
            relative = file.path.absolute().relative_to(self.root.absolute())
        except ValueError as error:
            raise ModelBundleError(f'{file.path} is not below {self.root}.', remedy='Copy it there first.') from error
        return {'path': relative.as_posix(), 'sha256': file.sha256}

    def _foreign(self, artefact: Artefact) -> str:
        return f'it was made from weights {artefact.weights_digest}, the bundle holds {self.weights_digest}.'

    def _check_io_names(self, key: str, artefact: Artefact) -> None:
        canonical = [spec.name for spec in (*self.inputs, *self.outputs)]
        for own, name in artefact.io_names.items():
            if name not in canonical:
                raise ModelBundleError(
                    f'{key}.{own}: {name!r} is no input or output.', remedy=f'Known are {canonical}.'
                )
        for specs in (self.inputs, self.outputs):
            own_names = [artefact.own_name(spec.name) for spec in specs]
            require(len(set(own_names)) == len(own_names), key, f'{own_names} stands for two tensors at once.')

    def _load_golden(
        self, which: str, specs: Sequence[TensorSpec], index: int, limit: int = GOLDEN_LIMIT_BYTES
    ) -> dict[str, NDArray]:
        if not self.golden:
            raise ModelBundleError(f'{self.name!r} has no golden {which}.', remedy='Only a model.json can name them.')
        file: BundleFile = getattr(self.golden[index], which)
        arrays = read_npz(file, limit=limit)
        _check_golden(str(file.path), specs, arrays)
        return {spec.name: np.asarray(arrays[spec.name], order='C') for spec in specs}


def image_input(inputs: Sequence[TensorSpec], preprocessing: PreprocessingSpec) -> TensorSpec:
    """
    Return the one input that a pre-processing fills.

    :raises ModelBundleError: no input, or more than one, takes what it makes.
    """
    fits = [
        tensor
        for tensor in inputs
        if tensor.dtype == preprocessing.dtype and _shape_fits(tensor.axes, preprocessing.tensor_shape)
    ]
    if len(fits) != 1:
        raise ModelBundleError(
            f'preprocessing: makes {preprocessing.dtype} {preprocessing.tensor_shape}, which {len(fits)} of the '
            f'inputs {[(tensor.name, tensor.dtype, tensor.shape) for tensor in inputs]} take.',
            remedy='Make width, height, colour, layout and dtype those of the one image input.',
        )
    return fits[0]


def image_layout(axes: Sequence[int | None]) -> str:
    """
    Return the layout of an image input with four axes.

    Channels first is the exporters' habit; only a last axis of 1 or 3 behind a second one that is neither says
    otherwise.
    """
    return 'nhwc' if axes[3] in (1, 3) and axes[1] not in (1, 3) else 'nchw'


def image_axes(
    axes: Sequence[int | None],
    *,
    width: int | None = None,
    height: int | None = None,
    colour: str | None = None,
    layout: str | None = None,
) -> tuple[int | None, ...]:
    """
    Return the four axes of an image input with the sizes that it leaves free filled in, as far as they are given.

    :param layout: :func:`image_layout` where None.
    """
    layout = layout or image_layout(axes)
    channels = COLOURS.get(colour or '')
    given = (None, channels, height, width) if layout == 'nchw' else (None, height, width, channels)
    return tuple(want if have is None else have for have, want in zip(axes, given, strict=True))


def default_preprocessing(inputs: Sequence[TensorSpec]) -> PreprocessingSpec:
    """
    Return the pre-processing for a model that comes without any, from its one image input.

    RGB for three channels, grey for one; 0..255 scaled to 0..1 for floats, unchanged for uint8;
    stretched, since a border that the network was not trained with makes features of its own.

    :raises ModelBundleError: there is not exactly one input, or it is no image of a fixed size.
    """
    remedy = f'Write a {MODEL_JSON} with its pre-processing, or export the model with one image input of a fixed size.'
    if len(inputs) != 1:
        raise ModelBundleError(f'{len(inputs)} inputs, where one image is needed.', remedy=remedy)
    tensor = inputs[0]
    if len(tensor.axes) == 4 and None in tensor.axes[1:]:
        remedy = f'{SIZE_REMEDY} {remedy}'
    fits = []
    if len(tensor.axes) == 4 and tensor.axes[0] in (1, None) and tensor.dtype in ('float32', 'float16', 'uint8'):
        _, second, third, fourth = tensor.axes
        candidates = (('nchw', second, third, fourth), ('nhwc', fourth, second, third))
        fits = [
            (layout, channels, height, width)
            for layout, channels, height, width in candidates
            if channels in (1, 3) and height is not None and width is not None
        ]
    if len(fits) != 1:
        raise ModelBundleError(
            f'input {tensor.name!r} ({tensor.dtype}, {tensor.shape}) is not plainly one image: '
            '(1, C, H, W) or (1, H, W, C) with 1 or 3 channels, fixed height and width, float32, float16 or uint8.',
            remedy=remedy,
        )
    layout, channels, height, width = fits[0]
    try:
        return PreprocessingSpec(
            width=width,
            height=height,
            colour='gray' if channels == 1 else 'rgb',
            scale=1.0 if tensor.dtype == 'uint8' else 1.0 / 255.0,
            layout=layout,
            dtype=tensor.dtype,
        )
    except ConfigError as error:
        raise ModelBundleError(f'input {tensor.name!r}: {error.message}', remedy=remedy) from error


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
    last: who reads an older bundle at that moment finds digests that fail, never mixed data.

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
            _check_golden(path.name, specs, arrays)
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
    _bundle_from_json(parse_json(contents[root / MODEL_JSON]), root)
    for path, content in contents.items():
        write_atomically(path, content)
    return ModelBundle.load(root)


def _bundle_from_json(value: object, root: Path) -> ModelBundle:
    fields = Fields(value, '')
    version = fields.integer('schema_version')
    if version != SCHEMA_VERSION:
        raise ModelBundleError(
            f'schema_version: {version} unknown, this package reads {SCHEMA_VERSION}.',
            remedy='Update the package, or write the bundle again with this one.',
        )
    name = fields.text('name')
    require(bool(_NAME.fullmatch(name)), 'name', f'{name!r} has characters other than A-Z a-z 0-9 . _ - .')
    bundle = fields.build(
        ModelBundle,
        name=name,
        root=root,
        weights_digest=fields.text('weights_digest'),
        inputs=tuple(_tensor(item) for item in fields.objects('inputs')),
        outputs=tuple(_tensor(item, may_lack_rank=True) for item in fields.objects('outputs')),
        preprocessing=_preprocessing(fields),
        artefacts=tuple(_artefact(item, root) for item in fields.objects('artefacts')),
        rules=tuple(rule_from_json(output, item) for output, item in fields.object('rules', default={}).children()),
        golden=_golden(fields, root),
        allow_non_finite=fields.texts('allow_non_finite', default=()),
    )
    fields.close()
    return bundle


def _tensor(fields: Fields, *, may_lack_rank: bool = False) -> TensorSpec:
    name, dtype = fields.text('name'), fields.text('dtype')
    fields.check(bool(name), 'name', 'is empty.')
    fields.check(dtype in _DTYPES, 'dtype', f'{dtype!r} unknown.', f'Known are {list(_DTYPES)}.')
    shape: Any = fields.take('shape')
    if may_lack_rank and shape is None:
        fields.close()
        return TensorSpec(name, dtype, fields.take('shape'))
    proper = isinstance(shape, list) and len(shape) <= _MAX_RANK and all(_is_size(size) for size in shape)
    fields.check(
        proper, 'shape', f'{shape!r} is no list of at most {_MAX_RANK} positive sizes.', 'Write null for a free axis.'
    )
    fields.close()
    return TensorSpec(name, dtype, tuple(shape))


def _is_size(size: object) -> bool:
    return size is None or (isinstance(size, int) and not isinstance(size, bool) and 1 <= size < 2**31)


def _preprocessing(fields: Fields) -> PreprocessingSpec:
    value = fields.take('preprocessing')
    fields.check(isinstance(value, dict), 'preprocessing', 'is no object.', 'Write size, colour, mean, std and so on.')
    try:
        return PreprocessingSpec.from_json(value)
    except ConfigError as error:
        raise ModelBundleError(f'preprocessing.{error.message}', remedy=error.remedy) from error


def _artefact(fields: Fields, root: Path) -> Artefact:
    names, external = fields.object('io_names', default={}), fields.object('external_data', default={})
    artefact = fields.build(
        Artefact,
        path=fields.file('path', root),
        sha256=fields.text('sha256'),
        strategy=fields.text('strategy'),
        precision=fields.text('precision'),
        device=fields.text('device'),
        weights_digest=fields.text('weights_digest'),
        io_names={own: names.text(own) for own in names.names()},
        external_data={location: external.text(location) for location in external.names()},
    )
    fields.close()
    return artefact


def _check_golden(where: str, specs: Sequence[TensorSpec], arrays: Arrays) -> None:
    names = [spec.name for spec in specs]
    if set(arrays) != set(names):
        raise ModelBundleError(
            f'{where}: holds {sorted(arrays)}, expected {sorted(names)}.', remedy='Write the golden files again.'
        )
    for spec in specs:
        if problem := spec.mismatch(arrays[spec.name]):
            raise ModelBundleError(f'{where}: {problem}.', remedy='Write the golden files again.')


def _tensor_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {'name': spec.name, 'dtype': spec.dtype, 'shape': None if spec.shape is None else list(spec.shape)}


def _golden(fields: Fields, root: Path) -> tuple[Golden, ...]:
    if isinstance(fields.take('golden'), dict):
        return (_golden_case(fields.object('golden'), ONLY_GOLDEN, root),)
    return tuple(_golden_case(item, item.text('name'), root) for item in fields.objects('golden'))


def _golden_case(fields: Fields, name: str, root: Path) -> Golden:
    fields.check(bool(_NAME.fullmatch(name)), 'name', f'{name!r} has characters other than A-Z a-z 0-9 . _ - .')
    files = []
    for which in ('inputs', 'outputs'):
        file = fields.object(which)
        files.append(file.build(BundleFile, path=file.file('path', root), sha256=file.text('sha256')))
        file.close()
    fields.close()
    return Golden(name, *files)


def _free_axis(spec: TensorSpec, arrays: Arrays) -> int | None:
    """Return the one axis of free size that is not of length one, None where there are more or none."""
    array = arrays.get(spec.name)
    shape: Sequence[int | None] | None = spec.shape
    if array is None or shape is None or len(shape) != array.ndim:
        return None
    free = [axis for axis, size in enumerate(shape) if size is None and array.shape[axis] != 1]
    return free[0] if len(free) == 1 else None


def _shape_fits(shape: Sequence[int | None], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(have in (None, want) for have, want in zip(shape, wanted, strict=True))
