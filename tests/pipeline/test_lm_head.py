"""Decoder and head run apart give the model's own logits, for every kind of head that is supported."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from adpa.errors import ModelError
from adpa.pipeline.lm_head import check_head, hidden_states, read_head

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS = {
    "plain": LlamaConfig(**SMALL),
    "tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "bias": PhiConfig(**(SMALL | {"num_key_value_heads": 4})),
    "softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "logit scale": CohereConfig(**SMALL, logit_scale=0.3),
    "logits scaling": GraniteConfig(**SMALL, logits_scaling=7.0),
    "another family": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5),
}


def build(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_give_the_models_logits(name: str) -> None:
    model = build(CONFIGS[name])
    check_head(model)
    input_ids = torch.randint(3, 96, (3, 11))
    mask = torch.ones_like(input_ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        whole = model(input_ids=input_ids, attention_mask=mask).logits
        parts = read_head(model).logits(hidden_states(model, input_ids, mask))
    torch.testing.assert_close(parts[mask.bool()], whole[mask.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "softcap", "scale"), [("softcap", 3.0, 1.0), ("logits scaling", None, 1 / 7)])
def test_what_the_head_does_is_read_from_the_configuration(name: str, softcap: float | None, scale: float) -> None:
    head = read_head(build(CONFIGS[name]))
    assert head.softcap == softcap
    assert head.logit_scale == pytest.approx(scale)


def test_a_head_that_does_something_else_is_refused_by_name() -> None:
    class TemperatureLlama(LlamaForCausalLM):
        def forward(self, *arguments, **options):  # type: ignore[no-untyped-def]
            output = super().forward(*arguments, **options)
            output.logits = output.logits / 0.7
            return output

    with pytest.raises(ModelError, match="TemperatureLlama"):
        check_head(TemperatureLlama(CONFIGS["plain"]))


def test_a_small_difference_is_refused_in_bfloat16_too() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *arguments, **options):  # type: ignore[no-untyped-def]
            output = super().forward(*arguments, **options)
            output.logits = output.logits * 0.9
            return output

    with pytest.raises(ModelError, match="Scaled"):
        check_head(Scaled(CONFIGS["plain"]).bfloat16())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_head_passes_the_check_in_bfloat16(name: str) -> None:
    check_head(build(CONFIGS[name]).bfloat16())


def test_the_check_leaves_a_model_in_training_mode() -> None:
    model = build(CONFIGS["plain"]).train()
    check_head(model)
    assert model.training
