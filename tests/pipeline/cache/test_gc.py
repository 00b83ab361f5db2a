"""Garbage: files that no set needs go, needed files stay, and files that a run may be using stay for a day."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.makers import INFO, SAMPLING, SCORING, response_rows, signal_row
from tests.pipeline.conftest import Filled
from typer.testing import CliRunner

from adpa import cli, collect_garbage, list_cache, pack_cache
from adpa.data.cache.responses import ResponseSet, make_response_set, read_response_sets, write_response_set
from adpa.data.cache.samples import SampleRequest, samples_folder, write_samples
from adpa.data.cache.shards import read_shard, read_shards, write_shard
from adpa.data.cache.signal_rows import SignalRow, plain_schema, plain_table
from adpa.data.cache.signals import (
    Scoring,
    read_scorings,
    read_signals,
    write_scoring,
    write_signals,
)
from adpa.errors import CacheError, DamagedFileError, OptionError
from adpa.pipeline.cache.gc import Garbage, GarbageReport

WEEK = 7 * 24 * 3600


@pytest.fixture
def cache(filled: Filled, tmp_path: Path) -> Path:
    """A copy of the filled cache."""
    return Path(shutil.copytree(filled.cache, tmp_path / "cache"))


def age(*paths: Path, seconds: int = WEEK) -> None:
    """Makes files older."""
    for path in paths:
        changed = path.stat().st_mtime - seconds
        os.utime(path, (changed, changed))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def signals_of(cache: Path, scoring: Scoring) -> dict[bytes, SignalRow]:
    """The rows that readers use: the first of each key."""
    table = read_signals(cache, scoring)
    return {row.key: row for row in map(table.row, reversed(range(len(table))))}


def equal(left: SignalRow, right: SignalRow) -> bool:
    return all(np.array_equal(vars(left)[name], vars(right)[name]) for name in vars(left) if name != "key")


def exact(report: GarbageReport) -> list[Garbage]:
    """The garbage, without the bytes of parts of files, which are estimates."""
    return [replace(one, bytes=0) if one.kept else one for one in report.garbage]


def a_set(seed: int, rows: int = 4) -> ResponseSet:
    return make_response_set(INFO, response_rows(seed, [f"{seed}-{row}" for row in range(rows)]))


def row_of(key: bytes, version: int = 0) -> SignalRow:
    """A row of a key; versions of it differ, as those of two runs do."""
    return signal_row(key, 1 + key[0] % 5, seed=10 * key[1] + version)


def test_a_whole_cache_has_no_garbage(cache: Path) -> None:
    before = files(cache)
    report = collect_garbage(cache, yes=True)
    assert (report.garbage, report.bytes, report.young) == ([], 0, [])
    assert files(cache) == before


def test_a_dropped_set_takes_its_rows_and_samples_along(cache: Path) -> None:
    (scoring,) = read_scorings(cache)
    whole = signals_of(cache, scoring)
    dropped = next(one for one in read_response_sets(cache) if one.info.name == "sampled")
    next((cache / "responses").glob("sampled-*")).unlink()
    age(*files(cache / "samples"))
    before = files(cache)
    listed = collect_garbage(cache)
    assert files(cache) == before, "it lists first"
    assert not listed.done
    space = sum(path.stat().st_size for path in before)
    report = collect_garbage(cache, yes=True)
    assert report.done
    assert exact(report) == exact(listed)
    assert report.bytes == space - sum(path.stat().st_size for path in files(cache))
    kept = signals_of(cache, scoring)
    gone = set(dropped.table["key"].to_pylist())
    assert kept.keys() == whole.keys() - gone
    assert all(equal(kept[key], whole[key]) for key in kept)
    assert not (cache / "samples").exists() or files(cache / "samples") == []
    assert list_cache(cache).scorings[0].unneeded == 0
    assert collect_garbage(cache).garbage == []


def test_young_samples_and_temporary_files_stay_for_a_day(cache: Path) -> None:
    next((cache / "responses").glob("sampled-*")).unlink()
    old, young = (cache / "responses" / f".chosen-{n}.arrow.{n:032x}" for n in range(2))
    for path in (old, young):
        path.write_bytes(b"half")
    age(old)
    report = collect_garbage(cache, yes=True)
    assert (old.exists(), young.exists()) == (False, True)
    assert len(files(cache / "samples")) > 0
    assert young.relative_to(cache).as_posix() in report.young
    assert any(place.startswith("samples/") for place in report.young)


def test_a_file_from_a_clock_that_is_ahead_is_young(cache: Path) -> None:
    path = cache / f".ahead.{0:032x}"
    path.write_bytes(b"")
    age(path, seconds=-WEEK)
    collect_garbage(cache, yes=True)
    assert path.exists()


def test_what_is_old_is_told_by_the_file_systems_clock(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache / f".killed.{0:032x}"
    path.write_bytes(b"")
    monkeypatch.setattr("time.time", lambda: 1e12)
    collect_garbage(cache, yes=True)
    assert path.exists()


def test_a_tokenizer_that_no_set_names_goes(cache: Path) -> None:
    used = next((cache / "tokenizers").iterdir())
    unused = Path(shutil.copytree(used, used.with_name("0" * 32)))
    assert collect_garbage(cache, yes=True).young == [p.relative_to(cache).as_posix() for p in files(unused)]
    age(*files(unused))
    collect_garbage(cache, yes=True)
    assert (used.exists(), unused.exists()) == (True, False)


def test_what_was_set_aside_goes(cache: Path) -> None:
    (cache / "damaged" / "scorings").mkdir(parents=True)
    (cache / "damaged" / "scorings" / "signals").write_bytes(b"123")
    (removed,) = collect_garbage(cache, yes=True).garbage
    assert (removed.place, removed.bytes) == ("damaged/scorings/signals", 3)
    assert not (cache / "damaged" / "scorings").exists()


def test_a_scoring_goes_with_its_last_row_but_not_while_it_is_young(tmp_path: Path) -> None:
    responses, emptied, new = a_set(0), replace(SCORING, top_k=2), replace(SCORING, top_k=1)
    write_response_set(tmp_path, responses)
    for scoring in (SCORING, emptied, new):
        write_scoring(tmp_path, scoring)
    write_signals(tmp_path, SCORING, [row_of(key) for key in responses.table["key"].to_pylist()])
    write_signals(tmp_path, emptied, [signal_row(b"n" * 16, 3, 0, top_k=2)])
    age(*files(tmp_path / "scorings" / emptied.id))
    collect_garbage(tmp_path, yes=True)
    assert (tmp_path / "scorings" / SCORING.id).exists()
    assert not (tmp_path / "scorings" / emptied.id).exists()
    assert (tmp_path / "scorings" / new.id).exists(), "a run may be about to write its first rows"
    age(*files(tmp_path / "scorings" / new.id))
    collect_garbage(tmp_path, yes=True)
    assert not (tmp_path / "scorings" / new.id).exists()


def test_rows_of_another_vocabulary_are_of_no_use(tmp_path: Path) -> None:
    responses = a_set(0)
    other = replace(SCORING, vocabulary="another")
    write_response_set(tmp_path, responses)
    for scoring in (SCORING, other):
        write_scoring(tmp_path, scoring)
        write_signals(tmp_path, scoring, [row_of(key) for key in responses.table["key"].to_pylist()])
    collect_garbage(tmp_path, yes=True)
    assert len(read_signals(tmp_path, SCORING)) == len(responses)
    assert len(read_signals(tmp_path, other)) == 0


def test_of_the_rows_that_wait_those_stay_that_a_set_needs(tmp_path: Path) -> None:
    responses = a_set(0, rows=3)
    write_response_set(tmp_path, responses)
    write_scoring(tmp_path, SCORING)
    done, waiting, other = responses.table["key"].to_pylist()
    write_signals(tmp_path, SCORING, [row_of(done)])
    folder, schema = (tmp_path / "scorings" / SCORING.id) / "pending", plain_schema(SCORING.top_k)

    def pending(*keys: bytes) -> Path:
        rows = [replace(row_of(key), token_advantages=None, topk_advantages=None) for key in keys]
        return Path(str(write_shard(folder, "teacher", plain_table(rows, schema))))

    mixed, finished, needed = pending(done, waiting, b"n" * 16), pending(done), pending(other)
    report = collect_garbage(tmp_path, yes=True)
    assert [(one.rows, one.kept) for one in report.garbage if one.kind == "pending"] in (
        [(2, 1), (1, 0)],
        [(1, 0), (2, 1)],
    )
    assert (mixed.exists(), finished.exists(), needed.exists()) == (False, False, True)
    left = [key for table in read_shards(folder, "teacher") for key in table["key"].to_pylist()]
    assert sorted(left) == sorted([waiting, other])


def test_samples_stay_as_long_as_one_set_was_made_of_them(tmp_path: Path) -> None:
    sampling = replace(SAMPLING, samples_per_prompt=2)
    sampled = make_response_set(replace(INFO, name="sampled", sampling=sampling), response_rows(0, ["a", "b"]))
    write_response_set(tmp_path, sampled)
    requests = [SampleRequest(np.array([n], dtype=np.int32), 0) for n in range(3)]
    for settings_of in (SAMPLING, replace(SAMPLING, seed=1)):
        write_samples(tmp_path, settings_of, requests, [np.array([5], dtype=np.int32)] * 3)
    age(*files(tmp_path / "samples"))
    collect_garbage(tmp_path, yes=True)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == [samples_folder(tmp_path, SAMPLING).name]


Version = tuple[bytes, int]


def chunks(keys: list[Version], sizes: Iterator[int]) -> Iterator[list[Version]]:
    while keys:
        size = next(sizes)
        yield keys[:size]
        keys = keys[size:]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_exactly_what_sets_need_is_kept(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        cache = Path(folder)
        sets = [a_set(seed, rows=data.draw(st.integers(1, 6))) for seed in range(3)]
        kept = data.draw(st.sets(st.integers(0, 2), min_size=1))
        for number in kept:
            write_response_set(cache, sets[number])
        needed = {key for number in kept for key in sets[number].table["key"].to_pylist()}
        write_scoring(cache, SCORING)
        everything = sorted({key for one in sets for key in one.table["key"].to_pylist()} | {b"n" * 16})
        versions = st.tuples(st.sampled_from(everything), st.integers(0, 2))
        scored = data.draw(st.lists(versions, min_size=1))  # some keys twice
        for part in chunks(scored, iter(lambda: data.draw(st.integers(1, 4)), None)):
            write_signals(cache, SCORING, [row_of(*version) for version in part])
        before = signals_of(cache, SCORING)
        rows = len(read_signals(cache, SCORING))
        listed = collect_garbage(cache)
        assert len(read_signals(cache, SCORING)) == rows
        assert exact(collect_garbage(cache, yes=True)) == exact(listed)
        after = signals_of(cache, SCORING)
        assert after.keys() >= before.keys() & needed
        assert all(equal(after[key], before[key]) for key in before.keys() & needed)
        left = collect_garbage(cache)
        assert left.garbage == []
        if left.repeated:
            assert len({key for key, _ in scored}) < len(scored)
            pack_cache(cache)
            collect_garbage(cache, yes=True)
        after = signals_of(cache, SCORING)
        assert after.keys() == before.keys() & needed
        assert all(equal(after[key], before[key]) for key in after)


def test_a_damaged_set_or_a_damaged_file_that_would_change_stops_it(cache: Path) -> None:
    shard = max(files(cache / "scorings"), key=lambda path: path.stat().st_size)
    next((cache / "responses").glob("rejected-*")).unlink()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = files(cache)
    with pytest.raises(DamagedFileError, match="digest"):
        collect_garbage(cache, yes=True)
    path = next((cache / "responses").glob("chosen-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"chosen-.*damaged"):
        collect_garbage(cache, yes=True)
    assert files(cache) == before


def test_the_command_lists_first_and_removes_with_yes(cache: Path, tmp_path: Path) -> None:
    next((cache / "responses").glob("rejected-*")).unlink()
    done = CliRunner().invoke(cli.app, ["cache", "gc", str(cache), "--report", str(tmp_path / "report.json")])
    assert done.exit_code == 0
    assert "can be removed; --yes does it" in done.stdout
    places = [one["place"] for one in json.loads((tmp_path / "report.json").read_text())["garbage"]]
    assert places
    assert all(place in done.stdout.replace("\n", "") for place in places)
    done = CliRunner().invoke(cli.app, ["cache", "gc", str(cache), "--yes"])
    assert "bytes removed" in done.stdout
    assert not any((cache / place).exists() for place in places)
    done = CliRunner().invoke(cli.app, ["cache", "gc", str(cache)])
    assert done.stdout == "no garbage\n"
    assert "remove its file in CACHE/responses" in " ".join(
        CliRunner().invoke(cli.app, ["cache", "gc", "--help"]).stdout.split()
    )


def test_no_cache_and_one_that_cannot_be_written_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CacheError, match="no cache there"):
        collect_garbage(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OptionError, match=r"CACHE .*cannot be written"):
        collect_garbage(cache, yes=True)
    before = {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))}
    assert collect_garbage(cache).garbage == [], "to list needs no right to write"
    assert {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))} == before


def test_a_rewritten_file_says_what_the_old_one_said(cache: Path) -> None:
    (scoring,) = read_scorings(cache)
    before = {path: read_shard(path) for path in (cache / "scorings" / scoring.id).glob("signals-*")}
    next((cache / "responses").glob("rejected-*")).unlink()
    collect_garbage(cache, yes=True)
    for path in (cache / "scorings" / scoring.id).glob("signals-*"):
        table = read_shard(path)
        assert table.schema == next(iter(before.values())).schema


def test_a_file_without_keys_stops_it(tmp_path: Path) -> None:
    write_response_set(tmp_path, a_set(0))
    write_scoring(tmp_path, SCORING)
    path = write_shard(SCORING.folder(tmp_path), "signals", pa.table({"row": [1]}))
    with pytest.raises(DamagedFileError, match="it has no column of keys"):
        collect_garbage(tmp_path, yes=True)
    assert Path(str(path)).exists()


def test_of_two_rows_with_one_key_the_one_that_readers_see_stays(tmp_path: Path) -> None:
    """A file that loses a row gets another name, which may sort after that of the other file."""
    responses = a_set(0, rows=2)
    needed, other = responses.table["key"].to_pylist()
    for version in range(8):  # enough names that some sort before and some after
        folder = tmp_path / str(version)
        write_response_set(folder, responses)
        write_scoring(folder, SCORING)
        parts = [[row_of(needed, 1), row_of(other)], [row_of(needed, 2), row_of(b"n" * 16, version)]]
        for part in parts:
            write_signals(folder, SCORING, part)
        before = signals_of(folder, SCORING)[needed]
        report = collect_garbage(folder, yes=True)
        assert len(report.repeated) == 1
        assert equal(signals_of(folder, SCORING)[needed], before)
        pack_cache(folder)
        report = collect_garbage(folder, yes=True)
        assert (report.repeated, [one.rows for one in report.garbage]) == ([], [1])
        assert equal(signals_of(folder, SCORING)[needed], before)


def test_the_command_says_that_pack_comes_first(tmp_path: Path) -> None:
    responses = a_set(0, rows=1)
    write_response_set(tmp_path, responses)
    write_scoring(tmp_path, SCORING)
    (needed,) = responses.table["key"].to_pylist()
    write_signals(tmp_path, SCORING, [row_of(needed, 1)])
    write_signals(tmp_path, SCORING, [row_of(needed, 2), row_of(b"n" * 16)])
    done = CliRunner().invoke(cli.app, ["cache", "gc", str(tmp_path)])
    assert "other files have rows of it; adpa cache pack first" in " ".join(done.stdout.split())
