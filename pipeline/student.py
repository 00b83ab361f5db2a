"""The student in training: decoder, the rows that count, loss head."""

from dataclasses import replace
from types import MethodType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adpa.kernels.head import HeadLosses, distill_head
from adpa.kernels.student_statistics import StudentStatistics, student_statistics
from adpa.pipeline.lm_head import LmHead, check_head, hidden_states, read_head


def attach_distill_head(model: PreTrainedModel) -> None:
    """Makes ``model(**batch)`` give the weighted loss and its parts instead of logits.

    The batch has the tensors of ``adpa.data.batches.collate`` and, instead of ``role``, the three per-row
    weights of ``distill_head``. It stays a method of the model, so that whatever wraps a model's forward (mixed
    precision, data parallelism, gradient checkpointing) works as it does for any other model.

    Raises:
        ModelError: the model's head does something that adpa does not support.
    """
    check_head(model)
    model.forward = MethodType(_forward, model)


def _forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    predicts: Tensor,
    **rows: Tensor,
) -> tuple[Tensor, HeadLosses]:
    hidden_ND, head = _hidden_and_head(model, input_ids, attention_mask, predicts)
    return distill_head(
        hidden_ND,
        head.weight,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        **rows,  # type: ignore[arg-type]
    )


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    predicts: Tensor,
    topk_ids: Tensor,
    teacher_logprobs: Tensor,
    advantages: Tensor,
) -> StudentStatistics:
    """The statistics of the rows of a batch, whose tensors are those of ``adpa.data.batches.collate``.

    Dropout is off meanwhile, so that no random number is drawn.
    """
    training = model.training
    model.eval()
    hidden_ND, head = _hidden_and_head(model, input_ids, attention_mask, predicts)
    model.train(training)
    return student_statistics(
        hidden_ND,
        head.weight,
        topk_ids,
        teacher_logprobs,
        advantages,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


def _hidden_and_head(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, predicts: Tensor
) -> tuple[Tensor, LmHead]:
    """The hidden states [N, d] of the rows that count, and the head, both in the dtype of autocast where it is on."""
    hidden_ND = hidden_states(model, input_ids, attention_mask)[predicts]
    head = read_head(model)
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND = hidden_ND.to(dtype)
        bias = None if head.bias is None else head.bias.to(dtype)
        head = replace(head, weight=head.weight.to(dtype), bias=bias)
    return hidden_ND, head
