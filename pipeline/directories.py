"""Directories and files that a stage will write, checked before its long work begins and without making them."""

import os
from pathlib import Path

from adpa.data.locations import Location
from adpa.errors import OptionError


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
