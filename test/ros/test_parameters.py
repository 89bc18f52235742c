"""N-10: each parameter declared once, described, checked; what is wrong is refused with its reason."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator

import pytest
import rclpy
import yaml
from rcl_interfaces.msg import ParameterType
from rclpy.node import Node
from rclpy.parameter import Parameter

from gps_denied_c7.errors import ConfigError, ModelBundleError
from gps_denied_c7.image.preprocess_spec import PreprocessingSpec, ResizeMode
from gps_denied_c7.ros.parameter_table import PARAMETERS, Effect
from gps_denied_c7.ros.parameters import NodeParameters, settings_from
from support.harness import ROOT, free_domain_id

DEFAULTS = {declaration.name: declaration.default for declaration in PARAMETERS}
BY_NAME = {declaration.name: declaration for declaration in PARAMETERS}
NUMBERS = (Parameter.Type.INTEGER, Parameter.Type.DOUBLE)


@pytest.mark.parametrize('declaration', PARAMETERS, ids=lambda declaration: declaration.name)
def test_every_parameter_is_described(declaration):
    descriptor = declaration.descriptor()
    assert descriptor.type == declaration.type.value != ParameterType.PARAMETER_NOT_SET
    assert len(descriptor.description) > 20
    assert descriptor.description.endswith(('at once.', 'next configure.', 'Read-only.'))
    assert descriptor.read_only == (declaration.effect is Effect.NEVER)
    assert not descriptor.dynamic_typing
    if declaration.type in NUMBERS and declaration.name != 'preprocess.scale':
        assert descriptor.integer_range or descriptor.floating_point_range
    for unit, suffix in (('milliseconds', '_ms'), ('second', '_s'), ('bytes', '_bytes')):
        if declaration.name.endswith(suffix):
            assert unit in descriptor.description


def test_defaults_are_settings_that_can_be_used():
    settings, live = settings_from(DEFAULTS)
    assert settings.image_topics == ('camera/image_raw',)
    assert settings.preprocessing == {}
    assert (live.max_queue_age_ms, live.max_frame_age_ms, live.max_stamp_ahead_s) == (0.0, 0.0, 3600.0)


def test_the_shipped_parameter_file_holds_the_defaults():
    """Every line of it is a declared parameter at its default, commented-out ones excepted."""
    text = (ROOT / 'config' / 'c7_inference.yaml').read_text()
    values = yaml.safe_load(text)['/**']['ros__parameters']
    assert values == {name: DEFAULTS[name] for name in values}
    commented = {name for name in DEFAULTS if f'# {name}:' in text}
    assert set(DEFAULTS) - set(values) - commented == {'autostart', 'preprocess.width', 'preprocess.height'}


@pytest.mark.parametrize(
    ('name', 'value', 'word'),
    [
        ('image_topics', [], 'empty'),
        ('image_topics', [''], 'empty'),
        ('image_topics', ['a', 'a'], 'twice'),
        ('image_topics', ['not a topic'], 'not a topic'),
        ('output_tensors', ['scores', 'scores'], 'twice'),
        ('runtime_chain', [], 'empty'),
        ('runtime_chain', ['tensorflow'], 'tensorflow'),
        ('runtime_chain', ['tensorrt', 'tensorrt'], 'twice'),
        ('disabled_runtimes', ['tensorflow'], 'tensorflow'),
        ('engine_cache_dir', '', 'empty'),
        ('ort_trt_cache_dir', '', 'empty'),
        ('gpu_memory_budget_bytes', 0, 'positive'),
        ('gpu_fault_window_s', 0.0, 'positive'),
        ('cpu_threads', -1, 'negative'),
        ('promotion_backoff_s', [5.0], 'longest'),
        ('restart_backoff_s', [2.0, 1.0], 'longest'),
        ('max_queue_age_ms', math.nan, 'number'),
        ('max_frame_age_ms', math.nan, 'number'),
        ('latency_warn_ms', math.nan, 'number'),
        ('preprocess.resize', 'squeeze', 'squeeze'),
        ('preprocess.interpolation', 'bilinear', 'bilinear'),
        ('preprocess.letterbox_anchor', 'left', 'left'),
        ('preprocess.letterbox_scaling', 'grow', 'grow'),
        ('preprocess.colour', 'hsv', 'hsv'),
        ('preprocess.layout', 'chwn', 'chwn'),
        ('preprocess.width', -1, '-1'),
        ('preprocess.std', [1.0, 0.0, 1.0], 'std'),
        ('preprocess.std', [1.0, 1.0], 'std'),
        ('preprocess.mean', [math.inf], 'finite'),
        ('preprocess.scale', math.nan, 'finite'),
        ('preprocess.pad_value', math.inf, 'finite'),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_name(name, value, word):
    with pytest.raises(ConfigError, match=word) as caught:
        settings_from({**DEFAULTS, name: value})
    assert name in str(caught.value)


def test_overrides_of_the_pre_processing_change_what_they_name_only():
    settings, _ = settings_from({**DEFAULTS, 'preprocess.resize': 'letterbox', 'preprocess.mean': [0.5]})
    spec = PreprocessingSpec(width=32, height=16, colour='gray')
    changed = settings.preprocessing_for(spec)
    assert changed.resize is ResizeMode.LETTERBOX and tuple(changed.mean) == (0.5,)
    assert changed == spec.replace(resize=ResizeMode.LETTERBOX, mean=(0.5,))


# --- on a node --------------------------------------------------------------------------------------


class Bench:
    """NodeParameters on a real node, with what it was told and told others."""

    def __init__(self, context, **overrides):
        self.why_fixed = None
        self.live, self.failures, self.models = [], [], []
        self.on_model = self.models.append
        self.node = Node(
            'bench',
            context=context,
            parameter_overrides=[
                value if isinstance(value, Parameter) else Parameter(name, value=value)
                for name, value in overrides.items()
            ],
        )
        self.parameters = NodeParameters(
            self.node,
            fixed=lambda name: self.why_fixed,
            on_model=lambda settings: self.on_model(settings),
            on_live=self.live.append,
            on_failure=lambda name, error: self.failures.append((name, error)),
        )

    @property
    def model_paths(self):
        return [settings.model_path for settings in self.models]

    def set(self, **values):
        return self.node.set_parameters_atomically([Parameter(name, value=value) for name, value in values.items()])


@pytest.fixture(scope='module')
def module_context() -> Iterator[rclpy.Context]:
    """One for all: no test of this module sends anything."""
    context = rclpy.Context()
    with free_domain_id() as domain_id:
        rclpy.init(context=context, domain_id=domain_id)
        yield context
        context.try_shutdown()


@pytest.fixture
def bench(module_context):
    benches = []

    def make(**overrides):
        benches.append(Bench(module_context, **overrides))
        return benches[-1]

    yield make
    for each in benches:
        each.node.destroy_node()


def test_start_values_are_taken(bench):
    made = bench(model_path='/m', cpu_threads=3, image_topics=['a', 'b'], max_queue_age_ms=5.0)
    settings = made.parameters.settings()
    assert (settings.model_path, settings.config.cpu_threads, settings.image_topics) == ('/m', 3, ('a', 'b'))
    assert made.parameters.live().max_queue_age_ms == 5.0


def test_a_start_value_of_no_parameter_is_told_with_what_was_meant(bench, capfd):
    """ROS ignores it; what others declare, before or later, is none of it."""
    bench(**{
        'promotion_backof_s': [1.0, 2.0], 'xyzzy': 1, 'use_sim_time': False,
        'qos_overrides./camera.subscription.depth': 3, 'hot_standby': False,
    })  # fmt: skip
    (told,) = [line for line in capfd.readouterr().err.splitlines() if 'not parameters' in line]
    assert told.endswith('ignored: promotion_backof_s (did you mean promotion_backoff_s?), xyzzy')


def test_types_of_image_topics_are_one_for_each_or_one_for_all():
    values = {**DEFAULTS, 'image_topics': ['a', '', 'b', 'c']}

    def types(*given):
        return settings_from({**values, 'image_topic_types': list(given)})[0].image_topic_types

    assert types('auto') == types('') == types() == ('auto',) * 3
    assert types('raw') == ('raw',) * 3
    assert types('raw', 'compressed', 'auto') == ('raw', 'compressed', 'auto')
    for wrong, said in ((['raw', 'raw'], '2 types for 3'), (['jpeg'], 'jpeg')):
        with pytest.raises(ConfigError, match=said) as caught:
            types(*wrong)
        assert 'image_topic_types' in str(caught.value)


WRONG_STARTS = {
    'image_topics': 'one string',
    'model_path': 5,
    'autostart': 'yes',
    'runtime_chain': [1, 2],
    'ort_disallow_cpu_fallback': 'no',
    'gpu_memory_budget_bytes': 1,
    'gpu_fault_window_s': 'long',
    'cpu_threads': 100_000,
    'max_queue_age_ms': 100,
    'max_frame_age_ms': -1.0,
    'latency_warn_ms': 1e12,
    'preprocess.width': -1,
    'preprocess.mean': 'none',
}


@pytest.mark.parametrize('name', WRONG_STARTS)
def test_a_wrong_start_value_keeps_the_node_up_and_refuses_configure_until_it_is_set(bench, name):
    """Wrong type or out of range; the default stands in its place meanwhile."""
    made = bench(**{name: WRONG_STARTS[name]})
    with pytest.raises(ConfigError, match='start value') as caught:
        made.parameters.settings()
    assert name in str(caught.value)
    assert made.parameters.live() == settings_from(DEFAULTS)[1]
    assert made.parameters.values()['autostart'] is False
    if BY_NAME[name].effect is not Effect.NEVER:
        assert made.set(**{name: DEFAULTS[name]}).successful
        made.parameters.settings()


@pytest.mark.parametrize(
    ('name', 'given', 'right'),
    [
        ('latency_warn_ms', 5, '5.0'),
        ('image_topics', '/camera/image_raw', '[/camera/image_raw]'),
        ('cpu_threads', 2.0, '2'),
        ('preprocess.std', [1, 2, 3], '[1.0, 2.0, 3.0]'),
        ('ort_disallow_cpu_fallback', 1, 'true'),
        ('model_path', 5, '"5"'),
        ('runtime_chain', [1, 2], '["1", "2"]'),
        ('max_frame_age_ms', -1.0, '0.0'),
        ('cpu_threads', 100_000, '256'),
        ('latency_warn_ms', 'slow', '0.0'),
    ],
)
def test_a_start_value_of_another_type_is_refused_once_with_how_it_is_written(bench, capfd, name, given, right):
    """With the node and a value to copy; what the shell would take for itself is quoted."""
    made = bench(autostart=True, **{name: given})
    with pytest.raises(ConfigError) as caught:
        made.parameters.settings()
    assert f'write {name}: {right} in a parameter file' in caught.value.remedy
    assert shlex.split(caught.value.remedy)[3].rstrip(',') == f'{name}:={right}'
    assert shlex.split(caught.value.remedy.partition('while the node runs: ')[2]) == [
        'ros2', 'param', 'set', '/bench', name, right,
    ]  # fmt: skip
    captured = capfd.readouterr()
    assert name not in captured.out + captured.err, 'configure logs it'


@pytest.mark.parametrize(('name', 'given'), [('autostart', 'on'), ('latency_warn_ms', 5)])
def test_a_start_value_of_another_type_is_logged_where_the_node_waits_for_its_configure(bench, capfd, name, given):
    bench(**{name: given})
    captured = capfd.readouterr()
    assert (captured.out + captured.err).count(f'{name}: the start value {given!r}') == 1


@pytest.mark.parametrize('declaration', PARAMETERS, ids=lambda declaration: declaration.name)
def test_a_default_is_written_as_yaml_of_its_type(declaration):
    assert yaml.safe_load(declaration.written(declaration.default)) == declaration.default


@pytest.mark.parametrize('name', ['resize', 'interpolation', 'colour', 'layout', 'letterbox_anchor'])
def test_an_override_that_is_no_choice_is_refused_with_the_choices(name):
    with pytest.raises(ConfigError, match=f'preprocess.{name}: .*unknown') as caught:
        settings_from({**DEFAULTS, f'preprocess.{name}': 'crop'})
    assert 'Known are [' in caught.value.remedy


def test_start_values_that_contradict_each_other_can_be_put_right_one_by_one(bench):
    made = bench(image_topics=['a', 'a'], **{'preprocess.colour': 'hsv'})
    with pytest.raises(ConfigError):
        made.parameters.settings()
    assert made.set(image_topics=['a', 'b']).successful
    with pytest.raises(ConfigError, match='colour'):
        made.parameters.settings()
    assert not made.set(**{'preprocess.colour': 'cmyk'}).successful
    assert made.set(**{'preprocess.colour': 'rgb'}).successful
    assert made.parameters.settings().image_topics == ('a', 'b')


@pytest.mark.parametrize(
    'declaration', [each for each in PARAMETERS if each.effect is Effect.AT_ONCE], ids=lambda each: each.name
)
def test_a_live_parameter_takes_effect_in_any_state(bench, declaration):
    made = bench()
    made.why_fixed = 'cannot change while active.'
    values = {Parameter.Type.STRING: 'off', Parameter.Type.INTEGER: 7, Parameter.Type.DOUBLE: 7.0}
    value = {'image_cpu_share': 0.75}.get(declaration.name, values[declaration.type])
    assert made.set(**{declaration.name: value}).successful
    assert getattr(made.live[-1], declaration.name) == value
    assert getattr(made.parameters.live(), declaration.name) == value


@pytest.mark.parametrize(
    'declaration',
    [each for each in PARAMETERS if each.effect not in (Effect.AT_ONCE, Effect.NEVER)],
    ids=lambda each: each.name,
)
def test_any_other_is_refused_with_the_reason_while_configured(bench, declaration):
    made = bench()
    value = {
        Parameter.Type.STRING: 'other', Parameter.Type.BOOL: True, Parameter.Type.INTEGER: 1 << 30,
        Parameter.Type.DOUBLE: 1.0, Parameter.Type.STRING_ARRAY: ['onnx_trt_ep'], Parameter.Type.DOUBLE_ARRAY: [0.25],
    }[declaration.type]  # fmt: skip
    value = {
        'cpu_threads': 2, 'preprocess.width': 32, 'preprocess.height': 32, 'preprocess.colour': 'gray',
        'preprocess.layout': 'nhwc', 'preprocess.resize': 'letterbox', 'isolation': 'none', 'hot_standby': False,
        'preprocess.interpolation': 'area', 'preprocess.letterbox_anchor': 'top_left',
        'preprocess.letterbox_scaling': 'shrink', 'spare_worker': False,
        'promotion_backoff_s': [1.0, 2.0], 'restart_backoff_s': [1.0, 2.0],
        'builder_optimization_level': 3, 'image_topic_types': ['raw'], 'decoder_memory_mb': 512,
        'decode_timeout_ms': 100.0,
    }.get(declaration.name, value)  # fmt: skip
    made.why_fixed = 'cannot change while active; run the cleanup transition first.'
    refused = made.set(**{declaration.name: value})
    assert not refused.successful
    assert declaration.name in refused.reason and 'cleanup' in refused.reason
    made.why_fixed = None
    assert made.set(**{declaration.name: value}).successful
    made.why_fixed = 'again.'
    assert made.set(**{declaration.name: value}).successful, 'the value it has already changes nothing'


def test_a_new_model_path_is_told_before_it_is_set_and_can_be_refused(bench):
    made = bench(model_path='/old')

    def refuse(settings):
        raise ModelBundleError(f'{settings.model_path} does not exist.')

    assert made.set(model_path='/old').successful
    assert made.model_paths == []
    assert made.set(model_path='/new', latency_warn_ms=5.0).successful
    assert made.model_paths == ['/new']
    made.on_model = refuse
    refused = made.set(model_path='/newer', latency_warn_ms=6.0)
    assert (refused.successful, refused.reason) == (False, '/newer does not exist.')
    assert (made.parameters.settings().model_path, made.parameters.live().latency_warn_ms) == ('/new', 5.0)
    assert made.failures == []


def test_what_is_refused_for_another_reason_begins_no_swap(bench):
    made = bench(model_path='/old')
    made.parameters._fixed = lambda name: None if name == 'model_path' else 'cannot change while active.'
    assert 'cpu_threads' in made.set(model_path='/new', cpu_threads=2).reason
    assert not made.set(model_path='/new', image_topics=['a', 'a']).successful
    assert made.model_paths == [] and made.parameters.settings().model_path == '/old'


def test_a_parameter_is_taken_back_in_any_state_without_effect(bench):
    made = bench(model_path='/old', output_tensors=['scores'])
    before = made.parameters.settings()
    assert made.set(model_path='/new', output_tensors=['scores', 'mask'], allow_non_finite=['mask']).successful
    made.why_fixed = 'cannot change while deactivating.'
    made.parameters.restore_model(before)
    assert made.model_paths == ['/new'], 'taking back is no swap'
    assert made.node.get_parameter('model_path').value == '/old' and made.parameters.settings() == before
    assert not made.set(model_path='/new').successful
    with pytest.raises(ConfigError, match='could not be reset'):
        made.parameters.restore_model(dataclasses.replace(before, model_path=5))


def test_outputs_change_while_active_together_with_the_model_alone(bench):
    made = bench(model_path='/old')
    made.parameters._fixed = lambda name: None if name == 'model_path' else 'cannot change while active.'
    assert 'output_tensors' in made.set(output_tensors=['scores']).reason
    assert made.set(model_path='/new', output_tensors=['scores'], allow_non_finite=['mask']).successful
    assert made.set(model_path='/new', output_tensors=['scores', 'mask']).successful
    told = [(each.model_path, each.output_tensors, each.allow_non_finite) for each in made.models]
    assert told == [('/new', ('scores',), ('mask',)), ('/new', ('scores', 'mask'), ('mask',))]
    assert made.models[-1].config.output_tensors == ('scores', 'mask')
    assert made.set(model_path='/new').successful and len(made.models) == 2, 'nothing changes'


def test_a_read_only_parameter_is_refused(bench):
    assert not bench().set(autostart=True).successful


def test_values_set_together_are_taken_or_refused_together(bench):
    made = bench()
    assert not made.set(latency_warn_ms=5.0, image_topics=[]).successful
    assert made.parameters.live().latency_warn_ms == 0.0
    assert made.set(latency_warn_ms=5.0, image_topics=['x']).successful
    assert made.parameters.live().latency_warn_ms == 5.0


@pytest.mark.parametrize(
    ('name', 'value'), [('latency_warn_ms', 'soon'), ('latency_warn_ms', -1.0), ('latency_warn_ms', math.nan),
                        ('max_stamp_ahead_s', 1e12), ('cpu_threads', 1000), ('model_path', 3), ('image_topics', 'x')],
)  # fmt: skip
def test_a_wrong_type_or_range_is_refused_and_changes_nothing(bench, name, value):
    made = bench()
    before = made.parameters.live()
    result = made.set(**{name: value})
    assert not result.successful and result.reason
    assert made.parameters.live() == before
    assert made.parameters.settings() == settings_from(DEFAULTS)[0]


def test_parameters_of_others_are_left_alone(bench):
    made = bench()
    made.why_fixed = 'cannot change while active.'
    made.node.declare_parameter('qos_overrides./x.subscription.depth', 5)
    assert made.set(use_sim_time=True).successful
    assert made.live == []


def test_a_parameter_cannot_be_deleted(bench):
    made = bench(**{'preprocess.width': 64})
    for name in ('image_topics', 'preprocess.width', 'latency_warn_ms'):
        assert not made.node.set_parameters_atomically([Parameter(name)]).successful
    assert made.parameters.settings().preprocessing == {'width': 64}
    assert made.failures == []


def test_an_override_of_the_pre_processing_is_taken_back_with_its_default(bench):
    overrides = {'preprocess.width': 64, 'preprocess.mean': [0.5], 'preprocess.scale': 2.0, 'preprocess.colour': 'gray'}
    made = bench(**overrides)
    assert set(made.parameters.settings().preprocessing) == {'width', 'mean', 'scale', 'colour'}
    assert made.set(**{name: DEFAULTS[name] for name in overrides}).successful
    assert made.parameters.settings().preprocessing == {}
