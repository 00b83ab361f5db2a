"""Reads rows from Parquet files, directories of ``datasets``, and the Hub.

Arrow writes null for every key that another row has and this one lacks, so rows lose the null fields of their objects;
the pair's own columns keep a null.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from adpa.data.column_map import Columns, used_columns
from adpa.data.columns import RESPONSE_COLUMNS
from adpa.data.json_rows import Rows, broken_row
from adpa.data.sources import CHECK
from adpa.data.splits import ONLY_SPLIT, Split
from adpa.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

PAIR_COLUMNS = ("prompt", *RESPONSE_COLUMNS)
BATCH_ROWS = 1000
NAME_OF_SPLIT = re.compile(r"\w+(?:\.\w+)*")
TABLE_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)  # the last two: of text and dates
PARQUET_END = b"PAR1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow


def parquet_split(path: Path, columns: Columns) -> Split:
    """The rows of a Parquet file.

    Args:
        path: the file.
        columns: those to read.
    """

    def rows() -> Rows:
        file, names = _open_parquet(path)
        with file:
            used = used_columns(str(path), names, columns)
            yield from _read_batches(str(path), _renamed(file.iter_batches(BATCH_ROWS, columns=[*used]), used))

    def count() -> int:
        with _open_parquet(path)[0] as file:
            return int(file.metadata.num_rows)

    return Split(rows, count)


def _open_parquet(path: Path) -> tuple[pq.ParquetFile, list[str]]:
    """A Parquet file, and the names of its columns."""
    with path.open("rb") as written:
        written.seek(-min(len(PARQUET_END), path.stat().st_size), os.SEEK_END)
        if written.read() != PARQUET_END:
            raise DataError(f"{path}: expected a Parquet file; found one that is cut off", "copy it again")
    try:
        file = pq.ParquetFile(path)
        return file, file.schema_arrow.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f"{path}: expected a Parquet file; found a damaged one ({first_line(error)})"
        raise DataError(problem, CHECK) from error


def saved_splits(path: Path, columns: Columns) -> dict[str, Split] | None:
    """The splits of a directory that ``datasets`` saved; none for another directory. ``columns`` as above."""
    if (path / "state.json").is_file():
        name = _read_json(path, path / "state.json").get("_split")  # may have slices of splits
        name = name if isinstance(name, str) and NAME_OF_SPLIT.fullmatch(name) else ONLY_SPLIT
        return {name: _saved_split(path, path, columns)}
    if not (path / "dataset_dict.json").is_file():
        return None
    try:
        names = list(_read_json(path, path / "dataset_dict.json")["splits"])
    except (KeyError, TypeError) as error:
        raise _other_form(path, error) from error
    return {
        name: _saved_split(path, path / name, columns, f" split {name}" if len(names) > 1 else "") for name in names
    }


def _saved_split(path: Path, folder: Path, columns: Columns, label: str = "") -> Split:
    """The split in a folder of a directory; ``label`` tells its rows from those of other splits."""

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            files = [folder / file["filename"] for file in _read_json(path, folder / "state.json")["_data_files"]]
        except (KeyError, TypeError) as error:
            raise _other_form(path, error) from error
        return _arrow_batches(path, files, columns)

    return Split(lambda: _read_batches(f"{path}{label}", batches()), lambda: sum(batch.num_rows for batch in batches()))


def _read_json(path: Path, file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _other_form(path, error) from error
    except OSError as error:
        raise DataError(f"{path}: {file} cannot be read ({error.strerror})", CHECK) from error
    if not isinstance(read, dict):
        raise _other_form(path, TypeError("no object"))
    return read


def _other_form(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: expected a directory saved by datasets.save_to_disk; found JSON of another form ({error!r})",
        "save the data set again",
    )


def _arrow_batches(path: Path, files: Iterable[Path], columns: Columns) -> Iterator[pa.RecordBatch]:
    """Reads Arrow files without ``datasets``, which may lack the package of their format or the type of a column."""
    for file in files:
        try:
            with file.open("rb") as written:  # pyarrow takes the end of a file for the end of its stream
                written.seek(-len(END_OF_STREAM), os.SEEK_END)
                if written.read() != END_OF_STREAM:
                    raise pa.ArrowInvalid("it is cut off")
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
                used = used_columns(str(path), reader.schema.names, columns)
                for batch in reader:
                    selected = batch.select([*used])
                    selected.validate(full=True)  # a damaged batch would crash the process
                    yield selected.rename_columns([*used.values()])
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: expected a directory saved by datasets.save_to_disk; "
                f"found a broken file, {file} ({first_line(error)})",
                "save the data set again",
            ) from error


def hub_splits(source: str, columns: Columns) -> dict[str, Split]:
    """The splits of a data set on the Hub. ``columns`` as above."""
    from adpa.data.hub import load_hub_data  # no other source needs it

    loaded = load_hub_data(source)
    return {
        name: _hub_split(f"{source} split {name}" if len(loaded) > 1 else source, rows, columns)
        for name, rows in loaded.items()
    }


def _hub_split(source: str, dataset: "Dataset", columns: Columns) -> Split:
    def rows() -> Rows:
        used = used_columns(source, dataset.column_names, columns)
        batches = dataset.with_format("arrow").select_columns([*used]).iter(BATCH_ROWS)
        return _read_batches(source, _renamed(batches, used))

    return Split(rows, lambda: len(dataset))


def _renamed(
    batches: Iterable[pa.RecordBatch | pa.Table], used: Mapping[str, str]
) -> Iterator[pa.RecordBatch | pa.Table]:
    """Batches that have the columns of ``used``, in whatever order, with their new names."""
    return (batch.rename_columns([used[name] for name in batch.schema.names]) for batch in batches)


def _read_batches(source: str, batches: Iterable[pa.RecordBatch | pa.Table]) -> Rows:
    number = 0
    try:
        for batch in batches:
            convert = _plain(pa.struct(batch.schema), keep=PAIR_COLUMNS)
            for row in batch.to_pylist():
                number += 1
                where = f"{source} row {number}"
                try:
                    yield where, convert(row)
                except (json.JSONDecodeError, RecursionError) as error:
                    yield where, broken_row(where, error)
    except DataError:
        raise
    except TABLE_ERRORS as error:
        raise DataError(f"{source}: cannot be read after row {number}: {first_line(error)}", CHECK) from error


def _plain(kind: pa.DataType, keep: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Makes a function that turns a value of an Arrow type into plain Python: no null fields, JSON decoded.

    Null fields named in ``keep`` stay.
    """
    if pa.types.is_struct(kind):
        fields = {field.name: _plain(field.type) for field in kind}
        return lambda value: (
            value
            and {
                name: convert(value[name])
                for name, convert in fields.items()
                if value[name] is not None or name in keep
            }
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _plain(kind.value_type)
        return lambda value: value and [item(element) for element in value]
    if pa.types.is_map(kind):
        entry = _plain(kind.item_type)
        return lambda value: value if value is None else {name: entry(element) for name, element in value}
    if isinstance(kind, pa.JsonType):
        return lambda value: value if value is None else json.loads(value)
    return lambda value: value
