"""The ``c7_engine`` executable: build, inspect, verify and sweep engines, make model bundles (G-3, M-1)."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence

from gps_denied_c7.errors import C7Error, in_one_line
from gps_denied_c7.ground import build, inspect, make_bundle, sweep, verify
from gps_denied_c7.ground.command_line import log_to_stderr
from gps_denied_c7.text import plain

__all__ = ['main']

COMMANDS = tuple(module.COMMAND for module in (build, inspect, verify, sweep, make_bundle))

_EXIT_CODES = """exit status:
  0    done; nothing was refused
  1    refused or failed; the message has the reason and the remedy
  2    the command line is wrong
  130  interrupted; unfinished files are removed

With --json, standard output gets one JSON object, also on failure; progress and errors go to standard
error. In every path, ~ is the home directory. More on one command: c7_engine COMMAND --help
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    log_to_stderr('c7_engine', logging.INFO if options.verbose else logging.WARNING)
    try:
        status = _status(options)
        # Here, where a failure is still reported: Python's own flush comes after the exit status. stdout may be closed.
        print(end='', flush=True)
        return status
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOENT and sys.stdout is not None:
            # Python would report the same failure again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f'c7_engine {options.command}: {plain(_unwritten(error))}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'c7_engine {options.command}: interrupted', file=sys.stderr)
        return 130


def _status(options: argparse.Namespace) -> int:
    """Run the command and report what it refuses; return the exit status."""
    try:
        status: int = options.run(options)
        return status
    except (C7Error, ModuleNotFoundError) as error:
        print(f'c7_engine {options.command}: {plain(in_one_line(error))}', file=sys.stderr)
        if options.json:
            # A package that is missing has its remedy in the message.
            message, remedy = getattr(error, 'message', in_one_line(error)), getattr(error, 'remedy', '')
            print(json.dumps({'error': {'message': message, 'remedy': remedy}}, indent=2))
        return 1


def _unwritten(error: OSError) -> str:
    """Say what failed; an error without a file's name is one of standard output, or of the working directory."""
    if error.filename is not None:
        return f'{error.filename}: {error.strerror}.'
    if error.errno == errno.ENOENT:
        return 'the working directory was removed. Change to another one.'
    return f'standard output cannot be written: {error.strerror}. Redirect it; what the command did is kept.'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='c7_engine',
        description='Make and check what the inference node loads: model bundles and TensorRT engines.',
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    exit_status = _EXIT_CODES.partition('With --json')[0].rstrip()
    for command in COMMANDS:
        its_parser = added.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=f'{command.notes}\n{exit_status}'.lstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        its_parser.set_defaults(run=command.run, error=its_parser.error)
        its_parser.add_argument('--json', action='store_true', help='print one JSON object instead of text')
        its_parser.add_argument('--verbose', action='store_true', help='log more to standard error')
        command.add_arguments(its_parser)
    return parser


if __name__ == '__main__':
    sys.exit(main())
