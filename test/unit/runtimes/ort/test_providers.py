"""R-3: every way to make a session, best first, from what is at hand; planning touches no file and no library."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gps_denied_c7.config import C7InferenceConfig
from gps_denied_c7.engines.ort_store import WHOLE_ENGINE, BuiltFor, CachedFile, CacheListing, VerifiedCache, WholeGraph
from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.onnx_file import OnnxModel
from gps_denied_c7.runtimes.ort.providers import (
    CPU,
    CUDA,
    TENSORRT,
    Attempt,
    Engines,
    SessionPlan,
    plan_model,
    provider_options,
)
from gps_denied_c7.runtimes.protocol import BuildConfig, EngineCacheEntry, ProviderSet
from gps_denied_c7.tensors import TensorSpec

DIGEST = 'a' * 64
TENSORS = (TensorSpec('image', 'float32', (1, 1, 8, 8)),)
MODEL = OnnxModel(b'model', DIGEST, {'image': (1, 1, 8, 8)}, {'image': 'float32'}, {}, {'w': np.zeros(1, np.float32)})
BUILT_FOR = BuiltFor(
    model_sha256=DIGEST, precision='fp16', axes={}, onnxruntime='1.17.1', tensorrt='8.6.0', gpu='a GPU', sm=87,
    driver='540.4', platform='linux-aarch64',
)  # fmt: skip
PLACE = Path('/nowhere/kept')
# In the directory of these, the provider finds its engines; and the model is one engine.
PROVIDERS = VerifiedCache(PLACE, CacheListing(built_for=BUILT_FOR, files=(CachedFile('a.engine', DIGEST, 1),)), None)
ONE = VerifiedCache(
    PLACE,
    CacheListing(
        built_for=BUILT_FOR,
        files=(CachedFile(WHOLE_ENGINE, DIGEST, 4),),
        whole_graph=WholeGraph(WHOLE_ENGINE, TENSORS, TENSORS),
    ),
    b'plan',
)
NEW = SimpleNamespace(directory=PLACE, built_for=BUILT_FOR)
BUILT = Attempt((TENSORRT, CUDA, CPU), b'around', engine=True, built=b'plan')

ALL, GPU = 'tensorrt cuda cpu', 'cuda cpu'
ANY = ProviderSet.ANY


def planned(
    engines: Engines = Engines(),  # noqa: B008
    *,
    providers: ProviderSet = ANY,
    disallow_cpu: bool = False,
    allow_build: bool = False,
) -> SessionPlan:
    bundle = ModelBundle(name='model', root=Path('/nowhere'), weights_digest=f'sha256:{DIGEST}')
    build = BuildConfig(allow_build=allow_build, precision='fp16')
    entry = EngineCacheEntry(Path('/nowhere/model.onnx'), DIGEST, bundle, build)
    return plan_model(entry, MODEL, {}, engines, providers=providers, disallow_cpu=disallow_cpu, notes=['found'])


def ways(plan: SessionPlan) -> list[str]:
    """Return each attempt's providers in short; ``!`` is around an engine, ``+`` has the provider build."""
    short = {TENSORRT: 'tensorrt', CUDA: 'cuda', CPU: 'cpu'}
    return [
        ' '.join(short[name] for name in attempt.providers) + '!' * attempt.engine + '+' * attempt.builds
        for attempt in plan.attempts
    ]


@pytest.mark.parametrize(
    ('engines', 'options', 'expected'),
    [
        (Engines(), {'providers': ProviderSet.CPU}, ['cpu']),
        (Engines(), {}, [GPU, 'cpu']),
        (Engines(), {'providers': ProviderSet.GPU}, [GPU]),
        (Engines(), {'disallow_cpu': True}, [GPU]),
        (Engines(), {'allow_build': True}, [f'{ALL}+', GPU, 'cpu']),
        (Engines(build=NEW), {'allow_build': True}, [f'{ALL}+', GPU, 'cpu']),
        (Engines(build=NEW, built=BUILT), {'allow_build': True}, [f'{ALL}!', f'{ALL}+', GPU, 'cpu']),
        (Engines(PROVIDERS), {}, [ALL, GPU, 'cpu']),
        (Engines(PROVIDERS), {'allow_build': True}, [ALL, GPU, 'cpu']),
        (Engines(ONE), {}, [f'{ALL}!', GPU, 'cpu']),
        (Engines(ONE), {'allow_build': True, 'disallow_cpu': True}, [f'{ALL}!', f'{ALL}+', GPU]),
    ],
)  # fmt: skip
def test_every_way_best_first(engines: Engines, options: dict[str, object], expected: list[str]) -> None:
    assert ways(planned(engines, **options)) == expected


def test_the_provider_builds_where_that_is_kept_and_reads_what_was_verified_alone() -> None:
    new, warm = planned(Engines(build=NEW), allow_build=True).attempts[0], planned(Engines(PROVIDERS)).attempts[0]
    assert (new.cache, new.warm) == (PLACE, None) and (warm.cache, warm.warm) == (PLACE, PROVIDERS)
    # One engine is no directory for the provider: it would not find it by its own name and build again.
    assert [attempt.cache for attempt in planned(Engines(ONE), allow_build=True).attempts] == [None] * 4


def test_a_plan_says_why_tensorrt_is_left_out() -> None:
    assert planned().notes[0] == 'found' and 'build_on_configure is off' in planned().notes[1]
    for engines, allow_build in ((Engines(), True), (Engines(PROVIDERS), False), (Engines(ONE), False)):
        assert planned(engines, allow_build=allow_build).notes == ('found',)
    assert planned(providers=ProviderSet.CPU).notes == ('found',)


def test_the_tensorrt_provider_gets_a_cache_only_where_one_was_planned(tmp_path: Path) -> None:
    config = C7InferenceConfig(ort_trt_cache_dir=tmp_path, engine_cache_dir=tmp_path)
    plan = planned(Engines(PROVIDERS))
    with_cache = provider_options(plan, plan.attempts[0], config)[TENSORRT]
    without = provider_options(plan, plan.attempts[1], config)[TENSORRT]
    assert (with_cache['trt_engine_cache_enable'], with_cache['trt_engine_cache_path']) == (True, str(PLACE))
    assert (without['trt_engine_cache_enable'], without['trt_engine_cache_path']) == (False, str(tmp_path / DIGEST))
    assert with_cache['trt_fp16_enable'] is True
