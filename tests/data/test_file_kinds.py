import gzip
import io
import json
import pickle
import sqlite3
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from adpa.data.file_kinds import HEAD_BYTES, binary_kind, text_kind

ROW = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
LINE = json.dumps(ROW) + "\n"
TABLE = pa.Table.from_pylist([ROW])


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def picture(name: str) -> bytes:
    return written(lambda file: Image.new("RGB", (4, 4)).save(file, name))


def archive(name: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with zipfile.ZipFile(file, "w") as members:
            members.writestr(name, LINE)

    return written(write)


def tar(mode: str) -> bytes:
    def write(file: io.BytesIO) -> None:
        with tarfile.open(fileobj=file, mode=mode) as members:  # type: ignore[call-overload]
            members.addfile(tarfile.TarInfo("prefs.jsonl"))

    return written(write)


def arrow(new: Callable[..., pa.ipc.RecordBatchStreamWriter]) -> bytes:
    def write(file: io.BytesIO) -> None:
        with new(file, TABLE.schema) as writer:
            writer.write(TABLE)

    return written(write)


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE pairs (prompt TEXT)")
        return connection.serialize()


BINARY = {
    "nothing": (b"", "an empty file"),
    "PNG": (picture("PNG"), "a picture (PNG)"),
    "JPEG": (picture("JPEG"), "a picture (JPEG)"),
    "WebP": (picture("WEBP"), "a picture (WebP)"),
    "GIF": (picture("GIF"), "a picture (GIF)"),
    "TIFF": (picture("TIFF"), "a picture (TIFF)"),
    "PDF": (picture("PDF"), "a PDF file"),
    "zip": (archive("prefs.jsonl"), "a zip archive"),
    "xlsx": (archive("[Content_Types].xml"), "an Office file (.xlsx or .docx)"),
    "npz": (written(lambda file: np.savez(file, a=np.ones(2))), "NumPy arrays (.npz)"),
    "npy": (written(lambda file: np.save(file, np.ones(2))), "a NumPy array"),
    "torch": (written(lambda file: torch.save(torch.ones(2), file)), "a model or tensor (PyTorch)"),
    "gzip": (gzip.compress(LINE.encode(), mtime=0), "a gzip file"),
    "tar": (tar("w"), "a tar archive"),
    "tar.gz": (tar("w:gz"), "a gzip file"),
    "tar.bz2": (tar("w:bz2"), "a bzip2 file"),
    "tar.xz": (tar("w:xz"), "an xz file"),
    "SQLite": (database(), "an SQLite database"),
    "pickle": (pickle.dumps([ROW]), "a pickle file"),
    "old pickle": (pickle.dumps([ROW], protocol=2), "a pickle file"),
    "safetensors": (save({"a": np.ones(2)}), "a model (safetensors)"),
    "Parquet": (written(lambda file: pq.write_table(TABLE, file)), "a Parquet file"),
    "Arrow file": (arrow(pa.ipc.new_file), "an Arrow file"),
    "Arrow stream": (arrow(pa.ipc.new_stream), "an Arrow file"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file itself"),
    "numbers": (struct.pack("<8d", *range(8)), "a binary file"),
}
ENCODINGS = {
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
    "utf-32": "UTF-32",
    "utf-32-le": "UTF-32",
    "utf-32-be": "UTF-32",
}


@pytest.mark.parametrize("kind", BINARY)
def test_a_file_is_recognised_by_its_first_bytes(kind: str) -> None:
    content, name = BINARY[kind]
    found = binary_kind(content[:HEAD_BYTES])
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("text", [LINE, json.dumps([ROW], indent=2), "prompt,chosen\na,b\n", 40 * LINE])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_encoding_of_a_text_is_recognised(encoding: str, text: str) -> None:
    found = binary_kind(text.encode(encoding)[:HEAD_BYTES])
    assert found is not None
    assert (found.name, found.fix) == (ENCODINGS[encoding], "save the file as UTF-8")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<!DOCTYPE html>\n<html>", "an HTML page"),
        ("\n\n<html lang='en'>", "an HTML page"),
        ("<HEAD>", "an HTML page"),
        ("<?xml version='1.0'?>", "an XML file"),
        ("prompt,chosen,rejected\nHi,Hello,No\n", "a table (CSV)"),
        ('"prompt";"chosen"\n', "a table (CSV)"),
        ('\ufeff"prompt","chosen"\n"a","b"', "a table (CSV)"),
        ("prompt\tchosen\trejected\n", "a table (TSV)"),
        ("- prompt: Hi\n  chosen: Hello\n", "a YAML file"),
        ("---\nprompt: Hi\n", "a YAML file"),
        ("prompt: Hi\nchosen: Hello\n", "a YAML file"),
        ("Once upon a time.\n", "a text that is not JSON"),
        ("# Pairs\n\nThese are pairs.\n", "a text that is not JSON"),
    ],
)
def test_a_text_that_is_no_json_is_recognised(text: str, name: str) -> None:
    head = text.encode()
    assert binary_kind(head) is None
    found = text_kind(head)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("text", [LINE, "\ufeff" + LINE, f"# a comment\n{LINE}", "[]", '"a"\n"b"\n', "5", "\n \n"])
def test_what_may_be_json_is_left_to_its_reader(text: str) -> None:
    assert binary_kind(text.encode()) is None
    assert text_kind(text.encode()) is None


@given(st.dictionaries(st.text(), st.text(), min_size=1), st.booleans())
def test_json_is_never_taken_for_another_kind(row: dict[str, str], ascii_only: bool) -> None:
    for text in (json.dumps(row, ensure_ascii=ascii_only), json.dumps([row], ensure_ascii=ascii_only, indent=1)):
        head = text.encode(errors="surrogatepass")[:HEAD_BYTES]
        assert binary_kind(head) is None
        assert text_kind(head) is None


def test_the_names_are_said_with_their_article(tmp_path: Path) -> None:
    for content, name in BINARY.values():
        assert name.startswith(("a ", "an ", "NumPy ")), content[:8]
