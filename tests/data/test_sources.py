import gzip
import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adpa.data.sources import find_source
from adpa.errors import DataError, RowError

LINE = b'{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}\n'
FORMATS = "expected JSONL, JSON, CSV or Parquet; found "
TABLE = "expected a Parquet file; found "


def refusal(source: object) -> str:
    """The one line with which the source is refused; it names the source once."""
    with pytest.raises(DataError) as caught:
        find_source(str(source))
    assert not isinstance(caught.value, RowError)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{source}: ")
    return message.removeprefix(f"{source}: ")


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["Hi"]}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("prefs.jsonl", b"", "found no rows: the file is empty; check --data"),
        ("prefs.json", b"", "found no rows: the file is empty; check --data"),
        ("prefs.parquet", b"", f"{TABLE}an empty file; check --data"),
        ("prefs.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", f"{FORMATS}a picture (PNG); check --data"),
        ("prefs.jsonl", b"\xff\xd8\xff\xe0\0\x10JFIF\0", f"{FORMATS}a picture (JPEG); check --data"),
        ("prefs.parquet", b"RIFF\0\0\0\0WEBPVP8 ", f"{TABLE}a picture (WebP); check --data"),
        ("prefs.json", b"%PDF-1.7\n", f"{FORMATS}a PDF file; check --data"),
        (
            "prefs.tar.gz",
            gzip.compress(bytes(257) + b"ustar", mtime=0),
            f"{FORMATS}a tar archive; unpack it and give --data the file in it",
        ),
        (
            "prefs.parquet.gz",
            gzip.compress(parquet(), mtime=0),
            f"{TABLE}a compressed Parquet file; unpack it and give --data the file in it",
        ),
        (
            "prefs.jsonl.gz",
            gzip.compress(LINE, mtime=0)[:20],
            "the compressed file is damaged or cut off; copy it again",
        ),
        ("prefs.jsonl.gz", gzip.compress(b"", mtime=0), "found no rows: the file is empty; check --data"),
        ("prefs.zip", b"PK\x03\x04" + bytes(26), f"{FORMATS}a zip archive; unpack it and give --data the file in it"),
        ("prefs.parquet", LINE, f"{TABLE}JSONL; give it the suffix .jsonl"),
        ("prefs.parquet", b"[\n" + LINE + b"]", f"{TABLE}a JSON list; give it the suffix .json"),
        ("prefs.parquet", b"prompt,chosen\n", f"{TABLE}a table (CSV); give it the suffix .csv"),
        ("prefs.jsonl", parquet(), "expected JSON; found a Parquet file; give it the suffix .parquet"),
        ("prefs.json", parquet(), "expected JSON; found a Parquet file; give it the suffix .parquet"),
        ("prefs.txt", parquet(), f"{FORMATS}a Parquet file; give it the suffix .parquet"),
        ("prefs.txt", b"prompt,chosen\n", f"{FORMATS}a table (CSV); give it the suffix .csv"),
        ("prefs.jsonl", b"prompt\tchosen\n", "expected JSON; found a table (TSV); give it the suffix .tsv"),
        ("prefs.csv", parquet(), "expected CSV; found a Parquet file; give it the suffix .parquet"),
        ("prefs.csv", b"\xef\xbb\xbf" + LINE, "expected CSV; found JSONL; give it the suffix .jsonl"),
        ("prefs.tsv", b"\n[" + LINE + b"]", "expected CSV; found a JSON list; give it the suffix .json"),
        ("prefs.csv", b"<?xml version='1.0'?>", f"{FORMATS}an XML file; convert it, for example with pandas"),
        ("prefs.yaml", b"- prompt: Hi\n", f"{FORMATS}a YAML file; convert it, for example with pandas"),
        (
            "prefs.jsonl",
            LINE.decode().encode("utf-16"),
            "expected UTF-8 text; found UTF-16; save the file as UTF-8",
        ),
        ("prefs.json", LINE.decode().encode("utf-32-be"), "expected UTF-8 text; found UTF-32; save the file as UTF-8"),
        (
            "prefs.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            f"{FORMATS}a Git LFS pointer, not the file itself; fetch it with git lfs pull",
        ),
        (
            "prefs.jsonl",
            b"<!doctype html>",
            f"{FORMATS}an HTML page; download the file itself (on the Hub its address has /resolve/, not /blob/)",
        ),
    ],
)
def test_a_file_of_something_else_is_refused_by_what_it_is(
    name: str, content: bytes, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path) == problem


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("prefs.jsonl", LINE, "text"),
        ("prefs.json", b"[" + LINE, "text"),
        ("prefs", b"\xef\xbb\xbf" + LINE, "text"),
        ("prefs.jsonl", b"\n\n", "text"),
        ("prefs.parquet", parquet(), "parquet"),
        ("prefs.jsonl.gz", gzip.compress(LINE, mtime=0), "text"),
        ("prefs.csv", b"prompt,chosen\n", "csv"),
        ("PREFS.TSV", b"prompt,chosen\n", "csv"),
        ("prefs.csv.gz", gzip.compress(b"prompt,chosen\n", mtime=0), "csv"),
    ],
)
def test_what_may_have_rows_is_told_by_its_kind(name: str, content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert find_source(str(path)) == kind
    assert find_source(str(tmp_path)) == "directory"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with three files in it."""
    for name in ("prefs.jsonl", "prefs-test.jsonl", "models/student.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("pref.jsonl", "did you mean prefs.jsonl?"),
        ("./prefs.jsnl", "did you mean prefs.jsonl?"),
        ("prefs.jsnl", "did you mean prefs.jsonl?"),
        ("prefs_test.jsonl", "did you mean prefs-test.jsonl?"),
        ("model/student.json", "did you mean models/student.json?"),
        ("models/studnt.json", "did you mean models/student.json?"),
        ("prefs.jsonl/train", "check --data"),
        ("zebra.jsonl", "check --data"),
        ("models/zebra", "check --data"),
        ("a/b/c", "check --data"),
        ("two words", "check --data"),
        ("org/name:", "check --data"),
        ("org/name@two words", "check --data"),
        ("~/zebra.jsonl", "write HOME/zebra.jsonl"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_missing_file_is_refused_with_the_nearest_name(source: str, fix: str) -> None:
    assert refusal(source) == f"no such file or directory; {fix.replace('HOME', os.path.expanduser('~'))}"


@pytest.mark.parametrize(
    "name",
    ["org/name", "name", "org/name-v1.5", "models2/name", "org/name:config", "name@v1.0", "org/name@refs/pr/1:config"],
)
@pytest.mark.usefixtures("folder")
def test_any_other_name_is_one_of_the_hub(name: str) -> None:
    assert find_source(name) == "hub"


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("https://huggingface.co/datasets/org/name/resolve/main/a.parquet", "give --data org/name"),
        ("https://huggingface.co/datasets/org/name", "give --data org/name"),
        ("https://example.com/prefs.jsonl", "download it"),
        ("s3://bucket/prefs.parquet", "download it"),
    ],
)
def test_a_url_is_refused(source: str, fix: str) -> None:
    assert refusal(source) == f"expected a file, a directory or a Hub name; found a URL; {fix}"


@pytest.mark.parametrize("source", ["", " ", "\n"])
def test_an_empty_name_is_refused(source: str) -> None:
    with pytest.raises(DataError) as caught:
        find_source(source)
    assert str(caught.value) == (
        "--data is empty; give it a JSONL, JSON, CSV or Parquet file, a folder of such files, or a Hub name"
    )


def test_what_is_no_ordinary_file_is_refused_by_its_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    fix = "write its content to a file first"
    assert refusal(tmp_path / "pipe") == f"expected a file; found a named pipe; {fix}"
    assert refusal("/dev/null") == f"expected a file; found a device; {fix}"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        assert refusal(tmp_path / "socket") == f"expected a file; found a socket; {fix}"


def test_a_link_that_leads_nowhere_is_refused_with_its_end(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    assert refusal(tmp_path / "link.jsonl") == "it is a link to gone.jsonl, which does not exist; check --data"
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path / "loop") == "cannot be read (Too many levels of symbolic links); check --data"


def test_a_name_that_no_file_can_have_is_refused() -> None:
    assert refusal("x" * 300) == "cannot be read (File name too long); check --data"
    assert refusal("a\0b") == "cannot be read (embedded null byte); check --data"


@pytest.mark.parametrize("place", ["the file", "its folder"])
def test_a_file_without_the_right_to_read_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(LINE)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    if place == "the file":
        monkeypatch.setattr(Path, "open", refuse)
    else:
        monkeypatch.setattr(os, "stat", refuse)
    assert refusal(path) == f"cannot be read (Permission denied); ask for the right to read it: chmod u+rX {path}"


def test_a_folder_without_the_right_to_list_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    assert refusal(tmp_path).startswith("cannot be read (Permission denied); ask for the right to read it")
