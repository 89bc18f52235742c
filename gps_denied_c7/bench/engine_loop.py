"""The bare engine: the same network, options and threads as in the node, and nothing around it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gps_denied_c7.bench.commands import CommandLine
from gps_denied_c7.bench.models import engine_session, time_engine

__all__ = ['main']


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the network for as long as each command says, and answer what every inference took."""
    parser = argparse.ArgumentParser(prog='c7_bench_engine', description='Run a network as fast as it goes.')
    parser.add_argument('--model', required=True)
    options = parser.parse_args(arguments)
    commands = CommandLine()
    session = engine_session(options.model)
    commands.serve(lambda seconds: {'durations_ns': time_engine(session, seconds)})
    return 0


if __name__ == '__main__':
    sys.exit(main())
