"""R-2 on a GPU: engines are built, run, refused and given back by TensorRT itself."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import AdmittedEngine, EngineGate
from gps_denied_c7.engines.manifest import EngineManifest, manifest_path
from gps_denied_c7.engines.store import EngineCache
from gps_denied_c7.errors import (
    EngineDeserializeError,
    EngineSchemaMismatchError,
    InferenceError,
    RuntimeUnavailableError,
)
from gps_denied_c7.failover.chain import RuntimeChain
from gps_denied_c7.failover.in_process import in_process_hosts
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.monitoring.thermal import UnknownThermalState
from gps_denied_c7.runtimes.gpu.cuda import Cuda, open_cuda
from gps_denied_c7.runtimes.gpu.nonfinite import FiniteCheck
from gps_denied_c7.runtimes.gpu.tensorrt_library import import_tensorrt
from gps_denied_c7.runtimes.host_profile import local_host_profile
from gps_denied_c7.runtimes.protocol import BuildConfig, BuildProgress, EngineCacheEntry, EngineHandle, ProviderSet
from gps_denied_c7.runtimes.trt.build import build_engine
from gps_denied_c7.runtimes.trt.engine import TensorrtEngine
from gps_denied_c7.runtimes.trt.runtime import TensorrtRuntime
from gps_denied_c7.worker.client import WorkerHost
from support import conformance
from support.gpu.results import percentiles, record
from support.gpu.superpoint import image, superpoint_inputs, superpoint_outputs, write_superpoint
from support.onnx_models import SHAPE, bundle_around
from support.shared_arrays import shared

Arrays = dict[str, NDArray]

ROUNDS, RUNS_PER_ROUND = 6, 150
MUTATIONS_OF_A_KIND = 60


@pytest.fixture(scope='module')
def gate() -> EngineGate:
    try:
        import_tensorrt('tensorrt')
        return EngineGate(local_host_profile())
    except RuntimeUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope='module')
def cuda(gate: EngineGate) -> Cuda:
    return open_cuda('tensorrt')


@dataclass(frozen=True)
class Bench:
    """A network, where its engines lie, and what it must answer."""

    directory: Path
    config: C7InferenceConfig
    model: ModelBundle
    request: Arrays
    expected: Arrays

    def differences(self, outputs: Arrays) -> dict[str, float]:
        """Return the largest difference by output, in percent of the expected output's range."""
        return {
            name: float(np.abs(outputs[name] - want).max() / (want.max() - want.min()) * 100)
            for name, want in self.expected.items()
        }


@pytest.fixture(scope='module')
def bench(gate: EngineGate, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    import onnxruntime

    directory = tmp_path_factory.mktemp('superpoint')
    path = write_superpoint(directory / 'superpoint.onnx')
    config = C7InferenceConfig(
        isolation='none',
        engine_cache_dir=directory / 'engines', ort_trt_cache_dir=directory / 'ort',
        gpu_memory_budget_bytes=8 << 30,
    )
    model = bundle_around(path, 'onnx_trt_ep', inputs=superpoint_inputs(), outputs=superpoint_outputs())
    request = {'image': image()}
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    expected = dict(zip(('scores', 'descriptors'), session.run(['scores', 'descriptors'], request), strict=True))
    return Bench(directory, config, model, request, expected)


Built = dict[str, EngineCacheEntry]


@pytest.fixture(scope='module')
def built(bench: Bench, gate: EngineGate) -> Built:
    """Build FP16, FP32, and FP16 by converting the model, which is what TensorRT without precision flags takes."""
    entries = {}
    for name, precision, convert in (('fp16', 'fp16', None), ('fp32', 'fp32', None), ('fp16 converted', 'fp16', True)):
        heard: list[BuildProgress] = []
        pauses = Pauses()
        start = time.monotonic()
        # Each in a cache of its own: the two of FP16 have one name. No timings are shared either.
        cache = EngineCache((bench.directory / 'engines' / name.replace(' ', '_'),))
        with pauses:
            entries[name] = build_engine(
                bench.model,
                bench.config,
                BuildConfig(allow_build=True, precision=precision, progress=heard.append),
                gate=gate,
                cache=cache,
                convert=convert,
            )
        manifest = EngineManifest.from_json(manifest_path(entries[name].path).read_bytes())
        record(
            f'tensorrt build {name}',
            seconds=round(time.monotonic() - start, 2),
            engine_bytes=manifest.engine_bytes,
            builder_flags=list(manifest.builder_flags),
            tensorrt=manifest.tensorrt,
            phases=sorted({progress.phase.split(',')[0] for progress in heard}),
            progress_reports=len(heard),
            longest_pause_of_another_thread_ms=round(pauses.longest_s * 1e3, 1),
        )
        assert heard
    return entries


class Pauses:
    """Measure for how long Python threads were kept from running."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Pauses:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(0.005):
            now = time.monotonic()
            self.longest_s = max(self.longest_s, now - last - 0.005)
            last = now


@dataclass(frozen=True)
class Loaded:
    runtime: TensorrtRuntime
    handle: EngineHandle

    @property
    def engine(self) -> TensorrtEngine:
        return self.runtime._bound(self.handle).engine

    def infer(self, request: Arrays) -> Arrays:
        return self.runtime.infer(self.handle, request)

    def pinned_inputs(self) -> Arrays:
        """Return the memory that requests are copied into: one that is filled there saves that copy."""
        return {name: tensor.host for name, tensor in self.engine.inputs.items()}


@pytest.fixture
def load(bench: Bench, gate: EngineGate) -> Iterator[Callable[[EngineCacheEntry], Loaded]]:
    loaded = []

    def make(entry: EngineCacheEntry) -> Loaded:
        runtime = TensorrtRuntime(bench.config, gate=gate)
        loaded.append(Loaded(runtime, runtime.deserialize_engine(entry)))
        return loaded[-1]

    yield make
    for one in loaded:
        one.runtime.release_engine(one.handle)


# --- conformance ------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> C7InferenceConfig:
    return C7InferenceConfig(engine_cache_dir=tmp_path / 'engines', ort_trt_cache_dir=tmp_path / 'ort')


@pytest.fixture
def request_arrays() -> Arrays:
    return {'left': np.arange(12, dtype=np.float32).reshape(SHAPE), 'right': np.full(SHAPE, 2.0, np.float32)}


@pytest.fixture
def subject(gate: EngineGate, config: C7InferenceConfig, tmp_path: Path) -> conformance.Subject:
    """What the conformance suite runs on: an engine that TensorRT has built here."""
    path = conformance.ARTEFACTS['tensorrt'](tmp_path)
    return conformance.Subject(conformance.runtime_of('tensorrt', config), bundle_around(path, 'tensorrt'))


globals().update(conformance.suite())


# --- answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['fp16', 'fp32', 'fp16 converted'])
def test_r2_answers_within_one_percent_of_the_cpus_fp32(
    name: str, bench: Bench, built: Built, load: Callable[[EngineCacheEntry], Loaded]
) -> None:
    loaded = load(built[name])
    assert loaded.handle.inputs == superpoint_inputs()
    assert loaded.handle.outputs == superpoint_outputs()
    differences = bench.differences(loaded.infer(bench.request))
    record(
        f'tensorrt accuracy {name}',
        **{f'{output}_percent_of_range': round(value, 4) for output, value in differences.items()},
        load_s=round(loaded.handle.facts.load_s, 3),
        notes=list(loaded.handle.facts.notes),
    )
    assert max(differences.values()) < 1.0


def test_r2_graph_and_check_are_on_the_gpu(
    bench: Bench, built: Built, load: Callable[[EngineCacheEntry], Loaded]
) -> None:
    """Neither had to be done without; each has proven itself while loading."""
    loaded = load(built['fp16'])
    assert loaded.handle.facts.notes == ()
    with_graph = {name: array.copy() for name, array in loaded.infer(bench.request).items()}
    assert loaded.engine.seen_finite
    loaded.engine._drop_graph()
    for name, array in loaded.infer(bench.request).items():
        np.testing.assert_allclose(array, with_graph[name], atol=1e-3)


def test_r2_answers_follow_the_input(bench: Bench, built: Built, load: Callable[[EngineCacheEntry], Loaded]) -> None:
    """A graph that read another buffer would answer the first image for ever."""
    loaded = load(built['fp32'])
    first = loaded.infer(bench.request)['scores'].copy()
    other = loaded.infer({'image': image(seed=1)})['scores'].copy()
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(loaded.infer(bench.request)['scores'], first)


def test_r2_inference_from_another_thread_than_loading(
    bench: Bench, built: Built, load: Callable[[EngineCacheEntry], Loaded]
) -> None:
    loaded = load(built['fp16'])
    answers: list[Any] = []

    def work() -> None:
        try:
            answers.append(bench.differences(loaded.infer(bench.request)))
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(answers[0], dict) and max(answers[0].values()) < 1.0


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_r1_non_finite_output_is_refused_and_the_next_answer_is_good(
    value: float, bench: Bench, built: Built, load: Callable[[EngineCacheEntry], Loaded]
) -> None:
    loaded = load(built['fp32'])
    bad = {'image': np.full_like(bench.request['image'], value)}
    with pytest.raises(InferenceError, match='non-finite'):
        loaded.infer(bad)
    assert max(bench.differences(loaded.infer(bench.request)).values()) < 1.0


def test_f5_free_axes_are_fixed(bench: Bench, gate: EngineGate, load: Callable[[EngineCacheEntry], Loaded]) -> None:
    path = write_superpoint(bench.directory / 'dynamic.onnx', dynamic=True)
    model = bundle_around(
        path, 'onnx_trt_ep', inputs=superpoint_inputs(240, 320), outputs=superpoint_outputs(240, 320)
    )
    entry = build_engine(model, bench.config, BuildConfig(allow_build=True), gate=gate)
    loaded = load(entry)
    assert loaded.handle.outputs == superpoint_outputs(240, 320)
    outputs = loaded.infer({'image': image(height=240, width=320)})
    assert outputs['descriptors'].shape == (1, 256, 30, 40)
    wrong = replace(model, inputs=superpoint_inputs(480, 640), outputs=superpoint_outputs())
    with pytest.raises(EngineSchemaMismatchError, match=r'input image.*480, 640.*240, 320'):
        load(replace(entry, model=wrong))


# --- refusals ---------------------------------------------------------------------------------------


def mutations(plan: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield 240 damaged copies: cut off, up to 63 bits flipped, 4 KiB zeroed, 8 random bytes near the start."""
    chance = random.Random(3)
    for _ in range(MUTATIONS_OF_A_KIND):
        yield 'truncated', plan[: chance.randrange(len(plan))]
        flipped = bytearray(plan)
        for position in chance.sample(range(len(plan)), chance.randint(1, 63)):
            flipped[position] ^= 1 << chance.randrange(8)
        yield 'bits flipped', bytes(flipped)
        zeroed = bytearray(plan)
        start = chance.randrange(len(plan) - 4096)
        zeroed[start : start + 4096] = bytes(4096)
        yield '4 KiB zeroed', bytes(zeroed)
        scribbled = bytearray(plan)
        start = chance.randrange(4096 - 8)
        scribbled[start : start + 8] = chance.randbytes(8)
        yield '8 bytes near the start', bytes(scribbled)


def test_g1_no_damaged_engine_passes_the_gate(bench: Bench, built: Built, gate: EngineGate, tmp_path: Path) -> None:
    entry = built['fp16']
    plan = entry.path.read_bytes()
    path = tmp_path / entry.path.name
    manifest_path(path).write_bytes(manifest_path(entry.path).read_bytes())
    passed, tried = {}, {}
    for kind, content in mutations(plan):
        if content == plan:
            continue
        path.write_bytes(content)
        tried[kind] = tried.get(kind, 0) + 1
        try:
            gate.admit(path)
            passed[kind] = passed.get(kind, 0) + 1
        except EngineSchemaMismatchError:
            continue
    record('mutated engines through the gate', tried=tried, total=sum(tried.values()), passed=sum(passed.values()))
    assert sum(tried.values()) >= 238
    assert not passed
    path.write_bytes(plan)
    assert gate.admit(path).plan == plan


def test_r2_what_tensorrt_says_of_a_bad_plan_is_in_the_exception(
    bench: Bench, built: Built, gate: EngineGate, cuda: Cuda
) -> None:
    """Past the gate on purpose; a truncated plan is what TensorRT refuses every time."""
    admitted = gate.admit(built['fp16'].path)
    engine = TensorrtEngine(cuda, import_tensorrt('tensorrt'))
    try:
        with pytest.raises(EngineDeserializeError) as caught:
            engine.load(AdmittedEngine(admitted.plan[:100_000], admitted.manifest, admitted.path), {}, 8 << 30)
    finally:
        engine.release()
    record('tensorrt error recorder, truncated plan', message=str(caught.value))
    assert 'TensorRT says' in str(caught.value)


def test_r2_a_model_that_the_parser_refuses_says_why(bench: Bench, gate: EngineGate) -> None:
    import onnx
    from onnx import TensorProto, helper

    node = helper.make_node('NoSuchOperator', ['image'], ['answer'], domain='nowhere')
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4)) for name in ('image', 'answer')]
    graph = helper.make_graph([node], 'graph', value[:1], value[1:])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid('', 17), helper.make_opsetid('nowhere', 1)], ir_version=8
    )
    path = bench.directory / 'unknown.onnx'
    path.write_bytes(onnx.ModelProto.SerializeToString(model))
    with pytest.raises(EngineDeserializeError) as caught:
        build_engine(ModelBundle.load(path), bench.config, BuildConfig(allow_build=True), gate=gate)
    record('tensorrt parser error', message=str(caught.value))
    assert 'NoSuchOperator' in str(caught.value)


def test_g1_a_refused_engine_ends_on_onnxruntime_with_the_alert(bench: Bench, built: Built, tmp_path: Path) -> None:
    """On its GPU providers where this ONNX Runtime has them, and never with the refused bytes."""
    path = tmp_path / built['fp16'].path.name
    manifest_path(path).write_bytes(manifest_path(built['fp16'].path).read_bytes())
    damaged = bytearray(built['fp16'].path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    engine = Artefact.of_file(path, strategy='tensorrt', weights_digest=bench.model.weights_digest, device='cuda')
    model = replace(bench.model, artefacts=(*bench.model.artefacts, engine))
    records: list[tuple[str, dict[str, Any]]] = []
    chain = RuntimeChain(
        model,
        bench.config,
        in_process_hosts(model, bench.config, UnknownThermalState()),
        emit=lambda kind, **payload: records.append((kind, payload)),
    )
    try:
        chain.load()
        differences = bench.differences(dict(chain.infer(bench.request).outputs))
        status = chain.status()
    finally:
        chain.release()
    assert status.active is not None and status.facts is not None
    record(
        'refused engine in the chain',
        active=status.active.name,
        provider=status.facts.active_provider,
        alerts=list(status.alerts),
        records=[kind for kind, _ in records],
    )
    assert status.active.strategy == 'onnx_trt_ep'
    kinds = [kind for kind, _ in records]
    assert kinds.count('c7.fallback_to_onnx_trt_ep') == 1
    rejected = next(payload for kind, payload in records if kind == 'c7.engine_rejected')
    assert rejected['rung'] == 'tensorrt/gpu' and 'engine_sha256' in rejected['reason']
    assert max(differences.values()) < 1.0


# --- building through the chain ---------------------------------------------------------------------


def test_f5_build_on_configure_builds_once_and_then_loads(bench: Bench, tmp_path: Path) -> None:
    config = replace(bench.config, engine_cache_dir=tmp_path / 'engines', build_on_configure=True)
    heard: list[BuildProgress] = []
    seconds = []
    for allowed in (True, True, False):
        started = time.monotonic()
        hosts = in_process_hosts(
            bench.model,
            replace(config, build_on_configure=allowed),
            UnknownThermalState(),
            on_build=heard.append,
        )
        chain = RuntimeChain(bench.model, config, hosts, emit=lambda kind, **payload: None)
        try:
            chain.load()
            status = chain.status()
            assert status.active is not None and status.active.name == 'tensorrt/gpu', status.failures
        finally:
            chain.release()
        seconds.append(round(time.monotonic() - started, 3))
        if len(seconds) == 1:
            reports = len(heard)
    record('build on configure', first_s=seconds[0], second_s=seconds[1], without_building_s=seconds[2])
    assert len(heard) == reports, 'only the first had anything to build'


# --- memory -----------------------------------------------------------------------------------------


def test_r2_release_gives_the_gpu_memory_back(
    bench: Bench, built: Built, gate: EngineGate, cuda: Cuda
) -> None:
    """The first load also initialises libraries, which stays; every further one gives back what it took."""
    runtime = TensorrtRuntime(bench.config, gate=gate)
    free = []
    loaded_free = []
    for _ in range(6):
        handle = runtime.deserialize_engine(built['fp16'])
        runtime.infer(handle, bench.request)
        loaded_free.append(cuda.memory()[0])
        runtime.release_engine(handle)
        gc.collect()
        free.append(cuda.memory()[0])
    record(
        'gpu memory after release',
        taken_mib=round((free[0] - loaded_free[1]) / 2**20, 1),
        lost_over_five_loads_mib=round((free[0] - free[-1]) / 2**20, 1),
    )
    assert free[0] - free[-1] <= 4 << 20


# --- the look for non-finite values -----------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_r1_the_gpu_judges_values_as_numpy_does(dtype: str, cuda: Cuda) -> None:
    """Each special value at each place, lengths that fill no quad, and 4096 bit patterns from the whole range."""
    limits = np.finfo(dtype)
    specials = np.array(
        [np.nan, -np.nan, np.inf, -np.inf, limits.max, limits.min, limits.tiny, limits.smallest_subnormal, 0.0, -0.0],
        dtype,
    )
    unsigned = np.uint32 if dtype == 'float32' else np.uint16
    patterns = np.random.default_rng(0).integers(0, np.iinfo(unsigned).max, 4096, unsigned, endpoint=True).view(dtype)
    stream = cuda.new_stream()
    wrong = []
    checked = 0
    for length in (1, 2, 3, 5, 8, 1023, 312_000, 1_228_800):
        array = cuda.pinned((length,), dtype)
        address = cuda.device_memory(array.nbytes)
        check = FiniteCheck(cuda, [(address, array.nbytes, dtype)], stream)
        copy = cuda.copy_to_device(address, array, stream)
        values = np.concatenate([specials, patterns]) if length == 5 else specials
        for place in sorted({0, length // 2, length - 1}):
            for value in values:
                array[...] = 1
                array[place] = value
                check.reset()
                copy()
                check.enqueue()
                cuda.call('cudaStreamSynchronize', stream)
                checked += 1
                if check.found == bool(np.isfinite(value)):
                    wrong.append((length, place, value))
        check.release()
        cuda.call('cudaFree', address)
    cuda.call('cudaStreamDestroy', stream)
    record(f'non-finite check on the gpu, {dtype}', checked=checked, wrong=len(wrong))
    assert not wrong


# --- speed ------------------------------------------------------------------------------------------


class BareLoop:
    """What anybody would write with pinned memory, and nothing around it: the yardstick."""

    def __init__(self, cuda: Cuda, plan: bytes, request: NDArray, *, graph: bool) -> None:
        import tensorrt

        self._runtime_module = cuda.runtime
        self._logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        self._runtime = tensorrt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        self.stream = cuda.new_stream()
        self._copies_in, self._copies_out = [], []
        self.memory = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            shape = tuple(self._engine.get_tensor_shape(name))
            array = cuda.pinned(shape, np.float32)
            address = cuda.device_memory(array.nbytes)
            self.memory.append(address)
            self._context.set_tensor_address(name, address)
            if self._engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT:
                array[...] = request
                self._copies_in.append((address, array.__array_interface__['data'][0], array.nbytes))
            else:
                self._copies_out.append((array.__array_interface__['data'][0], address, array.nbytes))
            setattr(self, f'_{name}', array)
        kinds = cuda.runtime.cudaMemcpyKind
        self._to_device, self._to_host = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self._graph = None
        self.run()
        if graph:
            self._graph = cuda.capture(self.stream, self._enqueue)
            self.run()

    def _enqueue(self) -> None:
        copy = self._runtime_module.cudaMemcpyAsync
        for target, source, size in self._copies_in:
            copy(target, source, size, self._to_device, self.stream)
        self._context.execute_async_v3(int(self.stream))
        for target, source, size in self._copies_out:
            copy(target, source, size, self._to_host, self.stream)

    def run(self) -> None:
        if self._graph is None:
            self._enqueue()
        else:
            self._runtime_module.cudaGraphLaunch(self._graph, self.stream)
        self._runtime_module.cudaStreamSynchronize(self.stream)

    def release(self, cuda: Cuda) -> None:
        cuda.call('cudaStreamSynchronize', self.stream)
        if self._graph is not None:
            cuda.call('cudaGraphExecDestroy', self._graph)
        self._context = self._engine = None
        for address in self.memory:
            cuda.call('cudaFree', address)
        cuda.call('cudaStreamDestroy', self.stream)


@pytest.mark.parametrize('name', ['fp16', 'fp32'])
def test_r2_latency_beside_the_bare_pinned_copy_loop(
    name: str,
    bench: Bench,
    built: Built,
    gate: EngineGate,
    cuda: Cuda,
    load: Callable[[EngineCacheEntry], Loaded],
) -> None:
    """
    Figures, no limits: what else runs on the machine is not known here.

    All take turns in short rounds, so that a change of the GPU's clock meets all of them.
    """
    entry = built[name]
    graphed, plain = load(entry), load(entry)
    plain.engine._drop_graph()
    in_place = {}
    for which, loaded in (('graphed', graphed), ('plain', plain)):
        in_place[which] = loaded.pinned_inputs()
        in_place[which]['image'][...] = bench.request['image']
    plan = gate.admit(entry.path).plan
    bare = BareLoop(cuda, plan, bench.request['image'], graph=False)
    bare_graph = BareLoop(cuda, plan, bench.request['image'], graph=True)
    subjects: dict[str, Callable[[], object]] = {
        'bare loop': bare.run,
        'bare loop, graph': bare_graph.run,
        'infer, inputs in place': lambda: graphed.infer(in_place['graphed']),
        'infer, inputs copied': lambda: graphed.infer(bench.request),
        'infer without graph, inputs in place': lambda: plain.infer(in_place['plain']),
        'infer without graph, inputs copied': lambda: plain.infer(bench.request),
    }
    seconds: dict[str, list[float]] = {subject: [] for subject in subjects}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(ROUNDS + 1):
            for subject, run in subjects.items():
                for _ in range(RUNS_PER_ROUND):
                    start = time.perf_counter()
                    run()
                    end = time.perf_counter()
                    # The first round warms up.
                    if round_:
                        seconds[subject].append(end - start)
    finally:
        gc.enable()
        bare.release(cuda)
        bare_graph.release(cuda)
    figures = {subject: percentiles(values) for subject, values in seconds.items()}
    reference = figures['bare loop']['p50_ms']
    ratios = {subject: round(values['p50_ms'] / reference, 3) for subject, values in figures.items()}
    record(f'tensorrt latency {name}', **figures, ratio_of_p50_to_bare_loop=ratios)
    assert all(len(values) == ROUNDS * RUNS_PER_ROUND for values in seconds.values())


def test_r2_what_a_request_is_made_of(
    bench: Bench, built: Built, cuda: Cuda, load: Callable[[EngineCacheEntry], Loaded]
) -> None:
    """Each stage alone and waited for, and then what a request takes in which nothing waits for another."""
    loaded = load(built['fp16'])
    engine = loaded.engine
    in_place = loaded.pinned_inputs()
    in_place['image'][...] = bench.request['image']
    check = engine._check
    assert check is not None
    stages: dict[str, Callable[[], object]] = {
        'copy a request to pinned memory': lambda: np.copyto(in_place['image'], bench.request['image']),
        'copy it to the GPU': lambda: [tensor.copy() for tensor in engine.inputs.values()],
        'network': lambda: engine._context.execute_async_v3(int(engine._stream)),
        'look for non-finite values': check.enqueue,
        'copy the answer to pinned memory': lambda: [tensor.copy() for tensor in engine.outputs.values()],
        'copy it elsewhere': lambda: {name: array.copy() for name, array in engine._answer.items()},
        'infer, in place': lambda: loaded.infer(in_place),
    }
    seconds: dict[str, list[float]] = {stage: [] for stage in stages}
    for round_ in range(RUNS_PER_ROUND + 20):
        for stage, run in stages.items():
            start = time.perf_counter()
            run()
            cuda.call('cudaStreamSynchronize', engine._stream)
            end = time.perf_counter()
            if round_ >= 20:
                seconds[stage].append(end - start)
    record('tensorrt stages fp16', **{stage: percentiles(values) for stage, values in seconds.items()})
    assert max(bench.differences(loaded.infer(in_place)).values()) < 1.0


def test_f1_the_gpu_reads_and_writes_memory_that_two_processes_share(
    bench: Bench, built: Built, cuda: Cuda, load: Callable[[EngineCacheEntry], Loaded]
) -> None:
    """Requests are mapped for reading alone, which not every GPU can lock: what came of it is in the results."""
    loaded = load(built['fp16'])
    own, request = shared(bench.request, writable=False)
    _, answer = shared({name: np.zeros_like(array) for name, array in bench.expected.items()}, writable=True)
    loaded.infer(request)
    loaded.runtime.place(loaded.handle, inputs=request, outputs=answer)
    attribute = cuda.runtime.cudaDeviceAttr.cudaDevAttrHostRegisterReadOnlySupported
    locks_read_only = bool(cuda.call('cudaDeviceGetAttribute', attribute, 0))
    in_place = {
        name: bool(np.shares_memory(tensor.host, {**request, **answer}[name]))
        for name, tensor in {**loaded.engine.inputs, **loaded.engine.outputs}.items()
    }
    record('tensors in shared memory', in_place=in_place, locks_read_only_memory=locks_read_only)
    assert all(in_place[name] for name in answer)
    assert in_place['image'] == locks_read_only
    for seed in (1, 0):
        own['image'][...] = image(seed=seed)
        outputs = loaded.infer(request)
    assert all(np.shares_memory(outputs[name], array) for name, array in answer.items())
    assert max(bench.differences(answer).values()) < 1.0


def test_f1_a_worker_beside_an_engine_in_this_process(bench: Bench, built: Built) -> None:
    """Requests are filled in place in the memory that both processes see; the GPU reads and writes there."""
    entry = built['fp16']
    model = bundle_around(entry.path, 'tensorrt', inputs=superpoint_inputs(), outputs=superpoint_outputs())
    rung = Rung('tensorrt', ProviderSet.GPU)
    hosts: dict[str, Any] = {
        'in this process, request copied': in_process_hosts(model, bench.config, UnknownThermalState())(rung),
        'in a worker, request in place': WorkerHost(rung, model, bench.config),
    }
    seconds: dict[str, list[float]] = {name: [] for name in hosts}
    try:
        for host in hosts.values():
            host.load()
        for round_ in range(ROUNDS * RUNS_PER_ROUND + 20):
            for name, host in hosts.items():
                request = host.request_arrays or bench.request
                for key, array in request.items():
                    if array is not bench.request[key]:
                        np.copyto(array, bench.request[key])
                start = time.perf_counter()
                answer = host.infer(request)
                end = time.perf_counter()
                if round_ >= 20:
                    seconds[name].append(end - start)
                else:
                    assert max(bench.differences(answer).values()) < 1.0
    finally:
        for host in hosts.values():
            host.release()
    record('tensorrt fp16, processes', **{name: percentiles(values) for name, values in seconds.items()})
