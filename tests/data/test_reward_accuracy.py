"""Reward accuracy of stored signals, against the plain sum of every row; and when it warns."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.data.makers import INFO, SCORING, response_rows, signal_row, signal_rows

from adpa.data.cache.responses import ResponseSet, make_response_set
from adpa.data.cache.selection import ScoredSet
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import Scoring, SignalTable, read_signals, write_signals
from adpa.data.reward_accuracy import RewardAccuracy, SetRewards, compare_rewards, set_rewards, stored_rewards

ALONE = replace(SCORING, reference=None)


def keys(*names: str) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([name.encode().ljust(16, b".") for name in names], pa.binary(16))])


def table_of(rewards: dict[str, float], folder: Path) -> SignalTable:
    """A table with rows of five tokens that have these rewards."""
    rows = []
    for place, (name, reward) in enumerate(rewards.items()):
        row = signal_row(keys(name)[0].as_py(), 5, seed=place)
        rows.append(replace(row, token_advantages=np.array([reward, 1, -1, 2, -2], np.float32)))
    write_signals(folder, SCORING, rows)
    return read_signals(folder, SCORING)


def test_the_larger_sum_is_preferred_and_equal_sums_prefer_neither() -> None:
    rewards = compare_rewards(np.array([3.0, -1.0, 2.0, 0.5]), np.array([1.0, -0.5, 2.0, 0.0]))
    assert rewards == RewardAccuracy(4, 0.5, 0.5)


def test_without_pairs_there_is_no_accuracy() -> None:
    assert compare_rewards(np.array([]), np.array([])) is None


def test_stored_rewards_are_those_of_pairs_with_two_different_responses_that_have_signals(tmp_path: Path) -> None:
    signals = table_of({"a": 2.0, "b": 1.0, "c": -4.0, "d": 0.5}, tmp_path)
    chosen, rejected = keys("a", "c", "a", "a", "lost", "b"), keys("b", "d", "b", "a", "b", "lost")
    expected = RewardAccuracy(3, 2 / 3, (1.0 - 4.5 + 1.0) / 3)
    assert stored_rewards(chosen, rejected, signals) == expected, "a > b twice, c < d; the other pairs do not count"
    for one, other in (("a", "a"), ("lost", "b"), ("lost", "gone")):
        assert stored_rewards(keys(one), keys(other), signals) is None


@pytest.mark.parametrize(
    ("rewards", "warned"),
    [
        (RewardAccuracy(8, 0.375, -0.2), True),
        (RewardAccuracy(60_000, 0.49, 0.3), True),
        (RewardAccuracy(8, 0.5, -3.0), False),
        (RewardAccuracy(60_000, 0.51, -0.1), False),
        (RewardAccuracy(1, 0.0, -9.0), True),
        (RewardAccuracy(8, 0.0, -1e-5), False),
    ],
)
def test_below_one_half_is_a_warning_unless_the_models_hardly_differ(rewards: RewardAccuracy, warned: bool) -> None:
    assert (rewards.warning() is not None) == warned


def test_the_sentences() -> None:
    assert RewardAccuracy(64, 0.625, 3.2).describe() == (
        "teacher − reference prefers the chosen response in 62.5 % of 64 pairs, mean margin +3.20 nats"
    )
    assert RewardAccuracy(1, 1.0, 1234.5).describe().endswith("in 100.0 % of 1 pair, mean margin +1,234.50 nats")
    assert RewardAccuracy(2, 0.5, -0.00042).describe().endswith("of 2 pairs, mean margin -0.0004 nats")
    assert RewardAccuracy(1000, 0.25, -3.2).warning() == (
        "teacher − reference prefers the rejected response in most pairs: it prefers the chosen one in 25.0 % of "
        "1,000 pairs, mean margin -3.20 nats; are --teacher and --reference swapped? Or chosen and "
        "rejected in the data?"
    )


IDS = [f"example-{number:02}" for number in range(20)]


def pair_of_sets(**options: object) -> tuple[ResponseSet, ResponseSet]:
    """A chosen and a rejected set of the same prompts."""
    info = replace(INFO, **options)  # type: ignore[arg-type]
    chosen, others = response_rows(0, IDS), response_rows(1, IDS)
    rejected = [(name, prompt, other[2]) for (name, prompt, _), other in zip(chosen, others, strict=True)]
    return make_response_set(info, chosen), make_response_set(replace(info, name="rejected"), rejected)


def scored(responses: ResponseSet, cache: Path, scoring: Scoring = SCORING) -> ScoredSet:
    return ScoredSet(responses, scoring, read_signals(cache, scoring))


def expected_rewards(chosen: list[SignalRow], rejected: list[SignalRow]) -> tuple[float, float]:
    margins = []
    for one, other in zip(chosen, rejected, strict=True):
        assert one.token_advantages is not None
        assert other.token_advantages is not None
        if one.key != other.key:
            margins.append(one.token_advantages.astype(float).sum() - other.token_advantages.astype(float).sum())
    assert len(margins) >= 15
    return float(np.mean(np.array(margins) > 0)), float(np.mean(margins))


def test_every_chosen_and_rejected_set_of_the_same_data_is_compared_with_each_scoring_that_has_both(
    tmp_path: Path,
) -> None:
    chosen, rejected = pair_of_sets()
    short_chosen, short_rejected = pair_of_sets(max_length=31)
    rows, others = signal_rows(chosen, 1), signal_rows(rejected, 200)
    half = replace(SCORING, engine="hf")
    for scoring, written in ((SCORING, rows + others), (half, rows)):
        write_signals(tmp_path, scoring, written)
    write_signals(tmp_path, ALONE, [replace(row, token_advantages=None, topk_advantages=None) for row in rows + others])
    sets = [chosen, rejected, short_chosen, short_rejected]

    whole = [scored(one, tmp_path) for one in sets]
    accuracy, margin = expected_rewards(rows, others)
    found = set_rewards([*whole, scored(chosen, tmp_path, half), scored(chosen, tmp_path, ALONE)], sets)
    assert [(one.chosen, one.rejected, one.scoring) for one in found] == [
        (chosen.shard_prefix(), rejected.shard_prefix(), SCORING.id),
        (short_chosen.shard_prefix(), short_rejected.shard_prefix(), SCORING.id),
    ]
    for one in found:
        assert isinstance(one, SetRewards)
        assert one.reward_accuracy == accuracy
        assert one.reward_margin == pytest.approx(margin, rel=1e-5)
    assert set_rewards(whole[1:2], sets) == found[:1], "of a set that a user names, its counterpart is read too"
    assert set_rewards([scored(chosen, tmp_path, ALONE)], sets) == []
    assert set_rewards(whole, [chosen, short_rejected]) == []
