"""The frozen configuration refuses what cannot be flown with."""

import dataclasses
import math
from pathlib import Path

import pytest

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import ConfigError


def test_defaults_put_both_caches_below_one_directory():
    """§3: one sweep cleans both caches."""
    config = C7InferenceConfig()
    assert config.ort_trt_cache_dir == Path('/var/lib/gps-denied/engines/ort_trt_cache')
    assert config.ort_trt_cache_dir.parent == config.engine_cache_dir.parent


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        C7InferenceConfig().cpu_threads = 3


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('runtime_chain', ()),
        ('runtime_chain', ('tensorrt', 'tensorrt')),
        ('runtime_chain', ('openvino',)),
        ('disabled_runtimes', ('openvino',)),
        ('ort_trt_cache_dir', ''),
        ('engine_cache_dir', ''),
        ('gpu_memory_budget_bytes', 0),
        ('gpu_fault_window_s', -1.0),
        ('restart_backoff_s', (2.0, 1.0)),
        ('restart_backoff_s', (0.0, 1.0)),
        ('restart_backoff_s', (1.0,)),
        ('restart_backoff_s', 1.0),
        ('promotion_backoff_s', (1.0, math.nan)),
        ('promotion_backoff_s', (1.0, math.inf)),
        ('cpu_threads', -1),
        ('builder_optimization_level', 6),
    ],
)
def test_an_unusable_value_is_refused_by_name(field, value):
    with pytest.raises(ConfigError) as refused:
        C7InferenceConfig(**{field: value})
    assert refused.value.name == field


def test_digest_tells_settings_apart():
    assert C7InferenceConfig().digest() == C7InferenceConfig().digest()
    assert C7InferenceConfig().digest() != C7InferenceConfig(cpu_threads=1).digest()
