"""Immutable Arrow files that are named by the digest of their bytes.

A shard is written under a temporary name, synced and renamed, so that a reader sees it whole or not at all, and any
number of processes may add shards to one folder. It is never changed afterwards: its name is its checksum. In an object
store an object appears when it is whole; it is read through a local copy, which needs no other name.
"""

import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from upath import UPath

from adpa.data.cache.locations import Location, copies_folder
from adpa.errors import CacheError, DamagedFileError

Result = TypeVar("Result")

SMALL_FILE = 1 << 16
LISTINGS = 100
HIDDEN = r"\.[^/]+\.[0-9a-f]{32}"  # what this module names what readers must not see


def write_file(path: Location, payload: bytes | pa.Buffer) -> None:
    """Writes a whole file at once: after a crash it is there complete, or it is not there."""
    if not isinstance(path, Path):
        path.fs.pipe_file(path.path, bytes(memoryview(payload)))
        return
    _make_folder(path.parent)
    temporary = _hidden(path)
    try:
        _write(temporary, memoryview(payload))
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_folder(path: Location, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files, unless another process was first.

    A local one is there whole or not at all. In an object store the files appear in the order given: the last one says
    that the others are there.
    """
    if not isinstance(path, Path):
        for name, payload in files.items():
            write_file(path / name, payload)
        return
    temporary = _hidden(path)
    try:
        for name, payload in files.items():
            write_file(temporary / name, payload)
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and path.is_dir():  # another process was first
            return
        raise
    _sync(path.parent)


def remove_file(path: Location) -> None:
    """Removes a file; one that another process has removed is as good."""
    with suppress(FileNotFoundError):
        path.unlink()


def hide(path: Path) -> Path:
    """Gives a file or folder a name that readers ignore, at once.

    Raises:
        FileNotFoundError: there is none.
    """
    hidden = _hidden(path)
    os.rename(path, hidden)
    return hidden


def find_hidden(path: Path) -> Path:
    """The path that a hidden file or folder had, or was to get."""
    assert re.fullmatch(HIDDEN, path.name)
    return path.with_name(path.name[1:].rpartition(".")[0])


def is_whole(path: Path) -> bool:
    """Whether the bytes of a hidden shard are those that its name without the hiding says."""
    return _digest(map_file(path)) == find_hidden(path).stem.rpartition("-")[2]


def serialize(table: pa.Table, metadata: Mapping[str, str] | None = None) -> pa.Buffer:
    """A table as the bytes of an Arrow IPC file of one record batch, which may have metadata of its own."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch, custom_metadata=metadata)
    return sink.getvalue()


def write_shard(folder: Location, prefix: str, table: pa.Table) -> Location:
    """Writes ``folder/prefix-<digest of the file's bytes>.arrow``."""
    return write_serialized(folder, prefix, serialize(table))


def write_replacement(folder: Location, prefix: str, table: pa.Table) -> Location:
    """Writes a shard as ``write_shard`` does, of rows that other shards have, which are to go.

    Its bytes, and so its name, are nobody else's: who has listed the folder before, and removes what was there, cannot
    remove this one.
    """
    return write_serialized(folder, prefix, serialize_replacement(table))


def serialize_replacement(table: pa.Table) -> pa.Buffer:
    """The bytes of a shard that ``write_replacement`` writes."""
    return serialize(table, {"replacement": uuid.uuid4().hex})


def write_serialized(folder: Location, prefix: str, payload: pa.Buffer) -> Location:
    """Writes what ``serialize`` gave, as ``write_shard`` does."""
    path = folder / f"{prefix}-{_digest(payload)}.arrow"
    write_file(path, payload)
    return path


def list_folder(folder: Location) -> list[Location]:
    """What lies in a folder, in the order of the names; none where there is no folder.

    Hidden files, which are unfinished or another program's, are left out.
    """
    try:
        names = os.listdir(folder) if isinstance(folder, Path) else _list_objects(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if name and not name.startswith(".")]


def list_shards(folder: Location, prefix: str = "") -> list[Location]:
    """The shards of a folder, all or those of a prefix, in the order of their names; none where there is no folder."""
    beginning = f"{prefix}-" if prefix else ""
    return [path for path in list_folder(folder) if path.name.startswith(beginning) and path.name.endswith(".arrow")]


def read_shard(path: Location) -> pa.Table:
    """Memory-maps a shard and checks its bytes against its name, and their form.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: they differ, or are no table.
    """
    if not isinstance(path, Path):
        path = _copy_here(path)
    payload = map_file(path)
    _check_digest(path, payload)
    # Arrow trusts its offsets: those of a hostile file would end the process later.
    return _open_table(path, payload, whole=True)


def check_shard(path: Location) -> None:
    """Checks the bytes of a shard in an object store, of which ``read_shard`` may have a copy from better days.

    Raises:
        DamagedFileError: they are not those that were written.
    """
    if not isinstance(path, Path):
        _check_digest(path, path.read_bytes())


def peek_shard(path: Location) -> pa.Table:
    """Opens a shard without reading all of its bytes: for counting its rows and looking at their keys.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it is no table.
    """
    payload = map_file(path if isinstance(path, Path) else _copy_here(path))
    return _open_table(path, payload, whole=False)


def keys_of(path: Location, table: pa.Table) -> pa.ChunkedArray:
    """The keys of a shard's rows, 16 bytes each.

    Raises:
        DamagedFileError: its table has no such column.
    """
    found = table.schema.get_all_field_indices("key")
    if len(found) != 1 or table.schema.field(found[0]).type != pa.binary(16) or table["key"].null_count:
        raise damaged(path, "it has no column of keys")
    return table["key"]


def peek_keys(path: Location) -> pa.ChunkedArray:
    """The keys of a shard's rows, read as ``peek_shard`` does.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it is no table, or has no keys.
    """
    return keys_of(path, peek_shard(path))


def open_shards(folder: Location, prefix: str = "") -> Iterator[tuple[Location, pa.Table]]:
    """Reads every shard of a folder, while other processes add some, and replace some by others with the same rows.

    A folder is listed until that brings nothing new. A listed file that has vanished is not missed: what replaced it
    was there before it went, and the next listing has it.

    Raises:
        CacheError: a file is listed again and again, but is not there: its link leads nowhere.
        DamagedFileError: a file is damaged.
    """
    read: set[str] = set()
    for _ in range(LISTINGS):
        new = [path for path in list_shards(folder, prefix) if path.name not in read]
        if not new:
            return
        for path in new:
            try:
                table = read_shard(path)
            except FileNotFoundError:
                continue
            read.add(path.name)
            yield path, table
    vanished = [path for path in list_shards(folder, prefix) if path.name not in read and not path.exists()]
    if vanished:
        raise CacheError(f"{vanished[0]}: listed, but not there", "remove the link, or restore what it leads to")


def list_again(folder: Location, work: Callable[[], Result]) -> Result:
    """What ``work`` gives, which lists a folder and reads what is there; begun again when a listed file has vanished.

    Raises:
        CacheError: that happens again and again.
    """
    for _ in range(LISTINGS):
        try:
            return work()
        except FileNotFoundError as error:  # what replaced it was there before it went
            vanished = error
    raise CacheError(
        f"{folder}: a listed file is not there: {vanished}", "remove the link, or restore what it leads to"
    ) from vanished


def read_shards(folder: Location, prefix: str) -> Iterator[pa.Table]:
    """The tables of ``open_shards``."""
    return (table for _, table in open_shards(folder, prefix))


def join_keys(columns: Iterable[pa.ChunkedArray]) -> pa.ChunkedArray:
    """The key columns of several shards as one."""
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.binary(16))


def map_file(path: Path) -> pa.Buffer:
    """A file's bytes: mapped into memory, or read where that is cheaper (a process may map some 65,000 files)."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # to read a pipe is to wait for ever
        raise damaged(path, "no regular file")
    if found.st_size < SMALL_FILE:
        return pa.py_buffer(path.read_bytes())
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def damaged(path: Location, problem: str) -> DamagedFileError:
    """The error of a file that is not what was written, and can be made again."""
    return DamagedFileError(f"{path}: damaged: {problem}", "delete it and run the same adpa precompute again")


def _open_table(path: Location, payload: pa.Buffer, whole: bool) -> pa.Table:
    """The table of a shard, of which the form of everything is checked, or only that of its description."""
    try:
        table = pa.ipc.open_file(payload).read_all()
        table.validate(full=whole)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"no Arrow table: {' '.join(str(error).split())}") from error
    return table


def _list_objects(folder: UPath) -> list[str]:
    folder.fs.invalidate_cache()  # other processes write, too
    return [name.removeprefix(folder.path).strip("/") for name in folder.fs.ls(folder.path, detail=False)]


def _copy_here(path: Location) -> Path:
    """The local copy of a shard in an object store, downloaded once."""
    copy = copies_folder() / path.name
    if not copy.exists():
        payload = path.read_bytes()
        _check_digest(path, payload)
        write_file(copy, payload)
    return copy


def _check_digest(path: Location, payload: bytes | pa.Buffer) -> None:
    found, expected = _digest(payload), path.stem.rpartition("-")[2]
    if found != expected:
        raise damaged(path, f"the digest of its bytes is {found}; expected {expected}")


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _write(path: Path, payload: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        while payload:
            payload = payload[os.write(descriptor, payload) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(payload: bytes | pa.Buffer) -> str:
    return hashlib.blake2b(payload, digest_size=16).hexdigest()
