"""Reads rows from Parquet files, directories of ``datasets``, and the Hub.

Arrow writes null for every key that another row has and this one lacks, so rows lose the null fields of their objects;
the pair's own columns keep a null.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adpa.data.cache.kinds import kind
from adpa.data.column_map import rename_columns
from adpa.data.columns import (
    FORM_COLUMNS,
    OTHER_NAMES,
    READ_COLUMNS,
    RESPONSE_COLUMNS,
    lacks_responses,
    missing_columns,
)
from adpa.data.json_rows import Rows, broken_row
from adpa.data.sources import CHECK, FILE_SUFFIXES
from adpa.errors import DataError, did_you_mean

PAIR_COLUMNS = ("prompt", *RESPONSE_COLUMNS)
BATCH_ROWS = 1000
TABLE_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)  # the last two: of text and dates
PARQUET_END = b"PAR1"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow


def read_parquet(path: Path, columns: Mapping[str, str], prompts_alone: bool) -> Rows:
    """The rows of a Parquet file."""
    with path.open("rb") as written:
        written.seek(-min(len(PARQUET_END), path.stat().st_size), os.SEEK_END)
        if written.read() != PARQUET_END:
            raise DataError(f"{path}: expected a Parquet file; found one that is cut off", "copy it again")
    try:
        file = pq.ParquetFile(path)
        used = _used_columns(str(path), file.schema_arrow.names, columns, prompts_alone)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected a Parquet file; found a damaged one ({_first_line(error)})", CHECK
        ) from error
    with file:
        yield from _read_batches(str(path), _renamed(file.iter_batches(BATCH_ROWS, columns=[*used]), used))


def read_directory(path: Path, split: str | None, columns: Mapping[str, str], prompts_alone: bool) -> Rows:
    """The rows of a directory that ``datasets`` saved."""
    try:
        files = _arrow_files(path, split)
    except FileNotFoundError:
        raise _other_directory(path) from None
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected a directory saved by datasets.save_to_disk; found JSON of another form ({error!r})",
            "save the data set again",
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", CHECK) from error
    return _read_batches(str(path), _arrow_batches(path, files, columns, prompts_alone))


def _other_directory(path: Path) -> DataError:
    if (found := kind(path)) in ("a model", "a cache"):
        return DataError(f"{path}: it is {found}; expected preference pairs", CHECK)
    names = sorted(each.name for each in path.iterdir())
    readable = [name for name in names if name.endswith(FILE_SUFFIXES) and name != "config.json"]
    fix = "give --data a file, or a directory of datasets"
    if not names:
        found = "an empty one"
    elif readable:
        found = "files"
        fix = f"give --data one of them, such as {path / readable[0]}"
    else:
        found = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
    return DataError(f"{path}: expected a directory saved by datasets.save_to_disk; found {found}", fix)


def _arrow_files(path: Path, split: str | None) -> list[Path]:
    if not (path / "state.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        path = path / _pick_split(str(path), names, split)
    elif split is not None:
        raise DataError(f"{path}: found --split {split}; this data set has no splits", "leave --split out")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return [path / file["filename"] for file in state["_data_files"]]


def _arrow_batches(
    path: Path, files: Iterable[Path], columns: Mapping[str, str], prompts_alone: bool
) -> Iterator[pa.RecordBatch]:
    """Reads Arrow files without ``datasets``, which may lack the package of their format or the type of a column."""
    for file in files:
        try:
            with file.open("rb") as written:  # pyarrow takes the end of a file for the end of its stream
                written.seek(-len(END_OF_STREAM), os.SEEK_END)
                if written.read() != END_OF_STREAM:
                    raise pa.ArrowInvalid("it is cut off")
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
                used = _used_columns(str(path), reader.schema.names, columns, prompts_alone)
                for batch in reader:
                    selected = batch.select([*used])
                    selected.validate(full=True)  # a damaged batch would crash the process
                    yield selected.rename_columns([*used.values()])
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: expected a directory saved by datasets.save_to_disk; "
                f"found a broken file, {file} ({_first_line(error)})",
                "save the data set again",
            ) from error


def read_hub(name: str, split: str | None, columns: Mapping[str, str], prompts_alone: bool) -> Rows:
    """The rows of a data set on the Hub."""
    from adpa.data.hub import check_hub_data  # no other source needs it

    check_hub_data(name)
    from datasets import load_dataset  # takes a second
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(name)
    except (DatasetsError, OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        raise DataError(
            f"{name}: no such file or directory, and the Hub does not give it ({_first_line(error)})", CHECK
        ) from error
    rows = dataset[_pick_split(name, list(dataset), split)].with_format("arrow")
    used = _used_columns(name, rows.column_names, columns, prompts_alone)
    return _read_batches(name, _renamed(rows.select_columns([*used]).iter(BATCH_ROWS), used))


def _pick_split(source: str, names: Sequence[str], split: str | None) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        choice = "no --split" if split is None else f"--split {split}"
        near = did_you_mean(split or "", names)
        raise DataError(f"{source}: found {choice}; expected one of {', '.join(names)}", near or "name it with --split")
    return split


def _used_columns(source: str, found: Sequence[str], columns: Mapping[str, str], prompts_alone: bool) -> dict[str, str]:
    """The columns of a table that ``parse_pair`` reads, with the names that it reads them by.

    Others may have types that become no Python objects.
    """
    names = rename_columns(source, found, columns)
    if (wrong := missing_columns(tuple(names))) and not (prompts_alone and lacks_responses(tuple(names))):
        raise DataError(f"{source}: {wrong[0]}", wrong[1])
    for column in (*READ_COLUMNS, *FORM_COLUMNS):
        if names.count(column) > 1:
            raise DataError(f"{source}: found the column `{column}` more than once", "remove one of them")
    maybe_prompts = () if "prompt" in names else (*FORM_COLUMNS, *OTHER_NAMES["prompt"])  # an error names the last
    used = {*READ_COLUMNS, *maybe_prompts}
    return {name: column for name, column in zip(found, names, strict=True) if column in used}


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
        raise DataError(f"{source}: cannot be read after row {number}: {_first_line(error)}", CHECK) from error


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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
