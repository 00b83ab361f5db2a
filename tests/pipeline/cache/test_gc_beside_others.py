"""gc at the same time as runs that write, or killed at any step: no set loses a row."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tests.data.makers import INFO, SAMPLING, TURN_END, token_ids
from tests.pipeline.faults import DIGEST, SCORING, SCORING_BATCH, TOKENIZER, Model, Point, Watched
from upath import UPath

from adpa import collect_garbage, list_cache, merge_cache, verify_cache
from adpa.data.cache.format import prepare_cache
from adpa.data.cache.inventory import list_files
from adpa.data.cache.removal import remove_unless, set_aside
from adpa.data.cache.responses import ResponseSet, make_response_set, read_response_sets, write_response_set
from adpa.data.cache.samples import SampleRequest, samples_folder, write_samples
from adpa.data.cache.shards import list_shards, write_shard
from adpa.data.cache.signal_rows import plain_schema, plain_table
from adpa.data.cache.signals import read_scorings, read_signals, write_scoring
from adpa.data.cache.tokenizers import read_tokenizer, write_tokenizer
from adpa.errors import CacheError, DamagedFileError
from adpa.pipeline.cache import gc as cache_gc
from adpa.pipeline.cache import merge as cache_merge
from adpa.pipeline.scoring.score import missing_sequences, score

pytestmark = pytest.mark.slow

WEEK = 7 * 24 * 3600


@pytest.fixture
def cache() -> Iterator[Path]:
    """A folder in memory where there is one: much is synced here."""
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as temporary:
        yield Path(temporary) / "cache"


def a_set(first: int, last: int) -> ResponseSet:
    """Rows of some numbers; sets of the same numbers share their rows."""
    info = replace(INFO, tokenizer=DIGEST, vocabulary=SCORING.vocabulary)
    rows = range(first, last)
    return make_response_set(info, [(str(row), token_ids(5, row), token_ids(7, TURN_END)) for row in rows])


def run(cache: Path, responses: ResponseSet) -> int:
    """The steps of ``precompute`` on a set, in its order; returns the number of rows that it scored."""
    prepare_cache(cache)
    write_response_set(cache, responses)
    write_tokenizer(cache, TOKENIZER, DIGEST)
    missing = missing_sequences(cache, SCORING, responses.sequences())
    score(cache, SCORING, missing, lambda _: Model(), SCORING_BATCH)
    return len(missing)


def drop_sets(cache: Path) -> None:
    for path in list_shards(cache / "responses"):
        path.unlink()


def check_whole(cache: Path) -> None:
    """Every set has its tokenizer and all of its rows, which a scoring describes."""
    keys = set().union(*(read_signals(cache, scoring).keys() for scoring in read_scorings(cache)))
    for responses in read_response_sets(cache):
        assert set(responses.table["key"].to_pylist()) <= keys
        read_tokenizer(cache, responses.info.tokenizer)


def age(folder: Path) -> None:
    """Makes everything in a folder a week older."""
    for path in folder.rglob("*"):
        changed = path.stat().st_mtime - WEEK
        os.utime(path, (changed, changed))


def fill(cache: Path) -> None:
    """A set of rows 0 to 3 that was dropped, one of rows 2 to 5 that is there, and garbage of every other kind."""
    run(cache, a_set(0, 4))
    drop_sets(cache)
    run(cache, a_set(2, 6))
    (scoring_folder,) = (cache / "scorings").iterdir()
    rows = [replace(row, key=bytes([number]) * 16) for number, row in enumerate(rows_of(cache))]
    teachers = [replace(row, token_advantages=None, topk_advantages=None) for row in rows]
    write_shard(scoring_folder / "pending", "teacher", plain_table(teachers, plain_schema(SCORING.top_k)))
    write_scoring(cache, replace(SCORING, top_k=2))
    write_samples(cache, SAMPLING, [SampleRequest(token_ids(5), 0)], [token_ids(7)])
    age(cache)


def rows_of(cache: Path) -> list[Any]:
    signals = read_signals(cache, SCORING)
    return [signals.row(number) for number in range(len(signals))]


def before_step(cache: Path, step: int, do: Callable[[], object]) -> bool:
    """Removes garbage, and acts before, in or after the nth call that changes files; returns whether that call came."""
    reached = iter(range(10**9))
    done = []

    def reach(_: Point) -> None:
        if next(reached) == step:
            done.append(do())

    with Watched(cache, reach, lambda _: None):
        collect_garbage(cache, yes=True)
    return bool(done)


@pytest.mark.parametrize("dropped", [a_set(0, 4), a_set(0, 6)], ids=["a dropped set", "another set of its rows"])
def test_a_set_that_comes_back_at_any_step_keeps_its_rows(cache: Path, dropped: ResponseSet) -> None:
    steps = 0
    while True:
        at_step = cache / str(steps)
        fill(at_step)
        came = before_step(at_step, steps, lambda at_step=at_step: run(at_step, dropped))  # type: ignore[misc]
        check_whole(at_step)
        assert not list(at_step.rglob(".*")), steps
        if not came:
            break
        assert dropped.id in {one.id for one in read_response_sets(at_step)}
        steps += 1
    assert steps > 20


def test_a_set_that_comes_when_all_sets_are_gone_keeps_its_tokenizer_and_scoring(cache: Path) -> None:
    steps = 0
    while True:
        at_step = cache / str(steps)
        run(at_step, a_set(0, 4))
        drop_sets(at_step)
        age(at_step)
        came = before_step(at_step, steps, lambda at_step=at_step: run(at_step, a_set(0, 4)))  # type: ignore[misc]
        if not came:
            break
        check_whole(at_step)
        assert len(read_signals(at_step, SCORING)) >= 4
        steps += 1
    assert steps > 12
    assert list_cache(at_step).total.files == 1, "only the marker is left where nothing came"


def kill_at(cache: Path, step: int, back: bool) -> bool:
    """Kills a gc before one step, where a set may just have come back; returns whether that step came."""
    process = os.fork()
    if process == 0:
        try:

            def die() -> None:
                if back:
                    write_response_set(cache, a_set(0, 4))
                os.kill(os.getpid(), signal.SIGKILL)

            before_step(cache, step, die)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0


@pytest.mark.parametrize("back", [False, True])
def test_a_gc_killed_at_any_step_loses_nothing_and_the_next_one_and_a_run_mend_it(cache: Path, back: bool) -> None:
    steps = 0
    while True:
        at_step = cache / str(steps)
        fill(at_step)
        if not kill_at(at_step, steps, back):
            break
        before = {row.key for row in rows_of(at_step)}
        collect_garbage(at_step, yes=True)
        after = {row.key for row in rows_of(at_step)}
        needed = {key for one in read_response_sets(at_step) for key in one.table["key"].to_pylist()}
        assert before & needed <= after, steps
        for responses in read_response_sets(at_step):
            run(at_step, responses)
        check_whole(at_step)
        steps += 1
    assert steps > 20


def test_rows_that_a_killed_gc_hid_are_put_back_for_the_set_that_needs_them(cache: Path) -> None:
    run(cache, a_set(0, 4))
    whole = {row.key for row in rows_of(cache)}
    for path in list((cache / "scorings" / SCORING.id).glob("signals-*")):
        path.rename(path.with_name(f".{path.name}.{0:032x}"))
    tokenizer = cache / "tokenizers" / DIGEST
    tokenizer.rename(tokenizer.with_name(f".{DIGEST}.{0:032x}"))
    age(cache)
    assert rows_of(cache) == []
    assert collect_garbage(cache).garbage == [], "what will be put back is not garbage"
    collect_garbage(cache, yes=True)
    assert {row.key for row in rows_of(cache)} == whole
    assert not list(cache.rglob(".*"))
    check_whole(cache)


def test_the_file_of_a_run_at_work_is_not_taken_from_it(cache: Path) -> None:
    run(cache, a_set(0, 4))
    path = next((cache / "scorings" / SCORING.id).glob("signals-*"))
    writing = path.rename(path.with_name(f".{path.name}.{0:032x}"))
    collect_garbage(cache, yes=True)
    assert writing.exists()
    assert path.exists()


def test_a_hidden_file_that_is_half_goes_when_it_is_old(cache: Path) -> None:
    run(cache, a_set(0, 4))
    half = cache / "scorings" / SCORING.id / f".signals-{0:032x}.arrow.{0:032x}"
    half.write_bytes(b"half")
    age(cache)
    collect_garbage(cache, yes=True)
    assert not half.exists()
    check_whole(cache)


def test_gc_beside_merge_sees_whose_the_rows_are(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = cache / "ours", cache / "other"
    run(ours, a_set(10, 12))
    run(other, a_set(0, 4))
    real = cache_merge._Merge.take

    def take(merge: Any, file: Any) -> None:
        real(merge, file)
        collect_garbage(ours, yes=True)

    monkeypatch.setattr(cache_merge._Merge, "take", take)
    assert merge_cache(ours, other).refused == []
    check_whole(ours)
    assert len(list(read_response_sets(ours))) == 2


def test_after_a_repair_gc_waits_until_the_set_is_there_again(cache: Path) -> None:
    run(cache, a_set(0, 4))
    (path,) = list_shards(cache / "responses")
    set_aside(cache, [file for file in list_files(cache) if file.path == path])
    for yes in (False, True):
        with pytest.raises(CacheError) as caught:
            collect_garbage(cache, yes=yes)
        assert str(caught.value) == (
            f"{cache}/damaged/responses/{path.name}: a response set that was set aside; without it its rows would be "
            "taken for garbage; run the same adpa precompute first, or remove this file"
        )
    assert run(cache, a_set(0, 4)) == 0, "no row was lost"
    (removed,) = collect_garbage(cache, yes=True).garbage
    assert removed.kind == "damaged"
    check_whole(cache)


def test_what_others_hide_is_left_alone(cache: Path) -> None:
    run(cache, a_set(0, 4))
    strangers = [".gitattributes", "responses/.nfs0001", "scorings/.DS_Store", "tokenizers/.git/config", f".a.{0:031x}"]
    for place in strangers:
        (cache / place).parent.mkdir(exist_ok=True)
        (cache / place).write_bytes(b"theirs")
    (cache / f".folder.{0:032x}").mkdir()
    age(cache)
    report = collect_garbage(cache, yes=True)
    assert (report.garbage, report.young) == ([], [])
    assert all((cache / place).exists() for place in [*strangers, f".folder.{0:032x}"])
    unknown = list_cache(cache).unknown
    assert {place.split("/")[0] for place in strangers} <= {place.split("/")[0] for place in unknown}


def test_a_loop_of_links_and_a_pipe_are_unknown_and_stop_nothing(cache: Path) -> None:
    run(cache, a_set(0, 4))
    (cache / "samples").symlink_to("samples")
    os.mkfifo(cache / "pipe")
    assert list_cache(cache).unknown == ["pipe", "samples"]
    assert verify_cache(cache).unknown == ["pipe", "samples"]
    assert collect_garbage(cache, yes=True).garbage == []
    (cache / "responses").joinpath("chosen-aa-bb.arrow").unlink(missing_ok=True)
    os.mkfifo(cache / "responses" / "chosen-aa-bb.arrow")
    assert "responses/chosen-aa-bb.arrow" in verify_cache(cache).unknown
    with pytest.raises(DamagedFileError, match="not a regular file"):
        collect_garbage(cache)


def test_listing_reads_keys_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache)
    monkeypatch.setattr(cache_gc, "read_shard", lambda _: pytest.fail("rows were read"))
    report = collect_garbage(cache)
    assert any(one.kept for one in report.garbage)
    assert all(0 <= one.bytes <= (cache / one.place).stat().st_size for one in report.garbage)


def test_samples_are_there_until_a_set_is_made_of_them(cache: Path) -> None:
    fill(cache)
    assert samples_folder(cache, SAMPLING).exists()
    collect_garbage(cache, yes=True)
    assert not samples_folder(cache, SAMPLING).exists()


def test_in_an_object_store_it_is_looked_just_before_a_file_goes() -> None:
    file = UPath("memory://gc/signals-0.arrow")
    file.write_bytes(b"rows")
    assert not remove_unless(file.parent, file, lambda: True)
    assert file.exists()
    assert remove_unless(file.parent, file, lambda: False)
    assert not file.exists()
