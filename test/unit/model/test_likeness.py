"""How answers without a rule are compared: what a GPU's rounding does passes, what is another answer does not."""

from __future__ import annotations

import numpy as np
import pytest

from gps_denied_c7.model.bundle import ModelBundle
from gps_denied_c7.model.compare import Alike, AllClose, MatchedDistance, SetOverlap, compare_output
from gps_denied_c7.model.likeness import unlike
from gps_denied_c7.tensors import TensorSpec

SEEDS = range(20)
BARE = ModelBundle(name='net', root='/', weights_digest=f'sha256:{"0" * 64}')


def feature_map(random: np.random.RandomState, channels: int = 32) -> np.ndarray:
    """Smooth, as a network's maps are: noise of 6 x 8 cells, each drawn over 4 x 4 pixels."""
    return random.normal(size=(1, channels, 6, 8)).repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)


def heatmap(random: np.random.RandomState) -> np.ndarray:
    """Nothing but for some peaks."""
    values = np.zeros((1, 1, 60, 80), np.float32)
    values.reshape(-1)[random.choice(values.size, 120, replace=False)] = random.uniform(0.3, 1.0, 120)
    return values


def embedding(random: np.random.RandomState) -> np.ndarray:
    values = random.normal(size=(1, 512))
    return (values / np.linalg.norm(values)).astype(np.float32)


def keypoints(random: np.random.RandomState) -> np.ndarray:
    return random.uniform(0, (640, 480), (150, 2)).astype(np.float32)


def boxes(random: np.random.RandomState) -> np.ndarray:
    """As (x, y, x, y, score) in pixels and in 0..1."""
    return np.concatenate([random.uniform(0, 640, (1, 100, 4)), random.uniform(0, 1, (1, 100, 1))], 2).astype('f')


def raw_detections(random: np.random.RandomState) -> np.ndarray:
    """As 4 coordinates in pixels and 20 scores in 0..1 for each place."""
    return np.concatenate([random.uniform(0, 640, (1, 4, 300)), random.beta(0.3, 1, (1, 20, 300))], 1).astype('f')


def label_map(random: np.random.RandomState) -> np.ndarray:
    return random.randint(0, 20, (1, 1, 12, 16)).repeat(4, axis=2).repeat(4, axis=3)


def mask(random: np.random.RandomState) -> np.ndarray:
    return random.uniform(size=(1, 60, 80)) > 0.95


KINDS = [feature_map, heatmap, embedding, keypoints, boxes, raw_detections, label_map, mask]
FLOATS = [kind for kind in KINDS if kind not in (label_map, mask)]


def alike(found: np.ndarray, expected: np.ndarray, **options: object) -> bool:
    return unlike(found, expected, **options) is None


@pytest.mark.parametrize('kind', KINDS)
def test_an_answer_is_like_itself_and_unlike_zeros_and_the_answer_to_another_frame(kind) -> None:
    for seed in SEEDS:
        random = np.random.RandomState(seed)
        expected, other = kind(random), kind(random)
        assert alike(expected.copy(), expected)
        assert not alike(np.zeros_like(expected), expected)
        assert not alike(other, expected)


@pytest.mark.parametrize('kind', FLOATS)
def test_the_rounding_of_half_precision_passes_and_a_wrong_factor_does_not(kind) -> None:
    for seed in SEEDS:
        random = np.random.RandomState(seed)
        expected = kind(random)
        rounded = expected.astype(np.float16).astype(np.float32)
        assert alike(rounded, expected)
        assert alike(rounded * (1 + random.normal(0, 2e-3, expected.shape)).astype('f'), expected)
        assert not alike(expected * np.float32(1.3), expected)
        assert not alike(-expected, expected)


@pytest.mark.parametrize(
    ('kind', 'axis'), [(feature_map, 1), (raw_detections, 1), (keypoints, 1), (boxes, 2), (embedding, 1)]
)
def test_channels_in_another_order_are_refused(kind, axis: int) -> None:
    for seed in SEEDS:
        expected = kind(np.random.RandomState(seed))
        assert not alike(np.flip(expected, axis), expected)
        assert not alike(np.roll(expected, 1, axis), expected)


def test_one_channel_that_is_wrong_among_many_is_refused() -> None:
    for seed in SEEDS:
        random = np.random.RandomState(seed)
        expected = feature_map(random, 64)
        for wrong in (0.0, -1.0):
            found = expected.copy()
            found[:, random.randint(64)] *= wrong
            assert not alike(found, expected)
        found = expected.copy()
        found[:, [3, 40]] = expected[:, [40, 3]]
        assert not alike(found, expected)


def test_scores_in_0_to_1_are_judged_beside_coordinates_in_pixels() -> None:
    for seed in SEEDS:
        expected = boxes(np.random.RandomState(seed))
        found = expected.copy()
        found[..., 4] = 0.0
        assert not alike(found, expected)
        raw = raw_detections(np.random.RandomState(seed))
        found = raw.copy()
        found[:, 4:] = 0.0
        assert not alike(found, raw)


def test_a_list_in_another_order_and_of_another_length_is_alike() -> None:
    for seed in SEEDS:
        random = np.random.RandomState(seed)
        for expected, axis in ((keypoints(random), 0), (boxes(random), 1)):
            order = random.permutation(expected.shape[axis])
            assert alike(expected.take(order, axis), expected)
            assert alike(expected.take(order[:-7], axis), expected)
            assert not alike(expected.take(order[: len(order) // 2], axis), expected)
        descriptors = random.normal(size=(40, 64)).astype('f')
        order = random.permutation(40)
        assert alike(descriptors[order], descriptors, free_axis=0)
        assert not alike(descriptors[:, ::-1], descriptors, free_axis=0)
        assert not alike(descriptors[order], descriptors)


@pytest.mark.parametrize('dtype', [np.float32, np.int64])
def test_no_rows_are_like_no_rows_alone(dtype: type) -> None:
    none, some = np.zeros((0, 2), dtype), np.array([[3, 4], [30, 9], [7, 200]], dtype)
    assert alike(none, none.copy())
    assert not alike(none, some)
    assert not alike(some, none)


@pytest.mark.parametrize(('found', 'expected', 'like'), [
    (np.array(150), np.array(150), True), (np.array(148), np.array(150), True), (np.array(0), np.array(150), False),
    (np.array(1), np.array(2), False), (np.array(True), np.array(False), False),
    (np.array([3, 1, 2]), np.array([1, 2, 3]), True), (np.array([3, 1, 9]), np.array([1, 2, 3]), False),
    (np.float32(0.5), np.float32(0.501), True), (np.float32(0.0), np.float32(0.501), False),
    (np.zeros((2, 3)), np.zeros((3, 2)), False), (np.zeros(3), np.zeros((1, 3)), False),
    (np.zeros(3, np.int64), np.zeros(3, np.float32), False),
])  # fmt: skip
def test_counts_and_lists_of_numbers(found, expected, like: bool) -> None:
    assert alike(np.asarray(found), np.asarray(expected)) is like


def test_a_mask_of_minus_10000_does_not_hide_zeros_elsewhere() -> None:
    for low in (-1e4, -np.inf):
        for seed in SEEDS:
            random = np.random.RandomState(seed)
            expected = random.normal(size=(1, 8, 20, 20)).astype('f')
            masked = random.uniform(size=expected.shape) < 0.5
            expected[masked] = low
            found = expected.copy()
            found[~masked] *= np.float32(1.001)
            assert alike(found, expected)
            found[~masked] = 0.0
            assert not alike(found, expected)


@pytest.mark.parametrize('rule', [
    AllClose('out', 0.1, 0.1), MatchedDistance('out', 1.0, 0.9), SetOverlap('out', 1.0, 'values'), Alike('out'),
])  # fmt: skip
def test_nan_agrees_with_nan_only_where_it_is_meant(rule) -> None:
    values = np.array([[1.0, 2.0], [np.nan, np.nan], [30.0, 4.0]])
    assert compare_output(rule, values.copy(), values) is not None
    assert compare_output(rule, values.copy(), values, allow_non_finite=True) is None
    assert compare_output(rule, np.nan_to_num(values), values, allow_non_finite=True) is not None
    assert compare_output(rule, values, np.nan_to_num(values), allow_non_finite=True) is not None


@pytest.mark.parametrize('rule', [AllClose('out', 0.1, 0.1), Alike('out')])
def test_the_same_infinity_at_the_same_place_agrees_and_nothing_else_does(rule) -> None:
    values = np.array([1.0, -np.inf, 3.0, np.inf])
    assert compare_output(rule, values.copy(), values) is None
    for wrong in (np.inf, 0.0, -1e30, np.nan):
        found = values.copy()
        found[1] = wrong
        assert compare_output(rule, found, values) is not None
        assert compare_output(rule, values, found) is not None


def test_outputs_without_a_rule_are_compared_where_both_sides_have_them() -> None:
    random = np.random.RandomState(0)
    expected = {'map': feature_map(random), 'points': keypoints(random)}
    assert BARE.compare(expected, expected) == []
    assert BARE.compare({'map': expected['map']}, expected) == []
    (problem,) = BARE.compare({**expected, 'map': np.zeros_like(expected['map'])}, expected)
    assert problem.startswith("output 'map':")
    assert BARE.compare({}, expected) != []
    ruled = ModelBundle(
        name='net', root='/', weights_digest=BARE.weights_digest, rules=(AllClose('map', 0.0, 1e9),),
        outputs=(TensorSpec('map', 'float32', (1, 32, 24, 32)), TensorSpec('points', 'float32', (None, 2))),
    )  # fmt: skip
    assert ruled.compare({**expected, 'map': np.zeros_like(expected['map'])}, expected) == []
    assert ruled.compare({**expected, 'points': expected['points'][::-1]}, expected) == []
    assert len(ruled.compare({'points': expected['points'] * 0}, expected)) == 2


def test_random_arrays_of_any_shape_and_type_never_raise() -> None:
    random = np.random.RandomState(0)
    kinds = ('float16', 'float32', 'float64', 'int8', 'uint8', 'int64', 'bool')
    for _ in range(1500):
        sides = []
        for _ in range(2):
            array = random.normal(scale=10.0 ** random.randint(-8, 9), size=random.randint(0, 4, random.randint(0, 5)))
            with np.errstate(all='ignore'):
                array = np.asarray(array).astype(random.choice(kinds))
            if array.dtype.kind == 'f' and array.size and random.rand() < 0.3:
                array = np.where(random.rand(*array.shape) < 0.5, random.choice([np.nan, np.inf, -np.inf]), array)
            sides.append(array)
        unlike(*sides, allow_non_finite=bool(random.randint(2)))
        assert alike(sides[0], sides[0].copy(), allow_non_finite=True)


@pytest.mark.parametrize('lead', [(), (1,)])
@pytest.mark.parametrize('kind', ['float32', 'uint8', 'bool'])
def test_a_tall_map_without_channels_is_no_list_of_its_rows(lead: tuple[int, ...], kind: str) -> None:
    """As depth and masks often are: moved by a few rows or upside down, most rows are there, in another place."""
    for seed in range(5):
        cells = np.random.RandomState(seed).uniform(size=(30, 20)).repeat(8, axis=0).repeat(8, axis=1)
        expected = (cells if kind == 'float32' else cells > 0.5).astype(kind).reshape(*lead, 240, 160)
        assert alike(expected.copy(), expected)
        assert not alike(np.roll(expected, 3, axis=-2), expected) and not alike(np.flip(expected, -2), expected)


@pytest.mark.parametrize('padding', [0, 300, 480])
def test_rows_of_many_columns_in_any_order_are_a_list_still(padding: int) -> None:
    """Descriptors, and boxes with a score for each class; those of a fixed length end in zeros."""
    random = np.random.RandomState(0)
    boxes = np.concatenate([random.uniform(0, 640, (500, 4)), random.beta(0.3, 1, (500, 80))], 1)
    for expected in (random.normal(size=(500, 128)).astype(np.float32), boxes.astype(np.float32)):
        expected[500 - padding :] = 0
        order = np.concatenate([random.permutation(500 - padding), np.arange(500 - padding, 500)])
        assert alike(expected[order], expected)
