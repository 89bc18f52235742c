"""The output directory of a run of ``c7_demo`` or ``c7_bench``, and the parameters of its node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gps_denied_c7.demo.child_process import DemoError

__all__ = ['claim_output', 'write_parameters']


def claim_output(output: Path, program: str, own: Collection[str] | None = None) -> Path:
    """
    Make the output directory, or clear what an earlier run made in it, and nothing else; return its absolute path.

    :param program: that makes it; it leaves a marker of its name.
    :param own: names that a run makes in it; None where all that lies in it is the run's.
    :raises DemoError: something else made what would be cleared, or the directory cannot be written.
    """
    output = output.resolve()
    marker = output / f'.{program}'
    try:
        output.mkdir(parents=True, exist_ok=True)
        others = [path for path in sorted(output.iterdir()) if path != marker]
        taken = [path for path in others if own is None or path.name in own]
        if taken and not marker.exists():
            names = ', '.join(path.name for path in taken[:5])
            raise DemoError(f'{output} holds {names}, not made by {program}.', remedy='Name another --output.')
        for path in taken:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        marker.touch()
    except OSError as error:
        raise DemoError(f'{output} cannot be written: {error}.', remedy='Name another --output.') from error
    return output


def write_parameters(path: Path, output: Path, values: Mapping[str, Any]) -> Path:
    """
    Write the parameters of a node that activates itself as a file for ``--params-file``, and return its path.

    :param output: holds the node's caches.
    :param values: other parameters by name.
    """
    parameters = {
        'autostart': True,
        'engine_cache_dir': str(output / 'engines' / 'engine_cache'),
        'ort_trt_cache_dir': str(output / 'engines' / 'ort_trt_cache'),
        **values,
    }
    lines = [f'    {name}: {json.dumps(value)}' for name, value in parameters.items()]
    path.write_text('\n'.join(['/**:', '  ros__parameters:', *lines, '']), encoding='utf-8')
    return path
