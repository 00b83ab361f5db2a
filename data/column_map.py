"""``--map``: columns that have other names in the data, ``prompt=question,chosen=answer_a``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adpa.data.columns import (
    FORM_COLUMNS,
    OTHER_NAMES,
    READ_COLUMNS,
    RESPONSE_COLUMNS,
    TEMPLATE_COLUMNS,
    lacks_responses,
    missing_columns,
    missing_prompt,
    printable,
)
from adpa.data.json_rows import Rows
from adpa.errors import DataError, OptionError, RowError, did_you_mean

MAPPED_COLUMNS = ("prompt", *RESPONSE_COLUMNS, *TEMPLATE_COLUMNS)
EXAMPLE = "write it as prompt=question,chosen=answer_a"


def parse_map(text: str | None) -> dict[str, str]:
    """The columns of a pair, and their names in the data.

    Raises:
        OptionError: the text is no such list, names a column that no pair has, or has a name twice.
    """
    columns: dict[str, str] = {}
    for part in [] if text is None else text.split(","):
        column, equals, name = (each.strip() for each in part.partition("="))
        if not (column and equals and name) or "=" in name:
            found = f"found {part.strip()!r}" if part.strip() else "found an empty entry"
            raise OptionError(f"--map {text}: {found}; expected column=name", EXAMPLE)
        if column not in MAPPED_COLUMNS:
            near = f"write {name}={column}" if name in MAPPED_COLUMNS else did_you_mean(column, MAPPED_COLUMNS)
            expected = f"expected one of {', '.join(MAPPED_COLUMNS)} before ="
            raise OptionError(f"--map {text}: found {column!r}; {expected}", near)
        if column in columns:
            raise OptionError(f"--map {text}: found {column!r} twice", "leave one of them out")
        if name in columns.values():
            raise OptionError(f"--map {text}: found the name {name!r} twice", "map each column of the data once")
        columns[column] = name
    return columns


def describe_map(columns: Mapping[str, str]) -> str | None:
    """A map as ``--map`` takes it, in one order; none for an empty one."""
    return ",".join(f"{column}={name}" for column, name in sorted(columns.items())) or None


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read, and as what.

    Attributes:
        names: the columns of a pair that have other names in the data, with these names.
        prompts_alone: whether both responses may be missing.
    """

    names: Mapping[str, str]
    prompts_alone: bool


def used_columns(source: str, names: Sequence[str], columns: Columns) -> dict[str, str]:
    """The columns of a table that ``parse_pair`` reads, each with the name that it reads it by.

    Args:
        source: the table, for errors.
        names: all its columns.
        columns: those to read.

    Raises:
        DataError: the table lacks a column of the map or a response, or has a column twice.
    """
    if problem := _problem(names, columns.names):
        raise DataError(f"{source}: {problem[0]}", problem[1])
    new = {name: column for column, name in columns.names.items()}
    renamed = tuple(new.get(name, name) for name in names)
    wrong = missing_columns(renamed, describe_map(columns.names))
    if wrong and columns.prompts_alone and lacks_responses(renamed):
        wrong = missing_prompt(renamed)
    if wrong:
        raise DataError(f"{source}: {wrong[0]}", wrong[1])
    for column in (*READ_COLUMNS, *FORM_COLUMNS):
        if renamed.count(column) > 1:
            raise DataError(f"{source}: found the column `{column}` more than once", "remove one of them")
    maybe_prompts = () if "prompt" in renamed else (*FORM_COLUMNS, *OTHER_NAMES["prompt"])  # an error names the last
    used = {*READ_COLUMNS, *maybe_prompts}
    return {name: column for name, column in zip(names, renamed, strict=True) if column in used}


def rename_rows(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """The rows with the columns as the map has them; a row that does not fit it becomes a ``RowError``."""
    new = {name: column for column, name in columns.items()}
    for where, row in rows:
        if not isinstance(row, Mapping):  # its own error, or no object: parse_pair says so
            yield where, row
        elif problem := _problem(row, columns):
            yield where, RowError(f"{where}: {problem[0]}", problem[1], "columns of --map")
        else:
            yield where, {new.get(name, name): value for name, value in row.items()}


def _problem(names: Sequence[str] | Mapping[str, object], columns: Mapping[str, str]) -> tuple[str, str] | None:
    """Why a map does not fit the names of columns, and what to do; none if it fits."""
    for column, name in columns.items():
        entry = f"--map {column}={name}"
        if name not in names:
            found = f"found no column `{printable([name])}` for {entry} among the columns {printable(names)}"
            return found, did_you_mean(name, names) or "check --map"
        if column in names and column not in columns.values():
            return (
                f"{entry}: there is a column `{column}` already",
                f"leave {column}={name} out, or rename the column `{column}` in the data",
            )
    return None
