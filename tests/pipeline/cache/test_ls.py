"""The listing of a cache: its content, origin and size, without reading it whole."""

import json
import shutil
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from tests.pipeline.conftest import Filled

from adpa import CacheListing, list_cache, pack_cache
from adpa.data.cache.responses import make_response_set, read_response_sets, write_response_set
from adpa.data.cache.rounding import advantage_errors, kl_errors
from adpa.data.cache.shards import peek_keys
from adpa.data.cache.signals import SignalTable, read_scorings, read_signals, write_scoring, write_signals
from adpa.errors import CacheError
from adpa.pipeline.cache import ls as cache_ls
from adpa.pipeline.terminal.cache import show_listing


@pytest.fixture
def cache(few_words: Filled, tmp_path: Path) -> Path:
    """A copy of a filled cache."""
    return Path(shutil.copytree(few_words.cache, tmp_path / "cache"))


def as_text(listing: CacheListing) -> str:
    console = Console(file=StringIO(), width=100)
    console.print(show_listing(listing))
    written = console.file
    assert isinstance(written, StringIO)
    return written.getvalue()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_sets_and_scorings_are_counted(cache: Path) -> None:
    listing = list_cache(cache)
    sets = {one.shard_prefix(): one for one in read_response_sets(cache)}
    (scoring,) = read_scorings(cache)
    signals = read_signals(cache, scoring)
    assert [one.name for one in listing.sets] == list(sets), "the newest first"
    assert [one.record for one in listing.sets] == [one.record for one in sets.values()]
    for listed in listing.sets:
        sequences = sets[listed.name].sequences()
        assert (listed.rows, listed.info) == (len(sequences), sets[listed.name].info)
        assert listed.tokens == sum(len(sequence.response_ids) for sequence in sequences)
        assert listed.prompt_tokens == sum(len(sequence.prompt_ids) for sequence in sequences)
        assert listed.scored == {scoring.id: listed.rows}
    (scored,) = listing.scorings
    assert scored.scoring == scoring
    assert scored.rows == len(signals.keys())
    assert scored.tokens == sum(len(signals.row(number).token_logprobs) for number in range(len(signals)))
    assert (scored.repeated, scored.unneeded, scored.pending) == (0, 0, 0)
    shards = list((cache / "scorings" / scoring.id).glob("signals-*"))
    assert (scored.shards, scored.bytes) == (len(shards), sum(shard.stat().st_size for shard in shards))
    assert scored.bytes_per_token == pytest.approx(scored.bytes / scored.tokens)


def test_every_file_is_in_the_total(cache: Path) -> None:
    listing = list_cache(cache)
    assert (listing.total.files, listing.total.bytes) == (len(files(cache)), size(cache))
    (samples,) = listing.samples
    (sampled,) = (one.name for one in listing.sets if one.info.name == "sampled")
    assert (samples.sets, samples.rows, samples.bytes) == ([sampled], 16, size(cache / "samples"))
    (tokenizer,) = listing.tokenizers
    assert tokenizer.bytes == size(cache / "tokenizers")
    assert tokenizer.sets == [one.name for one in listing.sets]
    assert (listing.unknown, listing.unreadable, listing.unfinished.files) == ([], [], 0)


def test_the_terminal_says_who_made_what(cache: Path, few_words: Filled) -> None:
    text = " ".join(as_text(list_cache(cache)).split())
    (scoring,) = read_scorings(cache)
    for part in (str(few_words.models.teacher), str(few_words.models.reference), "K = 10", "float32, hf"):
        assert part.replace(" ", "") in text.replace(" ", "")
    assert f"scored: 8 of 8 by {scoring.id}" in text
    assert "temperature 1, top-p 1, seed 0, 2 to a prompt, at most 6 tokens" in text


def test_what_is_partly_scored_unneeded_or_said_twice_is_told(cache: Path) -> None:
    (scoring,) = read_scorings(cache)
    signals = read_signals(cache, scoring)
    row = signals.row(0)
    write_signals(cache, scoring, [row, replace(row, key=b"n" * 16)])
    other = replace(scoring, top_k=1)
    write_scoring(cache, other)
    one_id = replace(
        row,
        topk_ids=row.topk_ids[:, :1],
        topk_logprobs=row.topk_logprobs[:, :1],
        topk_advantages=None if row.topk_advantages is None else row.topk_advantages[:, :1],
    )
    write_signals(cache, other, [one_id])
    listing = list_cache(cache)
    scored = {one.id: one for one in listing.scorings}
    assert (scored[scoring.id].repeated, scored[scoring.id].unneeded) == (1, 1)
    assert scored[scoring.id].rows == len(SignalTable([]).keys() | signals.keys()) + 1
    assert scored[other.id].rows == 1
    assert sum(one.scored[other.id] for one in listing.sets) >= 1
    text = " ".join(as_text(listing).split())
    assert "1 repeated rows; adpa cache pack drops them" in text
    assert "1 rows that no set needs; adpa cache gc removes them" in text


def test_bytes_per_token_leave_out_files_with_rows_of_unknown_length(cache: Path) -> None:
    before = list_cache(cache).scorings[0].bytes_per_token
    (scoring,) = read_scorings(cache)
    write_signals(cache, scoring, [replace(read_signals(cache, scoring).row(0), key=b"n" * 16)] * 9)
    assert list_cache(cache).scorings[0].bytes_per_token == before


def test_leftovers_and_strangers_are_told(cache: Path) -> None:
    (cache / "responses" / f".chosen-0.arrow.{0:032x}").write_bytes(b"half")
    (cache / "damaged" / "scorings").mkdir(parents=True)
    (cache / "damaged" / "scorings" / "gone").write_bytes(b"123")
    (cache / "notes.txt").write_text("mine\x1b[31m")
    (cache / "evaluation" / "responses").mkdir(parents=True)
    (cache / "mine").mkdir()
    (cache / "mine" / "big").write_bytes(b"1")
    (cache / "loop").symlink_to(cache)
    listing = list_cache(cache)
    assert asdict(listing.unfinished) == {"files": 1, "bytes": 4}
    assert asdict(listing.damaged) == {"files": 1, "bytes": 3}
    assert listing.unknown == ["loop/", "mine/", "notes.txt"]
    assert "unfinished 1 file, 4 bytes" in as_text(listing)


def test_a_file_that_cannot_be_read_is_told_and_the_rest_is_listed(cache: Path) -> None:
    whole = list_cache(cache)
    for folder in ("responses", f"scorings/{whole.scorings[0].id}", f"samples/{whole.samples[0].id}"):
        path = next(path for path in sorted((cache / folder).iterdir()) if path.suffix == ".arrow")
        path.write_bytes(b"no table")
    listing = list_cache(cache)
    assert len(listing.unreadable) == 3
    assert all("damaged" in line and "\n" not in line for line in listing.unreadable)
    assert len(listing.sets) == len(whole.sets) - 1


def test_the_numbers_need_no_signal_to_be_read(cache: Path) -> None:
    """Damage in columns other than the key goes unnoticed: only verify reads them."""
    (scoring,) = read_scorings(cache)
    before = list_cache(cache)
    for path in (cache / "scorings" / scoring.id).glob("signals-*"):
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 8] = b"\xff" * 8
        path.write_bytes(content)
    assert list_cache(cache).scorings == before.scorings


def test_the_report_is_plain_json(cache: Path) -> None:
    listing = list_cache(cache)
    read = json.loads(json.dumps(asdict(listing), allow_nan=False))
    for one in read["sets"]:
        if one["info"]["sampling"]:
            one["info"]["sampling"]["stops"] = tuple(one["info"]["sampling"]["stops"])  # JSON has lists alone
    assert read == asdict(listing)


def test_signals_without_their_description_are_told(cache: Path) -> None:
    (scoring,) = read_scorings(cache)
    folder = cache / "scorings" / scoring.id
    assert list_cache(cache).undescribed.files == 0
    assert "without description" not in as_text(list_cache(cache))
    (folder / "scoring.json").unlink()
    listing = list_cache(cache)
    assert asdict(listing.undescribed) == {"files": len(files(folder)), "bytes": size(folder)}
    assert listing.scorings == []
    assert f"signals without description {len(files(folder))} files, {size(folder):,} bytes" in as_text(listing)


def test_a_pack_between_listing_and_looking_is_no_fault(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**9))
    (before,) = list_cache(cache).scorings

    def packing(path: Path) -> pa.ChunkedArray:
        if next(calls) == 0:
            pack_cache(cache)
        return peek_keys(path)

    monkeypatch.setattr(cache_ls, "peek_keys", packing)
    listing = list_cache(cache)
    (scored,) = listing.scorings
    assert before.shards > scored.shards == 1
    assert (scored.rows, scored.repeated, listing.unreadable) == (before.rows, 0, [])


def test_an_empty_scoring_and_an_empty_set_are_listed(cache: Path) -> None:
    (scoring,) = read_scorings(cache)
    write_scoring(cache, replace(scoring, top_k=3))
    info = next(read_response_sets(cache)).info
    write_response_set(cache, make_response_set(replace(info, max_length=9), []))
    listing = list_cache(cache)
    assert sorted(one.rows for one in listing.sets)[0] == 0
    assert sorted((one.rows, one.bytes_per_token) for one in listing.scorings if one.rows == 0) == [(0, None)]


def test_where_no_cache_is_nothing_is_listed(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="no cache there"):
        list_cache(tmp_path)


def test_a_lossy_scoring_says_what_its_rounding_changes(cache: Path) -> None:
    (scoring,) = read_scorings(cache)
    lossy = replace(scoring, lossy=True)
    signals = read_signals(cache, scoring)
    rows = [signals.row(number) for number in range(len(signals))]
    write_scoring(cache, lossy)
    write_signals(cache, lossy, rows[:3])
    write_signals(cache, lossy, rows[3:])
    errors = {one.id: one.rounding for one in list_cache(cache).scorings}
    assert errors[scoring.id] is None
    actual = errors[lossy.id]
    assert actual is not None
    rounded = read_signals(cache, lossy)
    by_key = {row.key: row for row in map(rounded.row, range(len(rounded)))}
    changes = np.concatenate([np.abs(kl_errors(row, by_key[row.key])) for row in rows])
    assert actual.kl == pytest.approx(changes.mean(), rel=1e-3)
    assert actual.largest_kl == pytest.approx(changes.max(), rel=1e-3)
    advantages = np.concatenate([advantage_errors(row, by_key[row.key]) for row in rows])
    assert actual.advantage == pytest.approx(advantages.mean(), rel=1e-3)
    assert f"by {actual.kl:.1e} nats in the mean" in " ".join(as_text(list_cache(cache)).split())
