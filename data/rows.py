"""Reads rows of preference data from wherever they lie.

A row that cannot be read by its own fault becomes a ``RowError`` in its place.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

from adpa.data.column_map import Columns, rename_rows
from adpa.data.csv_rows import read_csv
from adpa.data.folders import folder_files
from adpa.data.json_rows import Rows, read_text
from adpa.data.sources import CHECK, find_source
from adpa.data.splits import ONLY_SPLIT, Split, read_split, uncounted
from adpa.data.tables import hub_splits, parquet_split, saved_splits
from adpa.errors import DataError


def read_rows(
    source: str | Path,
    split: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] = {},
    prompts_alone: bool = False,
) -> Rows:
    """Yields (where, row) for every row of a file, a folder of files, a ``datasets`` directory, or a Hub dataset.

    A row that cannot be read by its own fault is yielded as its ``RowError``.

    Args:
        source: a path, or a name of the Hub.
        split: the split to read, or slices of splits.
        limit: read only so many rows, the first ones.
        columns: the columns of a pair that have other names in the data, with these names.
        prompts_alone: take a table without columns of responses, too.

    Raises:
        AdpaError: the source does not exist, cannot be read, or has no rows; or it has no such split or columns.
    """
    empty = True
    splits = _find_splits(str(source), Columns(columns, prompts_alone))
    for where, row in islice(read_split(str(source), splits, split), limit):
        empty = False
        yield where, row
    if empty:
        within, check = ("", CHECK) if split is None else (f" in split {split}", "check --split")
        raise DataError(f"{source}: found no rows{within}; expected at least one preference pair", check)


def _find_splits(source: str, columns: Columns) -> dict[str, Split]:
    path = Path(source)
    match find_source(source):
        case "hub":
            return hub_splits(source, columns)
        case "directory":
            saved = saved_splits(path, columns)
            if saved is not None:
                return saved
            return {name: _files_split(files, columns) for name, files in folder_files(path).items()}
        case _:
            return {ONLY_SPLIT: _files_split([path], columns)}


def _files_split(paths: Sequence[Path], columns: Columns) -> Split:
    """The rows of files, one after another."""

    def rows() -> Rows:
        return chain.from_iterable(_file_split(path, columns).rows() for path in paths)

    return Split(rows, lambda: sum(_file_split(path, columns).count() for path in paths))


def _file_split(path: Path, columns: Columns) -> Split:
    match find_source(str(path)):
        case "parquet":
            return parquet_split(path, columns)
        case "csv":
            return uncounted(partial(read_csv, path, columns))
        case _:
            return uncounted(lambda: rename_rows(read_text(path), columns.names) if columns.names else read_text(path))
