"""Every parameter of the node, declared once: type, range, unit, and when a change takes effect (N-10)."""

from __future__ import annotations

import difflib
import json
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException, InvalidTopicNameException
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.validate_topic_name import validate_topic_name

from gps_denied_c7.config import DEFAULT_CHAIN, ISOLATIONS, RUNTIME_LABELS, C7InferenceConfig
from gps_denied_c7.errors import C7Error, ConfigError
from gps_denied_c7.image.preprocess import (
    LETTERBOX_ANCHORS,
    LETTERBOX_SCALINGS,
    Interpolation,
    PreprocessingSpec,
    ResizeMode,
)
from gps_denied_c7.monitoring.thermal_policy import ThermalPolicy
from gps_denied_c7.text import plain

__all__ = [
    'PARAMETERS',
    'TOPIC_TYPES',
    'WITH_MODEL',
    'LiveSettings',
    'NodeParameters',
    'NodeSettings',
    'ParameterDeclaration',
    'parameter_table',
    'settings_from',
]

Type = Parameter.Type

_DEFAULTS = C7InferenceConfig()


@dataclass(frozen=True, slots=True)
class ParameterDeclaration:
    """
    Declare one parameter.

    :param default: of the preprocess.* parameters it stands for the model bundle's own value. They are not left
        unset instead, because rclpy answers a get_parameters call that names an unset one with nothing at all, and
        ``ros2 param dump`` asks for all in one call.
    :param live: a change takes effect at once; otherwise with the next configure.
    :param swapped: a change takes effect while active too, in the background, or is taken back.
    :param with_model: likewise where ``model_path`` is set in the same request.
    :param limits: least and greatest value of a number.
    :param read_only: only settable when the node starts.
    """

    name: str
    type: Parameter.Type
    default: Any
    description: str
    live: bool = False
    limits: tuple[float, float] | None = None
    constraints: str = ''
    read_only: bool = False
    swapped: bool = False
    with_model: bool = False

    def descriptor(self) -> ParameterDescriptor:
        """Return the descriptor that ``ros2 param describe`` shows."""
        effect = 'Takes effect with the next configure.'
        if self.read_only:
            effect = 'Read-only.'
        elif self.live:
            effect = 'Takes effect at once.'
        elif self.swapped:
            effect = 'Takes effect in the background while active, otherwise with the next configure.'
        elif self.with_model:
            effect = 'While active, set it together with model_path; otherwise it takes effect with the next configure.'
        descriptor = ParameterDescriptor(
            description=f'{self.description} {effect}',
            additional_constraints=self.constraints,
            read_only=self.read_only,
            type=self.type.value,
        )
        if self.limits and self.type is Type.INTEGER:
            least, most = map(int, self.limits)
            descriptor.integer_range = [IntegerRange(from_value=least, to_value=most, step=0)]
        elif self.limits:
            low, high = map(float, self.limits)
            descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
        return descriptor


_HOUR_MS = 3_600_000.0
TOPIC_TYPES = ('auto', 'raw', 'compressed')
"""What ``image_topic_types`` may say of a topic."""
# Not NaN, which `ros2 param load` cannot read back; no mean of any pixel values.
_NO_MEAN = -1e6
_STRATEGIES = f'Each of {", ".join(RUNTIME_LABELS)}, at most once.'

PARAMETERS: tuple[ParameterDeclaration, ...] = (
    ParameterDeclaration(
        'image_topics', Type.STRING_ARRAY, ['camera/image_raw'],
        'Image topics to answer, sensor_msgs/Image or CompressedImage.', constraints='At least one, none twice.',
    ),
    ParameterDeclaration(
        'image_topic_types', Type.STRING_ARRAY, ['auto'],
        'Types of image_topics, in their order, or one for all of them. raw: Image; compressed: CompressedImage; auto: '
        "the publisher's type, and before there is a publisher, compressed where the name ends in /compressed.",
        constraints=f'Each one of {", ".join(TOPIC_TYPES)}.',
    ),
    ParameterDeclaration(
        'decoder_memory_mb', Type.INTEGER, 256,
        'Memory that the decoder process of a compressed topic may use for one image, MiB; an image that needs more is '
        'refused.', limits=(16, 65536),
    ),
    ParameterDeclaration(
        'decode_timeout_ms', Type.DOUBLE, 1000.0,
        'A compressed image that is not decoded within this time is refused, and its decoder restarted; milliseconds.',
        limits=(10.0, 60_000.0),
    ),
    ParameterDeclaration(
        'model_path', Type.STRING, '',
        'Model bundle (a directory with model.json) or a bare .onnx file; ~ is the home directory. While active, '
        'another one is read, loaded and proven beside the one that serves and then takes over; where it fails, the '
        'value goes back.', swapped=True,
    ),
    ParameterDeclaration(
        'output_tensors', Type.STRING_ARRAY, [''],
        'Names of the outputs that are published; empty: all. Publishing unused outputs costs milliseconds for each '
        '6 MB. An output that is neither published nor ruled by the bundle is not looked at.',
        constraints='None twice.', with_model=True,
    ),
    ParameterDeclaration(
        'allow_non_finite', Type.STRING_ARRAY, [''],
        'Names of the outputs in which NaN and infinity mean something, as in a mask. In any other output that is '
        "published or ruled they fail the request. The bundle's own names are added.",
        constraints='None twice.', with_model=True,
    ),
    ParameterDeclaration(
        'autostart', Type.BOOL, False,
        'Configure and activate at start, and retry until it works: with back-off, or, where only a change can help, '
        'as soon as a file or parameter changes.', read_only=True,
    ),
    ParameterDeclaration(
        'runtime_chain', Type.STRING_ARRAY, list(DEFAULT_CHAIN),
        'Runtime strategies by preference; the ONNX Runtime CPU rung is always last.', constraints=_STRATEGIES,
    ),
    ParameterDeclaration(
        'disabled_runtimes', Type.STRING_ARRAY, [''], 'Runtime strategies switched off.', constraints=_STRATEGIES,
    ),
    ParameterDeclaration(
        'ort_disallow_cpu_fallback', Type.BOOL, _DEFAULTS.ort_disallow_cpu_fallback,
        'Refuse to run on the CPU: the node then has no answer where no GPU works.',
    ),
    ParameterDeclaration(
        'build_on_configure', Type.BOOL, _DEFAULTS.build_on_configure,
        'Build missing engines while configuring, which takes minutes. Not for flight.',
    ),
    ParameterDeclaration(
        'builder_optimization_level', Type.INTEGER, _DEFAULTS.builder_optimization_level,
        "How long TensorRT's builder searches for fast kernels: 3 takes half as long again as 2, for engines that are "
        'some percent faster. An engine that is there already is taken, whatever its level.', limits=(0, 5),
    ),
    ParameterDeclaration(
        'engine_cache_dir', Type.STRING, str(_DEFAULTS.engine_cache_dir),
        'Directory of the engine files; ~ is the home directory.',
    ),
    ParameterDeclaration(
        'ort_trt_cache_dir', Type.STRING, str(_DEFAULTS.ort_trt_cache_dir),
        'Directory where ONNX Runtime keeps the engines of its TensorRT provider; ~ is the home directory.',
        constraints='Not empty.',
    ),
    ParameterDeclaration(
        'gpu_memory_budget_bytes', Type.INTEGER, _DEFAULTS.gpu_memory_budget_bytes,
        'GPU memory for all engines together, bytes: the serving one, its standby, one that is to take over. An engine '
        'over the budget is refused; the standby is unloaded first.',
        limits=(64 << 20, 1 << 40),
    ),
    ParameterDeclaration(
        'gpu_fault_window_s', Type.DOUBLE, _DEFAULTS.gpu_fault_window_s,
        'Failures of two different GPU rungs within this many seconds mean that the GPU is lost.',
        limits=(0.1, 3600.0),
    ),
    ParameterDeclaration(
        'isolation', Type.STRING, _DEFAULTS.isolation,
        'process: each engine runs in a worker process, whose death or hang costs no frame; none: all in the node.',
        constraints=f'One of {", ".join(ISOLATIONS)}.',
    ),
    ParameterDeclaration(
        'hot_standby', Type.BOOL, _DEFAULTS.hot_standby,
        'Keep a second engine loaded, which answers when the first one does not. Needs isolation process.',
    ),
    ParameterDeclaration(
        'spare_worker', Type.BOOL, _DEFAULTS.spare_worker,
        'Keep a worker process ready that has imported ONNX Runtime, about 60 MB, so that the next engine is loaded '
        'sooner. Needs isolation process.',
    ),
    ParameterDeclaration(
        'load_timeout_s', Type.DOUBLE, _DEFAULTS.load_timeout_s,
        'A worker must have loaded its engine, or begun to build it, within this many seconds; one step of a build may '
        'take ten minutes. A frame that all engines are late for waits for such a load.',
        limits=(0.1, 3600.0),
    ),
    ParameterDeclaration(
        'inference_deadline_ms', Type.DOUBLE, _DEFAULTS.inference_deadline_ms,
        'The standby answers in place of an engine that takes longer than this, milliseconds; three times its own '
        'warm-up where that is longer.', limits=(1.0, _HOUR_MS),
    ),
    ParameterDeclaration(
        'hang_timeout_ms', Type.DOUBLE, _DEFAULTS.hang_timeout_ms,
        'A worker that does not answer for longer than this is killed, milliseconds; three times the deadline where '
        'that is longer.', limits=(1.0, _HOUR_MS),
    ),
    ParameterDeclaration(
        'configure_budget_s', Type.DOUBLE, _DEFAULTS.configure_budget_s,
        'A worse rung serves where better ones take longer than this to load, seconds; they go on loading beside.',
        limits=(0.1, 3600.0),
    ),
    ParameterDeclaration(
        'promotion_backoff_s', Type.DOUBLE_ARRAY, list(_DEFAULTS.promotion_backoff_s),
        'First and longest pause before a better rung that has failed is loaded again beside the one that serves, '
        'seconds; each is twice the one before, until none was needed for as long as the longest.',
        constraints='[first, longest]',
    ),
    ParameterDeclaration(
        'restart_backoff_s', Type.DOUBLE_ARRAY, list(_DEFAULTS.restart_backoff_s),
        'The same for a chain in which every rung has failed, and for what stands by, seconds; where a frame is late '
        'and nothing stands by, an engine is loaded without it, once in such a pause.',
        constraints='[first, longest]',
    ),
    ParameterDeclaration(
        'cpu_threads', Type.INTEGER, _DEFAULTS.cpu_threads,
        'Threads of one CPU inference; 0 means all cores but one.', limits=(0, 256),
    ),
    ParameterDeclaration(
        'image_cpu_share', Type.DOUBLE, 0.5,
        'Part of the cores that decoding and pre-processing the images of all cameras may use. Each camera that '
        'sends has an equal part; images beyond it are dropped. One that sends alone has no limit. 0: no limit.',
        live=True, limits=(0.0, 1.0),
    ),
    ParameterDeclaration(
        'max_queue_age_ms', Type.DOUBLE, 0.0,
        'Drop a frame that waited longer than this since its reception, milliseconds; 0 never does.',
        live=True, limits=(0.0, _HOUR_MS),
    ),
    ParameterDeclaration(
        'max_frame_age_ms', Type.DOUBLE, 0.0,
        'Drop a frame whose header stamp lies further back in ROS time than this, milliseconds; 0 never does.',
        live=True, limits=(0.0, _HOUR_MS),
    ),
    ParameterDeclaration(
        'max_stamp_ahead_s', Type.DOUBLE, 3600.0,
        'Refuse an image whose header stamp lies further ahead of ROS time than this, seconds; 0 never does.',
        live=True, limits=(0.0, 1e9),
    ),
    ParameterDeclaration(
        'latency_warn_ms', Type.DOUBLE, 0.0,
        'Warn on diagnostics when the p95 from image callback to published tensors exceeds this, '
        'milliseconds; 0 never does.',
        live=True, limits=(0.0, _HOUR_MS),
    ),
    ParameterDeclaration(
        'cpu_wakeup_latency_us', Type.INTEGER, -1,
        'While active, have the kernel keep idle cores awake enough to be back within this, microseconds (PM QoS, '
        '/dev/cpu_dma_latency, for all processes); it costs power, most of all 0; -1: as the system has it.',
        live=True, limits=(-1, 1_000_000),
    ),
    ParameterDeclaration(
        'thermal_policy', Type.STRING, ThermalPolicy.REPORT.value,
        'What heat brings about: off: nothing; report: diagnostics and flight records; shed: fewer frames are '
        'answered too, until it has cooled down.',
        constraints=f'One of {", ".join(policy.value for policy in ThermalPolicy)}.', live=True,
    ),
    ParameterDeclaration(
        'min_rate_hz', Type.DOUBLE, 1.0,
        'Frames a second of each topic that thermal_policy shed answers in any heat, as far as they come.',
        live=True, limits=(0.1, 1000.0),
    ),
    ParameterDeclaration(
        'preprocess.width', Type.INTEGER, 0,
        'Width of the network input, pixels; a bare .onnx that takes any size needs it; 0: from the model.',
        limits=(0, 16384),
    ),
    ParameterDeclaration(
        'preprocess.height', Type.INTEGER, 0,
        'Height of the network input, pixels; a bare .onnx that takes any size needs it; 0: from the model.',
        limits=(0, 16384),
    ),
    ParameterDeclaration(
        'preprocess.resize', Type.STRING, '', 'How images of another size are resized; empty: from the model.',
        constraints=f'One of {", ".join(mode.value for mode in ResizeMode)}.',
    ),
    ParameterDeclaration(
        'preprocess.interpolation', Type.STRING, '',
        'How the pixels of a resized image are made, as in training; empty: from the model.',
        constraints=f'One of {", ".join(mode.value for mode in Interpolation)}.',
    ),
    ParameterDeclaration(
        'preprocess.letterbox_anchor', Type.STRING, '', 'Where the image lies in a letterbox; empty: from the model.',
        constraints=f'One of {", ".join(LETTERBOX_ANCHORS)}.',
    ),
    ParameterDeclaration(
        'preprocess.letterbox_scaling', Type.STRING, '',
        'Whether a letterbox enlarges smaller images (fit) or not (shrink); empty: from the model.',
        constraints=f'One of {", ".join(LETTERBOX_SCALINGS)}.',
    ),
    ParameterDeclaration(
        'preprocess.colour', Type.STRING, '', 'Channels of the network input; empty: from the model.',
        constraints='One of gray, rgb, bgr.',
    ),
    ParameterDeclaration(
        'preprocess.mean', Type.DOUBLE_ARRAY, [_NO_MEAN],
        'Subtracted after scaling, one value or one per channel; [-1000000.0], or [.nan]: from the model.',
    ),
    ParameterDeclaration(
        'preprocess.std', Type.DOUBLE_ARRAY, [0.0],
        'Divides after the mean is subtracted, one value or one per channel; [0.0]: from the model.',
    ),
    ParameterDeclaration(
        'preprocess.scale', Type.DOUBLE, 0.0, 'Factor on pixel values of 0..255; 0: from the model.',
    ),
    ParameterDeclaration(
        'preprocess.layout', Type.STRING, '', 'Axes of the network input; empty: from the model.',
        constraints='One of nchw, nhwc.',
    ),
    ParameterDeclaration(
        'preprocess.pad_value', Type.DOUBLE, -1.0,
        'Pixel value of the border that letterbox adds; -1: from the model.', limits=(-1.0, 255.0),
    ),
)

_BY_NAME = {declaration.name: declaration for declaration in PARAMETERS}
WITH_MODEL = frozenset(declaration.name for declaration in PARAMETERS if declaration.with_model)
"""Parameters that change while the node is active where ``model_path`` is set in the same request."""
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
        """Names of the outputs in which NaN and infinity mean something."""
        return self.config.allow_non_finite

    def check_outputs(self, names: Collection[str]) -> None:
        """
        Refuse a model that lacks an output which is to be published.

        :raises ConfigError: naming ``output_tensors``.
        """
        if unknown := sorted(set(self.output_tensors).difference(names)):
            raise ConfigError('output_tensors', f'the model has no {unknown}.', remedy=f'It has {sorted(names)}.')

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
            raise ConfigError('image_topics', f'{topic!r} is no topic name: {error}.') from error
    overrides = {
        name.removeprefix('preprocess.'): value
        for name, value in values.items()
        if name.startswith('preprocess.') and not _same(value, _DECLARED[name]) and not _is_unset_mean(name, value)
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
    # The bundle's own values are not known yet; any spec tells whether an override can be used at all.
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
        self._broken: dict[str, str] = {}
        for declaration in PARAMETERS:
            self._declare(declaration)
        self._values = {declaration.name: self._value(declaration.name) for declaration in PARAMETERS}
        self._warn_of_strangers()
        node.add_on_set_parameters_callback(self._on_set)

    def settings(self) -> NodeSettings:
        """
        Return what a configure works with now.

        :raises ConfigError: a value that cannot be used, naming the parameter.
        """
        with self._lock:
            for name, problem in self._broken.items():
                raise ConfigError(name, problem, remedy=f'Correct the parameter file, or ros2 param set {name}.')
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
        Take the parameters of the model back to values that they had, in any lifecycle state and with no other effect.

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
            raise ConfigError('model_path', f'could not be taken back to {settings.model_path!r}: {result.reason}')

    @property
    def autostart(self) -> bool:
        """Whether the node is to take itself to active."""
        return bool(self._values['autostart'])

    def _declare(self, declaration: ParameterDeclaration) -> None:
        descriptor = declaration.descriptor()
        value = declaration.default
        try:
            self._node.declare_parameter(declaration.name, value, descriptor)
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            self._broken[declaration.name] = f'the start value cannot be used ({error}).'
            self._node.get_logger().error(f'parameter {declaration.name}: {self._broken[declaration.name]}')
            self._node.declare_parameter(declaration.name, value, descriptor, ignore_override=True)
        if _is_unset_mean(declaration.name, self._value(declaration.name)):
            # From a parameter file of an earlier version; NaN in a file dumped now could not be read back.
            self._node.set_parameters([Parameter(declaration.name, value=value)])

    def _warn_of_strangers(self) -> None:
        """Say which start values name no parameter: ROS ignores them without a word, typing errors among them."""
        strangers = []
        # Private, and the same from Humble to Kilted; there is no other way to see them.
        for name in getattr(self._node, '_parameter_overrides', {}):
            # What others declare: rclpy itself, and each subscription's QoS later on.
            if not self._node.has_parameter(name) and not name.startswith('qos_overrides.'):
                (meant,) = difflib.get_close_matches(name, _BY_NAME, 1) or ('',)
                strangers.append(f'{name} (did you mean {meant}?)' if meant else name)
        if strangers:
            self._node.get_logger().warning(f'no parameter of this node, and ignored: {", ".join(sorted(strangers))}')

    def _value(self, name: str) -> Any:
        value = self._node.get_parameter_or(name, Parameter(name)).value
        return _plain(value)

    def _on_set(self, parameters: list[Parameter]) -> SetParametersResult:
        try:
            self._apply(parameters)
        except C7Error as error:
            return SetParametersResult(successful=False, reason=plain(error))
        except Exception as error:
            # Let out, it would leave the asker without a result.
            self._on_failure('on-set-parameters callback', error)
            return SetParametersResult(successful=False, reason=plain(f'{type(error).__name__}: {error}'))
        return SetParametersResult(successful=True)

    def _apply(self, parameters: list[Parameter]) -> None:
        ours = {parameter.name: _plain(parameter.value) for parameter in parameters if parameter.name in _BY_NAME}
        if not ours:
            return
        changed = {name: value for name, value in ours.items() if not _same(value, self._values[name])}
        restoring = self._restoring == threading.get_ident()
        with_model = {name for name in changed if _BY_NAME[name].with_model and 'model_path' in ours}
        for name in changed:
            asked = 'model_path' if name in with_model else name
            if not _BY_NAME[name].live and not restoring and (why := self._fixed(asked)):
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


def parameter_table() -> str:
    """Return every parameter as a Markdown table."""
    rows = ['| parameter | type | default | |', '|---|---|---|---|']
    for declaration in PARAMETERS:
        default = f'`{json.dumps(declaration.default)}`'
        text = ' '.join(filter(None, (declaration.description, declaration.constraints)))
        effect = ' *At once.*' if declaration.live else ' *Read-only.*' if declaration.read_only else ''
        effect = ' *In the background.*' if declaration.swapped else effect
        effect = ' *In the background, with `model_path`.*' if declaration.with_model else effect
        kind = declaration.type.name.lower().replace('_array', '[]')
        rows.append(f'| `{declaration.name}` | {kind} | {default} | {text}{effect} |')
    return '\n'.join(rows)


def _usable(values: Mapping[str, Any]) -> bool:
    try:
        settings_from(values)
    except ConfigError:
        return False
    return True


def _is_unset_mean(name: str, value: Any) -> bool:
    """Return whether a mean is the earlier default, NaN, which stands for the model's own mean."""
    return name == 'preprocess.mean' and len(value) == 1 and math.isnan(value[0])


def _same(value: Any, other: Any) -> bool:
    """Return whether two plain values are equal, where not-a-number equals itself."""
    return bool(value == other) or repr(value) == repr(other)


def _plain(value: Any) -> Any:
    """Return ``value`` with rclpy's arrays as lists."""
    return value if value is None or isinstance(value, bool | int | float | str) else list(value)
