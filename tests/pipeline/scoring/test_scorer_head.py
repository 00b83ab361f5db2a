"""Scoring with adpa's own head: exact tails, float32 logits, and response rows only."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import MakeModel
from tests.memory import peak_bytes
from tests.pipeline.conftest import dense_logprobs, synthetic
from torch import Tensor

from adpa.data.cache.signal_rows import SignalRow
from adpa.data.sequences import TokenSequence
from adpa.errors import ModelError, OptionError
from adpa.pipeline.models.checkpoint import open_checkpoint
from adpa.pipeline.models.lm_head import LmHead, read_head
from adpa.pipeline.scoring.hf_scorer import HfDecoder, open_hf_scorer
from adpa.pipeline.scoring.score import Batch, ReferenceLogprobs
from adpa.pipeline.scoring.scorer_head import CHUNK_BYTES, HeadScorer, bytes_beside_decoder, chunk_rows, chunks_on

CPU = torch.device("cpu")


def scorer_of(model: Path, dtype: str = "float32") -> HeadScorer:
    return open_hf_scorer(open_checkpoint(str(model)), dtype, CPU)


def top_k(scorer: HeadScorer, batch: Sequence[TokenSequence], k: int) -> list[SignalRow]:
    (rows,) = scorer.top_k([batch], k)
    return rows


def logprobs_at(
    scorer: HeadScorer, batch: Sequence[TokenSequence], ids: Sequence[NDArray[np.int32]]
) -> list[ReferenceLogprobs]:
    (given,) = scorer.logprobs_at([batch], [ids])
    return given


def test_the_tail_of_a_sure_teacher_keeps_its_digits(make_model: MakeModel) -> None:
    model = make_model(5, vocab_size=64, width=256, initializer_range=1.0)
    sequence = synthetic([1, 2, 3], [4, 5, 6, 7])
    (row,) = top_k(scorer_of(model), [sequence], 20)
    dense = dense_logprobs(model, sequence).astype(np.float64)
    rest = np.sort(dense, axis=1)[:, :-20]
    expected = np.logaddexp.reduce(rest, axis=1)
    assert expected.min() < np.log(1e-8), "not a case where 1 − Σp loses its digits"
    np.testing.assert_allclose(row.tail_logprob, expected, atol=1e-4)


def test_k_of_the_whole_vocabulary_leaves_an_empty_tail(make_model: MakeModel) -> None:
    scorer = scorer_of(make_model(6, vocab_size=64))
    (row,) = top_k(scorer, [synthetic([1], [2, 3])], 64)
    assert (row.tail_logprob == -np.inf).all()
    np.testing.assert_allclose(np.exp(row.topk_logprobs.astype(np.float64)).sum(1), 1, atol=1e-5)


def test_signals_do_not_depend_on_the_batch(make_model: MakeModel) -> None:
    scorer = scorer_of(make_model(7, vocab_size=512))
    generator = np.random.default_rng(0)
    sequences = [
        synthetic(generator.integers(0, 512, prompt), generator.integers(0, 512, response))
        for prompt, response in [(1, 1), (9, 3), (2, 40), (30, 30), (5, 1)]
    ]
    together = top_k(scorer, sequences, 12)
    for sequence, batched in zip(sequences, together, strict=True):
        (alone,) = top_k(scorer, [sequence], 12)
        np.testing.assert_array_equal(alone.topk_ids, batched.topk_ids)
        np.testing.assert_allclose(alone.topk_logprobs, batched.topk_logprobs, atol=1e-5)
        np.testing.assert_allclose(alone.tail_logprob, batched.tail_logprob, atol=1e-5)


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows in each chunk of the head."""
    found: list[int] = []
    logits = LmHead.float32_logits

    def counting(head: LmHead, hidden_Cd: Tensor) -> Tensor:
        found.append(len(hidden_Cd))
        return logits(head, hidden_Cd)

    monkeypatch.setattr(LmHead, "float32_logits", counting)
    return found


def test_prompt_rows_are_never_projected_to_the_vocabulary(make_model: MakeModel, projected: list[int]) -> None:
    scorer = scorer_of(make_model(8, vocab_size=64))
    sequences = [synthetic(np.arange(50), np.arange(3)), synthetic(np.arange(20), np.arange(7))]
    rows = top_k(scorer, sequences, 4)
    logprobs_at(scorer, sequences, [row.topk_ids for row in rows])
    assert sum(projected) == 2 * (3 + 7)


def test_the_head_scores_in_float32_whatever_the_models_dtype(make_model: MakeModel) -> None:
    scorer = scorer_of(make_model(40, vocab_size=512, initializer_range=0.02), "bfloat16")
    (row,) = top_k(scorer, [synthetic([1, 2, 3], [4, 5])], 50)
    assert all(len(set(values)) > 45 for values in row.topk_logprobs), "bfloat16 logits leave ties"


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("where", ["cpu", "cpu as cuda", pytest.param("cuda", marks=NO_GPU)])
def test_signals_are_those_of_float64_from_the_models_own_factors(
    where: str, dtype: str, make_model: MakeModel, request: pytest.FixtureRequest
) -> None:
    """Within 2e-6, and what the logits lose: a rounding for each of a sum's d products, or only one in the stand-in."""
    products = request.getfixturevalue("products") if where == "cpu as cuda" else []
    checkpoint = open_checkpoint(str(make_model(40, vocab_size=700, initializer_range=0.1)))
    model = checkpoint.load(dtype, torch.device(where.split()[0])).eval()
    decoder, head = HfDecoder(model), read_head(model)
    scorer = HeadScorer("teacher", decoder, head)
    sequences = [synthetic([1, 2, 3], [4, 5]), synthetic([6], [7, 8, 9])]
    rows = top_k(scorer, sequences, 20)
    given = logprobs_at(scorer, sequences, [row.topk_ids for row in rows])
    assert [factors for factors, _ in products] == [getattr(torch, dtype)] * len(products)
    assert len(products) == (2 if where == "cpu as cuda" else 0)

    (hidden_Nd,) = decoder.response_hidden([sequences])
    hidden_Nd, weight_Vd = hidden_Nd.cpu().double(), head.weight.detach().cpu().double()
    logprobs_NV = (hidden_Nd @ weight_Vd.T).log_softmax(dim=1)
    roundings = 2 if where == "cpu as cuda" else 2 * len(hidden_Nd.T)
    bound = 2e-6 + roundings * 2**-24 * float((hidden_Nd.abs() @ weight_Vd.abs().T).max())
    for sequence, row, (own, at_ids), logprobs_TV in zip(
        sequences, rows, given, logprobs_NV.split([2, 3]), strict=True
    ):
        ids_TK = torch.from_numpy(row.topk_ids).long()
        assert torch.equal(ids_TK, logprobs_TV.topk(20, dim=1).indices)
        topk_TK = logprobs_TV.gather(1, ids_TK).numpy()
        own_T = logprobs_TV.gather(1, torch.from_numpy(sequence.response_ids).long()[:, None])[:, 0].numpy()
        tail_T = logprobs_TV.scatter(1, ids_TK, -torch.inf).logsumexp(dim=1).numpy()
        for found, expected in [
            *((row.token_logprobs, own_T), (row.topk_logprobs, topk_TK), (row.tail_logprob, tail_T)),
            *((own, own_T), (at_ids, topk_TK)),
        ]:
            np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


def test_an_id_that_the_reference_lacks_is_refused_by_name(make_model: MakeModel) -> None:
    sequence = synthetic([1, 2], [3, 4])
    narrow = scorer_of(make_model(41, vocab_size=64))
    with pytest.raises(ModelError, match=r"token id 70, which this model lacks: it has 64 tokens"):
        logprobs_at(narrow, [sequence], [np.array([[1, 70], [2, 3]], dtype=np.int32)])


def test_more_ids_than_the_model_has_tokens_are_refused(make_model: MakeModel) -> None:
    scorer = scorer_of(make_model(42, vocab_size=64))
    with pytest.raises(OptionError, match=r"--top-k 65: .* has 64 tokens"):
        top_k(scorer, [synthetic([1], [2])], 65)


def test_long_batches_go_through_the_head_in_chunks_of_rows(
    make_model: MakeModel, projected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(make_model(43, vocab_size=512))
    sequences = [synthetic([1, 2], np.arange(5)), synthetic([3], np.arange(7)), synthetic([4], [5])]
    whole = top_k(scorer, sequences, 6)
    given = logprobs_at(scorer, sequences, [row.topk_ids for row in whole])
    assert projected == [13, 13]
    monkeypatch.setattr("adpa.pipeline.scoring.scorer_head.CHUNK_BYTES", 4 * 4 * (512 + 32 + 4 * 6))
    chunked = top_k(scorer, sequences, 6)
    assert projected[2:] == [4, 4, 4, 1]
    for row, other in zip(whole, chunked, strict=True):
        assert row.key == other.key
        np.testing.assert_array_equal(row.topk_ids, other.topk_ids)
        for name in ("token_logprobs", "topk_logprobs", "tail_logprob"):
            np.testing.assert_allclose(getattr(row, name), getattr(other, name), atol=1e-5)
    for pair, other_pair in zip(given, logprobs_at(scorer, sequences, [r.topk_ids for r in chunked]), strict=True):
        for values, other_values in zip(pair, other_pair, strict=True):
            np.testing.assert_allclose(values, other_values, atol=1e-5)


@pytest.mark.parametrize(("V", "d", "K"), [(32_000, 4096, 50), (151_936, 896, 1000), (262_144, 5376, 50), (96, 32, 96)])
def test_a_chunk_has_as_many_rows_as_its_bytes_allow(V: int, d: int, K: int) -> None:
    head = LmHead(torch.empty(V, d, device="meta"), None, None, 1.0)
    bytes_of_row = 4 * (V + d) + 16 * K
    rows = chunk_rows(head, K)
    assert rows * bytes_of_row <= CHUNK_BYTES < (rows + 1) * bytes_of_row


def test_a_row_that_is_larger_than_a_chunk_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adpa.pipeline.scoring.scorer_head.CHUNK_BYTES", 10)
    assert chunk_rows(LmHead(torch.empty(8, 4), None, None, 1.0), 2) == 1


class KnownHidden:
    """A decoder that returns prepared hidden states."""

    def __init__(self, hidden_Nd: Tensor) -> None:
        self.hidden_Nd = hidden_Nd

    def response_hidden(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        return iter([self.hidden_Nd] * len(batches))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("K", [1, 50, 1000])
@pytest.mark.parametrize("head", [(None, None, 1.0), (torch.ones(4096), 30.0, 0.5)])
def test_scoring_takes_no_more_memory_beside_the_decoder_than_is_reserved(
    head: tuple[Tensor | None, float | None, float], K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adpa.pipeline.scoring.scorer_head.CHUNK_BYTES", 2 << 20)
    for module in ("pipeline.scoring.scorer_head", "kernels.teacher_rows"):
        monkeypatch.setattr(f"adpa.{module}.BLOCK_BYTES", 1 << 20)
    lm_head = LmHead(torch.randn(4096, 16), *head)
    scorer = HeadScorer("teacher", KnownHidden(torch.randn(500, 16)), lm_head)
    batch = [synthetic([1], np.arange(500))]
    (row,) = top_k(scorer, batch, K)
    results = 2 * 500 * (8 * K + 8)  # on a CPU the results stay in memory until they are joined
    limit = bytes_beside_decoder(lm_head) - lm_head.nbytes + results
    assert peak_bytes(lambda: top_k(scorer, batch, K)) <= limit
    assert peak_bytes(lambda: logprobs_at(scorer, batch, [row.topk_ids])) <= limit


def test_teacher_and_reference_are_asked_the_same_way(make_model: MakeModel) -> None:
    """A model has no advantage over itself at any token."""
    scorer = scorer_of(make_model(44, vocab_size=512))
    batches = [[synthetic([1, 2], [3, 4, 5]), synthetic([6], [7])], [synthetic([8], [9, 10])]]
    rows = list(scorer.top_k(batches, 6))
    given = list(scorer.logprobs_at(batches, ([row.topk_ids for row in batch] for batch in rows)))
    assert [len(batch) for batch in rows] == [len(batch) for batch in given] == [2, 1]
    for row, (own, at_ids) in zip(chain(*rows), chain(*given), strict=True):
        np.testing.assert_allclose(own, row.token_logprobs, atol=1e-6)
        np.testing.assert_allclose(at_ids, row.topk_logprobs, atol=1e-6)


class Streams:
    """Stands in for CUDA's streams and events, and records which work waits for which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.names = {0: "compute", 1: "copy"}
        self.current = 0
        self.events = 0
        streams, said = self, self.said

        class Stream:
            def __init__(self, _: object = None, number: int = 1) -> None:
                self.number = number

            def wait_stream(self, other: "Stream") -> None:
                said.append(f"{streams.names[self.number]} waits for {streams.names[other.number]}")

            def wait_event(self, event: "Event") -> None:
                if event.recorded:
                    said.append(f"{streams.names[self.number]} waits for {event.recorded}")

        class Event:
            recorded = ""

            def record(self, stream: Stream) -> None:
                self.recorded = f"{streams.names[stream.number]} of chunk {streams.events}"
                streams.events += 1

        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(number=0))
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())


class OnTheHost(Tensor):
    """Hidden states that make their buffers on the CPU for every device."""

    def new_empty(self, *shape: int, device: object) -> Tensor:  # type: ignore[override]
        return torch.empty(shape)


def test_a_gpu_copies_a_chunk_while_it_computes_with_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits only for the computation two chunks earlier, whose buffer it reuses."""
    said = Streams(monkeypatch).said
    hidden_Nd = torch.randn(11, 3)
    taken = [chunk.clone() for chunk in chunks_on(torch.device("cuda"), hidden_Nd.as_subclass(OnTheHost), 3)]
    torch.testing.assert_close(torch.cat(taken).as_subclass(Tensor), hidden_Nd, rtol=0, atol=0)
    assert said == [
        "copy waits for compute",
        "compute waits for copy",
        "compute waits for copy",
        "copy waits for compute of chunk 0",
        "compute waits for copy",
        "copy waits for compute of chunk 1",
        "compute waits for copy",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_chunks_on_a_gpu_are_those_of_the_host() -> None:
    hidden_Nd = torch.randn(1000, 64).pin_memory()
    taken = [chunk.square() for chunk in chunks_on(torch.device("cuda"), hidden_Nd, 37)]
    torch.testing.assert_close(torch.cat(taken).cpu(), hidden_Nd.square(), rtol=0, atol=0)


def test_a_closed_scorer_holds_no_weights(make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(str(make_model(45, vocab_size=64)))
    model = checkpoint.load("float32", CPU)
    vars(model)["itself"] = model  # real models contain reference cycles
    left = weakref.ref(model)
    scorer = HeadScorer("teacher", HfDecoder(model), read_head(model))
    del model
    answers = scorer.top_k([[synthetic([1], [2])], [synthetic([1], [3])]], 4)
    next(answers)  # as in a run that fails in its second batch
    gc.disable()
    try:
        scorer.close()
        assert left() is None
    finally:
        gc.enable()
