"""Reads rows from text: JSONL, or a JSON list.

A row that cannot be read by its own fault becomes a ``RowError`` in its place.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from adpa.data.columns import printable
from adpa.data.compressed_files import UNPACK_ERRORS, open_bytes, open_text, plain_suffix
from adpa.data.file_kinds import HEAD_BYTES
from adpa.data.preferences import Row
from adpa.data.sources import CHECK, unreadable
from adpa.errors import DataError, RowError

Rows = Iterator[tuple[str, Row]]  # where each is, and the row


class DuplicateKeyError(ValueError):
    """An object of JSON that has a key twice; the argument is the key."""


def read_text(path: Path) -> Rows:
    """Yields the rows of a file with one JSON object a line, or, with the suffix .json, of a JSON list.

    Raises:
        DataError: the text is neither.
    """
    try:
        with open_bytes(path) as file:
            beginning = file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
        if plain_suffix(path.name) == ".json" and beginning.startswith(b"["):
            yield from _read_list(path)
        else:
            _check_lines(path)
            yield from _read_lines(path)
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, error) from error
    except (OSError, *UNPACK_ERRORS) as error:
        raise unreadable(str(path), error) from error


def _check_lines(path: Path) -> None:
    """Refuses a text that is JSON as a whole, and not line by line."""
    with open_text(path) as lines:
        written = (line.strip() for line in lines if not line.isspace())
        first = next(written, None)
        more = next(written, None) is not None
    if first is None:
        raise DataError(f"{path}: found no rows: all its lines are blank", CHECK)
    row: Any = None
    try:
        row = json.loads(first)
        if more:
            return
    except (ValueError, RecursionError):
        if first[-1] in "{[,:":  # an object over several lines
            with suppress(ValueError, RecursionError):
                row = json.loads(_whole_text(path))
    if first.startswith("["):
        raise DataError(f"{path}: expected one JSON object a line; found a JSON list", "give it the suffix .json")
    if isinstance(row, Mapping) and (more or "chosen" not in row or _is_column(row["chosen"])):
        _refuse_object(path, row, more)


def _refuse_object(path: Path, whole: Mapping[str, Any], over_lines: bool) -> None:
    """Refuses an object that holds all rows, or one that lies over several lines."""
    inner = [name for name, value in whole.items() if isinstance(value, list) and _is_rows(value)]
    if "chosen" in whole and _is_column(whole["chosen"]):
        fix = "write the rows one after another (pandas: to_json(…, orient='records', lines=True))"
    elif "chosen" not in whole and inner:
        fix = f"write the list under {printable(inner[:1])} to a file of its own"
    elif over_lines:
        fix = "put [ and ] around it, or write it on one line"
    else:
        return
    keys = f"one object with the keys {printable(whole)}"
    raise DataError(f"{path}: expected a JSON list of objects, or one object a line; found {keys}", fix)


def _is_rows(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, Mapping) and not {"role", "from"} & value.keys() for value in values)


def _is_column(value: Any) -> bool:
    """Whether a value has the texts or messages of all rows, as other programs write columns."""
    if isinstance(value, Mapping):
        return bool(value) and all(name.isdigit() for name in value)
    return isinstance(value, list) and bool(value) and all(isinstance(each, str | list) for each in value)


def _read_lines(path: Path) -> Rows:
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    line.encode()
                    yield where, json.loads(line.rstrip(), object_pairs_hook=_object)
                except UnicodeEncodeError as error:
                    yield where, wrong_byte(where, ord(line[error.start]) & 0xFF)
                except (ValueError, RecursionError) as error:
                    yield where, broken_row(where, error)


def _read_list(path: Path) -> Rows:
    text = _whole_text(path)
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        broken = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else f"row {_whole_rows(text) + 1}"
        raise DataError(f"{path} {broken}: {_json_problem(error)}", "mend the file") from error
    if not rows:
        raise DataError(f"{path}: found no rows: the list is empty", CHECK)
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


def wrong_byte(where: str, byte: int) -> RowError:
    """The error of a row with a byte that is no UTF-8."""
    return RowError(
        f"{where}: expected UTF-8 text; found the byte {byte:#04x}",
        "save the file as UTF-8, or pass --drop-invalid",
        "not UTF-8",
    )


def broken_row(where: str, error: Exception) -> RowError:
    """The error of a row that is no JSON."""
    return RowError(f"{where}: {_json_problem(error)}", "mend the row, or pass --drop-invalid", "broken JSON")


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        if error.msg.startswith("Unterminated string"):
            return f"broken JSON: it ends inside the string that begins at column {error.colno}"
        if error.pos >= len(error.doc.rstrip()):
            return f"broken JSON: it ends too early, at column {error.colno}"
        return f"broken JSON: {error.msg.removesuffix(' at').rstrip(': ')} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "broken JSON: nested too deeply"
    if isinstance(error, DuplicateKeyError):
        return f"the key '{printable([error.args[0]])}' is there twice"
    return "broken JSON: an integer with too many digits"  # Python limits them


def _whole_text(path: Path) -> str:
    with open_bytes(path) as file:
        return file.read().decode("utf-8-sig")


def _wrong_encoding(path: Path, error: UnicodeDecodeError) -> DataError:
    line = error.object.count(b"\n", 0, error.start) + 1
    problem = f"found the byte {error.object[error.start]:#04x} in line {line} ({error.reason})"
    return DataError(f"{path}: expected UTF-8 text; {problem}", "save the file as UTF-8")
