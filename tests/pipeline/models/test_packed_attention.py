"""A packed row has the results of its sequences alone: attention against its definition, models against themselves.

Both ways: piece by piece, and at once, where the reference stands in for torch's function, which only a GPU has.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pipeline.conftest import SMALL, AtOnce, synthetic
from tests.pipeline.models.test_lm_head import CONFIGS, build
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
    Qwen3Config,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from adpa.data.batches import pad_sequences
from adpa.data.packing import pack_sequences
from adpa.errors import ModelError
from adpa.pipeline.models.lm_head import hidden_states
from adpa.pipeline.models.packed_attention import (
    Mask,
    Row,
    allow_packing,
    packed_attention,
    packed_hidden_states,
    packed_mask,
    sdpa_is_plain,
)
from adpa.pipeline.models.varlen_attention import varlen_reference

WAYS = ("by pieces", "at once")

PROMPTS = st.lists(st.lists(st.integers(3, 95), min_size=1, max_size=9), min_size=1, max_size=3)
RESPONSES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=6)


def make_mask(
    length: int, sees: Any = causal_mask_function, window: int | None = None, plain: bool = True, own: str = "sdpa"
) -> Mask:
    """The mask as transformers calls for it."""
    return packed_mask(
        own=own,
        batch_size=1,
        q_length=99,
        kv_length=length,
        attention_mask=torch.ones(1, length),
        mask_function=sees,
        allow_is_causal_skip=plain,
        local_size=window,
        dtype=torch.float64,
    )


@settings(max_examples=90, deadline=None, derandomize=True)
@given(
    PROMPTS,
    RESPONSES,
    st.booleans(),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from(["at once", "sdpa", "eager"]),
    st.sampled_from([None, 1, 2, 5]),
)
def test_attention_of_any_layout_is_its_definition(
    prompts: list[list[int]],
    responses: list[tuple[int, int]],
    share: bool,
    heads: tuple[int, int],
    way: str,
    window: int | None,
) -> None:
    """Values and gradients, float64, with as many heads for keys as for queries, and with fewer."""
    packed = pack_sequences(
        [synthetic(prompts[which % len(prompts)], [5] * count) for which, count in responses], share
    )
    tokens, width, own = packed.input_ids.shape[1], 6, "sdpa" if way == "at once" else way
    generator = torch.Generator().manual_seed(tokens)
    config = LlamaConfig(hidden_size=24, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=width)
    shapes = [(1, count, tokens, width) for count in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    query, key, value = inputs
    upstream = torch.randn(1, tokens, heads[0], width, generator=generator, dtype=torch.float64)

    sees = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    mask = make_mask(max(packed.lengths.keys), sees, window, own=own)
    row = Row(packed.query_starts, packed.key_starts, packed.key_places, packed.lengths)
    layer, options = LlamaAttention(config, 0), dict[str, Any](scaling=0.3, sliding_window=window)
    with pytest.MonkeyPatch.context() as patch:
        if way == "at once":
            patch.setattr("adpa.pipeline.models.packed_attention.compared_varlen", lambda *_: varlen_reference)
            patch.setattr("adpa.pipeline.models.packed_attention.attend_by_pieces", None)
        actual, _ = packed_attention(layer, query, key, value, mask, row=row, own=own, **options)
    expected = torch.zeros_like(actual)
    query_HTD, key_HTD, value_HTD = (each[0].repeat_interleave(heads[0] // each.shape[1], 0) for each in inputs)
    for queries, places in zip(packed.lengths.queries, packed.key_places.split(packed.lengths.keys), strict=True):
        scores = 0.3 * query_HTD[:, places] @ key_HTD[:, places].transpose(1, 2)
        seen = torch.ones(len(places), len(places), dtype=torch.bool).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(2)
        expected[0, places[-queries:]] = (weights @ value_HTD[:, places]).transpose(0, 1)[-queries:]

    tolerance = 1e-5 if own == "eager" else 1e-12  # its softmax is float32
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    gradients = (torch.autograd.grad((each * upstream).sum(), inputs) for each in (actual, expected))
    for gradient, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=tolerance, atol=tolerance)


CHUNKS = chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int64))


def test_a_mask_is_computed_at_once_only_if_it_is_causal_or_slides_as_the_layer_says() -> None:
    sliding = sliding_window_causal_mask_function
    assert make_mask(9).varlen_window(None) == (-1, 0)
    assert make_mask(9).varlen_window(3) == (-1, 0)  # the mask is what counts
    assert make_mask(9, sliding(3), 3).varlen_window(3) == (2, 0)
    assert make_mask(5000, sliding(4096), 4096).varlen_window(4096) == (4095, 0)
    assert make_mask(3, sliding(4), 4).varlen_window(4) == (-1, 0)  # no sequence is as long as the window
    assert make_mask(2, CHUNKS, 3).varlen_window(None) == (-1, 0)
    others = {
        "the layer says another width": make_mask(9, sliding(3), 3).varlen_window(4),
        "the layer says nothing": make_mask(9, sliding(3), 3).varlen_window(None),
        "one wider than it is called": make_mask(9, sliding(4), 3).varlen_window(3),
        "one narrower": make_mask(9, sliding(2), 3).varlen_window(3),
        "chunks": make_mask(9, CHUNKS, 3).varlen_window(3),
        "something on top": make_mask(9, or_masks(causal_mask_function, CHUNKS), plain=False).varlen_window(None),
        "all see all": make_mask(9, bidirectional_mask_function, plain=False).varlen_window(None),
    }
    assert others == dict.fromkeys(others)


def test_options_that_only_the_models_own_attention_has_keep_a_layer_from_being_computed_at_once() -> None:
    layer = LlamaAttention(LlamaConfig(**SMALL), 0)
    assert sdpa_is_plain(layer, {})
    assert sdpa_is_plain(layer, {"dropout": 0.0, "scaling": 0.3, "sliding_window": 3, "softcap": None})
    tensor = torch.ones(4)
    for option in ({"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": tensor}, {"position_bias": tensor}):
        assert not sdpa_is_plain(layer, option)
    assert not sdpa_is_plain(layer, {"is_causal": False})
    layer.is_causal = False
    assert not sdpa_is_plain(layer, {})
    assert sdpa_is_plain(layer, {"is_causal": True})


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
    "windows and norms of queries": Qwen3Config(
        **WINDOW, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"]
    ),
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


# Their attention is eager, or has a softcap.
PIECES_ALONE = {"softcap", "eager, with a softcap", "eager, with sinks"}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_hidden_states_and_the_gradient_of_padded_sequences(
    name: str, checkpointing: bool, at_once: AtOnce
) -> None:
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
    for way in WAYS:
        calls = at_once() if way == "at once" else []
        for share_prompts in (False, True):
            actual = decoded(model, share_prompts)
            assert (actual - padded).norm() < tolerance * padded.norm()
            assert (gradient(model, actual) - expected).norm() < tolerance * expected.norm()
    passes = 2 * (2 if checkpointing else 1)  # packed in two ways, and computed again for the backward pass
    assert len(calls) == (0 if name in PIECES_ALONE else passes * model.config.get_text_config().num_hidden_layers)


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("plain", [(-1, 0), (-1, 0)]),
        ("a window in every layer", [(2, 0), (2, 0)]),
        ("windows in some layers", [(2, 0), (-1, 0)]),
        ("windows and norms of queries", [(-1, 0), (2, 0)]),
    ],
)
def test_a_window_of_w_tokens_is_w_minus_one_before_the_own_one(
    name: str, windows: list[tuple[int, int]], at_once: AtOnce
) -> None:
    model = build(MODELS[name])
    allow_packing(model)
    calls = at_once()
    decoded(model, True)
    assert [call["window_size"] for call in calls] == windows
    assert all(call["enable_gqa"] and call["scale"] is not None for call in calls)


def test_dropout_of_attention_is_left_to_the_models_own_function(at_once: AtOnce) -> None:
    model = build(LlamaConfig(**SMALL, attention_dropout=0.5))
    allow_packing(model)
    calls = at_once()
    decoded(model.train(), True)
    assert not calls
    decoded(model.eval(), True)
    assert len(calls) == 2


@pytest.mark.parametrize("share_prompts", [False, True])
def test_autocast_casts_for_variable_length_attention_as_for_sdpa(share_prompts: bool, at_once: AtOnce) -> None:
    """Rotations and norms make queries and keys float32 under it, while values are bfloat16."""
    model = build(MODELS["windows and norms of queries"])
    allow_packing(model)
    exact = decoded(model, share_prompts)
    errors = []
    for way in WAYS:
        calls = at_once() if way == "at once" else []
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((decoded(model, share_prompts) - exact).norm() / exact.norm())
    assert [call["dtypes"] for call in calls] == [{torch.bfloat16}] * 2
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("way", ["varlen_attn", "pieces"])
@pytest.mark.parametrize("name", ["a window in every layer", "windows in some layers", "another family"])
def test_the_host_reads_nothing_from_the_device(
    name: str, way: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device without numbers, from which nothing can be read, has torch's own function, forward and backward."""
    from torch.nn.attention.varlen import varlen_attn

    model = build(MODELS[name])
    allow_packing(model)
    torch.nn.Module.to(model, "meta", torch.bfloat16)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # there even this call fails
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    for dropout in (module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        dropout.p = 0.0
    if way == "varlen_attn":
        monkeypatch.setattr("adpa.pipeline.models.packed_attention.compared_varlen", lambda *_: varlen_attn)
        monkeypatch.setattr("adpa.pipeline.models.packed_attention.attend_by_pieces", None)
    for share_prompts in (False, True):
        packed = vars(pack_sequences(SEQUENCES, share_prompts).to(torch.device("meta")))
        decoder = {name: each for name, each in packed.items() if name not in ("predicts", "labels")}
        hidden = packed_hidden_states(model, **decoder)
        assert hidden.shape == (*packed["input_ids"].shape, 32)
        hidden.sum().backward()


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
