"""Checks, without torch, the models and the data that a run names: at once, and before the Hub is asked for files."""

from collections.abc import Mapping

from adpa.data.hub import check_hub_data
from adpa.data.preferences import parse_pair
from adpa.data.row_counts import RowCounts
from adpa.data.sources import find_source
from adpa.data.splits import check_split
from adpa.errors import OptionError, RowError
from adpa.pipeline.models.model_names import check_models, is_here, is_same
from adpa.pipeline.scoring.request import DataOptions


def check_inputs(models: Mapping[str, str | None], data: DataOptions) -> None:
    """Checks the models that options name, and the data; what the Hub must be asked for comes last.

    Args:
        models: the name of each model by its option, such as ``--teacher``; None for one that is not used.
        data: the data.

    Raises:
        AdpaError: a model or the data is not there, or is something else.
    """
    named = {option: name for option, name in models.items() if name is not None}
    check_models({option: name for option, name in named.items() if is_here(name)})
    _check_data(data)
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


def _check_data(data: DataOptions) -> None:
    """Checks that the data is there, and that a row of it can be used. All rows are checked when they are encoded.

    Raises:
        AdpaError: the data is not there, is something else, or none of its rows can be used.
    """
    check_split(data.split)
    if find_source(data.source) == "hub":
        check_hub_data(data.source)
        return
    counts = RowCounts()
    for number, (where, row) in enumerate(data.read()):
        try:
            parse_pair(where, row, data.rendered, data.prompts_alone)
        except RowError as error:
            counts.add_invalid(number, error)
        else:
            return
    raise counts.nothing_left(data.source) if data.drop_invalid else counts.error()
