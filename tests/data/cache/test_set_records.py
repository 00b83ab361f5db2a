"""The record of a response set: who reads it, and when the file of the set is written again."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tests.data.makers import INFO, SAMPLING, response_rows
from upath import UPath

from adpa.data.cache.locations import Location
from adpa.data.cache.responses import (
    ResponseSet,
    make_response_set,
    peek_response_set,
    read_response_set,
    read_response_sets,
    write_response_set,
)
from adpa.data.cache.set_records import SetRecord, make_record, read_record
from adpa.data.cache.shards import list_shards, write_shard
from adpa.errors import DamagedFileError

MINE = make_record("/data/prefs.jsonl", None)
THEIRS = make_record("/home/other/prefs.jsonl", None)


def made(examples: str = "abc", record: SetRecord | None = MINE, **info: Any) -> ResponseSet:
    return make_response_set(replace(INFO, **info), response_rows(len(examples), examples), record)


def files(cache: Location) -> list[str]:
    return [path.name for path in list_shards(cache / "responses")]


def ids(cache: Location) -> list[str]:
    return [one.id for one in read_response_sets(cache)]


def record_of(cache: Location, responses: ResponseSet) -> SetRecord | None:
    return next(one.record for one in read_response_sets(cache) if one.id == responses.id)


@pytest.fixture(params=["directory", "object store"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    if request.param == "directory":
        return tmp_path
    monkeypatch.setenv("ADPA_HOME", str(tmp_path))
    return UPath(f"memory://records/{tmp_path.name}")


def test_a_record_has_the_data_and_its_moment_and_is_no_part_of_the_id(cache: Location) -> None:
    before = datetime.now(UTC)
    responses = made(record=make_record("/data/prefs.jsonl", "train"))
    after = datetime.now(UTC)
    assert responses.id == made(record=None).id
    write_response_set(cache, responses)
    (read,) = read_response_sets(cache)
    assert (read.id, read.info, len(read)) == (responses.id, responses.info, 3)
    assert read.record == responses.record
    assert read.record is not None
    assert (read.record.data, read.record.split) == ("/data/prefs.jsonl", "train")
    assert before <= datetime.fromisoformat(read.record.time) <= after


def test_the_metadata_of_the_file_has_the_record_as_the_format_says(tmp_path: Path) -> None:
    write_response_set(tmp_path, made())
    (path,) = (tmp_path / "responses").iterdir()
    written = json.loads(pa.ipc.open_file(path).schema.metadata[b"run"])
    assert written.keys() == {"data", "split", "time"}
    assert (written["data"], written["split"], written["time"][-6:]) == ("/data/prefs.jsonl", None, "+00:00")
    assert len(written["time"]) == len("2026-11-28T14:02:00.000000+00:00")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('{"data": "d", "split": "s", "time": "2026-11-28T15:02:00+01:00", "host": "later"}', ("d", "s", 14)),
        ('{"data": "d", "time": "2026-11-28T14:02:00Z"}', ("d", None, 14)),
    ],
)
def test_unknown_fields_and_other_zones_are_read(written: str, expected: tuple[str, str | None, int]) -> None:
    record = read_record({b"run": written.encode()})
    assert record is not None
    assert (record.data, record.split, datetime.fromisoformat(record.time).hour) == expected
    assert record.time.endswith(":02:00.000000+00:00")


def test_a_limit_and_a_map_are_part_of_the_record(cache: Location) -> None:
    responses = made(record=make_record("/data/prefs.csv", "train[:9]", 5, "chosen=a,prompt=q"))
    write_response_set(cache, responses)
    (read,) = read_response_sets(cache)
    assert read.record == responses.record
    assert read.record is not None
    assert (read.record.limit, read.record.map) == (5, "chosen=a,prompt=q")
    assert read.record.source == "/data/prefs.csv split train[:9] limit 5 map chosen=a,prompt=q"
    assert json.loads(read.record.serialize()).keys() == {"data", "split", "time", "limit", "map"}
    assert responses.id == made(record=None).id


@pytest.mark.parametrize("other", [{"limit": 5}, {"limit": 6}, {"map": "prompt=q"}, {"split": "train[:5]"}])
def test_another_limit_map_or_slice_is_no_version_of_the_same_data(other: dict[str, Any]) -> None:
    whole, part = (replace(make_record("/d", None), **fields) for fields in ({}, other))
    assert made(record=whole).recipe != made(record=part).recipe
    assert made(record=part).recipe == made(record=replace(make_record("/d", None), **other)).recipe


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"[]",
        b"3",
        b"\xff",
        b"[" * 100_000,
        b'{"data": "d"}',
        b'{"data": 3, "split": null, "time": "2026-11-28T14:02:00Z"}',
        b'{"data": "d", "split": ["s"], "time": "2026-11-28T14:02:00Z"}',
        b'{"data": "d", "split": null, "time": "2026-11-28T14:02:00Z", "limit": "5"}',
        b'{"data": "d", "split": null, "time": "2026-11-28T14:02:00Z", "map": {"prompt": "q"}}',
        b'{"data": "d", "split": null, "time": "yesterday"}',
        b'{"data": "d", "split": null, "time": 7}',
        b'{"data": "d", "split": null, "time": "2026-11-28T14:02:00"}',
        b'{"data": "d", "split": null, "time": "9999-12-31T23:59:59Z"}',
        b'{"data": "d", "split": null, "time": "0001-01-01T00:00:00+09:00"}',
    ],
)
def test_metadata_of_another_form_is_no_record_and_no_damage(written: bytes, tmp_path: Path) -> None:
    responses = made(record=None)
    metadata = responses.table.schema.metadata | {b"run": written}
    path = write_shard(
        tmp_path / "responses", responses.shard_prefix(), responses.table.replace_schema_metadata(metadata)
    )
    for read in (next(read_response_sets(tmp_path)), read_response_set(path), peek_response_set(path)):
        assert (read.id, read.record) == (responses.id, None)


def test_a_changed_record_is_damage(tmp_path: Path) -> None:
    write_response_set(tmp_path, made())
    (path,) = (tmp_path / "responses").iterdir()
    path.write_bytes(path.read_bytes().replace(b"/data/prefs", b"/data/prefz"))
    with pytest.raises(DamagedFileError):
        list(read_response_sets(tmp_path))


def test_words_for_the_record_control_no_terminal() -> None:
    time = "2026-11-28T14:02:59.123456+00:00"
    assert SetRecord("/data/my prefs.jsonl", None, time).describe() == "/data/my prefs.jsonl (2026-11-28 14:02 UTC)"
    assert SetRecord("org/data", "train", time).describe() == "org/data split train (2026-11-28 14:02 UTC)"
    assert SetRecord("/a\x1b[2J\n\udcff/é", None, time).source == "/a\\x1b[2J\\n\\udcff/é"


def test_the_same_set_of_the_same_data_is_written_once(cache: Location) -> None:
    write_response_set(cache, made())
    before = files(cache)
    for _ in range(3):
        write_response_set(cache, made())
    assert files(cache) == before


def test_a_set_without_a_record_changes_nothing_that_is_there(cache: Location) -> None:
    write_response_set(cache, made())
    before = files(cache)
    write_response_set(cache, made(record=None))
    assert files(cache) == before


@pytest.mark.parametrize("first", [None, THEIRS, make_record("/data/prefs.jsonl", "train")])
def test_a_set_of_an_older_version_or_other_data_gets_the_new_record(first: SetRecord | None, cache: Location) -> None:
    write_response_set(cache, made(record=first))
    before = files(cache)
    write_response_set(cache, made())
    (after,) = files(cache)
    assert [after] != before
    record = record_of(cache, made())
    assert record is not None
    assert (record.data, record.split) == (MINE.data, MINE.split)


def test_data_that_shrinks_back_makes_its_set_the_newest_again(cache: Location) -> None:
    small, large = made("abc"), made("abcd")
    write_response_set(cache, small)
    write_response_set(cache, large)
    assert ids(cache) == [large.id, small.id]
    write_response_set(cache, small)
    assert ids(cache) == [small.id, large.id]
    before = files(cache)
    write_response_set(cache, small)
    assert files(cache) == before
    write_response_set(cache, large)
    assert ids(cache) == [large.id, small.id]
    assert len(files(cache)) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda: made("abcd", record=THEIRS),
        lambda: made("abcd", record=None),
        lambda: made("abcd", max_length=64),
        lambda: made("abcd", chat_template="other"),
        lambda: made("abcd", name="rejected"),
        lambda: made("abcd", name="sampled", sampling=SAMPLING),
    ],
)
def test_newer_sets_of_another_recipe_do_not_matter(other: Callable[[], ResponseSet], cache: Location) -> None:
    write_response_set(cache, made())
    write_response_set(cache, other())
    before = files(cache)
    write_response_set(cache, made())
    assert files(cache) == before


def test_the_last_run_is_the_newest_though_its_clock_is_behind(cache: Location) -> None:
    write_response_set(cache, made("abc", record=replace(MINE, time="2126-11-28T14:02:00.999999+00:00")))
    write_response_set(cache, made("abcd"))
    assert ids(cache) == [made("abcd").id, made("abc").id]
    record = record_of(cache, made("abcd"))
    assert record == replace(MINE, time="2126-11-28T14:02:01.000000+00:00")
    before = files(cache)
    write_response_set(cache, made("abcd"))
    assert files(cache) == before


def test_the_sets_of_one_run_come_in_the_order_of_their_names(cache: Location) -> None:
    for name in ("sampled", "rejected", "chosen"):
        write_response_set(cache, made(name=name, sampling=SAMPLING if name == "sampled" else None))
    assert [one.info.name for one in read_response_sets(cache)] == ["chosen", "rejected", "sampled"]


def test_sets_without_a_record_come_last_in_the_order_of_their_names(cache: Location) -> None:
    older = [made("abcde", record=None), made("abcdef", record=None)]
    for one in (*older, made()):
        write_response_set(cache, one)
    assert ids(cache) == [made().id, *sorted(one.id for one in older)]


def test_a_damaged_file_stays_for_the_user_to_see(tmp_path: Path) -> None:
    write_response_set(tmp_path, made(record=THEIRS))
    (path,) = (tmp_path / "responses").iterdir()
    path.write_bytes(b"damaged")
    write_response_set(tmp_path, made())
    assert files(tmp_path) == [path.name]
    assert path.read_bytes() == b"damaged"


def test_damage_and_newer_formats_of_other_sets_hinder_no_writer(tmp_path: Path) -> None:
    write_response_set(tmp_path, made("abcd"))
    (path,) = (tmp_path / "responses").iterdir()
    path.write_bytes(b"damaged")
    write_response_set(tmp_path, made())
    assert len(files(tmp_path)) == 2


def test_of_two_files_of_a_set_the_one_with_the_latest_record_counts(tmp_path: Path) -> None:
    """Two processes wrote at once, and one was killed before it could remove the other's file."""
    responses = made(record=None)
    times = [f"2026-11-28T14:0{minute}:00.000000+00:00" for minute in (3, 1, 5, 2)]
    for number, time in enumerate(times):
        metadata = responses.table.schema.metadata | {
            b"run": SetRecord(f"/data/{number}.jsonl", None, time).serialize().encode()
        }
        table = responses.table.replace_schema_metadata(metadata)
        write_shard(tmp_path / "responses", responses.shard_prefix(), table)
    (read,) = read_response_sets(tmp_path)
    assert read.record == SetRecord("/data/2.jsonl", None, times[2])
    write_response_set(tmp_path, made(record=THEIRS))
    assert len(files(tmp_path)) == 1
    assert record_of(tmp_path, responses) is not None


@pytest.mark.parametrize("_", range(5))
def test_processes_that_write_one_set_at_once_leave_one_whole_file(_: int, tmp_path: Path) -> None:
    sets = [made(record=make_record(f"/data/{number % 3}.jsonl", None)) for number in range(24)]
    with ThreadPoolExecutor(8) as pool:
        reading = [pool.submit(lambda: list(read_response_sets(tmp_path))) for _ in range(4)]
        list(pool.map(partial(write_response_set, tmp_path), sets))
        for future in reading:
            assert {one.id for one in future.result()} <= {sets[0].id}
    (read,) = read_response_sets(tmp_path)
    assert read.id == sets[0].id
    assert len(files(tmp_path)) == 1
