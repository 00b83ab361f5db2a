"""Places that users name: URLs among them, and whether a stage can write there, checked before its long work begins."""

import os
from pathlib import Path

from upath import UPath

from adpa.data.cache.locations import Location
from adpa.errors import OptionError


def find_location(text: str) -> Location:
    """The location that a user named: a path, or the URL of anything that fsspec opens.

    Raises:
        OptionError: the URL's scheme is unknown, or the package that opens it is not installed.
    """
    if "://" not in text:
        return Path(text)
    try:
        location = UPath(text)
        local = "file" in location.fs.protocol
    except (ImportError, ValueError) as error:
        raise OptionError(
            f"{text}: cannot be opened: {error}", "name a directory, or s3://bucket/folder with pip install 'adpa[s3]'"
        ) from error
    return Path(location.path) if local else location


def check_writable(option: str, directory: Location) -> None:
    """Checks that a directory can be written, or made where it is not there yet; an object store says it when asked.

    Raises:
        OptionError: naming the option.
    """
    if not isinstance(directory, Path):
        return
    nearest = next(path for path in (directory, *directory.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise OptionError(f"{option} {directory}: {nearest} is not a directory", "name another directory")
    if not os.access(nearest, os.W_OK):
        raise OptionError(f"{option} {directory}: {nearest} cannot be written", "name another directory")


def check_writable_file(option: str, file: Path) -> None:
    """Checks that a file can be written in a directory that is there.

    Raises:
        OptionError: naming the option.
    """
    if file.is_dir() or not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
        raise OptionError(f"{option} {file}: cannot be written there", "name a file in an existing directory")
