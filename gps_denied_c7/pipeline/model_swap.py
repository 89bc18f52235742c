"""Another model in place of the one that serves, while it serves: load beside, shadow, hand over, free (N-10)."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from gps_denied_c7.errors import C7Error, ConfigError, InferenceError
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.policy import SHADOWED_FRAMES
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.pipeline.model_fit import ImageSettings, fit_bundle, fit_model, read_bundle
from gps_denied_c7.pipeline.pipeline import InferenceThread, ServedModel

__all__ = ['ModelSwapper', 'SwapPhase', 'SwapStatus']

_NO_FRAME_S = 5.0
_ACCEPTED_S = 1.0
_KILL_S = 0.4
_LOOK_S = 0.02
_FRAME_S = 0.1
_READ_S = 60.0
# Linux takes no longer one.
_LONGEST_PATH = 4096

_log = logging.getLogger(__name__)


class SwapPhase(str, Enum):
    """How far a swap is, or how it ended."""

    LOADING = 'loading'
    SHADOWING = 'shadowing'
    HANDING_OVER = 'handing over'
    SWAPPED = 'swapped'
    FAILED = 'failed'
    CANCELLED = 'cancelled'


@dataclass(frozen=True, slots=True)
class SwapStatus:
    """
    Describe the latest swap.

    :param path: of the new model.
    :param reason: why the old model goes on serving, empty otherwise.
    """

    path: str
    phase: SwapPhase
    reason: str = ''

    @property
    def under_way(self) -> bool:
        """Whether it has not ended yet."""
        return self.phase in (SwapPhase.LOADING, SwapPhase.SHADOWING, SwapPhase.HANDING_OVER)

    @property
    def unsuccessful(self) -> bool:
        """Whether it ended with the old model serving."""
        return self.phase in (SwapPhase.FAILED, SwapPhase.CANCELLED)


class SwapOwner(Protocol):
    """What the swapper asks of the node; called from the swap's thread, except where :meth:`ModelSwapper.stop` says."""

    def make_chain(self, bundle: ModelBundle, settings: Any) -> RuntimeChain:
        """Return a chain for ``bundle`` that is not loaded yet."""

    def path_accepted(self, path: str) -> bool:
        """Return whether ``path`` has become the value of the parameter; never waits."""

    def model_swapped(self, model: ServedModel, settings: Any) -> None:
        """Take note that ``model`` answers from now on, as ``settings`` say."""

    def keep_model(self) -> None:
        """Take the parameters back: the model that answered before still does."""

    def swap_changed(self, status: SwapStatus) -> None:
        """Show ``status``."""

    def record(self, kind: str, **payload: object) -> None:
        """Write a flight record."""


class _SwapCancelledError(C7Error):
    """The streams are being closed."""


@dataclass(eq=False, slots=True)
class _Swap:
    """
    One swap under way.

    :param bundle: the new one, once it is read.
    :param chain: of the new model until it is handed over; another thread may release it to end its load.
    :param model: the new one, once it answers.
    """

    path: str
    previous: ServedModel
    settings: ImageSettings
    previous_settings: ImageSettings
    started: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    bundle: ModelBundle | None = None
    chain: RuntimeChain | None = None
    model: ServedModel | None = None
    concluded: bool = False
    thread: threading.Thread | None = None


class ModelSwapper:
    """
    Swap the model of an InferenceThread, in a thread of its own and one at a time, until it is stopped.

    The new model is loaded and self-tested beside the old one, answers live frames that reach no consumer, takes over
    between two frames, and only then is the old one freed. Whatever fails before leaves the old one as it is.

    :param served: the model that answers now.
    :param settings: what is asked of the model that answers now.
    :param no_frame_s: seconds to wait for a live frame.
    :param read_s: seconds in which a model must have been read, its engines left out.
    """

    def __init__(
        self,
        served: ServedModel,
        inference: InferenceThread,
        owner: SwapOwner,
        settings: ImageSettings,
        *,
        no_frame_s: float = _NO_FRAME_S,
        read_s: float = _READ_S,
    ) -> None:
        self._served = served
        self._inference = inference
        self._owner = owner
        self._settings = settings
        self._no_frame_s = no_frame_s
        self._read_s = read_s
        self._lock = threading.Lock()
        self._swap: _Swap | None = None
        self._stopped = False

    def begin(self, path: str, settings: ImageSettings) -> None:
        """
        Have the model at ``path`` swapped in; nothing is read here, since a disk or mount may not answer.

        :param settings: what is asked of it.
        :raises ConfigError: it is refused; nothing has been begun.
        """
        if not path:
            raise ConfigError('model_path', 'is empty.', remedy='Name a model bundle or an .onnx file.')
        if '\0' in path or len(path) > _LONGEST_PATH:
            raise ConfigError('model_path', f'{path[:80]!r}… is not a path.', remedy='Correct it.')
        with self._lock:
            self._require_free()
            swap = _Swap(path, self._served, settings, self._settings)
            swap.thread = threading.Thread(target=self._run, args=(swap,), name='c7-model-swap', daemon=True)
            self._swap = swap
            try:
                swap.thread.start()
            except BaseException:
                self._swap = None
                raise

    def stop(self, timeout_s: float) -> bool:
        """
        Refuse further swaps and cancel the one under way, killing a load in a worker.

        :return: False where a load in this process still runs after ``timeout_s``; what it loads is freed
            as soon as it returns, and its outcome has been reported from the calling thread.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._stopped = True
            swap = self._swap
        if swap is None or swap.thread is None:
            return True
        swap.cancelled.set()
        while swap.thread.is_alive() and time.monotonic() < deadline:
            with self._lock:
                # Again and again: the load may just be between two workers.
                if swap.chain is not None:
                    _release(swap.chain, _KILL_S)
            swap.thread.join(_LOOK_S)
        if swap.thread.is_alive():
            _log.error('the swap to %s still runs after %.1f s; its thread keeps running.', swap.path, timeout_s)
            self._conclude(swap, _SwapCancelledError('the streams were closed.'))
            return False
        return True

    def _require_free(self) -> None:
        if self._stopped:
            raise ConfigError('model_path', 'cannot change while the streams are being closed.')
        if (swap := self._swap) is not None:
            raise ConfigError(
                'model_path',
                f'a swap to {swap.path} is under way.',
                remedy='Wait for its record c7.model_swapped, or deactivate.',
            )

    def _run(self, swap: _Swap) -> None:
        error: BaseException | None = None
        try:
            self._replace(swap)
        except BaseException as failure:
            error = failure
            if not isinstance(error, C7Error):
                _log.error('the swap to %s met an unexpected error', swap.path, exc_info=error)
        try:
            unused = swap.chain if swap.model is None else swap.previous.chain
            if unused is not None:
                _release(unused)
            self._conclude(swap, error)
        finally:
            with self._lock:
                self._swap = None

    def _replace(self, swap: _Swap) -> None:
        self._show(swap, SwapPhase.LOADING)
        self._await_accepted(swap)
        bundle = swap.bundle = read_bundle(swap.path, limit_s=self._read_s, cancelled=swap.cancelled)
        if _same_model(bundle, swap.previous.bundle) and _same_outputs(swap.settings, swap.previous_settings):
            raise ConfigError(
                'model_path', f'{swap.path} holds the model that serves already ({bundle.weights_digest}).'
            )
        bundle = swap.bundle = fit_bundle(bundle, swap.settings)
        chain = self._owner.make_chain(bundle, swap.settings)
        with self._lock:
            swap.chain = chain
        _require_wanted(swap)
        chain.load(beside=swap.previous.chain)
        model = fit_model(bundle, chain, swap.settings)
        self._show(swap, SwapPhase.SHADOWING)
        self._shadow(swap, model)
        self._show(swap, SwapPhase.HANDING_OVER)
        with self._lock:
            _require_wanted(swap)
            # From here on no other thread may release it: it may be the one that serves.
            swap.chain = None
        if not self._inference.replace(model, swap.cancelled):
            swap.chain = chain
            _require_wanted(swap)
        swap.model = model
        self._served, self._settings = model, swap.settings
        self._owner.model_swapped(model, swap.settings)

    def _await_accepted(self, swap: _Swap) -> None:
        # A callback further on may still refuse the parameter, and it must not be reverted before it is set.
        deadline = time.monotonic() + _ACCEPTED_S
        while not self._owner.path_accepted(swap.path):
            if time.monotonic() > deadline:
                raise ConfigError('model_path', f'the change to {swap.path} was refused or replaced by another one.')
            time.sleep(_LOOK_S)

    def _shadow(self, swap: _Swap, model: ServedModel) -> None:
        """Answer live frames that reach no consumer; where none come, the proof has to do."""
        deadline = time.monotonic() + self._no_frame_s
        remaining = SHADOWED_FRAMES
        while remaining and time.monotonic() < deadline:
            pixels = self._inference.answered_frame(_FRAME_S)
            _require_wanted(swap)
            if pixels is not None:
                try:
                    model.chain.shadow(model.request(pixels))
                except C7Error as error:
                    _require_wanted(swap)
                    raise InferenceError(
                        f'the new model fails a live frame: {error.message}', remedy=error.remedy
                    ) from error
                remaining -= 1
                deadline = time.monotonic() + self._no_frame_s
        if remaining:
            _log.warning(
                'no frame arrived for %.1f s: %s takes over after its self-test, without live frames.',
                self._no_frame_s,
                swap.path,
            )

    def _show(self, swap: _Swap, phase: SwapPhase, reason: str = '') -> None:
        _require_wanted(swap)
        self._owner.swap_changed(SwapStatus(swap.path, phase, reason))

    def _conclude(self, swap: _Swap, error: BaseException | None) -> None:
        """Report the outcome, once."""
        with self._lock:
            if swap.concluded:
                return
            swap.concluded = True
        phase, reason = SwapPhase.SWAPPED, ''
        # Where it was not even read, all that is known of it is its path.
        name, digest = (swap.bundle.name, swap.bundle.weights_digest) if swap.bundle else ('', '')
        before = swap.previous.bundle
        if swap.model is None:
            phase = SwapPhase.CANCELLED if swap.cancelled.is_set() else SwapPhase.FAILED
            reason = 'the streams were closed meanwhile.' if swap.cancelled.is_set() else _describe(error)
            try:
                self._owner.keep_model()
            except C7Error as failure:
                reason = f'{reason} {failure}'
            level = logging.INFO if phase is SwapPhase.CANCELLED else logging.ERROR
            _log.log(level, 'the swap to %s did not happen, %s continues: %s', swap.path, before.name, reason)
        else:
            models = [(name, digest), (before.name, before.weights_digest)]
            names = [each if name != before.name else f'{each} ({weights[:19]}…)' for each, weights in models]
            _log.info('%s answers in place of %s.', *names)
        self._owner.swap_changed(SwapStatus(swap.path, phase, reason))
        self._owner.record(
            'c7.model_swapped',
            model_name=name,
            model_path=swap.path,
            weights_digest=digest,
            outcome=phase.value,
            previous_weights_digest=before.weights_digest,
            seconds=round(time.monotonic() - swap.started, 3),
            **({'reason': reason} if reason else {}),
        )


def _same_model(bundle: ModelBundle, other: ModelBundle) -> bool:
    def identity(model: ModelBundle) -> tuple[object, ...]:
        return model.weights_digest, model.preprocessing, {artefact.content_sha256 for artefact in model.artefacts}

    return identity(bundle) == identity(other)


def _same_outputs(settings: ImageSettings, other: ImageSettings) -> bool:
    return (settings.output_tensors, settings.allow_non_finite) == (other.output_tensors, other.allow_non_finite)


def _require_wanted(swap: _Swap) -> None:
    if swap.cancelled.is_set():
        raise _SwapCancelledError('the streams are being closed.')


def _release(chain: RuntimeChain, timeout_s: float = 2.0) -> None:
    try:
        chain.release(timeout_s)
    except C7Error as error:
        _log.error('%s', error)


def _describe(error: BaseException | None) -> str:
    return str(error) if isinstance(error, C7Error) else f'{type(error).__name__}: {error}'
