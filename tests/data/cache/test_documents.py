import json
from pathlib import Path

import pytest

from adpa.data.cache.documents import SIZE_LIMIT, read_document, write_document
from adpa.errors import DamagedFileError

FIELDS = {"format": "adpa-cache", "version": 2, "names": ["ü", None], "share": 0.1}


def test_a_document_comes_back_and_is_plain_json(tmp_path: Path) -> None:
    write_document(tmp_path / "a.json", FIELDS)
    assert read_document(tmp_path / "a.json") == (FIELDS, True)
    written = json.loads((tmp_path / "a.json").read_text())
    assert {name: value for name, value in written.items() if name != "checksum"} == FIELDS


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """A flip in the word checksum makes it a plain object: its reader sees an unknown field, and no checksum."""
    path = tmp_path / "a.json"
    write_document(path, FIELDS)
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << (place % 8)
        path.write_bytes(bytes(flipped))
        try:
            fields, proved = read_document(path)
        except DamagedFileError:
            continue
        assert not proved
        assert len(fields.keys() - FIELDS.keys()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content + b" ",
        lambda content: content.replace(b"  ", b" "),
        lambda content: content.replace(b'"version": 2', b'"version": 3, "version": 2'),
        lambda content: content.replace(b'"version": 2', b'"version": 2.0'),
    ],
    ids=["a blank more", "blanks less", "a field twice", "another number of the same value"],
)
def test_a_changed_byte_that_means_the_same_is_found(change: object, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_document(path, FIELDS)
    assert callable(change)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DamagedFileError, match="checksum"):
        read_document(path)


def test_a_plain_object_is_read_without_proof(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(FIELDS, indent=7))
    assert read_document(tmp_path / "a.json") == (FIELDS, False)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"9" * 10_000 + b"}"],
    ids=["empty", "cut off", "list", "number", "bytes", "deep", "a number without end"],
)
def test_what_is_no_json_object_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        read_document(path)
    assert str(caught.value).startswith(f"{path}: damaged: ")
    assert "\n" not in str(caught.value)


def test_a_file_of_absurd_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedFileError, match=f"more than {SIZE_LIMIT:,} bytes"):
        read_document(path)


def test_a_document_that_is_not_there_is_missing_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_document(tmp_path / "a.json")
