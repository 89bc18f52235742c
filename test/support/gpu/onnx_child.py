"""
One load of OnnxTrtEpRuntime, or of what it is compared with, in a process of its own.

CUDA contexts, cuDNN and TensorRT keep state for the life of a process, and a broken context ends it: each
measurement starts from nothing. Called as ``python onnx_child.py OUT JSON``; the answer goes to the file OUT.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.admission import EngineGate
from gps_denied_c7.engines.ort_store import CacheListing
from gps_denied_c7.errors import C7Error
from gps_denied_c7.model.artefact import Artefact
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.onnx_file import ep_context_model
from gps_denied_c7.runtimes.host_profile import linked_tensorrt, local_host_profile
from gps_denied_c7.runtimes.ort.providers import CPU, CUDA, TENSORRT
from gps_denied_c7.runtimes.ort.runtime import OnnxTrtEpRuntime
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineCacheEntry, EngineHandle, ProviderSet

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.gpu.superpoint import image, superpoint_inputs, superpoint_outputs


def bundle(path: Path, strategy: str) -> ModelBundle:
    """Return a bundle that holds one artefact of the suite's network."""
    weights = f'sha256:{"0" * 64}'
    return ModelBundle(
        name='superpoint',
        root=path.parent,
        weights_digest=weights,
        inputs=superpoint_inputs(),
        outputs=superpoint_outputs(),
        artefacts=(Artefact.of_file(path, strategy=strategy, weights_digest=weights, io_names={}),),
    )


def config_of(task: Mapping[str, Any]) -> C7InferenceConfig:
    root = Path(task['root'])
    return C7InferenceConfig(
        engine_cache_dir=root / 'engine_cache',
        ort_trt_cache_dir=root / 'ort_trt_cache',
        ort_disallow_cpu_fallback=task.get('disallow_cpu', False),
    )


def import_onnxruntime() -> Any:
    """Import ONNX Runtime and, from 1.21 on, the CUDA libraries that pip installed beside it."""
    import onnxruntime

    if hasattr(onnxruntime, 'preload_dlls'):
        onnxruntime.preload_dlls()
    return onnxruntime


def watch(onnxruntime: Any) -> dict[str, list[Any]]:
    """Have every session and every run of ONNX Runtime written down."""
    seen: dict[str, list[Any]] = {'providers': [], 'options': [], 'made_s': [], 'run_s': [], 'engine': []}
    base = onnxruntime.InferenceSession
    make, run = base.__init__, base.run_with_iobinding

    def making(self: Any, source: Any, *rest: Any, **named: Any) -> None:
        seen['providers'].append([name for name, _ in named['providers']])
        seen['options'].append({name: dict(options) for name, options in named['providers']})
        seen['engine'].append(isinstance(source, bytes) and b'EPContext' in source[-(1 << 16) :] + source[: 1 << 16])
        start = time.perf_counter()
        try:
            make(self, source, *rest, **named)
        finally:
            seen['made_s'].append(time.perf_counter() - start)

    def running(self: Any, binding: Any, *rest: Any) -> None:
        start = time.perf_counter()
        run(self, binding, *rest)
        seen['run_s'].append(time.perf_counter() - start)

    base.__init__, base.run_with_iobinding = making, running
    return seen


def timed(call: Callable[[], object], runs: int) -> list[float]:
    """Return the seconds of each of ``runs`` calls, after some that do not count."""
    for _ in range(max(3, runs // 20)):
        call()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def save(task: Mapping[str, Any], outputs: Mapping[str, NDArray]) -> None:
    if path := task.get('save'):
        np.savez(path, **outputs)


def probe(task: Mapping[str, Any]) -> dict[str, Any]:
    """Say what this Python's ONNX Runtime offers and which TensorRT it loads."""
    ort = import_onnxruntime()
    answer: dict[str, Any] = {'onnxruntime': ort.__version__, 'providers': ort.get_available_providers()}
    try:
        answer['tensorrt'] = linked_tensorrt(ort)
    except C7Error as error:
        answer['tensorrt_error'] = str(error)
    return answer


def load(task: Mapping[str, Any]) -> dict[str, Any]:
    """Load a model or an engine as the chain would, run it, and say all that can be seen of it."""
    path = Path(task['path'])
    if not task.get('own_builder', True):
        sys.modules['tensorrt'] = None  # type: ignore[assignment]
    start = time.perf_counter()
    ort = import_onnxruntime() if task.get('touch', True) else None
    import_s = time.perf_counter() - start
    seen = watch(ort) if ort else {}
    gate = EngineGate(local_host_profile()) if path.suffix == '.engine' else None
    runtime = OnnxTrtEpRuntime(config_of(task), gate=gate, providers=ProviderSet(task.get('providers', 'gpu')))
    model = bundle(path, 'onnx_trt_ep')
    entry = EngineCacheEntry(
        path, task.get('sha256'), model, BuildConfig(task.get('build', False), task.get('precision', 'fp16'))
    )
    start = time.perf_counter()
    try:
        handle = runtime.deserialize_engine(entry)
    except C7Error as error:
        return {
            'error': type(error).__name__,
            'message': str(error),
            'touched': 'onnxruntime' in sys.modules,
            'seen': seen,
        }
    load_s = time.perf_counter() - start
    facts = handle.facts
    warm_ups = len(seen.get('run_s', []))
    answer: dict[str, Any] = {
        'import_s': import_s,
        'load_s': load_s,
        'first_run_s': seen['run_s'][0] if warm_ups else None,
        'warm_ups': warm_ups,
        'active': facts.active_provider,
        'requested': list(facts.requested_providers),
        'cpu_only': facts.cpu_only,
        'cpu_nodes': facts.cpu_nodes,
        'notes': list(facts.notes),
        'seen': seen,
        'io': type(runtime._engines[handle].engine.io).__name__,
    }
    frame = {'image': image(seed=3)}
    save(task, runtime.infer(handle, frame))
    if runs := task.get('runs', 0):
        answer['infer_s'] = timed(lambda: runtime.infer(handle, frame), runs)
        session = runtime._engines[handle].engine.session
        names = [spec.name for spec in handle.outputs]
        answer['session_run_s'] = timed(lambda: session.run(names, frame), max(20, runs // 4))
    answer['memory'] = release(runtime, handle, facts.active_provider)
    return answer


def release(runtime: OnnxTrtEpRuntime, handle: EngineHandle, provider: str) -> dict[str, int] | None:
    """Release twice, and say how much GPU memory was free before and after."""
    if provider == CPU:
        runtime.release_engine(handle)
        return None
    from gps_denied_c7.runtimes.gpu.cuda import open_cuda

    try:
        cuda = open_cuda('onnx_trt_ep')
    except C7Error:
        runtime.release_engine(handle)
        return None
    before, total = cuda.memory()
    runtime.release_engine(handle)
    runtime.release_engine(handle)
    after, _ = cuda.memory()
    return {'free_loaded_bytes': before, 'free_released_bytes': after, 'total_bytes': total}


def embed(task: Mapping[str, Any]) -> dict[str, Any]:
    """Make a session on the cache's engine, its bytes inside the model or in a private copy hashed as written."""
    import hashlib

    ort = import_onnxruntime()
    directory = next(path for path in (Path(task['root']) / 'ort_trt_cache').iterdir() if path.is_dir())
    listing = CacheListing.from_json((directory / 'listing.json').read_bytes())
    whole = listing.whole_graph
    assert whole is not None, 'the cache has no engine that is the whole model'
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if task['unoptimised']:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    every = {TENSORRT: {'trt_fp16_enable': True}, CUDA: {}, CPU: {}}
    providers = [(name, every[name]) for name in task['providers']]
    shape = {'name': 'superpoint', 'inputs': whole.inputs, 'outputs': whole.outputs, 'sm': listing.built_for.sm}
    private = Path(task['root']) / f'private-{time.monotonic_ns()}'
    start = time.perf_counter()
    plan = (directory / whole.engine).read_bytes()
    hashlib.sha256(plan).hexdigest()
    if task['mode'] == 1:
        source: Any = ep_context_model(plan, **shape)
    else:
        private.mkdir(mode=0o700)
        (private / 'copy.engine').write_bytes(plan)
        import onnx

        around = onnx.ModelProto.FromString(ep_context_model(b'copy.engine', **shape))
        next(attribute for attribute in around.graph.node[0].attribute if attribute.name == 'embed_mode').i = 0
        (private / 'model.onnx').write_bytes(around.SerializeToString())
        source = str(private / 'model.onnx')
    session = ort.InferenceSession(source, sess_options=options, providers=providers, enable_fallback=0)
    made_s = time.perf_counter() - start
    assert session.get_providers()[0] == TENSORRT, session.get_providers()
    answers = session.run([spec.name for spec in whole.outputs], {'image': image(seed=3)})
    run_s = time.perf_counter() - start - made_s
    shutil.rmtree(private, ignore_errors=True)
    return {'made_s': made_s, 'first_run_s': run_s, 'plan_bytes': len(plan), 'mean': float(np.mean(answers[0]))}


def direct(task: Mapping[str, Any]) -> dict[str, Any]:
    """Build the network with TensorRT itself where there is no engine yet, and run it."""
    from gps_denied_c7.runtimes.trt.runtime import TensorrtRuntime

    runtime = TensorrtRuntime(config_of(task), gate=EngineGate(local_host_profile()))
    start = time.perf_counter()
    build = BuildConfig(allow_build=True, precision=task.get('precision', 'fp16'))
    entry = runtime.compile_engine(bundle(Path(task['path']), 'onnx_trt_ep'), build)
    build_s = time.perf_counter() - start
    start = time.perf_counter()
    handle = runtime.deserialize_engine(entry)
    answer: dict[str, Any] = {
        'build_s': build_s,
        'load_s': time.perf_counter() - start,
        'engine': str(entry.path),
        'sha256': entry.sha256,
        'notes': list(handle.facts.notes),
    }
    frame = {'image': image(seed=3)}
    save(task, runtime.infer(handle, frame))
    if runs := task.get('runs', 0):
        answer['infer_s'] = timed(lambda: runtime.infer(handle, frame), runs)
    runtime.release_engine(handle)
    return answer


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    out, task = Path(sys.argv[1]), json.loads(sys.argv[2])
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f'{record.levelname} {record.getMessage()}')

    logging.getLogger('gps_denied_c7').addHandler(Keep())
    try:
        answer = {'probe': probe, 'load': load, 'embed': embed, 'direct': direct}[task['do']](task)
    except Exception:
        traceback.print_exc()
        return 1
    out.write_text(json.dumps({**answer, 'log': lines}))
    return 0


if __name__ == '__main__':
    sys.exit(main())
