"""
Feed a node hostile pictures, messages and models while it has little memory, and let hostile cameras run beside others.

Run it in the environment that runs the tests (part of ``make soak``), as somebody who may make memory cgroups:

    python test/measure/hostile.py [--pictures 900] [--bundles 100] [--memory-mb 900] [--seconds 8] [--only TEXT]

The node, its workers and its decoders live in one memory cgroup. First every picture, message and bundle is given to it
once; then each kind of hostile camera runs at 20 Hz beside one of plain images. Exits with 1 where the node has ended,
a frame is not accounted for, a healthy image is answered otherwise than by plain ``session.run``, the plain camera gets
too few answers, ``get_state`` takes too long, or diagnostics do not name the camera that costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rclpy
from gps_denied_c7_msgs.msg import TensorList
from lifecycle_msgs.srv import GetState
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from sensor_msgs.msg import CompressedImage, Image

from gps_denied_c7.demo.network import HEIGHT, WIDTH, write_demo_bundle
from gps_denied_c7.ros.fastdds import apply_profile
from support.differential import plain_session, wrong_outputs
from support.harness import ROOT, NodeProcess, Peer, free_domain_id, image, tensor, wait_until
from support.hostile.hostile_bundles import hostile_bundle
from support.hostile.hostile_messages import hostile_message
from support.hostile.hostile_pictures import STARVING, Picture, hostile_picture, starving_picture
from support.hostile.jpeg_parts import scene
from support.hostile.png_parts import encoded as png_encoded
from support.keep_apart import keep_apart
from support.memory_group import MemoryGroup, NoMemoryGroupError, memory_group

PLAIN, RAW = '/plain/image_raw', '/hostile/image_raw'
COMPRESSED = ('/hostile_1/image_raw/compressed', '/hostile_2/image_raw/compressed')
RATE_HZ, CALLS_HZ = 20.0, 10.0
PLAIN_SHARE, STATE_MS = 0.95, 100.0
# What the slowest picture may cost before the next one follows; whichever comes first.
_NEXT_S = 0.25
_SWAP_S, _CONFIGURE_S = 30.0, 90.0
_RELIABLE = QoSProfile(depth=5, reliability=ReliabilityPolicy.RELIABLE)


@dataclass
class Verdict:
    """
    What came of it.

    :param exits: of the node, with what it was given last.
    :param problems: every other promise that was broken.
    :param rows: of the table, one for each hostile camera.
    """

    given: Counter[str] = field(default_factory=Counter)
    accounts: dict[str, Counter[str]] = field(default_factory=dict)
    exits: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    outcomes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    healthy: int = 0
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def broken(self) -> list[str]:
        """Name every broken promise."""
        return [*(f'the node ended: {text}' for text in self.exits), *self.problems]


class Rig:
    """
    A node in a memory cgroup, and a peer outside, which starts it anew where it has ended.

    :param directory: for bundles.
    """

    def __init__(self, group: MemoryGroup | None, domain_id: int, directory: Path, verdict: Verdict) -> None:
        self.group, self.domain_id, self.directory, self.verdict = group, domain_id, directory, verdict
        self.healthy = write_demo_bundle(directory / 'healthy')
        self._session = plain_session(next(self.healthy.glob('*.onnx')))
        self.given: list[str] = []
        self.arrived: dict[int, float] = {}
        self._answers: dict[int, TensorList] = {}
        self._number = 0
        self.process = self._start_node()
        self.peer = Peer(domain_id)
        self.peer.node.create_subscription(
            TensorList, f'{self.peer.node_name}/tensors', self._hear,
            QoSProfile(depth=200, reliability=ReliabilityPolicy.RELIABLE),
        )  # fmt: skip
        for topic in COMPRESSED:
            self.peer.publisher(topic, CompressedImage, _RELIABLE)
        self.peer.publisher(RAW, Image, _RELIABLE)
        self._activate()

    def _start_node(self) -> NodeProcess:
        topics = [PLAIN, RAW, *COMPRESSED]
        parameters: dict[str, Any] = {
            'model_path': str(self.healthy), 'image_topics': topics, 'cpu_threads': 1, 'load_timeout_s': 20.0,
            **{f'qos_overrides.{topic}.subscription.reliability': 'reliable' for topic in topics[1:]},
        }  # fmt: skip
        with self.group.entered() if self.group else contextlib.nullcontext():
            return NodeProcess(self.domain_id, parameters)

    def _activate(self) -> None:
        self.peer.start()
        self.peer.wait_matched(PLAIN)
        for topic in (RAW, *COMPRESSED):
            self.peer.wait_matched(topic, Image if topic == RAW else CompressedImage)
        wait_until(lambda: self.peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby', 60.0)

    def _hear(self, answer: TensorList) -> None:
        self.arrived[answer.header.stamp.sec] = time.monotonic()
        if answer.header.stamp.sec in self._answers:
            self._answers[answer.header.stamp.sec] = answer

    def close(self) -> None:
        """End the node in order."""
        if self.alive():
            self.process.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                if code := self.process.wait(30.0):
                    self.verdict.problems.append(f'the node ended with {code} when it was told to end')
        self.peer.close()
        with contextlib.redirect_stdout(None):
            self.process.close()

    def alive(self) -> bool:
        """Whether the node runs."""
        return self.process.process.poll() is None

    def kills(self) -> int:
        """Return how many processes of the group the kernel has killed."""
        return self.group.kills if self.group else 0

    def memory(self) -> str:
        """Say what the node alone holds, and how many processes of the group were killed."""
        with contextlib.suppress(OSError):
            lines = Path(f'/proc/{self.process.process.pid}/status').read_text().splitlines()
            resident, own = (
                next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f'{name}:'))
                for name in ('VmRSS', 'RssAnon')
            )
            return f'node {resident:.0f} MB resident, {own:.0f} of it its own, {self.kills()} processes killed'
        return 'node gone'

    def switches(self) -> int:
        """Return how often the node has switched engines."""
        return int(self.peer.values('Runtime').get('switches', 0))

    def forget(self) -> None:
        """Let go of what the peer keeps."""
        for kept in (self.peer.tensors, self.peer.records):
            kept.clear()
        del self.peer.diagnostics[:-5]

    def look(self) -> None:
        """Note a node that has ended, and start another."""
        if self.alive():
            return
        said = self.process.output()
        (self.directory.parent / f'ended_{len(self.verdict.exits)}.log').write_text(said[-100_000:])
        self.verdict.exits.append(f'code {self.process.process.returncode}, after {"; ".join(self.given[-3:])}')
        print(f'  the node has ended: {self.verdict.exits[-1]}', flush=True)
        self.restart()

    def restart(self) -> None:
        """Start the node anew, and end it before where it still runs."""
        with contextlib.redirect_stdout(None):
            self.process.close()
        time.sleep(1.0)
        self.process = self._start_node()
        self.peer.diagnostics.clear()
        self._activate()

    def number(self) -> int:
        """Return the next number for a stamp."""
        self._number += 1
        return self._number

    def ask_healthy(self, compressed: bool) -> None:
        """Compare the answer to a healthy image with plain ``session.run``."""
        pixels = scene(self._number, WIDTH, HEIGHT, 1)
        number = self.number()
        self._answers[number] = TensorList()
        message: Image | CompressedImage
        if compressed:
            message = CompressedImage(format='png')
            message.data.frombytes(png_encoded(pixels))
            message.header.stamp.sec = number
        else:
            message = image(number, width=WIDTH, height=HEIGHT, data=pixels.tobytes())
        topic = COMPRESSED[0] if compressed else PLAIN
        deadline = time.monotonic() + 30.0
        while number not in self.arrived and time.monotonic() < deadline:
            self.peer.publisher(topic, type(message)).publish(message)
            _wait(lambda: number in self.arrived, 2.0)
        answer, what = self._answers.pop(number), 'PNG' if compressed else 'image'
        if number not in self.arrived:
            self.verdict.problems.append(f'a healthy {what} was not answered within 30 s')
            return
        names = [output.name for output in self._session.get_outputs()]
        if not set(names) <= {one.name for one in answer.tensors}:
            self.verdict.problems.append(f'a healthy {what} was answered by the model {answer.model_name:.100}')
            return
        request = pixels.astype(np.float32)[None, None] * np.float32(1 / 255)
        values = self._session.run(None, {'image': request})
        found = {name: tensor(answer, name) for name in names}
        if wrong := wrong_outputs(found, dict(zip(names, values, strict=True))):
            self.verdict.problems.append(f'a healthy {what} was answered wrongly: {"; ".join(wrong)}')
        self.verdict.healthy += 1

    def publish(self, topic: str, message: Image | CompressedImage) -> int:
        """Publish a message with a number of its own as stamp, and return that."""
        message.header.stamp.sec = number = self.number()
        self.peer.publisher(topic, type(message)).publish(message)
        return number


def _wait(condition: Callable[[], Any], timeout_s: float) -> bool:
    """Wait for a condition, and return whether it has come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def compressed(picture: Picture) -> CompressedImage:
    """Return the message of a picture."""
    message = CompressedImage(format=picture.format)
    message.data.frombytes(picture.data)
    return message


# --- pictures and messages ----------------------------------------------------------------------------


def feed_pictures(rig: Rig, count: int, seed: int) -> None:
    """Give the node so many hostile pictures, one in eight a raw message, and account for each."""
    sent: Counter[str] = Counter()
    before, exits = _counters(rig), len(rig.verdict.exits)
    for number in range(count):
        if number % 8 == 7:
            kind, message = hostile_message(seed * 1_000_003 + number // 8)
            topic, kind = RAW, f'message, {kind}'
        else:
            picture = hostile_picture(seed * 1_000_003 + number)
            topic, message, kind = COMPRESSED[number % len(COMPRESSED)], compressed(picture), picture.kind
        rig.given.append(f'picture {seed * 1_000_003 + number} ({kind})')
        rig.verdict.given[kind] += 1
        stamp = rig.publish(topic, message)
        sent[topic] += 1
        _wait(lambda stamp=stamp: stamp in rig.arrived or not rig.alive(), _NEXT_S)
        if not rig.alive():
            rig.look()
            before, sent, exits = _counters(rig), Counter(), len(rig.verdict.exits)
        if number % 50 == 49:
            rig.forget()
            print(f'  {number + 1} pictures and messages; {rig.memory()}', flush=True)
        if number % 100 == 99:
            rig.ask_healthy(compressed=False)
    time.sleep(1.0)
    rig.look()
    if len(rig.verdict.exits) == exits:
        _settle(rig, before, sent)
    rig.ask_healthy(compressed=True)
    rig.ask_healthy(compressed=False)


def _counters(rig: Rig) -> dict[str, Counter[str]]:
    found = {}
    for topic in (PLAIN, RAW, *COMPRESSED):
        values = rig.peer.values(f'Stream {topic}')
        found[topic] = Counter({key: int(value) for key, value in values.items() if value.isdigit()})
    return found


def _unaccounted(now: Counter[str], before: Counter[str], sent: int) -> tuple[int, Counter[str]]:
    """
    Return how many of the messages sent have not become one of: answered, refused, dropped or lost by count.

    ``dropped_by_policy`` is the sum of the others.
    """
    grown = Counter({key: now[key] - before[key] for key in now if now[key] != before[key]})
    ends = Counter({
        key: count for key, count in grown.items()
        if key in ('answered', 'unanswered', 'lost_before_node')
        or key.startswith(('refused ', 'dropped_')) and key != 'dropped_by_policy'
    })  # fmt: skip
    return sent - ends.total(), ends


def _settle(rig: Rig, before: dict[str, Counter[str]], sent: Counter[str]) -> None:
    """Wait until every message has come to its end, and note which."""

    def missing() -> dict[str, int]:
        now = _counters(rig)
        return {topic: count for topic in sent if (count := _unaccounted(now[topic], before[topic], sent[topic])[0])}

    _wait(lambda: not missing(), 40.0)
    now = _counters(rig)
    for topic in sent:
        _, ends = _unaccounted(now[topic], before[topic], sent[topic])
        rig.verdict.accounts[f'{topic}, {sent[topic]} sent'] = ends
    rig.verdict.problems += [
        f'{count} of {sent[topic]} of {topic} are not accounted for' for topic, count in missing().items()
    ]


# --- bundles ------------------------------------------------------------------------------------------


def feed_bundles(rig: Rig, count: int, seed: int) -> None:
    """Set so many hostile bundles while the node is active, a quarter of them by configure, with a camera beside."""
    by_configure = count // 4
    for number in range(count - by_configure):
        with _bundle(rig, seed * 1_000_003 + number, 'set') as (path, kind):
            _swap(rig, path, kind)
        rig.look()
        if number % 10 == 9:
            rig.forget()
            print(f'  {number + 1} bundles set', flush=True)
    _wait(lambda: 'under way' not in rig.peer.message('Runtime'), _SWAP_S)
    # Where every swap has failed, it is what serves already.
    if rig.peer.get_parameter('model_path').string_value != str(rig.healthy):
        _swap(rig, str(rig.healthy), 'healthy')
    rig.ask_healthy(compressed=False)
    rig.ask_healthy(compressed=True)
    for number in range(count - by_configure, count):
        with _bundle(rig, seed * 1_000_003 + number, 'configured') as (path, kind):
            _configure(rig, path, kind)
        rig.look()
    print(f'  {by_configure} bundles configured', flush=True)
    if rig.peer.state() == 'active':
        rig.peer.change_state('deactivate')
    if rig.peer.state() == 'inactive':
        rig.peer.change_state('cleanup')
    rig.peer.set_parameter('model_path', str(rig.healthy))
    rig.peer.start()
    rig.peer.wait_matched(PLAIN)
    rig.ask_healthy(compressed=False)
    rig.ask_healthy(compressed=True)


@contextlib.contextmanager
def _bundle(rig: Rig, number: int, how: str) -> Iterator[tuple[str, str]]:
    kind, path = hostile_bundle(number, rig.directory, rig.healthy)
    rig.given.append(f'bundle {number} ({kind}) {how}')
    rig.verdict.given[f'bundle: {kind}'] += 1
    try:
        yield path, kind
    except AssertionError as error:
        if rig.alive():
            rig.verdict.problems.append(f'bundle {number} ({kind}) {how}: {error}')
            # What hangs would hang for the next one as well.
            rig.restart()
    finally:
        shutil.rmtree(rig.directory / f'bundle_{number}', ignore_errors=True)


def _swap(rig: Rig, path: str, kind: str) -> None:
    began = time.monotonic()
    result = rig.peer.set_parameter('model_path', path)
    took = time.monotonic() - began
    if took > 1.0:
        rig.verdict.problems.append(f'set_parameters took {took:.1f} s for {rig.given[-1]}')
    if not result.successful:
        rig.verdict.outcomes[kind]['refused at once'] += 1
        return

    def outcome() -> str:
        values = rig.peer.values('Runtime')
        phase = values.get('model_swap', '')
        # A path that is hostile itself is shown escaped or cut.
        mine = values.get('model_swap_path') == path or len(path) > 100 or not path.isprintable()
        return phase if mine and phase in ('swapped', 'failed', 'cancelled') else ''

    deadline = began + _SWAP_S
    while not outcome() and time.monotonic() < deadline and rig.alive():
        # A swap waits for frames to compare with.
        rig.publish(PLAIN, image(width=WIDTH, height=HEIGHT))
        asked = time.monotonic()
        rig.peer.state()
        if (took := time.monotonic() - asked) > 1.0:
            rig.verdict.problems.append(f'get_state took {took:.1f} s while {rig.given[-1]}')
        time.sleep(0.2)
    rig.verdict.outcomes[kind][outcome() or 'not ended in time'] += 1


def _configure(rig: Rig, path: str, kind: str) -> None:
    for state, transition in (('active', 'deactivate'), ('inactive', 'cleanup')):
        if rig.peer.state() == state:
            assert rig.peer.change_state(transition), f'{transition} failed'
    if not rig.peer.set_parameter('model_path', path).successful:
        rig.verdict.outcomes[kind]['refused at once'] += 1
        return
    done = rig.peer.change_state('configure', timeout_s=_CONFIGURE_S)
    rig.verdict.outcomes[kind][f'configure {"succeeded" if done else "failed"}'] += 1


# --- cameras ------------------------------------------------------------------------------------------


@dataclass
class Beside:
    """
    What the others had while a camera ran.

    :param sent: plain images, by stamp.
    :param calls_ms: of ``get_state``; one that was not answered in 10 s counts as so long.
    """

    sent: set[int] = field(default_factory=set)
    calls_ms: list[float] = field(default_factory=list)


def run_cameras(rig: Rig, kinds: Sequence[str], seconds: float) -> None:
    """Run each kind of hostile camera beside one of plain images, and none at first."""
    for kind in ('none', *kinds):
        rig.given.append(f'camera ({kind})')
        rig.forget()
        before, kills, switches = _counters(rig), rig.kills(), rig.switches()
        camera = None if kind == 'none' else HostileCamera(rig.domain_id, kind)
        beside = _measure(rig, seconds)
        level, message = rig.peer.level(f'Stream {COMPRESSED[0]}'), rig.peer.message(f'Stream {COMPRESSED[0]}')
        others = [name for name in ('Runtime', f'Stream {PLAIN}') if rig.peer.level(name) not in ('OK', '')]
        hostile_sent = camera.stop() if camera is not None else 0
        _wait(lambda sent=beside.sent: not rig.alive() or sent <= set(rig.arrived), 2.0)
        share = len(beside.sent & set(rig.arrived)) / max(1, len(beside.sent))
        p50, p95 = np.percentile(beside.calls_ms, (50, 95))
        ended = not rig.alive()
        rig.look()
        time.sleep(2.0)
        now = _counters(rig)
        answered = now[COMPRESSED[0]]['answered'] - (0 if ended else before[COMPRESSED[0]]['answered'])
        missed = {topic: _missed(now[topic], before[topic]) for topic in (PLAIN, COMPRESSED[0])} if not ended else {}
        named = level in ('WARN', 'ERROR')
        costs = kind != 'none' and answered < PLAIN_SHARE * hostile_sent
        rig.verdict.rows.append(
            (
                kind,
                f'{share:.1%}',
                f'{p50:.0f}',
                f'{p95:.0f}',
                f'{answered} of {hostile_sent}',
                level,
                f'{rig.kills() - kills}',
                f'{rig.switches() - switches}',
                f'plain: {missed.get(PLAIN)}; its own: {missed.get(COMPRESSED[0])}; {message:.100}',
            )
        )
        print('  ' + ' | '.join(rig.verdict.rows[-1]), flush=True)
        if share < PLAIN_SHARE:
            rig.verdict.problems.append(f'beside "{kind}", {share:.1%} of the plain images were answered')
        if p95 > STATE_MS:
            rig.verdict.problems.append(f'beside "{kind}", get_state took {p95:.0f} ms (p95)')
        if costs and not named:
            rig.verdict.problems.append(
                f'diagnostics do not name the camera of "{kind}"; not OK: {others or "nothing"}'
            )
    rig.ask_healthy(compressed=True)
    rig.ask_healthy(compressed=False)


def _missed(now: Counter[str], before: Counter[str]) -> str:
    """Say what became of images that were not answered, as the node tells."""
    grown = {key: now[key] - before[key] for key in now if key != 'dropped_by_policy' and now[key] > before[key]}
    missed = {
        key: count for key, count in grown.items() if key.startswith(('dropped_', 'lost', 'unanswered', 'refused'))
    }
    return ', '.join(f'{key} {count}' for key, count in missed.items()) or 'none missed'


def _measure(rig: Rig, seconds: float) -> Beside:
    beside, over = Beside(), threading.Event()
    message = image(width=WIDTH, height=HEIGHT)

    def publish() -> None:
        due = time.monotonic()
        while not over.wait(max(0.0, due - time.monotonic())):
            due = max(due, time.monotonic()) + 1 / RATE_HZ
            beside.sent.add(rig.publish(PLAIN, message))

    thread = threading.Thread(target=publish, daemon=True)
    thread.start()
    client = rig.peer._client(GetState, 'get_state')
    ends = time.monotonic() + seconds
    while (began := time.monotonic()) < ends and rig.alive():
        answered = rig.peer._wait_answer(client.call_async(GetState.Request()), 10.0) is not None
        beside.calls_ms.append(1e3 * (time.monotonic() - began) if answered else 10_000.0)
        time.sleep(max(0.0, began + 1 / CALLS_HZ - time.monotonic()))
    over.set()
    thread.join()
    return beside


class HostileCamera:
    """Publish one kind of picture from a process of its own, outside of the group."""

    def __init__(self, domain_id: int, kind: str) -> None:
        environ = {**os.environ, 'ROS_DOMAIN_ID': str(domain_id)}
        environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), environ.get('PYTHONPATH', '')])
        apply_profile(environ)
        self._process = subprocess.Popen(
            [sys.executable, __file__, '--camera', kind], env=environ, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == 'ready', f'the camera of "{kind}" did not start'

    def stop(self) -> int:
        """Return how many pictures were sent."""
        said, _ = self._process.communicate(timeout=30.0)
        return int(said)


def run_camera(kind: str) -> None:
    """Publish a picture at RATE_HZ until standard input ends, and print how often."""
    content = bytearray(serialize_message(compressed(starving_picture(kind))))
    rclpy.init()
    node = rclpy.create_node('hostile_camera', start_parameter_services=False, enable_rosout=False)
    publisher = node.create_publisher(CompressedImage, COMPRESSED[0], _RELIABLE)
    deadline = time.monotonic() + 30.0
    while not publisher.get_subscription_count() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    print('ready', flush=True)
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    sent, due = 0, time.monotonic()
    while not over.wait(max(0.0, due - time.monotonic())):
        due = max(due, time.monotonic()) + 1 / RATE_HZ
        # The stamp follows the 4 bytes of the encapsulation.
        content[4:12] = int(time.time()).to_bytes(4, 'little') + bytes(4)
        publisher.publish(bytes(content))
        sent += 1
    print(sent, flush=True)
    node.destroy_node()
    rclpy.try_shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pictures', type=int, default=900, help='hostile pictures and raw messages')
    parser.add_argument('--bundles', type=int, default=100, help='hostile bundles, a quarter of them by configure')
    parser.add_argument('--seconds', type=float, default=8.0, help='of each hostile camera; 0 for none')
    parser.add_argument('--only', default='', help='hostile cameras whose name holds this')
    parser.add_argument('--memory-mb', type=float, default=900.0, help='of the cgroup; 0 for none')
    parser.add_argument('--seed', type=int, default=random.SystemRandom().randrange(1, 10**6))
    parser.add_argument('--camera', choices=sorted(STARVING), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.camera is not None:
        run_camera(options.camera)
        return 0
    keep_apart()
    verdict = Verdict()
    print(f'seed {options.seed}', flush=True)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='c7-hostile-')))
        (scratch / 'bundles').mkdir()
        try:
            group = stack.enter_context(memory_group(int(options.memory_mb * 1e6))) if options.memory_mb else None
        except NoMemoryGroupError as error:
            print(f'NOT MEASURED  {error}\nWithout a limit of memory: --memory-mb 0', file=sys.stderr)
            return 2
        domain_id = stack.enter_context(free_domain_id())
        rig = Rig(group, domain_id, scratch / 'bundles', verdict)
        stack.callback(rig.close)
        feed_pictures(rig, options.pictures, options.seed)
        feed_bundles(rig, options.bundles, options.seed)
        kinds = [kind for kind in STARVING if options.only in kind] if options.seconds else []
        if kinds:
            run_cameras(rig, kinds, options.seconds)
        if group is not None:
            print(f'memory: {group.peak_bytes / 1e6:.0f} MB at most, {group.kills} processes killed by the kernel')
        for log in sorted(scratch.glob('ended_*.log')):
            print(f'--- {log.name}\n{log.read_text()[-2000:]}')
    _tell(verdict)
    return 1 if verdict.broken() else 0


def _tell(verdict: Verdict) -> None:
    print(f'given: {json.dumps(verdict.given)}')
    for topic, ends in verdict.accounts.items():
        print(f'{topic}: {dict(ends)}')
    for kind, outcomes in sorted(verdict.outcomes.items()):
        print(f'bundle, {kind}: {", ".join(f"{outcome} {count}" for outcome, count in outcomes.items())}')
    print(f'healthy images answered as plain session.run answers: {verdict.healthy}; node exits: {len(verdict.exits)}')
    head = ('hostile camera at 20 Hz', 'plain', 'p50', 'p95 ms', 'its own', 'level', 'kills', 'switches', '')
    for row in (head, *verdict.rows) if verdict.rows else ():
        print(f'{row[0]:40} {row[1]:>6} {row[2]:>5} {row[3]:>6} {row[4]:>11}', *(f'{text:6}' for text in row[5:]))
    for problem in verdict.broken():
        print(f'BROKEN  {problem}')


if __name__ == '__main__':
    sys.exit(main())
