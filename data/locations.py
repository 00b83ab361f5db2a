"""Where a cache lies: a local directory, or an address of an object store such as ``s3://bucket/folder``."""

import os
from pathlib import Path
from typing import TypeAlias

from upath import UPath

from adpa.errors import OptionError

Location: TypeAlias = Path | UPath


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


def copies_folder() -> Path:
    """Where files of object stores are kept for reading: ``$ADPA_HOME/files``; it may be deleted at any time."""
    return Path(os.environ.get("ADPA_HOME") or Path.home() / ".cache" / "adpa") / "files"
