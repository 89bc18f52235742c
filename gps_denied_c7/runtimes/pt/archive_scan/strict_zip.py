"""Zip archives that every reader reads alike: one layout, no gap, nothing hidden, or a refusal."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

__all__ = ['ZipRefusedError', 'read_entries']

_LOCAL = struct.Struct('<4s5H3L2H')
_CENTRAL = struct.Struct('<4s6H3L5H2L')
_DESCRIPTOR = struct.Struct('<4s3L')
_END = struct.Struct('<4s4H2LH')
_END64 = struct.Struct('<4sQ2H2L4Q')
_LOCATOR64 = struct.Struct('<4sLQL')

_STORED, _DEFLATED = 0, 8
_DESCRIPTOR_FOLLOWS, _UTF8 = 0x8, 0x800

_NAME = re.compile(r'[A-Za-z0-9_.][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_.][A-Za-z0-9_.-]*)*', re.ASCII)
_MAX_NAME = 512
_MAX_ENTRIES = 65534


class ZipRefusedError(ValueError):
    """An archive that is not a plain zip; the text says what is wrong, for the end of a sentence."""


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    offset: int


def read_entries(data: bytes, *, max_unpacked: int = 64 << 20) -> dict[str, memoryview]:
    """
    Return every entry of a zip archive that leaves no room for two readings.

    The entries tile the file from its first byte to the central directory, that reaches the end record,
    and that the last byte. Local headers, data descriptors and the directory must agree, and checksums hold.
    So there is nothing before, between or behind the entries, none that overlap, none that one reader sees and
    another does not. Larger than 4 GiB, encrypted or on several disks is refused too.

    :param max_unpacked: bytes that all compressed entries together may unpack to.
    :return: contents by name, in the order of the directory; views of ``data`` where an entry is not compressed.
    :raises ZipRefusedError: saying why.
    """
    try:
        members, start = _directory(data)
        return _contents(data, members, start, max_unpacked)
    except struct.error as error:
        raise ZipRefusedError(f'is cut off: {error}') from error


def _require(fits: bool, problem: str) -> None:
    if not fits:
        raise ZipRefusedError(problem)


def _directory(data: bytes) -> tuple[list[_Member], int]:
    """Return the central directory's members and where it begins."""
    _require(data[:4] == b'PK\x03\x04', 'does not begin as a zip archive')
    end = len(data) - _END.size
    _require(end > 0 and data[end : end + 4] == b'PK\x05\x06', 'does not end as a zip archive')
    _, disk, first_disk, here, count, length, start, comment = _END.unpack_from(data, end)
    _require(disk == first_disk == comment == 0 and here == count, 'has a comment or further disks')
    _require(0 < count <= _MAX_ENTRIES and start != 0xFFFFFFFF, 'is empty, or larger than 4 GiB')
    stop = _skip_end64(data, end, count, length, start)
    _require(start + length == stop, 'has data between its directory and its end')
    members, seen, offset = [], set(), start
    for _ in range(count):
        member, offset = _central(data, offset)
        # torch's own reader takes no notice of case.
        _require(member.name.lower() not in seen, f'names {member.name!r} twice')
        seen.add(member.name.lower())
        members.append(member)
    _require(offset == stop, 'has a directory of another length than it says')
    return members, start


def _skip_end64(data: bytes, end: int, count: int, length: int, start: int) -> int:
    """Return where the directory must stop: before the 64-bit end records, where they are and say the same."""
    first = end - _LOCATOR64.size - _END64.size
    if first < 0 or data[first : first + 4] != b'PK\x06\x06':
        return end
    _, size, _, _, disk, first_disk, here, total, length64, start64 = _END64.unpack_from(data, first)
    locator = _LOCATOR64.unpack_from(data, first + _END64.size)
    same = (size, disk, first_disk, here, total, length64, start64) == (
        _END64.size - 12, 0, 0, count, count, length, start,
    )
    _require(same and locator == (b'PK\x06\x07', 0, first, 1), 'has two end records that contradict each other')
    return first


def _central(data: bytes, offset: int) -> tuple[_Member, int]:
    header = _CENTRAL.unpack_from(data, offset)
    magic, _, _, flags, method, _, _, crc, packed, size, name_length, extra, comment, disk, _, kind, local = header
    _require(magic == b'PK\x01\x02', 'has a damaged directory')
    offset += _CENTRAL.size
    name = _name(data[offset : offset + name_length])
    _require(extra == comment == disk == 0, f'has a directory entry {name!r} with extras')
    # Some readers give nothing for what is marked as a directory.
    _require(kind == 0, f'has a directory entry {name!r} that is marked as no file')
    _require(not flags & ~(_DESCRIPTOR_FOLLOWS | _UTF8), f'has an encrypted or unusual entry {name!r}')
    _require(method in (_STORED, _DEFLATED), f'has an entry {name!r} with compression method {method}')
    _require(method == _DEFLATED or packed == size, f'has a stored entry {name!r} of two sizes')
    return _Member(name, flags, method, crc, packed, size, local), offset + name_length


def _name(raw: bytes) -> str:
    name = raw.decode('ascii', errors='replace')
    plain = len(name) <= _MAX_NAME and _NAME.fullmatch(name) and not {'.', '..'} & set(name.split('/'))
    _require(bool(plain), f'names an entry {name[:80]!r}')
    return name


def _contents(data: bytes, members: list[_Member], stop: int, max_unpacked: int) -> dict[str, memoryview]:
    view = memoryview(data)
    contents: dict[str, memoryview] = {}
    expected = 0
    for member in sorted(members, key=lambda member: member.offset):
        _require(member.offset == expected, f'has a gap or an overlap before {member.name!r}')
        begin = _check_local(data, member)
        packed = view[begin : begin + member.packed]
        content = packed
        if member.method == _DEFLATED:
            max_unpacked -= member.size
            _require(max_unpacked >= 0, 'unpacks to too much')
            content = memoryview(_inflate(packed, member))
        _require(zlib.crc32(content) == member.crc, f'has a damaged entry {member.name!r}')
        contents[member.name] = content
        expected = begin + member.packed
        if member.flags & _DESCRIPTOR_FOLLOWS:
            descriptor = _DESCRIPTOR.unpack_from(data, expected)
            same = descriptor == (b'PK\x07\x08', member.crc, member.packed, member.size)
            _require(same, f'contradicts its directory about {member.name!r}')
            expected += _DESCRIPTOR.size
    _require(expected == stop, 'has data between its entries and its directory')
    return {member.name: contents[member.name] for member in members}


def _check_local(data: bytes, member: _Member) -> int:
    """Compare the local header with the directory's and return where the data begins."""
    header = _LOCAL.unpack_from(data, member.offset)
    magic, _, flags, method, _, _, crc, packed, size, name_length, extra = header
    begin = member.offset + _LOCAL.size
    sizes = (0, 0, 0) if flags & _DESCRIPTOR_FOLLOWS else (member.crc, member.packed, member.size)
    same = (magic, flags, method) == (b'PK\x03\x04', member.flags, member.method) and (crc, packed, size) == sizes
    name = data[begin : begin + name_length]
    _require(same and name == member.name.encode(), f'contradicts its directory about {member.name!r}')
    begin += name_length
    padding = data[begin : begin + extra]
    # The writers pad each entry to 64 bytes with one field of this id.
    plain = not extra or (padding[:2] == b'FB' and padding[2:4] == struct.pack('<H', extra - 4))
    _require(bool(plain), f'has extras before {member.name!r}')
    _require(begin + extra + member.packed <= len(data), f'is cut off in {member.name!r}')
    return begin + extra


def _inflate(packed: memoryview, member: _Member) -> bytes:
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = unpacker.decompress(packed, member.size + 1)
    except zlib.error as error:
        raise ZipRefusedError(f'has a damaged entry {member.name!r}: {error}') from error
    whole = len(content) == member.size and unpacker.eof and not unpacker.unused_data
    _require(whole, f'has an entry {member.name!r} of another size than it says')
    return content
