"""
Kill, crash and stop the workers of a node that answers a camera, and account for every frame.

Run it in the environment that runs the tests (``make chaos``):

    python test/measure/chaos.py [--deaths 200] [--hangs 20] [--rate 30] [--pause 0.2 1.5]

Exits with 1 where a frame is lost, answered twice or out of order, the node leaves ``active``, or something of it is
left when it has ended. An hour with a death every ten seconds, and what the node's memory does meanwhile:

    python test/measure/chaos.py --deaths 360 --hangs 0 --pause 10 10
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gps_denied_c7_msgs.msg import TensorList
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from gps_denied_c7.demo.network import write_demo_bundle
from gps_denied_c7.worker.child import SPARE_NAME, WORKER_NAME
from support.harness import NodeProcess, Peer, image, running_node, wait_until
from support.keep_apart import keep_apart

CAMERA = '/camera/image_raw'

# A frame that was sent so close to a blow may have been under way, or was the next one.
_AROUND_S = 0.1
# An engine that is stopped counts as hung after the default limit; one that stands by is asked every 0.25 s.
_HUNG_S = 1.25


@dataclass
class Account:
    """
    What came of every frame and every blow.

    :param blows: monotonic seconds, what was done and to whom (``serving``, ``standby`` or ``spare``).
    :param sent: monotonic seconds of publication by stamp.
    :param answered: monotonic seconds and frame number of each answer, by stamp, in order of arrival.
    :param load_s: what the slowest load of an engine took, as the node tells.
    :param levels: monotonic seconds, resident bytes and open descriptors of the node before each blow.
    :param workers: process ids of all workers that were seen.
    :param left: what was there after the node had ended; Fast DDS's files are counted in ``left_by_dds``.
    """

    blows: list[tuple[float, str, str]] = field(default_factory=list)
    sent: dict[int, float] = field(default_factory=dict)
    answered: list[tuple[int, float, int]] = field(default_factory=list)
    counters: dict[str, str] = field(default_factory=dict)
    switches: list[dict] = field(default_factory=list)
    load_s: float = 0.0
    left_active: bool = False
    levels: list[tuple[float, int, int]] = field(default_factory=list)
    workers: set[int] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    left_by_dds: int = 0

    def answered_since(self, when: float) -> bool:
        """Return whether a frame has been answered that was sent after ``when``: no older one waits any more."""
        return bool(self.answered) and self.sent.get(self.answered[-1][0], -math.inf) > when

    def take_level(self, pid: int) -> None:
        """Note what a process holds now."""
        pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
        descriptors = len(os.listdir(f'/proc/{pid}/fd'))
        self.levels.append((time.monotonic(), pages * os.sysconf('SC_PAGE_SIZE'), descriptors))

    def problems(self) -> list[str]:
        """Name every broken promise."""
        found = []
        stamps = [stamp for stamp, _, _ in self.answered]
        if len(set(stamps)) != len(stamps):
            found.append(f'{len(stamps) - len(set(stamps))} frames were answered twice')
        if stamps != sorted(stamps):
            found.append('answers came out of order')
        numbers = [number for _, _, number in self.answered]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            found.append('frame numbers have gaps')
        if numbers[-1] + 1 != int(self.counters['accepted']):
            found.append(f'{self.counters["accepted"]} frames were accepted, the last one answered is {numbers[-1]}')
        if self.counters['unanswered'] != '0':
            found.append(f'{self.counters["unanswered"]} frames stayed unanswered')
        if self.left_active:
            found.append('the node left active')
        return [*found, *self.left]

    def latencies_around(self, *kinds: str, alone: bool) -> np.ndarray:
        """
        Return, for each blow of ``kinds`` to the serving worker, the seconds of the slowest answer around it.

        :param alone: blows that no other engine's came before for as long as it takes until another one stands by,
            else only those that were not alone so.
        """
        arrived = {stamp: when for stamp, when, _ in self.answered}
        slowest: list[float] = []
        stands_by = -math.inf
        for when, kind, role in self.blows:
            if role == 'spare':
                continue
            if kind in kinds and role == 'serving' and alone == (when >= stands_by):
                around = [
                    arrived[stamp] - sent
                    for stamp, sent in self.sent.items()
                    if abs(sent - when) <= _AROUND_S and stamp in arrived
                ]
                slowest += [max(around)] if around else []
            stands_by = max(stands_by, when + self.load_s + (_HUNG_S if kind == 'SIGSTOP' else 0.0))
        return np.array(slowest)


def workers(process: NodeProcess, name: str = WORKER_NAME) -> list[int]:
    """Return the process ids of a node's workers, oldest first; of those without an engine for SPARE_NAME."""
    listed = subprocess.run(['pgrep', '-P', str(process.process.pid), '-x', name], capture_output=True, text=True)
    started = {int(word): _start_ticks(int(word)) for word in listed.stdout.split()}
    # Not by their ids, which begin anew at some point.
    return sorted((pid for pid in started if started[pid]), key=lambda pid: started[pid])


def _start_ticks(pid: int) -> int:
    """Return when a process was started, 0 where it is gone."""
    try:
        return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@contextlib.contextmanager
def slowed_down(pids: list[int], times: int) -> Iterator[None]:
    """Let processes run for one part in ``times`` only, as a throttled processor would."""
    over = threading.Event()

    def signal_all(number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def alternate() -> None:
        while not over.is_set():
            signal_all(signal.SIGSTOP)
            over.wait(0.005 * (times - 1))
            signal_all(signal.SIGCONT)
            over.wait(0.005)

    thread = threading.Thread(target=alternate, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal_all(signal.SIGCONT)


class Camera:
    """
    Publish numbered frames from a thread of its own.

    :param last: number of the last frame that was sent before.
    :param picture: returns the frame of a number; the same VGA image for all by default.
    """

    def __init__(
        self, publisher: Publisher, account: Account, rate_hz: float, last: int,
        picture: Callable[[int], Image] | None = None,
    ) -> None:  # fmt: skip
        self._publisher, self._account, self._period_s, self._last = publisher, account, 1 / rate_hz, last
        self._picture = picture or _vga()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number, due = self._last, time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            # A camera that was held up does not make up for it.
            due = max(due, time.monotonic()) + self._period_s
            number += 1
            message = self._picture(number)
            self._account.sent[number] = time.monotonic()
            self._publisher.publish(message)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def _vga() -> Callable[[int], Image]:
    message = image(width=640, height=480)

    def picture(number: int) -> Image:
        message.header.stamp.sec = number
        return message

    return picture


def run(
    directory: Path, *, deaths: int, hangs: int, rate_hz: float, pause_s: tuple[float, float], seed: int = 1,
    answered_between: bool = False,
) -> Account:  # fmt: skip
    """
    Strike the workers of a node ``deaths + hangs`` times at random moments, and account for it.

    :param directory: for the model.
    :param pause_s: shortest and longest pause between two blows, seconds.
    :param answered_between: wait longer where the node has answered nothing since the last blow. A frame stays
        unanswered where each engine that is loaded for it is struck too, and how long a load takes is the machine's.
    """
    chance = random.Random(seed)
    account = Account()
    blows = [
        *(chance.choice(['SIGKILL', 'SIGSEGV']) for _ in range(deaths)),
        *('SIGSTOP' for _ in range(hangs)),
    ]  # fmt: skip
    chance.shuffle(blows)
    parameters = {'model_path': str(write_demo_bundle(directory / 'bundle')), 'cpu_threads': 1}
    with running_node(parameters) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        wait_until(lambda: peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby')
        peer.node.create_subscription(
            TensorList,
            f'{peer.node_name}/tensors',
            lambda message: account.answered.append((message.header.stamp.sec, time.monotonic(), message.frame_seq)),
            QoSProfile(depth=200, reliability=ReliabilityPolicy.RELIABLE),
        )
        publisher = peer.publisher(CAMERA)
        first = 0
        while not account.answered:
            # Whoever listens has matched once it hears an answer.
            first += 1
            publisher.publish(image(first, width=640, height=480))
            time.sleep(0.2)
        camera = Camera(publisher, account, rate_hz, first)
        try:
            for blow in blows:
                time.sleep(chance.uniform(*pause_s))
                if answered_between and account.blows:
                    last = account.blows[-1][0]
                    wait_until(lambda last=last: account.answered_since(last), 'an answer after the last blow', 60.0)
                targets = wait_until(lambda: workers(process), 'a worker')
                spare = workers(process, SPARE_NAME)
                account.workers.update(targets, spare)
                account.take_level(process.process.pid)
                target = chance.choice(targets + spare)
                role = 'spare' if target in spare else 'serving' if target == _serving(peer, targets) else 'standby'
                account.blows.append((time.monotonic(), blow, role))
                try:
                    os.kill(target, getattr(signal, blow))
                except ProcessLookupError:
                    account.blows.pop()
                account.left_active |= process.process.poll() is not None
            time.sleep(2.0)
            account.left_active |= peer.state() != 'active'
        finally:
            camera.stop()

        settle(peer, account)
        loads = {name: value for name, value in peer.values('Runtime').items() if name.startswith('longest_load_s')}
        account.load_s = max(map(float, loads.values()), default=0.0)
        account.switches = peer.payloads('c7.runtime_switched')
        end(process, account)
    return account


def settle(peer: Peer, account: Account, timeout_s: float = 30.0) -> None:
    """Wait until every accepted frame is answered and has arrived, and note the node's counters."""

    def settled() -> bool:
        account.counters = dict(peer.values(f'Stream {CAMERA}'))
        received = account.answered[-1][2] + 1
        return int(account.counters['accepted']) == int(account.counters['answered']) == received

    deadline = time.monotonic() + timeout_s
    while not settled() and time.monotonic() < deadline:
        time.sleep(0.1)


def end(process: NodeProcess, account: Account) -> None:
    """End the node, and note what is left of it."""
    account.workers.update(workers(process), workers(process, SPARE_NAME))
    segments = process.shared_memory()
    process.signal(signal.SIGTERM)
    if code := process.wait():
        account.left.append(f'the node ended with {code}')
    account.left += [f'worker {pid} is left' for pid in account.workers if _is_worker(pid)]
    account.left_by_dds = sum(path.exists() for path in segments)


def _serving(peer: Peer, targets: list[int]) -> int:
    """Return the worker that serves, as the node told since the last switch, else the oldest: it nearly always does."""
    values = peer.values('Runtime')
    told = values.get('worker_pid', 'none')
    fresh = values.get('switches') == str(len(peer.payloads('c7.runtime_switched')))
    return int(told) if fresh and told != 'none' else targets[0]


def _is_worker(pid: int) -> bool:
    try:
        return b'gps_denied_c7.worker' in Path(f'/proc/{pid}/cmdline').read_bytes()
    except FileNotFoundError:
        return False


def _describe_levels(levels: list[tuple[float, int, int]], settled_s: float = 300.0) -> str:
    """Say how the node's memory and descriptors went, since it had settled where it ran for long enough."""
    later = [level for level in levels if level[0] >= levels[0][0] + settled_s] or levels
    sizes = np.array([size for _, size, _ in later]) / 2**20
    descriptors = [count for *_, count in later]
    # A worker that is being started holds a few more for a moment.
    return (
        f'node over {later[-1][0] - later[0][0]:.0f} s: resident {sizes[0]:.1f} MiB, then {sizes.min():.1f} to '
        f'{sizes.max():.1f}, at last {sizes[-1]:.1f}; descriptors {descriptors[0]}, then {min(descriptors)} to '
        f'{max(descriptors)}, at last {descriptors[-1]}'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--deaths', type=int, default=200, help='SIGKILL and SIGSEGV, half and half')
    parser.add_argument('--hangs', type=int, default=20, help='SIGSTOP for good')
    parser.add_argument('--rate', type=float, default=30.0, help='images a second')
    parser.add_argument(
        '--pause', type=float, nargs=2, default=(0.2, 1.5), metavar=('MIN', 'MAX'), help='between two blows, seconds'
    )
    parser.add_argument('--seed', type=int, default=1)
    options = parser.parse_args()
    keep_apart()
    with tempfile.TemporaryDirectory() as directory:
        account = run(
            Path(directory), deaths=options.deaths, hangs=options.hangs, rate_hz=options.rate,
            pause_s=tuple(options.pause), seed=options.seed,
        )  # fmt: skip
    arrived = {stamp: when for stamp, when, _ in account.answered}
    usual = np.median([when - account.sent[stamp] for stamp, when in arrived.items() if stamp in account.sent]) * 1e3
    print(f'blows: {len(account.blows)}, {sum(role == "serving" for *_, role in account.blows)} to who served')
    print(f'frames: {len(account.sent)} sent, {account.counters}')
    pauses = np.diff(sorted(account.sent.values())) * 1e3
    print(f'longest pause of the camera: {pauses.max():.0f} ms')
    print(f'switches recorded: {len(account.switches)}; camera to tensors p50 {usual:.1f} ms')
    print(f'longest load: {account.load_s * 1e3:.0f} ms')
    for name, kinds in (('death', ('SIGKILL', 'SIGSEGV')), ('hang', ('SIGSTOP',))):
        for alone, where in ((True, 'with one standing by'), (False, 'sooner')):
            slowest = account.latencies_around(*kinds, alone=alone) * 1e3
            if slowest.size:
                p50, p95 = np.percentile(slowest, (50, 95))
                print(
                    f'slowest answer around a {name} {where}: p50 {p50:.0f}, p95 {p95:.0f}, '
                    f'max {slowest.max():.0f} ms, {slowest.size} of them'
                )
    print(_describe_levels(account.levels))
    print(f'left by Fast DDS: {account.left_by_dds} files; by the node: {len(account.left)}')
    for problem in account.problems():
        print(f'BROKEN  {problem}')
    return 1 if account.problems() else 0


if __name__ == '__main__':
    sys.exit(main())
