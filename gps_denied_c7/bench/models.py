"""Networks that take a given time on this machine, with small or large outputs."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gps_denied_c7.bench.cases import NETWORK_HEIGHT, NETWORK_WIDTH
from gps_denied_c7.demo.child_process import DemoError

__all__ = ['INPUT', 'BenchModel', 'build_model', 'calibrated_model', 'engine_session', 'layers_for', 'time_engine']

INPUT = 'image'
_WIDTH_OF_BODY = 16
_STRIDE = 8
_OPSET, _IR_VERSION = 17, 8
_PROBES = (4, 24)
_MOST_LAYERS = 4000


@dataclass(frozen=True, slots=True)
class BenchModel:
    """
    Hold a network that was made.

    :param engine_ms: median of one inference when it was made, milliseconds.
    """

    path: Path
    engine_ms: float


def build_model(channels: int, layers: int, *, dense_maps: int) -> bytes:
    """
    Return an ONNX model whose cost grows with ``layers``, the same at every call.

    ``image`` 1xCx480x640 float32 gives ``descriptor`` 1x256 float32 and, where there are maps, ``dense`` 1xMx480x640
    float32. The body is 3x3 convolutions at an eighth of the resolution, as feature extractors have.

    :param dense_maps: how many maps ``dense`` holds, 1.23 MB each; 0 for no such output.
    """
    from onnx import checker, numpy_helper, parser

    weights: dict[str, tuple[int, ...]] = {'stem': (_WIDTH_OF_BODY, channels, _STRIDE, _STRIDE)}
    steps = [f'relu0 = Conv <kernel_shape = {[_STRIDE] * 2}, strides = {[_STRIDE] * 2}> ({INPUT}, stem)']
    for number in range(1, layers + 1):
        weights[f'body{number}'] = (_WIDTH_OF_BODY, _WIDTH_OF_BODY, 3, 3)
        steps += [
            f'conv{number} = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (relu{number - 1}, body{number})',
            f'relu{number} = Relu (conv{number})',
        ]
    weights['head'] = (_WIDTH_OF_BODY, 256)
    steps += [
        f'pooled = GlobalAveragePool (relu{layers})',
        'flat = Flatten <axis = 1> (pooled)',
        'descriptor = MatMul (flat, head)',
    ]
    outputs = 'float[1,256] descriptor'
    if dense_maps:
        weights['map'] = (dense_maps * _STRIDE**2, _WIDTH_OF_BODY, 1, 1)
        steps += [
            f'cells = Conv <kernel_shape = [1, 1]> (relu{layers}, map)',
            f'dense = DepthToSpace <blocksize = {_STRIDE}> (cells)',
        ]
        outputs += f', float[1,{dense_maps},{NETWORK_HEIGHT},{NETWORK_WIDTH}] dense'
    head = f'<ir_version: {_IR_VERSION}, opset_import: ["" : {_OPSET}], producer_name: "gps_denied_c7">'
    signature = f'(float[1,{channels},{NETWORK_HEIGHT},{NETWORK_WIDTH}] {INPUT}) => ({outputs})'
    model = parser.parse_model('\n'.join([head, f'bench_{layers} {signature} {{', *steps, '}']))
    random = np.random.default_rng(7)
    for name, shape in weights.items():
        # He initialisation: values neither die nor explode, however many layers there are.
        values = random.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def engine_session(model: bytes | str, *, ort_defaults: bool = False) -> Any:
    """
    Return an ONNX Runtime session on the CPU with the threads and options that the node uses by default.

    :param ort_defaults: leave ONNX Runtime its own: a thread for each core, which spin while they wait.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not ort_defaults:
        options.intra_op_num_threads = max(1, len(os.sched_getaffinity(0)) - 1)
        options.inter_op_num_threads = 1
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    return ort.InferenceSession(model, options, providers=['CPUExecutionProvider'])


def time_engine(session: Any, seconds: float, warm_up: int = 3) -> list[int]:
    """Return the nanoseconds of each inference that fits into ``seconds``, tensors bound in place, at least one."""
    (spec,) = session.get_inputs()
    binding = session.io_binding()
    image = np.random.default_rng(1).random(spec.shape, np.float32)
    binding.bind_cpu_input(spec.name, image)
    outputs = [np.empty(output.shape, np.float32) for output in session.get_outputs()]
    for output, array in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(output.name, 'cpu', 0, np.float32, array.shape, array.ctypes.data)
    for _ in range(warm_up):
        session.run_with_iobinding(binding)
    durations: list[int] = []
    began = now = time.perf_counter_ns()
    while not durations or now - began < seconds * 1e9:
        session.run_with_iobinding(binding)
        before, now = now, time.perf_counter_ns()
        durations.append(now - before)
    return durations


def layers_for(target_ms: float, probes: tuple[tuple[int, float], tuple[int, float]]) -> int:
    """
    Return how many layers take about ``target_ms``, from two (layers, milliseconds) that were measured.

    At least one layer: a head that alone takes longer cannot be made faster.
    """
    (few, few_ms), (many, many_ms) = probes
    per_layer = max((many_ms - few_ms) / (many - few), 1e-3)
    return int(min(max(round(few + (target_ms - few_ms) / per_layer), 1), _MOST_LAYERS))


def calibrated_model(
    directory: Path,
    channels: int,
    target_ms: float,
    *,
    dense_maps: int,
    seconds: float = 0.5,
    earlier: Path | None = None,
) -> BenchModel:
    """
    Write a network that takes about ``target_ms`` here, and return it with what it took.

    :param seconds: for each of the three timings.
    :param earlier: output directory of another run, whose network is taken with what it took then.
    :raises DemoError: that run has not made one.
    """
    # What it took is part of its name, so that the file alone is enough for another run.
    name = f'bench_{channels}x{target_ms:g}ms_{f"{dense_maps}maps" if dense_maps else "small"}'
    if earlier is not None:
        for path in earlier.glob(f'{name}_*us_*.onnx'):
            shutil.copy(path, directory)
            return BenchModel(directory / path.name, int(path.stem.split('_')[3].removesuffix('us')) / 1e3)
        raise DemoError(f'{earlier} holds no network {name} of c7_bench: name the output of a run with these cases.')

    def timed(layers: int) -> tuple[bytes, float]:
        model = build_model(channels, layers, dense_maps=dense_maps)
        return model, float(np.median(time_engine(engine_session(model), seconds))) / 1e6

    few, many = _PROBES
    layers = layers_for(target_ms, ((few, timed(few)[1]), (many, timed(many)[1])))
    model, engine_ms = timed(layers)
    digest = hashlib.sha256(model).hexdigest()[:8]
    path = directory / f'{name}_{engine_ms * 1e3:.0f}us_{digest}.onnx'
    path.write_bytes(model)
    return BenchModel(path, engine_ms)
