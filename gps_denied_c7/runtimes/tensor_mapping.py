"""The names and shapes of a file's own tensors, beside those of its bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gps_denied_c7.errors import EngineContentError, EngineSchemaMismatchError
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.image_input import SIZE_REMEDY
from gps_denied_c7.runtimes.protocol import EngineCacheEntry
from gps_denied_c7.tensors import TensorSpec

__all__ = ['artefact_of', 'contradiction', 'fix_shapes', 'map_tensors', 'own_input_shapes', 'own_specs']


def artefact_of(entry: EngineCacheEntry, label: str) -> Artefact | None:
    """Return what the bundle says about the entry's file or its source, None for one that it does not list."""
    if entry.source is not None:
        return entry.source
    own = (artefact for artefact in entry.model.artefacts if artefact.strategy == label)
    return next((artefact for artefact in own if artefact.path == entry.path), None)


def own_input_shapes(entry: EngineCacheEntry, label: str) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes that the bundle gives its inputs, by the file's own names; empty for a bare ``.onnx``."""
    return {spec.name: spec.axes for spec in own_specs(entry.model.inputs, artefact_of(entry, label))}


def own_specs(specs: Sequence[TensorSpec], artefact: Artefact | None) -> tuple[TensorSpec, ...]:
    """Return tensors of a bundle by the names that a file of it has for them."""
    if artefact is None:
        return tuple(specs)
    return tuple(dataclasses.replace(spec, name=artefact.own_name(spec.name)) for spec in specs)


def map_tensors(
    role: str, canonical: Sequence[TensorSpec], found: Sequence[TensorSpec], artefact: Artefact | None
) -> tuple[tuple[TensorSpec, ...], dict[str, str]]:
    """
    Return the tensors as bundle and file agree on them, and the file's own name of each by its canonical one.

    :param role: ``input`` or ``output``.
    :param found: as the file spells them, all of them where the bundle names none.
    :raises EngineSchemaMismatchError: the two contradict each other.
    """
    by_name = {spec.name: spec for spec in found}
    own_names = {spec.name: artefact.own_name(spec.name) if artefact else spec.name for spec in canonical or found}
    if missing := set(own_names.values()) - by_name.keys():
        raise contradiction(f'{role}s', sorted(own_names.values()), f'{sorted(by_name)}, without {sorted(missing)}')
    specs = tuple(_agree(role, spec, by_name[own_names[spec.name]]) for spec in canonical or found)
    return specs, own_names


def _agree(role: str, canonical: TensorSpec, found: TensorSpec) -> TensorSpec:
    """Return what both allow: of an input what either fixes, of an output what the engine is sure of."""
    if canonical.shape is None or found.shape is None:
        axes, same_rank = [], True
    else:
        axes = list(zip(canonical.shape, found.shape, strict=False))
        same_rank = len(canonical.shape) == len(found.shape)
    if canonical.dtype != found.dtype or not same_rank or any(None not in axis and len(set(axis)) > 1 for axis in axes):
        raise contradiction(
            f'{role} {canonical.name}', f'{canonical.dtype} {canonical.shape}', f'{found.dtype} {found.shape}'
        )
    if role == 'output':
        return dataclasses.replace(canonical, shape=found.shape)
    return dataclasses.replace(canonical, shape=tuple(have if want is None else want for want, have in axes))


def fix_shapes(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Fix every input axis: a free leading axis is the batch, which is 1; no size can be chosen for another one."""
    fixed = tuple(
        dataclasses.replace(spec, shape=(1, *spec.axes[1:])) if spec.axes[:1] == (None,) else spec for spec in specs
    )
    for spec in fixed:
        if None in spec.axes:
            raise EngineContentError(
                f'input {spec.name!r} has free axes: {spec.shape}.',
                remedy=f'{SIZE_REMEDY} Else make a bundle (c7_engine bundle), or export the model with fixed sizes.',
            )
    return fixed


def contradiction(field: str, expected: object, found: object) -> EngineSchemaMismatchError:
    """Return the error for a bundle that says something else than its file."""
    return EngineSchemaMismatchError(
        field, expected=expected, found=found, remedy='Correct inputs, outputs or io_names in model.json.'
    )
