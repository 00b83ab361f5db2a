"""Reads rows of preference data from wherever they lie.

A row that cannot be read by its own fault becomes a ``RowError`` in its place.
"""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from adpa.data.column_map import rename_rows
from adpa.data.json_rows import Rows, read_text
from adpa.data.sources import CHECK, find_source
from adpa.data.tables import read_directory, read_hub, read_parquet
from adpa.errors import DataError


def read_rows(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] = {},
    prompts_alone: bool = False,
) -> Rows:
    """Yields (where, row) for every row of a JSONL, JSON or Parquet file, a ``datasets`` directory, or a Hub dataset.

    Args:
        source: a path, or a name of the Hub.
        split: the split to read.
        limit: read only so many rows, the first ones.
        columns: the columns of a pair that have other names in the data, with these names.
        prompts_alone: take a table without columns of responses, too.

    A row that cannot be read by its own fault is yielded as its ``RowError``.

    Raises:
        DataError: the source does not exist, cannot be read, or has no rows.
    """
    empty = True
    for where, row in islice(_open(str(source), split, columns, prompts_alone), limit):
        empty = False
        yield where, row
    if empty:
        raise DataError(f"{source}: found no rows; expected at least one preference pair", CHECK)


def _open(source: str, split: str | None, columns: Mapping[str, str], prompts_alone: bool) -> Rows:
    match find_source(source, split):
        case "text":
            return rename_rows(read_text(Path(source)), columns) if columns else read_text(Path(source))
        case "parquet":
            return read_parquet(Path(source), columns, prompts_alone)
        case "directory":
            return read_directory(Path(source), split, columns, prompts_alone)
        case "hub":
            return read_hub(source, split, columns, prompts_alone)
