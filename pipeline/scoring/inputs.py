"""Checks, without torch, the models and the data that a run names: at once, and before the Hub is asked for files."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from adpa.data.cache.kinds import kind
from adpa.data.cache.locations import check_name
from adpa.data.hub import check_hub_data
from adpa.data.rows import FILE_SUFFIXES, read_rows
from adpa.errors import DataError, OptionError
from adpa.pipeline.models.model_names import check_models, is_here, is_same


def check_inputs(models: Mapping[str, str | None], source: str, split: str | None) -> None:
    """Checks the models that options name, and the data; what the Hub must be asked for comes last.

    Args:
        models: the name of each model by its option, such as ``--teacher``; None for one that is not used.
        source: the data.
        split: its split.

    Raises:
        AdpaError: a model or the data is not there, or is something else.
    """
    named = {option: name for option, name in models.items() if name is not None}
    check_models({option: name for option, name in named.items() if is_here(name)})
    check_data(source, split)
    check_models({option: name for option, name in named.items() if not is_here(name)})


def check_reference(reference: str | None, teacher: str) -> None:
    """Checks that reference and teacher are not one place; equal weights in two places are noticed later.

    Raises:
        OptionError: they are.
    """
    if reference is not None and is_same(reference, teacher):
        raise teachers_weights(reference)


def teachers_weights(reference: str) -> OptionError:
    """The error where the reference is the teacher."""
    return OptionError(
        f"--reference {reference}: it has the teacher's weights, so that every advantage would be 0",
        "name the model before preference training",
    )


def check_data(source: str, split: str | None) -> None:
    """Checks that the data is there, and that its beginning can be read. Rows are checked when all are read.

    Raises:
        AdpaError: it is not.
    """
    path = Path(source)
    check_name("--data", path)
    found = kind(path)
    if found in ("a model", "a cache"):
        raise DataError(f"{source}: it is {found}; expected preference pairs", "check --data")
    if found == "a file" and not path.is_file():
        raise DataError(f"{source}: a device or a pipe; expected a file, which can be read twice", "write it to a file")
    try:
        if found or path.suffix in FILE_SUFFIXES or source.startswith((".", "/", "~")):
            next(iter(read_rows(source, split)))
        elif "://" not in source:
            check_hub_data(source)
    except DataError as error:
        meant = _near_file(path)
        if meant is None:
            raise
        raise DataError(error.args[0], f"did you mean {meant}?") from error


def _near_file(path: Path) -> Path | None:
    """A file of rows with nearly the name of one that is not there, or the first one in a directory that is no data."""
    found = kind(path)
    if found not in ("", "a directory"):
        return None
    folder = path if found else path.parent
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    files = [name for name in names if name.endswith(FILE_SUFFIXES) and (folder / name).is_file()]
    near = files if found else get_close_matches(path.name, files, n=1)
    return folder / near[0] if near else None
