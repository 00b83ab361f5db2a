"""verify reports every problem of a row, and none for rows that float16 rounded."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adpa.data.cache.compact import compact_table, read_compact_row
from adpa.data.cache.integrity import SignalRules, signal_problems
from adpa.data.cache.signal_rows import SignalRow, keep_nucleus

LENGTH, K, VOCABULARY = 4, 6, 400
RULES = SignalRules(K, with_reference=True)


def make_row(
    seed: int = 0, scale: float = 3.0, top_k: int = K, dtype: type = np.float16, anywhere: bool = False
) -> tuple[SignalRow, NDArray[np.int32]]:
    """A row of a teacher, computed in float64 and rounded as in the cache; and its response, of the top K or not."""
    generator = np.random.default_rng(seed)
    logits_TV = generator.normal(scale=scale, size=(LENGTH, VOCABULARY))
    shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    logprobs_TV = shifted_TV - np.log(np.exp(shifted_TV).sum(axis=1, keepdims=True))
    order_TV = np.argsort(-logprobs_TV, axis=1)
    ids_TK = order_TV[:, :top_k].astype(np.int32)
    ranks_T = generator.integers(VOCABULARY if anywhere else top_k, size=LENGTH)
    response_ids = order_TV[np.arange(LENGTH), ranks_T].astype(np.int32)
    masses_TV = np.take_along_axis(np.exp(logprobs_TV), order_TV, axis=1)
    with np.errstate(divide="ignore"):
        tail_T = np.log(masses_TV[:, top_k:].sum(axis=1).astype(np.float32))
    row = SignalRow(
        key=b"k" * 16,
        token_logprobs=logprobs_TV[np.arange(LENGTH), response_ids].astype(np.float32),
        topk_ids=ids_TK,
        topk_logprobs=np.take_along_axis(logprobs_TV, ids_TK, axis=1).astype(dtype),
        tail_logprob=tail_T,
        token_advantages=np.zeros(LENGTH, np.float32),
        topk_advantages=np.zeros((LENGTH, top_k), np.float16),
    )
    return row, response_ids


@given(st.integers(0, 2**32), st.floats(0, 30), st.integers(1, VOCABULARY - 1))
@settings(max_examples=200, deadline=None)
def test_what_float16_rounded_is_no_fault(seed: int, scale: float, top_k: int) -> None:
    row, response_ids = make_row(seed, scale, top_k)
    rules = replace(RULES, top_k=top_k)
    assert list(signal_problems(row, rules, response_ids)) == []


@given(st.integers(0, 2**32), st.floats(0, 30), st.integers(1, VOCABULARY - 1))
@settings(max_examples=100, deadline=None)
def test_what_the_lossy_encoding_rounded_is_no_fault(seed: int, scale: float, top_k: int) -> None:
    row, response_ids = make_row(seed, scale, top_k, np.float32)
    rounded = read_compact_row(compact_table([row], top_k, lossy=True), 0)
    rules = replace(RULES, top_k=top_k, lossy=True)
    assert list(signal_problems(rounded, rules, response_ids)) == []


@given(st.integers(0, 2**32), st.floats(0, 400), st.integers(1, VOCABULARY - 1))
@settings(max_examples=200, deadline=None)
def test_no_response_of_a_sharp_teacher_is_a_fault(seed: int, scale: float, top_k: int) -> None:
    """Its log-probabilities go down to −2,000, where the probability is 0 in float64; any token may be the response."""
    row, response_ids = make_row(seed, scale, top_k, anywhere=True)
    rules = replace(RULES, top_k=top_k)
    assert list(signal_problems(row, rules, response_ids)) == []
    row, response_ids = make_row(seed, scale, top_k, np.float32, anywhere=True)
    rounded = read_compact_row(compact_table([row], top_k, lossy=True), 0)
    assert list(signal_problems(rounded, replace(rules, lossy=True), response_ids)) == []


def changed(column: str, place: Any, value: float) -> SignalRow:
    row, _ = make_row()
    values = getattr(row, column).copy()
    values[place] = value
    return replace(row, **{column: values})


def padded(ids: list[int], logprobs: list[float]) -> SignalRow:
    """A row whose first position has these ids, then padding."""
    row, _ = make_row()
    ids_TK, logprobs_TK, tail_T = row.topk_ids.copy(), row.topk_logprobs.copy(), row.tail_logprob.copy()
    ids_TK[0], logprobs_TK[0] = ids, logprobs
    tail_T[0] = np.log1p(-np.exp(np.array(logprobs, np.float64)).sum())
    return replace(row, topk_ids=ids_TK, topk_logprobs=logprobs_TK, tail_logprob=tail_T)


WHOLE, RESPONSE = make_row()
FAULTY = {
    "advantages are missing": replace(WHOLE, token_advantages=None, topk_advantages=None),
    "its columns do not have one length": replace(WHOLE, tail_logprob=WHOLE.tail_logprob[:-1]),
    "or not K = 6 ids": replace(WHOLE, topk_ids=WHOLE.topk_ids[:, :-1]),
    "ids that no vocabulary has": changed("topk_ids", (1, 2), 1 << 24),
    "no vocabulary has: -2 to": changed("topk_ids", (1, 2), -2),
    "padding where an id must be": changed("topk_ids", (1, -1), -1),
    "the same id twice": changed("topk_ids", (1, 0), int(WHOLE.topk_ids[1, 1])),
    "above 0, or not numbers": changed("topk_logprobs", (1, 0), 0.01),
    "or not numbers": changed("topk_logprobs", (3, 4), np.nan),
    "log-probabilities above 0": changed("tail_logprob", 2, 0.01),
    "probabilities above 0": changed("token_logprobs", 2, np.nan),
    "than ids in the top K, but not among": replace(WHOLE, topk_ids=WHOLE.topk_ids + 60_000),
    "with the probability 0": changed("token_logprobs", 2, -np.inf),
    "mass + tail is not 1": changed("tail_logprob", 2, float(WHOLE.tail_logprob[2]) + 0.01),
    "have other log-probabilities": changed("token_logprobs", 1, float(WHOLE.token_logprobs[1]) - 0.05),
    "advantages that are not numbers": changed("topk_advantages", (0, 0), np.inf),
    "that are not numbers": changed("token_advantages", 0, np.nan),
}


def test_the_whole_row_has_no_fault() -> None:
    assert list(signal_problems(WHOLE, RULES, RESPONSE)) == []


@pytest.mark.parametrize("problem", FAULTY)
def test_what_is_wrong_is_told(problem: str) -> None:
    actual = list(signal_problems(FAULTY[problem], RULES, RESPONSE))
    assert any(problem in text for text in actual), actual


def test_log_probabilities_that_rise_are_told() -> None:
    logprobs_TK = WHOLE.topk_logprobs.copy()
    logprobs_TK[2, [0, 1]] = logprobs_TK[2, [1, 0]]
    assert list(signal_problems(replace(WHOLE, topk_logprobs=logprobs_TK), RULES, None)) == [
        "log-probabilities that do not fall"
    ]


def test_a_row_of_another_response_is_told() -> None:
    assert any("not as long" in text for text in signal_problems(WHOLE, RULES, RESPONSE[:-1]))
    other = WHOLE.topk_ids[:, 0].copy()
    same = np.equal(other, RESPONSE)
    other[same] = WHOLE.topk_ids[same, 1]
    assert any("other log-probabilities" in text for text in signal_problems(WHOLE, RULES, other))


def test_advantages_without_a_reference_are_told() -> None:
    (actual,) = signal_problems(WHOLE, replace(RULES, with_reference=False), RESPONSE)
    assert actual.startswith("advantages without a reference")


def test_only_ragged_rows_have_padding_and_only_at_the_end() -> None:
    nothing = -np.inf
    row = padded([5, 7, -1, -1, -1, -1], [-0.5, -1.5, nothing, nothing, nothing, nothing])
    assert list(signal_problems(row, replace(RULES, top_p=0.8), None)) == []
    assert list(signal_problems(row, RULES, None)) == ["padding where an id must be"]
    row = padded([5, -1, 7, -1, -1, -1], [-0.5, -1.5, nothing, nothing, nothing, nothing])
    assert "padding where an id must be" in list(signal_problems(row, replace(RULES, top_p=0.8), None))


def test_fewer_ids_than_k_with_less_mass_than_top_p_are_told() -> None:
    nothing = -np.inf
    row = padded([5, 7, -1, -1, -1, -1], [-0.5, -1.5, nothing, nothing, nothing, nothing])
    mass = np.exp(-0.5) + np.exp(-1.5)
    assert list(signal_problems(row, replace(RULES, top_p=mass + 1e-4), None)) == [], "within rounding"
    (actual,) = signal_problems(row, replace(RULES, top_p=mass + 2e-3), None)
    assert actual == "fewer ids than K have less mass than 0.831661: 0.829661 at token 0"
    row = padded([5, 7, 8, 9, 10, 11], [-0.5, -1.5, -9, -9, -9, -9])
    assert list(signal_problems(row, replace(RULES, top_p=0.9), None)) == [], "K ids may have less"


@given(st.integers(0, 2**32), st.floats(0, 30), st.floats(0.01, 0.999), st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_top_p_keeps_is_no_fault(seed: int, scale: float, top_p: float, lossy: bool) -> None:
    row, response_ids = make_row(seed, scale, 50, np.float32)
    kept = read_compact_row(compact_table([keep_nucleus(row, top_p)], 50, lossy), 0)
    rules = replace(RULES, top_k=50, top_p=top_p, lossy=lossy)
    assert list(signal_problems(kept, rules, response_ids)) == []


LOSSY = replace(RULES, lossy=True)


@pytest.fixture
def rounded() -> SignalRow:
    row, _ = make_row(dtype=np.float32)
    return read_compact_row(compact_table([row], K, lossy=True), 0)


def lossy_error(mass: float) -> float:
    """The largest error of a log-probability on the grid."""
    return min(0.5, 2**-12 / mass) / 2


@pytest.mark.parametrize("sign", [1, -1])
def test_a_mass_beyond_what_rounding_does_is_told_of_lossy_rows(sign: int, rounded: SignalRow) -> None:
    masses = np.exp(rounded.topk_logprobs[2].astype(np.float64))
    tail = 1 - masses.sum()
    tolerance = sum(mass * np.expm1(lossy_error(mass)) for mass in masses) + 2**-13
    tolerance += tail * -np.log(tail) * 2**-11
    for share in (0.9, 1.1):
        tails = rounded.tail_logprob.copy()
        tails[2] = np.log(tail + sign * share * tolerance)
        actual = list(signal_problems(replace(rounded, tail_logprob=tails), LOSSY, RESPONSE))
        assert [text.partition(":")[0] for text in actual] == (["mass + tail is not 1"] if share > 1 else [])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_token_off_by_more_than_rounding_is_told_of_lossy_rows(sign: int, rounded: SignalRow) -> None:
    (rank,) = np.flatnonzero(rounded.topk_ids[2] == RESPONSE[2])
    listed = float(rounded.topk_logprobs[2, rank])
    tolerance = 2**-13 + lossy_error(np.exp(listed)) + abs(listed) * 2**-11
    for share in (0.9, 1.1):
        own = rounded.token_logprobs.copy()
        own[2] = listed + sign * share * tolerance
        actual = list(signal_problems(replace(rounded, token_logprobs=own), LOSSY, RESPONSE))
        assert len(actual) == (share > 1)
        assert all("other log-probabilities" in text for text in actual)


def test_an_id_of_probability_0_is_no_fault() -> None:
    nothing = -np.inf
    row = padded([5, 7, 8, 9, 10, 11], [-0.5, -1.5, nothing, nothing, nothing, nothing])
    advantages_TK = np.zeros((LENGTH, K), np.float16)
    advantages_TK[0, 2:] = nothing
    assert list(signal_problems(replace(row, topk_advantages=advantages_TK), RULES, None)) == []
