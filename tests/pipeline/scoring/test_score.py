"""Signals in the cache agree with a dense float32 forward pass, and the scoring loop survives failures."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import MakeModel
from tests.pipeline.conftest import Filled, dense_logprobs, synthetic
from transformers import AutoModelForCausalLM

from adpa import precompute
from adpa.data.cache.responses import read_response_sets
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import ModelIdentity, Scoring, read_scorings, read_signals
from adpa.data.sequences import TokenSequence
from adpa.errors import ModelError
from adpa.pipeline.scoring.score import Batch, ReferenceLogprobs, Scorer, missing_sequences, score


def half_ulp(values: NDArray[np.float16]) -> NDArray[np.float32]:
    """The largest error of rounding to float16."""
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


class ScriptedScorer:
    """A scorer with uniform log-probabilities, a record of its requests, and a failure on demand."""

    opened: ClassVar[list[str]] = []
    asked: ClassVar[list[tuple[str, int]]] = []
    loaded: ClassVar[int] = 0

    def __init__(self, name: str, fail_after: int = 10**9, value: float = -1.0) -> None:
        self.name, self.fail_after, self.value = name, fail_after, value
        ScriptedScorer.opened.append(name)
        ScriptedScorer.loaded += 1
        assert ScriptedScorer.loaded == 1, "two models in memory at once"

    def top_k(self, batches: Sequence[Batch], top_k: int) -> Iterator[list[SignalRow]]:
        for batch in batches:
            self._note(batch)
            yield [self._row(sequence, top_k) for sequence in batch]

    def logprobs_at(
        self, batches: Sequence[Batch], topk_ids: Iterable[Sequence[NDArray[np.int32]]]
    ) -> Iterator[list[ReferenceLogprobs]]:
        for batch, given in zip(batches, topk_ids, strict=True):
            self._note(batch)
            yield [
                (np.full(len(ids), -2.0, np.float32), np.full(ids.shape, self.value - 1, np.float32)) for ids in given
            ]

    def close(self) -> None:
        ScriptedScorer.loaded -= 1

    def _row(self, sequence: TokenSequence, top_k: int) -> SignalRow:
        tokens = len(sequence.response_ids)
        return SignalRow(
            sequence.key,
            np.full(tokens, self.value, np.float32),
            np.tile(np.arange(top_k, dtype=np.int32), (tokens, 1)),
            np.full((tokens, top_k), self.value, np.float32),
            np.full(tokens, -3.0, np.float32),
        )

    def _note(self, batch: Batch) -> None:
        if self.fail_after == 0:
            raise KeyboardInterrupt
        self.fail_after -= 1
        ScriptedScorer.asked.append((self.name, len(batch)))


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
        """A teacher during whose pass another run scores everything."""

        def _note(self, batch: Batch) -> None:
            if ScriptedScorer.asked == [("teacher", 1)] * 3:
                ScriptedScorer.loaded = 0
                # The first two batches are written; the third one may still be open.
                run(tmp_path, {}, SEQUENCES[:2])
                ScriptedScorer.loaded = 1
            super()._note(batch)

    def open_scorer(identity: ModelIdentity) -> Scorer:
        return (Interrupting if identity.name == "teacher" else ScriptedScorer)(identity.name)

    score(tmp_path, SCORING, missing_sequences(tmp_path, SCORING, SEQUENCES), open_scorer, batch_tokens=4)
    assert missing_sequences(tmp_path, SCORING, SEQUENCES) == []
    assert not list((SCORING.folder(tmp_path) / "pending").glob("*"))


def test_a_sequence_without_its_row_is_never_read_as_another(tmp_path: Path, scripted: type[ScriptedScorer]) -> None:
    run(tmp_path, {})
    with pytest.raises(AssertionError, match="without its row"):
        read_signals(tmp_path, SCORING).row(-1)


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


@pytest.mark.parametrize("place", ["a later rank", "the tail"])
def test_a_number_that_is_none_is_refused_wherever_it_is(
    tmp_path: Path, scripted: type[ScriptedScorer], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    whole = scripted._row

    def broken(self: ScriptedScorer, sequence: TokenSequence, top_k: int) -> SignalRow:
        row = whole(self, sequence, top_k)
        if place == "the tail":
            row.tail_logprob[-1] = np.nan
        else:
            row.topk_logprobs[-1, -1] = np.nan
        return row

    monkeypatch.setattr(scripted, "_row", broken)
    with pytest.raises(ModelError, match="not finite"):
        score(tmp_path, SCORING, SEQUENCES, lambda identity: scripted(identity.name), batch_tokens=4)


def test_a_checkpoint_with_nan_weights_is_refused(make_model: MakeModel, filled: Filled, tmp_path: Path) -> None:
    broken = make_model(9)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    model.save_pretrained(broken)
    with pytest.raises(ModelError, match="not finite"):
        precompute(teacher=str(broken), data=str(filled.data), cache=tmp_path)
