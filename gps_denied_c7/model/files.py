"""Files of a model bundle: read as the digest promises, written as a whole or not at all."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gps_denied_c7._json import require
from gps_denied_c7.errors import ModelBundleError
from gps_denied_c7.host_memory import require_memory
from gps_denied_c7.stalled_reads import note_progress

__all__ = [
    'GOLDEN_LIMIT_BYTES',
    'PART_SUFFIX',
    'BundleFile',
    'expand_home',
    'file_digest',
    'file_sha256',
    'file_size',
    'npz_bytes',
    'open_regular',
    'read_file',
    'read_npz',
    'read_pieces',
    'require_hex',
    'sync_directory',
    'unfinished_file',
    'write_atomically',
]

_HEX = re.compile(r'[0-9a-f]{64}')
_CHUNK_BYTES = 1 << 20
# What any reader here holds in memory as a whole: a protobuf ends at 2 GiB, a zip archive without extras at 4.
_LIMIT_BYTES = 4 << 30

GOLDEN_LIMIT_BYTES = 256 << 20
"""Bytes of all golden tensors of a bundle together, which the node itself reads; tens of MB are usual."""

PART_SUFFIX = '.part'
"""How the name of an unfinished file ends; it begins with a dot. Nothing reads such a file."""

# Of a golden file: zipfile allocates half a kilobyte for each entry before its size is known.
_MOST_ENTRIES = 1024
_MOST_NAMED_BYTES = 4 << 20
_ENTRY_MARK = b'PK\x01\x02'
# The length of an entry's name has 16 bits; '.npy' ends it.
_LONGEST_NAME = (1 << 16) - 1 - len('.npy')
_FREE_SOME = 'Free memory, or use a smaller model.'


def expand_home(path: Path | str) -> Path:
    """
    Return a path with ``~`` or ``~user`` at its beginning replaced by that user's home directory.

    :raises ModelBundleError: there is no such user, or no home directory is known.
    """
    try:
        return Path(path).expanduser()
    except (RuntimeError, ValueError) as error:
        raise ModelBundleError(f'{str(path)!r}: {error}', remedy='Write the whole path.') from error


def file_sha256(path: Path) -> str:
    """
    Return the hex SHA-256 of a file, read once in pieces of 1 MiB.

    :raises ModelBundleError: the file is missing or cannot be read.
    """
    return file_digest(path)[0]


def file_digest(path: Path, sought: bytes = b'') -> tuple[str, bool]:
    """
    Return the hex SHA-256 of a file, read once in pieces of 1 MiB, and whether ``sought`` lies in it.

    :raises ModelBundleError: the file is missing or cannot be read.
    """
    digest, tail, found = hashlib.sha256(), b'', False
    with open_regular(path) as file:
        for chunk in read_pieces(path, file):
            digest.update(chunk)
            found = found or sought in tail + chunk
            tail = chunk[1 - len(sought) :] if len(sought) > 1 else b''
    return digest.hexdigest(), found


def read_pieces(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """
    Yield the bytes that an open file had when this began, in pieces of 1 MiB; notes progress (:mod:`stalled_reads`).

    :raises ModelBundleError: it became shorter or longer meanwhile.
    """
    size = left = os.fstat(file.fileno()).st_size
    # One byte more than the file's size shows that it grows.
    while chunk := file.read(min(left + 1, _CHUNK_BYTES)):
        left -= len(chunk)
        if left < 0:
            break
        note_progress()
        yield chunk
    if left:
        change = 'longer' if left < 0 else 'shorter'
        raise ModelBundleError(
            f'{path}: became {change} than its {size} bytes while it was read.',
            remedy='Try again when the program that writes it has ended.',
        )


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """
    Open a regular file for reading, without waiting for anything else that may lie there.

    :raises ModelBundleError: the file is missing, no regular file, or cannot be read; also while it is read.
    """
    try:
        # O_NONBLOCK: a FIFO named as a model would block its reader forever.
        with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ModelBundleError(f'{path}: is not a regular file.', remedy='Correct the path.')
            yield file
    except PermissionError as error:
        raise ModelBundleError(f'{path}: {error.strerror}.', remedy='Let the user of the node read it.') from error
    except OSError as error:
        raise ModelBundleError(f'{path}: {error.strerror}.', remedy='Copy it again, or correct the path.') from error
    except ValueError as error:
        raise ModelBundleError(f'{str(path)!r}: {error}.', remedy='Correct the path.') from error


def file_size(path: Path) -> int:
    """
    Return the bytes of a regular file.

    :raises ModelBundleError: the file is missing, unreadable, a directory or a device.
    """
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def read_file(path: Path, *, limit: int = _LIMIT_BYTES) -> bytes:
    """
    Return the bytes of a regular file.

    :param limit: bytes that it may have at most.
    :raises ModelBundleError: the file is missing, unreadable, a directory or a device, or too large.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ModelBundleError(f'{path}: has {size} bytes, more than {limit}.', remedy='Copy it again.')
        require_memory(path, size, remedy=_FREE_SOME)
        try:
            # BytesIO returns its own memory; joined pieces would be in memory twice.
            content = io.BytesIO()
            for chunk in read_pieces(path, file):
                content.write(chunk)
            return content.getvalue()
        except MemoryError as error:
            raise ModelBundleError(f'{path}: no memory for its {size} bytes.', remedy=_FREE_SOME) from error


@dataclass(frozen=True, slots=True)
class BundleFile:
    """
    Name one file of a bundle and the digest its bytes must have.

    :param path: absolute.
    :param sha256: 64 lower-case hex digits.
    """

    path: Path
    sha256: str

    def __post_init__(self) -> None:
        require_hex('sha256', self.sha256)

    def verify(self) -> None:
        """
        Read the whole file and check its digest (about 1 s per GB).

        :raises ModelBundleError: the file is missing, unreadable, too large, or not the one the bundle names.
        """
        if (size := file_size(self.path)) > _LIMIT_BYTES:
            raise ModelBundleError(
                f'{self.path}: has {size} bytes, more than {_LIMIT_BYTES}.', remedy='Copy the bundle again.'
            )
        _check_digest(self.path, self.sha256, file_sha256(self.path))

    def read_verified(self, *, limit: int = _LIMIT_BYTES) -> bytes:
        """
        Return the file's bytes, which are the very bytes whose digest was checked.

        :param limit: bytes that it may have at most.
        :raises ModelBundleError: as :meth:`verify`, or it is too large.
        """
        content = read_file(self.path, limit=limit)
        _check_digest(self.path, self.sha256, hashlib.sha256(content).hexdigest())
        return content


def read_npz(file: BundleFile, *, limit: int = GOLDEN_LIMIT_BYTES) -> dict[str, NDArray]:
    """
    Return the arrays of an ``.npz``, read from the bytes whose digest was checked.

    :param limit: bytes that the file may have, and that its arrays may unpack to: a few kilobytes of zip can hold
        gigabytes of zeros.
    :raises ModelBundleError: the file is missing, not the one named, too large, or holds anything but plain arrays.
    """
    content = file.read_verified(limit=limit)
    try:
        if content.count(_ENTRY_MARK) > _MOST_ENTRIES:
            raise ValueError(f'it has more than {_MOST_ENTRIES} entries')
        # Lengths of name, extra field and comment; zipfile takes four times as much before any of it is checked.
        texts = [struct.unpack_from('<3H', content, mark.start() + 28) for mark in re.finditer(_ENTRY_MARK, content)]
        if (named := sum(map(sum, texts))) > _MOST_NAMED_BYTES:
            raise ValueError(f'its entries have {named} bytes of names and comments, more than {_MOST_NAMED_BYTES}')
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked > limit:
                raise ValueError(f'it unpacks to {unpacked} bytes, more than {limit}')
            require_memory(file.path, unpacked, remedy=_FREE_SOME)
            if len({entry.filename for entry in entries}) != len(entries):
                raise ValueError('it has two entries of one name')
            return {entry.filename.removesuffix('.npy'): _array(archive, entry) for entry in entries}
    except ModelBundleError:
        raise
    except Exception as error:  # what NumPy, zipfile and zlib raise for a damaged file is theirs to choose
        raise ModelBundleError(
            f'{file.path}: no .npz of plain arrays: {error}.', remedy='Write the golden files again.'
        ) from error


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NDArray:
    """Return the array of one entry; NumPy itself would allocate whatever shape the entry names."""
    with archive.open(entry) as stream:
        try:
            version = np.lib.format.read_magic(stream)
        except ValueError as error:
            raise ValueError(f'{entry.filename!r} is not an array: {error}') from error
        if version != (1, 0):
            raise ValueError(f'{entry.filename!r} is not a plain array')
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        size, left = math.prod(shape) * dtype.itemsize, entry.file_size - stream.tell()
        if dtype.hasobject or min(shape, default=0) < 0 or size != left:
            raise ValueError(f'{entry.filename!r} says {dtype} {shape} and has {left} bytes')
    with archive.open(entry) as stream:
        array: NDArray = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def npz_bytes(arrays: Mapping[str, NDArray]) -> bytes:
    """
    Return arrays as an ``.npz``; the same arrays give the same bytes.

    :raises ModelBundleError: a name is longer than a zip archive can hold.
    """
    # Not numpy.savez: it takes names as keywords, so that some tensor names would be its own options.
    content = io.BytesIO()
    with zipfile.ZipFile(content, 'w') as archive:
        for name, array in arrays.items():
            if len(name.encode()) > _LONGEST_NAME:
                raise ModelBundleError(
                    f'the name of the tensor {name[:40]}… has {len(name.encode())} bytes, more than {_LONGEST_NAME}.',
                    remedy='Export the model with shorter names.',
                )
            entry = io.BytesIO()
            np.lib.format.write_array(entry, np.asanyarray(array), allow_pickle=False)
            # Flat pictures and sparse answers shrink to little, at the fastest level.
            archive.writestr(
                zipfile.ZipInfo(f'{name}.npy'), entry.getvalue(), compress_type=zipfile.ZIP_DEFLATED, compresslevel=1
            )
    return content.getvalue()


@contextmanager
def unfinished_file(directory: Path, name: str, content: bytes) -> Iterator[str]:
    """
    Write a file to the disk under another name, yield its path, and remove it unless it was renamed.

    :raises OSError: it cannot be written.
    """
    handle, path = tempfile.mkstemp(dir=directory, prefix=f'.{name[:128]}.', suffix=PART_SUFFIX)
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        yield path
    finally:
        if os.path.exists(path):
            os.unlink(path)


def write_atomically(path: Path, content: bytes) -> None:
    """
    Replace a file as a whole and sync it, making its directory where needed.

    :raises ModelBundleError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_file(path.parent, path.name, content) as part:
            os.replace(part, path)
    except OSError as error:
        raise ModelBundleError(f'{path}: cannot be written: {error.strerror}.') from error


def sync_directory(directory: Path) -> None:
    """
    Bring the names in a directory onto the disk.

    :raises OSError: it cannot be opened or synced.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_hex(key: str, value: str) -> None:
    """Raise ModelBundleError naming ``key`` unless ``value`` is spelled as a hex SHA-256."""
    require(bool(_HEX.fullmatch(value)), key, f'{value!r} is not 64 lower-case hex digits.')


def _check_digest(path: Path, expected: str, found: str) -> None:
    if found != expected:
        raise ModelBundleError(
            f'{path}: SHA-256 {found} is not the {expected} that the bundle names.', remedy='Copy the bundle again.'
        )
