"""
Model bundles and model files that are not what they seem, or too much: one for every number.

``hostile_bundle(n, directory)`` writes the bundle of a number and returns the path to give as ``model_path``. Files
that seem huge are sparse: terabytes that take no room.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ['KINDS', 'hostile_bundle']

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def hostile_bundle(number: int, directory: Path, healthy: Path) -> tuple[str, str]:
    """
    Return kind and path of the bundle of a number.

    :param directory: a new one is made in it.
    :param healthy: a bundle that is served, of which most kinds are a copy with something changed.
    """
    kinds = sorted(KINDS)
    kind, chance = kinds[number % len(kinds)], random.Random(number)
    place = directory / f'bundle_{number}'
    shutil.copytree(healthy, place)
    return kind, str(KINDS[kind](place, chance))


def _values(place: Path) -> dict[str, Any]:
    return json.loads((place / 'model.json').read_text())


def _write_values(place: Path, values: dict[str, Any]) -> Path:
    (place / 'model.json').write_text(json.dumps(values))
    return place


def _sparse(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    with path.open('wb') as file:
        try:
            file.truncate(size)
        except OSError:
            # As much as this file system counts.
            file.truncate(1 << 40)


def _artefact(place: Path) -> Path:
    return next(place.glob('*.onnx'))


def _golden(place: Path, chance: random.Random) -> Path:
    return chance.choice(sorted(place.glob('*.npz')))


def _set_golden(place: Path, name: str, content: bytes) -> Path:
    """Put a file in the place of a golden one, with its digest where that is named."""
    (place / name).write_bytes(content)
    values, digest = _values(place), hashlib.sha256(content).hexdigest()
    for case in values['golden'] if isinstance(values['golden'], list) else [values['golden']]:
        for part in case.values():
            if isinstance(part, dict) and name in part.values():
                part['sha256'] = digest
    return _write_values(place, values)


def _sparse_golden(place: Path, chance: random.Random) -> Path:
    _sparse(_golden(place, chance), chance.choice([1 << 31, 1 << 34, 8 << 40]))
    return place


def _golden_bomb(place: Path, chance: random.Random) -> Path:
    """Return a bundle of which a golden array takes gigabytes, deflated to some megabytes, its digest right."""
    name = _golden(place, chance).name
    with zipfile.ZipFile(place / name) as archive:
        array = archive.namelist()[0]
    content = io.BytesIO()
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (268435456,), }".ljust(117) + b'\n'
    with (
        zipfile.ZipFile(content, 'w', zipfile.ZIP_DEFLATED) as archive,
        archive.open(array, 'w', force_zip64=True) as entry,
    ):
        entry.write(b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header)
        for _ in range(chance.choice([64, 1024])):
            entry.write(bytes(1 << 20))
    return _set_golden(place, name, content.getvalue())


def _sparse_json(place: Path, chance: random.Random) -> Path:
    _sparse(place / 'model.json', chance.choice([1 << 30, 8 << 40]))
    return place


def _giant_json(place: Path, chance: random.Random) -> Path:
    text = (place / 'model.json').read_text().strip()
    size = chance.choice([5_000_000, 60_000_000])
    filling = chance.choice(
        [' ' * size, f'"x": [{"1," * (size // 2)}1],', f'"x": "{"a" * size}",', '"k": 1,' * (size // 7)]
    )
    (place / 'model.json').write_text('{' + filling + text[1:])
    return place


def _deep_json(place: Path, chance: random.Random) -> Path:
    depth, pair = chance.choice([500, 100_000, 5_000_000]), chance.choice(['[]', '{}'])
    opening = '[' if pair == '[]' else '{"a":'
    text = (place / 'model.json').read_text().strip()
    (place / 'model.json').write_text('{"x": ' + opening * depth + '1' + pair[1] * depth + ',' + text[1:])
    return place


def _json_of_anything(place: Path, chance: random.Random) -> Path:
    texts = [
        b'', b'null', b'[]', b'{}', b'\xff\xfe{}', b'\xef\xbb\xbf{}', b'{"name": "\xff"}', b'NaN', b'{"a":1}' * 2,
        b'\x00' * 100, b'1e999', b'-' * 10_000, b'"\\ud800"', b'{"name": 1' + b'0' * 100_000 + b'}',
    ]  # fmt: skip
    (place / 'model.json').write_bytes(chance.choice(texts))
    return place


def _other_values(place: Path, chance: random.Random) -> Path:
    """Replace one value anywhere in model.json."""
    values = _values(place)
    holders: list[tuple[Any, Any]] = []

    def gather(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            holders.append((value, key))
            gather(inner)

    gather(values)
    for _ in range(chance.choice([1, 1, 3])):
        holder, key = chance.choice(holders)
        with contextlib.suppress(KeyError, IndexError):
            holder[key] = chance.choice(
                [None, True, -1, 0, 1 << 62, 10**400, 1e308, '', 'x' * 100_000, '../../../etc/shadow', '/dev/zero',
                 '\ud800', 'a\nb\x1b[31m', [], {}, [[]], [1 << 40] * 4, 'float64', 'sha256:' + '0' * 64]
            )  # fmt: skip
    return _write_values(place, values)


def _wrong_digest(place: Path, chance: random.Random) -> Path:
    path = chance.choice([_artefact(place), _golden(place, chance)])
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1
    path.write_bytes(content)
    return place


def _sparse_artefact(place: Path, chance: random.Random) -> Path:
    _sparse(_artefact(place), chance.choice([1 << 31, 1 << 34, 8 << 40]))
    return place


def _sparse_model(place: Path, chance: random.Random) -> Path:
    path = place / 'alone.onnx'
    _sparse(path, chance.choice([1 << 20, 1 << 31, 8 << 40]))
    return path


def _cut_model(place: Path, chance: random.Random) -> Path:
    content = _artefact(place).read_bytes()
    path = place / 'alone.onnx'
    path.write_bytes(content[: chance.randrange(len(content))])
    return path


def _flipped_model(place: Path, chance: random.Random) -> Path:
    content = bytearray(_artefact(place).read_bytes())
    for _ in range(chance.choice([1, 5, 100])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path = place / 'alone.onnx'
    path.write_bytes(content)
    return path


def _external(place: Path, chance: random.Random) -> Path:
    """Return a model whose weights lie in a file that is cut, missing, sparse, a pipe, or somewhere else."""
    weights = np.ones((64, 48), np.float32)
    tensor = numpy_helper.from_array(weights, 'weights')
    path = _network(place, [helper.make_node('Mul', ['scaled', 'weights'], ['out'])], [tensor], height=64, width=48)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location='weights.bin', size_threshold=0)
    kind, data = (
        chance.choice(['cut', 'missing', 'sparse', 'pipe', 'elsewhere', 'offset', 'loop']),
        place / 'weights.bin',
    )
    if kind == 'cut':
        os.truncate(data, chance.choice([0, 1, 4000]))
    elif kind == 'missing':
        data.unlink()
    elif kind == 'sparse':
        _sparse(data, 8 << 40)
    elif kind in ('pipe', 'loop'):
        data.unlink()
        os.mkfifo(data) if kind == 'pipe' else data.symlink_to(data)
    else:
        model = onnx.load(path, load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            if kind == 'elsewhere' and entry.key == 'location':
                entry.value = chance.choice(['../../../../etc/passwd', '/dev/zero', '/proc/self/mem', 'a' * 5000, '\n'])
            elif kind == 'offset' and entry.key in ('offset', 'length'):
                entry.value = chance.choice(['-1', str(1 << 62), 'x', '1e9', '9' * 500])
        Path(path).write_bytes(model.SerializeToString())
    return Path(path)


def _network(
    place: Path, nodes: list[Any], initialisers: list[Any], *, output: str = 'out', height: Any = 48, width: Any = 64,
    channels: int = 1, shape: list[Any] | None = None,
) -> str:  # fmt: skip
    """Write a network of an image, which the nodes find as ``scaled``, and return its path."""
    graph = helper.make_graph(
        [helper.make_node('Mul', ['image', 'scale'], ['scaled']), *nodes],
        'graph',
        [helper.make_tensor_value_info('image', FLOAT, [1, channels, height, width])],
        [helper.make_tensor_value_info(output, FLOAT, shape)],
        [numpy_helper.from_array(np.array(255.0, np.float32), 'scale'), *initialisers],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    path = place / 'alone.onnx'
    path.write_bytes(model.SerializeToString())
    return str(path)


def _greedy_model(place: Path, chance: random.Random) -> Path:
    """Return a model that fills gigabytes as soon as it is loaded, or runs."""
    size = numpy_helper.from_array(np.array([chance.choice([1 << 28, 1 << 30, 1 << 38])], np.int64), 'size')
    one = helper.make_tensor('value', FLOAT, [1], [1.0])
    nodes = [
        helper.make_node('ConstantOfShape', ['size'], ['filled'], value=one),
        helper.make_node('ReduceSum', ['filled'], ['sum'], keepdims=0),
        helper.make_node('Add', ['scaled', 'sum'], ['out']),
    ]
    return Path(_network(place, nodes, [size]))


def _greedy_output(place: Path, chance: random.Random) -> Path:
    shape = numpy_helper.from_array(np.array([chance.choice([100, 10_000, 1_000_000]), 1, 48, 64], np.int64), 'shape')
    return Path(_network(place, [helper.make_node('Expand', ['scaled', 'shape'], ['out'])], [shape]))


def _huge_input(place: Path, chance: random.Random) -> Path:
    height, width = chance.choice([(16384, 16384), (100_000, 100_000), (1, 1 << 40), (65_536, 64), (0, 0), (-1, 5)])
    nodes = [helper.make_node('ReduceMean', ['scaled'], ['out'], keepdims=0)]
    return Path(_network(place, nodes, [], height=height, width=width, channels=chance.choice([1, 3]), shape=[]))


def _endless_model(place: Path, chance: random.Random) -> Path:
    """Return a model whose warm-up does not end in this life."""
    value, names = helper.make_tensor_value_info, ('go on', 'nothing', 'rounds')
    steps = [
        helper.make_node('Cos', ['before'], ['after']),
        helper.make_node('Identity', ['condition'], ['still']),
    ]
    body = helper.make_graph(
        steps,
        'body',
        [value('round', INT64, []), value('condition', TensorProto.BOOL, []), value('before', FLOAT, [])],
        [value('still', TensorProto.BOOL, []), value('after', FLOAT, [])],
    )
    constants = (np.array(True), np.array(0.0, np.float32), np.array(1 << 60, np.int64))
    nodes = [
        helper.make_node('Loop', ['rounds', 'go on', 'nothing'], ['work'], body=body),
        helper.make_node('Add', ['scaled', 'work'], ['out']),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in zip(names, constants, strict=True)]
    return Path(_network(place, nodes, tensors))


def _names(place: Path, chance: random.Random) -> Path:
    name = chance.choice(['', ' ', 'a\nFATAL: b', 'x' * 1_000_000, '\x1b[2J', '../out', 'é' * 100_000, '\u202e', '%s'])
    return Path(_network(place, [helper.make_node('Identity', ['scaled'], [name])], [], output=name))


def _name_that_is_no_text(place: Path, chance: random.Random) -> Path:
    """Return a model with an output whose name is not UTF-8."""
    path = Path(_network(place, [helper.make_node('Identity', ['scaled'], ['QQQQ'])], [], output='QQQQ'))
    path.write_bytes(
        path.read_bytes().replace(b'QQQQ', chance.choice([b'\xff\xfe\xfd\xfc', b'\xc0\x80\x80\x80', b'\xed\xa0\x80Q']))
    )
    return path


def _many_outputs(place: Path, chance: random.Random) -> Path:
    number = chance.choice([1000, 50_000])
    nodes = [helper.make_node('Identity', ['scaled'], [f'out {index}']) for index in range(number)]
    path = Path(_network(place, nodes, [], output='out 0'))
    model = onnx.load(path)
    model.graph.output.extend(helper.make_tensor_value_info(f'out {index}', FLOAT, None) for index in range(1, number))
    path.write_bytes(model.SerializeToString())
    return path


def _no_file(place: Path, chance: random.Random) -> Path:
    """Put a pipe, a device, a directory, a socket or a loop in the place of a file."""
    path = chance.choice([place / 'model.json', _artefact(place), _golden(place, chance)])
    path.unlink()
    kind = chance.choice(['pipe', 'directory', 'loop', 'dangling', 'zero', 'random', 'memory'])
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'directory':
        path.mkdir()
    else:
        targets = {
            'loop': str(path),
            'dangling': '/nowhere',
            'zero': '/dev/zero',
            'random': '/dev/urandom',
            'memory': '/proc/self/mem',
        }
        path.symlink_to(targets[kind])
    return place


def _no_path(place: Path, chance: random.Random) -> Path | str:
    return chance.choice(
        ['', ' ', '/nowhere', '/dev/zero', '/dev/stdin', '/proc/self/mem', '/proc/kmsg', '/', '~', '~nobody/x',
         'a' * 5000, '/' + 'a/' * 3000, '/tmp/a\nFATAL: forged', '/tmp/\x1b[2J', '/tmp/\u202e', '/tmp/x.onnx',
         str(place / 'nothing.onnx'), str(place / 'model.json'), str(place) + '/' * 1000,
         '/dev/null', '/sys/kernel/debug']
    )  # fmt: skip


def _pipe(place: Path, chance: random.Random) -> Path:
    path = place / chance.choice(['model.onnx', 'model'])
    os.mkfifo(path)
    return path


KINDS: dict[str, Callable[[Path, random.Random], Path | str]] = {
    'golden file, sparse': _sparse_golden,
    'golden file, bomb': _golden_bomb,
    'model.json, sparse': _sparse_json,
    'model.json, giant': _giant_json,
    'model.json, deep': _deep_json,
    'model.json, of anything': _json_of_anything,
    'model.json, other values': _other_values,
    'wrong digest': _wrong_digest,
    'artefact, sparse': _sparse_artefact,
    'model, sparse': _sparse_model,
    'model, cut': _cut_model,
    'model, bits flipped': _flipped_model,
    'model, external data': _external,
    'model, greedy': _greedy_model,
    'model, greedy output': _greedy_output,
    'model, huge input': _huge_input,
    'model, endless': _endless_model,
    'model, names': _names,
    'model, name that is no text': _name_that_is_no_text,
    'model, many outputs': _many_outputs,
    'no regular file': _no_file,
    'no path': _no_path,
    'pipe': _pipe,
}
"""What changes a copy of a healthy bundle, and returns what is named as its path."""
