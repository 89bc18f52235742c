"""
Torch archives (``.pt2`` of torch.export, TorchScript ``.pt``), checked before torch reads a byte (R-4).

Both are zip archives, and torch's readers run what lies in them: torch.export unpickles sample inputs, custom
objects, tensor subclasses and older weights with ``weights_only=False`` (2.13, 2.14), and loads libraries that
AOTInductor has built. So what may lie in an archive is a list, by name and by content; everything else is refused.

What trust remains: an admitted archive still chooses which ATen operators run on its tensors, or brings
TorchScript code, which torch compiles and runs in its own interpreter. Neither reaches Python; the operators
that open files are refused by name. A digest says that the file is the one its bundle names, and nothing about
its maker: use models from a maker that you trust.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from gps_denied_c7.errors import EngineContentError, EngineSchemaMismatchError, ModelBundleError
from gps_denied_c7.model.files import read_file
from gps_denied_c7.runtimes.pt.archive_scan.pickles import (
    PickleRefusedError,
    check_tensor_pickle,
    check_torchscript_pickle,
)
from gps_denied_c7.runtimes.pt.archive_scan.program import ProgramRefusedError, check_payload_config, check_program
from gps_denied_c7.runtimes.pt.archive_scan.strict_zip import ZipRefusedError, read_entries

__all__ = ['ArchiveKind', 'TorchArchive', 'read_torch_archive', 'scan_torch_archive']

_REMEDY = (
    'Export the model again with fixed shapes (gps_denied_c7.runtimes.pt.export), and use files from trusted sources '
    'only.'
)

Entries = Mapping[str, memoryview]


class ArchiveKind(str, Enum):
    """Which reader of torch an archive is for."""

    EXPORT = 'torch.export'
    TORCHSCRIPT = 'TorchScript'


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """
    Hold an archive that was checked.

    :param content: the very bytes that were; what is loaded is made from them, never from the path again.
    """

    content: bytes = field(repr=False)
    kind: ArchiveKind


class _RefusedError(ValueError):
    """What is wrong with an archive, to follow its name."""


def read_torch_archive(path: Path, sha256: str | None) -> TorchArchive:
    """
    Read a ``.pt2`` or ``.pt`` file once, and check its digest and everything in it.

    :param sha256: hex digest that the file must have, None where the digest is unknown.
    :raises EngineSchemaMismatchError: another digest.
    :raises EngineContentError: missing, unreadable, of another suffix, or refused by the scan.
    """
    kind = {'.pt2': ArchiveKind.EXPORT, '.pt': ArchiveKind.TORCHSCRIPT}.get(path.suffix)
    if kind is None:
        raise EngineContentError(f'{path} is neither .pt2 nor .pt.', remedy='Correct the artefact in model.json.')
    try:
        content = read_file(path)
    except ModelBundleError as error:
        raise EngineContentError(error.message, remedy=error.remedy) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise EngineSchemaMismatchError(
            'model_sha256', expected=sha256, found=found, remedy='Copy or export the model again.'
        )
    try:
        scan_torch_archive(content, kind)
    except ValueError as error:
        raise EngineContentError(
            f'{path} is refused before torch opens it, since it {error}.', remedy=_REMEDY
        ) from error
    return TorchArchive(content, kind)


def scan_torch_archive(content: bytes, kind: ArchiveKind) -> None:
    """
    Refuse an archive that holds anything that its kind does not need.

    :raises ValueError: saying what, as the end of a sentence that names the file.
    """
    entries = _below_root(read_entries(content))
    rules, required = _RULES[kind]
    if missing := [name for name in required if name not in entries]:
        raise _RefusedError(f'is no {kind.value} archive: it has no {missing[0]}')
    for name, entry in entries.items():
        check = next((check for pattern, check in rules if pattern.fullmatch(name)), None)
        if check is None:
            raise _RefusedError(f'has an entry {name!r}, which a {kind.value} model does not need')
        try:
            check(entry, entries)
        except (PickleRefusedError, ProgramRefusedError, ZipRefusedError, _RefusedError) as error:
            raise _RefusedError(f'has an entry {name!r} that {error}') from error


def _below_root(entries: Entries) -> dict[str, memoryview]:
    """Return the entries by their names below the one folder that all lie in."""
    roots = {name.partition('/')[0] for name in entries}
    if len(roots) != 1:
        raise _RefusedError(f'has entries in {len(roots)} folders')
    return {name.partition('/')[2]: entry for name, entry in entries.items()}


def _any(entry: memoryview, entries: Entries) -> None:
    """Admit bytes that are read as numbers alone."""


def _short_text(entry: memoryview, entries: Entries) -> None:
    if len(entry) > 256 or not re.fullmatch(rb'[0-9a-z\n]*', entry):
        raise _RefusedError('is not a short text')


def _program(entry: memoryview, entries: Entries) -> None:
    check_program(bytes(entry))


def _payload_config(directory: str) -> Callable[[memoryview, Entries], None]:
    def check(entry: memoryview, entries: Entries) -> None:
        names = {name.removeprefix(directory) for name in entries if name.startswith(directory)}
        check_payload_config(bytes(entry), names)

    return check


def _sample_inputs(entry: memoryview, entries: Entries) -> None:
    """Admit an archive of torch.save that holds plain tensors; torch falls back to a full unpickler here."""
    if not entry:
        return
    inner = _below_root(read_entries(bytes(entry), max_unpacked=0))
    for name, content in inner.items():
        check = next((check for pattern, check in _SAMPLE_INPUTS if pattern.fullmatch(name)), None)
        if check is None:
            raise _RefusedError(f'has an entry {name!r}, which sample inputs do not need')
        check(content, inner)
    if 'data.pkl' not in inner:
        raise _RefusedError('has no data.pkl')


def _tensor_pickle(entry: memoryview, entries: Entries) -> None:
    check_tensor_pickle(bytes(entry))


def _torchscript_pickle(entry: memoryview, entries: Entries) -> None:
    check_torchscript_pickle(bytes(entry))


# save(), from_file() and C++ classes; also as the text that getattr() takes. Operators of packages that are
# installed beside torch (ops.<namespace>) may do anything.
_BARRED_CODE = re.compile(rb'\b(?:save|from_file|classes)\b|\bops\.(?!(?:aten|prim|prims|quantized)\.)')


def _torchscript_code(entry: memoryview, entries: Entries) -> None:
    if barred := _BARRED_CODE.search(entry):
        raise _RefusedError(f'has TorchScript code that names {bytes(barred[0]).decode()!r}')


Rules = tuple[tuple[re.Pattern[str], Callable[[memoryview, Entries], None]], ...]


def _rules(*rules: tuple[str, Callable[[memoryview, Entries], None]]) -> Rules:
    return tuple((re.compile(pattern, re.ASCII), check) for pattern, check in rules)


_COMMON = (
    ('byteorder', _short_text),
    (r'(?:\.data/)?version', _short_text),
    (r'\.data/serialization_id', _short_text),
)
_SAMPLE_INPUTS = _rules(
    *_COMMON,
    (r'data\.pkl', _tensor_pickle),
    (r'data/\d+', _any),
    (r'\.(?:format_version|storage_alignment)', _short_text),
)
_RULES: Mapping[ArchiveKind, tuple[Rules, tuple[str, ...]]] = {
    ArchiveKind.EXPORT: (
        _rules(
            *_COMMON,
            (r'archive_(?:format|version)', _short_text),
            (r'models/model\.json', _program),
            (r'data/weights/weight_\d+', _any),
            (r'data/weights/model_weights_config\.json', _payload_config('data/weights/')),
            (r'data/constants/tensor_\d+', _any),
            (r'data/constants/model_constants_config\.json', _payload_config('data/constants/')),
            (r'data/sample_inputs/model\.pt', _sample_inputs),
        ),
        ('archive_format', 'models/model.json', 'data/weights/model_weights_config.json'),
    ),
    ArchiveKind.TORCHSCRIPT: (
        _rules(
            *_COMMON,
            (r'data\.pkl', _torchscript_pickle),
            (r'(?:constants|traced_inputs)\.pkl', _torchscript_pickle),
            (r'(?:data|constants|traced_inputs)/\d+', _any),
            (r'code/__torch__(?:/\w+)*\.py', _torchscript_code),
            (r'code/__torch__(?:/\w+)*\.py\.debug_pkl', _torchscript_pickle),
        ),
        ('data.pkl', 'constants.pkl', 'version'),
    ),
}
