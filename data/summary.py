"""A response set's signals in a few numbers: how much the top K captures, and how the advantages are distributed.

A quantile is the smallest value with at least that share of values at or below it; no value is interpolated.

Shapes: N response tokens, K ids of the teacher's top K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adpa.data.cache.selection import ScoredSet
from adpa.data.cache.signal_rows import PADDING

QUANTILES = {"1%": 0.01, "5%": 0.05, "25%": 0.25, "50%": 0.5, "75%": 0.75, "95%": 0.95, "99%": 0.99}
# A token is plausible if the teacher's probability of it is at least this; the default of --plausibility. The watch on
# training has a lower bound and another word: an unlikely token, in adpa.kernels.student_statistics.
PLAUSIBLE = 0.05

# All values of float16: with a count of each, a distribution of any size is exact.
FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)


@dataclass(frozen=True)
class Distribution:
    """The mean of some values, and their quantiles by the names of ``QUANTILES``."""

    mean: float
    quantiles: dict[str, float]


@dataclass(frozen=True)
class AdvantageGroup:
    """Advantages of the plausible, or of the implausible, tokens of the top K.

    Attributes:
        entries: number of advantages.
        positive: number of positive ones.
        mean_positive: mean of the positive ones; None if there are none.
        largest: the largest; None without entries.
    """

    entries: int
    positive: int
    mean_positive: float | None
    largest: float | None


@dataclass(frozen=True)
class SignalSummary:
    """The signals of a response set, in natural logarithms.

    Attributes:
        response_set: name and id of the set.
        made: how the set was made, in words.
        scoring: id of the scoring.
        teacher: the teacher's name.
        reference: the reference's name; None without one.
        responses: responses of the set.
        tokens: their tokens.
        top_k: K.
        in_top_k: share of the response tokens that are in the teacher's top K.
        captured_mass: per token, the teacher's probability of its top K.
        tail: per token, the teacher's probability of all other tokens.
        token_logprob: the teacher's log-probability of the response's own tokens.
        token_advantage: advantage of the response's own tokens; this and the rest are None without a reference.
        topk_advantage: advantage of all tokens of the top K.
        plausible: tokens of the top K whose teacher probability is at least ``PLAUSIBLE``.
        implausible: the other tokens of the top K. If their advantages are large, the advantage term pulls the student
            towards tokens that the teacher does not want.
    """

    response_set: str
    made: str
    scoring: str
    teacher: str
    reference: str | None
    responses: int
    tokens: int
    top_k: int
    in_top_k: float
    captured_mass: Distribution
    tail: Distribution
    token_logprob: Distribution
    token_advantage: Distribution | None
    topk_advantage: Distribution | None
    plausible: AdvantageGroup | None
    implausible: AdvantageGroup | None

    @property
    def coloured_by(self) -> str:
        """What the colour of a token shows."""
        return "log-probability" if self.token_advantage is None else "advantage"

    @property
    def colour_scale(self) -> float:
        """The advantage (without a reference, the log-probability) at which a colour reaches full strength."""
        quantiles = (self.token_advantage or self.token_logprob).quantiles
        return max(abs(quantiles["5%"]), abs(quantiles["95%"])) or 1.0

    @property
    def legend(self) -> list[float]:
        """Values across the whole range of colours, a third of it apart."""
        thirds = range(-3, 1 if self.token_advantage is None else 4)
        return [third / 3 * self.colour_scale for third in thirds]

    def distributions(self) -> dict[str, Distribution]:
        """The distributions that are not None, by their usual names."""
        named = {
            f"top-{self.top_k} mass": self.captured_mass,
            "tail": self.tail,
            "log p": self.token_logprob,
            "advantage": self.token_advantage,
            f"top-{self.top_k} advantage": self.topk_advantage,
        }
        return {name: values for name, values in named.items() if values is not None}


def summarize(scored: ScoredSet, advance: Callable[[int], None]) -> SignalSummary:
    """Summarises a response set, one response at a time; calls ``advance(1)`` after each."""
    numbers = scored.signals.locate(scored.responses.table["key"])
    sequences = scored.responses.sequences()
    in_top_k = 0
    tails, logprobs, advantages = [], [], []
    # Counts of advantages by their float16 bits: implausible, plausible.
    counts = np.zeros((2, len(FLOAT16)), dtype=np.int64)
    for place in np.argsort(numbers, kind="stable"):  # in the order of the files
        row, response_ids_T = scored.signals.row(int(numbers[place])), sequences[place].response_ids
        in_top_k += int((row.topk_ids == response_ids_T[:, None]).any(axis=1).sum())
        tails.append(row.tail_logprob)
        logprobs.append(row.token_logprobs)
        if row.token_advantages is not None and row.topk_advantages is not None:
            advantages.append(row.token_advantages)
            bits_TK = row.topk_advantages.astype(np.float16).view(np.uint16)
            plausible_TK = row.topk_logprobs >= np.float32(np.log(PLAUSIBLE))
            implausible_TK = ~plausible_TK & (row.topk_ids != PADDING)
            for group, member_TK in enumerate((implausible_TK, plausible_TK)):
                counts[group] += np.bincount(bits_TK[member_TK], minlength=len(FLOAT16))
        advance(1)
    with_reference = bool(advantages)
    tail_N = np.concatenate(tails).astype(np.float64)
    return SignalSummary(
        response_set=scored.responses.shard_prefix(),
        made=scored.responses.describe().partition(": ")[2],
        scoring=scored.scoring.id,
        teacher=scored.scoring.teacher.name,
        reference=None if scored.scoring.reference is None else scored.scoring.reference.name,
        responses=len(sequences),
        tokens=len(tail_N),
        top_k=scored.scoring.top_k,
        in_top_k=in_top_k / len(tail_N),
        captured_mass=_distribution(-np.expm1(tail_N)),
        tail=_distribution(np.exp(tail_N)),
        token_logprob=_distribution(np.concatenate(logprobs)),
        token_advantage=_distribution(np.concatenate(advantages)) if with_reference else None,
        topk_advantage=_distribution(FLOAT16, counts.sum(axis=0)) if with_reference else None,
        plausible=_advantage_group(counts[1]) if with_reference else None,
        implausible=_advantage_group(counts[0]) if with_reference else None,
    )


def _distribution(values: NDArray[Any], counts: NDArray[np.int64] | None = None) -> Distribution:
    """The distribution of values; each occurs ``counts`` times, by default once."""
    if counts is not None:
        values, counts = values[counts > 0], counts[counts > 0]
    order = np.argsort(values)
    reached = np.cumsum(np.ones(len(values), dtype=np.int64) if counts is None else counts[order])
    places = np.searchsorted(reached, np.array(list(QUANTILES.values())) * reached[-1])
    mean = float(np.average(values.astype(np.float64), weights=counts))
    return Distribution(mean, dict(zip(QUANTILES, values[order][places].tolist(), strict=True)))


def _advantage_group(counts: NDArray[np.int64]) -> AdvantageGroup:
    present = counts > 0
    values, counts = FLOAT16[present], counts[present]
    above = values > 0
    positive = int(counts[above].sum())
    return AdvantageGroup(
        entries=int(counts.sum()),
        positive=positive,
        mean_positive=float(counts[above] @ values[above] / positive) if positive else None,
        largest=float(values.max()) if len(values) else None,
    )
