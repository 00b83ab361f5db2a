"""A place that cannot be written is refused by option and path, before the work, and nothing is created."""

import os
from pathlib import Path

import pytest
from upath import UPath

from adpa.data.cache.locations import (
    check_name,
    check_other_file,
    check_outside,
    check_writable,
    check_writable_file,
    find_location,
)
from adpa.errors import OptionError


def test_a_directory_that_is_there_or_can_be_made_is_good(tmp_path: Path) -> None:
    check_writable("--output", tmp_path)
    check_writable("--output", tmp_path / "a" / "b" / "c")
    assert not list(tmp_path.iterdir())


def test_a_relative_directory_is_looked_for_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    check_writable("--output", Path("runs/dckd"))
    with pytest.raises(OptionError, match=r"--output file/out: .*file is not a directory"):
        check_writable("--output", Path("file/out"))


@pytest.mark.parametrize(("place", "named"), [("file", "it"), ("file/below", ".*/file")])
def test_a_file_in_the_way_is_refused_by_name(place: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=f"^--cache .*{place}: {named} is not a directory"):
        check_writable("--cache", tmp_path / place)


def test_a_directory_without_permission_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    with pytest.raises(OptionError, match="cannot be written; name another directory"):
        check_writable("--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("place", "reason"),
    [("x" * 256, "File name too long"), ("a\0b", "embedded null byte"), ("loop/out", "Too many levels of symbolic")],
)
def test_a_name_that_no_place_can_have_is_refused(place: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for check in (check_name, check_writable, check_writable_file):
        with pytest.raises(OptionError, match=f"^--output .*: {reason}.*; name another place$"):
            check("--output", tmp_path / place)


def test_a_link_to_nothing_and_a_file_system_that_nobody_writes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(OptionError, match=r"--output .*: .*link is a broken link; name another directory"):
        check_writable("--output", tmp_path / "link" / "out")
    with pytest.raises(OptionError, match="--output /proc/out: /proc cannot be written; name another directory"):
        check_writable("--output", Path("/proc/out"))
    with pytest.raises(OptionError, match=r"--report /proc/r.json: cannot be written there"):
        check_writable_file("--report", Path("/proc/r.json"))


def test_a_file_needs_a_directory_that_is_there(tmp_path: Path) -> None:
    check_writable_file("--html", tmp_path / "page.html")
    for file in (tmp_path, tmp_path / "nowhere" / "page.html"):
        with pytest.raises(OptionError, match=f"--html {file}: cannot be written there; name a file in an existing"):
            check_writable_file("--html", file)


def test_a_device_may_be_written_and_a_file_without_permission_may_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable_file("--report", Path("/dev/null"))
    (tmp_path / "report.json").write_text("old")
    check_writable_file("--report", tmp_path / "report.json")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "report.json")
    with pytest.raises(OptionError, match="cannot be written there"):
        check_writable_file("--report", tmp_path / "report.json")


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("model", "--teacher names it too"),
        ("model/../model", "--teacher names it too"),
        ("model/config.json", "one of the files of --teacher"),
    ],
)
def test_a_file_that_is_written_is_none_that_another_option_reads(file: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(OptionError, match=problem):
        check_other_file("--report", tmp_path / file, "--teacher", tmp_path / "model", is_read=True)


def test_a_new_file_beside_what_is_read_and_one_in_an_output_are_good(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    check_other_file("--report", tmp_path / "run" / "new.json", "--teacher", tmp_path / "run", is_read=True)
    (tmp_path / "run" / "old.json").write_text("{}")
    check_other_file("--report", tmp_path / "run" / "old.json", "--output", tmp_path / "run", is_read=False)


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket/run", "file:///run", "https://host/run"])
def test_a_url_that_became_a_path_makes_no_folder(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for check in (check_name, check_writable, check_writable_file):
        with pytest.raises(OptionError, match=r"^--output .*:/.*: not a local path; name a file or directory of this"):
            check("--output", Path(url))
    with pytest.raises(OptionError, match=r"--cache s3:/bucket/c: not a local path; .*in Python UPath"):
        check_writable("--cache", Path("s3://bucket/c"))
    (tmp_path / "run:").mkdir()
    check_writable("--output", Path("run:/dckd"))


def test_a_plain_path_stays_one() -> None:
    assert find_location("runs/cache") == Path("runs/cache")
    assert find_location("file:///runs/cache") == Path("/runs/cache")


@pytest.mark.parametrize(
    ("url", "problem"),
    [("nothing://bucket/cache", "nothing"), ("abfs://bucket/cache", "adlfs"), ("gs://bucket/cache", "gcsfs")],
)
def test_an_address_that_nothing_opens_is_one_line(url: str, problem: str) -> None:
    with pytest.raises(OptionError) as caught:
        find_location(url)
    assert str(caught.value).startswith(f"{url}: cannot be opened: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("url", ["s3://", "s3:///folder", "gs://", "abfs:///cache"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(OptionError) as error:
        find_location(url)
    assert str(error.value) == f"{url}: names no bucket; write s3://bucket/folder"


@pytest.mark.parametrize("place", ["cache", "cache/report.json", "cache/../cache/x/y", "link/page.html"])
def test_what_a_command_writes_lies_outside_of_the_cache(place: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (tmp_path / "link").symlink_to(cache)
    with pytest.raises(OptionError, match=r"--output .*: lies in the cache"):
        check_outside("--output", tmp_path / place, cache)


@pytest.mark.parametrize("place", ["cache-2", "runs/cache", "page.html"])
def test_a_place_beside_the_cache_is_good(place: str, tmp_path: Path) -> None:
    check_outside("--output", tmp_path / place, tmp_path / "cache")
    check_outside("--output", tmp_path / place, UPath("s3://bucket/cache"))
