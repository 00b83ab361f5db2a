"""Scoring with a real vLLM on the CPU, against transformers: both methods, every kind of head."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.conftest import MakeModel
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    OpenAIGPTConfig,
    PhiConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from adpa.data.cache.responses import Sampling
from adpa.data.cache.signal_rows import SignalRow
from adpa.data.cache.signals import Scoring
from adpa.data.sequences import TokenSequence, sequence_key
from adpa.errors import EngineError, ModelError, OptionError
from adpa.pipeline.models.checkpoint import Checkpoint, open_checkpoint
from adpa.pipeline.options import HeadDtype
from adpa.pipeline.scoring.engine import HfEngine
from adpa.pipeline.scoring.hf_scorer import HfDecoder
from adpa.pipeline.scoring.score import Scorer
from adpa.pipeline.scoring.vllm_engine import VllmEngine, open_vllm
from adpa.pipeline.scoring.vllm_options import VllmOptions

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
QUICK = ("enforce_eager=true", "kv_cache_memory_bytes=67108864")
HF = HfEngine(CPU, "")
TEXT = (Path(__file__).parents[3] / "LICENSE").read_text()


def sequence(prompt_ids: NDArray[np.int32], response_ids: NDArray[np.int32]) -> TokenSequence:
    return TokenSequence(sequence_key(prompt_ids, response_ids), prompt_ids, response_ids)


def random_sequences(vocabulary: int, *lengths: tuple[int, int]) -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    return [
        sequence(*(generator.integers(0, vocabulary, length).astype(np.int32) for length in pair)) for pair in lengths
    ]


def scoring_of(teacher: Checkpoint, top_k: int, dtype: str = "float32") -> Scoring:
    return Scoring(teacher.identity, None, "v", top_k, dtype, "")


def vllm_engine(checkpoint: Checkpoint, head_dtype: HeadDtype = "auto", *arguments: str) -> VllmEngine:
    options = VllmOptions(head_dtype=head_dtype, engine_arg=(*QUICK, *arguments))
    return open_vllm(options, CPU, {"teacher": checkpoint}, {"teacher": "float32"}, "")


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    """Scorers and samplers of a test. All are closed: vLLM runs only one model at a time in a process."""
    models: list[Any] = []
    yield models
    for model in models:
        model.close()


def top_k(scorer: Scorer, sequences: list[TokenSequence], k: int) -> list[SignalRow]:
    """Scores in batches of three."""
    batches = [sequences[start : start + 3] for start in range(0, len(sequences), 3)]
    rows = [row for answered in scorer.top_k(batches, k) for row in answered]
    scorer.close()
    return rows


def logprobs_at(scorer: Scorer, sequences: list[TokenSequence], ids: list[NDArray[np.int32]]) -> list[Any]:
    (given,) = scorer.logprobs_at([sequences], [ids])
    scorer.close()
    return given


def assert_rows_agree(rows: list[SignalRow], oracle: list[SignalRow], bound: float) -> None:
    """Log-probabilities agree within the bound, and so do ids unless the oracle's next id is within the bound."""
    for row, expected in zip(rows, oracle, strict=True):
        assert row.key == expected.key
        np.testing.assert_allclose(row.token_logprobs, expected.token_logprobs, atol=bound)
        np.testing.assert_array_equal(np.sort(row.topk_ids, axis=1), np.sort(expected.topk_ids, axis=1))
        np.testing.assert_allclose(row.topk_logprobs, expected.topk_logprobs, atol=bound)


# --- SmolLM2 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_sequences(tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
    """Eight pieces of real text, from 40 to 250 tokens."""
    ids = np.array(tokenizer(TEXT)["input_ids"], dtype=np.int32)
    starts = np.arange(8) * 250
    return [sequence(ids[s : s + 20 + 3 * n], ids[s + 20 + 3 * n : s + 40 + 30 * n]) for n, s in enumerate(starts)]


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2: Path, text_sequences: list[TokenSequence]) -> list[SignalRow]:
    checkpoint = open_checkpoint(str(smollm2))
    return top_k(HF.open_scorer(checkpoint, scoring_of(checkpoint, 50), 250), text_sequences, 50)


def test_hidden_states_of_smollm2_give_the_signals_of_transformers(
    smollm2: Path, text_sequences: list[TokenSequence], smollm2_oracle: list[SignalRow]
) -> None:
    checkpoint = open_checkpoint(str(smollm2))
    engine = vllm_engine(checkpoint, "auto", "max_num_batched_tokens=64")
    assert engine.name == "vllm hidden-states"
    scoring = scoring_of(checkpoint, 50)
    rows = top_k(engine.open_scorer(checkpoint, scoring, 250), text_sequences, 50)
    assert_rows_agree(rows, smollm2_oracle, 5e-4)
    for row, expected in zip(rows, smollm2_oracle, strict=True):
        np.testing.assert_allclose(row.tail_logprob, expected.tail_logprob, atol=5e-4)

    ids = [row.topk_ids for row in smollm2_oracle]
    given = logprobs_at(engine.open_scorer(checkpoint, scoring, 250), text_sequences, ids)
    for (own, at_ids), expected in zip(given, smollm2_oracle, strict=True):
        np.testing.assert_allclose(own, expected.token_logprobs, atol=5e-4)
        np.testing.assert_allclose(at_ids, expected.topk_logprobs, atol=5e-4)


def test_prompt_logprobs_of_smollm2_are_those_of_transformers(
    smollm2: Path, text_sequences: list[TokenSequence], smollm2_oracle: list[SignalRow]
) -> None:
    checkpoint = open_checkpoint(str(smollm2))
    engine = replace(vllm_engine(checkpoint), head_dtype="float32")
    rows = top_k(engine.open_scorer(checkpoint, scoring_of(checkpoint, 50), 250), text_sequences, 50)
    assert_rows_agree(rows, smollm2_oracle, 5e-4)
    # 1 − Σp has no more digits than Σp, and torch's float32 log-softmax of so many logits errs by 3e-5 on a CPU.
    for row, expected in zip(rows, smollm2_oracle, strict=True):
        np.testing.assert_allclose(np.exp(row.tail_logprob), np.exp(expected.tail_logprob), atol=5e-5)


# --- tiny models -----------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
HEADS = {
    "tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "untied": Qwen2Config(**TINY, tie_word_embeddings=False),
    "softcap": Gemma2Config(**TINY, head_dim=32, final_logit_softcapping=3.0, attn_logit_softcapping=None),
    "divisor": GraniteConfig(**TINY, logits_scaling=8.0),
    "scale": CohereConfig(**TINY, logit_scale=0.25),
    "bias": PhiConfig(**TINY),
}


@pytest.mark.parametrize("kind", HEADS)
def test_every_kind_of_head_is_as_in_the_model(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HEADS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    sequences = random_sequences(512, (1, 1), (9, 30), (40, 3))
    scoring = scoring_of(checkpoint, 20)
    oracle = top_k(HF.open_scorer(checkpoint, scoring, 64), sequences, 20)
    engine = vllm_engine(checkpoint)
    assert engine.head_dtype is None, engine.reason
    assert_rows_agree(top_k(engine.open_scorer(checkpoint, scoring, 64), sequences, 20), oracle, 2e-5)


@pytest.fixture(scope="module")
def tiny(make_model: MakeModel) -> Callable[[int], Path]:
    """Random Llamas with the head width that vLLM's attention on CPUs needs."""
    return lambda seed: make_model(seed, width=128, vocab_size=512, initializer_range=0.1)


@dataclass(frozen=True)
class OnV2:
    """Results of the V2 runner, which GPUs use, for some sequences."""

    teacher: Checkpoint
    reference: Checkpoint
    sequences: list[TokenSequence]
    answers: Mapping[str, NDArray[Any]]


@pytest.fixture(scope="module")
def on_v2(tiny: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory) -> OnV2:
    teacher, reference, tmp_path = tiny(60), tiny(61), tmp_path_factory.mktemp("v2")
    lengths = [(1, 4), (2, 29), (20, 11), (16, 16), (33, 1), (1, 63), (60, 30), (50, 100)]
    sequences = random_sequences(512, *lengths)
    np.savez(
        tmp_path / "sequences.npz",
        allow_pickle=False,
        **{f"prompt{n}": s.prompt_ids for n, s in enumerate(sequences)},
        **{f"response{n}": s.response_ids for n, s in enumerate(sequences)},
    )
    settings = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, Path(__file__).parent / "vllm_v2.py", teacher, reference]
    command += [tmp_path / "sequences.npz", tmp_path / "answers.npz"]
    subprocess.run(list(map(str, command)), env=os.environ | settings, check=True)
    answers = np.load(tmp_path / "answers.npz")
    return OnV2(open_checkpoint(str(teacher)), open_checkpoint(str(reference)), sequences, answers)


@pytest.mark.parametrize("way", ["hidden", "logprobs"])
def test_the_v2_runner_answers_for_teacher_and_reference(way: str, on_v2: OnV2) -> None:
    def answer(column: str, number: int) -> NDArray[Any]:
        return np.asarray(on_v2.answers[f"{way}-{column}{number}"])

    rows = [
        SignalRow(sequence.key, *(answer(column, number) for column in ("own", "ids", "logprobs", "tail")))
        for number, sequence in enumerate(on_v2.sequences)
    ]
    scorer = HF.open_scorer(on_v2.teacher, scoring_of(on_v2.teacher, 20), 200)
    oracle = top_k(scorer, on_v2.sequences, 20)
    assert_rows_agree(rows, oracle, 1e-5)
    for row, judged in zip(rows, oracle, strict=True):
        np.testing.assert_allclose(row.tail_logprob, judged.tail_logprob, atol=1e-5)

    scorer = HF.open_scorer(on_v2.reference, scoring_of(on_v2.reference, 20), 200)
    expected = logprobs_at(scorer, on_v2.sequences, [row.topk_ids for row in rows])
    for number, (own, at_ids) in enumerate(expected):
        given, padded = answer("reference", number), answer("asked", number) < 0
        np.testing.assert_allclose(answer("reference_own", number), own, atol=1e-5)
        np.testing.assert_allclose(given[~padded], at_ids[~padded], atol=1e-5)
        assert padded.any() == (way == "logprobs"), "no padding to ignore"
        assert (given[padded] == -np.inf).all()


def opened_with(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, head_dtype: Any, *engine_arg: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of vLLM for scoring and for sampling."""
    from adpa.pipeline.scoring import vllm_models

    started: list[dict[str, Any]] = []
    monkeypatch.setattr(vllm_models, "VllmModel", lambda _, arguments: started.append(arguments))
    engine = VllmEngine(VllmOptions(engine_arg=engine_arg), CPU, head_dtype, with_reference=False, reason="")
    engine.open_scorer(checkpoint, scoring_of(checkpoint, 4), 16)
    engine.open_sampler(checkpoint, Sampling("s", 2, 1.0, 1.0, 12, 1, 0, "float32", "vllm"), 64)
    return started[0], started[1]


@pytest.mark.parametrize("head_dtype", [None, "float32"])
def test_scoring_runs_without_graphs_and_sampling_with_them_unless_the_user_says_otherwise(
    head_dtype: Any, tiny: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny(60)))
    scoring, sampling = opened_with(checkpoint, monkeypatch, head_dtype)
    assert scoring["compilation_config"] == {"cudagraph_mode": "NONE"}
    assert not {"compilation_config", "enforce_eager", "async_scheduling"} & sampling.keys()
    assert not {"enforce_eager", "async_scheduling"} & scoring.keys(), "vLLM's defaults"
    said = ('compilation_config={"cudagraph_mode": "FULL"}', "enforce_eager=true", "async_scheduling=true")
    scoring, sampling = opened_with(checkpoint, monkeypatch, head_dtype, *said)
    for arguments in (scoring, sampling):
        assert arguments["compilation_config"] == {"cudagraph_mode": "FULL"}
        assert arguments["enforce_eager"] is arguments["async_scheduling"] is True


def test_an_engine_of_scoring_has_no_graphs(tiny: Callable[[int], Path], opened: list[Any]) -> None:
    checkpoint = open_checkpoint(str(tiny(60)))
    scorer: Any = vllm_engine(checkpoint).open_scorer(checkpoint, scoring_of(checkpoint, 4), 16)
    opened.append(scorer)
    config = scorer._decoder._model._engine.vllm_config
    assert config.compilation_config.cudagraph_mode.name == "NONE"
    assert config.scheduler_config.async_scheduling is False


def test_hidden_states_keep_the_models_dtype(make_model: MakeModel, opened: list[Any]) -> None:
    from adpa.pipeline.scoring.vllm_models import VllmDecoder

    checkpoint = open_checkpoint(
        str(make_model(63, width=128, vocab_size=512, initializer_range=0.1, dtype="bfloat16"))
    )
    engine = vllm_engine(checkpoint)
    decoder = VllmDecoder(checkpoint, engine._arguments("teacher", "bfloat16", 64))
    opened.append(decoder)
    batches = [random_sequences(512, (3, 5), (9, 20)), random_sequences(512, (1, 4))]
    expected = HfDecoder(checkpoint.load("bfloat16", CPU).eval()).response_hidden(batches)
    for hidden_Nd, other_Nd in zip(decoder.response_hidden(batches), expected, strict=True):
        assert hidden_Nd.dtype == torch.bfloat16
        torch.testing.assert_close(hidden_Nd, other_Nd, atol=0.1, rtol=0.1)


def test_hidden_states_lie_in_pinned_memory_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from adpa.pipeline.scoring.vllm_models import _join

    pinned: list[bool] = []

    def empty(*size: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        pinned.append(pin_memory)
        return torch.zeros(*size, dtype=dtype)

    rows = [torch.randn(length, 3, dtype=torch.bfloat16) for length in (1, 4, 2)]
    for gpu in (True, False):
        with monkeypatch.context() as there:
            there.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
            there.setattr("torch.empty", empty)
            joined_Nd = _join(rows)
        assert torch.equal(joined_Nd, torch.cat(rows))
        assert joined_Nd.dtype == torch.bfloat16
    assert pinned == [True, False]


def test_log_probabilities_at_given_ids_without_the_v2_runner_are_refused(tiny: Callable[[int], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny(60)))
    engine = replace(vllm_engine(checkpoint), head_dtype="float32", with_reference=True)
    with pytest.raises(OptionError, match="V2 model runner, which is off here"):
        engine.open_scorer(checkpoint, scoring_of(checkpoint, 4), 16)


def test_an_answer_about_other_tokens_is_refused(
    tiny: Callable[[int], Path], opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny(60)))
    engine = replace(vllm_engine(checkpoint), head_dtype="float32")
    scorer = engine.open_scorer(checkpoint, scoring_of(checkpoint, 4), 16)
    opened.append(scorer)
    monkeypatch.setattr("vllm.LLMEngine.step", answering_about_other_tokens())
    with pytest.raises(EngineError, match="answered with log-probabilities of other tokens"):
        next(scorer.top_k([random_sequences(512, (3, 5))], 4))


def answering_about_other_tokens() -> Callable[[Any], list[Any]]:
    from vllm import LLMEngine

    step = LLMEngine.step

    def forged(engine: Any) -> list[Any]:
        outputs: list[Any] = step(engine)
        for output in outputs:
            ids = output.prompt_logprobs.token_ids
            ids[:] = ids[1:] + ids[:1]
        return outputs

    return forged


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["max_nonsense=1"], OptionError, "max_nonsense: vLLM has no such engine argument"),
        (["quantization=nonsense"], ModelError, "vLLM cannot run it: .*quantization"),
        (["kv_cache_memory_bytes=1024"], EngineError, "vLLM does not start: .*memory.*--gpu-memory-utilization"),
    ],
)
def test_an_engine_that_cannot_start_says_why_and_what_to_do(
    tiny: Callable[[int], Path], arguments: list[str], error: type[Exception], message: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(60)))
    with pytest.raises(error, match=message):
        vllm_engine(checkpoint, "auto", *arguments).open_scorer(checkpoint, scoring_of(checkpoint, 4), 64)


def test_an_architecture_that_vllm_does_not_know_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=1)).save_pretrained(
        tmp_path
    )
    checkpoint = open_checkpoint(str(tmp_path))
    with pytest.raises(ModelError, match=r"vLLM cannot run it: .*OpenAIGPT"):
        vllm_engine(checkpoint).open_scorer(checkpoint, scoring_of(checkpoint, 4), 64)


def test_more_ids_than_vllm_gives_by_default(tiny: Callable[[int], Path]) -> None:
    checkpoint = open_checkpoint(str(tiny(60)))
    sequences = random_sequences(512, (5, 9))
    scoring = scoring_of(checkpoint, 128)
    engine = replace(vllm_engine(checkpoint), head_dtype="float32")
    rows = top_k(engine.open_scorer(checkpoint, scoring, 64), sequences, 128)
    assert_rows_agree(rows, top_k(HF.open_scorer(checkpoint, scoring, 64), sequences, 128), 1e-5)
