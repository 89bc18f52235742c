"""
The answer is the network's answer: random networks through every host, against plain ``session.run``.

C7_SOAK_NETWORKS and C7_SOAK_FRAMES say how many (``make soak``); C7_INPUTS_DIR names a folder of further models.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from gps_denied_c7.errors import C7Error
from support.differential import NUMPY_TYPES, Tally, compare_host, loaded_host, plain_session, wrong_outputs
from support.random_networks import frames, random_network

NETWORKS = int(os.environ.get('C7_SOAK_NETWORKS', '40'))
FRAMES = int(os.environ.get('C7_SOAK_FRAMES', '30'))
FIRST_SEED = int(os.environ.get('C7_SOAK_SEED', '0'))
MODELS = os.environ.get('C7_INPUTS_DIR', '')


def answers_of(path, requests):
    """Return each request with plain ``session.run``'s answer, which level 0 must confirm."""
    session, unoptimised = plain_session(path), plain_session(path, optimised=False)
    names = [output.name for output in session.get_outputs()]
    right = []
    for request in requests:
        answer = dict(zip(names, session.run(None, request), strict=True))
        level_0 = dict(zip(names, unoptimised.run(None, request), strict=True))
        assert wrong_outputs(answer, level_0, close=True) == [], 'ONNX Runtime itself disagrees'
        right.append((request, answer))
    return right


def compare(path, label, right, tally, isolation):
    tally.networks += 1
    try:
        with loaded_host(path, isolation) as host:
            compare_host(host, right, tally, label)
    except C7Error as error:
        tally.blame(tally.refused, label, len(right), f'is not loaded: {error}')


def assert_none_wrong(tally, isolation):
    print(f'isolation {isolation}: {tally}')
    counts = [f'{count:5} {label}' for label, count in (tally.wrong + tally.refused).most_common()]
    assert not counts, '\n'.join([str(tally), *counts[:20], 'for example:', *tally.examples[:10]])


@pytest.mark.parametrize('isolation', ['process', 'none'])
def test_random_networks_are_answered_as_session_run_answers_them(isolation, tmp_path):
    tally = Tally()
    path = tmp_path / 'network.onnx'
    for seed in range(FIRST_SEED, FIRST_SEED + NETWORKS):
        network = random_network(seed)
        path.write_bytes(network.model)
        label = f'seed {seed} ({network.dtype} {network.shape}: {", ".join(network.kinds)})'
        compare(path, label, answers_of(path, frames(network, seed, FRAMES)), tally, isolation)
    assert_none_wrong(tally, isolation)
    assert tally.answers == NETWORKS * FRAMES


def test_exact_networks_are_exact_in_half_precision_and_in_any_order(tmp_path):
    """What the GPU suite relies on: every value is an integer below 2048, at any level of optimisation."""
    path = tmp_path / 'network.onnx'
    for seed in range(FIRST_SEED, FIRST_SEED + NETWORKS):
        network = random_network(seed, exact=True)
        path.write_bytes(network.model)
        session = plain_session(path, optimised=False)
        for request in frames(network, seed, 10):
            for array in session.run(None, request):
                if array.dtype.kind == 'f':
                    assert np.array_equal(array, np.round(array)) and np.abs(array).max(initial=0) < 2048


def test_the_networks_are_of_every_kind():
    kinds = {kind for seed in range(60) for kind in random_network(seed).kinds}
    assert kinds == {
        'dense', 'scalar', 'tiny', 'free', 'declared_as_the_example', 'declared_empty', 'of_unknown_rank', 'undeclared',
        'empty', 'twice', 'the_input', 'a_constant', 'read_by_another',
    }  # fmt: skip


@pytest.mark.skipif(not MODELS, reason='C7_INPUTS_DIR names no folder of models')
@pytest.mark.parametrize('isolation', ['process', 'none'])
def test_further_models_are_answered_as_session_run_answers_them(isolation):
    """All in a folder whose inputs are of known types and whose outputs are numbers and finite."""
    tally, left_out = Tally(), []
    for path in sorted(Path(MODELS).glob('*.onnx')):
        session = plain_session(path)
        chance = np.random.default_rng(0)

        def request(session=session, chance=chance):
            share = chance.choice([0.0, 0.01, 0.1, 0.5, 1.0])
            feed = {}
            for tensor in session.get_inputs():
                shape = [axis if isinstance(axis, int) else 1 for axis in tensor.shape]
                values = chance.random(shape) * (chance.random(shape) < share)
                whole = np.issubdtype(NUMPY_TYPES[tensor.type], np.integer)
                feed[tensor.name] = (values * (200 if whole else 1)).astype(NUMPY_TYPES[tensor.type])
            return feed

        right = answers_of(path, [request() for _ in range(FRAMES)])
        usable = all(
            array.dtype.kind in 'fiub' and (array.dtype.kind != 'f' or np.isfinite(array).all())
            for _, answer in right
            for array in answer.values()
        )
        if usable:
            compare(path, path.name, right, tally, isolation)
        else:
            left_out.append(path.name)
    print(f'left out, since not all of their outputs are finite numbers: {left_out}')
    assert tally.networks
    assert_none_wrong(tally, isolation)


def test_a_wrong_bit_a_wrong_shape_and_a_wrong_type_are_each_seen():
    """The comparison itself can fail."""
    right = {'a': np.array([1.0, np.nan, 2.0], np.float32)}
    assert wrong_outputs({'a': right['a'].copy()}, right) == []
    for wrong in (
        np.array([1.0, np.nan, np.nextafter(np.float32(2), np.float32(3))], np.float32),
        np.array([[1.0, np.nan, 2.0]], np.float32),
        np.array([1.0, np.nan, 2.0], np.float64),
    ):
        assert wrong_outputs({'a': wrong}, right)
    assert wrong_outputs({}, right)
