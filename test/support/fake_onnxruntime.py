"""A stand-in for ONNX Runtime's GPU providers, which this machine does not have: it has no CUDA."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnxruntime as real
from onnx import helper

TENSORRT = 'TensorrtExecutionProvider'
CUDA = 'CUDAExecutionProvider'
CPU = 'CPUExecutionProvider'


@dataclass
class Subgraph:
    """What ONNX Runtime reports for one provider."""

    ep_name: str
    nodes: int

    def get_nodes(self) -> list[object]:
        return [object()] * self.nodes


@dataclass
class GpuBehaviour:
    """
    Say how the absent GPU would behave.

    :param available: what this build of ONNX Runtime offers.
    :param raises: providers whose libraries are missing so that the constructor raises, with its text.
    :param silent: providers that are left out with a mere warning.
    :param placement: graph nodes by provider; None for an ONNX Runtime before 1.24, which cannot tell.
    :param profile: graph nodes by provider that a profiled run writes down; None where none can be written.
    :param engines: TensorRT engines that the graph becomes.
    :param engine_raises: what a session on an EPContext model raises.
    :param ignores_enable_fallback: retry whatever the constructor is told, as 1.17 does.
    :param run_raises: what every run raises.
    """

    available: tuple[str, ...] = (TENSORRT, CUDA, CPU)
    raises: dict[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    placement: dict[str, int] | None = None
    profile: dict[str, int] | None = None
    engines: int = 1
    engine_raises: Exception | None = None
    ignores_enable_fallback: bool = False
    run_raises: Exception | None = None


class FakeOnnxRuntimeThisMachineHasNoCuda(ModuleType):
    """
    Answer as an onnxruntime with GPU providers would.

    The arithmetic is the real ONNX Runtime's on the CPU; only which provider is said to do it is made up.
    An EPContext model, which only a GPU can run, answers zeros.
    """

    def __init__(self, behaviour: GpuBehaviour) -> None:
        super().__init__('onnxruntime')
        self.behaviour = behaviour
        self.attempts: list[dict[str, Any]] = []
        self.sessions: list[_FakeSession] = []
        self.retries = 0
        self.builds: list[str] = []
        self.SessionOptions = _RecordingOptions
        self.OrtValue = real.OrtValue
        self.GraphOptimizationLevel = real.GraphOptimizationLevel
        self.__version__ = '1.17.1'
        base = _FakeSession if behaviour.placement is None else _FakePlacementSession
        self.InferenceSession = type('InferenceSession', (base,), {'module': self})

    def get_available_providers(self) -> list[str]:
        return list(self.behaviour.available)

    @property
    def runs(self) -> int:
        return sum(session.runs for session in self.sessions)


class _RecordingOptions(real.SessionOptions):
    def __init__(self) -> None:
        super().__init__()
        self.axes: dict[str, int] = {}

    def add_free_dimension_override_by_name(self, name: str, size: int) -> None:
        self.axes[name] = size
        super().add_free_dimension_override_by_name(name, size)


class _FakeSession:
    module: FakeOnnxRuntimeThisMachineHasNoCuda

    def __init__(
        self, source: bytes | str, sess_options: _RecordingOptions, providers: list[Any], enable_fallback: int = 1
    ) -> None:
        names = [provider[0] for provider in providers]
        self.module.attempts.append(
            {
                'source': source,
                'providers': names,
                'options': dict(providers),
                'session_options': sess_options,
                'enable_fallback': enable_fallback,
            }
        )
        behaviour = self.module.behaviour
        self._enable_fallback = behaviour.ignores_enable_fallback or enable_fallback == 1
        for name in names:
            if name in behaviour.raises:
                # The real constructor retries without the options unless it is kept from it.
                if not self._enable_fallback:
                    raise RuntimeError(behaviour.raises[name])
                self.module.retries += 1
                names = [CUDA, CPU] if name == TENSORRT else [CPU]
                break
        self._providers = [name for name in names if name in behaviour.available and name not in behaviour.silent]
        if CPU not in self._providers:
            self._providers.append(CPU)
        self.runs = 0
        self._profile = Path(f'{sess_options.profile_file_prefix}.json') if sess_options.enable_profiling else None
        model = onnx.load_model_from_string(source) if isinstance(source, bytes) else onnx.load(source)
        if any(node.op_type == 'EPContext' for node in model.graph.node):
            if behaviour.engine_raises is not None:
                raise behaviour.engine_raises
            model = _zeros_like(model)
            source = model.SerializeToString()
        elif TENSORRT in self._providers:
            self._build(dict(providers)[TENSORRT])
        sess_options.enable_profiling = False
        self._real = real.InferenceSession(source, sess_options, [CPU], enable_fallback=0)
        self.module.sessions.append(self)

    def _build(self, options: dict[str, Any]) -> None:
        """Load what the cache has, build the rest, and keep that where a cache is wanted; as the provider does."""
        for index in range(self.module.behaviour.engines):
            path = Path(options['trt_engine_cache_path']) / f'TensorrtExecutionProvider_graph_{index}_sm87.engine'
            if options['trt_engine_cache_enable'] and path.exists():
                continue
            self.module.builds.append(path.name)
            if options['trt_engine_cache_enable']:
                path.write_bytes(b'ftrt' + path.name.encode())
                path.with_suffix('.profile').write_bytes(b'shapes')

    def get_providers(self) -> list[str]:
        return self._providers

    def get_inputs(self) -> list[Any]:
        return self._real.get_inputs()

    def get_outputs(self) -> list[Any]:
        return self._real.get_outputs()

    def io_binding(self) -> Any:
        return self._real.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        self.runs += 1
        if self.module.behaviour.run_raises is not None:
            raise self.module.behaviour.run_raises
        self._real.run_with_iobinding(binding)

    def end_profiling(self) -> str:
        assert self._profile is not None
        if (nodes := self.module.behaviour.profile) is not None:
            events = [
                {'cat': 'Node', 'name': f'{name}{index}_kernel_time', 'args': {'provider': name, 'node_index': '0'}}
                for name, count in nodes.items()
                for index in range(count)
            ]
            self._profile.write_text(json.dumps([{'cat': 'Session', 'name': 'model_run', 'args': {}}, *events * 2]))
        return str(self._profile)


class _FakePlacementSession(_FakeSession):
    def get_provider_graph_assignment_info(self) -> list[Subgraph]:
        engines = self.module.behaviour.engines
        return [
            Subgraph(name, nodes)
            for name, nodes in self.module.behaviour.placement.items()
            for _ in range(engines if name == TENSORRT else 1)
        ]


def _zeros_like(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with the same inputs and outputs that answers zeros."""
    nodes, shapes = [], []
    for value in model.graph.output:
        sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        shapes.append(helper.make_tensor(f'{value.name}.shape', onnx.TensorProto.INT64, [len(sizes)], sizes))
        nodes.append(helper.make_node('ConstantOfShape', [f'{value.name}.shape'], [value.name]))
    graph = helper.make_graph(nodes, 'zeros', model.graph.input, model.graph.output, shapes)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
