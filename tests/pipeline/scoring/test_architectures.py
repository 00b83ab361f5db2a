"""In a batch every architecture samples and scores what it does one by one, or the batch is divided."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.pipeline.conftest import SAMPLING, SMALL, save_random, synthetic
from transformers import (
    BloomConfig,
    FalconConfig,
    FalconMambaConfig,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from adpa.data.cache.samples import SampleRequest
from adpa.errors import ModelError
from adpa.pipeline.scoring.hf_sampler import HfSampler
from adpa.pipeline.scoring.hf_scorer import open_hf_scorer

CPU = torch.device("cpu")
HYBRID: dict[str, Any] = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
STATE: dict[str, Any] = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}

# Learned positions, ALiBi, windows, experts, attention sinks, states, convolutions, linear attention.
PADDED: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "bloom": lambda: BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: FalconConfig(**STATE, num_attention_heads=4, alibi=True, new_decoder_architecture=False),
    "mpt": lambda: MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=3),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "gpt-oss": lambda: GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, sliding_window=4),
    "jamba": lambda: JambaConfig(
        **SMALL,
        num_experts=4,
        mamba_d_state=4,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "falcon mamba": lambda: FalconMambaConfig(**STATE, state_size=4, time_step_rank=4),
    "mamba 2": lambda: Mamba2Config(**STATE, state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "lfm2": lambda: Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "qwen3-next": lambda: Qwen3NextConfig(**SMALL, **HYBRID),
}
# Sampling ignores padding: in transformers 5, RWKV even takes the last sequence's state for all.
DIVIDED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "rwkv": (lambda: RwkvConfig(**STATE, attention_hidden_size=32, context_length=64), "one sequence at a time"),
}


def requests() -> list[SampleRequest]:
    """Ten prompts of up to eight tokens."""
    generator = np.random.default_rng(0)
    lengths = (3, 1, 3, 8, 5, 1, 2, 7, 3, 8)
    return [SampleRequest(generator.integers(3, 96, length).astype(np.int32), 0) for length in lengths]


def own_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("adpa.")]


def assert_samples_like_single_prompts(config: PretrainedConfig, folder: Path) -> None:
    sampler = HfSampler(save_random(config, folder), replace(SAMPLING, max_new_tokens=6), CPU)
    wanted = requests()
    (together,) = sampler.sample([wanted])
    alone = [answer for (answer,) in sampler.sample([[request] for request in wanted])]
    assert [answer.tolist() for answer in together] == [answer.tolist() for answer in alone]
    assert len({tuple(answer) for answer in together}) >= 8, "they differ"


@pytest.mark.parametrize("name", PADDED)
def test_a_padded_batch_samples_what_single_prompts_do(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "adpa"):
        assert_samples_like_single_prompts(PADDED[name](), tmp_path)
    assert not own_warnings(caplog)


@pytest.mark.parametrize("name", DIVIDED)
def test_a_model_that_ignores_padding_samples_the_same_and_says_how(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_config, how = DIVIDED[name]
    with caplog.at_level(logging.WARNING, "adpa"):
        assert_samples_like_single_prompts(make_config(), tmp_path)
    (message,) = own_warnings(caplog)
    assert message.startswith(f"{type(make_config()).__name__.removesuffix('Config')}ForCausalLM has other numbers")
    assert message.endswith(f"it takes {how}, and more time")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [32, 64])
def test_a_model_that_takes_a_prompt_for_the_next_token_of_the_one_before_is_refused(
    width: int, dtype: str, tmp_path: Path
) -> None:
    """RecurrentGemma keeps its state, and a prompt of one token continues it, in a batch and alone."""
    changes = {"num_hidden_layers": 3, "hidden_size": width}
    config = RecurrentGemmaConfig(**SMALL | changes, lru_width=width, attention_window_size=16)
    with pytest.raises(ModelError, match="RecurrentGemmaForCausalLM: token by token it has other logits"):
        HfSampler(save_random(config, tmp_path), replace(SAMPLING, dtype=dtype), CPU)


@pytest.mark.parametrize("name", [*PADDED, "rwkv"])
def test_a_padded_batch_is_scored_like_single_sequences(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_config = PADDED.get(name) or DIVIDED[name][0]
    scorer = open_hf_scorer(save_random(make_config(), tmp_path), "float32", CPU)
    batch = [synthetic(request.prompt_ids, [7, 9, 11][: 1 + place % 3]) for place, request in enumerate(requests())]
    (together,) = scorer.top_k([batch], 5)
    alone = [row for (row,) in scorer.top_k([[sequence] for sequence in batch], 5)]
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_array_equal(found.topk_ids, expected.topk_ids)
        np.testing.assert_allclose(found.topk_logprobs, expected.topk_logprobs, atol=2e-4)
        np.testing.assert_allclose(found.token_logprobs, expected.token_logprobs, atol=2e-4)
    assert not own_warnings(caplog)


def test_a_model_that_sees_later_tokens_cannot_be_sampled_token_by_token(tmp_path: Path) -> None:
    checkpoint = save_random(LlamaConfig(**SMALL | {"is_causal": False}), tmp_path)
    with pytest.raises(ModelError, match="LlamaForCausalLM: token by token it has other logits"):
        HfSampler(checkpoint, SAMPLING, CPU)
