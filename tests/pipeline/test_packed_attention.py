"""A packed row gives what its sequences give alone: attention against its definition, models against themselves."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pipeline import test_lm_head
from tests.pipeline.conftest import SMALL, synthetic
from tests.pipeline.test_lm_head import CONFIGS
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from adpa.data.batches import pad_sequences
from adpa.data.packing import pack_sequences
from adpa.errors import ModelError
from adpa.pipeline.lm_head import hidden_states
from adpa.pipeline.packed_attention import (
    allow_packing,
    make_pieces,
    packed_attention,
    packed_hidden_states,
    packed_mask,
)

PROMPTS = st.lists(st.lists(st.integers(3, 95), min_size=1, max_size=9), min_size=1, max_size=3)
RESPONSES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(PROMPTS, RESPONSES, st.booleans(), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.sampled_from(["sdpa", "eager"]))
def test_attention_of_any_layout_is_its_definition(
    prompts: list[list[int]], responses: list[tuple[int, int]], share: bool, heads: tuple[int, int], own: str
) -> None:
    """Values and gradients, float64, with as many heads for keys as for queries, and with fewer."""
    packed = pack_sequences(
        [synthetic(prompts[which % len(prompts)], [5] * count) for which, count in responses], share
    )
    tokens, width = packed.input_ids.shape[1], 6
    generator = torch.Generator().manual_seed(tokens)
    config = LlamaConfig(hidden_size=24, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=width)
    shapes = [(1, count, tokens, width) for count in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    query, key, value = inputs
    upstream = torch.randn(1, tokens, heads[0], width, generator=generator, dtype=torch.float64)
    longest = int(packed.key_lengths.max())

    mask = packed_mask(
        own=own,
        batch_size=1,
        q_length=tokens,
        kv_length=longest,
        attention_mask=torch.ones(1, longest),
        allow_is_causal_skip=True,
        dtype=torch.float64,
    )
    pieces = make_pieces(packed.query_lengths, packed.key_lengths, packed.key_places)
    found, _ = packed_attention(LlamaAttention(config, 0), query, key, value, mask, pieces=pieces, own=own, scaling=0.3)
    expected = torch.zeros_like(found)
    query_HTD, key_HTD, value_HTD = (each[0].repeat_interleave(heads[0] // each.shape[1], 0) for each in inputs)
    for queries, places in zip(packed.query_lengths, packed.key_places.split(packed.key_lengths.tolist()), strict=True):
        scores = 0.3 * query_HTD[:, places] @ key_HTD[:, places].transpose(1, 2)
        seen = torch.ones(len(places), len(places), dtype=torch.bool).tril()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(2)
        expected[0, places[-queries:]] = (weights @ value_HTD[:, places]).transpose(0, 1)[-queries:]

    tolerance = 1e-12 if own == "sdpa" else 1e-5  # its softmax is float32
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    gradients = (torch.autograd.grad((each * upstream).sum(), inputs) for each in (found, expected))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)


def with_attention(name: str, config: PretrainedConfig) -> PretrainedConfig:
    config._attn_implementation = name
    return config


WINDOW: dict[str, Any] = SMALL | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 3,
    "initializer_range": 0.5,
}
MODELS: dict[str, PretrainedConfig] = {
    **CONFIGS,
    "a window in every layer": MistralConfig(**WINDOW),
    "windows in some layers": Gemma3TextConfig(**WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "no positions in some layers": Cohere2Config(**WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "eager, with a softcap": with_attention("eager", Gemma2Config(**WINDOW, attn_logit_softcapping=2.0)),
    "eager, with sinks": with_attention("eager", GptOssConfig(**WINDOW, num_local_experts=4)),
}
# Odd lengths, prompts and responses of one token, a prompt of several responses, one that differs in its last token.
SEQUENCES = [
    synthetic(prompt, response)
    for prompt, response in [
        ([5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16]),
        ([5, 6, 7, 8, 9, 10, 11], [17]),
        ([5, 6, 7, 8, 9, 10, 11], [12, 13, 18]),
        ([5, 6, 7, 8, 9, 10, 12], [12, 13]),
        ([20], [21]),
        ([20], [22, 23, 24, 25, 26, 27, 28]),
        ([30, 31], [32, 33, 34]),
    ]
]


def build(config: PretrainedConfig) -> PreTrainedModel:
    return test_lm_head.build(copy.deepcopy(config))  # preparing a model changes its configuration


def decoded(model: PreTrainedModel, share_prompts: bool | None) -> Tensor:
    """Hidden states [N, d] that predict response tokens, padded if `share_prompts` is None."""
    if share_prompts is None:
        padded = pad_sequences(SEQUENCES)
        return hidden_states(model, padded.input_ids, padded.attention_mask).flatten(0, 1)[padded.predicts]
    packed = pack_sequences(SEQUENCES, share_prompts)
    decoder = {name: tensor for name, tensor in vars(packed).items() if name not in ("predicts", "labels")}
    return packed_hidden_states(model, **decoder)[0, packed.predicts]


def gradient(model: PreTrainedModel, hidden_Nd: Tensor) -> Tensor:
    """Of a weighted sum of hidden states, in all parameters."""
    weights = torch.linspace(-1, 1, hidden_Nd.numel(), dtype=hidden_Nd.dtype).view_as(hidden_Nd)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((hidden_Nd * weights).sum(), parameters, allow_unused=True)
    return torch.cat([each.flatten() for each in gradients if each is not None])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_hidden_states_and_the_gradient_of_padded_sequences(name: str, checkpointing: bool) -> None:
    config = copy.deepcopy(MODELS[name])
    for dropout in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):  # of GPT-2; the others have none
        setattr(config, dropout, 0.0)
    # Models whose attention is eager put what is not seen at the least number, which must be one of float32.
    double = config._attn_implementation != "eager"
    model = build(config).train()
    torch.nn.Module.to(model, torch.float64 if double else torch.float32)
    tolerance = (
        1e-6 if double else 1e-5
    )  # norms are float32 in transformers, and so are its eager softmax and rotations
    padded = decoded(model, None)
    expected = gradient(model, padded)
    allow_packing(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for share_prompts in (False, True):
        found = decoded(model, share_prompts)
        assert (found - padded).norm() < tolerance * padded.norm()
        assert (gradient(model, found) - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_passes_the_check_in_bfloat16_and_stays_in_its_mode(name: str) -> None:
    model = build(MODELS[name]).bfloat16().train()
    allow_packing(model)
    assert model.training


REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "a convolution": (
        Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        "Lfm2ForCausalLM cannot be given packed sequences: its hidden states are not those of padded ones",
    ),
    "no positions": (BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), "Bloom.*: it takes no positions"),
    "attention of its own": (
        FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
        "FalconForCausalLM cannot be given packed sequences: it fails on them",
    ),
    "another attention": (
        with_attention("flex_attention", LlamaConfig(**SMALL)),
        "Llama.*: its attention is flex_attention; expected sdpa or eager",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_mixes_packed_sequences_is_refused(name: str) -> None:
    config, message = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=message) as caught:
        allow_packing(AutoModelForCausalLM.from_config(config))
    assert str(caught.value).endswith("leave out --packing")


def test_a_saved_model_knows_nothing_of_packing(tmp_path: Any) -> None:
    model = build(CONFIGS["plain"])
    allow_packing(model)
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.from_numpy(np.arange(3, 9))[None]
    with torch.no_grad():
        assert loaded(input_ids=ids).logits.isfinite().all()
