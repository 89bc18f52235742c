"""The factory: from a strategy's label to its runtime, resolved only when asked (R-5)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.errors import RuntimeUnavailableError
from gps_denied_c7.monitoring.thermal import ThermalStatePublisher
from gps_denied_c7.runtimes.protocol import InferenceRuntime, ProviderSet

__all__ = ['create_runtime', 'import_strategy', 'require_strategy']


@dataclass(frozen=True, slots=True)
class _Strategy:
    """
    Say what a strategy needs.

    :param packages: Python packages that it imports when it loads an engine.
    :param requirements: the file that lists them.
    :param target: ``module:class``.
    """

    packages: tuple[str, ...]
    requirements: str
    target: str


_GPU_REQUIREMENTS = 'requirements/gpu.txt'
_STRATEGIES = {
    'tensorrt': _Strategy(
        ('tensorrt', 'cuda'), _GPU_REQUIREMENTS, 'gps_denied_c7.runtimes.trt.runtime:TensorrtRuntime'
    ),
    'onnx_trt_ep': _Strategy(
        ('onnxruntime', 'onnx'), 'requirements/runtime.txt', 'gps_denied_c7.runtimes.ort.runtime:OnnxTrtEpRuntime'
    ),
    'pytorch_fp16': _Strategy(
        ('torch',), _GPU_REQUIREMENTS, 'gps_denied_c7.runtimes.pt.runtime:PytorchFp16Runtime'
    ),
}

# Spread over several distributions, so a package without a file of its own.
_NAMESPACE_PACKAGES = ('cuda',)


def create_runtime(
    label: str,
    config: C7InferenceConfig,
    *,
    thermal: ThermalStatePublisher | None = None,
    gate: EngineGate | None = None,
    providers: ProviderSet = ProviderSet.ANY,
) -> InferenceRuntime:
    """
    Return a runtime of the strategy ``label``, importing its module but no vendor library.

    :param label: of ``RUNTIME_LABELS``.
    :param thermal: where the runtime's thermal state comes from, None for an honest "unknown".
    :param gate: what admits engine files on this host, None where none may be loaded.
    :param providers: the hardware that it may use.
    :raises RuntimeUnavailableError: unknown, switched off, or a package is missing.
    """
    require_strategy(label, config)
    module, _, name = _STRATEGIES[label].target.partition(':')
    runtime: InferenceRuntime = getattr(importlib.import_module(module), name)(
        config, thermal=thermal, gate=gate, providers=providers
    )
    return runtime


def require_strategy(label: str, config: C7InferenceConfig) -> None:
    """
    Look whether this host has the strategy ``label``, importing nothing of it.

    :raises RuntimeUnavailableError: unknown, switched off, or a package is missing.
    """
    strategy = _STRATEGIES.get(label)
    if strategy is None:
        raise RuntimeUnavailableError(label, 'no such strategy.', remedy=f'Known are {list(_STRATEGIES)}.')
    if label in config.disabled_runtimes:
        raise RuntimeUnavailableError(
            label, 'switched off by disabled_runtimes.', remedy=f'Take {label!r} out of disabled_runtimes to use it.'
        )
    missing = [package for package in strategy.packages if not _is_installed(package)]
    if missing:
        raise RuntimeUnavailableError(
            label, f'Python packages not installed: {", ".join(missing)}.', remedy=_remedy(strategy.requirements)
        )


def _remedy(requirements: str) -> str:
    from gps_denied_c7.runtimes.gpu.cuda import gpu_stack_remedy

    install = f'pip install -r {requirements}'
    return gpu_stack_remedy(install) if requirements == _GPU_REQUIREMENTS else install


def import_strategy(label: str) -> None:
    """
    Import everything that loading an engine of the strategy ``label`` will, vendor libraries included.

    :raises ImportError: a package is missing or broken.
    """
    strategy = _STRATEGIES[label]
    for module in (strategy.target.partition(':')[0], *strategy.packages):
        importlib.import_module(module)


def _is_installed(package: str) -> bool:
    """Look for ``package`` without importing it; a mere directory of that name does not count."""
    if package in sys.modules:
        return sys.modules[package] is not None
    spec = importlib.util.find_spec(package)
    return spec is not None and (spec.origin is not None or package in _NAMESPACE_PACKAGES)
