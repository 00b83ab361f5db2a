"""Compressed files are read as if they were not, and told by their first bytes."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from tests.data.row_files import ROWS, only_rows, refusal

from adpa.data.compressed_files import open_text, plain_suffix

TEXTS = {
    "prefs.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "prefs.json": json.dumps(ROWS, indent=1),
    "prefs.csv": "prompt,chosen,rejected\n" + 'Hi,"Hello\nyou",No\n' * 3,
}


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_compressed_file_has_the_rows_of_the_file(name: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TEXTS[name])
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(COMPRESS[suffix](TEXTS[name].encode()))
    assert only_rows(packed) == only_rows(tmp_path / name)
    if name == "prefs.jsonl":  # whatever it is called
        assert only_rows(packed.rename(tmp_path / "other")) == ROWS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_files_that_were_written_one_after_another_are_one(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"prefs.jsonl{suffix}"
    lines = TEXTS["prefs.jsonl"].splitlines(keepends=True)
    path.write_bytes(b"".join(COMPRESS[suffix](line.encode()) for line in ("\ufeff", *lines)))
    assert only_rows(path) == ROWS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_that_is_cut_off_is_refused(suffix: str, tmp_path: Path) -> None:
    for name, text in TEXTS.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(COMPRESS[suffix](text.encode())[:-3])
        assert refusal(path) == f"{path}: the compressed file is damaged or cut off; copy it again"


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_damaged_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"prefs.jsonl{suffix}"
    content = bytearray(COMPRESS[suffix](TEXTS["prefs.jsonl"].encode()))
    content[len(content) // 2 : len(content) // 2 + 8] = bytes(8)
    path.write_bytes(content)
    assert refusal(path) == f"{path}: the compressed file is damaged or cut off; copy it again"


def test_text_that_is_no_utf8_is_refused_as_in_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "prefs.json.gz"
    path.write_bytes(gzip.compress(b'[{"prompt": "\xe9"}]', mtime=0))
    assert refusal(path).startswith(f"{path}: expected UTF-8 text; found the byte 0xe9 in line 1 (")


def test_a_suffix_is_told_without_that_of_the_compression() -> None:
    names = ("a.jsonl", "a.JSONL.gz", "a.csv.bz2", "a.gz", "a.tar.xz", "a", "a.b/c.json.zst")
    assert [plain_suffix(name) for name in names] == [".jsonl", ".jsonl", ".csv", "", ".tar", "", ".json"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\xff")
    with open_text(tmp_path / "a") as text:
        assert text.read() == "a\udcff"
