"""Several ranks, one run: what they must agree on before they begin."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from accelerate.utils import gather_object

from adpa.errors import AdpaError, OptionError, RankError
from adpa.pipeline.models.launcher import number_of_ranks

Result = TypeVar("Result")


def on_all_ranks(prepare: Callable[[], Result]) -> Result:
    """Runs a function on every rank, and raises on all of them what one of them raised: nobody waits for who has left.

    Raises:
        AdpaError: the lowest such rank's; a ``RankError`` where it raised something else.
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
    for rank, found in enumerate(gather_object([error])):
        if found is not None:
            raise type(found)(f"rank {rank}: {found.args[0]}", found.args[1])
    return result[0]


def check_agreement(view: Mapping[str, Any]) -> None:
    """Checks that all ranks see the same.

    Args:
        view: what this rank sees, by name.

    Raises:
        OptionError: on all ranks, if one of them sees something else than rank 0.
    """
    views = gather_object([dict(view)])
    for rank, other in enumerate(views[1:], start=1):
        for name, value in views[0].items():
            if other[name] != value:
                raise OptionError(
                    f"rank {rank} has the {name} {other[name]}; rank 0 has {value}",
                    "give all ranks the same options, the same files and the same cache",
                )
