"""Immutable Arrow files that are named by the digest of their bytes.

Any number of processes may add shards to one folder. A shard never changes: its name is its checksum. A shard in an
object store is read through a local copy of the same name.
"""

import hashlib
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from adpa.data.cache.files import find_hidden, list_folder, write_file
from adpa.data.cache.locations import Location, copies_folder, is_local
from adpa.errors import CacheError, DamagedFileError

Result = TypeVar("Result")

SMALL_FILE = 1 << 16
LISTINGS = 100


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
    return write_serialized(folder, prefix, serialize(table, {"replacement": uuid.uuid4().hex}))


def write_serialized(folder: Location, prefix: str, payload: pa.Buffer) -> Location:
    """Writes what ``serialize`` gave, as ``write_shard`` does."""
    path = folder / f"{prefix}-{_digest(payload)}.arrow"
    write_file(path, payload)
    return path


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
    path = _local_file(path)
    payload = map_file(path)
    _check_digest(path, payload)
    # Arrow trusts its offsets: those of a hostile file would end the process later.
    return _open_table(path, payload, whole=True)


def check_shard(path: Location) -> None:
    """Checks the bytes of a shard in an object store, of which ``read_shard`` may have a copy from better days.

    Raises:
        DamagedFileError: they are not those that were written.
    """
    if not is_local(path):
        _check_digest(path, path.read_bytes())


def peek_shard(path: Location) -> pa.Table:
    """Opens a shard without reading all of its bytes: for counting its rows and looking at their keys.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it is no table.
    """
    payload = map_file(_local_file(path))
    return _open_table(path, payload, whole=False)


def keys_of(path: Location, table: pa.Table) -> pa.ChunkedArray:
    """The keys of a shard's rows, 16 bytes each.

    Raises:
        DamagedFileError: its table has no such column.
    """
    places = table.schema.get_all_field_indices("key")
    if len(places) != 1 or table.schema.field(places[0]).type != pa.binary(16) or table["key"].null_count:
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
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # to read a pipe is to wait for ever
        raise damaged(path, "no regular file")
    if status.st_size < SMALL_FILE:
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


def _local_file(path: Location) -> Path:
    """A local shard itself, or the local copy of one in an object store, downloaded once."""
    if is_local(path):
        return path
    copy = copies_folder() / path.name
    if not copy.exists():
        payload = path.read_bytes()
        _check_digest(path, payload)
        write_file(copy, payload)
    return copy


def _check_digest(path: Location, payload: bytes | pa.Buffer) -> None:
    digest, expected = _digest(payload), path.stem.rpartition("-")[2]
    if digest != expected:
        raise damaged(path, f"the digest of its bytes is {digest}; expected {expected}")


def _digest(payload: bytes | pa.Buffer) -> str:
    return hashlib.blake2b(payload, digest_size=16).hexdigest()
