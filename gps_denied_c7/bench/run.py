"""The ``c7_bench`` executable: all contestants in turn, repeatedly, in one run on one machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from gps_denied_c7.bench.cases import (
    BARE,
    CONTESTANTS,
    DEFAULT_TRANSPORT,
    Case,
    full_cases,
    quick_cases,
    scaling_cases,
)
from gps_denied_c7.bench.figures import CaseResult
from gps_denied_c7.bench.measurement import BenchOptions, Measurement
from gps_denied_c7.bench.models import BenchModel, calibrated_model
from gps_denied_c7.bench.plots import draw_plots
from gps_denied_c7.bench.report import BenchReport
from gps_denied_c7.demo.child_process import run_program
from gps_denied_c7.demo.output import claim_output
from gps_denied_c7.demo.ros_domain import child_environment, free_domain_id, free_ports
from gps_denied_c7.ground.command_line import path_argument, whole_number
from gps_denied_c7.monitoring.cpu_latency import CpuLatencyRequest
from gps_denied_c7.monitoring.host_info import package_versions
from gps_denied_c7.ros.fastdds import DdsPorts, domain_id

__all__ = ['main', 'run_bench']

NumberT = TypeVar('NumberT', int, float)


def run_bench(options: BenchOptions, say: Callable[[str], None]) -> BenchReport:
    """
    Measure every case and write ``report.json``, ``report.md`` and the plots.

    :param say: takes one line at a time.
    :raises DemoError: a process did not start, answer or end.
    :raises CpuLatencyError: the kernel cannot be asked for cores that wake up fast.
    """
    began = time.monotonic()
    facts = _facts(options)
    contestants = {one.name: one for one in CONTESTANTS}
    models: dict[tuple[int, int, int], BenchModel] = {}
    done: list[CaseResult] = []
    with ExitStack() as stack:
        if options.cpu_wakeup_latency_us is not None:
            cores = CpuLatencyRequest()
            cores.hold(options.cpu_wakeup_latency_us)
            stack.callback(cores.drop)
        output = claim_output(options.output, 'c7_bench')
        domain_id, ports = options.domain_id, None
        if domain_id is None:
            ports = free_ports(os.environ)
            domain_id = stack.enter_context(free_domain_id(ports))
        for number, case in enumerate(options.cases, 1):
            key = (case.channels, case.model_ms, case.dense_maps)
            if key not in models:
                models[key] = calibrated_model(
                    output, case.channels, case.model_ms, dense_maps=case.dense_maps, earlier=options.networks
                )
            chosen = [contestants[name] for name in case.contestants]
            environ = _environment(case, domain_id, ports, output, len(chosen) + 2)
            measurement = Measurement(
                options, case, models[key], chosen, environ, output / case.name, with_idle=number == 1
            )
            done.append(measurement.result())
            elapsed = time.monotonic() - began
            say(f'[{number}/{len(options.cases)}, {elapsed:.0f} s] {case.title}: {_in_short(done[-1])}')
            _write(output, BenchReport(tuple(done), facts, elapsed, {}))
    report = BenchReport(tuple(done), facts, time.monotonic() - began, draw_plots(output, tuple(done)))
    _write(output, report)
    return report


def _in_short(result: CaseResult) -> str:
    results = result.results.values()
    return ', '.join(f'{one.name} {one.latency.p50:.1f} ms {one.answered_hz:.1f}/s' for one in results if one.latency)


def _write(output: Path, report: BenchReport) -> None:
    (output / 'report.json').write_text(json.dumps(report.to_json(), indent=1) + '\n', encoding='utf-8')
    (output / 'report.md').write_text(report.markdown(), encoding='utf-8')


def _environment(
    case: Case, domain_id: int, ports: DdsPorts | None, output: Path, processes: int
) -> dict[str, str]:
    transports = 'DEFAULT' if case.transport == DEFAULT_TRANSPORT else ''
    environ = child_environment(domain_id, output, processes, ports=ports, transports=transports)
    environ['ROS_LOG_DIR'] = str(output / 'ros_log')
    # All contestants run on the CPU; docs/gpu-results.md has the GPU's figures.
    environ['CUDA_VISIBLE_DEVICES'] = ''
    return environ


def _facts(options: BenchOptions) -> dict[str, str]:
    versions = package_versions()
    model = None
    with contextlib.suppress(OSError):  # hidden, as in some containers
        model = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text(encoding='utf-8'))
    latency_us = options.cpu_wakeup_latency_us
    return {
        'machine': f'{len(os.sched_getaffinity(0))} cores, {model[1] if model else platform.machine()}',
        'ROS': f'{os.environ.get("ROS_DISTRO", "unknown")}, Python {platform.python_version()}',
        'versions': ', '.join(f'{name} {version}' for name, version in versions.items() if version),
        'day': time.strftime('%Y-%m-%d'),
        'form': f'{options.form}: {options.repetitions} repetitions of {options.seconds:g} s for each contestant, in '
        f'turn, after {options.warm_up_s:g} s of warm-up',
        'idle cores': 'as the system sets them' if latency_us is None else f'awake within {latency_us} µs (PM QoS)',
        'load before': f'{os.getloadavg()[0]:.2f} processes running on average over the last minute',
    }


def _form(parsed: argparse.Namespace) -> tuple[tuple[Case, ...], dict[str, Any]]:
    """Return the cases of the form that was asked for, and those of its options that are not as in the quick one."""
    if parsed.full:
        return full_cases(), {'form': 'full', 'seconds': 10.0, 'repetitions': 5}
    if parsed.scaling:
        return scaling_cases(), {'form': 'scaling'}
    return quick_cases(), {}


def _only(cases: tuple[Case, ...], texts: Sequence[str]) -> tuple[Case, ...]:
    """Return the cases that a text names, or whose name holds one that names none."""
    names = {case.name for case in cases}
    return tuple(
        case for case in cases if any(text == case.name or (text not in names and text in case.name) for text in texts)
    )


def _positive(kind: type[NumberT]) -> Callable[[str], NumberT]:
    """Return what reads a number above 0 from the command line."""

    def read(text: str) -> NumberT:
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f'{text} is not above 0')
        return number

    read.__name__ = kind.__name__
    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='c7_bench',
        description='Measure this node beside the bare engine and beside a forty-line node, and show the limits.',
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--quick', action='store_true', help='a choice of cases, about four minutes; the default')
    form.add_argument('--full', action='store_true', help='the whole matrix, many hours')
    form.add_argument(
        '--scaling', action='store_true',
        help='how latency and throughput grow with image size, cameras and outputs, about ten minutes',
    )  # fmt: skip
    parser.add_argument(
        '--output', type=path_argument, default=Path('bench_output'), metavar='DIR',
        help='directory for the results; replaces those of an earlier run; default: %(default)s',
    )  # fmt: skip
    parser.add_argument(
        '--only', nargs='+', metavar='TEXT', default=[''],
        help='only cases with these names, or whose names contain one of these texts',
    )  # fmt: skip
    parser.add_argument(
        '--contestants', nargs='+', metavar='NAME', choices=[one.name for one in CONTESTANTS],
        help='only these contestants: %(choices)s',
    )  # fmt: skip
    parser.add_argument(
        '--networks', type=path_argument, metavar='DIR',
        help='measure with the networks of an earlier run, from its output directory, so that both can be compared; '
        'default: new ones, which take the same time but differ',
    )  # fmt: skip
    parser.add_argument('--list', action='store_true', help='list the cases and exit')
    parser.add_argument('--seconds', type=_positive(float), metavar='S', help='length of one measurement')
    parser.add_argument('--repetitions', type=_positive(int), metavar='N', help='repetitions of each case')
    parser.add_argument(
        '--cpu-wakeup-latency-us', type=whole_number(0, 1_000_000), metavar='US',
        help='limit the wake-up time of idle cores to this for all contestants; default: the system setting',
    )  # fmt: skip
    parser.add_argument('--domain-id', type=domain_id, metavar='N', help='ROS domain; default: one that is free')
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.networks is not None and parsed.networks.resolve() == parsed.output.resolve():
        parser.error('--networks and --output are one directory, whose results would be replaced: change --output')
    cases, chosen = _form(parsed)
    cases = named = _only(cases, parsed.only)
    if parsed.contestants is not None:
        cases = tuple(
            dataclasses.replace(case, contestants=tuple(one for one in case.contestants if one in parsed.contestants))
            for case in cases
        )
        cases = tuple(case for case in cases if set(case.contestants) - {BARE})
    if parsed.list and cases:
        print('\n'.join(case.name for case in cases))
        return 0
    if not cases:
        print(
            f'c7_bench: no case name contains {" or ".join(map(repr, parsed.only))}; --list shows the names.'
            if not named
            else 'c7_bench: none of these --contestants takes images, so nothing would be measured; add node.',
            file=sys.stderr,
        )
        return 2
    if parsed.seconds is not None:
        chosen['seconds'] = parsed.seconds
    if parsed.repetitions is not None:
        chosen['repetitions'] = parsed.repetitions
    options = BenchOptions(
        output=parsed.output, cases=cases, domain_id=parsed.domain_id, networks=parsed.networks,
        cpu_wakeup_latency_us=parsed.cpu_wakeup_latency_us, **chosen,
    )  # fmt: skip
    return run_program('c7_bench', lambda: _bench(options))


def _bench(options: BenchOptions) -> int:
    """Measure; the exit status says that the figures were measured, not that they are good."""
    report = run_bench(options, lambda line: print(line, flush=True))
    print(f'\n{report.limits_table("simple_outline")}\n\n{report.seconds:.0f} s; tables, plots, logs: {options.output}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
