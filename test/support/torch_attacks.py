"""Torch archives that an attacker would write."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from support.torch_files import (
    DATA,
    changed_weights,
    entries_of,
    evil_pickle,
    saved,
    torch_zip,
)

LAYERS = entries_of('layers.pt2')


def replaced(name: str, entry: str) -> Callable[[Path], tuple[dict[str, bytes], str]]:
    """Put a pickle that runs a command into an entry of a real archive."""
    return lambda marker: ({**entries_of(name), entry: evil_pickle(marker)}, Path(name).suffix)


def added(name: str, entry: str, content: bytes = b'\x7fELF') -> Callable[[Path], tuple[dict[str, bytes], str]]:
    return lambda marker: ({**entries_of(name), entry: content}, Path(name).suffix)


def sample_inputs(wrap: Callable[[bytes], bytes]) -> Callable[[Path], tuple[dict[str, bytes], str]]:
    def make(marker: Path) -> tuple[dict[str, bytes], str]:
        return {**entries_of('arithmetic.pt2'), 'data/sample_inputs/model.pt': wrap(evil_pickle(marker))}, '.pt2'

    return make


def pickled_weight(marker: Path) -> tuple[dict[str, bytes], str]:
    entries = changed_weights(lambda weight: weight.update(use_pickle=True))
    return {**entries, 'data/weights/weight_0': saved(evil_pickle(marker))}, '.pt2'


def pickled_constant(prefix: str, wrap: Callable[[bytes], bytes]) -> Callable[[Path], tuple[dict[str, bytes], str]]:
    def make(marker: Path) -> tuple[dict[str, bytes], str]:
        entries = entries_of('layers.pt2')
        config = json.loads(entries['data/constants/model_constants_config.json'])
        payload = next(iter(config['config'].values()))
        payload.update(path_name=f'{prefix}0', use_pickle=True)
        return {
            **entries,
            'data/constants/model_constants_config.json': json.dumps(config).encode(),
            f'data/constants/{prefix}0': wrap(evil_pickle(marker)),
        }, '.pt2'

    return make


def legacy_tar(content: bytes) -> bytes:
    """The layout of torch.save before its first pickle format."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode='w') as tar:
        for name in ('sys_info', 'storages', 'tensors', 'pickle'):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return target.getvalue()


ENTRIES: dict[str, Callable[[Path], tuple[dict[str, bytes], str]]] = {
    'sample inputs': sample_inputs(saved),
    'sample inputs without an archive': sample_inputs(lambda content: content),
    'sample inputs as a tar': sample_inputs(legacy_tar),
    'a weight': pickled_weight,
    'a constant': pickled_constant('tensor_', saved),
    'a custom object': pickled_constant('custom_obj_', lambda content: content),
    'an opaque object': pickled_constant('opaque_obj_', lambda content: content),
    'legacy weights': replaced('arithmetic.pt2', 'data/weights/model.pt'),
    'legacy constants': replaced('arithmetic.pt2', 'data/constants/model.pt'),
    'extra files': added('arithmetic.pt2', 'extra/notes.txt'),
    'a second model': lambda marker: (
        {**entries_of('arithmetic.pt2'), 'models/other.json': entries_of('arithmetic.pt2')['models/model.json']}, '.pt2'
    ),
    'a shared library': added('arithmetic.pt2', 'data/weights/libevil.so'),
    'AOTInductor': added('arithmetic.pt2', 'data/aotinductor/model/model.so'),
    'AOTInductor sources': added('arithmetic.pt2', 'data/aotinductor/model/model.cpp', b'int main() {}'),
    'an ExecuTorch program': added('arithmetic.pt2', 'data/executorch/model.pte'),
    'a nested archive': added('arithmetic.pt2', 'data/weights/more.zip', (DATA / 'arithmetic.pt2').read_bytes()),
    'TorchScript: data': replaced('scripted.pt', 'data.pkl'),
    'TorchScript: constants': replaced('scripted.pt', 'constants.pkl'),
    'TorchScript: traced inputs': replaced('traced.pt', 'traced_inputs.pkl'),
    'TorchScript: debug information': replaced('scripted.pt', 'code/__torch__.py.debug_pkl'),
    'TorchScript: legacy attributes': replaced('scripted.pt', 'attributes.pkl'),
    'TorchScript: mobile bytecode': replaced('scripted.pt', 'bytecode.pkl'),
    'TorchScript: a shared library': added('scripted.pt', 'extra/libevil.so'),
    'TorchScript: Python': added('scripted.pt', 'code/setup.py', b'import os'),
}
DOUBLE = {**LAYERS, 'data/weights/Weight_0': b'1234'}


def patched(old: bytes, new: bytes) -> bytes:
    content = torch_zip(LAYERS)
    assert old in content and len(old) == len(new)
    return content.replace(old, new)


def other_end64() -> bytes:
    before, magic, after = torch_zip(LAYERS).rpartition(b'PK\6\6')
    return before + magic + b'\x2d' + after[1:]


ZIPS: dict[str, tuple[bytes, str]] = {
    'prepended data': (torch_zip(LAYERS, before_entries=b'#!/bin/sh\n'), 'begin'),
    'a whole archive before it': (torch_zip(LAYERS) + torch_zip(LAYERS), 'gap|overlap|end|directory'),
    'a hidden entry in front': (torch_zip(LAYERS, before_entries=torch_zip({'a': b'b'})[:128]), 'gap'),
    'trailing data': (torch_zip(LAYERS) + b'x', 'end'),
    'a comment': (torch_zip(LAYERS, comment=b'PK'), 'end|comment'),
    'data before the directory': (torch_zip(LAYERS, before_directory=b'x' * 64), 'between'),
    'data before the end': (torch_zip(LAYERS, before_end=b'x' * 64), 'between'),
    'another name in the local header': (
        torch_zip(LAYERS, local_name=lambda name: name.replace('weight_0', 'weight_x')), 'contradicts'
    ),
    'a larger size than there is': (torch_zip(LAYERS, size=lambda size: size + 1), 'two sizes'),
    'encrypted': (torch_zip(LAYERS, flags=0x809), 'encrypted'),
    'another compression': (torch_zip(LAYERS, method=12), 'compression'),
    'names that differ by case': (torch_zip(DOUBLE), 'twice'),
    'a name twice': (patched(b'weight_1', b'weight_0'), 'twice'),
    'a name with ..': (torch_zip({'../weights': b'', **LAYERS}), 'names an entry'),
    'an absolute name': (torch_zip(LAYERS, root='/archive/'), 'names an entry'),
    'a backslash': (torch_zip({'data\\x': b'', **LAYERS}), 'names an entry'),
    'an empty name': (torch_zip({'': b'', **LAYERS}), 'names an entry'),
    'a directory': (torch_zip({'data/': b'', **LAYERS}), 'names an entry'),
    'no common folder': (torch_zip({'x/y': b'', **LAYERS}, root=''), 'folders'),
    'extras in the directory': (torch_zip(LAYERS, directory_extra=b'\1\0\0\0'), 'extras'),
    'entries marked as folders': (torch_zip(LAYERS, attributes=0x10), 'no file'),
    'extras before an entry': (torch_zip(LAYERS, padding_id=b'\1\0'), 'extras'),
    'another checksum behind an entry': (torch_zip(LAYERS, descriptor_crc=7), 'contradicts'),
    'no entry': (torch_zip({}), 'begin|empty'),
    'end records that differ': (other_end64(), 'contradict'),
    'a damaged weight': (patched(LAYERS['data/weights/weight_1'], b'\0' * len(LAYERS['data/weights/weight_1'])),
                         'damaged'),
}
