"""Other advantages than the published ones, as scorings that were made from another one in the same cache.

``adpa distill`` trains on a changed scoring as it does on any other. Shapes: T response tokens, K ids.
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
    """A minus its expectation under the teacher, Σ_S p·A / Σ_S p; what is outside S keeps 0."""
    advantages_TK, p_TK = _advantages(row), np.exp(row.topk_logprobs, dtype=np.float64)
    mean_T = (p_TK * advantages_TK).sum(1) / p_TK.sum(1)
    return replace(row, topk_advantages=advantages_TK - mean_T[:, None])


def uniform_reference(row: SignalRow) -> SignalRow:
    """log π_teacher + log V: what is left without a reference, with a zero where the teacher knows nothing."""
    return replace(row, topk_advantages=row.topk_logprobs.astype(np.float64) + np.log(len(VOCABULARY)))


CHANGES: dict[AdvantageName, Change] = {
    "clipped": clipped,
    "centred": centred,
    "uniform reference": uniform_reference,
}


def towards_prior(prior: SignalTable) -> Change:
    """Makes KL terms pull towards another model than the teacher; advantages stay.

    Args:
        prior: signals of the same sequences and ids, whose reference is that model: its log-probabilities are the
            teacher's minus the advantages. A sequence that is not among them has no changed row.
    """
    rows = {row.key: row for row in map(prior.row, range(len(prior)))}

    def change(row: SignalRow) -> SignalRow | None:
        found = rows.get(row.key)
        if found is None:
            return None
        assert np.array_equal(row.topk_ids, found.topk_ids), "signals of other ids"
        logprobs_TK = found.topk_logprobs - _advantages(found)
        outside_T = 1 - np.exp(logprobs_TK).sum(1)
        return replace(row, topk_logprobs=logprobs_TK, tail_logprob=np.log(np.maximum(outside_T, 1e-9)))

    return change


def change_signals(cache: Path, scoring_id: str, name: str, change: Change) -> str:
    """Writes every row of a scoring, changed, to a scoring of its own; gives its id."""
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
