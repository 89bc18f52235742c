"""
Give Python child processes a command and an environment in which nothing runs from the working directory.

Python looks for modules in the working directory with ``-m`` and ``-c``; it and the loader of shared libraries also do
for an empty or relative entry of a search path, and hooks like colcon's leave empty ones. The node may be started
anywhere, with another user's files there.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Mapping

__all__ = ['SAFE_DIRECTORY', 'clean_environment', 'python_child', 'worker_environment']

SAFE_DIRECTORY = '/'
"""Working directory for a child: the loader's relative names are looked up before any program of ours runs."""

# Not -m, which puts the working directory first, and not -P, which Python 3.10 does not know: the same for all.
_RUN_MODULE = (
    'import sys; sys.path[:] = [entry for entry in sys.path if entry[:1] == "/"]; '
    'import runpy; runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)'
)
# Where this package lies, for a child to find the same one.
_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Variables that hold paths, with the characters that separate these (ld.so(8), PYTHON* in Python's manual).
_PATHS = {
    'LD_LIBRARY_PATH': ':;', 'LD_PRELOAD': ': ', 'LD_AUDIT': ':', 'PATH': ':', 'PYTHONPATH': ':', 'PYTHONHOME': ':',
    'AMENT_PREFIX_PATH': ':',
    **dict.fromkeys(
        ('CUDA_CACHE_PATH', 'CUDA_INJECTION64_PATH', 'PYTHONPYCACHEPREFIX', 'PYTHONUSERBASE', 'TMPDIR', 'TORCH_HOME',
         'TORCHINDUCTOR_CACHE_DIR', 'TRITON_CACHE_DIR', 'XDG_CACHE_HOME', 'XDG_CONFIG_HOME', 'XDG_DATA_HOME'),
        '',
    ),
}  # fmt: skip
# The loader looks for a name without a slash where it looks for libraries.
_NAMES = ('LD_PRELOAD', 'LD_AUDIT')
_INTERACTIVE = ('PYTHONINSPECT', 'PYTHONSTARTUP')

# LD_PRELOAD: on Arm, libgomp has to be there first for vendor libraries to find room for their thread-local variables.
_KEPT_VARIABLES = (
    'PATH', 'LD_LIBRARY_PATH', 'LD_PRELOAD', 'HOME', 'USER', 'LANG', 'TZ', 'TMPDIR', '_ROS_WHEELS_BOOTSTRAP_COMPLETE',
)  # fmt: skip
_KEPT_PREFIXES = ('LC_', 'XDG_', 'PYTHON', 'VIRTUAL_ENV', 'MALLOC_', 'OMP_', 'CUDA_', 'NVIDIA_', 'ORT_', 'TORCH')

_log = logging.getLogger(__name__)


def python_child(module: str, *arguments: str, environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """
    Return the command and the environment of a process that runs ``module``; start it in ``SAFE_DIRECTORY``.

    It imports what this process would from absolute places: this package, ``PYTHONPATH``, the user's site-packages.

    :param environ: what it is to inherit; cleaned by :func:`clean_environment`.
    """
    cleaned = clean_environment(environ)
    cleaned['PYTHONPATH'] = os.pathsep.join(filter(None, [_PACKAGE_PARENT, cleaned.get('PYTHONPATH', '')]))
    return [os.path.abspath(sys.executable), '-c', _RUN_MODULE, module, *arguments], cleaned


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without paths that depend on the working directory, and without an interpreter's start-up."""
    cleaned = {name: value for name, value in environ.items() if name not in _INTERACTIVE}
    for name in _PATHS.keys() & cleaned.keys():
        separators, value = _PATHS[name], cleaned.pop(name)
        entries = [entry for entry in (re.split(f'[{separators}]', value) if separators else [value]) if entry]
        kept = [entry for entry in entries if _is_fixed(name, entry)]
        if relative := tuple(entry for entry in entries if entry not in kept):
            _warn(name, relative)
        # A variable without entries, or PATH with an empty one, would name the working directory.
        if kept:
            cleaned[name] = separators[:1].join(kept)
    cleaned.setdefault('PATH', os.defpath)
    return cleaned


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return of ``environ`` what vendor libraries and Python read, and nothing of ROS."""
    return {
        name: value for name, value in environ.items() if name in _KEPT_VARIABLES or name.startswith(_KEPT_PREFIXES)
    }


def _is_fixed(name: str, entry: str) -> bool:
    if name.startswith('LD_') and entry.startswith(('$ORIGIN', '${ORIGIN}')):
        # The folder of the program.
        return True
    return entry.startswith('/') or (name in _NAMES and '/' not in entry)


@functools.cache
def _warn(name: str, relative: tuple[str, ...]) -> None:
    _log.warning(
        'child processes do not get the relative paths in %s: %s. Name absolute ones.', name, ', '.join(relative)
    )
