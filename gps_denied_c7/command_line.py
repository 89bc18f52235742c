"""What the command lines of this package have in common."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gps_denied_c7.bundle_files import expand_home
from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.text import plain

__all__ = ['one_line', 'path_argument']


def path_argument(text: str) -> Path:
    """Return the path that an argument names, ``~`` being the home directory; for argparse's ``type``."""
    if not text:
        raise argparse.ArgumentTypeError('the path is empty')
    try:
        return expand_home(text)
    except ModelBundleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def one_line(text: object) -> str:
    """Return text as one line for a terminal: characters that do not print become escapes."""
    return plain(text, sys.maxsize)
