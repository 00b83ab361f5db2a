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
    """Writes a whole file at once: after a crash it is there complete, or it is not there."""
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

    A local one is there whole or not at all. In an object store the files appear in the order given: the last one says
    that the others are there.
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


def list_folder(folder: Location) -> list[Location]:
    """What lies in a folder, in the order of the names; none where there is no folder.

    Hidden files, which are unfinished or another program's, are left out.
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
    folder.fs.invalidate_cache()  # other processes write, too
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
