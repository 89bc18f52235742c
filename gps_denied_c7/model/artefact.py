"""The files that a model bundle names: artefacts that are loaded, and golden requests with their answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from numpy.typing import NDArray

from gps_denied_c7._json import require, require_digest, require_known
from gps_denied_c7.config import RUNTIME_LABELS
from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.model.external_data import check_location, content_sha256, onnx_digests
from gps_denied_c7.model.files import BundleFile, file_sha256, require_hex
from gps_denied_c7.tensors import TensorSpec

__all__ = ['ONLY_GOLDEN', 'PRECISIONS', 'Arrays', 'Artefact', 'Golden', 'check_golden']

PRECISIONS = ('fp32', 'fp16', 'bf16', 'fp8', 'int8', 'unknown')

ONLY_GOLDEN = 'golden'
"""Name of the golden request of a bundle that names none."""

_DEVICE = re.compile(r'any|cpu|cuda|sm[0-9]{2,3}')

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


def check_golden(where: str, specs: Sequence[TensorSpec], arrays: Arrays) -> None:
    """
    Refuse golden arrays that are not those of the tensors.

    :param where: the file, for the error.
    :raises ModelBundleError: naming the first difference.
    """
    names = [spec.name for spec in specs]
    if set(arrays) != set(names):
        raise ModelBundleError(
            f'{where}: holds {sorted(arrays)}, expected {sorted(names)}.', remedy='Write the golden files again.'
        )
    for spec in specs:
        if problem := spec.mismatch(arrays[spec.name]):
            raise ModelBundleError(f'{where}: {problem}.', remedy='Write the golden files again.')
