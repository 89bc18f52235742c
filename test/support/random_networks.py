"""Random small networks whose outputs have every kind of shape and place, and frames that change their lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

__all__ = ['RandomNetwork', 'frames', 'random_network']

Arrays = dict[str, NDArray]

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
_TYPES = {
    'float32': FLOAT, 'float16': TensorProto.FLOAT16, 'float64': TensorProto.DOUBLE, 'bool': BOOL,
    'int8': TensorProto.INT8, 'uint8': TensorProto.UINT8, 'int32': TensorProto.INT32, 'int64': INT64,
}  # fmt: skip
# Values of the image that are found: integers above it in an exact network, 0.6 to 1 of full scale otherwise.
_LEVELS = 15
_FULL_SCALE = {'uint8': 255, 'int32': 1000}
# Elements of the image that are sorted or suppressed, each with a rank of its own: ties have no one right order.
_CANDIDATES = 64


@dataclass(frozen=True)
class RandomNetwork:
    """
    Hold one network.

    :param model: ``.onnx`` bytes, opset 17, IR version 8.
    :param shape: of ``image``, its only input.
    :param kinds: what its outputs are, in their order.
    :param exact: whether every value is an integer that FP16 and TF32 hold, far from every threshold.
    """

    model: bytes
    shape: tuple[int, ...]
    dtype: str
    kinds: tuple[str, ...]
    exact: bool


class _Builder:
    """Grow a graph output by output."""

    def __init__(self, chance: np.random.Generator, *, exact: bool, dense: bool) -> None:
        self.chance, self.exact, self.only_dense = chance, exact, dense
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self.outputs: list[ValueInfoProto] = []
        self._count = 0
        large = chance.random() < 0.3
        self.channels = int(chance.choice([1, 3]))
        self.height, self.width = (int(size) for size in chance.integers(9, 160 if large else 40, 2))
        self.shape = (1, self.channels, self.height, self.width)
        self.dtype = str(chance.choice(['float32', 'float32', 'uint8', 'float16', 'float64', 'int32']))
        if dense:
            self.dtype = 'float32'
        self.size = self.channels * self.height * self.width
        self.image = self.add('Cast', ['image'], to=FLOAT)
        if self.dtype in _FULL_SCALE and not exact:
            self.image = self.add('Mul', [self.image, self.constant(np.float32(1 / _FULL_SCALE[self.dtype]))])
        self.flat = self.add('Reshape', [self.image, self.constant(np.array([-1]))])
        self.threshold = self.constant(np.float32(0.5))
        self.found = self.add('Greater', [self.flat, self.threshold])
        kernels = int(chance.integers(1, 9))
        weights = chance.integers(-1, 2, (kernels, self.channels, 3, 3)) if exact else chance.normal(
            size=(kernels, self.channels, 3, 3)
        )  # fmt: skip
        self.features = self.add('Conv', [self.image, self.constant(weights.astype(np.float32))], pads=[1, 1, 1, 1])
        self.features_shape = (1, kernels, self.height, self.width)
        first = self.add('Slice', [self.flat, *map(self.constant, (np.array([0]), np.array([_CANDIDATES])))])
        scaled = first if exact else self.add('Mul', [first, self.constant(np.float32(_LEVELS))])
        levels = self.add('Round', [scaled])
        ranks = np.arange(_CANDIDATES - 1, -1, -1, dtype=np.float32)
        self.scores = self.add('Add', [self.add('Mul', [levels, self.constant(np.float32(_CANDIDATES))]),
                                       self.constant(ranks)])  # fmt: skip
        self.is_candidate = self.add('Greater', [levels, self.constant(np.float32(_LEVELS / 2))])

    def name(self) -> str:
        self._count += 1
        return f'value {self._count}'

    def add(self, operator: str, inputs: list[str], outputs: int = 1, **attributes: object) -> str:
        """Append a node; return its last output's name."""
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[-1]

    def constant(self, value: object) -> str:
        array = np.asarray(value)
        name = self.name()
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def cast(self, value: str, dtype: str) -> str:
        return self.add('Cast', [value], to=_TYPES[dtype])

    def put_out(self, value: str, dtype: str, shape: list[int | str | None] | None) -> None:
        """Make ``value`` an output of its own; ``shape`` is what is declared, None for nothing."""
        name = f'output {len(self.outputs)}'
        self.nodes.append(helper.make_node('Identity', [value], [name]))
        self.declare(name, dtype, shape)

    def declare(self, name: str, dtype: str, shape: list[int | str | None] | None) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], shape))

    def any_type(self, *types: str) -> str:
        return str(self.chance.choice(types or tuple(_TYPES)))

    def length(self, wrong: str | None) -> int | str | None:
        """Return how a length that the data decide is declared: free by name, free without one, or wrongly fixed."""
        if wrong == 'example':
            return int(self.chance.integers(1, 9))
        if wrong == 'zero':
            return 0
        return [None, f'n{len(self.outputs)}'][int(self.chance.integers(2))]

    # --- kinds of outputs -------------------------------------------------------------------------

    def dense(self) -> None:
        dtype = 'float32' if self.only_dense else self.any_type()
        if dtype in ('float32', 'float16', 'float64'):
            self.put_out(self.cast(self.features, dtype), dtype, list(self.features_shape))
        else:
            # Not of a sum, whose last bit depends on how the graph is optimised, and which may lie next to a half.
            scale = self.constant(np.float32(1 if self.exact else 100))
            value = self.add('Round', [self.add('Mul', [self.image, scale])])
            self.put_out(self.cast(value, dtype), dtype, list(self.shape))

    def scalar(self) -> None:
        dtype = self.any_type('int64', 'int32', 'float32', 'float64')
        # The others are more than FP16 counts.
        counted = self.is_candidate if self.exact else self.found
        count = self.add('ReduceSum', [self.cast(counted, 'int64')], keepdims=0)
        self.put_out(self.cast(count, dtype), dtype, [])

    def tiny(self) -> None:
        dtype = self.any_type('float32', 'float16', 'bool', 'uint8', 'int64')
        largest = self.add('ReduceMax', [self.flat], keepdims=1)
        value = self.add('Greater', [largest, self.threshold])
        self.put_out(self.cast(value, dtype), dtype, [1])

    def nonzero(self, wrong: str | None = None) -> None:
        self.put_out(self.add('NonZero', [self.found]), 'int64', [1, self.length(wrong)])

    def compress(self, wrong: str | None = None) -> None:
        dtype = self.any_type('float32', 'float16', 'float64', 'uint8', 'int32')
        values = self.add('Compress', [self.flat, self.found], axis=0)
        if dtype in ('uint8', 'int32'):
            values = self.add('Round', [values])
        self.put_out(self.cast(values, dtype), dtype, [self.length(wrong)])

    def gathered(self, wrong: str | None = None) -> None:
        """Descriptors of what was found, several pages of them where much is."""
        dtype, width = self.any_type('float32', 'float16'), int(self.chance.integers(1, 65))
        table = self.chance.integers(0, 16, (7, width)) if self.exact else self.chance.normal(size=(7, width))
        where = self.add('Squeeze', [self.add('NonZero', [self.is_candidate]), self.constant(np.array([0]))])
        rows = self.add('Mod', [where, self.constant(np.array(7))])
        values = self.add('Gather', [self.constant(table.astype(np.float32)), rows], axis=0)
        self.put_out(self.cast(values, dtype), dtype, [self.length(wrong), width])

    def topk(self, wrong: str | None = None) -> None:
        count = self.add('ReduceSum', [self.cast(self.is_candidate, 'int64')], keepdims=1)
        length = self.length(wrong)
        indices = self.add('TopK', [self.scores, count], outputs=2)
        self.put_out(self.nodes[-1].output[0], 'float32', [length])
        self.put_out(indices, 'int64', [length])

    def suppressed(self, wrong: str | None = None) -> None:
        corners = np.arange(_CANDIDATES, dtype=np.float32)[:, None] * 4 + np.array([0, 0, 6, 2], np.float32)
        boxes = self.constant(corners[None])
        scores = self.add('Reshape', [self.scores, self.constant(np.array([1, 1, _CANDIDATES]))])
        limits = map(self.constant, (np.array([_CANDIDATES]), np.array([0.45], np.float32),
                                     np.array([_CANDIDATES * _LEVELS / 2], np.float32)))  # fmt: skip
        self.put_out(self.add('NonMaxSuppression', [boxes, scores, *limits]), 'int64', [self.length(wrong), 3])

    def free(self, wrong: str | None = None) -> None:
        """One of those whose length the data decide."""
        kind = [self.nonzero, self.compress, self.gathered, self.topk, self.suppressed][int(self.chance.integers(5))]
        kind(wrong)

    def declared_as_the_example(self) -> None:
        self.free('example')

    def declared_empty(self) -> None:
        self.free('zero')

    def of_unknown_rank(self) -> None:
        """A squeeze that the exporter made an If of, since it did not know the size of the axis."""
        few = self.add('Less', [self.add('ReduceSum', [self.cast(self.found, 'int64')], keepdims=0),
                                self.constant(np.array(3))])  # fmt: skip
        row = self.add('Unsqueeze', [self.flat, self.constant(np.array([0]))])
        axis = self.constant(np.array([0]))
        branches = {}
        for branch, node in (
            ('then_branch', helper.make_node('Squeeze', [row, axis], ['squeezed'])),
            ('else_branch', helper.make_node('Identity', [row], ['as it was'])),
        ):
            result = helper.make_tensor_value_info(node.output[0], FLOAT, None)
            branches[branch] = helper.make_graph([node], branch, [], [result])
        self.put_out(self.add('If', [few], **branches), 'float32', None)

    def undeclared(self) -> None:
        """A shape that the file leaves out, of a value whose length the data decide or not."""
        if self.chance.random() < 0.5:
            self.put_out(self.features, 'float32', None)
        else:
            self.put_out(self.add('NonZero', [self.found]), 'int64', None)

    def empty(self) -> None:
        nothing = self.add('Slice', [self.flat, *map(self.constant, (np.array([0]), np.array([0])))])
        self.put_out(self.add('Reshape', [nothing, self.constant(np.array([0, 4]))], allowzero=1), 'float32', [0, 4])

    def twice(self) -> None:
        """Two names for one tensor."""
        if self.only_dense or self.chance.random() < 0.5:
            value, dtype, shape = self.features, 'float32', list(self.features_shape)
        else:
            value, dtype, shape = self.add('NonZero', [self.found]), 'int64', [1, None]
        self.put_out(value, dtype, shape)
        self.put_out(value, dtype, shape)

    def the_input(self) -> None:
        """The input itself, under its own name, which is one output at most."""
        if all(output.name != 'image' for output in self.outputs):
            self.declare('image', self.dtype, list(self.shape))

    def a_constant(self) -> None:
        values = self.chance.integers(0, 9, int(self.chance.integers(1, 2000))).astype(np.float32)
        if self.chance.random() < 0.5:
            self.declare(self.constant(values), 'float32', list(values.shape))
        else:
            self.put_out(self.constant(values), 'float32', list(values.shape))

    def read_by_another(self) -> None:
        """An output that another output is computed from."""
        free = not self.only_dense and self.chance.random() < 0.5
        value = self.add('Compress', [self.flat, self.found], axis=0) if free else self.features
        shape = [None] if free else list(self.features_shape)
        self.put_out(value, 'float32', shape)
        self.put_out(self.add('Neg', [self.outputs[-1].name]), 'float32', shape)

    def _needed(self) -> tuple[list[NodeProto], list[TensorProto]]:
        """Return the nodes and constants that lead to an output."""
        wanted, nodes = {output.name for output in self.outputs}, []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted |= set(node.input)
                nodes.append(node)
        return nodes[::-1], [constant for constant in self.constants if constant.name in wanted]

    def build(self) -> RandomNetwork:
        kinds = [
            self.dense, self.dense, self.dense, self.scalar, self.tiny, self.free, self.free, self.free,
            self.declared_as_the_example, self.declared_empty, self.of_unknown_rank, self.undeclared, self.empty,
            self.twice, self.the_input, self.a_constant, self.read_by_another,
        ]  # fmt: skip
        if self.only_dense:
            kinds = [self.dense, self.dense, self.twice, self.read_by_another]
        chosen = []
        for _ in range(int(self.chance.integers(1, 6))):
            kind = kinds[int(self.chance.integers(len(kinds)))]
            if len(self.outputs) < 5:
                kind()
                chosen.append(kind.__name__)
        order = self.chance.permutation(len(self.outputs))
        image = helper.make_tensor_value_info('image', _TYPES[self.dtype], list(self.shape))
        nodes, constants = self._needed() if self.only_dense else (self.nodes, self.constants)
        graph = helper.make_graph(
            nodes, 'random', [image], [self.outputs[int(index)] for index in order], constants
        )
        # The oldest ONNX Runtime in use reads this.
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
        return RandomNetwork(model.SerializeToString(), self.shape, self.dtype, tuple(chosen), self.exact)


def random_network(seed: int, *, exact: bool = False, dense: bool = False) -> RandomNetwork:
    """
    Return the network of ``seed``, the same one each time.

    :param exact: small integers only, so that FP16, TF32 and any order of summation give one answer.
    :param dense: float32 outputs of fixed size alone, which TensorRT takes.
    """
    return _Builder(np.random.default_rng((seed, exact)), exact=exact, dense=dense).build()


def frames(network: RandomNetwork, seed: int, count: int) -> Iterator[Arrays]:
    """Yield ``count`` requests of which much, little or nothing is found, in an order that changes abruptly."""
    chance = np.random.default_rng((seed, 1))
    for _ in range(count):
        share = chance.choice([0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0])
        is_found = chance.random(network.shape) < share
        if network.exact:
            values = np.where(is_found, chance.integers(_LEVELS // 2 + 1, _LEVELS + 1, network.shape), 0)
        elif network.dtype in _FULL_SCALE:
            top = _FULL_SCALE[network.dtype]
            values = np.where(is_found, chance.integers(int(0.6 * top), top, network.shape), 0)
        else:
            noise = chance.random(network.shape)
            values = np.where(is_found, 0.6 + 0.4 * noise, 0.3 * noise)
        yield {'image': values.astype(network.dtype)}
