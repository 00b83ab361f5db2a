"""Reads rows from CSV and TSV files. Every cell is text: ``1``, ``NA`` and ``true`` stay as they are written."""

import ast
import csv
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from adpa.data.column_map import Columns, used_columns
from adpa.data.compressed_files import UNPACK_ERRORS, open_text, plain_suffix
from adpa.data.json_rows import Rows, wrong_byte
from adpa.data.messages import holds_messages
from adpa.data.preferences import Row
from adpa.data.sources import CHECK, unreadable
from adpa.errors import DataError, RowError

SEPARATORS = ",;\t|"
LONGEST_CELL = 2**31 - 1  # of characters; Python's own limit is 131,072
_EXCEL = re.compile(rf'"?sep=([{SEPARATORS}])"?\s*')  # a first line that tells Excel the separator
_QUOTES = "double the quotes inside a cell"
_DROP = "or pass --drop-invalid"


def read_csv(path: Path, columns: Columns) -> Rows:
    """Yields the rows of a file whose first line names the columns; a cell may have line breaks within quotes.

    Args:
        path: the file.
        columns: those to read.

    Raises:
        DataError: the file cannot be read or has no text, its columns are no pair's, or a quoted cell never ends.
    """
    csv.field_size_limit(LONGEST_CELL)
    try:
        with open_text(path, newline="") as text:
            yield from _read_table(path, text, columns)
    except (OSError, *UNPACK_ERRORS) as error:
        raise unreadable(str(path), error) from error


def _read_table(path: Path, text: TextIO, columns: Columns) -> Rows:
    blank, first, told = 0, text.readline(), None
    while first.isspace() or (not told and (told := _EXCEL.fullmatch(first))):
        blank, first = blank + 1, text.readline()
    if not first:
        raise DataError(f"{path}: found no rows: all its lines are blank", CHECK)
    separator = told[1] if told else "\t" if plain_suffix(path.name) == ".tsv" else _separator(first)
    spaced = all(cell.startswith(" ") for cell in _cells(first, separator)[1:])
    lines = chain([first], text)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=spaced, strict=True)
    records = _read_records(path, reader, blank)
    where, header = next(records)
    if isinstance(header, RowError):
        raise DataError(header.args[0], _QUOTES)
    names = [name.strip() for name in header]
    used = used_columns(str(path), names, columns)
    for where, cells in records:
        yield where, cells if isinstance(cells, RowError) else _row(where, cells, names, used)


def _separator(header: str) -> str:
    """The character that divides the first line into the most names; a comma where none does."""
    return max(SEPARATORS, key=lambda separator: len(_cells(header, separator)))


def _cells(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator))


def _read_records(path: Path, reader: Any, blank: int) -> Iterator[tuple[str, list[str] | RowError]]:
    """The cells of each record that has any text, and the line where it begins.

    Args:
        path: the file.
        reader: the reader of its lines.
        blank: lines that come before those of the reader.
    """
    while True:
        where = f"{path} line {blank + reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise DataError(f"{where}: a cell begins with a quote and never ends", "close the quote") from error
            yield where, RowError(f"{where}: a cell goes on after its closing quote", f"{_QUOTES}, {_DROP}", "quotes")
        else:
            if any(cell.strip() for cell in cells):
                yield where, cells


def _row(where: str, cells: list[str], names: list[str], used: Mapping[str, str]) -> Row:
    if len(cells) != len(names):
        found = f"found {len(cells)} cell{'s' * (len(cells) != 1)}; the first line names {len(names)} columns"
        return RowError(f"{where}: {found}", f"put cells with separators or line breaks into quotes, {_DROP}", "ragged")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        return wrong_byte(where, ord(error.object[error.start]) & 0xFF)
    return {used[name]: _value(cell) for name, cell in zip(names, cells, strict=True) if name in used}


def _value(cell: str) -> Any:
    """The text of a cell; messages if it holds them as JSON or as Python prints them: a cell has no other way."""
    if holds_messages(cell):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(cell)
    return cell
