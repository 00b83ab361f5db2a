"""Without its padding mask a decoder gives what it gives with it, and one that would not keeps the mask."""

import copy
from typing import Any

import pytest
import torch
from tests.pipeline.conftest import Filled, synthetic
from tests.pipeline.models.test_lm_head import SMALL, build
from tests.pipeline.models.test_packed_attention import MODELS, WINDOW
from tests.pipeline.training.test_student import gradient_error
from tests.pipeline.training.test_trainer import one_step, relative_error
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from adpa.data.batches import pad_sequences
from adpa.pipeline.models.attention_mask import WITHOUT_PADDING, leave_out_padding_mask, same_hidden_states
from adpa.pipeline.models.lm_head import hidden_states

# Padded in both parts of a batch, and longer than the windows.
PADDED = pad_sequences(
    [synthetic([5, 6, 7, 8], [9, 10, 11, 12, 13]), synthetic([14], [15, 16]), synthetic([17, 18, 19], [20, 21, 22])]
)


def compute(model: PreTrainedModel) -> Tensor:
    """Hidden states that count, [N, d], and their gradient in the model's parameters."""
    hidden_Nd = hidden_states(model, PADDED.input_ids, PADDED.attention_mask).flatten(0, 1)[PADDED.predicts]
    hidden_Nd.square().sum().backward()
    return hidden_Nd.detach()


@pytest.mark.parametrize("name", [name for name in MODELS if "eager" not in name])
def test_hidden_states_and_gradient_are_those_with_the_mask(name: str) -> None:
    model, exact = build(copy.deepcopy(MODELS[name])), build(copy.deepcopy(MODELS[name])).double()
    leave_out_padding_mask(model)
    assert model.config._attn_implementation == WITHOUT_PADDING
    torch.testing.assert_close(compute(model).double(), compute(exact), rtol=1e-5, atol=1e-5)
    assert gradient_error(model, exact) < 1e-5


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of every call of torch's attention."""
    seen: list[dict[str, Any]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append(options | {"key": key.shape})
        return attention(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen


def test_full_attention_has_no_mask_and_repeats_no_key(calls: list[dict[str, Any]]) -> None:
    model = build(LlamaConfig(**SMALL))
    leave_out_padding_mask(model)
    calls.clear()
    compute(model)
    assert len(calls) == SMALL["num_hidden_layers"]
    for options in calls:
        assert (options["attn_mask"], options["is_causal"], options["enable_gqa"]) == (None, True, True)
        assert options["key"][1] == SMALL["num_key_value_heads"]


def test_a_window_keeps_its_mask(calls: list[dict[str, Any]]) -> None:
    model = build(MistralConfig(**WINDOW))
    leave_out_padding_mask(model)
    calls.clear()
    compute(model)
    ones = torch.ones(9, 9, dtype=torch.bool)
    for options in calls:
        assert torch.equal(options["attn_mask"], (ones.tril() & ones.triu(-2)).expand(3, 1, 9, 9))


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SMALL | {"is_causal": False}), LlamaConfig(**SMALL | {"attn_implementation": "eager"})],
    ids=["every token sees padding", "eager"],
)
def test_a_model_that_is_not_causal_or_not_sdpa_stays_as_it_is(config: PretrainedConfig) -> None:
    model = build(config)
    own, expected = model.config._attn_implementation, compute(model)
    leave_out_padding_mask(model)
    assert model.config._attn_implementation == own
    assert torch.equal(compute(model), expected)
    assert not model.training


def test_layers_in_4_bits_are_held_to_the_digits_of_their_products() -> None:
    model, expected = build(LlamaConfig(**SMALL)), torch.linspace(-1, 1, 50)
    nearly = expected + 5e-3
    assert same_hidden_states(model, expected + 1e-6, expected)
    assert not same_hidden_states(model, nearly, expected)
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    assert same_hidden_states(model, nearly, expected)
    assert not same_hidden_states(model, expected + 0.1, expected)


def test_a_step_of_training_is_the_one_with_masks(
    few_words: Filled, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, gradient = one_step(few_words, tmp_path / "without", objective="dckd")
    monkeypatch.setattr("adpa.pipeline.training.run.leave_out_padding_mask", lambda _: None)
    masked, expected = one_step(few_words, tmp_path / "with", objective="dckd")
    assert report.first_loss == pytest.approx(masked.first_loss, rel=1e-5)
    assert relative_error(gradient, expected) < 1e-5


def test_what_is_saved_does_not_know_of_it(few_words: Filled, tmp_path: Any) -> None:
    one_step(few_words, tmp_path, objective="sft")
    assert WITHOUT_PADDING not in (tmp_path / "config.json").read_text()
