"""A set's signals in a few numbers, against the plain formulas in float64 over every token of the set."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.data.makers import INFO, SCORING, K, response_rows, signal_rows

from adpa.data.cache.responses import ResponseSet, make_response_set
from adpa.data.cache.selection import ScoredSet
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import read_signals, write_signals
from adpa.data.summary import PLAUSIBLE, QUANTILES, Distribution, SignalSummary, summarize


def scored_set(cache: Path, responses: ResponseSet, *shards: list[SignalRow]) -> ScoredSet:
    for rows in shards:
        write_signals(cache, SCORING, rows)
    return ScoredSet(responses, SCORING, read_signals(cache, SCORING))


def assert_distribution(distribution: Distribution | None, values: NDArray[Any]) -> None:
    assert distribution is not None
    assert distribution.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-6)
    expected = np.quantile(values.astype(np.float64), list(QUANTILES.values()), method="inverted_cdf")
    np.testing.assert_allclose(list(distribution.quantiles.values()), expected, rtol=1e-6)


@pytest.fixture
def responses() -> ResponseSet:
    """Thirty responses; one of them was said twice."""
    rows = response_rows(0, [f"example-{number:02}" for number in range(29)])
    return make_response_set(INFO, [*rows, rows[3]])


@pytest.fixture
def rows(responses: ResponseSet) -> list[SignalRow]:
    """Random signals; every third token is the teacher's second choice."""
    rows = signal_rows(responses, seed=1)
    for row, sequence in zip(rows, responses.sequences(), strict=True):
        row.topk_ids[::3, 1] = sequence.response_ids[::3]
        row.topk_logprobs[...] = np.sort(row.topk_logprobs - 3, axis=1)[:, ::-1]
        row.tail_logprob[...] -= 5
    rows[4] = rows[3]  # the response that was said twice
    return rows


def test_every_number_is_that_of_all_tokens_at_once(
    responses: ResponseSet, rows: list[SignalRow], tmp_path: Path
) -> None:
    # Shards of other responses too, and not in the order of the set.
    others = signal_rows(make_response_set(INFO, response_rows(9, ["other"])), seed=7)
    summary = summarize(scored_set(tmp_path, responses, rows[20:] + others, rows[:4], rows[5:20]), lambda _: None)

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(row, name) for row in rows])

    ids = np.concatenate([sequence.response_ids for sequence in responses.sequences()])
    assert (summary.responses, summary.tokens, summary.top_k) == (30, len(ids), K)
    assert summary.in_top_k == (joined("topk_ids") == ids[:, None]).any(1).mean() > 1 / 3
    tail = joined("tail_logprob").astype(np.float64)
    assert_distribution(summary.tail, np.exp(tail))
    assert_distribution(summary.captured_mass, 1 - np.exp(tail))
    assert_distribution(summary.token_logprob, joined("token_logprobs"))
    assert_distribution(summary.token_advantage, joined("token_advantages"))
    assert_distribution(summary.topk_advantage, joined("topk_advantages").ravel())

    plausible = np.exp(joined("topk_logprobs").astype(np.float64)) >= PLAUSIBLE
    for group, member in ((summary.plausible, plausible), (summary.implausible, ~plausible)):
        advantages = joined("topk_advantages")[member].astype(np.float64)
        assert group is not None
        assert group.entries == len(advantages) > 10
        assert group.positive == (advantages > 0).sum()
        assert group.mean_positive == pytest.approx(advantages[advantages > 0].mean())
        assert group.largest == advantages.max()


def test_progress_is_told_of_every_response(responses: ResponseSet, rows: list[SignalRow], tmp_path: Path) -> None:
    seen: list[int] = []
    summarize(scored_set(tmp_path, responses, rows[:9], rows[9:]), seen.append)
    assert sum(seen) == len(responses)


def test_a_group_without_positive_advantages_has_no_mean(
    responses: ResponseSet, rows: list[SignalRow], tmp_path: Path
) -> None:
    for row in rows:
        row.topk_logprobs[...] = np.log(np.float16(0.5))
        row.topk_advantages[...] = -1  # type: ignore[index]
    summary = summarize(scored_set(tmp_path, responses, rows), lambda _: None)
    assert summary.plausible is not None
    assert (summary.plausible.positive, summary.plausible.mean_positive, summary.plausible.largest) == (0, None, -1.0)
    assert summary.implausible is not None
    assert (summary.implausible.entries, summary.implausible.largest) == (0, None)


def distribution(low: float, high: float) -> Distribution:
    return Distribution((low + high) / 2, {name: low + share * (high - low) for name, share in QUANTILES.items()})


def summary_of(token_logprob: Distribution, token_advantage: Distribution | None) -> SignalSummary:
    mass = distribution(0, 1)
    return SignalSummary(
        "chosen-1",
        "3 responses",
        "2",
        "large",
        None,
        3,
        4,
        K,
        1.0,
        mass,
        mass,
        token_logprob,
        token_advantage,
        None,
        None,
        None,
    )


def test_colours_reach_from_the_5_to_the_95_percent_quantile() -> None:
    summary = summary_of(distribution(-9, 0), distribution(-1, 3))
    assert summary.colour_scale == pytest.approx(2.8)
    assert summary.legend == pytest.approx([-2.8, -2.8 * 2 / 3, -2.8 / 3, 0, 2.8 / 3, 2.8 * 2 / 3, 2.8])


def test_without_advantages_colours_are_of_the_log_probability() -> None:
    summary = summary_of(distribution(-10, 0), None)
    assert summary.colour_scale == pytest.approx(9.5)
    assert summary.legend == pytest.approx([-9.5, -9.5 * 2 / 3, -9.5 / 3, 0])


def test_advantages_that_are_all_zero_have_a_scale_too() -> None:
    assert summary_of(distribution(-10, 0), distribution(0, 0)).colour_scale == 1.0
