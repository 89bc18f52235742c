"""The model bundle: a directory whose ``model.json`` says what a network is and which files hold it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7._json import parse_json, require, require_digest
from gps_denied_c7.errors import C7Error, ModelBundleError
from gps_denied_c7.host_memory import require_memory
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.model.artefact import ONLY_GOLDEN, Arrays, Artefact, Golden, check_golden
from gps_denied_c7.model.bundle_json import MODEL_JSON, bundle_from_json, bundle_to_json
from gps_denied_c7.model.compare import Alike, OutputRule, compare_output
from gps_denied_c7.model.external_data import content_sha256, onnx_digests
from gps_denied_c7.model.files import (
    GOLDEN_LIMIT_BYTES,
    BundleFile,
    expand_home,
    file_size,
    npz_bytes,
    read_file,
    read_npz,
    write_atomically,
)
from gps_denied_c7.model.image_input import image_input
from gps_denied_c7.tensors import TensorSpec

__all__ = ['ModelBundle', 'write_bundle']

# model.json usually has a few kilobytes; parsed, it takes thirty times its size.
_MODEL_JSON_LIMIT_BYTES = 1 << 20

# More of each would only hold up a load: all golden requests are answered in it, seven are usual.
_MOST = {'inputs': 1024, 'outputs': 1024, 'artefacts': 256, 'golden': 32}

_logger = logging.getLogger(__name__)


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
        for key, most in _MOST.items():
            count = len(getattr(self, key))
            require(count <= most, key, f'has {count} entries, more than {most}.', 'Make the bundle again with fewer.')
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
            raise ModelBundleError(f'{path} is not a model.', remedy=f'Name a folder with {MODEL_JSON}, or an .onnx.')
        content = read_file(file, limit=_MODEL_JSON_LIMIT_BYTES)
        try:
            bundle = bundle_from_json(parse_json(content), file.parent, cls)
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
            remedy='Free memory, or make the bundle again with smaller golden requests.',
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
        return bundle_to_json(self)

    def _foreign(self, artefact: Artefact) -> str:
        return f'it was made from weights {artefact.weights_digest}, the bundle holds {self.weights_digest}.'

    def _check_io_names(self, key: str, artefact: Artefact) -> None:
        canonical = dict.fromkeys(spec.name for spec in (*self.inputs, *self.outputs))
        for own, name in artefact.io_names.items():
            if name not in canonical:
                raise ModelBundleError(
                    f'{key}.{own}: {name!r} is not an input or output.', remedy=f'Known are {list(canonical)}.'
                )
        # Not by own_name, which looks through all of them for each.
        own_of = {name: own for own, name in artefact.io_names.items()}
        for specs in (self.inputs, self.outputs):
            own_names = [own_of.get(spec.name, spec.name) for spec in specs]
            require(len(set(own_names)) == len(own_names), key, f'{own_names} stands for two tensors at once.')

    def _load_golden(
        self, which: str, specs: Sequence[TensorSpec], index: int, limit: int = GOLDEN_LIMIT_BYTES
    ) -> dict[str, NDArray]:
        if not self.golden:
            raise ModelBundleError(f'{self.name!r} has no golden {which}.', remedy='Only a model.json can name them.')
        file: BundleFile = getattr(self.golden[index], which)
        arrays = read_npz(file, limit=limit)
        check_golden(str(file.path), specs, arrays)
        return {spec.name: np.asarray(arrays[spec.name], order='C') for spec in specs}


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


def _free_axis(spec: TensorSpec, arrays: Arrays) -> int | None:
    """Return the one axis of free size that is not of length one, None where there are more or none."""
    array = arrays.get(spec.name)
    shape: Sequence[int | None] | None = spec.shape
    if array is None or shape is None or len(shape) != array.ndim:
        return None
    free = [axis for axis, size in enumerate(shape) if size is None and array.shape[axis] != 1]
    return free[0] if len(free) == 1 else None
