"""Stage one's main loop: which sequences a scoring lacks, and scoring them in batches that survive a crash.

Every batch ends as a shard in the cache before the next begins, so that a killed run loses the batch in flight and
no more. The teacher goes first and leaves its log-probabilities in float32 under ``pending``; the reference then
completes them into signal rows. Both models need not be in memory at once, and advantages are subtracted in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adpa.data.encoding import TokenSequence
from adpa.data.shards import list_shards, read_shard, write_shard
from adpa.data.signals import (
    ModelIdentity,
    Scoring,
    SignalRow,
    SignalTable,
    read_signals,
    signals_schema,
    signals_table,
    write_scoring,
    write_signals,
)
from adpa.errors import ModelError
from adpa.pipeline.progress import progress

PENDING_PREFIX = "teacher"


class Scorer(Protocol):
    """A model that judges token sequences. T response tokens, K ids."""

    def top_k(self, sequences: Sequence[TokenSequence], top_k: int) -> list[SignalRow]:
        """The teacher's part of a signal row for each sequence, log-probabilities in float32."""
        ...

    def logprobs_at(
        self, sequences: Sequence[TokenSequence], topk_ids: Sequence[NDArray[np.int32]]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """For each sequence, log-probabilities of its own tokens [T] and at the given ids [T, K]."""
        ...

    def close(self) -> None:
        """Gives the model's memory back."""
        ...


OpenScorer = Callable[[ModelIdentity], Scorer]


def missing_sequences(cache: Path, scoring: Scoring, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The distinct sequences that have no signal row yet."""
    present = read_signals(cache, scoring).keys()
    return list({sequence.key: sequence for sequence in sequences if sequence.key not in present}.values())


def score(
    cache: Path,
    scoring: Scoring,
    missing: Sequence[TokenSequence],
    open_scorer: OpenScorer,
    batch_tokens: int,
) -> None:
    """Scores sequences and adds their rows to the cache.

    Args:
        cache: the cache's directory.
        scoring: who judges.
        missing: what ``missing_sequences`` gave.
        open_scorer: loads a model of the scoring.
        batch_tokens: tokens of a batch, padding included.
    """
    write_scoring(cache, scoring)
    if scoring.reference is not None:
        _score_with_both(cache, scoring, missing, open_scorer, batch_tokens)
    elif missing:
        with closing(open_scorer(scoring.teacher)) as teacher:
            for batch in _batches("teacher: tokens", missing, batch_tokens):
                write_signals(cache, scoring, _teacher_rows(teacher, batch, scoring))


def _score_with_both(
    cache: Path,
    scoring: Scoring,
    missing: Sequence[TokenSequence],
    open_scorer: OpenScorer,
    batch_tokens: int,
) -> None:
    folder = scoring.folder(cache) / "pending"
    pending = _open_pending(folder)
    judged = SignalTable(pending.values()).keys()
    unjudged = [sequence for sequence in missing if sequence.key not in judged]
    if unjudged:
        schema = signals_schema(scoring.top_k, logprob_type=pa.float32())
        with closing(open_scorer(scoring.teacher)) as teacher:
            for batch in _batches("teacher: tokens", unjudged, batch_tokens):
                rows = _teacher_rows(teacher, batch, scoring)
                path = write_shard(folder, PENDING_PREFIX, signals_table(rows, schema))
                pending[path] = read_shard(path)
    if missing:
        assert scoring.reference is not None
        table = SignalTable(pending.values())
        with closing(open_scorer(scoring.reference)) as reference:
            for batch in _batches("reference: tokens", missing, batch_tokens):
                numbers = table.locate(pa.array([sequence.key for sequence in batch], pa.binary(16)))
                teacher_rows = [table.row(int(number)) for number in numbers]
                logprobs = reference.logprobs_at(batch, [row.topk_ids for row in teacher_rows])
                rows = [
                    _with_advantages(row, *given, scoring) for row, given in zip(teacher_rows, logprobs, strict=True)
                ]
                write_signals(cache, scoring, rows)
    if pending:
        done = read_signals(cache, scoring).keys()
        for path, shard in pending.items():
            if done.issuperset(shard["key"].to_pylist()):
                path.unlink(missing_ok=True)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Groups indices so that rows × longest ≤ ``batch_tokens``, longest first; a longer row is a batch of its own."""
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if not batches or (len(batches[-1]) + 1) * longest > batch_tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def _batches(description: str, sequences: Sequence[TokenSequence], batch_tokens: int) -> Iterator[list[TokenSequence]]:
    lengths = [len(sequence) for sequence in sequences]
    with progress(description, total=sum(lengths)) as advance:
        for indices in batches_by_length(lengths, batch_tokens):
            yield [sequences[index] for index in indices]
            advance(sum(lengths[index] for index in indices))


def _teacher_rows(teacher: Scorer, batch: Sequence[TokenSequence], scoring: Scoring) -> list[SignalRow]:
    rows = teacher.top_k(batch, scoring.top_k)
    if not all(np.isfinite(row.token_logprobs).all() and np.isfinite(row.topk_logprobs[:, 0]).all() for row in rows):
        raise ModelError(
            f"{scoring.teacher.name}: the teacher's log-probabilities are not finite",
            "check the checkpoint, or use --dtype float32",
        )
    return rows


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


def _open_pending(folder: Path) -> dict[Path, pa.Table]:
    """What runs before this one, or beside it, left for the reference.

    A run removes only what it opened here or wrote itself, when all of it is done. What another run removes meanwhile
    stays readable here, because it is open.
    """
    shards = {}
    for path in list_shards(folder, PENDING_PREFIX):
        try:
            shards[path] = read_shard(path)
        except FileNotFoundError:  # another run has just finished with it
            continue
    return shards
