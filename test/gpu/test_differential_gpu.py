"""
The answer is the network's answer on a GPU: exact random networks on each provider, against ONNX Runtime on the CPU.

Every value of these networks is an integer that FP16 and TF32 hold, so a right answer is equal to the bit once it is
rounded: cuDNN may choose a Winograd convolution, whose intermediate values are fractions that TF32 rounds.
C7_GPU_NETWORKS, C7_GPU_BUILT_NETWORKS and C7_GPU_FRAMES say how many, C7_GPU_FIRST the first seed; a network that
TensorRT builds an engine of takes several seconds.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.gpu.results import record
from support.onnx_models import bundle_around

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

import onnxruntime
from onnx import load_from_string

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.errors import C7Error, RuntimeUnavailableError
from gps_denied_c7.failover.rungs import Rung
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.runtimes.protocol import ProviderSet
from gps_denied_c7.tensors import TensorSpec
from gps_denied_c7.worker.client import WorkerHost, worker_hosts
from support.differential import NUMPY_TYPES, Tally, compare_host, plain_session, rounded, wrong_outputs
from support.random_networks import frames, random_network

NETWORKS = int(os.environ.get('C7_GPU_NETWORKS', '200'))
FIRST = int(os.environ.get('C7_GPU_FIRST', '0'))
BUILT_NETWORKS = int(os.environ.get('C7_GPU_BUILT_NETWORKS', '24'))
FRAMES = int(os.environ.get('C7_GPU_FRAMES', '100'))
# The first engine of a process that compiles kernels for a GPU newer than the library takes half a minute.
LOAD_S = 180.0


def config(root: Path, *, build: bool) -> C7InferenceConfig:
    return C7InferenceConfig(
        cpu_threads=1, engine_cache_dir=root / 'engines', ort_trt_cache_dir=root / 'ort', load_timeout_s=LOAD_S,
        gpu_memory_budget_bytes=8 << 30, build_on_configure=build,
    )  # fmt: skip


def described(path: Path) -> ModelBundle:
    """Return a bundle that names the tensors, as TensorRT wants them; raise ValueError where no rank is known."""
    session = plain_session(path)
    ranked = {value.name for value in load_from_string(path.read_bytes()).graph.output
              if value.type.tensor_type.HasField('shape')}  # fmt: skip
    if unranked := [output.name for output in session.get_outputs() if output.name not in ranked]:
        raise ValueError(f'{unranked} of unknown rank')

    def specs(tensors: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                tensor.name, np.dtype(NUMPY_TYPES[tensor.type]).name,
                tuple(axis if isinstance(axis, int) else None for axis in tensor.shape),
            )
            for tensor in tensors
        )  # fmt: skip

    return bundle_around(path, 'onnx_trt_ep', inputs=specs(session.get_inputs()), outputs=specs(session.get_outputs()))


def plain_wrong(path: Path, right: list[tuple[Any, Any]], provider: str) -> int:
    """Return how many answers plain ``session.run`` gets wrong on a provider, bound to nothing of ours."""
    session = onnxruntime.InferenceSession(str(path), providers=[provider, 'CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    answers = (dict(zip(names, map(rounded, session.run(names, frame)), strict=True)) for frame, _ in right)
    return sum(bool(wrong_outputs(answer, expected)) for answer, (_, expected) in zip(answers, right, strict=True))


def judge(
    name: str, rung: Rung, settings: C7InferenceConfig, count: int, directory: Path, provider: str,
    *, dense: bool = False,
) -> None:  # fmt: skip
    """Run ``count`` networks on a rung, print how many it took, and why not the others, and fail for a wrong answer."""
    tally, accepted, why_not = Tally(), 0, Counter[str]()
    path = directory / 'network.onnx'
    for seed in range(FIRST, FIRST + count):
        network = random_network(seed, exact=True, dense=dense)
        path.write_bytes(network.model)
        session = plain_session(path, optimised=False)
        names = [output.name for output in session.get_outputs()]
        label = f'seed {seed} ({network.dtype} {network.shape}: {", ".join(network.kinds)})'
        host: WorkerHost | None = None
        try:
            bundle = described(path) if rung.strategy == 'tensorrt' else ModelBundle.load(path)
            bundle = dataclasses.replace(bundle, name=f'network{seed}')
            host = worker_hosts(bundle, settings)(rung)
            facts = host.load()
        except RuntimeUnavailableError as error:
            pytest.skip(str(error))
        except (C7Error, ValueError) as error:
            why_not[f'{type(error).__name__}: {error!s:.120}'] += 1
            tally.networks += 1
            if host is not None:
                host.release()
            continue
        try:
            tally.networks += 1
            if facts.active_provider != provider:
                why_not[f'{facts.active_provider} ran it'] += 1
                continue
            accepted += 1
            requests = frames(network, seed, FRAMES)
            right = [(request, dict(zip(names, session.run(None, request), strict=True))) for request in requests]
            compare_host(host, right, tally, label, whole=True)
            if tally.wrong[label] and rung.strategy == 'onnx_trt_ep':
                print(f'{label}: {plain_wrong(path, right, provider)} of plain session.run are wrong too', flush=True)
        finally:
            host.release()
    record(
        f'differential: {name}', networks=tally.networks, accepted=accepted, answers=tally.answers,
        outputs=tally.outputs, wrong=sum(tally.wrong.values()), refused=sum(tally.refused.values()),
        not_accepted=dict(why_not.most_common(6)),
    )  # fmt: skip
    assert accepted, why_not
    assert not tally.wrong and not tally.refused, '\n'.join([str(tally), *tally.examples[:10]])


def test_random_networks_on_the_cuda_provider_are_answered_as_on_the_cpu(tmp_path):
    rung = Rung('onnx_trt_ep', ProviderSet.GPU)
    judge('CUDA provider', rung, config(tmp_path, build=False), NETWORKS, tmp_path, 'CUDAExecutionProvider')


def test_random_networks_on_the_tensorrt_provider_are_answered_as_on_the_cpu(tmp_path):
    rung = Rung('onnx_trt_ep', ProviderSet.GPU)
    settings = config(tmp_path, build=True)
    judge('TensorRT provider', rung, settings, BUILT_NETWORKS, tmp_path, 'TensorrtExecutionProvider')


def test_dense_networks_on_the_tensorrt_provider_are_answered_as_on_the_cpu(tmp_path):
    """Each becomes one engine."""
    rung = Rung('onnx_trt_ep', ProviderSet.GPU)
    settings = config(tmp_path, build=True)
    judge('one engine', rung, settings, BUILT_NETWORKS, tmp_path, 'TensorrtExecutionProvider', dense=True)


def test_random_networks_on_tensorrt_itself_are_answered_as_on_the_cpu(tmp_path):
    pytest.importorskip('tensorrt', reason='TensorRT for Python is not installed')
    rung = Rung('tensorrt', ProviderSet.GPU)
    settings = config(tmp_path, build=True)
    judge('TensorRT itself', rung, settings, BUILT_NETWORKS, tmp_path, 'TensorRT', dense=True)
