"""Bootstrap intervals: laws that hold for any values, and how often an interval holds the mean."""

import numpy as np
import pytest

from adpa.data.bootstrap import CHUNK_VALUES, Interval, bootstrap_interval, win_share
from adpa.errors import DataError


def draw(groups: int, prompts: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(groups, prompts))


@pytest.mark.parametrize("groups", [1, 4])
def test_constant_values_have_an_interval_of_no_width(groups: int) -> None:
    interval = bootstrap_interval(np.full((groups, 7), 0.1))
    assert (interval.low, interval.high) == (interval.mean, interval.mean)
    assert interval.mean == pytest.approx(0.1, abs=1e-15)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_shift_and_a_scale_move_the_interval_with_the_values(groups: int) -> None:
    values = draw(groups, 30)
    plain, moved = bootstrap_interval(values), bootstrap_interval(3 + 2 * values)
    for name in ("mean", "low", "high"):
        assert getattr(moved, name) == pytest.approx(3 + 2 * getattr(plain, name), abs=1e-12)


def test_the_order_of_groups_and_of_prompts_does_not_matter() -> None:
    values = draw(6, 200)
    plain = bootstrap_interval(values, resamples=20_000)
    turned = bootstrap_interval(values[::-1, ::-1], resamples=20_000)
    assert turned.mean == pytest.approx(plain.mean, abs=1e-15)
    assert (turned.low, turned.high) == pytest.approx((plain.low, plain.high), abs=0.1 * (plain.high - plain.low))


def test_the_same_arguments_give_the_same_interval_and_another_seed_another_one() -> None:
    values = draw(3, 50)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1).low != bootstrap_interval(values).low


def test_the_mean_lies_within_and_a_higher_level_is_wider() -> None:
    values = draw(2, 80)
    wide, narrow = bootstrap_interval(values, level=0.99), bootstrap_interval(values, level=0.8)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_one_group_has_the_width_of_the_normal_approximation() -> None:
    values = draw(1, 2000)
    interval = bootstrap_interval(values, resamples=20_000)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert (interval.low, interval.high) == pytest.approx((interval.mean - half, interval.mean + half), abs=0.05 * half)


def test_what_differs_between_groups_widens_the_interval() -> None:
    """Many prompts tell nothing about another seed: the width is that of the means of the groups."""
    effects = draw(8, 1)
    interval = bootstrap_interval(effects + 0.1 * draw(8, 500, seed=1), resamples=20_000)
    half = 1.96 * effects.std() / np.sqrt(8)
    assert (interval.high - interval.low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(("groups", "effect"), [(1, 0.0), (20, 0.5)])
def test_an_interval_of_95_percent_holds_the_mean_about_that_often(groups: int, effect: float) -> None:
    generator = np.random.default_rng(7)
    held = 0
    for trial in range(300):
        values = effect * generator.normal(size=(groups, 1)) + generator.normal(size=(groups, 60))
        interval = bootstrap_interval(values, resamples=300, seed=trial)
        held += interval.low <= 0 <= interval.high
    assert 0.90 < held / 300 < 0.99


def test_values_beyond_a_chunk_are_resampled_a_piece_at_a_time() -> None:
    values = draw(2, CHUNK_VALUES // 4 + 1)  # one resample a chunk
    interval = bootstrap_interval(values, resamples=20)
    assert interval.low < interval.mean < interval.high


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.empty((0, 3)), "no values"),
        (np.empty((3, 0)), "no values"),
        ([[1.0, np.nan, np.inf]], "2 of 3 values are not finite"),
        ([1.0, 2.0], r"shape \[2\]; expected \[groups, prompts\]"),
    ],
)
def test_values_without_a_mean_are_refused(values: object, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        bootstrap_interval(values)  # type: ignore[arg-type]


def test_a_win_counts_one_and_a_tie_one_half() -> None:
    assert win_share([1, 2, 3], [2, 2, 2]).tolist() == [0, 0.5, 1]
    assert win_share([0.9, 0.5, 0.5, 0.1], [0.2, 0.5, 0.5, 0.2]).mean() == (1 + 0.5 + 0.5 + 0) / 4
    assert bootstrap_interval([win_share([2, 2], [1, 1])]) == Interval(1, 1, 1)


@pytest.mark.parametrize(
    ("mine", "theirs", "problem"), [([1], [1, 2], "the same prompts"), ([], [], "no values"), ([1], [np.nan], "finite")]
)
def test_prompts_that_are_not_the_same_or_not_there_are_refused(mine: object, theirs: object, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        win_share(mine, theirs)  # type: ignore[arg-type]
