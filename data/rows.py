"""Reads rows from JSONL, JSON and Parquet files, directories of ``datasets``, and the Hub.

A row that cannot be read by its own fault becomes a ``RowError`` in its place. Arrow writes null for every key that
another row has and this one lacks, so rows of Parquet and ``datasets`` lose the null fields of their objects.
"""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adpa.data.preferences import READ_COLUMNS, RESPONSE_COLUMNS, printable
from adpa.errors import DataError, RowError

Row = Mapping[str, Any] | RowError
Rows = Iterator[tuple[str, Row]]  # where each is, and the row

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
BATCH_ROWS = 1000
TABLE_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)  # the last two: of text and dates
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class DuplicateKeyError(ValueError):
    """An object of JSON that has a key twice; the argument is the key."""


def read_rows(source: str, split: str | None = None) -> Rows:
    """Yields (where, row) for every row of a JSONL, JSON or Parquet file, a ``datasets`` directory, or a Hub dataset.

    A row that cannot be read by its own fault is yielded as its ``RowError``.

    Raises:
        DataError: the source does not exist, cannot be read, or has no rows.
    """
    path = Path(source)
    if path.is_file():
        if split is not None:
            raise DataError(f"{source}: found --split {split}; a file has no splits", "leave --split out")
        rows = _read_file(path)
    elif path.is_dir():
        rows = _read_directory(path, split)
    elif path.suffix in FILE_SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file or directory", "check --data")
    else:
        rows = _read_hub(source, split)
    empty = True
    for where, row in rows:
        empty = False
        yield where, row
    if empty:
        raise DataError(f"{source}: found no rows; expected at least one preference pair", "check --data")


def _read_file(path: Path) -> Rows:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        beginning = _beginning(path)
        if path.suffix == ".json" and beginning.lstrip("\ufeff \t\r\n").startswith("["):
            yield from _read_json_list(path)
        else:
            yield from _read_lines(path)
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", "check --data") from error


def _read_lines(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    line.encode()
                    yield where, json.loads(line.rstrip(), object_pairs_hook=_object)
                except UnicodeEncodeError as error:
                    yield where, _wrong_byte(where, ord(line[error.start]) & 0xFF)
                except (ValueError, RecursionError) as error:
                    yield where, _broken_row(where, error)


def _read_json_list(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        broken = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else f"row {_whole_rows(text) + 1}"
        raise DataError(f"{path} {broken}: {_json_problem(error)}", "mend the file") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _whole_rows(text: str) -> int:
    """How many rows of a JSON list can be read before the first that cannot."""
    decoder, between = json.JSONDecoder(object_pairs_hook=_object), re.compile(r"[,\s]*")
    place, rows = text.index("[") + 1, 0
    with suppress(ValueError, RecursionError):
        while True:
            skipped = between.match(text, place)
            assert skipped is not None, "it matches nothing, too"
            _, place = decoder.raw_decode(text, skipped.end())
            rows += 1
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Of a key that is there twice, Python would keep the last value alone."""
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return read


def _wrong_byte(where: str, byte: int) -> RowError:
    return RowError(
        f"{where}: expected UTF-8 text; found the byte {byte:#04x}",
        "save the file as UTF-8, or pass --drop-invalid",
        "not UTF-8",
    )


def _broken_row(where: str, error: Exception) -> RowError:
    return RowError(f"{where}: {_json_problem(error)}", "mend the row, or pass --drop-invalid", "broken JSON")


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    if isinstance(error, DuplicateKeyError):
        return f"the key {error.args[0]!r} is there twice"
    return "broken JSON: an integer with too many digits"  # Python limits them


def _beginning(path: Path) -> str:
    """The first characters of a file; refuses one that is not UTF-8 at first sight."""
    with path.open("rb") as file:
        head = file.read(4096)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            raise DataError(f"{path}: expected UTF-8 text; found {encoding}", "save the file as UTF-8")
    if b"\0" in head:
        raise DataError(
            f"{path}: expected UTF-8 text; found a binary file",
            "give --data a JSONL or JSON file, or a Parquet file with the suffix .parquet",
        )
    return head.decode(errors="replace")


def _wrong_encoding(path: Path) -> DataError:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = f"found the byte {error.object[error.start]:#04x} in line {line} ({error.reason})"
        return DataError(f"{path}: expected UTF-8 text; {problem}", "save the file as UTF-8")
    raise AssertionError(f"{path} changed while it was read")


def _read_parquet(path: Path) -> Rows:
    try:
        file = pq.ParquetFile(path)
        columns = _used_columns(str(path), file.schema_arrow.names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a Parquet file; {_first_line(error)}", "check --data") from error
    with file:
        yield from _read_batches(str(path), file.iter_batches(BATCH_ROWS, columns=columns))


def _read_directory(path: Path, split: str | None) -> Rows:
    try:
        files = _arrow_files(path, split)
    except FileNotFoundError:
        files = []
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected a directory saved by datasets.save_to_disk; found JSON of another form ({error!r})",
            "save the data set again",
        ) from error
    if not files:
        raise DataError(
            f"{path}: expected a directory saved by datasets.save_to_disk, with at least one row",
            "or give --data one file",
        )
    return _read_batches(str(path), _arrow_batches(path, files))


def _arrow_files(path: Path, split: str | None) -> list[Path]:
    if not (path / "state.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        path = path / _pick_split(str(path), names, split)
    elif split is not None:
        raise DataError(f"{path}: found --split {split}; this data set has no splits", "leave --split out")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return [path / file["filename"] for file in state["_data_files"]]


def _arrow_batches(path: Path, files: Iterable[Path]) -> Iterator[pa.RecordBatch]:
    """Reads Arrow files without ``datasets``, which may lack the package of their format or the type of a column."""
    for file in files:
        try:
            with file.open("rb") as written:  # pyarrow takes the end of a file for the end of its stream
                written.seek(-len(END_OF_STREAM), os.SEEK_END)
                if written.read() != END_OF_STREAM:
                    raise pa.ArrowInvalid("it is cut off")
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
                columns = _used_columns(str(path), reader.schema.names)
                for batch in reader:
                    used = batch.select(columns)
                    used.validate(full=True)  # a damaged batch would crash the process
                    yield used
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: expected a directory saved by datasets.save_to_disk; "
                f"found a broken file, {file} ({_first_line(error)})",
                "save the data set again",
            ) from error


def _read_hub(name: str, split: str | None) -> Rows:
    from datasets import load_dataset  # takes a second, and no other source needs it
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(name)
    except (DatasetsError, OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        raise DataError(
            f"{name}: no such file or directory, and the Hub does not give it ({_first_line(error)})", "check --data"
        ) from error
    rows = dataset[_pick_split(name, list(dataset), split)].with_format("arrow")
    columns = _used_columns(name, rows.column_names)
    return _read_batches(name, rows.select_columns(columns).iter(BATCH_ROWS))


def _pick_split(source: str, names: Sequence[str], split: str | None) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        choice = "no --split" if split is None else f"--split {split}"
        raise DataError(f"{source}: found {choice}; expected one of {', '.join(names)}", "name it with --split")
    return split


def _used_columns(source: str, names: Sequence[str]) -> list[str]:
    """The columns of a table that ``parse_pair`` reads. Others may have types that become no Python objects."""
    for column in RESPONSE_COLUMNS:
        if column not in names:
            raise DataError(
                f"{source}: found the columns {printable(names)}; expected `{column}`",
                "name the columns prompt, chosen and rejected",
            )
    for column in READ_COLUMNS:
        if names.count(column) > 1:
            raise DataError(f"{source}: found the column `{column}` more than once", "remove one of them")
    return [column for column in names if column in READ_COLUMNS]


def _read_batches(source: str, batches: Iterable[pa.RecordBatch | pa.Table]) -> Rows:
    number = 0
    try:
        for batch in batches:
            convert = _plain(pa.struct(batch.schema))
            for row in batch.to_pylist():
                number += 1
                where = f"{source} row {number}"
                try:
                    yield where, convert(row)
                except (json.JSONDecodeError, RecursionError) as error:
                    yield where, _broken_row(where, error)
    except DataError:
        raise
    except TABLE_ERRORS as error:
        raise DataError(f"{source}: cannot be read after row {number}: {_first_line(error)}", "check --data") from error


def _plain(kind: pa.DataType) -> Callable[[Any], Any]:
    """Makes a function that turns a value of an Arrow type into plain Python: no null fields, JSON decoded."""
    if pa.types.is_struct(kind):
        fields = {field.name: _plain(field.type) for field in kind}
        return lambda value: (
            value and {name: convert(value[name]) for name, convert in fields.items() if value[name] is not None}
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
