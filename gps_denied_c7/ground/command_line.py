"""What the command lines of this package have in common."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.model.files import expand_home
from gps_denied_c7.text import plain

__all__ = ['log_to_stderr', 'path_argument']


def path_argument(text: str) -> Path:
    """Return the path that an argument names, ``~`` being the home directory; for argparse's ``type``."""
    if not text:
        raise argparse.ArgumentTypeError('the path is empty')
    try:
        return expand_home(text)
    except ModelBundleError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _OneLine(logging.Formatter):
    """Have one line for each message: names and errors from files may hold line breaks and terminal codes."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def log_to_stderr(program: str, level: int) -> None:
    """Have what is logged from ``level`` on printed to standard error, one line each, behind the program's name."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine(f'{program}: %(message)s'))
    logging.basicConfig(handlers=[handler], level=level)
