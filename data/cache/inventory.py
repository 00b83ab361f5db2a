"""Lists every file of a cache, and tells its kind by its place."""

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

# A place is the path below the cache; the first pattern that matches it decides. Readers read any file with such a
# name. A hidden file whose name is not one of adpa's belongs to another program.
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
    """A file of a cache. A foreign directory, or something that is not a file, is one unknown entry of size 0.

    Attributes:
        path: its path.
        place: its path below the cache, with slashes; the place of a directory ends with one.
        kind: its kind, by its place alone.
        size: bytes.
        changed: when it was written, in seconds since 1970 by the clock of the file system.
    """

    path: Location
    place: str
    kind: FileKind
    size: int
    changed: float

    @property
    def owner(self) -> str:
        """The id of the scoring, samples or tokenizer in whose folder it lies."""
        return self.place.split("/")[1]


def list_files(cache: Location) -> list[CacheFile]:
    """Every file of a cache, sorted by place.

    ``evaluation``, the cache of ``adpa evaluate`` inside the cache, is one entry.
    """
    if not is_local(cache):
        cache.fs.invalidate_cache()  # other processes write to it
    return sorted(_walk(cache, ""), key=lambda file: file.place)


def _walk(folder: Location, above: str) -> Iterator[CacheFile]:
    try:
        paths: list[Location] = list(folder.iterdir())
    except FileNotFoundError:  # removed meanwhile
        return
    for path in paths:
        place = above + path.name
        is_directory = path.is_dir()
        # A link to a folder of any depth could be a loop, or lead out of the cache: it is not followed.
        if is_directory and re.fullmatch(FOLDERS if path.is_symlink() else f"{FOLDERS}|{DEEP_FOLDERS}", place):
            yield from _walk(path, place + "/")
            continue
        try:
            status = path.stat()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not (is_local(path) and path.is_symlink()):
                continue  # removed meanwhile; otherwise it is a broken link, or one to itself
            yield CacheFile(path, place, "unknown", 0, 0.0)
            continue
        if is_directory:
            yield CacheFile(path, place + "/", find_kind(place + "/"), 0, status.st_mtime)
        elif is_local(path) and not stat.S_ISREG(status.st_mode):
            yield CacheFile(path, place, "unknown", 0, status.st_mtime)
        else:
            yield CacheFile(path, place, find_kind(place), status.st_size, status.st_mtime)


def find_kind(place: str) -> FileKind:
    """The kind of the file at a place."""
    return next(kind for kind, pattern in PLACES.items() if re.fullmatch(pattern, place))
