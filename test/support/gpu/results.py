"""Where the GPU suite leaves its figures: one JSON line each, in the file that C7_GPU_RESULTS names."""

from __future__ import annotations

import json
import os
import platform
import sys
import time

import numpy as np

from gps_denied_c7.monitoring.host_info import describe_gpu, package_versions

__all__ = ['percentiles', 'record']

VARIABLE = 'C7_GPU_RESULTS'


def record(name: str, **figures: object) -> None:
    """
    Print a result, and append it to the file named by C7_GPU_RESULTS where that is set.

    :param name: of the test or measurement; a later line of the same name and Python replaces an earlier one.
    :param figures: whatever JSON can hold; units stand in the names, as ``p50_ms``.
    """
    line = {
        'name': name,
        'unix_s': round(time.time(), 1),
        'gpu': describe_gpu(),
        'platform': f'{platform.system()} {platform.machine()}',
        'versions': package_versions(),
        'figures': figures,
    }
    print(f'\n{name}: {json.dumps(figures)}', file=sys.stderr, flush=True)
    if path := os.environ.get(VARIABLE):
        # One write of one line: children of the suite append to the same file.
        with open(path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(line) + '\n')


def percentiles(seconds: list[float], unit: str = 'ms') -> dict[str, float]:
    """Return p50, p95, p99, the largest and the count of durations, in ``ms`` or ``s``."""
    scale, digits = {'ms': (1e3, 4), 's': (1.0, 3)}[unit]
    values = np.asarray(seconds) * scale
    figures = {f'p{percent}_{unit}': round(float(np.percentile(values, percent)), digits) for percent in (50, 95, 99)}
    return {**figures, f'max_{unit}': round(float(values.max()), digits), 'n': len(seconds)}
