"""Find the storage files of a bag, and read what its metadata.yaml says of them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from gps_denied_c7.ros.bag import sqlite_file
from gps_denied_c7.ros.bag.storage import (
    LZ4_MAGIC,
    ZSTD_MAGIC,
    BagError,
    OfferedQos,
    Storage,
    profiles_of,
    read_yaml,
    reason,
    whole,
)

__all__ = ['BagFiles', 'Metadata', 'find_files', 'open_storage']

_logger = logging.getLogger(__name__)

_STORAGE_SUFFIXES = ('.mcap', '.db3')
_COMPRESSED_SUFFIXES = ('.zstd', '.zst', '.lz4')
_ROS_1_MAGIC = b'#ROSBAG V'
_NAME_A_BAG = 'Name a bag directory, or an .mcap or .db3 file.'


@dataclass(slots=True)
class Metadata:
    """
    Hold what a metadata.yaml says, of whichever version from 1 to 9; the storage files take precedence.

    :param files: names of the storage files.
    :param types: topic → its types.
    :param counts: topic → messages.
    :param qos: topic → offered profiles, one per publisher.
    :param hashes: topic → type hash, where stated.
    """

    files: list[str] = field(default_factory=list)
    types: dict[str, set[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    qos: dict[str, tuple[OfferedQos, ...]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class BagFiles:
    """
    Name what to open.

    :param files: storage files that are there.
    :param metadata: None where there is none, or none that can be read.
    :param missing: sentences about files that are named and not there.
    :param notes: sentences about what is odd and loses nothing.
    """

    files: list[Path]
    metadata: Metadata | None = None
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_files(path: Path) -> BagFiles:
    """
    Return the storage files of a bag.

    :param path: a directory, its metadata.yaml, or one storage file.
    :raises BagError: there is no bag.
    """
    if not path.exists():
        raise BagError(f'{path} does not exist.', remedy=_NAME_A_BAG)
    if path.name == 'metadata.yaml':
        path = path.parent
    if path.is_dir():
        return _in_directory(path)
    if not path.is_file():
        raise BagError(f'{path} is not a bag: it is neither a file nor a directory.', remedy=_NAME_A_BAG)
    found = BagFiles([path])
    beside = path.parent / 'metadata.yaml'
    if beside.exists():
        metadata = _read_metadata(beside, BagFiles([]))
        # Its counts are those of all files together.
        if metadata and [PurePath(name).name for name in metadata.files] == [path.name]:
            found.metadata = metadata
    return found


def _in_directory(path: Path) -> BagFiles:
    present = {
        file.name: file
        for file in sorted(path.iterdir())
        if PurePath(_without_compression(file.name)).suffix in _STORAGE_SUFFIXES and file.is_file()
    }
    # rosbag2 leaves a decompressed copy beside a file that it has played.
    plain = {name: file for name, file in present.items() if name == _without_compression(name)}
    present = {**{name: file for name, file in present.items() if _without_compression(name) not in plain}, **plain}
    found = BagFiles([])
    if not (path / 'metadata.yaml').exists():
        found.files = _without_metadata(path, list(present.values()))
        names = ', '.join(file.name for file in found.files)
        found.notes.append(f'{path} has no metadata.yaml; read without it: {names}.')
        return found
    found.metadata = _read_metadata(path / 'metadata.yaml', found)
    if found.metadata is None or not found.metadata.files:
        found.files = _without_metadata(path, list(present.values()))
        if found.metadata:
            found.notes.append('metadata.yaml names no storage file; the storage files beside it are played.')
        return found
    gone = _take_named(path, found, found.metadata.files)
    used = {_without_compression(os.path.realpath(file)) for file in found.files}
    others = [file for file in present.values() if _without_compression(os.path.realpath(file)) not in used]
    _account_for_others(path, found, gone, others)
    if not found.files:
        raise BagError(
            f'{path} has none of its storage files; missing: {", ".join(gone)}.',
            remedy='Copy the bag again, with all of its files.',
        )
    return found


def _take_named(path: Path, found: BagFiles, names: list[str]) -> list[str]:
    """
    Take each file that the metadata names, once, and return the names of those that are gone.

    A name means the file that it leads to within the bag's directory; else the one of that name beside metadata.yaml,
    since a name may begin with the place where the bag was recorded; else one outside the directory, which is noted.
    """
    where = os.path.abspath(path)
    within = {
        name: path / name
        for name in names
        if PurePath(os.path.normpath(os.path.join(where, name))).is_relative_to(where)
    }
    beside = {name: path / PurePath(name).name for name in names}
    outside = {name: path / name for name in names}
    files: dict[str, Path] = {}
    for candidates in (within, beside, outside):
        for name, file in candidates.items():
            # Not Path.is_file, which raises for a name that is too long.
            if name in files or not os.path.isfile(file):
                continue
            # Two names in different folders must not both stand for one file beside the metadata.
            if candidates is not beside or os.path.realpath(file) not in map(os.path.realpath, files.values()):
                files[name] = file
            if candidates is outside:
                found.notes.append(f'metadata.yaml names {file}, which is outside {path}; it is played.')
    found.files = list({os.path.realpath(files[name]): files[name] for name in names if name in files}.values())
    if len(found.files) < len(files):
        found.notes.append('metadata.yaml names a file more than once; it is played once.')
    return [name for name in dict.fromkeys(names) if name not in files]


def _account_for_others(path: Path, found: BagFiles, gone: list[str], others: list[Path]) -> None:
    """Replace missing files that the metadata names by files that it does not name, and note it."""
    names, there = ', '.join(gone), ', '.join(file.name for file in others)
    if gone and others:
        found.files += others
        found.notes.append(f'metadata.yaml names files that are missing: {names}; played instead: {there}.')
    if len(gone) > len(others):
        found.missing.append(f'{names} is missing: metadata.yaml names it and it is not in {path}.')
    if others and not gone:
        found.missing.append(f'{there} is not played: it is in {path} and metadata.yaml does not name it.')


def _without_compression(name: str) -> str:
    return str(PurePath(name).with_suffix('')) if PurePath(name).suffix in _COMPRESSED_SUFFIXES else name


def _without_metadata(path: Path, files: list[Path]) -> list[Path]:
    """Return the only storage file, or those that one recording was split into."""
    if len(files) == 1:
        return files
    if not files:
        raise BagError(
            f'{path} is not a bag: no metadata.yaml and no storage file in it.', remedy='Name a bag directory.'
        )
    parts = {re.sub(r'_\d+(?=\.)', '', _without_compression(file.name), count=1) for file in files}
    if len(parts) == 1 and all(re.search(r'_\d+\.', file.name) for file in files):
        return sorted(files, key=lambda file: [int(number) for number in re.findall(r'_(\d+)\.', file.name)])
    raise BagError(
        f'{path} is not a bag: no metadata.yaml and {len(files)} storage files in it that do not belong together.',
        remedy=f'Name one of them: {", ".join(file.name for file in files)}.',
    )


# -- metadata.yaml


def _read_metadata(path: Path, found: BagFiles) -> Metadata | None:
    """Return what it says; None, and a note, where it cannot be read."""
    try:
        if not path.is_file():
            raise ValueError('it is not a file')
        with path.open('rb') as stream:
            information = read_yaml(stream)['rosbag2_bagfile_information']
        return _metadata_from(information)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        found.notes.append(f'metadata.yaml cannot be read ({reason(error)}); the storage files are read without it.')
        return None


def _metadata_from(information: dict[str, Any]) -> Metadata:
    metadata = Metadata(files=[name for name in information['relative_file_paths'] if name and isinstance(name, str)])
    for entry in information.get('topics_with_message_count') or ():
        topic = entry['topic_metadata']
        name = topic['name']
        if not isinstance(name, str):
            raise ValueError('the name of a topic is not text')
        # Not formatted unless it is text: a few aliases in each other are gigabytes once written out.
        msgtype, type_hash = (topic.get(key) for key in ('type', 'type_description_hash'))
        metadata.types.setdefault(name, set()).add(msgtype[:200] if isinstance(msgtype, str) else 'no type')
        metadata.counts[name] = metadata.counts.get(name, 0) + whole(entry.get('message_count'))
        metadata.qos[name] = (*metadata.qos.get(name, ()), *profiles_of(topic.get('offered_qos_profiles')))
        if type_hash and isinstance(type_hash, str):
            metadata.hashes[name] = type_hash
    return metadata


# -- storage files


def open_storage(path: Path, scratch: Callable[[], Path]) -> tuple[Storage, list[str]]:
    """
    Open a storage file by what it is, whatever its name, and return with it what was lost in decompressing it.

    :param scratch: makes an empty directory for temporary copies.
    :raises BagError: it is not a storage file, cannot be read, or a package for that is not installed.
    """
    try:
        import lz4.frame  # noqa: F401
        import zstandard  # noqa: F401

        from gps_denied_c7.ros.bag import mcap_file
    except ImportError as error:
        raise BagError(
            f'c7_replay needs a Python package that is not installed: {reason(error)}.',
            remedy='Install what it needs: pip install -r requirements/runtime.txt.',
        ) from error
    try:
        with path.open('rb') as file:
            magic = file.read(16)
        if not magic:
            raise BagError(f'{path} is damaged: it is empty.', remedy='Record it again.')
        if magic.startswith(_ROS_1_MAGIC):
            raise BagError(
                f'{path} is a bag of ROS 1.',
                remedy=f'Convert it: pip install rosbags; rosbags-convert --src {path} --dst DIRECTORY.',
            )
        if magic.startswith((ZSTD_MAGIC, LZ4_MAGIC)):
            plain, lost = _decompress(path, scratch(), magic)
            try:
                storage, more = open_storage(plain, scratch)
            except BagError as error:
                # The copy is gone when the user reads of it.
                raise BagError(error.message.replace(str(plain), str(path)), remedy=error.remedy) from error
            return storage, [*lost, *more]
        if magic == sqlite_file.MAGIC:
            return sqlite_file.SqliteFile(path, scratch), []
        if magic.startswith(mcap_file.MAGIC) or PurePath(path.name).suffix == '.mcap':
            return mcap_file.McapFile(path), []
    except PermissionError as error:
        raise BagError(f'{path} may not be read: {reason(error)}.', remedy='Change its permissions.') from error
    except OSError as error:
        raise BagError(f'{path} cannot be read: {reason(error)}.', remedy='Take another copy of it.') from error
    except BagError:
        raise
    except Exception as error:
        # Damage shows as the first error that the parser meets: struct, zstd, SQLite or plain index errors.
        raise BagError(f'{path} is damaged: {reason(error)}.', remedy='Take another copy of it.') from error
    if PurePath(path.name).suffix == '.db3':
        raise BagError(f'{path} is damaged: it does not begin as an SQLite file.', remedy='Take another copy of it.')
    raise BagError(f'{path} is not a bag.', remedy=_NAME_A_BAG)


def _decompress(path: Path, scratch: Path, magic: bytes) -> tuple[Path, list[str]]:
    """Decompress a file that was recorded with file compression, as far as it goes."""
    import lz4.frame
    import zstandard

    plain, lost = scratch / (_without_compression(path.name) or 'storage'), []
    _logger.info('decompressing %s to %s', path, scratch)
    try:
        with path.open('rb') as source, plain.open('wb') as target:
            if magic.startswith(LZ4_MAGIC):
                reader = lz4.frame.open(source)
            else:
                reader = zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True)
            while True:
                try:
                    data = reader.read(2**20)
                except (zstandard.ZstdError, RuntimeError, EOFError) as error:
                    lost.append(f'{path.name} is damaged ({reason(error)}); what comes after is missing.')
                    break
                if not data:
                    break
                target.write(data)
    except OSError as error:
        raise BagError(
            f'{path} cannot be decompressed to {scratch.parent}: {reason(error)}.',
            remedy='Set TMPDIR to a directory with more room.',
        ) from error
    return plain, lost

