"""Made-up engines that only a number tells apart; all have one name, so that each build replaces the last."""

from __future__ import annotations

import dataclasses

from gps_denied_c7.engines.manifest import EngineManifest
from support.engine_cache_files import fake_plan, manifest_of

__all__ = ['fake_plan_of', 'manifest_for']

# Large enough that writing it takes longer than starting to.
PLAN_BYTES = 4 << 20


def fake_plan_of(number: int) -> bytes:
    """Return the made-up plan of that number."""
    return fake_plan(PLAN_BYTES, seed=number)


def manifest_for(number: int, plan: bytes) -> EngineManifest:
    """Return its manifest; the name is the same for every number, so that each build replaces the last."""
    return dataclasses.replace(manifest_of(plan), versions={'number': str(number)})
