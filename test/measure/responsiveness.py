"""
Measure N-4: how fast services answer under image overload and during a long configure, and whether memory stays flat.

Run it on an otherwise idle machine, in the environment that runs the tests:

    python test/measure/responsiveness.py [--overload-s 60] [--configure-s 10]

Exits with 1 where a limit of the contract is exceeded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rclpy
from lifecycle_msgs.srv import GetState
from rcl_interfaces.srv import GetParameters
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from gps_denied_c7.ros.fastdds import apply_profile
from support.harness import ROOT, Peer, image, running_node, wait_until
from support.keep_apart import keep_apart
from support.networks import slow, slow_to_load

CAMERA = '/camera/image_raw'
RATE_HZ, WIDTH, HEIGHT = 60.0, 640, 480
CALLS_HZ = 20.0
LIMIT_MS = 100.0
SERVICES = {
    'get_state': (GetState, GetState.Request()),
    'get_parameters': (GetParameters, GetParameters.Request(names=['model_path'])),
}


@dataclass
class Report:
    """Collect the rows of the table, and what exceeded its limit."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, text: str, holds: bool = True) -> None:
        self.rows.append((name, text))
        if not holds:
            self.failures.append(f'{name}: {text}')

    def add_latencies(self, phase: str, latencies: dict[str, list[float]]) -> None:
        for service, values in latencies.items():
            milliseconds = np.array(values) * 1e3
            p50, p95, p99 = np.percentile(milliseconds, (50, 95, 99))
            within = float(np.mean(milliseconds <= LIMIT_MS))
            self.add(
                f'{phase}: {service}',
                f'{within:6.1%} within {LIMIT_MS:.0f} ms; p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f}, '
                f'max {milliseconds.max():.1f} ms, {len(values)} calls',
                within >= 0.95,
            )


class ProcessorTime:
    """Tell which share of all cores was busy since the start, and how much of it was not ours."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._before = self._read()

    def _read(self) -> tuple[float, ...]:
        ticks = [int(word) for word in Path('/proc/stat').read_text().split('\n', 1)[0].split()[1:9]]
        ours = sum(
            sum(int(word) for word in Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[11:13])
            for pid in self._pids
        )
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4] - ticks[7], ours, ticks[7]

    def text(self) -> str:
        total, busy, ours, stolen = (now - then for now, then in zip(self._read(), self._before, strict=True))
        others = max(0.0, busy - ours)
        return f'{busy / total:.0%} busy, {others / total:.0%} with others, {stolen / total:.1%} taken by the host'


def call_while(peer: Peer, going_on: Callable[[], bool]) -> dict[str, list[float]]:
    """Call each service in turn while ``going_on`` and return the seconds each call took."""
    latencies: dict[str, list[float]] = {service: [] for service in SERVICES}
    while going_on():
        for service, (service_type, request) in SERVICES.items():
            started = time.perf_counter()
            peer.call(service_type, service, request)
            latencies[service].append(time.perf_counter() - started)
            time.sleep(1 / CALLS_HZ / len(SERVICES))
    return latencies


class Memory:
    """Sample the resident memory of a process, in MB."""

    def __init__(self, pid: int) -> None:
        self._statm = Path(f'/proc/{pid}/statm')
        self._over = threading.Event()
        self.samples: list[float] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.5):
            self.samples.append(int(self._statm.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6)

    def stop(self) -> list[float]:
        self._over.set()
        self._thread.join()
        return self.samples


@contextmanager
def camera_process(domain_id: int, seconds: float) -> Iterator[subprocess.Popen]:
    """Publish images from a process of its own, so that it disturbs no measurement here."""
    environ = {**os.environ, 'ROS_DOMAIN_ID': str(domain_id)}
    environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), environ.get('PYTHONPATH', '')])
    apply_profile(environ)
    process = subprocess.Popen(
        [sys.executable, __file__, '--camera', str(seconds)], env=environ, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run_camera(seconds: float) -> None:
    """Publish at the rate of the contract and print how many images were sent."""
    rclpy.init()
    node = rclpy.create_node('camera')
    publisher = node.create_publisher(Image, CAMERA, QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT))
    wait_until(publisher.get_subscription_count, 'a subscriber')
    time.sleep(0.5)
    message = image(width=WIDTH, height=HEIGHT)
    sent = 0
    started = due = time.monotonic()
    while due < started + seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        # A camera that was held up does not make up for it.
        due = max(due, time.monotonic()) + 1 / RATE_HZ
        message.header.stamp.sec = sent + 1
        publisher.publish(message)
        sent += 1
    print(sent, f'{sent / (time.monotonic() - started):.1f}', flush=True)
    time.sleep(1.0)


def measure_overload(report: Report, directory: Path, seconds: float) -> None:
    with running_node({'model_path': slow(directory, multiplications=24), 'cpu_threads': 1}) as (process, peer):
        peer.start()
        # The first call makes its client, which takes longer than an answer.
        peer.get_parameter('model_path')
        with camera_process(peer.context.get_domain_id(), seconds) as camera:
            wait_until(lambda: peer.tensors, 'the first answer')
            memory = Memory(process.process.pid)
            processors = ProcessorTime(process.process.pid, camera.pid, os.getpid())
            end = time.monotonic() + seconds - 1.0
            report.add_latencies('overload', call_while(peer, lambda: time.monotonic() < end))
            samples = memory.stop()
            report.add('overload: cores', processors.text())
            assert camera.stdout is not None
            sent, rate = camera.stdout.readline().split()

            def settled() -> dict[str, str] | None:
                values: dict[str, str] = peer.values(f'Stream {CAMERA}')
                missed = (values['lost_before_node'], values['dropped_in_queue'])
                done = int(values['received']) + sum(int(one) for one in missed if one.isdigit()) >= int(sent)
                return values if done or camera.poll() is not None else None

            values = wait_until(settled, 'the last images', 30.0)
            latency = peer.values('Latency')
    report.add('overload: sent', f'{sent} images of {WIDTH}x{HEIGHT} at {rate} Hz')
    report.add('overload: engine p50', f'{latency["engine_p50_ms"]} ms, a frame every {1e3 / RATE_HZ:.1f} ms')
    for name in ('received', 'answered', 'unanswered', 'dropped_by_policy'):
        report.add(f'overload: {name}', values[name])
    report.add('overload: lost_before_node', values['lost_before_node'], values['lost_before_node'] == '0')
    accounted = int(values['answered']) + int(values['unanswered']) + int(values['dropped_by_policy'])
    accounted -= int(values['dropped_in_queue']) if values['dropped_in_queue'].isdigit() else 0
    report.add('overload: received and accounted for', str(accounted), accounted == int(values['received']))
    early, late = np.mean(samples[5:15]), np.mean(samples[-10:])
    report.add(
        'overload: resident memory',
        f'{early:.1f} MB in seconds 3 to 8, {late:.1f} MB in the last 5, at most {max(samples):.1f} MB',
        late < early * 1.05,
    )


def measure_configure(report: Report, directory: Path, seconds: float) -> None:
    rate = _multiplications_per_second(directory)
    model = slow_to_load(directory, multiplications=int(rate * seconds))
    with running_node({'model_path': model, 'cpu_threads': 1}) as (_, peer):
        peer.state()
        peer.get_parameter('model_path')
        started = time.monotonic()
        answer: Any = peer.ask_change_state('configure')
        latencies = call_while(peer, lambda: not answer.done())
        took = time.monotonic() - started
        assert answer.result().success
    report.add('configure: took', f'{took:.1f} s')
    report.add_latencies('configure', latencies)


def _multiplications_per_second(directory: Path) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    count = 100
    model = slow_to_load(directory, multiplications=count)
    started = time.monotonic()
    onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    return count / (time.monotonic() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--overload-s', type=float, default=60.0, help='seconds of images at 60 Hz')
    parser.add_argument('--configure-s', type=float, default=10.0, help='about how long the configure is to take')
    parser.add_argument('--camera', type=float, metavar='SECONDS', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.camera is not None:
        run_camera(options.camera)
        return 0
    keep_apart()
    report = Report()
    with tempfile.TemporaryDirectory() as directory:
        measure_overload(report, Path(directory), options.overload_s)
        measure_configure(report, Path(directory), options.configure_s)
    print(f'ROS 2 {os.environ.get("ROS_DISTRO") or Path(sys.prefix).name}, {len(os.sched_getaffinity(0))} cores')
    for name, text in report.rows:
        print(f'{name:42} {text}')
    for failure in report.failures:
        print(f'EXCEEDED  {failure}')
    return 1 if report.failures else 0


if __name__ == '__main__':
    sys.exit(main())
