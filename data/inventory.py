"""Every file of a cache, and what it is by its place."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adpa.data.locations import Location

FileKind = Literal[
    "marker", "response set", "scoring", "signals", "pending", "samples", "tokenizer", "unfinished", "damaged",
    "evaluation", "unknown",
]  # fmt: skip

# The first that fits a place, which is the path below the cache. Readers take whatever has such a name.
PLACES: dict[FileKind, str] = {
    "damaged": r"damaged/.+",
    "unfinished": r"(.+/)?\..+",
    "marker": r"cache\.json",
    "response set": r"responses/[^/]+\.arrow",
    "scoring": r"scorings/[^/]+/scoring\.json",
    "signals": r"scorings/[^/]+/signals-[^/]+\.arrow",
    "pending": r"scorings/[^/]+/pending/teacher-[^/]+\.arrow",
    "samples": r"samples/[^/]+/samples-[^/]+\.arrow",
    "tokenizer": r"tokenizers/[^/]+/.+",
    "evaluation": r"evaluation/",
    "unknown": r".+",
}
FOLDERS = r"responses|(scorings|samples)(/[^/]+)?|scorings/[^/]+/pending"
DEEP_FOLDERS = r"(tokenizers|damaged)(/.+)?"


@dataclass(frozen=True)
class CacheFile:
    """A file of a cache; a directory that is none of the cache's is one entry of no size.

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
    if not isinstance(cache, Path):
        cache.fs.invalidate_cache()  # other processes write, too
    return sorted(_walk(cache, ""), key=lambda file: file.place)


def _walk(folder: Location, above: str) -> Iterator[CacheFile]:
    for path in folder.iterdir():
        place = above + path.name
        is_directory = path.is_dir()
        # Folders of any depth must not be a loop of links, nor lead out of the cache.
        if is_directory and re.fullmatch(FOLDERS if path.is_symlink() else f"{FOLDERS}|{DEEP_FOLDERS}", place):
            yield from _walk(path, place + "/")
            continue
        try:
            found = path.stat()
        except FileNotFoundError:  # removed meanwhile, or a link to nothing
            continue
        if is_directory:
            place += "/"
        kind = next(kind for kind, pattern in PLACES.items() if re.fullmatch(pattern, place))
        yield CacheFile(path, place, kind, 0 if is_directory else found.st_size, found.st_mtime)
