"""A probe before stage one: what each K would keep, how large the cache gets, how long the scoring takes.

Some responses are scored twice, in memory. The first pass has a K of 1,000, of which every smaller K is a part. It also
warms the engine up: the second pass, with the run's own K, is the one whose time is taken. A student, if there is one,
is asked once, as the reference is: the KL that a K loses depends on it.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

from adpa.data.cache.samples import SampleRequest
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import ModelIdentity, Scoring
from adpa.data.fidelity import Fidelity, measure_fidelity
from adpa.data.sequences import TokenSequence, sequence_key
from adpa.pipeline.scoring.jobs import make_batches, write_batches
from adpa.pipeline.scoring.score import Batch, Scorer, complete, judge

PROBE_TOP_K = 1000
COMPARED_TOP_K = (10, 20, 50, 100)


@dataclass(frozen=True)
class Work:
    """What a run has to score, at most.

    Attributes:
        wanted: the sequences of all its response sets.
        missing: those that the cache lacks.
        unsampled: responses that are still to be sampled, and scored then.
        max_new_tokens: tokens that each of these has at most.
    """

    wanted: Sequence[TokenSequence]
    missing: Sequence[TokenSequence]
    unsampled: Sequence[SampleRequest]
    max_new_tokens: int

    @property
    def tokens(self) -> int:
        """Response tokens, of what is there and of what is planned."""
        planned = len(self.unsampled) * self.max_new_tokens
        return sum(len(sequence.response_ids) for sequence in self.wanted) + planned

    def lengths(self, sequences: Sequence[TokenSequence]) -> list[int]:
        """Tokens of each of some sequences and of each planned one, prompt and response together."""
        planned = [len(request.prompt_ids) + self.max_new_tokens for request in self.unsampled]
        return [*map(len, sequences), *planned]


@dataclass(frozen=True)
class ProbeReport:
    """What a probe measured, and what it predicts for all the responses that a run wants.

    Attributes:
        responses: responses probed.
        tokens: their response tokens.
        stand_ins: whether they are chosen responses in the place of sampled ones, of which there are none yet.
        own_top_k: the run's K.
        top_k: the K that they were scored with; the KL within what lies beyond it is not seen.
        tail: the teacher's probability of what lies beyond it, mean.
        by_top_k: what each K keeps, and the bytes it takes for all the responses.
        data_responses: all the responses, those of the part of the data if it is a part.
        data_tokens: their response tokens.
        input_tokens: tokens that the models read for them, prompts included.
        kl_against: whose KL it is: the student's, or the reference's in its place; none without both.
        teacher_hours: time that the teacher needs for them in one process, without loading it.
        reference_hours: the same of the reference; none without one.
        missing_hours: time that both need for what the cache lacks.
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

    def predict_bytes(self, tokens: int) -> int:
        """What so many response tokens take in the cache with the run's own K."""
        (own,) = (kept for kept in self.by_top_k if kept.top_k == self.own_top_k)
        return round(own.bytes * tokens / self.data_tokens)


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
        count: how many.
        work: what there is to score.
        chosen: the chosen responses, for a run whose own are all to be sampled yet.
        scoring: who judges, with the run's K.
        open_scorer: loads a model of a scoring.
        student: whose KL is measured, if there is one.
        vocabulary: tokens that the teacher has.
        batch_tokens: tokens of a batch.
        pads: see ``Engine.pads``.
    """
    there = work.missing or work.wanted or [_cut(sequence, work.max_new_tokens) for sequence in chosen]
    sequences = _spread(there, count)
    wide = replace(scoring, top_k=min(max(PROBE_TOP_K, scoring.top_k), vocabulary))
    batches = make_batches(sequences, len, batch_tokens)
    with closing(open_scorer(wide, scoring.teacher)) as teacher:
        shards, _ = _collect("teacher: tokens", batches, judge(teacher, batches, wide))
        narrow, teacher_seconds = _collect("teacher, timed: tokens", batches, judge(teacher, batches, scoring))
    reference_seconds = None
    if scoring.reference is not None:
        with closing(open_scorer(wide, scoring.reference)) as reference:
            completed = complete(reference, batches, _find(shards), wide)
            shards, _ = _collect("reference: tokens", batches, completed)
            completed = complete(reference, batches, _find(narrow), scoring)
            _, reference_seconds = _collect("reference, timed: tokens", batches, completed)
    ratios = None
    if student is not None:
        with closing(open_scorer(wide, student)) as scorer:
            compared = complete(scorer, batches, _find(shards), replace(wide, reference=student))
            against, _ = _collect("student: tokens", batches, compared)
        ratios = {row.key: row.topk_advantages for shard in against for row in shard if row.topk_advantages is not None}

    top_ks = sorted({top_k for top_k in COMPARED_TOP_K if top_k <= wide.top_k} | {scoring.top_k})
    *by_top_k, whole = measure_fidelity(shards, scoring, [*top_ks, wide.top_k], work.tokens, ratios)
    lengths = work.lengths(work.wanted)
    probed = _cost([len(sequence) for sequence in sequences], batch_tokens, pads)
    cost, missing_cost = (_cost(of, batch_tokens, pads) for of in (lengths, work.lengths(work.missing)))

    def hours(seconds: float, tokens: int) -> float:
        return seconds / probed * tokens / 3600

    return ProbeReport(
        responses=len(sequences),
        tokens=sum(len(sequence.response_ids) for sequence in sequences),
        stand_ins=not work.wanted,
        own_top_k=scoring.top_k,
        top_k=wide.top_k,
        tail=whole.tail,
        by_top_k=by_top_k,
        data_responses=len(lengths),
        data_tokens=work.tokens,
        input_tokens=sum(lengths),
        kl_against="student" if student else "reference" if scoring.reference else None,
        teacher_hours=hours(teacher_seconds, cost),
        reference_hours=None if reference_seconds is None else hours(reference_seconds, cost),
        missing_hours=hours(teacher_seconds + (reference_seconds or 0), missing_cost),
    )


def _spread(sequences: Sequence[TokenSequence], count: int) -> list[TokenSequence]:
    """So many of the sequences, evenly over their lengths; all if there are fewer."""
    ordered = sorted(sequences, key=len)
    count = min(count, len(ordered))
    return [ordered[(2 * place + 1) * len(ordered) // (2 * count)] for place in range(count)]


def _cut(sequence: TokenSequence, tokens: int) -> TokenSequence:
    """The sequence with a response of so many tokens at most."""
    response_ids = sequence.response_ids[:tokens]
    return TokenSequence(sequence_key(sequence.prompt_ids, response_ids), sequence.prompt_ids, response_ids)


def _collect(
    description: str, batches: Sequence[Batch], answers: Iterable[list[SignalRow]]
) -> tuple[list[list[SignalRow]], float]:
    """All answers, batch by batch, and the seconds that they took."""
    collected: list[list[SignalRow]] = []
    started = time.perf_counter()
    write_batches(description, batches, len, answers, collected.append)
    return collected, time.perf_counter() - started


def _find(shards: Sequence[list[SignalRow]]) -> Callable[[Batch], list[SignalRow]]:
    rows = {row.key: row for shard in shards for row in shard}
    return lambda batch: [rows[sequence.key] for sequence in batch]


def _cost(lengths: Sequence[int], batch_tokens: int, pads: bool) -> int:
    """Tokens that a model runs over; padding makes more of them where few sequences share a batch."""
    batches = make_batches(lengths, lambda length: length, batch_tokens)
    return sum(len(batch) * batch[0] if pads else sum(batch) for batch in batches)
