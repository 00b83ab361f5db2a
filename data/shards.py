"""Immutable Arrow files that are named by the digest of their bytes.

A shard is written under a temporary name, synced and renamed, so that a reader sees it whole or not at all, and any
number of processes may add shards to one folder. It is never changed afterwards: its name is its checksum.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from adpa.errors import DamagedFileError

SMALL_FILE = 1 << 16


def write_file(path: Path, payload: bytes | pa.Buffer) -> None:
    """Writes a whole file at once: after a crash it is there complete, or it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_file(path: Path) -> None:
    """Removes a file; one that another process has removed is as good."""
    path.unlink(missing_ok=True)


def serialize(table: pa.Table) -> pa.Buffer:
    """A table as the bytes of an Arrow IPC file of one record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def write_shard(folder: Path, prefix: str, table: pa.Table) -> Path:
    """Writes ``folder/prefix-<digest of the file's bytes>.arrow``."""
    payload = serialize(table)
    path = folder / f"{prefix}-{_digest(payload)}.arrow"
    write_file(path, payload)
    return path


def list_shards(folder: Path, prefix: str) -> list[Path]:
    """The shards of a folder, in the order of their names; none where there is no folder."""
    return sorted(folder.glob(f"{prefix}-*.arrow"))


def read_shard(path: Path) -> pa.Table:
    """Memory-maps a shard and checks its bytes against its name.

    Raises:
        DamagedFileError: they differ.
    """
    payload = map_file(path)
    found, expected = _digest(payload), path.stem.rpartition("-")[2]
    if found != expected:
        raise DamagedFileError(
            f"{path}: damaged: the digest of its bytes is {found}; expected {expected}",
            "delete the file and run the same adpa precompute again",
        )
    return pa.ipc.open_file(payload).read_all()


def peek_shard(path: Path) -> pa.Table:
    """Opens a shard without reading all of its bytes: for counting its rows and looking at their keys.

    Raises:
        DamagedFileError: it is no table.
    """
    payload = map_file(path)
    try:
        table = pa.ipc.open_file(payload).read_all()
        table.validate()
    except (pa.ArrowException, OSError) as error:  # Arrow has both for bytes that it does not understand
        problem = " ".join(str(error).split())
        raise DamagedFileError(f"{path}: damaged: {problem}", "run adpa cache verify --repair") from error
    return table


def read_shards(folder: Path, prefix: str) -> Iterator[pa.Table]:
    """Reads every shard of a folder."""
    for path in list_shards(folder, prefix):
        yield read_shard(path)


def map_file(path: Path) -> pa.Buffer:
    """A file's bytes: mapped into memory, or read where that is cheaper (a process may map some 65,000 files)."""
    if path.stat().st_size < SMALL_FILE:
        return pa.py_buffer(path.read_bytes())
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _digest(payload: pa.Buffer) -> str:
    return hashlib.blake2b(payload, digest_size=16).hexdigest()
