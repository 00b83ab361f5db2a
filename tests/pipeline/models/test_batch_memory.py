"""The estimate of a batch's size: it leaves enough memory for a model, and keeps its limits."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.memory import peak_bytes
from tests.pipeline.conftest import SAMPLING, SMALL, synthetic
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from adpa.data.cache.samples import SampleRequest
from adpa.pipeline.models.batch_memory import (
    DRAWING_BYTES,
    FIXED_TOKENS,
    MOST_SAMPLING_TOKENS,
    MOST_SCORING_TOKENS,
    activation_bytes,
    cache_bytes,
    sampling_tokens,
    scoring_tokens,
)
from adpa.pipeline.options import ModelName
from adpa.pipeline.scoring.engine import HfEngine
from adpa.pipeline.scoring.hf_sampler import sample
from adpa.pipeline.scoring.hf_scorer import HfDecoder

GB = 10**9
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@dataclass(frozen=True)
class Large:
    """A checkpoint as the rule sees it."""

    config: PretrainedConfig
    weights: int
    attn_implementation: str | None = None

    def weight_bytes(self, dtype: str) -> int:
        return self.weights


QWEN_7B = Qwen2Config(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152_064,
)  # fmt: skip
QWEN_HALF_B = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151_936,
)  # fmt: skip
TEACHER: Any = Large(QWEN_7B, 15 * GB)
STUDENT: Any = Large(QWEN_HALF_B, GB)


def test_on_a_gpu_of_80_gb_batches_are_no_longer_a_handful_of_sequences() -> None:
    assert scoring_tokens(TEACHER, "bfloat16", 80 * GB) == MOST_SCORING_TOKENS
    assert sampling_tokens(STUDENT, "bfloat16", 80 * GB, 512, 1.0) == MOST_SAMPLING_TOKENS
    assert sampling_tokens(TEACHER, "bfloat16", 80 * GB, 512, 1.0) // 2048 > 32


def test_a_batch_shrinks_with_the_memory_that_the_weights_leave_and_never_below_that_of_a_cpu() -> None:
    for tokens in (
        [scoring_tokens(TEACHER, "bfloat16", free * GB) for free in (16, 20, 24, 30, 40)],
        [sampling_tokens(TEACHER, "bfloat16", free * GB, 512, 0.9) for free in (16, 20, 24, 30, 40)],
    ):
        assert tokens == sorted(tokens)
        assert tokens[0] == FIXED_TOKENS < tokens[-1]
    assert scoring_tokens(TEACHER, "bfloat16", 10 * GB) == FIXED_TOKENS


@pytest.mark.parametrize("free", [20, 24, 48, 80])
def test_what_is_planned_takes_half_of_the_free_memory_at_most(free: int) -> None:
    room = (free - 15) * GB
    if (tokens := scoring_tokens(TEACHER, "bfloat16", free * GB)) > FIXED_TOKENS:
        assert tokens * activation_bytes(QWEN_7B, 2) <= room / 2
    responses = sampling_tokens(TEACHER, "bfloat16", free * GB, 512, 0.9) / 512  # with prompts of no tokens
    if responses * 512 > FIXED_TOKENS:
        assert responses * (512 * cache_bytes(QWEN_7B, 2) + 96 * QWEN_7B.vocab_size) <= room / 2


def test_short_responses_make_room_for_the_drawing_of_each() -> None:
    tokens = [sampling_tokens(STUDENT, "bfloat16", 24 * GB, length, 0.9) for length in (1, 16, 256)]
    assert tokens == sorted(tokens)
    assert tokens[1] / 16 * 96 * QWEN_HALF_B.vocab_size <= 23 / 2 * GB


def test_sizes_that_a_configuration_leaves_open_or_has_for_each_layer() -> None:
    assert cache_bytes(LlamaConfig(**SMALL), 4) == 2 * 4 * 8 * (2 * 4 + 4)
    assert cache_bytes(Qwen3Config(**SMALL | {"num_key_value_heads": 1}, head_dim=64), 2) == 2 * 2 * 64 * (2 * 1 + 4)
    assert activation_bytes(LlamaConfig(**SMALL), 2) == 2 * (16 * 32 + 4 * 48)
    assert activation_bytes(GPT2Config(n_embd=32, n_layer=2, n_head=4), 2) == 2 * (16 * 32 + 4 * 4 * 32)
    assert cache_bytes(GPT2Config(n_embd=32, n_layer=2, n_head=4), 2) == 2 * 2 * 8 * (2 * 4 + 4)
    several = Gemma3nTextConfig(hidden_size=32, intermediate_size=[48, 96], num_hidden_layers=2)
    assert activation_bytes(several, 2) == 2 * (16 * 32 + 4 * 96)


def test_a_model_whose_sdpa_the_user_does_not_take_keeps_them_too() -> None:
    assert scoring_tokens(replace(TEACHER, attn_implementation="eager"), "bfloat16", 80 * GB) == FIXED_TOKENS
    assert scoring_tokens(replace(TEACHER, attn_implementation="sdpa"), "bfloat16", 80 * GB) == MOST_SCORING_TOKENS


def test_a_model_without_sdpa_keeps_the_batches_of_a_cpu() -> None:
    """Its attention scores take memory in the square of a sequence's length."""
    eager: Any = Large(GptOssConfig(), 40 * GB)
    assert scoring_tokens(eager, "bfloat16", 80 * GB) == FIXED_TOKENS
    assert sampling_tokens(eager, "bfloat16", 80 * GB, 512, 1.0) == FIXED_TOKENS


def test_batches_follow_a_gpu_and_every_model_that_shares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adpa.pipeline.scoring.engine.free_memory", {GPU: 24 * GB}.__getitem__)
    engine = HfEngine(GPU, "")
    both: dict[ModelName, str] = {"teacher": "bfloat16", "reference": "float32"}
    alone = engine.scoring_tokens({"teacher": TEACHER}, both)
    assert alone == scoring_tokens(TEACHER, "bfloat16", 24 * GB)
    assert engine.scoring_tokens({"teacher": STUDENT, "reference": TEACHER}, both) < alone
    expected = sampling_tokens(STUDENT, "bfloat16", 24 * GB, 99, 0.9)
    assert engine.sampling_tokens(STUDENT, "bfloat16", 99, 0.9) == expected > FIXED_TOKENS


def test_on_a_cpu_batches_are_what_they_were() -> None:
    engine = HfEngine(CPU, "")
    assert engine.scoring_tokens({"teacher": TEACHER}, {"teacher": "float32"}) == 8192
    assert engine.sampling_tokens(STUDENT, "float32", 512, 1.0) == 8192


WIDE = LlamaConfig(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
    vocab_size=4096, initializer_range=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(WIDE)
    return torch.nn.Module.to(model.eval(), torch.bfloat16)


def test_a_forward_pass_needs_no_more_than_was_estimated(wide: PreTrainedModel) -> None:
    sequences = [synthetic(range(3, 3 + 40 + n), range(5, 60)) for n in range(8)]
    tokens = 8 * max(map(len, sequences))
    needed = peak_bytes(lambda: next(HfDecoder(wide).response_hidden([sequences])))
    assert needed <= tokens * activation_bytes(WIDE, 2)


@pytest.mark.parametrize(("prompt", "new"), [(100, 4), (4, 24)])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling_needs_no_more_than_was_estimated(prompt: int, new: int, top_p: float, wide: PreTrainedModel) -> None:
    settings = replace(SAMPLING, turn_end=0, max_new_tokens=new, top_p=top_p)
    requests = [SampleRequest(np.arange(3, 3 + prompt - n % 2, dtype=np.int32), n) for n in range(16)]
    tokens = 16 * (prompt + new)
    drawing = DRAWING_BYTES[top_p < 1] * WIDE.vocab_size * 16
    needed = peak_bytes(lambda: sample(wide, settings, requests))
    assert needed <= tokens * cache_bytes(WIDE, 2) + max(tokens * activation_bytes(WIDE, 2), drawing)
