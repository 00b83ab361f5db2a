"""Any interleaving of precompute runs over overlapping data sets ends in the same rows as one run.

The runs are whole calls of ``precompute``, with ``cache gc`` and ``cache pack`` beside them, in threads of their own of
which one moves at a time. A run can stop before a model answers a batch, and before a file of the cache is opened for
writing, appears, vanishes, is listed or is read. Hypothesis draws who goes on next, up to which stop, and who is killed
there. The models are no networks, but say of a sequence what its key says, so that rows can be compared bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from functools import cache as remember
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.data.makers import INFO, SCORING, TURN_END, signal_row, token_ids
from tests.pipeline.cache.lockstep import EXAMPLES, STOPS, Chore, Job, Pack, Run, Turn, models_and_steps, take_turns

from adpa.data.cache.format import prepare_cache
from adpa.data.cache.responses import ResponseSet, make_response_set, read_response_sets, write_response_set
from adpa.data.cache.shards import read_shard
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import SignalTable, read_scorings, read_signals, write_scoring, write_signals
from adpa.pipeline.scoring.sample import sample_responses

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _models_and_steps() -> Iterator[None]:
    with models_and_steps():
        yield


Row = tuple[object, ...]


def bits(row: SignalRow) -> Row:
    """A row as a value that is equal to another only if all bits are."""
    values = [getattr(row, field.name) for field in fields(row)]
    return tuple((v.dtype.str, v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values)


def read_rows(cache: Path) -> dict[bytes, Row]:
    """The row of each key in the only scoring; no key may have two different rows in its shards."""
    rows: dict[bytes, Row] = {}
    for scoring in read_scorings(cache):
        table = read_signals(cache, scoring)
        for number in range(len(table)):
            row = table.row(number)
            assert rows.setdefault(row.key, bits(row)) == bits(row), "a key with two rows"
    return rows


def read_keys(cache: Path) -> set[bytes]:
    return set().union(*(read_signals(cache, scoring).keys() for scoring in read_scorings(cache)))


def read_waiting(cache: Path) -> set[bytes]:
    """The keys of the pending rows."""
    return SignalTable(read_shard(path) for path in cache.glob("scorings/*/pending/*.arrow")).keys()


def read_sets(cache: Path) -> dict[str, ResponseSet]:
    return {one.id: one for one in read_response_sets(cache)}


def check_same_sets(actual: dict[str, ResponseSet], expected: dict[str, ResponseSet]) -> None:
    """The sets are the same but for their records: every job has a data file of its own."""
    assert actual.keys() == expected.keys()
    for name, responses in expected.items():
        assert actual[name].info == responses.info
        assert actual[name].record is not None
        assert actual[name].table.equals(responses.table)
        assert actual[name].table.schema.metadata[b"adpa"] == responses.table.schema.metadata[b"adpa"]


@remember
def alone(
    examples: frozenset[int], responses: str, samples: int, reference: str | None
) -> tuple[dict[str, ResponseSet], dict[bytes, Row]]:
    """The response sets and rows of an undisturbed run in its own cache."""
    with TemporaryDirectory() as folder:
        Job(tuple(sorted(examples)), responses, samples).run(Path(folder) / "cache", reference)
        return read_sets(Path(folder) / "cache"), read_rows(Path(folder) / "cache")


def alone_as(job: Job, reference: str | None) -> tuple[dict[str, ResponseSet], dict[bytes, Row]]:
    return alone(frozenset(job.examples), job.responses, job.samples if job.sampled() else 1, reference)


def join(jobs: Sequence[Job]) -> Job:
    """One run on the examples of several jobs."""
    names = [name for name in ("chosen", "rejected", "sampled") if any(name in job.responses for job in jobs)]
    examples = sorted({number for job in jobs for number in job.examples})
    return Job(tuple(examples), ",".join(names), max(job.samples for job in jobs))


JOBS = st.builds(
    Job,
    examples=st.lists(st.integers(0, len(EXAMPLES) - 1), min_size=1, unique=True).map(tuple),
    responses=st.sampled_from(["chosen", "chosen,rejected", "rejected", "sampled", "chosen,rejected,sampled"]),
    samples=st.integers(1, 2),
    batch_tokens=st.integers(1, 60),
    writes_late=st.booleans(),
)
TURNS = st.builds(
    Turn,
    run=st.integers(0, 5),
    until=st.sampled_from([*STOPS, "its end"]),
    times=st.integers(1, 4),
    killed=st.sampled_from([False] * 5 + [True]),
)


TWINS = [Job((0, 1, 2), "chosen,rejected", samples=1, batch_tokens=1)] * 2
TEACHER_IS_DONE = Turn(0, "answer", 8, killed=False)  # it was opened, answered five batches and was closed; reference
GONE_BETWEEN_LISTING_AND_READING = [TEACHER_IS_DONE, Turn(1, "read_bytes", 1, killed=False, at="/pending/")]
GONE_AFTER_IT_WAS_WRITTEN_AGAIN = [
    Turn(1, "answer", 1, killed=False),
    TEACHER_IS_DONE,
    Turn(0, "unlink", 1, killed=False, at="/pending/"),
    Turn(1, "read_bytes", 2, killed=False, at="/pending/"),
]
HEIRS = [Job((0, 1, 2), "chosen,rejected", 1, batch_tokens=60), Job((0,), "chosen", 1)]
GC_KILLED_AT_ITS_CLOCK = [Turn(2, "unlink", 1, killed=True)]
KILLED_BEFORE_THE_REFERENCE = [Turn(0, "answer", 4, killed=True), Turn(2, "its end", 1, killed=False)]


@settings(max_examples=40, deadline=None)
@example(TWINS, [], GONE_BETWEEN_LISTING_AND_READING, "reference")
@example(TWINS, [], GONE_AFTER_IT_WAS_WRITTEN_AGAIN, "reference")
@example(HEIRS, [Chore("gc")], KILLED_BEFORE_THE_REFERENCE, "reference")
@example(HEIRS, [Chore("gc")], GC_KILLED_AT_ITS_CLOCK, "reference")
@given(
    jobs=st.lists(JOBS, min_size=2, max_size=4),
    chores=st.lists(st.builds(Chore, st.sampled_from(["gc", "pack"])), max_size=2),
    turns=st.lists(TURNS, min_size=2, max_size=20),
    reference=st.sampled_from(["reference"] * 3 + [None]),
)
def test_any_interleaving_of_runs_ends_in_the_rows_of_one_run(
    jobs: list[Job], chores: list[Chore], turns: list[Turn], reference: str | None
) -> None:
    whole = join(jobs)
    expected_sets, expected_rows = alone_as(whole, reference)
    with TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        works: list[Job | Chore] = [*jobs, *chores]
        runs = [Run(work, cache, reference) for work in works]
        keys, judged = set[bytes](), set[bytes]()
        with closing(take_turns(runs, turns)) as taken:
            for _ in taken:
                before, keys = (keys, judged), read_keys(cache)
                judged = keys | read_waiting(cache)
                assert before[0] <= keys, "rows that were there have gone"
                assert before[1] <= judged, "the teacher's answers have gone before they were used"

        rows, sets = read_rows(cache), read_sets(cache)
        assert rows.items() <= expected_rows.items()
        allowed: dict[str, ResponseSet] = {}
        for job, run in zip(jobs, runs, strict=False):
            own_sets, own_rows = alone_as(job, reference)
            allowed |= own_sets
            if run.report is not None:
                assert own_sets.keys() <= sets.keys(), "a run ended without its response sets"
                assert own_rows.keys() <= rows.keys(), "a run ended without its rows"
        check_same_sets(sets, {name: allowed[name] for name in sets})  # a killed run may have left its own, too

        waiting = read_waiting(cache)
        rerun = Run(whole, cache, reference)
        rerun.go_on()
        missing = expected_rows.keys() - rows.keys()
        requested = [key for model, key in rerun.requested if model == "teacher"]
        assert sorted(requested) == sorted(missing - waiting)
        requested = [key for model, key in rerun.requested if model == "reference"]
        assert sorted(requested) == (sorted(missing) if reference else [])

        assert read_rows(cache) == expected_rows
        check_same_sets(read_sets(cache), sets | expected_sets)
        assert not list(cache.glob("scorings/*/pending/*"))
        # A gc that is killed while it removes the file that tells it the time leaves that file to the next gc.
        assert not [path for path in cache.rglob(".*") if not path.name.startswith(".clock.")]
        assert len(list((cache / "tokenizers").iterdir())) == 1


PACKED = make_response_set(INFO, [(str(row), token_ids(5, row), token_ids(7, TURN_END)) for row in range(4)])
KEYS = [*PACKED.table["key"].to_pylist(), b"n" * 16]  # the last one is of no set


def row_of(key: int, version: int) -> SignalRow:
    """A row larger than the rest of its file; versions differ, like the rows of two runs."""
    return signal_row(KEYS[key], 250, seed=10 * key + version)


def seen(cache: Path) -> dict[bytes, Row]:
    """The rows that readers use, of those that the set needs."""
    table = read_signals(cache, SCORING)
    numbers = table.locate(pa.array(KEYS[:-1], pa.binary(16)))
    return {key: bits(table.row(number)) for key, number in zip(KEYS, numbers.tolist(), strict=False) if number >= 0}


VERSIONS = st.tuples(st.integers(0, len(KEYS) - 1), st.integers(0, 1))
PACKS = st.builds(Pack, st.just(SCORING), st.sampled_from([1, 9_000, 15_000, 1 << 20]))


# Of files K < L, a pack takes a row of L to a file M > L, for K has the other one; a gc removes K; a second pack finds
# the row of M in L, too, removes M, and leaves L alone; then the first one removes L.
LARGE = Pack(SCORING, goal=1)
LEFT_TO_ANOTHER = [
    Turn(0, "unlink", 1, killed=False),
    Turn(1, "unlink", 2, killed=False),  # the first one is of the file that tells the time
    Turn(2, "its end", 1, killed=False),
]


# A gc writes a file again without a row; before it goes on, a pack takes that file.
TAKEN_AT_ONCE = [Turn(2, "open", 1, killed=False), Turn(2, "open", 1, killed=False)]


@settings(max_examples=60, deadline=None)
@example([[(4, 2)], [(0, 1), (4, 3)]], [LARGE, Chore("gc"), LARGE], LEFT_TO_ANOTHER)
@example([[(0, 0)], [(1, 0), (4, 0)]], [LARGE, LARGE, Chore("gc")], TAKEN_AT_ONCE)
@given(
    parts=st.lists(st.lists(VERSIONS, min_size=1, max_size=3), min_size=2, max_size=5),
    works=st.lists(st.one_of(PACKS, PACKS, PACKS, st.just(Chore("gc"))), min_size=2, max_size=5),
    turns=st.lists(TURNS, min_size=2, max_size=20),
)
def test_any_number_of_packs_with_gc_beside_leaves_the_rows_that_readers_see(
    parts: list[list[tuple[int, int]]], works: list[Pack | Chore], turns: list[Turn]
) -> None:
    with TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        prepare_cache(cache)
        write_response_set(cache, PACKED)
        write_scoring(cache, SCORING)
        for part in parts:
            write_signals(cache, SCORING, [row_of(*version) for version in part])
        before = seen(cache)
        runs = [Run(work, cache, None) for work in works]
        with closing(take_turns(runs, turns)) as taken:
            for _ in taken:
                assert seen(cache) == before
        assert seen(cache) == before


def test_samples_that_a_gc_removes_before_their_set_is_made_are_sampled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of no set are garbage once they are a day old, also when a run has just counted on them."""
    job, cache, real = Job((0, 1, 2, 3), "sampled", 2), tmp_path / "cache", sample_responses
    gone: list[Path] = []

    def sample(*arguments: Any) -> None:
        real(*arguments)
        if not gone:
            gone.extend(cache.glob("samples/*/*"))
            gone[0].unlink()

    monkeypatch.setattr("adpa.pipeline.scoring.sample.sample_responses", sample)
    job.run(cache, None)
    check_same_sets(read_sets(cache), alone_as(job, None)[0])
    assert len(gone) > 1
