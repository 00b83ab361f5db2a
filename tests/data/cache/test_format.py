import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.data.makers import INFO, SCORING, response_rows

from adpa.data.cache.documents import write_document
from adpa.data.cache.format import MARKER, check_cache, check_new_cache, find_version, prepare_cache
from adpa.data.cache.responses import make_response_set, write_response_set
from adpa.data.cache.signals import write_scoring
from adpa.errors import CacheError, DamagedFileError, OptionError

WRITTEN = {"format": "adpa-cache", "version": 2}


def test_a_prepared_cache_has_a_marker_of_this_version(tmp_path: Path) -> None:
    prepare_cache(tmp_path / "cache")
    assert check_cache(tmp_path / "cache") == 2
    written = json.loads((tmp_path / "cache" / MARKER).read_text())
    assert WRITTEN.items() <= written.items()


def test_a_marker_is_written_once(tmp_path: Path) -> None:
    prepare_cache(tmp_path)
    before = (tmp_path / MARKER).stat().st_ino
    prepare_cache(tmp_path)
    assert (tmp_path / MARKER).stat().st_ino == before


def test_a_cache_without_a_marker_is_of_version_1_until_it_is_written_to(tmp_path: Path) -> None:
    write_response_set(tmp_path, make_response_set(INFO, response_rows(0, "ab")))
    assert check_cache(tmp_path) == 1
    prepare_cache(tmp_path)
    assert check_cache(tmp_path) == 2


def test_a_cache_that_has_only_scorings_is_one(tmp_path: Path) -> None:
    write_scoring(tmp_path, SCORING)
    assert find_version(tmp_path) == 1


def test_folders_of_the_same_names_are_no_cache(tmp_path: Path) -> None:
    (tmp_path / "scorings" / "match").mkdir(parents=True)
    (tmp_path / "responses").mkdir()
    (tmp_path / "responses" / "survey.arrow").touch()
    assert find_version(tmp_path) is None


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["nothing", "an empty folder"])
def test_where_no_cache_is_there_is_no_version(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "cache")
    assert find_version(tmp_path / "cache") is None
    with pytest.raises(CacheError, match="no cache there; make it with adpa precompute, or check the path"):
        check_cache(tmp_path / "cache")


@pytest.mark.parametrize("use", [check_cache, prepare_cache])
@pytest.mark.parametrize("marker", [{"version": 3}, {"version": 17, "layout": {"rows": "columns"}}])
def test_a_newer_format_is_refused_by_both_versions(
    use: Callable[[Path], object], marker: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / MARKER).write_text(json.dumps({"format": "adpa-cache"} | marker))
    with pytest.raises(CacheError) as caught:
        use(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: a cache of format {marker['version']}; this adpa reads formats up to 2; install a newer adpa"
    )


@pytest.mark.parametrize("use", [check_cache, prepare_cache])
def test_a_marker_of_another_program_is_refused_and_left(use: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text('{"format": "squid", "version": 2}')
    with pytest.raises(CacheError) as caught:
        use(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / MARKER}: of another program: its format is 'squid'; expected 'adpa-cache'; name another directory"
    )
    assert "squid" in (tmp_path / MARKER).read_text()


@pytest.mark.parametrize("use", [check_cache, prepare_cache])
@pytest.mark.parametrize(
    "content",
    [json.dumps(WRITTEN), json.dumps(WRITTEN | {"version": "2"})],
    ids=["no checksum", "a version that is no number"],
)
def test_a_damaged_marker_is_refused_by_name(use: Callable[[Path], object], content: str, tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(DamagedFileError) as caught:
        use(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / MARKER}: damaged: ")


@pytest.mark.parametrize("use", [check_cache, prepare_cache])
@pytest.mark.parametrize(
    "content",
    ['{"format": "other", "checksum": "abc"}', json.dumps(WRITTEN | {"checksum": "0"}), "[]", "hello: 1", "{", ""],
    ids=["a checksum of another kind", "another checksum", "no object", "no JSON", "cut off", "empty"],
)
def test_what_may_be_another_programs_is_left_and_nobody_is_told_to_delete_it(
    use: Callable[[Path], object], content: str, tmp_path: Path
) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(DamagedFileError) as caught:
        use(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / MARKER}: damaged, or of another program: ")
    assert str(caught.value).endswith("; name another directory, or restore this file")
    assert (tmp_path / MARKER).read_text() == content


def test_a_field_that_this_version_does_not_write_is_damage(tmp_path: Path) -> None:
    write_document(tmp_path / MARKER, WRITTEN | {"more": 1})
    with pytest.raises(DamagedFileError):
        check_cache(tmp_path)


@pytest.mark.parametrize("link", ["cache", MARKER])
def test_a_loop_of_symbolic_links_is_one_line(link: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache" if link == "cache" else tmp_path
    (tmp_path / link).symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(tmp_path / link)
    with pytest.raises(CacheError) as caught:
        check_cache(cache)
    assert str(caught.value) == (
        f"{cache}: cannot be read: Too many levels of symbolic links; check the path, its links and your permissions"
    )


@pytest.mark.parametrize("files", [("config.json", "model.safetensors"), ("dataset_dict.json",)])
@pytest.mark.parametrize("place", ["it", "it/cache", "it/a/b"])
def test_no_cache_is_made_in_a_model_or_in_data(files: tuple[str, ...], place: str, tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    for file in files:
        (tmp_path / "it" / file).touch()
    what = "a model" if len(files) == 2 else "a data set"
    with pytest.raises(OptionError, match=rf"--cache .*{place}: .*is {what}; name a directory of its own for the"):
        check_new_cache("--cache", tmp_path / place)
    check_new_cache("--cache", tmp_path / "beside")


def test_a_file_where_the_cache_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(CacheError, match="cache: it is a file; expected the directory of a cache; check the path"):
        check_cache(tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights, which needs root")
def test_no_permission_is_one_line(tmp_path: Path) -> None:
    prepare_cache(tmp_path / "cache")
    (tmp_path / "cache" / MARKER).chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(CacheError, match="cannot be read: Permission denied"):
            check_cache(tmp_path / "cache")
        with pytest.raises(CacheError, match="cannot be written: Permission denied"):
            prepare_cache(tmp_path)
    finally:
        os.seteuid(0)


def test_a_full_disk_is_not_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(OSError, match="No space left on device"):
        prepare_cache(tmp_path / "cache")
    assert find_version(tmp_path / "cache") is None
