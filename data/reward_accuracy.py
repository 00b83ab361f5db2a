"""Reward accuracy: the share of preference pairs in which teacher − reference prefers the chosen response.

The reward of a response is Σ_t (log p_teacher − log p_reference) over its tokens: DPO's implicit reward with β = 1. If
teacher and reference are swapped, every reward changes its sign.

Shapes: N pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from adpa.data.cache.responses import ResponseSet
from adpa.data.cache.selection import ScoredSet, complete_groups
from adpa.data.cache.signals import SignalTable

SMALLEST_MARGIN = 1e-3  # nats: two models with the same weights differ by less, through rounding


@dataclass(frozen=True)
class RewardAccuracy:
    """How often, and by how much, teacher − reference prefers the chosen response.

    Attributes:
        pairs: number of pairs, at least one; a pair of two equal responses does not count.
        reward_accuracy: share of them whose chosen response has the larger reward; equal rewards prefer neither.
        reward_margin: reward of the chosen response minus that of the rejected one, mean over the pairs, in nats.
    """

    pairs: int
    reward_accuracy: float
    reward_margin: float

    def describe(self) -> str:
        """One sentence without its full stop."""
        return f"teacher − reference prefers the chosen response in {self._numbers()}"

    def warning(self) -> str | None:
        """What to check, in one line, if it prefers fewer than half of the chosen responses; else None."""
        if self.reward_accuracy >= 0.5 or abs(self.reward_margin) < SMALLEST_MARGIN:
            return None
        return (
            "teacher − reference prefers the rejected response in most pairs: it prefers the chosen one in "
            f"{self._numbers()}; are --teacher and --reference swapped? Or chosen and rejected in the data?"
        )

    def _numbers(self) -> str:
        pairs = "pair" if self.pairs == 1 else "pairs"
        margin = f"{self.reward_margin:+,.2f}" if abs(self.reward_margin) >= 0.01 else f"{self.reward_margin:+.1g}"
        return f"{100 * self.reward_accuracy:.1f} % of {self.pairs:,} {pairs}, mean margin {margin} nats"


@dataclass(frozen=True)
class SetRewards(RewardAccuracy):
    """The reward accuracy of a chosen and a rejected set.

    Attributes:
        chosen: name and id of the chosen set.
        rejected: name and id of the rejected set.
        scoring: id of the scoring.
    """

    chosen: str
    rejected: str
    scoring: str

    def of(self) -> str:
        """The sets and the scoring, in words."""
        return f"{self.chosen} and {self.rejected}, scoring {self.scoring}"


def compare_rewards(chosen_N: NDArray[np.float64], rejected_N: NDArray[np.float64]) -> RewardAccuracy | None:
    """The reward accuracy of pairs, from the rewards of their responses; None without pairs."""
    if not len(chosen_N):
        return None
    return RewardAccuracy(len(chosen_N), float(np.mean(chosen_N > rejected_N)), float(np.mean(chosen_N - rejected_N)))


def stored_rewards(chosen: pa.ChunkedArray, rejected: pa.ChunkedArray, signals: SignalTable) -> RewardAccuracy | None:
    """The reward accuracy of the pairs whose two responses have signals; None if no pair counts.

    Args:
        chosen: keys of the chosen responses, binary(16) [N].
        rejected: keys of the rejected responses, in the same order.
        signals: the signals of a scoring with a reference.

    Raises:
        DamagedFileError: a row cannot be decoded.
    """
    numbers_N, others_N = signals.locate(chosen), signals.locate(rejected)
    counted_N = (numbers_N >= 0) & (others_N >= 0) & (numbers_N != others_N)
    numbers_N, others_N = numbers_N[counted_N], others_N[counted_N]
    sums = signals.advantage_sums(np.concatenate([numbers_N, others_N]))
    return compare_rewards(sums[: len(numbers_N)], sums[len(numbers_N) :])


def set_rewards(scored: Sequence[ScoredSet], sets: Sequence[ResponseSet]) -> list[SetRewards]:
    """The reward accuracy of every chosen and rejected set that were made from the same data in the same way.

    Args:
        scored: scored sets of a cache; a pair of sets has at least one of them, and its scoring.
        sets: all response sets of the cache.

    Raises:
        DamagedFileError: a row cannot be decoded.
    """
    named = {(one.responses.id, one.scoring.id) for one in scored}
    scorings = {one.scoring.id: one.signals for one in scored if one.scoring.reference is not None}
    measured = []
    for group, (scoring, signals) in product(complete_groups(sets, ["chosen", "rejected"]), scorings.items()):
        chosen, rejected = group.values()
        keys, others = chosen.table["key"], rejected.table["key"]
        whole = all((signals.locate(column) >= 0).all() for column in (keys, others))
        if whole and named & {(chosen.id, scoring), (rejected.id, scoring)}:
            assert chosen.table["example_id"].equals(rejected.table["example_id"]), "pairs in another order"
            if (rewards := stored_rewards(keys, others, signals)) is not None:
                names = (chosen.shard_prefix(), rejected.shard_prefix(), scoring)
                measured.append(SetRewards(rewards.pairs, rewards.reward_accuracy, rewards.reward_margin, *names))
    return measured
