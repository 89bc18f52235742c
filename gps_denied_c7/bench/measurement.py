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
from gps_denied_c7.demo.child_process import Child, DemoError
from gps_denied_c7.demo.output import write_parameters

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
    :param networks: output directory of an earlier run, whose networks are measured; None for new ones.
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
    networks: Path | None = None
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
        results = {record.name: record.summary() for record in self._records}
        return CaseResult(self._case, self._model.engine_ms, self._hz, results)

    def _run_round(self, stack: ExitStack, repetitions: Sequence[int], *, first: bool) -> None:
        """Start every process, measure, and shut them down."""
        nodes = [record.name for record in self._records if record.name != BARE]
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
        # The start of the node as shipped is timed before the others start.
        for record in sorted(self._records, key=lambda record: record.name != SHIPPED):
            self._start(stack, record, topics.get(record.name, []))
            if first and record.name == SHIPPED:
                self._wait_ready(record, timed=True)
        answering = [record for record in self._records if record.name != BARE]
        for record in answering:
            if not (first and record.name == SHIPPED):
                self._wait_ready(record)
        self._wait_quiet()
        if self._with_idle and first:
            self._watch_idle()
        for repetition in repetitions:
            # The first contestant changes each time: the effects of one on the next, such as heat, reach all of them.
            turn = repetition % len(self._records)
            for record in [*self._records[turn:], *self._records[:turn]]:
                self._measure(record)
        time.sleep(_DIAGNOSTICS_S)
        for record in answering:
            self._note_end(record)
        for record in answering:
            # All at once: each takes a second to leave its domain.
            record.child.process.send_signal(signal.SIGINT)
        for record in answering:
            record.child.wait()

    def _service(self, stack: ExitStack, module: str, arguments: Sequence[str], log: str = '') -> _Service:
        path = self._logs / f'{log or module.rpartition(".")[2]}.log'
        service = _Service(module, arguments, self._environ, path)
        stack.enter_context(service)
        service.answer()
        return service

    def _start(self, stack: ExitStack, record: _Record, topics: list[str]) -> None:
        """Start a contestant's process; the bare engine is asked instead of being sent images."""
        module, record.began_s = record.contestant.module, time.time()
        if record.name == BARE:
            record.child = self._service(stack, module, ['--model', str(self._model.path)], record.name)
        else:
            log = self._logs / f'{record.name}.log'
            arguments = self._arguments(record.contestant, topics)
            record.child = stack.enter_context(Child(module, arguments, self._environ, log=log))

    def _wait_ready(self, record: _Record, *, timed: bool = False) -> None:
        """Wait until images are answered."""
        name, child = record.name, record.child
        matched = self._camera.ask(do='match', contestant=name, timeout_s=_MATCH_S)['matched_s']
        child.check_alive()
        if matched is None:
            raise DemoError(f'{name} did not subscribe in {_MATCH_S:.0f} s.\n{child.tail()}')
        if timed:
            record.start_s = matched - record.began_s
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
        record.blocks.append(Block((), len(answers), answers, {}, 0.0))

    def _arguments(self, contestant: Contestant, topics: list[str]) -> list[str]:
        rename = ['-r', f'__node:={contestant.name}']
        if not contestant.is_node:
            model = ['--model', str(self._model.path), '--topics', *topics]
            return [*model, *contestant.arguments, '--ros-args', *rename]
        values = {
            'image_topics': topics,
            'model_path': str(self._model.path),
            # There is no better rung here, and looking for one would disturb the measurement.
            'promotion_backoff_s': [3600.0, 3600.0],
            **contestant.parameters,
        }
        path = write_parameters(self._logs / f'{contestant.name}.yaml', self._directory, values)
        return ['--ros-args', *rename, '--params-file', str(path)]

    def _wait_quiet(self) -> None:
        """Wait until no process loads anything any more, as a node does its standby; at most a few seconds."""
        deadline = time.monotonic() + _QUIET_AT_LAST_S
        spent = sum(self._cpu_seconds())
        while time.monotonic() < deadline:
            time.sleep(_QUIET_S)
            before, spent = spent, sum(self._cpu_seconds())
            if spent - before < _QUIET_SHARE * _QUIET_S * len(self._records):
                return

    def _watch_idle(self) -> None:
        """Measure each process while no images are sent."""
        began, before = time.monotonic(), self._cpu_seconds()
        time.sleep(self._options.idle_s)
        for record, was, spent in zip(self._records, before, self._cpu_seconds(), strict=True):
            record.idle_percent = 100.0 * (spent - was) / (time.monotonic() - began)

    def _cpu_seconds(self) -> list[float]:
        return [cpu_seconds(record.child.process.pid) for record in self._records]

    def _measure(self, record: _Record) -> None:
        if isinstance(record.child, _Service):
            record.durations.append(record.child.ask(seconds=self._seconds * _BARE_SHARE)['durations_ns'])
            return
        name = record.name
        pids = {
            'contestant': record.child.process.pid,
            'camera': self._camera.process.pid,
            'listener': self._listener.process.pid,
        }
        before = {key: cpu_seconds(pid) for key, pid in pids.items()}
        began = time.monotonic()
        warm_up = self._camera.ask(do='send', contestant=name, rate_hz=self._hz, seconds=self._options.warm_up_s)
        sent = self._camera.ask(do='send', contestant=name, rate_hz=self._hz, seconds=self._seconds)
        # A queue of five frames in front of the engine, and one in it, for each camera.
        time.sleep(_SETTLE_S + 6e-3 * self._model.engine_ms * self._case.cameras)
        spent = {key: cpu_seconds(pid) - before[key] for key, pid in pids.items()}
        elapsed = time.monotonic() - began
        record.child.check_alive()
        record.blocks.append(
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

    def _note_end(self, record: _Record) -> None:
        """Note a contestant's last answers, its diagnostics and its memory before it ends."""
        collected = self._collect(record.name)
        if collected['answers']:
            record.blocks.append(Block((), 0, collected['answers'], {}, 0.0))
        record.statuses.append(collected['statuses'])
        record.memory_mb.append(memory_mb(record.child.process.pid))


class _Service(Child):
    """Run a module that answers each line with a line; the end of its input shuts it down."""

    def __init__(self, module: str, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        super().__init__(module, arguments, environ, log=log, pipe=True, commands=True)

    def __exit__(self, *raised: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        # A child that still waits for a dead process is interrupted.
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
        super().__exit__(*raised)

    def ask(self, **command: Any) -> dict[str, Any]:
        """Return the answer to one command."""
        assert self.process.stdin is not None
        try:
            print(json.dumps(command), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self.process.wait()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Return the next answer; the first one says that the process is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.check_alive()
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(slots=True)
class _Record:
    """
    What one contestant has done in a case, in all its processes.

    :param child: its present process.
    :param began_s: wall clock when that was started.
    :param durations: of the bare engine's inferences, nanoseconds, one list a repetition.
    :param statuses: of a node's diagnostics, one for each process.
    """

    contestant: Contestant
    child: Child = field(init=False)
    began_s: float = 0.0
    blocks: list[Block] = field(default_factory=list)
    durations: list[list[int]] = field(default_factory=list)
    statuses: list[Mapping[str, Mapping[str, str]]] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)
    start_s: float | None = None
    idle_percent: float | None = None

    @property
    def name(self) -> str:
        return self.contestant.name

    def summary(self) -> Result:
        """Return the figures."""
        if self.name == BARE:
            return summarise_bare(self.name, self.contestant.title, self.durations)
        return summarise(
            self.name,
            self.contestant.title,
            self.blocks,
            statuses=self.statuses if self.contestant.is_node else None,
            memory_mb=statistics.median(self.memory_mb),
            start_s=self.start_s,
            idle_percent=self.idle_percent,
        )
