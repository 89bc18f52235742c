"""The ``c7_bench`` executable: everyone in turn, again and again, in one run on one machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gps_denied_c7.bench.cases import (
    BARE,
    CONTESTANTS,
    DEFAULT_TRANSPORT,
    JPEG,
    SHIPPED,
    Case,
    Contestant,
    full_cases,
    present_contestants,
    quick_cases,
    scaling_cases,
)
from gps_denied_c7.bench.figures import Block, CaseResult, Result, summarise, summarise_bare
from gps_denied_c7.bench.models import BenchModel, calibrated_model
from gps_denied_c7.bench.plots import draw_plots
from gps_denied_c7.bench.report import BenchReport
from gps_denied_c7.bench.resources import cpu_seconds, memory_mb
from gps_denied_c7.demo.processes import Child, DemoError, child_environment, free_domain_id, free_ports
from gps_denied_c7.errors import C7Error
from gps_denied_c7.ground.command_line import path_argument
from gps_denied_c7.monitoring.cpu_latency import CpuLatencyRequest
from gps_denied_c7.monitoring.host_info import package_versions
from gps_denied_c7.ros.fastdds import DdsPorts

__all__ = ['BenchOptions', 'main', 'run_bench']

NumberT = TypeVar('NumberT', int, float)

_MARKER = '.c7_bench'
_READY_S = 90.0
_MATCH_S = 60.0
_FIRST_ANSWER_S = 20.0
_SETTLE_S = 0.3
_MATCHED_S = 0.5
_QUIET_S, _QUIET_SHARE, _QUIET_AT_LAST_S = 0.5, 0.03, 6.0
_DIAGNOSTICS_S = 1.2
_BARE_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """
    Say what is measured and where the results go.

    :param output: directory, made where needed.
    :param seconds: of one measurement of one contestant.
    :param warm_up_s: of frames before it that do not count.
    :param repetitions: of each case, the contestants taking turns.
    :param idle_s: how long, in the first case, each is watched while nothing is sent; 0 for not at all.
    :param domain_id: ROS domain, a free one where None.
    :param cpu_wakeup_latency_us: within which idle cores wake up, for everybody; None as the system has it.
    """

    output: Path
    cases: tuple[Case, ...]
    form: str = 'quick'
    seconds: float = 1.6
    warm_up_s: float = 0.4
    repetitions: int = 3
    idle_s: float = 6.0
    domain_id: int | None = None
    cpu_wakeup_latency_us: int | None = None


class _Service:
    """Ask a child process that answers each line with a line."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self._answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Return the answer to one command."""
        assert self.child.process.stdin is not None
        try:
            print(json.dumps(command), file=self.child.process.stdin, flush=True)
        except BrokenPipeError:
            self.child.process.wait()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.child.process.stdout is not None
        line = self.child.process.stdout.readline()
        if not line:
            self.child.process.wait()
            self.child.check_alive()
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(slots=True)
class _Record:
    """
    What one contestant has done in a case, in whichever processes.

    :param durations: of the bare engine's inferences, nanoseconds, one list a repetition.
    :param statuses: of a node's diagnostics, one for each process.
    """

    contestant: Contestant
    blocks: list[Block] = field(default_factory=list)
    durations: list[list[int]] = field(default_factory=list)
    statuses: list[Mapping[str, Mapping[str, str]]] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    start_s: float | None = None
    idle_percent: float | None = None

    def summary(self) -> Result:
        """Return the figures."""
        contestant = self.contestant
        if contestant.name == BARE:
            return summarise_bare(contestant.name, contestant.title, self.durations)
        return summarise(
            contestant.name,
            contestant.title,
            self.blocks,
            statuses=self.statuses if contestant.is_node else None,
            memory_mb=statistics.median(self.memory_mb),
            start_s=self.start_s,
            idle_percent=self.idle_percent,
        )


@dataclass(slots=True)
class _Running:
    """
    One contestant that runs.

    :param began_s: wall clock when its process was started.
    :param service: of the bare engine, which is asked instead of being sent images.
    """

    record: _Record
    child: Child
    began_s: float
    service: _Service | None = None

    @property
    def name(self) -> str:
        return self.record.contestant.name


def run_bench(options: BenchOptions, say: Callable[[str], None]) -> BenchReport:
    """
    Measure every case and write ``report.json``, ``report.md`` and the plots.

    :param say: takes one line at a time.
    :raises DemoError: a process did not start, answer or end.
    :raises CpuLatencyError: the kernel cannot be asked for cores that wake up fast.
    """
    # Here and not above: it is part of the ROS side, and the report of an old run can be read without that.
    from gps_denied_c7.ros.parameters import PARAMETERS

    began = time.monotonic()
    facts = _facts(options)
    contestants = {one.name: one for one in present_contestants({declared.name for declared in PARAMETERS})}
    models: dict[tuple[int, int, int], BenchModel] = {}
    done: list[CaseResult] = []
    with ExitStack() as stack:
        if options.cpu_wakeup_latency_us is not None:
            cores = CpuLatencyRequest()
            cores.hold(options.cpu_wakeup_latency_us)
            stack.callback(cores.drop)
        output = _claim(options.output)
        domain_id, ports = options.domain_id, None
        if domain_id is None:
            ports = free_ports(os.environ)
            domain_id = stack.enter_context(free_domain_id(ports))
        for number, case in enumerate(options.cases, 1):
            key = (case.channels, case.model_ms, case.dense_maps)
            if key not in models:
                models[key] = calibrated_model(output, case.channels, case.model_ms, dense_maps=case.dense_maps)
            chosen = [contestants[name] for name in case.contestants if name in contestants]
            environ = _environment(case, domain_id, ports, output, len(chosen) + 2)
            measurement = _Measurement(
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
    told = (one for one in result.results.values() if one.latency)
    return ', '.join(f'{one.name} {one.latency.p50:.1f} ms {one.answered_hz:.1f}/s' for one in told if one.latency)


def _write(output: Path, report: BenchReport) -> None:
    (output / 'report.json').write_text(json.dumps(report.to_json(), indent=1) + '\n', encoding='utf-8')
    (output / 'report.md').write_text(report.markdown(), encoding='utf-8')


def _claim(output: Path) -> Path:
    """Make the output directory, or clear what an earlier run made, and nothing else."""
    output = output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(output.iterdir()) and not (output / _MARKER).exists():
            raise DemoError(f'{output} holds files not made by a benchmark.', remedy='Name another --output.')
        shutil.rmtree(output)
        output.mkdir()
        (output / _MARKER).touch()
    except OSError as error:
        raise DemoError(f'{output} cannot be written: {error}.', remedy='Name another --output.') from error
    return output


def _environment(
    case: Case, domain_id: int, ports: DdsPorts | None, output: Path, processes: int
) -> dict[str, str]:
    transports = 'DEFAULT' if case.transport == DEFAULT_TRANSPORT else ''
    environ = child_environment(domain_id, output, processes, ports=ports, transports=transports)
    environ['ROS_LOG_DIR'] = str(output / 'ros_log')
    # Everybody runs on the CPU; what a GPU is worth, its own results tell.
    environ['CUDA_VISIBLE_DEVICES'] = ''
    return environ


def _facts(options: BenchOptions) -> dict[str, str]:
    versions = package_versions()
    model = next(
        (line.partition(':')[2].strip() for line in _lines('/proc/cpuinfo') if line.startswith('model name')),
        platform.processor(),
    )
    latency_us = options.cpu_wakeup_latency_us
    return {
        'machine': f'{len(os.sched_getaffinity(0))} cores, {model or platform.machine()}',
        'ROS': f'{os.environ.get("ROS_DISTRO", "unknown")}, Python {platform.python_version()}',
        'versions': ', '.join(f'{name} {version}' for name, version in versions.items() if version),
        'day': time.strftime('%Y-%m-%d'),
        'form': f'{options.form}: {options.repetitions} repetitions of {options.seconds:g} s for each contestant, in '
        f'turn, after {options.warm_up_s:g} s of warm-up',
        'idle cores': 'as the system has it' if latency_us is None else f'awake again within {latency_us} µs (PM QoS)',
        'load before': f'{os.getloadavg()[0]:.2f} processes running on average over the last minute',
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding='utf-8').splitlines()
    except OSError:
        return []


class _Measurement:
    """Measure one case; every process of it starts and ends here."""

    def __init__(
        self,
        options: BenchOptions,
        case: Case,
        model: BenchModel,
        contestants: Sequence[Contestant],
        environ: Mapping[str, str],
        directory: Path,
        *,
        with_idle: bool,
    ) -> None:
        self._options = options
        self._with_idle = with_idle and options.idle_s > 0
        self._case = case
        self._model = model
        self._records = [_Record(one) for one in contestants]
        self._environ = environ
        self._directory = directory
        self._seconds = case.seconds or options.seconds
        self._repetitions = case.repetitions or options.repetitions
        self._hz = case.sent_hz(model.engine_ms)

    def result(self) -> CaseResult:
        """Return what came of it."""
        repetitions = range(self._repetitions)
        rounds = [[number] for number in repetitions] if self._case.anew else [list(repetitions)]
        (self._directory / 'engines').mkdir(parents=True)
        for number, of_round in enumerate(rounds):
            self._logs = self._directory if len(rounds) == 1 else self._directory / f'processes_{number}'
            self._logs.mkdir(exist_ok=True)
            with ExitStack() as stack:
                self._run_round(stack, of_round, first=number == 0)
        results = {record.contestant.name: record.summary() for record in self._records}
        return CaseResult(self._case, self._model.engine_ms, self._hz, results)

    def _run_round(self, stack: ExitStack, repetitions: Sequence[int], *, first: bool) -> None:
        """Start every process, measure, and end them in order."""
        nodes = [record.contestant.name for record in self._records if record.contestant.name != BARE]
        suffix = '/compressed' if self._case.encoding == JPEG else ''
        cameras = [f'camera_{number}/image_raw{suffix}' for number in range(self._case.cameras)]
        topics = {name: [f'/{name}/{camera}' for camera in cameras] for name in nodes}
        self._listener = self._service(stack, 'gps_denied_c7.bench.listener', nodes)
        self._camera = self._service(
            stack,
            'gps_denied_c7.bench.camera',
            ['--size', str(self._case.width), str(self._case.height), '--encoding', self._case.encoding,
             '--topics', *(f'{name}={",".join(own)}' for name, own in topics.items())],
        )  # fmt: skip
        started: dict[str, _Running] = {}
        # How long the node as shipped takes to start is measured while nobody else does.
        for record in sorted(self._records, key=lambda record: record.contestant.name != SHIPPED):
            name = record.contestant.name
            started[name] = self._start(stack, record, topics.get(name, []))
            if first and name == SHIPPED:
                self._wait_ready(started[name], timed=True)
        running = [started[record.contestant.name] for record in self._records]
        for one in running:
            if not (first and one.name == SHIPPED):
                self._wait_ready(one)
        self._wait_quiet(running)
        if self._with_idle and first:
            self._watch_idle(running)
        for repetition in repetitions:
            # Whoever goes first changes: what one leaves behind, as heat, hits each of them.
            turn = repetition % len(running)
            for one in [*running[turn:], *running[:turn]]:
                self._measure(one)
        time.sleep(_DIAGNOSTICS_S)
        for one in running:
            self._take_leave(one)
        for one in running:
            # All at once: each takes a second to leave its domain in order.
            if one.service is None:
                one.child.process.send_signal(signal.SIGINT)
        for one in running:
            if one.service is None:
                one.child.wait()

    def _service(self, stack: ExitStack, module: str, arguments: Sequence[str], log: str = '') -> _Service:
        path = self._logs / f'{log or module.rpartition(".")[2]}.log'
        child = Child(module, arguments, self._environ, log=path, pipe=True, commands=True)
        # Ending its input ends it in order; what does not end by that is ended by its context manager.
        stack.enter_context(child)
        assert child.process.stdin is not None
        stack.callback(_end_input, child)
        return _Service(child)

    def _start(self, stack: ExitStack, record: _Record, topics: list[str]) -> _Running:
        contestant, began = record.contestant, time.time()
        if contestant.name == BARE:
            service = self._service(stack, contestant.module, ['--model', str(self._model.path)], contestant.name)
            return _Running(record, service.child, began, service)
        log = self._logs / f'{contestant.name}.log'
        arguments = self._arguments(contestant, topics)
        return _Running(record, stack.enter_context(Child(contestant.module, arguments, self._environ, log=log)), began)

    def _wait_ready(self, running: _Running, *, timed: bool = False) -> None:
        """Wait until images are answered."""
        if running.service is not None:
            return
        name, child = running.name, running.child
        matched = self._camera.ask(do='match', contestant=name, timeout_s=_MATCH_S)['matched_s']
        child.check_alive()
        if matched is None:
            raise DemoError(f'{name} did not subscribe in {_MATCH_S:.0f} s.\n{child.tail()}')
        if timed:
            running.record.start_s = matched - running.began_s
        # The other end may match a moment later, and an engine's first run is not like the others.
        time.sleep(_MATCHED_S)
        deadline = time.monotonic() + _FIRST_ANSWER_S
        settle_s = max(_SETTLE_S, 3e-3 * self._model.engine_ms)
        answers: list[Mapping[str, int]] = []
        while not answers:
            self._camera.ask(do='send', contestant=name, rate_hz=5.0, seconds=0.2)
            time.sleep(settle_s)
            answers = self._collect(name)['answers']
            child.check_alive()
            if time.monotonic() > deadline:
                if self._case.transport == DEFAULT_TRANSPORT:
                    break  # losing every image is what some hosts do without the profile
                raise DemoError(f'{name} answered no image in {_FIRST_ANSWER_S:.0f} s.\n{child.tail()}')
        time.sleep(settle_s)
        answers += self._collect(name)['answers']
        # What left before both ends had matched is lost on nobody.
        running.record.blocks.append(Block((), len(answers), answers, {}, 0.0))

    def _arguments(self, contestant: Contestant, topics: list[str]) -> list[str]:
        rename = ['-r', f'__node:={contestant.name}']
        if not contestant.is_node:
            model = ['--model', str(self._model.path), '--topics', *topics]
            return [*model, *contestant.arguments, '--ros-args', *rename]
        values = {
            'image_topics': topics,
            'model_path': str(self._model.path),
            'autostart': True,
            # Nothing better is there to be found, and whoever looks for it is in everybody's way.
            'promotion_backoff_s': [3600.0, 3600.0],
            'engine_cache_dir': str(self._directory / 'engines' / 'engine_cache'),
            'ort_trt_cache_dir': str(self._directory / 'engines' / 'ort_trt_cache'),
            **contestant.parameters,
        }
        path = self._logs / f'{contestant.name}.yaml'
        lines = [f'    {name}: {json.dumps(value)}' for name, value in values.items()]
        path.write_text('\n'.join(['/**:', '  ros__parameters:', *lines, '']), encoding='utf-8')
        return ['--ros-args', *rename, '--params-file', str(path)]

    def _wait_quiet(self, everyone: Sequence[_Running]) -> None:
        """Wait until nobody loads anything beside any more, as a node its standby, but not forever."""
        deadline = time.monotonic() + _QUIET_AT_LAST_S
        spent = sum(cpu_seconds(one.child.process.pid) for one in everyone)
        while time.monotonic() < deadline:
            time.sleep(_QUIET_S)
            before, spent = spent, sum(cpu_seconds(one.child.process.pid) for one in everyone)
            if spent - before < _QUIET_SHARE * _QUIET_S * len(everyone):
                return

    def _watch_idle(self, everyone: Sequence[_Running]) -> None:
        """See what each costs while nothing is sent to anyone."""
        began = time.monotonic()
        before = [cpu_seconds(one.child.process.pid) for one in everyone]
        time.sleep(self._options.idle_s)
        for one, was in zip(everyone, before, strict=True):
            spent = cpu_seconds(one.child.process.pid) - was
            one.record.idle_percent = 100.0 * spent / (time.monotonic() - began)

    def _measure(self, running: _Running) -> None:
        if running.service is not None:
            seconds = self._seconds * _BARE_SHARE
            running.record.durations.append(running.service.ask(seconds=seconds)['durations_ns'])
            return
        name = running.name
        pids = {
            'contestant': running.child.process.pid,
            'camera': self._camera.child.process.pid,
            'listener': self._listener.child.process.pid,
        }
        before = {key: cpu_seconds(pid) for key, pid in pids.items()}
        began = time.monotonic()
        warm_up = self._camera.ask(do='send', contestant=name, rate_hz=self._hz, seconds=self._options.warm_up_s)
        sent = self._camera.ask(do='send', contestant=name, rate_hz=self._hz, seconds=self._seconds)
        # A queue of five frames in front of the engine, and one in it, for each camera.
        time.sleep(_SETTLE_S + 6e-3 * self._model.engine_ms * self._case.cameras)
        spent = {key: cpu_seconds(pid) - before[key] for key, pid in pids.items()}
        elapsed = time.monotonic() - began
        running.child.check_alive()
        running.record.blocks.append(
            Block(
                stamps=sent['stamps'],
                warm_up=len(warm_up['stamps']),
                answers=self._collect(name)['answers'],
                cpu_s=spent,
                elapsed_s=elapsed,
            )
        )

    def _collect(self, name: str) -> dict[str, Any]:
        return self._listener.ask(contestant=name)

    def _take_leave(self, running: _Running) -> None:
        """Note what a process that is about to end tells at last."""
        if running.service is not None:
            return
        collected, record = self._collect(running.name), running.record
        if collected['answers']:
            record.blocks.append(Block((), 0, collected['answers'], {}, 0.0))
        record.statuses.append(collected['statuses'])
        record.memory_mb.append(memory_mb(running.child.process.pid))


def _end_input(child: Child) -> None:
    assert child.process.stdin is not None
    child.process.stdin.close()
    # One that still waits for a process that is gone is interrupted when it is left.
    with suppress(subprocess.TimeoutExpired):
        child.process.wait(5.0)


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


def _with(case: Case, contestants: Sequence[str]) -> Case:
    """Return the case with those of its contestants alone."""
    return dataclasses.replace(case, contestants=tuple(name for name in case.contestants if name in contestants))


def _positive(kind: type[NumberT]) -> Callable[[str], NumberT]:
    """Return what reads a number above 0 from the command line."""

    def read(text: str) -> NumberT:
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f'{text} is not above 0')
        return number

    read.__name__ = kind.__name__
    return read


def _microseconds(text: str) -> int:
    """Read a latency from the command line."""
    number = int(text)
    if not 0 <= number <= 1_000_000:
        raise argparse.ArgumentTypeError(f'{text} is not 0 to 1000000')
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
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
        help='made where missing; replaces what an earlier run left there; default: %(default)s',
    )  # fmt: skip
    parser.add_argument(
        '--only', nargs='+', metavar='TEXT', default=[''],
        help='cases of these names, or whose names hold one of these texts',
    )  # fmt: skip
    parser.add_argument(
        '--contestants', nargs='+', metavar='NAME', choices=[one.name for one in CONTESTANTS],
        help='of each case, those of: %(choices)s',
    )  # fmt: skip
    parser.add_argument('--list', action='store_true', help='name the cases of the form and end')
    parser.add_argument('--seconds', type=_positive(float), metavar='S', help='of one measurement')
    parser.add_argument('--repetitions', type=_positive(int), metavar='N', help='of each case')
    parser.add_argument(
        '--cpu-wakeup-latency-us', type=_microseconds, metavar='US',
        help='have idle cores wake up within this, for everybody who is measured; default: as the system has it',
    )  # fmt: skip
    parser.add_argument('--domain-id', type=int, metavar='N', help='ROS domain; default: one of its own')
    parsed = parser.parse_args(arguments)
    cases, chosen = _form(parsed)
    cases = _only(cases, parsed.only)
    if parsed.contestants is not None:
        cases = tuple(_with(case, parsed.contestants) for case in cases)
        cases = tuple(case for case in cases if set(case.contestants) - {BARE})
    if parsed.list and cases:
        print('\n'.join(case.name for case in cases))
        return 0
    if not cases:
        print(
            f'c7_bench: no case has {" or ".join(map(repr, parsed.only))} in its name and anybody to send images to; '
            '--list names them.',
            file=sys.stderr,
        )
        return 2
    if parsed.seconds is not None:
        chosen['seconds'] = parsed.seconds
    if parsed.repetitions is not None:
        chosen['repetitions'] = parsed.repetitions
    options = BenchOptions(
        output=parsed.output, cases=cases, domain_id=parsed.domain_id,
        cpu_wakeup_latency_us=parsed.cpu_wakeup_latency_us, **chosen,
    )  # fmt: skip
    # Children have sessions of their own, so they are ended by leaving their context managers.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        report = run_bench(options, lambda line: print(line, flush=True))
    except C7Error as error:
        print(f'c7_bench: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f'\n{report.limits_table("simple_outline")}\n\n{report.seconds:.0f} s; tables, plots, logs: {options.output}')
    # Ratios on a busy machine are figures, not a test: the exit status says that they were taken.
    return 0


if __name__ == '__main__':
    sys.exit(main())
