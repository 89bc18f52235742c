"""Keep neural-network inference running on a drone when the GPU stack misbehaves."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gps_denied_c7.config import C7InferenceConfig
    from gps_denied_c7.engines.admission import AdmittedEngine, EngineGate
    from gps_denied_c7.engines.manifest import EngineManifest, EngineName, HostProfile
    from gps_denied_c7.engines.store import EngineCache
    from gps_denied_c7.errors import (
        C7Error,
        ChainExhaustedError,
        ConfigError,
        EngineContentError,
        EngineDeserializeError,
        EngineSchemaMismatchError,
        FdrSchemaError,
        GpuMemoryError,
        GpuUnavailableError,
        ImageRejectedError,
        InferenceError,
        ModelBundleError,
        RuntimeUnavailableError,
        WorkerDiedError,
    )
    from gps_denied_c7.failover.chain import Answer, RuntimeChain
    from gps_denied_c7.failover.in_process import in_process_hosts
    from gps_denied_c7.failover.status import ChainState, ChainStatus
    from gps_denied_c7.image.decode import Pixels, decode_compressed
    from gps_denied_c7.image.preprocess import Preprocessor
    from gps_denied_c7.image.preprocess_spec import PreprocessingSpec
    from gps_denied_c7.model.artefact import Artefact, Golden
    from gps_denied_c7.model.bundle import ModelBundle, write_bundle
    from gps_denied_c7.model.compare import AllClose, MatchedDistance, SetOverlap
    from gps_denied_c7.monitoring.thermal import ThermalLevel, ThermalState, ThermalStatePublisher
    from gps_denied_c7.monitoring.thermal_sources import find_thermal_source
    from gps_denied_c7.runtimes.host_profile import local_host_profile
    from gps_denied_c7.runtimes.ort.runtime import OnnxTrtEpRuntime
    from gps_denied_c7.runtimes.protocol import (
        BuildConfig,
        BuildProgress,
        EngineCacheEntry,
        EngineFacts,
        EngineHandle,
        InferenceRuntime,
        ProviderSet,
    )
    from gps_denied_c7.runtimes.pt.export import export_program
    from gps_denied_c7.runtimes.pt.runtime import PytorchFp16Runtime
    from gps_denied_c7.runtimes.registry import create_runtime
    from gps_denied_c7.runtimes.trt.build import build_engine
    from gps_denied_c7.runtimes.trt.runtime import TensorrtRuntime
    from gps_denied_c7.tensors import TensorSpec
    from gps_denied_c7.worker.client import worker_hosts

__all__ = [
    'AdmittedEngine',
    'AllClose',
    'Answer',
    'Artefact',
    'BuildConfig',
    'BuildProgress',
    'C7Error',
    'C7InferenceConfig',
    'ChainExhaustedError',
    'ChainState',
    'ChainStatus',
    'ConfigError',
    'EngineCache',
    'EngineCacheEntry',
    'EngineContentError',
    'EngineDeserializeError',
    'EngineFacts',
    'EngineGate',
    'EngineHandle',
    'EngineManifest',
    'EngineName',
    'EngineSchemaMismatchError',
    'FdrSchemaError',
    'Golden',
    'GpuMemoryError',
    'GpuUnavailableError',
    'HostProfile',
    'ImageRejectedError',
    'InferenceError',
    'InferenceRuntime',
    'MatchedDistance',
    'ModelBundle',
    'ModelBundleError',
    'OnnxTrtEpRuntime',
    'Pixels',
    'PreprocessingSpec',
    'Preprocessor',
    'ProviderSet',
    'PytorchFp16Runtime',
    'RuntimeChain',
    'RuntimeUnavailableError',
    'SetOverlap',
    'TensorSpec',
    'TensorrtRuntime',
    'ThermalLevel',
    'ThermalState',
    'ThermalStatePublisher',
    'WorkerDiedError',
    'build_engine',
    'create_runtime',
    'decode_compressed',
    'export_program',
    'find_thermal_source',
    'in_process_hosts',
    'local_host_profile',
    'worker_hosts',
    'write_bundle',
]

__version__ = '0.2.0'

# ONNX Runtime's Linux wheels from 1.29 on report to a vendor's host and keep a database under the home directory unless
# they find this when they are imported. All that imports ONNX Runtime here imports this package first, and children
# inherit it. Not setdefault: that nothing is sent holds whatever the environment says.
os.environ['ORT_DISABLE_TELEMETRY'] = '1'

# What a user of the library imports from here, and where it is defined; nothing of it is imported before.
_HOMES = {
    'config': ('C7InferenceConfig',),
    'engines.admission': ('AdmittedEngine', 'EngineGate'),
    'engines.manifest': ('EngineManifest', 'EngineName', 'HostProfile'),
    'engines.store': ('EngineCache',),
    'errors': (
        'C7Error', 'ChainExhaustedError', 'ConfigError', 'EngineContentError', 'EngineDeserializeError',
        'EngineSchemaMismatchError', 'FdrSchemaError', 'GpuMemoryError', 'GpuUnavailableError', 'ImageRejectedError',
        'InferenceError', 'ModelBundleError', 'RuntimeUnavailableError', 'WorkerDiedError',
    ),
    'failover.chain': ('Answer', 'RuntimeChain'),
    'failover.in_process': ('in_process_hosts',),
    'failover.status': ('ChainState', 'ChainStatus'),
    'image.decode': ('Pixels', 'decode_compressed'),
    'image.preprocess': ('Preprocessor',),
    'image.preprocess_spec': ('PreprocessingSpec',),
    'model.artefact': ('Artefact', 'Golden'),
    'model.bundle': ('ModelBundle', 'write_bundle'),
    'model.compare': ('AllClose', 'MatchedDistance', 'SetOverlap'),
    'monitoring.thermal': ('ThermalLevel', 'ThermalState', 'ThermalStatePublisher'),
    'monitoring.thermal_sources': ('find_thermal_source',),
    'runtimes.host_profile': ('local_host_profile',),
    'runtimes.ort.runtime': ('OnnxTrtEpRuntime',),
    'runtimes.protocol': (
        'BuildConfig', 'BuildProgress', 'EngineCacheEntry', 'EngineFacts', 'EngineHandle', 'InferenceRuntime',
        'ProviderSet',
    ),
    'runtimes.pt.export': ('export_program',),
    'runtimes.pt.runtime': ('PytorchFp16Runtime',),
    'runtimes.registry': ('create_runtime',),
    'runtimes.trt.build': ('build_engine',),
    'runtimes.trt.runtime': ('TensorrtRuntime',),
    'tensors': ('TensorSpec',),
    'worker.client': ('worker_hosts',),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_MODULE_OF[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too, for editors and interpreters."""
    return sorted({*globals(), *__all__})
