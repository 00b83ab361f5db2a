"""Advantages other than the published ones: changes the signals of a scoring and saves them as a new scoring.

The new scoring is in the same cache, and ``adpa distill`` trains on it as on any other. Shapes: T response tokens,
K ids.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import SignalTable, read_scoring, read_signals, write_scoring, write_signals
from adpa.lab.tokenizer import VOCABULARY

AdvantageName = Literal["log ratio", "clipped", "centred", "uniform reference"]
Change = Callable[[SignalRow], SignalRow | None]

CLIP = 1.0


def clipped(row: SignalRow) -> SignalRow:
    """A clamped to ±1."""
    return replace(row, topk_advantages=np.clip(_advantages(row), -CLIP, CLIP))


def centred(row: SignalRow) -> SignalRow:
    """A minus its expectation under the teacher, Σ_S p·A / Σ_S p. Tokens outside S keep advantage 0."""
    advantages_TK, p_TK = _advantages(row), np.exp(row.topk_logprobs, dtype=np.float64)
    mean_T = (p_TK * advantages_TK).sum(1) / p_TK.sum(1)
    return replace(row, topk_advantages=advantages_TK - mean_T[:, None])


def uniform_reference(row: SignalRow) -> SignalRow:
    """log π_teacher + log V: the advantage over a uniform reference. It is 0 if the teacher is uniform, too."""
    return replace(row, topk_advantages=row.topk_logprobs.astype(np.float64) + np.log(len(VOCABULARY)))


CHANGES: dict[AdvantageName, Change] = {
    "clipped": clipped,
    "centred": centred,
    "uniform reference": uniform_reference,
}


def towards_prior(prior: SignalTable) -> Change:
    """Replaces the teacher in KL terms by another model, the prior. Advantages stay.

    Args:
        prior: signals of the same sequences and ids, with the prior as reference: its log-probabilities are the
            teacher's minus the advantages. A sequence without these signals gets no changed row.
    """
    rows = {row.key: row for row in map(prior.row, range(len(prior)))}

    def change(row: SignalRow) -> SignalRow | None:
        prior_row = rows.get(row.key)
        if prior_row is None:
            return None
        assert np.array_equal(row.topk_ids, prior_row.topk_ids), "signals of other ids"
        logprobs_TK = prior_row.topk_logprobs - _advantages(prior_row)
        outside_T = 1 - np.exp(logprobs_TK).sum(1)
        return replace(row, topk_logprobs=logprobs_TK, tail_logprob=np.log(np.maximum(outside_T, 1e-9)))

    return change


def change_signals(cache: Path, scoring_id: str, name: str, change: Change) -> str:
    """Changes every row of a scoring and writes it to a new scoring. Returns the new scoring's id."""
    scoring = read_scoring(cache, scoring_id)
    changed = replace(scoring, engine=f"{scoring.engine}, {name}")
    signals, done = read_signals(cache, scoring), read_signals(cache, changed).keys()
    rows = map(signals.row, range(len(signals)))
    write_scoring(cache, changed)
    new = [new for row in rows if row.key not in done and (new := change(row))]
    if new:
        write_signals(cache, changed, new)
    return changed.id


def _advantages(row: SignalRow) -> NDArray[np.float64]:
    assert row.topk_advantages is not None, "a scoring without a reference"
    return row.topk_advantages.astype(np.float64)
