"""R-1: one suite over every strategy that can run here; what cannot is listed as skipped, with the factory's reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from gps_denied_c7.config import RUNTIME_LABELS, C7InferenceConfig
from support.conformance import ARTEFACTS, Subject, absence, runtime_of, suite
from support.onnx_models import bundle_around

# ONNX Runtime warns where its build has no GPU provider at all; the facts say the same.
pytestmark = pytest.mark.filterwarnings('ignore:Specified provider')


@pytest.mark.parametrize('label', RUNTIME_LABELS)
def test_r1_strategy_runs_here_and_is_under_test(label: str) -> None:
    if reason := absence(label):
        pytest.skip(reason)
    assert label in ARTEFACTS


@pytest.fixture(params=[label for label in RUNTIME_LABELS if absence(label) is None])
def subject(request: pytest.FixtureRequest, config: C7InferenceConfig, tmp_path: Path) -> Subject:
    runtime = runtime_of(request.param, config)
    return Subject(runtime, bundle_around(ARTEFACTS[request.param](tmp_path), request.param))


globals().update(suite())
