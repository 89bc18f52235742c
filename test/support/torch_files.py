"""Torch archives for tests: real ones, taken apart, changed and put together again in the layout of torch's writer."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gps_denied_c7.runtimes.pt.archive_scan.strict_zip import read_entries
from support import source_tree

DATA = source_tree.DATA / 'torch'

LOCAL, CENTRAL = struct.Struct('<4s5H3L2H'), struct.Struct('<4s6H3L5H2L')
END, END64, LOCATOR64 = struct.Struct('<4s4H2LH'), struct.Struct('<4sQ2H2L4Q'), struct.Struct('<4sLQL')


def entries_of(name: str) -> dict[str, bytes]:
    """Return a real archive's entries by their names below its root."""
    entries = read_entries((DATA / name).read_bytes())
    return {name.partition('/')[2]: bytes(content) for name, content in entries.items()}


def torch_zip(
    entries: Mapping[str, bytes],
    *,
    root: str = 'archive/',
    packed: tuple[str, ...] = (),
    flags: int = 0x808,
    method: int | None = None,
    size: Callable[[int], int] = lambda size: size,
    local_name: Callable[[str], str] = lambda name: name,
    before_entries: bytes = b'',
    before_directory: bytes = b'',
    before_end: bytes = b'',
    padding_id: bytes = b'FB',
    directory_extra: bytes = b'',
    attributes: int = 0,
    descriptor_crc: int | None = None,
    with_end64: bool = True,
    comment: bytes = b'',
) -> bytes:
    """
    Write a zip as torch does: data descriptors, entries padded to 64 bytes, 64-bit end records.

    :param packed: names below the root of the entries to compress.
    :param size: changes the unpacked sizes that are declared.
    :param local_name: changes the names in the local headers alone.
    """
    body, directory = before_entries, b''
    for name, content in entries.items():
        full, local, offset = f'{root}{name}'.encode(), f'{root}{local_name(name)}'.encode(), len(body)
        kind = method if method is not None else 8 if name in packed else 0
        data = content
        if name in packed:
            deflate = zlib.compressobj(wbits=-15)
            data = deflate.compress(content) + deflate.flush()
        crc, length = zlib.crc32(content), size(len(content))
        padding = -(offset + LOCAL.size + len(local) + 4) % 64
        body += LOCAL.pack(b'PK\3\4', 0, flags, kind, 0, 0, 0, 0, 0, len(local), padding + 4) + local
        body += padding_id + struct.pack('<H', padding) + b'Z' * padding + data
        body += struct.pack(
            '<4s3L', b'PK\7\10', crc if descriptor_crc is None else descriptor_crc, len(data), length
        )
        directory += CENTRAL.pack(
            b'PK\1\2', 0, 0, flags, kind, 0, 0, crc, len(data), length, len(full), len(directory_extra),
            0, 0, 0, attributes, offset,
        ) + full + directory_extra
    start, count = len(body) + len(before_directory), len(entries)
    content = body + before_directory + directory + before_end
    if with_end64:
        first = len(content)
        content += END64.pack(b'PK\6\6', 44, 798, 45, 0, 0, count, count, len(directory), start)
        content += LOCATOR64.pack(b'PK\6\7', 0, first, 1)
    return content + END.pack(b'PK\5\6', 0, 0, count, count, len(directory), start, len(comment)) + comment


class Touch:
    """Make a file when unpickled, as a stand-in for anything that a command can do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.system, (f'touch {self.marker}',)


def evil_pickle(marker: Path) -> bytes:
    return pickle.dumps((Touch(marker), {}), protocol=2)


def evil_expression(marker: Path) -> str:
    return f"__import__('os').system('touch {marker}')"


def saved(data_pkl: bytes) -> bytes:
    """Return an archive of torch.save around a pickle."""
    return torch_zip({'data.pkl': data_pkl, 'byteorder': b'little', 'version': b'3\n'})


def changed_program(change: Callable[[dict[str, Any]], None], name: str = 'arithmetic.pt2') -> dict[str, bytes]:
    """Return a real archive's entries with its graph changed."""
    entries = entries_of(name)
    program = json.loads(entries['models/model.json'])
    change(program)
    return {**entries, 'models/model.json': json.dumps(program).encode()}


def changed_weights(change: Callable[[dict[str, Any]], None]) -> dict[str, bytes]:
    """Return layers.pt2's entries with the description of one of its weights changed."""
    entries = entries_of('layers.pt2')
    config = json.loads(entries['data/weights/model_weights_config.json'])
    change(next(iter(config['config'].values())))
    return {**entries, 'data/weights/model_weights_config.json': json.dumps(config).encode()}
