"""The lossy grids: the error of a number is bounded, and the stored errors are those of the plain formula."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.data.makers import teacher_row

from adpa.data.cache.compact import compact_table, read_compact_row
from adpa.data.cache.rounding import (
    ADVANTAGE_STEP,
    COARSEST,
    DEEPEST,
    IMPOSSIBLE,
    LOGPROB_STEP,
    LOGPROBS,
    STEPS,
    advantage_errors,
    kl_errors,
    restore_advantages,
    round_advantages,
    round_logprobs,
)
from adpa.data.cache.signal_rows import SignalRow, keep_nucleus

KEY = bytes(16)


def digest(numbers: NDArray[np.float32]) -> str:
    return hashlib.blake2b(numbers.astype("<f4").tobytes(), digest_size=16).hexdigest()


def test_the_grids_are_frozen_for_caches_outlive_the_program() -> None:
    assert (len(LOGPROBS), len(STEPS), IMPOSSIBLE) == (4341, 4341, 4340)
    assert (LOGPROBS[0], LOGPROBS[IMPOSSIBLE], STEPS[IMPOSSIBLE]) == (0, -np.inf, 0)
    assert digest(LOGPROBS) == "74b900de22db5d5efe08ed362a2a08ea"
    assert digest(STEPS) == "fbb54980e00b25af2ecf3995a7e8517b"
    assert round_logprobs(np.array([-np.inf])).tolist() == [4340]


@given(st.floats(-DEEPEST, 0))
def test_a_probability_moves_by_at_most_half_a_step(logprob: float) -> None:
    rounded = float(LOGPROBS[round_logprobs(np.array([logprob]))[0]])
    step = min(COARSEST, LOGPROB_STEP * np.exp(-min(logprob, rounded)))
    assert abs(rounded - logprob) <= step / 2 + 1e-5


def test_rounding_keeps_the_order_and_what_is_impossible() -> None:
    logprobs = -np.sort(np.random.default_rng(0).uniform(0, 30, 1000))
    assert (np.diff(LOGPROBS[round_logprobs(logprobs)]) <= 0).all()
    assert LOGPROBS[round_logprobs(np.array([-np.inf, -1e30, 0.0]))].tolist() == [-np.inf, LOGPROBS[-2], 0.0]
    assert LOGPROBS[-2] == pytest.approx(-DEEPEST, abs=COARSEST)


@given(st.floats(-30, 0), st.floats(-1e4, 1e4))
def test_an_advantage_moves_by_at_most_half_a_step(logprob: float, advantage: float) -> None:
    codes = round_logprobs(np.array([logprob]))
    numbers = round_advantages(np.array([advantage]), codes)
    assert numbers.dtype == np.uint32
    step = min(COARSEST, ADVANTAGE_STEP * np.exp(-float(LOGPROBS[codes[0]]) / 2))
    assert abs(float(restore_advantages(numbers, codes)[0]) - advantage) <= step / 2 + 1e-3


def test_the_advantage_of_an_impossible_token_stays_minus_infinity() -> None:
    codes = round_logprobs(np.array([-np.inf]))
    assert restore_advantages(round_advantages(np.array([-np.inf]), codes), codes).tolist() == [-np.inf]


def kl_to(student: NDArray[np.float64], row: SignalRow) -> NDArray[np.float64]:
    """KL(p‖q) over K + 1 outcomes by the formula of the paper; ``student`` is q of them, [T, K + 1]."""
    p = np.exp(np.column_stack([row.topk_logprobs, row.tail_logprob]).astype(np.float64))
    return (p * (np.log(p) - np.log(student))).sum(1)


@pytest.mark.parametrize("reference", [True, False])
def test_the_noted_errors_are_those_of_the_formula(reference: bool) -> None:
    row = teacher_row(KEY, 50, seed=1, vocabulary=3000)
    if not reference:
        row = replace(row, token_advantages=None, topk_advantages=None)
    rounded = read_compact_row(compact_table([row], 50, lossy=True), 0)
    if row.topk_advantages is None:
        student = np.full((50, 51), 1 / 51)
    else:
        kept = np.exp(row.topk_logprobs.astype(np.float64) - row.topk_advantages)
        student = np.column_stack([kept, np.maximum(1 - kept.sum(1), np.finfo(np.float32).eps)])
    np.testing.assert_allclose(kl_errors(row, rounded), kl_to(student, rounded) - kl_to(student, row), atol=1e-9)
    if row.topk_advantages is not None and rounded.topk_advantages is not None:
        weighted = np.exp(row.topk_logprobs) * np.abs(rounded.topk_advantages - row.topk_advantages)
        np.testing.assert_allclose(advantage_errors(row, rounded), weighted.sum(1), rtol=1e-5)
    else:
        assert not advantage_errors(row, rounded).any()


def test_padding_has_no_error() -> None:
    row = keep_nucleus(teacher_row(KEY, 20, seed=2, vocabulary=3000), 0.5)
    rounded = read_compact_row(compact_table([row], 50, lossy=True), 0)
    assert np.isfinite(kl_errors(row, rounded)).all()
    assert (np.abs(kl_errors(row, rounded)) < 1e-2).all()
