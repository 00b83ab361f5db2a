"""Taking files out of a cache: for good, or into ``CACHE/damaged``."""

from collections.abc import Iterable
from pathlib import Path

from adpa.data.inventory import CacheFile
from adpa.data.locations import Location
from adpa.data.shards import remove_file, write_file


def remove_files(cache: Location, files: Iterable[CacheFile]) -> None:
    """Removes files, and the folders of the cache that this leaves empty; what is gone already is as good."""
    for file in files:
        remove_file(file.path)
        _remove_empty_folders(cache, file)


def set_aside(cache: Location, files: Iterable[CacheFile]) -> list[str]:
    """Moves files to the same place below ``CACHE/damaged``; gives these places."""
    places = []
    for file in files:
        place = f"damaged/{file.place}"
        write_file(cache / place, file.path.read_bytes())
        remove_files(cache, [file])
        places.append(place)
    return places


def _remove_empty_folders(cache: Location, file: CacheFile) -> None:
    folder = file.path.parent
    # The folders right below the cache stay, as readers look for them. Object stores have no folders.
    while isinstance(folder, Path) and folder.parent != cache and folder != cache:
        try:
            folder.rmdir()
        except OSError:  # it is not empty, or another process was first
            return
        folder = folder.parent
