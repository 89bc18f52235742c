"""The one frozen configuration of the inference library."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gps_denied_c7.errors import ConfigError

__all__ = ['DEFAULT_CHAIN', 'ISOLATIONS', 'RUNTIME_LABELS', 'C7InferenceConfig']

RUNTIME_LABELS = ('tensorrt', 'onnx_trt_ep', 'pytorch_fp16')
DEFAULT_CHAIN = RUNTIME_LABELS
ISOLATIONS = ('process', 'none')

_ENGINE_ROOT = '/var/lib/gps-denied/engines'


@dataclass(frozen=True, slots=True, kw_only=True)
class C7InferenceConfig:
    """
    Hold every setting of the library; a value that cannot be used never becomes a config.

    :param runtime_chain: strategies by preference, of RUNTIME_LABELS, each at most once, at least one.
    :param disabled_runtimes: strategies switched off; the chain goes on past them and says so.
    :param engine_cache_dir: where engine files lie; in each directory, ``~`` is the home directory.
    :param ort_trt_cache_dir: where ONNX Runtime's TensorRT provider keeps its engines; a sibling of
        ``engine_cache_dir``, so that one sweep cleans both.
    :param ort_disallow_cpu_fallback: refuse to run on the CPU.
    :param gpu_memory_budget_bytes: bytes of GPU memory for all engines together.
    :param gpu_fault_window_s: seconds in which failures of two different GPU rungs mean that the GPU is lost.
    :param restart_backoff_s: first and longest pause in seconds before a failed chain, or a standby, is tried again;
        if a frame is late and there is no standby, one engine is loaded before the pause is over, once per pause.
    :param build_on_configure: engines may be built while configuring (minutes).
    :param builder_optimization_level: how long TensorRT's builder searches for fast kernels, 0 to 5; TensorRT before
        8.6 has no such choice. An engine that is there already is taken, whatever its level.
    :param isolation: ``process``: each engine in a worker process of its own, so that no vendor library can end
        the node; ``none``: all in this process, where a vendor's crash or hang is the node's.
    :param hot_standby: keep a second engine loaded that answers when the serving one does not; workers only.
    :param spare_worker: keep a worker process that has imported ONNX Runtime and has no model, about 60 MB, so that
        the next engine is loaded sooner; workers only.
    :param load_timeout_s: seconds in which a worker must have loaded its engine, or begun to build it; one step of a
        build may take ten minutes. A frame that all engines are late for waits for such a load.
    :param inference_deadline_ms: milliseconds after which the standby answers in place of a late worker; three
        times the rung's own warm-up where that is longer.
    :param hang_timeout_ms: milliseconds after which a worker that does not answer is killed; three times the
        deadline where that is longer.
    :param configure_budget_s: seconds that better rungs get to load before a worse one serves in their place.
    :param promotion_backoff_s: first and longest pause in seconds before a better rung is tried again.
    :param output_tensors: canonical names of the outputs that are published, all of them where empty. Only these, and
        those that the bundle has a rule for, are copied from an engine and checked.
    :param allow_non_finite: canonical names of the outputs in which NaN and infinity mean something.
    :param cpu_threads: threads of one CPU inference, 0 for all cores but one, which other programs may use.
    :raises ConfigError: naming the field.
    """

    runtime_chain: tuple[str, ...] = DEFAULT_CHAIN
    disabled_runtimes: tuple[str, ...] = ()
    engine_cache_dir: Path = Path(_ENGINE_ROOT) / 'engine_cache'
    ort_trt_cache_dir: Path = Path(_ENGINE_ROOT) / 'ort_trt_cache'
    ort_disallow_cpu_fallback: bool = False
    gpu_memory_budget_bytes: int = 4 << 30
    gpu_fault_window_s: float = 10.0
    restart_backoff_s: tuple[float, float] = (1.0, 30.0)
    build_on_configure: bool = False
    builder_optimization_level: int = 2
    isolation: str = 'process'
    hot_standby: bool = True
    spare_worker: bool = True
    load_timeout_s: float = 60.0
    inference_deadline_ms: float = 200.0
    hang_timeout_ms: float = 1000.0
    configure_budget_s: float = 10.0
    promotion_backoff_s: tuple[float, float] = (5.0, 300.0)
    cpu_threads: int = 0
    output_tensors: tuple[str, ...] = ()
    allow_non_finite: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_labels('runtime_chain', self.runtime_chain)
        _check_labels('disabled_runtimes', self.disabled_runtimes)
        if not self.runtime_chain:
            raise ConfigError('runtime_chain', 'is empty.', remedy=f'Name at least one of {list(RUNTIME_LABELS)}.')
        for name in ('engine_cache_dir', 'ort_trt_cache_dir'):
            value = getattr(self, name)
            if str(value) in ('', '.'):
                raise ConfigError(name, 'is empty.', remedy='Name a directory that this user may write.')
            # A worker has another working directory.
            object.__setattr__(self, name, _expand_home(name, Path(value)).absolute())
        if self.gpu_memory_budget_bytes <= 0:
            raise ConfigError('gpu_memory_budget_bytes', f'{self.gpu_memory_budget_bytes} is not positive.')
        for name in (
            'gpu_fault_window_s', 'load_timeout_s', 'inference_deadline_ms', 'hang_timeout_ms', 'configure_budget_s',
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ConfigError(name, f'{getattr(self, name)} is not positive.')
        for name in ('restart_backoff_s', 'promotion_backoff_s'):
            value = getattr(self, name)
            bounds = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] < math.inf:
                raise ConfigError(name, f'{list(bounds)} is not [first, longest] in positive seconds.')
            object.__setattr__(self, name, bounds)
        if not 0 <= self.builder_optimization_level <= 5:
            raise ConfigError('builder_optimization_level', f'{self.builder_optimization_level} is not 0 to 5.')
        if self.isolation not in ISOLATIONS:
            raise ConfigError('isolation', f'{self.isolation!r} unknown.', remedy=f'Known are {list(ISOLATIONS)}.')
        if self.cpu_threads < 0:
            raise ConfigError('cpu_threads', f'{self.cpu_threads} is negative.', remedy='0 means all cores but one.')

    def digest(self) -> str:
        """Return a SHA-256 over every field, which shows whether two flights had the same settings."""
        values: dict[str, Any] = dataclasses.asdict(self)
        text = json.dumps(values, sort_keys=True, default=str)
        return f'sha256:{hashlib.sha256(text.encode()).hexdigest()}'


def _expand_home(name: str, path: Path) -> Path:
    # By the environment alone: other users' directories are known to a file, or to a server that may not answer.
    if not path.parts[0].startswith('~'):
        return path
    home = os.environ.get('HOME', '')
    if path.parts[0] != '~' or not home:
        raise ConfigError(name, f'{str(path)!r} begins with no known home.', remedy='Write the whole path.')
    return Path(home, *path.parts[1:])


def _check_labels(name: str, labels: tuple[str, ...]) -> None:
    if unknown := [label for label in labels if label not in RUNTIME_LABELS]:
        raise ConfigError(name, f'{unknown} unknown.', remedy=f'Known are {list(RUNTIME_LABELS)}.')
    if len(set(labels)) != len(labels):
        raise ConfigError(name, f'{list(labels)} names a runtime twice.')
