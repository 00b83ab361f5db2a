"""What a K keeps equals float64 sums over the whole vocabulary; and laws of what it loses."""

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.data.makers import SCORING

from adpa.data.cache.signal_rows import SignalRow, keep_nucleus
from adpa.data.cache.signals import write_signals
from adpa.data.fidelity import Fidelity, cut_row, measure_fidelity

V = 60
TOP_KS = [1, 5, 20]


def random_logprobs(seed: int, tokens: int, spread: float = 2.0) -> NDArray[np.float64]:
    """Log-probabilities [T, V] of two models, one after the other."""
    logits = np.random.default_rng(seed).normal(scale=spread, size=(2, tokens, V))
    return logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))


def make_row(teacher_TV: NDArray[np.float64], reference_TV: NDArray[np.float64] | None, top_k: int) -> SignalRow:
    """The float32 row that scoring makes of two models' log-probabilities."""
    ids = np.argsort(-teacher_TV, axis=1, kind="stable")[:, :top_k]
    logprobs = np.take_along_axis(teacher_TV, ids, axis=1)
    rest = np.exp(teacher_TV)
    np.put_along_axis(rest, ids, 0, axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(rest.sum(axis=1))
    row = SignalRow(
        key=blake2b(teacher_TV.tobytes(), digest_size=16).digest(),
        token_logprobs=teacher_TV[:, 0].astype(np.float32),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=logprobs.astype(np.float32),
        tail_logprob=tail.astype(np.float32),
    )
    if reference_TV is None:
        return row
    possible = np.isfinite(logprobs)
    reference_logprobs = np.where(possible, np.take_along_axis(reference_TV, ids, axis=1), 0)
    return replace(
        row,
        token_advantages=(teacher_TV[:, 0] - reference_TV[:, 0]).astype(np.float32),
        topk_advantages=np.where(possible, logprobs - reference_logprobs, -np.inf).astype(np.float32),
    )


def kl_of_outcomes(teacher_V: NDArray[np.float64], reference_V: NDArray[np.float64], top_k: int) -> float:
    """KL over the teacher's top K and the rest as one outcome."""
    order = np.argsort(-teacher_V, kind="stable")
    total = 0.0
    for outcome in [*order[:top_k, None], order[top_k:]]:
        p, q = np.exp(teacher_V[outcome]).sum(), np.exp(reference_V[outcome]).sum()
        total += p * np.log(p / q) if p > 0 else 0.0
    return total


@pytest.mark.parametrize("large", [30, V])
def test_every_number_is_that_of_the_whole_vocabulary(large: int) -> None:
    teacher, reference = random_logprobs(0, tokens=40)
    rows = [make_row(teacher[part], reference[part], large) for part in (slice(0, 13), slice(13, 14), slice(14, 40))]
    for top_k, actual in zip(TOP_KS, measure_fidelity([rows[:2], rows[2:]], SCORING, TOP_KS, 40), strict=True):
        descending = -np.sort(-np.exp(teacher), axis=1)
        mass = descending[:, :top_k].sum(axis=1)
        assert actual.top_k == top_k
        assert actual.captured_mass == pytest.approx(mass.mean(), abs=1e-6)
        assert actual.captured_mass_5 == pytest.approx(np.quantile(mass, 0.05, method="inverted_cdf"), abs=1e-6)
        assert actual.tail == pytest.approx(1 - mass.mean(), abs=1e-6)
        lost = [
            kl_of_outcomes(p, q, large) - kl_of_outcomes(p, q, top_k) for p, q in zip(teacher, reference, strict=True)
        ]
        assert actual.kl_lost == pytest.approx(np.mean(lost), abs=1e-5)
        assert actual.kl_lost_95 == pytest.approx(np.quantile(lost, 0.95, method="inverted_cdf"), abs=1e-5)
        weights = np.exp(teacher) * np.abs(teacher - reference)
        weights = np.take_along_axis(weights, np.argsort(-teacher, axis=1, kind="stable"), axis=1)[:, :large]
        assert actual.advantage_lost == pytest.approx(weights[:, top_k:].sum() / weights.sum(), abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 6),
    spread=st.floats(0.01, 12),
    large=st.integers(2, V),
    impossible=st.integers(0, 50),
)
def test_a_larger_k_never_loses_more_and_nothing_lost_is_negative(
    seed: int, tokens: int, spread: float, large: int, impossible: int
) -> None:
    teacher, reference = random_logprobs(seed, tokens, spread)
    teacher[:, :impossible] = -np.inf
    with np.errstate(invalid="ignore"):
        teacher -= np.log(np.exp(teacher).sum(axis=1, keepdims=True))
    top_ks = sorted({1, 1 + large // 4, 1 + large // 2, large})
    actual = measure_fidelity([[make_row(teacher, reference, large)]], SCORING, top_ks, tokens)
    losses = np.array([[kept.tail, kept.kl_lost, kept.kl_lost_95, kept.advantage_lost] for kept in actual], np.float64)
    assert (losses >= 0).all()
    assert (np.diff(losses, axis=0) <= 1e-12).all()
    assert (losses[:, 3] <= 1).all()
    assert (losses[-1, 1:] == 0).all()
    for kept in actual:
        assert kept.captured_mass_5 <= kept.captured_mass + 1e-12 <= 1 + 1e-6
        assert kept.captured_mass + kept.tail == pytest.approx(1)


def test_tokens_that_the_teacher_never_says_lose_nothing() -> None:
    teacher, reference = random_logprobs(3, tokens=5)
    teacher[:, 4:] = -np.inf
    teacher -= np.log(np.exp(teacher).sum(axis=1, keepdims=True))
    for kept in measure_fidelity([[make_row(teacher, reference, 20)]], SCORING, [4, 10], 5):
        assert (kept.kl_lost, kept.kl_lost_95, kept.advantage_lost, kept.tail) == (0, 0, 0, 0)


def test_a_teacher_that_says_what_the_reference_says_has_no_advantage_to_lose() -> None:
    teacher, _ = random_logprobs(4, tokens=5)
    (kept,) = measure_fidelity([[make_row(teacher, teacher, 20)]], SCORING, [3], 5)
    assert kept.kl_lost == pytest.approx(0, abs=1e-6)
    assert kept.advantage_lost == 0


def test_without_a_reference_only_the_mass_is_known() -> None:
    teacher, reference = random_logprobs(5, tokens=9)
    alone = measure_fidelity([[make_row(teacher, None, 20)]], replace(SCORING, reference=None), TOP_KS, 9)
    both = measure_fidelity([[make_row(teacher, reference, 20)]], SCORING, TOP_KS, 9)

    def mass(kept: Fidelity) -> Fidelity:
        return replace(kept, kl_lost=None, kl_lost_95=None, advantage_lost=None, bytes=0)

    assert [replace(kept, bytes=0) for kept in alone] == list(map(mass, both))


def test_a_students_ratios_outrank_the_references() -> None:
    teacher, reference = random_logprobs(8, tokens=9)
    _, student = random_logprobs(9, tokens=9)
    row, of_student = make_row(teacher, reference, 20), make_row(teacher, student, 20)
    assert of_student.topk_advantages is not None
    ratios = {row.key: of_student.topk_advantages}
    actual, as_reference, alone = (
        measure_fidelity([[case]], scoring, TOP_KS[:2], 9, of)
        for case, scoring, of in (
            (row, SCORING, ratios),
            (of_student, SCORING, None),
            (make_row(teacher, None, 20), replace(SCORING, reference=None), ratios),
        )
    )
    for one, other, third in zip(actual, as_reference, alone, strict=True):
        assert one.kl_lost == other.kl_lost == third.kl_lost
        assert one.kl_lost_95 == other.kl_lost_95 == third.kl_lost_95
        assert one.advantage_lost != other.advantage_lost
        assert third.advantage_lost is None


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("large", [20, V])
def test_a_row_cut_to_a_smaller_k_is_that_ks_own(with_reference: bool, large: int) -> None:
    teacher, reference = random_logprobs(6, tokens=11)
    for top_k in (*TOP_KS, large):
        actual, own = (
            cut_row(make_row(teacher, reference if with_reference else None, of), [1, top_k])[1]
            for of in (large, top_k)
        )
        np.testing.assert_array_equal(actual.topk_ids, own.topk_ids)
        np.testing.assert_array_equal(actual.topk_logprobs, own.topk_logprobs)
        np.testing.assert_array_equal(actual.token_logprobs, own.token_logprobs)
        np.testing.assert_allclose(actual.tail_logprob, own.tail_logprob, atol=1e-5)
        assert (actual.topk_advantages is not None) == with_reference
        if actual.topk_advantages is not None and own.topk_advantages is not None:
            np.testing.assert_array_equal(actual.topk_advantages, own.topk_advantages)


def test_the_bytes_are_those_of_the_files_and_grow_with_the_tokens(tmp_path: Path) -> None:
    teacher, reference = random_logprobs(7, tokens=30)
    shards = [
        [make_row(teacher[start:stop], reference[start:stop], 20) for start, stop in parts]
        for parts in ([(0, 4), (4, 15)], [(15, 30)])
    ]
    once, thrice = (measure_fidelity(shards, SCORING, TOP_KS, tokens) for tokens in (30, 90))
    for top_k, kept, more in zip(TOP_KS, once, thrice, strict=True):
        scoring = replace(SCORING, top_k=top_k)
        for shard in shards:
            write_signals(tmp_path, scoring, [cut_row(row, [top_k])[0] for row in shard])
        assert kept.bytes == sum(path.stat().st_size for path in scoring.folder(tmp_path).iterdir())
        assert more.bytes == 3 * kept.bytes


def test_with_a_nucleus_everything_is_of_what_it_keeps() -> None:
    """Mass, KL and advantages are those that ``keep_nucleus`` leaves, each token with a K of its own."""
    teacher, reference = random_logprobs(6, tokens=30)
    rows = [make_row(teacher, reference, V)]
    (actual,) = measure_fidelity([rows], replace(SCORING, top_p=0.5), [20], 30)
    descending = -np.sort(-np.exp(teacher), axis=1)
    counts = np.minimum((np.cumsum(descending, axis=1) - descending < 0.5).sum(axis=1), 20)
    assert len(set(counts.tolist())) > 2
    mass = [row[:count].sum() for row, count in zip(descending, counts, strict=True)]
    assert actual.captured_mass == pytest.approx(np.mean(mass), abs=1e-6)
    lost = [
        kl_of_outcomes(p, q, V) - kl_of_outcomes(p, q, count)
        for p, q, count in zip(teacher, reference, counts, strict=True)
    ]
    assert actual.kl_lost == pytest.approx(np.mean(lost), abs=1e-5)
    (whole,) = measure_fidelity([rows], SCORING, [20], 30)
    assert whole.captured_mass > actual.captured_mass
    assert whole.advantage_lost is not None
    assert actual.advantage_lost is not None
    assert whole.advantage_lost < actual.advantage_lost
    assert whole.bytes > actual.bytes


@pytest.mark.parametrize("kept", [{"top_p": 0.6}, {"lossy": True}, {"top_p": 0.6, "lossy": True}])
def test_the_bytes_of_a_nucleus_and_of_rounding_are_those_of_the_files(kept: dict[str, Any], tmp_path: Path) -> None:
    teacher, reference = random_logprobs(7, tokens=30)
    row = make_row(teacher, reference, 20)
    whole, less = (measure_fidelity([[row]], replace(SCORING, **options), [20], 30)[0] for options in ({}, kept))
    scoring = replace(SCORING, top_k=20, **kept)
    write_signals(tmp_path, scoring, [keep_nucleus(row, scoring.top_p)])
    (path,) = scoring.folder(tmp_path).iterdir()
    assert less.bytes == path.stat().st_size < whole.bytes
    if scoring.top_p == 1:
        assert replace(less, bytes=0) == replace(whole, bytes=0), "rounding is not judged here"
