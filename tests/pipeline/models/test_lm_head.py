"""Decoder and head, run separately, give the model's own logits for every supported kind of head."""

import copy
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
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
from adpa.pipeline.models.lm_head import FLOAT32_PRODUCTS, LmHead, check_head, hidden_states, read_head

CPU = torch.device("cpu")
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
    own = copy.deepcopy(config)  # preparing a model changes it
    model: PreTrainedModel = AutoModelForCausalLM.from_config(own).eval()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("products")
def test_logits_in_float32_are_those_of_float64_from_the_same_factors(name: str, dtype: torch.dtype) -> None:
    head = read_head(build(CONFIGS[name])).to(CPU, dtype)
    hidden_Cd = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        found_CV, expected_CV = head.float32_logits(hidden_Cd), head.to(CPU, torch.float64).logits(hidden_Cd.double())
    assert found_CV.dtype == torch.float32
    torch.testing.assert_close(found_CV.double(), expected_CV, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_process_that_allows_less_than_float32_keeps_its_settings_and_loses_no_digits(
    dtype: torch.dtype, products: list[tuple[torch.dtype, dict[str, object]]]
) -> None:
    matmul = torch.backends.cuda.matmul
    names = [*FLOAT32_PRODUCTS, *(f"allow_{number}_reduced_precision_reduction_split_k" for number in ("fp16", "bf16"))]
    initial = {name: getattr(matmul, name) for name in names}

    def settings() -> dict[str, object]:
        return {name: getattr(matmul, name) for name in names}

    head = read_head(build(CONFIGS["plain"])).to(CPU, dtype)
    try:
        matmul.fp32_precision = "tf32"
        matmul.allow_fp16_accumulation = True
        matmul.allow_bf16_reduced_precision_reduction = (False, False)
        before = settings()
        head.float32_logits(torch.ones(2, 32, dtype=dtype))
        assert products == [(dtype, FLOAT32_PRODUCTS)]
        assert settings() == before
        with pytest.raises(RuntimeError):
            head.float32_logits(torch.ones(2, 31, dtype=dtype))
        assert settings() == before
    finally:
        matmul.fp32_precision = initial["fp32_precision"]
        matmul.allow_fp16_accumulation = False
        matmul.allow_bf16_reduced_precision_reduction = True
    assert settings() == initial


def test_a_scale_of_one_multiplies_nothing() -> None:
    head, hidden_Cd = read_head(build(CONFIGS["plain"])), torch.randn(5, 32)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
        head.float32_logits(hidden_Cd)
    assert {event.key for event in profiler.key_averages()} & {"aten::mul", "aten::mul_", "aten::add_"} == set()


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
def test_a_head_knows_which_dtypes_have_its_numbers(dtype: torch.dtype, exact: bool) -> None:
    head = LmHead(torch.tensor([[1.0, 2.0**-100]]), torch.tensor([0.5]), None, 1.0)
    assert head.is_exact_in(dtype) == exact
    in_bias = LmHead(head.weight[:, :1], head.weight[0, 1:], None, 1.0)
    assert in_bias.is_exact_in(dtype) == exact


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
