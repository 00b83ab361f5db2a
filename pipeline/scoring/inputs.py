"""Checks, without torch, the models and the data that a run names: at once, and before the Hub is asked for files."""

from collections.abc import Mapping
from pathlib import Path

from adpa.data.cache.kinds import kind
from adpa.data.cache.locations import check_name
from adpa.data.hub import check_hub_data
from adpa.data.rows import read_rows
from adpa.data.sources import find_source
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
    check_name("--data", Path(source))
    if (found := kind(Path(source))) in ("a model", "a cache"):
        raise DataError(f"{source}: it is {found}; expected preference pairs", "check --data")
    if find_source(source, split) == "hub":
        check_hub_data(source)
    else:
        next(iter(read_rows(source, split)))
