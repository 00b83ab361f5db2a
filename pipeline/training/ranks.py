"""Several ranks, one run: errors that all ranks raise, and the check that all do the same run."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from accelerate.utils import gather_object

from adpa.errors import AdpaError, OptionError, RankError
from adpa.pipeline.models.launcher import number_of_ranks

Result = TypeVar("Result")


def on_all_ranks(prepare: Callable[[], Result]) -> Result:
    """Runs a function on every rank. An error of one rank is raised on all, so that no rank waits for one that stopped.

    Raises:
        AdpaError: the error of the lowest rank that has one; a ``RankError`` for an error that is not adpa's.
    """
    if number_of_ranks() == 1:
        return prepare()
    result: list[Result] = []
    error: AdpaError | None = None
    try:
        result.append(prepare())
    except AdpaError as raised:
        error = raised
    except Exception as raised:
        error = RankError(f"{type(raised).__name__}: {raised}")
    for rank, raised_there in enumerate(gather_object([error])):
        if raised_there is not None:
            raise type(raised_there)(f"rank {rank}: {raised_there.args[0]}", *raised_there.args[1:])
    return result[0]


def check_agreement(view: Mapping[str, Any]) -> None:
    """Checks that all ranks have the same options, files and cache.

    Args:
        view: this rank's values, by name.

    Raises:
        OptionError: a rank has another value than rank 0; raised on all ranks.
    """
    views = gather_object([dict(view)])
    for rank, other in enumerate(views[1:], start=1):
        for name, value in views[0].items():
            if other[name] != value:
                raise OptionError(
                    f"rank {rank} has the {name} {other[name]}; rank 0 has {value}",
                    "start all ranks with the same options, the same files and the same cache",
                )
