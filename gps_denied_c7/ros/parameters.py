"""The node's parameters: declared, checked against each other when they are set, frozen, and restored (N-10)."""

from __future__ import annotations

import difflib
import math
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.exceptions import (
    InvalidParameterTypeException,
    InvalidParameterValueException,
    InvalidTopicNameException,
)
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.validate_topic_name import validate_topic_name

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error, ConfigError
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
from gps_denied_c7.monitoring.thermal_policy import ThermalPolicy
from gps_denied_c7.pipeline.model_fit import ImageSettings
from gps_denied_c7.ros.parameter_table import PARAMETERS, TOPIC_TYPES, WITH_MODEL, Effect, ParameterDeclaration
from gps_denied_c7.text import plain

__all__ = ['LiveSettings', 'NodeParameters', 'NodeSettings', 'settings_from']

_BY_NAME = {declaration.name: declaration for declaration in PARAMETERS}

_DECLARED = {declaration.name: declaration.default for declaration in PARAMETERS}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings(ImageSettings):
    """
    Hold what one configure works with.

    :param image_topics: as given, not yet resolved.
    :param image_topic_types: one of TOPIC_TYPES for each of them.
    """

    image_topics: tuple[str, ...]
    image_topic_types: tuple[str, ...]
    decoder_memory_mb: int
    decode_timeout_ms: float
    model_path: str
    config: C7InferenceConfig

    def preprocessing_for(self, spec: PreprocessingSpec) -> PreprocessingSpec:
        """
        Return ``spec`` with the overrides.

        :raises ConfigError: naming the parameter.
        """
        try:
            return spec.replace(**self.preprocessing)
        except ConfigError as error:
            message = error.message.partition(': ')[2]
            raise ConfigError(f'preprocess.{error.name}', message, remedy=error.remedy) from error


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
        if name.startswith('preprocess.')
        and not _same_value(value, _DECLARED[name])
        and not _is_unset_mean(name, value)
    }
    for name, value in overrides.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ConfigError(f'preprocess.{name}', f'{value} is not finite.')
    live = LiveSettings(**{name: values[name] for name in LiveSettings.__dataclass_fields__})
    if any(isinstance(value, float) and math.isnan(value) for value in astuple(live)):
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
        image_topics=topics,
        image_topic_types=_topic_types(values['image_topic_types'], len(topics)),
        decoder_memory_mb=values['decoder_memory_mb'],
        decode_timeout_ms=values['decode_timeout_ms'],
        model_path=values['model_path'],
        config=config,
        preprocessing=overrides,
        output_tensors=config.output_tensors,
        allow_non_finite=config.allow_non_finite,
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


def _is_unset_mean(name: str, value: Any) -> bool:
    """Return whether a mean is the earlier default, NaN, which stands for the model's own mean."""
    return name == 'preprocess.mean' and len(value) == 1 and math.isnan(value[0])


def _same_value(value: Any, other: Any) -> bool:
    """Return whether two plain values are equal, where not-a-number equals itself."""
    return bool(value == other) or repr(value) == repr(other)


class NodeParameters:
    """
    Own the node's parameters.

    A value of the wrong type or out of range in the parameter file must not end the process: the
    default is declared in its place and ``configure`` is refused until the value is set.

    :param fixed: says why the parameter of that name, which is not live, cannot be set now, or None when it can.
    :param on_live: called with the new live settings after each change.
    :param on_model: called with each new ``model_path`` that is valid so far, and the other settings, before it is set;
        raises a C7Error to refuse it.
    :param on_failure: called with the callback's name and an unexpected exception.
    """

    def __init__(
        self,
        node: Node,
        *,
        fixed: Callable[[str], str | None],
        on_live: Callable[[LiveSettings], None],
        on_model: Callable[[NodeSettings], None],
        on_failure: Callable[[str, Exception], None],
    ) -> None:
        self._node = node
        self._fixed = fixed
        self._on_live = on_live
        self._on_model = on_model
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._restoring: int | None = None
        self._broken: dict[str, ConfigError] = {}
        # Private, and the same from Humble to Kilted; there is no other way to see start values as they were given.
        self._given: Mapping[str, Parameter] = getattr(node, '_parameter_overrides', {})
        for declaration in PARAMETERS:
            self._declare(declaration)
        self._values = {declaration.name: self._value(declaration.name) for declaration in PARAMETERS}
        self._warn_of_strangers()
        for error in self._broken.values() if not self._values['autostart'] else ():
            # Otherwise the configure that follows at once logs it.
            node.get_logger().error(str(error))
        node.add_on_set_parameters_callback(self._on_set)

    def settings(self) -> NodeSettings:
        """
        Return what a configure works with now.

        :raises ConfigError: a value that cannot be used, naming the parameter.
        """
        with self._lock:
            for error in self._broken.values():
                raise error.with_traceback(None)
            return settings_from(self._values)[0]

    def values(self) -> dict[str, Any]:
        """Return the value of each parameter, whether it can be used or not."""
        with self._lock:
            return dict(self._values)

    def live(self) -> LiveSettings:
        """Return the live settings; the defaults' where the start values cannot be used together."""
        with self._lock:
            values = {name: self._values[name] for name in LiveSettings.__dataclass_fields__}
            return LiveSettings(**values)

    def restore_model(self, settings: NodeSettings) -> None:
        """
        Reset the parameters of the model to earlier values, in any lifecycle state and with no other effect.

        :raises ConfigError: they cannot be set.
        """
        values = {
            'model_path': settings.model_path,
            'output_tensors': list(settings.output_tensors) or [''],
            'allow_non_finite': list(settings.allow_non_finite) or [''],
        }
        parameters = [Parameter(name, value=value) for name, value in values.items()]
        self._restoring = threading.get_ident()
        try:
            result = self._node.set_parameters_atomically(parameters)
        finally:
            self._restoring = None
        if not result.successful:
            raise ConfigError('model_path', f'could not be reset to {settings.model_path!r}: {result.reason}')

    def _declare(self, declaration: ParameterDeclaration) -> None:
        descriptor = declaration.descriptor()
        value = declaration.default
        try:
            self._node.declare_parameter(declaration.name, value, descriptor)
        except (InvalidParameterTypeException, InvalidParameterValueException):
            self._broken[declaration.name] = self._wrong_start(declaration)
            self._node.declare_parameter(declaration.name, value, descriptor, ignore_override=True)
        if _is_unset_mean(declaration.name, self._value(declaration.name)):
            # From a parameter file of an earlier version; NaN in a file dumped now could not be read back.
            self._node.set_parameters([Parameter(declaration.name, value=value)])

    def _wrong_start(self, declaration: ParameterDeclaration) -> ConfigError:
        """Return what is wrong with a start value of another type or out of range, and how it is written."""
        name, given = declaration.name, _plain(self._given[declaration.name].value)
        right = declaration.written(given)
        remedy = f'Start with -p {shlex.quote(f"{name}:={right}")}, or write {name}: {right} in a parameter file'
        if declaration.effect is not Effect.NEVER:
            set_it = ['ros2', 'param', 'set', self._node.get_fully_qualified_name(), name, right]
            remedy += f'; while the node runs: {shlex.join(set_it)}'
        limits = ' from {} to {}'.format(*declaration.limits) if declaration.limits else ''
        kind = declaration.type.name.lower().replace('_', ' ')
        return ConfigError(name, f'the start value {given!r} is not a valid {kind}{limits}.', remedy=remedy)

    def _warn_of_strangers(self) -> None:
        """Say which start values name no parameter: ROS ignores them silently, typing errors among them."""
        strangers = []
        for name in self._given:
            # What others declare: rclpy itself, and each subscription's QoS later on.
            if not self._node.has_parameter(name) and not name.startswith('qos_overrides.'):
                (meant,) = difflib.get_close_matches(name, _BY_NAME, 1) or ('',)
                strangers.append(f'{name} (did you mean {meant}?)' if meant else name)
        if strangers:
            self._node.get_logger().warning(f'not parameters of this node, and ignored: {", ".join(sorted(strangers))}')

    def _value(self, name: str) -> Any:
        value = self._node.get_parameter_or(name, Parameter(name)).value
        return _plain(value)

    def _on_set(self, parameters: list[Parameter]) -> SetParametersResult:
        try:
            self._apply(parameters)
        except C7Error as error:
            return SetParametersResult(successful=False, reason=plain(error))
        except Exception as error:
            # If raised, the client would get no result.
            self._on_failure('on-set-parameters callback', error)
            return SetParametersResult(successful=False, reason=plain(f'{type(error).__name__}: {error}'))
        return SetParametersResult(successful=True)

    def _apply(self, parameters: list[Parameter]) -> None:
        ours = {parameter.name: _plain(parameter.value) for parameter in parameters if parameter.name in _BY_NAME}
        if not ours:
            return
        changed = {name: value for name, value in ours.items() if not _same_value(value, self._values[name])}
        restoring = self._restoring == threading.get_ident()
        with_model = {name for name in changed if name in WITH_MODEL and 'model_path' in ours}
        for name in changed:
            asked = 'model_path' if name in with_model else name
            if _BY_NAME[name].effect is not Effect.AT_ONCE and not restoring and (why := self._fixed(asked)):
                raise ConfigError(name, why)
        with self._lock:
            values = {**self._values, **ours}
            try:
                settings = settings_from(values)[0]
            except ConfigError:
                # Start values that were wrong before must not keep a right one from being set.
                if _usable(self._values) or not _usable({**_DECLARED, **ours}):
                    raise
            else:
                if ('model_path' in changed or with_model) and not restoring:
                    self._on_model(settings)
            self._values = values
            self._broken = {name: problem for name, problem in self._broken.items() if name not in ours}
        self._on_live(self.live())


def _usable(values: Mapping[str, Any]) -> bool:
    try:
        settings_from(values)
    except ConfigError:
        return False
    return True


def _plain(value: Any) -> Any:
    """Return ``value`` with rclpy's arrays as lists."""
    return value if value is None or isinstance(value, bool | int | float | str) else list(value)
