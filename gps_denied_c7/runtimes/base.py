"""What all runtimes share: handles, validation, warm-up and errors, once; a backend fills in the vendor part."""

from __future__ import annotations

import dataclasses
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.errors import (
    C7Error,
    EngineDeserializeError,
    InferenceError,
    RuntimeUnavailableError,
    forget_locals,
)
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import ThermalState, ThermalStatePublisher, UnknownThermalState
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineCacheEntry, EngineFacts, EngineHandle, ProviderSet
from gps_denied_c7.runtimes.tensor_mapping import artefact_of, contradiction, fix_shapes, map_tensors
from gps_denied_c7.tensors import TensorSpec, check_arrays, check_finite, noise_inputs, probe_inputs

__all__ = ['BaseRuntime', 'LoadedEngine']

EngineT = TypeVar('EngineT')

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedEngine(Generic[EngineT]):
    """
    Hold what a backend loaded, before its first run.

    :param engine: the vendor's object.
    :param inputs: every input as the file spells it, None where an axis is free.
    :param outputs: every output as the file spells it, None where an axis is free.
    :param facts: as found; ``load_s`` is filled in after the warm-up run.
    """

    engine: EngineT
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    facts: EngineFacts


@dataclass(slots=True, eq=False)
class _Handle:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    facts: EngineFacts
    ran_ns: tuple[int, int]


@dataclass(slots=True, eq=False)
class _Bound(Generic[EngineT]):
    """
    An engine with its canonical tensors, and the file's own name for each.

    :param outputs: those that are wanted; an axis that the engine is unsure of is None, whatever the bundle says.
    :param finite: canonical outputs that have to be finite.
    :param requests: the last request's arrays that were run as they were given, with their shapes and dtypes: most
        callers fill the same ones again.
    :param answers: where the last answer lay, and what its caller got: most engines write into the same arrays again.
    """

    engine: EngineT
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    own_inputs: Mapping[str, str]
    own_outputs: Mapping[str, str]
    finite: frozenset[str]
    requests: dict[str, tuple[NDArray, tuple[int, ...], np.dtype[Any]]] = field(default_factory=dict)
    answers: dict[str, tuple[NDArray, NDArray]] = field(default_factory=dict)

    def own_arrays(self, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """
        Return a request by the file's own names.

        Vendors read raw memory: an array that is not C-contiguous is copied rather than refused.

        :raises InferenceError: it is not what the engine takes.
        """
        known = self.requests
        same = len(known) == len(inputs) > 0 and all(
            inputs.get(name) is array and array.shape == shape and array.dtype == dtype
            for name, (array, shape, dtype) in known.items()
        )
        if not same:
            known.clear()
            for name, value in inputs.items():
                if not isinstance(value, np.ndarray):
                    raise InferenceError(f'input {name!r} is a {type(value).__name__}, not a NumPy array.')
            check_arrays('input', self.inputs, inputs)
            if all(array.flags.c_contiguous for array in inputs.values()):
                known.update({name: (array, array.shape, array.dtype) for name, array in inputs.items()})
        return {own: np.asarray(inputs[name], order='C') for name, own in self.own_inputs.items()}


class BaseRuntime(ABC, Generic[EngineT]):
    """
    Do for every strategy what :class:`gps_denied_c7.runtimes.protocol.InferenceRuntime` promises.

    A subclass names its ``label`` and fills in ``_load``, ``_run`` and ``_free``, and ``_settle`` and
    ``_found_finite`` where it can; vendor exceptions may leave those, they become the ``__cause__`` of the
    family's errors here.

    :param config: the library's settings.
    :param thermal: where ``thermal_state`` comes from, None for an honest "unknown".
    :param gate: what admits engine files on this host, None where no engine file may be loaded.
    :param providers: the hardware that may be used.
    """

    label: ClassVar[str]

    def __init__(
        self,
        config: C7InferenceConfig,
        *,
        thermal: ThermalStatePublisher | None = None,
        gate: EngineGate | None = None,
        providers: ProviderSet = ProviderSet.ANY,
    ) -> None:
        self._config = config
        self._thermal = thermal or UnknownThermalState()
        self._gate = gate
        self._providers = providers
        self._engines: dict[_Handle, _Bound[EngineT]] = {}

    def current_runtime_label(self) -> str:
        """Return the strategy's label, whatever provider is active."""
        return self.label

    def thermal_state(self) -> ThermalState:
        """Return the injected publisher's latest snapshot."""
        return self._thermal.thermal_state()

    def compile_engine(self, model: ModelBundle, build_config: BuildConfig) -> EngineCacheEntry:
        """Return the artefact of ``model`` that this runtime loads; see the protocol."""
        try:
            return self._compile(model, build_config)
        except C7Error as error:
            forget_locals(error)
            raise
        except Exception as error:
            forget_locals(error)
            raise EngineDeserializeError(
                f'{self.label} could not build {model.name!r}: {error}',
                remedy='Export the model again.',
            ) from error

    def deserialize_engine(self, entry: EngineCacheEntry) -> EngineHandle:
        """Load ``entry``, run it exactly once to warm it up, and return its handle; see the protocol."""
        try:
            return self._deserialize(entry)
        except C7Error as error:
            forget_locals(error)
            raise
        except Exception as error:
            forget_locals(error)
            raise EngineDeserializeError(
                f'{self.label} could not load {entry.path}: {error}',
                remedy='Copy or export the file again.',
            ) from error

    def infer(self, handle: EngineHandle, inputs: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one request; see the protocol for shapes, ownership and errors."""
        try:
            # No name for the engine here: an error that is kept would keep it.
            outputs, cast('_Handle', handle).ran_ns = self._infer(self._bound(handle), inputs)
            cast('_Handle', handle).outputs = self._bound(handle).outputs
        except C7Error as error:
            forget_locals(error)
            raise
        return outputs

    def place(
        self,
        handle: EngineHandle,
        *,
        inputs: Mapping[str, NDArray] | None = None,
        outputs: Mapping[str, NDArray] | None = None,
    ) -> None:
        """
        Have later requests read from arrays of the caller's, and answers written there, by those that can.

        Nothing promises it: requests may come in any arrays, and a caller that needs an answer elsewhere than where
        :meth:`infer` returns it copies it. What was placed is kept until the engine is released or another array takes
        its place. An earlier answer may change meanwhile: engines that are captured again run once more.

        :param inputs: C-contiguous arrays by canonical name that most requests will come in, each on memory pages of
            its own; may be read-only.
        :param outputs: likewise, writable; not to be read while a request runs.
        :raises InferenceError: the engine does not run any more.
        """
        bound = self._bound(handle)
        inputs, outputs = inputs or {}, outputs or {}
        places = {own: inputs[name] for name, own in bound.own_inputs.items() if name in inputs}
        places |= {own: outputs[name] for name, own in bound.own_outputs.items() if name in outputs}
        self._place(bound.engine, places)

    def release_engine(self, handle: EngineHandle) -> None:
        """Free the engine; a foreign or released handle is a silent no-op."""
        bound = self._engines.pop(handle, None) if isinstance(handle, _Handle) else None
        if bound is not None:
            self._give_back(bound.engine)

    def _compile(self, model: ModelBundle, build_config: BuildConfig) -> EngineCacheEntry:
        artefact = self._choose(model.artefacts_for(self.label))
        if artefact is None:
            raise RuntimeUnavailableError(
                self.label,
                f'model {model.name!r} has no artefact for it on {self._providers.value!r} providers.',
                remedy=f'Add one to model.json, or take {self.label!r} out of runtime_chain.',
            )
        return EngineCacheEntry(
            artefact.path, artefact.sha256, model, build_config, external_data=artefact.external_data
        )

    def _deserialize(self, entry: EngineCacheEntry) -> EngineHandle:
        start = time.monotonic()
        loaded = self._load(entry)
        try:
            bound = self._bind(loaded, entry)
            _, ran_ns = self._infer(bound, noise_inputs(bound.inputs))
            remarks = self._settle(loaded.engine)
            seen = self._witness(loaded.engine, loaded.facts)
            remarks = (*remarks, *self._compare(loaded.engine, _probes(bound)))
            self._relax(bound)
        except InferenceError as error:
            self._give_back(loaded.engine)
            raise EngineDeserializeError(
                f'{entry.path} loaded, but its warm-up run failed: {error.message}',
                remedy='Run the model outside of this package on noise in the range 0..1, and correct it.',
            ) from (error.__cause__ or error)
        except Exception:
            self._give_back(loaded.engine)
            raise
        notes = (*seen.notes, *_relaxations(bound, entry), *remarks)
        facts = dataclasses.replace(seen, notes=notes, load_s=time.monotonic() - start)
        handle = _Handle(bound.inputs, bound.outputs, facts, ran_ns)
        self._engines[handle] = bound
        return handle

    def _bind(self, loaded: LoadedEngine[EngineT], entry: EngineCacheEntry) -> _Bound[EngineT]:
        """Map the file's tensors to the bundle's, or raise EngineSchemaMismatchError where they contradict."""
        artefact = artefact_of(entry, self.label)
        inputs, own_inputs = map_tensors('input', entry.model.inputs, loaded.inputs, artefact)
        own_outputs = self._wanted(entry, [spec.name for spec in loaded.outputs])
        canonical = [spec for spec in entry.model.outputs if spec.name in own_outputs]
        outputs, own_outputs = map_tensors(
            'output', canonical, [spec for spec in loaded.outputs if spec.name in own_outputs.values()], artefact
        )
        if surplus := {spec.name for spec in loaded.inputs} - set(own_inputs.values()):
            raise contradiction('inputs', sorted(own_inputs.values()), f'also {sorted(surplus)}')
        finite = frozenset(own_outputs) - self._non_finite(entry)
        return _Bound(loaded.engine, fix_shapes(inputs), outputs, own_inputs, own_outputs, finite)

    def _wanted(self, entry: EngineCacheEntry, own_names: Collection[str]) -> dict[str, str]:
        """
        Return the file's own name of each output that is published or ruled, by canonical name.

        :param own_names: of all outputs of the file.
        """
        artefact = artefact_of(entry, self.label)
        names = {spec.name: artefact.own_name(spec.name) if artefact else spec.name for spec in entry.model.outputs}
        names = names or {name: name for name in own_names}
        asked = {*self._config.output_tensors, *(rule.output for rule in entry.model.rules)}
        if not self._config.output_tensors or not asked <= names.keys():
            # Where the model lacks one that is asked for, the setting is refused later, with the names of all.
            return names
        return {name: own for name, own in names.items() if name in asked}

    def _non_finite(self, entry: EngineCacheEntry) -> frozenset[str]:
        """Return the canonical outputs in which NaN and infinity mean something."""
        return frozenset((*self._config.allow_non_finite, *entry.model.allow_non_finite))

    def _relax(self, bound: _Bound[EngineT]) -> None:
        """Have the outputs that surprised come in any shape."""
        unsure = self._unsure(bound.engine)
        bound.outputs = tuple(
            dataclasses.replace(spec, shape=None) if bound.own_outputs[spec.name] in unsure else spec
            for spec in bound.outputs
        )

    def _bound(self, handle: EngineHandle) -> _Bound[EngineT]:
        bound = self._engines.get(handle) if isinstance(handle, _Handle) else None
        if bound is None:
            raise InferenceError(
                f'{self.label}: the engine handle was released or belongs to another runtime.',
                remedy='Use the handle that this runtime returned, before its release.',
            )
        return bound

    def _infer(
        self, bound: _Bound[EngineT], inputs: Mapping[str, NDArray]
    ) -> tuple[dict[str, NDArray], tuple[int, int]]:
        """Return the outputs, and when the engine's run began and ended by the steady clock."""
        arrays = bound.own_arrays(inputs)
        began_ns = time.monotonic_ns()
        try:
            found = self._run(bound.engine, arrays)
        except C7Error:
            raise
        except Exception as error:
            raise InferenceError(
                f'{self.label} failed the request: {error}', remedy='The next runtime of the chain can serve it.'
            ) from error
        ended_ns = time.monotonic_ns()
        outputs = {name: found[own] for name, own in bound.own_outputs.items() if own in found}
        if any(outputs.get(name) is not array for name, (array, _) in bound.answers.items()) or not bound.answers:
            self._relax(bound)
            check_arrays('output', bound.outputs, outputs)
            bound.answers.clear()
            for spec in bound.outputs:
                array = outputs[spec.name]
                bound.answers[spec.name] = array, _read_only(array)
        if not self._found_finite(bound.engine):
            check_finite({name: array for name, array in outputs.items() if name in bound.finite})
        return {name: view for name, (_, view) in bound.answers.items()}, (began_ns, ended_ns)

    def _give_back(self, engine: EngineT) -> None:
        try:
            self._free(engine)
        except Exception:
            # The handle is gone and its caller can do nothing about a vendor's failing destructor.
            _log.exception('%s: freeing an engine failed', self.label)

    def _settle(self, engine: EngineT) -> Sequence[str]:
        """Do what wants an engine that has run, as capturing a graph; return remarks for its facts."""
        return ()

    def _place(self, engine: EngineT, arrays: Mapping[str, NDArray]) -> None:
        """Read later requests from ``arrays`` and write answers there, by the file's own names, where that helps."""

    def _witness(self, engine: EngineT, facts: EngineFacts) -> EngineFacts:
        """Return the facts as the warm-up run has shown them to be, or raise to refuse the engine."""
        return facts

    def _compare(self, engine: EngineT, probes: Iterator[dict[str, NDArray]]) -> Sequence[str]:
        """
        Compare the engine's runs with plainer ones on these requests; return remarks for its facts, or refuse it.

        :param probes: requests by the file's own names; made when asked for.
        """
        return ()

    def _unsure(self, engine: EngineT) -> Collection[str]:
        """Return the outputs, by the file's own names, that have come in another shape than was declared."""
        return ()

    def _found_finite(self, engine: EngineT) -> bool:
        """Say whether the device has seen every output of the last run to be finite; False has the values read here."""
        return False

    @abstractmethod
    def _choose(self, artefacts: Sequence[Artefact]) -> Artefact | None:
        """Return the artefact to load, of those that the bundle has for this strategy, or None."""

    @abstractmethod
    def _load(self, entry: EngineCacheEntry) -> LoadedEngine[EngineT]:
        """Load ``entry`` without running it."""

    @abstractmethod
    def _run(self, engine: EngineT, inputs: Mapping[str, NDArray]) -> Mapping[str, NDArray]:
        """Run checked, C-contiguous inputs and return the outputs, both by the file's own names."""

    @abstractmethod
    def _free(self, engine: EngineT) -> None:
        """Give back what ``_load`` took; called once for each loaded engine."""


def _relaxations(bound: _Bound[Any], entry: EngineCacheEntry) -> Iterator[str]:
    """Say which outputs may come in another shape than the bundle gives them."""
    promised = {spec.name: spec.shape for spec in entry.model.outputs}
    for spec in bound.outputs:
        shape = promised.get(spec.name)
        if shape is not None and None in (spec.shape or (None,)) and None not in shape:
            yield (
                f'model.json gives output {spec.name!r} the fixed shape {shape}, but the network can return other '
                'shapes, which are accepted too. Write null for each axis that varies.'
            )


def _probes(bound: _Bound[Any]) -> Iterator[dict[str, NDArray]]:
    """Return requests of different kinds by the file's own names: noise, flat ones, and a few bright places."""
    for inputs in probe_inputs(bound.inputs):
        yield {own: inputs[name] for name, own in bound.own_inputs.items()}


def _read_only(array: NDArray) -> NDArray:
    view = array.view()
    view.flags.writeable = False
    return view
