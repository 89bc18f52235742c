"""What the GPU suite shares, and the reason for its skips where there is no GPU."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from support.gpu.report import write_report
from support.gpu.results import VARIABLE, record

HERE = Path(__file__).parent

# Device files of a discrete GPU and of a Jetson; looked at by name, so that no vendor library is loaded to decide.
GPU_SIGNS = ('/proc/driver/nvidia/version', '/dev/nvidia0', '/dev/nvidiactl', '/dev/nvhost-gpu')

# What came of the conformance suite, by what it ran on.
conformed: dict[str, Counter[str]] = {}


@pytest.fixture(scope='session')
def superpoint_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle around the SuperPoint-shaped network, golden answers from ONNX Runtime on the CPU in FP32."""
    from gps_denied_c7.ground.bundle_request import BundleRequest
    from gps_denied_c7.ground.make_bundle import make_bundle
    from support.gpu.superpoint import write_superpoint

    directory = tmp_path_factory.mktemp('superpoint_bundle')
    onnx = write_superpoint(directory / 'superpoint.onnx')
    return make_bundle(BundleRequest(model=onnx, output=directory / 'bundle')).bundle.root


@pytest.fixture(scope='session')
def flight_caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Parameters that name the caches of the node's engines: what one test has built, the later ones load."""
    root = tmp_path_factory.mktemp('flight_caches')
    return {'engine_cache_dir': str(root / 'engines'), 'ort_trt_cache_dir': str(root / 'ort')}


def absent_gpu() -> str | None:
    """Say why the suite cannot run here, None where it can."""
    if any(Path(sign).exists() for sign in GPU_SIGNS):
        return None
    return f'no NVIDIA GPU here: none of {", ".join(GPU_SIGNS)}'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = absent_gpu()
    for item in items:
        if HERE in item.path.parents:
            if getattr(item, 'function', None) and item.function.__module__ == 'support.conformance':
                params = item.callspec.params if hasattr(item, 'callspec') else {}
                on = params.get('subject') or params.get('provider') or 'engine'
                item.user_properties.append(('conformance', f'{item.path.stem[5:-4]} {on}'))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure at once, since a run may be cut off before pytest sums up; and count the conformance suite's."""
    on = dict(report.user_properties).get('conformance')
    if on and (report.when == 'call' or not report.passed):
        conformed.setdefault(str(on), Counter())[report.outcome] += 1
    if report.failed and os.environ.get(VARIABLE):
        told = report.longreprtext[-3000:], report.capstdout[-3000:]
        print('', report.nodeid, report.when, *told, sep='\n', flush=True)


def pytest_sessionfinish() -> None:
    """Let the suite write its report from everything measured so far."""
    results = os.environ.get(VARIABLE)
    for on, outcomes in conformed.items():
        if outcomes['passed'] or outcomes['failed']:
            record(f'conformance: {on}', **{outcome: outcomes[outcome] for outcome in ('passed', 'failed', 'skipped')})
    if results and Path(results).is_file():
        write_report(Path(results).read_text(encoding='utf-8').splitlines())
