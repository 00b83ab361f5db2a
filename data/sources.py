"""Where preference data lies: a file, a directory or the Hub. Answers before anything is read, and imports no model."""

import os
import re
import stat
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from adpa.data.compressed_files import UNPACK_ERRORS, open_bytes, plain_suffix
from adpa.data.file_kinds import (
    EMPTY,
    HEAD_BYTES,
    PARQUET,
    READ_FORMATS,
    READ_KINDS,
    FileKind,
    binary_kind,
    json_kind,
    other_than_csv,
    text_kind,
)
from adpa.errors import DataError, did_you_mean

SourceKind = Literal["text", "csv", "parquet", "directory", "hub"]

FORMAT_OF_SUFFIX = dict.fromkeys((".jsonl", ".ndjson", ".json"), "JSON") | dict.fromkeys((".csv", ".tsv"), "CSV")
FORMAT_OF_SUFFIX[".parquet"] = "Parquet"
CHECK = "check --data"
SPECIAL_FILES = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"} | dict.fromkeys(
    (stat.S_IFCHR, stat.S_IFBLK), "a device"
)


def find_source(source: str) -> SourceKind:
    """Says what a source is, by its first bytes; opens no connection.

    Raises:
        DataError: it does not exist, cannot be read, or is nothing that adpa reads.
    """
    if not source.strip():
        raise DataError("--data is empty", f"give it a {READ_FORMATS} file, a folder of such files, or a Hub name")
    try:
        mode = os.stat(source).st_mode
        if stat.S_ISDIR(mode):
            os.listdir(source)
            return "directory"
    except (FileNotFoundError, NotADirectoryError):
        return _find_missing(source)
    except (OSError, ValueError) as error:  # a name with a zero byte
        raise unreadable(source, error) from error
    if special := SPECIAL_FILES.get(stat.S_IFMT(mode)):
        raise DataError(f"{source}: expected a file; found {special}", "write its content to a file first")
    return _find_format(Path(source))


def unreadable(source: str, error: Exception) -> DataError:
    """The error for a source that the system does not open."""
    if isinstance(error, UNPACK_ERRORS) or (isinstance(error, OSError) and error.errno is None):
        return DataError(f"{source}: the compressed file is damaged or cut off", "copy it again")
    problem = (isinstance(error, OSError) and error.strerror) or str(error)
    fix = f"ask for the right to read it: chmod u+rX {source}" if isinstance(error, PermissionError) else CHECK
    return DataError(f"{source}: cannot be read ({problem})", fix)


def _find_missing(source: str) -> SourceKind:
    path = Path(source)
    if path.is_symlink():
        raise DataError(f"{source}: it is a link to {os.readlink(source)}, which does not exist", CHECK)
    if "://" in source:
        name = re.match(r"https?://huggingface\.co/datasets/([\w.-]+/[\w.-]+)", source)
        fix = f"give --data {name[1]}" if name else "download it"
        raise DataError(f"{source}: expected a file, a directory or a Hub name; found a URL", fix)
    if source.startswith("~") and os.path.expanduser(source) != source:
        raise DataError(f"{source}: no such file or directory", f"write {os.path.expanduser(source)}")
    plain, *parts = re.split("[@:]", source)
    hub_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", plain) and not any(re.search(r"\s|^$", part) for part in parts)
    in_folder = "/" in source and path.parent.exists()
    file_name = "/" not in source and re.fullmatch(r"\.[A-Za-z]\w*", path.suffix)
    if parts and os.path.exists(plain):
        fix = f"give --data {plain}: only data sets of the Hub have configurations and revisions"
        raise DataError(f"{source}: no such file or directory", fix)
    if plain_suffix(plain) in FORMAT_OF_SUFFIX or not hub_name or in_folder or file_name:
        raise DataError(f"{source}: no such file or directory", did_you_mean_file(path) or CHECK)
    return "hub"


def did_you_mean_file(path: Path) -> str:
    """The file or directory that a missing one may be meant to be, as a question; empty if none is near."""
    missing = next((each for each in reversed(path.parents) if not each.exists()), path)
    try:
        siblings = list(missing.parent.iterdir())
    except OSError:
        return ""
    stems = get_close_matches(missing.stem, {each.stem for each in siblings})  # a suffix makes any two names alike
    near = [each / path.relative_to(missing) for each in siblings if each.stem in stems]
    return did_you_mean(str(path), map(str, near))


def _find_format(path: Path) -> SourceKind:
    try:
        with path.open("rb") as file:
            packed = file.read(HEAD_BYTES)
        with open_bytes(path) as file:
            head = file.read(HEAD_BYTES)
    except (OSError, *UNPACK_ERRORS) as error:
        raise unreadable(str(path), error) from error
    form, kind = FORMAT_OF_SUFFIX.get(plain_suffix(path.name)), binary_kind(head)
    if kind is PARQUET and head != packed:
        kind = FileKind("a compressed Parquet file", "unpack it and give --data the file in it")
    if form == "Parquet":
        if kind is PARQUET:
            return "parquet"
        kind = kind or text_kind(head) or json_kind(head)
        raise DataError(f"{path}: expected a Parquet file; found {kind.name}", kind.fix)
    if kind is EMPTY:
        raise DataError(f"{path}: found no rows: the file is empty", CHECK)
    kind = kind or (other_than_csv(head) if form == "CSV" else text_kind(head))
    if kind is None:
        return "csv" if form == "CSV" else "text"
    expected = READ_FORMATS if form is None or kind not in READ_KINDS else form
    expected = "UTF-8 text" if kind.name.startswith("UTF-") else expected
    raise DataError(f"{path}: expected {expected}; found {kind.name}", kind.fix)
