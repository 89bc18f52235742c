"""The values of the parameters, checked against each other and frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rclpy.exceptions import InvalidTopicNameException
from rclpy.validate_topic_name import validate_topic_name

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import ConfigError
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.monitoring.thermal_policy import ThermalPolicy
from gps_denied_c7.ros.parameter_table import PARAMETERS, TOPIC_TYPES

__all__ = ['DECLARED', 'LiveSettings', 'NodeSettings', 'is_unset_mean', 'same_value', 'settings_from']

DECLARED = {declaration.name: declaration.default for declaration in PARAMETERS}
"""Default values by name."""
_CONFIG_FIELDS = (
    'ort_disallow_cpu_fallback', 'build_on_configure', 'builder_optimization_level', 'engine_cache_dir',
    'ort_trt_cache_dir', 'gpu_memory_budget_bytes', 'gpu_fault_window_s', 'isolation', 'hot_standby', 'spare_worker',
    'load_timeout_s', 'inference_deadline_ms', 'hang_timeout_ms', 'configure_budget_s', 'cpu_threads',
    'promotion_backoff_s', 'restart_backoff_s',
)


@dataclass(frozen=True, slots=True)
class LiveSettings:
    """Hold what may change while the node is active; units as in PARAMETERS."""

    image_cpu_share: float
    max_queue_age_ms: float
    max_frame_age_ms: float
    max_stamp_ahead_s: float
    latency_warn_ms: float
    cpu_wakeup_latency_us: int
    thermal_policy: str
    min_rate_hz: float


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """
    Hold what one configure works with.

    :param image_topics: as given, not yet resolved.
    :param image_topic_types: one of TOPIC_TYPES for each of them.
    :param preprocessing: overrides of the bundle's pre-processing, by PreprocessingSpec field.
    """

    image_topics: tuple[str, ...]
    image_topic_types: tuple[str, ...]
    decoder_memory_mb: int
    decode_timeout_ms: float
    model_path: str
    config: C7InferenceConfig
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output_tensors(self) -> tuple[str, ...]:
        """Names of the outputs that are published, all of them where empty."""
        return self.config.output_tensors

    @property
    def allow_non_finite(self) -> tuple[str, ...]:
        """Names of the outputs in which NaN and infinity are valid."""
        return self.config.allow_non_finite

    def preprocessing_for(self, spec: PreprocessingSpec) -> PreprocessingSpec:
        """
        Return ``spec`` with the overrides.

        :raises ConfigError: naming the parameter.
        """
        try:
            return spec.replace(**self.preprocessing)
        except ConfigError as error:
            raise ConfigError(f'preprocess.{error.name}', error.message.partition(': ')[2]) from error


def settings_from(values: Mapping[str, Any]) -> tuple[NodeSettings, LiveSettings]:
    """
    Check parameter values against each other and freeze them.

    :param values: plain values by parameter name.
    :raises ConfigError: naming the parameter.
    """
    topics = tuple(topic for topic in values['image_topics'] if topic)
    if not topics:
        raise ConfigError('image_topics', 'is empty.', remedy='Name at least one image topic.')
    if len(set(topics)) != len(topics):
        raise ConfigError('image_topics', f'{list(topics)} names a topic twice.')
    for topic in topics:
        try:
            validate_topic_name(topic)
        except InvalidTopicNameException as error:
            raise ConfigError('image_topics', f'{topic!r} is not a topic name: {error}.') from error
    overrides = {
        name.removeprefix('preprocess.'): value
        for name, value in values.items()
        if name.startswith('preprocess.') and not same_value(value, DECLARED[name]) and not is_unset_mean(name, value)
    }
    for name, value in overrides.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ConfigError(f'preprocess.{name}', f'{value} is not finite.')
    live = LiveSettings(**{name: values[name] for name in LiveSettings.__dataclass_fields__})
    settings_of_live = [getattr(live, name) for name in LiveSettings.__dataclass_fields__]
    if any(isinstance(value, float) and math.isnan(value) for value in settings_of_live):
        raise ConfigError('live settings', f'{live} holds a value that is not a number.')
    policies = [policy.value for policy in ThermalPolicy]
    if live.thermal_policy not in policies:
        raise ConfigError('thermal_policy', f'{live.thermal_policy!r} unknown.', remedy=f'Known are {policies}.')
    config = C7InferenceConfig(
        runtime_chain=tuple(label for label in values['runtime_chain'] if label),
        disabled_runtimes=tuple(label for label in values['disabled_runtimes'] if label),
        **{name: values[name] for name in _CONFIG_FIELDS},
        output_tensors=_names('output_tensors', values),
        allow_non_finite=_names('allow_non_finite', values),
    )
    settings = NodeSettings(
        topics,
        _topic_types(values['image_topic_types'], len(topics)),
        values['decoder_memory_mb'],
        values['decode_timeout_ms'],
        values['model_path'],
        config,
        overrides,
    )
    # The bundle's own values are not known yet; any spec shows whether an override can be used at all.
    settings.preprocessing_for(PreprocessingSpec(width=64, height=64, colour='rgb'))
    return settings, live


def _topic_types(given: Sequence[str], topics: int) -> tuple[str, ...]:
    types = tuple(name for name in given if name) or ('auto',)
    if unknown := sorted(set(types).difference(TOPIC_TYPES)):
        raise ConfigError('image_topic_types', f'{unknown} unknown.', remedy=f'Known are {list(TOPIC_TYPES)}.')
    if len(types) not in (1, topics):
        raise ConfigError(
            'image_topic_types',
            f'has {len(types)} types for {topics} image_topics.',
            remedy='Give one for each of image_topics, in their order, or one for all of them.',
        )
    return types * topics if len(types) == 1 else types


def _names(parameter: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    names = tuple(name for name in values[parameter] if name)
    if len(set(names)) != len(names):
        raise ConfigError(parameter, f'{list(names)} names an output twice.')
    return names


def is_unset_mean(name: str, value: Any) -> bool:
    """Return whether a mean is the earlier default, NaN, which stands for the model's own mean."""
    return name == 'preprocess.mean' and len(value) == 1 and math.isnan(value[0])


def same_value(value: Any, other: Any) -> bool:
    """Return whether two plain values are equal, where not-a-number equals itself."""
    return bool(value == other) or repr(value) == repr(other)
