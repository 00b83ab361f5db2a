"""The student in training: decoder, the rows that count, loss head."""

from types import MethodType

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adpa.kernels.head import HeadLosses, distill_head
from adpa.pipeline.lm_head import check_head, hidden_states, read_head


def attach_distill_head(model: PreTrainedModel) -> None:
    """Makes ``model(**batch)`` give the weighted loss and its parts instead of logits.

    The batch has the tensors of ``adpa.data.batches.make_collator`` and, instead of ``role``, the three per-row
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
    hidden_ND = hidden_states(model, input_ids, attention_mask)[predicts]
    head = read_head(model)
    weight_VD, bias_V = head.weight, head.bias
    if torch.is_autocast_enabled(hidden_ND.device.type):
        dtype = torch.get_autocast_dtype(hidden_ND.device.type)
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    return distill_head(
        hidden_ND,
        weight_VD,
        bias=bias_V,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        **rows,  # type: ignore[arg-type]
    )
