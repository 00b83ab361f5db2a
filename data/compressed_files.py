"""Files that may be compressed (gzip, bzip2, xz, Zstandard), told by their first bytes and read unpacked."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TextIO

import pyarrow as pa

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
UNPACK_ERRORS = (EOFError, zlib.error, lzma.LZMAError)  # and an OSError without a number


def _open_zstandard(path: Path) -> IO[bytes]:
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstandard,
}


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file; of a compressed one, those in it."""
    file = path.open("rb")
    head = file.peek(8)
    for mark, opener in _OPENERS.items():
        if head.startswith(mark):
            file.close()
            unpacked: IO[bytes] = opener(path)
            return unpacked
    return file


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """The text of a file, with ``open_bytes``. A byte that is no UTF-8 becomes half of a surrogate pair."""
    return io.TextIOWrapper(open_bytes(path), "utf-8-sig", "surrogateescape", newline)


def plain_suffix(name: str) -> str:
    """The suffix of a file in small letters, without that of its compression: ``.jsonl`` of ``prefs.jsonl.gz``."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix
