"""The format of a cache: which program and which version wrote it.

From version 2 on, ``CACHE/cache.json`` holds both. Version 1 had no such file; its other files identify it. A reader
reads every version up to its own.
"""

import re

from adpa.data.cache.documents import read_document, write_document
from adpa.data.cache.files import list_folder
from adpa.data.cache.kinds import did_you_mean_path, kind
from adpa.data.cache.locations import Location, is_local
from adpa.data.cache.shards import damaged
from adpa.errors import AdpaError, CacheError, DamagedFileError, OptionError

FORMAT, VERSION = "adpa-cache", 2
MARKER = "cache.json"
RESPONSE_SET = r"[a-z]+-[0-9a-f]{16}-[0-9a-f]{32}\.arrow"


def check_cache(cache: Location) -> int:
    """The version of an existing cache.

    Raises:
        CacheError: the cache does not exist, has a newer format, names another program, or cannot be read.
        DamagedFileError: its marker is damaged, or belongs to another program.
    """
    found, meant = kind(cache), did_you_mean_path(cache, "a cache")
    if found == "a file":
        raise CacheError(f"{cache}: it is a file; expected the directory of a cache", meant or "check the path")
    version = find_version(cache)
    if version is None:
        there = f", but {found}" if found in ("a model", "a data set") else ""
        raise CacheError(f"{cache}: no cache there{there}", meant or "make it with adpa precompute, or check the path")
    return version


def check_new_cache(option: str, cache: Location) -> None:
    """Checks that a directory is a cache that this version may write to, or may become one.

    Raises:
        OptionError: it is a model or a data set, or lies in one.
        CacheError: see ``find_version``.
        DamagedFileError: see ``find_version``.
    """
    if find_version(cache) is None and is_local(cache):
        for place in (cache, *cache.absolute().parents):
            if (found := kind(place)) in ("a model", "a data set"):
                problem = f"{option} {cache}: " + ("it" if place == cache else str(place)) + f" is {found}"
                raise OptionError(problem, "name a directory of its own for the cache")


def prepare_cache(cache: Location) -> None:
    """Marks a cache as one of this version, before anything else is written to it.

    Raises:
        CacheError: it has a newer format, names another program, or cannot be read or written.
        DamagedFileError: its marker is damaged, or belongs to another program.
    """
    if find_version(cache) == VERSION:
        return
    try:
        write_document(cache / MARKER, {"format": FORMAT, "version": VERSION})
    except Exception as error:  # clients of object stores raise their own errors
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError):
            raise  # a full disk is not the user's mistake
        raise _unusable(cache, "written", error) from error


def find_version(cache: Location) -> int | None:
    """The version of the format of a cache; none if the cache does not exist yet.

    Raises:
        CacheError: it has a newer format, names another program, or cannot be read.
        DamagedFileError: its marker is damaged, or belongs to another program.
    """
    marker = cache / MARKER
    try:
        try:
            fields, proved = read_document(marker)
        except FileNotFoundError:
            return 1 if has_files(cache) else None
    except DamagedFileError as error:  # so it may not even be a marker
        problem = str(error.args[0]).replace(": damaged: ", ": damaged, or of another program: ", 1)
        raise DamagedFileError(problem, "name another directory, or restore this file") from error
    except AdpaError:
        raise
    except Exception as error:  # clients of object stores raise their own errors
        raise _unusable(cache, "read", error) from error
    if fields.get("format") != FORMAT:
        raise CacheError(
            f"{marker}: of another program: its format is {fields.get('format')!r}; expected {FORMAT!r}",
            "name another directory",
        )
    version = fields.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CacheError(
            f"{cache}: a cache of format {version}; this adpa reads formats up to {VERSION}", "install a newer adpa"
        )
    if not proved or version != VERSION or len(fields) != 2:
        raise damaged(marker, f"its version is {version!r}, or its checksum is gone")
    return VERSION


def has_files(cache: Location) -> bool:
    """Whether a directory has a file that only a cache has. Folder names alone prove nothing."""
    if any(re.fullmatch(RESPONSE_SET, path.name) for path in list_folder(cache / "responses")):
        return True
    return any((folder / "scoring.json").exists() for folder in list_folder(cache / "scorings"))


def _unusable(cache: Location, what: str, error: Exception) -> CacheError:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return CacheError(
        f"{cache}: cannot be {what}: {' '.join(reason.split())}", "check the path, its links and your permissions"
    )
