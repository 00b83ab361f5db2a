"""Splits and their slices, as ``datasets`` writes them: ``test``, ``train[:1000]``, ``train[10%:20%]+test``."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from adpa.data.json_rows import Rows
from adpa.errors import DataError, OptionError, did_you_mean

if TYPE_CHECKING:
    from datasets import ReadInstruction

ONLY_SPLIT = "train"  # the name that datasets gives to the rows of a file
_HAS_SLICES = re.compile(r"[\[\]()+]")
_NEEDS_COUNT = re.compile(r"\[[^]]*[%-]")  # a share of the rows, or a place counted from their end


@dataclass(frozen=True)
class Split:
    """The rows of a split, and how many they are."""

    rows: Callable[[], Rows]
    count: Callable[[], int]


def uncounted(rows: Callable[[], Rows]) -> Split:
    """A split whose rows must be read to be counted."""
    return Split(rows, lambda: sum(1 for _ in rows()))


def read_split(source: str, splits: Mapping[str, Split], named: str | None) -> Rows:
    """Yields the rows that ``--split`` names. Each keeps the number that it has in its split.

    Args:
        source: the data, for errors.
        splits: the splits that the data has.
        named: a split, or slices of splits; none for the only split.

    Raises:
        AdpaError: there is no such split, several and none is named, or the slices are not written as they should be.
    """
    if named is None and len(splits) == 1:
        (named,) = splits
    elif named == "all":
        named = "+".join(splits)
    if named is not None and named in splits:
        yield from splits[named].rows()
        return
    if named is None or not _HAS_SLICES.search(named):
        raise _no_split(source, list(splits), named, named or "")
    instruction = parse_split(named)
    names = [part.strip().partition("[")[0] for part in named.split("+")]
    if unknown := [name for name in names if name not in splits]:
        raise _no_split(source, list(splits), named, unknown[0])
    counted = _NEEDS_COUNT.search(named)
    counts = {name: splits[name].count() if counted and name in names else sys.maxsize for name in splits}
    try:
        slices = instruction.to_absolute(counts)
    except ValueError as error:
        raise _no_slice(named, error) from error
    for one in slices:
        yield from islice(splits[one.splitname].rows(), one.from_, one.to)


def parse_split(named: str) -> "ReadInstruction":
    """Reads slices of splits.

    Raises:
        OptionError: they are not written as ``datasets`` does.
    """
    from datasets import ReadInstruction  # takes a second

    try:
        return ReadInstruction.from_spec(named)
    except ValueError as error:
        raise _no_slice(named, error) from error


def check_split(named: str | None) -> None:
    """Checks how slices are written, before the splits are known; for arguments and errors see ``parse_split``."""
    if named is not None and _HAS_SLICES.search(named):
        parse_split(named)


def _no_split(source: str, names: Sequence[str], named: str | None, unknown: str) -> DataError:
    choice = "no --split" if named is None else f"--split {named}"
    if len(names) == 1:
        return DataError(f"{source}: found {choice}; its only split is {names[0]}", "leave --split out")
    near = did_you_mean(unknown, names) or "name it with --split"
    return DataError(f"{source}: found {choice}; expected one of {', '.join(names)}", near)


def _no_slice(named: str, error: ValueError) -> OptionError:
    reason = str(error)
    problem = "no slice of a split"
    if "Percent" in reason:
        problem = "found more than 100 percent"
    elif "less than 100" in reason:
        problem = "pct1_dropremainder needs a split of at least 100 rows"
    return OptionError(f"--split {named}: {problem}", "write it as in train[:1000], train[10%:20%] or train+test")
