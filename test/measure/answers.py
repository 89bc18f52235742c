"""
Compare every answer of a node with plain ``session.run``, bit for bit, under kills, stops and swaps of its model.

Run it in the environment that runs the tests (``make soak``):

    python test/measure/answers.py [--answers 20000] [--rate 100] [--pause 0.5 3]

The images are numbered by their stamps and made from these numbers, so that what each must become is known. The two
models that take turns have an output of data-dependent length before fixed ones. Exits with 1 where a value of a
published tensor is wrong, or a promise is broken that ``make chaos`` checks.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gps_denied_c7_msgs.msg import TensorList
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image

from gps_denied_c7.worker.child import SPARE_NAME
from measure.chaos import CAMERA, Account, Camera, end, settle, workers
from support.differential import plain_session, wrong_outputs
from support.harness import NodeProcess, Peer, image, running_node, tensor, wait_until

WIDTH, HEIGHT, CHANNELS = 64, 48, 4
MODELS = ('sparse_first', 'sparse_between')
SHARES = (0.0, 0.002, 0.05, 0.3, 1.0)


@dataclass
class Verdict:
    """
    What the answers were worth.

    :param compared: answers by model.
    :param wrong: wrong answers by model; ``examples`` says what was wrong with the first few.
    :param blows: by what was done to one worker, or to all that have an engine.
    :param swaps: swaps that were asked for and accepted.
    """

    compared: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    blows: Counter[str] = field(default_factory=Counter)
    swaps: int = 0

    def problems(self) -> list[str]:
        """Name every wrong answer, by model."""
        counts = self.wrong.items()
        wrong = [f'{count} of {self.compared[model]} answers of {model} are wrong' for model, count in counts]
        return wrong + self.examples


def pixels(number: int) -> NDArray[np.uint8]:
    """Return the image of a number: of some much is found, of others little or nothing."""
    chance = np.random.default_rng(number)
    found = chance.random((HEIGHT, WIDTH)) < SHARES[int(chance.integers(len(SHARES)))]
    bright, dark = chance.integers(150, 256, found.shape, np.uint8), chance.integers(0, 100, found.shape, np.uint8)
    return np.where(found, bright, dark)


def picture(number: int) -> Image:
    """Return that image as a message, stamped with its number."""
    return image(number, width=WIDTH, height=HEIGHT, data=pixels(number).tobytes())


def write_models(directory: Path) -> dict[str, Path]:
    """Write two models of the same outputs and other values, of which each lists its free outputs elsewhere."""
    paths = {}
    for seed, name in enumerate(MODELS):
        weights = np.random.default_rng(seed).integers(-3, 4, (CHANNELS, 1, 3, 3)).astype(np.float32)
        constants = {
            'full scale': np.float32(255), 'weights': weights, 'limit': np.float32(125), 'one row': np.array([-1]),
        }  # fmt: skip
        nodes = [
            helper.make_node('Mul', ['image', 'full scale'], ['scaled']),
            helper.make_node('Round', ['scaled'], ['grey']),
            helper.make_node('Conv', ['grey', 'weights'], ['scores'], pads=[1, 1, 1, 1]),
            helper.make_node('Greater', ['grey', 'limit'], ['found']),
            helper.make_node('NonZero', ['found'], ['places']),
            helper.make_node('Transpose', ['places'], ['keypoints'], perm=[1, 0]),
            helper.make_node('Reshape', ['grey', 'one row'], ['flat']),
            helper.make_node('Reshape', ['found', 'one row'], ['flat found']),
            helper.make_node('Compress', ['flat', 'flat found'], ['values'], axis=0),
            helper.make_node('ReduceSum', ['grey'], ['total'], keepdims=0),
        ]
        outputs = {
            'keypoints': (TensorProto.INT64, ['n', 4]),
            'scores': (TensorProto.FLOAT, [1, CHANNELS, HEIGHT, WIDTH]),
            'values': (TensorProto.FLOAT, ['n']),
            'total': (TensorProto.FLOAT, []),
        }
        order = list(outputs) if seed == 0 else ['scores', 'values', 'total', 'keypoints']
        graph = helper.make_graph(
            nodes, name,
            [helper.make_tensor_value_info('image', TensorProto.FLOAT, [1, 1, HEIGHT, WIDTH])],
            [helper.make_tensor_value_info(output, *outputs[output]) for output in order],
            [numpy_helper.from_array(np.asarray(array), key) for key, array in constants.items()],
        )  # fmt: skip
        paths[name] = directory / f'{name}.onnx'
        # The oldest ONNX Runtime in use reads this.
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
        paths[name].write_bytes(model.SerializeToString())
    return paths


class Judge:
    """Compare answers as they arrive."""

    def __init__(self, paths: dict[str, Path], account: Account, verdict: Verdict) -> None:
        self._sessions: dict[str, onnxruntime.InferenceSession] = {
            name: plain_session(path) for name, path in paths.items()
        }
        self._account, self._verdict = account, verdict

    def hear(self, answer: TensorList) -> None:
        """Judge one answer."""
        number, model, arrived = answer.header.stamp.sec, answer.model_name, time.monotonic()
        session = self._sessions[model]
        request = pixels(number).astype(np.float32)[None, None] / np.float32(255)
        names = [output.name for output in session.get_outputs()]
        expected = dict(zip(names, session.run(None, {'image': request}), strict=True))
        problems = wrong_outputs({name: tensor(answer, name) for name in names}, expected)
        self._account.answered.append((number, arrived, answer.frame_seq))
        self._verdict.compared[model] += 1
        if problems:
            self._verdict.wrong[model] += 1
            if len(self._verdict.examples) < 5:
                self._verdict.examples.append(f'frame {number} of {model}: {"; ".join(problems)}')


def strike(process: NodeProcess, chance: random.Random) -> str:
    """Kill or stop a worker, or stop all that have an engine; return what was done."""
    engines, spare = workers(process), workers(process, SPARE_NAME)
    what = chance.choice(['SIGKILL', 'SIGKILL', 'SIGKILL', 'SIGSTOP', 'SIGSTOP', 'SIGSTOP of all'])
    targets = engines if what == 'SIGSTOP of all' else [chance.choice(engines + spare)] if engines + spare else []
    for pid in targets:
        try:
            os.kill(pid, getattr(signal, what.split()[0]))
        except ProcessLookupError:
            continue
    return what


def run(
    directory: Path, *, answers: int, rate_hz: float, pause_s: tuple[float, float], seed: int = 1,
    answered_between: bool = False,
) -> tuple[Account, Verdict]:  # fmt: skip
    """
    Have a node give at least so many answers, some by each model, while its workers are killed and stopped and its
    model is swapped.

    :param directory: for the models.
    :param pause_s: shortest and longest pause between two blows, seconds; every fourth is a swap.
    :param answered_between: as of :func:`measure.chaos.run`.
    """
    chance = random.Random(seed)
    account, verdict = Account(), Verdict()
    paths = write_models(directory)
    judge = Judge(paths, account, verdict)
    with running_node({'model_path': str(paths[MODELS[0]]), 'cpu_threads': 1}) as (process, peer):
        peer.start()
        peer.wait_matched(CAMERA)
        wait_until(lambda: peer.values('Runtime').get('standby') not in (None, 'none'), 'a standby')
        peer.node.create_subscription(
            TensorList, f'{peer.node_name}/tensors', judge.hear,
            QoSProfile(depth=500, reliability=ReliabilityPolicy.RELIABLE),
        )  # fmt: skip
        first = 0
        while not account.answered:
            # The listener has matched once it hears an answer.
            first += 1
            peer.publisher(CAMERA).publish(picture(first))
            time.sleep(0.2)
        camera = Camera(peer.publisher(CAMERA), account, rate_hz, first, picture)
        try:
            _strike_until(answers, process, peer, account, verdict, paths, chance, pause_s, answered_between)
            time.sleep(2.0)
            account.left_active |= peer.state() != 'active'
        finally:
            camera.stop()
        settle(peer, account)
        account.switches = peer.payloads('c7.runtime_switched')
        end(process, account)
    return account, verdict


def _strike_until(
    answers: int, process: NodeProcess, peer: Peer, account: Account, verdict: Verdict, paths: dict[str, Path],
    chance: random.Random, pause_s: tuple[float, float], answered_between: bool,
) -> None:  # fmt: skip
    models = [str(path) for path in paths.values()]
    turn, heard, struck = 0, time.monotonic(), -math.inf
    # A busy machine may need long for a swap; each model is to answer some.
    while len(account.answered) < answers or (
        len(verdict.compared) < len(models) and len(account.answered) < 20 * answers
    ):
        before = len(account.answered)
        time.sleep(chance.uniform(*pause_s))
        heard = time.monotonic() if len(account.answered) > before else heard
        assert process.process.poll() is None and time.monotonic() - heard < 60.0, 'the node answers no more'
        # This peer keeps every message that it hears.
        peer.tensors.clear()
        if answered_between and not account.answered_since(struck):
            continue
        turn += 1
        if turn % 4 == 0:
            verdict.swaps += peer.set_parameter('model_path', models[(turn // 4) % 2]).successful
            continue
        account.workers.update(workers(process), workers(process, SPARE_NAME))
        struck = time.monotonic()
        verdict.blows[strike(process, chance)] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--answers', type=int, default=20_000, help='how many are compared')
    parser.add_argument('--rate', type=float, default=100.0, help='images a second')
    parser.add_argument(
        '--pause', type=float, nargs=2, default=(0.5, 3.0), metavar=('MIN', 'MAX'), help='between two blows, seconds'
    )
    parser.add_argument('--seed', type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        account, verdict = run(
            Path(directory), answers=options.answers, rate_hz=options.rate, pause_s=tuple(options.pause),
            seed=options.seed,
        )  # fmt: skip
    print(f'answers compared: {dict(verdict.compared)}, wrong: {dict(verdict.wrong)}')
    print(f'blows: {dict(verdict.blows)}; swaps: {verdict.swaps}; switches recorded: {len(account.switches)}')
    print(f'frames: {len(account.sent)} sent, {account.counters}')
    problems = [*verdict.problems(), *account.problems()]
    for problem in problems:
        print(f'BROKEN  {problem}')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
