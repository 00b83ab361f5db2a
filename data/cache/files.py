"""Whole files, local or in an object store: readers see a file complete, or not at all.

A local file is written under a hidden name, synced and renamed. In an object store an object appears when it is whole.
"""

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from upath import UPath

from adpa.data.cache.locations import Location, is_local

HIDDEN = r"\.[^/]+\.[0-9a-f]{32}"  # the names of files that readers must not see


def write_file(path: Location, payload: bytes | pa.Buffer) -> None:
    """Writes a file: after a crash it is complete, or it does not exist."""
    if not is_local(path):
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

    A local folder is complete, or does not exist. In an object store the files appear in the order of the mapping: when
    the last one exists, all do.
    """
    if not is_local(path):
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
    """Removes a file; it is no error if another process has removed it."""
    with suppress(FileNotFoundError):
        path.unlink()


def hide(path: Path) -> Path:
    """Renames a file or folder to a name that readers ignore.

    Raises:
        FileNotFoundError: it does not exist.
    """
    hidden = _hidden(path)
    os.rename(path, hidden)
    return hidden


def find_hidden(path: Path) -> Path:
    """The visible path of a hidden file or folder."""
    assert re.fullmatch(HIDDEN, path.name)
    return path.with_name(path.name[1:].rpartition(".")[0])


def list_folder(folder: Location) -> list[Location]:
    """The entries of a folder, sorted by name; none if it does not exist.

    Hidden files are left out: they are unfinished, or belong to another program.
    """
    try:
        names = os.listdir(folder) if is_local(folder) else _list_objects(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if name and not name.startswith(".")]


def link_file(source: Location, target: Location) -> bool:
    """Gives a file a second name by hard link; returns whether that is possible here."""
    if not (is_local(source) and is_local(target)):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except FileExistsError:  # another process was first
        return True
    except OSError:  # another file system, or one without links
        return False
    return True


def _list_objects(folder: UPath) -> list[str]:
    folder.fs.invalidate_cache()  # other processes write to it
    return [name.removeprefix(folder.path).strip("/") for name in folder.fs.ls(folder.path, detail=False)]


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
