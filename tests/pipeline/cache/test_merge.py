"""Merging: a cache takes the files of another; nothing is read twice or changed, and no damaged file is taken."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import WriteRows
from tests.data.makers import INFO, SAMPLING, SCORING, assert_same_row, response_rows, signal_row
from tests.pipeline.conftest import Filled
from typer.testing import CliRunner

from adpa import cli, merge_cache, pack_cache, precompute, verify_cache
from adpa.data.cache.format import prepare_cache
from adpa.data.cache.responses import make_response_set, read_response_sets, write_response_set
from adpa.data.cache.samples import SampleRequest, read_samples, write_samples
from adpa.data.cache.set_records import make_record
from adpa.data.cache.shards import list_shards, read_shard, write_shard
from adpa.data.cache.signals import read_scorings, read_signals, write_scoring, write_signals
from adpa.errors import CacheError, OptionError
from adpa.pipeline.cache import merge as cache_merge


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def other(few_words: Filled, tmp_path: Path) -> Path:
    """A copy of a filled cache."""
    return Path(shutil.copytree(few_words.cache, tmp_path / "other"))


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A cache without anything."""
    prepare_cache(tmp_path / "cache")
    return tmp_path / "cache"


def test_an_empty_cache_becomes_the_other_by_links(empty: Path, other: Path) -> None:
    before = files(other)
    report = merge_cache(empty, other)
    assert files(other) == before
    assert (report.present.files, report.refused, report.left_out.files) == (1, [], 0), "the format's marker is"
    assert report.linked.files + report.copied.files == len(before) - 1
    assert report.linked.bytes + report.copied.bytes + report.present.bytes == sum(map(len, before.values()))
    shards = [place for place in before if place.endswith(".arrow")]
    assert report.linked.files == len(shards)
    assert all((empty / place).samefile(other / place) for place in shards)
    assert verify_cache(empty).faults == []


def test_what_is_there_is_left_and_merging_again_does_nothing(empty: Path, other: Path) -> None:
    merge_cache(empty, other)
    before = files(empty)
    report = merge_cache(empty, other)
    assert files(empty) == before
    assert (report.linked.files, report.copied.files) == (0, 0)
    assert report.present.files == len(before)


def test_without_links_files_are_copied(empty: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuses)
    report = merge_cache(empty, other)
    assert (report.linked.files, report.copied.files) == (0, len(files(other)) - 1)
    assert {k: v for k, v in files(empty).items() if k.endswith("arrow")} == {
        k: v for k, v in files(other).items() if k.endswith("arrow")
    }


def test_a_packed_cache_takes_no_row_again(empty: Path, other: Path) -> None:
    merge_cache(empty, other)
    pack_cache(empty)
    before = files(empty)
    report = merge_cache(empty, other)
    assert (report.linked.files, report.copied.files) == (0, 0)
    assert files(empty) == before


def test_precompute_goes_on_with_what_another_machine_scored(
    few_words: Filled, other: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    models = few_words.models
    common: dict[str, Any] = {"teacher": str(models.teacher), "reference": str(models.reference), "top_k": 10}
    row = {"prompt": "Say hello.", "chosen": "Paris.", "rejected": "Four."}
    mine = tmp_path / "mine"
    assert precompute(**common, data=str(write_rows([row])), cache=mine).scored == 2
    merge_cache(mine, other)
    assert precompute(**common, data=str(few_words.data), cache=mine).scored == 0
    (scoring,) = read_scorings(mine)
    assert len(read_signals(mine, scoring)) == 2 + len(read_signals(other, scoring))


def test_a_damaged_file_is_named_and_nothing_of_it_is_taken(empty: Path, other: Path, tmp_path: Path) -> None:
    (scoring,) = read_scorings(other)
    chosen, tokenizer = next((other / "responses").glob("chosen-*")), next((other / "tokenizers").iterdir())
    shard = list_shards((other / "scorings" / scoring.id), "signals")[0]
    for path in (chosen, shard):
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 4
        path.write_bytes(bytes(content))
    (tokenizer / "tokenizer.json").write_text("{")
    done = CliRunner().invoke(
        cli.app, ["cache", "merge", str(empty), str(other), "--report", str(tmp_path / "report.json")]
    )
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    refused = json.loads((tmp_path / "report.json").read_text())["refused"]
    assert len(refused) == 3
    for path in (chosen, shard, tokenizer):
        assert str(path) in done.stderr
        assert not (empty / Path(str(path)).relative_to(other)).exists()
    assert len(list(read_response_sets(empty))) == 2


def test_signals_of_a_scoring_whose_description_is_damaged_are_left_out(empty: Path, other: Path) -> None:
    (scoring,) = read_scorings(other)
    ((other / "scorings" / scoring.id) / "scoring.json").write_text("{")
    report = merge_cache(empty, other)
    assert len(report.refused) == 1
    assert report.left_out.files == len(list_shards((other / "scorings" / scoring.id), "signals"))
    assert not (empty / "scorings" / scoring.id).exists()


def test_what_is_no_result_is_left_out(empty: Path, other: Path) -> None:
    (scoring,) = read_scorings(other)
    places = ("responses/.chosen-0.f00", "damaged/x", "notes.txt", f"scorings/{scoring.id}/pending/teacher-0.arrow")
    for place in places:
        (other / place).parent.mkdir(exist_ok=True)
        (other / place).write_bytes(b"12")
    report = merge_cache(empty, other)
    assert (report.left_out.files, report.left_out.bytes) == (4, 8)
    assert not any((empty / place).exists() for place in places)


def flip(path: Path) -> None:
    """Changes one bit of a file, but not of the files linked to it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_damaged_here_and_sound_there_is_taken_and_named(empty: Path, other: Path, packed: bool) -> None:
    """A file with the same name replaces it; rows of another file are added, and it stays for verify."""
    merge_cache(empty, other)
    if packed:
        pack_cache(empty)
    (scoring,) = read_scorings(other)
    signals = min((empty / "scorings" / scoring.id).glob("signals-*"))
    samples, chosen = next((empty / "samples").rglob("*.arrow")), next((empty / "responses").glob("chosen-*"))
    description = empty / "scorings" / scoring.id / "scoring.json"
    damaged = [signals, samples, chosen, description]
    for path in damaged:
        flip(path)
    done = CliRunner().invoke(cli.app, ["cache", "merge", str(empty), str(other)])
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert "adpa cache merge" in done.stdout
    assert f"{empty}: files of its own are damaged" in done.stderr
    assert all(str(path) in done.stderr for path in damaged)
    report = verify_cache(empty)
    if packed:
        assert {fault.place for fault in report.faults} == {signals.relative_to(empty).as_posix()}
        verify_cache(empty, repair=True)
    assert verify_cache(empty).faults == []
    assert read_signals(empty, scoring).keys() == read_signals(other, scoring).keys()
    assert merge_cache(empty, other).failure == ""


def test_a_damaged_tokenizer_here_is_named(empty: Path, other: Path) -> None:
    merge_cache(empty, other)
    tokenizer = next((empty / "tokenizers").iterdir())
    (tokenizer / "tokenizer.json").write_text("{")
    report = merge_cache(empty, other)
    assert len(report.damaged) == 1
    assert str(tokenizer) in report.failure


@pytest.mark.parametrize("which", ["cache", "other"])
def test_a_pack_at_any_moment_is_no_fault(
    which: str, empty: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either cache, before any call that reads a shard."""
    (scoring,) = read_scorings(other)
    signals = read_signals(other, scoring)
    merge_cache(empty, other)
    write_signals(empty, scoring, [replace(signals.row(0), key=b"e" * 16)])
    write_signals(other, scoring, [replace(signals.row(0), key=b"o" * 16)])
    for moment in range(6):
        pair = {
            "cache": Path(shutil.copytree(empty, tmp_path / f"cache-{moment}")),
            "other": Path(shutil.copytree(other, tmp_path / f"other-{moment}")),
        }
        calls = iter(range(10**9))

        def read(path: Path, pair: dict[str, Path] = pair, calls: Any = calls, moment: int = moment) -> pa.Table:
            if next(calls) == moment:
                pack_cache(pair[which])
            return read_shard(path)

        monkeypatch.setattr(cache_merge, "read_shard", read)
        report = merge_cache(pair["cache"], pair["other"])
        assert (report.refused, report.damaged) == ([], [])
        assert read_signals(pair["cache"], scoring).keys() == signals.keys() | {b"e" * 16, b"o" * 16}


def rows(cache: Path) -> tuple[set[str], set[bytes], set[bytes]]:
    """Sets, keys of signals, keys of samples."""
    return (
        {one.shard_prefix() for one in read_response_sets(cache)},
        read_signals(cache, SCORING).keys(),
        set(read_samples(cache, SAMPLING)),
    )


parts = st.lists(st.sets(st.integers(0, 6), min_size=1), max_size=3)
contents = st.tuples(st.sets(st.integers(0, 3)), parts, parts)


def fill(cache: Path, content: tuple[set[int], list[set[int]], list[set[int]]]) -> None:
    """Response sets, files of signals, and files of samples, by their numbers."""
    sets, signals, samples = content
    prepare_cache(cache)
    for seed in sets:
        write_response_set(cache, make_response_set(INFO, response_rows(seed, ["a", "b"])))
    write_scoring(cache, SCORING)
    for part in signals:
        write_signals(cache, SCORING, [signal_row(bytes([key]) * 16, 2, seed=key) for key in sorted(part)])
    for part in samples:
        requests = [SampleRequest(np.array([key], dtype=np.int32), 0) for key in sorted(part)]
        write_samples(cache, SAMPLING, requests, [np.array([key], dtype=np.int32) for key in sorted(part)])


@given(contents, contents)
@settings(max_examples=12, deadline=None)
def test_rows_are_those_of_both_in_either_order_and_once_is_enough(left: Any, right: Any) -> None:
    with TemporaryDirectory() as folder:
        for name in ("left", "there", "right", "back"):
            fill(Path(folder, name), left if name in ("left", "there") else right)
        one, other, there, back = (Path(folder, name) for name in ("left", "right", "there", "back"))
        before = [rows(one), rows(other)]
        merge_cache(one, other)
        merge_cache(back, there)
        assert rows(one) == rows(back) == tuple(a | b for a, b in zip(*before, strict=True))
        assert rows(other) == before[1]
        known = files(one)
        merge_cache(one, other)
        assert files(one) == known


def test_what_cannot_be_merged_is_refused(
    empty: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pair in ((tmp_path, other), (empty, tmp_path)):
        with pytest.raises(CacheError, match="no cache there"):
            merge_cache(*pair)
    (tmp_path / "link").symlink_to(empty)
    for same in (empty, tmp_path / "link", empty / ".." / empty.name):
        with pytest.raises(OptionError, match="the same cache as"):
            merge_cache(empty, same)
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OptionError, match=r"CACHE .*cannot be written"):
        merge_cache(empty, other)


def test_a_link_to_a_file_is_followed(empty: Path, other: Path) -> None:
    path = next((other / "responses").glob("chosen-*"))
    elsewhere = path.rename(other.parent / "elsewhere")
    path.symlink_to(elsewhere)
    merge_cache(empty, other)
    taken = empty / path.relative_to(other)
    assert not taken.is_symlink()
    assert os.path.samefile(taken, elsewhere)


def test_a_file_without_keys_is_named_and_not_taken(empty: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    prepare_cache(other)
    write_scoring(other, SCORING)
    write_signals(empty, SCORING, [signal_row(b"k" * 16, 2, seed=0)])
    write_scoring(empty, SCORING)
    paths = [write_shard(SCORING.folder(cache), "signals", pa.table({cache.name: [1]})) for cache in (empty, other)]
    write_signals(other, SCORING, [signal_row(b"o" * 16, 2, seed=0)])
    report = merge_cache(empty, other)
    assert report.damaged == [f"{paths[0]}: damaged: it has no column of keys"]
    assert report.refused == [f"{paths[1]}: damaged: it has no column of keys"]
    assert report.linked.files == 1


def test_of_two_rows_with_one_key_the_one_that_readers_see_stays(tmp_path: Path) -> None:
    """The name of the other cache's file may sort first."""
    ours, twice, theirs = (bytes([key]) * 16 for key in range(3))
    for version in range(8):
        empty, other = tmp_path / f"cache-{version}", tmp_path / f"other-{version}"
        for cache, key in ((empty, ours), (other, theirs)):
            prepare_cache(cache)
            write_scoring(cache, SCORING)
            seed = 2 * version + (cache == other)
            write_signals(cache, SCORING, [signal_row(twice, 2, seed=seed), signal_row(key, 2, seed=seed)])
        report = merge_cache(empty, other)
        assert (report.linked.files, report.copied.files) == (0, 1)
        read = read_signals(empty, SCORING)
        assert (len(read), read.keys()) == (3, {ours, twice, theirs})
        number = int(read.locate(pa.array([twice], pa.binary(16)))[0])
        assert_same_row(read.row(number), signal_row(twice, 2, seed=2 * version))
        known = files(empty)
        assert merge_cache(empty, other).copied.files == 0
        assert files(empty) == known


@pytest.mark.parametrize("own_data", ["/mine/prefs.jsonl", None])
def test_a_set_keeps_its_own_record_and_a_new_one_brings_its_own(own_data: str | None, tmp_path: Path) -> None:
    """The paths of the other cache's users say nothing to those of this one."""
    rows, more = response_rows(0, "ab"), response_rows(1, "abc")
    caches = {name: tmp_path / name for name in ("mine", "theirs")}
    for cache in caches.values():
        prepare_cache(cache)
    mine = make_record(own_data, None) if own_data else None
    write_response_set(caches["mine"], make_response_set(INFO, rows, mine))
    for set_rows in (rows, more):
        write_response_set(
            caches["theirs"], make_response_set(INFO, set_rows, make_record("/theirs/prefs.jsonl", None))
        )
    report = merge_cache(caches["mine"], caches["theirs"])
    assert (report.linked.files, report.present.files, report.refused) == (1, 2, [])
    records = {len(one): one.record and one.record.data for one in read_response_sets(caches["mine"])}
    assert records == {2: own_data, 3: "/theirs/prefs.jsonl"}
    assert len(list_shards(caches["mine"] / "responses")) == 2
