"""Probes stage one before a run: measures what each K keeps, and predicts cache size and scoring time.

The probe scores some responses twice, in memory, whole pairs where it can. The first pass uses K = 1,000, which
contains every smaller K, and warms the engine up. The second pass uses the run's own K and is timed. If the run has a
student, it scores the responses once, as a reference does, because the KL that is lost at a given K depends on the
student.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from adpa.data.cache.samples import SampleRequest
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.data.fidelity import Fidelity, measure_fidelity
from adpa.data.reward_accuracy import RewardAccuracy, compare_rewards
from adpa.data.sequences import TokenSequence, sequence_key
from adpa.pipeline.scoring.jobs import make_batches, write_batches
from adpa.pipeline.scoring.score import Batch, Scorer, score_reference, score_teacher

PROBE_TOP_K = 1000
COMPARED_TOP_K = (10, 20, 50, 100)


@dataclass(frozen=True)
class Work:
    """The sequences that a run scores.

    Attributes:
        requested: the sequences of all its response sets, scored or not.
        missing: the sequences whose signals the cache lacks.
        unsampled: the responses that the run will sample before it scores them.
        max_new_tokens: maximum tokens of each of these responses.
        pairs: the chosen and the rejected response of each pair, where teacher − reference can compare them.
    """

    requested: Sequence[TokenSequence]
    missing: Sequence[TokenSequence]
    unsampled: Sequence[SampleRequest]
    max_new_tokens: int
    pairs: Sequence[tuple[TokenSequence, TokenSequence]] = ()

    @property
    def tokens(self) -> int:
        """Response tokens. A planned sample counts with its maximum."""
        planned = len(self.unsampled) * self.max_new_tokens
        return sum(len(sequence.response_ids) for sequence in self.requested) + planned

    def lengths(self, sequences: Sequence[TokenSequence]) -> list[int]:
        """Tokens of each of these sequences and of each planned sample, prompt and response together."""
        planned = [len(request.prompt_ids) + self.max_new_tokens for request in self.unsampled]
        return [*map(len, sequences), *planned]


@dataclass(frozen=True)
class ProbeReport:
    """What a probe measured on some responses, and what it predicts for all responses of the run.

    Attributes:
        responses: number of probed responses.
        tokens: their response tokens.
        stand_ins: whether chosen responses stand in for sampled ones, because the student has sampled none yet.
        own_top_k: the run's K.
        top_k: the K of the probe. The KL among tokens outside of it is not measured.
        tail: the teacher's mean probability of all tokens outside of it.
        by_top_k: for each K, what it keeps, and its bytes for all responses.
        data_responses: number of all responses, in the run's part of the data.
        data_tokens: their response tokens.
        input_tokens: tokens that a model reads to score them, prompts included.
        kl_against: the model of the KL: the student, or else the reference; None without either.
        teacher_hours: hours of one process for the teacher to score all responses, loading not included.
        reference_hours: the same for the reference; None without one.
        missing_hours: hours for both models to score only the sequences that the cache lacks.
        rewards: how often teacher − reference prefers the chosen response of the probed pairs; None without a pair.
    """

    responses: int
    tokens: int
    stand_ins: bool
    own_top_k: int
    top_k: int
    tail: float
    by_top_k: list[Fidelity]
    data_responses: int
    data_tokens: int
    input_tokens: int
    kl_against: Literal["student", "reference"] | None
    teacher_hours: float
    reference_hours: float | None
    missing_hours: float
    rewards: RewardAccuracy | None = None

    def predict_bytes(self, tokens: int) -> int:
        """Predicted cache size in bytes of this many response tokens with the run's own K."""
        (fidelity,) = (fidelity for fidelity in self.by_top_k if fidelity.top_k == self.own_top_k)
        return round(fidelity.bytes * tokens / self.data_tokens)


def probe_signals(
    count: int,
    work: Work,
    chosen: Sequence[TokenSequence],
    scoring: Scoring,
    open_scorer: Callable[[Scoring, ModelIdentity], Scorer],
    *,
    student: ModelIdentity | None,
    vocabulary: int,
    batch_tokens: int,
    pads: bool,
) -> ProbeReport:
    """Scores sequences in memory, and predicts bytes and hours from them.

    Args:
        count: number of sequences to probe.
        work: the sequences of the run.
        chosen: the chosen responses; they stand in if the run has not sampled any response yet.
        scoring: the models and the run's K.
        open_scorer: loads a model of a scoring.
        student: the model whose KL is measured, if the run has one.
        vocabulary: number of the teacher's tokens.
        batch_tokens: tokens of a batch.
        pads: see ``Engine.pads``.
    """
    candidates = work.missing or work.requested or [_cut(sequence, work.max_new_tokens) for sequence in chosen]
    sequences = _spread(_units(candidates, work.pairs), count)
    wide = replace(scoring, top_k=min(max(PROBE_TOP_K, scoring.top_k), vocabulary))
    batches = make_batches(sequences, len, batch_tokens)
    with closing(open_scorer(wide, scoring.teacher)) as teacher:
        shards, _ = _collect("teacher: tokens", batches, score_teacher(teacher, batches, wide))
        narrow, teacher_seconds = _collect("teacher, timed: tokens", batches, score_teacher(teacher, batches, scoring))
    reference_seconds = None
    if scoring.reference is not None:
        with closing(open_scorer(wide, scoring.reference)) as reference:
            completed = score_reference(reference, batches, _row_lookup(shards), wide)
            shards, _ = _collect("reference: tokens", batches, completed)
            completed = score_reference(reference, batches, _row_lookup(narrow), scoring)
            _, reference_seconds = _collect("reference, timed: tokens", batches, completed)
    ratios = None
    if student is not None:
        with closing(open_scorer(wide, student)) as scorer:
            compared = score_reference(scorer, batches, _row_lookup(shards), replace(wide, reference=student))
            compared_shards, _ = _collect("student: tokens", batches, compared)
        ratios = {
            row.key: row.topk_advantages
            for shard in compared_shards
            for row in shard
            if row.topk_advantages is not None
        }

    top_ks = sorted({top_k for top_k in COMPARED_TOP_K if top_k <= wide.top_k} | {scoring.top_k})
    *by_top_k, widest = measure_fidelity(shards, scoring, [*top_ks, wide.top_k], work.tokens, ratios)
    lengths = work.lengths(work.requested)
    probed = _cost([len(sequence) for sequence in sequences], batch_tokens, pads)
    cost = _cost(lengths, batch_tokens, pads)
    missing_cost = _cost(work.lengths(work.missing), batch_tokens, pads)

    def hours(seconds: float, tokens: int) -> float:
        return seconds / probed * tokens / 3600

    return ProbeReport(
        responses=len(sequences),
        tokens=sum(len(sequence.response_ids) for sequence in sequences),
        stand_ins=not work.requested,
        own_top_k=scoring.top_k,
        top_k=wide.top_k,
        tail=widest.tail,
        by_top_k=by_top_k,
        data_responses=len(lengths),
        data_tokens=work.tokens,
        input_tokens=sum(lengths),
        kl_against="student" if student else "reference" if scoring.reference else None,
        teacher_hours=hours(teacher_seconds, cost),
        reference_hours=None if reference_seconds is None else hours(reference_seconds, cost),
        missing_hours=hours(teacher_seconds + (reference_seconds or 0), missing_cost),
        rewards=_rewards(shards, work.pairs),
    )


def _units(
    sequences: Sequence[TokenSequence], pairs: Sequence[tuple[TokenSequence, TokenSequence]]
) -> list[tuple[TokenSequence, ...]]:
    """The distinct sequences, those of a pair together; one in several pairs is with its first partner."""
    left = {sequence.key: sequence for sequence in sequences}
    units: list[tuple[TokenSequence, ...]] = []
    for chosen, rejected in pairs:
        if chosen.key in left and rejected.key in left and chosen.key != rejected.key:
            units.append((left.pop(chosen.key), left.pop(rejected.key)))
    return units + [(sequence,) for sequence in left.values()]


def _spread(units: Sequence[tuple[TokenSequence, ...]], count: int) -> list[TokenSequence]:
    """Up to ``count`` of the sequences, evenly spread over the mean lengths of their units."""
    ordered = sorted(units, key=lambda unit: sum(map(len, unit)) / len(unit))
    sequences = sum(len(unit) for unit in ordered)
    taken = math.ceil(min(count, sequences) * len(ordered) / sequences)
    spread = [ordered[(2 * place + 1) * len(ordered) // (2 * taken)] for place in range(taken)]
    return [sequence for unit in spread for sequence in unit][:count]


def _rewards(
    shards: Sequence[list[SignalRow]], pairs: Sequence[tuple[TokenSequence, TokenSequence]]
) -> RewardAccuracy | None:
    """The reward accuracy of the pairs whose two responses were probed."""
    rewards = {
        row.key: float(row.token_advantages.sum(dtype=np.float64))
        for shard in shards
        for row in shard
        if row.token_advantages is not None
    }
    keys = [(chosen.key, rejected.key) for chosen, rejected in pairs]
    probed = [pair for pair in keys if rewards.keys() >= set(pair) and pair[0] != pair[1]]
    chosen_N, rejected_N = (np.array([rewards[pair[side]] for pair in probed]) for side in (0, 1))
    return compare_rewards(chosen_N, rejected_N)


def _cut(sequence: TokenSequence, tokens: int) -> TokenSequence:
    """The sequence with its response cut to ``tokens`` tokens."""
    response_ids = sequence.response_ids[:tokens]
    return TokenSequence(sequence_key(sequence.prompt_ids, response_ids), sequence.prompt_ids, response_ids)


def _collect(
    description: str, batches: Sequence[Batch], rows: Iterable[list[SignalRow]]
) -> tuple[list[list[SignalRow]], float]:
    """All rows, batch by batch, and the seconds until the last one."""
    collected: list[list[SignalRow]] = []
    started = time.perf_counter()
    write_batches(description, batches, len, rows, collected.append)
    return collected, time.perf_counter() - started


def _row_lookup(shards: Sequence[list[SignalRow]]) -> Callable[[Batch], list[SignalRow]]:
    rows = {row.key: row for shard in shards for row in shard}
    return lambda batch: [rows[sequence.key] for sequence in batch]


def _cost(lengths: Sequence[int], batch_tokens: int, pads: bool) -> int:
    """Tokens that a model computes. Padding adds more if few sequences share a batch."""
    batches = make_batches(lengths, lambda length: length, batch_tokens)
    return sum(len(batch) * batch[0] if pads else sum(batch) for batch in batches)
