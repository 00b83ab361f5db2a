"""Changed advantages have the right values, and a changed scoring works like any other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from adpa.data.cache.signal_rows import SignalRow, plain_schema, plain_table
from adpa.data.cache.signals import (
    ModelIdentity,
    Scoring,
    SignalTable,
    read_scoring,
    read_signals,
    write_scoring,
    write_signals,
)
from adpa.lab.advantages import centred, change_signals, clipped, towards_prior, uniform_reference
from adpa.lab.tokenizer import VOCABULARY

P = np.array([[0.5, 0.25], [0.9, 0.05]])
A = np.array([[0.5, -2.0], [3.0, 0.25]])
ROW = SignalRow(
    key=b"k" * 16,
    token_logprobs=np.log(P[:, 0]).astype(np.float32),
    topk_ids=np.array([[3, 7], [5, 2]], dtype=np.int32),
    topk_logprobs=np.log(P).astype(np.float16),
    tail_logprob=np.log(1 - P.sum(1)).astype(np.float32),
    token_advantages=A[:, 0].astype(np.float32),
    topk_advantages=A.astype(np.float16),
)
SCORING = Scoring(ModelIdentity("T", None, "t"), ModelIdentity("R", None, "r"), "v", 2, "float32", "hf")


def test_clipped_advantages_are_at_most_one_in_size() -> None:
    np.testing.assert_array_equal(clipped(ROW).topk_advantages, [[0.5, -1.0], [1.0, 0.25]])


def test_centred_advantages_have_no_expectation_under_the_teacher() -> None:
    centred_TK = np.asarray(centred(ROW).topk_advantages)
    np.testing.assert_allclose((P * centred_TK).sum(1), 0, atol=2e-3)
    np.testing.assert_allclose(np.diff(centred_TK, axis=1), np.diff(A, axis=1))


def test_without_a_reference_the_advantage_is_how_much_likelier_than_chance_a_token_is() -> None:
    found = np.asarray(uniform_reference(ROW).topk_advantages)
    np.testing.assert_allclose(found, np.log(P * len(VOCABULARY)), atol=2e-3)


def test_towards_a_prior_the_row_has_its_probabilities_and_keeps_the_advantages() -> None:
    prior_TK = np.array([[0.1, 0.2], [0.3, 0.6]])
    judged = replace(ROW, topk_advantages=(np.log(P) - np.log(prior_TK)).astype(np.float32))
    table = SignalTable([plain_table([judged], plain_schema(2))])
    changed = towards_prior(table)(ROW)
    assert changed is not None
    np.testing.assert_allclose(np.exp(changed.topk_logprobs), prior_TK, rtol=3e-3)
    np.testing.assert_allclose(np.exp(changed.tail_logprob), 1 - prior_TK.sum(1), rtol=1e-2)
    np.testing.assert_array_equal(changed.topk_advantages, ROW.topk_advantages)
    assert towards_prior(table)(replace(ROW, key=b"x" * 16)) is None


def test_a_changed_scoring_is_made_once_and_grows_with_its_origin(tmp_path: Path) -> None:
    write_scoring(tmp_path, SCORING)
    write_signals(tmp_path, SCORING, [ROW])
    changed = change_signals(tmp_path, SCORING.id, "clipped advantages", clipped)
    assert changed == change_signals(tmp_path, SCORING.id, "clipped advantages", clipped) != SCORING.id
    write_signals(tmp_path, SCORING, [replace(ROW, key=b"n" * 16)])
    change_signals(tmp_path, SCORING.id, "clipped advantages", clipped)
    scoring = read_scoring(tmp_path, changed)
    assert scoring.engine == "hf, clipped advantages"
    table = read_signals(tmp_path, scoring)
    assert table.keys() == {b"k" * 16, b"n" * 16}
    assert len(table) == 2
    for number in range(2):
        assert np.asarray(table.row(number).topk_advantages).max() == pytest.approx(1.0)
