"""Every file of a cache, and what it is by its place."""

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adpa.data.cache.files import HIDDEN
from adpa.data.cache.locations import Location, is_local

FileKind = Literal[
    "marker", "response set", "scoring", "signals", "pending", "samples", "tokenizer", "unfinished", "damaged",
    "evaluation", "unknown",
]  # fmt: skip

NAME = r"[^/.][^/]*"

# The first that fits a place, which is the path below the cache. Readers take whatever has such a name. What is hidden
# and has no name that adpa gives belongs to somebody else.
PLACES: dict[FileKind, str] = {
    "unfinished": rf"(({NAME}/)*{HIDDEN}|tokenizers/{HIDDEN}(/.*[^/])?)",
    "damaged": rf"damaged(/{NAME})+",
    "marker": r"cache\.json",
    "response set": rf"responses/{NAME}\.arrow",
    "scoring": rf"scorings/{NAME}/scoring\.json",
    "signals": rf"scorings/{NAME}/signals-[^/]+\.arrow",
    "pending": rf"scorings/{NAME}/pending/teacher-[^/]+\.arrow",
    "samples": rf"samples/{NAME}/samples-[^/]+\.arrow",
    "tokenizer": rf"tokenizers(/{NAME}){{2,}}",
    "evaluation": r"evaluation/",
    "unknown": r".+",
}
FOLDERS = rf"responses|(scorings|samples)(/{NAME})?|scorings/{NAME}/pending"
DEEP_FOLDERS = rf"(tokenizers|damaged)(/{NAME})*|tokenizers/{HIDDEN}(/.+)?"


@dataclass(frozen=True)
class CacheFile:
    """A file of a cache; a directory that is none of the cache's, and what is no file, is one unknown entry of no size.

    Attributes:
        path: where it is.
        place: the same below the cache, with slashes; a directory's ends with one.
        kind: what it is, by its place alone.
        size: bytes.
        changed: when it was written, seconds since 1970 by the clock of the file system.
    """

    path: Location
    place: str
    kind: FileKind
    size: int
    changed: float

    @property
    def owner(self) -> str:
        """The scoring's, the samples' or the tokenizer's id, whose folder it lies in."""
        return self.place.split("/")[1]


def list_files(cache: Location) -> list[CacheFile]:
    """Every file of a cache, in the order of their places.

    ``evaluation``, the cache inside of the cache that ``adpa evaluate`` keeps, is one entry.
    """
    if not is_local(cache):
        cache.fs.invalidate_cache()  # other processes write, too
    return sorted(_walk(cache, ""), key=lambda file: file.place)


def _walk(folder: Location, above: str) -> Iterator[CacheFile]:
    try:
        paths: list[Location] = list(folder.iterdir())
    except FileNotFoundError:  # removed meanwhile
        return
    for path in paths:
        place = above + path.name
        is_directory = path.is_dir()
        # Folders of any depth must not be a loop of links, nor lead out of the cache.
        if is_directory and re.fullmatch(FOLDERS if path.is_symlink() else f"{FOLDERS}|{DEEP_FOLDERS}", place):
            yield from _walk(path, place + "/")
            continue
        try:
            status = path.stat()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not (is_local(path) and path.is_symlink()):
                continue  # removed meanwhile; else a link to nothing, or to itself
            yield CacheFile(path, place, "unknown", 0, 0.0)
            continue
        if is_directory:
            yield CacheFile(path, place + "/", find_kind(place + "/"), 0, status.st_mtime)
        elif is_local(path) and not stat.S_ISREG(status.st_mode):
            yield CacheFile(path, place, "unknown", 0, status.st_mtime)
        else:
            yield CacheFile(path, place, find_kind(place), status.st_size, status.st_mtime)


def find_kind(place: str) -> FileKind:
    """What a file is by its place."""
    return next(kind for kind, pattern in PLACES.items() if re.fullmatch(pattern, place))
