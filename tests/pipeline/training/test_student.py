"""The student's loss and gradient, for every kind of head, against its own dense logits."""

import copy
from typing import Any

import pytest
import torch
from tests.pipeline.models.test_lm_head import CONFIGS, build
from torch import Tensor
from transformers import PreTrainedModel

from adpa.kernels import reference
from adpa.kernels.head import HeadLosses
from adpa.pipeline.training.student import attach_distill_head

VOCABULARY, TOP_K = 96, 5


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_are_those_of_the_models_own_logits(name: str) -> None:
    student = build(CONFIGS[name])
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(input_ids)
    mask[2, 6:] = 0
    predicts = (mask.bool() & (torch.arange(9) >= 3)).flatten().nonzero().squeeze(1)
    rows = len(predicts)
    teacher = torch.randn(rows, VOCABULARY, generator=generator).log_softmax(1)
    logprobs, ids = teacher.topk(TOP_K)
    targets: dict[str, Any] = {
        "labels": torch.randint(VOCABULARY, (rows,), generator=generator),
        "topk_ids": ids,
        "teacher_logprobs": logprobs,
        "tail_logprob": (1 - logprobs.exp().sum(1)).log(),
        "advantages": torch.randn(rows, TOP_K, generator=generator),
        **{f"{term}_weight": torch.rand(rows, generator=generator) for term in ("nll", "kl", "advantage")},
    }

    def naive(model: PreTrainedModel) -> tuple[Tensor, HeadLosses]:
        """The definition on dense logits; the identity stands for a head, because the model's own is in them."""
        logits = model(input_ids=input_ids, attention_mask=mask).logits.flatten(0, 1)[predicts]
        return reference.distill_head(logits, torch.eye(VOCABULARY, dtype=logits.dtype), **targets)

    float32, float64 = copy.deepcopy(student), copy.deepcopy(student).double()
    attach_distill_head(student)
    loss, parts = student(input_ids=input_ids, attention_mask=mask, predicts=predicts, **targets)
    expected, expected_parts = naive(float64)
    for total in (loss, expected, naive(float32)[0]):
        total.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(parts.kl.double(), expected_parts.kl, rtol=1e-4, atol=1e-5)
    assert gradient_error(student, float64) <= 1.5 * gradient_error(float32, float64) + 1e-6


def gradient_error(model: PreTrainedModel, exact: PreTrainedModel) -> float:
    """Relative error of the gradient of all parameters."""
    gradients = {name: parameter.grad for name, parameter in exact.named_parameters()}
    difference = size = 0.0
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        assert (parameter.grad is None) == (expected is None), name
        if parameter.grad is not None and expected is not None:
            difference += float((parameter.grad.double() - expected).square().sum())
            size += float(expected.square().sum())
    return float((difference / size) ** 0.5)
