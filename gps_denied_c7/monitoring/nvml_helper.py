"""
Ask NVML for a GPU's temperature and throttle reasons once a second, and write them as JSON lines.

``python -m gps_denied_c7.monitoring.nvml_helper [--device N] [--period SECONDS]``. A process of its own, because a
call into the driver can hang forever; the node, which reads its output, starts another one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from gps_denied_c7.parent_death import die_with_parent

__all__ = ['main']


def main(arguments: list[str] | None = None) -> int:
    """Write readings until the reader has gone."""
    parser = argparse.ArgumentParser(description='Write readings of NVML as JSON lines.')
    parser.add_argument('--device', type=int, default=0, help='index of the GPU')
    parser.add_argument('--period', type=float, default=1.0, help='seconds between two readings')
    options = parser.parse_args(arguments)
    die_with_parent()
    try:
        import pynvml
    except ImportError as error:
        remedy = 'pip install -r requirements/gpu.txt'
        return _say({'unavailable': f'nvidia-ml-py is not installed ({error}); {remedy}.', 'final': True})
    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(options.device)
        while _say(_reading(pynvml, device)) == 0:
            time.sleep(options.period)
    except pynvml.NVMLError as error:
        return _say({'unavailable': f'NVML: {error}.'})
    return 0


def _reading(nvml: Any, device: Any) -> dict[str, Any]:
    # Called "throttle reasons" before driver 535.
    reasons = getattr(nvml, 'nvmlDeviceGetCurrentClocksEventReasons', None) or (
        nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    )
    return {
        'temperatures_c': {'gpu': nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)},
        'reasons': int(reasons(device)),
    }


def _say(what: dict[str, Any]) -> int:
    try:
        sys.stdout.write(json.dumps(what) + '\n')
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter would try to flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
