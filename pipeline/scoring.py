"""Stage one's main loop: which sequences a scoring lacks, and scoring them in batches that survive a crash.

Every batch ends as a shard in the cache, so that a killed run loses the batches in flight and no more. The teacher
goes first and leaves its log-probabilities in float32 under ``pending``; the reference then completes them into signal
rows. Both models need not be in memory at once, and advantages are subtracted in float32.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adpa.data.encoding import TokenSequence
from adpa.data.locations import Location
from adpa.data.shards import open_shards, read_shard, remove_file, write_shard
from adpa.data.signal_rows import SignalRow, keep_nucleus, plain_schema, plain_table
from adpa.data.signals import ModelIdentity, Scoring, SignalTable, read_signals, write_scoring, write_signals
from adpa.errors import ModelError
from adpa.pipeline.batching import make_batches, write_batches

PENDING_PREFIX = "teacher"

Batch = Sequence[TokenSequence]
ReferenceLogprobs = tuple[NDArray[np.float32], NDArray[np.float32]]


class Scorer(Protocol):
    """A model that judges token sequences, batch after batch, in order. T response tokens, K ids.

    It may take a batch before the one before it is answered, so that the model is never idle.
    """

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        """The teacher's part of a signal row for each sequence, log-probabilities in float32."""
        ...

    def logprobs_at(
        self, batches: Sequence[Batch], topk_ids: Iterable[Sequence[NDArray[np.int32]]]
    ) -> Iterator[list[ReferenceLogprobs]]:
        """For each sequence, log-probabilities of its own tokens and at its ids [T, K], given batch by batch."""
        ...

    def close(self) -> None:
        """Gives the model's memory back."""
        ...


OpenScorer = Callable[[ModelIdentity], Scorer]


def missing_sequences(cache: Location, scoring: Scoring, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The distinct sequences that have no signal row yet."""
    present = read_signals(cache, scoring).keys()
    return list({sequence.key: sequence for sequence in sequences if sequence.key not in present}.values())


def score(
    cache: Location,
    scoring: Scoring,
    missing: Sequence[TokenSequence],
    open_scorer: OpenScorer,
    batch_tokens: int,
) -> int:
    """Scores sequences, adds their rows to the cache, and gives the bytes of the files with them.

    Args:
        cache: the cache's directory.
        scoring: who judges.
        missing: what ``missing_sequences`` gave.
        open_scorer: loads a model of the scoring.
        batch_tokens: tokens of a batch, padding included; a batch becomes a shard.
    """
    write_scoring(cache, scoring)
    sizes: list[int] = []

    def write(rows: list[SignalRow]) -> None:
        sizes.append(write_signals(cache, scoring, [keep_nucleus(row, scoring.top_p) for row in rows]))

    if scoring.reference is not None:
        _score_with_both(cache, scoring, missing, open_scorer, batch_tokens, write)
    elif missing:
        _ask_teacher(scoring, missing, open_scorer, batch_tokens, write)
    write_scoring(cache, scoring)  # again: a gc beside this run may have taken it for one without rows
    return sum(sizes)


def _score_with_both(
    cache: Location,
    scoring: Scoring,
    missing: Sequence[TokenSequence],
    open_scorer: OpenScorer,
    batch_tokens: int,
    write: Callable[[list[SignalRow]], None],
) -> None:
    folder = scoring.folder(cache) / "pending"
    # What runs before this one, or beside it, left for the reference. A run removes only what it opened here or wrote
    # itself, when all of it is done. What another run removes meanwhile stays readable here, because it is open.
    pending = dict(open_shards(folder, PENDING_PREFIX))
    judged = SignalTable(pending.values()).keys()
    unjudged = [sequence for sequence in missing if sequence.key not in judged]
    if unjudged:
        schema = plain_schema(scoring.top_k, logprob_type=pa.float32())

        def write_pending(rows: list[SignalRow]) -> None:
            table = plain_table(rows, schema)
            path = write_shard(folder, PENDING_PREFIX, table)
            try:
                pending[path] = read_shard(path)
            except FileNotFoundError:  # a run beside this one wrote the same rows, and has just finished with them
                pending[path] = table

        _ask_teacher(scoring, unjudged, open_scorer, batch_tokens, write_pending)
    if missing:
        _ask_reference(scoring, missing, SignalTable(pending.values()), open_scorer, batch_tokens, write)
    if pending:
        done = read_signals(cache, scoring).keys()
        for path, shard in pending.items():
            if done.issuperset(shard["key"].to_pylist()):
                remove_file(path)


def _ask_teacher(
    scoring: Scoring,
    sequences: Sequence[TokenSequence],
    open_scorer: OpenScorer,
    batch_tokens: int,
    write: Callable[[list[SignalRow]], None],
) -> None:
    batches = make_batches(sequences, len, batch_tokens)
    with closing(open_scorer(scoring.teacher)) as teacher:
        write_batches("teacher: tokens", batches, len, judge(teacher, batches, scoring), write)


def _ask_reference(
    scoring: Scoring,
    sequences: Sequence[TokenSequence],
    judged: SignalTable,
    open_scorer: OpenScorer,
    batch_tokens: int,
    write: Callable[[list[SignalRow]], None],
) -> None:
    assert scoring.reference is not None
    batches = make_batches(sequences, len, batch_tokens)

    def find(batch: Batch) -> list[SignalRow]:
        numbers = judged.locate(pa.array([sequence.key for sequence in batch], pa.binary(16)))
        return [judged.row(int(number)) for number in numbers]

    with closing(open_scorer(scoring.reference)) as reference:
        answers = complete(reference, batches, find, scoring)
        write_batches("reference: tokens", batches, len, answers, write)


def judge(teacher: Scorer, batches: Sequence[Batch], scoring: Scoring) -> Iterator[list[SignalRow]]:
    """The teacher's part of the signal rows, batch by batch.

    Raises:
        ModelError: its log-probabilities are not finite.
    """
    for rows in teacher.top_k(batches, scoring.top_k):
        if not all(map(_has_numbers, rows)):
            raise ModelError(
                f"{scoring.teacher.name}: the teacher's log-probabilities are not finite",
                "check the checkpoint, or use --dtype float32",
            )
        yield rows


def _has_numbers(row: SignalRow) -> bool:
    """Whether the response's tokens and the most probable ids are possible, and nothing is NaN."""
    possible = np.isfinite(row.token_logprobs).all() and np.isfinite(row.topk_logprobs[:, 0]).all()
    return bool(possible and not np.isnan(row.topk_logprobs).any() and not np.isnan(row.tail_logprob).any())


def complete(
    reference: Scorer, batches: Sequence[Batch], find: Callable[[Batch], list[SignalRow]], scoring: Scoring
) -> Iterator[list[SignalRow]]:
    """Whole signal rows, batch by batch; ``find`` gives what ``judge`` made of a batch.

    Raises:
        ModelError: the reference's log-probabilities are not finite.
    """
    topk_ids = ([row.topk_ids for row in find(batch)] for batch in batches)
    for batch, given in zip(batches, reference.logprobs_at(batches, topk_ids), strict=True):
        yield [_with_advantages(row, *logprobs, scoring) for row, logprobs in zip(find(batch), given, strict=True)]


def _with_advantages(
    row: SignalRow, token_logprobs: NDArray[np.float32], topk_logprobs: NDArray[np.float32], scoring: Scoring
) -> SignalRow:
    """Completes the teacher's row with teacher minus reference, subtracted in float32."""
    assert scoring.reference is not None
    possible = np.isfinite(row.topk_logprobs)
    if not (np.isfinite(token_logprobs).all() and np.isfinite(topk_logprobs[possible]).all()):
        raise ModelError(
            f"{scoring.reference.name}: the reference's log-probabilities are not finite at tokens that the teacher "
            "may say, so that their advantage is not defined",
            "check the checkpoint, or use --dtype float32",
        )
    advantages = np.where(possible, row.topk_logprobs - np.where(possible, topk_logprobs, 0), -np.inf)
    return replace(row, token_advantages=row.token_logprobs - token_logprobs, topk_advantages=advantages)
