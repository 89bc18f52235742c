"""Measure one case: its processes, the contestants in turn, and what each of them did."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gps_denied_c7.bench.cases import BARE, DEFAULT_TRANSPORT, JPEG, SHIPPED, Case, Contestant
from gps_denied_c7.bench.figures import Block, CaseResult, Result, summarise, summarise_bare
from gps_denied_c7.bench.models import BenchModel
from gps_denied_c7.bench.resources import cpu_seconds, memory_mb
from gps_denied_c7.demo.processes import Child, DemoError

__all__ = ['BenchOptions', 'Measurement']

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
    :param cpu_wakeup_latency_us: limit on the wake-up time of idle cores, for all contestants; None: the system's.
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


class Measurement:
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
        """Measure, and return the figures."""
        repetitions = range(self._repetitions)
        rounds = [[number] for number in repetitions] if self._case.separate_processes else [list(repetitions)]
        (self._directory / 'engines').mkdir(parents=True)
        for number, of_round in enumerate(rounds):
            self._logs = self._directory if len(rounds) == 1 else self._directory / f'processes_{number}'
            self._logs.mkdir(exist_ok=True)
            with ExitStack() as stack:
                self._run_round(stack, of_round, first=number == 0)
        results = {record.contestant.name: record.summary() for record in self._records}
        return CaseResult(self._case, self._model.engine_ms, self._hz, results)

    def _run_round(self, stack: ExitStack, repetitions: Sequence[int], *, first: bool) -> None:
        """Start every process, measure, and shut them down."""
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
        # The start of the node as shipped is timed before the others start.
        for record in sorted(self._records, key=lambda record: record.contestant.name != SHIPPED):
            name = record.contestant.name
            started[name] = self._start(stack, record, topics.get(name, []))
            if first and name == SHIPPED:
                self._wait_ready(started[name], timed=True)
        running = [started[record.contestant.name] for record in self._records]
        answering = [one for one in running if one.service is None]
        for one in answering:
            if not (first and one.name == SHIPPED):
                self._wait_ready(one)
        self._wait_quiet(running)
        if self._with_idle and first:
            self._watch_idle(running)
        for repetition in repetitions:
            # The first contestant changes each time: the effects of one on the next, such as heat, reach all of them.
            turn = repetition % len(running)
            for one in [*running[turn:], *running[:turn]]:
                self._measure(one)
        time.sleep(_DIAGNOSTICS_S)
        for one in answering:
            self._note_end(one)
        for one in answering:
            # All at once: each takes a second to leave its domain.
            one.child.process.send_signal(signal.SIGINT)
        for one in answering:
            one.child.wait()

    def _service(self, stack: ExitStack, module: str, arguments: Sequence[str], log: str = '') -> _Service:
        path = self._logs / f'{log or module.rpartition(".")[2]}.log'
        child = Child(module, arguments, self._environ, log=path, pipe=True, commands=True)
        # The end of its input shuts it down; its context manager ends a process that ignores that.
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
        name, child = running.name, running.child
        matched = self._camera.ask(do='match', contestant=name, timeout_s=_MATCH_S)['matched_s']
        child.check_alive()
        if matched is None:
            raise DemoError(f'{name} did not subscribe in {_MATCH_S:.0f} s.\n{child.tail()}')
        if timed:
            running.record.start_s = matched - running.began_s
        # The other end may match a moment later, and an engine's first run is slower.
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
        # Frames sent before both ends had matched do not count as lost.
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
            # There is no better rung here, and looking for one would disturb the measurement.
            'promotion_backoff_s': [3600.0, 3600.0],
            'engine_cache_dir': str(self._directory / 'engines' / 'engine_cache'),
            'ort_trt_cache_dir': str(self._directory / 'engines' / 'ort_trt_cache'),
            **contestant.parameters,
        }
        path = self._logs / f'{contestant.name}.yaml'
        lines = [f'    {name}: {json.dumps(value)}' for name, value in values.items()]
        path.write_text('\n'.join(['/**:', '  ros__parameters:', *lines, '']), encoding='utf-8')
        return ['--ros-args', *rename, '--params-file', str(path)]

    def _wait_quiet(self, running: Sequence[_Running]) -> None:
        """Wait until no process loads anything any more, as a node does its standby; at most a few seconds."""
        deadline = time.monotonic() + _QUIET_AT_LAST_S
        spent = sum(cpu_seconds(one.child.process.pid) for one in running)
        while time.monotonic() < deadline:
            time.sleep(_QUIET_S)
            before, spent = spent, sum(cpu_seconds(one.child.process.pid) for one in running)
            if spent - before < _QUIET_SHARE * _QUIET_S * len(running):
                return

    def _watch_idle(self, running: Sequence[_Running]) -> None:
        """Measure each process while no images are sent."""
        began = time.monotonic()
        before = [cpu_seconds(one.child.process.pid) for one in running]
        time.sleep(self._options.idle_s)
        for one, was in zip(running, before, strict=True):
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

    def _note_end(self, running: _Running) -> None:
        """Note a contestant's last answers, its diagnostics and its memory before it ends."""
        collected, record = self._collect(running.name), running.record
        if collected['answers']:
            record.blocks.append(Block((), 0, collected['answers'], {}, 0.0))
        record.statuses.append(collected['statuses'])
        record.memory_mb.append(memory_mb(running.child.process.pid))


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
    What one contestant has done in a case, in all its processes.

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


def _end_input(child: Child) -> None:
    assert child.process.stdin is not None
    child.process.stdin.close()
    # A child that still waits for a dead process is interrupted by its context manager.
    with suppress(subprocess.TimeoutExpired):
        child.process.wait(5.0)
