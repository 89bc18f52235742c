"""Every parameter of the node, declared once: type, range, unit, and when a change takes effect (N-10)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.parameter import Parameter

from gps_denied_c7.config import DEFAULT_CHAIN, ISOLATIONS, RUNTIME_LABELS, C7InferenceConfig
from gps_denied_c7.image.preprocess_spec import LETTERBOX_ANCHORS, LETTERBOX_SCALINGS, Interpolation, ResizeMode
from gps_denied_c7.monitoring.thermal_policy import ThermalPolicy

__all__ = ['PARAMETERS', 'TOPIC_TYPES', 'WITH_MODEL', 'Effect', 'ParameterDeclaration', 'parameter_table']

Type = Parameter.Type

_DEFAULTS = C7InferenceConfig()


class Effect(Enum):
    """When a change of a parameter takes effect: in the words of ``ros2 param describe``, and of the table."""

    NEXT_CONFIGURE = 'Takes effect with the next configure.', ''
    AT_ONCE = 'Takes effect at once.', 'At once.'
    IN_BACKGROUND = (
        'Takes effect in the background while active, otherwise with the next configure.',
        'In the background.',
    )
    """Reverted where the node cannot work with it."""
    WITH_MODEL = (
        'While active, set it together with model_path; otherwise it takes effect with the next configure.',
        'In the background, with `model_path`.',
    )
    NEVER = 'Read-only.', 'Read-only.'
    """Only settable when the node starts."""


@dataclass(frozen=True, slots=True)
class ParameterDeclaration:
    """
    Declare one parameter.

    :param default: of the preprocess.* parameters it stands for the model bundle's own value. They are not left
        unset instead, because rclpy answers a get_parameters call that names an unset one with nothing at all, and
        ``ros2 param dump`` asks for all in one call.
    :param limits: least and greatest value of a number.
    """

    name: str
    type: Parameter.Type
    default: Any
    description: str
    effect: Effect = Effect.NEXT_CONFIGURE
    limits: tuple[float, float] | None = None
    constraints: str = ''

    def descriptor(self) -> ParameterDescriptor:
        """Return the descriptor that ``ros2 param describe`` shows."""
        descriptor = ParameterDescriptor(
            description=f'{self.description} {self.effect.value[0]}',
            additional_constraints=self.constraints,
            read_only=self.effect is Effect.NEVER,
            type=self.type.value,
        )
        if self.limits and self.type is Type.INTEGER:
            least, most = map(int, self.limits)
            descriptor.integer_range = [IntegerRange(from_value=least, to_value=most, step=0)]
        elif self.limits:
            low, high = map(float, self.limits)
            descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high, step=0.0)]
        return descriptor

    def written(self, given: Any) -> str:
        """Return how a start value that was given is written as YAML of this type and range; or else the default."""
        kind, _, array = self.type.name.partition('_')
        items = given if isinstance(given, list) else [given]
        try:
            values = [_CONVERSIONS[kind](item) for item in items]
            if self.limits:
                values = [min(max(value, self.limits[0]), self.limits[1]) for value in values]
            texts = [value if isinstance(value, str) else json.dumps(_CONVERSIONS[kind](value)) for value in values]
            return f'[{", ".join(texts)}]' if array else texts[0]
        except (ValueError, IndexError):
            return self.written(self.default)


_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {
    'DOUBLE': float,
    'INTEGER': int,
    'BOOL': lambda value: bool(int(value)),
    'STRING': lambda value: value if isinstance(value, str) and value else json.dumps(str(value)),
}


_HOUR_MS = 3_600_000.0
TOPIC_TYPES = ('auto', 'raw', 'compressed')
"""What ``image_topic_types`` may say of a topic."""
# Not NaN, which `ros2 param load` cannot read back; no mean of any pixel values.
_NO_MEAN = -1e6
_STRATEGIES = f'Each of {", ".join(RUNTIME_LABELS)}, at most once.'

PARAMETERS: tuple[ParameterDeclaration, ...] = (
    ParameterDeclaration(
        'image_topics', Type.STRING_ARRAY, ['camera/image_raw'],
        'Image topics that the node subscribes to, sensor_msgs/Image or CompressedImage.',
        constraints='At least one, each once.',
    ),
    ParameterDeclaration(
        'image_topic_types', Type.STRING_ARRAY, ['auto'],
        'Types of image_topics, in their order, or one for all of them. raw: Image; compressed: CompressedImage; auto: '
        "the publisher's type, and before there is a publisher, compressed where the name ends in /compressed.",
        constraints=f'Each one of {", ".join(TOPIC_TYPES)}.',
    ),
    ParameterDeclaration(
        'decoder_memory_mb', Type.INTEGER, 256,
        'Limit on the memory for decoding one image, MiB. For a raw image it includes the message. An image that needs '
        'more is refused.', limits=(16, 65536),
    ),
    ParameterDeclaration(
        'decode_timeout_ms', Type.DOUBLE, 1000.0,
        'A compressed image that is not decoded within this time is refused; its decoder is restarted; milliseconds.',
        limits=(10.0, 60_000.0),
    ),
    ParameterDeclaration(
        'model_path', Type.STRING, '',
        'Model bundle (a directory with model.json) or a bare .onnx file; ~ is the home directory. While active, '
        'another one is read, loaded and tested beside the one that serves and then replaces it; if it fails, the '
        'value is reset.', effect=Effect.IN_BACKGROUND,
    ),
    ParameterDeclaration(
        'output_tensors', Type.STRING_ARRAY, [''],
        'Names of the outputs that are published; empty: all. Publishing unused outputs costs milliseconds for each '
        '6 MB. An output that is neither published nor compared by a rule of the bundle is not checked.',
        constraints='Each once.', effect=Effect.WITH_MODEL,
    ),
    ParameterDeclaration(
        'allow_non_finite', Type.STRING_ARRAY, [''],
        'Names of the outputs in which NaN and infinity are valid, for example in a mask. In any other output that is '
        "published or compared they fail the request. The bundle's own names are added.",
        constraints='Each once.', effect=Effect.WITH_MODEL,
    ),
    ParameterDeclaration(
        'autostart', Type.BOOL, False,
        'Configure and activate at start, and retry until it works: with back-off, or, if only a change can help, '
        'as soon as a file or parameter changes.', effect=Effect.NEVER,
    ),
    ParameterDeclaration(
        'runtime_chain', Type.STRING_ARRAY, list(DEFAULT_CHAIN),
        'Runtime strategies by preference; the ONNX Runtime CPU rung is always last.', constraints=_STRATEGIES,
    ),
    ParameterDeclaration(
        'disabled_runtimes', Type.STRING_ARRAY, [''], 'Runtime strategies that are not used.', constraints=_STRATEGIES,
    ),
    ParameterDeclaration(
        'ort_disallow_cpu_fallback', Type.BOOL, _DEFAULTS.ort_disallow_cpu_fallback,
        'Refuse to run on the CPU: without a working GPU the node then answers nothing.',
    ),
    ParameterDeclaration(
        'build_on_configure', Type.BOOL, _DEFAULTS.build_on_configure,
        'Build missing engines while configuring, which takes minutes. Do not use in flight.',
    ),
    ParameterDeclaration(
        'builder_optimization_level', Type.INTEGER, _DEFAULTS.builder_optimization_level,
        "How long TensorRT's builder searches for fast kernels: 3 takes 1.5 times as long as 2, for engines that are "
        'a few percent faster. An engine that exists already is used, whatever its level.', limits=(0, 5),
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
        'GPU memory for all engines together, bytes: the serving one, its standby, and one that is to replace it. An '
        'engine over the budget is refused; the standby is unloaded first.',
        limits=(64 << 20, 1 << 40),
    ),
    ParameterDeclaration(
        'gpu_fault_window_s', Type.DOUBLE, _DEFAULTS.gpu_fault_window_s,
        'Failures of two different GPU rungs within this many seconds mean that the GPU is lost.',
        limits=(0.1, 3600.0),
    ),
    ParameterDeclaration(
        'isolation', Type.STRING, _DEFAULTS.isolation,
        'process: each engine runs in a worker process, whose death or hang loses no frame; none: all run in the node.',
        constraints=f'One of {", ".join(ISOLATIONS)}.',
    ),
    ParameterDeclaration(
        'hot_standby', Type.BOOL, _DEFAULTS.hot_standby,
        'Keep a second engine loaded, which answers if the first one fails. Needs isolation process.',
    ),
    ParameterDeclaration(
        'spare_worker', Type.BOOL, _DEFAULTS.spare_worker,
        'Keep a worker process ready that has imported ONNX Runtime, about 60 MB, so that the next engine is loaded '
        'sooner. Needs isolation process.',
    ),
    ParameterDeclaration(
        'load_timeout_s', Type.DOUBLE, _DEFAULTS.load_timeout_s,
        'A worker must have loaded its engine, or begun to build it, within this many seconds; one step of a build may '
        'take ten minutes. If all engines are late, the frame waits for a new one to load.',
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
        'A worse rung serves if better ones take longer than this to load, seconds; they continue loading meanwhile.',
        limits=(0.1, 3600.0),
    ),
    ParameterDeclaration(
        'promotion_backoff_s', Type.DOUBLE_ARRAY, list(_DEFAULTS.promotion_backoff_s),
        'First and longest pause, seconds, before a better runtime that has failed is loaded again in the background. '
        'The pause doubles with each failure, and starts from the first again after a time without failures as long '
        'as the longest.',
        constraints='[first, longest]',
    ),
    ParameterDeclaration(
        'restart_backoff_s', Type.DOUBLE_ARRAY, list(_DEFAULTS.restart_backoff_s),
        'First and longest pause, seconds, before a runtime is loaded again when every runtime has failed, and before '
        'a standby is loaded again. If a frame is late and there is no standby, one engine is loaded before the pause '
        'ends, once per pause.',
        constraints='[first, longest]',
    ),
    ParameterDeclaration(
        'cpu_threads', Type.INTEGER, _DEFAULTS.cpu_threads,
        'Threads of one CPU inference; 0 means all cores but one.', limits=(0, 256),
    ),
    ParameterDeclaration(
        'image_cpu_share', Type.DOUBLE, 0.5,
        'Part of the cores that decoding and pre-processing the images of all cameras may use. Each camera that '
        'sends has an equal part; images beyond it are dropped. A camera that sends alone has no limit. 0: no limit.',
        effect=Effect.AT_ONCE, limits=(0.0, 1.0),
    ),
    ParameterDeclaration(
        'max_queue_age_ms', Type.DOUBLE, 0.0,
        'Drop a frame that waited longer than this since its reception, milliseconds; 0: never.',
        effect=Effect.AT_ONCE, limits=(0.0, _HOUR_MS),
    ),
    ParameterDeclaration(
        'max_frame_age_ms', Type.DOUBLE, 0.0,
        'Drop a frame whose header stamp is older in ROS time than this, milliseconds; 0: never.',
        effect=Effect.AT_ONCE, limits=(0.0, _HOUR_MS),
    ),
    ParameterDeclaration(
        'max_stamp_ahead_s', Type.DOUBLE, 3600.0,
        'Refuse an image whose header stamp is further ahead of ROS time than this, seconds; 0: never.',
        effect=Effect.AT_ONCE, limits=(0.0, 1e9),
    ),
    ParameterDeclaration(
        'latency_warn_ms', Type.DOUBLE, 0.0,
        'Warn on diagnostics when the p95 from image callback to published tensors exceeds this, '
        'milliseconds; 0: never.',
        effect=Effect.AT_ONCE, limits=(0.0, _HOUR_MS),
    ),
    ParameterDeclaration(
        'cpu_wakeup_latency_us', Type.INTEGER, -1,
        'While active, limit the wake-up time of idle cores to this, microseconds (PM QoS, /dev/cpu_dma_latency, for '
        'all processes). Small values cost power, 0 the most; -1: leave the system setting.',
        effect=Effect.AT_ONCE, limits=(-1, 1_000_000),
    ),
    ParameterDeclaration(
        'thermal_policy', Type.STRING, ThermalPolicy.REPORT.value,
        'Reaction to heat. off: none; report: diagnostics and flight records; shed: as report, and fewer frames are '
        'answered until the host has cooled down.',
        constraints=f'One of {", ".join(policy.value for policy in ThermalPolicy)}.', effect=Effect.AT_ONCE,
    ),
    ParameterDeclaration(
        'min_rate_hz', Type.DOUBLE, 1.0,
        'Frames per second of each topic that thermal_policy shed always answers, if that many arrive.',
        effect=Effect.AT_ONCE, limits=(0.1, 1000.0),
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
        'Divisor after the mean is subtracted, one value or one per channel; [0.0]: from the model.',
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

WITH_MODEL = frozenset(declaration.name for declaration in PARAMETERS if declaration.effect is Effect.WITH_MODEL)
"""Parameters that change while the node is active if ``model_path`` is set in the same request."""


def parameter_table() -> str:
    """Return every parameter as a Markdown table."""
    rows = ['| parameter | type | default | |', '|---|---|---|---|']
    for declaration in PARAMETERS:
        default = f'`{json.dumps(declaration.default)}`'
        text = ' '.join(filter(None, (declaration.description, declaration.constraints)))
        effect = f' *{declaration.effect.value[1]}*' if declaration.effect.value[1] else ''
        kind = declaration.type.name.lower().replace('_array', '[]')
        rows.append(f'| `{declaration.name}` | {kind} | {default} | {text}{effect} |')
    return '\n'.join(rows)
