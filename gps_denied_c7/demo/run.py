"""The ``c7_demo`` executable: a flight, a network, the real node, real DDS, and an account of every frame."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gps_denied_c7.demo.child_process import Child, DemoError, run_program, wait_for
from gps_denied_c7.demo.flight import Camera, Flight, write_flight
from gps_denied_c7.demo.network import HEIGHT, WIDTH, write_demo_bundle
from gps_denied_c7.demo.output import claim_output, write_parameters
from gps_denied_c7.demo.picture import Detections, compose, read_frame
from gps_denied_c7.demo.report import DemoReport, FrameCount, stage_percentiles
from gps_denied_c7.demo.ros_domain import child_environment, free_domain_id, free_ports
from gps_denied_c7.ground.command_line import path_argument
from gps_denied_c7.monitoring.flight_record import in_order
from gps_denied_c7.ros.fastdds import domain_id

__all__ = ['DemoOptions', 'main', 'run_demo']

NODE = '/c7_inference'
_START_S = 90.0
_LISTEN_S = 30.0
_ANSWER_S = 20.0
_REPLAY_SLACK_S = 120.0
_PACES = (1.0, 0.5, 0.25)
_OWN = ('flight', 'bundle', 'ros_log')


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """
    Say what is flown and where the results go.

    The rates leave a slow or busy machine with two cores the time to answer every frame: a frame that is still
    waiting when the next one of its camera comes is dropped by policy.

    :param output: directory, made where needed.
    :param duration_s: length of the flight.
    :param rate_hz: frames per second of the 640x480 camera.
    :param hd_rate_hz: frames per second of the 1920x1080 camera, 0 for none.
    :param domain_id: ROS domain, a free one where None.
    """

    output: Path
    duration_s: float = 12.0
    rate_hz: float = 6.0
    hd_rate_hz: float = 2.0
    domain_id: int | None = None

    @property
    def cameras(self) -> tuple[Camera, ...]:
        """The cameras flown."""
        small = Camera('/camera', 640, 480, 'mono8', self.rate_hz)
        if not self.hd_rate_hz:
            return (small,)
        return small, Camera('/camera_hd', 1920, 1080, 'rgb8', self.hd_rate_hz, field_of_view_deg=66.0)


class _Feed(threading.Thread):
    """Collect what the observer process prints."""

    def __init__(self, child: Child) -> None:
        super().__init__(daemon=True)
        assert child.process.stdout is not None
        self._lines = child.process.stdout
        self.answers: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self.statuses: dict[str, dict[str, Any]] = {}
        self.last_answer = time.monotonic()
        self.start()

    def run(self) -> None:
        for line in self._lines:
            event = json.loads(line)
            if event['event'] == 'answer':
                self.answers.append(event)
                self.last_answer = time.monotonic()
            elif event['event'] == 'record':
                self.records.append(event)
            else:
                self.statuses = event['statuses']

    def values(self, status: str) -> Mapping[str, str]:
        """Return the values of the latest diagnostic status of that name."""
        values: Mapping[str, str] = self.statuses.get(status, {}).get('values', {})
        return values

    def counter(self, topic: str, *names: str) -> int:
        """Return the sum of those counters of a topic, by the node's own latest count."""
        values = self.values(f'Stream {topic}')
        return sum(int(values.get(name, 0)) for name in names)


def run_demo(options: DemoOptions, say: Callable[[str], None], *, progress: bool = True) -> DemoReport:
    """
    Carry the demo out and write ``report.md``, ``report.json`` and ``detections.png`` beside what they came from.

    :param say: takes one line at a time.
    :param progress: draw progress bars on standard error.
    :raises DemoError: a process did not start, answer or end.
    """
    output = claim_output(options.output, 'c7_demo', _OWN)
    seconds: dict[str, float] = {}
    with _timed(seconds, 'flight'):
        flight = Flight(options.duration_s, options.cameras)
        bag = write_flight(output / 'flight', flight, disable_bar=None if progress else True).path
    say(f'flight recorded: {bag}')
    with _timed(seconds, 'network'):
        bundle = write_demo_bundle(output / 'bundle')
    say(f'network written: {bundle}')
    report: DemoReport | None = None
    for pace in _PACES:
        run = _Run(options, output, bag, bundle, pace, seconds, progress)
        report = run.account(say)
        if not report.dropped:
            break
        # The newest frame wins if they come too fast: right in flight, but then not every frame can be accounted for.
        say(f'{report.dropped} frames were dropped by policy: this machine is too busy for a pace of {pace:g}')
    assert report is not None
    (output / 'report.json').write_text(json.dumps(report.to_json(), indent=2) + '\n', encoding='utf-8')
    (output / 'report.md').write_text(report.markdown(), encoding='utf-8')
    return report


@dataclass(frozen=True, slots=True)
class _Run:
    """Replay the bag once, to a node and an observer started for it."""

    options: DemoOptions
    output: Path
    bag: Path
    bundle: Path
    pace: float
    seconds: dict[str, float]
    progress: bool

    def account(self, say: Callable[[str], None]) -> DemoReport:
        """Return the report, and draw the picture."""
        output = self.output
        topics = [f'{camera.name}/image_raw' for camera in self.options.cameras]
        with ExitStack() as stack:
            domain_id, ports = self.options.domain_id, None
            if domain_id is None:
                ports = free_ports(os.environ)
                domain_id = stack.enter_context(free_domain_id(ports))
            environ = child_environment(domain_id, output, processes=3, ports=ports)
            environ['ROS_LOG_DIR'] = str(output / 'ros_log')
            tensors = output / 'tensors.npz'
            listening = ['--node', NODE, '--tensors', str(tensors)]
            observer = stack.enter_context(
                Child('gps_denied_c7.ros.observer', listening, environ, log=output / 'observer.log', pipe=True)
            )
            feed = _Feed(observer)
            with _timed(self.seconds, 'start'):
                parameters = write_parameters(
                    output / 'parameters.yaml', output, {'image_topics': topics, 'model_path': str(self.bundle)}
                )
                arguments = ['--ros-args', '--params-file', str(parameters)]
                node = stack.enter_context(
                    Child('gps_denied_c7.ros.node_main', arguments, environ, log=output / 'node.log')
                )
                wait_for(
                    lambda: feed.values('Runtime').get('lifecycle_state') == 'active',
                    _START_S, 'the node to be active', node, observer,
                )  # fmt: skip
            say(f'node active on ROS domain {domain_id}: {feed.statuses["Runtime"]["message"]}')
            with _timed(self.seconds, 'replay'):
                sent = self._replay(topics, environ)
                _wait_answered(feed, sent, node, observer)
            last = dict(feed.statuses)
            exit_code = node.stop()
            # The record went out before the process ended; that it comes late or never is for the report to tell.
            with suppress(DemoError):
                wait_for(lambda: any(record['kind'] == 'c7.session_ended' for record in feed.records), 3.0, 'its end')
            observer.stop()
            feed.join(5.0)
        say('node stopped')
        if not feed.answers:
            raise DemoError('no frame was answered.', remedy=f'See {output / "node.log"}.')
        report = _account(feed, last, sent, exit_code, self.pace, self.seconds)
        _draw(output / 'detections.png', report, _detections(feed, self.bag, tensors))
        return report

    def _replay(self, topics: Sequence[str], environ: Mapping[str, str]) -> dict[str, int]:
        """Play the images of the bag and return how many were sent on each topic."""
        written, log = self.output / 'replay.json', self.output / 'replay.log'
        visible = self.progress and sys.stderr.isatty()
        arguments = [
            str(self.bag), '--topics', *topics, '--wait-matched', str(_LISTEN_S), '--rate', str(self.pace),
            '--json', str(written), '--progress' if visible else '--no-progress',
        ]  # fmt: skip
        with Child('gps_denied_c7.ros.replay_main', arguments, environ, log=None if visible else log) as child:
            longest = self.options.duration_s / self.pace + _REPLAY_SLACK_S
            wait_for(lambda: child.process.poll() is not None, longest, 'the end of the replay')
            if child.process.returncode:
                raise DemoError(f'the replay ended with code {child.process.returncode}.\n{child.tail()}')
        values = json.loads(written.read_text(encoding='utf-8'))
        return {topic['topic']: topic['sent'] for topic in values['topics']}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - began, 3)


def _wait_answered(feed: _Feed, sent: Mapping[str, int], *children: Child) -> None:
    """Wait until the node accounts for every frame, or nothing has moved for a while."""

    def settled() -> bool:
        accounted = all(
            feed.counter(topic, 'answered', 'unanswered', 'dropped_by_policy') >= count for topic, count in sent.items()
        )
        answered = sum(feed.counter(topic, 'answered') for topic in sent)
        return (accounted and len(feed.answers) >= answered) or time.monotonic() - feed.last_answer > _ANSWER_S

    wait_for(settled, 4 * _ANSWER_S, 'the last answers', *children)


def _account(
    feed: _Feed,
    statuses: Mapping[str, Mapping[str, Any]],
    sent: Mapping[str, int],
    exit_code: int,
    pace: float,
    seconds: Mapping[str, float],
) -> DemoReport:
    frames, stages = [], {}
    for topic, count in sent.items():
        answers = [answer for answer in feed.answers if answer['topic'] == topic]
        stamps = {answer['stamp_ns'] for answer in answers}
        values = statuses.get(f'Stream {topic}', {}).get('values', {})
        lost = values.get('lost_before_node', 'unknown')
        frames.append(
            FrameCount(
                topic=topic,
                sent=count,
                answered=len(stamps),
                repeated=len(answers) - len(stamps),
                dropped=int(values.get('dropped_by_policy', 0)),
                refused=sum(int(value) for name, value in values.items() if name.startswith('refused ')),
                unanswered=int(values.get('unanswered', 0)),
                lost_before_node=int(lost) if lost.isdigit() else None,
            )
        )
        if answers:
            stages[topic] = stage_percentiles(answers)
    runtime = statuses.get('Runtime', {})
    notices = [value for name, value in runtime.get('values', {}).items() if name.startswith('notice ')]
    records = in_order(feed.records, lambda record: (record['session_id'], record['seq']))
    last = feed.answers[-1]
    return DemoReport(
        frames=tuple(frames),
        stages=stages,
        model=last['model'],
        weights_digest=last['weights_digest'],
        runtimes=tuple(dict.fromkeys(answer['runtime'] for answer in feed.answers)),
        providers=tuple(dict.fromkeys(answer['provider'] for answer in feed.answers)),
        is_fallback=any(answer['is_fallback'] for answer in feed.answers),
        records=tuple((record['kind'], record['payload']) for record in records),
        standing_alerts=tuple(filter(None, runtime.get('values', {}).get('alerts', '').split(', '))),
        diagnostics_message=runtime.get('message', ''),
        node_exit_code=exit_code,
        transport='; '.join(notices) or 'shared memory, large images fit',
        pace=pace,
        seconds=seconds,
    )


def _draw(path: Path, report: DemoReport, found: Sequence[Detections]) -> None:
    import cv2

    answered, sent = (sum(getattr(count, name) for count in report.frames) for name in ('answered', 'sent'))
    made_by = f'{report.model} on {", ".join(report.runtimes)}, {", ".join(report.providers)}'
    cv2.imwrite(str(path), compose(found, 'What the network found', f'{made_by}; {answered} of {sent} frames answered'))


def _detections(feed: _Feed, bag: Path, tensors: Path) -> list[Detections]:
    """Return one answered frame of each topic with its answer: the one with the most keypoints."""
    chosen = []
    with np.load(tensors, allow_pickle=False) as arrays:
        for topic in dict.fromkeys(answer['topic'] for answer in feed.answers):
            answers = [answer for answer in feed.answers if answer['topic'] == topic]

            def array(answer: Mapping[str, Any], name: str, topic: str = topic) -> Any:
                return arrays[f'{topic}|{answer["frame_seq"]}|{name}'][0]

            best = max(answers, key=lambda answer: int((array(answer, 'scores') > 0).sum()))
            chosen.append(
                Detections(
                    topic=topic,
                    image=read_frame(bag, topic, best['stamp_ns']),
                    keypoints=array(best, 'keypoints'),
                    scores=array(best, 'scores'),
                    heatmap=array(best, 'heatmap')[0],
                    network_to_image=np.array(best['network_to_image']).reshape(2, 3),
                    network_size=(WIDTH, HEIGHT),
                )
            )
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    :return: 0 when every frame was answered and every alert seen, 1 when not, 2 when the demo could not be carried
        out.
    """
    defaults = DemoOptions(output=Path('demo_output'))
    parser = argparse.ArgumentParser(
        prog='c7_demo', description='Fly, replay over DDS through the node, and account for every frame.'
    )
    parser.add_argument(
        '--output', type=path_argument, default=defaults.output, metavar='DIR',
        help='directory for the results; replaces those of an earlier demo; default: %(default)s',
    )  # fmt: skip
    parser.add_argument(
        '--duration', type=float, default=defaults.duration_s, metavar='SECONDS', help='default: %(default)g'
    )
    parser.add_argument(
        '--rate', type=float, default=defaults.rate_hz, metavar='HZ',
        help='rate of the 640x480 camera; default: %(default)g',
    )  # fmt: skip
    parser.add_argument(
        '--hd-rate', type=float, default=defaults.hd_rate_hz, metavar='HZ',
        help='rate of the 1920x1080 camera; 0: none; default: %(default)g',
    )  # fmt: skip
    parser.add_argument(
        '--domain-id', type=domain_id, default=os.environ.get('ROS_DOMAIN_ID') or None, metavar='N',
        help='ROS domain; default: ROS_DOMAIN_ID; if that is not set, one on separate ports that no other program uses',
    )  # fmt: skip
    parser.add_argument('--no-progress', action='store_true', help='draw no bars')
    parsed = parser.parse_args(arguments)
    options = DemoOptions(
        output=parsed.output,
        duration_s=parsed.duration,
        rate_hz=parsed.rate,
        hd_rate_hz=parsed.hd_rate,
        domain_id=parsed.domain_id,
    )
    return run_program('c7_demo', lambda: _demo(options, progress=not parsed.no_progress))


def _demo(options: DemoOptions, *, progress: bool) -> int:
    report = run_demo(options, lambda line: print(line, flush=True), progress=progress)
    print(f'\n{report.text()}\n\npicture, table and logs: {options.output}')
    problems = report.problems()
    for problem in problems:
        print(f'c7_demo: {problem}', file=sys.stderr)
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
