"""Recognises by its first bytes what a file is, so that one without preference pairs is refused by its name."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass

HEAD_BYTES = 4096  # of a file, by which it is recognised
READ_FORMATS = "JSONL, JSON, CSV or Parquet"

_UNPACK = "unpack it and give --data the file in it"
_CONVERT = "convert it, for example with pandas"
_SAVE_UTF8 = "save the file as UTF-8"


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        name: in words, with its article.
        fix: what to do to read its rows.
    """

    name: str
    fix: str = "check --data"


PARQUET = FileKind("a Parquet file", "give it the suffix .parquet")
CSV = FileKind("a table (CSV)", "give it the suffix .csv")
TSV = FileKind("a table (TSV)", "give it the suffix .tsv")
JSON_LINES = FileKind("JSONL", "give it the suffix .jsonl")
JSON_LIST = FileKind("a JSON list", "give it the suffix .json")
READ_KINDS = (PARQUET, CSV, TSV, JSON_LINES, JSON_LIST)
EMPTY = FileKind("an empty file")

# Where the mark stands, the mark, and what has it.
_MARKS = (
    (0, b"PAR1", PARQUET),
    (0, b"ARROW1\0\0", FileKind("an Arrow file", _CONVERT)),
    (0, b"\xff\xff\xff\xff", FileKind("an Arrow file", "give --data the directory that datasets saved")),
    (0, b"\x1f\x8b", FileKind("a gzip file", _UNPACK)),
    (0, b"BZh", FileKind("a bzip2 file", _UNPACK)),
    (0, b"\xfd7zXZ\0", FileKind("an xz file", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", FileKind("a Zstandard file", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", FileKind("a 7z archive", _UNPACK)),
    (0, b"Rar!\x1a\x07", FileKind("a RAR archive", _UNPACK)),
    (257, b"ustar", FileKind("a tar archive", _UNPACK)),
    (0, b"SQLite format 3\0", FileKind("an SQLite database", _CONVERT)),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", FileKind("an old Office file (.xls or .doc)", _CONVERT)),
    (0, b"\x93NUMPY", FileKind("a NumPy array", _CONVERT)),
    (0, b"\x89HDF\r\n\x1a\n", FileKind("an HDF5 file", _CONVERT)),
    (0, b"Obj\x01", FileKind("an Avro file", _CONVERT)),
    (0, b"ORC", FileKind("an ORC file", _CONVERT)),
    (0, b"GGUF", FileKind("a model (GGUF)")),
    (0, b"\x89PNG\r\n\x1a\n", FileKind("a picture (PNG)")),
    (0, b"\xff\xd8\xff", FileKind("a picture (JPEG)")),
    (0, b"GIF8", FileKind("a picture (GIF)")),
    (0, b"II*\0", FileKind("a picture (TIFF)")),
    (0, b"MM\0*", FileKind("a picture (TIFF)")),
    (8, b"WEBP", FileKind("a picture (WebP)")),
    (8, b"WAVE", FileKind("a sound (WAV)")),
    (4, b"ftyp", FileKind("a video or picture (MP4, MOV or HEIC)")),
    (0, b"%PDF-", FileKind("a PDF file")),
    (0, b"\x7fELF", FileKind("a program")),
    (0, b"{\\rtf", FileKind("an RTF document")),
    (0, b"version https://git-lfs.", FileKind("a Git LFS pointer, not the file itself", "fetch it with git lfs pull")),
    (0, b"\xff\xfe\0\0", FileKind("UTF-32", _SAVE_UTF8)),
    (0, b"\0\0\xfe\xff", FileKind("UTF-32", _SAVE_UTF8)),
    (0, b"\xff\xfe", FileKind("UTF-16", _SAVE_UTF8)),
    (0, b"\xfe\xff", FileKind("UTF-16", _SAVE_UTF8)),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_SAFETENSORS = re.compile(rb".{5}\0\0\0\{", re.DOTALL)  # the length of the header, 64 bits, and the header, JSON
_BOM = b"\xef\xbb\xbf"
_YAML = re.compile(r"---|%YAML|- |-$|\w[\w -]*:(?:\s|$)")


def binary_kind(head: bytes) -> FileKind | None:
    """What a file is that is no text in UTF-8; none for text.

    Args:
        head: its first ``HEAD_BYTES`` bytes.
    """
    if not head:
        return EMPTY
    for place, mark, kind in _MARKS:
        if head.startswith(mark, place):
            return kind
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(head)
    if _PICKLE.match(head):
        return FileKind("a pickle file", _CONVERT)
    if _SAFETENSORS.match(head):
        return FileKind("a model (safetensors)")
    if b"\0" in head:
        return FileKind(_wide_encoding(head), _SAVE_UTF8) if _wide_encoding(head) else FileKind("a binary file")
    return None


def _zip_kind(head: bytes) -> FileKind:
    for mark, kind in (
        (b"[Content_Types].xml", FileKind("an Office file (.xlsx or .docx)", _CONVERT)),
        (b"data.pkl", FileKind("a model or tensor (PyTorch)")),
        (b".npy", FileKind("NumPy arrays (.npz)", _CONVERT)),
    ):
        if mark in head[:100]:
            return kind
    return FileKind("a zip archive", _UNPACK)


def _wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32 if ASCII text in it would have these zeros; else nothing."""
    zeros = [part.count(0) > 0.3 * len(part) for part in (head[place::4] for place in range(4))]
    if zeros in ([False, True, True, True], [True, True, True, False]):
        return "UTF-32"
    return "UTF-16" if zeros in ([False, True] * 2, [True, False] * 2) else ""


def json_kind(head: bytes) -> FileKind:
    """Which of the two forms of JSON a text has."""
    return JSON_LIST if head.removeprefix(_BOM).lstrip().startswith(b"[") else JSON_LINES


def other_than_csv(head: bytes) -> FileKind | None:
    """What a text is that can be no CSV; none for what may be."""
    start = head.removeprefix(_BOM).lstrip()
    return json_kind(head) if start[:1] in b"{[" and start else _markup_kind(start.decode(errors="replace"))


def _markup_kind(first: str) -> FileKind | None:
    if re.match(r"<!doctype html|<html|<head|<body", first, re.IGNORECASE):
        return FileKind("an HTML page", "download the file itself (on the Hub its address has /resolve/, not /blob/)")
    return FileKind("an XML file", _CONVERT) if first.startswith("<") else None


def text_kind(head: bytes) -> FileKind | None:
    """What a text is that is no JSON; none for what may be JSON, whole or in lines.

    Args:
        head: the first ``HEAD_BYTES`` bytes of the file, whose last line may be cut.
    """
    lines = [line.strip() for line in head.removeprefix(_BOM).decode(errors="replace").splitlines() if line.strip()]
    if not lines or any(line[0] in "{[" for line in lines):
        return None
    first = lines[0]
    with suppress(ValueError):
        json.loads(first)
        return None  # rows, but not objects
    if markup := _markup_kind(first):
        return markup
    if "\t" in first:
        return TSV
    if _YAML.match(first):
        return FileKind("a YAML file", _CONVERT)
    if any(len(cells) > 1 and max(map(len, cells)) <= 40 for cells in (first.split(","), first.split(";"))):
        return CSV
    return FileKind("a text that is not JSON")
