"""The model from configure to cleanup: loaded, replaced by a swap, released."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gps_denied_c7.errors import C7Error, ConfigError, InferenceError
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.pipeline.chain_factory import ChainFactory
from gps_denied_c7.pipeline.model_fit import fit_bundle, fit_model, read_bundle
from gps_denied_c7.pipeline.pipeline import ServedModel
from gps_denied_c7.ros.parameters import NodeSettings

__all__ = ['Loaded', 'LoadedModel']

_ABANDON_S = 0.2


@dataclass(frozen=True, slots=True)
class Loaded:
    """
    Hold what one configure has loaded.

    :param topics: resolved names of the image topics.
    """

    settings: NodeSettings
    topics: tuple[str, ...]
    model: ServedModel


class LoadedModel:
    """
    Own the model that a configure loads and a cleanup frees.

    :param factory: makes its chains; what they share is freed with the model.
    :param logger: returns the node's logger.
    """

    def __init__(self, factory: ChainFactory, logger: Callable[[], Any]) -> None:
        self._factory = factory
        self._logger = logger
        self.current: Loaded | None = None
        """What is loaded; None before a configure and after a cleanup."""

    def require(self) -> Loaded:
        """
        Return what is loaded.

        :raises C7Error: nothing is.
        """
        if self.current is None:
            raise C7Error('no model is loaded.', remedy='Run the configure transition first.')
        return self.current

    def on_configure(self, settings: NodeSettings, resolve: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Loaded:
        """
        Load and self-test the first usable rung of the model that the settings name.

        :param resolve: returns the full names of topics, or raises ConfigError.
        :raises C7Error: it cannot be served; then nothing is loaded.
        """
        if not settings.model_path:
            raise ConfigError('model_path', 'is not set.', remedy='Name a model bundle or an .onnx file.')
        bundle = read_bundle(settings.model_path, limit_s=settings.config.load_timeout_s)
        bundle = fit_bundle(bundle, settings)
        topics = resolve(settings.image_topics)
        self._factory.configure(settings.config)
        chain = self._factory.make(bundle, settings.config)
        try:
            self._factory.load(chain)
            model = fit_model(bundle, chain, settings)
        except BaseException:
            chain.release()
            self._factory.close()
            raise
        self.current = Loaded(settings, topics, model)
        return self.current

    def on_cleanup(self) -> None:
        """Free the model's engines and what its chains share; safe to repeat."""
        loaded, self.current = self.current, None
        if loaded is not None:
            try:
                loaded.model.chain.release()
            except C7Error as error:
                self._logger().error(str(error))
        self._factory.close()

    def make_chain(self, bundle: ModelBundle, settings: NodeSettings) -> RuntimeChain:
        """Return a chain for another model; engines are not built in flight (F-5)."""
        return self._factory.make(bundle, dataclasses.replace(settings.config, build_on_configure=False))

    def swapped(self, settings: NodeSettings, model: ServedModel) -> None:
        """Note the model that answers from now on, which the next cleanup frees."""
        self.current = dataclasses.replace(self.require(), settings=settings, model=model)

    def abandon_frame(self) -> None:
        """End the engine that does not answer: a worker can be ended, a thread of this process cannot."""
        loaded = self.current
        if loaded is not None:
            self._logger().warning('the current frame was not answered in time and is abandoned')
            with contextlib.suppress(InferenceError):
                loaded.model.chain.release(_ABANDON_S)
