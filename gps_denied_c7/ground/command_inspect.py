"""``c7_engine inspect``: describe an engine file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from gps_denied_c7.ground.command_arguments import Command
from gps_denied_c7.ground.command_line import path_argument
from gps_denied_c7.ground.command_output import print_field, print_json, print_manifest
from gps_denied_c7.ground.compatibility import known_host
from gps_denied_c7.ground.inspect import EngineReport, inspect_engine
from gps_denied_c7.text import plain

__all__ = ['COMMAND']


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('file', type=path_argument, metavar='FILE', help='.engine file')


def _run(options: argparse.Namespace) -> int:
    host, unknown = known_host()
    report = inspect_engine(options.file, host)
    if options.json:
        print_json(**report.to_json(), host=asdict(host), unknown=list(unknown))
    else:
        _print_report(report, unknown)
    if report.plan is None:
        print(f'c7_engine inspect: {plain(report.path)} is not a TensorRT engine.', file=sys.stderr)
    return 1 if report.plan is None else 0


def _print_report(report: EngineReport, unknown: Sequence[str]) -> None:
    print(plain(report.path))
    if report.manifest is not None:
        print_manifest(report.manifest)
    elif report.name is not None:
        print_field('model', f'{report.name.model}, {report.name.precision} (by the file name)')
        print_field('built on', f'SM {report.name.sm}, TensorRT {report.name.tensorrt} (by the file name)')
    print_field('header', f'plan of TensorRT {report.plan}' if report.plan else 'not a TensorRT plan')
    print_field('file', f'{report.size} bytes, sha256 {report.sha256}')
    print('this host would refuse it:' if report.refusals else 'this host finds nothing wrong with it')
    for refusal in report.refusals:
        print_field(refusal.field, f'expected {refusal.expected!r}, found {refusal.found!r}. {refusal.remedy}')
    if unknown:
        print('not compared with this host:')
        for reason in unknown:
            print(f'  {reason}')


COMMAND = Command(
    name='inspect',
    summary='describe an engine file, and whether this machine would refuse it',
    description='Describe an engine file by its name, its manifest (the .json beside it), its header and its digest,\n'
    'and list what this machine would refuse. Loads nothing: works without a GPU and without TensorRT.',
    add_arguments=_add_arguments,
    run=_run,
)
