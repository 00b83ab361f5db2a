import errno
import os
from pathlib import Path

import pytest
from upath import UPath

from adpa.data.cache.files import link_file, write_file


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "scoring.json", b"old")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "scoring.json", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_link_is_the_same_file_and_leaves_a_file_that_is_already_there(tmp_path: Path) -> None:
    write_file(tmp_path / "source", b"new")
    write_file(tmp_path / "present", b"old")
    assert link_file(tmp_path / "source", tmp_path / "folder" / "target")
    assert (tmp_path / "folder" / "target").samefile(tmp_path / "source")
    assert link_file(tmp_path / "source", tmp_path / "present")
    assert (tmp_path / "present").read_bytes() == b"old"


def test_objects_cannot_be_linked(tmp_path: Path) -> None:
    assert not link_file(UPath("memory://cache/source"), tmp_path / "target")
    assert not (tmp_path / "target").exists()
