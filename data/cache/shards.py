"""Immutable Arrow files, each named by the digest of its bytes.

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
    """Whether the bytes of a hidden shard have the digest in its visible name."""
    return _digest(map_file(path)) == find_hidden(path).stem.rpartition("-")[2]


def serialize(table: pa.Table, metadata: Mapping[str, str] | None = None) -> pa.Buffer:
    """The bytes of an Arrow IPC file with the table as one record batch, which carries ``metadata``."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch, custom_metadata=metadata)
    return sink.getvalue()


def write_shard(folder: Location, prefix: str, table: pa.Table) -> Location:
    """Writes ``folder/prefix-<digest of the file's bytes>.arrow``."""
    return write_serialized(folder, prefix, serialize(table))


def write_replacement(folder: Location, prefix: str, table: pa.Table) -> Location:
    """Writes a shard whose rows come from other shards that will be removed.

    Its bytes, and so its name, are unique. So a process that listed the folder earlier, and removes the files of its
    listing, cannot remove this shard.
    """
    return write_serialized(folder, prefix, serialize_replacement(table))


def serialize_replacement(table: pa.Table) -> pa.Buffer:
    """The bytes of a shard that ``write_replacement`` writes."""
    return serialize(table, {"replacement": uuid.uuid4().hex})


def write_serialized(folder: Location, prefix: str, payload: pa.Buffer) -> Location:
    """Writes the bytes from ``serialize`` as ``write_shard`` does."""
    path = folder / f"{prefix}-{_digest(payload)}.arrow"
    write_file(path, payload)
    return path


def list_shards(folder: Location, prefix: str = "") -> list[Location]:
    """The shards of a folder, all or those with a prefix, sorted by name; none if the folder does not exist."""
    beginning = f"{prefix}-" if prefix else ""
    return [path for path in list_folder(folder) if path.name.startswith(beginning) and path.name.endswith(".arrow")]


def read_shard(path: Location) -> pa.Table:
    """Memory-maps a shard, and checks its digest and its Arrow structure.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedFileError: the digest differs from the name, or the bytes are not a table.
    """
    path = _local_file(path)
    payload = map_file(path)
    _check_digest(path, payload)
    # Arrow trusts the offsets in a file: hostile ones would crash the process later.
    return _open_table(path, payload, whole=True)


def check_shard(path: Location) -> None:
    """Checks the bytes of a shard in an object store itself: ``read_shard`` may read an older local copy.

    Raises:
        DamagedFileError: the digest differs from the name.
    """
    if not is_local(path):
        _check_digest(path, path.read_bytes())


def peek_shard(path: Location) -> pa.Table:
    """Opens a shard without reading all of its bytes, to count its rows or read their keys.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedFileError: it is not a table.
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
        FileNotFoundError: it does not exist.
        DamagedFileError: it is not a table, or has no keys.
    """
    return keys_of(path, peek_shard(path))


def open_shards(folder: Location, prefix: str = "") -> Iterator[tuple[Location, pa.Table]]:
    """Reads every shard of a folder, while other processes add shards and replace some by others with the same rows.

    It lists the folder until a listing has nothing new. A listed file may vanish: its replacement was written before,
    so that the next listing has it.

    Raises:
        CacheError: a file is in every listing but does not exist: it is a broken link.
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
        raise CacheError(f"{vanished[0]}: listed, but missing", "remove the link, or restore what it leads to")


def list_again(folder: Location, work: Callable[[], Result]) -> Result:
    """Calls ``work``, which lists a folder and reads its files, until no listed file has vanished; returns its result.

    Raises:
        CacheError: a file vanishes every time.
    """
    for _ in range(LISTINGS):
        try:
            return work()
        except FileNotFoundError as error:  # its replacement was written before it was removed
            vanished = error
    raise CacheError(
        f"{folder}: a listed file is missing: {vanished}", "remove the link, or restore what it leads to"
    ) from vanished


def read_shards(folder: Location, prefix: str) -> Iterator[pa.Table]:
    """The tables of ``open_shards``."""
    return (table for _, table in open_shards(folder, prefix))


def join_keys(columns: Iterable[pa.ChunkedArray]) -> pa.ChunkedArray:
    """The key columns of several shards as one."""
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.binary(16))


def map_file(path: Path) -> pa.Buffer:
    """A file's bytes: mapped into memory, or read if it is small (a process may map some 65,000 files)."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise damaged(path, "not a regular file")
    if status.st_size < SMALL_FILE:
        return pa.py_buffer(path.read_bytes())
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def damaged(path: Location, problem: str) -> DamagedFileError:
    """The error for a file that differs from what was written, and that precompute can make again."""
    return DamagedFileError(f"{path}: damaged: {problem}", "delete it and run the same adpa precompute again")


def _open_table(path: Location, payload: pa.Buffer, whole: bool) -> pa.Table:
    """The table of a shard; with ``whole`` its data is validated, otherwise only its description."""
    try:
        table = pa.ipc.open_file(payload).read_all()
        table.validate(full=whole)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"not an Arrow table: {' '.join(str(error).split())}") from error
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
