"""Signals in the cache against a dense float32 forward, and the scoring loop's behaviour under failure."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from tests.conftest import MakeModel
from tests.pipeline.conftest import Filled
from torch import Tensor
from transformers import AutoModelForCausalLM

from adpa import precompute
from adpa.data.encoding import TokenSequence, sequence_key
from adpa.data.responses import read_response_sets
from adpa.data.signals import ModelIdentity, Scoring, SignalRow, read_scorings, read_signals
from adpa.errors import ModelError
from adpa.pipeline.checkpoint import open_checkpoint
from adpa.pipeline.lm_head import LmHead
from adpa.pipeline.scorer_hf import HfScorer
from adpa.pipeline.scoring import Scorer, batches_by_length, missing_sequences, score

CPU = torch.device("cpu")


def dense_logprobs(model: Path, sequence: TokenSequence) -> NDArray[np.float32]:
    """Log-probabilities [T, V] of every token at every response position, one sequence, no batching."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    whole = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()[None]
    with torch.inference_mode():
        logprobs = loaded(input_ids=whole).logits.log_softmax(-1)
    return np.asarray(logprobs[0, len(sequence.prompt_ids) - 1 : -1], dtype=np.float32)


def synthetic(prompt: ArrayLike, response: ArrayLike) -> TokenSequence:
    prompt_ids, response_ids = np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32)
    return TokenSequence(sequence_key(prompt_ids, response_ids), prompt_ids, response_ids)


def half_ulp(values: NDArray[np.float16]) -> NDArray[np.float32]:
    """What rounding to float16 can cost."""
    return np.asarray(np.spacing(np.abs(values)) / 2, dtype=np.float32)


def test_stored_signals_are_those_of_a_dense_forward(filled: Filled) -> None:
    (scoring,) = read_scorings(filled.cache)
    signals = read_signals(filled.cache, scoring)
    for responses in read_response_sets(filled.cache):
        keys = pa.array(responses.table["key"].to_pylist(), pa.binary(16))
        for sequence, number in list(zip(responses.sequences(), signals.locate(keys), strict=True))[:3]:
            row = signals.row(int(number))
            teacher = dense_logprobs(filled.models.teacher, sequence)
            reference = dense_logprobs(filled.models.reference, sequence)
            own = np.arange(len(teacher)), sequence.response_ids
            assert row.topk_advantages is not None
            assert row.token_advantages is not None

            expected_ids = np.argsort(-teacher, axis=1, kind="stable")[:, :10]
            np.testing.assert_array_equal(np.sort(row.topk_ids, axis=1), np.sort(expected_ids, axis=1))
            expected = np.take_along_axis(teacher, row.topk_ids, axis=1)
            error = np.abs(row.topk_logprobs.astype(np.float32) - expected)
            assert (error <= half_ulp(row.topk_logprobs) + 1e-5).all()
            assert (np.diff(expected, axis=1) <= 0).all()

            advantages = expected - np.take_along_axis(reference, row.topk_ids, axis=1)
            error = np.abs(row.topk_advantages.astype(np.float32) - advantages)
            assert (error <= half_ulp(row.topk_advantages) + 2e-5).all()

            np.testing.assert_allclose(row.token_logprobs, teacher[own], atol=1e-5)
            np.testing.assert_allclose(row.token_advantages, teacher[own] - reference[own], atol=2e-5)
            rest = np.exp(teacher.astype(np.float64))
            np.put_along_axis(rest, row.topk_ids, 0, axis=1)
            np.testing.assert_allclose(row.tail_logprob, np.log(rest.sum(1)), atol=1e-5)


def test_the_tail_of_a_sure_teacher_keeps_its_digits(make_model: MakeModel) -> None:
    model = make_model(5, vocab_size=64, width=256, initializer_range=1.0)
    sequence = synthetic([1, 2, 3], [4, 5, 6, 7])
    (row,) = HfScorer(open_checkpoint(str(model)), "float32", CPU).top_k([sequence], 20)
    dense = dense_logprobs(model, sequence).astype(np.float64)
    rest = np.sort(dense, axis=1)[:, :-20]
    expected = np.logaddexp.reduce(rest, axis=1)
    assert expected.min() < np.log(1e-8), "not a case where 1 − Σp loses its digits"
    np.testing.assert_allclose(row.tail_logprob, expected, atol=1e-4)


def test_k_of_the_whole_vocabulary_leaves_an_empty_tail(make_model: MakeModel) -> None:
    scorer = HfScorer(open_checkpoint(str(make_model(6, vocab_size=64))), "float32", CPU)
    (row,) = scorer.top_k([synthetic([1], [2, 3])], 64)
    assert (row.tail_logprob == -np.inf).all()
    np.testing.assert_allclose(np.exp(row.topk_logprobs.astype(np.float64)).sum(1), 1, atol=1e-5)


def test_signals_do_not_depend_on_the_batch(make_model: MakeModel) -> None:
    scorer = HfScorer(open_checkpoint(str(make_model(7, vocab_size=512))), "float32", CPU)
    generator = np.random.default_rng(0)
    sequences = [
        synthetic(generator.integers(0, 512, prompt), generator.integers(0, 512, response))
        for prompt, response in [(1, 1), (9, 3), (2, 40), (30, 30), (5, 1)]
    ]
    together = scorer.top_k(sequences, 12)
    for sequence, batched in zip(sequences, together, strict=True):
        (alone,) = scorer.top_k([sequence], 12)
        np.testing.assert_array_equal(alone.topk_ids, batched.topk_ids)
        np.testing.assert_allclose(alone.topk_logprobs, batched.topk_logprobs, atol=1e-5)
        np.testing.assert_allclose(alone.tail_logprob, batched.tail_logprob, atol=1e-5)


def test_prompt_rows_are_never_projected_to_the_vocabulary(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = HfScorer(open_checkpoint(str(make_model(8, vocab_size=64))), "float32", CPU)
    projected: list[int] = []
    logits = LmHead.logits

    def counting(head: LmHead, hidden: Tensor) -> Tensor:
        projected.append(len(hidden))
        return logits(head, hidden)

    monkeypatch.setattr(LmHead, "logits", counting)
    sequences = [synthetic(np.arange(50), np.arange(3)), synthetic(np.arange(20), np.arange(7))]
    rows = scorer.top_k(sequences, 4)
    scorer.logprobs_at(sequences, [row.topk_ids for row in rows])
    assert sum(projected) == 2 * (3 + 7)


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 300))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = batches_by_length(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    longest = [max(lengths[index] for index in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


class ScriptedScorer:
    """Uniform log-probabilities, a record of what was asked, and a failure on demand."""

    opened: ClassVar[list[str]] = []
    asked: ClassVar[list[tuple[str, int]]] = []
    loaded: ClassVar[int] = 0

    def __init__(self, name: str, fail_after: int = 10**9, value: float = -1.0) -> None:
        self.name, self.fail_after, self.value = name, fail_after, value
        ScriptedScorer.opened.append(name)
        ScriptedScorer.loaded += 1
        assert ScriptedScorer.loaded == 1, "two models in memory at once"

    def top_k(self, sequences: Sequence[TokenSequence], top_k: int) -> list[SignalRow]:
        self._note(sequences)
        return [
            SignalRow(
                sequence.key,
                np.full(len(sequence.response_ids), self.value, np.float32),
                np.tile(np.arange(top_k, dtype=np.int32), (len(sequence.response_ids), 1)),
                np.full((len(sequence.response_ids), top_k), self.value, np.float32),
                np.full(len(sequence.response_ids), -3.0, np.float32),
            )
            for sequence in sequences
        ]

    def logprobs_at(
        self, sequences: Sequence[TokenSequence], topk_ids: Sequence[NDArray[np.int32]]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        self._note(sequences)
        return [
            (np.full(len(sequence.response_ids), -2.0, np.float32), np.full(ids.shape, self.value - 1, np.float32))
            for sequence, ids in zip(sequences, topk_ids, strict=True)
        ]

    def close(self) -> None:
        ScriptedScorer.loaded -= 1

    def _note(self, sequences: Sequence[TokenSequence]) -> None:
        if self.fail_after == 0:
            raise KeyboardInterrupt
        self.fail_after -= 1
        ScriptedScorer.asked.append((self.name, len(sequences)))


@pytest.fixture
def scripted() -> type[ScriptedScorer]:
    ScriptedScorer.opened, ScriptedScorer.asked, ScriptedScorer.loaded = [], [], 0
    return ScriptedScorer


SCORING = Scoring(ModelIdentity("teacher", None, "a"), ModelIdentity("reference", None, "b"), "v", 3, "float32", "hf")
SEQUENCES = [synthetic([1, 2], [number, 4]) for number in range(6)]


def run(cache: Path, failing: dict[str, int], sequences: Sequence[TokenSequence] = SEQUENCES) -> None:
    def open_scorer(identity: ModelIdentity) -> Scorer:
        return ScriptedScorer(identity.name, failing.get(identity.name, 10**9))

    missing = missing_sequences(cache, SCORING, sequences)
    try:
        score(cache, SCORING, missing, open_scorer, batch_tokens=4)
    except KeyboardInterrupt:
        assert failing


def test_the_teacher_is_closed_before_the_reference_is_opened(tmp_path: Path, scripted: type[ScriptedScorer]) -> None:
    run(tmp_path, {})
    assert scripted.opened == ["teacher", "reference"]
    assert scripted.loaded == 0


@pytest.mark.parametrize("failing", [{"teacher": 4}, {"reference": 0}, {"reference": 4}])
def test_a_run_that_was_interrupted_goes_on_where_it_stopped(
    tmp_path: Path, scripted: type[ScriptedScorer], failing: dict[str, int]
) -> None:
    run(tmp_path, failing)
    run(tmp_path, {})
    assert scripted.asked.count(("teacher", 1)) == 6
    assert scripted.asked.count(("reference", 1)) == 6
    assert missing_sequences(tmp_path, SCORING, SEQUENCES) == []
    assert not list((SCORING.folder(tmp_path) / "pending").glob("*"))
    opened = len(scripted.opened)
    run(tmp_path, {})
    assert len(scripted.opened) == opened, "a complete cache loads no model"


def test_a_run_beside_another_does_not_lose_what_the_other_removes(
    tmp_path: Path, scripted: type[ScriptedScorer]
) -> None:
    class Interrupting(ScriptedScorer):
        """A teacher in whose pass another run scores everything from start to end."""

        def top_k(self, sequences: Sequence[TokenSequence], top_k: int) -> list[SignalRow]:
            if ScriptedScorer.asked == [("teacher", 1)] * 3:
                ScriptedScorer.loaded = 0
                run(tmp_path, {}, SEQUENCES[:4])
                ScriptedScorer.loaded = 1
            return super().top_k(sequences, top_k)

    def open_scorer(identity: ModelIdentity) -> Scorer:
        return (Interrupting if identity.name == "teacher" else ScriptedScorer)(identity.name)

    score(tmp_path, SCORING, missing_sequences(tmp_path, SCORING, SEQUENCES), open_scorer, batch_tokens=4)
    assert missing_sequences(tmp_path, SCORING, SEQUENCES) == []
    assert not list((SCORING.folder(tmp_path) / "pending").glob("*"))


def test_a_sequence_without_its_row_is_never_read_as_another(tmp_path: Path, scripted: type[ScriptedScorer]) -> None:
    run(tmp_path, {})
    with pytest.raises(AssertionError, match="without its row"):
        read_signals(tmp_path, SCORING).row(-1)


def test_the_head_scores_in_float32_whatever_the_models_dtype(make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(str(make_model(40, vocab_size=512, initializer_range=0.02)))
    (row,) = HfScorer(checkpoint, "bfloat16", CPU).top_k([synthetic([1, 2, 3], [4, 5])], 50)
    assert all(len(set(values)) > 45 for values in row.topk_logprobs), "bfloat16 logits leave ties"


def test_an_id_that_the_reference_lacks_is_refused_by_name(make_model: MakeModel) -> None:
    sequence = synthetic([1, 2], [3, 4])
    narrow = HfScorer(open_checkpoint(str(make_model(41, vocab_size=64))), "float32", CPU)
    with pytest.raises(ModelError, match=r"token id 70, which this model lacks: it has 64 tokens"):
        narrow.logprobs_at([sequence], [np.array([[1, 70], [2, 3]], dtype=np.int32)])


def test_advantages_are_subtracted_before_they_are_rounded(tmp_path: Path, scripted: type[ScriptedScorer]) -> None:
    def open_scorer(identity: ModelIdentity) -> Scorer:
        return scripted(identity.name, value=-12.3456789)

    score(tmp_path, SCORING, SEQUENCES[:1], open_scorer, batch_tokens=4)
    row = read_signals(tmp_path, SCORING).row(0)
    assert row.topk_advantages is not None
    np.testing.assert_array_equal(row.topk_advantages, np.float16(1.0))


@pytest.mark.parametrize(
    ("name", "value"), [("teacher", np.nan), ("teacher", np.inf), ("reference", np.nan), ("reference", -np.inf)]
)
def test_logprobs_that_are_not_finite_are_refused_by_the_models_name(
    tmp_path: Path, scripted: type[ScriptedScorer], name: str, value: float
) -> None:
    def open_scorer(identity: ModelIdentity) -> Scorer:
        return scripted(identity.name, value=value if identity.name == name else -1.0)

    with pytest.raises(ModelError, match=f"^{name}: .*not finite"):
        score(tmp_path, SCORING, SEQUENCES, open_scorer, batch_tokens=4)
    assert scripted.loaded == 0
    assert missing_sequences(tmp_path, SCORING, SEQUENCES) == SEQUENCES


def test_a_checkpoint_with_nan_weights_is_refused(make_model: MakeModel, filled: Filled, tmp_path: Path) -> None:
    broken = make_model(9)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(broken)
    with pytest.raises(ModelError, match="not finite"):
        precompute(teacher=str(broken), data=str(filled.data), cache=tmp_path)
