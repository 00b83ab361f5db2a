"""Scores the sequences that a scoring lacks, batch by batch: the main loop of stage one.

Each batch becomes a shard in the cache, so that a killed run loses only open batches. The teacher goes first and writes
its log-probabilities in float32 under ``pending``. Then the reference turns these pending rows into signal rows. So
only one of the two models is in memory at a time, and advantages are subtracted in float32. Several processes may score
side by side. If they score the same sequences, a warning says so; a missing pending row means that another process
finished that sequence.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adpa.data.cache.files import remove_file
from adpa.data.cache.locations import Location
from adpa.data.cache.shards import list_shards, peek_shard, read_shards, write_shard
from adpa.data.cache.signal_rows import SignalRow, keep_nucleus, plain_schema, plain_table
from adpa.data.cache.signals import (
    SHARD_PREFIX,
    ModelIdentity,
    Scoring,
    SignalTable,
    read_signals,
    write_scoring,
    write_signals,
)
from adpa.data.sequences import TokenSequence
from adpa.errors import CacheError, ModelError
from adpa.pipeline.scoring.jobs import Executor, make_batches, run_here
from adpa.pipeline.scoring.other_runs import Alarm, Watch, Written

PENDING_PREFIX = "teacher"

Batch = Sequence[TokenSequence]
ReferenceLogprobs = tuple[NDArray[np.float32], NDArray[np.float32]]


class Scorer(Protocol):
    """A model that scores token sequences, batch after batch, in order. T response tokens, K ids.

    It may read the next batches early, so that the model is never idle.
    """

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        """For each sequence, the teacher's part of its signal row, with log-probabilities in float32."""
        ...

    def logprobs_at(
        self, batches: Sequence[Batch], topk_ids: Iterable[Sequence[NDArray[np.int32]]]
    ) -> Iterator[list[ReferenceLogprobs]]:
        """For each sequence, the log-probabilities of its tokens [T] and of the ids in ``topk_ids`` [T, K]."""
        ...

    def close(self) -> None:
        """Frees the model's memory."""
        ...


OpenScorer = Callable[[ModelIdentity], Scorer]


@dataclass(frozen=True)
class Scored:
    """What ``score`` did.

    Attributes:
        keys: the keys of the rows that it wrote; the others were finished by another process in the meantime.
        halves: sequences whose teacher's row was there before.
        bytes: size of the new files.
    """

    keys: Set[bytes]
    halves: int
    bytes: int


def missing_sequences(cache: Location, scoring: Scoring, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The distinct sequences without a signal row."""
    present = read_signals(cache, scoring).keys()
    return list({sequence.key: sequence for sequence in sequences if sequence.key not in present}.values())


def read_pending(cache: Location, scoring: Scoring) -> SignalTable:
    """The teacher's rows that wait for the reference; none without a reference."""
    return SignalTable(read_shards(_pending_folder(cache, scoring), PENDING_PREFIX))


def score(
    cache: Location,
    scoring: Scoring,
    missing: Sequence[TokenSequence],
    open_scorer: OpenScorer,
    batch_tokens: int,
    run: Executor = run_here,
    alarm: Alarm | None = None,
    judge: str = "teacher",
) -> Scored:
    """Scores sequences and adds their rows to the cache.

    Args:
        cache: the cache's directory.
        scoring: the models and their settings.
        missing: the result of ``missing_sequences``.
        open_scorer: loads a model of the scoring.
        batch_tokens: tokens of a batch, padding included; a batch becomes a shard.
        run: runs the models.
        alarm: warns if another process scores the same.
        judge: what progress calls the scoring's teacher.
    """
    write_scoring(cache, scoring)
    doubled = partial(alarm or Alarm(), cache, "scores the same sequences")
    passes: list[list[Written]] = [[]]
    unscored = missing
    if scoring.reference is not None:
        pending = read_pending(cache, scoring).keys()
        unscored = [sequence for sequence in missing if sequence.key not in pending]
    if unscored:
        job = TeacherJob(cache, scoring, open_scorer, doubled, f"{judge}: tokens")
        passes.append(run(job, make_batches(unscored, len, batch_tokens)))
    if missing and scoring.reference is not None:
        passes.append(run(ReferenceJob(cache, scoring, open_scorer, doubled), make_batches(missing, len, batch_tokens)))
    if scoring.reference is not None:
        _remove_finished(cache, scoring)
    write_scoring(cache, scoring)  # again: while there were no rows, a gc may have removed it
    if any(one.doubled for written in passes for one in written):
        doubled()
    keys = {key for one in passes[-1] for key in one.keys}
    return Scored(keys, len(missing) - len(unscored), sum(one.bytes for one in passes[-1]))


@dataclass(frozen=True)
class TeacherJob:
    """A ``Job`` that computes the teacher's part of signal rows: the whole of them without a reference."""

    cache: Location
    scoring: Scoring
    open_scorer: OpenScorer
    alarm: Callable[[], None]
    counts: str = "teacher: tokens"

    def size(self, sequence: TokenSequence) -> int:
        """Tokens of the sequence."""
        return len(sequence)

    @contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Batch]], Iterator[Callable[[], Written]]]]:
        """See ``Job.open``."""
        write = _write_signals if self.scoring.reference is None else _write_pending
        watch = Watch(_folders(self.cache, self.scoring), self.alarm)
        with closing(self.open_scorer(self.scoring.teacher)) as teacher:

            def process(batches: Sequence[Batch]) -> Iterator[Callable[[], Written]]:
                scored = score_teacher(teacher, batches, self.scoring)
                return watch.over(batches, (partial(write, self.cache, self.scoring, rows) for rows in scored))

            yield process


@dataclass(frozen=True)
class ReferenceJob:
    """A ``Job`` that completes the teacher's pending rows into signal rows and writes them into the cache."""

    cache: Location
    scoring: Scoring
    open_scorer: OpenScorer
    alarm: Callable[[], None]

    counts = "reference: tokens"

    def size(self, sequence: TokenSequence) -> int:
        """Tokens of the sequence."""
        return len(sequence)

    @contextmanager
    def open(self) -> Iterator[Callable[[Sequence[Batch]], Iterator[Callable[[], Written]]]]:
        """See ``Job.open``."""
        assert self.scoring.reference is not None
        watch = Watch(_folders(self.cache, self.scoring)[:1], self.alarm)
        pending = read_pending(self.cache, self.scoring)
        keys = pending.keys()
        with closing(self.open_scorer(self.scoring.reference)) as reference:
            yield lambda batches: watch.over(batches, self._complete(reference, pending, keys, batches))

    def _complete(
        self, reference: Scorer, pending: SignalTable, keys: Set[bytes], batches: Sequence[Batch]
    ) -> Iterator[Callable[[], Written]]:
        not_pending = [sequence for batch in batches for sequence in batch if sequence.key not in keys]
        if not_pending and (lost := missing_sequences(self.cache, self.scoring, not_pending)):
            raise CacheError(
                f"{self.cache}: the teacher's rows of {len(lost)} sequences are gone",
                "see what removes files there, and run the same adpa precompute again",
            )

        def find(batch: Batch) -> list[SignalRow]:
            numbers = pending.locate(pa.array([sequence.key for sequence in batch], pa.binary(16)))
            return [pending.row(int(number)) for number in numbers]

        unfinished = [[sequence for sequence in batch if sequence.key in keys] for batch in batches]
        rows = score_reference(reference, [batch for batch in unfinished if batch], find, self.scoring)
        for batch in unfinished:
            yield partial(_write_signals, self.cache, self.scoring, next(rows) if batch else [])


def _write_signals(cache: Location, scoring: Scoring, rows: Sequence[SignalRow]) -> Written:
    if not rows:
        return Written()
    path, size = write_signals(cache, scoring, [keep_nucleus(row, scoring.top_p) for row in rows])
    return Written(path.name, [row.key for row in rows], size)


def _write_pending(cache: Location, scoring: Scoring, rows: Sequence[SignalRow]) -> Written:
    table = plain_table(rows, plain_schema(scoring.top_k, logprob_type=pa.float32()))
    path = write_shard(_pending_folder(cache, scoring), PENDING_PREFIX, table)
    return Written(path.name, [row.key for row in rows])


def _remove_finished(cache: Location, scoring: Scoring) -> None:
    """Removes the pending shards whose rows all have signals now, also those of earlier and concurrent runs."""
    finished = None
    for path in list_shards(_pending_folder(cache, scoring), PENDING_PREFIX):
        with suppress(FileNotFoundError):  # a concurrent run removed it first
            keys = peek_shard(path)["key"].to_pylist()
            finished = finished or read_signals(cache, scoring).keys()
            if finished.issuperset(keys):
                remove_file(path)


def _folders(cache: Location, scoring: Scoring) -> list[tuple[Location, str]]:
    """Where signal rows and pending rows appear, and how their files' names begin."""
    return [(scoring.folder(cache), SHARD_PREFIX), (_pending_folder(cache, scoring), PENDING_PREFIX)]


def _pending_folder(cache: Location, scoring: Scoring) -> Location:
    return scoring.folder(cache) / "pending"


def score_teacher(teacher: Scorer, batches: Sequence[Batch], scoring: Scoring) -> Iterator[list[SignalRow]]:
    """The teacher's part of the signal rows, batch by batch.

    Raises:
        ModelError: the teacher's log-probabilities are not finite.
    """
    for rows in teacher.top_k(batches, scoring.top_k):
        if not all(map(_is_finite, rows)):
            raise ModelError(
                f"{scoring.teacher.name}: the teacher's log-probabilities are not finite",
                "check the checkpoint, or use --dtype float32",
            )
        yield rows


def _is_finite(row: SignalRow) -> bool:
    """Whether each response token and the most probable id have a probability above 0, and no number is NaN."""
    possible = np.isfinite(row.token_logprobs).all() and np.isfinite(row.topk_logprobs[:, 0]).all()
    return bool(possible and not np.isnan(row.topk_logprobs).any() and not np.isnan(row.tail_logprob).any())


def score_reference(
    reference: Scorer, batches: Sequence[Batch], find: Callable[[Batch], list[SignalRow]], scoring: Scoring
) -> Iterator[list[SignalRow]]:
    """Complete signal rows, batch by batch. ``find`` returns the rows of ``score_teacher`` for a batch.

    Raises:
        ModelError: the reference's log-probabilities are not finite.
    """
    topk_ids = ([row.topk_ids for row in find(batch)] for batch in batches)
    for batch, answers in zip(batches, reference.logprobs_at(batches, topk_ids), strict=True):
        yield [_with_advantages(row, *logprobs, scoring) for row, logprobs in zip(find(batch), answers, strict=True)]


def _with_advantages(
    row: SignalRow, token_logprobs: NDArray[np.float32], topk_logprobs: NDArray[np.float32], scoring: Scoring
) -> SignalRow:
    """Adds advantages to the teacher's row: teacher minus reference, subtracted in float32."""
    assert scoring.reference is not None
    possible = np.isfinite(row.topk_logprobs)
    if not (np.isfinite(token_logprobs).all() and np.isfinite(topk_logprobs[possible]).all()):
        raise ModelError(
            f"{scoring.reference.name}: the reference's log-probabilities are not finite at tokens to which the "
            "teacher gives probability, so that their advantage is not defined",
            "check the checkpoint, or use --dtype float32",
        )
    advantages = np.where(possible, row.topk_logprobs - np.where(possible, topk_logprobs, 0), -np.inf)
    return replace(row, token_advantages=row.token_logprobs - token_logprobs, topk_advantages=advantages)
