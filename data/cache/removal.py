"""Taking files out of a cache: for good, unless they are needed again, or into ``CACHE/damaged``.

A writer puts a file that needs others into the cache before it checks that these are there. So a file without users is
renamed first, then its users are looked up: either the writer sees it missing, or we see the writer. A process that is
killed in between leaves renamed files, which the next one restores.
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
    """Removes files, and the folders of the cache that this leaves empty; what is gone already is as good."""
    for file in files:
        remove_file(file.path)
        _remove_empty_folders(cache, file.path)


def remove_unless(cache: Location, path: Location, needed: Callable[[], bool]) -> bool:
    """Removes a file, or a folder of a file system with its files, unless it is needed; says whether it did.

    ``needed`` is asked when it is hidden. Object stores cannot rename: there it is asked just before the file goes.
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
    """The hidden files that are whole, and nobody has written again; of a hidden tokenizer, the list of its files.

    A process was killed when it had hidden them, or before it gave them their names.
    """
    hidden = (file for file in files if file.kind == "unfinished" and is_local(file.path))
    return [file for file in hidden if _is_restorable(file)]


def as_restored(files: Iterable[CacheFile], restorable: Iterable[CacheFile]) -> list[CacheFile]:
    """What a listing of the files would be if what can be restored were."""
    folders = {_hidden_path(file) for file in restorable}

    def moved(file: CacheFile) -> CacheFile:
        hidden = _hidden_path(file) if folders and file.kind == "unfinished" else None
        if hidden is None or hidden not in folders:
            return file
        place = file.place.replace(hidden.name, find_hidden(hidden).name)
        return replace(file, place=place, kind=find_kind(place))

    return [moved(file) for file in files]


def restore(file: CacheFile, abandoned: bool) -> None:
    """Puts back what ``find_restorable`` gave; a copy of it, where the one that writes it may still be at work."""
    hidden = _hidden_path(file)
    path = find_hidden(hidden)
    if abandoned or hidden.is_dir():
        _show(hidden, path)
    else:
        write_file(path, hidden.read_bytes())


def set_aside(cache: Location, files: Iterable[CacheFile]) -> list[str]:
    """Moves files to the same place below ``CACHE/damaged``; gives these places."""
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
    except (FileNotFoundError, CacheError):  # its process has just ended, or it is half
        return False
    return False


def _hidden_path(file: CacheFile) -> Path:
    """The hidden file, or the folder of a tokenizer that is hidden as a whole."""
    assert is_local(file.path), "in object stores nothing is hidden"
    parts = file.place.split("/")
    is_folder = len(parts) > 2 and parts[0] == "tokenizers" and parts[1].startswith(".")
    return file.path.parents[len(parts) - 3] if is_folder else file.path


def _show(hidden: Path, path: Path) -> None:
    """Gives a hidden file or folder its name back."""
    try:
        os.rename(hidden, path)
    except FileNotFoundError:  # another process has put it back
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
    # The folders right below the cache stay, as readers look for them. Object stores have no folders.
    while is_local(folder) and folder.parent != cache and folder != cache:
        try:
            folder.rmdir()
        except OSError:  # it is not empty, or another process was first
            return
        folder = folder.parent
