"""Removes files from a cache: for good, only if nothing needs them, or by moving them to ``CACHE/damaged``.

A writer first writes the file that needs others, then checks that the others exist. So removal renames a file first,
then looks for files that need it: either the writer sees it missing, or we see the writer's file. A process that is
killed in between leaves renamed files; the next removal restores them.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from adpa.data.cache.files import find_hidden, hide, remove_file, write_file
from adpa.data.cache.inventory import CacheFile, find_kind
from adpa.data.cache.locations import Location, is_local
from adpa.data.cache.shards import is_whole
from adpa.data.cache.signals import read_scoring_file
from adpa.data.cache.tokenizers import CONTENTS, read_contents
from adpa.errors import CacheError


def remove_files(cache: Location, files: Iterable[CacheFile]) -> None:
    """Removes files, and the folders of the cache that become empty. Missing files are no error."""
    for file in files:
        remove_file(file.path)
        _remove_empty_folders(cache, file.path)


def remove_unless(cache: Location, path: Location, needed: Callable[[], bool]) -> bool:
    """Removes a file, or a local folder with its files, unless it is needed; returns whether it removed it.

    It calls ``needed`` while the file is hidden. Object stores cannot rename: there it calls ``needed`` just before it
    removes the file.
    """
    if not is_local(path):
        if needed():
            return False
        remove_file(path)
        return True
    try:
        hidden = hide(path)
    except FileNotFoundError:  # another process was first
        return False
    try:
        keep = needed()
    except BaseException:
        _show(hidden, path)
        raise
    if keep:
        _show(hidden, path)
        return False
    _remove(hidden)
    _remove_empty_folders(cache, path)
    return True


def find_restorable(files: Iterable[CacheFile]) -> list[CacheFile]:
    """The hidden files that are whole and have no visible successor; of a hidden tokenizer, ``files.json`` alone.

    A killed process left them: it had hidden them, or had not yet given them their names.
    """
    hidden = (file for file in files if file.kind == "unfinished" and is_local(file.path))
    return [file for file in hidden if _is_restorable(file)]


def as_restored(files: Iterable[CacheFile], restorable: Iterable[CacheFile]) -> list[CacheFile]:
    """The listing as it would be after ``restore`` of every restorable file."""
    folders = {_hidden_path(file) for file in restorable}

    def moved(file: CacheFile) -> CacheFile:
        hidden = _hidden_path(file) if folders and file.kind == "unfinished" else None
        if hidden is None or hidden not in folders:
            return file
        place = file.place.replace(hidden.name, find_hidden(hidden).name)
        return replace(file, place=place, kind=find_kind(place))

    return [moved(file) for file in files]


def restore(file: CacheFile, abandoned: bool) -> None:
    """Restores a file from ``find_restorable``: an abandoned one by its name, another by a copy, as it has a writer."""
    hidden = _hidden_path(file)
    path = find_hidden(hidden)
    if abandoned or hidden.is_dir():
        _show(hidden, path)
    else:
        write_file(path, hidden.read_bytes())


def set_aside(cache: Location, files: Iterable[CacheFile]) -> list[str]:
    """Moves files to the same places below ``CACHE/damaged``; returns the new places."""
    places = []
    for file in files:
        place = f"damaged/{file.place}"
        write_file(cache / place, file.path.read_bytes())
        remove_files(cache, [file])
        places.append(place)
    return places


def _is_restorable(file: CacheFile) -> bool:
    hidden = _hidden_path(file)
    path = find_hidden(hidden)
    place = file.place[: -len(file.path.name)] + path.name if hidden == file.path else ""
    kind = find_kind(place) if place else "tokenizer"
    try:
        if os.path.lexists(path):
            return False
        if kind in ("signals", "pending", "samples"):
            return is_whole(hidden)
        if kind == "scoring":
            read_scoring_file(hidden)
            return True
        if kind == "tokenizer" and file.path == hidden / CONTENTS:
            read_contents(hidden)
            return True
    except (FileNotFoundError, CacheError):  # its process has just ended, or it is incomplete
        return False
    return False


def _hidden_path(file: CacheFile) -> Path:
    """The hidden file, or the hidden folder of a tokenizer."""
    assert is_local(file.path), "object stores have no hidden files"
    parts = file.place.split("/")
    is_folder = len(parts) > 2 and parts[0] == "tokenizers" and parts[1].startswith(".")
    return file.path.parents[len(parts) - 3] if is_folder else file.path


def _show(hidden: Path, path: Path) -> None:
    """Gives a hidden file or folder its name back; removes a hidden folder that was written again."""
    try:
        os.rename(hidden, path)
    except FileNotFoundError:  # another process has restored it
        return
    except OSError:
        if not path.is_dir():
            raise
        _remove(hidden)  # another process has written the folder again


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        remove_file(path)


def _remove_empty_folders(cache: Location, path: Location) -> None:
    folder = path.parent
    # The folders right below the cache stay: readers look for them. Object stores have no folders.
    while is_local(folder) and folder.parent != cache and folder != cache:
        try:
            folder.rmdir()
        except OSError:  # it is not empty, or another process was first
            return
        folder = folder.parent
